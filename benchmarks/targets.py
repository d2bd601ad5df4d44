"""What flexmla aims at on each GPU, beside what the rows of `benchmarks/results` say: the tables of docs/targets.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flexmla.bench.report import FLOOR, Row
from flexmla.bench.search import PREFIX
from flexmla.bench.suites import PER_HEAD, SHARED, SUITES
from flexmla.shape import MLAShape

SMALL_PAGES = (1, 2, 4, 8, 16, 32)
MTP = MLAShape(16, 1, 512, 64)


@dataclass(frozen=True)
class Target:
    """A figure that is aimed at.

    Attributes:
        what: in words, for people.
        limit: what is asked.
        unit: of both figures: "us", "s", "of read", "of matmul", "times", or "%".
        measured: the figures of the latest rows, the worst of which counts.
        reading: the same of a kernel that only reads as many bytes, where rows have it.
    """

    what: str
    limit: float
    unit: str
    measured: Callable[[list[Row]], Iterable[float]]
    reading: Callable[[list[Row]], Iterable[float]] = lambda rows: ()

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.unit.startswith("of ")

    def worst(self, rows: list[Row]) -> float | None:
        """The figure that counts; None where nothing is measured."""
        return (min if self.at_least else max)(self.measured(rows), default=None)

    def reached(self, figure: float) -> bool:
        """Whether a figure is what is asked."""
        return figure >= self.limit if self.at_least else figure <= self.limit


def latest(rows: list[Row], **wanted: Any) -> Row | None:
    """The last row of flexmla with these entries."""
    wanted = {"name": "flexmla", "q_len": 1} | wanted
    return next((row for row in reversed(rows) if all(row[key] == value for key, value in wanted.items())), None)


def of(suite: str, key: str, *shapes: MLAShape, **wanted: Any) -> Callable[[list[Row]], Iterator[float]]:
    """An entry of each shape's latest row."""

    def figures(rows: list[Row]) -> Iterator[float]:
        for shape in shapes:
            row = latest(rows, suite=suite, **layer(shape), **wanted)
            if row is not None and row[key] is not None:
                yield row[key]

    return figures


def ratio(
    suite: str, shape: MLAShape, case: dict[str, Any], other: dict[str, Any]
) -> Callable[[list[Row]], Iterator[float]]:
    """How many times as long one case takes as another of the same shape."""

    def figures(rows: list[Row]) -> Iterator[float]:
        row, to = (latest(rows, suite=suite, **layer(shape), **wanted) for wanted in (case, other))
        if row is not None and to is not None:
            yield row["us"] / to["us"]

    return figures


def pages(shape: MLAShape) -> Callable[[list[Row]], Iterator[float]]:
    """How many times as long small pages take as pages of 64."""

    def figures(rows: list[Row]) -> Iterator[float]:
        for page_size in SMALL_PAGES:
            size = {"batch": 64, "max_len": 8192}
            yield from ratio("paged", shape, size | {"page_size": page_size}, size | {"page_size": 64})(rows)

    return figures


def gains(batch: int) -> Callable[[list[Row]], Iterator[float]]:
    """What the best tile of the last search over all models gains, in percent, on each layer at one batch size."""

    def figures(rows: list[Row]) -> Iterator[float]:
        found = [row for row in rows if row["suite"] == "models" and row["batch"] == batch]
        searched = [row for row in found if row["name"].startswith(PREFIX)]
        runs: dict[Any, list[Row]] = {}
        for row in found:
            case = (*layer_of(row), row["date"])
            if searched and row["commit"] == searched[-1]["commit"]:
                runs.setdefault(case, []).append(row)
        for of_case in runs.values():
            ours = [row["us"] for row in of_case if row["name"] == "flexmla"]
            tiles = [row["us"] for row in of_case if row["name"].startswith(PREFIX)]
            if ours and tiles:
                yield 100 * (ours[0] / min(*ours, *tiles) - 1)

    return figures


def first_calls(name: str) -> Callable[[list[Row]], Iterator[float]]:
    """Seconds of the first call of every shape that was ever measured."""

    def figures(rows: list[Row]) -> Iterator[float]:
        found = {layer_of(row): row["us"] / 1e6 for row in rows if row["name"] == name}
        yield from found.values()

    return figures


LAYER = ("n_heads", "n_rope_heads", "dv", "d_pe")


def layer(shape: MLAShape) -> dict[str, int]:
    """A row's entries for a shape."""
    return {name: getattr(shape, name) for name in LAYER}


def layer_of(row: Row) -> tuple[Any, ...]:
    """A row's shape."""
    return tuple(row[name] for name in LAYER)


def both_keys(sizes: dict[tuple[int, int], tuple[str, float, float]]) -> Iterator[Target]:
    """Targets of 32 heads at dv 512 with a shared rope key and with one a head, contiguous and in pages of 64."""
    for key, suite, shape in (("a shared rope key", "llama2", SHARED), ("a key per head", "per-head", PER_HEAD)):
        for (batch, max_len), (unit, *limits) in sizes.items():
            limit, entry = limits[suite == "per-head"], "us" if unit == "us" else "frac_read"
            size = {"batch": batch, "max_len": max_len}
            what = f"32 heads, dv 512, d_pe 16, {key}, {batch} x {max_len // 1024}K"
            reading = of(suite, entry, shape, **size, name=FLOOR)
            yield Target(what, limit, unit, of(suite, entry, shape, **size, page_size=0), reading)
            yield Target(f"{what}, pages of 64", limit, unit, of("paged", entry, shape, **size, page_size=64), reading)


