"""Fixtures of the kernel tests."""

import dataclasses
import functools

import pytest
import torch

from mmvmamba_kernels.backends.triton.support import interpreting


def _once(function, key):
    """The function, called once for every key that its argument has, and each time without one."""
    known = {}

    def look_up(argument, *others, **named):
        name = None if others or named else key(argument)
        if name is None:
            return function(argument, *others, **named)
        if name not in known:
            known[name] = function(argument)
        return known[name]

    return look_up


def _share(cls, key, *own):
    """Objects of a class with the same key get what the first of them has, but for their own."""
    make, known = cls.__init__, {}

    def start(self, *arguments):
        name = key(*arguments)
        if name not in known:
            make(self, *arguments)
            known[name] = vars(self).copy()
        vars(self).update(known[name])
        vars(self).update(zip(own, arguments, strict=False))

    cls.__init__ = start


def _block(element_ty, shape) -> tuple:
    """What makes a type of blocks."""
    return element_ty.name, *(getattr(size, "value", size) for size in shape)


def _same_shape(general):
    """The comparison of a shape, with a list without making another shape of it."""
    return lambda self, other: self.values == other if type(other) is list else general(self, other)


if interpreting():
    from triton.language import core
    from triton.runtime import interpreter

    # Half of the interpreter's time: it puts its functions in the place of the language's at every
    # launch and every call of a device function, where once a function is enough, and it looks for
    # overflow in all 32-bit arithmetic, which no map of a test is large enough for.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    # Half of the rest: what stands for a type in NumPy, types of blocks, and what tensors have of
    # their types, is made once.
    interpreter._get_np_dtype = _once(interpreter._get_np_dtype, lambda dtype: dtype.name)
    _share(core.block_type, _block)
    _share(core.tensor, lambda _, kind: kind.name, "handle")
    if hasattr(core, "tuple"):
        core.tuple.__eq__ = _same_shape(core.tuple.__eq__)
    # Until Triton 3.5 they stay there; later a launch removes them when it ends.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._LangPatchScope.restore = lambda _: None


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("triton")
    needed = marker is not None and not marker.kwargs.get("elsewhere")
    if needed and not torch.cuda.is_available() and not interpreting():
        pytest.skip("no GPU: test_interpreter.py runs this in a process of its own")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN, and operations without a deterministic algorithm raise."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def no_default_backend(monkeypatch):
    """Tests do not depend on the caller's environment."""
    monkeypatch.delenv("MMVMAMBA_KERNELS_BACKEND", raising=False)
