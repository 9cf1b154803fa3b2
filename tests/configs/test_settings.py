"""Settings: what is overridden takes effect, or its user is told."""

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config

from mmvmamba.engine import cli
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.optim import rate_notice
from mmvmamba.engine.settings import ConfigSource

IMAGES = "configs/finetune/vmamba-tiny-s1l8_1xb64-finetune_images.py"
MASKS = "configs/finetune/upernet_vmamba-tiny-s1l8_1xb4-finetune_masks.py"

# A setting without effect, and what is named instead.
WITHOUT_EFFECT = {
    "optimizer.lr": "optim_wrapper.optimizer.lr",
    "optim_wraper.optimizer.lr": "optim_wrapper.optimizer.lr",
    "data.samples_per_gpu": "train_dataloader.batch_size",
    "runner.max_epochs": "train_cfg.max_epochs",
    "lr": "optim_wrapper.optimizer.lr",
    "train_dataloader.batchsize": "batch_size",
    "train_cfg.max_epoch": "max_epochs",
    "randomness.sed": "seed",
    "default_hooks.loggr.interval": "logger",
    "param_scheduler.0.start_facor": "start_factor",
    "model.head.loss.label_smooth": "label_smooth_val",
    "train_dataloader.dataset.pipeline.1.scal": "scale",
}
# What the config does not have, and something reads.
READ = {
    "model.backbone.with_cp": True,
    "randomness.seed": 0,
    "experiment_name": "x",
    "visualizer.name": "x",
    "default_hooks.visualization.enable": True,
    "optim_wrapper.accumulative_counts": 2,
    "optim_wrapper.optimizer.amsgrad": True,
    "train_dataloader.dataset.indices": 10,
    "param_scheduler.1.T_max": 3,
    "model.head.topk": (1,),
    "env_cfg.cudnn_benchmark": True,
    "load_ignore": ["head"],
}


def notices(config, **overrides):
    return cli.load_config(str(config), overrides).get("notices", [])


def test_settings_without_effect_are_told_with_the_nearest_name():
    wrong = dict.fromkeys(WITHOUT_EFFECT, 1)
    told = notices(IMAGES, **READ, **wrong)
    assert [text.split()[1].rstrip(":") for text in told] == list(wrong)
    for text, near in zip(told, WITHOUT_EFFECT.values(), strict=True):
        assert f" {near}?" in text or f" {near} today." in text


def test_a_variable_of_an_inherited_file_is_told_with_what_it_stands_for(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(f'_base_ = "mmvmamba::{MASKS.removeprefix("configs/")}"\nmax_iters = 3\n')
    (in_file, on_line) = notices(mine, **{"optimizer.lr": 0.5})
    assert (
        in_file == "mine.py sets max_iters, which nothing reads. Did you mean train_cfg.max_iters?"
    )
    assert "optimizer is a variable" in on_line
    assert "optim_wrapper.optimizer.lr" in on_line


def test_variables_of_the_file_take_effect():
    cfg = cli.load_config(MASKS, {"max_iters": 400, "classes": ["a", "b"]})
    assert "notices" not in cfg
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler[1].end) == (400, 400)
    assert cfg.model.decode_head.num_classes == 2
    assert cfg.val_dataloader.dataset.metainfo.classes == ["a", "b"]
    assert cfg.filename.endswith(MASKS)


def test_a_file_of_ones_own(tmp_path):
    base, mine = tmp_path / "base.py", tmp_path / "mine.py"
    base.write_text("train_cfg = dict(max_epochs=3)\nmodel = dict(type='A')\n")
    mine.write_text(
        "_base_ = ['./base.py']\noptim_wraper = dict()\nepochs = 5\n"
        "train_cfg = dict(max_epochs=epochs)\ndef _helper():\n    return epochs\n"
    )
    cfg = cli.load_config(str(mine), {"epochs": 7})
    assert cfg.train_cfg.max_epochs == 7
    (told,) = cfg.pop("notices")
    assert told == "mine.py sets optim_wraper, which nothing reads. Did you mean optim_wrapper?"
    # What was dumped has the variables of all files, which no longer are of use.
    cfg.dump(tmp_path / "dumped.py")
    assert not ConfigSource(tmp_path / "dumped.py").inherits
    (told,) = notices(tmp_path / "dumped.py")
    assert "optim_wraper" in told


