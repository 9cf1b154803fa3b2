"""New-style configs, whose types are classes, wrapped test sets and folders of any pictures."""

import uuid

import numpy as np
import pytest
import torch
from PIL import Image

from mmvmamba.analysis.flops import count_config
from mmvmamba.analysis.inspection import find_images
from mmvmamba.analysis.pictures import predict_and_draw, training_samples
from mmvmamba.analysis.subjects import find_subject
from mmvmamba.engine import cli
from mmvmamba.engine.errors import DataError, UsageError

BASE = """
from mmengine.config import read_base
from mmengine.dataset import ConcatDataset, DefaultSampler
from mmengine.optim import OptimWrapper
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs, CenterCrop
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import ClsDataPreprocessor, ImageClassifier
from mmpretrain.engine.hooks import VisualizationHook
from mmpretrain.visualization import UniversalVisualizer
from torch.optim import AdamW

default_scope = None
data_preprocessor = dict(type=ClsDataPreprocessor, mean=[120.0] * 3, std=[60.0] * 3)
pipeline = [
    dict(type=LoadImageFromFile), dict(type=CenterCrop, crop_size=32), dict(type=PackInputs)
]
dataset = dict(type=CustomDataset, data_root={root!r}, pipeline=pipeline, extensions={suffixes!r})
sampler = dict(type=DefaultSampler, shuffle=False)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset, sampler=sampler)
test_dataloader = dict(
    batch_size=2, num_workers=0, sampler=sampler,
    dataset=dict(type=ConcatDataset, datasets=[dataset, dataset]),
)
test_evaluator = dict(type=Accuracy)
test_cfg = dict()
visualizer = dict(type=UniversalVisualizer)
default_hooks = dict(visualization=dict(type=VisualizationHook))
"""
MINE = """
from mmengine.config import read_base

with read_base():
    from .base import *

from mmpretrain.models import ImageClassifier
from mmvmamba.models import VMamba
from mmvmamba.models.cls_head import VMambaClsHead

train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-4))
model = dict(
    type=ImageClassifier,
    backbone=dict(type=VMamba, arch=dict(dims=8, depths=(1,)), out_indices=(0,), outnorm=False),
    head=dict(type=VMambaClsHead, num_classes=2, in_channels=8),
)
"""
SUFFIXES = (".tif", ".bmp", ".webp")


@pytest.fixture
def pictures(tmp_path):
    """A folder for each of two classes, with a picture of each kind."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for suffix in SUFFIXES:
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"one{suffix}", lossless=True)
    return tmp_path / "data"


@pytest.fixture
def config(pictures, tmp_path):
    (tmp_path / "base.py").write_text(BASE.format(root=str(pictures), suffixes=SUFFIXES))
    (tmp_path / "mine.py").write_text(MINE)
    model = find_subject(str(tmp_path / "mine.py")).build((32, 32)).model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    return str(tmp_path / "mine.py")


def arguments(config, tmp_path, *more):
    names = (f"{key}={uuid.uuid4().hex}" for key in ("experiment_name", "visualizer.name"))
    return [config, *more, "--work-dir", str(tmp_path / "out"), "--cfg-options", *names]


def test_trains(config, tmp_path):
    options = cli.parse_train_arguments([*arguments(config, tmp_path), "optim_wraper.x=1"])
    cfg = cli.train_config(options)
    (told,) = cfg.notices
    assert "optim_wraper.x has no effect" in told
    cli.build_runner(cfg).train()
    assert (tmp_path / "out/epoch_1.pth").is_file()


def test_is_tested_with_augmentation_of_all_data_sets(config, tmp_path):
    weights = str(tmp_path / "weights.pth")
    more = (weights, "--tta", "--out", str(tmp_path / "o.pkl"))
    cfg = cli.test_config(cli.parse_test_arguments(arguments(config, tmp_path, *more)))
    for dataset in cfg.test_dataloader.dataset.datasets:
        assert dataset.pipeline[-1].type == "TestTimeAug"
    metrics = cli.build_runner(cfg).test()
    assert 0 <= metrics["accuracy/top1"] <= 100
    options = cli.parse_test_arguments(arguments(config, tmp_path, *more, "--show-dir", "show"))
    with pytest.raises(UsageError, match="--tta with --show or --show-dir"):
        cli.test_config(options)


def test_is_tested_with_pictures(config, tmp_path):
    more = (str(tmp_path / "weights.pth"), "--show-dir", str(tmp_path / "show"))
    cfg = cli.test_config(cli.parse_test_arguments(arguments(config, tmp_path, *more)))
    cli.build_runner(cfg).test()
    # Both data sets have pictures of the same names.
    assert len(list((tmp_path / "show").rglob("*.png"))) >= 3


def test_is_counted_and_drawn(config, pictures, tmp_path):
    cfg = cli.load_config(config)
    assert count_config(cfg, (32, 32)).params > 0
    assert len(list(training_samples(cfg))) == 6
    pairs = list(predict_and_draw(cfg, str(tmp_path / "weights.pth")))
    assert len(pairs) == 12
    own = list(predict_and_draw(cfg, str(tmp_path / "weights.pth"), find_images([pictures])))
    for one, path in zip(own, sorted(pictures.rglob("*.*")), strict=True):
        assert one.path == path
        np.testing.assert_array_equal(one.image, np.asarray(Image.open(path)))


def test_other_files_of_a_folder_are_named(pictures, caplog):
    (pictures / "notes.txt").write_text("x")
    (pictures / "b" / "raw.dng").write_text("x")
    assert len(find_images([pictures])) == 6
    for path in pictures.rglob("one*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"there are 1 \.\w+, 1 \.\w+"):
        find_images([pictures])


@pytest.mark.parametrize("scope", ["mmpretrain", "mmseg"])
def test_data_sets_name_the_suffixes_that_they_do_not_take(
    config, pictures, tmp_path, scope, caplog
):
    cfg = cli.load_config(config)
    cfg.train_dataloader.dataset.extensions = (".bmp",)
    if scope == "mmseg":
        cfg.train_dataloader.dataset = {
            "type": "mmseg.BaseSegDataset",
            "data_root": str(pictures),
            "img_suffix": ".bmp",
            "data_prefix": {"img_path": "a"},
            "metainfo": {"classes": ["a", "b"]},
            "pipeline": [],
        }
    lines = []
    from mmvmamba.engine import data_checks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_checks, "print_log", lambda text, **_: lines.append(text))
        data_checks.build_dataloader(cfg.train_dataloader, training=True)
        (line,) = lines
        assert ("1 .tif" if scope == "mmseg" else "2 .tif") in line
        assert ".webp" in line
        assert "bmp)" not in line
        for path in pictures.rglob("*.bmp"):
            path.unlink()
        with pytest.raises(DataError, match=r"In its folders are: \d \.\w+, \d \.\w+"):
            data_checks.build_dataloader(cfg.train_dataloader, training=True)
