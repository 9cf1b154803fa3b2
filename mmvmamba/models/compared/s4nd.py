"""S4ND (arXiv 2210.06583): global convolutions whose kernels are state-space models along the axes.

A kernel is the outer product of one kernel per axis, each the impulse response of diagonal
state-space models (S4D, arXiv 2206.11893) in both directions. Convolutions are products of Fourier
transforms, in float32 whatever the precision around them.

The released runs (state-spaces/s4) had S4's A, diagonal and a term of low rank; here it is S4D's,
diagonal, with S4D's counterparts of their initial values. All else is as in their configs: A and B
are one set for all channels (`n_ssm`), N is 64.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmvmamba.models.arguments import check_choice
from mmvmamba.models.layers import Conv2d, KeepsFloat32, LayerNorm, VSSBlock, project
from mmvmamba.models.vmamba import check_images, init_module
from mmvmamba.registry import MODELS

INITS = ("lin", "legs")


def initial_states(init: Literal["lin", "legs"], states: int) -> tuple[Tensor, Tensor]:
    """A and B of a diagonal state-space model, one of each conjugate pair.

    Args:
        init: 'lin', A_n = -1/2 - i pi n and B = 1; or 'legs', the normal part of the HiPPO-LegS
            matrix, with its B (S4D, section 4).
        states: Number of states N, even.

    Returns:
        Two complex tensors (N / 2,).
    """
    check_choice("init", init, INITS)
    n = torch.arange(states, dtype=torch.float64)
    if init == "lin":
        imaginary = math.pi * n[: states // 2]
        return torch.complex(torch.full_like(imaginary, -0.5), -imaginary), torch.ones(
            states // 2, dtype=torch.complex128
        )
    roots = (2 * n + 1).sqrt()
    # HiPPO-LegS plus its low-rank term is -1/2 and a skew-symmetric part.
    products = roots[:, None] * roots / 2
    skew = products.triu(1) - products.tril(-1)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    b = vectors.mH @ roots.to(vectors.dtype)
    a = torch.complex(torch.full_like(frequencies, -0.5), frequencies)
    # In ascending order: the first half is negative.
    return a[: states // 2], b[: states // 2]


class S4DKernel(KeepsFloat32):
    """Kernels along one axis, of diagonal state-space models.

    Names are those of the released code's S4D kernel.

    Args:
        dim: Number of channels H.
        channels: Kernels of each channel.
        d_state: Number of states N.
        n_ssm: Sets of A and B, which channels share; divides `dim`.
        dt_min: Smallest initial time step, whose logarithms are drawn uniformly.
        dt_max: Largest.
        init: Of A and B, see `initial_states`.
    """

    kept_in_float32 = ("inv_dt", "A_real", "A_imag", "B", "C")

    def __init__(
        self,
        dim: int,
        channels: int,
        d_state: int,
        n_ssm: int,
        dt_min: float,
        dt_max: float,
        init: Literal["lin", "legs"],
    ):
        super().__init__()
        a, b = (x.expand(n_ssm, -1) for x in initial_states(init, d_state))
        low, high = math.log(dt_min), math.log(dt_max)
        c = torch.randn(channels, dim, d_state // 2, 2) / math.sqrt(2)
        self.inv_dt = nn.Parameter(torch.rand(dim, 1) * (high - low) + low)
        self.A_real = nn.Parameter(torch.log(-a.real).float())
        self.A_imag = nn.Parameter(-a.imag.float())
        self.B = nn.Parameter(torch.view_as_real(b[None].contiguous()).float())
        self.C = nn.Parameter(c)

    def forward(self, length: int) -> Tensor:
        """The kernels' first values, (channels, H, length)."""
        dt = self.inv_dt.exp()
        sets = len(dt) // len(self.A_real)
        a = torch.complex(-self.A_real.exp(), -self.A_imag).repeat(sets, 1)
        # No view: a model in the channels_last memory format has these dimensions in another order.
        b, c = (torch.complex(*x.unbind(-1)) for x in (self.B, self.C))
        b = b.repeat(1, sets, 1)
        # Zero-order hold.
        steps = dt * a
        weights = b * c * (steps.exp() - 1) / a
        positions = torch.arange(length, device=dt.device, dtype=dt.dtype)
        # The other of each conjugate pair adds the conjugate.
        return 2 * torch.einsum("chn,hnl->chl", weights, (steps[..., None] * positions).exp()).real


