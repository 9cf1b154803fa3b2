"""What is counted as how much, which models can be counted, and the command line."""

import json
import runpy
import sys
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvmamba.analysis.flops import (
    Complexity,
    count_classifier,
    count_config,
    count_model,
    plot_flops,
)
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.errors import UsageError
from mmvmamba.models import VMamba
from mmvmamba.models.ss2d import SS2D
from mmvmamba.registry import MODELS

DETECTOR = "configs/sample/mask-rcnn_vmamba-sample_coco.py"


def parts(result: Complexity) -> dict[str, int]:
    return {module.name: module.flops for module in result.modules}


class EveryOperator(nn.Module):
    """What fvcore's convention has a rule for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.deconv = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.bn, self.gn = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.plain_bn = nn.BatchNorm2d(8, affine=False)
        self.ln, self.plain_ln = nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.linear = nn.Linear(8, 5)

    def forward(self, x):
        x = self.gn(self.plain_bn(self.bn(self.deconv(self.depthwise(self.conv(x))))))
        x = F.interpolate(x, scale_factor=2) + F.interpolate(
            x, scale_factor=2, mode="bilinear", align_corners=False
        )
        x = F.gelu(F.adaptive_avg_pool2d(x, 5))
        x = F.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False)
        x = self.plain_ln(self.ln(x.permute(0, 2, 3, 1))).flatten(1, 2)
        x = torch.einsum("blc,bmc->blm", x, x) @ x
        return self.linear(x)


def test_the_convention_is_that_of_mmengines_analysis():
    model, x = EveryOperator().eval(), torch.zeros(1, 3, 16, 24)
    found = count_model(model, lambda m: m(x), (16, 24))
    expected = FlopAnalyzer(model, x).unsupported_ops_warnings(False).by_module()
    assert {name: n for name, n in parts(found).items() if name} == {
        name: n for name, n in expected.items() if name
    }
    assert found.flops == expected[""]
    assert found.params == sum(p.numel() for p in model.parameters())


def test_attention_is_two_products():
    q = torch.zeros(1, 2, 6, 4, device="meta")
    found = count_model(nn.Identity(), lambda _: F.scaled_dot_product_attention(q, q, q), (1, 1))
    assert found.flops == 2 * 2 * 6 * 6 * 4


@pytest.mark.parametrize("scan", ["cross2d", "unidi", "bidi", "cascade2d", "hilbert", "atrous2"])
@pytest.mark.parametrize("mode", [nullcontext(), FakeTensorMode()], ids=["real", "fake"])
def test_ss2d_is_the_sum_of_its_products_and_its_scans(scan, mode):
    channels, states, rank, height, width = 6, 3, 2, 4, 5
    inner, positions = 2 * channels, height * width
    with mode:
        op = SS2D(channels, states, 2.0, rank, scan=scan, gated=True)
        x = torch.zeros(1, height, width, channels)
        found = count_model(op, lambda m: m(x), (height, width))
    products = channels * 2 * inner + 9 * inner + inner * channels
    projected = 4 * inner * (rank + 2 * states)
    # Every second row and column has 6 of the 20 positions, at most.
    steps = 6 if scan == "atrous2" else positions
    scanned = 4 * inner * (rank + 9 * states + 1)
    # The cascade normalises twice, with no weights.
    norms = 5 * inner + (2 * 4 * inner if scan == "cascade2d" else 0)
    assert found.flops == positions * (products + projected + norms) + steps * scanned


def test_modules_add_up_and_lists_are_no_level():
    result = count_classifier("tiny", (64, 64))
    by_name, flops = {m.name: m for m in result.modules}, parts(result)
    assert result.modules[0].name == ""
    stages = [name for name, m in by_name.items() if m.depth == 2 and m.name.startswith("0.layers")]
    assert stages == [f"0.layers.{i}" for i in range(4)]
    assert flops["0"] == flops["0.patch_embed"] + sum(flops[name] for name in stages)
    assert flops[""] == flops["0"] + flops["1"] == sum(result.operators.values())
    assert result.params == by_name["0"].params + by_name["1"].params
    saved = result.as_dict(depth=1)
    assert [m["name"] for m in saved["modules"]] == ["", "0", "1"]
    assert (saved["flops"], saved["shape"]) == (result.flops, [64, 64])


def test_cost_grows_linearly_with_the_pixels():
    small, large = (count_classifier("tiny", (side, side)) for side in (64, 256))
    head = parts(small)["1.head"]
    assert (large.flops - head) == 16 * (small.flops - head)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nat-tiny", "s4nd-vit-base", "vim-tiny"])
def test_so_does_that_of_compared_systems_at_any_size(name):
    """Class tokens and heads cost the same at any size, S4ND without its Fourier transforms."""
    sides = (224, 320, 448)
    small, middle, large = (count_classifier(name, (side, side)).flops for side in sides)
    per_pixel = (large - small) / (448**2 - 224**2)
    assert middle - small == pytest.approx(per_pixel * (320**2 - 224**2), rel=1e-9)


def test_tensors_without_values_and_real_ones_give_the_same():
    cfg = load_config("configs/sample/upernet_vmamba-sample_ade20k.py")
    real = MODELS.build(deepcopy(cfg.model) | {"_scope_": "mmseg"}).eval()
    images = torch.zeros(1, 3, 64, 96)
    found = count_model(real, lambda m: m(images, mode="tensor"), (64, 96))
    assert found == count_config(cfg, (64, 96))


def test_proposals_are_as_many_as_the_config_allows():
    cfg = load_config(DETECTOR)
    few = parts(count_config(cfg, (96, 128)))
    cfg.model.test_cfg.rpn.max_per_img *= 3
    many = parts(count_config(cfg, (96, 128)))
    assert many["roi_head.bbox_head"] == 3 * few["roi_head.bbox_head"]
    assert many["roi_head.mask_head"] == few["roi_head.mask_head"]
    assert many["rpn_head"] == few["rpn_head"] > 0


def test_a_config_is_not_changed_and_checkpoints_are_not_read():
    cfg = load_config("configs/mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py")
    cfg.model.backbone = {"type": "mmvmamba.MM_VSSM", "pretrained": "nowhere.pth"}
    before = cfg.to_dict()
    assert count_config(cfg, (32, 32)).params > 0
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    "name",
    [
        "mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
        "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
        "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py",
        "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
    ],
)
def test_other_detectors_and_segmentors(name):
    cfg = load_config(name)
    cfg.model.backbone = {
        "type": "mmvmamba.VMamba",
        "arch": {"dims": 8, "depths": (1,) * 4},
        "out_indices": (0, 1, 2, 3) if "dino" not in name else (1, 2, 3),
    }
    if "num_queries" in cfg.model:
        # There are fewer positions in a small image.
        cfg.model.num_queries = 20
    widths = [8, 16, 32, 64]
    if "neck" in cfg.model:
        cfg.model.neck.in_channels = widths if "dino" not in name else widths[1:]
    else:
        cfg.model.decode_head.in_channels = widths
    found = count_config(cfg, (64, 64))
    alone = count_model(
        VMamba(cfg.model.backbone["arch"], out_indices=cfg.model.backbone["out_indices"]).eval(),
        lambda m: m(torch.zeros(1, 3, 64, 64)),
        (64, 64),
    )
    assert parts(found)["backbone"] == alone.flops
    assert found.flops > 2 * alone.flops


def test_what_cannot_be_counted_says_so():
    with pytest.raises(UsageError, match="no default_scope"):
        count_config(Config({"model": {}}))
    with pytest.raises(UsageError, match="'mmpose'; FLOPs are counted for mmpretrain, mmdet"):
        count_config(Config({"model": {}, "default_scope": "mmpose"}))
    with pytest.raises(ValueError, match="'tyny' is neither"):
        count_classifier("tyny")


def test_plot(tmp_path):
    curves = {"tiny": [count_classifier("tiny", (side, side)) for side in (64, 32)]}
    plot_flops(curves, tmp_path / "new" / "plot.png", title="FLOPs")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tool(project, tmp_path, monkeypatch, capsys):
    """Runs the command line in another directory; gives its exit code and what it wrote."""

    def run(*arguments):
        script = project / "tools/analysis_tools/get_flops.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        code = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_figures_at_one_size(tool):
    code, out, _ = tool(DETECTOR, "--shape", "64", "96")
    assert code is None
    for text in ("64 x 96", "layers.3", "mask_head", "mmvmamba.selective_scan_2d"):
        assert text in out


def test_figures_at_several_sizes(tool, tmp_path):
    models = ("tiny", "mmpretrain::convnext/convnext-tiny_32xb128_in1k.py")
    files = ("--out", tmp_path / "a.json", "--plot", tmp_path / "a.svg")
    code, out, _ = tool(*models, "--sizes", "64", "128", *files)
    assert code is None
    assert "convnext-tiny_32xb128_in1k" in out
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [(row["model"], row["shape"]) for row in rows] == [
        (model, [side, side]) for model in models for side in (64, 128)
    ]
    assert f"{rows[1]['flops'] / 1e9:.2f}" in out
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_settings_can_be_overridden(tool, tmp_path):
    config = "configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"
    changes = ("model.backbone.arch=small-s2l15", "model.head.num_classes=10")
    tool(config, "--shape", "32", "--out", tmp_path / "a.json", "--cfg-options", *changes)
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["params"] == count_classifier("small-s2l15", (32, 32)).params - 990 * 769


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tyny",), "error: tyny: 'tyny' is neither"),
        (("configs/nothing.py",), "error: no config"),
        (("tiny", "--shape", "1", "2", "3"), "--shape takes"),
        (("tiny", "--plot", "a.png"), "several sizes"),
        (("vanilla-tiny", "--shape", "2"), "error: vanilla-tiny: images of 2x2 pixels"),
    ],
)
def test_mistakes_end_with_one_message(tool, arguments, message):
    code, _, err = tool(*arguments)
    assert code not in (None, 0)
    assert message in (str(code) if isinstance(code, str) else err)
