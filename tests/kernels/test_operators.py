"""What every operator promises to PyTorch: schema, compilers, export, autograd, determinism."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba_kernels import (
    depthwise_conv,
    selective_scan,
    selective_scan_2d,
    state_space_dual,
)
from mmvmamba_kernels.testing import (
    depthwise_conv_arguments,
    output_and_gradients,
    relative_error,
    selective_scan_2d_arguments,
    selective_scan_arguments,
    state_space_dual_arguments,
)


class Case(NamedTuple):
    """One operator with small arguments of a given size."""

    function: Callable
    arguments: Callable
    options: tuple
    """The options of the registered operator, after its tensors."""
    flops: int
    """At size 5: of a scan 9 N L D a direction and L D for the skip, of a convolution two a
    weight."""


CASES = {
    "depthwise_conv": Case(
        # By itself it would be PyTorch's own operations on the CPU.
        functools.partial(depthwise_conv, backend="reference"),
        lambda size, **kwargs: depthwise_conv_arguments(2, size, size + 2, 3, **kwargs),
        ("silu",),
        2 * 35 * 3 * 2 * 9,
    ),
    "selective_scan": Case(
        functools.partial(selective_scan, delta_softplus=True),
        lambda size, **kwargs: selective_scan_arguments(2, 2, 3, 2, 10 * size, **kwargs),
        (True, torch.float32),
        2 * 6 * 50 * (9 * 2 + 1),
    ),
    "selective_scan_2d": Case(
        selective_scan_2d,
        lambda size, **kwargs: selective_scan_2d_arguments(2, size, size + 2, 3, 2, 2, **kwargs),
        (None, "cross2d"),
        2 * 4 * 35 * 3 * (9 * 2 + 1),
    ),
    "state_space_dual": Case(
        functools.partial(state_space_dual, chunk_size=16),
        lambda size, **kwargs: state_space_dual_arguments(2, 2, 10 * size, 2, 3, 4, **kwargs),
        (16,),
        2 * 2 * 50 * 6 * (9 * 4 + 1),
    ),
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture
def case(name):
    return CASES[name]


def test_opcheck(name, case):
    overload = getattr(torch.ops.mmvmamba, name).default
    args = tuple(case.arguments(5).values())
    torch.library.opcheck(overload, (*args, *case.options, "auto", True))
    plain = tuple(t.detach() for t in args)
    torch.library.opcheck(overload, (*plain, *case.options, "reference", False))


@pytest.mark.parametrize(
    ("name", "present"), [("depthwise_conv", 2), ("selective_scan", 5), ("state_space_dual", 5)]
)
def test_opcheck_with_absent_arguments(name, present):
    case = CASES[name]
    args = list(case.arguments(5).values())
    args[present:] = [None] * (len(args) - present)
    overload = getattr(torch.ops.mmvmamba, name).default
    torch.library.opcheck(overload, (*args, *case.options, "auto", True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(case, dynamic):
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in (5, 9) if dynamic else (5,):
        args = case.arguments(size)
        expected, actual = (output_and_gradients(f, args) for f in (case.function, compiled))
        assert all(torch.equal(actual[k], expected[k]) for k in expected)


@pytest.mark.slow  # test_inductor_trains_at_changing_sizes compiles the scan within a model.
def test_compiles_with_the_default_backend(tmp_path, monkeypatch):
    # The cache on disk does not know which backend was chosen when it was written.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Needs a C++ compiler, which inductor uses for the operations around the scan.
    pytest.importorskip("torch._inductor")
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"no C++ compiler for inductor: {error}")

    def around(**args):
        return selective_scan_2d(**{**args, "x": args["x"].sin()}).cos()

    args = CASES["selective_scan_2d"].arguments(5)
    expected = output_and_gradients(around, args)
    actual = output_and_gradients(torch.compile(around, fullgraph=True), args)
    assert max(relative_error(actual[k], expected[k]) for k in expected) < 1e-5


def test_exports_as_one_operator(name, case):
    class Module(torch.nn.Module):
        def forward(self, **args):
            return case.function(**args)

    args = {k: t.detach() for k, t in case.arguments(5).items()}
    program = torch.export.export(Module(), (), args)
    calls = [n.target for n in program.graph.nodes if "mmvmamba" in str(n.target)]
    assert calls == [getattr(torch.ops.mmvmamba, name).default]
    other = {k: t.detach() for k, t in case.arguments(5, seed=3).items()}
    assert torch.equal(program.module()(**other), case.function(**other))


def test_flop_counter_sees_the_scan(name, case):
    args = case.arguments(5)
    with FlopCounterMode(display=False) as counter:
        case.function(**args).sum().backward()
    counts = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    assert counts == {f"mmvmamba.{name}": case.flops, f"mmvmamba.{name}_backward": 2 * case.flops}


def test_flop_counter_leaves_out_an_absent_skip():
    args = CASES["selective_scan"].arguments(5)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**{**args, "D": None})
    assert counter.get_total_flops() == 2 * 6 * 50 * 9 * 2


def test_backward_is_deterministic(case):
    args = case.arguments(16)
    first = output_and_gradients(case.function, args)
    for _ in range(10):
        again = output_and_gradients(case.function, args)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_only_some_gradients(case):
    args = case.arguments(5)
    expected = output_and_gradients(case.function, args)
    for wanted in args:
        some = {k: t.detach().requires_grad_(k == wanted) for k, t in args.items()}
        out = case.function(**some)
        grad = torch.autograd.grad(out, some[wanted], torch.ones_like(out))[0]
        assert grad.shape == expected[wanted].shape
        assert grad.isfinite().all()


def test_double_backward_is_refused(name, case):
    args = case.arguments(5)
    first = next(iter(args.values()))
    (grad,) = torch.autograd.grad(case.function(**args).sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} can be differentiated only once"):
        grad.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, context):
    args = case.arguments(5)
    expected = case.function(**args)
    with context():
        out = case.function(**args)
    assert not out.requires_grad
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_reaches_nothing_inside(case, dtype):
    args = case.arguments(5)
    expected = output_and_gradients(case.function, args)
    with torch.autocast("cpu", dtype):
        actual = output_and_gradients(case.function, args)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def test_checkpointing_recomputes(case):
    args = case.arguments(5)
    expected = output_and_gradients(case.function, args)
    actual = output_and_gradients(
        lambda **a: torch.utils.checkpoint.checkpoint(case.function, use_reentrant=False, **a), args
    )
    assert all(torch.equal(actual[k], expected[k]) for k in expected)


def test_meta_tensors_have_a_shape(case):
    args = {k: t.detach().to("meta") for k, t in case.arguments(5).items()}
    assert case.function(**args).shape == next(iter(args.values())).shape


def test_sizes_beyond_32_bit_offsets_on_meta():
    args = {k: t.detach() for k, t in selective_scan_2d_arguments(1, 2, 2, 4, 1, 1).items()}
    args["x"] = torch.empty(1, 2**15, 2**15, 4, device="meta")
    args["proj"] = torch.empty(1, 2**15, 2**15, 4, 3, device="meta")
    args = {k: t.to("meta") for k, t in args.items()}
    assert selective_scan_2d(**args).numel() == 2**32


def test_readme_example_runs():
    readme = Path(__file__).parents[2] / "kernels" / "README.md"
    example = readme.read_text().split("```python")[1].split("```")[0]
    names = {}
    exec(compile(example, str(readme), "exec"), names)
    assert names["y"].shape == names["x"].shape
