"""From the masks transformers builds to the visible range of each row that `mla_decode` takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class VisibleRange:
    """A mask read as left padding plus causality: query i of a row sees `starts <= t < past + i + 1`.

    Attributes:
        starts: int32 `[batch]`, first visible token of each row; the number of slots where there is none.
        regular: bool `[batch]`, whether the row's mask is exactly that; None where all rows were found to be.
    """

    starts: Tensor
    regular: Tensor | None


def visible_range(mask: Tensor, past: int | Tensor, batch: int) -> VisibleRange:
    """Read a mask without synchronising with its device.

    Args:
        mask: bool `[batch or 1, 1, q_len, kv_len]`, True where a query may look.
        past: tokens in the cache before this step, an int or a scalar tensor.
        batch: rows of the step.
    """
    mask = mask[:, 0].expand(batch, -1, -1)
    q_len, kv_len = mask.shape[1:]
    slots = torch.arange(kv_len, device=mask.device)
    newest = mask[:, -1]
    starts = torch.where(newest.any(-1), newest.int().argmax(-1), kv_len)
    ends = past + torch.arange(1, q_len + 1, device=mask.device)
    expected = (slots >= starts[:, None, None]) & (slots < ends[:, None])
    return VisibleRange(starts.to(torch.int32), (mask == expected).flatten(1).all(-1))


class MaskReader:
    """Reads the mask of a forward pass once for all layers of a model."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._range: VisibleRange | None = None

    def read(self, mask: Tensor, past: int | Tensor, batch: int, *, first_layer: bool) -> VisibleRange | None:
        """The visible range of each row, or None where a mask is seen not to be one.

        Whether a mask has holes (padding on the right, a custom mask) is a value on its device. With a growing cache,
        or on a CPU, it is looked at; with a static cache on an accelerator, or in a compiled pass, it must not be:
        `regular` then stays a tensor, for the caller to act on.
        """
        if mask.dtype != torch.bool or mask.shape[1] != 1:
            return None
        if torch.compiler.is_compiling():
            return visible_range(mask, past, batch)
        if first_layer or mask is not self._mask:
            found: VisibleRange | None = visible_range(mask, past, batch)
            if found is not None and found.regular is not None and (isinstance(past, int) or mask.device.type == "cpu"):
                found = VisibleRange(found.starts, None) if bool(found.regular.all()) else None
            self._mask, self._range = mask, found
        return self._range
