"""Starting one process or many, with GPUs or without.

`python -m mmvmamba.engine.launch <torchrun arguments>` is torchrun with three differences: it
refuses more processes than GPUs before any of them starts, it shares the CPU's cores among the
processes, and a process that fails is reported in one line below that process's own message.
"""

import datetime as dt
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial

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


def main(arguments: list[str] | None = None) -> None:
    """Runs torchrun with the checks above.

    Args:
        arguments: torchrun's arguments; the command line's if None.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = torchrun.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if not options.nproc_per_node.isdigit() or int(options.nproc_per_node) < 1:
            raise UsageError(
                f"the number of processes must be a positive integer, got "
                f"{options.nproc_per_node!r}."
            )
        processes = int(options.nproc_per_node)
        check_gpus(processes)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if not torch.cuda.is_available():
        # torchrun's default of one thread would leave the other cores idle.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
        # Threads that wait by spinning make a training several times slower wherever anything else
        # runs on the machine, its own data loader included.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(
            f"error: process {rank} of {processes} ended with exit code {failure.exitcode}; "
            "its own message stands above."
        )
    except SignalException as error:
        sys.exit(f"interrupted ({error.sigval.name}); --resume goes on from the last checkpoint.")


if __name__ == "__main__":
    main()
