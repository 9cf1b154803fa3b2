"""The mixers: SS2D (paper, section 4.3) and its Mamba-2 variant."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvmamba.models import cpu, plans
from mmvmamba.models.arguments import ArgumentError, check_choice
from mmvmamba.models.layers import (
    ACTIVATIONS,
    ActivationName,
    KeepsFloat32,
    LayerNorm,
    autocast_dtype,
    fx_leaf,
    linear,
    plan_linear,
    project,
)
from mmvmamba.models.plans import KeepsPrepared, Step, is_plain, plan_of, runs_as
from mmvmamba_kernels import (
    depthwise_conv,
    selective_scan,
    selective_scan_2d,
    selective_scan_2d_norm,
    state_space_dual,
)
from mmvmamba_kernels.patterns import (
    PathFunction,
    find_listed,
    listed_names,
    name_pattern,
)
from mmvmamba_kernels.patterns import count_directions as count_pattern_directions
from mmvmamba_kernels.selective_scan_2d.api import prepare

SCANS = ("cross2d", "unidi", "bidi", "cascade2d")
"""The paper's scans (table 10)."""
INITS = ("mamba", "rand", "zero")
DIRECTIONS = 4
"""Of the paper's scans."""

ScanName = str | PathFunction
"""A name of `SCANS` or of a scan pattern, or the pattern itself; see `find_scan`."""
InitName = Literal["mamba", "rand", "zero"]

# Mamba's range of time steps at initialisation.
DT_MIN, DT_MAX = 1e-3, 1e-1


def find_scan(scan: ScanName) -> str:
    """The name of a scan, checked; a function is registered under its own.

    Args:
        scan: A name of `SCANS`; 'snake', 'diagonal', 'hilbert', 'window7', 'atrous2' (or with
            another number) or what `mmvmamba_kernels.register_pattern` was given; or a function
            from a map's height and width to its paths, (K, height * width) positions `row * width +
            column`, as `register_pattern` takes it.

    Raises:
        ArgumentError: If there is no such scan, or the function does not give such paths.
    """
    if callable(scan):
        try:
            return name_pattern(scan)
        except ValueError as error:
            raise ArgumentError(str(error)) from error
    if not isinstance(scan, str) or (scan not in SCANS and find_listed(scan) is None):
        known = ", ".join((*SCANS, *listed_names()))
        raise ArgumentError(
            f"scan={scan!r} is unknown, choose from {known}, or give a function of height and "
            "width; mmvmamba_kernels.register_pattern gives one a name."
        )
    return scan


def count_directions(scan: str) -> int:
    """The number of directions K of a scan."""
    return DIRECTIONS if scan in SCANS else count_pattern_directions("VMamba", scan)


