"""What the trainings in several processes are made of."""

import dataclasses
import json
import socket
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A tiny training whose losses do not depend on the number of processes.

    Attributes:
        task: One of `TASKS`.
        changes: What would be drawn by a process and not by a place in the data, or is taken over a
            process's own part of the batch, is left out.
        length: The options that make it `STEPS` long.
        flags: What else stands on the command line.
    """

    task: str
    changes: str
    length: tuple[str, ...]
    flags: tuple[str, ...] = ()


STEPS = 6
# Four images are one step of an epoch.
EPOCHS = (f"train_cfg.max_epochs={STEPS}", f"train_cfg.val_interval={STEPS}")
NO_DROP_PATH = "model = dict(backbone=dict(arch=dict(drop_path_rate=0.0)))\n"
RECIPES = {
    "classifier": Recipe("mmpretrain", NO_DROP_PATH, EPOCHS, ("--auto-scale-lr",)),
    # For runners that know nothing of numbers drawn by their place in the data.
    "unaugmented": Recipe(
        "mmpretrain",
        NO_DROP_PATH
        + "steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 96)), "
        "dict(type='PackInputs')]\n"
        "train_dataloader = dict(dataset=dict(pipeline=steps))\n",
        EPOCHS,
    ),
    "segmentor": Recipe(
        "mmseg",
        "norm = dict(_delete_=True, type='GN', num_groups=8)\n"
        "head = dict(norm_cfg=norm, dropout_ratio=0.0)\n"
        + NO_DROP_PATH
        + "model.update(decode_head=head, auxiliary_head=head)\n"
        "del norm, head\n",
        (f"train_cfg.max_iters={STEPS}", f"train_cfg.val_interval={STEPS}"),
    ),
}
# The mean over a batch and the mean of the means over its parts differ by rounding, 6e-8 of a loss;
# AdamW divides a gradient by its own size, which hands on the rounding of the smallest ones whole.
TOLERANCE = 2e-6
GLOBAL_BATCH = 4
CURVES = ("loss", "grad_norm", "lr")


@dataclasses.dataclass(frozen=True)
class Machine:
    """One of the machines of a job.

    Attributes:
        address: Where the others reach it.
        inside: The command that runs another one on it.
        variables: What its processes need in the environment.
    """

    address: str
    inside: tuple[str, ...] = ()
    variables: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job's end on one machine."""

    code: int
    output: str
    time: float


def curves(work_dir: Path) -> dict[tuple[str, int], float]:
    """What was recorded, by name and step; of a step that was done twice, the last."""
    lines = map(json.loads, (work_dir / "curves.jsonl").read_text().splitlines())
    return {(name, line["iter"]): line[name] for line in lines for name in CURVES}


def fault(kind: str, at: int) -> str:
    """A hook of `watched.py` for a config."""
    return f"dict(type='Fault', kind={kind!r}, at={at})"


def free_port() -> str:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])
