"""The forward core for d_state 1 in tiles of positions and channels, with associative scans."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _comb(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))


@triton.jit
def _tile(P, Wdt, bias, Am, b, k, pos, mask, d, dmask, L, D, R, PS, RP: tl.constexpr):
    r = tl.arange(0, RP)
    pb = P + (b * L + pos) * PS + k * (R + 2)
    pr = tl.load(pb[:, None] + r[None, :], mask=mask[:, None] & (r[None, :] < R), other=0.0)
    w = tl.load(
        Wdt + (k * D + d[None, :]) * R + r[:, None],
        mask=dmask[None, :] & (r[:, None] < R),
        other=0.0,
    )
    bi = tl.load(bias + k * D + d, mask=dmask, other=0.0)
    A = tl.load(Am + k * D + d, mask=dmask, other=0.0)
    Bv = tl.load(pb + R, mask=mask, other=0.0).to(tl.float32)
    Cv = tl.load(pb + R + 1, mask=mask, other=0.0).to(tl.float32)
    dt = _softplus(tl.dot(pr, w.to(pr.dtype)) + bi[None, :])
    dt = tl.where(mask[:, None], dt, 0.0)
    return dt, A, Bv, Cv


@triton.jit
def state_kernel(
    x,
    P,
    Wdt,
    bias,
    Am,
    S,
    Hs,
    H,
    W,
    D,
    L,
    R,
    PS,
    NCH,
    T: tl.constexpr,
    BD: tl.constexpr,
    RP: tl.constexpr,
):
    c = tl.program_id(0)
    pd = tl.program_id(1)
    bp = tl.program_id(2)
    b = bp // 2
    pair = bp % 2
    t = c * T + tl.arange(0, T)
    mask = t < L
    pos = tl.where(pair == 1, (t % H) * W + t // H, t)
    d = pd * BD + tl.arange(0, BD)
    dmask = d < D
    u = tl.load(
        x + (b * L + pos)[:, None] * D + d[None, :], mask=mask[:, None] & dmask[None, :], other=0.0
    ).to(tl.float32)
    for rev in tl.static_range(2):
        k = pair + 2 * rev
        dt, A, Bv, _ = _tile(P, Wdt, bias, Am, b, k, pos, mask, d, dmask, L, D, R, PS, RP)
        cs = tl.cumsum(dt, 0)
        tot = tl.sum(dt, 0)
        e = (tot[None, :] - cs) if rev == 0 else (cs - dt)
        h = tl.sum(tl.exp(A[None, :] * e) * dt * Bv[:, None] * u, 0)
        o = ((b * 4 + k) * NCH + c) * D + d
        tl.store(S + o, tl.exp(A * tot), mask=dmask)
        tl.store(Hs + o, h, mask=dmask)


@triton.jit
def carry_kernel(S, Hs, D, NCH, NB: tl.constexpr, BD: tl.constexpr):
    bk = tl.program_id(0)
    pd = tl.program_id(1)
    k = bk % 4
    d = pd * BD + tl.arange(0, BD)
    dm = d < D
    carry = tl.zeros((BD,), tl.float32)
    last = tl.arange(0, NB) == NB - 1
    for c0 in range(0, NCH, NB):
        i = c0 + tl.arange(0, NB)
        m = (i < NCH)[:, None] & dm[None, :]
        j = tl.where(k >= 2, NCH - 1 - i, i)
        o = (bk * NCH + j)[:, None] * D + d[None, :]
        s = tl.load(S + o, mask=m, other=1.0)
        h = tl.load(Hs + o, mask=m, other=0.0)
        aa, hh = tl.associative_scan((s, h), 0, _comb)
        inc = hh + aa * carry[None, :]
        # The state before a chunk is the one after the chunk before it.
        tl.store(
            Hs + (bk * NCH + tl.where(k >= 2, j - 1, j + 1))[:, None] * D + d[None, :],
            inc,
            mask=m & ((i + 1) < NCH)[:, None],
        )
        carry = tl.sum(tl.where(last[:, None], inc, 0.0), 0)
    j0 = tl.where(k >= 2, NCH - 1, 0)
    tl.store(Hs + (bk * NCH + j0) * D + d, tl.zeros((BD,), tl.float32), mask=dm)


@triton.jit
def out_kernel(
    x,
    P,
    Wdt,
    bias,
    Am,
    Ds,
    Hs,
    y,
    H,
    W,
    D,
    L,
    R,
    PS,
    NCH,
    T: tl.constexpr,
    BD: tl.constexpr,
    RP: tl.constexpr,
):
    c = tl.program_id(0)
    pd = tl.program_id(1)
    bp = tl.program_id(2)
    b = bp // 2
    pair = bp % 2
    t = c * T + tl.arange(0, T)
    mask = t < L
    pos = tl.where(pair == 1, (t % H) * W + t // H, t)
    d = pd * BD + tl.arange(0, BD)
    dmask = d < D
    u = tl.load(
        x + (b * L + pos)[:, None] * D + d[None, :], mask=mask[:, None] & dmask[None, :], other=0.0
    ).to(tl.float32)
    acc = tl.zeros((T, BD), tl.float32)
    for rev in tl.static_range(2):
        k = pair + 2 * rev
        dt, A, Bv, Cv = _tile(P, Wdt, bias, Am, b, k, pos, mask, d, dmask, L, D, R, PS, RP)
        h0 = tl.load(Hs + ((b * 4 + k) * NCH + c) * D + d, mask=dmask, other=0.0)
        Dv = tl.load(Ds + k * D + d, mask=dmask, other=0.0)
        a = tl.exp(dt * A[None, :])
        bb = dt * Bv[:, None] * u
        aa, hh = tl.associative_scan((a, bb), 0, _comb, reverse=(rev == 1))
        h = hh + aa * h0[None, :]
        acc += h * Cv[:, None] + Dv[None, :] * u
    tl.store(
        y + ((pair * (tl.num_programs(2) // 2) + b) * L + pos)[:, None] * D + d[None, :],
        acc.to(y.dtype.element_ty),
        mask=mask[:, None] & dmask[None, :],
    )


@triton.jit
def merge_ln_kernel(y, w, bvec, o, N, D, eps, BN: tl.constexpr, BD: tl.constexpr):
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    m = (i < N)[:, None] & (d < D)[None, :]
    off = i[:, None] * D + d[None, :]
    v = tl.load(y + off, mask=m, other=0.0).to(tl.float32) + tl.load(
        y + N * D + off, mask=m, other=0.0
    ).to(tl.float32)
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
    Wdt: Tensor,
    bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    lnw: Tensor,
    lnb: Tensor,
    H: int,
    W: int,
    *,
    T: int,
    BD: int,
    nw: int,
) -> Tensor:
    """Product, state, carry and output passes, sum and norm, on x of (B, H * W, D)."""
    B, L, D = x.shape
    R = Wdt.shape[-1]
    RP = max(16, triton.next_power_of_2(R))
    PS = Wx.shape[0]
    P = torch.nn.functional.linear(x, Wx)
    NCH = triton.cdiv(L, T)
    S = torch.empty(B * 4, NCH, D, device=x.device, dtype=torch.float32)
    Hs = torch.empty_like(S)
    y = torch.empty(2, B, L, D, device=x.device, dtype=x.dtype)
    g = (NCH, triton.cdiv(D, BD), B * 2)
    state_kernel[g](
        x, P, Wdt, bias, A, S, Hs, H, W, D, L, R, PS, NCH, T=T, BD=BD, RP=RP, num_warps=nw
    )
    carry_kernel[(B * 4, triton.cdiv(D, 32))](S, Hs, D, NCH, NB=64, BD=32, num_warps=4)
    out_kernel[g](
        x, P, Wdt, bias, A, Ds, Hs, y, H, W, D, L, R, PS, NCH, T=T, BD=BD, RP=RP, num_warps=nw
    )
    o = torch.empty_like(x)
    BDn = triton.next_power_of_2(D)
    BN = max(1, 4096 // BDn)
    merge_ln_kernel[(triton.cdiv(B * L, BN),)](
        y, lnw, lnb, o, B * L, D, 1e-5, BN=BN, BD=BDn, num_warps=4
    )
    return o
