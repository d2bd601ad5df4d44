"""Many heads: queries on the MMA's M (`S = Q K^T`, `O = P K`), 64 of them a CTA.

Two consumer warpgroups each compute all scores and half of the output's width: the probabilities stay in registers as
the second GEMM's operand and the warpgroups share nothing but the tiles. docs/kernels.md tells why it is built so.
"""

import tilelang.language as T

from .combine import LEAST, LN2
from .schedule import row_span

CONSUMERS = 256
# Together no more than the launch gives a CTA: 168 for each of 384 threads.
CONSUMER_REGISTERS = 208
PRODUCER_REGISTERS = 88
LOG2E = 1.4426950408889634


@T.macro
def consume_many(
    spec, rows, sh, results, softmax_scale, causal, group, worker, row: T.Ref, tile: T.Ref, left: T.Ref, tx
):
    """Both consumer warpgroups: `left` tiles from (`row`, `tile`) on; write results and partial states."""
    T.inc_max_nreg(CONSUMER_REGISTERS)
    # Only now may the merge's CTAs come: those that wait for this launch must not hold the registers it waits for.
    T.sync_threads(5, CONSUMERS)
    T.pdl_trigger()
    if tx < 128:
        consume_half(0, spec, rows, sh, results, softmax_scale, causal, group, worker, row, tile, left)
    else:
        consume_half(1, spec, rows, sh, results, softmax_scale, causal, group, worker, row, tile, left)


@T.macro
def consume_half(
    side, spec, rows, sh, results, softmax_scale, causal, group, worker, row: T.Ref, tile: T.Ref, left: T.Ref
):
    """One of them: columns `[side * dv / 2, (side + 1) * dv / 2)` of the output."""
    q_len = spec.q_len
    queries = spec.queries
    block_n = spec.block_n
    stages = spec.stages
    rope = spec.rope
    dtype = spec.dtype
    q_sh = sh.q
    q_rope_sh = sh.q_rope
    ckv_sh = sh.ckv
    kpe_sh = sh.kpe
    full = sh.full
    empty = sh.empty
    q_full = sh.q_full
    q_empty = sh.q_empty
    out = results.out
    lse = results.lse
    state = results.states
    sums = results.sums
    sums0 = results.sums0
    query0 = group * spec.block_q
    width = spec.k // 2
    col0 = side * width
    span = 1 << (width - 1).bit_length()  # of loops over width: their index arithmetic stays shifts
    f32 = T.float32
    s = T.alloc_fragment((queries, block_n), f32)
    p = T.alloc_fragment((queries, block_n), dtype)
    o = T.alloc_fragment((queries, width), f32)
    m = T.alloc_fragment((queries,), f32)
    alpha = T.alloc_fragment((queries,), f32)
    norm = T.alloc_fragment((queries,), f32)
    added = T.alloc_fragment((queries,), f32)
    step = T.alloc_var(T.int32)
    seg = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    step = 0
    seg = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        if count > 0:
            T.fill(o, 0)
            T.fill(norm, 0)
            T.fill(m, LEAST)
            T.mbarrier_wait_parity(q_full, seg & 1)
            T.fence_proxy_async()
            for j in T.serial(count):
                stage = step % stages
                first = (begin // block_n + tile + j) * block_n
                low = begin - first
                high = length - first
                T.mbarrier_wait_parity(full[stage], (step // stages) & 1)
                if spec.vector > 0:
                    T.fence_proxy_async()
                if rope > 0:
                    T.wgmma_gemm(q_rope_sh, kpe_sh[stage, :, :], s, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(q_sh, ckv_sh[stage, :, :], s, transpose_B=True, clear_accum=(rope == 0))
                T.wait_wgmma(0)
                if T.max(low, block_n - high + causal * (q_len - 1)) > 0:
                    for h, i in T.Parallel(queries, block_n):
                        unseen = causal * (q_len - 1 - h % q_len)
                        s[h, i] = T.if_then_else(T.And(i >= low, i < high - unseen), s[h, i], -T.infinity(f32))
                    if spec.vector == 0:
                        # what lies outside the row may be NaN, and 0 * NaN is NaN; each clears its own columns
                        for i, c in T.Parallel(block_n, span):
                            if T.Or(i < low, i >= high) and c < width:
                                ckv_sh[stage, i, col0 + c] = 0
                        T.fence_proxy_async()
                        T.sync_threads(3 + side, 128)
                T.copy(m, alpha)
                T.reduce_max(s, added, dim=1)
                for h in T.Parallel(queries):
                    m[h] = T.max(m[h], added[h] * (softmax_scale * LOG2E))
                for h, i in T.Parallel(queries, block_n):
                    s[h, i] = T.exp2(s[h, i] * (softmax_scale * LOG2E) - m[h])
                for h in T.Parallel(queries):
                    alpha[h] = T.exp2(alpha[h] - m[h])
                T.copy(s, p)
                for h, i in T.Parallel(queries, width):
                    o[h, i] *= alpha[h]
                T.wgmma_gemm(p, ckv_sh[stage, :, col0 : col0 + width], o)
                T.reduce_sum(s, added, dim=1)
                for h in T.Parallel(queries):
                    norm[h] = norm[h] * alpha[h] + added[h]
                T.wait_wgmma(0)
                T.mbarrier_arrive(empty[stage])
                step += 1
            for h in T.Parallel(queries):
                alpha[h] = T.if_then_else(norm[h] > 0, 1.0 / norm[h], 0)
            for h, i in T.Parallel(queries, width):
                o[h, i] *= alpha[h]
            # once both warpgroups have read the query tile for the last time the output passes through it
            T.sync_threads(5, CONSUMERS)
            T.copy(o, q_sh[:, col0 : col0 + width])
            T.sync_threads(3 + side, 128)
            if count == tiles:
                for h, i in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and i < width:
                        out[row, h % q_len, (query0 // q_len) + h // q_len, col0 + i] = q_sh[h, col0 + i]
                if side == 0:
                    for h in T.Parallel(queries):
                        if h < spec.block_q and query0 + h < spec.n_queries:
                            lse[row, (query0 // q_len) + h // q_len, h % q_len] = (T.log2(norm[h]) + m[h]) * LN2
            else:
                slot = 2 * worker + T.if_then_else(tile == 0, 1, 0)
                for h, i in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and i < width:
                        state[slot, query0 + h, col0 + i] = q_sh[h, col0 + i]
                if side == 0:
                    for h in T.Parallel(queries):
                        if h < spec.block_q and query0 + h < spec.n_queries:
                            sums[sums0 + slot, query0 + h] = T.log2(norm[h]) + m[h]
            T.fence_proxy_async()
            T.mbarrier_arrive(q_empty)
            seg += 1
        left -= count
        row += 1
        tile = 0
