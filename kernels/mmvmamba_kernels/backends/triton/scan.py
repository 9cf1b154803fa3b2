"""The selective scan in Triton: kernels that the 1D and the 2D operator share, and their launches.

One program owns a block of channels of one direction of one sequence and walks positions in that
direction's order, the states in registers: nothing crosses lanes but the sums over channels in the
backward pass. Maps are channels-last and are never reordered; a path is arithmetic on positions.
Where there are too few paths to fill the GPU, paths are cut into chunks: one pass finds each
chunk's decay and end state, a second walks over the chunks to the states that enter them, and the
walk itself then starts at every chunk at once. ``kernels/README.md`` has the maths and the counts.

The backward pass goes through intervals of a path from the last to the first. It recomputes an
interval's states into registers from the state that enters it, then runs the adjoint recurrence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mmvmamba_kernels.arguments import ceil_div
from mmvmamba_kernels.backends.triton.scan_kernels import (
    selective_scan_bwd_kernel,
    selective_scan_carry_kernel,
    selective_scan_fwd_kernel,
    selective_scan_state_kernel,
    sum_buffers_kernel,
)
from mmvmamba_kernels.backends.triton.support import (
    interpreting,
    is_aligned,
    lanes,
    multiprocessors,
    on_device,
)
from mmvmamba_kernels.patterns import Path

INTERVAL = 8
"""Positions whose states the backward pass holds in registers at a time."""

MAX_RANK = 64
"""Largest dt rank that the forward pass expands in registers, from weights in registers.

Beyond it the raw step sizes are a matrix product in memory.
"""

MAX_RANK_BACKWARD = 32
"""The same of the backward pass, which needs registers and code for a group at once."""


class _Warps(NamedTuple):
    """Warps of one multiprocessor; others are what hides the latency of a walk's every step."""

    enough: int
    """With fewer, paths are cut into chunks, although that computes every step size twice."""
    full: int
    """As many as the registers hold: what paths are cut for."""


_FORWARD_WARPS = _Warps(enough=8, full=24)
_BACKWARD_WARPS = _Warps(enough=6, full=12)

_TURNS_RESIDENT = 8
"""Programs of the adjoint scans on a multiprocessor where states take turns, in all registers."""

_UNSUMMED = 2**30
"""Bytes of what these scans may leave to be summed, or there are fewer programs at a time."""

_SHORTEST_CHUNK = 32
"""Positions below which a walk is not worth its start, where it reads its weights."""

_NARROW = 2**31
"""Elements of one map below which offsets within it have 32 bits."""


@dataclass(frozen=True)
class Layout:
    """Where the operands' elements are, in elements, and which paths lead through them."""

    batch: int
    height: int
    width: int
    channels: int
    """Of one direction."""
    states: int
    paths: tuple[Path, ...]
    low_rank: int
    """Columns of ``proj`` before B."""
    rank: int
    """The dt rank if the kernels expand it, 0 if the raw step sizes are read."""
    stride: int
    """From a position to the next in all maps: u, y, the raw step sizes, and their gradients."""
    stride_u_k: int
    """From a direction to the next in u and in the gradient of y."""
    stride_y_k: int
    """The same in y and in the gradient of u."""
    stride_delta_k: int
    """The same in the raw step sizes and in their gradient."""
    steps: int | None = None
    """Positions of the longest path, where paths are lists; ``paths`` walk along the lists."""
    partial: bool = False
    """Whether paths need not visit every position: maps that are written are set beforehand."""
    rounded: bool = False
    """Whether the forward pass saves states in bfloat16."""

    @property
    def lines(self) -> int:
        """Sequences of one image."""
        return self.paths[0].sequences(self.height, self.width)[0]

    @property
    def length(self) -> int:
        """Positions of one sequence."""
        if self.steps is not None:
            return self.steps
        return self.paths[0].sequences(self.height, self.width)[1]

    @property
    def sequences(self) -> int:
        return self.batch * self.lines

    @property
    def saved_interval(self) -> int:
        """Positions between the states that the forward pass saves, a multiple of INTERVAL.

        One state at every interval is as much memory as a bfloat16 input. Several are saved in
        bfloat16, or at every second, and the backward pass finds those between.
        """
        return INTERVAL if self.states == 1 or self.rounded else 2 * INTERVAL

    @property
    def turn(self) -> int:
        """States whose turn it is at a time, so that a kernel's code does not grow with all."""
        return next(turn for turn in (4, 2, 1) if self.states % turn == 0)

    @property
    def carries_shape(self) -> tuple[int, ...]:
        """Shape of the states that the forward pass saves; two of bfloat16 are one of float32."""
        intervals = ceil_div(self.length, self.saved_interval)
        states = self.states // 2 if self.rounded else self.states
        return self.sequences, len(self.paths), intervals, states, self.channels

    def saved(self, carries: Tensor) -> Tensor:
        """Those states, in the dtype that they are saved in."""
        return carries.view(torch.bfloat16) if self.rounded else carries


