"""The official modules: their signatures, what configs hold, and networks that derive from them."""

import copy
import inspect

import golden
import pytest
import torch
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry
from torch import nn

from mmvmamba.models import official
from mmvmamba.models.checkpoint import OLD_NAMES
from mmvmamba.models.official import (
    MM_VSSM,
    SS2D,
    VSSM,
    Backbone_VSSM,
    LayerNorm2d,
    Linear2d,
    Permute,
    SS2Dm0,
    VSSBlock,
    translate_forward_type,
)
from mmvmamba.models.vmamba import ArgumentError

# In float64; the data were, too, and are stored in float32.
TOLERANCE = 1e-6
TINY = {"dims": (4, 8), "depths": (1, 1), "ssm_d_state": 2, "mlp_ratio": 2.0}

# In the order of the official signatures.
SS2D_ARGUMENTS = {
    "d_model": 96,
    "d_state": 16,
    "ssm_ratio": 2.0,
    "dt_rank": "auto",
    "act_layer": nn.SiLU,
    "d_conv": 3,
    "conv_bias": True,
    "dropout": 0.0,
    "bias": False,
    "dt_min": 0.001,
    "dt_max": 0.1,
    "dt_init": "random",
    "dt_scale": 1.0,
    "dt_init_floor": 1e-4,
    "initialize": "v0",
    "forward_type": "v2",
    "channel_first": False,
}
MIXER_ARGUMENTS = {
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_dt_rank": "auto",
    "ssm_act_layer": "silu",
    "ssm_conv": 3,
    "ssm_conv_bias": True,
    "ssm_drop_rate": 0.0,
    "ssm_init": "v0",
    "forward_type": "v2",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "mlp_drop_rate": 0.0,
    "gmlp": False,
}
SIGNATURES = {
    SS2D: SS2D_ARGUMENTS,
    VSSBlock: {
        "hidden_dim": 0,
        "drop_path": 0.0,
        "norm_layer": nn.LayerNorm,
        "channel_first": False,
        **MIXER_ARGUMENTS,
        "ssm_act_layer": nn.SiLU,
        "mlp_act_layer": nn.GELU,
        "use_checkpoint": False,
        "post_norm": False,
        "_SS2D": SS2D,
    },
    VSSM: {
        "patch_size": 4,
        "in_chans": 3,
        "num_classes": 1000,
        "depths": (2, 2, 9, 2),
        "dims": (96, 192, 384, 768),
        **MIXER_ARGUMENTS,
        "drop_path_rate": 0.1,
        "patch_norm": True,
        "norm_layer": "LN",
        "downsample_version": "v2",
        "patchembed_version": "v1",
        "use_checkpoint": False,
        "posembed": False,
        "imgsize": 224,
        "_SS2D": SS2D,
    },
    Backbone_VSSM: {"out_indices": (0, 1, 2, 3), "pretrained": None, "norm_layer": "ln"},
}


@pytest.mark.parametrize("cls", SIGNATURES)
def test_signatures_are_the_official_ones(cls):
    parameters = inspect.signature(cls).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(SIGNATURES[cls].items())


@pytest.mark.parametrize(
    ("forward_type", "expected"),
    [
        ("v05", {"gated": True}),
        ("v05_noz", {"gated": False}),
        ("v2_no32", {"gated": True}),
        ("v3noz", {"gated": False}),
        ("v2_noz_no32", {"gated": False}),
        ("v31d", {"gated": True, "scan": "unidi"}),
        ("v31d_noz", {"gated": False, "scan": "unidi"}),
        ("v32d_noz", {"gated": False, "scan": "bidi"}),
        ("v052dc_noz", {"gated": False, "scan": "cascade2d"}),
        ("m0_noz", {"gated": False, "mixer": "mamba2"}),
        ("v0seq", official.VANILLA),
    ],
)
def test_forward_types(forward_type, expected):
    assert translate_forward_type(forward_type) == (expected, None)
    if forward_type in ("v05_noz", "v3noz"):
        base = forward_type.removesuffix("noz").removesuffix("_")
        assert translate_forward_type(f"{base}_onnone_noz") == (expected, "none")


@pytest.mark.parametrize(
    ("forward_type", "message"),
    [
        ("xv1a_act", "'xv1a_act' is not supported: the 'xv' types compute"),
        ("v32dc_noz", "'v32dc_noz' does not run in the official code either"),
        ("v2_nozact", "'_nozact' is a gate without activation"),
        ("v05_noz_oact", "'_oact' is an activation behind"),
        ("v0seq_noz", "v0 always has its gate"),
        ("v0_onnone", "v0 always has its gate and its layer norm"),
        ("v99_noz", "'v99_noz' is unknown, choose from v0, v0seq"),
        ("m0", "mixer='mamba2' has no gate, write 'm0_noz'"),
    ],
)
def test_forward_types_without_a_counterpart_are_named(forward_type, message):
    for build in (MM_VSSM, VSSBlock, SS2D):
        with pytest.raises(ArgumentError, match=message):
            build(forward_type=forward_type)


