"""Throughput and memory of models, every one measured in the same way and in the same run.

A model is timed only after its output, and in training its gradients, have been compared with its
own in fp32, eager and without TF32. The models of a case take turns for several rounds, so that a
machine that slows down or speeds up in the meantime favours none. Weights and images are in
channels-last memory format for all models or for none; dropout and stochastic depth are off.
"""

import dataclasses
import gc
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from mmvmamba.analysis.measured import Subject, number_of_parameters, silence
from mmvmamba.analysis.passes import MEMORY_FORMATS, Case, Step, tf32

ROUNDS = 5

# What a model may raise that does not fit a case, on its way through PyTorch.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    ArithmeticError,
    # The compilers behind Triton and Inductor.
    subprocess.CalledProcessError,
)
if find_spec("triton"):
    from triton.errors import TritonError

    FAILURES = (*FAILURES, TritonError)


@dataclass(frozen=True)
class Result:
    """One model in one case.

    Attributes:
        model: The model's name.
        case: What was timed.
        failure: Why there are no figures; empty where there are.
        params: Its number of parameters.
        seconds: Median time of a call; `p20` and `p80` are percentiles.
        calls: How many calls were timed.
        images_per_second: Batch over the median.
        peak_gb: Peak of the model's own memory on a GPU, weights included, in GB (1e9 bytes); None
            on the CPU, where no measure of it is good.
        error: Of the output against fp32, relative (L2 norms).
    """

    model: str
    case: Case
    failure: str = ""
    params: int | None = None
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    calls: int = 0
    images_per_second: float | None = None
    peak_gb: float | None = None
    error: float | None = None

    def row(self) -> dict:
        """The result as one flat row for a CSV file."""
        row = dataclasses.asdict(self)
        del row["case"]
        return {"model": row.pop("model"), **self.case.row(), **row}


def measure_case(
    subjects: Sequence[Subject],
    case: Case,
    device: torch.device,
    seconds: float,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Checks and times models in turns.

    Args:
        subjects: The models. All of them stay on the device until the last has been timed.
        case: What to time.
        device: Where.
        seconds: How long to time each model, all rounds together.
        rounds: How many turns each model takes; at least one call is timed in each.
        progress: Called with each model's name before it is prepared and before each turn.

    Returns:
        A result for each model, in their order. A model that cannot run, runs out of memory or
        gives wrong numbers has the reason in `failure` and no figures.

    Raises:
        ValueError: If the device cannot do what the case or a model's execution asks for.
    """
    cases = [case_of(subject, case) for subject in subjects]
    for one in cases:
        one.check_device(device)
    contestants: list[Contestant] = []
    with conditions(case, device, len(subjects)):
        for subject, own_case in zip(subjects, cases, strict=True):
            progress(subject.name)
            contestants.append(Contestant(subject, own_case, device))
        return take_turns(contestants, seconds, rounds, progress)


@contextmanager
def conditions(case: Case, device: torch.device, models: int) -> Iterator[None]:
    """What models of a case are prepared and timed under."""
    with tf32(True), _on(device), _room_to_compile(case, models):
        yield


def take_turns(
    contestants: Sequence["Contestant"],
    seconds: float,
    rounds: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Result]:
    """Times models that are prepared, see `measure_case`. What was timed before is forgotten."""
    for contestant in contestants:
        contestant.times = []
    for turn in range(rounds):
        # Back and forth: the first of a round is the last of the next.
        for contestant in contestants[:: -1 if turn % 2 else 1]:
            progress(contestant.name)
            contestant.take_turn(seconds / rounds)
    return [contestant.result() for contestant in contestants]


def case_of(subject: Subject, case: Case) -> Case:
    """The case with a model's own execution, if it has one."""
    return dataclasses.replace(case, execution=subject.execution) if subject.execution else case


class Contestant:
    """A model that is checked at once, and timed turn by turn until it fails.

    Args:
        subject: The model.
        case: What to time, on a device that can do it.
        device: Where.
    """

    def __init__(self, subject: Subject, case: Case, device: torch.device):
        self.name, self.case, self.device = subject.name, case, device
        self.failure, self.times = "", []
        self.params = self.peak_gb = self.error = self.call = None
        self.first = 0.0
        with self._failures():
            self._prepare(subject)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            self._give_up("out of memory")
        except FAILURES as error:
            reason = str(error).strip().splitlines()
            self._give_up(reason[0] if reason else type(error).__name__)

    def _give_up(self, reason: str) -> None:
        self.failure, self.call = reason, None

    def _prepare(self, subject: Subject) -> None:
        case, device = self.case, self.device
        before = _allocated(device)
        model = subject.build(case.size).to(device)
        model = model.to(memory_format=MEMORY_FORMATS[case.memory_format])
        self.params = number_of_parameters(model)
        silence(model)
        model.train(case.passes == "training")
        step = Step(model, case, device, subject.classifies)
        reference = step.reference()
        call = step.prepare()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if "graph" in case.execution:
            call = _capture(call)
        _synchronize(device)
        begin = time.perf_counter()
        outputs = call()
        _synchronize(device)
        self.first = time.perf_counter() - begin
        if device.type == "cuda":
            self.peak_gb = (torch.cuda.max_memory_allocated(device) - before) / 1e9
        self.error = step.check(outputs, reference)
        self.call = call

    def take_turn(self, seconds: float) -> None:
        """Times calls for some seconds, but one at least."""
        if self.call is None:
            return
        with self._failures():
            # The others have emptied the caches, which a long call fills by the way.
            if self.first <= seconds:
                self.call()
            self.times += _timed(self.call, self.device, seconds)

    def result(self) -> Result:
        """What its turns gave, or why there are none."""
        if self.failure:
            return Result(self.name, self.case, self.failure, self.params)
        p20, median, p80 = np.percentile(self.times, [20, 50, 80]).tolist()
        return Result(
            self.name,
            self.case,
            params=self.params,
            seconds=median,
            p20=p20,
            p80=p80,
            calls=len(self.times),
            images_per_second=self.case.batch / median,
            peak_gb=self.peak_gb,
            error=self.error,
        )


def _capture(call: Callable[[], object]) -> Callable[[], object]:
    """Records a warmed-up pass as a CUDA graph; its outputs are those of the last replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    return replay


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def _room_to_compile(case: Case, models: int) -> Iterator[None]:
    """Lets every model of a case be compiled for the case's size alone."""
    if "compiled" not in case.execution:
        yield
        return
    import torch._dynamo

    # What other cases compiled would make sizes dynamic that are fixed here.
    torch.compiler.reset()
    # Models share code, whose graphs are counted together; over the limit it runs uncompiled.
    limit = torch._dynamo.config.recompile_limit * models
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield


def _allocated(device: torch.device) -> int:
    """Memory of the device in use, after what failed models have left was given back."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(call: Callable[[], object], device: torch.device, seconds: float) -> Iterator[float]:
    """Times of single calls, at least one, until the seconds are over."""
    _synchronize(device)
    begin = now = time.perf_counter()
    while True:
        call()
        _synchronize(device)
        before, now = now, time.perf_counter()
        yield now - before
        if now - begin >= seconds:
            return
