"""Decode for many heads: heads on the MMA's M (`S = Q K^T`, `O = P K`), 64 of them a CTA.

Two consumer warpgroups each compute all scores and half of the output's width: the probabilities stay in registers as
the second GEMM's operand and the warpgroups share nothing but the tiles. docs/kernels.md tells why it is built so.
"""

import tilelang.language as T

from ...tiling import padded_heads, rope_tile_width
from .combine import LN2, combine
from .producer import fetch_queries, stream_tiles
from .schedule import row_tiles, share

CONSUMERS = 256
LOG2E = 1.4426950408889634
STRIDES = ("sqb", "sqh", "spb", "sph", "scb", "scn", "skb", "skn")


def many_heads(shape, block_h, block_n, stages, ctas_per_sm, dtype):
    """The kernel of one shape and tile; batch, lengths, strides and grid are dynamic. Arguments as `few_heads`."""
    n_heads, dv, d_pe = shape.n_heads, shape.dv, shape.d_pe
    rep = n_heads // shape.n_rope_heads
    heads = padded_heads("many_heads", block_h)
    rope = rope_tile_width(shape, block_h) if d_pe else 0
    # without rotary keys their arguments are stand-ins that nothing reads
    has_rope, not_rope = d_pe > 0, d_pe == 0
    q_pe_cols, kpe_cols, rope_cols = (d_pe, shape.n_rope_heads * d_pe, rope) if has_rope else (dv, dv, 16)
    groups = -(-n_heads // block_h)
    half = dv // 2
    f32, i32 = T.float32, T.int32
    batch, max_len, slots = (T.dynamic(name) for name in ("batch", "max_len", "slots"))
    sqb, sqh, spb, sph, scb, scn, skb, skn = (T.dynamic(name) for name in STRIDES)

    @T.macro
    def consume(
        side, col0, width, q_sh, ckv_sh, q_rope_sh, kpe_sh, full, empty, q_full, q_empty, seq_lens, out, lse,
        part, part_lse, softmax_scale, head0, worker, row: T.Ref, tile: T.Ref, left: T.Ref,
    ):  # fmt: skip
        span = 1 << (width - 1).bit_length()  # of loops over width: their index arithmetic stays shifts
        s = T.alloc_fragment((heads, block_n), f32)
        p = T.alloc_fragment((heads, block_n), dtype)
        o = T.alloc_fragment((heads, width), f32)
        m = T.alloc_fragment((heads,), f32)
        alpha = T.alloc_fragment((heads,), f32)
        norm = T.alloc_fragment((heads,), f32)
        added = T.alloc_fragment((heads,), f32)
        step = T.alloc_var(i32)
        seg = T.alloc_var(i32)
        tiles = T.alloc_var(i32)
        count = T.alloc_var(i32)
        length = T.alloc_var(i32)
        step = 0
        seg = 0
        while left > 0:
            row_tiles(seq_lens, row, max_len, block_n, tiles)
            count = T.min(tiles - tile, left)
            if count > 0:
                length = T.min(seq_lens[row], max_len)
                T.fill(o, 0)
                T.fill(norm, 0)
                T.fill(m, -(2.0**30))
                T.mbarrier_wait_parity(q_full, seg & 1)
                for j in T.serial(count):
                    stage = step % stages
                    valid = length - (tile + j) * block_n
                    T.mbarrier_wait_parity(full[stage], (step // stages) & 1)
                    if has_rope:
                        T.wgmma_gemm(q_rope_sh, kpe_sh[stage, :, :], s, transpose_B=True, clear_accum=True)
                    T.wgmma_gemm(q_sh, ckv_sh[stage, :, :], s, transpose_B=True, clear_accum=not_rope)
                    T.wait_wgmma(0)
                    if valid < block_n:
                        for h, i in T.Parallel(heads, block_n):
                            s[h, i] = T.if_then_else(i < valid, s[h, i], -T.infinity(f32))
                        # what lies past the row may be NaN, and 0 * NaN is NaN; each warpgroup clears its own columns
                        for i, c in T.Parallel(block_n, span):
                            if i >= valid and c < width:
                                ckv_sh[stage, i, col0 + c] = 0
                        T.fence_proxy_async()
                        T.sync_threads(3 + side, 128)
                    T.copy(m, alpha)
                    T.reduce_max(s, added, dim=1)
                    for h in T.Parallel(heads):
                        m[h] = T.max(m[h], added[h] * (softmax_scale * LOG2E))
                    for h, i in T.Parallel(heads, block_n):
                        s[h, i] = T.exp2(s[h, i] * (softmax_scale * LOG2E) - m[h])
                    for h in T.Parallel(heads):
                        alpha[h] = T.exp2(alpha[h] - m[h])
                    T.copy(s, p)
                    for h, i in T.Parallel(heads, width):
                        o[h, i] *= alpha[h]
                    T.wgmma_gemm(p, ckv_sh[stage, :, col0 : col0 + width], o)
                    T.reduce_sum(s, added, dim=1)
                    for h in T.Parallel(heads):
                        norm[h] = norm[h] * alpha[h] + added[h]
                    T.wait_wgmma(0)
                    T.mbarrier_arrive(empty[stage])
                    step += 1
                for h in T.Parallel(heads):
                    alpha[h] = 1.0 / norm[h]
                for h, i in T.Parallel(heads, width):
                    o[h, i] *= alpha[h]
                # once both warpgroups have read the query tile for the last time the output passes through it
                T.sync_threads(5, CONSUMERS)
                T.copy(o, q_sh[:, col0 : col0 + width])
                T.sync_threads(3 + side, 128)
                if count == tiles:
                    for h, i in T.Parallel(block_h, span):
                        if head0 + h < n_heads and i < width:
                            out[row, head0 + h, col0 + i] = q_sh[h, col0 + i]
                    if side == 0:
                        for h in T.Parallel(heads):
                            if h < block_h and head0 + h < n_heads:
                                lse[row, head0 + h] = (T.log2(norm[h]) + m[h]) * LN2
                else:
                    slot = 2 * worker + T.if_then_else(tile == 0, 1, 0)
                    for h, i in T.Parallel(block_h, span):
                        if head0 + h < n_heads and i < width:
                            part[slot, head0 + h, col0 + i] = q_sh[h, col0 + i]
                    if side == 0:
                        for h in T.Parallel(heads):
                            if h < block_h and head0 + h < n_heads:
                                part_lse[slot, head0 + h] = T.log2(norm[h]) + m[h]
                T.fence_proxy_async()
                T.mbarrier_arrive(q_empty)
                seg += 1
            left -= count
            row += 1
            tile = 0

    @T.prim_func
    def decode(
        q_nope: T.StridedTensor((batch, n_heads, dv), (sqb, sqh, 1), dtype),
        q_pe: T.StridedTensor((batch, n_heads, q_pe_cols), (spb, sph, 1), dtype),
        ckv: T.StridedTensor((batch, max_len, dv), (scb, scn, 1), dtype),
        kpe: T.StridedTensor((batch, max_len, kpe_cols), (skb, skn, 1), dtype),
        seq_lens: T.Tensor((batch,), i32),
        out: T.Tensor((batch, n_heads, dv), dtype),
        lse: T.Tensor((batch, n_heads), f32),
        part: T.Tensor((slots, n_heads, dv), dtype),
        part_lse: T.Tensor((slots, n_heads), f32),
        softmax_scale: T.float32,
        workers: T.int32,
        log_ways: T.int32,
        log_parts: T.int32,
    ):
        T.assume(workers > 0)
        with T.Kernel(groups, workers, threads=CONSUMERS + 128) as (group, worker):
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            q_sh = T.alloc_shared((heads, dv), dtype)
            ckv_sh = T.alloc_shared((stages, block_n, dv), dtype)
            q_rope_sh = T.alloc_shared((heads, rope_cols), dtype)
            kpe_sh = T.alloc_shared((stages, block_n, rope_cols), dtype)
            full = T.alloc_barrier([32] * stages)
            empty = T.alloc_barrier([CONSUMERS] * stages)
            q_full = T.alloc_barrier(32)
            q_empty = T.alloc_barrier(CONSUMERS)

            tx = T.get_thread_binding()
            head0 = group * block_h
            row = T.alloc_var(i32)
            tile = T.alloc_var(i32)
            left = T.alloc_var(i32)
            T.pdl_trigger()
            share(seq_lens, batch, max_len, block_n, tx % 32, worker, workers, row, tile, left)
            if tx < 128:
                T.inc_max_nreg(224)
                consume(
                    0, 0, half, q_sh, ckv_sh, q_rope_sh, kpe_sh, full, empty, q_full, q_empty, seq_lens, out, lse,
                    part, part_lse, softmax_scale, head0, worker, row, tile, left,
                )  # fmt: skip
            elif tx < CONSUMERS:
                T.inc_max_nreg(224)
                consume(
                    1, half, half, q_sh, ckv_sh, q_rope_sh, kpe_sh, full, empty, q_full, q_empty,
                    seq_lens, out, lse, part, part_lse, softmax_scale, head0, worker, row, tile, left,
                )  # fmt: skip
            else:
                T.dec_max_nreg(64)
                if tx < CONSUMERS + 32:
                    stream_tiles(
                        ckv, kpe, ckv_sh, kpe_sh, seq_lens, max_len, block_n, stages, rope, head0 // rep * d_pe,
                        full, empty, row, tile, left,
                    )  # fmt: skip
                elif tx < CONSUMERS + 64:
                    fetch_queries(
                        q_nope, q_pe, q_sh, q_rope_sh, seq_lens, max_len, block_n, n_heads, block_h, heads, rep, d_pe,
                        rope, head0, q_full, q_empty, row, tile, left,
                    )  # fmt: skip

        combine(
            n_heads, dv, dtype, block_n, batch, max_len, workers, log_ways, log_parts,
            seq_lens, out, lse, part, part_lse,
        )  # fmt: skip

    return decode
