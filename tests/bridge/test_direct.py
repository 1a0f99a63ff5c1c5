"""Calls on the direct path, from torch's function to the addresses that would be launched, against torch's own results.

CPU tensors stand for those of a GPU, and in the place of a loaded plan a function in Python reads and writes memory at
the addresses that it is given, as kernels would. What plans hold is tested in test_direct_offline.py.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import math
import threading
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torch_bridge
from bridge.direct import A100, H200
from bridge.problems import OURS, check, heads_inside, qkv
from pallas_flash import FallbackWarning, UnsupportedError, dropout, scores
from pallas_flash.kernels.ampere import defaults as ampere_defaults
from pallas_flash.kernels.hopper import defaults
from pallas_flash.kernels.mosaic import traced
from torch_bridge import exchange, ops, score_names, streams, strides
from torch_bridge.arguments import Attention, AttentionBackward, Cotangents, Numbers, Operands, PerArray, Results
from torch_bridge.direct import (
    attention,
    cache,
    driver,
    launch,
    lengths,
    lower,
    repeated,
    requirements,
    runner,
    said,
    score_ir,
    shortcut,
)
from torch_bridge.direct import shared as shared_
from torch_bridge.direct.parent import NoLaunchesError, NoPlanError
from torch_bridge.direct.plan import Buffer, Program, Step


def program_of(request):
    """The arrays of a pass by name, with one more in between, and operations; no kernels."""
    problem, pass_name = request.problem, request.pass_name
    implementation = "hopper" if request.gpu.capability == (9, 0) else "ampere"
    if problem.given or problem.score:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lower, "_step", lambda launch, given: Step(
                b"", (*launch.inputs, *launch.outputs, *launch.updates)))
            return lower.lower(request)
    shapes, wanted = problem.shapes(), problem.strides()
    of_parts = pass_name == "backward_of_parts"
    dq, dk, dv = (Buffer(shape, problem.dtype, wanted[name] if of_parts else None) for name, shape in shapes.items())
    q, k, v = (Buffer(shape, problem.dtype, wanted[name]) for name, shape in shapes.items())
    out = Buffer((*shapes["q"][:3], problem.d_v), problem.dtype)
    stats = Buffer((problem.batch, problem.q_heads, 2, problem.q_len), "float32")
    known = dict(q=q, k=k, v=v, between=Buffer((33,), "float32"), out=out, stats=stats)
    if pass_name == "forward":
        return Program(known, ("q", "k", "v"), ("out", "stats"), {}, (), implementation=implementation)
    buffers = known | dict(dout=out, dstats=stats, more=Buffer((7,), "bfloat16"), dq=dq, dk=dk, dv=dv)
    return Program(buffers, ("q", "k", "v", "out", "stats", "dout", "dstats"), ("dq", "dk", "dv"), {}, (),
                   implementation=implementation)


class FakeGpu:
    """In the place of `Loaded`: computes in float64 what kernels would, in the memory at the addresses."""

    launched, requests, read, written = [], {}, [], []

    def __init__(self, program, index):
        self.program, (self.problem, self.pass_name) = program, self.requests[id(program)]

    def array(self, addresses, name):
        buffer = self.program.buffers[name]
        dtype, wanted = runner.DTYPES[buffer.dtype], buffer.strides or torch.empty(buffer.shape).stride()
        size = dtype.itemsize * (1 + sum((n - 1) * stride for n, stride in zip(buffer.shape, wanted)))
        memory = (ctypes.c_char * size).from_address(addresses[[*self.program.buffers].index(name)])
        return torch.frombuffer(memory, dtype=dtype).as_strided(buffer.shape, wanted)

    def window(self, q_len, kv_len):
        """Which pairs numbers keep."""
        left, right, offset, _ = self.problem.window
        distance = torch.arange(kv_len) - torch.arange(q_len)[:, None] - offset
        far = 2**30
        return (distance <= (far if right is None else right)) & (distance >= -(far if left is None else left))

    def keep(self, arrays, q_len, kv_len):
        """Which pairs the arrays keep that operations made of the call's: intervals of each position, and ids."""
        found = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
        if "keys" in arrays:
            first, count = (x[..., :q_len, None] for x in arrays["keys"].unbind(2))
            found = found & (torch.arange(kv_len) >= first) & (torch.arange(kv_len) < first + count)
        if "queries" in arrays:
            first, count = (x[..., None, :kv_len] for x in arrays["queries"].unbind(2))
            at = torch.arange(q_len)[:, None]
            found = found & (at >= first) & (at < first + count)
        if "q_ids" in arrays:
            found = found & (arrays["q_ids"][:, :, 0, :q_len, None] == arrays["kv_ids"][:, :, 0, None, :kv_len])
        for name, shape in (("key_bits", (q_len, kv_len)), ("query_bits", (kv_len, q_len))):
            if name in arrays:  # (.., .., words or 1, rows or 1)
                words = arrays[name].transpose(2, 3)[:, :, :shape[0]]
                bits = (words[..., None] >> torch.arange(32) & 1).flatten(3)[..., :shape[1]] != 0
                bits = bits[..., :1] if words.shape[3] == 1 and shape[1] > 32 else bits
                found = found & (bits if name == "key_bits" else bits.transpose(2, 3))
        return found

    def biased(self, s, arrays):
        """Scores with the bias that launches read, and the anchor of each row."""
        bias = next((arrays[name] for name in ("bias", "given bias") if name in arrays), None)
        if bias is None:
            return s, 0.0
        (rows, columns), anchor = s.shape[2:], arrays["anchor"][:, :, 0, :s.shape[2], None].double()
        bias = (bias[:, :, :rows, :columns]).double()
        return torch.where(bias == -torch.inf, bias, s + bias - anchor), anchor

    def scored(self, s, arrays):
        """Scores behind a score function, and its slope, in float32 as kernels have them."""
        if self.problem.score_ir is None:
            return s, 1.0
        function = score_ir.function(self.problem.score_ir, "a function")
        own, filled = traced.program(function), list(scores.floats(function) + scores.integers(function))
        assert not own.prepared
        for i, number in enumerate(own.read):  # by its name, or as it is given
            kind = "floats" if own.types[number].dtype == np.float32 else "integers"
            x = next(arrays[name] for name in (f"score_{i}", f"given score_{kind}") if name in arrays)
            filled[number] = jnp.asarray(x.numpy().copy()).reshape(filled[number].shape).astype(filled[number].dtype)
        filled = [jnp.asarray(x if hasattr(x, "at") else np.zeros(x.shape, x.dtype)) for x in filled]
        count = len(scores.floats(function))
        pairs = scores.tile(*s.shape[:2], *(jnp.arange(n, dtype=jnp.int32) for n in s.shape[2:]))
        found = scores.value_and_slope(function.filled(filled[:count], filled[count:]),
                                       jnp.asarray(s.float().numpy()), pairs)
        value, slope = (torch.from_numpy(np.array(x)).double() for x in found)
        return value, slope

    def kept(self, arrays, shape):
        """What dropout multiplies weights with, by the keys that operations made of the seed."""
        if not self.problem.dropout_p:
            return 1.0
        keys = arrays["dropout_keys"].numpy().view("uint32")[..., None, None]
        q_pos, kv_pos = np.arange(shape[2], dtype="uint32")[:, None], np.arange(shape[3], dtype="uint32")
        flags = dropout.kept_by((keys[:, :, 0], keys[:, :, 1]), q_pos, kv_pos, self.problem.dropout_p)
        return torch.from_numpy(np.array(flags)).double() * dropout.factor(self.problem.dropout_p)

    def launch(self, addresses, stream):
        beside = {*self.program.given} - {name for step in self.program.steps for name in step.arrays}
        used = [x for name, x in zip(self.program.buffers, addresses) if name not in beside]
        assert stream == 78 and all(address and address % 16 == 0 for address in used)
        arrays = {name: self.array(addresses, name) for name in self.program.buffers if name not in beside}
        self.read[:] = [arrays[name].data_ptr() for name in "qkv"]
        self.written[:] = [arrays[name].data_ptr() for name in self.program.results]
        for name in {*self.program.scratch, *self.program.results}:
            arrays[name].fill_(torch.nan if arrays[name].is_floating_point() else -1)
        heads_first = lambda x: x.transpose(1, 2) if self.problem.layout == "BLHD" else x
        group = self.problem.q_heads // self.problem.kv_heads
        q, k, v = (heads_first(arrays[name]).double() for name in "qkv")
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scale = self.problem.d**-0.5 if self.problem.scale is None else self.problem.scale
        s, slope = scale * q @ k.mT, 1.0
        if (cap := self.problem.softcap) is not None:
            s, slope = cap * torch.tanh(s / cap), 1 - torch.tanh(s / cap)**2
        has_arrays = {name for name, _, _ in self.problem.given} - {"seed"} or self.problem.score
        keep = self.keep(arrays, *s.shape[2:]) if has_arrays else self.window(*s.shape[2:])
        s, of_score = self.scored(s, arrays)
        slope = torch.where(keep, slope * of_score, 0.0)
        s, _ = self.biased(s, arrays)
        s = s.masked_fill(~keep, -torch.inf)
        p, lse = s.softmax(-1).nan_to_num(0.0), s.logsumexp(-1)
        kept = self.kept(arrays, s.shape)
        out = (kept * p) @ v
        self.launched.append(self.pass_name)
        if self.pass_name == "forward":
            heads_first(arrays["out"]).copy_(out)
            arrays["stats"].copy_(torch.stack((lse, torch.zeros_like(lse)), 2))
            return
        dout, dlse = heads_first(arrays["dout"]).double(), arrays["dstats"][:, :, 0, :, None]
        counts = dout.any(-1)  # others may be padding
        assert torch.equal(arrays["stats"][:, :, 0][counts], lse.float()[counts]), "the forward's statistics"
        assert torch.equal(heads_first(arrays["out"])[counts], out.to(arrays["out"].dtype)[counts]), "the forward's out"
        ds = p * (kept * (dout @ v.mT) - (out * dout).sum(-1, keepdim=True) + dlse)
        if self.pass_name == "dbias":
            found = arrays["dbias"].fill_(torch.nan)
            rows, columns = ds.shape[2:]
            axes = [axis for axis in (0, 1) if found.shape[axis] == 1]
            found[:, :, :rows, :columns].copy_(ds.sum(axes, keepdim=True))
            return
        ds = scale * slope * ds
        for name, grad, shared in (("dq", ds @ k, 1), ("dk", ds.mT @ q, group), ("dv", (kept * p).mT @ dout, group)):
            heads_first(arrays[name]).copy_(grad.unflatten(1, (-1, shared)).sum(2))


