"""The producer warps of a decode CTA: one streams cache tiles, one fetches queries a row ahead of need.

Cache tiles come by TMA where rows are aligned and pages hold at least sixteen tokens, else token by token
(`gather_tiles`). A tile that does not lie inside one page is copied in boxes that do.
"""

from math import gcd
from typing import Any, NamedTuple

import tilelang.language as T

from ...tiling import PANEL
from .schedule import row_span

# Copies of a lane that are written out side by side, by the elements of one: few of 16 bytes, so that a tile's are
# shared out evenly over the warps; of single elements, which pass through registers, as many as these allow.
TOGETHER = {8: 4, 1: 8}
# The place of a token that is not there: cp.async reads nothing, but may want an address that is aligned.
NOWHERE = -8


class Caches(NamedTuple):
    """The caches, what finds a token in them, and where a CTA's columns begin.

    Attributes:
        ckv: `[n_pages, page_size, dv]`; the rows of contiguous caches count as pages.
        kpe: `[n_pages, page_size, n_rope_heads, d_pe]`, or several keys as `[n_pages, page_size, n_rope_heads * d_pe]`.
        v: `[n_pages, page_size, width]`, a stand-in where values are latents.
        scale: `[n_pages, page_size, scale_heads]`, a stand-in where there is none.
        block_table: int32 `[batch, max_pages]`, a stand-in where `paged` is not.
        log_page: two's logarithm of page_size.
        paged: whether block_table is looked at.
        k0, v0: first column of the CTA's part of latents and values.
        rope0: first column of the CTA's rotary keys, of all of a token's keys side by side.
        scale0: first multiplier of the CTA's heads.
    """

    ckv: Any
    kpe: Any
    v: Any
    scale: Any
    block_table: Any
    log_page: Any
    paged: bool
    k0: Any
    v0: Any
    rope0: Any
    scale0: Any


