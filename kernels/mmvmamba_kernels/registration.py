"""An operator pair, forward and backward, registered with ``torch.library``.

Compilers, exporters and counters see one operator a call, and calls that nobody watches pass the
dispatcher by; which implementation runs is decided inside.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmvmamba_kernels import rehearsal
from mmvmamba_kernels.arguments import state_dtype
from mmvmamba_kernels.dispatch import AUTO, Problem, pin, resolve

NAMESPACE = "mmvmamba"

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    str: "str",
    torch.dtype: "ScalarType",
}


class OperatorPair:
    """A forward and a backward pass, called as they are or through PyTorch's dispatcher.

    The dispatcher is for where something needs to see the call: compilers, exporters, tracers,
    counters, transforms, tensors of special kinds. On its way through it a call of a Python
    operator costs the host as much as all else in it, and a backbone has a hundred of them.

    Args:
        name: Name of the forward operator; the other's ends in '_backward'.
        forward: The forward pass, of arguments by position.
        backward: The backward pass, likewise.
        forward_schema: Arguments and results of ``forward``, as ``torch.library`` writes them.
        backward_schema: The same of ``backward``.
        forward_fake: Results of ``forward`` without contents.
        backward_fake: The same of ``backward``.
        setup_context: Saves for the backward pass, as ``torch.autograd.Function.setup_context``.
        gradients: From the context and the results' gradients to those of the arguments, through
            this pair's ``backward``.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., tuple[Tensor, ...]],
        forward_schema: str,
        backward_schema: str,
        forward_fake: Callable[..., tuple[Tensor, ...]],
        backward_fake: Callable[..., tuple[Tensor, ...]],
        setup_context: Callable[..., None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ):
        self._forward, self._backward = forward, backward
        self._setup_context, self._gradients = setup_context, gradients
        self._forward_op = torch.library.custom_op(
            f"{NAMESPACE}::{name}", forward, mutates_args=(), schema=forward_schema
        )
        self._backward_op = torch.library.custom_op(
            f"{NAMESPACE}::{name}_backward", backward, mutates_args=(), schema=backward_schema
        )
        self._forward_op.register_fake(forward_fake)
        self._backward_op.register_fake(backward_fake)
        self._forward_op.register_autograd(gradients, setup_context=setup_context)

        def refuse(_ctx, *_grads) -> None:
            raise RuntimeError(
                f"{name} can be differentiated only once: its backward pass has no gradient. Call "
                "backward() or autograd.grad() without create_graph=True."
            )

        self._backward_op.register_autograd(refuse)

        def forward_and_save(ctx, *values) -> tuple[Tensor, ...]:
            outputs = forward(*values)
            setup_context(ctx, values, outputs)
            return outputs

        # Named like the operator, for anomaly reports and profiles.
        self._function = type(
            name,
            (torch.autograd.Function,),
            {"forward": staticmethod(forward_and_save), "backward": staticmethod(gradients)},
        )
        self._transformed = _transformed(name, forward, setup_context, gradients)
        self._transformed_backward = _transformed(
            f"{name}_backward", backward, lambda *_: None, refuse
        )

    def __call__(self, *values) -> tuple[Tensor, ...]:
        """Runs the forward pass, differentiable."""
        if rehearsal.active():
            return rehearsal.rehearse(self._forward, self._setup_context, self._gradients, values)
        if torch._C._are_functorch_transforms_active():
            return self._transformed.apply(*values)
        tensors = [value for value in values if isinstance(value, Tensor)]
        if needs_dispatcher(tensors):
            return self._forward_op(*values)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._function.apply(*values)
        return self._forward(*values)

    def backward(self, *values) -> tuple[Tensor, ...]:
        """Runs the backward pass, not differentiable."""
        if rehearsal.active():
            return self._backward(*values)
        if torch._C._are_functorch_transforms_active():
            return self._transformed_backward.apply(*values)
        tensors = [value for value in values if isinstance(value, Tensor)]
        # Where gradients are enabled, somebody is about to try, and the operator refuses.
        if torch.is_grad_enabled() or needs_dispatcher(tensors):
            return self._backward_op(*values)
        return self._backward(*values)