@pytest.fixture
def launched(monkeypatch):
    """The passes that were launched directly."""
    def find(request, index):
        try:
            program = program_of(request)
        except UnsupportedError as error:
            raise NoLaunchesError(str(error)) from error
        FakeGpu.requests[id(program)] = request.problem, request.pass_name
        kept.append(program)
        return program

    kept = []
    for kernel in ("has_mask_kernel", "has_keys_kernel"):  # what they make is not read by what stands in
        monkeypatch.setattr(defaults, kernel, lambda spec: False)
    monkeypatch.setattr(ampere_defaults, "with_mask_kernel", lambda spec, schedule, device: schedule)
    for name in ("_choices", "_directs", "_reasons"):
        monkeypatch.setattr(attention, name, {})
    monkeypatch.setattr(said, "_said", set())
    for name in ("_shortcuts", "_copied"):
        monkeypatch.setattr(shortcut, name, {})
    monkeypatch.setattr(shortcut, "_recent", [])
    for name in ("_forwards", "_backwards"):
        monkeypatch.setattr(repeated, name, [])
    for name in ("_ways", "_own"):
        monkeypatch.setattr(lengths, name, {})
    for name in ("MOST_ALONE", "MOST_WITH_GRADIENTS"):
        monkeypatch.setattr(attention, name, math.inf)
    monkeypatch.setattr(requirements, "why_not", lambda: None)
    monkeypatch.setattr(FakeGpu, "launched", [])
    monkeypatch.setattr(attention, "DEVICES", {"cpu"})
    monkeypatch.setattr(attention, "gpu_of", lambda device: H200)
    monkeypatch.setattr(driver, "version", lambda: 13000)
    monkeypatch.setattr(runner, "Loaded", FakeGpu)
    monkeypatch.setattr(streams, "_number", lambda index: 78 + index)
    monkeypatch.setattr(cache, "find", find)
    monkeypatch.setattr(attention.Direct, "expect", lambda self, pass_name: None)
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    return FakeGpu.launched


