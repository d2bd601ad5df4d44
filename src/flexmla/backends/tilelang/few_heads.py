"""Few heads: tokens on the MMA's M, queries on N (`S^T = K Q^T`, `O^T = K^T P`), one consumer warpgroup.

The rotary dot of shared, grouped and per-head keys is one GEMM: the keys that the CTA's heads use lie side by side in
a tile, and the query is zero where a head and a key do not belong together. Latents too wide for one CTA are shared out
over a cluster: each CTA multiplies its columns of queries and keys, and all add up the parts' scores.
docs/kernels.md tells why it is built so.
"""

import tilelang.language as T

from .combine import LEAST, LN2
from .schedule import row_span
from .scores import LOG2E, SLACK, add_parts, cap_scores, scale_scores
from .transpose import transpose

CONSUMERS = 128


@T.macro
def consume_few(
    spec, rows, sh, exchange, p_sh, max_sh, sum_sh, results, softmax_scale, inner_scale, causal, group, part, worker,
    row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """The consumer warpgroup: `left` tiles from (`row`, `tile`) on; writes results and partial states."""
    q_len = spec.q_len
    queries = spec.queries
    block_n = spec.block_n
    width = spec.out
    stages = spec.stages
    q_sh = sh.q
    q_rope_sh = sh.q_rope
    ckv_sh = sh.ckv
    kpe_sh = sh.kpe
    out_sh = sh.out
    v_sh = sh.v if spec.v > 0 else sh.ckv
    full = sh.full
    empty = sh.empty
    q_full = sh.q_full
    q_empty = sh.q_empty
    out = results.out
    lse = results.lse
    state = results.states
    sums_of = results.sums
    sums0 = results.sums0
    query0 = group * spec.block_q
    column0 = part * width
    warps = block_n // 16
    span = 1 << (width - 1).bit_length()  # of loops over columns: their index arithmetic stays shifts
    f32 = T.float32
    s = T.alloc_fragment((block_n, queries), f32)
    sums = T.alloc_fragment((block_n, queries), f32)
    o = T.alloc_fragment((width, queries), f32)
    per_warp = T.alloc_fragment((warps, queries), f32)
    m = T.alloc_fragment((queries,), f32)
    limit = T.alloc_fragment((queries,), f32)
    alpha = T.alloc_fragment((queries,), f32)
    norm = T.alloc_fragment((queries,), f32)
    outgrown = T.alloc_local((1,), T.int32)
    moved = T.alloc_var(T.int32)
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
            T.fill(sums, 0)
            T.fill(m, LEAST)
            T.fill(limit, -T.infinity(f32))
            T.mbarrier_wait_parity(q_full, seg & 1)
            T.fence_proxy_async()
            for j in T.serial(count):
                stage = step % stages
                first = (begin // block_n + tile + j) * block_n
                low = begin - first
                high = length - first
                if T.And(j == count - 1, left <= count):
                    T.pdl_trigger()  # the merge's CTAs may come: earlier they would only be in the way
                T.mbarrier_wait_parity(full[stage], (step // stages) & 1)
                if spec.vector > 0:
                    T.fence_proxy_async()
                if spec.rope > 0:
                    T.wgmma_gemm(kpe_sh[stage, :, :], q_rope_sh, s, transpose_B=True, clear_accum=True)
                T.wgmma_gemm(ckv_sh[stage, :, :], q_sh, s, transpose_B=True, clear_accum=(spec.rope == 0))
                T.wait_wgmma(0)
                if spec.parts > 1:
                    add_parts(spec, exchange, s, step)
                if spec.scales > 0:
                    scale_scores(spec, sh.scale, s, stage, group)
                if spec.softcap:
                    cap_scores(spec, s, inner_scale)
                if T.max(low, block_n - high + causal * (q_len - 1)) > 0:
                    for i, h in T.Parallel(block_n, queries):
                        unseen = causal * (q_len - 1 - h % q_len)
                        s[i, h] = T.if_then_else(T.And(i >= low, i < high - unseen), s[i, h], -T.infinity(f32))
                    if spec.vector == 0:
                        # what lies outside the row may be NaN, and 0 * NaN is NaN
                        for i, c in T.Parallel(block_n, span):
                            if T.Or(i < low, i >= high) and c < width:
                                v_sh[stage, i, c] = 0
                outgrown[0] = 0
                for i, h in T.Parallel(block_n, queries):
                    if s[i, h] > limit[h]:
                        outgrown[0] = 1
                # a barrier too: nobody reads the last tile's probabilities, or maxima that moved before, any more
                moved = T.call_extern("int32", "flexmla_any", 3, CONSUMERS, outgrown[0])
                if moved != 0:
                    move_maxima(spec, s, per_warp, max_sh, softmax_scale, m, limit, alpha)
                    if j > 0:  # before that there is nothing to shrink
                        for i, h in T.Parallel(width, queries):
                            o[i, h] *= alpha[h]
                        for i, h in T.Parallel(block_n, queries):
                            sums[i, h] *= alpha[h]
                for i, h in T.Parallel(block_n, queries):
                    s[i, h] = T.exp2(s[i, h] * (softmax_scale * LOG2E) - m[h])
                T.copy(s, p_sh)
                T.fence_proxy_async()
                T.sync_threads(3, CONSUMERS)
                T.wgmma_gemm(v_sh[stage, :, :], p_sh, o, transpose_A=True)
                for i, h in T.Parallel(block_n, queries):
                    sums[i, h] += s[i, h]
                T.wait_wgmma(0)
                T.mbarrier_arrive(empty[stage])
                step += 1
            T.reduce_sum(T.reshape(sums, (warps, 16, queries)), per_warp, dim=1)
            T.copy(per_warp, sum_sh)
            T.sync_threads(3, CONSUMERS)
            T.fill(norm, 0)
            for w in T.unroll(warps):
                for h in T.Parallel(queries):
                    norm[h] = norm[h] + sum_sh[w, h]
            for h in T.Parallel(queries):
                alpha[h] = T.if_then_else(norm[h] > 0, 1.0 / norm[h], 0)
            # where values are latents, the query tile has been read for the last time: the output passes through it
            for i, h in T.Parallel(width, queries):
                o[i, h] *= alpha[h]
            transpose(spec, o, out_sh)
            T.sync_threads(3, CONSUMERS)
            if count == tiles:
                for h, i in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and column0 + i < spec.width and i < width:
                        out[row, h % q_len, (query0 // q_len) + h // q_len, column0 + i] = out_sh[h, i]
                if part == 0:
                    for h in T.Parallel(queries):
                        if h < spec.block_q and query0 + h < spec.n_queries:
                            lse[row, (query0 // q_len) + h // q_len, h % q_len] = (T.log2(norm[h]) + m[h]) * LN2
            else:
                slot = 2 * worker + T.if_then_else(tile == 0, 1, 0)
                for h, i in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and column0 + i < spec.width and i < width:
                        state[slot, query0 + h, column0 + i] = out_sh[h, i]
                if part == 0:
                    for h in T.Parallel(queries):
                        if h < spec.block_q and query0 + h < spec.n_queries:
                            sums_of[sums0 + slot, query0 + h] = T.log2(norm[h]) + m[h]
            T.fence_proxy_async()
            T.mbarrier_arrive(q_empty)
            seg += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def move_maxima(spec, s, per_warp, max_sh, softmax_scale, m, limit, alpha):
    """Takes a tile's scores into the maxima: `alpha` is what sums and output shrink by, `limit` what moves m again."""
    warps = spec.block_n // 16
    T.reduce_max(T.reshape(s, (warps, 16, spec.queries)), per_warp, dim=1)
    T.copy(per_warp, max_sh)
    T.sync_threads(3, CONSUMERS)
    T.copy(m, alpha)
    for w in T.unroll(warps):
        for h in T.Parallel(spec.queries):
            m[h] = T.max(m[h], max_sh[w, h] * (softmax_scale * LOG2E))
    for h in T.Parallel(spec.queries):
        alpha[h] = T.exp2(alpha[h] - m[h])
    for h in T.Parallel(spec.queries):
        limit[h] = (m[h] + SLACK) / (softmax_scale * LOG2E)
