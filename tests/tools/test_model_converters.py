"""Official files become files for our configs and back, completely or not at all."""

import csv
import re
import runpy
import sys

import pytest
import torch
import yaml
from mmengine.config import Config

from mmvmamba.analysis.flops import build_structure
from mmvmamba.engine.cli import load_config
from mmvmamba.engine.runner import load_strictly
from mmvmamba.models.checkpoint import find_state_dict, read_checkpoint
from mmvmamba.registry import MODELS

SAMPLES = {
    "mmpretrain": "configs/sample/vmamba-sample_imagenet.py",
    "mmdet": "configs/sample/mask-rcnn_vmamba-sample_coco.py",
    "mmseg": "configs/sample/upernet_vmamba-sample_ade20k.py",
}


@pytest.fixture
def tool(project, tmp_path, monkeypatch, capsys):
    """Runs the command line in another directory; gives its error, or None, and its output."""

    def run(*arguments):
        script = project / "tools/model_converters/convert_checkpoint.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            return str(error.code), capsys.readouterr().out
        return None, capsys.readouterr().out

    return run


def random_state(scope: str) -> dict[str, torch.Tensor]:
    """Values for every key of a sample model, no two alike."""
    torch.manual_seed(0)
    return {
        key: torch.rand(value.shape).to(value.dtype)
        for key, value in build_structure(load_config(SAMPLES[scope])).state_dict().items()
    }


def official_content(scope: str) -> dict:
    """What an official file of a sample model holds."""
    state = random_state(scope)
    if scope != "mmpretrain":
        meta = {"epoch": 12, "dataset_meta": {"CLASSES": ("cat", "dog")}}
        return {"meta": meta, "state_dict": state, "optimizer": {"state": {}}, "message_hub": {}}
    renamed = {
        key.replace("head.", "classifier.", 1)
        if key.startswith("head.")
        else key.removeprefix("backbone."): value
        for key, value in state.items()
    }
    stale = {key: torch.zeros_like(value) for key, value in renamed.items()}
    return {"model": stale, "model_ema": renamed, "epoch": 264, "max_accuracy": 82.5}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("scope", SAMPLES)
def test_official_to_ours_and_back_is_the_same_bit_for_bit(scope, tool, tmp_path):
    content = official_content(scope)
    torch.save(content, tmp_path / "official.pth")
    config = ("--config", SAMPLES[scope])
    error, _ = tool("official.pth", "new/ours.pth", "--to", "ours", *config)
    assert error is None
    ours = read_checkpoint(tmp_path / "new/ours.pth")
    assert_same(ours["state_dict"], random_state(scope))
    assert ours["meta"]["converted_from"] == "official.pth"
    if scope == "mmdet":
        # What an inferencer needs stays, a training's state goes.
        assert ours["meta"]["dataset_meta"] == {"CLASSES": ("cat", "dog")}
        assert set(ours) == {"meta", "state_dict"}
    model = MODELS.build(load_config(SAMPLES[scope]).model | {"_scope_": scope})
    load_strictly(model, find_state_dict(ours, "ours.pth")[1], "ours.pth")
    assert_same(model.state_dict(), random_state(scope))

    error, _ = tool("new/ours.pth", "back.pth", "--to", "official", *config)
    assert error is None
    back = read_checkpoint(tmp_path / "back.pth")
    if scope == "mmpretrain":
        assert_same(back["model"], content["model_ema"])
    else:
        assert_same(back["state_dict"], content["state_dict"])


def test_the_report_has_every_key(tool, tmp_path):
    content = official_content("mmpretrain")
    content["model_ema"]["outnorm3.weight"] = torch.ones(256)
    weight = "layers.0.blocks.0.op.in_proj.weight"
    content["model_ema"][weight] = content["model_ema"][weight][:, :, None, None]
    torch.save(content, tmp_path / "a.pth")
    files = ("a.pth", "b.pth", "--report", "report/keys.csv")
    error, out = tool(*files, "--to", "ours", "--config", SAMPLES["mmpretrain"])
    assert error is None
    assert "left out: outnorm3.weight" in out
    with (tmp_path / "report/keys.csv").open() as file:
        rows = {row["key in the file"]: row for row in csv.DictReader(file)}
    assert rows.keys() == content["model_ema"].keys()
    assert rows["classifier.head.bias"]["key written"] == "head.head.bias"
    assert rows["classifier.head.bias"]["shape"] == "1000"
    assert rows["classifier.head.bias"]["what"] == "renamed"
    assert rows[weight]["what"] == "renamed, reshaped"
    assert rows["outnorm3.weight"]["what"] == "left out"
    assert read_checkpoint(tmp_path / "b.pth")["state_dict"][f"backbone.{weight}"].shape == (32, 32)