BOTH = ["forward", "backward"]
EXPECT = attention.Direct.expect
BF16 = torch.bfloat16
FULL, CAUSAL = (Numbers.of(causal_offset=offset, scale=None, dropout_p=0.0) for offset in (None, 0))
NONE = dict(mask=None, bias=None, seed=None)


def sliced(x):
    """The same values with gaps between them."""
    wide = torch.cat((x.detach(), x.detach()), -1)
    return wide[..., :x.shape[-1]].requires_grad_()


def moved(x):
    """The same values, 2 bytes past a multiple of 16."""
    memory = torch.empty(x.numel() + 8, dtype=x.dtype)
    start = (2 - memory.data_ptr()) % 16 // x.itemsize
    return memory[start:start + x.numel()].view(x.shape).copy_(x.detach()).requires_grad_()


def negative(x):
    complex_ = torch.complex(torch.zeros_like(x.detach(), dtype=torch.float), -x.detach().float())
    return complex_.conj().imag.to(x.dtype).requires_grad_()


@pytest.mark.parametrize("change", [lambda x: x, heads_inside, sliced, moved, negative],
                         ids=["dense", "heads inside", "gaps", "misaligned", "negative"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_torchs(launched, change, dtype):
    tensors = [change(x) for x in qkv((2, 4, 9, 16), (2, 4, 12, 16), (2, 4, 12, 8), dtype=dtype)]
    results = check(tensors, is_causal=True)
    assert launched == BOTH
    assert results[0].stride() == strides.like_query(tensors[0], 8)


@pytest.mark.parametrize("changes", [(heads_inside, sliced, moved), (moved, heads_inside, heads_inside)])
def test_each_tensor_may_be_stored_otherwise(launched, changes):
    tensors = qkv(*[(2, 3, 8, 16)] * 3, dtype=BF16)
    check([change(x) for change, x in zip(changes, tensors)])
    assert launched == BOTH


def test_groups_scale_ranks_and_idle_queries(launched, monkeypatch):
    check(qkv((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), dtype=BF16), enable_gqa=True, scale=0.7)
    check(qkv((5, 8), (7, 8), (7, 8), dtype=BF16), is_causal=True)
    check(qkv((2, 3, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8), dtype=BF16))
    tensors = qkv((1, 2, 5, 8), (1, 2, 3, 8), (1, 2, 3, 8), dtype=BF16, requires_grad=False)
    call = Attention(Operands.of(*tensors, **NONE), CAUSAL._replace(offset=-2), True)
    out, stats = ops.attention(*call.flat())
    assert launched == [*BOTH * 3, "forward"] and not out[:, :, :2].any() and torch.isneginf(stats[:, :, 0, :2]).all()
    monkeypatch.setenv(attention.VARIABLE, "0")
    torch.testing.assert_close(out, ops.attention(*call.flat())[0])


def test_only_what_needs_a_gradient_gets_one(launched):
    q, k, v = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    out = OURS(q, k.detach(), v)
    dq, dv = torch.autograd.grad(out, (q, v), torch.ones_like(out))
    assert launched == BOTH and dq.shape == q.shape and dv.shape == v.shape
    with torch.no_grad():
        assert torch.equal(OURS(q, k, v), out)
    assert launched == [*BOTH, "forward"]


def test_operators_take_the_path_too(launched):
    """What modes and transforms see is the operator, and it launches the same."""
    q, k, v = (x.detach() for x in qkv(*[(2, 2, 5, 8)] * 3, dtype=BF16))
    out = OURS(q, k, v)
    assert torch.equal(torch.vmap(OURS)(q[:, None], k[:, None], v[:, None])[:, 0], out)
    grads = torch.func.grad(lambda *x: OURS(*x).float().square().sum(), (0, 1, 2))(q, k, v)
    assert [grad.shape for grad in grads] == [q.shape] * 3
    assert launched == ["forward", "forward", *BOTH]
    assert ops.attention(*Attention(Operands.of(q, k, v, **NONE), FULL, False).flat())[1].shape == (0,)


@pytest.mark.parametrize(("dtype", "d", "arguments", "reason"), [
    (torch.float32, 8, {}, "takes bfloat16 and float16, query.dtype is torch.float32"),
    (BF16, 12, {}, "multiples of 8, JAX pads copies of the others, d=12, d_v=12"),
], ids=["float32", "padded"])
def test_other_calls_go_through_dlpack(launched, dtype, d, arguments, reason):
    tensors = qkv(*[(1, 2, 5, d)] * 3, dtype=dtype)
    OURS(*tensors, **arguments).sum().backward()
    assert launched == [] and all(x.grad is not None for x in tensors)
    with pytest.raises(RuntimeError, match=reason):
        torch_bridge.precompile(*tensors, **arguments)


def test_other_gpus_go_through_dlpack_without_asking_a_compiler(launched, monkeypatch):
    """Regression: each new problem started a process that could only say no."""
    monkeypatch.setattr(attention, "gpu_of", lambda device: dataclasses.replace(
        H200, name="Tesla T4", capability=(7, 5)))
    monkeypatch.setattr(cache, "find", None)
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    check(tensors)
    assert launched == []
    with pytest.raises(RuntimeError, match=r"for compute capability 8\.0 or higher, Tesla T4 has 7\.5"):
        torch_bridge.precompile(*tensors)


def test_the_kernels_of_an_a100_are_launched_directly_too(launched, monkeypatch):
    monkeypatch.setattr(attention, "gpu_of", lambda device: A100)
    torch_bridge.report(reset=True)
    check(qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))
    assert len(launched) == 2
    rows = [row for row in torch_bridge.report() if "launched directly" in row.problem]
    assert {(row.what, row.implementation) for row in rows} == {("forward", "ampere"), ("backward", "ampere")}


@pytest.mark.parametrize("gpu", [A100, H200], ids=["A100", "H200"])
def test_reports_say_why_as_explain_does(launched, monkeypatch, tmp_path, gpu):
    """Which implementations cannot run what is launched directly, and why DLPack is taken."""
    monkeypatch.setattr(attention, "gpu_of", lambda device: gpu)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    torch_bridge.report(reset=True)
    options = dict(kv_lengths=torch.tensor([3]))
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    torch_bridge.flash_attention(*tensors, **options).sum().backward()
    said = torch_bridge.explain_flash_attention(*tensors, **options)
    rows = torch_bridge.report(reset=True)
    assert {row.what for row in rows} == {*BOTH} and launched == BOTH
    against = [line.strip() for line in said.splitlines() if line.startswith("  not ") and "it could run" not in line
               and "only when it is named" not in line]
    assert [*rows[0].reasons] == [*rows[1].reasons] == against
    assert gpu == H200 or any("'hopper': needs compute capability 9.0" in reason for reason in rows[0].reasons)
    wide = [x.detach().float() for x in tensors]
    OURS(*wide)
    assert launched == BOTH
    row, = torch_bridge.report(reset=True)
    reason = "it takes bfloat16 and float16, query.dtype is torch.float32"
    assert f"not launched directly: {reason}" in row.reasons
    assert f"path: DLPack, JAX's runtime launches (not the direct path: {reason})" in torch_bridge.explain(*wide)


OTHERWISE = {
    "query": torch.zeros(1, 2, 5, 16, dtype=BF16), "key": torch.zeros(1, 2, 7, 8, dtype=BF16),
    "value": torch.zeros(1, 2, 5, 16, dtype=BF16), "mask": torch.ones(1, 1, 5, 5, dtype=torch.bool),
    "bias": torch.zeros(1, 1, 5, 5, dtype=BF16), "offsets": torch.ones(1, dtype=torch.int32),
    "q_lengths": torch.ones(1, dtype=torch.int32), "kv_lengths": torch.ones(1, dtype=torch.int32),
    "q_ids": torch.zeros(1, 5, dtype=torch.int32), "kv_ids": torch.zeros(1, 5, dtype=torch.int32),
    "q_starts": torch.zeros(2, dtype=torch.int32), "kv_starts": torch.zeros(2, dtype=torch.int32),
    "left": 1, "right": None, "offset": 1, "softcap": 2.0, "scale": 0.5, "dropout_p": 0.5, "deterministic": True,
    "partial": True, "ends_aligned": True, "score": score_names.name_of(lambda score, *_: score * 0.5, (), False),
}
WITHOUT_EFFECT = {"seed": "its numbers are read, and there is one wherever there is dropout",
                  **dict.fromkeys(("score_floats", "score_integers"), "there are none without a score")}


def test_every_argument_is_in_the_problem_or_refused():
    """So that a field that is added can not be forgotten: the call would be launched as if it were not there."""
    assert {*OTHERWISE, *WITHOUT_EFFECT} == {*Operands._fields, *Numbers._fields}
    operands = Operands.of(*qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16, requires_grad=False), **NONE)
    assert attention.why_not(operands, CAUSAL) is None
    problem = attention.problem_of(operands, CAUSAL)
    for name, value in OTHERWISE.items():
        changed = {name: value}
        other = (operands._replace(**changed), CAUSAL) if name in Operands._fields else (
            operands, CAUSAL._replace(**changed))
        assert attention.why_not(*other) is not None or attention.problem_of(*other) != problem, name
    assert "no such window, (1, -2)" in str(attention.why_not(operands, CAUSAL._replace(left=1, right=-2)))
    assert "no such soft cap, nan" in str(attention.why_not(operands, CAUSAL._replace(softcap=torch.nan)))


