"""Vim, the other vision Mamba: "Vision Mamba: Efficient Visual Representation Learning with
Bidirectional State Space Model" (arXiv 2401.09417v3).

Where the paper and the released code (github.com/hustvl/Vim) differ, this is the code:

- The sum of both directions is halved (paper, algorithm 1: it is not).
- Time steps begin log-uniform in [1e-3, 1e-1] on the way forward, as Mamba's. On the way back their
  bias begins at zero, which makes them 0.69.
- Segmentors and detectors have no class token. They take the residual stream as it is, the
  segmentor of Vim-Ti the last mixers' outputs alone. Vim-S' segmentor and all detectors turn
  their tokens by their positions before every block (`rope`), which no released weights do.
- Released weights are of 14x14 patches, or 27x27 that overlap by half ('finer granularity').
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmvmamba.models.arguments import ArgumentError, check_choice
from mmvmamba.models.backbone import Backbone
from mmvmamba.models.layers import Conv2d, DropPath, KeepsFloat32, trunc_normal_
from mmvmamba.models.ss2d import inverse_softplus_of_log_uniform, with_range
from mmvmamba.models.vmamba import check_images
from mmvmamba.registry import MODELS
from mmvmamba_kernels import selective_scan

OUT_TYPES = ("cls_token", "featmap", "stream", "mixer")
OutType = Literal["cls_token", "featmap", "stream", "mixer"]

ROPE_SIDE = 14
"""Positions turn by as much over any image as over 14x14 patches, which the weights are made for"""


@dataclass(frozen=True)
class Arch:
    """An architecture.

    Attributes:
        dims: Channels C of a token.
        depth: Number of blocks.
        d_state: State size N of each channel.
        ssm_ratio: Channels inside the mixer over C.
        d_conv: Positions that the mixer's convolutions see.
    """

    dims: int
    depth: int = 24
    d_state: int = 16
    ssm_ratio: int = 2
    d_conv: int = 4


class RMSNorm(KeepsFloat32, nn.RMSNorm):
    """Root mean square normalisation of the residual stream, in float32."""

    kept_in_float32 = ("weight",)

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-5)


class StepProjection(KeepsFloat32, nn.Linear):
    """The time steps' weight and bias, which the scan adds in float32."""

    kept_in_float32 = ("bias",)


