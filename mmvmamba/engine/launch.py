"""Starting one process or many, with GPUs or without.

`python -m mmvmamba.engine.launch <torchrun arguments>` is torchrun with four differences: it
refuses more processes than GPUs before any of them starts, it shares the CPU's cores among the
processes, a process that fails is reported in one line below that process's own message, on every
machine, and `--max_restarts` works.
"""

import argparse
import os
import socket
import sys

import torch
from torch import distributed
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from mmvmamba.engine import agent
from mmvmamba.engine.errors import UsageError
from mmvmamba.engine.processes import check_gpus


def main(arguments: list[str] | None = None) -> None:
    """Runs torchrun with the checks above.

    Args:
        arguments: torchrun's arguments; the command line's if None.
    """
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
        sys.exit(f"error: {reason.rstrip('.')}. Its own output is above.")
    except agent.JobEndedError as error:
        sys.exit(f"error: {error}")
    except (RendezvousError, distributed.DistError) as error:
        reason = error.__cause__ or error
        sys.exit(f"error: the machines did not meet, or one has left: {reason}")
    except SignalException as error:
        sys.exit(f"interrupted ({error.sigval.name}); --resume continues from the last checkpoint.")


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
