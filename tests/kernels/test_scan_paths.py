"""Scan paths that are lists of positions: the built-in ones, and scans along them."""

import functools
import gc
import io
import weakref
from types import SimpleNamespace

import comparison
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmvmamba_kernels import (
    BackendError,
    path_lists,
    patterns,
    register_pattern,
    scan_paths,
    selective_scan_2d,
    selective_scan_2d_norm,
)
from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.dispatch import Problem, choose
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments
from mmvmamba_kernels.testing import (
    listed_paths,
    output_and_gradients,
    relative_error,
    selective_scan_2d_arguments,
    selective_scan_2d_norm_arguments,
    selective_scan_2d_oracle,
)

# As the tests of the reference and of the C++ backend have them.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.05 * 2**-8}

PATTERNS = ["snake", "diagonal", "hilbert", "window2", "window3", "atrous2", "atrous3"]
MAPS = [(1, 1), (1, 7), (6, 1), (4, 4), (5, 8), (9, 6)]


def lists(pattern, height, width):
    """The positions that each direction visits, from the function itself."""
    found = patterns.pattern_paths(pattern, patterns.find_listed(pattern), height, width)
    return [[p for p in path if p >= 0] for path in found.tolist()]


def arguments(pattern, height, width, channels=5, rank=2, states=1, batch=2, **options):
    directions = patterns.count_directions("test", pattern)
    sizes = (batch, height, width, channels, rank, states)
    return selective_scan_2d_arguments(*sizes, directions, **options)


def check(args, orders, backend, tolerance, **options):
    """Output and gradients against the loop along the paths."""
    comparison.compare(
        functools.partial(selective_scan_2d, backend=backend, **options),
        functools.partial(selective_scan_2d_oracle, orders=[[order] for order in orders]),
        args,
        tolerance,
    )


@pytest.mark.parametrize("size", MAPS, ids=str)
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "hilbert"])
def test_the_order_is_the_loops(pattern, size):
    assert lists(pattern, *size) == listed_paths(pattern, *size)


