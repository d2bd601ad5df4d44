"""The program of a shape and tile: arguments, shared memory, the roles of a CTA's warps, and the two launches."""

import tilelang.language as T

from ...tiling import loader_warps, padded_queries, rope_tile_width, threads_per_cta
from . import few_heads, many_heads
from .combine import combine
from .few_heads import consume_few
from .many_heads import consume_many
from .producer import Caches, fetch_queries, gather_tiles, stream_tiles
from .schedule import Rows, share

QUERY_STRIDES = ("sqb", "sqi", "sqh", "spb", "spi", "sph")
CACHE_STRIDES = ("scp", "scs", "skp", "sks", "skr", "stb")
# loaders: contiguous caches by TMA, pages of at least a tile by TMA, and token by token: 8 or 1 elements at once
LOADERS = ("contiguous", "pages", "gather", "scalar")


def decode_program(shape, tiling, q_len, loader, dtype):
    """The kernel of one shape and tile; batch, lengths, page size, strides and grid are dynamic.

    Query tokens are folded into the heads: query `h * q_len + i` is head `h` of token `i`. A launch may begin while the
    one before it ends: nothing is read before that has been waited for.

    Args:
        shape: the `MLAShape`.
        tiling: the `Tiling`; its workers and merge are arguments of the launch.
        q_len: query tokens a row.
        loader: one of LOADERS.
        dtype: TileLang's name of the dtype of queries, caches and outputs.
    """
    n_heads, dv, d_pe, n_rope_heads = shape.n_heads, shape.dv, shape.d_pe, shape.n_rope_heads
    few = tiling.family == "few_heads"
    block_h, block_n, stages, ctas_per_sm = tiling.block_h, tiling.block_n, tiling.stages, tiling.ctas_per_sm
    n_queries, block_q = n_heads * q_len, block_h * q_len
    queries = padded_queries(tiling.family, block_q)
    rep = n_heads // n_rope_heads
    rope = rope_tile_width(shape, block_h) if d_pe else 0
    # without rotary keys their arguments are stand-ins that nothing reads
    q_pe_cols, rope_cols = (d_pe, rope) if d_pe else (dv, 16)
    groups = -(-n_heads // block_h)
    vector = {"gather": 8, "scalar": 1}.get(loader, 0)
    gathered, paged = vector > 0, loader != "contiguous"
    loaders = loader_warps(tiling.family, ctas_per_sm, gathered)
    arrivals = 32 * loaders * (2 if vector > 1 else 1)  # at a full stage
    query_arrivals = 64 if q_len > 1 or d_pe else 32
    consumers = few_heads.CONSUMERS if few else many_heads.CONSUMERS
    threads = threads_per_cta(tiling.family, loaders)
    warps = block_n // 16
    p_shape = (block_n, queries) if few else (1, 8)
    warp_shape = (warps, queries) if few else (1, 8)
    f32, i32 = T.float32, T.int32
    batch, max_pages, n_pages, page_size, slots = (
        T.dynamic(name) for name in ("batch", "max_pages", "n_pages", "page_size", "slots")
    )
    sqb, sqi, sqh, spb, spi, sph = (T.dynamic(name) for name in QUERY_STRIDES)
    scp, scs, skp, sks, skr, stb = (T.dynamic(name, "int64") for name in CACHE_STRIDES)
    table_shape, table_strides = ((batch, max_pages), (stb, 1)) if paged else ((batch,), (1,))
    if not d_pe:
        kpe_shape, kpe_strides = (n_pages, page_size, dv), (skp, sks, 1)
    elif gathered or n_rope_heads == 1:
        kpe_shape, kpe_strides = (n_pages, page_size, n_rope_heads, d_pe), (skp, sks, skr, 1)
    else:
        kpe_shape, kpe_strides = (n_pages, page_size, n_rope_heads * d_pe), (skp, sks, 1)

    @T.prim_func
    def decode(
        q_nope: T.StridedTensor((batch, q_len, n_heads, dv), (sqb, sqi, sqh, 1), dtype),
        q_pe: T.StridedTensor((batch, q_len, n_heads, q_pe_cols), (spb, spi, sph, 1), dtype),
        ckv: T.StridedTensor((n_pages, page_size, dv), (scp, scs, 1), dtype),
        kpe: T.StridedTensor(kpe_shape, kpe_strides, dtype),
        seq_lens: T.Tensor((batch,), i32),
        starts: T.Tensor((batch,), i32),
        block_table: T.StridedTensor(table_shape, table_strides, i32),
        out: T.Tensor((batch, q_len, n_heads, dv), dtype),
        lse: T.Tensor((batch, n_heads, q_len), f32),
        part: T.Tensor((slots, n_queries, dv), dtype),
        part_lse: T.Tensor((slots, n_queries), f32),
        softmax_scale: T.float32,
        has_starts: T.int32,
        causal: T.int32,
        capacity: T.int32,
        log_page: T.int32,
        workers: T.int32,
        log_ways: T.int32,
        log_parts: T.int32,
    ):
        T.assume(workers > 0)
        with T.Kernel(groups, workers, threads=threads) as (group, worker):
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            q_sh = T.alloc_shared((queries, dv), dtype)
            ckv_sh = T.alloc_shared((stages, block_n, dv), dtype)
            q_rope_sh = T.alloc_shared((queries, rope_cols), dtype)
            kpe_sh = T.alloc_shared((stages, block_n, rope_cols), dtype)
            p_sh = T.alloc_shared(p_shape, dtype)
            max_sh = T.alloc_shared(warp_shape, f32)
            sum_sh = T.alloc_shared(warp_shape, f32)
            full = T.alloc_barrier([arrivals] * stages)
            empty = T.alloc_barrier([consumers] * stages)
            q_full = T.alloc_barrier(query_arrivals)
            q_empty = T.alloc_barrier(consumers)

            tx = T.get_thread_binding()
            query0 = group * block_q
            rows = Rows(seq_lens, starts, has_starts, batch, capacity, block_n)
            row = T.alloc_var(i32)
            tile = T.alloc_var(i32)
            left = T.alloc_var(i32)
            T.pdl_sync()
            if few:
                T.pdl_trigger()
            share(rows, tx % 32, worker, workers, row, tile, left)
            if tx < consumers:
                if few:
                    consume_few(
                        rows, stages, gathered, q_len, n_heads, n_queries, block_q, queries, dv, rope, dtype, q_sh,
                        ckv_sh, q_rope_sh, kpe_sh, p_sh, max_sh, sum_sh, full, empty, q_full, q_empty, out, lse, part,
                        part_lse, softmax_scale, causal, query0, worker, row, tile, left,
                    )  # fmt: skip
                else:
                    consume_many(
                        rows, stages, gathered, q_len, n_heads, n_queries, block_q, queries, dv, rope, dtype, q_sh,
                        ckv_sh, q_rope_sh, kpe_sh, full, empty, q_full, q_empty, out, lse, part,
                        part_lse, softmax_scale, causal, query0, worker, row, tile, left, tx,
                    )  # fmt: skip
            else:
                if not few:
                    T.dec_max_nreg(many_heads.PRODUCER_REGISTERS)
                caches = Caches(
                    ckv, kpe, block_table, log_page, paged, ckv_sh, kpe_sh, rope, group * block_h // rep, d_pe, full,
                    empty,
                )  # fmt: skip
                if tx < consumers + 32 * loaders:
                    if gathered:
                        gather_tiles(
                            caches, rows, stages, vector, dv, loaders, (tx - consumers) // 32, tx % 32, row, tile, left
                        )
                    else:
                        stream_tiles(caches, rows, stages, row, tile, left)
                elif tx < consumers + 32 * (loaders + 1):
                    fetch_queries(
                        q_nope, q_pe, q_sh, q_rope_sh, rows, n_heads, block_q, queries, q_len, rep, d_pe, rope,
                        group * block_h, q_full, q_empty, tx % 32, row, tile, left,
                    )  # fmt: skip

        combine(
            n_heads, q_len, dv, dtype, seq_lens, starts, has_starts, batch, capacity, block_n, workers, log_ways,
            log_parts, out, lse, part, part_lse,
        )  # fmt: skip

    return decode