def load(case):
    return golden.load(case, "forward_types")


@pytest.mark.parametrize("case", [c for c in golden.FORWARD_TYPES if c != "posembed"])
def test_forward_types_compute_what_the_official_ones_do(case):
    data = load(case)
    model = MM_VSSM(**data.backbone_kwargs).eval()
    model.load_state_dict(data.backbone_weights)
    compare(model, data)
    model = VSSM(**data.kwargs).eval()
    model.load_state_dict({k: v for k, v in data.weights.items() if "outnorm" not in k})
    assert golden.relative_error(model.double()(data.input.double()), data.logits) < TOLERANCE


def compare(model, data):
    """Outputs and all gradients with the official ones."""
    model.double()
    image = data.input.double().requires_grad_()
    outs = model(image)
    outs = (outs,) if isinstance(outs, torch.Tensor) else outs
    for found, expected in zip(outs, data.outs, strict=True):
        assert golden.relative_error(found, expected) < TOLERANCE
    sum((o * g).sum() for o, g in zip(outs, data.grad_outs, strict=True)).backward()
    assert golden.relative_error(image.grad, data.grad_input) < TOLERANCE
    parameters = dict(model.named_parameters())
    assert set(data.grads) == set(parameters)
    for name, expected in data.grads.items():
        assert golden.relative_error(parameters[name].grad, expected) < TOLERANCE, name


def test_a_position_embedding_is_added_as_the_official_classifier_does():
    data = load("posembed")
    model = VSSM(**data.kwargs).eval()
    model.load_state_dict(data.weights)
    compare(model, data)


def test_a_position_embedding_fits_images_and_files_of_other_sizes(tmp_path):
    data = load("posembed")
    torch.save({"model": data.weights}, tmp_path / "a.pth")
    model = VSSM(**data.kwargs | {"imgsize": 64}, pretrained=str(tmp_path / "a.pth")).eval()
    assert model.pos_embed.shape == (1, 4, 16, 16)
    assert model(torch.zeros(1, 3, 40, 24)).shape == (1, 10)
    assert model.get_layer_depth("pos_embed")[0] == 0
    frozen = VSSM(**data.kwargs, frozen_stages=0)
    assert not frozen.pos_embed.requires_grad


def test_the_backbone_ignores_a_position_embedding_as_the_official_one_does():
    data = load("posembed")
    weights = {k: v for k, v in data.weights.items() if not k.startswith("classifier.")}
    maps = []
    for posembed in (True, False):
        model = Backbone_VSSM((0, 1), **data.kwargs | {"posembed": posembed}).eval()
        model.load_state_dict(weights, strict=False)
        maps.append(model(data.input)[1])
        assert all(p.requires_grad == (name != "pos_embed") for name, p in model.named_parameters())
    assert torch.equal(*maps)


def derived(case, norm_layer):
    """A backbone on the official classifier, laid out by itself, as projects write them."""

    class Derived(VSSM):
        def __init__(self, out_indices=(0, 1), **kwargs):
            super().__init__(**kwargs)
            self.channel_first = norm_layer == "ln2d"
            assert (self.num_layers, self.num_features) == (2, 8)
            self.out_indices = out_indices
            norm = LayerNorm2d if self.channel_first else nn.LayerNorm
            for i in out_indices:
                self.add_module(f"outnorm{i}", norm(self.dims[i]))
            del self.classifier
            self.load_pretrained(None)

        def forward(self, x):
            x = self.patch_embed(x)
            outs = []
            for i, layer in enumerate(self.layers):
                o = layer.blocks(x)
                x = layer.downsample(o)
                if i in self.out_indices:
                    out = getattr(self, f"outnorm{i}")(o)
                    out = out if self.channel_first else out.permute(0, 3, 1, 2)
                    outs.append(out.contiguous())
            return outs

    data = load(case)
    model = Derived(**data.kwargs | {"norm_layer": norm_layer}).eval()
    model.load_state_dict(data.backbone_weights)
    return model, data


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
@pytest.mark.parametrize("case", ["v0seq", "v31d_noz"])
def test_a_derived_network_lays_out_the_parts_itself(case, norm_layer):
    model, data = derived(case, norm_layer)
    whole = Backbone_VSSM((0, 1), None, norm_layer, **without_norm(data.kwargs)).eval()
    whole.load_state_dict(data.backbone_weights)
    for network in (model, whole, copy.deepcopy(whole)):
        maps = network.double()(data.input.double())
        for found, expected in zip(maps, data.outs, strict=True):
            assert golden.relative_error(found, expected) < TOLERANCE


