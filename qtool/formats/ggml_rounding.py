"""Rounding to ggml's types: scales of least squared error, searched for every block at once.

    signed codes    minimize sum (w - s q)^2         q = clip(round(w / s), low, -low - 1)      s = sum w q / sum q^2
    of a table      minimize sum (w - s l)^2         l the level nearest to w / s               s = sum w l / sum l^2
    with offsets    minimize sum (w - s q + t)^2     q = clip(round((w + t) / s), 0, 2^b - 1)   s, t of the normal equations
    w [parts, sub] the weights that share a scale    s, t [parts, 1]    b bits
From each of TRIES shares of the full range the codes are rounded, then s (and t) solved for these codes; the best of all is
taken, and where there is a t, codes and pair are found anew from each other REFITS times. In blocks of 256 the parts' s and t
become whole numbers times d and m: where both are, the best of the four next to them; codes are rounded again to what these
give. There t >= 0.
Signal to noise of the demo model's blocks in dB, by this search and by llama.cpp's (August 2026, without data):
    q2_k 11.5 10.5    q3_k 16.7 16.3    q4_k 22.8 22.9    q5_k 28.9 28.8    q6_k 35.4 34.9
    q4_0 21.7 21.2    q4_1 22.8 22.1    q5_0 27.8 27.3    q5_1 29.1 28.4    q8_0 46.0 45.3
Why not llama.cpp's own search: it weighs errors by magnitude, or by activations that a file of weights does not tell. The
plain squared error is what its users are shown as well.
Source: ggml, https://github.com/ggml-org/ggml (the grids); least squares as for any two-parameter line.
"""

import itertools

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import CodebookGrid
from qtool.formats.ggml import CHUNK, Blocks, GgmlType, from_codes, pack
from qtool.formats.integer import Params
from qtool.formats.scheme import PRESETS, WeightScheme
from qtool.formats.tensor import quantize

TRIES = 16
LEAST, MOST = 0.6, 1.1  # shares of the full range that are tried
REFITS = 2


