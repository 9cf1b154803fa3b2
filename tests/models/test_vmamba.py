"""The backbone against the official implementation's numbers, and its options."""

import copy
import math

import golden
import pytest
import torch
from mmengine.registry import init_default_scope

from mmvmamba.models import MM_VSSM, VMamba
from mmvmamba.models.layers import linear
from mmvmamba.models.ss2d import convolve
from mmvmamba.registry import MODELS
from mmvmamba_kernels import selective_scan_2d

# float32 on both sides, summed in different orders.
GOLDEN_TOLERANCE = 1e-4

SMALL = {"dims": 8, "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_outputs(case):
    data = golden.load(case)
    model = MM_VSSM(**data.backbone_kwargs).eval()
    model.load_state_dict(data.backbone_weights)
    outs = model(data.input)
    assert len(outs) == len(data.outs)
    for out, expected in zip(outs, data.outs, strict=True):
        assert out.shape == expected.shape
        assert golden.relative_error(out, expected) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_logits(case):
    data = golden.load(case)
    kwargs = data.backbone_kwargs | {"out_indices": (len(data.outs) - 1,)}
    backbone = MM_VSSM(**kwargs).eval()
    backbone.outnorm = False
    backbone.load_state_dict(data.backbone_weights, strict=False)
    head = MODELS.build(
        {
            "type": "mmvmamba.VMambaClsHead",
            "num_classes": 10,
            "in_channels": data.outs[-1].shape[1],
            "norm": backbone.arch.norm,
        }
    ).eval()
    prefix = "classifier."
    head.load_state_dict(
        {k.removeprefix(prefix): v for k, v in data.weights.items() if k.startswith(prefix)}
    )
    assert golden.relative_error(head(backbone(data.input)), data.logits) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("case", [c for c in golden.CASES if golden.has_gradients(c)])
@pytest.mark.parametrize("with_cp", [False, True])
def test_golden_gradients(case, with_cp):
    data = golden.load(case)
    model = MM_VSSM(**data.backbone_kwargs | {"use_checkpoint": with_cp}).eval()
    model.load_state_dict(data.backbone_weights)
    image = data.input.requires_grad_()
    outs = model(image)
    sum((o * g).sum() for o, g in zip(outs, data.grad_outs, strict=True)).backward()
    assert golden.relative_error(image.grad, data.grad_input) < GOLDEN_TOLERANCE
    parameters = dict(model.named_parameters())
    assert set(data.grads) == set(parameters)
    for name, expected in data.grads.items():
        assert golden.relative_error(parameters[name].grad, expected) < GOLDEN_TOLERANCE, name


@pytest.mark.parametrize("arch", golden.VARIANTS)
def test_official_keys_and_shapes(arch):
    expected = golden.VARIANTS[arch]["keys"]
    with torch.device("meta"):
        model = VMamba(arch, outnorm=False)
        head = MODELS.build(
            {
                "type": "mmvmamba.VMambaClsHead",
                "num_classes": 1000,
                "in_channels": model.arch.dims[-1],
            }
        )
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    keys |= {f"classifier.{k}": list(v.shape) for k, v in head.state_dict().items()}
    assert keys == expected
    count = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert count == golden.VARIANTS[arch]["params"]


@pytest.mark.parametrize("arch", golden.VARIANTS)
def test_official_arguments_make_the_same_architecture(arch):
    with torch.device("meta"):
        ours, official = VMamba(arch), MM_VSSM(**golden.VARIANTS[arch]["official_kwargs"])
    for name in vars(ours.arch):
        found, expected = getattr(official.arch, name), getattr(ours.arch, name)
        if name in ("dims", "depths"):
            found, expected = list(found), list(expected)
        assert found == expected, name


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 5), (1, 37), (64, 17), (33, 65)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("arch", ["vanilla", "vmamba"])
def test_any_size(arch, size):
    settings = SMALL if arch == "vmamba" else SMALL | {"stem": "v1", "downsample": "v1"}
    model = VMamba(settings)
    image = torch.randn(2, 3, *size)
    if min(size) < model.arch.min_size:
        with pytest.raises(ValueError, match="too small.*at least 4x4"):
            model(image)
        return
    outs = model(image)
    assert [o.shape[1] for o in outs] == [8, 16, 32, 64]
    assert all(torch.isfinite(o).all() for o in outs)
    sum(o.sum() for o in outs).backward()


def test_padding_free_downsampling_names_its_least_size():
    model = VMamba(SMALL | {"downsample": "v2"})
    with pytest.raises(ValueError, match="at least 32x32"):
        model(torch.zeros(1, 3, 31, 64))
    assert model(torch.zeros(1, 3, 32, 32))[-1].shape == (1, 64, 1, 1)


def test_maps_are_contiguous_and_independent_of_the_input_layout():
    model = VMamba(SMALL).eval()
    image = torch.randn(2, 3, 48, 40)
    outs = model(image)
    assert all(o.is_contiguous() for o in outs)
    again = model(image.to(memory_format=torch.channels_last))
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


