"""Tiny trainings: the sample configs, shrunk through their own options to a few seconds."""

import dataclasses
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import warm


@dataclasses.dataclass(frozen=True)
class Task:
    """One of the three tasks.

    Attributes:
        name: The upstream package, which is the scope of the task's models too.
        config: The sample config, below configs/.
        data: The data set's folder, below the sample data.
        options: What shrinks the config, as values of `--cfg-options`.
        images: What shrinks its images: they take most of a step, above all where the processor
            has no instructions for bfloat16.
        metric: A metric that an evaluation must report.
        longer: The options that make the training twice as long.
        last: The last checkpoint's name.
    """

    name: str
    config: str
    data: str
    options: tuple[str, ...]
    images: tuple[str, ...]
    metric: str
    longer: tuple[str, ...]
    last: str


COMMON = (
    "train_dataloader.batch_size=2",
    "train_dataloader.num_workers=0",
    "val_dataloader.num_workers=0",
    "test_dataloader.num_workers=0",
    "default_hooks.logger.interval=1",
    "default_hooks.checkpoint.interval=1",
    "model.backbone.arch.dims=16",
    "model.backbone.arch.depths=(1,1,1,1)",
    "randomness.seed=0",
)
EPOCH = ("train_cfg.max_epochs=1", "train_cfg.val_interval=1")
TASKS = {
    "mmdet": Task(
        "mmdet",
        "sample/mask-rcnn_vmamba-sample_coco.py",
        "coco",
        (
            *COMMON,
            *EPOCH,
            "model.neck.in_channels=[16,32,64,128]",
            "model.train_cfg.rpn_proposal.max_per_img=20",
            "model.test_cfg.rpn.max_per_img=20",
            # An untrained detector is sure of nothing, and without boxes there are no metrics.
            "model.test_cfg.rcnn.score_thr=0.0",
        ),
        (
            "train_dataloader.dataset.pipeline.2.scale=(64,64)",
            "val_dataloader.dataset.pipeline.1.scale=(64,64)",
            "test_dataloader.dataset.pipeline.1.scale=(64,64)",
        ),
        "coco/segm_mAP",
        ("train_cfg.max_epochs=2",),
        "epoch_1.pth",
    ),
    "mmseg": Task(
        "mmseg",
        "sample/upernet_vmamba-sample_ade20k.py",
        "ADEChallengeData2016",
        (
            *COMMON,
            "train_cfg.max_iters=2",
            "train_cfg.val_interval=2",
            "default_hooks.checkpoint.interval=2",
            "model.decode_head.in_channels=[16,32,64,128]",
            "model.auxiliary_head.in_channels=64",
        ),
        (
            "model.data_preprocessor.size=(64,64)",
            "train_dataloader.dataset.pipeline.2.scale=(96,72)",
            "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
            "val_dataloader.dataset.pipeline.1.scale=(96,72)",
            "test_dataloader.dataset.pipeline.1.scale=(96,72)",
        ),
        "mIoU",
        ("train_cfg.max_iters=4",),
        "iter_2.pth",
    ),
    "mmpretrain": Task(
        "mmpretrain",
        "sample/vmamba-sample_imagenet.py",
        "imagenet",
        (*COMMON, *EPOCH, "model.head.in_channels=128"),
        (),
        "accuracy/top1",
        ("train_cfg.max_epochs=2",),
        "epoch_1.pth",
    ),
}


def command_line(task: Task, project: Path, sample_data: Path, work_dir: Path) -> list[str]:
    """The arguments of train.py for a task, without the program; test.py takes them too."""
    run_name = uuid.uuid4().hex
    return [
        str(project / "configs" / task.config),
        *("--work-dir", str(work_dir), "--data-root", str(sample_data / task.data)),
        # mmengine keeps a process's runs and visualizers by name, and hands out an old one where
        # the name is known.
        *("--cfg-options", *task.options, *task.images),
        *(f"experiment_name={run_name}", f"visualizer.name={run_name}"),
    ]


def scalars(work_dir: Path) -> list[dict]:
    """What the runs in a work directory logged, line by line."""
    return [
        json.loads(line)
        for path in sorted(work_dir.rglob("scalars.json"))
        for line in path.read_text().splitlines()
    ]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished tiny training."""

    task: Task
    arguments: list[str]
    work_dir: Path
    checkpoint: Path
    config: Path


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without what would lead a process to this checkout or to a launcher."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def run(
    *command: str | Path,
    cwd: Path,
    check: bool = True,
    timeout: int = 240,
    cold: bool = False,
    tasks: bool = True,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Runs a program as `warm.run` does; its output, errors included, is in `stdout`."""
    done = warm.run(
        [str(part) for part in command],
        cold=cold,
        tasks=tasks,
        cwd=cwd,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
    )
    assert not check or done.returncode == 0, done.stdout[-6000:]
    return done


def run_python(*arguments: str | Path, cwd: Path, **options) -> subprocess.CompletedProcess:
    """Runs this Python; see `run`."""
    return run(sys.executable, *arguments, cwd=cwd, **options)
