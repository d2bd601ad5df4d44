"""Which backend a shape gets on a device, and why, with its tile and grid: pure Python, no GPU needed."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, field

import torch

from .shape import PLAIN, MLAShape, Scoring
from .tiling import BLOCK_N, tile

HOPPER = (9, 0)
FAST_MEMORY = 4000  # GB/s, between an H100's and an H200's
MAX_DV = 2048
MAX_D_PE = 256
MAX_BATCH = 65535  # the second dimension of a grid
MAX_Q_LEN = 16
MAX_PAGE_SIZE = 256


@dataclass(frozen=True)
class DeviceRecord:
    """What planning needs to know of a device.

    Attributes:
        capability: CUDA compute capability, `(0, 0)` for a CPU.
        sm_count: streaming multiprocessors, 0 for a CPU.
        name: for people.
        memory_gb_s: peak bandwidth of its memory by clock and bus, GB/s; 0 where it is not known.
    """

    capability: tuple[int, int]
    sm_count: int
    name: str = field(default="", compare=False)
    memory_gb_s: float = field(default=0, compare=False)

    @property
    def fast_memory(self) -> bool:
        """Whether the memory is little slower than L2, as on an H200."""
        return self.memory_gb_s > FAST_MEMORY


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
            if planned is not came and planned != came:
                raise ValueError(f"plan was made for {name} {planned}, got {came}; call flexmla.plan for this {name}")
        for name, bound, size in (("batch", self.batch, batch), ("max_len", self.max_len, max_len)):
            if size > bound:
                raise ValueError(f"plan takes {name} up to {bound}, got {size}; call flexmla.plan with a larger {name}")


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
    page_size: int | None = None,
    batch: int = 1,
    scoring: Scoring = PLAIN,
) -> str | None:
    """Why the TileLang backend does not take a combination; None where it does."""
    if device.capability == (0, 0):
        return f"it needs a CUDA GPU of compute capability 9.0, not {device.name or 'a CPU'}"
    if device.capability != HOPPER:
        return f"it needs compute capability 9.0, this device has {'.'.join(map(str, device.capability))}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if q_len > MAX_Q_LEN:
        return f"it takes a q_len up to {MAX_Q_LEN}, not {q_len}"
    if page_size is not None and (page_size > MAX_PAGE_SIZE or page_size.bit_count() != 1):
        return f"it takes a page_size that is a power of two up to {MAX_PAGE_SIZE}, not {page_size}"
    if batch > MAX_BATCH:
        return f"it takes a batch up to {MAX_BATCH}, not {batch}"
    for name, width in (("dv", shape.dv), ("v_cache width", shape.v_width or 8)):
        if width % 8 or width > MAX_DV:
            return f"it takes a {name} that is a multiple of 8 up to {MAX_DV}, not {width}"
    if shape.d_pe % 2 or shape.d_pe > MAX_D_PE:
        return f"it takes an even d_pe up to {MAX_D_PE}, not {shape.d_pe}"
    if tile(shape, 1, 1, device.sm_count, q_len, scoring=scoring) is None:
        return "no tile of this shape fits an SM's shared memory"
    return None


@functools.cache
def _cuda_record(index: int) -> DeviceRecord:
    count = torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device must be one that PyTorch finds ({count} CUDA GPUs), got 'cuda:{index}'")
    properties = torch.cuda.get_device_properties(index)
    # kHz and bits, two transfers a clock; not in every release of PyTorch
    kbit_s = 2 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0)
    capability, memory_gb_s = (properties.major, properties.minor), kbit_s / 8e6
    return DeviceRecord(capability, properties.multi_processor_count, properties.name, memory_gb_s)


def device_record(device: torch.device | str | DeviceRecord) -> DeviceRecord:
    """The record of a device; a record is returned as it is."""
    if isinstance(device, DeviceRecord):
        return device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a PyTorch device such as cpu or cuda:0, got {device!r}") from error
    except TypeError as error:
        got = type(device).__name__
        raise TypeError(f"device must be a torch.device, a str or a DeviceRecord, got {got}") from error
    if device.type != "cuda":
        return DeviceRecord((0, 0), 0, device.type)
    if device.index is None:
        return _cuda_record(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return _cuda_record(device.index)


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: MLAShape,
    batch: int,
    max_len: int,
    q_len: int,
    page_size: int | None,
    dtype: torch.dtype,
    record: DeviceRecord,
    fast_memory: bool,  # the record's, by which records that are equal may differ
    lacks: str | None,
    installed: bool,
    scoring: Scoring,
) -> DecodePlan:
    bounds = (shape, batch, max_len, q_len, page_size, dtype, record)
    if lacks is not None:
        return DecodePlan(*bounds, "torch", f"torch backend: TileLang is not used because {lacks}")
    if not installed:
        install = "torch backend: TileLang is not installed (pip install 'flexmla[tilelang]')"
        return DecodePlan(*bounds, "torch", install)
    small_pages = page_size is not None and page_size < BLOCK_N
    tiling = tile(shape, batch, max_len, record.sm_count, q_len, small_pages, scoring, fast_memory)
    assert tiling is not None, "tilelang_lacks has found a tile for this shape"
    return DecodePlan(*bounds, "tilelang", "TileLang takes this shape on compute capability 9.0", tiling.ints())


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
        max_len: the most tokens a row's cache holds; of a paged one whole pages count.
        q_len: query tokens a row, exact.
        page_size: tokens a page, None for contiguous caches.
        dtype: of queries and caches.
        device: a device, or a `DeviceRecord` to plan for a device that is not there.

    Raises:
        TypeError: where an argument has the wrong type, or the dtype is none of the three.
        ValueError: where a size is out of range, or the device is not there.
    """
    return plan_scored(shape, batch, max_len, q_len=q_len, page_size=page_size, dtype=dtype, device=device)


def plan_scored(
    shape: MLAShape,
    batch: int,
    max_len: int,
    *,
    q_len: int = 1,
    page_size: int | None = None,
    dtype: torch.dtype,
    device: torch.device | str | DeviceRecord,
    scoring: Scoring = PLAIN,
) -> DecodePlan:
    """As `plan`, for a call that does more to its scores: a softcap, a `score_scale`."""
    if not isinstance(shape, MLAShape):
        raise TypeError(f"shape must be an MLAShape, got {type(shape).__name__}")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype!r}")
    sizes = [("batch", batch, 0), ("max_len", max_len, 0), ("q_len", q_len, 1)]
    for name, value, least in sizes + ([] if page_size is None else [("page_size", page_size, 1)]):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if page_size is not None:
        max_len = -(-max_len // page_size) * page_size
    record = device_record(device)
    lacks = tilelang_lacks(shape, dtype, record, q_len=q_len, page_size=page_size, batch=batch, scoring=scoring)
    installed = lacks is None and tilelang_installed()
    return _plan(shape, batch, max_len, q_len, page_size, dtype, record, record.fast_memory, lacks, installed, scoring)
