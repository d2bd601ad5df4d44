"""The producer warps of a decode CTA: one streams cache tiles, one fetches queries a row ahead of need.

Cache tiles come by TMA where rows are aligned and a tile lies inside one page, else token by token (`gather_tiles`).
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .schedule import row_span


class Caches(NamedTuple):
    """The caches, what finds a token in them, and the ring of stages they are loaded into.

    Attributes:
        ckv: `[n_pages, page_size, dv]`; the rows of contiguous caches count as pages.
        kpe: `[n_pages, page_size, n_rope_heads * d_pe]`, by TMA; `[n_pages, page_size, n_rope_heads, d_pe]`, gathered.
        block_table: int32 `[batch, max_pages]`, a stand-in where `paged` is not.
        log_page: two's logarithm of page_size.
        paged: whether block_table is looked at.
        ckv_sh: `[stages, block_n, dv]`.
        kpe_sh: `[stages, block_n, rope]`.
        rope: columns of a rotary-key tile, 0 for none.
        rope_head0: first rotary key of the CTA's heads.
        full, empty: a barrier a stage.
    """

    ckv: Any
    kpe: Any
    block_table: Any
    log_page: Any
    paged: bool
    ckv_sh: Any
    kpe_sh: Any
    rope: int
    rope_head0: Any
    d_pe: int
    full: Any
    empty: Any


@T.macro
def stream_tiles(caches, rows, stages, row: T.Ref, tile: T.Ref, left: T.Ref):
    """A warp copies `left` tiles from (`row`, `tile`) on into the ring of stages; TMA zero-fills past the cache."""
    block_n, rope = rows.block_n, caches.rope
    column = caches.rope_head0 * caches.d_pe
    step = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    page = T.alloc_var(T.int32)
    slot = T.alloc_var(T.int32)
    step = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        for j in T.serial(count):
            stage = step % stages
            page = row
            slot = (begin // block_n + tile + j) * block_n
            if caches.paged:
                page = caches.block_table[row, T.shift_right(slot, caches.log_page)]
                slot = slot & (T.shift_left(1, caches.log_page) - 1)
            T.mbarrier_wait_parity(caches.empty[stage], ((step // stages) & 1) ^ 1)
            if rope > 0:
                T.tma_copy(
                    caches.kpe[page, slot : slot + block_n, column : column + rope],
                    caches.kpe_sh[stage, :, :],
                    barrier=caches.full[stage],
                    leader_scope_threads=32,
                )
            T.tma_copy(
                caches.ckv[page, slot : slot + block_n, :],
                caches.ckv_sh[stage, :, :],
                barrier=caches.full[stage],
                leader_scope_threads=32,
            )
            T.mbarrier_arrive(caches.full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def gather_tiles(caches, rows, stages, vector, dv, n_rope_heads, lane, row: T.Ref, tile: T.Ref, left: T.Ref):
    """As `stream_tiles`, a token at a time, with zeros for the slots that are not visible.

    A lane copies `vector` elements at once: 8 by cp.async, where everything is aligned to 16 bytes, or 1. A page
    number that is none reads nothing.
    """
    block_n, rope = rows.block_n, caches.rope
    lanes = 32 * vector
    per_key = max(caches.d_pe, 1)
    step = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    first = T.alloc_var(T.int32)
    page = T.alloc_var(T.int32)
    slot = T.alloc_var(T.int32)
    mask = T.alloc_var(T.int32)
    pages = T.alloc_local((2,), T.int32)
    mask = T.shift_left(1, caches.log_page) - 1
    step = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        for j in T.serial(count):
            stage = step % stages
            first = (begin // block_n + tile + j) * block_n
            for half in T.unroll(2):
                pages[half] = -1
                if first + half * 32 + lane >= begin and first + half * 32 + lane < length:
                    pages[half] = caches.block_table[row, T.shift_right(first + half * 32 + lane, caches.log_page)]
                    if pages[half] >= caches.ckv.shape[0]:
                        pages[half] = -1
            T.mbarrier_wait_parity(caches.empty[stage], ((step // stages) & 1) ^ 1)
            for half in T.unroll(2):
                for i in T.serial(32):
                    page = T.shfl_sync(pages[half], i)
                    slot = (first + half * 32 + i) & mask
                    for u in T.unroll(-(-dv // lanes)):
                        column = u * lanes + lane * vector
                        if column < dv:
                            if vector > 1:
                                T.ptx_cp_async(
                                    T.access_ptr(caches.ckv_sh[stage, half * 32 + i, column], "w", vector),
                                    T.access_ptr(caches.ckv[page, slot, column], "r", vector),
                                    vector,
                                    page >= 0,
                                )
                            else:
                                caches.ckv_sh[stage, half * 32 + i, column] = T.if_then_else(
                                    page >= 0, caches.ckv[page, slot, column], 0
                                )
                    if rope > 0:
                        for u in T.unroll(-(-rope // lanes)):
                            column = u * lanes + lane * vector
                            key = caches.rope_head0 + column // per_key
                            if column < rope:
                                if vector > 1:
                                    T.ptx_cp_async(
                                        T.access_ptr(caches.kpe_sh[stage, half * 32 + i, column], "w", vector),
                                        T.access_ptr(caches.kpe[page, slot, key, column % per_key], "r", vector),
                                        vector,
                                        T.And(page >= 0, key < n_rope_heads),
                                    )
                                else:
                                    caches.kpe_sh[stage, half * 32 + i, column] = T.if_then_else(
                                        T.And(page >= 0, key < n_rope_heads),
                                        caches.kpe[page, slot, key, column % per_key],
                                        0,
                                    )
            if vector > 1:
                T.cp_async_barrier_noinc(caches.full[stage])
            T.mbarrier_arrive(caches.full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def fetch_queries(
    q_nope, q_pe, q_sh, q_rope_sh, rows, n_queries, block_q, queries, q_len, rep, d_pe, rope, query0,
    q_full, q_empty, row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """A warp loads each row's queries; the rotary part stays zero where a query and a key of the tile do not match."""
    if rope > 0:
        for h, c in T.Parallel(queries, rope):
            q_rope_sh[h, c] = 0
        T.sync_warp()
    seg = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    seg = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        if count > 0:
            T.mbarrier_wait_parity(q_empty, (seg & 1) ^ 1)
            T.tma_copy(q_nope[row, query0 : query0 + queries, :], q_sh, barrier=q_full, leader_scope_threads=32)
            if rope > 0:
                for h, c in T.Parallel(block_q, d_pe):
                    if query0 + h < n_queries:
                        key = (query0 + h) // (q_len * rep) - query0 // (q_len * rep)
                        q_rope_sh[h, key * d_pe + c] = q_pe[row, query0 + h, c]
                T.fence_proxy_async()
            T.mbarrier_arrive(q_full)
            seg += 1
        left -= count
        row += 1
        tile = 0
