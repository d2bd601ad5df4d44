"""Every layer of `shapes.json` on the TileLang backend: both dtypes, contiguous and paged, one and several queries."""

from __future__ import annotations

import pytest
import torch

from flexmla.cases import CaseSpace, random_case
from flexmla.check import bounds, row_errors
from flexmla.models import ModelShape, model_shapes
from flexmla.shape import Specialisation

from .compiling import compile_all
from .hopper import ON_HOPPER

pytestmark = ON_HOPPER

LAYERS = tuple({(m.shape, m.scoring): m for m in model_shapes()}.values())  # models whose layers are the same share one
DTYPES = (torch.float16, torch.bfloat16)
LOADERS = ("contiguous", "pages")
Q_LENS = (1, 4)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compile_all(
        Specialisation(model.shape, dtype, q_len, loader, model.scoring)
        for model in LAYERS
        for dtype in DTYPES
        for q_len in Q_LENS
        for loader in LOADERS
    )


@pytest.mark.parametrize("q_len", Q_LENS)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("model", LAYERS, ids=[model.name for model in LAYERS])
def test_a_model_s_layer(model: ModelShape, dtype: torch.dtype, loader: str, q_len: int) -> None:
    specialisation = Specialisation(model.shape, dtype, q_len, loader, model.scoring)
    space = CaseSpace(max_batch=3, max_len=700, max_tokens=2000, specialisations=(specialisation,))
    for seed in range(4):
        case = random_case(seed, space, "cuda")
        with torch.inference_mode():
            errors = row_errors(*case.decode(backend="tilelang"), *case.expected())
        assert errors.within(bounds(dtype)), (case.describe(), errors)