def test_maps_pass_through_a_convolution_into_roi_align():
    """mmcv's RoIAlign reads its input as NCHW in memory, whatever the strides say."""
    ops = pytest.importorskip("mmcv.ops")
    model = VMamba(SMALL).eval()
    conv = torch.nn.Conv2d(8, 8, 3, padding=1)
    rois = torch.tensor([[0, 2.0, 2.0, 30.0, 20.0], [1, 4.0, 8.0, 25.0, 30.0]])
    with torch.no_grad():
        features = conv(model(torch.randn(2, 3, 64, 64))[0])
        found = ops.roi_align(features, rois, (7, 7), 0.25, 0, "avg", True)
        expected = ops.roi_align(features.contiguous(), rois, (7, 7), 0.25, 0, "avg", True)
    assert torch.equal(found, expected)


def test_out_indices_choose_maps_and_norms():
    full = VMamba(SMALL).eval()
    part = VMamba(SMALL, out_indices=(-1, 1)).eval()
    assert part.out_indices == (1, 3)
    assert not hasattr(part, "outnorm0")
    report = part.load_state_dict(full.state_dict(), strict=False)
    assert not report.missing_keys
    image = torch.randn(1, 3, 32, 32)
    for found, expected in zip(part(image), (full(image)[1], full(image)[3]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_norm_eval_keeps_batch_norms_as_they_are():
    image = torch.randn(2, 3, 32, 32)
    for norm_eval in (False, True):
        model = VMamba(SMALL, norm="bn", norm_eval=norm_eval).train()
        before = model.patch_embed[2].running_mean.clone()
        model(image)
        assert torch.equal(model.patch_embed[2].running_mean, before) == norm_eval
        assert model.layers[0].blocks.training


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    model = VMamba(SMALL, frozen_stages=frozen, norm="bn").train()
    for name, parameter in model.named_parameters():
        part, index = name.split(".")[0], name.split(".")[1]
        if part == "patch_embed":
            expected = frozen >= 0
        elif part == "layers":
            expected = int(index) < frozen
        else:
            expected = int(part.removeprefix("outnorm")) < frozen
        assert parameter.requires_grad is not expected, name
    before = copy.deepcopy(model.patch_embed[2].running_mean)
    model(torch.randn(2, 3, 32, 32))
    changed = not torch.equal(before, model.patch_embed[2].running_mean)
    assert changed is (frozen < 0)


def test_drop_path_rates_grow_linearly_and_act_only_in_training():
    model = VMamba(SMALL | {"drop_path_rate": 0.4})
    rates = [b.drop_path.drop_prob for la in model.layers for b in la.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    image = torch.randn(8, 3, 32, 32)
    torch.manual_seed(0)
    assert not torch.equal(model.train()(image)[-1], model(image)[-1])
    assert torch.equal(model.eval()(image)[-1], model(image)[-1])


def test_layer_depth_orders_parameters():
    model = VMamba(SMALL)
    cases = {
        "patch_embed.0.weight": 0,
        "layers.0.blocks.0.op.A_logs": 1,
        "layers.0.downsample.1.weight": 1,
        "layers.2.blocks.1.mlp.fc1.bias": 4,
        "layers.3.blocks.0.norm.weight": 5,
        "outnorm1.weight": 6,
    }
    for name, depth in cases.items():
        assert model.get_layer_depth(f"backbone.{name}", "backbone.") == (depth, 7)
    assert model.get_layer_depth("head.fc.weight", "backbone.") == (6, 7)


def test_time_steps_start_log_uniform():
    model = VMamba("tiny")
    dt = torch.nn.functional.softplus(model.layers[2].blocks[0].op.dt_projs_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 1.01e-1
    # Log-uniform: half of the values lie below the geometric mean of the ends.
    assert 0.45 < (dt < 1e-2).float().mean() < 0.55


@pytest.mark.parametrize("init", ["mamba", "rand", "zero"])
@pytest.mark.parametrize("mixer", ["ss2d", "mamba2"])
def test_initialisations_train(init, mixer):
    model = VMamba(SMALL | {"dims": 16, "init": init, "mixer": mixer, "d_state": 4})
    # Appendix H.2: 'rand' draws A too, from a normal distribution.
    drawn = torch.cat([p.flatten() for n, p in model.named_parameters() if n.endswith("A_logs")])
    assert (init == "rand") == bool((drawn < 0).any())
    outs = model(torch.randn(2, 3, 32, 32))
    sum(o.square().mean() for o in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("scan", ["cross2d", "unidi", "bidi", "cascade2d"])
def test_float64(scan):
    model = VMamba(SMALL, scan=scan).double()
    assert all(o.dtype == torch.float64 for o in model(torch.randn(1, 3, 32, 32).double()))


def spread(height, width):
    """Three permutations: strides of about the golden section, and two shifts of it."""
    positions = height * width
    step = next(s for s in range(round(0.6 * positions) or 1, 0, -1) if math.gcd(s, positions) == 1)
    first = torch.arange(positions) * step % positions
    return torch.stack([(first + shift) % positions for shift in range(3)])


def staying(height, width):
    """No permutation."""
    return [[0] * height * width]


@pytest.mark.parametrize(
    ("scan", "directions"),
    [("hilbert", 4), ("window3", 4), ("atrous3", 9), (spread, 3)],
    ids=["hilbert", "window3", "atrous3", "function"],
)
def test_scans_along_lists_of_positions_train(scan, directions):
    small = {"dims": 8, "depths": (1, 1), "d_state": 2, "drop_path_rate": 0.0}
    model = VMamba(small, scan=scan)
    assert model.layers[0].blocks[0].op.Ds.shape == (directions * 8,)
    # 9 by 12 positions, then 5 by 6.
    images = torch.randn(2, 3, 36, 48)
    outs = model(images)
    sum(o.square().mean() for o in outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    # What the mixer gives is the scan of the operator along these paths.
    op, x = model.layers[0].blocks[0].op, torch.randn(1, 5, 6, 8)
    paths = spread(5, 6) if scan is spread else None
    if paths is not None:
        x = convolve(op.conv2d, op.act, op.in_proj(x))
        y = selective_scan_2d(
            x,
            linear(x, op.x_proj_weight).unflatten(-1, op.x_proj_weight.shape[:2]),
            op.dt_projs_weight,
            op.dt_projs_bias,
            -op.A_logs.exp().unflatten(0, (3, -1)),
            op.Ds.unflatten(0, (3, -1)),
            paths=paths,
        )
        torch.testing.assert_close(op._scan(x), op.out_norm(y))
    # Its name is enough for a copy.
    copied = VMamba(small, scan=model.arch.scan)
    copied.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(copied(images), outs, strict=True))


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_builds_from_every_scope_without_an_import(scope):
    registry = pytest.importorskip(f"{scope}.registry").MODELS
    init_default_scope(scope)
    assert isinstance(registry.build({"type": "mmvmamba.VMamba", "arch": SMALL}), VMamba)
    assert isinstance(registry.build({"type": "mmvmamba.MM_VSSM", "dims": 8}), MM_VSSM)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"arch": "tiny-s1l9"}, r"'tiny-s1l9' is unknown; did you mean 'tiny-s1l8'\?.*base-m2"),
        ({"arch": {"dims": 8, "depth": (1,)}}, r"unknown attribute 'depth'; did you mean 'depths'"),
        ({"arch": {"dims": 8}}, "has no depths"),
        ({"arch": 3}, "name or a dict, got int"),
        ({"arch": SMALL | {"dims": (8, 16)}}, "dims has 2 stages and depths has 4"),
        ({"arch": SMALL | {"dims": 0}}, "dims=.*positive integers"),
        ({"arch": SMALL | {"stem": "v3"}}, "stem='v3' is unknown, choose from v1, v2"),
        ({"scan": "zigzag"}, "scan='zigzag' is unknown, choose from cross2d"),
        ({"scan": "window0"}, r"scan='window0' is unknown.*window\{n\}"),
        ({"scan": 3}, "scan=3 is unknown, choose from cross2d"),
        ({"scan": staying}, "path 0 must be a permutation of the 64 positions"),
        (
            {"scan": lambda h, w: [[*range(h * w)]]},
            "<lambda> cannot be found by name in another process",
        ),
        ({"arch": "tiny-m2", "scan": "hilbert"}, "only scans 'cross2d'"),
        ({"act": "tanh"}, "act='tanh' is unknown, choose from gelu, relu, silu"),
        ({"d_state": 0}, "d_state=0 must be"),
        ({"dt_rank": "full"}, "dt_rank='full' must be 'auto'"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate=1.5 must be a rate"),
        ({"out_indices": (0, 4)}, r"contains 4, which is not a stage: .* 0 to 3"),
        ({"out_indices": ()}, "out_indices is empty"),
        ({"frozen_stages": 5}, "frozen_stages=5"),
        ({"gated": "yes"}, "gated='yes' must be True or False"),
        ({"arch": "tiny-m2", "gated": True}, "mixer='mamba2' has no gate"),
    ],
)
def test_wrong_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VMamba(**kwargs)


def test_unknown_argument_is_named():
    with pytest.raises(TypeError, match="drop_rate"):
        VMamba("tiny", drop_rate=0.1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"forward_type": "v99"}, "forward_type='v99' is unknown, choose from v0, v0seq, v01"),
        ({"forward_type": "v0_noz"}, "v0 always has its gate"),
        ({"norm_layer": "gn"}, "norm_layer='gn' is unknown"),
        ({"ssm_init": "v3"}, "ssm_init='v3' is unknown"),
        ({"gmlp": True}, "gmlp=True is not supported"),
        ({"patch_size": 8}, "patch_size=8 is not supported"),
        ({"ssm_conv": 5}, "ssm_conv=5 is not supported"),
        ({"forward_type": "m0"}, "mixer='mamba2' has no gate"),
        ({"post_norm": True}, "no argument 'post_norm'"),
    ],
)
def test_official_arguments_without_a_counterpart_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MM_VSSM(**kwargs)
