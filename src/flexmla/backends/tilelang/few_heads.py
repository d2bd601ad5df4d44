"""Decode for few heads: tokens on the MMA's M, heads on N (`S^T = K Q^T`, `O^T = K^T P`).

One consumer warpgroup computes while two producer warps load. The rotary dot of shared, grouped and per-head keys is
one GEMM: the keys that the CTA's heads use lie side by side in a tile, and the query is zero where a head and a key do
not belong together. docs/kernels.md tells why it is built so.
"""

import tilelang.language as T

from ...tiling import padded_heads, rope_tile_width
from .combine import LN2, combine
from .producer import fetch_queries, stream_tiles
from .schedule import row_tiles, share

CONSUMERS = 128
LOG2E = 1.4426950408889634
STRIDES = ("sqb", "sqh", "spb", "sph", "scb", "scn", "skb", "skn")


def few_heads(shape, block_h, block_n, stages, ctas_per_sm, dtype):
    """The kernel of one shape and tile; batch, lengths, strides and grid are dynamic.

    Args:
        shape: the `MLAShape`.
        block_h, block_n, stages, ctas_per_sm: as in `plan.Tiling`.
        dtype: TileLang's name of the dtype of queries, caches and outputs.
    """
    n_heads, dv, d_pe = shape.n_heads, shape.dv, shape.d_pe
    rep = n_heads // shape.n_rope_heads
    heads = padded_heads("few_heads", block_h)
    rope = rope_tile_width(shape, block_h) if d_pe else 0
    # without rotary keys their arguments are stand-ins that nothing reads
    has_rope, not_rope = d_pe > 0, d_pe == 0
    q_pe_cols, kpe_cols, rope_cols = (d_pe, shape.n_rope_heads * d_pe, rope) if has_rope else (dv, dv, 16)
    groups = -(-n_heads // block_h)
    warps = block_n // 16
    span = 1 << (dv - 1).bit_length()  # of loops over dv: their index arithmetic stays shifts
    f32, i32 = T.float32, T.int32
    batch, max_len, slots = (T.dynamic(name) for name in ("batch", "max_len", "slots"))
    sqb, sqh, spb, sph, scb, scn, skb, skn = (T.dynamic(name) for name in STRIDES)

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
        with T.Kernel(groups, workers, threads=CONSUMERS + 64) as (group, worker):
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            q_sh = T.alloc_shared((heads, dv), dtype)
            ckv_sh = T.alloc_shared((stages, block_n, dv), dtype)
            q_rope_sh = T.alloc_shared((heads, rope_cols), dtype)
            kpe_sh = T.alloc_shared((stages, block_n, rope_cols), dtype)
            p_sh = T.alloc_shared((block_n, heads), dtype)
            max_sh = T.alloc_shared((warps, heads), f32)
            sum_sh = T.alloc_shared((warps, heads), f32)
            s = T.alloc_fragment((block_n, heads), f32)
            sums = T.alloc_fragment((block_n, heads), f32)
            o = T.alloc_fragment((dv, heads), f32)
            per_warp = T.alloc_fragment((warps, heads), f32)
            m = T.alloc_fragment((heads,), f32)
            alpha = T.alloc_fragment((heads,), f32)
            norm = T.alloc_fragment((heads,), f32)
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

            if tx < CONSUMERS:
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
                        T.fill(sums, 0)
                        T.fill(m, -(2.0**30))
                        T.mbarrier_wait_parity(q_full, seg & 1)
                        for j in T.serial(count):
                            stage = step % stages
                            valid = length - (tile + j) * block_n
                            T.mbarrier_wait_parity(full[stage], (step // stages) & 1)
                            if has_rope:
                                T.wgmma_gemm(kpe_sh[stage, :, :], q_rope_sh, s, transpose_B=True, clear_accum=True)
                            T.wgmma_gemm(ckv_sh[stage, :, :], q_sh, s, transpose_B=True, clear_accum=not_rope)
                            T.wait_wgmma(0)
                            if valid < block_n:
                                for i, h in T.Parallel(block_n, heads):
                                    s[i, h] = T.if_then_else(i < valid, s[i, h], -T.infinity(f32))
                                # what lies past the row may be NaN, and 0 * NaN is NaN
                                for i, c in T.Parallel(block_n, span):
                                    if i >= valid and c < dv:
                                        ckv_sh[stage, i, c] = 0
                            T.reduce_max(T.reshape(s, (warps, 16, heads)), per_warp, dim=1)
                            T.copy(per_warp, max_sh)
                            T.sync_threads(3, CONSUMERS)
                            T.copy(m, alpha)
                            for w in T.unroll(warps):
                                for h in T.Parallel(heads):
                                    m[h] = T.max(m[h], max_sh[w, h] * (softmax_scale * LOG2E))
                            for i, h in T.Parallel(block_n, heads):
                                s[i, h] = T.exp2(s[i, h] * (softmax_scale * LOG2E) - m[h])
                            T.copy(s, p_sh)
                            T.fence_proxy_async()
                            T.sync_threads(3, CONSUMERS)
                            for h in T.Parallel(heads):
                                alpha[h] = T.exp2(alpha[h] - m[h])
                            for i, h in T.Parallel(dv, heads):
                                o[i, h] *= alpha[h]
                            T.wgmma_gemm(ckv_sh[stage, :, :], p_sh, o, transpose_A=True)
                            for i, h in T.Parallel(block_n, heads):
                                sums[i, h] = sums[i, h] * alpha[h] + s[i, h]
                            T.wait_wgmma(0)
                            T.mbarrier_arrive(empty[stage])
                            step += 1
                        T.reduce_sum(T.reshape(sums, (warps, 16, heads)), per_warp, dim=1)
                        T.copy(per_warp, sum_sh)
                        T.sync_threads(3, CONSUMERS)
                        T.fill(norm, 0)
                        for w in T.unroll(warps):
                            for h in T.Parallel(heads):
                                norm[h] = norm[h] + sum_sh[w, h]
                        for h in T.Parallel(heads):
                            alpha[h] = 1.0 / norm[h]
                        # the query tile has been read for the last time: the output passes through it
                        for i, h in T.Parallel(dv, heads):
                            q_sh[h, i] = o[i, h] * alpha[h]
                        T.sync_threads(3, CONSUMERS)
                        if count == tiles:
                            for h, i in T.Parallel(block_h, span):
                                if head0 + h < n_heads and i < dv:
                                    out[row, head0 + h, i] = q_sh[h, i]
                            for h in T.Parallel(heads):
                                if h < block_h and head0 + h < n_heads:
                                    lse[row, head0 + h] = (T.log2(norm[h]) + m[h]) * LN2
                        else:
                            slot = 2 * worker + T.if_then_else(tile == 0, 1, 0)
                            for h, i in T.Parallel(block_h, span):
                                if head0 + h < n_heads and i < dv:
                                    part[slot, head0 + h, i] = q_sh[h, i]
                            for h in T.Parallel(heads):
                                if h < block_h and head0 + h < n_heads:
                                    part_lse[slot, head0 + h] = T.log2(norm[h]) + m[h]
                        T.fence_proxy_async()
                        T.mbarrier_arrive(q_empty)
                        seg += 1
                    left -= count
                    row += 1
                    tile = 0
            elif tx < CONSUMERS + 32:
                stream_tiles(
                    ckv, kpe, ckv_sh, kpe_sh, seq_lens, max_len, block_n, stages, rope, head0 // rep * d_pe,
                    full, empty, row, tile, left,
                )  # fmt: skip
            else:
                fetch_queries(
                    q_nope, q_pe, q_sh, q_rope_sh, seq_lens, max_len, block_n, n_heads, block_h, heads, rep, d_pe, rope,
                    head0, q_full, q_empty, row, tile, left,
                )  # fmt: skip

        combine(
            n_heads, dv, dtype, block_n, batch, max_len, workers, log_ways, log_parts,
            seq_lens, out, lse, part, part_lse,
        )  # fmt: skip

    return decode
