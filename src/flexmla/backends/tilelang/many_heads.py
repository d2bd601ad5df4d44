"""Many heads: queries on the MMA's M (`S = Q K^T`, `O = P K`), 64 of them a CTA.

Two consumer warpgroups take turns with the tiles: each computes the scores and probabilities of every other tile, and
half of the output's width of all of them. Its own probabilities it multiplies from registers, the other's from shared
memory; its scores are multiplied while the other exponentiates. docs/kernels.md tells why it is built so.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from ...tiling import registers_per_thread
from .combine import LEAST, LN2
from .schedule import row_span
from .scores import LOG2E, SLACK

CONSUMERS = 256


def registers(spec):
    """Registers of a consumer and a producer thread: together 168 for each of 384 threads, as many as the launch gives.

    Wide outputs take what there is; producers that gather need more than those that start what the TMA unit copies.
    """
    most = registers_per_thread(spec.family, 1) - (16 if spec.vector > 0 else 0)
    consumer = {512: most, 384: 200}.get(spec.k, 184)
    return consumer, 3 * 168 - 2 * consumer


class Turns(NamedTuple):
    """What the warpgroups hand each other.

    Attributes:
        p: probabilities `[2, queries, block_n]`, of each warpgroup; or, where `spec.overlaid`, the rotary keys of all
            stages, whose first columns they overwrite.
        rows: float32 `[2, queries]`, of each warpgroup: maxima of the queries.
        sums: as rows: sums of the probabilities of its tiles.
        ready: two barriers: whether a warpgroup's probabilities and maxima are there.
        done: a barrier: whether both are through with a row.
    """

    p: Any
    rows: Any
    sums: Any
    ready: Any
    done: Any


@T.macro
def consume_many(
    spec, rows, sh, turns, results, softmax_scale, causal, group, worker, row: T.Ref, tile: T.Ref, left: T.Ref, tx
):
    """Both consumer warpgroups: `left` tiles from (`row`, `tile`) on; write results and partial states."""
    if tx < 128:
        consume_half(0, spec, rows, sh, turns, results, softmax_scale, causal, group, worker, row, tile, left, tx)
    else:
        consume_half(1, spec, rows, sh, turns, results, softmax_scale, causal, group, worker, row, tile, left, tx)


@T.macro
def consume_half(
    side, spec, rows, sh, turns, results, softmax_scale, causal, group, worker, row: T.Ref, tile: T.Ref, left: T.Ref, tx
):
    """One of them: columns `[side * dv / 2, (side + 1) * dv / 2)` of the output, and the scores of every other tile."""
    q_len = spec.q_len
    queries = spec.queries
    block_n = spec.block_n
    stages = spec.stages
    q_sh = sh.q
    q_full = sh.q_full
    q_empty = sh.q_empty
    sum_sh = turns.sums
    out = results.out
    lse = results.lse
    state = results.states
    sums = results.sums
    sums0 = results.sums0
    query0 = group * spec.block_q
    width = spec.k // 2
    col0 = side * width
    span = 1 << (width - 1).bit_length()  # of loops over columns: their index arithmetic stays shifts
    f32 = T.float32
    s = T.alloc_fragment((queries, block_n), f32)
    p = T.alloc_fragment((queries, block_n), spec.dtype)
    o = T.alloc_fragment((queries, width), f32)
    m = T.alloc_fragment((queries,), f32)
    alpha = T.alloc_fragment((queries,), f32)
    norm = T.alloc_fragment((queries,), f32)
    added = T.alloc_fragment((queries,), f32)
    moved = T.alloc_local((1,), T.int32)
    step = T.alloc_var(T.int32)
    seg = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    skipped = T.alloc_var(T.int32)
    T.inc_max_nreg(registers(spec)[0])
    step = 0
    seg = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        if count > 0:
            T.fill(o, 0)
            T.fill(m, LEAST)
            T.fill(alpha, 0)
            T.mbarrier_wait_parity(q_full, seg & 1)
            for h in T.Parallel(queries):
                sum_sh[side, h] = alpha[h]  # a fragment's: by the threads that will add to it
            T.fence_proxy_async()
            # from here on counted from the row's first tile here
            length -= (begin // block_n + tile) * block_n
            begin -= (begin // block_n + tile) * block_n
            skipped = (step + side) & 1  # whether the row's first tile here is the other's
            for j in T.serial(skipped, count + 1, 2):  # tiles of its own, and the one after the last
                now = step + j
                stage = now % stages
                low = begin - j * block_n
                high = length - j * block_n
                if T.And(j >= count - 1, left <= count):
                    T.pdl_trigger()  # the merge's CTAs may come: earlier they would only be in the way
                # Each branch waits for the products that it started: else the compiler makes all products wait at once.
                if j < count:
                    if side == 0:
                        if j > 0:
                            add_other(side, spec, sh, turns, now - 1, o, m, alpha, moved)
                            T.wait_wgmma(0)
                            give_back(side, sh.empty, (now - 1) % stages, tx)
                        score(side, spec, sh, stage, (now // stages) & 1, low, high, causal, s, added)
                        exponentiate(spec, softmax_scale, s, m, alpha, added)
                    else:
                        score(side, spec, sh, stage, (now // stages) & 1, low, high, causal, s, added)
                        if j > 0:
                            add_other(side, spec, sh, turns, now - 1, o, m, alpha, moved)
                            exponentiate(spec, softmax_scale, s, m, alpha, added)
                            T.wait_wgmma(0)
                            give_back(side, sh.empty, (now - 1) % stages, tx)
                        else:
                            exponentiate(spec, softmax_scale, s, m, alpha, added)
                    hand_over(side, spec, turns, now, s, p, m, alpha, added)
                    add_own(side, spec, sh, stage, p, o, alpha, moved, tx)
                else:
                    add_other(side, spec, sh, turns, now - 1, o, m, alpha, moved)
                    T.wait_wgmma(0)
                    give_back(side, sh.empty, (now - 1) % stages, tx)
            step += count
            # both have the same maximum now, each the sum of its tiles, and read the query tile for the last time
            T.mbarrier_arrive(turns.done)
            T.mbarrier_wait_parity(turns.done, seg & 1)
            for h in T.Parallel(queries):
                norm[h] = sum_sh[0, h] + sum_sh[1, h]
            for h in T.Parallel(queries):
                alpha[h] = T.if_then_else(norm[h] > 0, 1.0 / norm[h], 0)
            for h, c in T.Parallel(queries, width):
                o[h, c] *= alpha[h]
            # which the output passes through
            T.copy(o, q_sh[:, col0 : col0 + width])
            T.sync_threads(3 + side, 128)
            if count == tiles:
                for h, c in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and c < width:
                        out[row, h % q_len, (query0 // q_len) + h // q_len, col0 + c] = q_sh[h, col0 + c]
                if side == 0:
                    for h in T.Parallel(queries):
                        if h < spec.block_q and query0 + h < spec.n_queries:
                            lse[row, (query0 // q_len) + h // q_len, h % q_len] = (T.log2(norm[h]) + m[h]) * LN2
            else:
                slot = 2 * worker + T.if_then_else(tile == 0, 1, 0)
                for h, c in T.Parallel(spec.block_q, span):
                    if query0 + h < spec.n_queries and c < width:
                        state[slot, query0 + h, col0 + c] = q_sh[h, col0 + c]
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


@T.macro
def give_back(side, empty, stage, tx):
    """A warp has read its half of a tile's columns for the last time, and the other's probabilities of it."""
    if tx % 32 == 0:
        T.mbarrier_arrive(empty[2 * stage + side])


@T.macro
def score(side, spec, sh, stage, parity, low, high, causal, s, largest):
    """Scores of a tile, of each chunk of its columns as it comes, and their maxima; what nobody sees is taken out."""
    block_n = spec.block_n
    q_len = spec.q_len
    wide = spec.k // spec.chunks
    for i in tuple(range(spec.chunks)):
        c = (i + side * (spec.chunks // 2)) % spec.chunks  # in the order in which they come
        with_rope = i == spec.chunks // 2 and spec.rope > 0
        T.mbarrier_wait_parity(sh.full[stage * spec.chunks + c], parity)
        if spec.vector > 0:
            T.fence_proxy_async()
        if with_rope:
            T.wgmma_gemm(sh.q_rope, sh.kpe[stage, :, :], s, transpose_B=True, clear_accum=i == 0)
        T.wgmma_gemm(
            sh.q[:, c * wide : (c + 1) * wide],
            sh.ckv[stage, :, c * wide : (c + 1) * wide],
            s,
            transpose_B=True,
            clear_accum=i == 0 and not with_rope,
        )
    T.wait_wgmma(0)
    if T.max(low, block_n - high + causal * (q_len - 1)) > 0:
        for h, t in T.Parallel(spec.queries, block_n):
            unseen = causal * (q_len - 1 - h % q_len)
            s[h, t] = T.if_then_else(T.And(t >= low, t < high - unseen), s[h, t], -T.infinity(T.float32))
        if spec.vector == 0:
            # what lies outside the row may be NaN, and 0 * NaN is NaN
            for t in T.serial(block_n):
                if T.Or(t < low, t >= high):
                    for c in T.Parallel(spec.k):
                        sh.ckv[stage, t, c] = 0
            T.fence_proxy_async()
    T.reduce_max(s, largest, dim=1)


@T.macro
def shrink(spec, o, alpha, moved):
    """Multiplies the output with alpha, unless that is 1 for all queries of a warp: most maxima do not move."""
    moved[0] = 0
    for h in T.Parallel(spec.queries):
        if alpha[h] != 1:
            moved[0] = 1
    if T.any_sync(moved[0] != 0):
        for h, c in T.Parallel(spec.queries, spec.k // 2):
            o[h, c] *= alpha[h]


@T.macro
def add_other(side, spec, sh, turns, now, o, m, alpha, moved):
    """Starts the product of the other warpgroup's probabilities of tile `now` and this one's columns of it."""
    stage = now % spec.stages
    width = spec.k // 2
    T.mbarrier_wait_parity(turns.ready[1 - side], (now // 2) & 1)
    for h in T.Parallel(spec.queries):
        alpha[h] = T.exp2(m[h] - turns.rows[1 - side, h])
    for h in T.Parallel(spec.queries):
        m[h] = turns.rows[1 - side, h]
    shrink(spec, o, alpha, moved)
    T.wgmma_gemm(
        turns.p[stage if spec.overlaid else 1 - side, :, 0 : spec.block_n],
        sh.ckv[stage, :, side * width : side * width + width],
        o,
    )
    for h in T.Parallel(spec.queries):
        turns.sums[side, h] *= alpha[h]


@T.macro
def exponentiate(spec, softmax_scale, s, m, alpha, added):
    """Makes probabilities of a tile's scores, whose maxima are `added`; the maxima before are left in alpha.

    A maximum stays until a score exceeds it by far (`SLACK`), so that what was added up seldom has to shrink.
    """
    T.copy(m, alpha)
    for h in T.Parallel(spec.queries):
        m[h] = T.if_then_else(
            added[h] * (softmax_scale * LOG2E) - m[h] > SLACK, added[h] * (softmax_scale * LOG2E), m[h]
        )
    for h, t in T.Parallel(spec.queries, spec.block_n):
        s[h, t] = T.exp2(s[h, t] * (softmax_scale * LOG2E) - m[h])


@T.macro
def hand_over(side, spec, turns, now, s, p, m, alpha, added):
    """Gives the other warpgroup the probabilities of tile `now`; what the output shrinks by is left in alpha."""
    stage = now % spec.stages
    queries = spec.queries
    T.reduce_sum(s, added, dim=1)
    T.copy(s, p)
    # all four warps have read the tile's rotary keys, whose place the probabilities may take
    T.sync_threads(3 + side, 128)
    T.copy(p, turns.p[stage if spec.overlaid else side, :, 0 : spec.block_n])
    for h in T.Parallel(queries):
        turns.rows[side, h] = m[h]
    T.fence_proxy_async()
    T.mbarrier_arrive(turns.ready[side])
    for h in T.Parallel(queries):
        alpha[h] = T.exp2(alpha[h] - m[h])
    for h in T.Parallel(queries):
        turns.sums[side, h] = turns.sums[side, h] * alpha[h] + added[h]


@T.macro
def add_own(side, spec, sh, stage, p, o, alpha, moved, tx):
    """Multiplies its own probabilities of a tile with its columns of it."""
    width = spec.k // 2
    shrink(spec, o, alpha, moved)
    T.wgmma_gemm(p, sh.ckv[stage, :, side * width : side * width + width], o)
    T.wait_wgmma(0)
    give_back(side, sh.empty, stage, tx)
