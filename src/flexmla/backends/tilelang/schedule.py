"""How the tiles of a ragged batch are cut over workers: device-side macros.

The tiles of all rows are numbered in row order; worker `w` takes `[w * chunk, (w + 1) * chunk)` with
`chunk = ceildiv(total, workers)`. Every warp finds its place by itself from `seq_lens`: no metadata kernel, no host.
A row that lies inside one worker's run is written straight to the output. Any other is cut into partial states, one a
worker, in slot `2 * w + 1` of the worker that begins the row and slot `2 * w` of those that go on with it.
"""

from typing import Any, NamedTuple

import tilelang.language as T

ROWS = 4  # a lane looks at, so that a warp sees 128 rows after one memory latency


class Rows(NamedTuple):
    """What says which tokens of a batch are visible.

    Attributes:
        seq_lens, starts: int32 `[batch]`; starts is a stand-in where has_starts is 0.
        has_starts: int32.
        batch: rows.
        capacity: tokens a row's cache holds.
        block_n: tokens a tile.
    """

    seq_lens: Any
    starts: Any
    has_starts: Any
    batch: Any
    capacity: Any
    block_n: int


@T.macro
def row_span(rows, row, begin: T.Ref, length: T.Ref, tiles: T.Ref):
    """The visible slots `[begin, length)` of one row, and its tiles: from the one that holds `begin` on."""
    length = T.min(T.max(rows.seq_lens[row], 0), rows.capacity)
    begin = 0
    if rows.has_starts != 0:
        begin = T.min(T.max(rows.starts[row], 0), length)
    tiles = T.if_then_else(begin < length, T.ceildiv(length, rows.block_n) - begin // rows.block_n, 0)


def tiles_each(total, workers):
    """Tiles of a worker's run, 0 where there are none."""
    return T.truncdiv(total + workers - 1, workers)


def warp_sum(value):
    """The sum of an int32 over the lanes of a warp."""
    return T.call_extern("int32", "__reduce_add_sync", T.uint32(0xFFFFFFFF), value)


@T.macro
def lane_tiles(rows, first, tiles):
    """`tiles[c]` = tiles of row `first + c`, 0 past the batch."""
    begin = T.alloc_var(T.int32)
    length = T.alloc_var(T.int32)
    found = T.alloc_var(T.int32)
    for c in T.unroll(ROWS):
        found = 0
        if first + c < rows.batch:
            row_span(rows, first + c, begin, length, found)
        tiles[c] = found


@T.macro
def count_before(rows, lane, row, before: T.Ref, total: T.Ref):
    """`before` = tiles of the rows ahead of `row`, `total` = tiles of the batch; a whole warp calls it."""
    tiles = T.alloc_local((ROWS,), T.int32)
    before = 0
    total = 0
    for i in T.serial(T.ceildiv(rows.batch, 32 * ROWS)):
        first = (i * 32 + lane) * ROWS
        lane_tiles(rows, first, tiles)
        for c in T.unroll(ROWS):
            total += tiles[c]
            before += T.if_then_else(first + c < row, tiles[c], 0)
    total = warp_sum(total)
    before = warp_sum(before)


@T.macro
def locate(rows, lane, target, row: T.Ref, tile: T.Ref):
    """`row` and `tile` inside it of the batch's tile number `target`, which exists; a whole warp calls it."""
    tiles = T.alloc_local((ROWS,), T.int32)
    base = T.alloc_var(T.int32)
    found = T.alloc_var(T.int32)
    base = 0
    found = 0
    row = 0
    tile = 0
    for i in T.serial(T.ceildiv(rows.batch, 32 * ROWS)):
        if found == 0:
            upto = T.alloc_var(T.int32)
            other = T.alloc_var(T.int32)
            owner = T.alloc_var(T.int32)
            lane_tiles(rows, (i * 32 + lane) * ROWS, tiles)
            upto = tiles[0]
            for c in T.unroll(1, ROWS):
                upto += tiles[c]
            row = (i * 32 + lane) * ROWS
            tile = target - base + upto
            for d in T.unroll(5):
                other = T.shfl_up(upto, 1 << d)
                if lane >= (1 << d):
                    upto += other
            # as many lanes as end at or before the target: the next one owns it, and finds the row among its own
            owner = T.popcount(T.cast(T.ballot_sync(base + upto <= target), "uint32"))
            tile -= upto
            for c in T.unroll(ROWS - 1):
                if found == 0:
                    if tile >= tiles[c]:
                        tile -= tiles[c]
                        row += 1
                    else:
                        found = 1
            found = T.if_then_else(owner < 32, 1, 0)
            row = T.shfl_sync(row, owner)
            tile = T.shfl_sync(tile, owner)
            base += T.shfl_sync(upto, 31)


@T.macro
def share(rows, lane, worker, workers, row: T.Ref, tile: T.Ref, left: T.Ref):
    """A worker's run of tiles: `left` of them from `tile` of `row` on."""
    before = T.alloc_var(T.int32)
    total = T.alloc_var(T.int32)
    chunk = T.alloc_var(T.int32)
    count_before(rows, lane, 0, before, total)
    chunk = tiles_each(total, workers)
    left = T.min(chunk, total - worker * chunk)
    row = 0
    tile = 0
    if left > 0:
        locate(rows, lane, worker * chunk, row, tile)
