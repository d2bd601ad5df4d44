"""The `flexmla` program: a thin layer over the modules that do the work, each imported by its command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from .shape import MLAShape

# What a wrong call raises: shapes and values, dtypes, missing combinations and packages, files, a failed compile.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError, RuntimeError)

app = typer.Typer(
    help="Multi-head latent attention (MLA) decoding at any shape.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str | None, typer.Option(help="Device, such as cpu or cuda:0; default: CUDA where there is a GPU.")]
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def parse_dtype(name: str) -> torch.dtype:
    """A torch dtype from `fp16`, `bf16`, `fp32` or its torch name.

    Raises:
        ValueError: for any other name.
    """
    import torch

    full = DTYPES.get(name, name)
    if full not in DTYPES.values():
        raise ValueError(f"dtype must be fp16, bf16 or fp32, got {name!r}")
    dtype: torch.dtype = getattr(torch, full)
    return dtype


def parse_device(name: str | None) -> torch.device:
    """A torch device from its name, by default CUDA where there is a GPU.

    Raises:
        ValueError: where the name is no device, or the device is not there.
    """
    import torch

    from .plan import device_record

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device_record(name)
    device = torch.device(name)
    if device.type == "meta":
        raise ValueError("device must be one that holds data, got 'meta'")
    return device


def parse_shape(text: str) -> MLAShape:
    """A shape from `n_heads,n_rope_heads,dv,d_pe`.

    Raises:
        ValueError: where it is not four integers, or not a shape.
    """
    from .shape import MLAShape

    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"shape must be four integers n_heads,n_rope_heads,dv,d_pe, got {text!r}")
    return MLAShape(*map(int, parts))


def parse_lens(text: str) -> list[int]:
    """Row lengths from `131072,63x1024,0`: each a length, or a count and a length.

    Raises:
        ValueError: where a part is neither.
    """
    lens = []
    for part in text.split(","):
        count, x, length = part.strip().rpartition("x")
        if not length.isdecimal() or (x and not count.isdecimal()):
            raise ValueError(f"lens must be row lengths such as 131072,63x1024, got {text!r}")
        lens += [int(length)] * (int(count) if x else 1)
    return lens


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, and wide enough for them where the output goes elsewhere."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=160)


@app.command()
def demo(
    rank: Annotated[int, typer.Option(help="Width of the shared latent.")] = 192,
    d_pe: Annotated[int, typer.Option(help="Rotary dimensions a head keeps.")] = 32,
    prompt: Annotated[str | None, typer.Option(help="What the models answer; default: why the sky is blue.")] = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; default: fp32 on CPU, bf16 on CUDA.")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A .gguf file or a model folder instead of the downloaded SmolLM2.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Convert a real model to MLA and let it answer beside the original."""
    from . import demo

    demo.run(
        prompt=demo.DEFAULT_PROMPT if prompt is None else prompt,
        rank=rank,
        d_pe=d_pe,
        device=parse_device(device),
        dtype=None if dtype is None else parse_dtype(dtype),
        weights=weights,
        json_path=json,
        console=Console(),
    )


