"""The building blocks of VMamba around the SS2D mixer.

All of them take and return maps in channels-last order, (B, H, W, C).
"""

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.models import cpu
from mmvmamba.models.recompute import LinearOf, origin_of, with_origin
from mmvmamba_kernels import add_layer_norm, layer_norm

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


class KeepsPacked(nn.Module):
    """A module whose own weights evaluation on a CPU may keep in another layout beside them."""

    def train(self, mode: bool = True):
        cpu.forget(self.parameters(recurse=False))
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        cpu.forget(self.parameters(recurse=False))
        return super()._apply(fn, recurse)


class Linear(KeepsPacked, nn.Linear):
    """A linear layer on the last dimension of (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        origin = origin_of(x)
        if origin is None:
            return linear(x, self.weight, self.bias)
        weight, bias, dtype = self.weight, self.bias, autocast_dtype(x)
        if dtype is not None:
            # Converted here and not by autocast, whose copies, made inside a function, have no
            # gradient but would serve other calls too.
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return LinearOf.apply(x, weight, bias, origin.function, origin.inputs)


class Conv2d(KeepsPacked, nn.Conv2d):
    """A convolution of one group."""

    def forward(self, x: Tensor) -> Tensor:
        rest = self.dilation, self.groups, self.padding_mode
        plain = rest == ((1, 1), 1, "zeros") and not isinstance(self.padding, str)
        if plain and cpu.serves(x, self.weight, self.bias):
            return cpu.convolve(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


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
        or torch.nn.modules.module._has_any_global_hook()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` on the last dimension of (B, H, W, C), by the fastest way the device has.

    Args:
        x: (B, H, W, C).
        weight: (..., C); all dimensions but the last become the result's last.
        bias: As many numbers as the result has channels, or None.
    """
    if cpu.serves(x, weight, bias):
        return _by_convolution(x, weight, bias)
    return F.linear(x, weight.flatten(0, -2), bias)


def _by_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: ActivationName | None = None
) -> Tensor:
    return cpu.convolve(x.permute(0, 3, 1, 2), weight, bias, act=act).permute(0, 2, 3, 1)


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


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of the last dimension of (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def of_sum(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """`x + scale * branch`, `scale` being one factor per sample, and its normalisation."""
        x = x + (branch if scale is None else branch * scale.to(branch.dtype).view(-1, 1, 1, 1))
        return x, self(x)


def build_norm(norm: NormName, channels: int, stream: bool = False) -> LayerNorm | BatchNorm:
    """Makes a normalisation over the last dimension; `stream` as `LayerNorm`'s."""
    return LayerNorm(channels, stream) if norm == "ln" else BatchNorm(channels)


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
        """The residual sum of `x` and `branch`, both (B, H, W, C)."""
        mask = self._mask(x)
        if mask is None:
            return x + branch
        mask = mask.to(branch.dtype).view(-1, 1, 1, 1)
        return torch.addcmul(x, branch, mask, value=1 / (1 - self.drop_prob))

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
            ToChannelsLast(),
            build_norm(norm, channels, stream=True),
        )
    return nn.Sequential(
        Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1),
        ToChannelsLast(),
        build_norm(norm, channels // 2),
        ToChannelsFirst(),
        nn.GELU(),
        Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1),
        ToChannelsLast(),
        build_norm(norm, channels, stream=True),
    )


class PatchMerging(nn.Module):
    """Halves a map by joining each 2x2 group of positions, as Swin Transformer does.

    An odd height or width is padded with zeros.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: NormName):
        super().__init__()
        self.reduction = Linear(4 * in_channels, out_channels, bias=False)
        self.norm = build_norm(norm, 4 * in_channels)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        # (B, H/2, row, W/2, column, C): the row offset varies fastest among the four parts.
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


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
        ToChannelsLast(),
        build_norm(norm, out_channels, stream=True),
    )


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on the last dimension."""

    def __init__(self, channels: int, hidden: int, act: ActivationName, drop: float = 0.0):
        super().__init__()
        self.fc1 = Linear(channels, hidden)
        self.act = act
        self.fc2 = Linear(hidden, channels)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        fc1 = self.fc1
        if runs_as(fc1, Linear) and cpu.fuses(x, fc1.weight, fc1.bias):
            hidden = _by_convolution(x, fc1.weight, fc1.bias, self.act)
        else:
            x = fc1(x)
            act = ACTIVATIONS[self.act]
            hidden = act(x)
            # The gradient of relu keeps its result, and not what it took.
            if self.act != "relu":
                hidden = with_origin(hidden, act, x)
        return self.drop(self.fc2(self.drop(hidden)))


class VSSBlock(nn.Module):
    """A visual state-space block (paper, section 4.2 and figure 3 (d)).

    `x + drop_path(mixer(norm(x)))`, then the same with an MLP; vanilla VMamba has no second half.

    Args:
        channels: Channels of the map.
        op: The mixer, from (B, H, W, C) to the same shape.
        norm: Normalisation before the mixer and the MLP.
        mlp_ratio: Hidden channels of the MLP over `channels`; 0 for no MLP.
        mlp_act: Activation of the MLP.
        mlp_drop: Dropout rate in the MLP.
        drop_path: Rate at which a sample skips a branch in training.
        with_cp: Whether to recompute the block in the backward pass instead of storing it.
    """

    channel_first = False
    """Whether the block's maps are (B, C, H, W), as the official modules' may be."""

    def __init__(
        self,
        channels: int,
        op: nn.Module,
        norm: NormName,
        mlp_ratio: float,
        mlp_act: ActivationName,
        mlp_drop: float = 0.0,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ):
        super().__init__()
        self.norm = build_norm(norm, channels)
        self.op = op
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = build_norm(norm, channels)
            self.mlp = Mlp(channels, int(channels * mlp_ratio), mlp_act, mlp_drop)
        self.with_cp = with_cp

    def _forward(self, x: Tensor) -> Tensor:
        branch = self.op(self.norm(x))
        if self.mlp is None:
            return self.drop_path(x, branch)
        if runs_as(self.norm2, LayerNorm) or runs_as(self.norm2, BatchNorm):
            x, normal = self.norm2.of_sum(x, branch, self.drop_path.scale(x))
        else:
            x = self.drop_path(x, branch)
            normal = self.norm2(x)
        return self.drop_path(x, self.mlp(normal))

    def forward(self, x: Tensor) -> Tensor:
        if self.channel_first:
            x = x.permute(0, 2, 3, 1)
        if self.with_cp and torch.is_grad_enabled():
            y = checkpoint(self._forward, x, use_reentrant=False)
        else:
            y = self._forward(x)
        return y.permute(0, 3, 1, 2) if self.channel_first else y
