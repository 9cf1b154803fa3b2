"""The recipes beside the models: multi-scale training and test, and the improved ones."""

import pytest
import torch
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from zoo import CONFIGS, batch, build, each_step, load, plain, shrink

from mmvmamba.engine.seeds import seed_step
from mmvmamba.engine.tasks import enable_tta

IMPROVED = [path for path in CONFIGS if "improved" in path.stem]
MULTI_SCALE = [path for path in CONFIGS if "ms-crop" in path.stem]

# Folder -> largest norm of the gradients, as in the upstream recipes that these follow.
CLIPPED = {"dino": 0.1, "mask2former": 0.01}


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


@by_name(MULTI_SCALE)
def test_multi_scale_training_is_upstreams_for_swin(path):
    """The paper's 3x models were trained with that recipe, NAT's with half the warm-up."""
    swin = get_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    ours = load(path)
    if ours.model.backbone.type == "mmvmamba.NAT":
        swin.param_scheduler[0].end = 500
    assert plain(ours.train_dataloader) == plain(swin.train_dataloader)
    assert plain(ours.param_scheduler) == plain(swin.param_scheduler)
    assert plain(ours.optim_wrapper.optimizer) == plain(swin.optim_wrapper.optimizer)
    assert ours.train_cfg.max_epochs == swin.train_cfg.max_epochs


def test_every_segmentor_has_a_multi_scale_test():
    segmentors = [path for path in CONFIGS if load(path).default_scope == "mmseg"]
    assert len(segmentors) >= 15
    for path in segmentors:
        cfg = load(path)
        enable_tta(cfg)
        (augmentation,) = [s for s in cfg.test_dataloader.dataset.pipeline if "transforms" in s]
        scales, flips, *_ = augmentation.transforms
        factors = [step.scale_factor for step in scales]
        assert factors == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75], path
        assert sorted(step.prob for step in flips) == [0.0, 1.0], path


def test_there_is_an_improved_recipe_for_each_task():
    assert sorted(load(path).default_scope for path in IMPROVED) == ["mmdet", "mmpretrain", "mmseg"]


@by_name(IMPROVED)
def test_improved_recipes_train_in_bfloat16(path):
    seed_step(0, 0, 0)
    cfg = shrink(load(path))
    assert cfg.optim_wrapper.dtype == "bfloat16"
    model = build(cfg).train()
    optim_wrapper = build_optim_wrapper(model, each_step(cfg.optim_wrapper))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *values: seen.add(values[-1].dtype))
    assert torch.isfinite(model.train_step(batch(cfg), optim_wrapper)["loss"])
    assert seen == {torch.bfloat16}
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "backbone.layers.0.blocks.0.op.A_logs" in changed


@by_name(IMPROVED)
def test_improved_recipes_decay_rates_by_layer_and_spare_the_state_space(path):
    cfg = shrink(load(path))
    base = cfg.optim_wrapper.optimizer
    model = build(cfg)
    optimizer = build_optim_wrapper(model, each_step(cfg.optim_wrapper)).optimizer
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


def test_recipes_clip_gradients_as_their_sources_do():
    """The paper's classifiers were trained with clipping, its detectors and segmentors without.

    Of the systems that it compares VMamba with, NAT's classifiers were.
    """
    for path in CONFIGS:
        cfg, folder = load(path), path.parent.name
        if folder in ("sample", "finetune"):
            continue
        expected = CLIPPED.get(folder)
        clipped = cfg.model.backbone.type in ("mmvmamba.VMamba", "mmvmamba.NAT")
        clipped = clipped and cfg.default_scope == "mmpretrain" and "linear" not in path.stem
        if path in IMPROVED or clipped:
            expected = 5.0
        found = cfg.optim_wrapper.get("clip_grad") or {}
        assert found.get("max_norm") == expected, path


@by_name([*IMPROVED, *(path for path in CONFIGS if path.parent.name in (*CLIPPED, "sample"))])
def test_gradients_are_clipped(path):
    """Of a loss a million times as large, an update sees gradients of the recipe's norm."""
    seed_step(0, 0, 0)
    cfg = shrink(load(path))
    limit = cfg.optim_wrapper.clip_grad.max_norm
    model = build(cfg).train()
    optim_wrapper = build_optim_wrapper(model, each_step(cfg.optim_wrapper))
    norms = []

    def look(*_):
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())

    optim_wrapper.optimizer.register_step_pre_hook(look)
    with optim_wrapper.optim_context(model):
        data = model.data_preprocessor(batch(cfg), training=True)
        loss, _ = model.parse_losses(model(**data, mode="loss"))
    optim_wrapper.update_params(1e6 * loss)
    # Sums of float32 numbers, scaled by a factor of float32.
    assert norms == [pytest.approx(limit, rel=1e-4)]
    assert MessageHub.get_current_instance().get_scalar("train/grad_norm").current() > 10 * limit
