"""Warm-ups: those of recipes as they are, in short trainings short enough, and the same drawn."""

import numpy as np
import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from mmvmamba.analysis.curves import scheduled
from mmvmamba.engine import cli
from mmvmamba.engine.schedules import fit_warm_up

FINETUNE = "configs/finetune/"
BOXES = f"{FINETUNE}faster-rcnn_vmamba-tiny-s1l8_1xb4-finetune_boxes.py"
IMAGES = f"{FINETUNE}vmamba-tiny-s1l8_1xb64-finetune_images.py"
MASKS = f"{FINETUNE}upernet_vmamba-tiny-s1l8_1xb4-finetune_masks.py"
IMAGENET = "configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k.py"
UPSTREAM = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"


def rates(schedulers, iterations, epoch_length, base=1.0):
    """The rate in each iteration, by mmengine's own schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    built = [
        PARAM_SCHEDULERS.build(
            {"end": iterations // epoch_length if one.get("by_epoch", True) else iterations, **one},
            default_args={"optimizer": optimizer, "epoch_length": epoch_length},
        )
        for one in schedulers
    ]
    found = []
    optimizer.step()
    for iteration in range(1, iterations + 1):
        found.append(optimizer.param_groups[0]["lr"])
        for one in built:
            if not one.by_epoch or iteration % epoch_length == 0:
                one.step()
    return np.array(found)


@pytest.mark.parametrize(
    ("end", "iterations", "expected"),
    [(1000, 2000, 1000), (1000, 1999, 199), (500, 12, 2), (1, 8, 2)],
)
def test_a_warm_up_takes_half_of_the_training_at_most(end, iterations, expected):
    warm_up = {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "end": end}
    decay = {"type": "PolyLR", "by_epoch": False, "begin": end, "end": 160000}
    fitted, lines = fit_warm_up([warm_up, decay], iterations, 100)
    assert bool(lines) == (end != expected)
    if not lines:
        assert fitted == [warm_up, decay]
    rate = rates(fitted, iterations, 100)
    assert rate[0] == pytest.approx(0.01)
    assert rate[expected - 1] == pytest.approx(1.0)
    assert np.all(np.diff(rate[:expected]) > 0)


@pytest.mark.parametrize("iterations", [2, 3, 7, 10, 39, 400])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("converted", [True, False])
def test_whatever_the_length_the_rate_reaches_its_peak_and_ends_below(
    iterations, epochs, converted
):
    """The ImageNet recipe's schedulers: 20 epochs up, then down to the end, which is not named."""
    schedulers = [
        {"type": "LinearLR", "start_factor": 0.001, "by_epoch": True, "end": 20},
        {"type": "CosineAnnealingLR", "eta_min": 0.0, "by_epoch": True, "begin": 20},
    ]
    for one in schedulers:
        one["convert_to_iter_based"] = converted
    total = iterations * epochs
    fitted, lines = fit_warm_up(schedulers, total, iterations)
    assert len(lines) == 1
    rate = rates(fitted, total, iterations)
    assert rate.max() >= 0.9
    if converted and total >= 10:
        assert rate[max(total // 10, 2) - 1] == pytest.approx(1.0)
        assert rate[-1] < 0.2


def test_a_training_of_one_step_runs():
    """A share of it is less than a step, which mmengine refuses."""
    share = {"by_epoch": True, "convert_to_iter_based": True}
    schedulers = [
        {"type": "LinearLR", "start_factor": 0.1, "end": 0.05, **share},
        {"type": "CosineAnnealingLR", "begin": 0.05, "end": 1, **share},
    ]
    assert rates(fit_warm_up(schedulers, 1, 1)[0], 1, 1) == pytest.approx([0.1])


def test_what_is_no_warm_up_stays():
    schedulers = [
        {"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.1, "by_epoch": False, "end": 90},
        {"type": "MultiStepLR", "milestones": [8], "by_epoch": True, "begin": 0, "end": 12},
        {"type": "ConstantLR", "factor": 1.0, "by_epoch": True, "begin": 2, "end": 300},
    ]
    assert fit_warm_up(schedulers, 100, 10) == (schedulers, [])
    assert fit_warm_up(schedulers[0], 100, 10) == (schedulers[:1], [])
    assert fit_warm_up(None, 100, 10) == ([], [])
    search = {"type": "LinearLR", "start_factor": 1e-4, "by_epoch": False, "end": 100}
    assert fit_warm_up(search, 100, 10) == ([search], [])


def test_a_warm_up_of_one_epoch_ends():
    """mmengine's own would leave the rate at its factor for good."""
    one = {"type": "LinearLR", "start_factor": 0.1, "by_epoch": True, "end": 1}
    rate = rates(fit_warm_up(one, 50, 10)[0], 50, 10)
    np.testing.assert_allclose(rate[:10], np.linspace(0.1, 1, 10))
    np.testing.assert_allclose(rate[9:], 1.0)


@pytest.mark.parametrize(
    ("config", "size", "overrides"),
    [
        (BOXES, 40, {}),
        (BOXES, 40, {"max_epochs": 1}),
        (BOXES, 40, {"train_cfg.max_epochs": 1}),
        (IMAGES, 30, {}),
        (IMAGES, 640, {"max_epochs": 1}),
        (IMAGES, 640, {"train_cfg.max_epochs": 1}),
        (MASKS, 40, {"max_iters": 400}),
        (MASKS, 40, {"train_cfg.max_iters": 400}),
        (IMAGENET, 25600, {"train_cfg.max_epochs": 10}),
        (UPSTREAM, 40, {}),
    ],
    ids=lambda value: str(value).rpartition("/")[2],
)
def test_short_trainings_reach_the_peak(config, size, overrides):
    cfg = cli.load_config(config, overrides)
    cfg.auto_scale_lr = None
    rate = scheduled(cfg, dataset_size=size)["lr"]
    assert rate.max() == pytest.approx(cfg.optim_wrapper.optimizer.lr, rel=0.03)
    assert rate.argmax() <= len(rate) / 8
    assert rate[0] < rate.max() / 2


def test_long_trainings_are_as_they_were():
    for config, size, up in ((IMAGES, 6400, 100), (MASKS, 40, 500), (IMAGENET, 1280, 200)):
        cfg = cli.load_config(config)
        cfg.auto_scale_lr = None
        settings = [dict(one) for one in cfg.param_scheduler]
        rate = scheduled(cfg, dataset_size=size)["lr"]
        length = size // cfg.train_dataloader.batch_size
        np.testing.assert_array_equal(
            rate, rates(settings, len(rate), length, cfg.optim_wrapper.optimizer.lr)
        )
        assert rate.argmax() == up - 1