def without_norm(kwargs):
    return {name: value for name, value in kwargs.items() if name != "norm_layer"}


def block_arguments(kwargs):
    names = inspect.signature(VSSBlock).parameters
    acts = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
    found = {name: value for name, value in kwargs.items() if name in names}
    return without_norm(found) | {
        "ssm_act_layer": acts[kwargs["ssm_act_layer"]],
        "mlp_act_layer": acts[kwargs["mlp_act_layer"]],
    }


@pytest.mark.parametrize("case", ["v2", "v3noz", "v0seq", "oncnorm", "onsoftmax"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_a_block_alone_is_as_in_the_whole_model(case, channel_first):
    data = load(case)
    whole = MM_VSSM((1,), **data.kwargs)
    block = VSSBlock(8, channel_first=channel_first, **block_arguments(data.kwargs))
    weights = whole.layers[1].blocks[0].state_dict()
    # Linear weights of channels-first files may be those of 1x1 convolutions.
    weights["op.in_proj.weight"] = weights["op.in_proj.weight"][..., None, None]
    block.load_state_dict(weights)
    x = torch.randn(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    last = (lambda t: t) if channel_first else (lambda t: t.permute(0, 2, 3, 1))
    inside = whole.layers[1].blocks[0]
    inside.channel_first = channel_first
    assert torch.equal(block(last(x)), inside(last(x)))

    op = block.op
    alone = SS2D(
        8,
        op.d_state,
        data.kwargs["ssm_ratio"],
        data.kwargs["ssm_dt_rank"],
        forward_type=data.kwargs["forward_type"],
        conv_bias=data.kwargs["ssm_conv_bias"],
        channel_first=channel_first,
    )
    alone.load_state_dict(op.state_dict())
    expected = op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.equal(alone(last(x)), last(expected))


def test_blocks_of_other_norms_and_mixers():
    x = torch.randn(2, 5, 7, 16)
    block = VSSBlock(16, norm_layer=lambda c: nn.LayerNorm(c, eps=0.1), forward_type="m0_noz")
    assert isinstance(block.op, SS2Dm0)
    plain = VSSBlock(16, forward_type="m0_noz")
    plain.load_state_dict(block.state_dict())
    assert block.norm2.eps == 0.1
    assert not torch.allclose(block(x), plain(x))
    assert isinstance(VSSBlock(16, norm_layer=nn.BatchNorm2d).norm, nn.BatchNorm2d)
    with pytest.raises(ArgumentError, match="makes a GroupNorm, expected nn.LayerNorm"):
        VSSBlock(16, norm_layer=lambda c: nn.GroupNorm(1, c))
    with pytest.raises(ArgumentError, match="belongs to SS2Dm0"):
        SS2D(16, forward_type="m0_noz")


def test_a_projects_own_mixer_takes_the_place_of_ss2d():
    class Own(nn.Module):
        def __init__(self, d_model, **arguments):
            super().__init__()
            self.arguments = arguments
            self.mix = nn.Linear(d_model, d_model)

        def forward(self, x):
            return self.mix(x)

    model = VSSM(**TINY, norm_layer="ln2d", num_classes=3, _SS2D=Own)
    ops = [block.op for layer in model.layers for block in layer.blocks]
    assert [op.mix.in_features for op in ops] == [4, 8]
    assert ops[0].arguments["d_state"] == 2
    assert ops[0].arguments["channel_first"] is False
    assert torch.equal(ops[0].mix.bias, torch.zeros(4))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert isinstance(VSSBlock(4, _SS2D=Own).op, Own)


SWIN = {
    "pretrain_img_size": 224,
    "embed_dims": 96,
    "window_size": 7,
    "num_heads": [3, 6, 12, 24],
    "strides": (4, 2, 2, 2),
    "qkv_bias": True,
    "qk_scale": None,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "use_abs_pos_embed": False,
    "act_cfg": {"type": "GELU"},
    "norm_cfg": {"type": "LN"},
    "convert_weights": True,
}


def test_what_is_left_of_a_swin_transformer_is_dropped_with_one_warning(monkeypatch):
    said = []
    monkeypatch.setattr(official, "print_log", lambda text, **_: said.append(text))
    init_cfg = {"type": "Pretrained", "checkpoint": "swin.pth"}
    assert set(SWIN) == set(official.SWIN_ARGUMENTS)
    model = MM_VSSM(**TINY, out_indices=(0, 1), with_cp=True, init_cfg=init_cfg, **SWIN)
    (text,) = said
    assert all(name in text for name in SWIN)
    assert "swin.pth" in text
    assert "_delete_=True" in text
    assert model.init_cfg is None
    model.init_weights()
    assert model.layers[0].blocks[0].with_cp
    kept = MM_VSSM(**TINY, out_indices=(0, 1), init_cfg=init_cfg)
    assert kept.init_cfg == init_cfg
    assert len(said) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"windw_size": 7}, "MM_VSSM has no argument 'windw_size'"),
        ({"forwardtype": "v2"}, "no argument 'forwardtype'; did you mean 'forward_type'?"),
        ({"arch": "tiny"}, "no argument 'arch'"),
        ({"ssm_rank_ratio": 1.2}, "ssm_rank_ratio=1.2 is not supported below ssm_ratio=2.0"),
        ({"ssm_act_layer": "sigmoid"}, "act='sigmoid' is unknown"),
        ({"gmlp": True}, "gmlp=True is not supported"),
    ],
)
def test_a_slip_of_the_pen_stays_an_error(kwargs, message):
    with pytest.raises(ArgumentError, match=message):
        MM_VSSM(**kwargs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SS2D(8, dstate=4), "SS2D has no argument 'dstate'; did you mean 'd_state'?"),
        (lambda: SS2D(8, bias=True), "bias=True is not supported"),
        (lambda: SS2D(8, dt_min=1e-4), "dt_min=0.0001 is not supported"),
        (lambda: SS2D(8, act_layer=nn.Tanh), "is unknown, choose from nn.SiLU"),
        (lambda: SS2D(8, ssm_rank_ratio=1.0), "ssm_rank_ratio=1.0 is not supported"),
        (lambda: VSSBlock(8, post_norm=True), "post_norm=True is not supported"),
        (lambda: VSSBlock(8, dropout=0.1), "VSSBlock has no argument 'dropout'"),
    ],
)
def test_arguments_of_the_parts_without_a_counterpart_are_named(build, message):
    with pytest.raises(ArgumentError, match=message):
        build()


