from __future__ import annotations

import pytest
import torch

import flexmla
from flexmla import DeviceRecord, MLAShape, mla_decode, plan

BATCH, Q_LEN, N_HEADS, DV, D_PE, GROUPS, MAX_LEN, PAGE = 2, 3, 4, 16, 8, 2, 12, 4


def call(**changes):
    """A valid call's arguments, with some replaced or made from the valid ones."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    arguments = {
        "q_nope": normal(BATCH, Q_LEN, N_HEADS, DV),
        "q_pe": normal(BATCH, Q_LEN, N_HEADS, D_PE),
        "ckv_cache": normal(BATCH, MAX_LEN, DV),
        "kpe_cache": normal(BATCH, MAX_LEN, GROUPS, D_PE),
        "seq_lens": torch.tensor([MAX_LEN, 5], dtype=torch.int32),
    }
    return changed(arguments, changes)


def paged(**changes):
    """The same with pages."""
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    caches = {"ckv_cache": (-1, PAGE, DV), "kpe_cache": (-1, PAGE, GROUPS, D_PE)}
    plain = call()
    return changed({**plain, **{k: plain[k].view(v) for k, v in caches.items()}, "block_table": table}, changes)


def changed(arguments, changes):
    made = {name: x(arguments[name]) if callable(x) else x for name, x in changes.items()}
    return {**arguments, **made}


def decode(arguments):
    rest = {k: v for k, v in arguments.items() if k not in ("q_nope", "q_pe", "ckv_cache", "kpe_cache")}
    return mla_decode(*(arguments[k] for k in ("q_nope", "q_pe", "ckv_cache", "kpe_cache")), **rest)


def transposed_last(x):
    return x.mT.contiguous().mT


def test_results_have_the_promised_shapes_and_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        out, lse = decode({k: v.to(dtype) if v.is_floating_point() else v for k, v in call().items()})
        assert (out.shape, out.dtype) == ((BATCH, Q_LEN, N_HEADS, DV), dtype)
        assert (lse.shape, lse.dtype) == ((BATCH, N_HEADS, Q_LEN), torch.float32)


def test_paged_and_contiguous_calls_agree():
    for a, b in zip(decode(call()), decode(paged()), strict=True):
        torch.testing.assert_close(a, b)


def test_the_default_length_is_the_whole_cache():
    full = torch.full((BATCH,), MAX_LEN, dtype=torch.int32)
    for a, b in zip(decode(call(seq_lens=None)), decode(call(seq_lens=full)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (call(q_nope=lambda x: x[0]), r"q_nope must be \[batch, q_len, n_heads, dv\].*got \(3, 4, 16\)"),
        (call(q_nope=lambda x: x[:, :0]), r"q_nope must be .* with no empty part, got \(2, 0, 4, 16\)"),
        (call(ckv_cache=lambda x: x[0]), r"ckv_cache must be \[batch, max_len, dv\] or .*, got \(12, 16\)"),
        (
            call(ckv_cache=lambda x: x[:1]),
            r"ckv_cache must be \[batch, max_len, dv\] = \(2, 12, 16\), got \(1, 12, 16\)",
        ),
        (call(ckv_cache=lambda x: x[..., :8]), r"ckv_cache must be .* = \(2, 12, 16\), got \(2, 12, 8\)"),
        (call(q_pe=None), "q_pe must be given with kpe_cache .*, got None"),
        (call(kpe_cache=None), "kpe_cache must be given with q_pe .*, got None"),
        (call(q_pe=lambda x: x[:, 0]), r"q_pe must be \[batch, q_len, n_heads, d_pe\], got \(2, 4, 8\)"),
        (call(q_pe=lambda x: x[:, :, :2]), r"q_pe must be .* = \(2, 3, 4, 8\), got \(2, 3, 2, 8\)"),
        (call(q_pe=lambda x: x[..., :0], kpe_cache=lambda x: x[..., :0]), "q_pe must be None where d_pe is 0"),
        (call(kpe_cache=lambda x: x.flatten(2)), r"kpe_cache must be \[batch, max_len, n_rope_heads, d_pe\], got"),
        (call(kpe_cache=lambda x: x[:, :9]), r"kpe_cache must be .* = \(2, 12, 2, 8\), got \(2, 9, 2, 8\)"),
        (call(kpe_cache=lambda x: x[..., :4]), r"kpe_cache must be .* = \(2, 12, 2, 8\), got \(2, 12, 2, 4\)"),
        (call(kpe_cache=torch.zeros(2, 12, 3, 8)), "n_rope_heads that divide n_heads 4, got 3"),
        (call(kpe_cache=torch.zeros(2, 12, 0, 8)), "n_rope_heads that divide n_heads 4, got 0"),
        (call(seq_lens=torch.zeros(3, dtype=torch.int32)), r"seq_lens must be \[batch\] = \(2,\), got \(3,\)"),
        (call(starts=torch.zeros(2, 1, dtype=torch.int32)), r"starts must be \[batch\] = \(2,\), got \(2, 1\)"),
        (paged(seq_lens=None), "seq_lens must be given for a paged cache"),
        (paged(block_table=torch.zeros(2, dtype=torch.int32)), r"block_table must be \[batch, max_pages\], got \(2,\)"),
        (paged(block_table=lambda x: x[:1]), r"block_table must be .* = \(2, 3\), got \(1, 3\)"),
        (paged(ckv_cache=torch.zeros(6, 0, DV)), "page_size of at least 1, got 0"),
        (
            paged(kpe_cache=lambda x: x.view(2, -1, GROUPS, D_PE)),
            r"kpe_cache must be \[n_pages, page_size, .* = \(6, 4",
        ),
        (call(v_cache=torch.zeros(2, 12)), r"v_cache must be \[batch, max_len, W\], got \(2, 12\)"),
        (call(v_cache=torch.zeros(2, 12, 0)), r"v_cache must be \[batch, max_len, W\], got \(2, 12, 0\)"),
        (call(v_cache=torch.zeros(2, 11, 5)), r"v_cache must be .* = \(2, 12, 5\), got \(2, 11, 5\)"),
        (call(score_scale=torch.ones(2, 12)), r"score_scale must be \[batch, max_len, g'\], got \(2, 12\)"),
        (call(score_scale=torch.ones(2, 11, 2)), r"score_scale must be .* = \(2, 12, 2\), got \(2, 11, 2\)"),
        (call(score_scale=torch.ones(2, 12, 4)), "last dimension that is n_rope_heads 2, got 4"),
        (call(q_pe=None, kpe_cache=None, score_scale=torch.ones(2, 12, 3)), "that divides n_heads 4, got 3"),
        (call(softmax_scale=float("inf")), "softmax_scale must be finite in float32, got inf"),
        (call(softmax_scale=float("nan")), "softmax_scale must be finite in float32, got nan"),
        (call(softcap=-1.0), "softcap must be 0 .* or positive and finite in float32, got -1.0"),
        (call(softmax_scale=1e39), r"softmax_scale must be finite in float32, got 1e\+39"),
        (call(softmax_scale=-(10**400)), "softmax_scale must be finite in float32, got -1000"),
        (call(softcap=float("nan")), "softcap must be 0 .* or positive and finite in float32, got nan"),
        (call(softcap=1e39), r"softcap must be 0 .* or positive and finite in float32, got 1e\+39"),
        (call(backend="triton"), "backend must be 'auto', 'tilelang' or 'torch', got 'triton'"),
        (call(out=torch.zeros(BATCH, Q_LEN, N_HEADS, 8)), r"out must be .* = \(2, 3, 4, 16\), got \(2, 3, 4, 8\)"),
        (call(lse=torch.zeros(BATCH, Q_LEN, N_HEADS)), r"lse must be .* = \(2, 4, 3\), got \(2, 3, 4\)"),
        (call(v_cache=torch.zeros(2, 12, 5), out=torch.zeros(2, 3, 4, 16)), r"out must be .* = \(2, 3, 4, 5\), got"),
    ],
)
def test_bad_shapes_and_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        decode(arguments)


@pytest.mark.parametrize("name", ["q_nope", "q_pe", "ckv_cache", "kpe_cache", "v_cache", "score_scale", "out", "lse"])
def test_last_dimensions_must_be_contiguous(name):
    more = {
        "v_cache": torch.zeros(BATCH, MAX_LEN, 6),
        "score_scale": torch.ones(BATCH, MAX_LEN, GROUPS),
        "out": torch.zeros(BATCH, Q_LEN, N_HEADS, 6),
        "lse": torch.zeros(BATCH, N_HEADS, Q_LEN),
    }
    arguments = call(**more)
    arguments[name] = transposed_last(arguments[name])
    with pytest.raises(ValueError, match=rf"{name} must have a contiguous last dimension \(stride 1\), got strides"):
        decode(arguments)


@pytest.mark.parametrize("name", ["q_pe", "ckv_cache", "kpe_cache", "v_cache", "score_scale", "seq_lens", "starts"])
def test_devices_must_agree(name):
    more = {"v_cache": torch.zeros(BATCH, MAX_LEN, 6), "score_scale": torch.ones(BATCH, MAX_LEN, GROUPS)}
    arguments = call(starts=torch.zeros(BATCH, dtype=torch.int32), **more)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on q_nope's device cpu, got meta"):
        decode(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (call(q_nope=[1.0]), "q_nope must be a tensor, got list"),
        (call(q_pe=1.0), "q_pe must be a tensor, got float"),
        (call(ckv_cache=None), "ckv_cache must be a tensor, got NoneType"),
        (call(kpe_cache="x"), "kpe_cache must be a tensor, got str"),
        (call(seq_lens=[12, 5]), "seq_lens must be a tensor, got list"),
        (call(starts=0), "starts must be a tensor, got int"),
        (paged(block_table=[[0]]), "block_table must be a tensor, got list"),
        (call(v_cache=1), "v_cache must be a tensor, got int"),
        (call(score_scale=2.0), "score_scale must be a tensor, got float"),
        (call(out=1), "out must be a tensor, got int"),
        (call(lse=1), "lse must be a tensor, got int"),
        (call(q_nope=lambda x: x.double()), "q_nope must be torch.float16 or .*, got torch.float64"),
        (call(q_pe=lambda x: x.half()), "q_pe must be torch.float32, got torch.float16"),
        (call(ckv_cache=lambda x: x.bfloat16()), "ckv_cache must be torch.float32, got torch.bfloat16"),
        (call(kpe_cache=lambda x: x.half()), "kpe_cache must be torch.float32, got torch.float16"),
        (call(seq_lens=lambda x: x.long()), "seq_lens must be torch.int32, got torch.int64"),
        (call(starts=torch.zeros(2)), "starts must be torch.int32, got torch.float32"),
        (paged(block_table=lambda x: x.long()), "block_table must be torch.int32, got torch.int64"),
        (call(v_cache=torch.zeros(2, 12, 5).half()), "v_cache must be torch.float32, got torch.float16"),
        (call(score_scale=torch.ones(2, 12, 2).half()), "score_scale must be torch.float32, got torch.float16"),
        (call(out=torch.zeros(2, 3, 4, 16).half()), "out must be torch.float32, got torch.float16"),
        (call(lse=torch.zeros(2, 4, 3).half()), "lse must be torch.float32, got torch.float16"),
        (call(softmax_scale=torch.tensor(0.1)), "softmax_scale must be a float, got Tensor"),
        (call(softcap="20"), "softcap must be a float, got str"),
        (call(plan="torch"), "plan must be a DecodePlan .*, got str"),
    ],
)
def test_bad_types_and_dtypes(arguments, message):
    with pytest.raises(TypeError, match=message):
        decode(arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_score_scale_is_float32_or_the_dtype_of_q(dtype):
    scale = (0.5 + torch.rand(BATCH, MAX_LEN, GROUPS)).to(dtype)
    arguments = {k: v.half() if v.is_floating_point() else v for k, v in call().items()}
    expected = decode({**arguments, "score_scale": scale.float()})
    for a, b in zip(decode({**arguments, "score_scale": scale}), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["q_nope", "q_pe", "ckv_cache", "kpe_cache", "v_cache", "score_scale"])
def test_inputs_that_require_grad(name):
    more = {"v_cache": torch.zeros(BATCH, MAX_LEN, 6), "score_scale": torch.ones(BATCH, MAX_LEN, GROUPS)}
    arguments = call(**more)
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{name} requires grad, but mla_decode is inference only"):
        decode(arguments)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not decode(arguments)[0].requires_grad


@pytest.mark.parametrize("given", [("out",), ("lse",), ("out", "lse")])
def test_given_results_are_written_and_returned(given):
    expected = dict(zip(("out", "lse"), decode(call()), strict=True))
    results = {name: torch.full_like(expected[name], float("nan")) for name in given}
    returned = dict(zip(("out", "lse"), decode(call(**results)), strict=True))
    for name in ("out", "lse"):
        assert torch.equal(returned[name], expected[name])
        assert name not in given or returned[name] is results[name]


def test_only_the_elements_of_given_results_are_written():
    out = torch.full((BATCH, Q_LEN, N_HEADS + 1, DV + 3), 7.0)
    lse = torch.full((BATCH, N_HEADS, Q_LEN + 2), 7.0)
    expected = decode(call())
    view = {"out": out[:, :, :N_HEADS, 1 : DV + 1], "lse": lse[..., :Q_LEN]}
    for a, b in zip(decode(call(**view)), expected, strict=True):
        assert torch.equal(a, b)
    for tensor in view.values():
        tensor.fill_(7.0)
    assert (out == 7.0).all()
    assert (lse == 7.0).all()


def test_inputs_are_never_written():
    arguments = paged(starts=torch.tensor([1, 0], dtype=torch.int32), softcap=5.0, v_cache=torch.randn(6, PAGE, 5))
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    decode(arguments)
    for name, tensor in before.items():
        assert torch.equal(arguments[name], tensor), name


def test_views_of_one_merged_row():
    expected = decode(call())
    plain = call()
    rows = torch.cat([plain["ckv_cache"], plain["kpe_cache"].flatten(2)], dim=2)
    query = torch.cat([plain["q_nope"], plain["q_pe"]], dim=3)
    merged = call(
        q_nope=query[..., :DV],
        q_pe=query[..., DV:],
        ckv_cache=rows[..., :DV],
        kpe_cache=rows[..., DV:].unflatten(2, (GROUPS, D_PE)),
    )
    for a, b in zip(decode(merged), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_results_may_lie_between_the_inputs_of_one_buffer():
    buffer = torch.randn(BATCH, Q_LEN, N_HEADS, 2 * DV)
    expected = decode(call(q_nope=buffer[..., :DV].clone()))
    out, _ = decode(call(q_nope=buffer[..., :DV], out=buffer[..., DV:]))
    assert torch.equal(out, expected[0])

    halves = torch.randn(BATCH, Q_LEN, 2 * N_HEADS, DV)
    expected = decode(call(q_nope=halves[:, :, N_HEADS:].clone()))
    out, _ = decode(call(q_nope=halves[:, :, N_HEADS:], out=halves[:, :, :N_HEADS]))
    assert torch.equal(out, expected[0])


def overlapping():
    itself = torch.zeros(BATCH, Q_LEN, N_HEADS, DV)
    yield "out", "q_nope", {"q_nope": itself, "out": itself}
    query = torch.zeros(BATCH, Q_LEN, N_HEADS, DV + 8)
    yield "out", "q_nope", {"q_nope": query[..., :DV], "out": query[..., :DV]}
    yield "out", "q_nope", {"q_nope": query[..., :DV], "out": query[..., 8:]}
    flat = torch.zeros(BATCH * MAX_LEN * DV)
    cache = flat.view(BATCH, MAX_LEN, DV)
    yield "out", "ckv_cache", {"ckv_cache": cache, "out": flat.view(BATCH, Q_LEN, N_HEADS, DV)}
    yield "lse", "ckv_cache", {"ckv_cache": cache, "lse": flat[-24:].view(BATCH, N_HEADS, Q_LEN)}
    results = torch.zeros(BATCH * Q_LEN * N_HEADS * DV)
    out = results.view(BATCH, Q_LEN, N_HEADS, DV)
    yield "lse", "out", {"out": out, "lse": results[:24].view(BATCH, N_HEADS, Q_LEN)}
    lens = torch.zeros(24)
    lens_view = lens[2:4].view(torch.int32)
    yield "lse", "seq_lens", {"seq_lens": lens_view, "lse": lens.view(BATCH, N_HEADS, Q_LEN)}


@pytest.mark.parametrize(("result", "name", "arguments"), list(overlapping()))
def test_results_must_not_overlap_inputs_or_each_other(result, name, arguments):
    with pytest.raises(
        ValueError, match=f"{result} must not overlap an input or the other result, got memory of {name}"
    ):
        decode(call(**arguments))


def test_results_must_not_be_expanded():
    with pytest.raises(ValueError, match="out must have memory of its own for every element"):
        decode(call(out=torch.zeros(BATCH, Q_LEN, 1, DV).expand(-1, -1, N_HEADS, -1)))


def test_batch_of_zero():
    arguments = {k: v[:0] for k, v in call().items()}
    out, lse = decode(arguments)
    assert out.shape == (0, Q_LEN, N_HEADS, DV)
    assert lse.shape == (0, N_HEADS, Q_LEN)
    given = torch.empty(0, Q_LEN, N_HEADS, DV)
    assert decode({**arguments, "out": given})[0] is given
    pages = paged(block_table=lambda x: x[:0], seq_lens=lambda x: x[:0], q_nope=lambda x: x[:0], q_pe=lambda x: x[:0])
    assert decode(pages)[0].shape == (0, Q_LEN, N_HEADS, DV)


def planned(**changes):
    sizes = {"shape": MLAShape(N_HEADS, GROUPS, DV, D_PE), "batch": BATCH, "max_len": MAX_LEN, "q_len": Q_LEN}
    sizes |= {"dtype": torch.float32, "device": "cpu", **changes}
    return plan(sizes.pop("shape"), sizes.pop("batch"), sizes.pop("max_len"), **sizes)


def test_a_plan_gives_the_same_bits():
    expected = decode(call())
    for made in (planned(), planned(batch=9, max_len=100)):
        for a, b in zip(decode(call(plan=made)), expected, strict=True):
            assert torch.equal(a, b)
    decode(paged(plan=planned(page_size=PAGE)))


@pytest.mark.parametrize("n_rope_heads", [1, 4])
def test_a_plan_without_rope_takes_any_number_of_rope_heads(n_rope_heads):
    made = planned(shape=MLAShape(N_HEADS, n_rope_heads, DV, 0))
    decode(call(plan=made, q_pe=None, kpe_cache=None))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"shape": MLAShape(N_HEADS, 1, DV, D_PE)}, "shape"),
        ({"shape": MLAShape(N_HEADS, GROUPS, DV, D_PE, v_width=16)}, "shape"),
        ({"batch": 1}, "batch"),
        ({"max_len": MAX_LEN - 1}, "max_len"),
        ({"q_len": 1}, "q_len"),
        ({"page_size": PAGE}, "page_size"),
        ({"dtype": torch.float16}, "dtype"),
        ({"device": DeviceRecord((9, 0), 132)}, "device"),
    ],
)
def test_a_plan_for_another_call(changes, name):
    with pytest.raises(ValueError, match=f"plan .*{name}"):
        decode(call(plan=planned(**changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": None}, "device must be a torch.device, a str or a DeviceRecord, got NoneType"),
        ({"device": 3.5}, "device must be a torch.device, a str or a DeviceRecord, got float"),
        ({"batch": True}, "batch must be an int, got bool"),
        ({"page_size": True}, "page_size must be an int, got bool"),
    ],
)
def test_wrong_types_for_a_plan(changes, message):
    with pytest.raises(TypeError, match=message):
        planned(**changes)


def test_a_plan_for_another_backend_than_the_named_one():
    with pytest.raises(ValueError, match="plan must be for the named backend 'tilelang', got one for 'torch'"):
        decode(call(plan=planned(), backend="tilelang"))


def test_tilelang_needs_its_gpu():
    with pytest.raises(NotImplementedError, match=r"backend 'tilelang' .*9\.0.*backend='torch' takes it"):
        decode(call(backend="tilelang"))
    empty = {name: x[:0] for name, x in call().items() if isinstance(x, torch.Tensor) and x.dim() > 0}
    with pytest.raises(NotImplementedError, match="backend 'tilelang'"):
        decode({**call(backend="tilelang"), **empty})


def test_public_names():
    assert set(flexmla.__all__) <= set(dir(flexmla))
    assert flexmla.reference.mla_decode is not flexmla.mla_decode
    with pytest.raises(AttributeError, match="module 'flexmla' has no attribute 'nothing'"):
        flexmla.nothing  # noqa: B018


def test_results_that_require_grad_are_named():
    arguments = call()
    out = torch.zeros(BATCH, Q_LEN, N_HEADS, DV, requires_grad=True)
    with pytest.raises(RuntimeError, match="out requires grad"):
        mla_decode(**arguments, out=out)


@pytest.mark.parametrize("causal", ["no", None, 1])
def test_causal_must_be_a_bool(causal):
    with pytest.raises(TypeError, match="causal must be a bool"):
        mla_decode(**call(), causal=causal)


def test_a_result_that_overlaps_itself_is_refused():
    out = torch.empty(500).as_strided((BATCH, Q_LEN, N_HEADS, DV), (200, 64, 8, 1))
    with pytest.raises(ValueError, match="out must have memory of its own"):
        mla_decode(**call(), out=out)


def test_a_result_padded_by_heads_and_by_rows_is_taken():
    arguments = call()
    want, _ = mla_decode(**arguments)
    heads = DV + 2  # neither stride is a multiple of the other
    out = torch.full((1000,), torch.nan).as_strided((BATCH, Q_LEN, N_HEADS, DV), (300, N_HEADS * heads + 3, heads, 1))
    got, _ = mla_decode(**arguments, out=out)
    assert got is out
    torch.testing.assert_close(out, want)
