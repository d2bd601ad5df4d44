"""What `flexmla info` tells: versions, the GPU, and which backend a shape gets and why."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import astuple, fields
from importlib import metadata

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import flexmla

from .bench.case import Case
from .bench.expected import expected
from .models import ModelShape, model_shapes
from .plan import DeviceRecord, device_record, plan_scored
from .shape import MLAShape
from .tiling import Tiling, used_memory

MISSING = "not installed"


def version(package: str) -> str:
    """The installed version of a package, without importing it; `"not installed"` where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def driver_version() -> str:
    """The NVIDIA driver's version as `nvidia-smi` tells it, `"unknown"` where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.splitlines()[0].strip() if answer.strip() else "unknown"


def versions() -> dict[str, str]:
    """Versions that decide what runs here: flexmla, Python, PyTorch and its CUDA, and the optional packages."""
    return {
        "flexmla": flexmla.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none (CPU build of PyTorch)",
        "tilelang": version("tilelang"),
        "triton": version("triton"),
        "transformers": version("transformers"),
    }


def gpu(device: torch.device) -> dict[str, str]:
    """Name, compute capability, SMs, L2, memory and driver of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "SMs": str(properties.multi_processor_count),
        "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": driver_version(),
    }


def backend_of(
    model: ModelShape, batch: int, max_len: int, dtype: torch.dtype, device: torch.device | DeviceRecord
) -> tuple[str, str, Tiling | None]:
    """Backend, the reason for it, and the tile where it is TileLang, for one decode step of a model's layer.

    Args:
        model: shape and options of the layer.
        batch: rows.
        max_len: tokens a row.
        dtype: of queries and caches.
        device: a device, or the record of one that is not there.
    """
    plan = plan_scored(model.shape, batch, max_len, dtype=dtype, device=device, scoring=model.scoring)
    return plan.backend, plan.reason, Tiling.from_ints(plan.tiling) if plan.backend == "tilelang" else None


def run(
    *,
    shape: MLAShape | None,
    dtype: torch.dtype,
    batch: int,
    max_len: int,
    device: torch.device | DeviceRecord,
    console: Console,
) -> None:
    """Prints versions, the GPU, and the backend of one shape, or of every model of `shapes.json` where it is None.

    Args:
        shape: the layer asked about.
        dtype: of queries and caches.
        batch: rows of the decode step.
        max_len: tokens a row.
        device: a device, or the record of one that is not there.
        console: where to print.
    """
    facts = versions()
    if isinstance(device, torch.device) and device.type == "cuda":
        facts |= gpu(device)
    else:
        facts["device"] = device_record(device).name
    console.print(_facts(facts))
    if shape is None:
        models = model_shapes()
    else:
        models = (ModelShape(f"{shape.n_heads},{shape.n_rope_heads},{shape.dv},{shape.d_pe}", shape),)
    backends = [backend_of(model, batch, max_len, dtype, device) for model in models]
    reasons = {reason for _, reason, _ in backends}
    step = f"{str(dtype).removeprefix('torch.')}, batch {batch}, max_len {max_len}, q_len 1, contiguous"
    table = Table(title=f"Backends: {step}", title_justify="left")
    columns = ("model", "heads/rope", "dv+d_pe", "bytes a token", "backend", "why")
    # A reason that holds for all is told once, below.
    for column in columns if len(reasons) > 1 else columns[:-1]:
        table.add_column(column, overflow="fold")
    for model, (backend, reason, _) in zip(models, backends, strict=True):
        shape = model.shape
        widths = (f"{shape.n_heads}/{shape.n_rope_heads}", f"{shape.dv}+{shape.d_pe}")
        cells = (model.name, *widths, str(shape.bytes_per_token(dtype)), backend, escape(reason))
        table.add_row(*cells[: len(table.columns)])
    console.print(table)
    if len(reasons) == 1:
        console.print(*reasons, markup=False, highlight=False, soft_wrap=True)
    tilings = [(model, tiling) for model, (_, _, tiling) in zip(models, backends, strict=True) if tiling]
    if tilings:
        console.print(_tilings(tilings, batch, max_len, dtype, device_record(device)))


def _facts(facts: dict[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _tilings(
    tilings: list[tuple[ModelShape, Tiling]], batch: int, max_len: int, dtype: torch.dtype, device: DeviceRecord
) -> Table:
    table = Table(
        title="TileLang kernels", title_justify="left", caption="expected: a rule of thumb, mostly within a fifth"
    )
    columns = ("model", *(field.name for field in fields(Tiling)), "shared memory", "expected us", "of read")
    for column in columns:
        table.add_column(column, overflow="fold")
    for model, tiling in tilings:
        memory = used_memory(model.shape, tiling, scoring=model.scoring)
        case = Case("info", model.shape, batch, max_len, dtype, score_scale=model.score_scale, softcap=model.softcap)
        us, fraction = expected(case, tiling, device)
        figures = (f"{memory / 1024:.0f} KiB", f"{us:.1f}", f"{fraction:.2f}")
        table.add_row(model.name, *map(str, astuple(tiling)), *figures)
    return table
