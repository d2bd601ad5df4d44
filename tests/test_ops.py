from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flexmla
from flexmla import MLAShape, mla_decode, ops
from flexmla.cases import CaseSpace, random_case

FLOAT32 = CaseSpace(dtypes=(torch.float32,))
# Seeds whose cases differ in kind of cache, rope, options and given results.
SEEDS = range(6)


def operands(case):
    options = {"seq_lens": None, "block_table": None, "starts": None, "v_cache": None, "score_scale": None}
    options |= {name: value for name, value in case.options.items() if name in options}
    return (case.q_nope, case.q_pe, case.ckv_cache, case.kpe_cache, *options.values(), 0.1, 0.0, True, "auto", [])


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_opcheck(seed):
    arguments = operands(random_case(seed))
    torch.library.opcheck(ops.mla_decode, arguments)
    out, lse = ops.mla_decode(*arguments)
    torch.library.opcheck(ops.mla_decode_out, arguments, {"out": torch.empty_like(out), "lse": torch.empty_like(lse)})


@pytest.mark.parametrize("seed", SEEDS)
def test_fake_results_have_the_real_shapes_and_dtypes(seed):
    case = random_case(seed)
    real = ops.mla_decode(*operands(case))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.mla_decode(*operands(case))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("seed", SEEDS)
def test_functional_and_out_variants_give_the_same_bits(seed):
    arguments = operands(random_case(seed))
    out, lse = ops.mla_decode(*arguments)
    given = torch.full_like(out, float("nan")), torch.full_like(lse, float("nan"))
    assert ops.mla_decode_out(*arguments, out=given[0], lse=given[1]) is None
    assert torch.equal(out, given[0])
    assert torch.equal(lse, given[1])


class Backend:
    """Stands for the TileLang backend and its launches: one fills the results."""

    workspace = 17

    def launcher(self, *arguments):
        return self

    def __call__(self, q_nope, *arguments):
        *_, out, lse, workspace = arguments
        assert (workspace.shape, workspace.dtype) == ((17,), q_nope.dtype)
        assert all(x.is_contiguous() for x in (out, lse, workspace))
        out.fill_(1)
        lse.fill_(2)


def test_a_launcher_allocates_what_is_not_given_and_refuses_overlap(monkeypatch):
    monkeypatch.setattr(ops, "_choose", lambda *operands: ("tilelang", ()))
    monkeypatch.setattr(ops, "_tilelang", Backend)
    q, ckv = torch.zeros(2, 3, 4, 64), torch.zeros(2, 20, 64)
    v, scale = torch.zeros(2, 20, 32), torch.ones(2, 20, 4)
    inputs = (q, None, ckv, None, torch.ones(2, dtype=torch.int32), None, None, v, scale)
    operands = (*inputs, 0.1, 0.0, True, "tilelang", ())
    out, lse = ops.launcher(operands, None, None)(*inputs, None, None)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((2, 3, 4, 32), q.dtype, (2, 4, 3), torch.float32)
    assert bool((out == 1).all() and (lse == 2).all())
    run = ops.launcher(operands, out, lse)
    assert run(*inputs, out, lse) == (out, lse)
    assert run(*inputs, out, None)[0] is out
    memory = torch.zeros(4 * q.numel())
    for given, named in (
        ((q.view(-1)[: out.numel()].view(out.shape), lse), "out must not overlap .* q_nope"),
        ((memory[: out.numel()].view_as(out), memory[out.numel() - 1 :][: lse.numel()].view_as(lse)), "lse .* of out"),
        ((out, ckv.flatten()[-lse.numel() :].view_as(lse)), "lse must not overlap .* ckv_cache"),
        ((v.flatten()[: out.numel()].view_as(out), lse), "out must not overlap .* v_cache"),
        ((out, scale.flatten()[: lse.numel()].view_as(lse)), "lse must not overlap .* score_scale"),
    ):
        with pytest.raises(ValueError, match=named):
            run(*inputs, *given)


def test_a_launcher_takes_views_that_interleave(monkeypatch):
    monkeypatch.setattr(ops, "_choose", lambda *operands: ("tilelang", ()))
    monkeypatch.setattr(ops, "_tilelang", Backend)
    memory = torch.zeros(1, 100, 128)
    q, cache, out = torch.zeros(1, 1, 1, 64), memory[..., :64], memory[:, 50, 64:].view(1, 1, 1, 64)
    inputs = (q, None, cache, None, torch.ones(1, dtype=torch.int32), None, None, None, None)
    run = ops.launcher((*inputs, 0.1, 0.0, True, "tilelang", ()), out, None)
    assert run(*inputs, out, None)[0] is out
    assert bool((cache == 0).all())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("paged", [False, True])
def test_compiles_whole_with_dynamic_shapes(backend, paged):
    """One graph for every batch and length, with and without given results."""
    torch._dynamo.reset()

    def step(q_nope, q_pe, ckv, kpe, seq_lens, block_table, out=None):
        return mla_decode(q_nope * 2, q_pe, ckv, kpe, seq_lens=seq_lens, block_table=block_table, out=out)

    def inputs(batch, max_len):
        ckv, kpe = torch.randn(batch, max_len, 64), torch.randn(batch, max_len, 2, 16)
        table = None
        if paged:
            table = torch.arange(batch * max_len // 4, dtype=torch.int32).view(batch, -1)
            ckv, kpe = ckv.view(-1, 4, 64), kpe.view(-1, 4, 2, 16)
        lens = torch.full((batch,), max_len - 1, dtype=torch.int32)
        return torch.randn(batch, 1, 8, 64), torch.randn(batch, 1, 8, 16), ckv, kpe, lens, table

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        # No two sizes of the first call are equal: torch.compile would take them for one.
        for batch, max_len in ((3, 20), (6, 28), (9, 44)):
            arguments = inputs(batch, max_len)
            for a, b in zip(compiled(*arguments), step(*arguments), strict=True):
                assert torch.equal(a, b)
    for out in (torch.empty(9, 1, 8, 64), torch.empty(9, 1, 8, 80)[..., :64]):
        with torch.no_grad():
            assert compiled(*arguments, out=out)[0] is out
            assert torch.equal(out, step(*arguments)[0])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_compiles_with_a_plan(rope, dynamic):
    torch._dynamo.reset()
    made = flexmla.plan(MLAShape(8, 2 if rope else 1, 64, 16 if rope else 0), 9, 64, dtype=torch.float32, device="cpu")
    compiled = torch.compile(
        lambda *tensors: mla_decode(*tensors, plan=made), fullgraph=True, dynamic=dynamic, backend="eager"
    )
    for batch, max_len in ((3, 20), (5, 33)):
        q_pe = torch.randn(batch, 1, 8, 16) if rope else None
        kpe = torch.randn(batch, max_len, 2, 16) if rope else None
        tensors = torch.randn(batch, 1, 8, 64), q_pe, torch.randn(batch, max_len, 64), kpe
        for a, b in zip(compiled(*tensors), mla_decode(*tensors), strict=True):
            assert torch.equal(a, b)


def test_value_errors_keep_their_type_and_sentence_through_the_operator():
    q, ckv = torch.randn(2, 1, 2, 8), torch.randn(2, 10, 8)
    with pytest.raises(ValueError, match=r"seq_lens\[0\] is 11; a row of this cache holds 0 to 10 tokens"):
        ops.mla_decode(
            *(q, None, ckv, None, torch.tensor([11, 1], dtype=torch.int32), None, None, None, None),
            *(0.1, 0.0, True, "auto", []),
        )
