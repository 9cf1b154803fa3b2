"""The fused 2D selective scan: public function, checks and registration with PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mmvmamba_kernels.arguments import check_positive, check_rank, check_shape, check_tensors
from mmvmamba_kernels.backends.native import extension
from mmvmamba_kernels.backends.triton import support as triton_support
from mmvmamba_kernels.dispatch import AUTO, Backend, check_name, choose, register_backend
from mmvmamba_kernels.patterns import count_directions, is_integer
from mmvmamba_kernels.registration import Operator
from mmvmamba_kernels.selective_scan_2d.arguments import Arguments, count_steps, is_listed

_OP = "selective_scan_2d"

register_backend(_OP, Backend("triton", f"{__package__}.triton_impl", triton_support.can_run))
register_backend(_OP, Backend("cpp", f"{__package__}.cpp_impl", extension.can_run))
register_backend(_OP, Backend("reference", f"{__package__}.reference", slow=True))


def selective_scan_2d(
    x: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
    paths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scan a map along K paths, each with its own selective state space model, and sum the results.

    For direction k and channel d, along that direction's path, ``delta_l = softplus(sum_r
    dt_weight[k, d, r] R_l[k, r] + dt_bias[k, d])``, ``h_l = exp(delta_l A[k, d]) h_{l-1} + delta_l
    B_l[k] x_l[d]`` and ``y_l = C_l[k] . h_l + D[k, d] x_l[d]`` with R, B and C the parts of
    ``proj``. Source: "VMamba: Visual State Space Model", arXiv 2401.10166, SS2D.

    States and sums are float32 (float64 if any argument is float64), whatever the arguments' dtypes
    and whether or not autocast is on. Differentiable once in every tensor argument, each gradient
    in its argument's dtype, and deterministic.

    Shape letters: B batch, H height, W width, D channels, K directions, R dt rank, N state
    dimension.

    Args:
        x: The map, (B, H, W, D), channels last.
        proj: Per position and direction the low-rank dt, B and C side by side, (B, H, W, K, R +
            2N).
        dt_weight: From the low rank to the channels' step sizes, (K, D, R).
        dt_bias: Bias of the step sizes before softplus, (K, D).
        A: Negative rates of the states, (K, D, N).
        D: Skip weights, (K, D).
        pattern: The paths. K = 4: 'cross2d' (k = 0 row by row, 1 column by column, 2 and 3 the same
            reversed), 'unidi' (row by row four times), 'bidi' (k = 0, 1 row by row, 2, 3 the same
            reversed). K = 2: 'rows' and 'columns', in which every row or column is a sequence of
            its own (k = 0 forwards, 1 reversed). By lists of positions, which are made once for a
            size: 'snake', 'diagonal', 'hilbert', 'window7' (or another number; K = 4), 'atrous2'
            (or n; K = n * n): see :mod:`mmvmamba_kernels.scan_paths`; and what
            :func:`mmvmamba_kernels.register_pattern` was given.
        paths: Paths of one's own in place of a pattern, (K, L) int32 or int64, on the device of
            ``x``: path k visits the positions ``row * W + column`` of its row, in that order. With
            L = H * W every path must visit every position once. With fewer, a path visits
            different positions and may end in -1; it adds nothing to those where it does not come
            by. The values are checked, which waits for a GPU, when a tensor is new or was changed.
        backend: Name of the implementation; None chooses one per call (see
            :mod:`mmvmamba_kernels.dispatch`).

    Returns:
        The sum over the K directions, (B, H, W, D), in the dtype of ``x``.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or paths are no integer one.
        ValueError: If shapes or devices do not fit one another, the pattern is unknown, or a path
            leaves the map or visits a position twice.
        BackendError: If the backend does not exist or cannot run this call.
    """
    arguments = Arguments(x, proj, dt_weight, dt_bias, A, D, paths, pattern)
    check_arguments(_OP, arguments)
    return _operator(arguments, check_name(_OP, backend))


