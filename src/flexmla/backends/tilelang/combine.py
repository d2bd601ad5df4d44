"""Merges the partial states of rows that were cut between workers, in worker order; writes rows that see nothing."""

import tilelang.language as T

from .schedule import count_before, row_tiles

LN2 = 0.6931471805599453
WARPS = 4
VECTOR = 8  # elements a lane loads at once: 16 bytes
LOADS = 4  # states a lane has in flight


@T.macro
def combine(n_heads, dv, dtype, block_n, batch, max_len, workers, ways, parts, seq_lens, out, lse, part, part_lse):
    """The second launch, warps that share nothing; it may start early and waits where it needs the first one's results.

    Each head of a row is cut into `parts` runs of columns, a warp each, whose lanes hold `ways` states side by side:
    few states of many rows want few warps, many states of few rows want many loads in flight.
    """
    with T.Kernel(T.ceildiv(n_heads * parts, WARPS), batch, threads=32 * WARPS) as (block, row):
        T.annotate_min_blocks_per_sm(6)
        acc = T.alloc_local((VECTOR,), T.float32)
        value = T.alloc_local((LOADS, VECTOR), dtype)
        before = T.alloc_var(T.int32)
        total = T.alloc_var(T.int32)
        tiles = T.alloc_var(T.int32)
        tx = T.get_thread_binding()
        lane = tx % 32
        head = (block * WARPS + tx // 32) // parts
        run = (block * WARPS + tx // 32) % parts
        span = 32 // ways  # lanes of one state
        way = lane // span
        run_vectors = T.ceildiv(dv // VECTOR, parts)
        end = T.min((run + 1) * run_vectors, dv // VECTOR)
        count_before(seq_lens, batch, max_len, block_n, lane, row, before, total)
        row_tiles(seq_lens, row, max_len, block_n, tiles)
        T.pdl_sync()
        if head < n_heads:
            if tiles == 0:
                for k in T.serial(T.ceildiv(run_vectors, 32)):
                    vector = run * run_vectors + k * 32 + lane
                    if vector < end:
                        for v in T.vectorized(VECTOR):
                            out[row, head, vector * VECTOR + v] = 0
                if run == 0 and lane == 0:
                    lse[row, head] = -T.infinity(T.float32)
            else:
                chunk = T.ceildiv(total, workers)
                first = before // chunk
                states = (before + tiles - 1) // chunk - first + 1
                if states > 1:
                    top = T.alloc_var(T.float32)
                    denom = T.alloc_var(T.float32)
                    weight = T.alloc_var(T.float32)
                    top = -T.infinity(T.float32)
                    for z in T.serial(T.ceildiv(states, 32)):
                        if z * 32 + lane < states:
                            top = T.max(top, part_lse[slot(first, z * 32 + lane), head])
                    for d in T.unroll(5):
                        top = T.max(top, T.shfl_xor(top, 16 >> d))
                    denom = 0.0
                    for z in T.serial(T.ceildiv(states, 32)):
                        if z * 32 + lane < states:
                            denom += T.exp2(part_lse[slot(first, z * 32 + lane), head] - top)
                    for d in T.unroll(5):
                        denom += T.shfl_xor(denom, 16 >> d)
                    for k in T.serial(T.ceildiv(run_vectors, span)):
                        vector = run * run_vectors + k * span + lane % span
                        for v in T.unroll(VECTOR):
                            acc[v] = 0
                        for z in T.serial(T.ceildiv(states, 32)):
                            weight = 0.0
                            if z * 32 + lane < states:
                                weight = T.exp2(part_lse[slot(first, z * 32 + lane), head] - top)
                            some = T.min(states - z * 32, 32)
                            for j in T.serial(T.ceildiv(some, ways * LOADS)):
                                for u in T.unroll(LOADS):
                                    state = (j * LOADS + u) * ways + way
                                    if state < some and vector < end:
                                        for v in T.vectorized(VECTOR):
                                            value[u, v] = part[slot(first, z * 32 + state), head, vector * VECTOR + v]
                                    else:
                                        for v in T.vectorized(VECTOR):
                                            value[u, v] = 0
                                for u in T.unroll(LOADS):
                                    share = T.shfl_sync(weight, ((j * LOADS + u) * ways + way) % 32)
                                    for v in T.unroll(VECTOR):
                                        acc[v] += T.cast(value[u, v], T.float32) * share
                        for d in T.unroll(5):
                            for v in T.unroll(VECTOR):
                                acc[v] += T.if_then_else((16 >> d) >= span, 1.0, 0.0) * T.shfl_xor(acc[v], 16 >> d)
                        if way == 0 and vector < end:
                            for v in T.vectorized(VECTOR):
                                out[row, head, vector * VECTOR + v] = acc[v] / denom
                    if run == 0 and lane == 0:
                        lse[row, head] = (T.log2(denom) + top) * LN2


def slot(first, state):
    """Where state number `state` of a row is kept whose first worker is `first`."""
    return 2 * (first + state) + T.if_then_else(state == 0, 1, 0)
