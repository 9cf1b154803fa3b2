"""Vim against its released code, against loops in float64, and its files."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.analysis.flops import count_model
from mmvmamba.engine.runner import load_strictly, model_weights
from mmvmamba.models import VisionMamba
from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.checkpoint import CheckpointError, convert, read_checkpoint
from mmvmamba.models.compared import SimpleFeaturePyramid
from mmvmamba.registry import MODELS

DATA = Path(__file__).resolve().parent.parent / "data"
RELEASED = json.loads((DATA / "vim_keys.json").read_text())
# The paper's millions of parameters.
PUBLISHED = {"tiny": 7, "small": 26, "base": 98}

SMALL = {"dims": 8, "depth": 3}
SEGMENTOR = {"with_cls_token": False, "fpn": True}
CASES = {
    "classifier": {"arch": SMALL, "img_size": 48, "stride": 8},
    "segmentor_s": SEGMENTOR
    | {
        "arch": {"dims": 8, "depth": 5},
        "img_size": 64,
        "rope": True,
        "out_type": "stream",
        "out_indices": (0, 1, 3, 4),
    },
    "segmentor_ti": SEGMENTOR
    | {
        "arch": {"dims": 8, "depth": 4},
        "img_size": 64,
        "out_type": "mixer",
        "out_indices": (0, 1, 2, 3),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_released_code(case):
    """Which ran in float64, with its kernels written as loops in PyTorch."""
    model = VisionMamba(in_channels=2, **CASES[case]).eval().double()
    with np.load(DATA / "vim.npz") as archive:
        data = {
            name.removeprefix(f"{case}/"): torch.from_numpy(archive[name]).double()
            for name in archive.files
            if name.startswith(f"{case}/")
        }
    weights = {name[2:]: value for name, value in data.items() if name.startswith("w/")}
    left = model.load_state_dict(weights, strict=False)
    assert not set(left.missing_keys) - {"fpn1.1.num_batches_tracked"}
    head = [weights[key] for key in left.unexpected_keys if key.startswith("head.")]
    outs = model(data["image"])
    if head:
        assert left.unexpected_keys == ["head.weight", "head.bias"]
        outs = [F.linear(outs[0], *head)]
    else:
        assert left.unexpected_keys == ["norm_f.weight"]
    expected = [data[f"out{i}"] for i in range(len(outs))]
    assert f"out{len(outs)}" not in data
    for out, one in zip(outs, expected, strict=True):
        # Its decays and cosines are float32 in any case.
        torch.testing.assert_close(out, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RELEASED)
def test_keys_shapes_and_number_of_parameters_are_the_released_codes(name):
    arch, _, finer = name.partition("-")
    with torch.device("meta"):
        model = VisionMamba(arch, stride=8 if finer else None)
        head = nn.Linear(model.arch.dims, 1000)
    keys = {k: list(v.shape) for k, v in model.state_dict().items()}
    keys |= {f"head.{k}": list(v.shape) for k, v in head.state_dict().items()}
    released = RELEASED[name]
    blocks = {
        f"layers.{i}.{k}": v for i in range(released["depth"]) for k, v in released["block"].items()
    }
    assert keys == released["keys"] | blocks
    count = sum(p.numel() for m in (model, head) for p in m.parameters())
    assert count == released["params"]
    assert round(count / 1e6) == PUBLISHED[arch]


def in_order(x, weights, end):
    """One direction of a mixer before the gate, (B, L, D) to (B, L, D), position by position."""

    def weight(name):
        return weights[name.format(end)]

    taps = weight("conv1d{}.weight")[:, 0]
    rows = []
    state = 0
    for i in range(x.shape[1]):
        # The last tap sees the position itself, the one before it the position before.
        seen = [(x[:, i - j], taps[:, -1 - j]) for j in range(taps.shape[1]) if i - j >= 0]
        u = F.silu(weight("conv1d{}.bias") + sum(a * b for a, b in seen))
        projected = u @ weight("x_proj{}.weight").T
        states = weight("A{}_log").shape[1]
        rank = projected.shape[-1] - 2 * states
        dt, b, c = projected.split([rank, states, states], dim=-1)
        dt = F.softplus(dt @ weight("dt_proj{}.weight").T + weight("dt_proj{}.bias"))
        decay = torch.exp(-dt[..., None] * weight("A{}_log").exp())
        state = decay * state + torch.einsum("bd,bn,bd->bdn", dt, b, u)
        rows.append(torch.einsum("bdn,bn->bd", state, c) + weight("D{}") * u)
    return torch.stack(rows, 1)


def oracle(weights, image, patch, depth):
    """The class token of Vim after its last norm, from the state dict, in plain words."""
    taken = image.unfold(2, patch, patch).unfold(3, patch, patch)
    x = torch.einsum("bchwij,dcij->bhwd", taken, weights["patch_embed.proj.weight"])
    x = (x + weights["patch_embed.proj.bias"]).flatten(1, 2)
    middle = x.shape[1] // 2
    token = weights["cls_token"].expand(len(x), -1, -1)
    stream = torch.cat([x[:, :middle], token, x[:, middle:]], 1) + weights["pos_embed"]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    for i in range(depth):
        prefix = f"layers.{i}.mixer."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        x = norm(stream, weights[f"layers.{i}.norm.weight"]) @ own["in_proj.weight"].T
        x, gate = x.chunk(2, -1)
        both = in_order(x, own, "") + in_order(x.flip(1), own, "_b").flip(1)
        stream = stream + (both * F.silu(gate) / 2) @ own["out_proj.weight"].T
    return norm(stream[:, middle], weights["norm_f.weight"])


def randomized(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.dtype), alpha=0.2)
    return model


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_output_and_gradients_are_those_of_loops_in_float64(backend, monkeypatch):
    monkeypatch.setenv("MMVMAMBA_KERNELS_BACKEND", backend)
    arch = {"dims": 20, "depth": 2, "d_state": 3}
    model = randomized(VisionMamba(arch, img_size=(12, 20), patch_size=4, with_cp=True).double())
    image = torch.randn(2, 3, 12, 20, dtype=torch.float64, requires_grad=True)
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    (out,) = model.eval()(image)
    expected = oracle(weights, image, patch=4, depth=2)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, [image, *model.parameters()], cotangent)
    names = [name for name, _ in model.named_parameters()]
    wanted = torch.autograd.grad(expected, [image, *(weights[n] for n in names)], cotangent)
    for name, one, other in zip(["image", *names], found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8, msg=name)


def test_tokens_turn_by_their_row_and_column_and_the_class_token_does_not():
    model = VisionMamba({"dims": 8, "depth": 1}, rope=True, out_type="featmap")
    cos, sin = model._rotation((3, 5), torch.zeros(1, dtype=torch.float64))
    angles = torch.atan2(sin, cos)
    for row in range(3):
        for column in range(5):
            place = row * 5 + column
            place += place >= 7
            # Two frequencies for each axis, and each for a pair of channels.
            turns = [row / 3 * 14, row / 3 * 0.14, column / 5 * 14, column / 5 * 0.14]
            expected = torch.tensor(turns, dtype=torch.float64).repeat_interleave(2)
            torch.testing.assert_close(angles[place].cos(), expected.cos())
            torch.testing.assert_close(angles[place].sin(), expected.sin())
    assert not angles[7].any()


@pytest.mark.parametrize("size", [(16, 16), (33, 79), (100, 48)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("out_type", ["cls_token", "featmap", "stream", "mixer"])
def test_any_size(out_type, size):
    model = VisionMamba(SMALL, img_size=48, out_type=out_type, out_indices=(0, 2))
    outs = model(torch.randn(2, 3, *size))
    expected = (2, 8) if out_type == "cls_token" else (2, 8, size[0] // 16, size[1] // 16)
    assert [tuple(out.shape) for out in outs] == [expected] * 2
    assert all(out.is_contiguous() for out in outs)
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("indices", [(-1,), (0, 1, 2, 3)])
def test_a_pyramid_of_four_scales(indices):
    arch = {"dims": 8, "depth": 4}
    options = {"out_type": "stream", "fpn": True, "with_cls_token": False}
    model = VisionMamba(arch, out_indices=indices, **options)
    outs = model(torch.randn(2, 3, 64, 96))
    assert [tuple(out.shape[-2:]) for out in outs] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="at least 32x32"):
        model(torch.zeros(1, 3, 31, 64))


def test_the_detectors_neck_makes_five_levels():
    neck = SimpleFeaturePyramid(8, 12)
    outs = neck((torch.randn(2, 8, 6, 4),))
    shapes = [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    assert [tuple(out.shape) for out in outs] == [(2, 12, *shape) for shape in shapes]
    assert torch.equal(outs[4], outs[3][..., ::2, ::2])
    for out in outs[:4]:
        torch.testing.assert_close(out.mean(1), torch.zeros(2, *out.shape[2:]), atol=1e-5, rtol=0)


def test_what_follows_the_last_map_is_neither_computed_nor_trained():
    full = VisionMamba(SMALL, out_type="featmap", out_indices=(0, 1, 2)).eval()
    part = VisionMamba(SMALL, out_type="featmap", out_indices=1).eval()
    part.load_state_dict(full.state_dict())
    part.layers[2].forward = None
    image = torch.randn(1, 3, 32, 48)
    assert torch.equal(part(image)[0], full(image)[1])
    frozen = {name for name, p in part.named_parameters() if not p.requires_grad}
    assert frozen == {f"layers.2.{name}" for name, _ in part.layers[2].named_parameters()}


def test_drop_path_rates_grow_and_leave_out_whole_branches_of_samples():
    model = VisionMamba(SMALL, img_size=16, drop_path_rate=0.6)
    assert [block.drop_path.drop_prob for block in model.layers] == pytest.approx([0, 0.3, 0.6])
    last = VisionMamba(SMALL, out_type="stream", drop_path_rate=0.9).layers[-1]
    assert last.drop_path.drop_prob == 0
    torch.manual_seed(0)
    image = torch.randn(1, 3, 16, 16).expand(40, -1, -1, -1)
    (out,) = model.train()(image)
    # Two blocks are there or not: four outcomes.
    assert len(out.detach().round(decimals=4).unique(dim=0)) == 4


@pytest.mark.parametrize("how", ["autocast", "model"])
def test_bfloat16_keeps_stream_and_state_space_in_float32(how):
    model = VisionMamba(SMALL, img_size=32, out_type="stream", out_indices=(0, 2)).eval()
    image = torch.randn(2, 3, 32, 32)
    expected = model(image)
    if how == "model":
        model.bfloat16()
        wide = {k for k, p in model.named_parameters() if p.dtype == torch.float32}
        assert {k.rpartition("mixer.")[2] for k in wide if "layers.0" in k} == {
            *("A_log", "A_b_log", "D", "D_b", "dt_proj.bias", "dt_proj_b.bias"),
            "layers.0.norm.weight",
        }
        outs = model(image.bfloat16())
        assert {out.dtype for out in outs} == {torch.bfloat16}
    else:
        seen = []
        model.layers[1].norm.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = model(image)
        assert seen == [torch.float32]
    for out, one in zip(outs, expected, strict=True):
        # Eight bits.
        assert (out - one).abs().max() < 0.03 * one.abs().max()


def released_state(grid=14, dims=8, depth=3):
    """A state dict as the released classifiers', of a small model."""
    model = randomized(VisionMamba({"dims": dims, "depth": depth}, img_size=16 * grid))
    return model.state_dict() | {"head.weight": torch.randn(5, dims), "head.bias": torch.ones(5)}