def prepare(
    shape: tuple[int, ...],
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
) -> Callable[[Tensor, Tensor], Tensor]:
    """:func:`selective_scan_2d` without gradients, for maps of one shape and one set of parameters.

    Where C++ runs it on the CPU, parameters are checked and laid out once and not in every call: a
    fifth of the time of a small map.

    Args:
        shape: Of the maps, (B, H, W, D); their dtype and device are the parameters'.
        dt_weight: This and the following as ``selective_scan_2d`` takes them.
        dt_bias: As there.
        A: As there.
        D: As there.
        pattern: As there.

    Returns:
        A function of ``x`` and ``proj``. It need not see that parameters change, or the backend
        that the environment names.

    Raises:
        TypeError: As ``selective_scan_2d``.
        ValueError: As there.
        BackendError: As there.
    """
    directions, _, rank = dt_weight.shape
    x = D.new_empty(shape)
    proj = D.new_empty((*shape[:3], directions, rank + 2 * A.shape[-1]))
    arguments = Arguments(x, proj, dt_weight, dt_bias, A, D, pattern=pattern)
    check_arguments(_OP, arguments)
    implementation = choose(_OP, AUTO, _operator.problem(arguments))[0].load()
    shapes = x.shape, proj.shape
    prepared = None
    if x.is_cpu and hasattr(implementation, "prepare"):
        prepared = implementation.prepare(arguments)

    def run(x: Tensor, proj: Tensor) -> Tensor:
        # What is prepared writes where these shapes say.
        if prepared is None or (x.shape, proj.shape) != shapes or x.dtype != D.dtype:
            return selective_scan_2d(x, proj, dt_weight, dt_bias, A, D, pattern=pattern)
        return prepared(x, proj)

    return run


def check_arguments(op: str, arguments: Arguments) -> None:
    """Check the arguments of a 2D scan; ``op`` is the function that messages name.

    Raises:
        TypeError: If an argument is not a floating-point tensor, or paths are no integer one.
        ValueError: If shapes or devices do not fit one another, or the pattern is unknown.
    """
    x, proj, dt_weight, dt_bias, A, D, paths, pattern = arguments
    # Written out for the compiler of PyTorch 2.7, which knows no fields of named tuples.
    tensors = {"x": x, "proj": proj, "dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    check_tensors(op, tensors)
    check_rank(op, "x", x, "(B, H, W, D)")
    check_rank(op, "dt_weight", dt_weight, "(K, D, R)")
    check_rank(op, "A", A, "(K, D, N)")
    batch, height, width, channels = x.shape
    rank, states = dt_weight.shape[2], A.shape[2]
    check_positive(op, H=height, W=width, D=channels, R=rank, N=states)
    if paths is None:
        directions, given = count_directions(op, pattern), f"pattern {pattern!r}"
    else:
        _check_paths(op, paths, x)
        directions, given = paths.shape[0], f"{paths.shape[0]} paths"
    check_shape(
        op,
        "dt_weight",
        dt_weight,
        f"(K, D, R) with {given}",
        (directions, channels, rank),
    )
    check_shape(op, "dt_bias", dt_bias, "(K, D)", (directions, channels))
    check_shape(op, "A", A, "(K, D, N)", (directions, channels, states))
    check_shape(op, "D", D, "(K, D)", (directions, channels))
    check_shape(
        op,
        "proj",
        proj,
        "(B, H, W, K, R + 2N)",
        (batch, height, width, directions, rank + 2 * states),
    )


def _check_paths(op: str, paths: Tensor, x: Tensor) -> None:
    """Check paths but for their values, which a compiler does not know."""
    if not isinstance(paths, Tensor) or not is_integer(paths.dtype):
        found = paths.dtype if isinstance(paths, Tensor) else type(paths).__name__
        raise TypeError(f"{op}: paths must be a tensor of int32 or int64, got {found}")
    if paths.device != x.device:
        raise ValueError(
            f"{op}: paths is on {paths.device} but x is on {x.device}; move them to one device"
        )
    positions = x.shape[1] * x.shape[2]
    if paths.ndim != 2 or paths.shape[0] < 1 or not 1 <= paths.shape[1] <= positions:
        raise ValueError(
            f"{op}: paths must be (K, L) with L = H * W = {positions}, or fewer where not every "
            f"position is visited, got shape {tuple(paths.shape)}"
        )


def scan_sizes(shapes: Arguments) -> tuple[int, int]:
    """Scanned elements (channels times positions of all sequences), and the state dimension.

    Args:
        shapes: The arguments, with shapes in place of tensors.
    """
    batch, height, width, channels = shapes.x
    directions, _, states = shapes.A
    steps = count_steps(shapes.paths, shapes.pattern, height, width)
    return batch * directions * steps * channels, states


_operator = Operator(_OP, Arguments, scan_sizes, listed=is_listed)
