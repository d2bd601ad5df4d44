"""The fused write of new tokens into a paged cache; needs Triton, which comes with CUDA builds of PyTorch."""

# A kernel's arguments are the DSL's own values, not types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024  # elements a program moves at once


def write_tokens(
    rows: Tensor,
    n_slots: int,
    slots: Tensor,
    ckv: Tensor,
    kpe: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """Writes latents and rotary keys of new tokens into their rows, one launch on the current device and stream.

    Args:
        rows: `[at least n_slots, dv + n_rope_heads * d_pe]`, contiguous.
        n_slots: rows that may be written; tokens of any other slot are skipped.
        slots: int64 `[batch, n_new]`.
        ckv: `[batch, n_new, dv]`, rows' dtype.
        kpe: `[batch, n_new, n_rope_heads, d_pe]`, rows' dtype, or None.
        cos: `[batch, n_new, n_rope_heads, d_pe]`, to rotate kpe on its way, or None.
        sin: as cos.
    """
    dv = ckv.shape[2]
    n_rope_heads, d_pe = (0, 1) if kpe is None else kpe.shape[2:]
    key = ckv if kpe is None else kpe
    cosine, sine = (key if table is None else table for table in (cos, sin))
    # No fused multiply-add: the PyTorch path rounds each product, and both are to give the same bits.
    _write_rows[(slots.numel(),)](
        rows,
        slots,
        ckv,
        key,
        cosine,
        sine,
        n_slots,
        slots.shape[1],
        *slots.stride(),
        *ckv.stride()[:2],
        *key.stride()[:2],
        0 if kpe is None else kpe.stride(2),
        *cosine.stride()[:2],
        0 if cos is None else cos.stride(2),
        *sine.stride()[:2],
        0 if sin is None else sin.stride(2),
        dv=dv,
        d_pe=d_pe,
        rope_width=n_rope_heads * d_pe,
        rotate=cos is not None,
        block=min(triton.next_power_of_2(max(dv, n_rope_heads * d_pe)), MAX_BLOCK),
        num_warps=4,
        enable_fp_fusion=False,
    )


@triton.jit(do_not_specialize=["n_slots", "n_new", "slots_batch", "slots_token"])
def _write_rows(
    rows,
    slots,
    ckv,
    kpe,
    cos,
    sin,
    n_slots,
    n_new,
    slots_batch,
    slots_token,
    ckv_batch,
    ckv_token,
    kpe_batch,
    kpe_token,
    kpe_head,
    cos_batch,
    cos_token,
    cos_head,
    sin_batch,
    sin_token,
    sin_head,
    dv: tl.constexpr,
    d_pe: tl.constexpr,
    rope_width: tl.constexpr,
    rotate: tl.constexpr,
    block: tl.constexpr,
):
    """A program writes one token: its latent, then its rotary keys, `block` elements at a time.

    Every index that a stride multiplies is 64-bit: caches and prompts pass 2**31 elements.
    """
    token = tl.program_id(0)
    b = (token // n_new).to(tl.int64)
    t = (token % n_new).to(tl.int64)
    slot = tl.load(slots + b * slots_batch + t * slots_token)
    if (slot >= 0) & (slot < n_slots):
        row = rows + slot * (dv + rope_width)
        latent = ckv + b * ckv_batch + t * ckv_token
        for start in range(0, dv, block):
            column = start + tl.arange(0, block)
            inside = column < dv
            tl.store(row + column, tl.load(latent + column, mask=inside), mask=inside)

        row += dv
        keys = kpe + b * kpe_batch + t * kpe_token
        cosines = cos + b * cos_batch + t * cos_token
        sines = sin + b * sin_batch + t * sin_token
        for start in range(0, rope_width, block):
            column = start + tl.arange(0, block)
            inside = column < rope_width
            head = (column // d_pe).to(tl.int64)
            dim = column % d_pe
            value = tl.load(keys + head * kpe_head + dim, mask=inside)
            if rotate:
                low = dim < d_pe // 2
                other = tl.where(low, dim + d_pe // 2, dim - d_pe // 2)
                partner = tl.load(keys + head * kpe_head + other, mask=inside).to(tl.float32)
                cosine = tl.load(cosines + head * cos_head + dim, mask=inside).to(tl.float32)
                sine = tl.load(sines + head * sin_head + dim, mask=inside).to(tl.float32)
                turned = value.to(tl.float32) * cosine + tl.where(low, -partner, partner) * sine
                value = turned.to(rows.dtype.element_ty)
            tl.store(row + column, value, mask=inside)
