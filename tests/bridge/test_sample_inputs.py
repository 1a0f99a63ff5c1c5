"""PyTorch's own sample inputs for SDPA give the results, or the errors, that PyTorch gives."""

import importlib.util
import math
import sys
import types
import unittest
import warnings

import pytest
import torch

from bridge.problems import OURS, TORCH, UNIT, assert_within_budget
from pallas_flash import dropout


@pytest.fixture
def op_info(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("expecttest") is None:  # torch's test utilities derive a class from it, no more
            monkeypatch.setitem(sys.modules, "expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
        from torch.testing._internal.common_methods_invocations import op_db
    return next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def outcome(function, query, key, value, kwargs):
    """[out, gradients...], or the type of the error."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    torch.manual_seed(0)
    try:
        out = function(*leaves, **kwargs)
    except Exception as error:
        return type(error)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def formula_with_our_dropout(query, key, value, kwargs):
    """SDPA's formula as a function that drops the weights that ours drops, seen by giving it the identity as value."""
    length, is_causal, p = key.shape[-2], kwargs["is_causal"], kwargs["dropout_p"]
    torch.manual_seed(0)
    kept = OURS(query.detach(), key.detach(), torch.eye(length).expand(*value.shape[:-1], length), **kwargs) != 0

    def formula(query, key, value, enable_gqa=False, **_):
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if is_causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        return torch.where(kept, scores.softmax(-1) * dropout.factor(p), torch.zeros_like(scores)) @ value
    return formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sample_inputs(op_info, dtype):
    samples = list(op_info.sample_inputs("cpu", dtype))
    assert len(samples) > 20
    for sample in samples:
        if dtype == torch.float64 and sample.kwargs.get("dropout_p"):
            continue  # slow to compile, and the dtype adds nothing
        args, theirs = (sample.input, *sample.args), TORCH
        if sample.kwargs.get("dropout_p") and isinstance(outcome(TORCH, *args, sample.kwargs), list):
            theirs = formula_with_our_dropout(*args, sample.kwargs)
        expected, ours = (outcome(function, *args, sample.kwargs) for function in (theirs, OURS))
        if isinstance(expected, type):
            assert ours is expected, sample
            continue
        doubled, kwargs = [x.double() for x in args], dict(sample.kwargs)
        if "attn_mask" in kwargs:
            kwargs["attn_mask"] = kwargs["attn_mask"].double()
        size = max(x.abs().max().item() for x in doubled) ** 3  # a score's error is that of |q| |k|, and meets |v|
        assert_within_budget(ours, expected, outcome(theirs, *doubled, kwargs), UNIT[dtype], size)