@pytest.fixture
def released(tmp_path):
    """A file as the released ones: with an average, and the arguments of the training."""
    state = released_state()
    average = {k: v + 1 if k == "head.bias" else v for k, v in state.items()}
    content = {"model": state, "model_ema": average, "scaler": "none", "epoch": 3}
    content["args"] = argparse.Namespace(model="vim_tiny", lr=1e-3)
    torch.save(content, tmp_path / "vim.pth")
    return tmp_path / "vim.pth", average


def classifier():
    return MODELS.build(
        {
            "type": "mmpretrain.ImageClassifier",
            "backbone": {"type": "mmvmamba.VisionMamba", "arch": SMALL},
            "head": {"type": "LinearClsHead", "num_classes": 5, "in_channels": 8},
            "_scope_": "mmpretrain",
        }
    )


def test_a_released_file_is_loaded_whole_by_a_classifier(released):
    path, state = released
    weights = model_weights(read_checkpoint(path), str(path))
    model = classifier()
    assert load_strictly(model, weights, str(path)) == len(state)
    assert torch.equal(model.head.fc.bias, state["head.bias"])
    assert torch.equal(model.backbone.pos_embed, state["pos_embed"])
    back = convert(model.state_dict(), "ours", "official", classifier=True).state
    assert set(back) == set(state)
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_segmentors_start_from_released_files_without_the_class_token(released):
    path, state = released
    options = {"out_type": "mixer", "fpn": True, "with_cls_token": False, "rope": True}
    model = VisionMamba(SMALL, **options, img_size=224)
    report = model.load_pretrained(str(path))
    assert set(report.ignored) == {"cls_token", "norm_f.weight", "head.weight", "head.bias"}
    assert report.kept
    assert all(key.startswith("fpn") for key in report.kept)
    rows = [i for i in range(197) if i != 98]
    assert torch.equal(model.pos_embed, state["pos_embed"][:, rows])


