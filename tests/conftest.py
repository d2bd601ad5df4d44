"""Shared by all tests: GPU tests skip themselves without a GPU, parallel workers do not fight for cores."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_configure() -> None:
    # Every worker would start a thread a core, and threads that wait for each other's cores are 10 times slower.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