@pytest.mark.parametrize("arguments", [
    dict(window=(1, 0)), dict(window=(None, 2), causal_offset=1), dict(window=(2, None)), dict(softcap=1.5),
    dict(window=(0, 1), softcap=0.7)], ids=str)
def test_windows_and_soft_caps(launched, arguments):
    tensors = qkv((2, 4, 6, 8), (2, 2, 7, 8), (2, 2, 7, 8), dtype=BF16)
    out = torch_bridge.flash_attention(*tensors, **arguments)
    found = out, *torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert launched == BOTH
    wide = [x.detach().double().requires_grad_() for x in tensors]
    out = torch_bridge.flash_attention(*wide, **arguments)
    assert launched == BOTH
    for x, exact in zip(found, (out, *torch.autograd.grad(out, wide, torch.ones_like(out))), strict=True):
        torch.testing.assert_close(x.double(), exact, atol=3e-2, rtol=3e-2)


def test_a_scale_that_is_no_number_is_refused_as_elsewhere(launched):
    """It cannot be part of a key."""
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    for scale in (torch.inf, -torch.inf, torch.nan, 1e31):
        with pytest.raises(ValueError, match="scale must be a Python number from -1e"):
            OURS(*tensors, scale=scale)
    assert launched == []


def test_the_default_dtype_has_no_part_in_it(launched):
    torch.set_default_dtype(torch.float64)
    try:
        check(qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))
    finally:
        torch.set_default_dtype(torch.float32)
    assert launched == BOTH