class S4ND(nn.Module):
    """A global convolution, depth-wise or from all channels to all.

    Args:
        dim: Channels H of the input.
        axes: Number of axes, 1 or 2.
        channels: Kernels, and results, of each channel.
        out_channels: Instead of one result per channel, this many, each the sum over all channels.
        l_max: The kernels' greatest length along each axis; None for that of the input.
        d_state: Number of states N of a channel, along each axis.
        n_ssm: Sets of A and B that channels share.
        dt_min: Smallest initial time step.
        dt_max: Largest.
        init: 'lin' or 'legs', see `initial_states`.

    Examples:
        >>> S4ND(8)(torch.zeros(2, 8, 14, 20)).shape
        torch.Size([2, 8, 14, 20])
    """

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        *,
        channels: int = 1,
        out_channels: int | None = None,
        l_max: int | None = None,
        d_state: int = 64,
        n_ssm: int = 1,
        dt_min: float = 0.1,
        dt_max: float = 1.0,
        init: Literal["lin", "legs"] = "lin",
    ):
        super().__init__()
        self.l_max, self.out_channels = l_max, out_channels
        kernels = 2 * (out_channels or channels)
        self.kernel = nn.ModuleList(
            S4DKernel(dim, kernels, d_state, n_ssm, dt_min, dt_max, init) for _ in range(axes)
        )
        if out_channels is None:
            self.D = nn.Parameter(torch.randn(channels, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, L) or (B, H, L1, L2) to the same with channels * H, or `out_channels`, channels.

        Channels of one kernel follow one another.
        """
        with torch.autocast(x.device.type, enabled=False):
            y = self._convolve(x.to(torch.promote_types(x.dtype, torch.float32)))
        return y.to(x.dtype)

    def _convolve(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        axes = tuple(range(-len(sizes), 0))
        lengths = [min(size, self.l_max or size) for size in sizes]
        padded = [size + length for size, length in zip(sizes, lengths, strict=True)]
        spectrum = self._spectrum(sizes, lengths)
        transformed = torch.fft.rfftn(x, s=padded, dim=axes)
        if self.out_channels is not None:
            y = torch.einsum("bh...,ch...->bc...", transformed, spectrum)
        else:
            y = transformed[:, None] * spectrum
        y = torch.fft.irfftn(y, s=padded, dim=axes)
        for axis, size in zip(axes, sizes, strict=True):
            y = y.narrow(axis, 0, size)
        if self.out_channels is not None:
            return y
        skip = self.D.to(x.dtype).view(*self.D.shape, *(1 for _ in sizes))
        return (y + skip * x[:, None]).flatten(1, 2)

    def _spectrum(self, sizes: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """The kernels' Fourier transforms, (channels, H, ...), of which the last axis is halved."""
        product = None
        for i, (size, length, kernel) in enumerate(zip(sizes, lengths, self.kernel, strict=True)):
            forth, back = kernel(length).chunk(2)
            # Position -1 of the circle is the first behind the origin.
            both = F.pad(forth, (0, size)) + F.pad(back.flip(-1), (size, 0))
            last = i == len(sizes) - 1
            transformed = torch.fft.rfft(both) if last else torch.fft.fft(both)
            product = (
                transformed if product is None else product[..., None] * transformed[:, :, None]
            )
        return product


class S4NDAttention(nn.Module):
    """What takes the place of attention: 1-D kernels over the flattened map, then a gated layer."""

    def __init__(self, dim: int, channels: int = 2, **options):
        super().__init__()
        self.s4nd = S4ND(dim, axes=1, channels=channels, **options)
        self.output_linear = nn.Linear(channels * dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y = self.s4nd(x.flatten(1, 2).mT).mT.unflatten(1, x.shape[1:3])
        return F.glu(project(self.output_linear, F.gelu(y)), dim=-1)


@MODELS.register_module()
class S4NDViT(BaseModule):
    """S4ND-ViT-B: a Vision Transformer with S4ND in the place of attention.

    As published, its kernels have one axis: patches are a sequence, row by row. There is neither a
    class token nor a positional embedding, so that images of any size will do; they are padded with
    zeros, at the right and at the bottom, to whole patches.

    Args:
        dim: Channels.
        depth: Blocks.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the image.
        d_state: Number of states N of a channel.
        n_ssm: Sets of A and B that channels share.
        drop_path_rate: Stochastic depth's largest rate, reached in the last block.
        outnorm: Whether the map passes the last norm. Classifiers say False, since `VMambaClsHead`
            has it.
        with_cp: Whether to recompute blocks in the backward pass (gradient checkpointing).
        init_cfg: mmengine's initialisation.
    """

    def __init__(
        self,
        dim: int = 768,
        depth: int = 12,
        patch_size: int = 16,
        in_channels: int = 3,
        d_state: int = 64,
        n_ssm: int = 1,
        drop_path_rate: float = 0.1,
        outnorm: bool = True,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ):
        super().__init__(init_cfg=init_cfg)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.patch_embed = Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        ssm = {"d_state": d_state, "n_ssm": n_ssm, "dt_min": 1e-3, "dt_max": 0.1, "init": "legs"}
        self.blocks = nn.Sequential(
            *(
                VSSBlock(
                    dim,
                    S4NDAttention(dim, **ssm),
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    with_cp=with_cp,
                )
                for i in range(depth)
            )
        )
        self.norm = LayerNorm(dim) if outnorm else None
        self.apply(init_module)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Images (B, in_channels, H, W) of any size to one map, of a position for each patch.

        Raises:
            ValueError: If `x` is no such tensor of floating-point numbers.
        """
        check_images(x, self.in_channels, 1)
        bottom, right = (-size % self.patch_size for size in x.shape[-2:])
        x = self.patch_embed(F.pad(x, (0, right, 0, bottom)))
        x = self.blocks(x.permute(0, 2, 3, 1))
        if self.norm is not None:
            x = self.norm(x)
        return (x.permute(0, 3, 1, 2).contiguous(),)
