"""The operators: values against float64, repeats bit for bit, graphs, and PyTorch's TF32 switch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

import mmvmamba_kernels
from acceptance.run import LEFT_OUT, MET, WRONG, Run, captured, equal, tell
from mmvmamba_kernels.patterns import PATTERNS, count_directions
from mmvmamba_kernels.testing import ARGUMENTS, ORACLES, errors, output_and_gradients

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest difference over the largest value, of the output and of every gradient."""

WIDE = {
    "selective_scan_2d": ("dt_weight", "dt_bias", "A", "D"),
    "selective_scan_2d_norm": ("dt_weight", "dt_bias", "A", "D"),
    "selective_scan": ("A", "D", "delta_bias"),
    "state_space_dual": ("A", "D", "dt_bias"),
    "depthwise_conv": ("weight", "bias"),
    "add_layer_norm": ("weight", "bias"),
}
"""Parameters, float32 in a model whose maps are narrower."""


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        op: Its name.
        sizes: As the operator's random arguments take them.
        dtype: Of the maps.
        options: Of the call.
        mixed: Whether parameters are float32 at least.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    options: dict[str, object] = field(default_factory=dict)
    mixed: bool = False

    def __str__(self) -> str:
        options = "".join(f", {value}" for value in self.options.values())
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, self.sizes))
        return f"{self.op} {sizes} {dtype}{options}{', float32 parameters' * self.mixed}"

    def arguments(self, device: torch.device | str) -> dict[str, Tensor]:
        """Random ones, leaves that need gradients."""
        tensors = ARGUMENTS[self.op](*self.sizes, dtype=self.dtype, device=device)
        if self.mixed:
            for name in WIDE[self.op]:
                wide = torch.promote_types(self.dtype, torch.float32)
                tensors[name] = tensors[name].detach().to(wide).requires_grad_()
        return tensors

    def run(self, backend: str | None, **tensors: Tensor) -> Tensor:
        if self.op == "state_space_dual":
            # It has one.
            backend = "reference"
        function = getattr(mmvmamba_kernels, self.op)
        out = function(**tensors, **self.options, backend=backend)
        return out[1] if self.op == "add_layer_norm" else out

    def both(self, backend: str | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The output and all gradients."""
        return output_and_gradients(partial(self.run, backend), tensors)


def _scan(sizes: tuple[int, ...], dtype: torch.dtype, pattern: str = "cross2d", **options) -> Case:
    sizes = (*sizes, count_directions("acceptance", pattern))
    return Case("selective_scan_2d", sizes, dtype, {"pattern": pattern}, **options)


def _norm(case: Case) -> Case:
    return Case("selective_scan_2d_norm", case.sizes, case.dtype, case.options, case.mixed)


# Batch, height, width, channels, rank, states: positions that no group of 8 divides, one of a side,
# channels that no warp divides, two channels a lane, raw step sizes, several states.
_SIZES_2D = (
    (1, 1, 1, 1, 1, 1),
    (1, 1, 17, 33, 3, 1),
    (1, 17, 1, 33, 3, 1),
    (2, 13, 9, 96, 6, 1),
    (1, 14, 14, 384, 24, 1),
    (1, 7, 7, 768, 48, 1),
    (1, 5, 3, 32, 65, 1),
    (1, 9, 11, 64, 33, 2),
    (2, 7, 5, 40, 3, 3),
    (1, 7, 9, 48, 4, 16),
    (1, 5, 7, 33, 3, 64),
    # So many paths that none is cut.
    (600, 5, 7, 96, 6, 1),
    (600, 3, 5, 32, 2, 16),
)


def cases(tiny: bool = False) -> list[Case]:
    """Every operator, dtype and pattern, and odd sizes; a few of each kind if ``tiny``."""
    if tiny:
        return _tiny()
    # The last two are lists of positions: of the whole map, and of a part of it each.
    patterns = (*PATTERNS, "snake", "atrous2")
    found = [_scan((2, 5, 7, 40, 3, 1), dtype, pattern) for dtype in DTYPES for pattern in patterns]
    found.append(_scan((2, 13, 9, 96, 6, 16), torch.float32, "atrous2"))
    for sizes in _SIZES_2D:
        found.append(_scan(sizes, torch.float32))
        found.append(_scan(sizes, torch.bfloat16, mixed=True))
    found += [_scan(sizes, torch.float16, mixed=True) for sizes in _SIZES_2D[3:6]]
    for dtype in DTYPES:
        found.append(_norm(_scan((2, 13, 9, 96, 6, 1), dtype, mixed=True)))
        found.append(_norm(_scan((1, 7, 5, 192, 12, 1), dtype, mixed=True)))
        for sizes in ((2, 2, 33, 1, 67), (1, 1, 5, 16, 300), (1, 3, 2, 64, 9)):
            options = {"delta_softplus": True}
            found.append(Case("selective_scan", sizes, dtype, options, mixed=True))
        for act in ("silu", "gelu", "relu", "none"):
            found.append(Case("depthwise_conv", (2, 13, 9, 96), dtype, {"act": act}))
        for sizes in ((1, 7, 7, 768), (1, 5, 3, 33), (1, 1, 1, 1)):
            found.append(Case("depthwise_conv", sizes, dtype, {"act": "silu"}, mixed=True))
        for channels in (1, 33, 48, 96, 192, 384, 768, 1536):
            found.append(Case("add_layer_norm", (2, 5, 7, channels), dtype, mixed=True))
    found.append(Case("state_space_dual", (2, 4, 67, 3, 8, 16), torch.float32))
    return found


def _tiny() -> list[Case]:
    scans = [_scan((1, 2, 3, 2, 2, 1), torch.float32), _scan((1, 2, 3, 2, 1, 2), torch.bfloat16)]
    return [
        *scans,
        _scan((1, 2, 3, 2, 2, 1), torch.float16, "rows", mixed=True),
        # A norm of two channels keeps their signs alone, and its gradients cancel.
        _norm(_scan((1, 2, 3, 4, 2, 1), torch.float32)),
        Case("selective_scan", (1, 1, 2, 1, 9), torch.float64, {"delta_softplus": True}),
        Case("depthwise_conv", (1, 2, 3, 3), torch.float32, {"act": "silu"}, mixed=True),
        Case("add_layer_norm", (1, 2, 3, 96), torch.bfloat16, mixed=True),
        Case("state_space_dual", (1, 2, 9, 1, 2, 2), torch.float32),
    ]


def compile_cases(run: Run) -> dict:
    """Compiles what the following parts call, in parallel."""
    from torch._subclasses import FakeTensorMode

    from mmvmamba_kernels.backends.triton.precompile import Target, compile_kernels, recording

    target = Target.here()
    start = time.perf_counter()
    with recording(target) as kernels, FakeTensorMode():
        for case in (*cases(run.tiny), *large_cases(run.tiny)):
            tensors = case.arguments("cuda")
            case.run(run.backend, **tensors)
            with torch.no_grad():
                case.run(run.backend, **tensors)
    done = compile_kernels(kernels, target)
    seconds = time.perf_counter() - start
    tell(f"         prepare: {done} kernels of all cases compiled in {seconds:.0f} s")
    return {"kernels": done, "seconds": seconds}


def check_values(run: Run) -> list[dict]:
    """Outputs and gradients against the definitions, position by position in float64."""
    rows, kinds = [], {}
    for case in cases(run.tiny):
        kind = f"{case.op}, {str(case.dtype).removeprefix('torch.')}"
        if run.left <= 0:
            kinds.setdefault(kind, []).append((LEFT_OUT, str(case)))
            continue
        tensors = case.arguments(run.device)
        expected = output_and_gradients(partial(ORACLES[case.op], **case.options), tensors)
        found = errors(case.both(run.backend, tensors), expected)
        worst = max(found, key=found.get)
        right = found[worst] <= TOLERANCES[case.dtype]
        rows.append({"case": str(case), "error": found[worst], "of": worst, "right": right})
        text = f"{found[worst]:.1e} of {worst}, {case}"
        kinds.setdefault(kind, []).append((MET if right else WRONG, text))
    for kind, results in kinds.items():
        bad = [result for result in results if result[0] != MET]
        worst = bad[0] if bad else max(results, key=lambda r: float(r[1].split()[0]))
        number = f"{len(results) - len(bad)} of {len(results)}"
        run.judge("values", kind, worst[0], f"{number} right; largest error {worst[1]}")
    return rows


def large_cases(tiny: bool = False) -> Iterator[Case]:
    """What is repeated and captured: the sizes of a model."""
    if tiny:
        # The fastest in Triton's interpreter.
        yield next(case for case in _tiny() if case.op == "depthwise_conv")
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _norm(_scan((16, 28, 28, 192, 12, 1), dtype, mixed=True))
    yield _norm(_scan((64, 56, 56, 96, 6, 1), torch.bfloat16, mixed=True))
    yield _norm(_scan((1, 14, 14, 384, 24, 1), torch.bfloat16, mixed=True))
    yield _norm(_scan((4, 28, 28, 96, 6, 16), torch.bfloat16, mixed=True))
    yield Case("depthwise_conv", (64, 56, 56, 96), torch.bfloat16, {"act": "silu"}, mixed=True)
    yield Case("add_layer_norm", (64, 28, 28, 192), torch.bfloat16, mixed=True)
    yield Case("selective_scan", (4, 4, 96, 1, 3136), torch.bfloat16, {"delta_softplus": True})


REPEATS = 4


def check_repeats(run: Run) -> list[dict]:
    """The same call again gives the same bits."""
    rows = []
    for case in large_cases(run.tiny):
        tensors = case.arguments(run.device)
        first = case.both(run.backend, tensors)
        same = all(equal(first, case.both(run.backend, tensors)) for _ in range(REPEATS))
        rows.append({"case": str(case), "equal": same})
        run.judge("repeats", str(case), MET if same else WRONG, f"{REPEATS} repeats")
    return rows


def check_graphs(run: Run, capture: Callable = captured) -> list[dict]:
    """Captured calls, replayed on new values, against the same calls outside of graphs."""
    rows = []
    for case in large_cases(run.tiny):
        tensors = case.arguments(run.device)
        for name, function in (
            ("forward", lambda c=case, t=tensors: _forward(c, run.backend, t)),
            ("both passes", lambda c=case, t=tensors: _both(c, run.backend, t)),
        ):
            replay, outputs = capture(function)
            with torch.no_grad():
                for tensor in tensors.values():
                    # Still the kind of value that it was: rates stay negative.
                    tensor.mul_(0.75)
            replay()
            same = equal(outputs, function())
            rows.append({"case": str(case), "passes": name, "equal": same})
            run.judge("graphs", f"{case}, {name}", MET if same else WRONG)
    return rows


@torch.no_grad()
def _forward(case: Case, backend: str | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"out": case.run(backend, **tensors)}


def _both(case: Case, backend: str | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `Case.both`, and nothing comes from the CPU on the way, which a capture forbids."""
    out = case.run(backend, **tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out))
    return {"out": out.detach(), **dict(zip(tensors, grads, strict=True))}


