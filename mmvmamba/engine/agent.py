"""torchrun's agent, which starts a machine's processes and watches them, with better manners.

Imported by the launcher alone: a training process needs none of it.
"""

import signal
import socket
import time
from collections.abc import Mapping

from torch.distributed import DistError
from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.utils.logging import get_logger
from torch.distributed.launcher import api as launcher_api

from mmvmamba.engine.processes import NOT_TO_BE_REPEATED

# The job's store holds the reason under this key once a machine has given up.
ENDED = "mmvmamba/ended"
# The store is gone with the machine that keeps it, so that one stays until the others have looked.
# They look every 0.1 s.
SECONDS_TO_BE_HEARD = 2.0


class JobEndedError(RuntimeError):
    """Another machine has ended the job."""


class Agent(LocalElasticAgent):
    """Starts this machine's processes, and all of them again when one dies.

    Beyond torchrun's agent:

    - the reason of every restart is logged;
    - a user's mistake, which another start would only repeat, ends the job at once;
    - a machine that gives up tells the others, whose processes would otherwise wait for its own
      until a collective operation times out (with NCCL, after ten minutes).
    """

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            if any(one.exitcode == NOT_TO_BE_REPEATED for one in result.failures.values()):
                self._remaining_restarts = 0
            processes = worker_group.workers[0].world_size
            self._report(worker_group, describe(result.failures, processes))
        elif result.state is WorkerState.HEALTHY and worker_group.group_world_size > 1:
            self._listen(worker_group)
        return result

    def _report(self, worker_group: WorkerGroup, reason: str) -> None:
        left = self._remaining_restarts
        if left:
            most = worker_group.spec.max_restarts
            get_logger(__name__).warning(
                "%s; restart %s of %s: all processes start again.", reason, most - left + 1, most
            )
        elif worker_group.group_world_size > 1:
            try:
                worker_group.store.set(ENDED, reason)
            except DistError:
                # The machine that keeps the store has ended before.
                return
            time.sleep(SECONDS_TO_BE_HEARD)

    def _listen(self, worker_group: WorkerGroup) -> None:
        try:
            ended = worker_group.store.check([ENDED])
            reason = worker_group.store.get(ENDED).decode() if ended else ""
        except DistError as error:
            raise JobEndedError(f"the first machine's launcher is gone: {error}") from error
        if ended:
            raise JobEndedError(f"another machine has ended the job: {reason}")


def describe(failures: Mapping[int, ProcessFailure], processes: int) -> str:
    """Says in one line which of a job's processes failed first on this machine, and how.

    Args:
        failures: What failed, by rank.
        processes: How many processes the job has.
    """
    rank = min(failures, key=lambda one: _blame(failures[one]))
    failure = failures[rank]
    if failure.exitcode == NOT_TO_BE_REPEATED:
        manner = f"ended with: {failure.message}"
    elif failure.exitcode < 0:
        manner = f"was killed by {failure.signal_name()}"
    else:
        manner = f"ended with exit code {failure.exitcode}"
    return f"process {rank} of {processes} on {socket.gethostname()} {manner}"


def _blame(failure: ProcessFailure) -> tuple:
    """Sorts the failure that the others follow from before them."""
    # The agent itself ends what is left by SIGTERM. Times are in whole seconds; of two in one
    # second the killed process is the cause: one that lost its connection raises an exception.
    return failure.exitcode == -signal.SIGTERM, failure.timestamp, failure.exitcode >= 0


def install() -> None:
    """Makes this process's torchrun use `Agent`, for which it has no option."""
    launcher_api.LocalElasticAgent = Agent
