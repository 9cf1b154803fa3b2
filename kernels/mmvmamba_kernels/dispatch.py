"""Which implementation of an operator runs: chosen per call, by device and capability.

Every operator has a list of backends in order of preference. A backend is a module with the
operator's functions and a check that either accepts a problem or says why not.
``kernels/README.md`` says how to add one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

AUTO = "auto"
ENVIRONMENT_VARIABLE = "MMVMAMBA_KERNELS_BACKEND"

# Scanned elements: half a second to a second on one core.
LARGE_CPU_PROBLEM = 1 << 25


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept a call."""

    device: torch.device
    dtype: torch.dtype
    """Of the operator's main input."""
    states: int
    """d_state."""
    work: int
    """Scanned elements: batch * directions * positions * channels * states."""
    listed: bool = False
    """Whether the paths of a 2D scan are lists of positions."""


@dataclass(frozen=True)
class Backend:
    """One implementation of one operator."""

    name: str
    module: str
    """Imported when first chosen; it may need packages that are not installed."""
    can_run: Callable[[Problem], str | None] = lambda _: None
    """None if the backend can run the problem, else why not, as the end of a sentence."""
    slow: bool = False
    """Correct but not fast: an automatic choice of it warns once where that matters."""
    automatic: bool = True
    """Whether it may be chosen without being named."""

    def load(self) -> ModuleType:
        """The module with the operator's functions."""
        return importlib.import_module(self.module)


class BackendError(RuntimeError):
    """The backend that was asked for does not exist or cannot run this call."""


_registry: dict[str, list[Backend]] = {}
_warned: set[tuple[str, str]] = set()


def register_backend(op: str, backend: Backend) -> None:
    """Add a backend to an operator, after those that are already there in order of preference.

    Args:
        op: Name of the public function.
        backend: The implementation.

    Raises:
        ValueError: If the operator already has a backend of that name, or the name is reserved.
    """
    names = [b.name for b in _registry.setdefault(op, [])]
    if backend.name == AUTO or backend.name in names:
        raise ValueError(f"{op} cannot register backend {backend.name!r}: the name is taken")
    _registry[op].append(backend)


def operators() -> tuple[str, ...]:
    """Names of the operators that have backends to choose from."""
    return tuple(_registry)


def available_backends(op: str | None = None) -> tuple[str, ...]:
    """Names of an operator's backends in order of preference, or of all backends of all operators.

    Raises:
        ValueError: If there is no such operator.
    """
    if op is None:
        return tuple(dict.fromkeys(b.name for backends in _registry.values() for b in backends))
    if op not in _registry:
        raise ValueError(f"unknown operator {op!r}, choose from {', '.join(_registry)}")
    return tuple(b.name for b in _registry[op])


def check_name(op: str, backend: str | None) -> str:
    """The backend argument as the string an operator takes, checked.

    Raises:
        BackendError: If the operator has no backend of that name.
    """
    if backend is None:
        return AUTO
    if backend != AUTO and backend not in available_backends(op):
        raise BackendError(
            f"{op} has no backend {backend!r}. Existing backends: "
            f"{', '.join(available_backends(op))}. Leave backend=None to have it chosen by device."
        )
    return backend


@torch.compiler.assume_constant_result
def pin(
    op: str, device: torch.device, dtype: torch.dtype, states: int, listed: bool = False
) -> str:
    """The choice that 'auto' stands for, as a string that :func:`resolve` takes in its place.

    For calls that a backward pass follows: both must run on one backend, even if the default
    changes between them. In a compiled graph the string is a constant, so that a graph kept on disk
    does not outlive a change of what is installed.

    Raises:
        BackendError: As :func:`resolve`.
    """
    choice, deliberate, _ = choose(op, AUTO, Problem(device, dtype, states, 0, listed))
    return choice.name if deliberate else f"{AUTO}:{choice.name}"