@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_cotangent_without_memory(launched, monkeypatch, asked):
    """torch's own tensors of zeros have the address 0, which JAX read: the process ended."""
    monkeypatch.setenv(attention.VARIABLE, asked)
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    grads = torch.autograd.grad(OURS(*tensors), tensors, torch._efficientzerotensor((1, 2, 5, 8), dtype=BF16))
    assert launched == BOTH * int(asked) and not any(grad.any() for grad in grads)


def test_room_is_made_for_the_process_that_compiles(launched, monkeypatch, tmp_path):
    """Where torch kept the whole GPU it found no memory, and calls went through JAX, which found none either."""
    asked, freed = [], []
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (2**29, 2**37))[1])
    monkeypatch.setattr(attention, "Runner", lambda program, device: program)
    monkeypatch.setattr(shared_, "MAX_UNREAD_BYTES", 0)
    problem = attention.problem_of(Operands.of(*qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16), **NONE), FULL)
    device = torch.device("cuda", 1)
    attention.Direct((problem, device)).prepare("forward")
    assert asked == [device] and freed == [True]
    cache.path_of(attention.request(problem, "forward", device)).touch()
    attention.Direct((problem, device)).prepare("forward")
    assert asked == [device]


def test_the_first_call_in_inference_mode(launched):
    """What is made then, and kept, serves calls that record."""
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    with torch.inference_mode():
        OURS(*tensors)
    check(tensors)
    check(tensors)
    assert launched == ["forward", *BOTH, *BOTH]


