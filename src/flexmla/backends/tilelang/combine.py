"""Merges the partial states of rows that were cut between workers, in worker order; writes rows that see nothing."""

import tilelang.language as T

from .schedule import count_before, row_tiles

LN2 = 0.6931471805599453
THREADS = 128
VECTOR = 8  # elements a thread loads at once: 16 bytes
LOADS = 4  # states a thread has in flight


@T.macro
def combine(n_heads, dv, dtype, block_n, batch, max_len, workers, seq_lens, out, lse, part, part_lse):
    """The second launch, a CTA a row and head; it may start early and waits where it needs the first one's results."""
    lanes = dv // VECTOR
    ways = THREADS // lanes  # states side by side
    with T.Kernel(n_heads, batch, threads=THREADS) as (head, row):
        T.annotate_min_blocks_per_sm(7)
        acc_sh = T.alloc_shared((ways, dv), T.float32)
        acc = T.alloc_local((VECTOR,), T.float32)
        value = T.alloc_local((LOADS, VECTOR), dtype)
        before = T.alloc_var(T.int32)
        total = T.alloc_var(T.int32)
        tiles = T.alloc_var(T.int32)
        tx = T.get_thread_binding()
        lane = tx % 32
        way = tx // lanes
        column = tx % lanes * VECTOR
        count_before(seq_lens, batch, max_len, block_n, lane, row, before, total)
        row_tiles(seq_lens, row, max_len, block_n, tiles)
        T.pdl_sync()
        if tiles == 0:
            if way == 0:
                for v in T.vectorized(VECTOR):
                    out[row, head, column + v] = 0
            if tx == 0:
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
                denom = 0.0
                for z in T.serial(T.ceildiv(states, 32)):
                    if z * 32 + lane < states:
                        top = T.max(top, part_lse[slot(first, z * 32 + lane), head])
                for d in T.unroll(5):
                    top = T.max(top, T.shfl_xor(top, 16 >> d))
                for v in T.unroll(VECTOR):
                    acc[v] = 0
                for z in T.serial(T.ceildiv(states, 32)):
                    weight = 0.0
                    if z * 32 + lane < states:
                        weight = T.exp2(part_lse[slot(first, z * 32 + lane), head] - top)
                    denom += weight
                    for k in T.serial(T.ceildiv(T.min(states - z * 32, 32), ways * LOADS)):
                        for u in T.unroll(LOADS):
                            state = (k * LOADS + u) * ways + way
                            if way < ways and state < T.min(states - z * 32, 32):
                                for v in T.vectorized(VECTOR):
                                    value[u, v] = part[slot(first, z * 32 + state), head, column + v]
                            else:
                                for v in T.vectorized(VECTOR):
                                    value[u, v] = 0
                        for u in T.unroll(LOADS):
                            share = T.shfl_sync(weight, ((k * LOADS + u) * ways + way) % 32)
                            for v in T.unroll(VECTOR):
                                acc[v] += T.cast(value[u, v], T.float32) * share
                for d in T.unroll(5):
                    denom += T.shfl_xor(denom, 16 >> d)
                if way < ways:
                    for v in T.vectorized(VECTOR):
                        acc_sh[way, column + v] = acc[v]
                T.sync_threads()
                if way == 0:
                    for v in T.unroll(VECTOR):
                        for w in T.unroll(1, ways):
                            acc[v] += acc_sh[w, column + v]
                    for v in T.vectorized(VECTOR):
                        out[row, head, column + v] = acc[v] / denom
                if tx == 0:
                    lse[row, head] = (T.log2(denom) + top) * LN2


def slot(first, state):
    """Where state number `state` of a row is kept whose first worker is `first`."""
    return 2 * (first + state) + T.if_then_else(state == 0, 1, 0)
