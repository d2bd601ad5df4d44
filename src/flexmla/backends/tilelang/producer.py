"""The producer warps of a decode CTA: one streams cache tiles, one fetches queries a row ahead of need."""

import tilelang.language as T

from .schedule import row_tiles


@T.macro
def stream_tiles(
    ckv, kpe, ckv_sh, kpe_sh, seq_lens, max_len, block_n, stages, rope, column, full, empty,
    row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """A warp copies `left` tiles from (`row`, `tile`) on into the ring of stages; TMA zero-fills past the cache."""
    step = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    step = 0
    while left > 0:
        row_tiles(seq_lens, row, max_len, block_n, tiles)
        count = T.min(tiles - tile, left)
        for j in T.serial(count):
            stage = step % stages
            first = (tile + j) * block_n
            T.mbarrier_wait_parity(empty[stage], ((step // stages) & 1) ^ 1)
            if rope > 0:
                T.tma_copy(
                    kpe[row, first : first + block_n, column : column + rope],
                    kpe_sh[stage, :, :],
                    barrier=full[stage],
                    leader_scope_threads=32,
                )
            T.tma_copy(
                ckv[row, first : first + block_n, :],
                ckv_sh[stage, :, :],
                barrier=full[stage],
                leader_scope_threads=32,
            )
            T.mbarrier_arrive(full[stage])
            step += 1
        left -= count
        row += 1
        tile = 0


@T.macro
def fetch_queries(
    q_nope, q_pe, q_sh, q_rope_sh, seq_lens, max_len, block_n, n_heads, block_h, heads, rep, d_pe, rope, head0,
    q_full, q_empty, row: T.Ref, tile: T.Ref, left: T.Ref,
):  # fmt: skip
    """A warp loads each row's queries; the rotary part stays zero where a head and a key of the tile do not match."""
    if rope > 0:
        for h, c in T.Parallel(heads, rope):
            q_rope_sh[h, c] = 0
        T.sync_warp()
    seg = T.alloc_var(T.int32)
    tiles = T.alloc_var(T.int32)
    count = T.alloc_var(T.int32)
    seg = 0
    while left > 0:
        row_tiles(seq_lens, row, max_len, block_n, tiles)
        count = T.min(tiles - tile, left)
        if count > 0:
            T.mbarrier_wait_parity(q_empty, (seg & 1) ^ 1)
            T.tma_copy(q_nope[row, head0 : head0 + heads, :], q_sh, barrier=q_full, leader_scope_threads=32)
            if rope > 0:
                for h, c in T.Parallel(block_h, d_pe):
                    if head0 + h < n_heads:
                        q_rope_sh[h, ((head0 + h) // rep - head0 // rep) * d_pe + c] = q_pe[row, head0 + h, c]
                T.fence_proxy_async()
            T.mbarrier_arrive(q_full)
            seg += 1
        left -= count
        row += 1
        tile = 0
