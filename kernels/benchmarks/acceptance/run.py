"""What all parts of the run share: the device, the time that is left, the verdicts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

MET, MISSED, WRONG, LEFT_OUT = "met", "missed", "wrong", "left out"


@dataclass(frozen=True)
class Verdict:
    """One target: what was asked, what was found."""

    section: str
    name: str
    verdict: str
    """'met'; 'missed' of a figure; 'wrong' of a result; 'left out' for want of time."""
    found: str = ""
    target: str = ""


@dataclass
class Run:
    """One acceptance run.

    Attributes:
        device: Where.
        backend: Of the operators.
        tiny: Whether sizes are those of a test of this run.
        deadline: When nothing new starts, on the clock of :func:`time.perf_counter`.
        verdicts: So far.
        data: Everything that was measured, by section, as JSON takes it.
    """

    device: torch.device
    backend: str
    tiny: bool
    deadline: float
    verdicts: list[Verdict] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.perf_counter()

    def judge(
        self, section: str, name: str, verdict: str, found: str = "", target: str = ""
    ) -> None:
        """Adds a verdict and prints it."""
        self.verdicts.append(Verdict(section, name, verdict, found, target))
        asked = f" (target: {target})" if target else ""
        tell(f"{verdict:8s} {section}: {name}{': ' + found if found else ''}{asked}")

    def compare(
        self, section: str, name: str, found: float, target: float | None, unit: str
    ) -> None:
        """A verdict on a figure that must be at most ``target``; without one it is only printed."""
        if target is None:
            tell(f"         {section}: {name}: {found:.3g} {unit}")
            return
        verdict = MET if found <= target else MISSED
        self.judge(section, name, verdict, f"{found:.3g} {unit}", f"at most {target:g} {unit}")

    def section(self, name: str, function: Callable[[Run], Any]) -> None:
        """Runs a part if there is time; what it returns goes into the data."""
        if self.left <= 0:
            self.judge(name, "all", LEFT_OUT, "no time left")
            return
        start = time.perf_counter()
        try:
            self.data[name] = function(self)
        except Exception as error:  # noqa: BLE001 - the other parts still say something
            self.judge(name, "all", WRONG, f"{type(error).__name__}: {error}"[:400])
        self.data.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {**self.data, "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    @property
    def status(self) -> int:
        """The exit status: 0 if all targets were met, else 1."""
        return int(any(verdict.verdict != MET for verdict in self.verdicts))


def tell(text: str) -> None:
    """Prints a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    function: Callable[[], object], device: torch.device, budget: float = 100
) -> float:
    """Median time of single calls, with a cache that others have emptied.

    Args:
        function: What to time.
        device: Where it runs.
        budget: Milliseconds to spend.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(function, warmup=25, rep=budget, return_mode="median")
    times = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < budget / 1e3:
        start = time.perf_counter()
        function()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A call as a CUDA graph, after it ran once: its replay, and the outputs that this fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call takes beyond what is held before it; None on a CPU, which cannot tell."""
    if device.type != "cuda":
        function()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all tensors are the same bit for bit."""
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
