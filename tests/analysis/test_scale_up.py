"""Scaling up: the accuracy of the test tool, a head that alone learns, and nothing done twice."""

import json
import pickle
import sys
import uuid
from pathlib import Path

import pytest
import torch

from mmvmamba.analysis import scale_up
from mmvmamba.analysis.scale_up import Study, run_study, set_image_size, tuning_config
from mmvmamba.engine import cli
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.checkpoint import read_checkpoint
from mmvmamba.registry import MODELS

CONFIG = "configs/sample/vmamba-sample_imagenet.py"
SMALL = {
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "test_dataloader.num_workers": 0,
    "test_dataloader.batch_size": 2,
    "train_dataloader.batch_size": 2,
    "model.backbone.arch.dims": 16,
    "model.backbone.arch.depths": (1, 1, 1, 1),
    "model.head.in_channels": 128,
    "model.head.num_classes": 1000,
    "randomness.seed": 0,
}
TUNING = {"train_cfg.max_epochs": 1, "optim_wrapper.accumulative_counts": 1}


@pytest.fixture(scope="module")
def checkpoint(sample_data, tmp_path_factory):
    """A classifier of random weights that takes every image for the class of the first one."""
    from mmpretrain.datasets import ImageNet

    labels = ImageNet(str(sample_data / "imagenet"), split="val").get_gt_labels()
    cfg = cli.load_config(CONFIG)
    cfg.merge_from_dict(SMALL)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model | {"_scope_": "mmpretrain"})
    model.head.head.bias.data[labels[0]] = 10
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return str(path)


@pytest.fixture
def study(checkpoint, sample_data, tmp_path):
    def make(**changes):
        settings = {
            "cfg_options": SMALL,
            "tuning_options": TUNING,
            "data_root": str(sample_data / "imagenet"),
            "batches": (1, 2),
            "seconds": 0,
            "work_dir": tmp_path / "work",
        }
        return Study(CONFIG, checkpoint, **(settings | changes))

    return make


def test_the_accuracy_is_the_test_tools(study, checkpoint, sample_data, tmp_path):
    dump = tmp_path / "predictions.pkl"
    evaluators = [
        {"type": "Accuracy", "topk": (1, 5)},
        {"type": "DumpResults", "out_file_path": str(dump)},
    ]
    settings = study(cfg_options=SMALL | {"test_evaluator": evaluators})
    costs = []
    for size in (64, 96):
        found = run_study(settings, (size,))[size]
        costs.append(found["cost"])
        predictions = pickle.loads(dump.read_bytes())
        name = uuid.uuid4().hex
        options = cli.parse_test_arguments(
            [
                CONFIG, checkpoint, "--data-root", str(sample_data / "imagenet"),
                "--work-dir", str(tmp_path / "test"), "--out", str(dump), "--cfg-options",
                f"experiment_name={name}", f"visualizer.name={name}",
            ]
        )  # fmt: skip
        options.cfg_options |= SMALL
        pipeline = cli.load_config(CONFIG).test_pipeline
        pipeline[1].scale, pipeline[2].crop_size = size * 104 // 96, size
        options.cfg_options["test_dataloader.dataset.pipeline"] = pipeline
        assert found["accuracy"] == cli.test(options)
        assert found["accuracy"]["accuracy/top1"] > 0
        expected = pickle.loads(dump.read_bytes())
        assert len(predictions) == len(expected) >= 2
        for one, other in zip(predictions, expected, strict=True):
            assert one["img_shape"] == other["img_shape"] == (size, size)
            torch.testing.assert_close(one["pred_score"], other["pred_score"], rtol=0, atol=0)
    small, large = costs
    assert small["failure"] == ""
    assert small["images_per_second"] > 0
    assert small["training_images_per_second"] > 0
    assert small["params"] == large["params"]
    # The same operations at 2.25 times as many positions, but for the head's matrix product.
    assert large["flops"] / small["flops"] == pytest.approx(2.25, rel=0.05)


def test_tuning_changes_the_last_layer_alone(study, checkpoint):
    settings = study(tune=True)
    found = run_study(settings, (64,))
    assert "accuracy/top1" in found[64]["tuned"]
    before = read_checkpoint(checkpoint)["state_dict"]
    after = read_checkpoint(settings.work_dir / "tuned_64/epoch_1.pth")["state_dict"]
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.head.weight", "head.head.bias"}