def test_positions_of_another_grid_are_interpolated_around_the_class_tokens(released):
    path, state = released
    model = VisionMamba(SMALL, img_size=(96, 160))
    model.load_pretrained(str(path))
    rows = [i for i in range(197) if i != 98]
    maps = state["pos_embed"][:, rows].transpose(1, 2).reshape(1, 8, 14, 14)
    expected = F.interpolate(maps, (6, 10), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed[:, :30], expected[:, :30])
    torch.testing.assert_close(model.pos_embed[:, 31:], expected[:, 30:])
    assert torch.equal(model.pos_embed[:, 30], state["pos_embed"][:, 98])
    # The same, when it is the image that has another size.
    same_grid = VisionMamba(SMALL)
    same_grid.load_pretrained(str(path))
    image = torch.randn(1, 3, 96, 160)
    torch.testing.assert_close(model.eval()(image), same_grid.eval()(image))


def test_files_of_other_models_are_refused(released):
    path, _ = released
    model = VisionMamba({"dims": 8, "depth": 4})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="keys are missing: layers.3"):
        model.load_pretrained(str(path))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    grey = VisionMamba(SMALL, in_channels=1)
    with pytest.raises(CheckpointError, match="images with 3 channels, the model's have 1"):
        grey.load_pretrained(str(path))
    assert grey.load_pretrained(str(path), in_channels="mean").loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "large"}, "arch='large' is unknown, choose from tiny, small, base"),
        ({"out_type": "raw"}, "out_type='raw' is unknown"),
        ({"out_indices": 3}, "there are 3 blocks"),
        ({"out_indices": ()}, "there are 3 blocks"),
        ({"with_cls_token": False}, "out_type='cls_token' needs with_cls_token=True"),
        ({"out_type": "mixer", "fpn": True, "out_indices": (0, 1)}, "4 blocks or of 1"),
        ({"out_type": "mixer", "fpn": True, "patch_size": 8}, "patches of 16 pixels"),
        ({"arch": {"dims": 6, "depth": 1}, "rope": True}, "channels in fours"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        VisionMamba(**{"arch": SMALL} | arguments)


def test_layers_have_depths():
    model = VisionMamba(SMALL)
    depths = {name: model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {5}
    assert depths["cls_token"] == depths["pos_embed"] == depths["patch_embed.proj.bias"] == (0, 5)
    assert [depths[f"layers.{i}.norm.weight"][0] for i in range(3)] == [1, 2, 3]
    assert depths["norm_f.weight"] == (4, 5)
    assert model.get_layer_depth("backbone.layers.1.mixer.D", "backbone.") == (2, 5)
    assert model.get_layer_depth("head.layers.1.weight", "backbone.") == (4, 5)


def test_flops_are_those_of_its_products_convolutions_and_scans():
    dims, inner, states, rank = 32, 64, 16, 2
    model = VisionMamba({"dims": dims, "depth": 3}).eval()
    found = count_model(model, lambda m: m(torch.zeros(1, 3, 48, 80)), (48, 80)).flops
    patches = 3 * 5
    tokens = patches + 1
    directions = 2 * inner * (4 + rank + 2 * states + rank + 9 * states + 1)
    # The convolutions run over the padding, whose end is cut off.
    padding = 2 * inner * 4 * 3
    block = tokens * (dims * 2 * inner + directions + inner * dims) + padding
    assert found == patches * 3 * 16 * 16 * dims + 3 * block


def test_initial_weights_are_the_released_codes():
    torch.manual_seed(0)
    model = VisionMamba({"dims": 64, "depth": 4})
    mixer = model.layers[0].mixer
    steps = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 <= steps.min() < 2e-3
    assert 5e-2 < steps.max() < 0.1001
    assert not mixer.dt_proj_b.bias.any()
    assert torch.equal(mixer.A_b_log.exp().round(), torch.arange(1.0, 17).expand(128, 16))
    bound = 1 / math.sqrt(128) / math.sqrt(4)
    assert 0.98 * bound < mixer.out_proj.weight.abs().max() <= bound
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    std = (3 * 16 * 16) ** -0.5
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(std, rel=0.05)
