"""The command lines of `tools/train.py` and `tools/test.py`, for all three tasks."""

import argparse
import difflib
import errno
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger, print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvmamba.compat import StackError
from mmvmamba.engine.data import (
    check_datasets,
    expand_home,
    find_data,
    join_evaluators_files,
    set_data_root,
)
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.optim import AmpOptimWrapper, rate_notice
from mmvmamba.engine.processes import LAUNCHERS, exit_for_good, finish_launch, prepare_launch
from mmvmamba.engine.project import project_folder
from mmvmamba.engine.resume import newest_checkpoint
from mmvmamba.engine.runner import StrictRunner
from mmvmamba.engine.settings import SettingsAction, read_config
from mmvmamba.engine.tasks import (
    add_prediction_dump,
    enable_drawing,
    enable_tta,
    scope_of,
    set_loader_defaults,
    type_name,
)
from mmvmamba.models.arguments import ArgumentError
from mmvmamba.models.checkpoint import CheckpointError
from mmvmamba.models.official import offer_official_name

CONFIG_HELP = "a config file, or a name such as mmvmamba::mask_rcnn/CONFIG.py"
NOTICES = "notices"


def load_config(name: str, overrides: Mapping[str, object] | None = None) -> Config:
    """Loads a config.

    Args:
        name: A path, relative to the working directory or to the project's folder, or
            'package::folder/file.py'.
        overrides: Settings that replace the config's, by key; see `read_config`.

    Returns:
        The config, with what `tell_notices` tells.

    Raises:
        UsageError: If there is no such config, with the nearest names that exist, or an override
            does not fit it.
    """
    cfg, notices = read_config(lambda: _load_and_offer(name), overrides or {})
    for notice in notices:
        _add_notice(cfg, notice)
    return cfg


def _load_and_offer(name: str) -> Config:
    cfg = _load(name)
    offer_official_name()
    return cfg


def _load(name: str) -> Config:
    if "::" in name:
        try:
            return get_config(name)
        except FileNotFoundError as error:
            raise UsageError(f"no config {name}: {error}") from error
    project = project_folder()
    for path in (Path(name).expanduser(), project / name):
        if path.is_file():
            return Config.fromfile(path)
    ours, beside = (project / "configs").rglob("*.py"), Path(name).expanduser().parent.glob("*.py")
    known = {path.name: path for path in (*sorted(ours), *sorted(beside))}
    near = difflib.get_close_matches(Path(name).name, known, n=3, cutoff=0.5)
    hint = "".join(f"\n  {known[one]}" for one in near)
    raise UsageError(
        f"no config {name} (working directory: {Path.cwd()})."
        + (f" Did you mean one of these?{hint}" if hint else f" Configs are in {project}/configs.")
    )


def parse_train_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line of `tools/train.py`."""
    parser = argparse.ArgumentParser(
        description="Train a detector, a segmentor or a classifier; the config says which."
    )
    _add_common_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint; without one, from the newest intact one of the work "
        "directory, or start from the beginning if there is none",
    )
    parser.add_argument("--amp", action="store_true", help="automatic mixed precision")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate to the total batch size of all processes",
    )
    parser.add_argument(
        "--no-validate", action="store_true", help="no validation during the training"
    )
    return _parse(parser, arguments)


def parse_test_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line of `tools/test.py`."""
    parser = argparse.ArgumentParser(
        description="Evaluate a detector, a segmentor or a classifier; the config says which."
    )
    _add_common_arguments(parser)
    parser.add_argument("checkpoint", help="a checkpoint file or URL")
    parser.add_argument(
        "--out",
        help="write the predictions to this .pkl file (segmentation: or to this folder, as PNG)",
    )
    parser.add_argument("--show-dir", help="write pictures of the predictions to this folder")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds per picture in the window"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return _parse(parser, arguments)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a config, and what `load_config_and_data` takes beside it."""
    parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("--data-root", help="where the data set is, if not where the config says")
    add_cfg_options(parser)


