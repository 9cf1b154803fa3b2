"""What is computed in which dtype: autocast, pure low precision, and where the copies are."""

import collections
import functools

import golden
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmvmamba.models import MM_VSSM, VMamba, recompute
from mmvmamba.models.layers import DropPath, KeepsFloat32, LayerNorm
from mmvmamba_kernels.layer_norm import api

NARROW = [torch.bfloat16, torch.float16]
TINY = {"dims": 16, "depths": [1, 1, 1, 1], "drop_path_rate": 0.1}


def build(case):
    data = golden.load(case)
    model = MM_VSSM(**data.backbone_kwargs).eval()
    model.load_state_dict(data.backbone_weights, strict=False)
    return model, data


@functools.cache
def maps_in_float64(case):
    model, data = build(case)
    with torch.no_grad():
        return model.double()(data.input.double())


def plain_layer_norm(self, x):
    """PyTorch's own, in the dtype that autocast or the input chooses."""
    return F.layer_norm(x, self.normalized_shape, self.weight.to(x), self.bias.to(x), self.eps)


def plain_sum(self, x, branch, scale):
    x = x + branch
    return x, self(x)


@pytest.fixture
def plain(monkeypatch):
    """Turns models into what PyTorch computes unasked, without dtypes of our own."""

    def apply():
        monkeypatch.setattr(LayerNorm, "forward", plain_layer_norm)
        monkeypatch.setattr(LayerNorm, "of_sum", plain_sum)
        monkeypatch.setattr(KeepsFloat32, "_apply", nn.Module._apply)

    return apply


def errors(outs, expected):
    """Root-mean-square error over the magnitude, per stage."""
    return [
        ((out.double() - e).norm() / e.norm()).item() for out, e in zip(outs, expected, strict=True)
    ]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("mode", ["autocast", "pure"])
@pytest.mark.parametrize("case", golden.CASES)
def test_low_precision_is_as_close_to_float64_as_an_eager_run(case, mode, dtype, plain):
    expected = maps_in_float64(case)

    @torch.no_grad()
    def run():
        model, data = build(case)
        if mode == "pure":
            return model.to(dtype)(data.input.to(dtype))
        with torch.autocast("cpu", dtype):
            return model(data.input)

    found = errors(run(), expected)
    plain()
    usual = errors(run(), expected)
    # Roundings are as random as the inputs are: single stages of these small maps differ by a half.
    for stage, (ours, theirs) in enumerate(zip(found, usual, strict=True)):
        assert ours < 1.5 * theirs + torch.finfo(dtype).eps / 4, (stage, found, usual)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sensitive_parameters_stay_float32(dtype):
    model = VMamba(TINY)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(o.sum() for o in model(torch.randn(1, 3, 32, 32))).backward()
    model.to(dtype)
    for name, parameter in model.named_parameters():
        kept = name.endswith(("A_logs", "Ds", "dt_projs_bias")) or "norm" in name
        # The stem's and the downsamples' norms have numbers for names.
        kept = kept or (parameter.ndim == 1 and name.endswith("weight"))
        if name.startswith("patch_embed.") or ".downsample." in name:
            kept = isinstance(model.get_submodule(name.rpartition(".")[0]), LayerNorm)
        assert parameter.dtype == (torch.float32 if kept else dtype), name
        assert parameter.grad.dtype == parameter.dtype, name
        if kept:
            assert torch.equal(parameter, exact[name]), name
    assert all(t.dtype == torch.float64 for t in model.double().parameters())
    assert {t.dtype for t in model.to(dtype).parameters()} == {torch.float32, dtype}
    assert next(model.to("meta").parameters()).device.type == "meta"


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_under_autocast_layers_meet_their_dtype_and_the_stream_is_float32(dtype):
    model = VMamba(TINY).train()
    seen = []

    def check(module, inputs, output):
        seen.append(type(module).__name__)
        stream = getattr(module, "stream", None)
        if stream is not None:
            assert output.dtype == (torch.float32 if stream else dtype)
        elif isinstance(module, nn.Linear):
            assert inputs[0].dtype == output.dtype == dtype

    for module in model.modules():
        module.register_forward_hook(check)
    with torch.autocast("cpu", dtype):
        outs = model(torch.randn(1, 3, 32, 32))
    assert {o.dtype for o in outs} == {dtype}
    assert {"LayerNorm", "Linear", "VSSBlock"} <= set(seen)