def test_threads_that_forget_choices_disturb_nobody(launched, monkeypatch):
    monkeypatch.setattr(attention, "_MAX_CHOICES", 1)
    inputs = [qkv(*[(1, 2, length, 8)] * 3, dtype=BF16, requires_grad=False) for length in (3, 4, 5, 6)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda i: OURS(*inputs[i % 4]), range(64)))) == 64


def test_what_does_not_fit_is_never_read(launched):
    """The operators may be called with anything; a kernel would read past the end."""
    q, k, v = (x.detach() for x in qkv((1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), dtype=BF16))
    for wrong in ((q, k[:, :, :6], v), (q, k[:, :1], v), (q, k, v.expand(2, 2, 7, 8)), (q[..., :4], k, v),
                  (q.expand(1, 2, 5, 8)[:, :1], k, v)):
        with pytest.raises((ValueError, RuntimeError)):
            ops.attention(*Attention(Operands.of(*wrong, **NONE), FULL, False).flat())
    assert launched == []
    operands = Operands.of(q, k, v, **NONE)
    out, stats = ops.attention(*Attention(operands, FULL, True).flat())
    needs = PerArray(True, True, True, False, False)
    for results, dout in ((Results(out[:, :, :4], stats), out), (Results(out, stats[..., :4]), out),
                          (Results(out, stats.double()), out), (Results(out, stats), out[:, :1])):
        with pytest.raises(ValueError, match=r"must be Buffer\(shape=.*, got .*Pass the tensors of the forward"):
            ops.attention_backward(*AttentionBackward(operands, FULL, results, Cotangents(dout, None), needs).flat())
    with pytest.raises(ValueError, match=r"^k must be Buffer.*got .*torch.float32"):
        ops.attention_backward(*AttentionBackward(operands._replace(key=k.float()), FULL, Results(out, stats),
                                                  Cotangents(out, None), needs).flat())
    cotangents = Cotangents(out.float(), torch.ones_like(stats))
    wide = AttentionBackward(operands, FULL, Results(out, stats), cotangents, needs)
    assert ops.attention_backward(*wide.flat())[0].dtype == BF16
    assert launched == BOTH


def test_direct_is_the_default(launched, monkeypatch):
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    for value in ("", "1"):
        monkeypatch.setenv(attention.VARIABLE, value)
        check(tensors)
    assert launched == BOTH * 2
    monkeypatch.setenv(attention.VARIABLE, "0")
    check(tensors)
    assert launched == BOTH * 2
    assert "launches (not the direct path: PALLAS_FLASH_DIRECT=0 is set)" in torch_bridge.explain(*tensors)
    monkeypatch.setenv(attention.VARIABLE, "yes")
    with pytest.raises(ValueError, match=r"PALLAS_FLASH_DIRECT must be 0 or 1, got 'yes'"):
        OURS(*tensors)


def test_an_installation_that_cannot_compile_is_said_once(launched, monkeypatch):
    """And no process is started that could only say it again."""
    monkeypatch.setattr(requirements, "why_not", lambda: "needs JAX 0.11, jax is 0.12.0")
    monkeypatch.setattr(cache, "find", None)
    with pytest.warns(FallbackWarning, match=r"calls go through DLPack.*jax is 0\.12\.0.*set PALLAS_F") as seen:
        for length in (5, 6):
            check(qkv(*[(1, 2, length, 8)] * 3, dtype=BF16))
    assert len(seen) == 1 and launched == []
    with pytest.raises(RuntimeError, match=r"jax is 0\.12\.0"):
        torch_bridge.precompile(*qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))


