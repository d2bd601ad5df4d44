"""Small calls through every kernel and branch, to be run under compute-sanitizer: `make sanitize`.

`python tests/sanitize.py 2 8` takes the third of eight shares, so that eight processes can do it side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from flexmla import MLAShape, PagedLatentCache
from flexmla.cases import CaseSpace, random_case
from flexmla.check import bounds, row_errors
from flexmla.shape import Scoring, Specialisation

FP16, BF16 = torch.float16, torch.bfloat16
# both families; shared, grouped and per-head keys, none; all loaders; one and several queries; one and several groups;
# widths that are no whole panels; clusters; options
SPECIALISATIONS = (
    Specialisation(MLAShape(32, 1, 512, 16), FP16, 1, "contiguous"),
    Specialisation(MLAShape(32, 32, 512, 16), FP16, 1, "pages"),
    Specialisation(MLAShape(16, 1, 512, 64), FP16, 4, "contiguous"),
    Specialisation(MLAShape(16, 1, 512, 64), FP16, 1, "gather"),
    Specialisation(MLAShape(16, 1, 128, 32), FP16, 1, "gather"),
    Specialisation(MLAShape(20, 5, 128, 32), FP16, 2, "gather"),  # fewer chunks than warps
    Specialisation(MLAShape(15, 5, 448, 8), FP16, 3, "scalar"),
    Specialisation(MLAShape(64, 1, 512, 64), FP16, 1, "contiguous"),
    Specialisation(MLAShape(64, 1, 512, 64), FP16, 1, "gather"),
    Specialisation(MLAShape(64, 1, 512, 64), FP16, 2, "contiguous"),
    Specialisation(MLAShape(96, 1, 512, 0), BF16, 1, "contiguous"),
    Specialisation(MLAShape(48, 1, 384, 0), BF16, 2, "pages"),  # three stages, which two warpgroups share out
    Specialisation(MLAShape(128, 1, 128, 32), FP16, 1, "contiguous"),
    Specialisation(MLAShape(12, 4, 256, 8), FP16, 16, "pages"),
    Specialisation(MLAShape(9, 3, 24, 8), FP16, 1, "contiguous"),
    Specialisation(MLAShape(5, 5, 96, 6), BF16, 4, "scalar"),
    Specialisation(MLAShape(32, 32, 1024, 16), FP16, 1, "contiguous"),
    Specialisation(MLAShape(16, 16, 2048, 16), BF16, 4, "gather"),
    Specialisation(MLAShape(16, 8, 512, 32), FP16, 1, "pages", Scoring(True, 8, torch.float32)),
    Specialisation(MLAShape(32, 1, 512, 16, 200), FP16, 1, "gather", Scoring(False, 1, FP16)),
    Specialisation(MLAShape(32, 32, 512, 16), FP16, 1, "pages_of_16"),
    Specialisation(MLAShape(16, 8, 256, 32, 64), BF16, 2, "pages_of_16", Scoring(True, 8, torch.float32)),
    Specialisation(MLAShape(96, 1, 512, 64), BF16, 1, "pages_of_16"),
    Specialisation(MLAShape(40, 8, 192, 20, 64), BF16, 2, "scalar", Scoring(True, 8, BF16)),
)
CASES_EACH = 3


def decode(specialisations: Sequence[Specialisation]) -> int:
    """Random cases of every specialisation; the number of wrong ones."""
    wrong = 0
    for specialisation in specialisations:
        space = CaseSpace(specialisations=(specialisation,), max_len=300, max_tokens=600)
        for seed in range(CASES_EACH):
            case = random_case(seed, space, "cuda")
            errors = row_errors(*case.decode(backend="tilelang"), *case.expected())
            if not errors.within(bounds(specialisation.dtype)):
                print(f"wrong, {errors}: {case.describe()}")
                wrong += 1
    return wrong


def append() -> None:
    """New tokens in every kind of cache, rotated and not."""
    for shape, dtype, page_size in (
        (MLAShape(8, 8, 64, 16), FP16, 4),
        (MLAShape(9, 3, 24, 6), BF16, 1),
        (MLAShape(8, 1, 512, 0), FP16, 64),
    ):
        cache = PagedLatentCache(shape, 48, page_size, dtype, "cuda")
        sequences = [cache.allocate(n) for n in (0, 3, 5)]
        ckv = torch.randn(3, 2, shape.dv, dtype=dtype, device="cuda")
        kpe = torch.randn(3, 2, shape.n_rope_heads, shape.d_pe, dtype=dtype, device="cuda") if shape.d_pe else None
        cache.append(sequences, ckv, kpe)
        if kpe is not None:
            angle = torch.rand(3, 2, shape.d_pe, device="cuda")
            cache.append(sequences, ckv, kpe, angle.cos().to(dtype), angle.sin().to(dtype))
    torch.cuda.synchronize()


if __name__ == "__main__":
    share, shares = map(int, sys.argv[1:] or (0, 1))
    append()
    sys.exit(decode(SPECIALISATIONS[share::shares]))