class Copies(TorchDispatchMode):
    """Counts the operations that copy, by the shape of what they copy."""

    def __init__(self):
        super().__init__()
        self.shapes = {"layout": [], "cast": []}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name in ("aten::clone", "aten::contiguous", "aten::copy_"):
            self.shapes["layout"].append(tuple(out.shape))
        elif name == "aten::_to_copy":
            kind = "cast" if out.dtype != args[0].dtype else "layout"
            self.shapes[kind].append(tuple(out.shape))
        return out

    def maps(self, kind):
        """Shapes of the copied maps, parameters and scalars left out."""
        return collections.Counter(s for s in self.shapes[kind] if len(s) == 4 and s[0] == BATCH)


BATCH = 3
OUTS = [(BATCH, 16, 8, 12), (BATCH, 32, 4, 6), (BATCH, 64, 2, 3), (BATCH, 128, 1, 2)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("devices", [{"cpu"}, {"cuda"}], ids=["recomputed", "kept"])
def test_no_layout_changes_between_the_image_and_the_outputs(autocast, devices, monkeypatch):
    # As on a GPU: one operator instead of PyTorch's own operations.
    monkeypatch.setattr(api, "_backend_name", lambda *_: "reference")
    monkeypatch.setattr(recompute, "DEVICES", devices)
    model = VMamba(TINY).train()
    image = torch.randn(BATCH, 3, 32, 45, requires_grad=True)
    with Copies() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outs = model(image)
    grads = [torch.randn_like(o) for o in outs]
    with Copies() as backward:
        torch.autograd.backward(outs, grads)

    # The image becomes channels-last, and each output NCHW, which detectors' operators need.
    channels_last = tuple(image.permute(0, 2, 3, 1).shape)
    assert forward.maps("layout") == collections.Counter([channels_last, *OUTS])
    # Their gradients come back once each; nothing else moves.
    assert sum(backward.maps("layout").values()) <= len(OUTS) + 1
    if not autocast:
        assert not forward.maps("cast")
        assert not backward.maps("cast")
        return
    # The image, and the float32 stream on its way into the three downsampling convolutions.
    assert forward.maps("cast") == collections.Counter([tuple(image.shape), *OUTS[:3]])
    casts = collections.Counter(s for s in forward.shapes["cast"] if len(s) > 1 and s[0] != BATCH)
    # Every weight once; SS2D's projection of all directions as one matrix.
    weights = collections.Counter(
        tuple(p.flatten(0, 1).shape if name.endswith("x_proj_weight") else p.shape)
        for name, p in model.named_parameters()
    )
    assert casts <= weights, casts - weights


def test_drop_path_keeps_the_mean_and_whole_samples():
    torch.manual_seed(0)
    drop = DropPath(0.2).train()
    x, branch = torch.randn(2000, 1, 1, 3), torch.ones(2000, 1, 1, 3)
    factors = drop(x, branch) - x
    assert torch.equal(
        factors[..., :1].expand_as(factors).round(decimals=3), factors.round(decimals=3)
    )
    values = factors[:, 0, 0, 0].round(decimals=3)
    assert sorted(values.unique().tolist()) == [0.0, 1.25]
    # 2000 draws at 0.2: a deviation of four standard deviations.
    assert abs((values == 0).float().mean().item() - 0.2) < 0.036
    scale = drop.scale(x)
    assert set(scale.unique().tolist()) == {0.0, 1.25}
    assert drop.eval().scale(x) is None
    assert torch.equal(drop(x, branch), x + branch)


def test_drop_path_in_bfloat16_divides_exactly():
    drop = DropPath(0.07).train()
    torch.manual_seed(0)
    branch = torch.full((64, 1, 1, 1), 3.0, dtype=torch.bfloat16)
    out = drop(torch.zeros_like(branch), branch)
    expected = torch.tensor(3 / 0.93).bfloat16().item()
    assert set(out.flatten().tolist()) <= {0.0, expected}
