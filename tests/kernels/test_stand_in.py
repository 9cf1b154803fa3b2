"""The stand-ins for other projects' modules: their calls against oracles, and who gets them."""

import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from comparison import compare, doubled

from mmvmamba_kernels import BackendError, selective_scan
from mmvmamba_kernels.testing import (
    errors,
    output_and_gradients,
    paths,
    relative_error,
    selective_scan_arguments,
    selective_scan_oracle,
)

# As those of the operator in test_selective_scan.py.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 1.05 * 2**-8}
FAMILY = ("csm_triton", "mamba_ssm", "selective_scan", "derived_models")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The package, installed for one test."""
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    package = importlib.import_module("mmvmamba_kernels.stand_in")
    package.install()
    yield package
    for name in [n for n in sys.modules if n.startswith(FAMILY)]:
        del sys.modules[name]


def arguments(dtype=torch.float32, **shapes):
    """Random arguments in the dtypes that the real modules take: float32 for A, D and the bias."""
    args = selective_scan_arguments(2, 2, 3, 2, 21)
    args = {n: t.detach() for n, t in args.items()}
    for name, shape in shapes.items():
        args[name] = torch.randn(shape)
    maps = ("u", "delta", "B", "C", "z")
    wide = torch.promote_types(dtype, torch.float32)
    return {n: t.to(dtype if n in maps else wide).requires_grad_() for n, t in args.items()}


def oracle(z=None, B=None, C=None, **args):
    """The scan in float64 for every layout of B and C, with the gate."""
    length, channels = args["u"].shape[2], args["u"].shape[1]

    def per_channel(t):
        if t.ndim == 2:
            return t[None, :, :, None].expand(args["u"].shape[0], -1, -1, length)
        t = t if t.ndim == 4 else t[:, None]
        return t.repeat_interleave(channels // t.shape[1], 1)

    result = selective_scan_oracle(**args, B=per_channel(B), C=per_channel(C), delta_softplus=True)
    return result if z is None else result * F.silu(z.double())


def wrapped(extension, form):
    """The two calls of an extension as an autograd function, as their callers have them."""

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, u, delta, A, B, C, D, z, delta_bias):
            tensors = (u, delta, A, B, C, D, *([z] if form == "mamba" else []), delta_bias)
            options = {"mamba": (), "core": (1,), "first": (), "oflex": (1, True)}[form]
            out, x, *rest = extension.fwd(*tensors, True, *options)
            assert torch.equal(
                x[:, :, -1, 1::2],
                selective_scan(
                    *(t.detach() for t in (u, delta, A, B, C)),
                    delta_bias=delta_bias,
                    delta_softplus=True,
                    return_last_state=True,
                )[1],
            )
            ctx.save_for_backward(*tensors, out, x)
            return rest[0] if rest else out

        @staticmethod
        def backward(ctx, grad_out):
            *tensors, out, x = ctx.saved_tensors
            if form != "mamba":
                options = (out, True) if form == "first" else (True, 1)
                grads = extension.bwd(*tensors, grad_out, x, *options)
                return (*grads[:6], None, grads[6])
            if tensors[6] is None:
                *grads, bias = extension.bwd(*tensors, grad_out, x, None, None, True, False)
                return (*grads, None, bias)
            buffer = torch.empty_like(tensors[6])
            *grads, bias, grad_z, out_z = extension.bwd(
                *tensors, grad_out, x, out, buffer, True, True
            )
            assert grad_z is buffer
            assert out_z.shape == out.shape
            return (*grads, grad_z, bias)

    def call(u, delta, A, B, C, D=None, z=None, delta_bias=None):
        return Scan.apply(u, delta, A, B, C, D, z, delta_bias)

    return call


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("selective_scan_cuda", "mamba"),
        ("selective_scan_cuda_core", "core"),
        ("selective_scan_cuda_core", "first"),
        ("selective_scan_cuda_nrow", "core"),
        ("selective_scan_cuda_oflex", "oflex"),
    ],
)
def test_extensions(name, form, dtype):
    args = arguments(dtype)
    function = wrapped(importlib.import_module(name), form)
    compare(function, oracle, args, TOLERANCE[dtype])
    wide = form == "oflex" and dtype == torch.bfloat16
    assert function(**args).dtype == (torch.float32 if wide else dtype)
    # What is absent has no gradient.
    del args["D"], args["delta_bias"]
    compare(function, oracle, args, TOLERANCE[dtype])


def test_the_gate_of_mambas_extension():
    args = arguments(z=(2, 6, 21))
    function = wrapped(importlib.import_module("selective_scan_cuda"), "mamba")
    compare(function, oracle, args, TOLERANCE[torch.float32])


def test_oflex_shares_step_sizes():
    args = arguments(delta=(2, 2, 21), delta_bias=(2,))
    function = wrapped(importlib.import_module("selective_scan_cuda_oflex"), "oflex")
    compare(function, oracle, args, TOLERANCE[torch.float32])


def test_the_extension_for_one_state():
    extension = importlib.import_module("selective_scan_cuda_ndstate")
    args = arguments(A=(6,), B=(2, 2, 21), C=(2, 2, 21))
    args["A"] = args["A"].detach().exp().neg().requires_grad_()
    values = [args[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    out, x = extension.fwd(*values, True, 1)
    grad_out = torch.randn_like(out)
    grads = extension.bwd(*values, grad_out, x, True, 1)
    exact = doubled(args)
    layout = {"A": exact["A"][:, None], "B": exact["B"][:, :, None], "C": exact["C"][:, :, None]}
    expected = oracle(**{**exact, **layout})
    wanted = torch.autograd.grad(expected, list(exact.values()), grad_out.double())
    found = dict(zip(("u", "delta", "A", "B", "C", "D", "delta_bias"), grads, strict=True))
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    for (name, value), want in zip(exact.items(), wanted, strict=True):
        assert found[name].shape == value.shape
        assert relative_error(found[name], want) < TOLERANCE[torch.float32]


LAYOUTS = {
    "a group": {"B": (2, 2, 21), "C": (2, 2, 21)},
    "groups": {},
    "constant": {"B": (6, 2), "C": (6, 2)},
    "one constant": {"B": (6, 2), "C": (2, 2, 2, 21)},
    "a group and groups": {"B": (2, 2, 21), "C": (2, 2, 2, 21)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["selective_scan_fn", "selective_scan_ref"])
def test_mambas_function(name, layout):
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    args = arguments(torch.float64, z=(2, 6, 21), **LAYOUTS[layout])

    def function(**tensors):
        return getattr(interface, name)(**tensors, delta_softplus=True)

    compare(function, oracle, args, TOLERANCE[torch.float64])
    del args["z"]
    compare(function, oracle, args, TOLERANCE[torch.float64])


def test_mambas_gate_rounds_once():
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    args = arguments(torch.bfloat16, z=(2, 6, 21))
    out, last = interface.selective_scan_fn(**args, delta_softplus=True, return_last_state=True)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, oracle(**args)) < TOLERANCE[torch.bfloat16]
    del args["z"]
    exact = selective_scan_oracle(**args, delta_softplus=True, return_last_state=True)[1]
    assert relative_error(last, exact) < TOLERANCE[torch.float32]
    # As the real one, while the version in PyTorch has its gradient.
    assert not last.requires_grad
    last = interface.selective_scan_ref(**args, delta_softplus=True, return_last_state=True)[1]
    assert last.requires_grad


def test_vmambas_first_function():
    interface = importlib.import_module("selective_scan")
    args = arguments(torch.float64)
    for name in ("selective_scan_fn", "selective_scan_ref"):
        function = getattr(interface, name)
        compare(lambda f=function, **t: f(**t, delta_softplus=True), oracle, args, 1e-13)
    nested = importlib.import_module("selective_scan.selective_scan_interface")
    assert nested.selective_scan_fn is interface.selective_scan_fn


def test_mambas_block():
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    rank, states, dim, length = 2, 3, 4, 11
    shapes = {
        "xz": (2, 2 * dim, length),
        "conv1d_weight": (dim, 1, 4),
        "conv1d_bias": (dim,),
        "x_proj_weight": (rank + 2 * states, dim),
        "delta_proj_weight": (dim, rank),
        "out_proj_weight": (5, dim),
        "out_proj_bias": (5,),
        "A": (dim, states),
        "D": (dim,),
        "delta_bias": (dim,),
        "B_proj_bias": (states,),
        "C_proj_bias": (states,),
    }
    args = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    args["A"] = -args["A"].exp()
    args = {n: t.requires_grad_() for n, t in args.items()}

    def by_position(out_proj_weight, out_proj_bias, **a):
        x, z = a["xz"].chunk(2, 1)
        weight = a["conv1d_weight"][:, 0]
        padded = F.pad(x, (3, 0))
        taps = [weight[:, i, None] * padded[..., i : i + length] for i in range(4)]
        x = F.silu(sum(taps) + a["conv1d_bias"][:, None])
        projected = torch.einsum("cd,bdl->bcl", a["x_proj_weight"], x)
        dt, B, C = projected.split((rank, states, states), 1)
        y = selective_scan_oracle(
            x,
            torch.einsum("dr,brl->bdl", a["delta_proj_weight"], dt),
            a["A"],
            (B + a["B_proj_bias"][:, None])[:, None],
            (C + a["C_proj_bias"][:, None])[:, None],
            a["D"],
            a["delta_bias"],
            True,
        )
        return torch.einsum("od,bdl->blo", out_proj_weight, y * F.silu(z)) + out_proj_bias

    compare(interface.mamba_inner_fn, by_position, args, 1e-12)
    with pytest.raises(NotImplementedError, match="does not support b_rms_weight, dt_rms_weight"):
        interface.mamba_inner_fn(**args, b_rms_weight=torch.ones(3), dt_rms_weight=torch.ones(2))


@pytest.mark.parametrize("scans", range(3))
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("x_first", [True, False])
@pytest.mark.parametrize("y_first", [True, False])
def test_cross_scan_and_merge(scans, one_by_one, x_first, y_first):
    module = importlib.import_module("csm_triton")
    height, width = 2, 3
    options = {
        "in_channel_first": x_first,
        "out_channel_first": y_first,
        "one_by_one": one_by_one,
        "scans": scans,
    }
    x = torch.randn(2, 4, 5, height, width, dtype=torch.float64)
    x = x if one_by_one else x[:, 0]
    walks = paths(("cross2d", "unidi", "bidi")[scans], height, width)
    expected = torch.stack(
        [
            torch.stack([(x[:, k] if one_by_one else x)[..., i, j] for i, j in walk], -1)
            for k, (walk,) in enumerate(walks)
        ],
        1,
    )
    if not x_first:
        x = x.movedim((-2, -1), (1, 2)).contiguous()
    x.requires_grad_()
    y = module.cross_scan_fn(x, **options)
    assert torch.equal(y, expected if y_first else expected.movedim(-1, 1))

    # The merge is the adjoint of the scan, and the scan that of the merge.
    maps = torch.randn(2, 4, 5, height, width, dtype=torch.float64)
    sequences = maps.flatten(-2) if y_first else maps.flatten(-2).movedim(-1, 1)
    if not y_first:
        maps = maps.movedim((-2, -1), (1, 2))
    maps.requires_grad_()
    (wanted,) = torch.autograd.grad(y, x, sequences)
    merged = module.cross_merge_fn(maps, **options)
    wanted = wanted.flatten(-2) if x_first else wanted.flatten(1, 2)
    assert merged.shape == wanted.shape
    torch.testing.assert_close(merged, wanted)
    weights = torch.randn_like(merged)
    (back,) = torch.autograd.grad(merged, maps, weights)
    weights = weights.view(x.shape)
    assert torch.equal(back.reshape(y.shape), module.cross_scan_fn(weights, **options))


@pytest.mark.parametrize("mode", range(3))
def test_cross_scans_of_older_copies(mode):
    module = importlib.import_module("csm_triton")
    x, maps = torch.randn(2, 5, 2, 3), torch.randn(2, 4, 5, 2, 3)
    scan, merge = module.getCSM(mode)
    assert torch.equal(scan.apply(x), module.cross_scan_fn(x, scans=mode))
    assert torch.equal(merge.apply(maps), module.cross_merge_fn(maps, scans=mode))
    if mode == 0:
        last = maps.movedim((1, 2), (3, 4))
        one_by_one = module.cross_scan_fn(maps, one_by_one=True)
        assert torch.equal(module.CrossScanTriton.apply(x), scan.apply(x))
        assert torch.equal(module.CrossScanTritonF.apply(x.movedim(1, 3), False), scan.apply(x))
        assert torch.equal(module.CrossMergeTriton.apply(maps), merge.apply(maps))
        assert torch.equal(module.CrossMergeTritonF.apply(maps, False), merge.apply(maps).mT)
        assert torch.equal(module.CrossScanTriton1b1.apply(maps), one_by_one)
        assert torch.equal(module.CrossScanTriton1b1F.apply(last, False), one_by_one)


def test_a_projects_own_cross_scan_is_replaced_if_asked(stand_in, tmp_path, monkeypatch):
    package = tmp_path / "derived_models_of_a_project"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "csm_triton.py").write_text("cross_scan_fn = 'own'\n")
    monkeypatch.syspath_prepend(tmp_path)
    name = f"{package.name}.csm_triton"
    assert importlib.import_module(name).cross_scan_fn == "own"
    stand_in.install(replace=True)
    assert callable(importlib.import_module(name).cross_scan_fn)


def test_wrong_cross_scans_are_named():
    module = importlib.import_module("csm_triton")
    with pytest.raises(ValueError, match="scans must be one of 0 .cross2d., .*, got 3"):
        module.cross_scan_fn(torch.zeros(1, 1, 2, 2), scans=3)
    with pytest.raises(ValueError, match=r"expected \(B, 4, C, H, W\) or .* shape \(1, 1, 2, 2\)"):
        module.cross_merge_fn(torch.zeros(1, 1, 2, 2))


def model_results(models, name, size):
    """The output of a network in float64 and the gradients of its parameters, from one seed."""
    torch.manual_seed(0)
    model = {
        "core": lambda: models.SS2DCore(3),
        "mamba_ssm": lambda: models.SS2DMamba(3),
        "unet": models.UNet,
        "unet with the extension": lambda: models.UNet(mixer=models.SS2DCore),
        "mamba layer": models.MambaLayer,
    }[name]().double()
    torch.manual_seed(1)
    image = torch.randn(size, dtype=torch.float64)
    return output_and_gradients(lambda **_: model(image), dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("core", (2, 3, 5, 3)),
        ("mamba_ssm", (2, 3, 5, 3)),
        ("unet", (1, 1, 4, 6)),
        ("unet with the extension", (1, 1, 4, 6)),
        ("mamba layer", (2, 4, 3, 2)),
    ],
)
def test_networks_of_other_projects(name, size, monkeypatch):
    models = importlib.import_module("derived_models")
    actual = model_results(models, name, size)
    assert all(t.abs().max() > 0 for t in actual.values())

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, *_, **__):
        return oracle(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)

    # The same with the loop in the place of what the project calls.
    monkeypatch.setattr(models, "selective_scan_fn", scan)
    monkeypatch.setattr(
        models.SelectiveScanCore,
        "apply",
        lambda u, delta, A, B, C, D, bias, _: scan(u, delta, A, B, C, D, None, bias),
    )
    interface = importlib.import_module("mmvmamba_kernels.stand_in.mamba_interface")
    monkeypatch.setattr(interface, "_gated_scan", scan)
    expected = model_results(models, name, size)
    assert max(errors(actual, expected).values()) < 1e-11


def test_networks_under_autocast():
    model = importlib.import_module("derived_models").UNet()
    image = torch.randn(1, 1, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(image)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    # A few roundings of 8 bits, one after another.
    assert relative_error(out, model(image)) < 2**-4
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


def test_an_installed_module_is_left_alone_unless_asked(stand_in, tmp_path, monkeypatch):
    (tmp_path / "selective_scan_cuda_core.py").write_text("fwd = 'real'\n")
    (tmp_path / "mamba_ssm" / "ops").mkdir(parents=True)
    for folder in ("mamba_ssm", "mamba_ssm/ops"):
        (tmp_path / folder / "__init__.py").write_text("")
    # A folder of that name, as VMamba's repository has for its sources, is no installed package.
    (tmp_path / "selective_scan").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    core = importlib.import_module("selective_scan_cuda_core")
    assert core.fwd == "real"
    assert callable(importlib.import_module("selective_scan").selective_scan_fn)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'mamba_ssm.ops.selective"):
        importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    stand_in.install(replace=True)
    assert callable(importlib.import_module("selective_scan_cuda_core").fwd)
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    assert callable(interface.selective_scan_fn)


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from mamba_ssm import Mamba", "Mamba"),
        ("import mamba_ssm.modules.mamba_simple", "modules"),
        ("from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn", "bimamba_inner_fn"),
        ("from csm_triton import triton_cross_scan", "triton_cross_scan"),
    ],
)
def test_what_is_not_provided_has_a_name_and_a_reason(statement, name):
    with pytest.raises(ModuleNotFoundError, match=f"stand-in of .* has no '{name}': only what"):
        exec(statement)


def test_attributes_that_are_not_provided():
    module = importlib.import_module("selective_scan_cuda_core")
    with pytest.raises(AttributeError, match="has no 'backward': only what .* here bwd, fwd"):
        module.backward  # noqa: B018
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    args = arguments()
    with pytest.raises(NotImplementedError, match="does not support cu_seqlens"):
        interface.selective_scan_fn(**args, cu_seqlens=torch.tensor([0, 21]))
    with pytest.raises(TypeError, match="A must be float16, .* or float64, got torch.complex64"):
        interface.selective_scan_fn(**{**args, "A": args["A"].detach().to(torch.complex64)})
    with pytest.raises(ValueError, match=r"B must be .*, got shape \(2,\)"):
        interface.selective_scan_fn(**{**args, "B": torch.zeros(2)})
    values = [args[n] for n in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    with pytest.raises(TypeError, match="bwd takes .* .a bool. and nrows; after x it got int, int"):
        module.bwd(*values, args["u"], None, 1, 1)


def test_the_backend_for_mamba_ssm_does_not_take_the_stand_in():
    importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    with pytest.raises(BackendError, match="mamba-ssm is not installed"):
        selective_scan(**arguments(), backend="mamba_ssm")


def test_a_program_runs_unchanged(tmp_path):
    (tmp_path / "beside.py").write_text("import selective_scan_cuda_oflex as extension\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from beside import extension\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], extension.__spec__.origin)\n"
    )
    command = [sys.executable, "-m", "mmvmamba_kernels.stand_in", "--replace"]
    result = subprocess.run(
        [*command, str(script), "-m", "--replace", "x"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['-m', '--replace', 'x'] mmvmamba_kernels.stand_in\n"


def test_a_module_as_program_and_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "tool.py").write_text("import selective_scan_cuda, sys\nprint(sys.argv[1:])\n")
    monkeypatch.syspath_prepend(tmp_path)
    main = importlib.import_module("mmvmamba_kernels.stand_in.__main__").main
    monkeypatch.setattr(sys, "argv", ["stand_in", "-m", "tool", "--lr", "1"])
    main()
    assert capsys.readouterr().out == "['--lr', '1']\n"
    monkeypatch.setattr(sys, "argv", ["stand_in", "tool"])
    with pytest.raises(SystemExit):
        main()
    assert "there is no script 'tool'; a module's name needs -m before" in capsys.readouterr().err
