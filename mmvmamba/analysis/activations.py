"""Memory that a training step keeps for its backward pass, computed without running it.

Every tensor that autograd saves in a forward pass is seen through PyTorch's hooks for saved tensors
and counted once per storage. On fake tensors, which have shapes and no contents, this takes neither
memory nor a GPU, whatever the batch. It is not the peak that a GPU reports: weights, gradients,
what a kernel needs for a moment, and what gradient checkpointing computes again are not in it.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mmvmamba.analysis.measured import (
    Subject,
    image_channels,
    number_of_parameters,
    silence,
    tensors,
)
from mmvmamba.analysis.passes import AUTOCAST_DTYPES, MEMORY_FORMATS, Case
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.precompile import autocast_anywhere, check_fake_gpu


@dataclass(frozen=True)
class Activations:
    """What one model keeps for its backward pass.

    Attributes:
        model: The model's name.
        case: The batch, its precision and memory format.
        failure: Why there is no figure; empty where there is.
        params: The model's number of parameters.
        bytes: Size of the storages that are saved, parameters and buffers not among them; the
            images are, and so are the copies of weights that autocast makes.
    """

    model: str
    case: Case
    failure: str = ""
    params: int | None = None
    bytes: int | None = None

    def row(self) -> dict:
        """The figure as one flat row for a CSV file."""
        row = dataclasses.asdict(self)
        del row["case"]
        return {"model": row.pop("model"), **self.case.row(), **row}


def count_activations(
    subject: Subject, case: Case, device: str = "cuda", fake: bool = True
) -> Activations:
    """Counts the bytes that one training forward pass saves for backward.

    Args:
        subject: The model. One whose operators depend on values (proposals of a detector) has no
            figure on fake tensors, its backbone has.
        case: The pass; whether it is compiled or captured makes no difference here.
        device: Type of the device whose kernels and autocast rules count; it need not exist where
            the tensors are fake.
        fake: Whether to run on fake tensors.

    Returns:
        The figure, or why there is none.

    Raises:
        UsageError: If this PyTorch has no fake tensors of a GPU without a driver.
    """
    if fake and device == "cuda":
        try:
            check_fake_gpu()
        except RuntimeError as error:
            raise UsageError(str(error)) from error
    model = subject.build(case.size).to(memory_format=MEMORY_FORMATS[case.memory_format])
    silence(model)
    model.train()
    params = number_of_parameters(model)
    with FakeTensorMode() if fake else nullcontext():
        state = _state_on(model, case, device)
        shape, dtype = (case.batch, image_channels(model), *case.size), _dtype(case)
        images = torch.zeros(shape, device=device, dtype=dtype)
        images = images.contiguous(memory_format=MEMORY_FORMATS[case.memory_format])
        try:
            dtype = AUTOCAST_DTYPES.get(case.precision)
            with autocast_anywhere(dtype, device), _attention(device, dtype):
                saved = saved_bytes(
                    lambda: functional_call(model, state, (images,)), state.values()
                )
        # Fake tensors tell of values that are needed in an exception of RuntimeError's kind.
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return Activations(subject.name, case, reason[0], params)
    return Activations(subject.name, case, "", params, saved)


def saved_bytes(forward: Callable[[], object], excluded: Iterator[Tensor]) -> int:
    """Size of the distinct storages that autograd saves while something runs.

    Args:
        forward: What to run; its result is kept until the count is done.
        excluded: Tensors whose storages do not count, parameters for instance.

    Returns:
        Bytes, of whole storages even where a part of one is saved.
    """
    known = {_storage_key(tensor) for tensor in excluded}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = _storage_key(tensor)
        if key not in known:
            # Kept alive, so that no other storage gets its address.
            kept.setdefault(key, tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = list(tensors(forward()))
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del outputs
    return total


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.precision == "bf16" else torch.float32


def _state_on(model: nn.Module, case: Case, device: str) -> dict[str, Tensor]:
    """Tensors like a model's parameters and buffers, of the case's dtype, on a device."""
    state = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        dtype = _dtype(case) if tensor.is_floating_point() else tensor.dtype
        # Strides are given, since a fake tensor cannot be made from a real one.
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        if not isinstance(like, torch._subclasses.FakeTensor):
            like.copy_(tensor)
        state[name] = like.requires_grad_(tensor.requires_grad)
    return state


def _attention(device: str, dtype: torch.dtype | None) -> AbstractContextManager:
    return (
        _FusedAttention(dtype)
        if device == "cuda" and not torch.cuda.is_available()
        else nullcontext()
    )


class _FusedAttention(TorchFunctionMode):
    """Attention by a fused kernel, which PyTorch would choose if the GPU were there.

    Args:
        dtype: What autocast casts to; None where it is off.
    """

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
        query, key, value = (t.to(self.dtype or t.dtype) for t in (query, key, value))
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, attn_mask, True, dropout_p, is_causal)[0]
