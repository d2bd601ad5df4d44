from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from flexmla import MLAShape
from flexmla.bench import peers
from flexmla.bench.case import Case
from flexmla.bench.inputs import READ_CHUNK, LatentInputs, MHAInputs, ReadInputs
from flexmla.bench.peers import flexmla_contender, peers_of, sdpa_mha, torch_eager
from flexmla.check import bounds, row_errors
from flexmla.plan import DeviceRecord

CPU = torch.device("cpu")
CASES = [
    Case("shape", MLAShape(6, 1, 64, 16), 3, 300),
    Case("shape", MLAShape(6, 6, 64, 16), 3, 300),
    Case("shape", MLAShape(6, 2, 64, 0), 3, 300),
    Case("shape", MLAShape(6, 2, 64, 16), 3, 300, torch.bfloat16, score_scale=True),
    Case("shape", MLAShape(6, 2, 64, 16), 3, 300, softcap=5.0),
    Case("shape", MLAShape(6, 2, 64, 16), 3, 304, page_size=16, q_len=3),
    Case.ragged("shape", MLAShape(6, 2, 64, 16), [0, 1, 50, 17], page_size=16, q_len=2),
    Case.ragged("shape", MLAShape(6, 1, 64, 16), [0, 1, 50, 17]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_latent_contenders_are_right(case):
    inputs = LatentInputs.random(case, CPU, torch.Generator().manual_seed(0))
    right, right_lse = inputs.expected()
    bound = bounds(case.dtype)
    out, lse = flexmla_contender(case, CPU).decode(inputs)
    assert out.dtype == case.dtype
    assert row_errors(out, lse, right, right_lse).within(bound)
    if peers_of(case):
        out, _ = torch_eager(inputs)
        assert out.dtype == case.dtype
        # its scores are of the inputs' dtype, and short rows average little of that away
        assert row_errors(out, right_lse, right, right_lse).row < 2 * bound.row


def test_sdpa_is_right():
    case = CASES[0]
    inputs = MHAInputs.random(case, CPU, torch.Generator().manual_seed(0))
    (out, _), (right, right_lse) = sdpa_mha(inputs), inputs.expected()
    assert row_errors(out, right_lse, right, right_lse).within(bounds(case.dtype))


def test_the_read_moves_the_bytes_of_a_step_and_its_sums_are_checked(monkeypatch):
    class read_sum:  # in place of the Triton kernel: a program a chunk
        def __class_getitem__(cls, grid):
            def launch(src, sums, rounds, block, loads, num_warps):
                assert (rounds * block * loads, *grid) == (READ_CHUNK, src.shape[0])
                sums.copy_(src.sum(1, dtype=torch.int32))

            return launch

    monkeypatch.setitem(sys.modules, "flexmla.bench.read_kernel", SimpleNamespace(read_sum=read_sum))
    case = Case("shape", MLAShape(6, 1, 64, 16), 3, 3000)
    inputs = ReadInputs.random(case, CPU, torch.Generator().manual_seed(0))
    assert 0 <= case.n_bytes - inputs.chunks.nbytes < 4 * READ_CHUNK
    (sums, _), (right, nothing) = peers.read(inputs), inputs.expected()
    assert row_errors(sums, nothing, right, nothing) == (0, 0)
    sums[0, 0, -1] += 1
    assert row_errors(sums, nothing, right, nothing).row > 0


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192), "flexmla"),
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192, score_scale=True), "flexmla"),
        (Case("shape", MLAShape(16, 1, 512, 16), 64, 8192, softcap=50.0), "flexmla"),
        (Case("shape", MLAShape(9, 3, 24, 8), 64, 8192), "flexmla"),
        (Case("shape", MLAShape(9, 3, 28, 8), 64, 8192), "flexmla-torch"),
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192, page_size=16, q_len=4), "flexmla"),
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192, q_len=17), "flexmla-torch"),
        (Case("shape", MLAShape(32, 32, 512, 16), 64, 8192, page_size=1024), "flexmla-torch"),
    ],
    ids=str,
)
def test_the_name_says_which_backend_runs(monkeypatch, case, name):
    monkeypatch.setattr(import_module("flexmla.plan"), "tilelang_installed", lambda: True)
    hopper = DeviceRecord((9, 0), 132, "Hopper with TileLang")
    assert flexmla_contender(case, hopper).name == name
    assert flexmla_contender(case, CPU).name == "flexmla-torch"


def test_peers_stand_beside_one_query_token_and_full_contiguous_rows_only():
    assert peers_of(CASES[0]) == peers.PEERS
    assert all(peers_of(case) == () for case in CASES if case.page_size or case.lens or case.q_len > 1)


def test_names_are_what_rows_are_told_apart_by():
    assert [peer.name for peer in peers.PEERS] == ["read", "torch-eager", "flexmla-torch", "sdpa-mha"]
