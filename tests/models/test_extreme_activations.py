"""Activations near the end of float16's range, and far beyond: no NaN where float32 has none."""

import contextlib

import golden
import pytest
import torch
from torch import Tensor

from mmvmamba.models import MM_VSSM, ss2d

# What the largest number in or between modules is brought to. The rest of the way to float16's end
# is for roundings and for what is added up on the way.
NEAR_THE_END = {torch.float16: 4e4, torch.bfloat16: 1e8}
# Beyond 4e4 the scan, which multiplies four numbers that these make, leaves float32's own range.
# And steps so long that a position forgets all before it, or nothing, make much of roundings.
STEEP = ("in_proj", "conv", "x_proj")
# Eight bits against eleven, over the depth of the models; PyTorch's own layers are as far off.
TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.16}
# Other cases differ from these in sizes, activations and norms.
MIXERS = ("cross_s1", "vanilla", "cascade", "mamba2")
SCANS = ("selective_scan_2d_norm", "selective_scan", "state_space_dual")


def build(case, place, scale, dtype=torch.float32):
    data = golden.load(case)
    model = MM_VSSM(**data.backbone_kwargs).train()
    model.load_state_dict(data.backbone_weights, strict=False)
    image = data.input * (scale if place == "image" else 1)
    with torch.no_grad():
        for parameter in PLACES[place](model):
            if place == "dt_bias":
                parameter.add_(scale)
            else:
                parameter.mul_(scale)
    return model.to(dtype), image.to(dtype)


def blocks(model):
    return [block for layer in model.layers for block in layer.blocks]


def of_mixers(*names):
    def find(model):
        for block in blocks(model):
            for name, parameter in block.op.named_parameters():
                if name.startswith(names) and (parameter.ndim > 1 or name in FIXED.values()):
                    yield parameter

    return find


def of_mlps(name):
    return lambda model: [getattr(b.mlp, name).weight for b in blocks(model) if b.mlp]


# Parameters that leave modules' values as they are: what they reach inside of a scan.
FIXED = {"dt_bias": "dt_projs_bias", "skip": "Ds"}
PLACES = {
    "image": lambda model: (),
    "stem": lambda model: [model.patch_embed[0].weight],
    "downsampling": lambda model: [
        parameter
        for layer in model.layers[:-1]
        for parameter in layer.downsample.parameters()
        if parameter.ndim > 1
    ],
    "in_proj": of_mixers("in_proj"),
    "conv": of_mixers("conv2d"),
    "x_proj": of_mixers("x_proj_weight"),
    "out_proj": of_mixers("out_proj"),
    "dt_bias": of_mixers("dt_projs_bias"),
    "skip": of_mixers("Ds"),
    "fc1": of_mlps("fc1"),
    "fc2": of_mlps("fc2"),
}


@contextlib.contextmanager
def largest_value(model, monkeypatch):
    """Collects the largest magnitude that modules and convolutions give, and that scans take."""
    found = [0.0]

    def look(values):
        for value in values:
            if isinstance(value, Tensor):
                found.append(value.detach().abs().max().item())

    def spied(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            # A scan's own result may be beyond float16's range, its normalisation is not.
            look([out] if function.__name__ == "convolve" else args)
            return out

        return call

    with monkeypatch.context() as patch:
        for name in (*SCANS, "convolve"):
            patch.setattr(ss2d, name, spied(getattr(ss2d, name)))

        def hook(_, args, out):
            look([*args, out])

        handles = [module.register_forward_hook(hook) for module in model.modules()]
        yield lambda: max(found)
        for handle in handles:
            handle.remove()


def find_scale(case, place, target, monkeypatch):
    """The factor that brings the largest value to within a factor of two below the target."""
    if place in FIXED:
        return 1e4
    low, high = 1.0, 1e12
    model, image = build(case, place, 1.0)
    parameters = list(PLACES[place](model))
    with torch.no_grad():
        begin = [parameter.clone() for parameter in parameters]
    for _ in range(40):
        scale = (low * high) ** 0.5
        with torch.no_grad(), largest_value(model, monkeypatch) as largest:
            for parameter, value in zip(parameters, begin, strict=True):
                parameter.copy_(value * scale)
            model(image * (scale if place == "image" else 1))
        if target / 2 < largest() <= target:
            return scale
        low, high = (scale, high) if largest() < target else (low, scale)
    raise AssertionError(f"no scale of {place} brings {case} near {target}: {largest()}")


def relative_error(outs, expected):
    return max(((o - e).norm() / e.norm()).item() for o, e in zip(outs, expected, strict=True))


# Types, and whether the weights are of the type or autocast casts them.
PAIRS = [
    [(torch.float16, False), (torch.bfloat16, True)],
    [(torch.float16, True), (torch.bfloat16, False)],
]


# Of every place two mixers, one for each pair of types; every mixer has half of the places.
SHORT = [
    pytest.param(case, place, PAIRS[pair], id=f"{case}-{place}")
    for number, place in enumerate(PLACES)
    for pair in (0, 1)
    for case in [MIXERS[(number - pair + 2) % len(MIXERS)]]
]


@pytest.mark.parametrize(("case", "place", "kinds"), SHORT)
def test_no_nan_where_float32_has_none(case, place, kinds, monkeypatch):
    """Forward and backward, in both types: in one under autocast, in the other without."""
    check(case, place, kinds, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", golden.CASES)
def test_no_nan_in_any_combination(case, place, monkeypatch):
    check(case, place, [*PAIRS[0], *PAIRS[1]], monkeypatch)


def check(case, place, kinds, monkeypatch):
    if place != "image" and not list(PLACES[place](build(case, "image", 1.0)[0])):
        pytest.skip("this model has no such part")
    targets = {d: min(t, 4e4 if place in STEEP else t) for d, t in NEAR_THE_END.items()}
    scales = {t: find_scale(case, place, t, monkeypatch) for t in set(targets.values())}
    for dtype, pure in kinds:
        scale = scales[targets[dtype]]
        model, image = build(case, place, scale)
        expected = [out.detach() for out in model(image)]
        assert all(out.isfinite().all() for out in expected)
        model, image = build(case, place, scale, dtype if pure else torch.float32)
        outs = train_step(model, image, dtype, pure)
        assert all(out.isfinite().all() for out in outs), (dtype, pure)
        if place not in (*STEEP, "dt_bias"):
            assert relative_error(outs, expected) < TOLERANCE[dtype], (dtype, pure)


def train_step(model, image, dtype, pure):
    """Forward and backward; overflows lower the loss scale, from 2^16, as a GradScaler does."""
    for exponent in range(16, -20, -6):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=not pure):
            outs = [out.float() for out in model(image)]
        (sum(out.mean() for out in outs) * 2.0**exponent).backward()
        if all(p.grad.isfinite().all() for p in model.parameters()):
            return [out.detach() for out in outs]
    raise AssertionError("gradients overflow down to a loss scale of 2^-14")