def add_cfg_options(
    parser: argparse.ArgumentParser, name: str = "--cfg-options", what: str = "the config"
) -> None:
    """Adds mmengine's overrides of settings, an empty dict by default.

    Args:
        parser: The parser.
        name: The option.
        what: What is overridden, for the help.
    """
    parser.add_argument(
        name,
        nargs="+",
        action=SettingsAction,
        default={},
        metavar="KEY=VALUE",
        help=f'override settings of {what}; lists as key="[a,b]", without spaces',
    )


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--work-dir", help="folder for logs and checkpoints; ./work_dirs/CONFIG by default"
    )
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="what starts the processes"
    )
    # torch.distributed.launch passes it; torchrun sets LOCAL_RANK instead.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)


def _parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return options


def train_config(options: argparse.Namespace) -> Config:
    """Makes the config that a training runs from its command line.

    Raises:
        UsageError: If the two do not fit each other, or something they name is missing.
    """
    cfg = _common_config(options)
    if options.amp:
        _enable_amp(cfg)
    notice = rate_notice(cfg)
    if notice:
        _add_notice(cfg, notice)
    if options.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise UsageError(
                "--auto-scale-lr: the config does not say which batch size its learning rate is "
                "for. Add auto_scale_lr=dict(base_batch_size=N), or leave the option out."
            )
        cfg.auto_scale_lr.enable = True
    if options.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if options.resume is not None:
        _set_resume(cfg, options.resume)
    _check_weights(cfg)
    check_datasets(cfg, ("train", "val"))
    return cfg


def _enable_amp(cfg: Config) -> None:
    wrapper = type_name(cfg.optim_wrapper) or "OptimWrapper"
    if wrapper not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UsageError(f"--amp works with OptimWrapper; the config has {wrapper}.")
    dtype = cfg.optim_wrapper.get("dtype", "float16")
    if isinstance(dtype, str) and dtype not in AmpOptimWrapper.valid_dtypes:
        raise UsageError(f"optim_wrapper.dtype={dtype}: expected float16 or bfloat16.")
    cfg.optim_wrapper.type = "mmvmamba.AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def _set_resume(cfg: Config, source: str) -> None:
    if source != "auto":
        cfg.resume, cfg.load_from = True, source
        return
    path, damaged = newest_checkpoint(cfg.work_dir)
    for reason in damaged:
        _add_notice(cfg, f"--resume: skipped, an older checkpoint is used: {reason}")
    if path is None:
        _add_notice(
            cfg,
            f"--resume: no checkpoint in {cfg.work_dir} yet, training starts from the beginning.",
        )
        cfg.resume = False
        return
    cfg.resume, cfg.load_from = True, str(path)


def test_config(options: argparse.Namespace) -> Config:
    """Makes the config that a test runs from its command line.

    Raises:
        UsageError: If the two do not fit each other, or something they name is missing.
    """
    cfg = _common_config(options)
    cfg.load_from = options.checkpoint
    for key in ("load_ignore", "load_in_channels"):
        if key not in options.cfg_options:
            # The config's own is of how its training may differ from the weights it began with.
            cfg.pop(key, None)
    if options.show or options.show_dir:
        enable_drawing(cfg, options.show_dir, options.show, options.wait_time)
    if options.tta:
        if scope_of(cfg) == "mmpretrain" and (options.show or options.show_dir):
            raise UsageError(
                "--tta with --show or --show-dir: mmpretrain draws what goes into the model, which "
                "is several images for one with --tta. Draw without it."
            )
        enable_tta(cfg)
    if options.out:
        add_prediction_dump(cfg, options.out)
    _check_weights(cfg)
    check_datasets(cfg, ("test",))
    return cfg


# pytest would otherwise take it for a test.
test_config.__test__ = False


