"""Runs again the step that a training ended at: `python -m mmvmamba.engine.replay FILE`."""

import argparse
import importlib
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from rich.console import Console

from mmvmamba.engine.cli import add_cfg_options, run_command
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.nonfinite import Trace, set_random_states, trace_step
from mmvmamba.engine.runner import load_strictly
from mmvmamba.models.checkpoint import CheckpointError, read_checkpoint
from mmvmamba.registry import MODELS

# Whose classes a batch is made of.
STRUCTURES = tuple(f"{name}.structures." for name in ("mmengine", "mmdet", "mmseg", "mmpretrain"))
# How pickle writes an array without elements.
EMPTY = "builtins.bytes"
ENTRIES = ("iteration", "batch", "random_states", "state_dict", "config")


def read_step(path: str | Path) -> dict:
    """Reads what `StopOnInvalidLoss` saved; nothing in the file is executed.

    Args:
        path: An `invalid_loss_iter_N.pt`.

    Returns:
        Its content: `iteration`, `losses`, `report`, `images`, `batch`, `random_states`,
        `state_dict` and `config`.

    Raises:
        UsageError: If it is another file.
        CheckpointError: If it cannot be read, or holds objects of unknown classes.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    classes = []
    for name in foreign:
        module, _, attribute = name.rpartition(".")
        if name == EMPTY or f"{module}.".startswith(STRUCTURES):
            found = getattr(importlib.import_module(module), attribute)
            classes += [found] if isinstance(found, type) else []
    with torch.serialization.safe_globals(classes):
        content = read_checkpoint(path)
    missing = [entry for entry in ENTRIES if entry not in content]
    if missing:
        raise UsageError(
            f"{path} has no {', '.join(missing)}: expected an invalid_loss_iter_N.pt, as a "
            "training that ended at a non-finite loss leaves it in its work directory."
        )
    return content


def replay(content: dict, overrides: dict | None = None, device: str | None = None) -> Trace:
    """Runs the forward pass of a saved step again.

    Args:
        content: As `read_step` gives it.
        overrides: Settings that replace the config's, such as another precision.
        device: Where to run; the machine's own choice if None.

    Returns:
        What was found.
    """
    cfg = Config(content["config"])
    cfg.merge_from_dict(overrides or {})
    if cfg.get("custom_imports"):
        import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.get("default_scope") or "mmengine")
    if "data_preprocessor" in cfg:
        # As mmengine's Runner does.
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    # One process has no others to synchronise with.
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device or get_device())
    load_strictly(model, content["state_dict"], f"iteration {content['iteration']}")
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    set_random_states(content["random_states"])
    return trace_step(model.train(), content["batch"], optim_wrapper)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmvmamba.engine.replay",
        description="Runs again, without updating anything, the step that a training ended at "
        "because its loss was not finite, and names the first module whose result is not.",
    )
    parser.add_argument("file", type=Path, help="WORK_DIR/invalid_loss_iter_N.pt")
    parser.add_argument("--device", help="cpu, cuda:1, ...; the machine's own choice by default")
    add_cfg_options(parser)
    options = parser.parse_args(arguments)

    def command() -> None:
        if not options.file.is_file():
            raise UsageError(f"{options.file} does not exist (working directory: {Path.cwd()}).")
        content = read_step(options.file)
        trace = replay(content, options.cfg_options, options.device)
        console = Console(highlight=False, soft_wrap=True)
        console.print(f"iteration {content['iteration']}, {len(content['images'])} images")
        console.print(str(trace), markup=False)

    run_command(command, quiet=True)


if __name__ == "__main__":
    main()
