"""Long runs in processes of their own, and what each process holds on the way.

`python leaks.py FOLDER SAMPLE_DATA RUN STEPS [RUN STEPS]...` writes one line of JSON for each
`Sample`, of each run to samples.jsonl in FOLDER/RUN.
"""

import ctypes
import dataclasses
import gc
import itertools
import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import quick
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from tiny import TASKS, command_line

from mmvmamba.engine import cli
from mmvmamba.models import VMamba

PROJECT = Path(__file__).resolve().parents[2]
BACKBONE = {"dims": 16, "depths": (1, 1, 1, 1)}

# Of the sample data's training split.
IMAGES = 4

SAMPLES, SAMPLES_FILE = 40, "samples.jsonl"


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the process holds after a step; memory in MiB.

    Attributes:
        step: Steps done.
        resident: Physical memory, the free parts of malloc's heap included.
        allocated: What malloc has given out and not got back.
        compiled: Address space of machine code that was made at run time, by oneDNN here.
        files: Open file descriptors.
        threads: Threads.
    """

    step: int
    resident: float
    allocated: float
    compiled: float
    files: int
    threads: int

    @classmethod
    def read(cls, folder: Path) -> list["Sample"]:
        """The samples in a run's folder."""
        lines = (folder / SAMPLES_FILE).read_text().splitlines()
        return [cls(**json.loads(line)) for line in lines]


class _MallInfo2(ctypes.Structure):
    # glibc's struct mallinfo2; see mallinfo(3).
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def mallinfo2() -> Callable[[], _MallInfo2] | None:
    """glibc's function of that name (since 2.33); None elsewhere."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is not None:
        function.restype = _MallInfo2
    return function


def take_sample(step: int) -> Sample:
    """Looks at this process."""
    gc.collect()
    info = mallinfo2()()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return Sample(
        step,
        resident / 2**20,
        # Of the heap, and of blocks with a mapping of their own.
        (info.uordblks + info.hblkhd) / 2**20,
        sum(anonymous_code()) / 2**20,
        len(os.listdir("/proc/self/fd")),
        len(os.listdir("/proc/self/task")),
    )


def anonymous_code() -> Iterator[int]:
    """Yields the sizes, in bytes, of executable mappings that no file stands behind."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *path = line.split()
        if "x" in permissions and inode == "0" and not path:
            start, end = (int(address, 16) for address in addresses.split("-"))
            yield end - start


class Recorder(Hook):
    """Takes samples at even distances, as a hook of a training or called after each step."""

    def __init__(self, steps: int, out: Path):
        # Looking costs more than a small step does.
        self.every, self.out = max(steps // SAMPLES, 3), out
        self.step = 0

    def count(self) -> None:
        self.step += 1
        if self.step == 1:
            # What was imported and built is not looked through for every sample.
            gc.collect()
            gc.freeze()
        if self.step % self.every == 0:
            with self.out.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(take_sample(self.step))) + "\n")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.count()


def size(steps: int) -> tuple[int, int]:
    """A height and a width, of so many that hardly two images of a run are of one size."""
    sides = range(32, 257 if steps > 1000 else 97)
    return random.choice(sides), random.choice(sides)


