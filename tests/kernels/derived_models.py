"""Small networks in the way of projects that build on VMamba, with the modules they import.

Only importable with the stand-ins, or where those modules are installed.
"""

import csm_triton
import selective_scan_cuda_core
import torch
import torch.nn.functional as F
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
from torch import nn


class CrossScan(torch.autograd.Function):
    """A map (B, D, H, W) as four sequences, with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.size = x.shape
        by_row, by_column = x.flatten(2), x.mT.flatten(2)
        return torch.stack([by_row, by_column, by_row.flip(-1), by_column.flip(-1)], 1)

    @staticmethod
    def backward(ctx, grad):
        batch, channels, height, width = ctx.size
        return merge(grad.unflatten(-1, (height, width))).view(batch, channels, height, width)


class CrossMerge(torch.autograd.Function):
    """Four sequences (B, 4, D, H, W) added up as a map (B, D, L)."""

    @staticmethod
    def forward(ctx, ys):
        ctx.size = ys.shape
        return merge(ys)

    @staticmethod
    def backward(ctx, grad):
        batch, _, channels, height, width = ctx.size
        x = grad.view(batch, channels, height, width)
        return CrossScan.apply(x).view(ctx.size)


def merge(ys):
    batch, _, channels, height, width = ys.shape
    both = ys.flatten(3)[:, :2] + ys.flatten(3)[:, 2:].flip(-1)
    return both[:, 0] + both[:, 1].view(batch, channels, width, height).mT.flatten(2)


class SelectiveScanCore(torch.autograd.Function):
    """The extension's two calls, as every copy of VMamba wraps them."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus):
        ctx.delta_softplus = delta_softplus
        out, x, *_ = selective_scan_cuda_core.fwd(
            u, delta, A, B, C, D, delta_bias, delta_softplus, 1
        )
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        u, delta, A, B, C, D, delta_bias, x = ctx.saved_tensors
        grads = selective_scan_cuda_core.bwd(
            u, delta, A, B, C, D, delta_bias, grad_out.contiguous(), x, ctx.delta_softplus, 1
        )
        return (*grads, None)


class SS2D(nn.Module):
    """The mixer: projection, convolution, four scans and the gate; subclasses have the scan."""

    def __init__(self, width, states=3, rank=2):
        super().__init__()
        self.states, self.rank = states, rank
        self.in_proj = nn.Linear(width, 2 * width)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.x_proj_weight = nn.Parameter(torch.randn(4, rank + 2 * states, width) / width**0.5)
        self.dt_projs_weight = nn.Parameter(torch.randn(4, width, rank) / rank**0.5)
        self.dt_projs_bias = nn.Parameter(torch.randn(4, width) - 1)
        self.A_logs = nn.Parameter(torch.randn(4 * width, states))
        self.Ds = nn.Parameter(torch.ones(4 * width))
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, width)

    def project(self, xs):
        x_dbl = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj_weight)
        dts, Bs, Cs = x_dbl.split([self.rank, self.states, self.states], dim=2)
        return torch.einsum("bkrl,kdr->bkdl", dts, self.dt_projs_weight).flatten(1, 2), Bs, Cs

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.scan(x).transpose(1, 2).view(*z.shape)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class SS2DCore(SS2D):
    """With the extension and autograd functions of its own."""

    def scan(self, x):
        batch, width, height, columns = x.shape
        xs = CrossScan.apply(x)
        dts, Bs, Cs = self.project(xs)
        ys = SelectiveScanCore.apply(
            xs.flatten(1, 2),
            dts.contiguous(),
            -torch.exp(self.A_logs),
            Bs.contiguous(),
            Cs.contiguous(),
            self.Ds,
            self.dt_projs_bias.view(-1),
            True,
        )
        return CrossMerge.apply(ys.view(batch, 4, width, height, columns))


class SS2DMamba(SS2D):
    """With mamba-ssm's function, as the first version of VMamba and most networks after it."""

    def scan(self, x):
        batch, width, height, columns = x.shape
        xs = csm_triton.cross_scan_fn(x, in_channel_first=True, out_channel_first=True, scans=0)
        dts, Bs, Cs = self.project(xs)
        ys = selective_scan_fn(
            xs.flatten(1, 2),
            dts,
            -torch.exp(self.A_logs),
            Bs,
            Cs,
            self.Ds,
            z=None,
            delta_bias=self.dt_projs_bias.view(-1),
            delta_softplus=True,
            return_last_state=False,
        )
        return csm_triton.cross_merge_fn(ys.view(batch, 4, width, height, columns))


class UNet(nn.Module):
    """One level down and up with a skip between, a block of VM-UNet's kind on each."""

    def __init__(self, width=4, mixer=SS2DMamba):
        super().__init__()
        self.embed = nn.Conv2d(1, width, 3, padding=1)
        self.encoder, self.decoder = mixer(width), mixer(width)
        self.down = nn.Linear(4 * width, 2 * width)
        self.middle = mixer(2 * width)
        self.up = nn.Linear(2 * width, 4 * width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, image):
        x = self.embed(image).permute(0, 2, 3, 1)
        skip = x = x + self.encoder(x)
        quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.down(torch.cat(quarters, -1))
        x = self.up(x + self.middle(x)).permute(0, 3, 1, 2)
        x = F.pixel_shuffle(x, 2).permute(0, 2, 3, 1) + skip
        x = x + self.decoder(x)
        return self.head(x.permute(0, 3, 1, 2))


class MambaLayer(nn.Module):
    """The pixels of a map as one sequence through a whole block of mamba-ssm."""

    def __init__(self, width=4, inner=6, states=3, rank=2):
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * inner)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.randn(inner, states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x):
        return mamba_inner_fn(
            self.in_proj(x.flatten(2).transpose(1, 2)).transpose(1, 2),
            self.conv1d.weight,
            self.conv1d.bias,
            self.x_proj.weight,
            self.dt_proj.weight,
            self.out_proj.weight,
            self.out_proj.bias,
            -torch.exp(self.A_log),
            None,
            None,
            self.D,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
