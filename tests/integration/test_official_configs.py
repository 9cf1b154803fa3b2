"""The official detection and segmentation configs, unmodified, through our tools.

What they inherit and say, that is: they inherit upstream's configs of Swin Transformers, whose
arguments stay in the backbone, and name it `MM_VSSM`, without a scope.
"""

import pytest
import torch
from mmengine.registry import DefaultScope
from tiny import run_python

from mmvmamba.engine.cli import load_config
from mmvmamba.models import MM_VSSM

BASES = {
    "mmdet": "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
    "mmseg": "mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
}
# The backbones of the folders `vssm` and `vssm1`, as of VMamba-T; of the others depths, dims, rates
# and the checkpoint differ.
BACKBONES = {
    "vssm": """
        type='MM_VSSM', out_indices=(0, 1, 2, 3), pretrained={pretrained!r},
        dims=96, depths=(2, 2, 9, 2), ssm_d_state=16, ssm_dt_rank="auto", ssm_ratio=2.0,
        mlp_ratio=0.0, downsample_version="v1", patchembed_version="v1\"""",
    "vssm1": """
        type='MM_VSSM', out_indices=(0, 1, 2, 3), pretrained={pretrained!r},
        dims=96, depths=(2, 2, 8, 2), ssm_d_state=1, ssm_dt_rank="auto", ssm_ratio=1.0, ssm_conv=3,
        ssm_conv_bias=False, forward_type="v05_noz", mlp_ratio=4.0, downsample_version="v3",
        patchembed_version="v2", drop_path_rate=0.2, norm_layer="ln2d\"""",
}
LEFT = "MM_VSSM drops what the config has from a Swin Transformer: "

# What shrinks their trainings to a step on small images.
SMALL = (
    *("model.backbone.dims=16", "model.backbone.depths=(1,1,1,1)", "train_dataloader.batch_size=2"),
    *("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
)
SMALLER = {
    "mmdet": (
        *("train_cfg.max_epochs=1", "train_dataloader.dataset.indices=2"),
        *("model.neck.in_channels=[16,32,64,128]", "model.train_cfg.rpn_proposal.max_per_img=20"),
        "train_dataloader.dataset.pipeline.2.scale=(96,96)",
    ),
    "mmseg": (
        *("train_cfg.max_iters=1", "model.data_preprocessor.size=(64,64)"),
        *("model.decode_head.in_channels=[16,32,64,128]", "model.decode_head.channels=16"),
        *("model.auxiliary_head.in_channels=64", "model.auxiliary_head.channels=16"),
        "train_dataloader.dataset.pipeline.2.scale=(128,64)",
        "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
        "default_hooks.checkpoint.interval=1",
    ),
}
DATA = {"mmdet": "coco", "mmseg": "ADEChallengeData2016"}


def write(folder, scope, kind, pretrained=""):
    path = folder / f"{scope}_{kind}.py"
    backbone = BACKBONES[kind].format(pretrained=pretrained)
    path.write_text(f"_base_ = [{BASES[scope]!r}]\nmodel = dict(backbone=dict({backbone}))\n")
    return path


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("scope", BASES)
def test_the_configs_build(scope, kind, tmp_path):
    registry = pytest.importorskip(f"{scope}.registry").MODELS
    cfg = load_config(str(write(tmp_path, scope, kind)))
    with DefaultScope.overwrite_default_scope(scope), torch.device("meta"):
        backbone = registry.build(cfg.model.backbone)
    assert type(backbone) is MM_VSSM
    assert backbone.init_cfg is None
    # Rates that a config does not say come from its base, as in the official code.
    rate = {"vssm": {"mmdet": 0.2, "mmseg": 0.3}[scope], "vssm1": 0.2}[kind]
    assert backbone.arch.drop_path_rate == rate
    assert backbone.arch.gated == (kind == "vssm")


@pytest.mark.parametrize("scope", BASES)
def test_the_configs_train(scope, project, sample_data, tmp_path):
    weights = MM_VSSM(
        dims=16,
        depths=(1, 1, 1, 1),
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        downsample_version="v3",
        patchembed_version="v2",
    ).state_dict()
    weights = {key: value for key, value in weights.items() if "outnorm" not in key}
    torch.save({"model": weights}, tmp_path / "vmamba.pth")
    config = write(tmp_path, scope, "vssm1", "vmamba.pth")
    done = run_python(
        *(project / "tools/train.py", config, "--work-dir", tmp_path / "out", "--no-validate"),
        *("--data-root", sample_data / DATA[scope], "--cfg-options", *SMALL, *SMALLER[scope]),
        cwd=tmp_path,
    )
    assert list((tmp_path / "out").glob("*_1.pth"))
    assert done.stdout.count(LEFT) == 1
    assert "tensors loaded from vmamba.pth (model)" in done.stdout


def test_a_slip_of_the_pen_is_named(project, sample_data, tmp_path):
    config = write(tmp_path, "mmseg", "vssm1")
    options = ("--data-root", sample_data / DATA["mmseg"], "--no-validate", "--cfg-options")
    done = run_python(
        *(project / "tools/train.py", config, *options, "model.backbone.windw_size=7"),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert "no argument 'windw_size'" in done.stdout
