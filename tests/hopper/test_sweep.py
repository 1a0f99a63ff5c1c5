"""The Hopper implementation on a Hopper GPU, forward, lse and all gradients, against the formulas in float64: every
form of its kernels with every field it takes, at the head sizes and lengths where their tiles begin and end.

The catalogue (`test_conformance`) has the features; this has the sizes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_within, with_rest

from pallas_flash import Causal, Full, InBounds, PrefixLM, SegmentIds, Window, dispatch
from pallas_flash.kernels.hopper import calls, launches, rules
from pallas_flash.kernels.hopper.backward.statistics import Statistics
from pallas_flash.kernels.hopper.schedule import BackwardSchedule, DqSchedule, KvSchedule, SplitSchedule
from pallas_flash.spec import Operands
from pallas_flash.testing import conformance, inputs, textbook
from pallas_flash.testing.budget import Budget
from pallas_flash.testing.problems import Problem

pytestmark = pytest.mark.gpu

DIMS = ((64, 64), (128, 128), (256, 256), (96, 96), (192, 128), (40, 72))
LENGTHS = ((1, 1), (1, 300), (64, 64), (129, 129), (511, 200), (200, 511), (640, 640))
OPTIONS: dict[str, dict] = {
    "window": dict(mask=Window(100, 20)),
    "window-short": dict(mask=Window(3, 0)),
    "full": dict(mask=Full()),
    "empty-rows": dict(mask=Causal(-70)),
    "bottom-right": dict(q_len=200, kv_len=450, mask=Causal(250)),
    "prefix-bounds": dict(mask=PrefixLM(150) & InBounds(380, 290)),
    "heads-first-gqa": dict(layout="BHLD", q_heads=6, kv_heads=2),
    "mqa": dict(q_heads=8, kv_heads=1),
    "float16": dict(dtypes=("float16",)),
    "softcap": dict(softcap=2.0),
    "negative-scale": dict(scale=-0.3),
    "large-rows": dict(row_lse=200.0),
    "deterministic": dict(deterministic=True),
    "deterministic-gqa-window": dict(deterministic=True, q_heads=4, mask=Window(60, 60)),
}


def _ids(*lengths):
    """Ids 0, 1, ... of documents of the given lengths; a negative length is padding."""
    return np.concatenate([np.full(abs(n), i if n > 0 else -1, np.int32) for i, n in enumerate(lengths)])


_DOCUMENTS = np.stack([_ids(150, 9, 241), _ids(64, 128, 100, -108)])
_SHUFFLED = np.random.default_rng(0).integers(-1, 4, (2, 400)).astype(np.int32)
FEATURES: dict[str, dict] = {
    "documents": dict(mask=Causal() & SegmentIds(_DOCUMENTS, _DOCUMENTS)),
    "documents-gqa-softcap": dict(mask=Causal() & SegmentIds(_DOCUMENTS, _DOCUMENTS), q_heads=4, softcap=2.0),
    "ids-in-any-order": dict(mask=Window(200, 100) & SegmentIds(_SHUFFLED, np.roll(_SHUFFLED, 31, axis=1))),
    "lengths-offsets": dict(mask=InBounds(q_len=np.array([400, 133]), kv_len=np.array([391, 0]))
                            & Causal(np.array([30, -20]))),
    "lengths-deterministic": dict(mask=Causal() & InBounds(kv_len=np.array([65, 399])), deterministic=True),
    "window-of-each-head": dict(mask=Window(np.array([[3, 140]]), np.array([[0, 5]]), np.array([[130], [0]]))),
    "prefix-of-each-entry": dict(mask=PrefixLM(np.array([250, 0])), layout="BHLD", q_heads=4),
    "dropout": dict(dropout_rate=0.1),
    "dropout-gqa-deterministic": dict(dropout_rate=0.4, q_heads=4, kv_heads=1, deterministic=True),
    "dropout-softcap": dict(dropout_rate=0.2, softcap=2.0, mask=Full()),
    "documents-dropout": dict(mask=Causal() & SegmentIds(_DOCUMENTS, _DOCUMENTS), dropout_rate=0.2),
}


def problem_of(name, dims, **options):
    fields = dict(batch=2, q_heads=2, kv_heads=2, q_len=400, kv_len=400, d=dims[0], d_v=dims[1], mask=Causal(),
                  dtypes=("bfloat16",))
    return Problem(f"{name}-d{dims[0]}-{dims[1]}", "sizes of the Hopper kernels' tiles", **(fields | options))


PROBLEMS = [*(problem_of(f"len-{q}x{kv}", dims, q_len=q, kv_len=kv) for dims in DIMS[:3] for q, kv in LENGTHS),
            *(problem_of(name, dims, **options) for dims in DIMS[:3] for name, options in OPTIONS.items()),
            *(problem_of(name, dims, **OPTIONS[name]) for dims in DIMS[3:] for name in ("window", "heads-first-gqa")),
            *(problem_of(name, dims, **options) for dims in DIMS for name, options in FEATURES.items())]


def budget_of(problem, operands, cotangents):
    """The error budget around the formulas in float64, which need no compiling."""
    wide = lambda x: np.asarray(x, np.float64)
    arrays = operands._replace(**{name: wide(getattr(operands, name)) for name in "qkv"})
    with jax.enable_x64(True):
        exact, _ = textbook.attention(problem.spec("float64"), arrays, *map(wide, cotangents))
    return Budget.of(problem.spec(), operands, cotangents, exact)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_agrees_with_the_oracle(problem):
    dtype = problem.dtypes[0]
    assert conformance.supports(problem, dtype, "hopper")
    case = conformance.random_case(problem, dtype)
    assert_within(budget_of(problem, *case), conformance.compiled(problem, "hopper")(*case)._asdict())


@pytest.mark.parametrize("name", ["documents", "documents-gqa-softcap", "ids-in-any-order", "lengths-offsets",
                                  "documents-dropout"])
@pytest.mark.parametrize("dims", DIMS[:5], ids=str)
def test_what_array_masks_hide_changes_nothing(dims, name):
    problem = problem_of(f"poison-{name}", dims, **FEATURES[name])
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    for value in (np.nan, np.inf):
        bad = inputs.poisoned(problem.spec(), operands, value)
        assert any(not np.array_equal(a, b) for a, b in zip(operands[:3], bad[:3], strict=True))
        found = conformance.compiled(problem, "hopper")(bad, cotangents)
        assert_within(budget_of(problem, operands, cotangents), found._asdict())


@pytest.mark.parametrize("names", ["kv", "q"])
@pytest.mark.parametrize("dims", DIMS[:5], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bad_document_reaches_no_other(dims, deterministic, names):
    """Documents share tiles: NaN in all keys and values of one changes no number of the others; NaN in its queries and
    cotangents none but dk and dv (docs/semantics.md).
    """
    problem = problem_of("bad-document", dims, **FEATURES["documents"], deterministic=deterministic)
    operands, (dout, dlse) = conformance.random_case(problem, "bfloat16")
    bad = (_DOCUMENTS == 1)[:, :, None, None]
    spoiled = lambda x: np.where(bad, np.asarray(np.nan, x.dtype), x)
    arrays = operands._replace(**{name: spoiled(getattr(operands, name)) for name in names})
    cotangents = (spoiled(dout) if names == "q" else dout, dlse)
    found = conformance.compiled(problem, "hopper")(arrays, cotangents)._asdict()
    budget = budget_of(problem, operands, (dout, dlse))
    for name in ("out", "dq") if names == "q" else ("out", "dq", "dk", "dv"):
        wrong = np.isnan(np.asarray(found[name], np.float32))
        assert (wrong == bad).all(), (name, np.argwhere(wrong != bad)[:3])
        found[name] = np.where(bad, getattr(budget.oracle, name), np.asarray(found[name], float))
    found["lse"] = np.where(bad[:, None, :, 0, 0], budget.oracle.lse, found["lse"])
    kept = ("out", "lse", "dq") if names == "q" else ("out", "lse", "dq", "dk", "dv")
    assert_within(budget, {name: found[name] for name in kept})


BACKWARD: dict[str, tuple[tuple[int, int], BackwardSchedule]] = {
    "shared-ds-slots": ((128, 128), BackwardSchedule(KvSchedule(dq="shared", ds_slots=4))),
    "shared-dq-slots": ((128, 128), BackwardSchedule(KvSchedule(dq="shared", dq_slots=2))),
    "shared-ordered": ((128, 128), BackwardSchedule(KvSchedule(dq="shared", ordered=True))),
    "own-ordered": ((64, 64), BackwardSchedule(KvSchedule(dq="own", dq_slots=3, ordered=True))),
    "own-unpipelined": ((64, 64), BackwardSchedule(KvSchedule(num_stages=2, dq="own"))),
    "own-three-warpgroups": ((64, 64), BackwardSchedule(KvSchedule(warpgroups=3, num_stages=2, dq="own"))),
    "two-kernels": ((128, 128), BackwardSchedule(KvSchedule(), DqSchedule())),
    "two-kernels-pipelined": ((64, 64), BackwardSchedule(KvSchedule(num_stages=4, pipelined=True),
                                                         DqSchedule(block_kv=64, k_stages=4, pipelined=True))),
    "split": ((192, 128), BackwardSchedule(SplitSchedule(p_slots=1), DqSchedule())),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_legal_schedules_agree(name):
    dims, schedule = BACKWARD[name]
    problem = problem_of(f"schedule-{name}", dims, q_heads=4, q_len=700, kv_len=700)
    spec, (operands, (dout, dlse)) = problem.spec(), conformance.random_case(problem, "bfloat16")
    assert rules.reasons_against(spec, schedule, 232_448) == []
    budget = budget_of(problem, operands, (dout, dlse))
    saved = dispatch.get("hopper").forward(spec, jax.tree.map(jnp.asarray, operands))
    dq, dk, dv = jax.jit(launches.backward(spec, schedule))(*operands[:3], *saved, dout, with_rest(dlse))
    used = budget.used(budget.baseline._replace(dq=dq, dk=dk, dv=dv))
    assert max(used.values()) <= 1, used


@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
def test_deterministic_gradients_are_the_same_at_every_place_of_a_batch(dims):
    problem = problem_of("repeat", dims, batch=1, q_len=1100, kv_len=1100, q_heads=4, deterministic=True)
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    repeat = lambda x: np.repeat(x, 6, axis=0)
    wide = operands._replace(**{name: repeat(getattr(operands, name)) for name in "qkv"})
    run = conformance.compiled(dataclasses.replace(problem, name="repeat-wide", batch=6), "hopper")
    for name, x in run(wide, tuple(map(repeat, cotangents)))._asdict().items():
        assert x is None or bool(jnp.all(x == x[:1])), name


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_extra_memory_is_one_float32_dq_and_statistics(dims, length, deterministic):
    problem = problem_of("memory", dims, q_len=length, kv_len=length, deterministic=deterministic)
    spec = problem.spec()
    shapes = [jax.ShapeDtypeStruct(spec.shape(length, 2, d), spec.dtype) for d in (*dims[:1] * 2, dims[1])]
    rows = jax.ShapeDtypeStruct(spec.stats_shape, np.float32)
    operands = lambda q, k, v: Operands(q, k, v, None, (), problem.mask, (), None, None, None)
    run = jax.jit(lambda *arrays: calls.backward(spec, operands(*arrays[:3]), *arrays[3:]))
    out = jax.ShapeDtypeStruct(spec.out_shape, spec.dtype)
    extra = run.lower(*shapes, out, rows, out, rows).compile().memory_analysis().temp_size_in_bytes
    dq, statistics = 4 * 2 * 2 * length * dims[0], 4 * 2 * 2 * length * len(Statistics)
    assert extra <= dq + statistics + 2**16


@pytest.mark.parametrize(("array", "value"), [("k", np.nan), ("v", np.nan), ("k", -np.inf), ("v", np.inf)])
@pytest.mark.parametrize("dims", DIMS[:3], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_bad_key_reaches_only_what_attends_to_it(dims, array, value, deterministic):
    """0 * NaN is NaN, also in the products of the backward: dq of earlier queries must not see a later key."""
    bad = 200
    problem = problem_of("bad", dims, batch=1, q_len=300, kv_len=300, deterministic=deterministic)
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    x = getattr(operands, array).copy()
    x[:, bad, :, 3] = value
    run = conformance.compiled(problem, "hopper")
    clean, found = run(operands, cotangents), run(operands._replace(**{array: x}), cotangents)
    close = lambda a, b: np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.02, atol=1e-3)
    assert close(found.out[:, :bad], clean.out[:, :bad])
    assert close(found.dq[:, :bad], clean.dq[:, :bad])
    if np.isnan(value):
        assert np.isnan(np.asarray(found.dq[:, bad:], np.float32)).all()
        assert np.isnan(np.asarray(found.dk[:, bad], np.float32)).all()
