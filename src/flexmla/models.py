"""The MLA shapes of known models, from `shapes.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

from .shape import MLAShape, Scoring


@dataclass(frozen=True)
class ModelShape:
    """The attention of one model.

    Attributes:
        name: the model, and the rank's share of it where heads are split over ranks.
        shape: its shape.
        score_scale: whether its q/k-norm needs a `score_scale` a token and rope head.
        softcap: cap of its attention scores, 0 for none.
    """

    name: str
    shape: MLAShape
    score_scale: bool = False
    softcap: float = 0.0

    @property
    def scoring(self) -> Scoring:
        """What is done to its scores."""
        return Scoring.of_layer(self.shape, self.softcap, self.score_scale)


def model_shapes() -> tuple[ModelShape, ...]:
    """Every row of `shapes.json`: converted models (MHA2MLA, TransMLA, X-EcoMLA) and native MLA models."""
    rows = json.loads(files(__package__).joinpath("shapes.json").read_text(encoding="utf-8"))
    return tuple(
        ModelShape(
            name=row["model"],
            shape=MLAShape(row["n_heads"], row["n_rope_heads"], row["dv"], row["d_pe"]),
            score_scale=row.get("score_scale", False),
            softcap=row.get("softcap", 0.0),
        )
        for row in rows
    )
