"""What tests that launch the kernels need."""

from __future__ import annotations

import pytest
import torch

from flexmla.plan import tilelang_installed

ON_HOPPER = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tilelang_installed(), reason="needs TileLang: pip install 'flexmla[tilelang]'"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
        reason="needs compute capability 9.0",
    ),
]
