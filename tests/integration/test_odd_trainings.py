"""Trainings that are not of the usual kind: images of all sizes in a batch, parts not trained."""

import json

import pytest
import torch
import unused_parameters
from tiny import TASKS, command_line, run, run_python, scalars

from mmvmamba.engine import cli
from mmvmamba.models.checkpoint import read_checkpoint

# Height, width. The second and third leave one pixel of the last stage; the first is the widest.
SHAPES = [(64, 160), (7, 31), (96, 5)]


@pytest.mark.parametrize("divisor", [1, 32])
def test_detection_of_images_of_several_sizes(divisor, project, sample_data, tmp_path):
    """Upstream's data_preprocessor pads a batch to its largest image, as it does for any model."""
    pytest.importorskip("mmdet")
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    arguments = command_line(TASKS["mmdet"], project, sample_data, tmp_path)
    arguments.append(f"model.data_preprocessor.pad_size_divisor={divisor}")
    cfg = cli.train_config(cli.parse_train_arguments(arguments))
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    shapes = [(3, *shape) for shape in SHAPES]
    batch = demo_mm_inputs(3, shapes, num_items=[2, 1, 1], num_classes=80, with_mask=True)

    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.backbone.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name

    found = model.eval().test_step(batch)
    for sample, (height, width) in zip(found, SHAPES, strict=True):
        instances = sample.pred_instances
        assert len(instances)
        assert torch.isfinite(instances.scores).all()
        boxes = instances.bboxes
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert instances.masks.shape == (len(instances), height, width)
    assert set(seen) == {torch.Size((96, 160))}


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """What each of the two found, by the case's name."""
    folder = tmp_path_factory.mktemp("group")
    run_python(unused_parameters.__file__, folder, cwd=folder)
    files = (folder / f"{rank}.json" for rank in range(unused_parameters.PROCESSES))
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("name", unused_parameters.CASES)
def test_two_processes_train_as_one_does(name, in_two_processes):
    for found in in_two_processes:
        # Two halves of a mean, in float32, after three steps.
        assert found[name] < 1e-5


def test_a_map_without_a_loss_is_an_error_that_names_the_setting(in_two_processes):
    for found in in_two_processes:
        assert "find_unused_parameters=True" in found["a map that no loss uses"]


def test_a_training_of_a_part_in_two_processes(project, sample_data, tmp_path):
    """Stages that are frozen, and stages after the last map, through the real runner."""
    arguments = command_line(TASKS["mmpretrain"], project, sample_data, tmp_path)
    arguments += ["model.backbone.out_indices=(1,)", "model.head.in_channels=32"]
    arguments += ["model.backbone.frozen_stages=1", "model.backbone.with_cp=True"]
    # Data parallelism notices a missing gradient one step later.
    arguments += ["train_cfg.max_epochs=3", "train_cfg.val_interval=3"]
    run("bash", project / "tools/dist_train.sh", arguments[0], "2", *arguments[1:], cwd=tmp_path)
    assert len([line for line in scalars(tmp_path) if "loss" in line]) == 3
    first, last = (
        read_checkpoint(tmp_path / f"epoch_{epoch}.pth")["state_dict"] for epoch in (2, 3)
    )
    changed = {name for name in first if not first[name].equal(last[name])}
    assert any(name.startswith("backbone.layers.1.blocks") for name in changed)
    assert not any(
        name.startswith(
            (
                *("backbone.patch_embed", "backbone.layers.0", "backbone.layers.1.downsample"),
                *("backbone.layers.2", "backbone.layers.3"),
            )
        )
        for name in changed
    )