def round_to(W: Tensor, kind: GgmlType) -> Tensor:
    """Bytes [out, row bytes] of W [out, in], of any float dtype, rounded; raises QtoolError beyond float16's range."""
    return torch.cat([_round_rows(part.float(), kind) for part in W.split(max(1, CHUNK // W.shape[1]))])


def _round_rows(W: Tensor, kind: GgmlType) -> Tensor:
    if kind.dtype is not None:
        return W.to(kind.dtype).contiguous().view(torch.uint8)
    if kind.name == "mxfp4":
        return from_codes(quantize(W, WeightScheme.model_validate(PRESETS["mxfp4"])), kind)
    blocks = W.reshape(-1, kind.block)  # [blocks, weights]
    if kind.table:
        rounded = _table_block(blocks, kind)
    elif kind.n_scales == 0:
        rounded = _offset_block(blocks, kind) if kind.has_minimum else _signed_block(blocks, kind)
    else:
        rounded = _offset_superblock(blocks, kind) if kind.has_minimum else _signed_superblock(blocks, kind)
    if not (torch.isfinite(rounded.d).all() and (rounded.m is None or torch.isfinite(rounded.m).all())):
        raise QtoolError(f"weights up to {float(W.abs().amax()):.1e} are beyond the float16 scales of {kind.name}")
    return pack(rounded, kind).view(len(W), -1)


def _signed_block(w: Tensor, kind: GgmlType) -> Blocks:
    d = signed_scale(w, kind.low).to(torch.float16)  # [blocks, 1]
    return Blocks(_nearest(w, d.float(), kind.low, -kind.low - 1), d.squeeze(1))


def _offset_block(w: Tensor, kind: GgmlType) -> Blocks:
    s, t = offset_scale(w, kind.bits, is_positive=False)
    d, m = s.to(torch.float16), (-t).to(torch.float16)  # [blocks, 1]
    codes = _nearest(w - m.float(), d.float(), 0, (1 << kind.bits) - 1)
    return Blocks(codes, d.squeeze(1), m.squeeze(1))


def _table_block(w: Tensor, kind: GgmlType) -> Blocks:
    grid = CodebookGrid(kind.table, "float16")
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))  # [blocks, 1]
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for end in grid.ends:  # the largest weight may lie on either side
        for share in torch.linspace(LEAST, MOST, TRIES).tolist():
            scale = share * largest / end
            level = grid.levels(grid.encode(w, Params(torch.where(scale == 0, 1.0, scale), None)))
            s = _divide((w * level).sum(1, keepdim=True), level.square().sum(1, keepdim=True))
            error = (w - s * level).square().sum(1, keepdim=True)
            best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    d = best.to(torch.float16)
    codes = grid.encode(w, Params(torch.where(d == 0, 1.0, d.float()), None))
    return Blocks(codes.int(), d.squeeze(1))


def _signed_superblock(w: Tensor, kind: GgmlType) -> Blocks:
    parts = w.reshape(-1, kind.sub)  # [blocks parts, sub]
    s = signed_scale(parts, kind.low).view(len(w), -1)  # [blocks, parts]
    largest = s.gather(1, s.abs().argmax(1, keepdim=True))  # [blocks, 1]
    d = (largest / kind.scale_low).to(torch.float16)
    scales = _nearest(s, d.float(), kind.scale_low, -kind.scale_low - 1)
    codes = _nearest(parts, (d.float() * scales).view(-1, 1), kind.low, -kind.low - 1)
    return Blocks(codes.view(len(w), -1), d.squeeze(1), None, scales)


def _offset_superblock(w: Tensor, kind: GgmlType) -> Blocks:
    parts = w.reshape(-1, kind.sub)  # [blocks parts, sub]
    pair = [number.view(len(w), -1) for number in offset_scale(parts, kind.bits, is_positive=True)]  # each [blocks, parts]
    high = 15 if kind.sub == 16 else 63  # four or six bits a scale
    d, m = ((number.amax(1, keepdim=True) / high).to(torch.float16) for number in pair)
    below = [_divide(number, unit.float()).floor() for number, unit in zip(pair, (d, m), strict=True)]
    least = torch.full((len(parts), 1), torch.inf, device=w.device)
    best = [torch.zeros_like(number, dtype=torch.int32).view(-1, 1) for number in pair]
    codes = torch.zeros_like(parts, dtype=torch.int32)
    for step_s, step_t in itertools.product((0, 1), repeat=2):  # both whole numbers next to each
        s, t = ((number + step).clamp(0, high).int() for number, step in zip(below, (step_s, step_t), strict=True))
        scale, offset = (d.float() * s).view(-1, 1), (m.float() * t).view(-1, 1)
        q = _nearest(parts + offset, scale, 0, (1 << kind.bits) - 1)
        error = (parts - scale * q + offset).square().sum(1, keepdim=True)
        is_better = error < least
        least, codes = torch.where(is_better, error, least), torch.where(is_better, q, codes)
        best = [torch.where(is_better, new.view(-1, 1), old) for new, old in zip((s, t), best, strict=True)]
    scales = torch.cat([number.view(len(w), -1) for number in best], 1)
    return Blocks(codes.view(len(w), -1), d.squeeze(1), m.squeeze(1), scales)


def signed_scale(w: Tensor, low: int) -> Tensor:
    """s [parts, 1] of least squared error of w [parts, sub] in codes low .. -low - 1; negative where that serves."""
    largest = w.gather(1, w.abs().argmax(1, keepdim=True))  # [parts, 1]
    best = torch.zeros_like(largest)
    least = torch.full_like(largest, torch.inf)
    for share in torch.linspace(LEAST, MOST, TRIES).tolist():
        q = _nearest(w, share * largest / low, low, -low - 1).float()
        s = _divide((w * q).sum(1, keepdim=True), q.square().sum(1, keepdim=True))
        error = (w - s * q).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, s, best), torch.minimum(error, least)
    return best


def offset_scale(w: Tensor, bits: int, is_positive: bool) -> tuple[Tensor, Tensor]:
    """s and t [parts, 1] of least squared error of w [parts, sub] as s q - t, q = 0 .. 2^bits - 1; t >= 0 where asked for."""
    high = (1 << bits) - 1
    low = w.amin(1, keepdim=True)  # [parts, 1]
    low = low.clamp(max=0) if is_positive else low
    span = w.amax(1, keepdim=True) - low
    best_s, best_t = torch.zeros_like(low), -low
    least = (w - low).square().sum(1, keepdim=True)
    for share in torch.linspace(LEAST, MOST, TRIES).tolist():
        q = _nearest(w - low - (1 - share) / 2 * span, share * span / high, 0, high)
        s, t = _solve(w, q.float(), is_positive)
        error = (w - s * q + t).square().sum(1, keepdim=True)
        is_better = (error < least) & (s >= 0)
        best_s, best_t = torch.where(is_better, s, best_s), torch.where(is_better, t, best_t)
        least = torch.where(is_better, error, least)
    for _ in range(REFITS):
        s, t = _solve(w, _nearest(w + best_t, best_s, 0, high).float(), is_positive)
        best_s, best_t = torch.where(s > 0, s, best_s), torch.where(s > 0, t, best_t)
    return best_s, best_t


def _solve(w: Tensor, q: Tensor, is_positive: bool) -> tuple[Tensor, Tensor]:
    """s and t [parts, 1] of least squared error for given codes q [parts, sub]."""
    n = w.shape[1]
    sum_w, sum_q, sum_qq, sum_wq = (x.sum(1, keepdim=True) for x in (w, q, q.square(), w * q))
    s = _divide(n * sum_wq - sum_q * sum_w, n * sum_qq - sum_q.square())
    t = (s * sum_q - sum_w) / n
    if is_positive:
        s, t = torch.where(t < 0, _divide(sum_wq, sum_qq), s), t.clamp(min=0)
    return s, t


def _nearest(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers of w / scale within low .. high, int32; 0 where the scale is."""
    return _divide(w, scale).round().clamp(low, high).int()


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, torch.zeros_like(a * b), a / torch.where(b == 0, torch.ones_like(b), b))
