"""Merges the partial states of rows that were cut between workers, in worker order; writes rows that see nothing."""

import tilelang.language as T

from .schedule import Rows, count_before, row_span, tiles_each

LN2 = 0.6931471805599453
LEAST = -1e38  # below every score: what a maximum starts from, so that a query that sees nothing needs no case
WARPS = 4
VECTOR = 8  # elements a lane loads at once: 16 bytes
LOADS = 4  # states a lane has in flight; with the most ways, 8, they make 32
KEPT = 4  # sums that a lane keeps, all loaded at once: with a warp's other lanes those of 128 states


@T.macro
def combine(
    n_heads, q_len, dv, dtype, seq_lens, starts, has_starts, batch, capacity, block_n, workers, log_ways, log_parts,
    results, cluster=1,
):  # fmt: skip
    """The second launch, warps that share nothing; it may start early and waits where it needs the first one's results.

    Each query (a head of a query token) of a row is cut into `2**log_parts` runs of columns, a warp each, whose lanes
    hold `2**log_ways` states side by side: few states of many rows want few warps, many states of few rows want many
    loads in flight. The first loads of states are under way before their weights are known. Whatever an address is made
    of is a variable of 32 bits: written as an expression, it would be computed again, in 64 bits, for every load.
    """
    out = results.out
    lse = results.lse
    part = results.states
    sums = results.sums
    sums0 = results.sums0
    # TileLang gives all launches of a program the same clusters, which divide the grid
    blocks = T.ceildiv(n_heads * q_len * T.shift_left(1, log_parts), WARPS * cluster) * cluster
    with T.Kernel(blocks, batch, threads=32 * WARPS) as (block, row):
        T.annotate_min_blocks_per_sm(6)
        acc = T.alloc_local((VECTOR,), T.float32)
        value = T.alloc_local((LOADS, VECTOR), dtype)
        before = T.alloc_var(T.int32)
        total = T.alloc_var(T.int32)
        tiles = T.alloc_var(T.int32)
        tx = T.get_thread_binding()
        lane = tx % 32
        query = T.alloc_var(T.int32)
        run = T.alloc_var(T.int32)
        span = T.alloc_var(T.int32)
        way = T.alloc_var(T.int32)
        batch_states = T.alloc_var(T.int32)
        vector = T.alloc_var(T.int32)
        end = T.alloc_var(T.int32)
        first = T.alloc_var(T.int32)
        states = T.alloc_var(T.int32)
        state = T.alloc_var(T.int32)
        run_vectors = T.alloc_var(T.int32)
        begin = T.alloc_var(T.int32)
        length = T.alloc_var(T.int32)
        # the next call's decode may come while this waits: it waits in turn for all of this to be written
        T.pdl_trigger()
        query = T.shift_right(block * WARPS + tx // 32, log_parts)
        run = block * WARPS + tx // 32 - T.shift_left(query, log_parts)
        batch_states = T.shift_left(LOADS, log_ways)
        span = T.shift_right(32, log_ways)  # lanes of one state
        way = T.shift_right(lane, 5 - log_ways)
        run_vectors = T.shift_right(dv // VECTOR + T.shift_left(1, log_parts) - 1, log_parts)
        vector = run * run_vectors
        end = T.min(vector + run_vectors, dv // VECTOR)
        rows = Rows(seq_lens, starts, has_starts, batch, capacity, block_n)
        count_before(rows, lane, row, before, total)
        row_span(rows, row, begin, length, tiles)
        total = T.max(tiles_each(total, workers), 1)
        first = T.truncdiv(before, total)
        states = T.if_then_else(tiles > 0, T.truncdiv(before + tiles - 1, total) - first + 1, 0)
        T.pdl_sync()
        if query < n_heads * q_len:
            if states == 0:
                vector += lane
                while vector < end:
                    for v in T.vectorized(VECTOR):
                        out[row, query % q_len, query // q_len, vector * VECTOR + v] = 0
                    vector += 32
                if run == 0 and lane == 0:
                    lse[row, query // q_len, query % q_len] = -T.infinity(T.float32)
            elif states > 1:
                top = T.alloc_var(T.float32)
                denom = T.alloc_var(T.float32)
                weight = T.alloc_var(T.float32)
                fresh = T.alloc_var(T.int32)
                kept = T.alloc_local((KEPT,), T.float32)
                for z in T.unroll(KEPT):
                    kept[z] = -T.infinity(T.float32)
                    if z * 32 + lane < states:
                        kept[z] = sums[sums0 + slot(first, z * 32 + lane), query]
                vector += lane - T.shift_left(way, 5 - log_ways)
                load_states(part, value, first, states, way, log_ways, query, vector, end)
                fresh = 1
                top = LEAST
                for z in T.unroll(KEPT):
                    top = T.max(top, kept[z])
                for z in T.serial(KEPT, T.ceildiv(states, 32)):
                    if z * 32 + lane < states:
                        top = T.max(top, sums[sums0 + slot(first, z * 32 + lane), query])
                for d in T.unroll(5):
                    top = T.max(top, T.shfl_xor(top, 16 >> d))
                denom = 0
                for z in T.unroll(KEPT):
                    denom += T.exp2(kept[z] - top)
                for z in T.serial(KEPT, T.ceildiv(states, 32)):
                    if z * 32 + lane < states:
                        denom += T.exp2(sums[sums0 + slot(first, z * 32 + lane), query] - top)
                for d in T.unroll(5):
                    denom += T.shfl_xor(denom, 16 >> d)
                for _ in T.serial(T.shift_right(run_vectors + span - 1, 5 - log_ways)):
                    for v in T.unroll(VECTOR):
                        acc[v] = 0
                    state = way
                    while state - way < states:
                        if fresh == 0:
                            load_states(part, value, first, states, state, log_ways, query, vector, end)
                        fresh = 0
                        # batches of states divide 32, so that one batch's weights are in one register of the warp
                        if (state - way) % 32 == 0:
                            weight = kept[0]
                            for z in T.unroll(1, KEPT):
                                weight = T.if_then_else(state - way == z * 32, kept[z], weight)
                            if state - way >= KEPT * 32:
                                weight = -T.infinity(T.float32)
                                if state - way + lane < states:
                                    weight = sums[sums0 + slot(first, state - way + lane), query]
                            weight = T.exp2(weight - top)
                        for u in T.unroll(LOADS):
                            share = T.shfl_sync(weight, (state + T.shift_left(u, log_ways)) % 32)
                            for v in T.unroll(VECTOR):
                                acc[v] += T.cast(value[u, v], T.float32) * share
                        state += batch_states
                    for d in T.unroll(5):
                        for v in T.unroll(VECTOR):
                            acc[v] += T.if_then_else((16 >> d) >= span, 1.0, 0.0) * T.shfl_xor(acc[v], 16 >> d)
                    if way == 0 and vector < end:
                        for v in T.vectorized(VECTOR):
                            out[row, query % q_len, query // q_len, vector * VECTOR + v] = T.if_then_else(
                                denom > 0, acc[v] / denom, 0
                            )
                    vector += span
                if run == 0 and lane == 0:
                    lse[row, query // q_len, query % q_len] = (T.log2(denom) + top) * LN2


@T.macro
def load_states(part, value, first, states, state, log_ways, query, vector, end):
    """`value[u]` = a vector of each of the states `state + u * 2**log_ways`, zeros past the last state or column."""
    for u in T.unroll(LOADS):
        if state + T.shift_left(u, log_ways) < states and vector < end:
            for v in T.vectorized(VECTOR):
                value[u, v] = part[slot(first, state + T.shift_left(u, log_ways)), query, vector * VECTOR + v]
        else:
            for v in T.vectorized(VECTOR):
                value[u, v] = 0


def slot(first, state):
    """Where state number `state` of a row is kept whose first worker is `first`."""
    return 2 * (first + state) + T.if_then_else(state == 0, 1, 0)