def load_config_and_data(
    name: str, overrides: Mapping[str, object] | None = None, data_root: str | None = None
) -> Config:
    """Loads a config whose data sets are to be read.

    Args:
        name: As `load_config` takes it.
        overrides: Settings that replace the config's.
        data_root: Where the data set is, if not where the config says.

    Raises:
        UsageError: If there is no such config, or it does not say its task.
    """
    overrides = dict(overrides or {})
    data_root = overrides.pop("data_root", data_root)
    cfg = load_config(name, overrides)
    scope_of(cfg)
    expand_home(cfg)
    join_evaluators_files(cfg)
    if data_root:
        set_data_root(cfg, data_root)
    else:
        found = find_data(cfg, project_folder(), Path(cfg.filename).parent)
        if found:
            _add_notice(cfg, f"data found at {found}.")
    set_loader_defaults(cfg)
    return cfg


def _common_config(options: argparse.Namespace) -> Config:
    cfg = load_config_and_data(options.config, options.cfg_options, options.data_root)
    cfg.launcher = options.launcher
    if options.work_dir:
        cfg.work_dir = options.work_dir
    elif not cfg.get("work_dir"):
        cfg.work_dir = str(Path("work_dirs") / Path(cfg.filename).stem)
    return cfg


def _add_notice(cfg: Config, text: str) -> None:
    """Keeps a message until there is a logger."""
    cfg[NOTICES] = [*cfg.get(NOTICES, []), text]


def tell_notices(cfg: Config) -> None:
    """Logs what is to be told of a config, once."""
    _log(cfg.pop(NOTICES, []))


def _log(notices: list[str]) -> None:
    for notice in notices:
        print_log(notice, "current", logging.WARNING)


def _check_weights(cfg: Config) -> None:
    """Refuses early, before data and models are made, what could only fail later."""
    source = cfg.get("load_from")
    if source and "://" not in source and not Path(source).expanduser().is_file():
        raise CheckpointError(
            f"checkpoint {source} does not exist (working directory: {Path.cwd()}). Give the path "
            "of a .pth file, or a URL."
        )


def build_runner(cfg: Config) -> Runner:
    """Builds the config's runner: `StrictRunner`, unless it names another in `runner_type`."""
    notices = cfg.pop(NOTICES, [])
    try:
        if cfg.get("runner_type"):
            # A runner of another make knows nothing of machines without GPUs.
            prepare_launch(cfg.launcher)
            return RUNNERS.build(cfg)
        return StrictRunner.from_cfg(cfg)
    finally:
        # What fails may be what they tell of; before, there was no log file.
        _log(notices)


def train(options: argparse.Namespace) -> None:
    """Trains as a parsed command line says."""
    build_runner(train_config(options)).train()


def test(options: argparse.Namespace) -> dict:
    """Tests as a parsed command line says, and returns the metrics."""
    cfg = test_config(options)
    if options.out:
        mmengine.mkdir_or_exist(Path(options.out).absolute().parent)
    return build_runner(cfg).test()


test.__test__ = False


def run_command(command: Callable[[], None], quiet: bool = False) -> None:
    """Runs a command so that its user's mistakes end it with one message and exit code 1.

    Args:
        command: The command.
        quiet: Leave out what models say of themselves as they are built.
    """
    logger = MMLogger.get_current_instance()
    level = logger.level
    try:
        if quiet:
            logger.setLevel("WARNING")
        command()
        finish_launch()
    except (ArgumentError, UsageError, CheckpointError, StackError) as error:
        if os.environ.get("RANK", "0") != "0":
            # The first process says it for all: where they share the fault, the launcher ends
            # the others in this time.
            time.sleep(3)
        exit_for_good(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        exit_for_good(
            f"error: {error.strerror}{f' ({error.filename})' if error.filename else ''}. Files "
            "written before are intact: free some space, and continue with --resume."
        )
    finally:
        logger.setLevel(level)


def train_main() -> None:
    """The command line of `tools/train.py`."""
    options = parse_train_arguments()
    run_command(lambda: train(options))


def test_main() -> None:
    """The command line of `tools/test.py`."""
    options = parse_test_arguments()
    run_command(lambda: test(options))


test_main.__test__ = False
