"""Head dimensions that are no multiples of 8, which run on padded copies, and those above 256, whose values may run in
parts: the kernels themselves in Pallas' interpreter, and, with the reference in their place, what surrounds them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, assert_within, with_rest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from hopper.stand_in import standing_in
from pallas_flash import Causal, Dense, device, dispatch, errors, flash_attention, padding
from pallas_flash.kernels.ampere import calls as ampere_calls
from pallas_flash.kernels.ampere import schedule as ampere_schedule
from pallas_flash.kernels.hopper import calls, defaults, rules, support
from pallas_flash.kernels.hopper import launches as hopper_launches
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, ForwardSchedule, KvSchedule
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.launches import launches
from pallas_flash.spec import AttentionSpec, Gradients, Results
from pallas_flash.testing import conformance, inputs
from pallas_flash.testing.problems import Problem

# The kernels ----------------------------------------------------------------------------------------------------------

FORWARD = ForwardSchedule(block_kv=64, warpgroups=1, num_blocks=2)
BACKWARD = BackwardSchedule(KvSchedule(warpgroups=1), DqSchedule(block_kv=32, warpgroups=1))
CASES = {
    "gqa": dict(q_heads=2, q_len=20, kv_len=40, d=20, d_v=33, mask=Causal(15)),
    "wide-dropout": dict(q_len=20, kv_len=40, d=260, d_v=271, mask=Causal(20), layout="BHLD", dropout_rate=0.3),
}
WITH_GRADIENTS = ("gqa",)
WIDE = dataclasses.replace(FORWARD, block_kv=32, query_buffers=1, out_chunks=0)


def problem_of(name, fields):
    return Problem(name, "dims", **(dict(batch=1, q_heads=1, kv_heads=1, dtypes=("bfloat16",)) | fields))


@pytest.fixture
def kernels(monkeypatch):
    """The passes of both packages run their kernels at once, in the interpreter, which fits into no program."""
    def arrays(operands):
        return operands.q, operands.k, operands.v

    def forward(spec, operands, keys=()):
        schedule = FORWARD if spec.d <= 256 else WIDE
        assert rules.reasons_against(spec, schedule, 232_448) == []
        with interpreted():
            return Results(*calls._forward(spec, schedule)(*arrays(operands), *keys, *jax.tree.leaves(operands.mask)))

    def backward(spec, operands, results, cotangents, keys=()):
        assert rules.reasons_against(spec, BACKWARD, 232_448) == []
        given = *arrays(operands), *results, *cotangents, *keys, *jax.tree.leaves(operands.mask)
        with interpreted():
            return Gradients(*calls._backward(spec, BACKWARD)(*given), dbias=None, dscore=()), None  # no sinks
    monkeypatch.setattr(calls, "_run_forward", forward)
    monkeypatch.setattr(calls, "_run_backward", backward)


def run(module, spec, operands, cotangents, gradients=True):
    """Everything that a package's passes compute, by name; the operands are poisoned where nothing may be read."""
    dout, dlse = cotangents
    given = jax.tree.map(jnp.asarray, inputs.poisoned(spec, operands))
    out, stats = module.forward(spec, given)
    if not gradients:
        return dict(out=out, lse=stats[:, :, 0])
    found = module.backward(spec, given, out, stats, jnp.asarray(dout), jnp.asarray(with_rest(dlse, np.nan)))
    return dict(out=out, lse=stats[:, :, 0], dq=found.dq, dk=found.dk, dv=found.dv)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_oracle(name, kernels):
    problem = problem_of(name, CASES[name])
    dtype, spec = problem.dtypes[0], problem.spec()
    assert support.why_not(spec, device.H200) == []
    case = conformance.random_case(problem, dtype)
    found = run(calls, spec, *case, gradients=name in WITH_GRADIENTS)
    assert_within(conformance.budget(problem, dtype, *case), found)


@pytest.mark.interpreted
def test_kernels_of_ampere_agree_with_the_oracle(monkeypatch):
    problem = problem_of("ampere", dict(q_len=20, kv_len=20, d=20, d_v=9, mask=Causal()))
    forward, backward = ampere_schedule.ForwardSchedule(), ampere_schedule.BackwardSchedule()

    def run_forward(spec, operands, keys):
        assert not keys  # of dropout
        with interpreted():
            return Results(*ampere_calls._forward(spec, forward)(*operands[:3]))

    def run_backward(spec, operands, results, cotangents, keys):
        assert not keys
        with interpreted():
            found = ampere_calls._backward(spec, backward)(*operands[:3], *results, *cotangents)
        return Gradients(*found, dbias=None, dscore=())
    monkeypatch.setattr(ampere_calls, "_run_forward", run_forward)
    monkeypatch.setattr(ampere_calls, "_run_backward", run_backward)
    case = conformance.random_case(problem, "bfloat16")
    assert_within(conformance.budget(problem, "bfloat16", *case), run(ampere_calls, problem.spec(), *case))