def test_another_entry_can_be_asked_for(tool, tmp_path):
    content = official_content("mmpretrain")
    torch.save(content, tmp_path / "a.pth")
    config = ("--to", "ours", "--config", SAMPLES["mmpretrain"])
    assert tool("a.pth", "b.pth", *config, "--entry", "model")[0] is None
    assert not any(v.any() for v in read_checkpoint(tmp_path / "b.pth")["state_dict"].values())
    error, _ = tool("a.pth", "c.pth", *config, "--entry", "ema")
    assert "error: a.pth has no state dict: expected one under ema" in error


def test_a_vanilla_detector_from_before_the_release(tool, tmp_path):
    config = tmp_path / "vanilla.py"
    config.write_text(
        "_base_ = 'mmvmamba::sample/mask-rcnn_vmamba-sample_coco.py'\n"
        "model = dict(backbone=dict(arch=dict(mlp_ratio=0, gated=True, d_state=16, ssm_ratio=2.0,\n"
        "    stem='v1', downsample='v1')))\n"
    )
    state = build_structure(Config.fromfile(config)).state_dict()
    state = {key: torch.rand(value.shape).to(value.dtype) for key, value in state.items()}
    old = {
        key.replace(".op.", ".self_attention.")
        .replace(".0.norm.", ".0.ln_1.")
        .replace(".1.norm.", ".1.ln_1.")
        .replace("patch_embed.0.", "patch_embed.proj.")
        .replace("patch_embed.2.", "patch_embed.norm."): value
        for key, value in state.items()
    }
    assert "backbone.layers.2.blocks.1.ln_1.weight" in old
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    error, out = tool("old.pth", "ours.pth", "--to", "ours", "--config", config)
    assert error is None
    assert "renamed" in out
    assert_same(read_checkpoint(tmp_path / "ours.pth")["state_dict"], state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("backbone.layers.0.blocks.0.op.Ds"), "1 missing in the file"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unknown to the model:\n    extra"),
        (lambda s: s.update({"neck.fpn_convs.0.conv.bias": torch.ones(3)}), "1 of another shape"),
    ],
)
def test_a_file_of_another_model_is_refused_and_nothing_written(tool, tmp_path, damage, message):
    content = official_content("mmdet")
    damage(content["state_dict"])
    torch.save(content, tmp_path / "other.pth")
    for to in ("ours", "official"):
        error, _ = tool("other.pth", "b.pth", "--to", to, "--config", SAMPLES["mmdet"])
        assert error.startswith("error: other.pth does not fit the model")
        assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.999])
def test_an_interrupted_file_is_refused_by_name(tool, tmp_path, keep):
    torch.save(official_content("mmdet"), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: int(len(whole) * keep)])
    error, _ = tool("a.pth", "b.pth", "--to", "ours", "--config", SAMPLES["mmdet"])
    assert "a.pth is " in error
    assert "Fetch or write it again" in error
    assert not (tmp_path / "b.pth").exists()


def test_a_target_is_overwritten_only_when_asked_to(tool, tmp_path):
    torch.save(official_content("mmseg"), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_text("precious")
    arguments = ("a.pth", "b.pth", "--to", "ours", "--config", SAMPLES["mmseg"])
    error, _ = tool(*arguments)
    assert error == "error: b.pth exists. Name another file, or overwrite it with --force."
    assert (tmp_path / "b.pth").read_text() == "precious"
    assert tool(*arguments, "--force")[0] is None
    assert "state_dict" in read_checkpoint(tmp_path / "b.pth")


def test_a_failed_write_leaves_nothing(tool, tmp_path, monkeypatch):
    torch.save(official_content("mmseg"), tmp_path / "a.pth")
    real_save = torch.save

    def full_disk(content, path):
        real_save({}, path)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        tool("a.pth", "b.pth", "--to", "ours", "--config", SAMPLES["mmseg"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_config_that_does_not_exist(tool, tmp_path):
    torch.save(official_content("mmseg"), tmp_path / "a.pth")
    error, _ = tool("a.pth", "b.pth", "--to", "ours", "--config", "configs/nothing.py")
    assert error.startswith("error: no config configs/nothing.py")


def test_the_table_of_official_files_is_that_of_the_metafiles(project):
    weights = {}
    for metafile in (project / "configs").glob("*/metafile.yml"):
        for model in yaml.safe_load(metafile.read_text())["Models"]:
            if "Weights" in model:
                weights.setdefault(model["Weights"], []).append(model["Config"])
    text = (project / "docs/checkpoints.md").read_text()
    listed = dict(
        re.findall(r"^\| \[\S+\]\((https://\S+)\) \| \[\S+\]\(\.\./(\S+)\) \|$", text, re.M)
    )
    assert listed.keys() == weights.keys()
    assert all(config in weights[address] for address, config in listed.items())