def test_the_hilbert_curve_goes_to_neighbours():
    for height in range(1, 14):
        for width in range(1, 14):
            paths = scan_paths.hilbert(height, width)
            places = torch.stack((paths // width, paths % width), -1)
            steps = places.diff(dim=1).abs()
            assert steps.numel() == 0 or steps.amax() == 1
            # At most one is diagonal.
            assert (steps.sum(-1) > 1).sum(1).max() <= (0 if height % 2 == width % 2 == 0 else 1)
            assert torch.equal(paths[2:], paths[:2].flip(1))


def test_the_hilbert_curve_is_hilberts_on_a_square():
    def place(d, side):
        """Row and column of the position d of the curve, bit by bit."""
        row = column = 0
        scale = 1
        while scale < side:
            turn, up = 1 & (d // 2), 1 & (d ^ (d // 2))
            if not up:
                if turn:
                    row, column = scale - 1 - row, scale - 1 - column
                row, column = column, row
            row, column = row + scale * turn, column + scale * up
            d //= 4
            scale *= 2
        return row, column

    curve = [row * 16 + column for row, column in (place(d, 16) for d in range(256))]
    transposed = [p % 16 * 16 + p // 16 for p in curve]
    assert sorted(scan_paths.hilbert(16, 16)[:2].tolist()) == sorted([curve, transposed])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_output_and_gradients(pattern, backend):
    args = arguments(pattern, 5, 8, states=2, dtype=torch.float64)
    check(args, lists(pattern, 5, 8), backend, TOLERANCE[torch.float64], pattern=pattern)


@pytest.mark.parametrize("pattern", ["hilbert", "atrous2"])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_more_positions_than_a_chunk_or_one(pattern, backend):
    for size in ((19, 23), (1, 1), (1, 3)):
        args = arguments(pattern, *size, channels=3)
        check(args, lists(pattern, *size), backend, TOLERANCE[torch.float32], pattern=pattern)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_bfloat16_rounds_only_the_result(backend):
    for pattern in ("snake", "atrous2"):
        args = arguments(pattern, 5, 6, dtype=torch.bfloat16)
        check(args, lists(pattern, 5, 6), backend, TOLERANCE[torch.bfloat16], pattern=pattern)


OWN = {
    "permutations": torch.stack([torch.arange(20) * step % 20 for step in (3, 7, 11)]),
    "parts": torch.tensor([[7, 3, 11, 19, -1], [0, 1, 2, 3, 4], [5, -1, -1, -1, -1]]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("paths", OWN.values(), ids=list(OWN))
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_paths_of_ones_own(paths, dtype, backend):
    args = selective_scan_2d_arguments(2, 4, 5, 3, 2, 2, len(paths), dtype=torch.float64)
    orders = [[p for p in path if p >= 0] for path in paths.tolist()]
    # Not contiguous.
    paths = torch.stack((paths, paths), -1).to(dtype)[..., 1]
    check(args, orders, backend, TOLERANCE[torch.float64], paths=paths)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_paths_that_go_nowhere(backend):
    args = selective_scan_2d_arguments(1, 2, 3, 2, 1, 2, 1)
    paths = torch.full((1, 5), -1)
    found = output_and_gradients(
        functools.partial(selective_scan_2d, paths=paths, backend=backend), args
    )
    assert all((t == 0).all() for t in found.values())


def test_lists_of_the_cross_scan_are_the_cross_scan():
    rows = torch.arange(35).view(5, 7)
    paths = torch.stack((rows.flatten(), rows.t().flatten()))
    paths = torch.cat((paths, paths.flip(1)))
    args = selective_scan_2d_arguments(2, 5, 7, 20, 3, 2)
    scan = functools.partial(selective_scan_2d, backend="cpp")
    expected = output_and_gradients(scan, args)
    actual = output_and_gradients(functools.partial(scan, paths=paths), args)
    # The C++ backend finds reversed positions either way, and does the same with them.
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_with_a_normalisation():
    sizes = (2, 4, 5, 6, 2, 1, 4)
    args = selective_scan_2d_norm_arguments(*sizes)
    norm = {name: args[name] for name in ("norm_weight", "norm_bias")}
    rest = {name: t for name, t in args.items() if name not in norm}
    for options in ({"pattern": "snake"}, {"paths": scan_paths.snake(4, 5)}):
        y = selective_scan_2d(**rest, **options)
        expected = torch.nn.functional.layer_norm(y, (6,), *norm.values())
        assert relative_error(selective_scan_2d_norm(**args, **options), expected) < 1e-5


def test_operations_are_counted_along_the_paths():
    args = {name: t.detach() for name, t in arguments("atrous2", 5, 7).items()}
    with FlopCounterMode(display=False) as counter:
        selective_scan_2d(**args, pattern="atrous2")
        selective_scan_2d(**args, paths=scan_paths.snake(5, 7)[:, :6])
    # Batch 2, K 4, D 5, and 9 N + 1 a step.
    assert counter.get_total_flops() == 2 * 4 * 5 * 10 * (3 * 4 + 6)


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (torch.zeros(4, 20), TypeError, "must be a tensor of int32 or int64, got torch.float32"),
        ([[0, 1]], TypeError, "paths must be a tensor of int32 or int64, got list"),
        (torch.arange(21)[None], ValueError, r"with L = H \* W = 20, or fewer .* shape \(1, 21\)"),
        (torch.arange(20), ValueError, r"paths must be \(K, L\) .* got shape \(20,\)"),
        (torch.zeros(4, 20, dtype=torch.int32, device="meta"), ValueError, "paths is on meta but"),
        (torch.arange(20).expand(3, 20), ValueError, r"dt_weight must be \(K, D, R\) with 3 paths"),
        (
            torch.arange(20).expand(4, 20) + 1,
            ValueError,
            "over a 4 x 5 map: path 0 must be a permutation of the 20 positions .* and has 20",
        ),
        (torch.zeros(4, 20).long(), ValueError, "path 0 must be a permutation .* 0 more than once"),
        (torch.tensor([[2, -1, 3]] * 4), ValueError, "path 0 .* then nothing but -1, and has 3"),
        (torch.tensor([[0, 1], [2, -3], [4, 5], [6, 7]]), ValueError, "path 1 .* and has -3"),
        (torch.tensor([[0, 1], [2, 2], [4, 5], [6, 7]]), ValueError, "path 1 .* 2 more than once"),
    ],
)  # fmt: skip
def test_wrong_paths_are_named(paths, error, message):
    args = {name: t.detach() for name, t in arguments("snake", 4, 5).items()}
    with pytest.raises(error, match=message):
        selective_scan_2d(**args, paths=paths)


def test_paths_are_looked_at_when_they_are_new_or_changed(monkeypatch):
    args = {name: t.detach() for name, t in arguments("snake", 4, 5).items()}
    looked = []
    monkeypatch.setattr(
        path_lists,
        "check_positions",
        lambda *a, **o: looked.append(1) or patterns.check_positions(*a, **o),
    )
    paths = scan_paths.snake(4, 5)
    first = selective_scan_2d(**args, paths=paths)
    assert torch.equal(selective_scan_2d(**args, paths=paths), first)
    assert len(looked) == 1
    paths.copy_(scan_paths.diagonal(4, 5))
    expected = selective_scan_2d(**args, pattern="diagonal")
    assert torch.equal(selective_scan_2d(**args, paths=paths), expected)
    paths[0, 0] = paths[0, 1]
    with pytest.raises(ValueError, match="more than once"):
        selective_scan_2d(**args, paths=paths)


def test_lists_of_a_pattern_are_made_once_for_a_size(monkeypatch):
    made = []

    def spiral(height, width):
        made.append((height, width))
        return [list(range(height * width))]

    monkeypatch.setattr(patterns, "_listed", dict(patterns._listed))
    register_pattern("test_once", spiral)
    register_pattern("test_once", spiral)
    args = arguments("test_once", 3, 4)
    for _ in range(2):
        output_and_gradients(functools.partial(selective_scan_2d, pattern="test_once"), args)
    assert made.count((3, 4)) == 1


@pytest.mark.parametrize("capturing", [False, True])
def test_lists_that_a_graph_captured_stay(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(path_lists, "_captured", {})
    x = SimpleNamespace(is_cuda=True, device=torch.device("cpu"))
    table = weakref.ref(path_lists.of_pattern("snake", 3, 2, x).table)
    path_lists._of_pattern.cache_clear()
    path_lists._make.cache_clear()
    gc.collect()
    assert (table() is not None) == capturing


def test_patterns_are_checked_where_they_are_registered():
    with pytest.raises(ValueError, match="the scan pattern 'window5' is registered already"):
        register_pattern("window5", scan_paths.snake)
    with pytest.raises(ValueError, match="the scan pattern 'cascade2d' is registered already"):
        register_pattern("cascade2d", scan_paths.snake)
    with pytest.raises(ValueError, match="<lambda> cannot be found by name in another process"):
        patterns.name_pattern(lambda h, w: scan_paths.snake(w, h))
    with pytest.raises(ValueError, match=r"'bad' over a 8 x 8 map must be \(K, 64\) integers, got"):
        register_pattern("bad", lambda h, w: scan_paths.snake(h, w)[:, 1:])
    with pytest.raises(ValueError, match="path 2 must be a permutation of the 64 positions"):
        register_pattern("bad", lambda h, w: [[*range(64)], [*range(64)], [0] * 64])
    args = {name: t.detach() for name, t in arguments("snake", 4, 5).items()}
    register_pattern("test_rows", lambda h, w: [list(range(h * w))] * min(h, 4))
    with pytest.raises(ValueError, match="gives 3 paths over a 3 x 5 map and 4 over others"):
        selective_scan_2d(
            **{n: t[:, :3] if n in ("x", "proj") else t for n, t in args.items()},
            pattern="test_rows",
        )
    with pytest.raises(ValueError, match=r"pattern must be one of .*hilbert.*window\{n\}.*'bad'"):
        selective_scan_2d(**args, pattern="bad")


def test_cuda_kernels_give_way(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda _: None)
    monkeypatch.setattr(extension, "_no_kernels_for", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    problem = Problem(torch.device("cuda"), torch.float32, 1, 1, listed=True)
    with pytest.raises(BackendError, match="no code for paths that are lists of positions"):
        choose("selective_scan_2d", "cpp", problem)


def test_opcheck():
    args = tuple(arguments("atrous2", 3, 4, channels=2).values())
    operator = torch.ops.mmvmamba.selective_scan_2d.default
    torch.library.opcheck(operator, (*args, scan_paths.snake(3, 4), "cross2d", "cpp", True))
    # Compiled with dynamic sizes below.
    for backend in ("reference", "cpp"):
        torch.library.opcheck(
            operator,
            (*args, None, "atrous2", backend, True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_compiles_without_graph_break():
    def scan(paths, **tensors):
        along = selective_scan_2d(**tensors, pattern="hilbert", backend="cpp")
        return (
            along
            + selective_scan_2d(**tensors, paths=paths)
            + selective_scan_2d(**tensors, pattern="atrous2")
        )

    torch.compiler.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 7), (9, 4)):
        args = arguments("hilbert", *size)
        paths = scan_paths.snake(*size)
        expected, actual = (
            output_and_gradients(functools.partial(f, paths), args) for f in (scan, compiled)
        )
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    torch.compiler.reset()


def test_exported_programs_keep_paths():
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("paths", scan_paths.snake(4, 5))

        def forward(self, *tensors):
            return selective_scan_2d(*tensors, paths=self.paths) + selective_scan_2d(
                *tensors, pattern="hilbert"
            )

    tensors = tuple(t.detach() for t in arguments("snake", 4, 5).values())
    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), tensors), file)
    file.seek(0)
    program = torch.export.load(file).module()
    assert torch.equal(program(*tensors), Module()(*tensors))


def test_lists_without_values():
    """As rehearsals of launches for a GPU need them, where there is none."""
    with FakeTensorMode():
        x = torch.empty(1, 3, 7, 5, device="cuda")
        rest = (x,) * 5
        lists = Arguments(x, *rest, pattern="atrous2").lists()
        assert (lists.table.shape, lists.visited.shape) == ((4, 9), (4, 21))
        assert lists.table.device.type == "cuda"
        paths = torch.empty(2, 21, dtype=torch.int64, device="cuda")
        assert Arguments(x, *rest, paths=paths).lists().table.shape == (2, 22)
    assert Arguments(torch.empty(1, 3, 7, 5), *rest, pattern="atrous2").lists().table.is_cpu


def test_function_transforms():
    args = {name: t.detach() for name, t in arguments("atrous2", 3, 4, batch=3).items()}
    own = scan_paths.diagonal(3, 4)

    def loss(x, proj):
        tensors = args | {"x": x[None], "proj": proj[None]}
        y = selective_scan_2d(**tensors, pattern="atrous2")
        return (y * selective_scan_2d(**tensors, paths=own)).sum()

    grads = torch.func.vmap(torch.func.grad(loss))(args["x"], args["proj"])
    for i in range(3):
        expected = torch.func.grad(loss)(args["x"][i], args["proj"][i])
        x = args["x"][i].clone().requires_grad_()
        (plain,) = torch.autograd.grad(loss(x, args["proj"][i]), x)
        assert relative_error(grads[i], expected) < 1e-6
        assert relative_error(expected, plain) < 1e-6
