"""The recipes beside the models: multi-scale training and test, and the improved ones."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from zoo import CONFIGS, batch, build, load, on_the_cpu, plain, shrink

from mmvmamba.engine.tasks import enable_tta

IMPROVED = [path for path in CONFIGS if "improved" in path.stem]
MULTI_SCALE = [path for path in CONFIGS if "ms-crop" in path.stem]
SEGMENTORS = [path for path in CONFIGS if load(path).default_scope == "mmseg"]


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


@by_name(MULTI_SCALE)
def test_multi_scale_training_is_upstreams_for_swin(path):
    """The paper's 3x models were trained with that recipe."""
    swin = get_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    ours = load(path)
    assert plain(ours.train_dataloader) == plain(swin.train_dataloader)
    assert plain(ours.param_scheduler) == plain(swin.param_scheduler)
    assert plain(ours.optim_wrapper.optimizer) == plain(swin.optim_wrapper.optimizer)
    assert ours.train_cfg.max_epochs == swin.train_cfg.max_epochs


@by_name(SEGMENTORS)
def test_every_segmentor_has_a_multi_scale_test(path):
    cfg = load(path)
    enable_tta(cfg)
    (augmentation,) = [s for s in cfg.test_dataloader.dataset.pipeline if "transforms" in s]
    scales, flips, *_ = augmentation.transforms
    assert [step.scale_factor for step in scales] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert sorted(step.prob for step in flips) == [0.0, 1.0]


def test_there_is_an_improved_recipe_for_each_task():
    assert sorted(load(path).default_scope for path in IMPROVED) == ["mmdet", "mmpretrain", "mmseg"]


@by_name(IMPROVED)
def test_improved_recipes_train_in_bfloat16(path):
    torch.manual_seed(0)
    cfg = shrink(load(path))
    assert cfg.optim_wrapper.dtype == "bfloat16"
    model = build(cfg).train()
    optim_wrapper = build_optim_wrapper(model, on_the_cpu(cfg.optim_wrapper))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        data = model.data_preprocessor(batch(cfg), training=True)
        loss, _ = model.parse_losses(model(**data, mode="loss"))
    optim_wrapper.update_params(loss)
    assert torch.isfinite(loss)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "backbone.layers.0.blocks.0.op.A_logs" in changed


@by_name(IMPROVED)
def test_improved_recipes_decay_rates_by_layer_and_spare_the_state_space(path):
    cfg = shrink(load(path))
    base = cfg.optim_wrapper.optimizer
    model = build(cfg)
    optimizer = build_optim_wrapper(model, on_the_cpu(cfg.optim_wrapper)).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {names[group["params"][0]]: group for group in optimizer.param_groups}
    assert set(groups) == set(names.values())
    # One block per stage: the stem, four blocks and the rest.
    assert groups["backbone.patch_embed.0.weight"]["lr"] == pytest.approx(base.lr * 0.9**5)
    assert groups["backbone.layers.2.blocks.0.op.in_proj.weight"]["lr"] == pytest.approx(
        base.lr * 0.9**2
    )
    heads = [group for name, group in groups.items() if not name.startswith("backbone.")]
    assert {group["lr"] for group in heads} == {base.lr}
    for name, group in groups.items():
        spared = name.endswith((".bias", "dt_projs_bias", "A_logs", "Ds")) or "norm" in name
        if spared:
            assert group["weight_decay"] == 0.0, name
    assert groups["backbone.layers.2.blocks.0.op.in_proj.weight"]["weight_decay"] == 0.05