def check_refusal(run: Run) -> dict:
    """A first call inside a capture, which would compile, is refused with what to do."""
    # Of sizes that nothing else in this run has.
    tensors = _scan((1, 3, 5, 56, 7, 5), torch.bfloat16).arguments(run.device)
    graph = torch.cuda.CUDAGraph()
    message = ""
    try:
        with torch.no_grad(), torch.cuda.graph(graph):
            mmvmamba_kernels.selective_scan_2d(**tensors, backend=run.backend)
    except RuntimeError as error:
        message = str(error.__context__ or error)
    right = "run the model once before the capture" in message
    run.judge("graphs", "a first call inside a capture", MET if right else WRONG, message[:200])
    return {"message": message}


def check_tf32(run: Run) -> dict:
    """PyTorch's setting for float32 products changes no bit of a float32 scan."""
    differing = {}
    for rank, channels in ((2, 8), (48, 64)) if run.tiny else ((24, 384), (48, 768), (65, 96)):
        batch, side = (1, 2) if run.tiny else (2, 14)
        case = _scan((batch, side, side, channels, rank, 1), torch.float32)
        tensors, found = case.arguments(run.device), []
        before = torch.get_float32_matmul_precision()
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            try:
                found.append(case.both(run.backend, tensors))
            finally:
                torch.set_float32_matmul_precision(before)
        differing[rank] = [n for n, t in found[0].items() if not torch.equal(t, found[1][n])]
    right = not any(differing.values())
    text = "" if right else f"differing gradients by rank: {differing}"
    run.judge("values", "TF32 changes nothing", MET if right else WRONG, text)
    return {str(rank): names for rank, names in differing.items()}
