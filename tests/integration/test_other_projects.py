"""What another project sees: the registry, inherited configs, upstream's own tools and inferencers.

Programs run in processes of their own, which know nothing of what the tests have imported: of the
packages in question they have none in `BUILD`, and all three where a task is used.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny import TASKS, command_line, run_python

from mmvmamba.engine.cli import load_config

BUILD = """
import sys
from importlib import import_module
assert not any(name.startswith("mmvmamba") for name in sys.modules)
models = import_module(sys.argv[1] + ".registry").MODELS
arch = dict(dims=16, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, mlp_ratio=2.0)
model = models.build(dict(type="mmvmamba.VMamba", arch=arch))
import torch
assert [tuple(map_.shape) for map_ in model(torch.zeros(1, 3, 64, 96))][-1] == (1, 128, 2, 3)
print("built")
"""

TOY = """
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/datasets/coco_instance.py",
          "mmdet::_base_/schedules/schedule_1x.py", "mmdet::_base_/default_runtime.py"]
root = {root!r}
model = dict(
    backbone=dict(
        _delete_=True, type="mmvmamba.VMamba", out_indices=(0, 1, 2, 3),
        arch=dict(dims=16, depths=(1, 1, 1, 1), d_state=1, ssm_ratio=1.0, mlp_ratio=2.0)),
    neck=dict(in_channels=[16, 32, 64, 128]),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=32))))
resize = dict(type="Resize", scale=(96, 96), keep_ratio=True)
train_pipeline = [dict(type="LoadImageFromFile"),
                  dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
                  resize, dict(type="PackDetInputs")]
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(data_root=root, indices=1, pipeline=train_pipeline))
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=1)
"""


@pytest.mark.parametrize("scope", sorted(TASKS))
def test_the_backbone_builds_from_each_registry_without_an_import(scope, tmp_path):
    assert "built" in run_python("-c", BUILD, scope, cwd=tmp_path, tasks=False).stdout


@pytest.mark.parametrize("runner", ["mmengine's", "ours"])
def test_upstreams_own_train_tool_runs_a_config_with_our_backbone(runner, sample_data, tmp_path):
    ours = "runner_type = 'mmvmamba.StrictRunner'\n" if runner == "ours" else ""
    (tmp_path / "toy.py").write_text(TOY.format(root=f"{sample_data}/coco/") + ours)
    tool = Path(find_spec("mmdet").origin).parent / ".mim/tools/train.py"
    done = run_python(tool, "toy.py", "--work-dir", "out", cwd=tmp_path)
    assert (tmp_path / "out/epoch_1.pth").is_file()
    assert ("StopOnInvalidLoss" in done.stdout) == bool(ours)


def test_a_config_of_another_project_inherits_from_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        '_base_ = "mmvmamba::mask_rcnn/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco.py"\n'
        "model = dict(roi_head=dict(bbox_head=dict(num_classes=3)))\n"
    )
    cfg = load_config(str(tmp_path / "mine.py"))
    assert cfg.model.backbone.type == "mmvmamba.VMamba"
    assert cfg.model.roi_head.bbox_head.num_classes == 3


@pytest.mark.parametrize("scope", sorted(TASKS))
def test_a_config_of_another_project_trains(scope, project, sample_data, tmp_path):
    task = TASKS[scope]
    (tmp_path / "mine.py").write_text(f'_base_ = "mmvmamba::{task.config}"\n')
    arguments = command_line(task, project, sample_data, tmp_path / "out")[1:]
    tool = project / "tools/train.py"
    run_python(tool, "mine.py", *arguments, "--no-validate", cwd=tmp_path)
    assert (tmp_path / "out" / task.last).is_file()


INFERENCERS = {
    "mmdet": (
        "from mmdet.apis import DetInferencer\n"
        "infer = DetInferencer(config, weights, device='cpu', show_progress=False)\n"
        "print(len(infer(image)['predictions'][0]['masks']) > 0)\n",
        "coco/val2017",
    ),
    "mmseg": (
        "from mmseg.apis import MMSegInferencer\n"
        "infer = MMSegInferencer(config, weights, device='cpu')\n"
        "print(infer(image)['predictions'].ndim == 2)\n",
        "ADEChallengeData2016/images/validation",
    ),
    "mmpretrain": (
        "from mmpretrain import ImageClassificationInferencer\n"
        "infer = ImageClassificationInferencer(config, weights, device='cpu')\n"
        "print(len(infer(image)[0]['pred_scores']) == 1000)\n",
        "imagenet/val",
    ),
}


def test_upstreams_inferencers_run_our_models(trained, sample_data, tmp_path):
    code, folder = INFERENCERS[trained.task.name]
    image = next((sample_data / folder).rglob("*.[jJ][pP]*[gG]"))
    # mmengine reads the file before it builds the model, and cannot read its own training
    # checkpoints with current torch unless mmvmamba has let their classes in.
    code = f"import sys, mmvmamba\nconfig, weights, image = sys.argv[1:]\n{code}"
    done = run_python("-c", code, trained.config, trained.checkpoint, image, cwd=tmp_path)
    assert done.stdout.rstrip().endswith("True"), done.stdout[-3000:]


@pytest.mark.parametrize("prefix", ["mmvmamba::", "configs/"])
def test_a_config_is_found_from_another_directory(prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(f"{prefix}sample/vmamba-sample_imagenet.py")
    assert Path(cfg.filename).name == "vmamba-sample_imagenet.py"