class BidirectionalMixer(KeepsFloat32, nn.Module):
    """Scans a sequence forward and backward, each with weights of its own, and gates the mean.

    Args:
        channels: Channels C of a token.
        arch: Sizes inside.
    """

    kept_in_float32 = ("A_log", "D", "A_b_log", "D_b")

    def __init__(self, channels: int, arch: Arch):
        super().__init__()
        inner = arch.ssm_ratio * channels
        self.d_conv, self.d_state = arch.d_conv, arch.d_state
        self.dt_rank = math.ceil(channels / 16)
        self.in_proj = nn.Linear(channels, 2 * inner, bias=False)
        for end in ("", "_b"):
            conv = nn.Conv1d(inner, inner, arch.d_conv, groups=inner, padding=arch.d_conv - 1)
            self.add_module(f"conv1d{end}", conv)
            projected = self.dt_rank + 2 * arch.d_state
            self.add_module(f"x_proj{end}", nn.Linear(inner, projected, bias=False))
            # PyTorch's weights are uniform up to 1 / sqrt(dt_rank), as Mamba's.
            self.add_module(f"dt_proj{end}", StepProjection(self.dt_rank, inner))
            rates = torch.arange(1, arch.d_state + 1).float().log().repeat(inner, 1)
            self.register_parameter(f"A{end}_log", nn.Parameter(rates))
            self.register_parameter(f"D{end}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, channels, bias=False)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus_of_log_uniform((inner,)))
            self.dt_proj_b.bias.zero_()

    def drive(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What drives both scans of a sequence (B, L, C), the one on the way back in its own order.

        Returns:
            Inputs and, before bias and softplus, time steps (B, 2 D, L), whose second half is the
            way back's; B and C, (B, 2, N, L); and the gate, (B, D, L) in the sequence's order.
        """
        x, gate = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        # Both directions at once, as two groups of channels: (B, 2D, L).
        x = torch.cat([x, x.flip(-1)], dim=1)
        convs, x_projs = (self.conv1d, self.conv1d_b), (self.x_proj, self.x_proj_b)
        dt_projs = self.dt_proj, self.dt_proj_b
        kernel, bias = (torch.cat([getattr(c, n) for c in convs]) for n in ("weight", "bias"))
        # Padded on both sides, of which the end is cut off: a position sees those before it.
        x = F.conv1d(x, kernel, bias, padding=self.d_conv - 1, groups=x.shape[1])
        x = F.silu(x[..., : gate.shape[-1]])
        projected = torch.stack([p.weight for p in x_projs]) @ x.unflatten(1, (2, -1))
        dt, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        dt = torch.stack([p.weight for p in dt_projs]) @ dt
        return x, dt.flatten(1, 2), b, c, gate

    @property
    def step_bias(self) -> Tensor:
        """The time steps' bias, (2 D,)."""
        return torch.cat([self.dt_proj.bias, self.dt_proj_b.bias])

    @property
    def rates(self) -> Tensor:
        """A, (2 D, N), negative."""
        return -torch.cat([self.A_log, self.A_b_log]).exp()

    def forward(self, x: Tensor) -> Tensor:
        """Mixes a sequence, (B, L, C) to (B, L, C)."""
        x, dt, b, c, gate = self.drive(x)
        skip = torch.cat([self.D, self.D_b])
        y = selective_scan(
            with_range(x), dt, self.rates, b, c, skip, self.step_bias, delta_softplus=True
        )
        forward, backward = y.chunk(2, dim=1)
        y = (forward + backward.flip(-1)) * F.silu(gate) / 2
        return self.out_proj(y.transpose(1, 2).to(gate.dtype))


class Block(nn.Module):
    """A mixer on the normalised residual stream."""

    def __init__(self, arch: Arch, drop_path: float, with_cp: bool):
        super().__init__()
        self.mixer = BidirectionalMixer(arch.dims, arch)
        self.norm = RMSNorm(arch.dims)
        self.drop_path = DropPath(drop_path)
        self.with_cp = with_cp

    def _forward(self, stream: Tensor) -> Tensor:
        return self.mixer(self.norm(stream).to(self.mixer.in_proj.weight.dtype))

    def forward(self, stream: Tensor) -> Tensor:
        """What is to be added to the stream, (B, L, C)."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, stream, use_reentrant=False)
        return self._forward(stream)


@MODELS.register_module()
class VisionMamba(Backbone):
    """Vim, a plain backbone of bidirectional Mamba blocks on a sequence of patches.

    Parameter names are the released code's. The residual stream is float32 in any precision. Image
    sides that are no multiple of the patch lose the rest.

    Args:
        arch: 'tiny', 'small' or 'base' (Vim-Ti, -S, -B), or a dict of `Arch`'s attributes.
        img_size: Height and width in pixels, one number if they are equal, that the position
            embeddings are made for. Those of other images, and of other files, are interpolated.
        patch_size: Side of a patch in pixels.
        stride: Pixels from one patch to the next; None for patches side by side.
        in_channels: Channels of the image.
        with_cls_token: Whether a class token stands in the middle of the sequence.
        rope: Whether tokens are turned by their position before every block.
        out_type: What is returned of a block: 'cls_token', the normalised class token (B, C);
            'featmap', a map (B, C, H, W) of the normalised patches; 'stream', one of the residual
            stream (released segmentor of Vim-S and detectors); 'mixer', one of the mixer's output
            (released segmentor of Vim-Ti).
        out_indices: Blocks of which it is returned, the last by default; negative numbers count
            from the last. Those after the last one named are neither computed nor trained.
        fpn: Whether maps become a pyramid of 1/4, 1/8, 1/16 and 1/32 of the image, as in the
            released segmentors: from four blocks, or all from one.
        drop_path_rate: Stochastic depth's largest rate, reached in the last block.
        with_cp: Whether to recompute blocks in the backward pass (gradient checkpointing).
        init_cfg: As `VMamba`'s; `dict(type='Pretrained', checkpoint=...)` takes official files.

    Raises:
        ArgumentError: If an argument is unknown or does not fit the others.

    Examples:
        >>> model = VisionMamba("tiny", out_type="featmap", out_indices=(11, 23))
        >>> [tuple(x.shape) for x in model(torch.zeros(1, 3, 64, 96))]
        [(1, 192, 4, 6), (1, 192, 4, 6)]
    """

    arch_settings = {"tiny": Arch(192), "small": Arch(384), "base": Arch(768)}  # noqa: RUF012
    foreign_parts = ("head.", "rope.", "fpn", "norm_f.", "cls_token")
    own_parts = ("fpn",)

    def __init__(
        self,
        arch: str | dict = "tiny",
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_channels: int = 3,
        with_cls_token: bool = True,
        rope: bool = False,
        out_type: OutType = "cls_token",
        out_indices: int | Sequence[int] = -1,
        fpn: bool = False,
        drop_path_rate: float = 0.1,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        check_choice("out_type", out_type, OUT_TYPES)
        self.arch = arch = self.find_arch(arch)
        indices = (out_indices,) if isinstance(out_indices, int) else out_indices
        self.out_indices = tuple(sorted({i % arch.depth for i in indices}))
        if not self.out_indices or not all(-arch.depth <= i < arch.depth for i in indices):
            raise ArgumentError(f"out_indices={out_indices!r}: there are {arch.depth} blocks.")
        if out_type == "cls_token" and (fpn or not with_cls_token):
            raise ArgumentError("out_type='cls_token' needs with_cls_token=True and fpn=False.")
        if fpn and len(self.out_indices) not in (1, 4):
            raise ArgumentError(f"fpn=True takes the maps of 4 blocks or of 1, {out_indices=!r}.")
        if rope and arch.dims % 4:
            raise ArgumentError(f"rope=True needs channels in fours, dims={arch.dims}.")
        if fpn and patch_size != 16:
            raise ArgumentError(f"fpn=True needs patches of 16 pixels, {patch_size=!r}.")
        self.in_channels, self.patch_size = in_channels, patch_size
        self.with_cls_token, self.rope, self.out_type = with_cls_token, rope, out_type
        stride = patch_size if stride is None else stride
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.stride = stride
        self.grid = self.grid_of(sides)
        # The coarsest map of the pyramid takes two patches for one.
        self.min_size = patch_size + (stride if fpn else 0)

        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = Conv2d(in_channels, arch.dims, patch_size, stride)
        if with_cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.dims))
        self.pos_embed = nn.Parameter(
            torch.zeros(1, math.prod(self.grid) + with_cls_token, arch.dims)
        )
        rates = [drop_path_rate * i / max(arch.depth - 1, 1) for i in range(arch.depth)]
        if out_type == "stream":
            # The released segmentors and detectors never leave it out.
            rates[-1] = 0.0
        self.layers = nn.ModuleList(Block(arch, rate, with_cp) for rate in rates)
        if out_type in ("cls_token", "featmap"):
            self.norm_f = RMSNorm(arch.dims)
        self.fpn = fpn
        if fpn:
            self._build_fpn(arch.dims)
        self._init_parameters()
        for block in self.layers[self.out_indices[-1] + 1 :]:
            block.requires_grad_(False)
        self._register_load_state_dict_pre_hook(self._fit_positions)

    def grid_of(self, sides: Sequence[int]) -> tuple[int, int]:
        """Height and width in patches of an image of a height and width in pixels."""
        height, width = ((side - self.patch_size) // self.stride + 1 for side in sides)
        return height, width

    @classmethod
    def find_arch(cls, arch: str | dict) -> Arch:
        """Looks an architecture up by name, or makes it from a dict.

        Raises:
            ArgumentError: If there is no such name.
            TypeError: If the dict lacks `dims` or has an unknown attribute.
        """
        if isinstance(arch, dict):
            return Arch(**arch)
        check_choice("arch", arch, cls.arch_settings)
        return cls.arch_settings[arch]

    def _build_fpn(self, channels: int) -> None:
        def double() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

        self.fpn1 = nn.Sequential(double(), nn.SyncBatchNorm(channels), nn.GELU(), double())
        self.fpn2 = nn.Sequential(double())
        self.fpn3 = nn.Identity()
        self.fpn4 = nn.MaxPool2d(kernel_size=2, stride=2)

    def _init_parameters(self) -> None:
        """As the released code; what is not named here keeps PyTorch's own."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.with_cls_token:
            trunc_normal_(self.cls_token, std=0.02)
        # LeCun's normal distribution, cut off at two standard deviations.
        proj = self.patch_embed.proj
        std = proj.weight[0].numel() ** -0.5 / 0.87962566103423978
        trunc_normal_(proj.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(proj.bias)
        with torch.no_grad():
            for block in self.layers:
                # A sum of that many branches keeps its size.
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Computes what `out_type` says.

        Args:
            x: Images, (B, in_channels, H, W), of any height and width from a patch on.

        Returns:
            For each block of `out_indices`, in ascending order, (B, C) or a contiguous map
            (B, C, H', W'); for `fpn` four maps, from the finest to the coarsest.

        Raises:
            ValueError: If `x` is no such tensor, or too small.
        """
        check_images(x, self.in_channels, self.min_size)
        stream, size = self._embed(x)
        turn = self._rotation(size, stream) if self.rope else None
        outs = []
        for i, block in enumerate(self.layers):
            if turn is not None:
                stream = rotate(stream, *turn)
                if self.out_type == "stream" and i - 1 in self.out_indices:
                    # The released code returns the stream as the next block takes it.
                    outs[-1] = self._to_map(stream, size)
            if i > self.out_indices[-1]:
                break
            branch = block(stream)
            stream = block.drop_path(stream, branch)
            if i in self.out_indices:
                outs.append(self._output(stream, branch, size))
        if not self.fpn:
            return tuple(outs)
        steps = self.fpn1, self.fpn2, self.fpn3, self.fpn4
        maps = outs if len(outs) == len(steps) else outs * len(steps)
        return tuple(step(x) for step, x in zip(steps, maps, strict=True))

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The sequence (B, L, C) that the blocks begin with, and height and width in patches."""
        x = self.patch_embed.proj(images)
        size = tuple(x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)
        if self.with_cls_token:
            x = insert_in_the_middle(x, self.cls_token.to(x.dtype).expand(len(x), -1, -1))
        positions = self.pos_embed
        if size != self.grid:
            positions = interpolate_positions(positions, self.grid, size)
        x = x + positions
        return (x if x.dtype == torch.float64 else x.float()), size

    def _rotation(self, size: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' angles, (L, C); a class token has none."""
        half = self.arch.dims // 2
        rates = 10000 ** -(torch.arange(0, half, 2, device=like.device, dtype=like.dtype) / half)
        rows, columns = (
            (torch.arange(n, device=like.device, dtype=like.dtype) / n * ROPE_SIDE).outer(rates)
            for n in size
        )
        angles = torch.cat(
            [rows[:, None].expand(*size, -1), columns[None].expand(*size, -1)], dim=-1
        )
        angles = angles.flatten(0, 1).repeat_interleave(2, dim=-1)
        if self.with_cls_token:
            angles = insert_in_the_middle(angles[None], torch.zeros_like(angles[None, :1]))[0]
        return angles.cos(), angles.sin()

    def _output(self, stream: Tensor, branch: Tensor, size: tuple[int, int]) -> Tensor:
        if self.out_type == "cls_token":
            middle = size[0] * size[1] // 2
            return self.norm_f(stream[:, middle]).to(self.patch_embed.proj.weight.dtype)
        if self.out_type == "featmap":
            return self._to_map(self.norm_f(stream), size)
        return self._to_map(branch if self.out_type == "mixer" else stream, size)

    def _to_map(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, L, C) to a map (B, C, H, W), without the class token."""
        if self.with_cls_token:
            _, tokens = split_middle(tokens)
        tokens = tokens.to(self.patch_embed.proj.weight.dtype)
        return tokens.transpose(1, 2).unflatten(2, size).contiguous()

    def _fit_positions(self, state_dict: dict, prefix: str, *_) -> None:
        """Gives a file's position embeddings the size and the tokens of this model.

        The released code keeps the first row for the class token's when it fine-tunes at another
        size, but the token stands in the middle.
        """
        key = f"{prefix}pos_embed"
        found = state_dict.get(key)
        if found is None or found.dim() != 3 or found.shape == self.pos_embed.shape:
            return
        side = math.isqrt(found.shape[1])
        if side**2 + 1 == found.shape[1] and not self.with_cls_token:
            _, found = split_middle(found)
        if found.shape[1] == side**2 + self.with_cls_token:
            found = interpolate_positions(found, (side, side), self.grid)
        state_dict[key] = found

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Tells a parameter's depth for layer-wise learning-rate decay.

        Args:
            param_name: The parameter's name in the whole model.
            prefix: What stands before the backbone's own names.

        Returns:
            The depth, 0 for what stands before the first block, and the number of depths. Whatever
            follows the blocks, and parameters of other parts of the model, have the last depth.
        """
        num_layers = self.arch.depth + 2
        part, _, rest = param_name.removeprefix(prefix).partition(".")
        if param_name.startswith(prefix) and part == "layers":
            return int(rest.partition(".")[0]) + 1, num_layers
        first = ("patch_embed", "pos_embed", "cls_token")
        is_first = param_name.startswith(prefix) and part in first
        return (0 if is_first else num_layers - 1), num_layers

    def no_weight_decay(self) -> set[str]:
        """Parameters that the released code trains without weight decay, for timm's optimisers."""
        return {"pos_embed", "cls_token"}


def insert_in_the_middle(tokens: Tensor, token: Tensor) -> Tensor:
    """(B, L, C) with one more token, (B, 1, C), at position L // 2."""
    middle = tokens.shape[1] // 2
    return torch.cat([tokens[:, :middle], token, tokens[:, middle:]], dim=1)


def split_middle(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `insert_in_the_middle` put together: the token and the others."""
    middle = (tokens.shape[1] - 1) // 2
    rest = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    return tokens[:, middle : middle + 1], rest


def interpolate_positions(
    embedding: Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Position embeddings for another number of patches, bicubic.

    Args:
        embedding: (1, L, C) of `grid`, perhaps with a class token in the middle, which is kept.
        grid: Height and width in patches.
        size: Those wanted.
    """
    token = None
    if embedding.shape[1] == math.prod(grid) + 1:
        token, embedding = split_middle(embedding)
    maps = embedding.transpose(1, 2).unflatten(2, grid)
    # Narrow formats are too coarse, and some devices have no kernels for them.
    wide = maps if maps.dtype == torch.float64 else maps.float()
    wide = F.interpolate(wide, size=size, mode="bicubic", align_corners=False)
    embedding = wide.to(embedding.dtype).flatten(2).transpose(1, 2)
    return embedding if token is None else insert_in_the_middle(embedding, token)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of (B, L, C) by its angle."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


@MODELS.register_module(name="LN2d")
class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation of the channels of NCHW, for `norm_cfg` of the released detectors."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """The neck of the released detectors: five maps from one, without a top-down pass.

    Source: "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527,
    section 3.

    Args:
        in_channels: Channels C of the map.
        out_channels: Channels of every level.
    """

    def __init__(self, in_channels: int, out_channels: int = 256):
        super().__init__()

        def double(channels: int) -> nn.Module:
            return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)

        half = in_channels // 2
        steps = (
            [double(in_channels), LayerNorm2d(half), nn.GELU(), double(half)],
            [double(in_channels)],
            [],
            [nn.MaxPool2d(kernel_size=2, stride=2)],
        )
        widths = half // 2, half, in_channels, in_channels
        self.levels = nn.ModuleList(
            nn.Sequential(
                *step,
                nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
                LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(out_channels),
            )
            for step, width in zip(steps, widths, strict=True)
        )

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Makes the levels.

        Args:
            maps: One map (B, C, H, W) of a sixteenth of the image.

        Returns:
            Maps (B, out_channels, ., .) of 1/4, 1/8, 1/16, 1/32 and 1/64 of the image.
        """
        (x,) = maps
        # mmcv's operators read maps of any strides as if they were NCHW in memory.
        outs = [level(x).contiguous() for level in self.levels]
        return (*outs, F.max_pool2d(outs[-1], kernel_size=1, stride=2))
