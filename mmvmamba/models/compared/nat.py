"""Neighborhood Attention Transformer (arXiv 2204.07143), the paper's NAT-T, -S and -B.

Parameter names are the official repository's (SHI-Labs/Neighborhood-Attention-Transformer): those
of its detection code, whose maps pass a norm each, `norm{i}`. A classifier's `norm` and `head` are
those of `VMambaClsHead`. Maps are channels-last inside, what goes in and comes out is NCHW.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.models.arguments import check_choice
from mmvmamba.models.backbone import Backbone
from mmvmamba.models.compared.neighborhood_attention import neighborhood_attention_2d
from mmvmamba.models.layers import Conv2d, DropPath, LayerNorm, Mlp, project, trunc_normal_
from mmvmamba.models.vmamba import check_images, init_module
from mmvmamba.registry import MODELS

KERNEL = 7
HEAD_CHANNELS = 32


class Arch(NamedTuple):
    """An architecture.

    Attributes:
        dims: Channels of the first stage, doubled from stage to stage.
        mlp_ratio: Hidden channels of the MLP over the stage's.
        drop_path_rate: Stochastic depth's largest rate, reached in the last block.
        layer_scale: First value of the factors of a block's branches; None for no factors.
        depths: Blocks per stage.
    """

    dims: int
    mlp_ratio: float
    drop_path_rate: float
    layer_scale: float | None = None
    depths: Sequence[int] = (3, 4, 18, 5)


class NeighborhoodAttention(nn.Module):
    """Multi-head attention to the 7 x 7 positions around each.

    Maps smaller than the window are padded with zeros at the right and at the bottom, as published.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.heads = dim // HEAD_CHANNELS
        self.scale = HEAD_CHANNELS**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.empty(self.heads, 2 * KERNEL - 1, 2 * KERNEL - 1))
        trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        _, height, width, _ = x.shape
        bottom, right = max(KERNEL - height, 0), max(KERNEL - width, 0)
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        q, k, v = project(self.qkv, x).unflatten(-1, (3, self.heads, HEAD_CHANNELS)).unbind(3)
        out = neighborhood_attention_2d(q * self.scale, k, v, self.rpb).flatten(3)
        return project(self.proj, out[:, :height, :width])


class NATLayer(nn.Module):
    """A block: attention and an MLP, each behind a norm and in a residual branch."""

    def __init__(
        self, dim: int, mlp_ratio: float, layer_scale: float | None, drop_path: float, with_cp: bool
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = NeighborhoodAttention(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), "gelu")
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.with_cp = with_cp

    def _forward(self, x: Tensor) -> Tensor:
        for norm, mix, gamma in (
            (self.norm1, self.attn, self.gamma1),
            (self.norm2, self.mlp, self.gamma2),
        ):
            branch = mix(norm(x))
            x = self.drop_path(x, branch if gamma is None else gamma * branch)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)


class ConvTokenizer(nn.Module):
    """The stem: NCHW images to (B, ceil(H/4), ceil(W/4), dim)."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            Conv2d(in_channels, dim // 2, kernel_size=3, stride=2, padding=1),
            Conv2d(dim // 2, dim, kernel_size=3, stride=2, padding=1),
        )
        self.norm = LayerNorm(dim, stream=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Between two stages: half the height and width, twice the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * dim, stream=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@MODELS.register_module()
class NAT(Backbone):
    """Neighborhood Attention Transformer, a backbone.

    Args:
        arch: 'mini', 'tiny', 'small' or 'base', or a dict of `Arch`'s attributes.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, counted from 0.
        outnorm: Whether each returned map passes a norm of its own, `norm{i}`. Classifiers say
            False, since `VMambaClsHead` has it.
        drop_path_rate: Takes the place of the arch's own.
        with_cp: Whether to recompute blocks in the backward pass (gradient checkpointing).
        init_cfg: As mmengine's. `dict(type='Pretrained', checkpoint=...)` takes official
            files of classifiers and detectors, and is strict: see `load_backbone`.

    Raises:
        ArgumentError: If the arch is unknown.

    Examples:
        >>> [tuple(x.shape) for x in NAT("mini")(torch.zeros(1, 3, 64, 96))]
        [(1, 64, 16, 24), (1, 128, 8, 12), (1, 256, 4, 6), (1, 512, 2, 3)]
    """

    arch_settings = {  # noqa: RUF012 (OpenMMLab's name for a class-level table)
        "mini": Arch(64, 3.0, 0.2, depths=(3, 4, 6, 5)),
        "tiny": Arch(64, 3.0, 0.2),
        "small": Arch(96, 2.0, 0.3, 1e-5),
        "base": Arch(128, 2.0, 0.5, 1e-5),
    }

    # Of classifiers, and the maps' own, which those do not have.
    foreign_parts = ("norm.", "head.")
    own_parts = ("norm0.", "norm1.", "norm2.", "norm3.")

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        outnorm: bool = True,
        drop_path_rate: float | None = None,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        if isinstance(arch, str):
            check_choice("arch", arch, self.arch_settings)
        self.arch = arch = self.arch_settings[arch] if isinstance(arch, str) else Arch(**arch)
        rate = arch.drop_path_rate if drop_path_rate is None else drop_path_rate
        self.in_channels = in_channels
        self.out_indices, self.outnorm = tuple(out_indices), outnorm
        dims = [arch.dims * 2**i for i in range(len(arch.depths))]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"levels.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.patch_embed = ConvTokenizer(in_channels, dims[0])
        last = max(sum(arch.depths) - 1, 1)
        rates = (rate * i / last for i in itertools.count())
        self.levels = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, arch.depths, strict=True)):
            level = nn.Module()
            level.blocks = nn.Sequential(
                *(
                    NATLayer(dim, arch.mlp_ratio, arch.layer_scale, next(rates), with_cp)
                    for _ in range(depth)
                )
            )
            if i < len(dims) - 1:
                level.downsample = ConvDownsampler(dim)
            self.levels.append(level)
        for i in self.out_indices if outnorm else ():
            self.add_module(f"norm{i}", LayerNorm(dims[i]))
        self.apply(init_module)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, in_channels, H, W) of any size to the maps (B, C_i, H_i, W_i) of stages.

        Raises:
            ValueError: If `x` is no such tensor of floating-point numbers.
        """
        check_images(x, self.in_channels, 1)
        x = self.patch_embed(x)
        outs = []
        for i, level in enumerate(self.levels):
            x = level.blocks(x)
            if i in self.out_indices:
                out = getattr(self, f"norm{i}")(x) if self.outnorm else x
                outs.append(out.permute(0, 3, 1, 2).contiguous())
            if i == max(self.out_indices):
                break
            x = level.downsample(x)
        return tuple(outs)