@dataclass(frozen=True)
class Operands:
    """The tensors of a scan, contiguous; None for one that the layout or the operator lacks."""

    u: Tensor
    proj: Tensor
    A: Tensor
    delta: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    skip: Tensor | None
    softplus: bool
    dtype: torch.dtype
    """Of states and sums."""
    lists: Tensor | None = None
    """Where paths are lists, (K, 1 + steps) int32: a path's length, and its positions."""


def rounds_states(factors: torch.dtype, dtype: torch.dtype, states: int) -> bool:
    """Whether states are saved in bfloat16: several of them, where B and C are it, too.

    Args:
        factors: Of B and C.
        dtype: Of the states.
        states: Their number; they are saved in pairs.
    """
    return (factors, dtype) == (torch.bfloat16, torch.float32) and states % 2 == 0


def chunk_length(programs: int, length: int, processors: int, warps: _Warps, multiple: int) -> int:
    """Length of the chunks into which paths are cut, or of a whole path.

    Args:
        programs: Programs, of one warp, that walk whole paths.
        length: Positions of a path.
        processors: Multiprocessors of the GPU.
        warps: How many of them a multiprocessor wants.
        multiple: What the length must be a multiple of.
    """
    cut = programs < processors * warps.enough
    wanted = ceil_div(processors * warps.full, programs) if cut else 1
    chunk = max(ceil_div(length, wanted), _SHORTEST_CHUNK)
    return ceil_div(chunk, multiple) * multiple


def images_at_once(layout: Layout, x: Tensor, dtype: torch.dtype) -> int:
    """Images whose adjoint scans are launched together: all, unless states take turns.

    Those leave several times the size of the maps to be summed. A part of the images is as many as
    are on the GPU at once, which takes no longer, or fewer where they would leave too much.

    Args:
        layout: Of all images.
        x: The map.
        dtype: Of a direction's gradients of it, and of the raw step sizes.
    """
    if layout.states == layout.turn:
        return max(layout.batch, 1)
    blocks = ceil_div(layout.channels, lanes(x.device))
    programs = layout.lines * len(layout.paths) * blocks
    numbers = layout.channels + blocks * layout.states
    unsummed = 2 * len(layout.paths) * layout.height * layout.width * numbers * dtype.itemsize
    images = multiprocessors(x.device) * _TURNS_RESIDENT // programs
    while images > 1 and images * unsummed > _UNSUMMED:
        images //= 2
    return max(images, 1)


def channel_blocks(layout: Layout, width: int) -> int:
    """Blocks of channels of one program of the forward pass: two if no lane is left without work.

    Two share the words of a position, but with many states the registers do not last for them.
    They do for the weights of any rank: two are a tenth to a third faster at ranks 24 and 48 by the
    model.

    Args:
        layout: The problem.
        width: Channels of a block, one a lane of the warp that a program is.
    """
    return 2 if layout.channels % (2 * width) == 0 and layout.states <= 4 else 1


def forward_group(layout: Layout) -> int:
    """Positions of a group of the forward pass, by the code that they take.

    States that take turns have a code of their own.
    """
    work = layout.rank + (4 * layout.states if layout.states == layout.turn else 0)
    return 8 if work <= 16 else 4 if work <= 128 else 2