@T.macro
def stream_tiles(spec, caches, rows, sh, lane, row: T.Ref, tile: T.Ref, left: T.Ref):
    """A warp copies `left` tiles from (`row`, `tile`) on into the ring of stages; TMA zero-fills past the cache."""
    block_n = spec.block_n
    rope = spec.rope
    stages = spec.stages
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
            if spec.boxes > 1:
                find_boxes(spec, caches, lane, row, slot, begin, length, page)
            elif caches.paged:
                page = caches.block_table[row, T.shift_right(slot, caches.log_page)]
                slot = slot & (T.shift_left(1, caches.log_page) - 1)
            if spec.chunks > 1:
                if (step & 1) == 0:
                    stream_halves(0, spec, caches, sh, stage, ((step // stages) & 1) ^ 1, page, slot)
                else:
                    stream_halves(1, spec, caches, sh, stage, ((step // stages) & 1) ^ 1, page, slot)
            else:
                T.mbarrier_wait_parity(sh.empty[stage], ((step // stages) & 1) ^ 1)
                if rope > 0:
                    stream_rope(spec, caches, sh, stage, 0, page, slot)
                stream_chunk(spec, caches, sh, stage, 0, page, slot)
            if spec.v > 0:
                stream_columns(spec, caches, caches.v, caches.v0, sh, sh.v, 0, spec.v, stage, 0, page, slot)
            if spec.scales > 0:
                for half in T.unroll(block_n // 32):
                    token = half * 32 + lane
                    owner = page
                    if spec.boxes > 1:
                        owner = T.shfl_sync(page, token // box_tokens(spec))
                    fetch_scales(
                        spec, caches, sh.scale, stage, token, owner, in_page(spec, caches, slot + token),
                        (begin // block_n + tile + j) * block_n + token, begin, length,
                    )  # fmt: skip
            if spec.chunks == 1:
                T.mbarrier_arrive(sh.full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


def eviction(spec):
    """What L2 is told of a tile: one that this CTA alone reads is not worth keeping."""
    return "evict_first" if spec.streams else None


@T.macro
def stream_halves(owner, spec, caches, sh, stage, parity, page: T.Ref, slot: T.Ref):
    """Starts the copies of a tile whose scores warpgroup `owner` of `many_heads` computes.

    Its own half of the columns comes first, as it gives that back first; the other's half with the rotary keys, whose
    place its probabilities take until the other warpgroup has read them.
    """
    each = spec.chunks // 2
    for half in (owner, 1 - owner):
        T.mbarrier_wait_parity(sh.empty[2 * stage + half], parity)
        if half != owner and spec.rope > 0:
            stream_rope(spec, caches, sh, stage, half * each, page, slot)
        for c in tuple(range(half * each, half * each + each)):  # written out
            stream_chunk(spec, caches, sh, stage, c, page, slot)
            T.mbarrier_arrive(sh.full[stage * spec.chunks + c])


def box_tokens(spec):
    """Tokens that one copy takes."""
    return spec.block_n // spec.boxes


def in_page(spec, caches, slot):
    """The place in its page of a slot that may lie past the page."""
    return slot & (T.shift_left(1, caches.log_page) - 1) if spec.boxes > 1 else slot


@T.macro
def find_boxes(spec, caches, lane, row, slot, begin, length, page: T.Ref):
    """Lane i gets the page of box i, or -1, which TMA fills with zeros, where none of its slots is visible."""
    first = slot + lane * box_tokens(spec)
    page = -1
    if lane < spec.boxes and first < length and first + box_tokens(spec) > begin:
        page = caches.block_table[row, T.shift_right(first, caches.log_page)]


@T.macro
def stream_rope(spec, caches, sh, stage, chunk, page: T.Ref, slot: T.Ref):
    """Starts the copy of a tile's rotary keys, which come with a chunk of its columns."""
    stream_columns(spec, caches, caches.kpe, caches.rope0, sh, sh.kpe, 0, spec.rope, stage, chunk, page, slot)


@T.macro
def stream_chunk(spec, caches, sh, stage, chunk, page: T.Ref, slot: T.Ref):
    """Starts the copy of a chunk of a tile's columns."""
    wide = spec.k // spec.chunks
    first = chunk * wide
    stream_columns(spec, caches, caches.ckv, caches.k0 + first, sh, sh.ckv, first, wide, stage, chunk, page, slot)


@T.macro
def stream_columns(
    spec, caches, cache, column0, sh, tile_sh, to0, width, stage, chunk, page: T.Ref, slot: T.Ref,
):  # fmt: skip
    """Starts the copy of columns `[column0, column0 + width)` of a tile, box by box where its pages are small."""
    tokens = box_tokens(spec)
    if spec.boxes == 1:
        T.tma_copy(
            region(cache, page, slot, tokens, column0, width),
            tile_sh[stage, :, to0 : to0 + width],
            barrier=sh.full[stage * spec.chunks + chunk],
            leader_scope_threads=32,
            eviction_policy=eviction(spec),
        )
    else:
        box_page = T.alloc_var(T.int32)
        box_slot = T.alloc_var(T.int32)
        for box in T.unroll(spec.boxes):
            box_page = T.shfl_sync(page, box)
            box_slot = in_page(spec, caches, slot + box * tokens)
            for panel in T.unroll(width // min(width, PANEL)):  # rows of one lie side by side
                at = panel * PANEL
                T.tma_copy(
                    region(cache, box_page, box_slot, tokens, column0 + at, min(width, PANEL)),
                    tile_sh[stage, box * tokens : (box + 1) * tokens, to0 + at : to0 + at + min(width, PANEL)],
                    barrier=sh.full[stage * spec.chunks + chunk],
                    leader_scope_threads=32,
                    eviction_policy=eviction(spec),
                )


def region(cache, page, slot, tokens, column0, width):
    """Columns of some tokens of a page; of several keys all lie side by side, of one there is a dimension."""
    if len(cache.shape) == 4:
        return cache[page, slot : slot + tokens, 0, column0 : column0 + width]
    return cache[page, slot : slot + tokens, column0 : column0 + width]


@T.macro
def fetch_scales(spec, caches, scale_sh, stage, token, page, slot, position, begin, length):
    """A lane loads one token's multipliers for the CTA's heads; where no visible token lies nothing is read."""
    for key in T.serial(spec.scales):
        scale_sh[stage, token, key] = 0
        visible = position >= begin and position < length and page >= 0 and page < caches.scale.shape[0]
        if visible and caches.scale0 + key < spec.scale_heads:
            scale_sh[stage, token, key] = T.cast(caches.scale[page, slot, caches.scale0 + key], T.float32)


@T.macro
def gather_tiles(spec, caches, rows, sh, warps, warp, lane, row: T.Ref, tile: T.Ref, left: T.Ref):
    """As `stream_tiles`, by `warps` warps and a token at a time, with zeros for the slots that are not visible.

    A lane copies `spec.vector` elements at once: 8 by cp.async, where everything is aligned to 16 bytes, or 1. A page
    number that is none reads nothing.
    """
    block_n = spec.block_n
    stages = spec.stages
    step = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    first = T.alloc_var(T.int32)
    mask = T.alloc_var(T.int32)
    found = T.alloc_local((2,), T.int32)
    pages = T.alloc_local((2,), T.int32)
    ckv_at = T.alloc_local((2,), T.int64)
    kpe_at = T.alloc_local((2,), T.int64)
    v_at = T.alloc_local((2,), T.int64)
    mask = T.shift_left(1, caches.log_page) - 1
    step = 0
    while left > 0:
        row_span(rows, row, begin, length, tiles)
        count = T.min(tiles - tile, left)
        first = (begin // block_n + tile) * block_n
        if count > 0:
            find_pages(caches, row, first, begin, length, lane, found)
        for j in T.serial(count):
            stage = step % stages
            first = (begin // block_n + tile + j) * block_n
            for half in T.unroll(2):
                pages[half] = T.if_then_else(found[half] < caches.ckv.shape[0], found[half], -1)
            find_rows(caches.ckv, pages, first, mask, lane, ckv_at)
            if spec.rope > 0:
                find_rows(caches.kpe, pages, first, mask, lane, kpe_at)
            if spec.v > 0:
                find_rows(caches.v, pages, first, mask, lane, v_at)
            # a tile ahead, as the numbers come from memory
            find_pages(caches, row, first + block_n, begin, length, lane, found)
            for half in tuple(range(spec.halves)):
                T.mbarrier_wait_parity(sh.empty[stage * spec.halves + half], ((step // stages) & 1) ^ 1)
            for half in T.unroll(2):
                gather_part(
                    spec, caches.ckv, sh.ckv, ckv_at[half], half, stage, spec.k, caches.k0, spec.dv, warps, warp, lane
                )
                if spec.rope > 0:
                    gather_part(
                        spec, caches.kpe, sh.kpe, kpe_at[half], half, stage, spec.rope, caches.rope0, spec.d_pe,
                        warps, warp, lane,
                    )  # fmt: skip
                if spec.v > 0:
                    gather_part(
                        spec, caches.v, sh.v, v_at[half], half, stage, spec.v, caches.v0, spec.width, warps, warp, lane
                    )
                if spec.scales > 0 and warp == half % warps:
                    fetch_scales(
                        spec, caches, sh.scale, stage, half * 32 + lane, pages[half],
                        (first + half * 32 + lane) & mask, first + half * 32 + lane, begin, length,
                    )  # fmt: skip
            if spec.vector > 1:
                T.cp_async_barrier_noinc(sh.full[stage])
            T.mbarrier_arrive(sh.full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def find_pages(caches, row, first, begin, length, lane, found):
    """A lane gets the pages of two tokens of a tile, or -1 where they are not visible."""
    for half in T.unroll(2):
        found[half] = -1
        if first + half * 32 + lane >= begin and first + half * 32 + lane < length:
            found[half] = caches.block_table[row, T.shift_right(first + half * 32 + lane, caches.log_page)]


@T.macro
def find_rows(cache, pages, first, mask, lane, at):
    """A lane works out for all that copy them where two tokens of a tile lie in a cache, or NOWHERE."""
    for half in T.unroll(2):
        at[half] = NOWHERE
        if pages[half] >= 0:
            at[half] = pages[half] * cache.strides[0] + ((first + half * 32 + lane) & mask) * cache.strides[1]


def rounds(spec, vectors, count):
    """A loop that nvcc unrolls, so that the latencies of many copies overlap, where registers allow it.

    They do not where every copy takes one for what it loads (single elements), nor those of the producers of
    `many_heads` where the lanes of a copy have several tokens: each has its addresses.
    """
    if spec.vector == 1 or (spec.family == "many_heads" and vectors % 32):
        return T.unroll(count, annotations={"pragma_unroll_factor": 1})
    return T.serial(count)


@T.macro
def gather_part(spec, cache, tile_sh, mine, half, stage, width, column0, per_key, warps, warp, lane):
    """Copies columns `[column0, column0 + width)` of 32 tokens, zeros past the last; lane i knows token i's place.

    `per_key` is the width of a key, or of the latent, whose columns are one key's.
    """
    vector = spec.vector
    token_at = T.alloc_var(T.int64)
    vectors = width // vector
    together = min(TOGETHER[vector], vectors)
    pieces = 1 if vectors % 32 else gcd(vectors // 32, together)  # copies next to each other that are of one token
    chunks = vectors // together
    for some in rounds(spec, vectors, -(-chunks // warps)):
        chunk = some * warps + (warp + half) % warps  # the warps take turns, and another begins each half
        # a guard: of a loop whose number of rounds, 0 or 1, depends on the warp, TileLang takes it for 1
        if chunk < chunks:
            for i in T.unroll(together // pieces):
                token = (((chunk * together + i * pieces) * 32 + lane) * vector) // width
                token_at = T.shfl_sync(mine, token)
                for piece in T.unroll(pieces):
                    column = (((chunk * together + i * pieces + piece) * 32 + lane) * vector) % width
                    there = token_at != NOWHERE
                    key = 0
                    at = column0 + column
                    if len(cache.shape) == 4:
                        key = at // per_key
                        at = at % per_key
                        there = T.And(there, key < cache.shape[2])
                    elif width > per_key or spec.parts > 1:
                        there = T.And(there, at < per_key)
                    # the last index takes all of the token's place, which the dimension's bounds do not limit
                    source = cache[0, 0, key, token_at + at] if len(cache.shape) == 4 else cache[0, 0, token_at + at]
                    if vector > 1:
                        T.ptx_cp_async(
                            T.access_ptr(tile_sh[stage, half * 32 + token, column], "w", vector),
                            T.access_ptr(source, "r", vector),
                            vector,
                            there,
                        )
                    else:
                        tile_sh[stage, half * 32 + token, column] = T.if_then_else(there, source, 0)


@T.macro
def fetch_queries(
    spec, q_nope, q_pe, sh, rows, group, part, rope0, lane, row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """A warp loads each row's queries; the rotary part stays zero where a query and a key of the tile do not match."""
    q_len = spec.q_len
    queries = spec.queries
    d_pe = spec.d_pe
    rope = spec.rope
    k = spec.k
    head0 = group * spec.block_h
    k0 = part * k
    lanes = 8 if d_pe % 8 == 0 else 1  # elements of a rotary query that a lane copies at once
    q_sh = sh.q
    q_rope_sh = sh.q_rope
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
            T.mbarrier_wait_parity(sh.q_empty, (seg & 1) ^ 1)
            if q_len == 1:
                T.tma_copy(
                    q_nope[row, 0, head0 : head0 + queries, k0 : k0 + k], q_sh, barrier=sh.q_full,
                    leader_scope_threads=32,
                )  # fmt: skip
            else:
                for some in T.serial(queries * k // (256 * 4)):
                    for u in T.unroll(4):
                        place = ((some * 4 + u) * 32 + lane) * 8
                        query = place // k
                        head = head0 + query // q_len
                        T.ptx_cp_async(
                            T.access_ptr(q_sh[query, place % k], "w", 8),
                            T.access_ptr(q_nope[row, query % q_len, head, k0 + place % k], "r", 8),
                            8,
                            T.And(T.And(query < spec.block_q, head < spec.n_heads), k0 + place % k < spec.dv),
                        )
            if rope > 0:
                for some in T.serial(-(-spec.block_q * d_pe // (32 * lanes))):
                    place = (some * 32 + lane) * lanes
                    query = place // d_pe
                    head = head0 + query // q_len
                    column = head // spec.rep * d_pe + place % d_pe - rope0
                    if query < spec.block_q and head < spec.n_heads and column >= 0 and column < rope:
                        if lanes > 1:
                            T.ptx_cp_async(
                                T.access_ptr(q_rope_sh[query, column], "w", lanes),
                                T.access_ptr(q_pe[row, query % q_len, head, place % d_pe], "r", lanes),
                                lanes,
                            )
                        else:
                            q_rope_sh[query, column] = q_pe[row, query % q_len, head, place % d_pe]
            if q_len > 1 or (rope > 0 and lanes > 1):
                T.cp_async_barrier_noinc(sh.q_full)
            T.mbarrier_arrive(sh.q_full)
            seg += 1
        left -= count
        row += 1
        tile = 0
