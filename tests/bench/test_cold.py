from __future__ import annotations

from flexmla.bench.cold import cold_cases
from flexmla.tiling import tile


def test_each_kernel_family_has_a_case():
    tilings = [tile(case.shape, case.batch, case.max_len, 132) for case in cold_cases()]
    assert [tiling.family for tiling in tilings if tiling] == ["few_heads", "many_heads"]