class SS2D(KeepsFloat32, KeepsPrepared):
    """2D selective scan: projections, depth-wise convolution, the scan, normalisation.

    Args:
        channels: Channels C of the map.
        d_state: State size N of each channel.
        ssm_ratio: Channels inside the mixer over C.
        dt_rank: Rank R of the time step's projection; 'auto' is ceil(C / 16).
        scan: The paths along which the map is scanned; see `find_scan`.
        gated: Whether a second branch multiplies the scan's output (vanilla VMamba).
        dwconv: Whether a depth-wise 3x3 convolution stands before the scan.
        dwconv_bias: Whether that convolution has a bias.
        act: Activation before the scan, and of the gate.
        init: 'mamba' (time steps log-uniform in [1e-3, 1e-1], A = -(1..N)), or 'rand' and 'zero',
            the alternatives of the paper's appendix H.2.
        drop: Dropout rate of the output.

    Raises:
        ArgumentError: If `scan`, `act` or `init` is unknown.
    """

    kept_in_float32 = ("dt_projs_bias", "A_logs", "Ds")

    def __init__(
        self,
        channels: int,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | Literal["auto"] = "auto",
        scan: ScanName = "cross2d",
        gated: bool = False,
        dwconv: bool = True,
        dwconv_bias: bool = False,
        act: ActivationName = "silu",
        init: InitName = "mamba",
        drop: float = 0.0,
    ):
        super().__init__()
        check_choice("act", act, ACTIVATIONS)
        check_choice("init", init, INITS)
        inner = int(ssm_ratio * channels)
        if dt_rank == "auto":
            dt_rank = math.ceil(channels / 16)
        self.scan, self.gated = find_scan(scan), gated
        self.directions = count_directions(self.scan)
        self.dt_rank, self.d_state = dt_rank, d_state
        self.in_proj = nn.Linear(channels, inner * (2 if gated else 1), bias=False)
        self.conv2d = build_depthwise_conv(inner, dwconv_bias) if dwconv else None
        self.act = act
        self.x_proj_weight = nn.Parameter(
            projection_weight(dt_rank + 2 * d_state, inner, self.directions)
        )
        self._init_ssm(inner, d_state, dt_rank, init)
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.dropout = nn.Dropout(drop)

    def _init_ssm(self, inner: int, d_state: int, dt_rank: int, init: InitName) -> None:
        shape = (self.directions, inner)
        if init == "mamba":
            bound = dt_rank**-0.5
            dt_weight = torch.empty(*shape, dt_rank).uniform_(-bound, bound)
            dt_bias = inverse_softplus_of_log_uniform(shape)
            a_log = torch.arange(1, d_state + 1).float().log().expand(*shape, d_state)
        else:
            draw = torch.randn if init == "rand" else torch.rand
            dt_weight, dt_bias = 0.1 * draw(*shape, dt_rank), 0.1 * draw(shape)
            a_log = torch.randn(*shape, d_state) if init == "rand" else torch.zeros(*shape, d_state)
        self.dt_projs_weight = nn.Parameter(dt_weight)
        self.dt_projs_bias = nn.Parameter(dt_bias)
        # The official names join directions and channels into one dimension.
        self.A_logs = nn.Parameter(a_log.flatten(0, 1).clone())
        self.Ds = nn.Parameter(torch.ones(self.directions * inner))

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Mixes a map.

        Args:
            x: (B, H, W, C).

        Returns:
            (B, H, W, C).
        """
        y = plans.run(self, x)
        if y is not None:
            return y
        x = project(self.in_proj, x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
        y = self._scan(convolve(self.conv2d, self.act, x))
        if self.gated:
            y = y * ACTIVATIONS[self.act](gate)
        return self.dropout(project(self.out_proj, y))

    def _scan(self, x: Tensor) -> Tensor:
        """The scan and the normalisation of its output."""
        if self.scan == "cascade2d":
            # Rows first, then columns, each on a normalised map (paper, figure 12: cascade scan).
            inner, dtype = x.shape[-1:], x.dtype
            x = self._scan_lines(F.layer_norm(x, inner), slice(0, 2))
            x = F.layer_norm(x, inner).to(dtype)
            x = self._scan_lines(x.transpose(1, 2), slice(2, 4))
            return self.out_norm(x.transpose(1, 2)).to(dtype)
        # Linear in x at the same position: one matrix product serves all directions.
        proj = linear(x, self.x_proj_weight).unflatten(-1, self.x_proj_weight.shape[:2])
        scan = (proj, *self._scan_parameters())
        if not runs_as(self.out_norm, LayerNorm):
            y = selective_scan_2d(with_range(x), *scan, pattern=self.scan)
            return self.out_norm(y).to(autocast_dtype(x) or x.dtype)
        y, total = selective_scan_2d_norm(
            x,
            *scan,
            self.out_norm.weight,
            self.out_norm.bias,
            eps=self.out_norm.eps,
            out_dtype=self.out_norm.out_dtype(x),
            pattern=self.scan,
            return_sum=True,
        )
        return y if total is None else self.out_norm.noted(y, total)

    def _scan_parameters(self) -> tuple[Tensor, ...]:
        """What a 2D scan takes after the map and its projections."""
        return (
            self.dt_projs_weight,
            self.dt_projs_bias,
            self._per_direction(-self.A_logs.float().exp()),
            self._per_direction(self.Ds),
        )

    def _scan_lines(self, x: Tensor, directions: slice) -> Tensor:
        """Scans every line of (B, lines, L, D) on its own, forward and reversed, and sums both."""
        lines = x.flatten(0, 1)
        paths = torch.stack([lines, lines.flip(1)], dim=1)
        projected = torch.einsum("skld,kcd->skcl", paths, self.x_proj_weight[directions])
        dt, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        y = selective_scan(
            with_range(paths).transpose(2, 3).flatten(1, 2),
            torch.einsum("skrl,kdr->skdl", dt, self.dt_projs_weight[directions]).flatten(1, 2),
            self._per_direction(-self.A_logs.float().exp())[directions].flatten(0, 1),
            b,
            c,
            self._per_direction(self.Ds)[directions].flatten(),
            self.dt_projs_bias[directions].flatten(),
            delta_softplus=True,
        )
        # The reversed path's output is added in the order it was scanned, not turned back: the
        # official models were trained so.
        return y.unflatten(1, (2, -1)).sum(1).transpose(1, 2).unflatten(0, x.shape[:2])

    def _per_direction(self, parameter: Tensor) -> Tensor:
        """Splits the official joint dimension of directions and channels."""
        return parameter.unflatten(0, (self.directions, -1))

    @plan_of(forward, _scan, _scan_parameters, _per_direction)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """What `forward` does with maps of a shape, see `plans`."""
        if self.scan == "cascade2d" or not runs_as(self.dropout, nn.Dropout):
            return None
        names = "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"
        if not is_plain(self, *names):
            return None
        batch, height, width, channels = shape
        directions, inner, rank = self.dt_projs_weight.shape
        rows = directions, rank + 2 * self.A_logs.shape[-1]
        if self.x_proj_weight.shape != (*rows, inner):
            return None
        first = batch, inner, height, width
        into, conv, norm, out = (
            plan_linear(self.in_proj, (batch, channels, height, width)),
            plan_convolve(self.conv2d, self.act, first),
            plans.make(self.out_norm, (batch, height, width, inner)),
            plan_linear(self.out_proj, first),
        )
        if None in (into, conv, norm, out):
            return None
        ends = self.in_proj.weight.shape[0], self.out_proj.weight.shape[0]
        if ends != (inner * (1 + self.gated), channels):
            return None
        proj = cpu.planned(cpu.Geometry(first), self.x_proj_weight, None)
        scan = prepare((batch, height, width, inner), *self._scan_parameters(), pattern=self.scan)

        def run(x: Tensor) -> Tensor:
            x = into(x.permute(0, 3, 1, 2))
            if self.gated:
                x, gate = x.chunk(2, dim=1)
            x = conv(x)
            coefficients = proj(x).permute(0, 2, 3, 1).unflatten(-1, rows)
            y = norm(scan(x.permute(0, 2, 3, 1), coefficients))
            if self.gated:
                y = y * ACTIVATIONS[self.act](gate.permute(0, 2, 3, 1))
            return out(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

        return run


class Mamba2Mixer(KeepsFloat32, KeepsPrepared):
    """SS2D with Mamba-2's state-space duality in place of the selective scan.

    Channels are grouped into `heads` that share one decay and one time step per position, and the
    time step is projected at full rank.

    Args:
        channels: Channels C of the map.
        d_state: State size N.
        ssm_ratio: Channels inside the mixer over C.
        heads: Number of heads; the inner channels must divide by it. 'auto' is ceil(C / 16).
        dwconv: Whether a depth-wise 3x3 convolution stands before the scan.
        dwconv_bias: Whether that convolution has a bias.
        act: Activation before the scan.
        init: 'rand' or 'zero' as in the paper's appendix H.2, or 'mamba'.
        drop: Dropout rate of the output.

    Raises:
        ArgumentError: If the inner channels do not divide by `heads`, or `act` or `init` is
            unknown.
    """

    kept_in_float32 = ("dt_projs_bias", "A_logs", "Ds")

    def __init__(
        self,
        channels: int,
        d_state: int = 64,
        ssm_ratio: float = 1.0,
        heads: int | Literal["auto"] = "auto",
        dwconv: bool = True,
        dwconv_bias: bool = False,
        act: ActivationName = "gelu",
        init: InitName = "zero",
        drop: float = 0.0,
    ):
        super().__init__()
        check_choice("act", act, ACTIVATIONS)
        check_choice("init", init, INITS)
        inner = int(ssm_ratio * channels)
        if heads == "auto":
            heads = math.ceil(channels / 16)
        if inner % heads:
            raise ArgumentError(
                f"the Mamba-2 mixer has {inner} inner channels, which do not divide into "
                f"{heads} heads (dt_rank). Choose dt_rank so that it divides ssm_ratio * dims."
            )
        self.heads, self.d_state = heads, d_state
        self.in_proj = nn.Linear(channels, inner, bias=False)
        self.conv2d = None
        if dwconv:
            # In a sequence because the official parameter is named `conv2d.1`.
            self.conv2d = nn.Sequential(nn.Identity(), build_depthwise_conv(inner, dwconv_bias))
        self.act = act
        self.x_proj_weight = nn.Parameter(projection_weight(heads + 2 * d_state, inner))
        shape = (DIRECTIONS, heads)
        if init == "mamba":
            dt_bias, a_log = inverse_softplus_of_log_uniform(shape), torch.zeros(shape)
        else:
            draw = torch.randn if init == "rand" else torch.rand
            dt_bias = 0.1 * draw(shape)
            a_log = torch.randn(shape) if init == "rand" else torch.zeros(shape)
        self.dt_projs_bias = nn.Parameter(dt_bias)
        self.A_logs = nn.Parameter(a_log)
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS, heads, inner // heads))
        self.out_norm = LayerNorm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.dropout = nn.Dropout(drop)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        """Mixes a map, (B, H, W, C) to (B, H, W, C)."""
        x = project(self.in_proj, x)
        conv = self.conv2d
        kinds = (nn.Sequential, nn.Identity, nn.Conv2d)
        parts = () if conv is None else (conv, *conv.children())
        if len(parts) == len(kinds) and all(map(runs_as, parts, kinds)):
            conv = conv[1]
        x = convolve(conv, self.act, x)
        y = self.out_norm(self._scan(x)).to(x.dtype)
        return self.dropout(project(self.out_proj, y))

    def _scan(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        paths = cross_paths(x)
        projected = torch.einsum("bkld,kcd->bklc", paths, self.x_proj_weight)
        dt, b, c = projected.split([self.heads, self.d_state, self.d_state], dim=-1)
        y = state_space_dual(
            with_range(paths).unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_logs.float().exp(),
            b,
            c,
            self.Ds,
            dt_bias=self.dt_projs_bias,
        )
        return cross_merge(y.flatten(-2), height, width)


def cross_paths(x: Tensor) -> Tensor:
    """Lays a map out along the four paths of the cross scan (paper, figure 2).

    Args:
        x: (B, H, W, D).

    Returns:
        (B, 4, L, D): row-major, column-major, and both reversed.
    """
    paths = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], dim=1)
    return torch.cat([paths, paths.flip(2)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """Sums at each position what the four paths of `cross_paths` gave.

    Args:
        y: (B, 4, L, D).
        height: H of the map.
        width: W of the map.

    Returns:
        (B, H, W, D).
    """
    y = y[:, :2] + y[:, 2:].flip(2)
    return y[:, 0].unflatten(1, (height, width)) + y[:, 1].unflatten(1, (width, height)).transpose(
        1, 2
    )


def with_range(x: Tensor) -> Tensor:
    """What a scan is given: float16 as float32, for the sake of its output.

    A sum over thousands of positions may leave float16's range, its normalisation does not.
    """
    return x.float() if x.dtype == torch.float16 else x


def build_depthwise_conv(channels: int, bias: bool) -> nn.Conv2d:
    """Makes a 3x3 convolution of each channel on its own, which keeps height and width."""
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=bias)


def is_depthwise_3x3(conv: nn.Conv2d) -> bool:
    """Whether it is as `build_depthwise_conv` makes it."""
    sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode
    expected = (3, 3), (1, 1), (1, 1), (1, 1), "zeros"
    return sizes == expected and conv.groups == conv.in_channels == conv.out_channels


def convolve(conv: nn.Module | None, act: ActivationName, x: Tensor) -> Tensor:
    """The depth-wise convolution, if there is one, and the activation, of (B, H, W, C)."""
    if conv is None:
        return ACTIVATIONS[act](x)
    if not runs_as(conv, nn.Conv2d) or not is_depthwise_3x3(conv):
        return ACTIVATIONS[act](conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    parameters = conv.weight, conv.bias
    if cpu.fuses(x, *parameters):
        y = cpu.convolve(x.permute(0, 3, 1, 2), *parameters, (1, 1), (1, 1), conv.groups, act)
        return y.permute(0, 2, 3, 1)
    return depthwise_conv(x, *parameters, act=act)


def plan_convolve(
    conv: nn.Module | None, act: ActivationName, shape: tuple[int, ...]
) -> Step | None:
    """`convolve`'s plan for maps (B, C, H, W); None if it is no such convolution."""
    if conv is None:
        # On the same view: for others PyTorch may have other kernels, which round otherwise.
        return lambda x: ACTIVATIONS[act](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if not runs_as(conv, nn.Conv2d) or not is_depthwise_3x3(conv) or not is_plain(conv, "weight"):
        return None
    if conv.groups != shape[1] or conv.weight.shape != (shape[1], 1, 3, 3):
        return None
    geometry = cpu.Geometry(shape, padding=(1, 1), groups=conv.groups)
    return cpu.planned(geometry, conv.weight, conv.bias, act)


def projection_weight(out_features: int, in_features: int, directions: int = DIRECTIONS) -> Tensor:
    """The directions' projections, (K, out, in), each as torch initialises a linear layer."""
    bound = 1 / math.sqrt(in_features)
    return torch.empty(directions, out_features, in_features).uniform_(-bound, bound)


def inverse_softplus_of_log_uniform(shape: tuple[int, ...]) -> Tensor:
    """Biases whose softplus is log-uniform in [DT_MIN, DT_MAX], as Mamba initialises time steps."""
    dt = torch.exp(torch.empty(shape).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
    # log(exp(dt) - 1), without cancellation for small dt.
    return dt + torch.log(-torch.expm1(-dt))
