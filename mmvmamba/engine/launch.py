"""Starting one process or many, with GPUs or without.

`python -m mmvmamba.engine.launch <torchrun arguments>` is torchrun with four differences: it
refuses more processes than GPUs before any of them starts, it shares the CPU's cores among the
processes, a process that fails is reported in one line below that process's own message, on every
machine, and `--max_restarts` works.
"""

import argparse
import ctypes
import datetime as dt
import gc
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
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
        sys.exit(NOT_TO_BE_REPEATED)
    sys.exit(message)


def main(arguments: list[str] | None = None) -> None:
    """Runs torchrun with the checks above.

    Args:
        arguments: torchrun's arguments; the command line's if None.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from mmvmamba.engine import agent

    options = torchrun.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if not options.nproc_per_node.isdigit() or int(options.nproc_per_node) < 1:
            raise UsageError(
                f"the number of processes must be a positive integer, got "
                f"{options.nproc_per_node!r}."
            )
        processes = int(options.nproc_per_node)
        check_gpus(processes)
        if options.max_restarts:
            _prepare_restarts(options)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if not torch.cuda.is_available():
        # torchrun's default of one thread would leave the other cores idle.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
        # Threads that wait by spinning make a training several times slower wherever anything else
        # runs on the machine, its own data loader included.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    agent.install()
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        _, machines = torchrun.parse_min_max_nnodes(options.nnodes)
        reason = agent.describe(error.failures, processes * machines)
        sys.exit(f"error: {reason}; its own message, if it left one, stands above.")
    except agent.JobEndedError as error:
        sys.exit(f"error: {error}")
    except (RendezvousError, distributed.DistError) as error:
        reason = error.__cause__ or error
        sys.exit(f"error: the machines did not meet, or one has left: {reason}")
    except SignalException as error:
        sys.exit(f"interrupted ({error.sigval.name}); --resume goes on from the last checkpoint.")


def _prepare_restarts(options: argparse.Namespace) -> None:
    """Makes torchrun's restarts work, on one machine and on several.

    PyTorch 2.11 keeps one store for all attempts, in which a new process finds the address of one
    that has died and cannot connect, or waits for it (github.com/pytorch/pytorch/issues/135712). A
    store of each attempt's own avoids it, which only the c10d rendezvous can give; that one also
    makes the other machines start again with the one that lost a process.
    """
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if options.standalone:
        return
    first, port = options.master_addr, int(options.master_port)
    options.rdzv_backend = "c10d"
    options.rdzv_endpoint = f"{first}:{port}"
    options.rdzv_id = f"{first}:{port}"
    options.rdzv_conf = f"is_host={int(options.node_rank == 0)}"
    options.local_addr = options.local_addr or _address_towards(first, port)


def _address_towards(host: str, port: int) -> str:
    """This machine's address as another one sees it, which a host name need not lead to."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Nothing is sent: this only chooses the route.
            probe.connect(address)
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"MASTER_ADDR={host} cannot be reached from here: {error}") from error


if __name__ == "__main__":
    main()