def test_what_older_configs_hold_is_taken():
    model = MM_VSSM((1,), "", "ln2d", **TINY, ssm_rank_ratio=2.0, channel_first=True, num_classes=5)
    assert model.out_indices == (1,)
    assert model.channel_first
    assert SS2D(8, expand=1, device=None, dtype=None).in_proj.out_features == 16
    fixed = MM_VSSM(forward_type="v0", ssm_act_layer="relu", ssm_conv=-1, ssm_init="v2", dims=8)
    assert fixed.arch == MM_VSSM(forward_type="v0", dims=8).arch


def test_files_of_before_the_release_load():
    data = load("v0seq")
    new = {"0": "proj", "2": "norm", "norm": "ln_1", "op": "self_attention"}
    old = {}
    for key, value in data.weights.items():
        if "outnorm" in key:
            continue
        name = key.removeprefix("classifier.")
        for pattern in OLD_NAMES:
            part, _, was = pattern.rpartition(r"\.")
            now = {v: k for k, v in new.items()}[was]
            stem = "patch_embed." if "patch_embed" in part else ".blocks.0."
            name = name.replace(f"{stem}{now}.", f"{stem}{was}.")
        old[name] = value
    assert any("self_attention" in key for key in old)
    model = VSSM(**data.kwargs).eval()
    net = nn.ModuleDict({"encoder": model})
    net.load_state_dict({f"encoder.{key}": value for key, value in old.items()})
    assert golden.relative_error(model.double()(data.input.double()), data.logits) < TOLERANCE


def test_the_small_layers():
    x = torch.randn(2, 4, 3, 5)
    norm = LayerNorm2d(4)
    nn.init.normal_(norm.weight)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (4,), norm.weight, norm.bias)
    assert torch.allclose(norm(x), expected.movedim(-1, 1), atol=1e-6)
    linear = Linear2d(4, 6)
    linear.load_state_dict({"weight": torch.randn(6, 4, 1, 1), "bias": torch.randn(6)})
    expected = nn.functional.linear(x.movedim(1, -1), linear.weight, linear.bias)
    assert torch.allclose(linear(x), expected.movedim(-1, 1), atol=1e-6)
    assert torch.equal(Permute(0, 2, 3, 1)(x), x.permute(0, 2, 3, 1))


def test_a_project_that_registers_the_name_keeps_it(monkeypatch):
    monkeypatch.setattr(ROOT, "_module_dict", dict(ROOT.module_dict))
    ROOT._module_dict.pop("MM_VSSM", None)
    child = Registry("model", parent=ROOT, scope="project_of_a_test")
    monkeypatch.setattr(ROOT, "_children", dict(ROOT._children))
    official.offer_official_name()
    official.offer_official_name()
    assert child.get("MM_VSSM") is MM_VSSM

    @child.register_module(name="MM_VSSM")
    class InChild(nn.Module):
        pass

    assert child.get("MM_VSSM") is InChild
    ROOT._module_dict["MM_VSSM"] = InChild
    official.offer_official_name()
    assert ROOT.get("MM_VSSM") is InChild