class _Launch:
    """What the kernels of one scan have in common."""

    def __init__(
        self, layout: Layout, operands: Operands, blocks: int, warps: _Warps, multiple: int
    ):
        # Twice a run's positions fit into 32 bits.
        if layout.height * layout.width >= 2**30:
            raise ValueError(
                f"a map of {layout.height} x {layout.width} positions is too large for the Triton "
                "kernels, which number a map's positions with 32 bits: use backend='reference'"
            )
        self.layout, self.operands = layout, operands
        self.lanes = lanes(operands.u.device)
        self.blocks = ceil_div(layout.channels, blocks * self.lanes)
        paths = layout.paths
        # The walks number programs with it as an argument: with a constant, a backward walk waits
        # more, and takes 0.54 for 0.49 ms (modelled).
        self.directions = len(paths)
        u, proj = operands.u, operands.proj
        programs = layout.sequences * self.directions * self.blocks
        processors = multiprocessors(u.device)
        self.cut(chunk_length(programs, layout.length, processors, warps, multiple))
        width = layout.low_rank + 2 * layout.states
        reach = layout.height * layout.width * max(layout.stride, self.directions * width)
        compute = tl.float64 if operands.dtype == torch.float64 else tl.float32
        # Two numbers of 16 bits are read as one word.
        packed = (
            proj.element_size() == 2
            and layout.low_rank % 2 == 0
            and (layout.states == 1 or layout.turn > 1)
            and is_aligned(proj, 4)
        )
        self.constants = {
            "K": self.directions,
            "N": layout.states,
            "R": layout.rank,
            "LOW": layout.low_rank,
            "COLUMN": sum(path.column_major << k for k, path in enumerate(paths)),
            "REVERSE": sum(path.reverse << k for k, path in enumerate(paths)),
            "LISTED": operands.lists is not None,
            # Lines so short that a group of positions crosses several ends.
            "SHORT": layout.lines == 1
            and layout.height < INTERVAL - 1
            and any(path.column_major for path in paths),
            "HAS_BIAS": operands.bias is not None,
            "SOFTPLUS": operands.softplus,
            "TURN": layout.turn,
            "BLOCKS": blocks,
            "LANES": self.lanes,
            "FULL": layout.channels % (blocks * self.lanes) == 0,
            "PACK": 2 if packed else 1,
            "TYPE": tl.bfloat16 if proj.dtype == torch.bfloat16 else tl.float16,
            "ACC": compute,
            # The start of a map always has 64 bits; within it 32 are faster and mostly enough.
            "INDEX": tl.int32 if reach < _NARROW else tl.int64,
            "FAST": u.is_cuda
            and torch.version.hip is None
            and compute == tl.float32
            and not interpreting(),
            "num_warps": 1,
        }
        # An absent tensor is never read, but a kernel must be given one.
        self.absent = u.new_empty(0, dtype=operands.dtype)
        words = proj.view(-1).view(torch.int32) if packed else proj
        # (K, N, D), so that neighbouring channels are neighbours in memory.
        rates = operands.A.view(self.directions, layout.channels, layout.states)
        self.rates = rates.transpose(1, 2).contiguous()
        self.inputs = tuple(
            self.absent if t is None else t
            for t in (
                *(operands.delta, words, operands.weight, operands.bias, self.rates),
                operands.lists,
            )
        )
        self.sizes = (layout.channels, layout.height, layout.width, layout.lines, layout.length)
        self.turns = layout.states // layout.turn
        self.strides = (layout.stride, layout.stride_u_k, layout.stride_delta_k)

    def cut(self, chunk: int) -> None:
        """Cut the paths into chunks of this length."""
        self.chunk, self.chunks = chunk, ceil_div(self.layout.length, chunk)

    def grid(self, chunks: int) -> tuple[int]:
        """Programs for so many chunks of every path."""
        return (self.blocks * self.directions * chunks * self.layout.sequences,)

    def entering_states(self, u: Tensor, backwards: bool) -> Tensor:
        """The states that enter the chunks; no elements if there is one chunk.

        Args:
            u: The input; backwards, the gradient of the output.
            backwards: Whether the recurrence is the adjoint one.
        """
        if self.chunks == 1:
            return self.absent
        layout = self.layout
        shape = (layout.sequences, self.directions, self.chunks, layout.states, layout.channels)
        state = u.new_empty(shape, dtype=self.operands.dtype)
        total = u.new_empty(shape[:3] + shape[4:], dtype=self.operands.dtype)
        # Nothing is entered from the last chunk that the recurrence comes to.
        selective_scan_state_kernel[self.grid(self.chunks - 1)](
            u,
            *self.inputs,
            state,
            total,
            *self.sizes,
            self.chunk,
            self.chunks,
            self.blocks,
            self.turns,
            *self.strides,
            BACKWARDS=backwards,
            GROUP=forward_group(layout),
            **self.constants,
        )
        blocks = ceil_div(layout.channels, self.lanes)
        selective_scan_carry_kernel[(blocks * self.directions * layout.states * layout.sequences,)](
            state,
            total,
            self.rates,
            layout.channels,
            self.chunks,
            blocks,
            int(backwards),
            K=self.directions,
            N=layout.states,
            UNROLL=16,
            BLOCK_D=self.lanes,
            ACC=self.constants["ACC"],
            num_warps=1,
        )
        return state

    def walk(self, entering: Tensor, carries: Tensor, y: Tensor) -> None:
        """Run the forward kernel.

        Args:
            entering: The states that enter the chunks.
            carries: Where states go; without elements, nowhere.
            y: Where outputs go.
        """
        u, skip = self.operands.u, self.operands.skip
        selective_scan_fwd_kernel[self.grid(self.chunks)](
            u,
            *self.inputs,
            self.absent if skip is None else skip,
            entering,
            self.layout.saved(carries),
            y,
            *self.sizes,
            self.chunk,
            self.chunks,
            self.blocks,
            self.turns,
            self.directions,
            *self.strides,
            self.layout.stride_y_k,
            HAS_SKIP=skip is not None,
            SAVED=self.layout.saved_interval if carries.numel() else 0,
            ACCUMULATE=self.layout.partial,
            GROUP=forward_group(self.layout),
            **self.constants,
        )