def _transformed(
    name: str, forward: Callable, setup_context: Callable, gradients: Callable
) -> type[torch.autograd.Function]:
    """A pass as the transforms of ``torch.func`` take it, which PyTorch's custom operators are not.

    ``vmap`` runs it once for each index: kernels have one batch dimension.
    """

    def vmap(info, in_dims, *values) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            function.apply(
                *(
                    v if dim is None else v.select(dim, i)
                    for v, dim in zip(values, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return outputs, (0,) * len(outputs)

    passes = {
        "forward": forward,
        "setup_context": setup_context,
        "backward": gradients,
        "vmap": vmap,
    }
    function = type(
        name, (torch.autograd.Function,), {key: staticmethod(f) for key, f in passes.items()}
    )
    return function


def is_transformed() -> bool:
    """Whether a compiler, a tracer or a function transform is at work, which knows operators."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def may_need_gradients(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient of these may be asked for, as far as they can tell.

    Under transforms they cannot: what vmap wraps says no.
    """
    return torch._C._are_functorch_transforms_active() or any(
        t is not None and t.requires_grad for t in tensors
    )


def needs_dispatcher(tensors: Sequence[Tensor]) -> bool:
    """Whether the dispatcher would do more with a call on these tensors than call the function."""
    return (
        is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._is_torch_function_mode_enabled()
        or not all(_is_ordinary(t) for t in tensors)
    )


def _is_ordinary(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory and nothing else.

    Subclasses are not, nor are meta tensors, nor those that the dispatcher knows to be negated,
    zero, batched or wrapped.
    """
    return type(tensor) in (Tensor, torch.nn.Parameter) and torch._C._dispatch_keys(
        tensor
    ).raw_repr() in _ordinary_keys(tensor.device.type)


@functools.cache
def _ordinary_keys(device: str) -> tuple[int, ...]:
    """The dispatch keys of ordinary tensors, made outside of and in inference mode."""
    if device == "meta":
        return ()
    keys = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return tuple(keys)


class Operator:
    """Forward and backward pass of one public function.

    The output has the shape of the first tensor argument, and its dtype unless there is an option
    ``out_dtype``. ``kernels/README.md`` lists the functions that an implementation consists of.

    Args:
        name: Name of the public function and, in the namespace ``mmvmamba``, of the operator.
        arguments: The record of its arguments, tensors first, whose annotations give the schema.
        sizes: From such a record, with shapes in place of tensors, to the number of scanned
            elements (channels times positions of all sequences) and the state dimension.
        flops: From the same to the operations of the forward pass; without it, those of a scan.
        listed: From the record to whether it scans along lists of positions; without it, never. A
            function, since the compiler of PyTorch 2.7 knows no properties of named tuples.
    """

    def __init__(
        self,
        name: str,
        arguments: type[NamedTuple],
        sizes: Callable[[NamedTuple], tuple[int, int]],
        flops: Callable[[NamedTuple], int] | None = None,
        listed: Callable[[NamedTuple], bool] = lambda _: False,
    ):
        self.name = name
        self._arguments = arguments
        schema = {name: _SCHEMA_TYPES[hint] for name, hint in get_type_hints(arguments).items()}
        self._count = sum(kind.startswith("Tensor") for kind in schema.values())
        self._sizes = sizes
        self._flops = flops or self._scan_flops
        self._listed = listed
        schema["backend"] = "str"
        inputs = ", ".join(f"{kind} {name}" for name, kind in schema.items())
        grads = ", ".join(["Tensor"] * self._count)
        self._pair = OperatorPair(
            name,
            self._forward,
            self._backward,
            f"({inputs}, bool save_carries) -> (Tensor, Tensor)",
            f"(Tensor grad_out, Tensor carries, {inputs}) -> ({grads})",
            self._forward_fake,
            self._backward_fake,
            self._setup_context,
            self._gradients,
        )
        overloads = getattr(torch.ops, NAMESPACE)
        register_flop_formula(getattr(overloads, name))(self._forward_flops)
        register_flop_formula(getattr(overloads, f"{name}_backward"))(self._backward_flops)

    def __call__(self, arguments: NamedTuple, backend: str) -> Tensor:
        """Run the operator on checked arguments."""
        # A list, since the compiler of PyTorch 2.7 cannot slice a named tuple.
        needed = may_need_gradients(list(arguments)[: self._count])
        # A traced graph may run anywhere, with and without gradients; the tracer compares both.
        tracing = torch.jit.is_tracing()
        save_carries = needed and (torch.is_grad_enabled() or tracing)
        if save_carries and backend == AUTO and not tracing:
            problem = self.problem(arguments)
            # index() makes a compiler fix the state dimension, which a choice may depend on.
            states = operator.index(problem.states)
            backend = pin(self.name, problem.device, problem.dtype, states, problem.listed)
        return self._pair(*arguments, backend, save_carries)[0]

    def problem(self, arguments: NamedTuple) -> Problem:
        """What backends need to know to accept a call."""
        shapes = (v.shape if isinstance(v, Tensor) else v for v in arguments)
        elements, states = self._sizes(self._arguments(*shapes))
        first = arguments[0]
        listed = self._listed(arguments)
        return Problem(first.device, first.dtype, states, elements * states, listed)

    def _implementation(self, arguments: NamedTuple, backend: str, quiet: bool = False):
        return resolve(self.name, backend, self.problem(arguments), quiet=quiet)

    def _forward(self, *values) -> tuple[Tensor, Tensor]:
        *values, backend, save_carries = values
        arguments = self._arguments(*values)
        implementation = self._implementation(arguments, backend)
        with autocast_off(values[0]):
            return implementation.forward(arguments, save_carries)

    def _forward_fake(self, *values) -> tuple[Tensor, Tensor]:
        *values, backend, save_carries = values
        arguments = self._arguments(*values)
        first = values[0]
        out = first.new_empty(first.shape, dtype=getattr(arguments, "out_dtype", first.dtype))
        saved = (0,)
        if save_carries:
            saved = self._implementation(arguments, backend, quiet=True).carries_shape(arguments)
        return out, first.new_empty(saved, dtype=state_dtype(*arguments))

    def _backward(self, grad_out: Tensor, carries: Tensor, *values) -> tuple[Tensor, ...]:
        *values, backend = values
        arguments = self._arguments(*values)
        implementation = self._implementation(arguments, backend)
        expected = tuple(implementation.carries_shape(arguments))
        if carries.shape != expected:
            raise RuntimeError(
                f"{self.name}: the backward pass got saved states of shape {tuple(carries.shape)}, "
                f"expected {expected}. Forward and backward must run on one backend."
            )
        with autocast_off(grad_out):
            grads = implementation.backward(grad_out, carries, arguments)
        # Paths, the last of an operator's tensors, have no gradient. Operators cannot return None.
        grads = (*grads, *(None,) * (self._count - len(grads)))
        return tuple(grad_out.new_empty(0) if g is None else g for g in grads)

    def _backward_fake(self, grad_out: Tensor, _carries: Tensor, *values) -> tuple[Tensor, ...]:
        tensors = values[: self._count]
        return tuple(
            t.new_empty(t.shape) if _is_differentiable(t) else grad_out.new_empty(0)
            for t in tensors
        )

    def _setup_context(self, ctx, inputs, output) -> None:
        carries = output[1]
        tensors = inputs[: self._count]
        ctx.options = inputs[self._count : -1]
        ctx.save_for_backward(carries, *tensors)
        ctx.mark_non_differentiable(carries)
        ctx.set_materialize_grads(False)

    def _gradients(self, ctx, grad_out: Tensor | None, _) -> tuple[Tensor | None, ...]:
        carries, *tensors = ctx.saved_tensors
        rest = (None,) * (len(ctx.options) + 1)
        if grad_out is None:
            return (None,) * len(tensors) + rest
        grads = self._pair.backward(grad_out, carries, *tensors, *ctx.options)
        found = (g if _is_differentiable(t) else None for t, g in zip(tensors, grads, strict=True))
        return (*found, *rest)

    def _forward_flops(self, *shapes, **_) -> int:
        return self._flops(self._arguments(*shapes[: len(self._arguments._fields)]))

    def _scan_flops(self, shapes: NamedTuple) -> int:
        return scan_flops(*self._sizes(shapes), skip=shapes.D is not None)

    def _backward_flops(self, _grad_out_shape, _carries_shape, *shapes, **_) -> int:
        # As PyTorch's own formulas count a backward pass.
        return 2 * self._forward_flops(*shapes)


def _is_differentiable(tensor: Tensor | None) -> bool:
    """Whether an argument has a gradient: paths have none, nor what is absent."""
    return tensor is not None and tensor.is_floating_point()


def scan_flops(elements: int, states: int, skip: bool = True) -> int:
    """Operations of a selective scan, as the authors of Mamba count them.

    Args:
        elements: Scanned ones: channels times positions of all sequences.
        states: N.
        skip: Whether there is a skip connection.
    """
    return elements * (9 * states + skip)


def autocast_off(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast casts nothing: an operator decides its own dtypes.

    Autocast stays active inside a custom operator and would otherwise cast the products inside it.
    """
    device = tensor.device.type
    # Asking costs a fraction of entering it, and there is none for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
