"""Every row of SDPA's semantics, against torch itself on the CPU: values, gradients, dtypes, strides and errors."""

import contextlib
import re
import warnings

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from bridge.problems import OURS, TORCH, UNIT, check, heads_inside, qkv, results
from pallas_flash import dropout
from torch_bridge import explain
from torch_bridge.strides import same_memory

B, H, L, S, E = 2, 4, 5, 7, 8
Q, KV = (B, H, L, E), (B, H, S, E)
DTYPES = list(UNIT)
OLD_TORCH = torch.__version__ < (2, 12)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dtypes(dtype, is_causal):
    check(qkv(Q, KV, KV, dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (1, 9), (9, 1), (130, 70), (70, 130)])
def test_causal_is_aligned_top_left(q_len, kv_len):
    check(qkv((B, H, q_len, E), (B, H, kv_len, E), (B, H, kv_len, E)), is_causal=True)


@pytest.mark.parametrize("scale", [0, 0.0, 1, -0.7, 2.5])
def test_scale(scale):
    check(qkv(Q, KV, KV), scale=scale)


def test_value_size_differs():
    check(qkv(Q, KV, (B, H, S, 5)))


def one_axis_allowed(shape):
    """With four axes, torch's CPU flash backend takes no mask of one axis; its math backend does."""
    return sdpa_kernel(SDPBackend.MATH) if len(shape) == 1 else contextlib.nullcontext()


