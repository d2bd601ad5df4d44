"""The tile and grid of a shape on an SM: which kernel family, heads a CTA, tokens a tile, stages, workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace

from .shape import PLAIN, MLAShape, Scoring

SMEM_PER_CTA = 232448  # bytes, compute capability 9.0
SMEM_PER_SM = 233472
SMEM_RESERVED = 1024  # what the runtime keeps for itself of each CTA's share
ALIGNMENT = 1024  # of tiles
BARRIER_BYTES = ALIGNMENT  # a few, but what comes before tiles is as long as their alignment
SCRATCH_REGISTERS = 40  # addresses and scalars of a consumer thread, at least
SHARED_SCRATCH_REGISTERS = 64  # the same where CTAs share an SM: with 40 some spilled
LEAST_BUSY = 0.95  # share of the SMs that must have work
MERGE_WARPS = 32  # warps of the merge an SM: about what is resident at once
BLOCK_N = 64
PANEL = 64  # columns of a latent tile that one swizzle covers; the MMA takes whole panels
MAX_PART = 512  # latent columns of a CTA: its accumulator and two tiles in flight fit
MAX_PARTS = 8  # CTAs of a cluster
# Share of the SMs that clusters of 1 to 8 CTAs reach, as each lies inside a GPC (cudaOccupancyMaxActiveClusters, H100).
CLUSTERED = (1.0, 1.0, 0.89, 0.91, 0.835, 0.775, 0.8, 0.91)
MAX_STAGES = 4
GOOD_STAGES = 3
MAX_CTAS_PER_SM = 3
# By `flexmla bench --search models` on an H100: how many bytes a CTA loads of a token decides what suits it.
SHARED_SM_UP_TO = 144  # CTAs share an SM
SHARED_SM_UP_TO_FAST = 320  # the same with fast memory (by an H200), where a tile's chain outlasts its load
CUT_ROWS_UP_TO = 512  # work on all SMs is worth cutting full rows
HALVES_FROM = 600  # two groups of heads, where their products are smaller, beat one
LEAST_SHARE = 8  # tiles of a CTA that shares an SM
MOST_STATES = 88  # of a row (by an H200): merging more takes longer than the CTAs save,
TILES_A_STATE = 16  # unless each has so many tiles, and these are small
SHORT_ROW = 8  # tiles up to which a row may be kept whole: what cutting it saves and costs, in us (by an H200):
TILE_US, TILE_BYTE_US = 0.4, 0.8e-3  # a CTA's tile, and each byte of a token
MERGE_US, STATE_US, STATE_BYTE_US = 1.0, 3e-3, 0.6e-6  # the merge, each worker's states, and each byte of them
UNEVEN = 1.3  # the merge of rows that are not cut in equal parts
FAMILIES = ("few_heads", "many_heads")


@dataclass(frozen=True)
class Tiling:
    """What a TileLang decode kernel is specialised to and launched with.

    Attributes:
        family: `few_heads` puts tokens on the MMA's M and heads on N, `many_heads` the other way round.
        block_h: heads a CTA works on; the head groups of a worker sit side by side in the grid.
        block_n: tokens a tile.
        stages: cache tiles held in shared memory.
        ctas_per_sm: CTAs that share an SM.
        parts: CTAs of a cluster that share the columns of latents and rotary keys, and add up their scores.
        workers: clusters (CTAs where parts is 1) a head group, each with an equal run of the batch's tiles.
        log_merge_ways: two's logarithm of the states of a cut row that a warp of the merge holds side by side.
        log_merge_parts: two's logarithm of the merge's warps a row and head.
    """

    family: str
    block_h: int
    block_n: int
    stages: int
    ctas_per_sm: int
    parts: int
    workers: int
    log_merge_ways: int
    log_merge_parts: int

    def ints(self) -> tuple[int, ...]:
        """The tiling as plain integers, the form that crosses the operator boundary."""
        return (FAMILIES.index(self.family), *astuple(self)[1:])

    @classmethod
    def from_ints(cls, values: tuple[int, ...]) -> Tiling:
        return cls(FAMILIES[values[0]], *values[1:])


def keys_per_group(n_heads: int, n_keys: int, block_h: int) -> int:
    """Keys that a group of `block_h` neighbouring heads touches, at most, where `n_heads // n_keys` heads share one."""
    per_key = n_heads // n_keys
    firsts = range(0, n_heads, block_h)
    return max((min(h + block_h, n_heads) - 1) // per_key - h // per_key + 1 for h in firsts)


def part_width(width: int, parts: int = 1) -> int:
    """Columns of a latent tile of `width` that each of `parts` CTAs holds, in whole panels."""
    return -(-width // (PANEL * parts)) * PANEL


def rope_tile_width(shape: MLAShape, block_h: int, parts: int = 1) -> int:
    """Columns of a CTA's rotary-key tile: its part of the group's keys side by side, as wide as a swizzle covers."""
    width = -(-keys_per_group(shape.n_heads, shape.n_rope_heads, block_h) * shape.d_pe // parts)
    step = 64 if width > 32 else 32 if width > 16 else 16
    return -(-width // step) * step


def overlaid(family: str, rope_width: int) -> bool:
    """Whether probabilities of `many_heads` fit where a tile's rotary keys were, which nobody needs any more."""
    return family == "many_heads" and rope_width >= BLOCK_N


