"""Plans: what a module does with maps of one shape in evaluation on a CPU, looked up once.

For an image of 224 x 224, a VMamba-T calls PyTorch's libraries some 250 times. To ask before each
call what may be done takes a tenth of the time of the whole. A plan has asked before, and looks
whether anything has changed since. It gives the numbers of the module's forward pass, bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mmvmamba.models import cpu
from mmvmamba_kernels.dispatch import requested

Step = Callable[[Tensor], Tensor]
"""From a map to a map: (B, H, W, C) for modules, (B, C, H, W) for the layers inside them."""

Maker = Callable[[Any, tuple[int, ...]], Step | None]
"""A method that makes a module's plan for maps of a shape, None where it cannot."""


def global_hooks() -> bool:
    """Whether there are hooks of all modules. PyTorch 2.7 has no function that asks for them."""
    of_all = torch.nn.modules.module
    return bool(
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )


def runs_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a call of `module` would be `cls.forward` and nothing else.

    If so, its parameters may be used without the call. If not, something of the user's is in the
    place of ours, or hooks see the call: those of `nn.utils.prune` make the weight in it.
    """
    # A forward pass may be set on the instance.
    return getattr(module.forward, "__func__", None) is cls.forward and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or global_hooks()
    )


# PyTorch's own, taken when nobody has changed them yet.
_OF_TORCH = tuple(
    (kind, name, getattr(kind, name))
    for kind, name in (
        (nn.Module, "__call__"),
        (nn.Linear, "forward"),
        (nn.Conv2d, "forward"),
        (nn.Dropout, "forward"),
    )
)


def is_plain(module: nn.Module, *names: str) -> bool:
    """Whether these attributes of a module are parameters, none of them absent."""
    return all(
        isinstance(module._parameters.get(name), nn.Parameter) and name not in vars(module)
        for name in names
    )


def plan_of(*functions: Callable) -> Callable[[Maker], Maker]:
    """Says of which of a class's functions its method `plan` is the plan.

    A subclass that has other ones needs a plan of its own, and runs without one until it has it.
    """

    def note(plan: Maker) -> Maker:
        plan.functions = tuple((f.__name__, f) for f in functions)
        return plan

    return note


class Plan:
    """A module's plan, and how to tell that it still holds.

    Args:
        module: What is planned.
        shape: Of the maps, (B, H, W, C).
        step: What to do with them.
    """

    def __init__(self, module: nn.Module, shape: tuple[int, ...], step: Step):
        self.step = step
        self._shape = shape
        self._backend = requested()
        self._module = vars(module)
        self._parts = modules = list(module.modules())
        self._kinds = list(map(type, modules))
        contents = (d for m in modules for d in (vars(m), m._parameters, m._modules))
        self._contents = [d for d in contents if d]
        self._sizes = list(map(len, self._contents))
        self._values = list(_values(self._contents))
        # The module's own hooks are called around its forward pass.
        self._hooks = [d for m in modules[1:] for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._parameters = list(module.parameters())
        # Biases, and what norms multiply by, are used where they are.
        copied = [
            parameter
            for m in modules
            if not isinstance(m, nn.LayerNorm)
            for name, parameter in m._parameters.items()
            if name != "bias"
        ]
        self._snapshot = cpu.Snapshot(self._parameters, copied)
        planned = ((kind, *function) for kind in set(self._kinds) for function in _planned(kind))
        self._functions = (*_OF_TORCH, *planned)

    def holds(self, module: nn.Module, shape: tuple[int, ...]) -> bool:
        """Whether this is what the module does with maps of such a shape, as it is now."""
        return (
            # A shallow copy has its original's plan.
            vars(module) is self._module
            and shape == self._shape
            and requested() == self._backend
            and list(map(type, self._parts)) == self._kinds
            and not any(self._hooks)
            and not global_hooks()
            and list(map(len, self._contents)) == self._sizes
            # Attributes, parameters and modules are the same ones: values may be tensors, which
            # cannot be compared.
            and all(map(is_, _values(self._contents), self._values))
            and self._snapshot.is_of(self._parameters)
            and all(getattr(kind, name) is function for kind, name, function in self._functions)
        )


def _values(contents: Iterable[dict]) -> Iterator:
    return chain.from_iterable(map(dict.values, contents))


class _Kept:
    """The latest plan of a module, which no copy of the module and no file has."""

    __slots__ = ("plan", "shape")

    def __init__(self):
        self.plan: Plan | None = None
        self.shape: tuple[int, ...] | None = None

    def __reduce__(self):
        return _Kept, ()


class KeepsPrepared(nn.Module):
    """A module that keeps what evaluation on a CPU prepared: its plan, and packed weights.

    Both are dropped by `train()`, `eval()` and `to(...)`.
    """

    def train(self, mode: bool = True):
        self._forget()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._forget()
        return super()._apply(fn, recurse)

    def _forget(self) -> None:
        vars(self).pop("_kept", None)
        cpu.forget(self.parameters())


def run(module: KeepsPrepared, x: Tensor) -> Tensor | None:
    """What the module's plan makes of `x`; None if it has none, here and now."""
    if torch.is_grad_enabled() or x.dim() != 4 or not cpu.serves(x):
        return None
    kept = vars(module).setdefault("_kept", _Kept())
    plan = kept.plan
    if plan is None or not plan.holds(module, x.shape):
        # A plan pays from the second of two maps on: images of a validation set may all differ.
        again, kept.shape = kept.shape == x.shape, x.shape
        plan = kept.plan = _make(module, x) if again else None
    return None if plan is None else plan.step(x)


def make(module: nn.Module, shape: tuple[int, ...]) -> Step | None:
    """A step of another module's plan: a call of `module` with maps (B, H, W, C) of a shape.

    None if that is more than its forward pass, or if its class has no plan of that.
    """
    if not _planned(type(module)) or getattr(module, "channel_first", False):
        return None
    return module.plan(shape) if runs_as(module, type(module)) else None


def _make(module: KeepsPrepared, x: Tensor) -> Plan | None:
    parts, parameters = list(module.modules()), list(module.parameters())
    if (
        not all(map(_is_known, parts))
        or not cpu.serves(x, *parameters)
        or not all(map(cpu.shows_changes, parameters))
    ):
        return None
    step = module.plan(tuple(x.shape))
    plan = None if step is None else Plan(module, x.shape, step)
    return plan if plan is not None and plan.holds(module, x.shape) else None


def _is_known(module: nn.Module) -> bool:
    """Whether a module does in evaluation what its class says, by parameters alone."""
    kind = type(module)
    return (
        (kind in (nn.Linear, nn.Conv2d, nn.Dropout) or bool(_planned(kind)))
        and not module.training
        and not module._buffers
        # A method that was set on the instance.
        and not any(map(callable, vars(module).values()))
    )


def _planned(kind: type[nn.Module]) -> tuple[tuple[str, Callable], ...]:
    """What the class's own plan is the plan of; nothing if it has no plan of its own.

    A plan calls those of base classes: their functions count too, where it names no others.
    """
    if "plan" not in vars(kind):
        return ()
    plans = (vars(base).get("plan") for base in reversed(kind.__mro__))
    return tuple(dict(chain.from_iterable(getattr(p, "functions", ()) for p in plans)).items())