def test_the_tuning_is_that_of_the_configs(study):
    found = tuning_config(study(tune=True, tuning_options={}), 288)
    name = "configs/vmamba_scale_up/vmamba-tiny-s1l8_linear-8xb64-30e_in1k-288px.py"
    expected = cli.load_config(name)
    for key in ("train_cfg", "optim_wrapper", "param_scheduler", "load_ignore"):
        assert found[key] == expected[key]
    assert found.model.head.loss == expected.model.head.loss
    assert found.model.backbone.frozen_stages == expected.model.backbone.frozen_stages
    assert found.train_dataloader.dataset.pipeline == found.test_dataloader.dataset.pipeline


@pytest.mark.parametrize("size", [288, 512, 768])
def test_sizes_are_those_of_the_configs(size):
    cfg = cli.load_config("configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k.py")
    set_image_size(cfg, size)
    expected = cli.load_config(f"configs/vmamba_scale_up/vmamba-tiny-s1l8_8xb128_in1k-{size}px.py")
    assert cfg.test_dataloader.dataset.pipeline == expected.test_dataloader.dataset.pipeline


def test_what_is_done_is_not_done_again(study, monkeypatch):
    calls = []

    def measured(part):
        def measure(study, size):
            if (part, size) == ("accuracy", 96) and len(calls) < 4:
                raise KeyboardInterrupt
            calls.append((part, size))
            return {"accuracy/top1": float(size), "failure": ""}

        return measure

    for name, part in (("measure_cost", "cost"), ("measure_accuracy", "accuracy")):
        monkeypatch.setattr(scale_up, name, measured(part))
    with pytest.raises(KeyboardInterrupt):
        run_study(study(), (64, 96))
    assert calls == [("cost", 64), ("accuracy", 64), ("cost", 96)]
    calls.append("begin")
    found = run_study(study(), (64, 96, 128))
    assert calls[4:] == [("accuracy", 96), ("cost", 128), ("accuracy", 128)]
    assert {size: parts["accuracy"]["accuracy/top1"] for size, parts in found.items()} == {
        64: 64, 96: 96, 128: 128
    }  # fmt: skip
    table = scale_up.study_table(found)
    assert [row[5] for row in table.rows] == ["64.00", "96.00", "128.00"]
    accuracy, *_ = scale_up.draw_study(found).axes
    (line,) = accuracy.lines
    assert line.get_label() == "as trained"
    assert line.get_xydata().tolist() == [[64, 64], [96, 96], [128, 128]]


def test_results_of_another_study_are_refused(study):
    settings = study()
    settings.work_dir.mkdir()
    settings.file.write_text(
        json.dumps({"study": {**settings.identity(), "precision": "bf16"}, "sizes": {}})
    )
    with pytest.raises(UsageError, match=r"another study.*\n  precision: bf16, now fp32"):
        run_study(settings, (64,))
    settings.file.write_text("{")
    with pytest.raises(UsageError, match="is not a file of results"):
        run_study(settings, (64,))


def test_what_cannot_be_scaled_is_refused(study):
    cfg = cli.load_config(CONFIG)
    del cfg.test_dataloader.dataset.pipeline[2]
    with pytest.raises(UsageError, match="no CenterCrop .* LoadImageFromFile, ResizeEdge"):
        set_image_size(cfg, 64)
    with pytest.raises(UsageError, match="linear tuning is of VMamba .* has ResNet"):
        scale_up._check_tunable(cli.load_config("mmpretrain::resnet/resnet18_8xb32_in1k.py"))


def test_command_line(load_tool, study, checkpoint, sample_data, monkeypatch, tmp_path, capsys):
    tool = load_tool("scale_up")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    options = [f"{key}={value}".replace(" ", "") for key, value in SMALL.items()]
    arguments = [
        CONFIG, checkpoint, "--sizes", "64", "--data-root", str(sample_data / "imagenet"),
        "--seconds", "0", "--device", "cpu", "--cfg-options", *options,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["scale_up.py", *arguments])
    for _ in range(2):
        tool.main()
        out = capsys.readouterr().out
        results = json.loads(
            Path("work_dirs/scale_up/vmamba-sample_imagenet/scale_up.json").read_text()
        )
        assert f"{results['sizes']['64']['accuracy']['accuracy/top1']:.2f}" in out
    assert "64 pixels, accuracy: already done" in out
    picture = Path("work_dirs/scale_up/vmamba-sample_imagenet/scale_up.png")
    assert picture.stat().st_size > 10_000