def paths() -> Iterator[Target]:
    """What engines use, on either GPU."""
    long, short = {"batch": 64, "max_len": 8192}, {"batch": 64, "page_size": 64}
    yield Target("pages of 1 to 32 to pages of 64, a shared key", 1.15, "times", pages(SHARED))
    yield Target("pages of 1 to 32 to pages of 64, a key per head", 1.15, "times", pages(PER_HEAD))
    yield Target(
        "one row of 128K beside 63 of 1K to the same tokens in even rows", 1.25, "times",
        ratio("ragged", SHARED, short | {"max_len": 131072}, short | {"max_len": 3072}),
    )  # fmt: skip
    for shape, q_len in ((MTP, 4), (SHARED, 2)):
        what = f"q_len {q_len} to 1, {shape.n_heads} heads"
        yield Target(what, 1.15, "times", ratio("mtp", shape, long | {"q_len": q_len, "page_size": 0}, long))
    many = of("deepseek", "frac_matmul", MLAShape(128, 1, 512, 64), batch=128, max_len=4096)
    yield Target("128 heads, dv 512, d_pe 64, 128 x 4K", 0.80, "of matmul", many)
    for batch, size in ((64, "64 x 8K"), (8, "8 x 2K"), (1, "1 x 128")):
        yield Target(f"gain of the best tile over the plan's, all models, {size}", 10, "%", gains(batch))
    for what, name, limit in (("the compiler", "first-call", 15), ("the disk cache", "first-call-cached", 0.5)):
        yield Target(f"first call with {what}", limit, "s", first_calls(f"flexmla-{name}"))


def h100_only() -> Iterator[Target]:
    """Other shapes at the memory's limit."""
    for n_heads in (8, 16, 24, 40, 48, 64):
        figure = of("deepseek", "frac_read", MLAShape(n_heads, 1, 512, 64), batch=64, max_len=8192)
        yield Target(f"{n_heads} heads, dv 512, d_pe 64, 64 x 8K", 0.93, "of read", figure)
    for dv in (128, 256):
        for key, several in (("a shared key", False), ("a key per head", True)):
            shapes = [case.shape for case in SUITES["small-latent"]()]
            shapes = [s for s in shapes if s.dv == dv and (s.n_rope_heads > 1) == several]
            figure = of("small-latent", "frac_read", *shapes, batch=64, max_len=8192)
            yield Target(f"dv {dv}, 16 to 32 heads, d_pe 16 and 32, {key}, 64 x 8K", 0.90, "of read", figure)
    for max_len, limit in ((32768, 0.70), (131072, 0.90)):
        figure = of("ragged", "frac_read", SHARED, batch=1, max_len=max_len)
        yield Target(f"32 heads, dv 512, d_pe 16, a shared key, 1 x {max_len // 1024}K", limit, "of read", figure)
    figure = of("deepseek", "frac_read", MTP, batch=128, max_len=1024)
    yield Target("16 heads, dv 512, d_pe 64, 128 x 1K", 0.90, "of read", figure)


TARGETS = {
    "h100": [
        *both_keys(
            {
                (8, 2048): ("us", 9, 14),
                (8, 4096): ("us", 15, 25),
                (64, 2048): ("of read", 0.90, 0.93),
                (64, 8192): ("of read", 0.95, 0.97),
            }
        ),
        *h100_only(),
        *paths(),
    ],
    "h200": [
        *both_keys(
            {(8, 2048): ("us", 8, 11), (64, 2048): ("of read", 0.85, 0.90), (64, 8192): ("of read", 0.93, 0.96)}
        ),
        *paths(),
    ],
}


def targets_table(rows: list[Row], gpu: str) -> str:
    """Each target of a GPU beside the latest figure; the worst where there are several."""
    lines = ["| | asked | measured | | only reading |", "| --- | --- | --- | --- | --- |"]
    for target in TARGETS[gpu]:
        figure = target.worst(rows)
        cells = ("not measured", "") if figure is None else (shown(figure, target.unit), mark(target, figure))
        reading = ", ".join(shown(only, target.unit) for only in target.reading(rows))
        lines.append(f"| {target.what} | {shown(target.limit, target.unit)} | {' | '.join(cells)} | {reading} |")
    return "\n".join(lines)


def mark(target: Target, figure: float) -> str:
    """Whether a target is reached."""
    return "reached" if target.reached(figure) else "missed"


def shown(figure: float, unit: str) -> str:
    """A figure with its unit: fractions with three digits, as targets have two."""
    if unit.startswith("of "):
        return f"{figure:.3f}".removeprefix("0").rstrip("0") + f" {unit}"
    return f"{figure:.3g} {unit}"
