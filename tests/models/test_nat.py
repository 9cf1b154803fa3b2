"""NAT against the official code's numbers, keys and parameters."""

import json

import golden
import numpy as np
import pytest
import torch

from mmvmamba.models import NAT
from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.checkpoint import CheckpointError
from mmvmamba.registry import MODELS

KEYS = json.loads((golden.DATA / "nat_keys.json").read_text())

SMALL = {"dims": 32, "mlp_ratio": 2.0, "drop_path_rate": 0.0, "depths": (1, 1)}
SMALL_STAGES = {"arch": SMALL, "out_indices": (0, 1)}


def build(arch, classes=1000, dtype=torch.float32):
    """The backbone and the head of a classifier."""
    last = len(NAT.arch_settings["tiny"].depths if isinstance(arch, str) else arch["depths"]) - 1
    backbone = NAT(arch, out_indices=(last,), outnorm=False)
    channels = backbone.feature_info[-1]["num_chs"]
    head = MODELS.build(
        {"type": "mmvmamba.VMambaClsHead", "num_classes": classes, "in_channels": channels}
    )
    return backbone.to(dtype).eval(), head.to(dtype).eval()


def official():
    """The golden arrays, and the weights among them under their official names."""
    with np.load(golden.DATA / "nat.npz") as data:
        arrays = {name: data[name] for name in data.files}
    weights = {
        name.removeprefix("w:"): torch.from_numpy(value).double()
        for name, value in arrays.items()
        if name.startswith("w:")
    }
    return json.loads(str(arrays["meta"]))["arch"], arrays, weights


def test_golden_logits():
    """Maps of 11 x 9 and 6 x 5 positions, the second of which is padded to the window."""
    arch, arrays, weights = official()
    logits = torch.from_numpy(arrays["logits"])
    backbone, head = build(arch, classes=logits.shape[1], dtype=torch.float64)
    of_head = {key: weights.pop(key) for key in [*weights] if key.startswith(("norm.", "head."))}
    backbone.load_state_dict(weights)
    head.load_state_dict(of_head)
    with torch.no_grad():
        found = head(backbone(torch.from_numpy(arrays["input"]).double()))
    torch.testing.assert_close(found, logits)


@pytest.mark.parametrize(
    ("arch", "millions"), [("tiny", 28), ("small", 51), ("base", 90), ("mini", 20)]
)
def test_keys_and_parameters(arch, millions):
    """The official names, and the numbers of parameters that the official repository gives."""
    with torch.device("meta"):
        backbone, head = build(arch)
    own = {k: list(v.shape) for k, v in (backbone.state_dict() | head.state_dict()).items()}
    assert round(sum(p.numel() for p in [*backbone.parameters(), *head.parameters()]) / 1e6) == (
        millions
    )
    if arch in KEYS:
        assert own == KEYS[arch]


@pytest.mark.parametrize("size", [(1, 1), (30, 45), (56, 33)])
def test_images_of_any_size(size):
    model = NAT(**SMALL_STAGES).eval()
    maps = model(torch.randn(2, 3, *size))
    for i, (level, stage) in enumerate(zip(maps, model.feature_info, strict=True)):
        sides = (-(-side // stage["reduction"]) for side in size)
        assert level.shape == (2, stage["num_chs"], *sides)
        # Each passes a norm of its own.
        assert level.mean(1).abs().max() < 1e-4
        assert torch.isfinite(level).all(), i


def test_every_parameter_learns_and_recomputing_changes_nothing():
    images, gradients = torch.randn(2, 3, 40, 32), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = NAT(**SMALL_STAGES, with_cp=with_cp)
        sum(
            (level * torch.linspace(-1, 1, level.shape[1])[:, None, None]).sum()
            for level in model(images)
        ).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.isfinite(g).all() and g.any() for g in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_half_precision_is_near():
    torch.manual_seed(0)
    model = NAT(**SMALL_STAGES).eval()
    images = torch.randn(1, 3, 40, 32)
    expected = model(images)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)[-1]
    assert golden.relative_error(out.float(), expected) < 2e-2


def test_what_cannot_be_is_refused():
    with pytest.raises(ArgumentError, match="arch='huge' is unknown, choose from mini, tiny"):
        NAT("huge")
    with pytest.raises(ValueError, match="takes floating-point images"):
        NAT(**SMALL_STAGES)(torch.zeros(1, 4, 32, 32))


def test_official_files_load_strictly(tmp_path):
    """A classifier's file has no norms of maps, and all else must fit."""
    arch, _, weights = official()
    file = tmp_path / "nat.pth"
    torch.save(weights, file)
    pretrained = {"type": "Pretrained", "checkpoint": str(file)}
    model = NAT(arch, out_indices=(0, 1), init_cfg=pretrained)
    model.init_weights()
    own = {key: value.double() for key, value in model.state_dict().items()}
    norms = [key for key in own if key.startswith(("norm0.", "norm1."))]
    assert len(norms) == 4
    of_maps = {key: weights[key] for key in own if key not in norms}
    torch.testing.assert_close({key: own[key] for key in of_maps}, of_maps)
    assert set(weights) - set(of_maps) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    torch.save({key: value for key, value in weights.items() if "rpb" not in key}, file)
    with pytest.raises(CheckpointError, match=r"2 keys are missing: .*attn\.rpb"):
        NAT(arch, out_indices=(0, 1), init_cfg=pretrained).init_weights()
