"""The program of a shape and tile: arguments, shared memory, the roles of a CTA's warps, and the two launches."""

import tilelang.language as T
from tilelang.layout import make_wgmma_swizzled_layout

from ...shape import PLAIN
from ...tiling import loader_warps, threads_per_cta
from . import few_heads, many_heads
from .combine import combine
from .few_heads import consume_few
from .many_heads import Turns, consume_many
from .producer import Caches, fetch_queries, gather_tiles, stream_tiles
from .schedule import Rows, share
from .scores import ADD_PARTS, ANY, Exchange
from .spec import DTYPES, Results, Shared, specialise
from .transpose import TRANSPOSE

QUERY_STRIDES = ("sqb", "sqi", "sqh", "spb", "spi", "sph")
CACHE_STRIDES = ("scp", "scs", "skp", "sks", "skr", "svp", "svs", "ssp", "sss", "stb")


def decode_program(wanted, tiling):
    """The kernel of one specialisation and tile; batch, lengths, page size, strides and grid are dynamic.

    Query tokens are folded into the heads: query `h * q_len + i` is head `h` of token `i`. A launch may begin while the
    one before it ends: nothing is read before that has been waited for.

    Args:
        wanted: the `Specialisation`.
        tiling: the `Tiling`; its workers and merge are arguments of the launch.

    Returns:
        A function whose arguments are, in order: `q_nope`, `q_pe`, `ckv`, `kpe`, `seq_lens`, `starts`, `block_table`,
        `out`, `lse`, the workspace (partial states of `2 * workers` slots, then their sums in float32),
        `softmax_scale`, `has_starts`, `causal`, `capacity`, `log_page`, `workers`, `log_ways`, `log_parts`; and, where
        scores or values are not plain, `v`, `scale`, `inner_scale`. With a cap, `softmax_scale` is the cap and
        `inner_scale` what the tanh's argument is multiplied with.
    """
    spec = specialise(wanted, tiling)
    shape, _, q_len, loader, scoring = wanted
    dtype, scale_dtype = spec.dtype, DTYPES[scoring.scale_dtype or wanted.dtype]
    few = tiling.family == "few_heads"
    n_heads, queries, block_n, stages, parts = spec.n_heads, spec.queries, spec.block_n, spec.stages, spec.parts
    # without rotary keys their arguments are stand-ins that nothing reads
    q_pe_cols, rope_cols = (spec.d_pe, spec.rope) if spec.d_pe else (spec.dv, 16)
    gathered, paged = spec.vector > 0, loader != "contiguous"
    loaders = loader_warps(tiling.family, tiling.ctas_per_sm, gathered)
    arrivals = 32 * loaders * (2 if spec.vector > 1 else 1)  # at a full stage
    query_arrivals = 64 if q_len > 1 or (spec.d_pe and spec.d_pe % 8 == 0) else 32
    consumers = few_heads.CONSUMERS if few else many_heads.CONSUMERS
    threads = threads_per_cta(tiling.family, loaders)
    p_shape = (block_n, queries) if few else (2, queries, block_n)
    warp_shape = (block_n // 16, queries) if few else (2, queries)
    f32, i32 = T.float32, T.int32
    batch, max_pages, n_pages, page_size, words = (
        T.dynamic(name) for name in ("batch", "max_pages", "n_pages", "page_size", "words")
    )
    sqb, sqi, sqh, spb, spi, sph = (T.dynamic(name) for name in QUERY_STRIDES)
    scp, scs, skp, sks, skr, svp, svs, ssp, sss, stb = (T.dynamic(name, "int64") for name in CACHE_STRIDES)
    table_shape, table_strides = ((batch, max_pages), (stb, 1)) if paged else ((batch,), (1,))
    if not spec.d_pe:
        kpe_shape, kpe_strides = (n_pages, page_size, spec.dv), (skp, sks, 1)
    elif gathered or shape.n_rope_heads == 1:
        kpe_shape, kpe_strides = (n_pages, page_size, shape.n_rope_heads, spec.d_pe), (skp, sks, skr, 1)
    else:
        kpe_shape, kpe_strides = (n_pages, page_size, shape.n_rope_heads * spec.d_pe), (skp, sks, 1)
    v_cols, scale_cols = spec.width if spec.v else spec.dv, spec.scale_heads or spec.dv

    # two groups of a worker read the same latents, from L2 the second time: side by side, and at the same time
    cluster = 2 if spec.groups == 2 and parts == 1 else parts

    @T.macro
    def launches(
        q_nope, q_pe, ckv, kpe, v, scale, seq_lens, starts, block_table, out, lse, workspace, softmax_scale,
        inner_scale, has_starts, causal, capacity, log_page, workers, log_ways, log_parts,
    ):  # fmt: skip
        state = T.Tensor((2 * workers, spec.n_queries, spec.width), dtype, workspace.data)
        sums = T.Tensor((workers * (spec.width + 2), spec.n_queries), f32, workspace.data)
        results = Results(out, lse, state, sums, workers * spec.width)
        with T.Kernel(spec.groups * parts, workers, threads=threads, cluster_dims=(cluster, 1, 1)) as (block, worker):
            T.annotate_min_blocks_per_sm(tiling.ctas_per_sm)
            q_sh = T.alloc_shared((queries, spec.k), dtype)
            ckv_sh = T.alloc_shared((stages, block_n, spec.k), dtype)
            q_rope_sh = T.alloc_shared((queries, rope_cols), dtype)
            kpe_sh = T.alloc_shared((stages, block_n, rope_cols), dtype)
            p_sh = kpe_sh if spec.overlaid else T.alloc_shared(p_shape, dtype)
            max_sh = T.alloc_shared(warp_shape, f32)
            sum_sh = T.alloc_shared(warp_shape, f32)
            v_sh = T.alloc_shared((stages, block_n, spec.v), dtype) if spec.v > 0 else None
            out_sh = T.alloc_shared((queries, spec.v), dtype) if spec.v > 0 else q_sh
            if spec.v > 0:  # as the query tile lies, which wgmma reads
                T.annotate_layout({out_sh: make_wgmma_swizzled_layout(out_sh)})
            scale_sh = T.alloc_shared((stages, block_n, spec.scales), f32) if spec.scales > 0 else None
            full = T.alloc_barrier([arrivals] * (stages * spec.chunks))
            # of many_heads a lane for each of a warpgroup's four warps
            empty = T.alloc_barrier([consumers if few else 4] * (stages * spec.halves))
            q_full = T.alloc_barrier(query_arrivals)
            q_empty = T.alloc_barrier(consumers)
            sh = Shared(q_sh, q_rope_sh, ckv_sh, kpe_sh, v_sh, scale_sh, out_sh, full, empty, q_full, q_empty)

            tx = T.get_thread_binding()
            group = block // parts
            part = block % parts
            rows = Rows(seq_lens, starts, has_starts, batch, capacity, block_n)
            rope0 = group * spec.block_h // spec.rep * spec.d_pe + part * spec.rope
            exchange = None
            turns = None
            if few:
                T.import_source(ANY + TRANSPOSE + (ADD_PARTS if parts > 1 else ""))
            else:
                # every thread of the other warpgroup: racecheck does not always follow a lane for its warp
                ready = T.alloc_barrier([consumers // 2] * 2)
                done = T.alloc_barrier(consumers)
                turns = Turns(p_sh, max_sh, sum_sh, ready, done)
            if parts > 1:
                scores_sh = T.alloc_shared((2, parts - 1, block_n * queries), f32)
                arrived = T.alloc_cluster_barrier([1, 1])
                exchange = Exchange(scores_sh, arrived, part)
            row = T.alloc_var(i32)
            tile = T.alloc_var(i32)
            left = T.alloc_var(i32)
            T.pdl_sync()
            share(rows, tx % 32, worker, workers, row, tile, left)
            if tx < consumers:
                if few:
                    consume_few(
                        spec, rows, sh, exchange, p_sh, max_sh, sum_sh, results, softmax_scale, inner_scale, causal,
                        group, part, worker, row, tile, left,
                    )  # fmt: skip
                else:
                    consume_many(
                        spec, rows, sh, turns, results, softmax_scale, causal, group, worker, row, tile, left, tx
                    )
            else:
                if not few:
                    T.dec_max_nreg(many_heads.registers(spec)[1])
                scale0 = group * spec.block_h * spec.scale_heads // n_heads
                caches = Caches(
                    ckv, kpe, v, scale, block_table, log_page, paged, part * spec.k, part * spec.v, rope0, scale0
                )
                if tx < consumers + 32 * loaders:
                    if gathered:
                        gather_tiles(spec, caches, rows, sh, loaders, (tx - consumers) // 32, tx % 32, row, tile, left)
                    else:
                        stream_tiles(spec, caches, rows, sh, tx % 32, row, tile, left)
                elif tx < consumers + 32 * (loaders + 1):
                    fetch_queries(spec, q_nope, q_pe, sh, rows, group, part, rope0, tx % 32, row, tile, left)

        combine(
            n_heads, q_len, spec.width, dtype, seq_lens, starts, has_starts, batch, capacity, block_n, workers,
            log_ways, log_parts, results, cluster,
        )  # fmt: skip

    # Two signatures, which the DSL reads from the functions: every argument costs a call time. The DSL traces what is
    # defined at once: so only the one that is wanted.
    if scoring == PLAIN and not spec.v:

        @T.prim_func
        def decode(
            q_nope: T.StridedTensor((batch, q_len, n_heads, spec.dv), (sqb, sqi, sqh, 1), dtype),
            q_pe: T.StridedTensor((batch, q_len, n_heads, q_pe_cols), (spb, spi, sph, 1), dtype),
            ckv: T.StridedTensor((n_pages, page_size, spec.dv), (scp, scs, 1), dtype),
            kpe: T.StridedTensor(kpe_shape, kpe_strides, dtype),
            seq_lens: T.Tensor((batch,), i32),
            starts: T.Tensor((batch,), i32),
            block_table: T.StridedTensor(table_shape, table_strides, i32),
            out: T.Tensor((batch, q_len, n_heads, spec.width), dtype),
            lse: T.Tensor((batch, n_heads, q_len), f32),
            workspace: T.Tensor((words,), dtype),
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
            launches(
                q_nope, q_pe, ckv, kpe, ckv, ckv, seq_lens, starts, block_table, out, lse, workspace, softmax_scale,
                softmax_scale, has_starts, causal, capacity, log_page, workers, log_ways, log_parts,
            )  # fmt: skip

        return decode

    @T.prim_func
    def decode_scored(
        q_nope: T.StridedTensor((batch, q_len, n_heads, spec.dv), (sqb, sqi, sqh, 1), dtype),
        q_pe: T.StridedTensor((batch, q_len, n_heads, q_pe_cols), (spb, spi, sph, 1), dtype),
        ckv: T.StridedTensor((n_pages, page_size, spec.dv), (scp, scs, 1), dtype),
        kpe: T.StridedTensor(kpe_shape, kpe_strides, dtype),
        seq_lens: T.Tensor((batch,), i32),
        starts: T.Tensor((batch,), i32),
        block_table: T.StridedTensor(table_shape, table_strides, i32),
        out: T.Tensor((batch, q_len, n_heads, spec.width), dtype),
        lse: T.Tensor((batch, n_heads, q_len), f32),
        workspace: T.Tensor((words,), dtype),
        softmax_scale: T.float32,
        has_starts: T.int32,
        causal: T.int32,
        capacity: T.int32,
        log_page: T.int32,
        workers: T.int32,
        log_ways: T.int32,
        log_parts: T.int32,
        v: T.StridedTensor((n_pages, page_size, v_cols), (svp, svs, 1), dtype),
        scale: T.StridedTensor((n_pages, page_size, scale_cols), (ssp, sss, 1), scale_dtype),
        inner_scale: T.float32,
    ):
        T.assume(workers > 0)
        launches(
            q_nope, q_pe, ckv, kpe, v, scale, seq_lens, starts, block_table, out, lse, workspace, softmax_scale,
            inner_scale, has_starts, causal, capacity, log_page, workers, log_ways, log_parts,
        )  # fmt: skip

    return decode_scored
