"""Times and memory: the scan's core at the shapes of a model, whole models beside their peers."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acceptance.operators import Case
from acceptance.run import LEFT_OUT, MET, MISSED, WRONG, Run, milliseconds, peak_bytes, tell
from mmvmamba_kernels import selective_scan_2d_norm

_FOLDER = Path(__file__).parent
_TARGETS = json.loads((_FOLDER / "targets.json").read_text())
_MODELLED = _FOLDER.parent / "gpu_model" / "predictions.json"


class Core:
    """The projection, the scans of four directions, their sum and its normalisation.

    Args:
        shape: Batch, height, width, channels.
        states: Of each channel.
        device: Where.
        backend: Of the scan.
    """

    def __init__(
        self, shape: Sequence[int], states: int, device: torch.device, backend: str | None
    ):
        batch, height, width, channels = shape
        rank = -(-channels // 16)
        sizes = (batch, height, width, channels, rank, states, 4)
        case = Case("selective_scan_2d_norm", sizes, torch.bfloat16, mixed=True)
        self.tensors = case.arguments(device)
        self.backend = backend
        self.weight = torch.randn(4, rank + 2 * states, channels, device=device) / channels**0.5
        self.weight = self.weight.bfloat16().requires_grad_()

    def scan(self, proj: Tensor) -> Tensor:
        """The core behind the projection."""
        return selective_scan_2d_norm(
            **{**self.tensors, "proj": proj}, out_dtype=torch.bfloat16, backend=self.backend
        )

    def forward(self) -> Tensor:
        """The whole core, without gradients."""
        with torch.no_grad():
            return self._whole()

    def _whole(self) -> Tensor:
        proj = F.linear(self.tensors["x"], self.weight.flatten(0, 1))
        return self.scan(proj.unflatten(-1, self.weight.shape[:2]))

    def both(self) -> tuple[Tensor, ...]:
        """The whole core and the gradients of all that it takes."""
        out = self._whole()
        leaves = {**self.tensors, "proj": self.weight}
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    def scan_forward(self) -> Tensor:
        with torch.no_grad():
            return self.scan(self.tensors["proj"])

    def scan_both(self) -> tuple[Tensor, ...]:
        out = self.scan(self.tensors["proj"])
        return torch.autograd.grad(out, list(self.tensors.values()), torch.ones_like(out))


def modelled(shape: str) -> list[float | None]:
    """What the model of GPU times says of a forward pass, and of both passes. Products are left
    out but for those of the low rank's gradient.
    """
    if not _MODELLED.exists():
        return [None, None]
    found = json.loads(_MODELLED.read_text()).get(shape, {})
    if not found:
        return [None, None]
    both = found["training forward"] + found["training backward"]
    return [found["inference forward"], round(both, 3)]


def time_core(run: Run) -> list[dict]:
    """The core at the shapes of VMamba-T, beside the targets and the modelled figures."""
    rows = []
    shapes = {k: v for k, v in _TARGETS["core"].items() if k != "about"}
    for text, asked in {"1,2,3,32": {}}.items() if run.tiny else shapes.items():
        if run.left <= 0:
            run.judge("core", text, LEFT_OUT)
            continue
        core = Core([int(n) for n in text.split(",")], 1, run.device, run.backend)
        row = {"shape": text, "official": asked.get("official"), "modelled": modelled(text)}
        row["whole"] = [milliseconds(f, run.device) for f in (core.forward, core.both)]
        row["scan"] = [milliseconds(f, run.device) for f in (core.scan_forward, core.scan_both)]
        rows.append(row)
        for i, name in enumerate(("forward", "forward and backward")):
            target = asked.get("target", (None, None))[i]
            run.compare("core", f"{text} {name}", row["whole"][i], target, "ms")
        tell(f"         of that scan and norm {row['scan']} ms, modelled {row['modelled']}")
        del core
    return rows


def time_states(run: Run) -> dict:
    """Sixteen states: times, and what the backward pass takes beside what it was given."""
    asked = _TARGETS["states"]
    shape, states = ([1, 2, 3, 8], 2) if run.tiny else (asked["shape"], asked["states"])
    core = Core(shape, states, run.device, run.backend)
    times = [milliseconds(f, run.device) for f in (core.scan_forward, core.scan_both)]
    for i, name in enumerate(("forward", "forward and backward")):
        target = None if run.tiny else asked["target"][i]
        run.compare("states", f"{states} states, {name}", times[i], target, "ms")
    out = core.scan(core.tensors["proj"])
    leaves, ones = list(core.tensors.values()), torch.ones_like(out)
    taken = peak_bytes(lambda: torch.autograd.grad(out, leaves, ones), run.device)
    maps = None
    if taken is not None:
        gradients = sum(tensor.nbytes for tensor in leaves)
        maps = (taken - gradients) / core.tensors["x"].nbytes
        run.compare("states", "temporary memory, maps of x", maps, asked["maps"], "maps")
    return {"shape": shape, "states": states, "ms": times, "temporary_maps": maps}


class Classifier(nn.Module):
    """VMamba with the head of the official models: norm, average over positions, linear layer."""

    def __init__(self, arch: str):
        super().__init__()
        from mmvmamba.models import VMamba
        from mmvmamba.models.layers import build_norm

        self.backbone = VMamba(arch, out_indices=(-1,), outnorm=False)
        channels = self.backbone.arch.dims[-1]
        self.norm = build_norm("ln", channels)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        (x,) = self.backbone(x)
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))


PEERS = ("swin-tiny", "convnext-tiny", "deit-small")


def _peer(name: str) -> Callable[[tuple[int, int]], nn.Module]:
    def build(size: tuple[int, int]) -> nn.Module:
        from mmvmamba.analysis.measured import NUM_CLASSES, build_of_timm
        from mmvmamba.analysis.measured import PEERS as LIBRARY

        return build_of_timm(LIBRARY[name][1], size, num_classes=NUM_CLASSES)

    return build


def _subjects(run: Run) -> list:
    from mmvmamba.analysis.measured import Subject

    peers = PEERS[:1] if run.tiny else PEERS
    found = [Subject("vmamba-tiny", lambda _: Classifier("tiny"), classifies=True)]
    if find_spec("timm"):
        found += [Subject(name, _peer(name), classifies=True) for name in peers]
    return found


def _modes(run: Run) -> Iterator[tuple[str, str, str]]:
    """Pass, precision and execution: what matters most first; compiling takes longest."""
    from mmvmamba.analysis.passes import PASSES, PRECISIONS

    if run.device.type != "cuda":
        # For a test of this run.
        yield "inference", "fp32", "eager"
        return
    order = ("autocast-bf16", "bf16", *(p for p in PRECISIONS if not p.endswith("bf16")))
    for executions in (("eager",), ("graph",), ("compiled", "compiled+graph")):
        for precision in order:
            for execution in executions:
                for passes in PASSES:
                    yield passes, precision, execution


def time_models(run: Run) -> list[dict]:
    """VMamba-T and its peers, every one in the same mode of the same run, until time is over."""
    from mmvmamba.analysis.passes import Case as Mode
    from mmvmamba.analysis.throughput import measure_case

    subjects = _subjects(run)
    if len(subjects) == 1:
        run.judge("models", "peers", LEFT_OUT, "timm is not installed")
    rows, left_out = [], []
    longest = defaultdict(float)
    for passes, precision, execution in _modes(run):
        batch, side = (2, 32) if run.tiny else (128, 224)
        case = Mode(passes, precision, batch, (side, side), execution)
        before = run.left
        if before <= longest[execution]:
            left_out.append(str(case))
            continue
        seconds, rounds = (0, 1) if run.tiny else (0.5, 2)
        found = measure_case(subjects, case, run.device, seconds, rounds)
        longest[execution] = max(longest[execution], before - run.left)
        rows += [_row(result) for result in found]
        _judge_models(run, case, found)
    if left_out:
        run.judge("models", "further modes", LEFT_OUT, "; ".join(left_out))
    return rows


def time_backbones(run: Run) -> list[dict]:
    """The backbone alone in bfloat16, at the sizes of detectors and segmentors."""
    from mmvmamba.analysis.measured import Subject
    from mmvmamba.analysis.passes import Case as Mode
    from mmvmamba.analysis.throughput import measure_case
    from mmvmamba.models import VMamba

    rows = []
    for asked in _TARGETS["backbones"][1:2] if run.tiny else _TARGETS["backbones"]:
        passes, execution = asked["passes"], asked["execution"]
        batch, *size = asked["shape"]
        if run.device.type != "cuda":
            execution, size = "eager", (32, 48)
        case = Mode(passes, "bf16", batch, tuple(size), execution)
        if run.left <= 0:
            run.judge("backbones", str(case), LEFT_OUT)
            continue
        subject = Subject("vmamba-tiny, backbone", lambda _: VMamba("tiny"))
        seconds, rounds = (0, 1) if run.tiny else (0.5, 2)
        (result,) = measure_case([subject], case, run.device, seconds, rounds)
        rows.append(_row(result))
        if result.failure:
            run.judge("backbones", str(case), WRONG, result.failure)
        else:
            target = None if run.tiny else asked["ms"]
            run.compare("backbones", str(case), result.seconds * 1e3, target, "ms")
    return rows


def _row(result) -> dict:
    row = asdict(result)
    row["case"] = result.case.row()
    return row


def _judge_models(run: Run, case, results: Sequence) -> None:
    ours, *peers = results
    for result in results:
        speed = result.failure or f"{result.images_per_second:.0f} images/s, {result.peak_gb} GB"
        tell(f"         models: {case}: {result.model}: {speed}")
        if result.failure:
            # A smaller GPU than the batch is for.
            verdict = LEFT_OUT if result.failure == "out of memory" else WRONG
            run.judge("models", f"{case}, {result.model}", verdict, result.failure)
    if ours.failure:
        return
    for peer in peers:
        target = _TARGETS["models"].get(peer.model)
        if target is None or peer.failure:
            continue
        ratio = ours.images_per_second / peer.images_per_second
        run.judge(
            "models",
            f"{case}, over {peer.model}",
            MET if ratio >= target else MISSED,
            f"{ratio:.2f} times",
            f"at least {target:g} times",
        )
    limit = _TARGETS["gigabytes"].get(case.passes)
    if limit and ours.peak_gb and case.execution == "eager" and case.precision == "autocast-bf16":
        run.compare("memory", str(case), ours.peak_gb, limit, "GB")


def check_compiling(run: Run) -> dict:
    """How many kernels VMamba-T has, how long they take, and that new sizes need no others."""
    from mmvmamba.models import VMamba
    from mmvmamba.models.precompile import MODES, Mode, kernels_of
    from mmvmamba_kernels.backends.triton.precompile import Target, cache_folder, compile_kernels

    target = Target.here() if run.device.type == "cuda" else Target.parse("sm_90")
    build = partial(VMamba.of_one_block_a_stage, "tiny")
    numbers, modes = {}, []
    for name, (dtype, autocast) in MODES.items():
        for training in (False,) if run.tiny else (False, True):
            mode = Mode(dtype, autocast, training)
            modes.append(mode)
            numbers[f"{name}, {'training' if training else 'inference'}"] = len(
                kernels_of(build, [mode], target)
            )
        if run.tiny:
            break
    for passes, limit in _TARGETS["kernels"].items():
        found = numbers.get(f"bf16, {passes}")
        if found is not None:
            run.compare("compiling", f"kernels in bf16, {passes}", found, limit, "kernels")
    if run.device.type != "cuda":
        return {"kernels": numbers}
    start = time.perf_counter()
    done = compile_kernels(kernels_of(build, modes, target), target)
    seconds = time.perf_counter() - start
    tell(f"         compiling: {done} kernels of all modes in {seconds:.0f} s")
    model = VMamba("tiny").to(run.device).train()
    _step(model, torch.randn(2, 3, 224, 224, device=run.device))
    before = len(os.listdir(cache_folder()))
    for size in ((2, 256, 320), (1, 800, 1333), (4, 512, 512), (64, 224, 224), (1, 480, 641)):
        _step(model, torch.randn(size[0], 3, *size[1:], device=run.device))
    new = len(os.listdir(cache_folder())) - before
    run.compare("compiling", "kernels that new sizes compile in training", new, 0, "kernels")
    return {"kernels": numbers, "compiled": done, "seconds": seconds, "new_sizes": new}


def _step(model: nn.Module, images: Tensor) -> None:
    with torch.autocast("cuda", torch.bfloat16):
        maps = model(images)
    sum(m.float().mean() for m in maps).backward()