# What surrounds them --------------------------------------------------------------------------------------------------

@pytest.fixture
def stand_in(monkeypatch):
    with standing_in(monkeypatch):
        yield


def arrays_of(*lead, d=20, d_v=33, heads=(2, 1), length=24):
    rng = np.random.default_rng(0)
    shapes = (*lead, length, heads[0], d), (*lead, length, heads[1], d), (*lead, length, heads[1], d_v)
    return [jnp.asarray(rng.standard_normal(shape), "bfloat16") for shape in shapes]


def everything(implementation, **options):
    """A function of q, k, v to out, lse and the gradients of a sum that depends on both."""
    def call(q, k, v):
        def loss(q, k, v):
            out, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation, **options)
            return (out.astype(jnp.float32) ** 2).sum() + jnp.sin(lse).sum(), (out, lse)
        gradients, results = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return results, gradients
    return call


def test_packed_sequences_under_jit(stand_in):
    """Their arrays and the copies come to the same launch."""
    arrays = arrays_of(length=12)
    call = functools.partial(everything, mask=Causal(), cu_seqlens_q=np.array([0, 5, 5, 10]))
    assert_agree(*(jax.jit(call(name))(*arrays) for name in ("hopper", "reference")))


def test_under_vmap(stand_in):
    """Padded before the mapped axis joins the batch; keys are not mapped."""
    q, k, v = arrays_of(3, 1, length=8)
    call = functools.partial(everything, mask=Causal())
    assert_agree(*(jax.jit(jax.vmap(call(name), (0, None, 0)))(q, k[0], v) for name in ("hopper", "reference")))


def test_wide_heads_have_one_backward_of_two_forwards(stand_in):
    """From the statistics of the first of two parts, and of the whole of v."""
    arrays = arrays_of(1, d=20, d_v=300, length=8)
    assert_agree(*(jax.jit(everything(name, mask=Causal()))(*arrays) for name in ("hopper", "reference")))


@pytest.mark.virtual
def test_split_over_devices(stand_in):
    """Batch and heads, and nothing is communicated for the copies."""
    arrays = arrays_of(2, heads=(4, 2), length=8)
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    there = [jax.device_put(x, NamedSharding(mesh, P("x", None, "y"))) for x in arrays]
    split = jax.jit(everything("hopper", mask=Causal())).lower(*there).compile()
    assert_agree(split(*there), jax.jit(everything("reference", mask=Causal()))(*arrays))
    text = split.as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_multiples_of_8_are_not_copied():
    q = jax.ShapeDtypeStruct((1, 16, 1, 24), "bfloat16")
    spec = AttentionSpec.of(q, q, q)
    operands = problem_of("whole", dict(d=24, d_v=8)).operands("bfloat16")
    assert padding.padded(spec) is spec and padding.copies(spec) is None
    same = padding.padded_operands(spec, operands._replace(v=operands.q))
    assert same.q is operands.q and same.k is operands.k
    results = Results(operands.q, operands.q)
    assert padding.cut_results(spec, results).out is padding.padded_results(spec, results).out is operands.q


# Who runs it ----------------------------------------------------------------------------------------------------------

def spec_of(d, d_v, **options):
    shape = lambda d: jax.ShapeDtypeStruct((2, 100, 4, d), "bfloat16")
    return AttentionSpec.of(shape(d), shape(d), shape(d_v), **options)