MASK_SHAPES = [(S,), (1,), (L, S), (1, S), (L, 1), (1, 1), (H, L, S), (1, L, S), (B, H, L, S), (B, 1, 1, S),
               (1, 1, L, S), (B, 1, L, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_boolean_masks(shape):
    with one_axis_allowed(shape):
        check([*qkv(Q, KV, KV), torch.rand(shape) > 0.4])


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_float_masks_and_their_gradients(shape):
    with one_axis_allowed(shape):
        check([*qkv(Q, KV, KV), torch.randn(shape, requires_grad=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, None], ids=["fp32 mask", "same"])
def test_mask_dtypes(dtype, mask_dtype):
    out = check([*qkv(Q, KV, KV, dtype=dtype), torch.randn(H, L, S, dtype=mask_dtype or dtype)])[0]
    assert out.dtype == dtype


def test_gradient_of_a_float32_mask_beside_bfloat16():
    check([*qkv(Q, KV, KV, dtype=torch.bfloat16), torch.randn(L, S, requires_grad=True)])


def test_expanded_masks_are_not_materialised():
    mask = (torch.rand(B, 1, L, S) > 0.4).expand(B, H, L, S)
    check([*qkv(Q, KV, KV), mask])
    assert "mask=Dense" in explain(*qkv(Q, KV, KV), mask)


@pytest.mark.parametrize("mask", ["False", "-inf"])
def test_a_fully_masked_row_gives_zero_and_zero_gradients(mask):
    rows = torch.ones(L, S, dtype=torch.bool)
    rows[2] = False
    attn_mask = rows if mask == "False" else torch.zeros(L, S).masked_fill(~rows, -torch.inf)
    out, dq, _, _ = check([*qkv(Q, KV, KV), attn_mask])
    assert torch.equal(out[:, :, 2], torch.zeros(B, H, E)) and torch.equal(dq[:, :, 2], torch.zeros(B, H, E))


def test_a_row_of_finfo_min_is_the_mean_of_value():
    """Against torch's math backend: its CPU flash backward loses the log(S) in lse = finfo.min + log(S)."""
    tensors, mask, dout = qkv(Q, KV, KV), torch.zeros(L, S), torch.randn(Q)
    mask[1] = torch.finfo(torch.float32).min
    ours = results(OURS, [*tensors, mask], dout)
    torch.testing.assert_close(ours[0][:, :, 1], tensors[2].detach().mean(2), rtol=1e-6, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(TORCH, [*tensors, mask], dout)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_and_inf_in_masked_keys_do_not_leak():
    """A deliberate difference: torch computes 0 * NaN."""
    q, k, v = qkv(Q, KV, KV, requires_grad=False)
    clean = [x.clone() for x in (k, v)]
    k[:, :, -2:], v[:, :, -2:] = torch.nan, torch.inf
    mask = torch.ones(L, S, dtype=torch.bool)
    mask[:, -2:] = False
    dout = torch.randn(Q)
    poisoned = results(OURS, [x.requires_grad_() for x in (q, k, v)] + [mask], dout)
    expected = results(OURS, [q, *(x.requires_grad_() for x in clean), mask], dout)
    for a, b in zip(poisoned, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_grouped_queries_with_a_mask(is_float):
    """Elsewhere these fall to a backend of O(L S) memory (diffusers #14518): here keys are not even copied."""
    tensors = qkv(Q, (B, 2, S, E), (B, 2, S, E))
    mask = torch.randn(B, 1, L, S, requires_grad=True) if is_float else torch.rand(B, 1, L, S) > 0.3
    check([*tensors, mask], enable_gqa=True)
    text = explain(*tensors, mask, enable_gqa=True)
    assert "key: shared, not copied" in text and "value: shared, not copied" in text
    assert "heads=4:2" in text and re.search(r"^on .*: implementation='(xla|hopper)'", text, re.MULTILINE)


@pytest.mark.parametrize("kv_len", [33, 65])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_of_stride_0(axis, kv_len, is_causal):
    """Efficient attention is wrong for them when kv_len % 32 == 1 (pytorch #191937)."""
    shape = [B, H, kv_len, E]
    q = torch.randn(B, H, 37, E, requires_grad=True)
    k, v = (torch.randn(*shape[:axis], 1, *shape[axis + 1:]).expand(shape) for _ in range(2))
    assert k.stride(axis) == 0
    out = check([q, k, v], is_causal=is_causal)[0]
    assert torch.equal(out, OURS(q, k.clone(), v.clone(), is_causal=is_causal))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_queries(heads, is_causal):
    check(qkv(Q, (B, heads, S, E), (B, heads, S, E)), enable_gqa=True, is_causal=is_causal)


BROADCASTS = [
    ((1, H, L, E), KV, KV), (Q, (1, H, S, E), (1, H, S, E)), (Q, KV, (1, H, S, E)), (Q, (H, S, E), (H, S, E)),
    ((H, L, E), KV, KV), ((B, 1, L, E), KV, KV), (Q, (B, 1, S, E), (B, 1, S, E)), (Q, (B, 1, S, E), KV),
    ((L, E), KV, KV), (Q, (S, E), (S, E)), ((L, E), (S, E), (S, E)), ((H, L, E), (H, S, E), (H, S, E)),
    ((3, 1, H, L, E), (3, B, H, S, E), (3, B, H, S, E)), ((3, 2, 1, H, L, E), (1, 2, B, H, S, E), (1, 2, B, H, S, E)),
]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=str)
def test_broadcasting(shapes):
    check(qkv(*shapes), is_causal=True)


@pytest.mark.parametrize("shapes", [
    ((H, L, E), (2, S, E), (2, S, E)), ((3, B, H, L, E), (3, B, 2, S, E), (3, B, 2, S, E)),
    (Q, (1, 2, S, E), (1, 2, S, E)),
    (Q, (2, S, E), (2, S, E)), (Q, (B, 2, S, E), (B, 1, S, E))], ids=str)
def test_grouped_queries_broadcast_too(shapes):
    check(qkv(*shapes), enable_gqa=True)


@pytest.mark.parametrize("q, mask", [((L, E), (L, S)), ((L, E), (S,)), ((H, L, E), (S,)),
                                     ((H, L, E), (H, 1, S)), ((H, L, E), (1, 1, L, S)),
                                     ((3, B, H, L, E), (L, S)), ((3, B, H, L, E), (H, L, S)),
                                     ((3, B, H, L, E), (B, H, L, S)), ((3, B, H, L, E), (3, B, H, L, S)),
                                     ((3, B, H, L, E), (3, 1, 1, 1, S))], ids=str)
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_masks_of_other_ranks(q, mask, is_float):
    tensors = qkv(q, (*q[:-2], S, E), (*q[:-2], S, E))
    mask = torch.randn(mask, requires_grad=True) if is_float else torch.rand(mask) > 0.3
    if mask.ndim > len(q) and OLD_TORCH:  # 2.11 takes no mask of more axes than the query
        assert OURS(*tensors, mask).shape == q
        tensors = [x.detach()[None].requires_grad_() for x in tensors]
    check([*tensors, mask])


NO_HEADS = [] if OLD_TORCH else [((B, 0, L, E), (B, 0, S, E), (B, 0, S, E))]  # 2.11 ends the process
EMPTY = [
    ((B, H, 0, E), KV, KV), ((0, H, L, E), (0, H, S, E), (0, H, S, E)), *NO_HEADS, (Q, KV, (B, H, S, 0)),
    (Q, (B, H, 0, E), (B, H, 0, E)), ((B, H, L, 0), (B, H, S, 0), KV),
    ((0, H, L, E), (1, H, S, E), (1, H, S, E)), ((H, L, E), (H, 0, E), (H, 0, E)), ((0, 0, 0, 0),) * 3,
]


@pytest.mark.parametrize("shapes", EMPTY, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_empty_tensors(shapes, is_causal):
    check(qkv(*shapes), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_heads(is_causal):
    """Also where torch cannot be asked: 2.11 ends the process, with a division by zero."""
    tensors = qkv((B, 0, L, E), (B, 0, S, E), (B, 0, S, E + 1))
    out = OURS(*tensors, is_causal=is_causal)
    assert out.shape == (B, 0, L, E + 1)
    for x, gradient in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert gradient.shape == x.shape


@pytest.mark.parametrize("q_len, kv_len", [(L, S), (S, L), (L, L)])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_bias_objects_are_not_materialised(make, q_len, kv_len, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that lower_right with q_len > kv_len gives NaN; neither does
        bias = make(q_len, kv_len)
    tensors = qkv((B, H, q_len, E), (B, H, kv_len, E), (B, H, kv_len, E))
    offset = kv_len - q_len if make is causal_lower_right else 0
    keep = torch.ones(q_len, kv_len, dtype=torch.bool).tril(offset)
    dout = torch.randn(B, H, q_len, E)
    expected = results(TORCH, [*tensors, keep], dout)
    monkeypatch.setattr(type(bias), "_materialize", lambda *_: pytest.fail("materialised"))
    for a, b in zip(results(lambda *x: OURS(*x, bias), tensors, dout), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_is_seeded_by_torch():
    tensors = qkv(Q, KV, KV, requires_grad=False)

    def run(seed):
        torch.manual_seed(seed)
        return OURS(*tensors, dropout_p=0.5), OURS(*tensors, dropout_p=0.5)
    (a, b), (c, d), (e, _) = run(1), run(1), run(2)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b) and not torch.equal(a, e)


def test_dropout_of_one_gives_zero():
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results(
        lambda *x: OURS(*x, dropout_p=1.0), qkv(Q, KV, KV), torch.randn(Q)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_drops_weights_after_the_softmax(is_causal):
    """With value = 1 the output is the dropped weights themselves; with those, torch's formula gives our gradients."""
    q, k, v = qkv((1, 2, 40, E), (1, 2, 40, E), (1, 2, 40, E), dtype=torch.float64)
    p, dout = 0.3, torch.randn(1, 2, 40, E, dtype=torch.float64)
    torch.manual_seed(5)
    identity = torch.eye(40, dtype=torch.float64).expand(1, 2, 40, 40)
    dropped = OURS(q, k, identity, dropout_p=p, is_causal=is_causal).detach()
    keep = torch.ones(40, 40, dtype=torch.bool).tril() if is_causal else torch.ones(40, 40, dtype=torch.bool)

    def formula(q, k, v):
        scores = (q @ k.mT / E**0.5).masked_fill(~keep, -torch.inf)
        return torch.where(dropped != 0, scores.softmax(-1) * dropout.factor(p), 0.0) @ v
    torch.manual_seed(5)
    ours = results(lambda *x: OURS(*x, dropout_p=p, is_causal=is_causal), (q, k, v), dout)
    for a, b in zip(ours, results(formula, (q, k, v), dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    kept = (dropped != 0).double()[..., keep].mean().item()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / (2 * keep.sum().item())) ** 0.5


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_storage_order_of_out_and_gradients(inside, with_mask):
    tensors = [heads_inside(x) if flag else x for x, flag in zip(qkv(Q, KV, KV), inside, strict=True)]
    mask = [torch.rand(L, S) > 0.3] if with_mask else []
    out, *grads = check([*tensors, *mask])
    assert out.stride() == torch.empty_like(tensors[0]).stride()
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.stride() == tensor.stride()


@pytest.mark.parametrize("shape", [(1, 1, 1, E), (1, H, 1, E), (B, 1, L, E), (1, H, L, E), (B, H, 1, E)], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_strides_where_axes_have_one_element(shape, inside):
    tensors = [heads_inside(x) if inside else x for x in qkv(shape, shape, shape)]
    out, *grads = check(tensors)
    assert same_memory(shape, out.stride(), TORCH(*tensors).stride())
    assert all(grad.stride() == torch.empty_like(x).stride() for grad, x in zip(grads, tensors, strict=True))


def test_gradients_of_packed_slices_are_packed():
    packed = torch.randn(B, L, 3, H, E, requires_grad=True)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    out, reference = OURS(q, k, v, is_causal=True), TORCH(q, k, v, is_causal=True)
    assert out.stride() == reference.stride()
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, packed, dout), torch.autograd.grad(reference, packed, dout),
                               rtol=1e-5, atol=1e-5)


# --- autocast, determinism -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16, torch.float16)], ids=str)
def test_autocast_casts_and_allows_mixed_types(dtypes):
    tensors = [torch.randn(shape, dtype=dtype, requires_grad=True)
               for shape, dtype in zip((Q, KV, KV), dtypes, strict=True)]
    mask = torch.randn(L, S)
    grads = []
    for function in (TORCH, OURS):
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*tensors, mask)
        assert out.dtype == torch.bfloat16
        grads.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
        assert [g.dtype for g in grads[-1]] == list(dtypes)
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert OURS(*qkv(Q, KV, KV, dtype=torch.float64)).dtype == torch.float64


def test_deterministic_algorithms_make_a_deterministic_spec():
    tensors = qkv(Q, KV, KV)
    assert "deterministic" not in explain(*tensors)
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in explain(*tensors)
        dout = torch.randn(Q)
        first, second = (results(OURS, tensors, dout) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", range(3))
def test_only_the_gradients_needed_are_computed(which):
    tensors = [x.detach().requires_grad_(i == which) for i, x in enumerate(qkv(Q, KV, KV))]
    check(tensors)


def test_nothing_is_recorded_without_grad():
    assert OURS(*qkv(Q, KV, KV, requires_grad=False)).grad_fn is None
    with torch.no_grad():
        assert not OURS(*qkv(Q, KV, KV)).requires_grad


SMALL = ((1, 2, 3, 4), (1, 1, 5, 4), (1, 1, 5, 3))


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_gradcheck_in_float64(kwargs):
    function = lambda *x: OURS(*x, enable_gqa=True, **kwargs)
    assert torch.autograd.gradcheck(function, qkv(*SMALL, dtype=torch.float64), fast_mode=True)


def test_second_derivatives_in_float64():
    tensors = [*qkv(*SMALL, dtype=torch.float64), torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)]
    function = lambda *x: OURS(*x, enable_gqa=True)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, check_undefined_grad=False)


def test_second_derivatives_of_fused_kernels_raise_a_sentence():
    q, k, v = qkv(Q, KV, KV)
    (dq,) = torch.autograd.grad(OURS(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no derivative for torch\.float32: .*float64"):
        dq.sum().backward()


# --- errors ----------------------------------------------------------------------------------------------------------


def _wrong(**replaced):
    return {"query": torch.randn(Q), "key": torch.randn(KV), "value": torch.randn(KV), **replaced}


ZERO_MASK = torch.zeros(L, S)
ERRORS = {
    "dtypes differ": _wrong(query=torch.randn(Q).half()),
    "devices differ": _wrong(query=torch.randn(Q, device="meta")),
    "rank of query": _wrong(query=torch.randn(E)),
    "rank of value": _wrong(value=torch.randn(E)),
    "int mask": _wrong(attn_mask=ZERO_MASK.int()),
    "float64 mask": _wrong(attn_mask=ZERO_MASK.double()),
    "bfloat16 mask": _wrong(attn_mask=ZERO_MASK.bfloat16()),
    "causal and mask": _wrong(attn_mask=ZERO_MASK, is_causal=True),
    "causal and causal bias": _wrong(attn_mask=causal_upper_left(L, S), is_causal=True),
    "lower right of other lengths": _wrong(attn_mask=causal_lower_right(L, S + 1)),
    "3 heads, grouped": _wrong(key=torch.randn(B, 3, S, E), value=torch.randn(B, 3, S, E), enable_gqa=True),
    "8 heads, grouped": _wrong(key=torch.randn(B, 8, S, E), value=torch.randn(B, 8, S, E), enable_gqa=True),
    "1 query head, grouped": _wrong(query=torch.randn(B, 1, L, E), enable_gqa=True),
    "2 heads": _wrong(key=torch.randn(B, 2, S, E), value=torch.randn(B, 2, S, E)),
    "grouped matrices": {"query": torch.randn(L, E), "key": torch.randn(S, E), "value": torch.randn(S, E),
                         "enable_gqa": True},
    "batch sizes": _wrong(key=torch.randn(3, H, S, E), value=torch.randn(3, H, S, E)),
    "E differs": _wrong(key=torch.randn(B, H, S, 4)),
    "negative dropout": _wrong(dropout_p=-0.1),
    "dropout over 1": _wrong(dropout_p=1.1),
    "dropout nan": _wrong(dropout_p=float("nan")),
    "int": {name: torch.ones(Q, dtype=torch.int32) for name in ("query", "key", "value")},
    "bool": {name: torch.ones(Q, dtype=torch.bool) for name in ("query", "key", "value")},
    "complex": {name: torch.ones(Q, dtype=torch.complex64) for name in ("query", "key", "value")},
    "fp8": {name: torch.ones(Q).to(torch.float8_e4m3fn) for name in ("query", "key", "value")},
    "sparse": _wrong(query=torch.randn(Q).to_sparse()),
    "query is a list": _wrong(query=[1.0]),
    "query is None": _wrong(query=None),
    "mask is numpy": _wrong(attn_mask=ZERO_MASK.numpy()),
    "scale is text": _wrong(scale="a"),
    "dropout is None": _wrong(dropout_p=None),
    "is_causal is 1": _wrong(is_causal=1),
    "enable_gqa is 1": _wrong(enable_gqa=1),
    **{f"mask {shape}": _wrong(attn_mask=torch.zeros(shape)) for shape in (
        (), (L, S + 1), (2, S), (2, L, S), (B, 2, L, S), (3, 1, L, S), (1, B, H, L, S))},
    "mask has more heads": _wrong(query=torch.randn(B, 1, L, E), key=torch.randn(B, 1, S, E),
                                  value=torch.randn(B, 1, S, E), attn_mask=torch.zeros(B, 3, L, S)),
    "mask has a batch, query has none": {"query": torch.randn(H, L, E), "key": torch.randn(H, S, E),
                                         "value": torch.randn(H, S, E), "attn_mask": torch.zeros(B, H, L, S)},
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_have_torchs_type(name):
    if name == "causal and mask" and OLD_TORCH:  # it computes something on CPUs
        expected = RuntimeError
    else:
        with pytest.raises(Exception) as theirs:
            TORCH(**ERRORS[name])
        expected = theirs.type
    with pytest.raises(Exception) as ours:
        OURS(**ERRORS[name])
    assert ours.type is expected, (ours.value, expected)


def test_a_seventh_positional_argument_is_a_type_error():
    with pytest.raises(TypeError):
        OURS(*qkv(Q, KV, KV), None, 0.0, False, 1.0)


def test_lengths_of_key_and_value_must_agree():
    """A deliberate difference: torch's CPU flash kernel reads out of step without a word."""
    with pytest.raises(RuntimeError, match="same length"):
        OURS(*qkv(Q, KV, (B, H, S - 1, E)))


def test_a_mask_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match="attn_mask to be on the device"):
        OURS(*qkv(Q, KV, KV), torch.zeros(L, S, device="meta"))
