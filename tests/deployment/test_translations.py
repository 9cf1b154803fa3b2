"""The operators' ONNX functions in both runtimes, against the kernels."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="the extra `deploy` is not installed")
pytest.importorskip("onnxscript", reason="the extra `deploy` is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra `deploy` is not installed")
openvino = pytest.importorskip("openvino", reason="the extra `deploy` is not installed")

from onnx.inliner import inline_local_functions  # noqa: E402

from mmvmamba.deployment import operators  # noqa: E402
from mmvmamba.deployment.export import OPSET  # noqa: E402
from mmvmamba_kernels import selective_scan, selective_scan_2d, state_space_dual  # noqa: E402

# Sums over a hundred positions in another order: a few units of the last place.
TOLERANCE = 1e-6


def run(nodes: list[tuple], feeds: dict[str, torch.Tensor], fixed: set[str]):
    """Runs function calls in both runtimes; all sizes are dynamic but those of `fixed`."""

    def info(name: str, tensor: torch.Tensor):
        integer = tensor.dtype == torch.int64
        kind = onnx.TensorProto.INT64 if integer else onnx.TensorProto.FLOAT
        whole = integer or name in fixed
        shape = [n if whole else f"{name}{i}" for i, n in enumerate(tensor.shape)]
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(f.name, a, b, domain="mmvmamba") for f, a, b in nodes],
        "scan",
        [info(name, tensor) for name, tensor in feeds.items()],
        [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)],
    )
    model = onnx.helper.make_model(
        graph,
        functions=[function.to_function_proto() for function in operators.functions()],
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid("mmvmamba", 1),
        ],
        ir_version=10,
    )
    arrays = {name: tensor.numpy() for name, tensor in feeds.items()}
    session = runtime.InferenceSession(model.SerializeToString())
    yield session.run(None, arrays)[0]
    plain = inline_local_functions(model).SerializeToString()
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    yield core.compile_model(core.read_model(plain, b""), "CPU", settings)(arrays)[0]


def check(found, expected: torch.Tensor) -> None:
    for result in found:
        assert np.isfinite(result).all()
        error = (torch.from_numpy(result) - expected).norm() / expected.norm()
        assert error <= TOLERANCE


@pytest.mark.parametrize(
    ("pattern", "states", "size"),
    [
        ("cross2d", 1, (7, 11)),
        ("cross2d", 3, (5, 2)),
        ("unidi", 1, (1, 9)),
        ("bidi", 2, (6, 6)),
    ],
)
def test_2d_scans_equal_the_kernels(pattern, states, size):
    torch.manual_seed(0)
    K, D, R = 4, 6, 2
    feeds = {
        "x": torch.randn(2, *size, D),
        "proj": torch.randn(2, *size, K, R + 2 * states),
        "weight": torch.randn(K, D, R),
        # Steps from 1e-3, which a plain softplus gets wrong by 1e-4, to ten.
        "bias": torch.linspace(-7, 10, K * D).view(K, D),
        "A": -torch.rand(K, D, states) - 0.1,
        "D": torch.randn(K, D),
    }
    sequences, merge = operators.PATTERNS[pattern]
    scan = operators.ScanOfOneState if states == 1 else operators.ScanOfStates
    nodes = [
        (sequences, ["x", "proj"], ["u", "p", "steps"]),
        (operators.Projections, ["p", "weight", "bias", "A"], ["raw", "B", "C"]),
        (scan, ["u", "raw", "A", "B", "C", "steps"], ["y"]),
        (merge, ["y", "x", "D"], ["out"]),
    ]
    check(run(nodes, feeds, set()), selective_scan_2d(*feeds.values(), pattern=pattern))


def test_scan_of_sequences_equals_the_kernels():
    torch.manual_seed(0)
    S, K, D, N, L = 3, 2, 4, 1, 9
    feeds = {
        "u": torch.randn(S, K * D, L),
        "delta": torch.randn(S, K * D, L),
        "A": -torch.rand(K * D, N),
        "B": torch.randn(S, K, N, L),
        "C": torch.randn(S, K, N, L),
        "D": torch.randn(K * D),
        "bias": torch.linspace(-7, 3, K * D),
    }
    parts = ["u_", "raw", "A_", "B_", "C_", "steps"]
    nodes = [
        (operators.GroupedSequences, ["u", "delta", "A", "B", "C", "bias"], parts),
        (operators.ScanOfOneState, parts, ["y"]),
        (operators.GroupedMerge, ["y", "u", "D"], ["out"]),
    ]
    expected = selective_scan(*feeds.values(), delta_softplus=True)
    check(run(nodes, feeds, set()), expected)


@pytest.mark.parametrize("length", [1, 70])
def test_state_space_dual_equals_the_kernel(length):
    torch.manual_seed(0)
    B, K, heads, P, N = 2, 4, 3, 2, 5
    feeds = {
        "x": torch.randn(B, K, length, heads, P),
        "dt": torch.randn(B, K, length, heads),
        "A": -torch.rand(K, heads) * 5,
        "B": torch.randn(B, K, length, N),
        "C": torch.randn(B, K, length, N),
        "D": torch.randn(K, heads, P),
        "bias": torch.linspace(-7, 3, K * heads).view(K, heads),
    }
    x, dt, A, b, c, D, bias = feeds.values()
    expected = state_space_dual(x, dt, A, b, c, D, dt_bias=bias)
    feeds["most"] = torch.tensor([32])
    nodes = [(operators.StateSpaceDual, list(feeds), ["out"])]
    check(run(nodes, feeds, {"x", "A"}), expected)