def test_an_automatic_choice_takes_it_and_names_the_copies():
    """With the schedule of what runs: d=60 becomes 64, which has a form of its own."""
    text = dispatch.explain(spec_of(60, 64), device.H200)
    assert "implementation='hopper'" in text
    assert f"copies: q, k filled with zeros to d=64: {2 * 2 * 100 * 4 * 64 * 2:,} bytes written" in text
    written = 2 * 2 * 100 * 4 * (64 + 60) * 2
    assert f"copies: q, k filled with zeros to d=64, dq, dk cut back: {written:,} bytes written" in text
    assert "dq='own'" in text
    both = padding.copies(spec_of(4, 5, partial=True))
    written = 2 * 100 * 4 * (3 * 8 * 2 + 5 * 4)  # out is float32
    assert both.forward == f"q, k, v filled with zeros to d=8, d_v=8, out cut back: {written:,} bytes written"
    assert both.backward.startswith("q, k, v, dout filled with zeros")
    assert "copies" not in dispatch.explain(spec_of(64, 64), device.H200)
    assert "copies" not in dispatch.explain(spec_of(60, 60), device.H200, "xla")


@pytest.mark.parametrize("d", [(0, 8), (513, 8), (8, 520)])
def test_others_are_refused(d):
    (reason,) = support.why_not(spec_of(*d), device.H200)
    assert reason.startswith("needs head dimensions from 1 to 512")


WIDE_DIMS = ((264, 64), (320, 320), (384, 384), (448, 264), (512, 512), (128, 512), (512, 8))


@pytest.mark.parametrize("dims", WIDE_DIMS, ids=str)
@pytest.mark.parametrize("options", [{}, dict(softcap=2.0), dict(partial=True),
                                     dict(mask=Dense(np.ones((100, 100), bool)).canonical())], ids=str)
def test_the_schedules_of_wide_heads_fit(dims, options):
    copies, spec = support.copies(spec_of(*dims, **options)), spec_of(*dims, **options)
    run = spec if copies is None else copies.run
    assert run.d_v <= 256 and run.d == spec.d
    schedule = defaults.default_forward(run, device.H100)
    assert rules.reasons_against(run, schedule, device.H100.smem_bytes) == []


def test_who_runs_wide_heads():
    """Not chosen, until they have been timed on a GPU."""
    spec = spec_of(512, 512)
    text = dispatch.explain(spec, device.H200)
    assert "not 'hopper': the backward of a head dimension above 256 has not been measured on a GPU yet" in text
    text = dispatch.explain(spec, device.H200, "hopper")
    written = 2 * 2 * 100 * 4 * 512 * 2
    assert (f"copies: v cut into parts of 256 and 256 columns, out joined of theirs, for each of which scores are "
            f"computed: {written:,} bytes written") in text
    assert "ForwardSchedule(block_kv=32" in text and text.count("copies: ") == 1
    kernels = ", ".join(f"attention_backward_wide_{name}" for name in ("dv", "dk", "dq"))
    assert f"backward: attention_backward_prepare, {kernels}, BackwardSchedule(kv=WideSchedule(makes='dk'" in text
    assert support.backward_of(spec) is None and support.not_measured(spec)
    both = support.copies(spec_of(4, 300)).forward
    assert "filled with zeros to d=8, d_v=304, out cut back" in both and "parts of 152 and 152 columns" in both
    assert calls.passes(spec, device.H200) is None
    narrow_values = spec_of(512, 256)  # no copies, but clusters, which only XLA launches
    assert calls.passes(narrow_values, device.H200) is None
    backward = hopper_launches.backward(narrow_values, defaults.default_backward(narrow_values, device.H200))
    assert [list(launch.outputs) for launch in backward.launches] == [["statistics"], ["dv"], ["dk"], ["dq"]]


def test_the_limits_hold_for_what_is_copied():
    """Of mma.sync's kernels."""
    for d, d_v, refused in ((255, 249, False), (256, 257, True), (264, 8, True)):
        reasons = dispatch.get("ampere").why_not(spec_of(d, d_v), device.A100)
        assert any("needs head dimensions from 1 to 256" in reason for reason in reasons) == refused


def test_padded_calls_are_no_pure_launches():
    with pytest.raises(errors.UnsupportedError, match="'hopper' reads copies that JAX makes before the launches "
                                                      r"\(q, k, v filled with zeros to d=24, d_v=24, out cut back"):
        launches(spec_of(20, 20), device.H200)
    assert len(launches(spec_of(24, 24), device.H200).backward.launches) == 3


def test_the_copies_are_lowered_with_the_kernels():
    q, k, v = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays_of(1, d=30, d_v=20, length=300))
    call = jax.jit(everything("hopper", mask=Causal()))
    with device.assume(device.H200):
        text = call.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 4
    assert "tensor<1x300x2x32xbf16>" in text and "tensor<1x300x1x24xbf16>" in text