def train_backbone(steps: int) -> Iterator[None]:
    """Training steps of the backbone alone."""
    model = VMamba(BACKBONE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        outs = model(torch.randn(random.choice((1, 2)), 3, *size(steps)))
        sum(out.square().mean() for out in outs).backward()
        optimizer.step()
        del outs
        yield


def infer_backbone(steps: int) -> Iterator[None]:
    """Inferences of the backbone alone."""
    model = VMamba(BACKBONE).eval()
    for _ in range(steps):
        with torch.no_grad():
            model(torch.randn(random.choice((1, 2)), 3, *size(steps)))
        yield


def leak_backbone(steps: int) -> Iterator[None]:
    """Inferences that leave something behind, each of them."""
    kept = []
    for _ in infer_backbone(steps):
        kept += [torch.zeros(2**16), os.memfd_create("kept")]
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        yield


def load_config(name: str, steps: int, sample_data: Path, work_dir: Path) -> Config:
    """A task's tiny config, in which images keep to no size."""
    arguments = command_line(TASKS[name], PROJECT, sample_data, work_dir)
    cfg = cli.train_config(cli.parse_train_arguments(arguments))
    # Neither padded nor cropped to a common size.
    if name == "mmdet":
        cfg.model.data_preprocessor.pad_size_divisor = 1
    if name == "mmseg":
        cfg.model.data_preprocessor.update(size=None, size_divisor=1)
    side = 64 if steps > 1000 else 48
    resized = {
        "train": {"scale": (side, side), "ratio_range": (0.5, 1.5), "type": "RandomResize"},
        "test": {"scale_factor": 1.0, "type": "Resize"},
    }
    for split, resize in resized.items():
        dataset = cfg[f"{split}_dataloader"].dataset
        place = next(i for i, step in enumerate(dataset.pipeline) if "Resize" in step["type"])
        others = [s for s in dataset.pipeline if not re.search("Resize|Crop", s["type"])]
        dataset.pipeline = [*others[:place], {**resize, "keep_ratio": False}, *others[place:]]
    return cfg


def train(name: str, recorder: Recorder, steps: int, sample_data: Path) -> None:
    """A training of a task, with four checkpoints and evaluations, and processes that load."""
    cfg = load_config(name, steps, sample_data, recorder.out.parent)
    loader = cfg.train_dataloader
    loader.update(batch_size=2, num_workers=1, persistent_workers=True)
    if name == "mmpretrain":
        # Images of several sizes are not joined to batches there. New processes in every epoch.
        loader.update(batch_size=1, persistent_workers=False)
    by_epoch = "max_epochs" in cfg.train_cfg
    length = steps * loader.batch_size // IMAGES if by_epoch else steps
    cfg.train_cfg["max_epochs" if by_epoch else "max_iters"] = length
    cfg.train_cfg.val_interval = length // 4
    cfg.default_hooks.checkpoint.update(interval=length // 4, max_keep_ckpts=1)
    cfg.param_scheduler = None
    runner = cli.build_runner(cfg)
    runner.register_hook(recorder, "LOWEST")
    runner.train()


def infer(name: str, steps: int, sample_data: Path, work_dir: Path) -> Iterator[None]:
    """Inferences through a task's functions and its inferencer in turn."""
    cfg = load_config(name, steps, sample_data, work_dir)
    if name == "mmdet":
        from mmdet.apis import DetInferencer, inference_detector, init_detector

        model = init_detector(cfg, device="cpu", palette="random")
        inferencer = DetInferencer(cfg, device="cpu", show_progress=False)
        calls = [partial(inference_detector, model), inferencer]
    elif name == "mmseg":
        from mmseg.apis import MMSegInferencer, inference_model, init_model

        model = init_model(cfg, device="cpu")
        inferencer = MMSegInferencer(cfg, device="cpu")
        calls = [partial(inference_model, model), inferencer]
    else:
        from mmpretrain import ImageClassificationInferencer

        calls = [ImageClassificationInferencer(cfg, pretrained=False, device="cpu")]
    # Evaluation keeps a second copy of the weights of small maps: all of them, after a small image.
    for call in calls:
        call(np.zeros((32, 32, 3), np.uint8))
    generator = np.random.default_rng(0)
    for call in itertools.islice(itertools.cycle(calls), steps):
        call(generator.integers(0, 256, (*size(steps), 3), dtype=np.uint8))
        yield


def make(what: str, name: str, steps: int, out: Path, sample_data: Path) -> None:
    """Makes a run."""
    random.seed(0)
    torch.manual_seed(0)
    recorder = Recorder(steps, out)
    if what == "train" and name != "backbone":
        train(name, recorder, steps, sample_data)
        return
    if name != "backbone":
        done = infer(name, steps, sample_data, out.parent)
    else:
        done = {"train": train_backbone, "infer": infer_backbone, "leak": leak_backbone}[what](
            steps
        )
    for _ in done:
        recorder.count()


def main() -> None:
    """Makes the runs that the command line names, each in a fork of this process."""
    folder, sample_data, *runs = sys.argv[1:]
    quick.quicken()
    for run, steps in zip(runs[::2], map(int, runs[1::2]), strict=True):
        out = Path(folder, run, SAMPLES_FILE)
        out.parent.mkdir()
        process = os.fork()
        if not process:
            make(*run.split("-"), steps, out, Path(sample_data))
            return
        if os.waitpid(process, 0)[1]:
            sys.exit(f"{run} failed; its error stands above")


if __name__ == "__main__":
    main()
