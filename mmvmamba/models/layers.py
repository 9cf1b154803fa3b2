"""The building blocks of VMamba around the SS2D mixer.

All of them take and return maps in channels-last order, (B, H, W, C). Linear layers and batch norms
are PyTorch's own modules, so that what converts those (quantisation, `convert_sync_batchnorm`,
adapters) converts these; `project` and `normalize` call them on maps.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from mmvmamba.models import cpu, plans
from mmvmamba.models.arguments import check_choice
from mmvmamba.models.plans import KeepsPrepared, Step, is_plain, plan_of, runs_as
from mmvmamba.models.recompute import LinearOf, Origin, origin_of, with_origin
from mmvmamba_kernels import add_layer_norm, layer_norm
from mmvmamba_kernels.dispatch import plain_or_pinned

NORMS = ("ln", "bn")
ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

NormName = Literal["ln", "bn"]
ActivationName = Literal["gelu", "relu", "silu"]


class ToChannelsLast(nn.Module):
    """A view of an NCHW tensor as (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """A view of a (B, H, W, C) tensor as NCHW, in torch's channels_last memory format."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def fx_leaf(forward: Callable) -> Callable:
    """Has the tracers of torch.fx record a call of the module, and not what its forward pass does.

    That depends on devices, dtypes and modes, of which the tracers' proxies know nothing.
    """

    @wraps(forward)
    def leaf(self: nn.Module, x: Tensor, **options) -> Tensor:
        if not isinstance(x, fx.Proxy):
            return forward(self, x, **options)
        path = x.tracer.path_of_module(self)
        if self._forward_hooks or self._forward_pre_hooks:
            # A tracer records them around the call, which runs them too.
            raise ValueError(
                f"{path} has hooks, which would run twice in a module traced by torch.fx: add them "
                "to the traced module instead."
            )
        return x.tracer.create_proxy("call_module", path, (x,), options)

    return leaf


class Conv2d(KeepsPrepared, nn.Conv2d):
    """A convolution of one group."""

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        rest = self.dilation, self.groups, self.padding_mode
        plain = rest == ((1, 1), 1, "zeros") and not isinstance(self.padding, str)
        if plain and cpu.serves(x, self.weight, self.bias):
            return cpu.convolve(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


def trunc_normal_(weight: Tensor, std: float, **bounds: float) -> None:
    """`nn.init.trunc_normal_`, but for fake tensors, which have no values.

    PyTorch 2.14 draws until all values lie within the bounds, and asks whether they do.
    """
    if not isinstance(weight, FakeTensor):
        nn.init.trunc_normal_(weight, std=std, **bounds)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` for a linear layer and a map, by the fastest way the device has.

    Args:
        layer: An `nn.Linear`; whatever stands in the place of one is called.
        x: (B, H, W, C).

    Returns:
        (B, H, W, out_features).
    """
    origin = origin_of(x)
    if (origin is not None or x.is_cpu) and runs_as(layer, nn.Linear):
        weight, bias = layer.weight, layer.bias
        # Weights that wrap others, such as quantised ones, know linear layers and little else.
        if origin is not None and not is_traceable_wrapper_subclass(weight):
            return _linear_of(x, weight, bias, origin)
        if cpu.serves(x, weight, bias):
            return cpu.linear(x, weight, bias)
    return layer(x)


def plan_linear(
    layer: nn.Module, shape: tuple[int, ...], act: ActivationName | None = None
) -> Step | None:
    """The plan of a linear layer, and of an activation after it; None if it is no such layer.

    Args:
        layer: The layer.
        shape: Of the map, (B, C, H, W), whose C is the layer's inputs.
        act: The activation.
    """
    if not runs_as(layer, nn.Linear) or not is_plain(layer, "weight"):
        return None
    fits = layer.weight.dim() == 2 and layer.weight.shape[1] == shape[1]
    return cpu.planned(cpu.Geometry(shape), layer.weight, layer.bias, act) if fits else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` on the last dimension of (B, H, W, C), likewise.

    Args:
        x: (B, H, W, C).
        weight: (..., C); all dimensions but the last become the result's last.
    """
    if cpu.serves(x, weight):
        return cpu.linear(x, weight)
    return F.linear(x, weight.flatten(0, -2))


def _linear_of(x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin) -> Tensor:
    """`F.linear` of an `x` that training does not keep."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        # Converted here and not by autocast, whose copies, made inside a function, have no
        # gradient but would serve other calls too.
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return LinearOf.apply(x, weight, bias, origin.function, origin.inputs)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast has linear layers compute on `x`; None where it is off."""
    device = x.device.type
    # There is no autocast of meta tensors to ask for.
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


class KeepsFloat32(nn.Module):
    """A module some of whose own parameters stay float32 when a model is made narrower.

    `model.bfloat16()` and the like would round them, and they are small but sensitive: steps near
    1e-3 and rates whose exponentials act over thousands of positions, scales near one.
    """

    kept_in_float32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        parameters = [getattr(self, name) for name in self.kept_in_float32]
        kept = {id(t) for p in parameters if p is not None for t in (p, p.grad)}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept and converted.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(converted.device, torch.float32)
            return converted

        return super()._apply(convert, recurse)


class LayerNorm(KeepsFloat32, nn.LayerNorm):
    """Layer normalisation of the last dimension, with float32 statistics and parameters.

    Without autocast the result has the input's dtype. Under autocast it has autocast's, which is
    what the layer that follows computes in, and float32 for `stream`.

    Args:
        channels: Channels C of the map.
        stream: Whether the result starts a residual stream, which autocast leaves in float32.
    """

    kept_in_float32 = ("weight", "bias")

    def __init__(self, channels: int, stream: bool = False):
        super().__init__(channels, eps=1e-5)
        self.stream = stream

    def out_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the result for such an input, here and now."""
        dtype = autocast_dtype(x)
        if dtype is None:
            return x.dtype
        return torch.float32 if self.stream else dtype

    def noted(self, y: Tensor, x: Tensor) -> Tensor:
        """Notes on `y`, which it returns, that it is the normalisation of `x`."""
        function = partial(layer_norm, eps=self.eps, out_dtype=y.dtype)
        return with_origin(y, function, x, self.weight, self.bias)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        y = layer_norm(x, self.weight, self.bias, eps=self.eps, out_dtype=self.out_dtype(x))
        return self.noted(y, x)

    def of_sum(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """`x + scale * branch`, `scale` being one factor per sample, and its normalisation."""
        total, y = add_layer_norm(
            x,
            branch,
            self.weight,
            self.bias,
            scale=scale,
            eps=self.eps,
            out_dtype=self.out_dtype(x),
        )
        return total, self.noted(y, total)

    @plan_of(forward, of_sum, out_dtype)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """What `forward` does with maps of a shape, see `plans`."""
        if not is_plain(self, "weight", "bias"):
            return None
        weight = self.weight
        # Another implementation than PyTorch's may have been asked for.
        named = plain_or_pinned("layer_norm", weight.device, weight.dtype)
        fits = self.normalized_shape == weight.shape == self.bias.shape == (shape[-1],)
        if not fits or named is not None:
            return None
        return lambda x: F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def build_norm(norm: NormName, channels: int, stream: bool = False) -> nn.Module:
    """Makes a normalisation for `normalize`; `stream` as `LayerNorm`'s.

    Raises:
        ArgumentError: If there is no such normalisation.
    """
    check_choice("norm", norm, NORMS)
    return LayerNorm(channels, stream) if norm == "ln" else nn.BatchNorm2d(channels)


def normalize(kind: NormName, norm: nn.Module, x: Tensor) -> Tensor:
    """Calls a module that `build_norm(kind, ...)` made, or one in its place, on (B, H, W, C)."""
    if kind == "ln":
        return norm(x)
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _norm_steps(norm: NormName, channels: int, last: bool = True) -> list[nn.Module]:
    """What normalises a convolution's NCHW result, as parts of a sequence.

    The second part has the parameters, and nothing follows it unless it must: the parts' places are
    the official names. The result is (B, H, W, C) for `last`, which starts a residual stream, else
    NCHW again.
    """
    module = build_norm(norm, channels, stream=last)
    if norm == "ln":
        return [ToChannelsLast(), module, *([] if last else [ToChannelsFirst()])]
    return [nn.Identity(), module, ToChannelsLast() if last else nn.Identity()]


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's branch is left out at a rate.

    Branches that stay are divided by the rate of staying.
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def _mask(self, x: Tensor) -> Tensor | None:
        if not self.drop_prob or not self.training:
            return None
        # Drawn in float32: narrower numbers are too coarse to keep the rate.
        return (torch.rand(x.shape[0], device=x.device) >= self.drop_prob).float()

    def scale(self, x: Tensor) -> Tensor | None:
        """The factor of each sample's branch, (B,) in float32; None where all are one."""
        mask = self._mask(x)
        return None if mask is None else mask / (1 - self.drop_prob)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """The residual sum of `x` and `branch`, both (B, ..., C)."""
        mask = self._mask(x)
        if mask is None:
            return x + branch
        mask = mask.to(branch.dtype).view(-1, *(1,) * (branch.dim() - 1))
        return torch.addcmul(x, branch, mask, value=1 / (1 - self.drop_prob))

    @plan_of(forward, scale, _mask)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """None: in evaluation it is a sum, which the block's plan has."""

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


def build_stem(version: Literal["v1", "v2"], in_channels: int, channels: int, norm: NormName):
    """Makes the stem: NCHW images to (B, ceil(H/4), ceil(W/4), channels), floor for 'v1'.

    'v1' is one 4x4 convolution of stride 4 (vanilla VMamba), 'v2' two 3x3 convolutions of stride 2.
    The modules' places in the sequence are the official parameter names.
    """
    if version == "v1":
        return nn.Sequential(
            Conv2d(in_channels, channels, kernel_size=4, stride=4),
            *_norm_steps(norm, channels),
        )
    return nn.Sequential(
        Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1),
        *_norm_steps(norm, channels // 2, last=False),
        nn.GELU(),
        Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        *_norm_steps(norm, channels),
    )


class PatchMerging(KeepsPrepared):
    """Halves a map by joining each 2x2 group of positions, as Swin Transformer does.

    An odd height or width is padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormName):
        super().__init__()
        self.reduction = nn.Linear(4 * in_channels, out_channels, bias=False)
        self.norm = build_norm(norm, 4 * in_channels)
        self.norm_kind = norm

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        # (B, H/2, row, W/2, column, C): the row offset varies fastest among the four parts.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return project(self.reduction, normalize(self.norm_kind, self.norm, x))


def build_downsample(
    version: Literal["v1", "v2", "v3"], in_channels: int, out_channels: int, norm: NormName
) -> nn.Module:
    """Makes the step between two stages: half the height and width, other channels.

    'v1' is patch merging, 'v2' a 2x2 convolution, 'v3' a 3x3 convolution with padding.
    """
    if version == "v1":
        return PatchMerging(in_channels, out_channels, norm)
    kernel, padding = (2, 0) if version == "v2" else (3, 1)
    return nn.Sequential(
        ToChannelsFirst(),
        Conv2d(in_channels, out_channels, kernel_size=kernel, stride=2, padding=padding),
        *_norm_steps(norm, out_channels),
    )


class Mlp(KeepsPrepared):
    """Two linear layers with an activation between them, on the last dimension."""

    def __init__(self, channels: int, hidden: int, act: ActivationName, drop: float = 0.0):
        super().__init__()
        check_choice("act", act, ACTIVATIONS)
        self.fc1 = nn.Linear(channels, hidden)
        self.act = act
        self.fc2 = nn.Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        y = plans.run(self, x)
        if y is not None:
            return y
        fc1 = self.fc1
        if runs_as(fc1, nn.Linear) and cpu.fuses(x, fc1.weight, fc1.bias):
            hidden = cpu.linear(x, fc1.weight, fc1.bias, self.act)
        else:
            x = project(fc1, x)
            act = ACTIVATIONS[self.act]
            hidden = act(x)
            # The gradient of relu keeps its result, and not what it took.
            if self.act != "relu":
                hidden = with_origin(hidden, act, x)
        return self.drop(project(self.fc2, self.drop(hidden)))

    @plan_of(forward)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """What `forward` does with maps of a shape, see `plans`."""
        if not runs_as(self.drop, nn.Dropout):
            return None
        batch, height, width, channels = shape
        hidden = plan_linear(self.fc1, (batch, channels, height, width), self.act)
        if hidden is None:
            return None
        out = plan_linear(self.fc2, (batch, self.fc1.weight.shape[0], height, width))
        if out is None or self.fc2.weight.shape[0] != channels:
            return None
        return lambda x: out(hidden(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class VSSBlock(KeepsPrepared):
    """A visual state-space block (paper, section 4.2 and figure 3 (d)).

    `x + drop_path(op(norm(x)))`, then the same with an MLP; vanilla VMamba has no second half.

    Args:
        channels: Channels C of the map.
        op: The mixer, from (B, H, W, C) to the same shape: an `SS2D`, a `Mamba2Mixer`, or any other
            module.
        norm: Normalisation before the mixer and the MLP: 'ln' or 'bn'.
        mlp_ratio: Hidden channels of the MLP over `channels`; 0 for no MLP.
        mlp_act: Activation of the MLP: 'gelu', 'relu' or 'silu'.
        mlp_drop: Dropout rate in the MLP.
        drop_path: Rate at which a sample skips a branch in training.
        with_cp: Whether to recompute the block in the backward pass instead of storing it.

    Raises:
        ArgumentError: If `norm` or `mlp_act` is unknown.

    Examples:
        >>> block = VSSBlock(32, SS2D(32))
        >>> block(torch.zeros(1, 14, 20, 32)).shape
        torch.Size([1, 14, 20, 32])
    """

    channel_first = False
    """Whether the block's maps are (B, C, H, W), as the official modules' may be."""

    def __init__(
        self,
        channels: int,
        op: nn.Module,
        norm: NormName = "ln",
        mlp_ratio: float = 4.0,
        mlp_act: ActivationName = "gelu",
        mlp_drop: float = 0.0,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__()
        self.norm = build_norm(norm, channels)
        self.norm_kind = norm
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = build_norm(norm, channels)
            self.mlp = Mlp(channels, int(channels * mlp_ratio), mlp_act, mlp_drop)
        self.with_cp = with_cp

    def _forward(self, x: Tensor) -> Tensor:
        y = plans.run(self, x)
        if y is not None:
            return y
        branch = self.op(normalize(self.norm_kind, self.norm, x))
        if self.mlp is None:
            return self.drop_path(x, branch)
        if runs_as(self.norm2, LayerNorm):
            x, normal = self.norm2.of_sum(x, branch, self.drop_path.scale(x))
        else:
            x = self.drop_path(x, branch)
            normal = normalize(self.norm_kind, self.norm2, x)
        return self.drop_path(x, self.mlp(normal))

    @fx_leaf
    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        if self.with_cp and torch.is_grad_enabled():
            y = checkpoint(self._forward, x, use_reentrant=False)
        else:
            y = self._forward(x)
        return y.permute(0, 3, 1, 2) if self.channel_first else y

    @plan_of(forward, _forward)
    def plan(self, shape: tuple[int, ...]) -> Step | None:
        """What `_forward` does with maps of a shape, see `plans`."""
        if self.norm_kind != "ln" or not runs_as(self.drop_path, DropPath):
            return None
        names = ("norm", "op") if self.mlp is None else ("norm", "op", "norm2", "mlp")
        steps = [plans.make(getattr(self, name), shape) for name in names]
        if None in steps:
            return None
        norm, op, *second = steps

        def run(x: Tensor) -> Tensor:
            x = _sum(x, op(norm(x)))
            if second:
                norm2, mlp = second
                x = _sum(x, mlp(norm2(x)))
            return x

        return run


def _sum(x: Tensor, branch: Tensor) -> Tensor:
    """`x + branch`, in the memory of the branch, which nobody else has, where the strides fit."""
    return branch.add_(x) if x.is_contiguous() else x + branch