@app.command()
def check(
    seed: Annotated[int | None, typer.Option(help="Repeat the one case of this seed.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="How many random cases.")] = 200,
    first_seed: Annotated[int, typer.Option(min=0, help="The seed that they count from.")] = 0,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32; default: every dtype.")] = None,
    backend: Annotated[str, typer.Option(help="auto, tilelang or torch.")] = "auto",
) -> None:
    """Compare mla_decode with the reference on random cases; exit code 1 on a miss."""
    from . import check

    misses = check.run(
        cases=cases,
        first_seed=first_seed,
        seed=seed,
        device=parse_device(device),
        dtype=None if dtype is None else parse_dtype(dtype),
        backend=backend,
        console=wide_console(),
    )
    raise typer.Exit(1 if misses else 0)


@app.command()
def info(
    shape: Annotated[
        str | None, typer.Option(help="n_heads,n_rope_heads,dv,d_pe; default: every model that is known.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    batch: Annotated[int, typer.Option(min=1, help="Rows of the decode step.")] = 64,
    max_len: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 8192,
    device: Device = None,
) -> None:
    """Show versions, the GPU, and which backend a shape gets and why."""
    from . import info

    info.run(
        shape=None if shape is None else parse_shape(shape),
        dtype=parse_dtype(dtype),
        batch=batch,
        max_len=max_len,
        device=parse_device(device),
        console=wide_console(),
    )


SHAPE_FLAGS = ("n_rope_heads", "dv", "d_pe", "batch", "max_len", "lens", "page_size", "q_len")


@app.command()
def bench(
    context: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="Among llama2, per-head, deepseek, small-latent, models, paged, ragged and mtp; default: llama2."
        ),
    ] = None,
    n_heads: Annotated[int | None, typer.Option(help="Measure one shape: query heads.")] = None,
    n_rope_heads: Annotated[int, typer.Option(help="Rotary keys a token.")] = 1,
    dv: Annotated[int, typer.Option(help="Latent width.")] = 512,
    d_pe: Annotated[int, typer.Option(help="Rotary width.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows.")] = 64,
    max_len: Annotated[int, typer.Option(help="Tokens a row.")] = 8192,
    lens: Annotated[
        str | None, typer.Option(help="Tokens of each row instead, such as 131072,63x1024 for 64 rows.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a page; 0: contiguous.")] = 0,
    q_len: Annotated[int, typer.Option(help="Query tokens a row.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    peers: Annotated[bool, typer.Option(help="Time eager MLA and SDPA on the original MHA too.")] = True,
    overhead: Annotated[bool, typer.Option("--overhead", help="Measure the host's time of an eager call too.")] = False,
    cold_start: Annotated[
        bool, typer.Option("--cold-start", help="Measure the first call of a new process too.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Time the other tiles that a kernel could have, instead of peers.")
    ] = False,
    device: Device = None,
    json: Annotated[Path | None, typer.Option(help="Append a row a measurement to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw fraction of read over bytes to this file.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit in the rows, where the checkout has no history.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Compare with the code of another checkout, in this folder.")
    ] = None,
) -> None:
    """Measure decode steps against the machine's limits; exit code 1 where one is wrong (or --search finds better)."""
    from .bench.case import Case
    from .bench.cold import cold_cases
    from .bench.run import run
    from .bench.suites import overhead_cases, suite_cases
    from .shape import MLAShape

    chosen = parse_dtype(dtype)
    sources = {name: context.get_parameter_source(name) for name in SHAPE_FLAGS}
    given = ["--" + name.replace("_", "-") for name, source in sources.items() if source and source.name != "DEFAULT"]
    if n_heads is None:
        if given:
            raise ValueError(f"bench takes {given[0]} for a shape by flags, with --n-heads, got no --n-heads")
        selected = suites or ([] if overhead or cold_start else ["llama2"])
        cases = suite_cases(selected, chosen)
    elif suites:
        raise ValueError(f"bench takes suites or a shape by flags, got {suites} and --n-heads {n_heads}")
    else:
        shape = MLAShape(n_heads, n_rope_heads, dv, d_pe)
        values = {"--" + name.replace("_", "-"): context.params[name] for name in ("n_heads", *SHAPE_FLAGS)}
        selected = [str(part) for flag in ("--n-heads", *given) for part in (flag, values[flag])]
        if lens is None:
            case = Case("shape", shape, batch, max_len, chosen, page_size=page_size, q_len=q_len)
        elif "--batch" in given or "--max-len" in given:
            raise ValueError(f"bench takes --lens or --batch and --max-len, got --lens {lens} and one of the others")
        else:
            case = Case.ragged("shape", shape, parse_lens(lens), page_size=page_size, dtype=chosen, q_len=q_len)
        cases = [case]
    misses = run(
        cases,
        device=parse_device(device),
        peers=peers,
        json_path=json,
        plot_path=plot,
        commit=commit,
        console=wide_console(),
        overhead=overhead_cases(chosen) if overhead else [],
        cold=cold_cases(chosen) if cold_start else [],
        search=search,
        base=base,
        base_arguments=[*selected, "--dtype", dtype, *(["--device", device] if device else [])],
    )
    raise typer.Exit(1 if misses else 0)


def main(args: list[str] | None = None) -> None:
    """Runs the program; an expected error is one sentence on stderr and exit code 2.

    With FLEXMLA_DEBUG set in the environment, an error keeps its traceback.
    """
    try:
        app(args)
    except USER_ERRORS as error:
        if os.environ.get("FLEXMLA_DEBUG"):
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
