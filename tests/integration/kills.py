"""Trainings that are killed again and again, and what they end with."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import warm
from tiny import Task, clean_environment

# Everything that a training carries from step to step: an average of the weights, a scale of the
# loss, data loader workers, stochastic depth, validations in between.
CONFIG = """
_base_ = "{base}"
custom_hooks = [dict(type="EMAHook", momentum=0.1)]
train_cfg = dict(_delete_=True, {loop})
train_dataloader = dict(batch_size=2, num_workers=2, persistent_workers=True)
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=2, save_best=None),
)
optim_wrapper = dict(
    type="mmvmamba.AmpOptimWrapper", dtype="bfloat16", loss_scale=dict(growth_interval=3)
)
model = dict(backbone=dict(drop_path_rate=0.3){float32})
"""
# mmcv's operators know no bfloat16.
FLOAT32 = """, rpn_head=dict(type="mmvmamba.Float32RPNHead"), roi_head=dict(
    bbox_roi_extractor=dict(type="mmvmamba.Float32RoIExtractor"),
    mask_roi_extractor=dict(type="mmvmamba.Float32RoIExtractor"),
)"""
BY_EPOCH = "type='EpochBasedTrainLoop', max_epochs={}, val_interval=2"
BY_ITER = "type='IterBasedTrainLoop', max_iters={}, val_interval=4"


class Training:
    """A tiny training of a task, in a folder of its own.

    Args:
        task: The task.
        project: The checkout.
        data: The sample data.
        folder: Where the config and the work directory go.
        steps: How many steps it takes; even.
        processes: How many processes it runs in.
    """

    def __init__(
        self, task: Task, project: Path, data: Path, folder: Path, steps: int, processes: int = 1
    ):
        self.processes, self.project, self.steps = processes, project, steps
        folder.mkdir(parents=True)
        self.folder, self.work_dir = folder, folder / "work_dir"
        # Four images, in batches of two.
        steps_of_epoch = 2 // processes
        by_epoch = task.name != "mmseg"
        loop = BY_EPOCH.format(steps // steps_of_epoch) if by_epoch else BY_ITER.format(steps)
        config = folder / "config.py"
        config.write_text(
            CONFIG.format(
                base=project / "configs" / task.config,
                loop=loop,
                float32=FLOAT32 if task.name == "mmdet" else "",
            )
        )
        shrunk = [
            option
            for option in task.options
            if not option.startswith(("train_dataloader", "train_cfg", "default_hooks"))
        ]
        self.arguments = [
            *(str(config), "--work-dir", str(self.work_dir)),
            *("--data-root", str(data / task.data), "--resume", "--cfg-options", *shrunk),
            *task.images,
        ]

    def start(self, cold: bool = False, **variables: str) -> subprocess.Popen:
        """Starts it, or goes on with it; see `warm` for what is cold."""
        if self.processes == 1:
            command = [sys.executable, str(self.project / "tools/train.py"), *self.arguments]
        else:
            script = str(self.project / "tools/dist_train.sh")
            config, *others = self.arguments
            command = ["bash", script, config, str(self.processes), *others]
        with (self.folder / "output.txt").open("ab") as output:
            return (subprocess.Popen if cold else warm.Popen)(
                command,
                env=clean_environment(**variables),
                cwd=self.folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, timeout: float = 600, cold: bool = False) -> dict:
        """Runs it to its end, and returns its last checkpoint."""
        process = self.start(cold)
        try:
            status = process.wait(timeout)
        finally:
            self.end(process)
        assert status == 0, self.output()[-6000:]
        return self.last()

    def last(self) -> dict:
        path = self.work_dir / f"iter_{self.steps}.pth"
        return torch.load(path, map_location="cpu", weights_only=False)

    def output(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def step(self) -> int:
        """The last step of which something is saved, or half saved."""
        names = [path.name for path in self.work_dir.glob("iter_*.pth*")]
        return max((int(name.split(".")[0].removeprefix("iter_")) for name in names), default=0)

    def wait_for(self, step: int, process: subprocess.Popen, timeout: float = 300) -> bool:
        """Waits until a step's checkpoint is being written; False if the training ended before."""
        deadline = time.monotonic() + timeout
        while self.step() < step:
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.output()[-6000:]
            time.sleep(0.002)
        return True

    def workers(self, process: subprocess.Popen) -> list[int]:
        """The training processes that a launcher has started, without their data loaders."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,comm=,args=", "--ppid", str(process.pid)],
            capture_output=True,
            text=True,
        ).stdout
        return [int(line.split()[0]) for line in listed.splitlines() if "train.py" in line]

    @staticmethod
    def end(process: subprocess.Popen) -> None:
        """Kills a training and everything that it has started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        process.wait()


def train_with_kills(training: Training, kills: int, seed: int) -> tuple[dict, int]:
    """Runs a training that is killed at random steps, and in random moments of them.

    One process is killed whole and started again with `--resume`. Of several, one is killed, and
    torchrun starts all of them again.

    Returns:
        The last checkpoint, and how many kills hit a file that was being written.
    """
    dice = random.Random(seed)
    hit = 0
    process, alone = None, training.processes == 1
    reach = max(1, 2 * training.steps // (kills + 1) - 1)
    try:
        for _ in range(kills):
            if process is None:
                process = training.start(MAX_RESTARTS=str(kills))
            target = min(training.step() + dice.randint(1, reach), training.steps - 1)
            if training.step() >= training.steps - 1:
                break
            assert training.wait_for(target, process), training.output()[-6000:]
            time.sleep(dice.uniform(0, 0.2))
            if alone:
                training.end(process)
                process = None
            else:
                os.kill(dice.choice(training.workers(process)), signal.SIGKILL)
            hit += any(training.work_dir.glob("*.part"))
        if process is None:
            return training.finish(), hit
        assert process.wait(600) == 0, training.output()[-6000:]
        return training.last(), hit
    finally:
        if process is not None:
            training.end(process)


def differences(one: object, other: object, place: str = "") -> list[str]:
    """Names the places in which two checkpoints differ in a bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [place]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: {sorted(one.keys() ^ other.keys())}"]
        return [d for key in one for d in differences(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{place}[{i}]")]
    return [] if one == other else [f"{place}: {one} and {other}"]


def state(checkpoint: dict) -> dict:
    """What of a checkpoint must not depend on interruptions: all but times and file names."""
    parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
    places = ("epoch", "iter", "epoch_iter", "seed")
    return {part: checkpoint[part] for part in parts} | {
        key: checkpoint["meta"][key] for key in places
    }
