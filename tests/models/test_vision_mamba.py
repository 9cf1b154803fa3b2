"""Vim against its released code, against loops in float64, and its files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmvmamba.models import VisionMamba

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
        # Its cosines are float32 in any case.
        tolerance = 1e-6 if model.rope else 1e-9
        torch.testing.assert_close(out, one, rtol=tolerance, atol=tolerance)


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