def test_what_is_no_list_of_launches_is_not_said_twice(launched, monkeypatch):
    """What runs in its place says why."""
    def refuse(request, index):
        raise NoLaunchesError("'hopper' takes head dims up to 256")
    monkeypatch.setattr(cache, "find", refuse)
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(tensors)
    assert launched == []
    problem = attention.problem_of(Operands.of(*tensors, **NONE), FULL)
    assert "up to 256" in attention.reason_found(problem, tensors[0].device)


@pytest.mark.parametrize("action", ["always", "error"])
def test_kernels_that_are_left_are_said_once(launched, monkeypatch, action):
    """As in JAX: which of them run is chosen where a plan is made, and found in it from then on."""
    find, reason = cache.find, "needs a compiler that moves registers"
    def left(request, index):
        program = find(request, index)
        other = program._replace(implementation="ampere", left=(("hopper", reason),))
        FakeGpu.requests[id(other)] = FakeGpu.requests[id(program)]
        kept.append(other)
        return other
    kept = []
    monkeypatch.setattr(cache, "find", left)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action, FallbackWarning)
        for length in (5, 5, 9):
            tensors = qkv(*[(1, 2, length, 8)] * 3, dtype=BF16)
            if action == "error":
                with pytest.raises(FallbackWarning, match=reason):
                    OURS(*tensors)
            else:
                check(tensors)
    if action == "always":
        warning, = seen
        assert warning.category is FallbackWarning and Path(warning.filename).parent == Path(__file__).parent
        assert "implementation='ampere' runs Problem(" in str(warning.message)
        assert f"on NVIDIA H200, because 'hopper', written for this device, cannot: {reason}." in str(warning.message)
    assert launched == BOTH * 3 * (action == "always")


def test_amds_gpus_are_left_alone(launched, monkeypatch):
    """They are of the type "cuda", and some count as 9.0."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    check(qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))
    assert launched == []


def test_a_plan_that_cannot_be_made_is_said_once(launched, monkeypatch):
    def refuse(request, index):
        raise NoPlanError("needs another JAX")
    monkeypatch.setattr(cache, "find", refuse)
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    with warnings.catch_warnings(), pytest.raises(FallbackWarning):  # nothing is remembered
        warnings.simplefilter("error", FallbackWarning)
        OURS(*tensors)
    with pytest.warns(FallbackWarning, match=r"forward of Problem.*DLPack.*needs another JAX.*PALLAS_FLASH_DIRECT=0"
                      ) as seen:
        check(tensors)
    assert len(seen) == 1 and Path(seen[0].filename).name == "problems.py", "the caller's line"
    check(tensors)
    assert launched == []
    with pytest.raises(NoPlanError, match="another JAX"):
        torch_bridge.precompile(*tensors)


@pytest.mark.parametrize("fails", [False, True])
def test_the_backward_is_compiled_while_the_forward_is(launched, monkeypatch, tmp_path, fails):
    """Each takes seconds in a process of its own. A call that needs no gradient has none made. One that failed was
    made, and failed, again."""
    seen, begun = [], threading.Event()
    find = cache.find

    def slow(request, index, quiet=False):
        seen.append((request.pass_name, quiet))
        if quiet:
            begun.set()
            if fails:
                raise NoPlanError("the compiler broke")
        elif len(seen) > 1:
            assert begun.wait(10)
        return find(request, index)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "find", slow)
    q, k, v = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    with torch.no_grad():
        OURS(q, k, v)
    assert seen == [("forward", False)]
    del seen[:]
    monkeypatch.setattr(attention.Direct, "expect", EXPECT)
    said = pytest.warns(FallbackWarning, match="backward of .*the compiler broke")
    with said if fails else contextlib.nullcontext():
        check(qkv(*[(1, 2, 6, 8)] * 3, dtype=BF16))
    assert sorted(seen) == [("backward", True), ("forward", False)]
    assert launched == ["forward", "forward", "backward"][:2 if fails else 3]


def test_a_plan_is_not_made_meanwhile_where_no_thread_can_start(launched, monkeypatch, tmp_path):
    """At exit, or at a limit, the first call that records a gradient was an error."""
    def start(thread):
        raise RuntimeError("can't create new thread at interpreter shutdown")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(attention.Direct, "expect", EXPECT)
    monkeypatch.setattr(threading.Thread, "start", start)
    q, k, v = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)
    OURS(q, k, v)
    assert launched == ["forward"]


def test_a_backward_without_a_plan_goes_through_dlpack(launched, monkeypatch):
    """It takes the statistics of the forward that was launched directly."""
    find = cache.find

    def forward_alone(request, index):
        if request.pass_name == "backward":
            raise driver.DriverError("cuModuleLoadData", 200, "bad image")
        return find(request, index)
    monkeypatch.setattr(cache, "find", forward_alone)
    with pytest.warns(FallbackWarning, match=r"backward of .*cuModuleLoadData returned CUDA error 200: bad image"):
        check(qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16), is_causal=True)
    assert launched == ["forward"]


def test_threads_load_a_plan_once(launched, monkeypatch):
    asked, find = [], cache.find
    monkeypatch.setattr(cache, "find", lambda request, index: (asked.append(request), find(request, index))[1])
    tensors = qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16, requires_grad=False)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: OURS(*tensors), range(16)))
    assert len(asked) == 1 and all(torch.equal(x, results[0]) for x in results)


def test_a_first_call_inside_a_capture_is_refused(monkeypatch):
    """And nothing is compiled for it: the backward's plan was."""
    problem = attention.problem_of(Operands.of(*qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16), **NONE),
                                   CAUSAL)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(attention.Direct, "expect", None)
    direct = attention.Direct((problem, torch.device("cuda", 0)))
    for call in (lambda: direct.prepare("backward"), lambda: direct.try_prepare("forward", then="backward")):
        with pytest.raises(RuntimeError, match=r"must have run once before it is captured in a CUDA graph.*Call it"):
            call()


