"""Every config loads, builds, takes a training step and predicts, here and from outside."""

from copy import deepcopy
from importlib import import_module

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from yapf.yapflib.yapf_api import FormatCode
from zoo import CONFIGS, PROJECT, batch, build, each_step, load, plain, shrink

from mmvmamba.engine.seeds import seed_step

# Parameters of each backbone's first layer and last mixer.
LEARNS = {
    "mmvmamba.VMamba": ("patch_embed.0.weight", "layers.3.blocks.0.op.A_logs"),
    "mmvmamba.VisionMamba": ("pos_embed", "layers.0.mixer.A_b_log"),
    "mmvmamba.NAT": ("patch_embed.proj.0.weight", "levels.3.blocks.0.attn.rpb"),
    "mmvmamba.S4NDViT": ("patch_embed.weight", "blocks.1.op.s4nd.kernel.0.A_real"),
    "mmvmamba.S4NDConvNeXt": (
        "downsample_layers.0.0.kernel.0.C",
        "stages.3.0.depthwise_conv.kernel.1.A_imag",
    ),
}

by_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)


STEPPED = set()


@by_config
def test_a_training_step_and_a_prediction(path):
    """One step for each small backbone, and one for all else that a config says.

    `shrink` has seen by then that the parts fit each other.
    """
    cfg = shrink(load(path))
    used = ("model", "data_preprocessor", "optim_wrapper", "param_scheduler", "default_scope")
    others = deepcopy({part: cfg.get(part) for part in used})
    backbone = repr(others["model"].pop("backbone"))
    settings = {backbone, f"{others} {cfg.train_cfg.get('max_epochs')}"}
    if settings <= STEPPED:
        return
    seed_step(0, 0, 0)
    model = build(cfg)
    optim_wrapper = build_optim_wrapper(model, each_step(cfg.optim_wrapper))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = model.train().train_step(batch(cfg), optim_wrapper)
    assert torch.isfinite(losses["loss"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if cfg.model.backbone.get("frozen_stages") == 4:
        assert changed == {"head.head.weight", "head.head.bias"}
    else:
        first_and_last = LEARNS[cfg.model.backbone.type]
        assert {f"backbone.{name}" for name in first_and_last} <= changed
    assert len(model.eval().test_step(batch(cfg))) == 2
    # Last, since a warm-up begins with rates that change nothing.
    for scheduler in as_list(cfg.param_scheduler):
        build_scheduler(cfg, scheduler, optim_wrapper)
    STEPPED.update(settings)


def as_list(settings):
    return settings if isinstance(settings, list | tuple) else [settings]


def build_scheduler(cfg, scheduler, optim_wrapper):
    """Builds a scheduler as the runner does, for epochs of ten iterations."""
    if scheduler.get("by_epoch", True):
        scheduler.setdefault("end", cfg.train_cfg.max_epochs)
    extra = {"optimizer": optim_wrapper, "epoch_length": 10}
    assert PARAM_SCHEDULERS.build(scheduler, default_args=extra).end > 0


@by_config
def test_inherits_from_outside(path, tmp_path):
    mine = tmp_path / "mine.py"
    name = path.relative_to(PROJECT / "configs")
    mine.write_text(f'_base_ = "mmvmamba::{name}"\nmodel = dict(backbone=dict(with_cp=True))\n')
    cfg = Config.fromfile(mine)
    for name in ("train_cfg", "val_cfg", "test_cfg"):
        # Loops build the data sets, whose types are looked up in the loop's scope.
        assert cfg[name].get("_scope_") in (None, cfg.default_scope)
    init_default_scope(cfg.default_scope)
    transforms = import_module(f"{cfg.default_scope}.registry").TRANSFORMS
    for pipeline in find_pipelines(cfg.to_dict()):
        # The scope that mmengine writes into inherited settings must lead to upstream's classes.
        assert all(transforms.build(step) for step in pipeline)
    assert cfg.model.backbone.pop("with_cp")
    assert plain(cfg) == plain(load(path))


def find_pipelines(node):
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "pipeline" else find_pipelines(value)


@pytest.mark.parametrize(
    "path", sorted((PROJECT / "configs/sample").glob("*.py")), ids=lambda p: p.stem
)
def test_a_config_is_laid_out_and_read_again(path, tmp_path, monkeypatch):
    """As logs and work directories have it; other tests leave yapf out, see `quick`."""
    monkeypatch.setattr("mmengine.config.config.FormatCode", FormatCode)
    cfg, laid_out = load(path), tmp_path / path.name
    cfg.dump(laid_out)
    assert max(map(len, laid_out.read_text().splitlines())) < 200
    assert plain(Config.fromfile(laid_out)) == plain(cfg)