def plain_or_pinned(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """For operators whose reference is PyTorch's own operations, as good as any kernel there.

    Returns:
        None if those are to be called without an operator around them: where the reference is what
        would run, in compiled graphs, whose compiler joins them with what stands around, and in
        traced ones, which may run anywhere. Else what :func:`pin` gives. A backend that the
        environment names stays, compiled or not.

    Raises:
        BackendError: As :func:`resolve`.
    """
    name = pin(op, device, dtype, states=1)
    chosen = name.rpartition(":")[2]
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    plain = chosen == "reference" or (chosen != name and recorded)
    return None if plain else name


def requested() -> str:
    """The backend that the environment names for all operators; empty if it names none."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def resolve(op: str, backend: str, problem: Problem, quiet: bool = False) -> ModuleType:
    """The module that runs this call.

    Args:
        op: Name of the public function.
        backend: A backend's name, or 'auto' for the environment's default, and without one the
            first backend in order of preference that can run the problem, or what :func:`pin` gave.
        problem: What is to be run.
        quiet: Never warn: nothing is run, only shapes are asked for.

    Returns:
        The backend's module.

    Raises:
        BackendError: If a backend was named, by argument or environment, that does not exist or
            cannot run the problem. It is never replaced by another one.
    """
    choice, deliberate, reasons = choose(op, backend, problem)
    if choice.slow and not deliberate and not quiet:
        _warn_if_it_matters(op, choice, problem, reasons)
    return choice.load()


def choose(op: str, backend: str, problem: Problem) -> tuple[Backend, bool, list[str]]:
    """The choice that :func:`resolve` makes, with its reasons.

    Returns:
        The backend, whether it was asked for by name, and why those preferred to it cannot run.

    Raises:
        BackendError: As :func:`resolve`.
    """
    asked_by = "backend="
    if backend == AUTO:
        default = requested()
        if default and default != AUTO:
            if default not in available_backends():
                raise BackendError(
                    f"environment variable {ENVIRONMENT_VARIABLE}={default!r} is not a backend. "
                    f"Existing backends: {', '.join((AUTO, *available_backends()))}. "
                    "Set it to one of these or unset it."
                )
            # A default for all operators does not bind those that have no such backend.
            if default in available_backends(op):
                backend, asked_by = default, f"{ENVIRONMENT_VARIABLE}="
    automatic, _, pinned = backend.partition(":")
    if automatic != AUTO:
        check_name(op, backend)
        choice = next(b for b in _registry[op] if b.name == backend)
        reason = choice.can_run(problem)
        if reason is not None:
            raise BackendError(f"{op} cannot run with {asked_by}{backend!r}: {reason}")
        return choice, True, []

    reasons = []
    for choice in (b for b in _registry[op] if b.automatic):
        reason = choice.can_run(problem)
        if reason is not None:
            reasons.append(f"{choice.name}: {reason}")
        elif pinned in ("", choice.name):
            return choice, False, reasons
    raise BackendError(
        f"{op} has no backend that can run this call"
        + (f" as it was compiled, with {pinned!r}. " if pinned else ". ")
        + "; ".join(reasons)
    )


def _warn_if_it_matters(op: str, choice: Backend, problem: Problem, reasons: list[str]) -> None:
    device = problem.device.type
    if device == "cpu" and problem.work < LARGE_CPU_PROBLEM:
        return
    if (op, device) in _warned:
        return
    _warned.add((op, device))
    if reasons:
        advice = "Faster backends exist but could not run it: " + "; ".join(reasons) + "."
    else:
        advice = f"This version has no faster backend of {op} for {device!r} tensors."
        if device == "cpu":
            advice += (
                " A smaller image or batch, or more threads (torch.set_num_threads), is what helps."
            )
    warnings.warn(
        f"{op} runs on the {choice.name!r} backend, plain PyTorch operations, for "
        f"{problem.work:,} scanned elements on {device!r}: correct, but slow. {advice} To choose "
        f"it deliberately and silence this, pass backend={choice.name!r} or set "
        f"{ENVIRONMENT_VARIABLE}={choice.name}.",
        UserWarning,
        stacklevel=2,
    )
