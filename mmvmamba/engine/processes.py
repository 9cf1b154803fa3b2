"""A training process among its siblings: its place, its process group, how it ends."""

import ctypes
import datetime as dt
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from mmengine.device import get_device
from torch import distributed

from mmvmamba.engine.errors import UsageError

# Launcher -> the variables that hold a process's place, in the order of PLACE.
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
PLACE_VARIABLES = {
    "pytorch": PLACE,
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
}
LAUNCHERS = ("none", *PLACE_VARIABLES)
DEFAULT_PORT = "29500"
# The exit code of a process that a user's mistake ended (EX_CONFIG of sysexits.h).
NOT_TO_BE_REPEATED = 78


def process_place(launcher: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Reads a process's place among its siblings from what the launcher left in the environment.

    Args:
        launcher: One of `LAUNCHERS` other than 'none'.
        environ: The environment.

    Returns:
        RANK, LOCAL_RANK and WORLD_SIZE, as torch.distributed names them.

    Raises:
        UsageError: If a variable is missing, as when the process was not started by the launcher.
    """
    names = PLACE_VARIABLES[launcher]
    missing = [name for name in names if name not in environ]
    if missing:
        raise UsageError(
            f"--launcher {launcher}: {', '.join(missing)} not set, so this process was not started "
            "by that launcher. Start it with tools/dist_train.sh, tools/dist_test.sh or the "
            "slurm_* scripts, or leave --launcher out for one process."
        )
    return dict(zip(PLACE, (environ[name] for name in names), strict=True))


def check_gpus(processes: int) -> None:
    """Refuses more processes on this machine than it has GPUs.

    They would share a GPU, and NCCL would hang or fail long after the start.

    Args:
        processes: How many processes this machine is to run.

    Raises:
        UsageError: If there are GPUs, but fewer.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UsageError(
            f"{processes} processes were asked for on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''} (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): ask for at most {gpus}, or set "
            "CUDA_VISIBLE_DEVICES=-1 to run on the CPU."
        )


def prepare_launch(launcher: str, timeout: float | None = None) -> None:
    """Makes a process ready for mmengine's Runner, on a GPU machine and on any other.

    mmengine's launchers select a CUDA device unconditionally. Where there is no accelerator, the
    process group is started here, on gloo, and the Runner finds it started.

    Args:
        launcher: One of `LAUNCHERS`.
        timeout: Seconds after which a collective operation fails; torch's own if None.

    Raises:
        UsageError: If the launcher's variables are missing or there are too few GPUs.
    """
    if launcher == "none":
        return
    place = process_place(launcher)
    if launcher == "pytorch":
        _end_with_the_launcher()
    # Slurm can show each task only the GPU that is its own.
    if launcher != "slurm" or "SLURM_GPUS_PER_TASK" not in os.environ:
        check_gpus(max(int(place["LOCAL_RANK"]) + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if get_device() != "cpu" or distributed.is_initialized():
        return
    os.environ.update(place)
    os.environ.setdefault("MASTER_PORT", DEFAULT_PORT)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_node() if launcher == "slurm" else "127.0.0.1"
    init = partial(distributed.init_process_group, backend="gloo")
    if timeout is None:
        init()
    else:
        init(timeout=dt.timedelta(seconds=timeout))


def _end_with_the_launcher() -> None:
    """Makes Linux end this process when its launcher is killed and cannot.

    It would go on unwatched otherwise, and write beside the training that takes its place.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def finish_launch() -> None:
    """Ends the process group, if there is one, and the threads that serve it.

    One that is still at work when Python ends aborts the process ("terminate called without an
    active exception"), and a training that is done counts as failed. The threads end with the last
    object that refers to the group, as wrapped models do: nothing but cycles may refer to those.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()


def _first_slurm_node() -> str:
    nodes = os.environ.get("SLURM_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"the first node's address is not known ({' '.join(command)}: {error}): "
            "set MASTER_ADDR."
        ) from error
    return names[0]


def exit_for_good(message: str) -> NoReturn:
    """Ends a process whose failure another start would only repeat.

    Args:
        message: What to do about it. It is all that is printed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        sys.stderr.write(f"{message}\n")
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # The launcher repeats it, below the tracebacks of processes that waited for this one.
            reply = {"message": message.removeprefix("error: "), "timestamp": int(time.time())}
            Path(file).write_text(json.dumps(reply))
        sys.exit(NOT_TO_BE_REPEATED)
    sys.exit(message)
