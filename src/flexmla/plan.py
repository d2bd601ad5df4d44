"""Which backend, kernel family, tile and grid a shape gets on a device: pure Python, no GPU needed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from .shape import MLAShape

HOPPER = (9, 0)
SMEM_PER_CTA = 232448  # bytes, compute capability 9.0
SMEM_PER_SM = 233472
SMEM_RESERVED = 1024  # what the runtime keeps for itself of each CTA's share
BARRIER_BYTES = 256
SCRATCH_REGISTERS = 44  # addresses and scalars of a consumer thread
LEAST_BUSY = 0.95  # share of the SMs that must have work
MERGE_WARPS = 16  # warps of the merge an SM: one latency for all of them
MAX_STAGES = 4
MAX_CTAS_PER_SM = 3
MAX_DV = 512
MAX_ROPE_ROW = 1024
FAMILIES = ("few_heads", "many_heads")


@dataclass(frozen=True)
class DeviceRecord:
    """What planning needs to know of a device.

    Attributes:
        capability: CUDA compute capability, `(0, 0)` for a CPU.
        sm_count: streaming multiprocessors, 0 for a CPU.
        name: for people.
    """

    capability: tuple[int, int]
    sm_count: int
    name: str = ""


@dataclass(frozen=True)
class Tiling:
    """What a TileLang decode kernel is specialised to and launched with.

    Attributes:
        family: `few_heads` puts tokens on the MMA's M and heads on N, `many_heads` the other way round.
        block_h: heads a CTA works on; the head groups of a worker sit side by side in the grid.
        block_n: tokens a tile.
        stages: cache tiles held in shared memory.
        ctas_per_sm: CTAs that share an SM.
        workers: CTAs a head group, each with an equal run of the batch's tiles.
        merge_ways: states of a cut row that a warp of the merge holds side by side.
        merge_parts: warps of the merge a row and head.
    """

    family: str
    block_h: int
    block_n: int
    stages: int
    ctas_per_sm: int
    workers: int
    merge_ways: int
    merge_parts: int

    def ints(self) -> tuple[int, ...]:
        """The tiling as plain integers, the form that crosses the operator boundary."""
        return (FAMILIES.index(self.family), *astuple(self)[1:])

    @classmethod
    def from_ints(cls, values: tuple[int, ...]) -> Tiling:
        return cls(FAMILIES[values[0]], *values[1:])


@dataclass(frozen=True)
class DecodePlan:
    """How a shape is decoded on a device; immutable, holds no device memory.

    Exact in `shape`, `dtype`, `q_len`, `page_size` and `device`; `batch` and `max_len` are upper bounds.

    Attributes:
        backend: `"tilelang"` or `"torch"`.
        reason: why this backend, a sentence.
        tiling: `Tiling.ints()`, empty for the torch backend.
    """

    shape: MLAShape
    batch: int
    max_len: int
    q_len: int
    page_size: int | None
    dtype: torch.dtype
    device: DeviceRecord
    backend: str
    reason: str
    tiling: tuple[int, ...] = ()

    def check(
        self,
        shape: MLAShape,
        batch: int,
        max_len: int,
        q_len: int,
        page_size: int | None,
        dtype: torch.dtype,
        device: DeviceRecord,
    ) -> None:
        """Raises ValueError where this plan was not made for such a call."""
        for name, planned, came in (
            ("shape", self.shape, shape),
            ("q_len", self.q_len, q_len),
            ("page_size", self.page_size, page_size),
            ("dtype", self.dtype, dtype),
            ("device", self.device, device),
        ):
            if planned != came:
                raise ValueError(f"plan was made for {name} {planned}, got {came}; call flexmla.plan for this {name}")
        for name, bound, size in (("batch", self.batch, batch), ("max_len", self.max_len, max_len)):
            if size > bound:
                raise ValueError(f"plan takes {name} up to {bound}, got {size}; call flexmla.plan with a larger {name}")


def rope_heads_per_group(shape: MLAShape, block_h: int) -> int:
    """Rotary keys that a group of `block_h` neighbouring heads touches, at most."""
    per_key = shape.n_heads // shape.n_rope_heads
    firsts = range(0, shape.n_heads, block_h)
    return max((min(h + block_h, shape.n_heads) - 1) // per_key - h // per_key + 1 for h in firsts)


def rope_tile_width(shape: MLAShape, block_h: int) -> int:
    """Columns of a CTA's rotary-key tile: its keys side by side, padded to a width that one swizzle covers."""
    width = rope_heads_per_group(shape, block_h) * shape.d_pe
    step = 64 if width > 32 else 32 if width > 16 else 16
    return -(-width // step) * step


def padded_heads(family: str, block_h: int) -> int:
    """Rows of the query tile: an MMA's N (multiples of 16) or M (64)."""
    return 64 if family == "many_heads" else -(-block_h // 16) * 16


def threads_per_cta(family: str) -> int:
    """A consumer warpgroup and two producer warps; or two and a producer warpgroup that gives up its registers."""
    return 384 if family == "many_heads" else 192


def registers_per_thread(family: str, ctas_per_sm: int) -> int:
    """What the compiler may use: an SM's four partitions have 512 registers a lane for the warps they hold."""
    warps = -(-ctas_per_sm * threads_per_cta(family) // 128)
    return 224 if family == "many_heads" else min(255, 512 // warps // 8 * 8)


def shared_memory(shape: MLAShape, family: str, block_h: int, block_n: int, stages: int) -> int:
    """Bytes of shared memory a CTA needs."""
    heads = padded_heads(family, block_h)
    row = 2 * (shape.dv + (rope_tile_width(shape, block_h) if shape.d_pe else 0))
    total = stages * block_n * row + heads * row + BARRIER_BYTES
    if family == "few_heads":
        total += 2 * block_n * heads + 2 * 4 * 4 * heads  # probabilities; maxima and sums, a row a warp
    return total


def _registers(shape: MLAShape, family: str, block_h: int, block_n: int) -> int:
    """A consumer thread's registers for accumulator, scores and elementwise sums."""
    heads = padded_heads(family, block_h)
    if family == "many_heads":
        return (heads * shape.dv // 2 + heads * block_n) // 128 + heads * block_n // 256
    return (heads * shape.dv + 2 * heads * block_n) // 128


def _workers(most: int, batch: int, row_tiles: int) -> int:
    """CTAs a head group: at most one a tile, and so many that full rows are not cut where that idles few SMs.

    Memory-bound work loses nothing by a few idle SMs, while a worker that ends one row and begins another stops loading
    for the time of an epilogue, and each cut adds a partial state.
    """
    tiles = max(1, batch * row_tiles)
    most = max(1, min(most, tiles))
    for workers in range(most, int(most * LEAST_BUSY), -1):
        chunk = -(-tiles // workers)
        if row_tiles % chunk == 0 or chunk % max(1, row_tiles) == 0:
            return workers
    return most


def _merge(shape: MLAShape, batch: int, workers: int, sm_count: int) -> tuple[int, int]:
    """Ways and parts of the merge: 8 states a lane in turn, and as many warps as keep it to MERGE_WARPS an SM."""
    states = workers // max(1, batch) + 2
    ways = min(8, 1 << max(0, (states - 1) // 8).bit_length())
    vectors = -(-shape.dv // 8)
    most = max(1, MERGE_WARPS * sm_count // max(1, batch * shape.n_heads))
    return ways, min(-(-vectors * ways // 32), most)


def _tilings(shape: MLAShape, sm_count: int, batch: int, max_len: int) -> Iterator[Tiling]:
    """Candidate tilings, the best first."""
    block_n = 64
    row_tiles = -(-max_len // block_n)
    candidates = [("few_heads", shape.n_heads)]
    if shape.dv % 128 == 0:  # its two warpgroups take half of dv each, in panels of 64
        groups = -(-shape.n_heads // 64)
        candidates.append(("many_heads", -(-shape.n_heads // (groups * 16)) * 16 if groups > 1 else shape.n_heads))
    candidates += [("few_heads", block_h) for block_h in (32, 16, 8) if block_h < shape.n_heads]
    for least_stages in (2, 1):
        for family, block_h in candidates:
            registers = _registers(shape, family, block_h, block_n)
            for ctas in range(MAX_CTAS_PER_SM if family == "few_heads" else 1, 0, -1):
                if registers + SCRATCH_REGISTERS > registers_per_thread(family, ctas):
                    continue
                limit = min(SMEM_PER_CTA, SMEM_PER_SM // ctas - SMEM_RESERVED)
                wanted = max(least_stages, 3 if ctas > 1 else 1)
                for stages in range(MAX_STAGES, wanted - 1, -1):
                    if shared_memory(shape, family, block_h, block_n, stages) <= limit:
                        workers = _workers(sm_count * ctas // -(-shape.n_heads // block_h), batch, row_tiles)
                        merge = _merge(shape, batch, workers, sm_count)
                        yield Tiling(family, block_h, block_n, stages, ctas, workers, *merge)


def tile(shape: MLAShape, batch: int, max_len: int, sm_count: int) -> Tiling | None:
    """Kernel family, tile and grid for a shape; None where no tile of it fits an SM."""
    return next(_tilings(shape, sm_count, batch, max_len), None)


@functools.cache
def tilelang_installed() -> bool:
    """Whether the optional dependency is there (it is not imported)."""
    return importlib.util.find_spec("tilelang") is not None


def tilelang_lacks(
    shape: MLAShape,
    dtype: torch.dtype,
    device: DeviceRecord,
    *,
    q_len: int = 1,
    paged: bool = False,
    starts: bool = False,
    softcap: bool = False,
    v_cache: bool = False,
    score_scale: bool = False,
    unaligned: bool = False,
    positive_scale: bool = True,
) -> str | None:
    """Why the TileLang backend does not take a combination; None where it does.

    `unaligned` stands for caches whose base or strides are no multiples of 16 bytes, or whose rotary keys of one token
    do not follow each other.
    """
    if device.capability != HOPPER:
        return f"it needs compute capability 9.0, this device has {'.'.join(map(str, device.capability))}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    for name, present in (
        ("q_len above 1", q_len > 1),
        ("a paged cache", paged),
        ("starts", starts),
        ("softcap", softcap),
        ("v_cache", v_cache),
        ("score_scale", score_scale),
    ):
        if present:
            return f"it does not take {name} yet"
    if unaligned:
        return "it takes caches aligned to 16 bytes in base and strides, a token's rotary keys side by side"
    if not positive_scale:
        return "it takes a softmax_scale above 0"
    if shape.dv % 64 or shape.dv > MAX_DV:
        return f"it takes a dv that is a multiple of 64 up to {MAX_DV}, not {shape.dv}"
    if shape.d_pe % 8:
        return f"it takes a d_pe that is a multiple of 8, not {shape.d_pe}"
    if shape.n_rope_heads * shape.d_pe > MAX_ROPE_ROW:
        return f"it takes n_rope_heads * d_pe up to {MAX_ROPE_ROW}, not {shape.n_rope_heads * shape.d_pe}"
    if tile(shape, 1, 1, device.sm_count) is None:
        return "no tile of this shape fits an SM's shared memory"
    return None


@functools.cache
def _cuda_record(index: int) -> DeviceRecord:
    properties = torch.cuda.get_device_properties(index)
    return DeviceRecord((properties.major, properties.minor), properties.multi_processor_count, properties.name)


def device_record(device: torch.device | str | DeviceRecord) -> DeviceRecord:
    """The record of a device; a record is returned as it is."""
    if isinstance(device, DeviceRecord):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        return DeviceRecord((0, 0), 0, device.type)
    return _cuda_record(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: MLAShape,
    batch: int,
    max_len: int,
    q_len: int,
    page_size: int | None,
    dtype: torch.dtype,
    record: DeviceRecord,
    lacks: str | None,
) -> DecodePlan:
    bounds = (shape, batch, max_len, q_len, page_size, dtype, record)
    if lacks is not None:
        return DecodePlan(*bounds, "torch", f"torch backend: TileLang is not used because {lacks}")
    if not tilelang_installed():
        install = "torch backend: TileLang is not installed (pip install 'flexmla[tilelang]')"
        return DecodePlan(*bounds, "torch", install)
    tiling = tile(shape, batch, max_len, record.sm_count)
    assert tiling is not None, "tilelang_lacks has found a tile for this shape"
    return DecodePlan(*bounds, "tilelang", "TileLang kernel", tiling.ints())


def plan(
    shape: MLAShape,
    batch: int,
    max_len: int,
    *,
    q_len: int = 1,
    page_size: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str | DeviceRecord,
) -> DecodePlan:
    """Chooses backend, tile and grid for decoding a shape on a device.

    Args:
        shape: the layer's shape; `v_width` set means a separate `v_cache`.
        batch: the most rows a call will have.
        max_len: the most tokens a row's cache holds.
        q_len: query tokens a row, exact.
        page_size: tokens a page, None for contiguous caches.
        dtype: of queries and caches.
        device: a device, or a `DeviceRecord` to plan for a device that is not there.

    Raises:
        ValueError: where a size is out of range.
    """
    for name, value, least in (("batch", batch, 0), ("max_len", max_len, 0), ("q_len", q_len, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    record = device_record(device)
    lacks = tilelang_lacks(
        shape, dtype, record, q_len=q_len, paged=page_size is not None, v_cache=shape.v_width is not None
    )
    return _plan(shape, batch, max_len, q_len, page_size, dtype, record, lacks)
