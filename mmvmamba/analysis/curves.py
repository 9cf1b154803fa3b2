"""Curves of a training: what its logs hold, and the learning rate that its config will give."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import (
    DATASETS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    init_default_scope,
)
from torch import nn

from mmvmamba.engine.data import check_datasets
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.schedules import fit_warm_up
from mmvmamba.engine.tasks import scope_of

LOG_NAME = "scalars.json"
# What a line says of its place, not of the training.
PLACES = ("step", "iter", "epoch")

Curve = tuple[np.ndarray, np.ndarray]


def read_log(path: str | Path) -> list[dict]:
    """Reads what a training logged.

    Args:
        path: A `scalars.json` of mmengine, or a folder in which they are, such as a work directory.
            The logs of a training that was resumed are joined: where they overlap, the later
            holds.

    Returns:
        The lines, in their order. Those of validations have got an `iter`: the training iteration
        that they followed.

    Raises:
        UsageError: If there is no log, or it is none of mmengine's.
    """
    path = Path(path)
    # Folders of runs are named after their time.
    files = sorted(path.rglob(LOG_NAME)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(
            f"no {LOG_NAME} in {path} (working directory: {Path.cwd()}). Give a training's work "
            "directory, or the file itself."
        )
    lines: list[dict] = []
    for file in files:
        lines = _joined(lines, _with_iterations(file))
    return lines


def _with_iterations(file: Path) -> list[dict]:
    lines, last = [], 0
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{file}, line {number}: {error}. Is it a log of mmengine?") from error
        last = line.setdefault("iter", last)
        lines.append(line)
    return lines


def _joined(before: list[dict], after: list[dict]) -> list[dict]:
    trained = [line["iter"] for line in after if "loss" in line]
    if not trained:
        return [*before, *after]
    # A validation at the very iteration from which the training was resumed stays.
    return [line for line in before if line["iter"] < trained[0]] + after


def curve(lines: Sequence[dict], key: str) -> Curve:
    """A logged value over the iterations.

    Args:
        lines: As `read_log` gives them.
        key: Its name in the log, such as 'loss' or 'coco/bbox_mAP'. 'time' and 'data_time' are
            those of the training.

    Returns:
        The iterations and the values.

    Raises:
        UsageError: If nothing of that name was logged; the message has the names.
    """
    names = sorted({name for line in lines for name in line} - set(PLACES))
    if key not in names:
        raise UsageError(f"{key!r} was not logged. Logged were: {', '.join(names)}.")
    found = [line for line in lines if key in line and _is_number(line[key])]
    if key in ("time", "data_time"):
        found = [line for line in found if "loss" in line] or found
    return (
        np.array([line["iter"] for line in found]),
        np.array([line[key] for line in found], dtype=float),
    )


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def metrics(lines: Sequence[dict]) -> list[str]:
    """The names of what validations reported."""
    names = {name: None for line in lines if "loss" not in line for name in line}
    return [name for name in names if name not in (*PLACES, "time", "data_time")]


def scheduled(
    cfg: Config, processes: int = 1, dataset_size: int | None = None
) -> dict[str, np.ndarray]:
    """What a config's schedulers make of the optimizer's settings, without training.

    The schedulers are the real ones, stepped as mmengine's hook steps them, on an optimizer of the
    config's kind with one parameter. So the learning rate is that of parameters without a
    multiplier of their own, which logs call `base_lr`.

    Args:
        cfg: The config.
        processes: How many train together, each with the config's batch size.
        dataset_size: Images of the training data set; None to count them, if they matter.

    Returns:
        'lr', 'momentum' (of Adam's kind its first beta) and 'weight_decay', each with the values
        in use in every iteration.

    Raises:
        UsageError: If a config's training has neither epochs nor iterations, or its data set has
            to be counted and is not there.
    """
    init_default_scope(scope_of(cfg))
    settings = cfg.get("param_scheduler") or []
    settings = [settings] if isinstance(settings, dict) else settings
    epochs, total = cfg.train_cfg.get("max_epochs"), cfg.train_cfg.get("max_iters")
    if epochs is None and total is None:
        raise UsageError(f"{cfg.filename}: train_cfg has neither max_epochs nor max_iters.")
    epoch_length = 0
    if epochs is not None or any(one.get("by_epoch", True) for one in settings):
        epoch_length = _iterations_per_epoch(cfg, processes, dataset_size)
        total = total if epochs is None else epochs * epoch_length
        epochs = epochs or math.ceil(total / epoch_length)
    settings, lines = fit_warm_up(settings, total, epoch_length)
    for line in lines:
        print_log(line, "current", logging.WARNING)
    optimizer = OPTIMIZERS.build(
        deepcopy(cfg.optim_wrapper.optimizer) | {"params": [nn.Parameter(torch.zeros(1))]}
    )
    for group in optimizer.param_groups:
        group["lr"] *= _lr_scale(cfg, processes)
    schedulers = [
        PARAM_SCHEDULERS.build(
            {"end": epochs if one.get("by_epoch", True) else total, **one},
            default_args={"optimizer": optimizer, "epoch_length": epoch_length},
        )
        for one in settings
    ]
    values: dict[str, list[float]] = {"lr": [], "momentum": [], "weight_decay": []}
    # PyTorch's own schedulers warn where no step of the optimizer came first.
    optimizer.step()
    for iteration in range(1, total + 1):
        [group] = optimizer.param_groups
        values["lr"].append(group["lr"])
        values["momentum"].append(group.get("momentum", group.get("betas", (0.0,))[0]))
        values["weight_decay"].append(group.get("weight_decay", 0.0))
        for scheduler in schedulers:
            if not scheduler.by_epoch or iteration % epoch_length == 0:
                scheduler.step()
    return {name: np.array(numbers) for name, numbers in values.items()}


def _iterations_per_epoch(cfg: Config, processes: int, dataset_size: int | None) -> int:
    loader = cfg.train_dataloader
    if dataset_size is None:
        check_datasets(cfg, ("train",))
        dataset_size = len(DATASETS.build(loader.dataset))
    # mmengine's samplers give every process equally many images, some of them twice.
    images = math.ceil(dataset_size / processes)
    if loader.get("drop_last"):
        return images // loader.batch_size
    return math.ceil(images / loader.batch_size)


def _lr_scale(cfg: Config, processes: int) -> float:
    scaling = cfg.get("auto_scale_lr") or {}
    if not scaling.get("enable"):
        return 1.0
    return processes * cfg.train_dataloader.batch_size / scaling["base_batch_size"]


def plot(curves: Mapping[str, Curve], quantity: str, file: Path, title: str = "") -> None:
    """Draws curves over the iterations.

    Args:
        curves: Each curve by its name.
        quantity: What they are values of.
        file: The picture, of any format of matplotlib; its folder is made if need be.
        title: A line above.
    """
    # The object-oriented interface leaves pyplot's global state and back end alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (iterations, values) in curves.items():
        # Validations are few, and a line through one point would not be seen.
        axes.plot(iterations, values, label=name, marker="o" if len(values) < 30 else None, ms=3)
    axes.set_xlabel("iteration")
    axes.set_ylabel(quantity)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