def test_a_forked_process_does_not_wait_for_a_plan(launched, monkeypatch):
    """The thread that makes it is not there."""
    monkeypatch.setattr(launch, "_was_forked", True)
    with pytest.raises(RuntimeError, match="forked after they were loaded"):
        OURS(*qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16))


def test_explain_and_precompile(launched, monkeypatch, tmp_path):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    tensors = qkv((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), dtype=BF16)
    arguments = dict(is_causal=True, enable_gqa=True)
    assert "path: direct" in torch_bridge.explain(*tensors, **arguments)
    odd = qkv((1, 4, 5, 12), (1, 2, 5, 12), (1, 2, 5, 12), dtype=BF16)
    assert "multiples of 8, JAX pads copies of the others, d=12" in torch_bridge.explain(*odd, **arguments)
    asked = []
    monkeypatch.setattr(cache, "find", lambda request, index: asked.append(request))
    torch_bridge.precompile(*tensors, **arguments)
    assert [request.pass_name for request in asked] == BOTH and launched == []
    problem = asked[0].problem
    assert problem.window == (None, 0, 0, False) and (problem.q_heads, problem.kv_heads) == (4, 2)
    monkeypatch.setattr(attention, "DEVICES", {"cuda"})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    torch_bridge.precompile(*(x.to("meta") for x in tensors), **arguments)
    assert [request.text for request in asked[2:]] == [request.text for request in asked[:2]]
    with pytest.raises(RuntimeError, match="for CUDA tensors, query is on cpu"):
        torch_bridge.precompile(*tensors, **arguments)


def test_explain_on_a_gpu(launched, monkeypatch, tmp_path):
    """With a decision as it is made for a Hopper GPU. JAX, if it were asked for the device, would start a client."""
    from pallas_flash import device
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(device, "of", lambda where: device.H200)
    x, jax_device = moved(qkv((1, 2, 200, 64), dtype=BF16)[0]), exchange.jax_device
    monkeypatch.setattr(exchange, "jax_device", None)
    text = torch_bridge.explain(x, x.detach().clone(), x.detach(), is_causal=True)
    assert "path: direct, launched on torch's stream; plans: forward to be compiled, backward to be compiled" in text
    assert "query: copied: its address is 2 bytes past a multiple of 16" in text and "out: torch's memory" in text
    problem = attention.problem_of(Operands.of(x, x, x, **NONE), CAUSAL)
    cache.path_of(attention.request(problem, "forward", x.device)).write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "plans: forward on disk, backward to be compiled" in torch_bridge.explain(x, x, x, is_causal=True)
    monkeypatch.setattr(exchange, "jax_device", jax_device)
    tmp_path.chmod(0o777)
    assert "launches (not the direct path: a directory of plans must not" in torch_bridge.explain(x, x, x)


def test_the_caller_may_be_a_package_whose_name_begins_as_torchs(launched, monkeypatch):
    """Its files were taken for torch's, and the warning named the line that called them."""
    def refuse(request, index):
        raise NoPlanError("needs another JAX")
    monkeypatch.setattr(cache, "find", refuse)
    installed = Path(torch.__file__).parents[1]
    for name, is_the_callers in (("torchtitan/model.py", True), ("torch/autograd/function.py", False)):
        attention._reasons.clear()
        said._said.clear()
        call = compile("attend(*tensors)", path := str(installed / name), "exec")
        with pytest.warns(FallbackWarning) as seen:
            exec(call, dict(attend=OURS, tensors=qkv(*[(1, 2, 5, 8)] * 3, dtype=BF16)))
        assert [warning.filename for warning in seen] == [path if is_the_callers else __file__]
