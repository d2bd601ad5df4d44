from __future__ import annotations

import pytest
import torch

from flexmla.bench.ceilings import READ_BYTES, READ_CONFIGS, measure
from flexmla.bench.timing import GraphTimer


@pytest.mark.parametrize("config", READ_CONFIGS)
@pytest.mark.parametrize("sm_count", [108, 114, 132, 148])
def test_a_grid_reads_nearly_everything_and_nothing_else(config, sm_count):
    n_values = READ_BYTES // 4
    programs, rounds = config.grid(n_values, sm_count)
    assert 0.95 * n_values < programs * rounds * config.block * config.loads <= n_values
    assert config.ctas_per_sm == 0 or programs == config.ctas_per_sm * sm_count


@pytest.mark.parametrize("config", READ_CONFIGS)
def test_a_thread_has_several_16_byte_loads_in_flight(config):
    values_a_thread = config.block // (32 * config.warps)
    assert values_a_thread % 4 == 0
    assert config.loads * values_a_thread // 4 >= 4


@pytest.mark.gpu
def test_ceilings_are_plausible():
    device = torch.device("cuda")
    limits = measure(GraphTimer(device), device)
    assert limits.read_gb_s > limits.copy_gb_s * 0.8 > 0
    assert limits.matmul_tflops > 1
    if torch.cuda.get_device_capability(device) == (9, 0):
        assert limits.read_gb_s > 2500
        assert limits.matmul_tflops > 400