def padded_queries(family: str, block_q: int) -> int:
    """Rows of the tile of `block_q` queries: an MMA's N (multiples of 16) or M (64)."""
    return 64 if family == "many_heads" else -(-block_q // 16) * 16


def loader_warps(family: str, ctas_per_sm: int, gathered: bool) -> int:
    """Warps that load tiles: one starts what the TMA unit copies; gathering takes three in a CTA that is alone."""
    return 3 if gathered and ctas_per_sm == 1 else 1


def threads_per_cta(family: str, loaders: int = 1) -> int:
    """A consumer warpgroup and the producer warps; or two and a producer warpgroup that gives up its registers."""
    return 384 if family == "many_heads" else 128 + 32 * (loaders + 1)


def registers_per_thread(family: str, ctas_per_sm: int) -> int:
    """What the compiler may use: an SM's four partitions have 512 registers a lane for the warps they hold.

    A consumer of `many_heads` gets what its producers can do without; less where these gather.
    """
    warps = -(-ctas_per_sm * threads_per_cta(family) // 128)
    return 232 if family == "many_heads" else min(255, 512 // warps // 8 * 8)


def shared_memory(
    shape: MLAShape,
    family: str,
    block_h: int,
    block_n: int,
    stages: int,
    q_len: int = 1,
    parts: int = 1,
    scoring: Scoring = PLAIN,
) -> int:
    """Bytes of shared memory a CTA needs."""
    queries = padded_queries(family, block_h * q_len)
    rope = rope_tile_width(shape, block_h, parts) if shape.d_pe else 0
    row = 2 * (part_width(shape.dv, parts) + rope)
    total = (stages * block_n + queries) * row + BARRIER_BYTES
    if shape.v_width is not None:  # the output no longer passes through the query tile
        total += 2 * (stages * block_n + queries) * part_width(shape.v_width, parts)
    if scoring.scale_heads:
        scales = 4 * stages * block_n * keys_per_group(shape.n_heads, scoring.scale_heads, block_h)
        total += -(-scales // ALIGNMENT) * ALIGNMENT
    if family == "few_heads":
        total += 2 * block_n * queries + 2 * 4 * 4 * queries  # probabilities; maxima and sums, a row a warp
    else:  # the same of two warpgroups
        total += 2 * 2 * 4 * queries + (0 if overlaid(family, rope) else 2 * 2 * block_n * queries)
    if parts > 1:
        total += 2 * (parts - 1) * 4 * block_n * queries  # the other parts' scores of this tile and the next
    return total


def used_memory(shape: MLAShape, tiling: Tiling, q_len: int = 1, scoring: Scoring = PLAIN) -> int:
    """Bytes of shared memory a CTA of a tiling needs."""
    sizes = (tiling.family, tiling.block_h, tiling.block_n, tiling.stages, q_len, tiling.parts)
    return shared_memory(shape, *sizes, scoring)


def _registers(shape: MLAShape, family: str, block_q: int, block_n: int, parts: int) -> int:
    """A consumer thread's registers for accumulator, scores and elementwise sums."""
    queries, width = padded_queries(family, block_q), part_width(shape.out_width, parts)
    if family == "many_heads":
        return (queries * width // 2 + queries * block_n) // 128 + queries * block_n // 256
    return (queries * width + 2 * queries * block_n) // 128


def _token_bytes(shape: MLAShape, block_h: int) -> int:
    """What a group of heads loads of a token, at most."""
    keys = keys_per_group(shape.n_heads, shape.n_rope_heads, block_h) if shape.d_pe else 0
    return 2 * (shape.dv + (shape.v_width or 0) + keys * shape.d_pe)


def _workers(most: int, ctas: int, batch: int, row_tiles: int, token_bytes: int, state_bytes: int) -> int:
    """CTAs a head group: at most one a tile, and so many that full rows are not cut where that idles few SMs.

    Memory-bound work loses nothing by a few idle SMs, while a worker that ends one row and begins another stops loading
    for the time of an epilogue, and each cut adds a partial state. Small tokens gain more from the SMs. Short shares
    are not worth a CTA beside another on an SM, nor a state more of a row that has many. Short rows stay whole where
    the tiles that a CTA would be spared take less time than a merge: full ones, as lengths are not known here.
    """
    tiles = max(1, batch * row_tiles)
    small = token_bytes <= CUT_ROWS_UP_TO
    states = max(MOST_STATES, row_tiles // TILES_A_STATE) if small else MOST_STATES
    most = max(1, min(most, tiles, max(most // ctas, tiles // LEAST_SHARE), batch * states))
    short = row_tiles <= SHORT_ROW and 0 < batch <= most
    if short and not _worth_cutting(row_tiles, -(-tiles // most), most, token_bytes, state_bytes):
        return batch
    least = int(most * LEAST_BUSY) + 1
    workers = most
    if not small:
        even = (w for w in range(most, least - 1, -1) if _whole(row_tiles, -(-tiles // w)))
        workers = next(even, most)
    return max(least, -(-tiles // -(-tiles // workers)))  # without a few for whom full rows leave nothing


def _whole(row_tiles: int, chunk: int) -> bool:
    """Whether runs of `chunk` tiles end where full rows do, or rows are cut in equal parts."""
    return row_tiles % chunk == 0 or chunk % max(1, row_tiles) == 0


def _worth_cutting(row_tiles: int, chunk: int, workers: int, token_bytes: int, state_bytes: int) -> bool:
    """Whether the tiles of a full row that its CTA is spared take longer than the merge of all workers' states."""
    spared = (row_tiles - chunk) * (TILE_US + TILE_BYTE_US * token_bytes)
    merge = MERGE_US + workers * (STATE_US + STATE_BYTE_US * state_bytes)
    return spared > merge * (1 if _whole(row_tiles, chunk) else UNEVEN)


def _merge(shape: MLAShape, batch: int, q_len: int, workers: int, sm_count: int) -> tuple[int, int]:
    """Logarithms of the merge's ways and parts: few states in turn for a lane, and at most MERGE_WARPS warps an SM."""
    states = workers // max(1, batch) + 1
    log_ways = min(3, (states // 8).bit_length())
    parts = -(-shape.out_width // 8 * 2**log_ways // 32)
    most = max(1, MERGE_WARPS * sm_count // max(1, batch * shape.n_heads * q_len))
    return log_ways, min((parts - 1).bit_length(), most.bit_length() - 1)


def _tilings(
    shape: MLAShape, sm_count: int, batch: int, max_len: int, q_len: int, scoring: Scoring, fast: bool
) -> Iterator[Tiling]:
    """Candidate tilings, the best first."""
    shared_up_to, pair_stages = (SHARED_SM_UP_TO_FAST, GOOD_STAGES) if fast else (SHARED_SM_UP_TO, MAX_STAGES)
    for parts in range(_least_parts(shape), MAX_PARTS + 1):
        candidates = list(_candidates(shape, q_len, parts, scoring))
        for least_stages, (family, block_h) in itertools.product((2, 1), candidates):
            for ctas in _ctas_per_sm(family, parts):
                if ctas > 1 and _token_bytes(shape, block_h) > shared_up_to:
                    continue
                # CTAs that share an SM hide each other's latencies, but not too few tiles in flight
                wanted = (least_stages, pair_stages, MAX_STAGES)[ctas - 1]
                fitting = _fitting(shape, sm_count, batch, max_len, q_len, scoring, family, block_h, ctas, parts)
                for tiling in fitting:
                    if tiling.stages >= wanted:
                        yield tiling


def choices(
    shape: MLAShape, batch: int, max_len: int, sm_count: int, q_len: int = 1, scoring: Scoring = PLAIN
) -> list[Tiling]:
    """What `tile` chooses from, for a search: families, groups of heads, CTAs an SM, as many stages as fit, workers.

    Not all of it: with the fewest parts, at least two stages, at most twice as many groups as there have to be, and
    workers as planned or as many as there can be.
    """
    parts = _least_parts(shape)
    found = []
    for family, block_h in _candidates(shape, q_len, parts, scoring):
        for ctas in _ctas_per_sm(family, parts):
            fitting = _fitting(shape, sm_count, batch, max_len, q_len, scoring, family, block_h, ctas, parts)
            found += [tiling for tiling in itertools.islice(fitting, 1) if tiling.stages > 1]
    fewest = min((_groups(shape, tiling.block_h) for tiling in found), default=1)
    found = [tiling for tiling in found if _groups(shape, tiling.block_h) <= 2 * fewest]
    most = []
    for tiling in found:
        workers = max(1, min(_most_workers(shape, sm_count, tiling), batch * -(-max_len // BLOCK_N)))
        most.append(_with_grid(tiling, workers, shape, batch, q_len, sm_count))
    return list(dict.fromkeys(found + most))


def _least_parts(shape: MLAShape) -> int:
    """CTAs that share the columns, at least."""
    return -(-(shape.dv + (shape.v_width or 0)) // MAX_PART)


def _groups(shape: MLAShape, block_h: int) -> int:
    return -(-shape.n_heads // block_h)


def _ctas_per_sm(family: str, parts: int) -> range:
    """CTAs that may share an SM, the most first."""
    return range(MAX_CTAS_PER_SM if family == "few_heads" and parts == 1 else 1, 0, -1)


def _most_workers(shape: MLAShape, sm_count: int, tiling: Tiling) -> int:
    """Workers whose CTAs are all there at once."""
    clusters = int(sm_count * CLUSTERED[tiling.parts - 1]) // tiling.parts * tiling.ctas_per_sm
    return clusters // _groups(shape, tiling.block_h)


def _with_grid(tiling: Tiling, workers: int, shape: MLAShape, batch: int, q_len: int, sm_count: int) -> Tiling:
    """The tiling with a number of workers, and the merge that suits it."""
    ways, parts = _merge(shape, batch, q_len, workers, sm_count)
    return replace(tiling, workers=workers, log_merge_ways=ways, log_merge_parts=parts)


def _fitting(
    shape: MLAShape,
    sm_count: int,
    batch: int,
    max_len: int,
    q_len: int,
    scoring: Scoring,
    family: str,
    block_h: int,
    ctas: int,
    parts: int,
) -> Iterator[Tiling]:
    """Tilings of one kind that fit an SM, those with the most stages first."""
    registers = _registers(shape, family, block_h * q_len, BLOCK_N, parts)
    scratch = SHARED_SCRATCH_REGISTERS if ctas > 1 else SCRATCH_REGISTERS
    if registers + scratch > registers_per_thread(family, ctas):
        return
    limit = min(SMEM_PER_CTA, SMEM_PER_SM // ctas - SMEM_RESERVED)
    for stages in range(MAX_STAGES, 0, -1):
        if shared_memory(shape, family, block_h, BLOCK_N, stages, q_len, parts, scoring) <= limit:
            kind = Tiling(family, block_h, BLOCK_N, stages, ctas, parts, 1, 0, 0)
            most, row_tiles = _most_workers(shape, sm_count, kind), -(-max_len // BLOCK_N)
            state_bytes = 2 * shape.n_heads * q_len * shape.out_width  # of all groups of a worker
            workers = _workers(most, ctas, batch, row_tiles, _token_bytes(shape, block_h), state_bytes)
            yield _with_grid(kind, workers, shape, batch, q_len, sm_count)


def _candidates(shape: MLAShape, q_len: int, parts: int, scoring: Scoring) -> Iterator[tuple[str, int]]:
    """Kernel families and heads a CTA, the best first."""
    yield "few_heads", shape.n_heads
    # many_heads has two warpgroups that take half of dv each, in panels of 64, and knows plain scores alone
    if shape.dv % 128 == 0 and parts == 1 and shape.v_width is None and scoring == PLAIN:
        groups = -(-shape.n_heads // (64 // q_len))
        step = 16 // math.gcd(16, q_len)  # heads whose queries fill a multiple of 16 rows
        even = -(-shape.n_heads // groups)
        yield "many_heads", min(-(-even // step) * step, 64 // q_len) if groups > 1 else even
    # groups of less than 8 queries pad their tile; wide rotary keys of many heads leave no room for more
    for most_queries in (32, 16, 8, 4, 2, 1):
        if q_len <= most_queries < shape.n_heads * q_len:
            full = most_queries // q_len
            even = -(-shape.n_heads // -(-shape.n_heads // full))
            # Rotary keys are shared out with the heads, but even groups may lie across the keys of grouped heads.
            wider = rope_tile_width(shape, even) > rope_tile_width(shape, full)
            yield "few_heads", full if wider else even


def tile(
    shape: MLAShape,
    batch: int,
    max_len: int,
    sm_count: int,
    q_len: int = 1,
    once: bool = False,
    scoring: Scoring = PLAIN,
    fast: bool = False,
) -> Tiling | None:
    """Kernel family, tile and grid for a shape; None where no tile of it fits an SM.

    Args:
        once: whether pages are small, so that the latent is not to be read again for a third tile.
        scoring: what is done to scores.
        fast: whether the memory is little slower than L2, so that latents are not read again in any case.
    """

    def tilings() -> Iterator[Tiling]:
        return _tilings(shape, sm_count, batch, max_len, q_len, scoring, fast)

    best = next(tilings(), None)
    if best is None or best.parts > 1 or best.block_h < shape.n_heads:
        return best
    half = -(-shape.n_heads // 2)
    whole = itertools.takewhile(lambda t: t.parts == 1, tilings())
    halves = (t for t in whole if (t.family, t.block_h) == ("few_heads", half))
    if fast:  # tokens small enough for CTAs to share an SM, but too many queries: two groups
        alone_by_queries = best.ctas_per_sm == 1 and _token_bytes(shape, shape.n_heads) <= SHARED_SM_UP_TO_FAST
        return next((t for t in halves if alone_by_queries and t.ctas_per_sm > 1), best)
    if once:
        return best
    # A third tile in flight is worth cutting the heads in two groups, which share the latent in L2; so are, for
    # large tokens, smaller products where they are no more together. More groups are not.
    padded = padded_queries(best.family, shape.n_heads)
    smaller = (
        q_len == 1 and _token_bytes(shape, half) >= HALVES_FROM and 2 * padded_queries("few_heads", half) <= padded
    )
    more_tiles = best.family == "few_heads" and best.stages < GOOD_STAGES
    least_stages = 2 if smaller else GOOD_STAGES if more_tiles else MAX_STAGES + 1
    return next((t for t in halves if t.ctas_per_sm == 1 and t.stages >= least_stages), best)
