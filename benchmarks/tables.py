"""Writes the measured tables and the plot of the documentation from `benchmarks/results`: `make tables`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from targets import latest, layer, targets_table

from flexmla.bench.peers import TORCH_BACKEND
from flexmla.bench.report import FLOOR, Row, plot
from flexmla.bench.suites import PER_HEAD, SHARED, SUITES
from flexmla.plan import HOPPER, DeviceRecord, tilelang_lacks
from flexmla.tiling import tile

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results"
NOT_MEASURED = "not measured"
BESIDE = (FLOOR, "torch-eager", "sdpa-mha")  # what the first table shows beside flexmla
H100 = DeviceRecord(HOPPER, 132, "NVIDIA H100")


def rows(gpu: str) -> list[Row]:
    """What was measured on a GPU, `h100` or `h200`."""
    return [json.loads(line) for line in (ROWS / f"{gpu}.jsonl").read_text(encoding="utf-8").splitlines()]


def find(found: list[Row], suite: str, name: str, shape: Any, batch: int, max_len: int) -> Row | None:
    """The latest row of a contender on one case of contiguous caches."""
    return latest(found, suite=suite, name=name, batch=batch, max_len=max_len, page_size=0, **layer(shape))


def llama2_table(found: list[Row]) -> str:
    """flexmla beside the peers on the two shapes that the project began with."""
    lines = [
        "| rope key | batch x length | flexmla | of read | the same bytes read | eager PyTorch "
        "| flash attention of the original MHA |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for suite, shape, key in (("llama2", SHARED, "shared"), ("per-head", PER_HEAD, "per head")):
        for batch, max_len in ((8, 2048), (8, 4096), (64, 2048), (64, 8192)):
            ours, *others = (find(found, suite, name, shape, batch, max_len) for name in ("flexmla", *BESIDE))
            cells = [_us(ours), _fraction(ours), *map(_us, others)]
            lines.append(f"| {key} | {batch} x {max_len // 1024}K | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain_table(found: list[Row], suites: Sequence[str]) -> str:
    """flexmla alone on all cases of some suites that one GPU has rows of."""
    lines = [
        "| heads / rope heads | dv + d_pe | batch x length | flexmla | of read |",
        "| --- | --- | --- | --- | --- |",
    ]
    for suite in suites:
        for case in SUITES[suite]():
            shape = case.shape
            row = find(found, suite, "flexmla", shape, case.batch, case.max_len)
            size = f"{shape.n_heads} / {shape.n_rope_heads} | {shape.dv} + {shape.d_pe}"
            lines.append(
                f"| {size} | {case.batch} x {case.max_len // 1024}K | {_us(row) or NOT_MEASURED} | {_fraction(row)} |"
            )
    return "\n".join(lines)


def models_table(found: list[Row]) -> str:
    """Every model of `shapes.json`: what decodes it and how fast."""
    lines = [
        "| model | heads / rope heads | dv + d_pe | decoded by | of read at 64 x 8K | us at 8 x 2K |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    long_cases = [case for case in SUITES["models"]() if case.batch == 64]
    for case in long_cases:
        shape = case.shape
        lacks = tilelang_lacks(shape, torch.float16, H100, batch=case.batch, scoring=case.scoring)
        tiling = tile(shape, 64, 8192, H100.sm_count, scoring=case.scoring) if lacks is None else None
        by = f"torch: {lacks}"
        if tiling is not None:
            groups = -(-shape.n_heads // tiling.block_h)
            by = f"`{tiling.family}`, {groups} x {tiling.block_h} heads, {tiling.stages} stages"
            if tiling.parts > 1:
                by += f", clusters of {tiling.parts}"
        name = TORCH_BACKEND if lacks else "flexmla"
        long, short = (find(found, "models", name, shape, *size) for size in ((64, 8192), (8, 2048)))
        size = f"{shape.n_heads} / {shape.n_rope_heads} | {shape.dv} + {shape.d_pe}"
        cells = (_fraction(long), _us(short).removesuffix(" us"))
        lines.append(f"| {case.label} | {size} | {by} | {' | '.join(cell or NOT_MEASURED for cell in cells)} |")
    return "\n".join(lines)


def source(found: list[Row], suite: str, beside: Sequence[str] = ()) -> str:
    """Where the latest figures of a suite come from, and those beside flexmla's, if from elsewhere: in sentences."""
    last, commits = _latest(found, suite, ("flexmla",))
    text = (
        f"Measured on {last['date'][:10]} on an {last['gpu']} that reads {last['read_gb_s']:.0f} GB/s, fp16, {commits}."
    )
    if any(row["suite"] == suite and row["name"] in beside for row in found):
        other, others = _latest(found, suite, beside)
        if others != commits:
            text += f" What stands beside flexmla: on {other['date'][:10]}, {others}."
    return text


def _latest(found: list[Row], suite: str, names: Sequence[str]) -> tuple[Row, str]:
    """The last row of some contenders in a suite, and which commits the latest rows of all its cases are of."""
    latest = {
        tuple(row[key] for key in ("name", "n_heads", "n_rope_heads", "dv", "d_pe", "batch", "max_len")): row
        for row in found
        if row["suite"] == suite and row["name"] in names
    }
    commits = dict.fromkeys(row["commit"][:12] for row in reversed(latest.values()))
    return list(latest.values())[-1], f"{'commit' if len(commits) == 1 else 'commits'} {' and '.join(commits)}"


# by the GPU whose rows they show
TABLES: dict[str, dict[str, Callable[[list[Row]], str]]] = {
    "h100": {
        "llama2": llama2_table,
        "source of llama2": functools.partial(source, suite="llama2", beside=BESIDE),
        "models": models_table,
        "source of models": functools.partial(source, suite="models"),
        "targets on an H100": functools.partial(targets_table, gpu="h100"),
    },
    "h200": {
        "an H200": functools.partial(plain_table, suites=("llama2", "per-head", "deepseek")),
        "source of an H200": functools.partial(source, suite="llama2"),
        "small latents on an H200": functools.partial(plain_table, suites=("small-latent",)),
        "source of small latents on an H200": functools.partial(source, suite="small-latent"),
        "targets on an H200": functools.partial(targets_table, gpu="h200"),
    },
}
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("models", "kernels", "targets")))


def filled(text: str, found: list[Row], gpu: str = "h100") -> str:
    """A page with a GPU's tables between their marks."""
    for name, table in TABLES[gpu].items():
        begin, end = f"<!-- {name}, by benchmarks/tables.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + "\n" + table(found) + "\n\n" + end + rest.split(end, 1)[1]
    return text


def _us(row: Row | None) -> str:
    return "" if row is None else f"{row['us']:.1f} us" if row["us"] < 100 else f"{row['us']:.0f} us"


def _fraction(row: Row | None) -> str:
    return "" if row is None else f"{row['frac_read']:.2f}".removeprefix("0")


if __name__ == "__main__":
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for card in TABLES:
            content = filled(content, rows(card), card)
        page.write_text(content, encoding="utf-8")
    drawn = [
        row
        for row in rows("h100")
        if row["suite"] in ("llama2", "per-head") and row["name"] not in ("sdpa-mha", TORCH_BACKEND)
    ]
    plot(drawn, ROOT / "docs" / "read.png")