def scan_forward(layout: Layout, operands: Operands, y: Tensor, save: bool) -> Tensor:
    """Run the scans.

    Args:
        layout: The problem.
        operands: Its tensors.
        y: Where the outputs go; they are added to what is there if paths are partial.
        save: Save states for the backward pass.

    Returns:
        The saved states, of ``layout.carries_shape``; no elements without ``save``.
    """
    u = operands.u
    carries = u.new_empty(layout.carries_shape if save else (0,), dtype=operands.dtype)
    if u.numel() == 0:
        return carries
    with on_device(u):
        launch = _Launch(
            layout,
            operands,
            channel_blocks(layout, lanes(u.device)),
            _FORWARD_WARPS,
            layout.saved_interval,
        )
        entering = launch.entering_states(u, backwards=False)
        launch.walk(entering, carries, y)
    return carries


@dataclass(frozen=True)
class Gradients:
    """What the backward kernels leave for the operators to finish."""

    proj: Tensor
    """Shares of B's and C's at every position, to be added, (channel blocks, positions, K, 2N);
    bfloat16 if B and C are."""
    A: Tensor
    """(K, D, N)"""
    skip: Tensor | None
    """(K, D)"""


def scan_backward(
    layout: Layout,
    operands: Operands,
    carries: Tensor,
    grad_y: Tensor,
    grad_u: Tensor,
    grad_raw: Tensor,
) -> Gradients:
    """Run the adjoint scans.

    Args:
        layout: As in the forward pass.
        operands: As in the forward pass.
        carries: What :func:`scan_forward` saved.
        grad_y: Gradient of the output, laid out as u.
        grad_u: Where the gradient of u goes, laid out as y, and written or added to like it.
        grad_raw: Where the gradient of the step sizes before softplus goes; zero if paths are
            partial.

    Returns:
        The other gradients, in the dtype of the states but where it says otherwise.
    """
    u, dtype = operands.u, operands.dtype
    states, channels, directions = layout.states, layout.channels, len(layout.paths)
    positions = layout.batch * layout.height * layout.width
    skip = operands.skip
    if u.numel() == 0:
        shapes = (
            (1, 0, directions, 2 * states),
            (directions, channels, states),
            (directions, channels),
        )
        proj, rates, grad_skip = (u.new_zeros(shape, dtype=dtype) for shape in shapes)
        return Gradients(proj, rates, None if skip is None else grad_skip)
    with on_device(u):
        saved = layout.saved_interval
        launch = _Launch(layout, operands, 1, _BACKWARD_WARPS, saved)
        entering = launch.entering_states(grad_y, backwards=True)
        new = u.new_zeros if layout.partial else u.new_empty
        # As the directions' parts of y: bfloat16 is wide enough for what bfloat16 is summed from.
        narrow = operands.proj.dtype == torch.bfloat16
        grad_proj = new(
            (launch.blocks, positions, directions, 2 * states),
            dtype=torch.bfloat16 if narrow else dtype,
        )
        rows = layout.sequences * launch.chunks
        grad_rates = u.new_empty((rows, directions, states, channels), dtype=dtype)
        grad_skip = u.new_empty(
            (rows, directions, channels) if skip is not None else 0, dtype=dtype
        )
        selective_scan_bwd_kernel[launch.grid(launch.chunks)](
            u,
            *launch.inputs,
            launch.absent if skip is None else skip,
            layout.saved(carries),
            grad_y,
            entering,
            grad_u,
            grad_raw,
            grad_proj,
            grad_rates,
            grad_skip,
            *launch.sizes,
            positions,
            launch.chunk,
            launch.chunks,
            launch.blocks,
            launch.turns,
            launch.directions,
            *launch.strides,
            layout.stride_y_k,
            HAS_SKIP=skip is not None,
            ACCUMULATE=layout.partial,
            SAVED=saved,
            GROUP=INTERVAL,
            **launch.constants,
        )
    return Gradients(
        grad_proj,
        grad_rates.sum(0).transpose(1, 2),
        None if skip is None else grad_skip.sum(0),
    )


def sum_buffers(parts: Tensor, out: Tensor) -> Tensor:
    """The sum over the first dimension, in its order, in float32 or float64, in ``out``."""
    if out.numel() == 0:
        return out
    block = 1024
    with on_device(parts):
        sum_buffers_kernel[(ceil_div(out.numel(), block),)](
            parts,
            out,
            out.numel(),
            COUNT=parts.shape[0],
            BLOCK=block,
            ACC=tl.float64 if parts.dtype == torch.float64 else tl.float32,
            num_warps=4,
        )
    return out
