"""The producer warps of a decode CTA: one streams cache tiles, one fetches queries a row ahead of need.

Cache tiles come by TMA where rows are aligned and a tile lies inside one page, else token by token (`gather_tiles`).
"""

from typing import Any, NamedTuple

import tilelang.language as T

from .schedule import row_span

TOGETHER = 8  # copies of a lane that are written out side by side, so that their latencies overlap


class Caches(NamedTuple):
    """The caches, what finds a token in them, and the ring of stages they are loaded into.

    Attributes:
        ckv: `[n_pages, page_size, dv]`; the rows of contiguous caches count as pages.
        kpe: `[n_pages, page_size, n_rope_heads, d_pe]`, or several keys as `[n_pages, page_size, n_rope_heads * d_pe]`.
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
                if len(caches.kpe.shape) == 4:
                    T.tma_copy(
                        caches.kpe[page, slot : slot + block_n, 0, 0:rope],
                        caches.kpe_sh[stage, :, :],
                        barrier=caches.full[stage],
                        leader_scope_threads=32,
                    )
                else:
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
def gather_tiles(caches, rows, stages, vector, dv, warps, warp, lane, row: T.Ref, tile: T.Ref, left: T.Ref):
    """As `stream_tiles`, by `warps` warps and a token at a time, with zeros for the slots that are not visible.

    A lane copies `vector` elements at once: 8 by cp.async, where everything is aligned to 16 bytes, or 1. A page
    number that is none reads nothing.
    """
    block_n, rope = rows.block_n, caches.rope
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
                gather_part(
                    caches.ckv, caches.ckv_sh, pages[half], first, mask, half, stage, vector, dv, dv, 0, warps, warp,
                    lane,
                )  # fmt: skip
                if rope > 0:
                    gather_part(
                        caches.kpe, caches.kpe_sh, pages[half], first, mask, half, stage, vector, rope, caches.d_pe,
                        caches.rope_head0, warps, warp, lane,
                    )  # fmt: skip
            if vector > 1:
                T.cp_async_barrier_noinc(caches.full[stage])
            T.mbarrier_arrive(caches.full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def gather_part(cache, tile_sh, my_page, first, mask, half, stage, vector, width, per_key, key0, warps, warp, lane):
    """Copies rows of `width` elements of 32 tokens, a lane `vector` elements at once; lane i knows token i's page."""
    page = T.alloc_var(T.int32)
    together = min(TOGETHER, width // vector)
    chunks = width // vector // together
    for some in T.serial(-(-chunks // warps)):
        chunk = some * warps + (warp + half) % warps  # the warps take turns, and another begins each half
        # a guard: of a loop whose number of rounds, 0 or 1, depends on the warp, TileLang takes it for 1
        if chunk < chunks:
            for i in T.unroll(together):
                place = ((chunk * together + i) * 32 + lane) * vector
                token = place // width
                column = place % width
                page = T.shfl_sync(my_page, token)
                slot = (first + half * 32 + token) & mask
                if len(cache.shape) == 3:
                    if vector > 1:
                        T.ptx_cp_async(
                            T.access_ptr(tile_sh[stage, half * 32 + token, column], "w", vector),
                            T.access_ptr(cache[page, slot, column], "r", vector),
                            vector,
                            page >= 0,
                        )
                    else:
                        tile_sh[stage, half * 32 + token, column] = T.if_then_else(
                            page >= 0, cache[page, slot, column], 0
                        )
                else:
                    key = key0 + column // per_key
                    there = T.And(page >= 0, key < cache.shape[2])
                    if vector > 1:
                        T.ptx_cp_async(
                            T.access_ptr(tile_sh[stage, half * 32 + token, column], "w", vector),
                            T.access_ptr(cache[page, slot, key, column % per_key], "r", vector),
                            vector,
                            there,
                        )
                    else:
                        tile_sh[stage, half * 32 + token, column] = T.if_then_else(
                            there, cache[page, slot, key, column % per_key], 0
                        )


@T.macro
def fetch_queries(
    q_nope, q_pe, q_sh, q_rope_sh, rows, n_heads, block_q, queries, q_len, rep, d_pe, rope, head0, q_full, q_empty,
    lane, row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """A warp loads each row's queries; the rotary part stays zero where a query and a key of the tile do not match."""
    dv = q_sh.shape[1]
    copied = q_len > 1 or rope > 0  # besides what the TMA unit does
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
            if q_len == 1:
                T.tma_copy(q_nope[row, 0, head0 : head0 + queries, :], q_sh, barrier=q_full, leader_scope_threads=32)
            else:
                for some in T.serial(queries * dv // (256 * 4)):
                    for u in T.unroll(4):
                        place = ((some * 4 + u) * 32 + lane) * 8
                        query = place // dv
                        head = head0 + query // q_len
                        T.ptx_cp_async(
                            T.access_ptr(q_sh[query, place % dv], "w", 8),
                            T.access_ptr(q_nope[row, query % q_len, head, place % dv], "r", 8),
                            8,
                            T.And(query < block_q, head < n_heads),
                        )
            if rope > 0:
                for some in T.serial(-(-block_q * d_pe // 256)):
                    place = (some * 32 + lane) * 8
                    query = place // d_pe
                    head = head0 + query // q_len
                    if query < block_q and head < n_heads:
                        key = head // rep - head0 // rep
                        T.ptx_cp_async(
                            T.access_ptr(q_rope_sh[query, key * d_pe + place % d_pe], "w", 8),
                            T.access_ptr(q_pe[row, query % q_len, head, place % d_pe], "r", 8),
                            8,
                        )
            if copied:
                T.cp_async_barrier_noinc(q_full)
            T.mbarrier_arrive(q_full)
            seg += 1
        left -= count
        row += 1
        tile = 0
