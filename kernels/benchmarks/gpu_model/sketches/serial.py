"""The forward core for d_state 1 walked position by position over blocks of channels."""

# ruff: noqa: RUF005 - Triton has no unpacking

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_model.sketches.tiles import carry_kernel

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dt(pp, ws, bi, R: tl.constexpr):
    z = bi
    for r in tl.static_range(R):
        z += tl.load(pp + r).to(tl.float32) * ws[r]
    # softplus in base 2: ln2 * log2(1 + 2^(z*log2e))
    return tl.where(z > 20.0, z, LN2 * tl.log2(1.0 + tl.exp2(z * LOG2E)))


@triton.jit
def seq_kernel(
    x,
    P,
    Wdt,
    bias,
    Am,
    Ds,
    Hs,
    S,
    y,
    H,
    W,
    D,
    L,
    NCH,
    B,
    R: tl.constexpr,
    T: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
    MODE: tl.constexpr,
):
    # MODE 0: state pass (chunk), 1: output pass from carry, 2: whole path
    pd = tl.program_id(0)
    c = tl.program_id(1)
    bk = tl.program_id(2)
    b = bk // 4
    k = bk % 4
    d = pd * BD + tl.arange(0, BD)
    dm = d < D
    ws = ()
    for r in tl.static_range(R):
        ws = ws + (tl.load(Wdt + (k * R + r) * D + d, mask=dm, other=0.0),)
    bi = tl.load(bias + k * D + d, mask=dm, other=0.0)
    A2 = tl.load(Am + k * D + d, mask=dm, other=0.0) * LOG2E
    Dv = tl.load(Ds + k * D + d, mask=dm, other=0.0)
    h = tl.zeros((BD,), tl.float32)
    tot = tl.zeros((BD,), tl.float32)
    o = (bk * NCH + c) * D + d
    if MODE == 1:
        h = tl.load(Hs + o, mask=dm, other=0.0)
    base = b * L
    PS: tl.constexpr = 4 * (R + 2)
    t0 = c * T
    t1 = tl.minimum(t0 + T, L)
    if MODE == 2:
        t0 = 0
        t1 = L
    rev = k >= 2
    Hc = tl.where((k % 2) == 1, H, 1)
    sg = tl.where(rev, -1, 1)
    i0 = tl.where(rev, t1 - 1, t0)
    pos = tl.where((k % 2) == 1, (i0 % Hc) * W + i0 // Hc, i0)
    q = tl.where(rev, Hc - 1 - i0 % Hc, i0 % Hc)
    jump = sg * (1 - (Hc - 1) * W)
    for t in range(t0, t1, U):
        for j in tl.static_range(U):
            ok = t + j < t1
            pp = P + (base + pos) * PS + k * (R + 2)
            u = tl.load(x + (base + pos) * D + d, mask=dm & ok, other=0.0).to(tl.float32)
            dt = _dt(pp, ws, bi, R)
            dt = tl.where(ok, dt, 0.0)
            Bv = tl.load(pp + R).to(tl.float32)
            h = tl.exp2(dt * A2) * h + (dt * Bv) * u
            if MODE == 0:
                tot += dt
            else:
                Cv = tl.load(pp + R + 1).to(tl.float32)
                tl.store(
                    y + ((k * B + b) * L + pos) * D + d,
                    (Cv * h + Dv * u).to(y.dtype.element_ty),
                    mask=dm & ok,
                )
            q += 1
            wrap = q == Hc
            npos = pos + tl.where(wrap, jump, sg * W)
            q = tl.where(wrap, 0, q)
            pos = tl.where(t + j + 1 < t1, npos, pos)
    if MODE == 0:
        tl.store(S + o, tl.exp2(tot * A2), mask=dm)
        tl.store(Hs + o, h, mask=dm)


@triton.jit
def merge4_ln(y, w, bvec, o, N, D, eps, BN: tl.constexpr, BD: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    m = (i < N)[:, None] & (d < D)[None, :]
    off = i[:, None] * D + d[None, :]
    v = tl.zeros((BN, BD), tl.float32)
    for k in tl.static_range(4):
        v += tl.load(y + k * N * D + off, mask=m, other=0.0).to(tl.float32)
    mu = tl.sum(v, 1) / D
    q = tl.where(m, v - mu[:, None], 0.0)
    var = tl.sum(q * q, 1) / D
    z = (
        q * tl.rsqrt(var + eps)[:, None] * tl.load(w + d, mask=d < D)[None, :]
        + tl.load(bvec + d, mask=d < D)[None, :]
    )
    tl.store(o + off, z.to(o.dtype.element_ty), mask=m)


def core(
    x: Tensor,
    Wx: Tensor,
    WdtT: Tensor,
    bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    lnw: Tensor,
    lnb: Tensor,
    H: int,
    W: int,
    *,
    mode: str,
    T: int,
    BD: int,
    U: int,
) -> Tensor:
    """Product, scans in chunks or over whole paths, sum and norm, on x of (B, H * W, D)."""
    B, L, D = x.shape
    R = WdtT.shape[1]
    P = torch.nn.functional.linear(x, Wx)
    y = torch.empty(4, B, L, D, device=x.device, dtype=x.dtype)
    nd = triton.cdiv(D, BD)
    if mode == "chunk":
        NCH = triton.cdiv(L, T)
        S = torch.empty(B * 4, NCH, D, device=x.device, dtype=torch.float32)
        Hs = torch.empty_like(S)
        g = (nd, NCH, B * 4)
        seq_kernel[g](
            x,
            P,
            WdtT,
            bias,
            A,
            Ds,
            Hs,
            S,
            y,
            H,
            W,
            D,
            L,
            NCH,
            B,
            R=R,
            T=T,
            U=U,
            BD=BD,
            MODE=0,
            num_warps=1,
        )
        carry_kernel[(B * 4, triton.cdiv(D, 32))](S, Hs, D, NCH, NB=64, BD=32, num_warps=4)
        seq_kernel[g](
            x,
            P,
            WdtT,
            bias,
            A,
            Ds,
            Hs,
            S,
            y,
            H,
            W,
            D,
            L,
            NCH,
            B,
            R=R,
            T=T,
            U=U,
            BD=BD,
            MODE=1,
            num_warps=1,
        )
    else:
        seq_kernel[(nd, 1, B * 4)](
            x,
            P,
            WdtT,
            bias,
            A,
            Ds,
            bias,
            bias,
            y,
            H,
            W,
            D,
            L,
            1,
            B,
            R=R,
            T=T,
            U=U,
            BD=BD,
            MODE=2,
            num_warps=1,
        )
    o = torch.empty_like(x)
    BDn = triton.next_power_of_2(D)
    BN = max(1, 2048 // BDn)
    merge4_ln[(triton.cdiv(B * L, BN),)](y, lnw, lnb, o, B * L, D, 1e-5, BN=BN, BD=BDn, num_warps=4)
    return o