def test_the_zoo_sets_nothing_in_vain(project):
    configs = [p for p in (project / "configs").rglob("*.py") if "_base_" not in p.parts]
    assert len(configs) > 50
    assert {path: ConfigSource(path).unread for path in configs if ConfigSource(path).unread} == {}


@pytest.mark.parametrize(
    "text", ["model.backbone.arch=dict(dims=96,depths=[2,2])", "a={b:1}", "a", "a=[(1,2)"]
)
def test_what_is_no_value_is_refused_with_what_can_be_given(text, capsys):
    parser = argparse.ArgumentParser()
    cli.add_cfg_options(parser)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--cfg-options", text])
    assert stopped.value.code == 2
    assert "model.backbone.arch.dims=96" in capsys.readouterr().err


def test_dicts_where_there_is_another_thing(tmp_path):
    base, mine = tmp_path / "base.py", tmp_path / "mine.py"
    base.write_text(
        "model = dict(backbone=dict(type='mmvmamba.VMamba', arch='tiny'))\nparam_scheduler = [{}]\n"
    )
    mine.write_text("_base_ = './base.py'\nmodel = dict(backbone=dict(arch=dict(dims=96)))\n")
    with pytest.raises(UsageError, match=r"arch is a dict .* is a str.*arch=dict\(_delete_=True"):
        cli.load_config(str(mine))
    dims = {"model.backbone.arch.dims": 96}
    with pytest.raises(UsageError, match=r"put model\.backbone\.arch\._delete_=True first"):
        cli.load_config(str(base), dims)
    cfg = cli.load_config(str(base), {"model.backbone.arch._delete_": True, **dims})
    assert cfg.model.backbone.arch == {"dims": 96}
    with pytest.raises(UsageError, match=r"as param_scheduler\.0\.end"):
        cli.load_config(str(base), {"param_scheduler.end": 3})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("arhc='tiny'", "VMamba has no argument 'arhc'. Did you mean arch?"),
        ("arch='tinny'", "arch='tinny' is unknown; did you mean 'tiny'?"),
        ("in_channels=0", "in_channels=0 must be an integer of at least 1"),
        ("arch=dict(dims=96)", "has no depths"),
    ],
)
def test_a_wrong_argument_of_the_backbone_is_one_line(
    project, tmp_path, line, message, monkeypatch
):
    mine = tmp_path / "mine.py"
    base = "mmvmamba::sample/vmamba-sample_imagenet.py"
    mine.write_text(
        f"_base_ = '{base}'\n"
        f"model = dict(backbone=dict(_delete_=True, type='mmvmamba.VMamba', {line}))\n"
    )
    ended = []
    monkeypatch.setattr(cli, "exit_for_good", ended.append)

    def build():
        from mmengine.registry import MODELS

        MODELS.build(cli.load_config(str(mine)).model.backbone)

    cli.run_command(build)
    assert len(ended) == 1
    assert ended[0].startswith("error: ")
    assert message in ended[0]


@pytest.mark.parametrize(
    ("optimizer", "backbone", "told"),
    [
        ({"type": "SGD", "lr": 0.01, "momentum": 0.9}, {}, True),
        ({"type": "SGD", "lr": 1e-4}, {}, False),
        ({"type": "AdamW", "lr": 1e-4}, {}, False),
        ({"type": "SGD", "lr": 0.05}, {"frozen_stages": 4}, False),
    ],
)
def test_sgd_at_a_resnets_rate_is_told(optimizer, backbone, told):
    model = {"backbone": {"type": "mmvmamba.VMamba", **backbone}}
    notice = rate_notice(Config({"model": model, "optim_wrapper": {"optimizer": optimizer}}))
    assert bool(notice) == told
    assert not told or ("type='AdamW', lr=1e-4" in notice and "weight_decay=0.05" in notice)


def test_a_resnets_recipe_with_the_backbone_alone_is_told(sample_data, tmp_path):
    """As the README's snippet makes it of an upstream config."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'\n"
        "model = dict(backbone=dict(_delete_=True, type='mmvmamba.VMamba', arch='tiny'))\n"
    )
    arguments = [str(mine), "--data-root", str(Path(sample_data) / "imagenet")]
    cfg = cli.train_config(cli.parse_train_arguments(arguments))
    (told,) = cfg.notices
    assert "SGD with lr=0.1" in told
