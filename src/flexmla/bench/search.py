"""Whether the plan's tile is the best: the others that there are, timed beside it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from flexmla import ops
from flexmla.plan import device_record
from flexmla.tiling import Tiling, choices

from .case import Case
from .inputs import LatentInputs
from .peers import Contender, flexmla_contender
from .report import Measured

SLACK = 0.1  # that the best may be faster than the plan's
PREFIX = "flexmla-tile-"


def searched(case: Case, device: torch.device) -> list[Contender]:
    """The case's kernels with every tile of `tiling.choices`; none where another backend decodes it."""
    if flexmla_contender(case, device).name != "flexmla":
        return []
    sm_count = device_record(device).sm_count
    tilings = choices(case.shape, case.batch, case.max_len, sm_count, case.q_len, case.scoring)
    return [_with_tile(tiling) for tiling in tilings]


def _with_tile(tiling: Tiling) -> Contender:
    backend: Any = importlib.import_module("flexmla.backends.tilelang")

    def decode(inputs: LatentInputs) -> tuple[Tensor, Tensor]:
        case, q = inputs.case, inputs.q_nope
        out, lse = ops.results(q, case.shape.out_width)
        caches = inputs.ckv, inputs.kpe, inputs.seq_lens, inputs.block_table, None, None, inputs.score_scale
        options = inputs.softmax_scale, case.softcap, True
        backend.decode(q, inputs.q_pe, *caches, *options, tiling.ints(), out, lse)
        return out, lse

    return Contender(PREFIX + tile_name(tiling), LatentInputs, decode)


def tile_name(tiling: Tiling) -> str:
    """A tile in a row's name: `few_heads-16x3-1-128` for 16 heads, 3 stages, 1 CTA an SM and 128 workers."""
    return f"{tiling.family}-{tiling.block_h}x{tiling.stages}-{tiling.ctas_per_sm}-{tiling.workers}"


def compared(results: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """Of each case, flexmla with its plan and the fastest of all tiles."""
    by_case: dict[Case, list[Measured]] = {}
    for result in results:
        by_case.setdefault(result.case, []).append(result)
    pairs = []
    for of_case in by_case.values():
        planned = [result for result in of_case if result.name == "flexmla"]
        if planned:
            tiles = [result for result in of_case if result.name.startswith(PREFIX)]
            pairs.append((planned[0], min((*planned, *tiles), key=lambda result: result.us)))
    return pairs


def search_table(results: Sequence[Measured], title: str) -> Table:
    """The plan's time beside the fastest tile's, for people."""
    out = Table(title=title, title_justify="left")
    for column in ("heads/rope dv+d_pe", "batch x len", "fastest tile"):
        out.add_column(column)
    for column in ("us", "fastest", "gain"):
        out.add_column(column, justify="right")
    for planned, best in compared(results):
        case, gain = planned.case, planned.us / best.us - 1
        cells = (case.layer, case.size, best.name.removeprefix(PREFIX), f"{planned.us:.1f}", f"{best.us:.1f}")
        out.add_row(*cells, f"{gain:.1%}", style="red" if gain > SLACK else None)
    return out


def search_misses(results: Sequence[Measured]) -> list[str]:
    """A sentence for each case whose fastest tile is more than SLACK faster than the plan's."""
    return [
        f"flexmla, {planned.case}: {planned.us:.1f} us, but {best.us:.1f} us with {best.name.removeprefix(PREFIX)}"
        for planned, best in compared(results)
        if planned.us / best.us - 1 > SLACK
    ]
