"""How the tiles of a ragged batch are cut over workers: device-side macros.

The tiles of all rows are numbered in row order; worker `w` takes `[w * chunk, (w + 1) * chunk)` with
`chunk = ceildiv(total, workers)`. Every warp finds its place by itself from `seq_lens`: no metadata kernel, no host.
A row that lies inside one worker's run is written straight to the output. Any other is cut into partial states, one a
worker, in slot `2 * w + 1` of the worker that begins the row and slot `2 * w` of those that go on with it.
"""

import tilelang.language as T

ROWS = 4  # a lane looks at, so that a warp sees 128 rows after one memory latency


@T.macro
def row_tiles(seq_lens, row, max_len, block_n, tiles: T.Ref):
    """`tiles` = tiles of one row."""
    tiles = T.ceildiv(T.min(T.max(seq_lens[row], 0), max_len), block_n)


@T.macro
def lane_tiles(seq_lens, batch, max_len, block_n, first, tiles):
    """`tiles[c]` = tiles of row `first + c`, 0 past the batch."""
    for c in T.unroll(ROWS):
        tiles[c] = 0
        if first + c < batch:
            tiles[c] = T.ceildiv(T.min(T.max(seq_lens[first + c], 0), max_len), block_n)


@T.macro
def count_before(seq_lens, batch, max_len, block_n, lane, row, before: T.Ref, total: T.Ref):
    """`before` = tiles of the rows ahead of `row`, `total` = tiles of the batch; a whole warp calls it."""
    tiles = T.alloc_local((ROWS,), T.int32)
    before = 0
    total = 0
    for i in T.serial(T.ceildiv(batch, 32 * ROWS)):
        first = (i * 32 + lane) * ROWS
        lane_tiles(seq_lens, batch, max_len, block_n, first, tiles)
        for c in T.unroll(ROWS):
            total += tiles[c]
            before += T.if_then_else(first + c < row, tiles[c], 0)
    for d in T.unroll(5):
        total += T.shfl_xor(total, 16 >> d)
        before += T.shfl_xor(before, 16 >> d)


@T.macro
def locate(seq_lens, batch, max_len, block_n, lane, target, row: T.Ref, tile: T.Ref):
    """`row` and `tile` inside it of the batch's tile number `target`, which exists; a whole warp calls it."""
    tiles = T.alloc_local((ROWS,), T.int32)
    base = T.alloc_var(T.int32)
    found = T.alloc_var(T.int32)
    base = 0
    found = 0
    row = 0
    tile = 0
    for i in T.serial(T.ceildiv(batch, 32 * ROWS)):
        if found == 0:
            mine = T.alloc_var(T.int32)
            upto = T.alloc_var(T.int32)
            other = T.alloc_var(T.int32)
            owner = T.alloc_var(T.int32)
            lane_tiles(seq_lens, batch, max_len, block_n, (i * 32 + lane) * ROWS, tiles)
            mine = 0
            for c in T.unroll(ROWS):
                mine += tiles[c]
            upto = mine
            for d in T.unroll(5):
                other = T.shfl_up(upto, 1 << d)
                if lane >= (1 << d):
                    upto += other
            # as many lanes as end at or before the target: the next one owns it
            owner = T.if_then_else(base + upto <= target, 1, 0)
            for d in T.unroll(5):
                owner += T.shfl_xor(owner, 16 >> d)
            if owner < 32:
                found = 1
                row = (i * 32 + owner) * ROWS
                tile = target - base - T.shfl_sync(upto - mine, owner)
                for c in T.unroll(ROWS):
                    other = T.shfl_sync(tiles[c], owner)
                    if found == 1:
                        if tile >= other:
                            tile -= other
                            row += 1
                        else:
                            found = 2
            base += T.shfl_sync(upto, 31)


@T.macro
def share(seq_lens, batch, max_len, block_n, lane, worker, workers, row: T.Ref, tile: T.Ref, left: T.Ref):
    """A worker's run of tiles: `left` of them from `tile` of `row` on."""
    before = T.alloc_var(T.int32)
    total = T.alloc_var(T.int32)
    chunk = T.alloc_var(T.int32)
    count_before(seq_lens, batch, max_len, block_n, lane, 0, before, total)
    chunk = T.ceildiv(total, workers)
    left = T.min(chunk, total - worker * chunk)
    row = 0
    tile = 0
    if left > 0:
        locate(seq_lens, batch, max_len, block_n, lane, worker * chunk, row, tile)
