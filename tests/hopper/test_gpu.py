"""What only a GPU shows about the Hopper kernels: accuracy beside FlashAttention-3, schedules, repeated runs, large
grids and long sequences, the time a call takes to compile, and what `compute-sanitizer` finds.

Shapes are those at which the kernels have several tiles and tails; masks, dtypes and defects of other libraries on
small shapes are in test_conformance. A direction is the forward, or the backward with cotangents of out and lse.
"""

import dataclasses
import functools
import json
import os
import pkgutil
import re
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sanitizer
from agreement import assert_within, with_rest
from jax import lax

from bench import cli, contestants, tune
from pallas_flash import Causal, Full, InBounds, PrefixLM, Window, autodiff, device, flash_attention
from pallas_flash.spec import Results
from pallas_flash.testing import inputs, textbook
from pallas_flash.testing.budget import Budget
from pallas_flash.testing.problems import Problem

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

IMPLEMENTATION = "hopper"
NAMES = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
DIRECTIONS = ("forward", "backward")
HEAD_DIMS = (64, 128, 256)
SCHEDULES_TRIED = 8
REPETITIONS = 1000
COLD_SECONDS = {"forward": 5, "backward": 10}  # the latter compiles the forward and two or three kernels more
LONG = (131_072, 524_288)
MORE_THAN_A_GRID_HAS = 4096  # batch; times 17 heads: 69,632

each_direction = pytest.mark.parametrize("direction", DIRECTIONS)
each_d = pytest.mark.parametrize("d", HEAD_DIMS)


def problem_of(source: str, d: int, **options: Any) -> Problem:
    """One batch element of 4 query and 2 key heads, causal, bfloat16, unless said."""
    fields: dict[str, Any] = dict(batch=1, q_heads=4, kv_heads=2, d=d, d_v=d, mask=Causal(), dtypes=("bfloat16",))
    return Problem("test", source, **fields | options)


# -- running and comparing -------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """A problem with its arrays."""

    problem: Problem
    operands: Any
    cotangents: Any  # of out and lse

    @property
    def arrays(self) -> tuple[Any, ...]:
        return *self.operands[:3], *self.cotangents

    def part(self, batch: int) -> "Case":
        """One element of the batch, as a problem of its own."""
        cut = lambda x: np.asarray(x[batch:][:1])
        operands = self.operands._replace(**{name: cut(getattr(self.operands, name)) for name in "qkv"})
        return Case(dataclasses.replace(self.problem, batch=1), operands, tuple(map(cut, self.cotangents)))


def case_of(problem: Problem, normal: inputs.Normal = inputs.host_normal) -> Case:
    return Case(problem, problem.operands(normal=normal), inputs.cotangents(problem.spec(), normal=normal))


def results(direction: str, attend: Any, q: Any, k: Any, v: Any, *cotangents: Any) -> dict[str, Any]:
    """What a direction computes, by name. `attend` returns out and, if there are two cotangents, lse."""
    if direction == "forward":
        return dict(zip(NAMES[direction], attend(q, k, v)))
    return dict(zip(NAMES[direction], jax.vjp(attend, q, k, v)[1](cotangents)))


def ours(direction: str, case: Case, **keywords: Any) -> Any:
    """A function of `case.arrays` to its results, by name."""
    options = case.problem.keywords(case.operands) | keywords
    attend = lambda q, k, v: flash_attention(q, k, v, implementation=IMPLEMENTATION, **options)
    return functools.partial(results, direction, attend)


def exact(case: Case) -> textbook.Results:
    """Everything in float64, from the formulas."""
    wide = lambda x: np.asarray(x, np.float64)
    operands = case.operands._replace(**{name: wide(getattr(case.operands, name)) for name in "qkv"})
    with jax.enable_x64(True):
        return textbook.attention(case.problem.spec("float64"), operands, *map(wide, case.cotangents))[0]


def budget_of(case: Case) -> Budget:
    return Budget.of(case.problem.spec(), case.operands, case.cotangents, exact(case))


def used(budget: Budget, found: dict[str, Any]) -> dict[str, float]:
    """The share of its error budget that each result takes: at most 1 if it is right."""
    shares = budget.used(budget.baseline._replace(**found))
    return {name: shares[name] for name in found}


def assert_right(case: Case, found: dict[str, Any]) -> None:
    assert_within(budget_of(case), found)


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


# -- shapes ----------------------------------------------------------------------------------------------------------

SHAPES = {
    "whole-tiles-d64": (64, dict(q_len=768, kv_len=768, batch=2)),
    "whole-tiles-d128": (128, dict(q_len=512, kv_len=512, batch=2)),
    "whole-tiles-d256": (256, dict(q_len=512, kv_len=512, batch=2)),
    "ragged-d64-full": (64, dict(q_len=999, kv_len=777, mask=Full())),
    "ragged-d128-mqa": (128, dict(q_len=1000, kv_len=1000, q_heads=8, kv_heads=1)),
    "ragged-d256-heads-first": (256, dict(q_len=641, kv_len=641, layout="BHLD")),
    "more-queries-fp16": (128, dict(q_len=700, kv_len=300, dtypes=("float16",))),
    "more-keys-bottom-right": (64, dict(q_len=300, kv_len=700, mask=Causal(offset=400), layout="BHLD")),
    "one-query": (128, dict(q_len=1, kv_len=900, mask=Causal(offset=899))),
    "one-key": (256, dict(q_len=300, kv_len=1, mask=Full())),
    "window-d128": (128, dict(q_len=900, kv_len=900, mask=Window(left=200, right=30))),
    "prefix-d64-fp16-heads-first": (64, dict(q_len=500, kv_len=500, mask=PrefixLM(150), dtypes=("float16",),
                                             layout="BHLD")),
    "d96": (96, dict(q_len=500, kv_len=500)),
    "d192-v128": (192, dict(d_v=128, q_len=500, kv_len=500)),
    "d192-v128-long": (192, dict(d_v=128, q_len=1500, kv_len=2000, mask=Causal(500))),
    "d40-v136": (40, dict(d_v=136, q_len=300, kv_len=300, layout="BHLD")),
    "d200-v8-softcap": (200, dict(d_v=8, q_len=300, kv_len=300, softcap=3.0)),
    "d248-fp16": (248, dict(q_len=300, kv_len=300, dtypes=("float16",), scale=-0.05)),
    "rows-of-lse-200-d128": (128, dict(q_len=700, kv_len=700, row_lse=200.0)),
    "rows-of-lse-200-d64-long": (64, dict(q_len=1700, kv_len=1700, row_lse=200.0)),
    "rows-of-lse-200-d128-long": (128, dict(q_len=1400, kv_len=1700, row_lse=200.0, mask=Full())),
    "more-keys-long": (128, dict(q_len=200, kv_len=3000, mask=Causal(offset=2800), layout="BHLD")),
    "rows-of-lse-200-d256": (256, dict(q_len=700, kv_len=700, row_lse=200.0, mask=Full())),
}


@each_direction
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(direction, name):
    d, options = SHAPES[name]
    case = case_of(problem_of("tiles and tails of every head size", d, **options))
    assert_right(case, jax.jit(ours(direction, case))(*case.arrays))


PARTIAL = {
    "d64-deterministic": (64, dict(q_len=700, kv_len=700, deterministic=True)),
    "d128-heads-first": (128, dict(q_len=700, kv_len=700, layout="BHLD")),
    "d128-long": (128, dict(q_len=3000, kv_len=3000)),
    "d192-v128": (192, dict(d_v=128, q_len=500, kv_len=500)),
    "d256": (256, dict(q_len=641, kv_len=641)),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_results_are_not_rounded(name):
    d, options = PARTIAL[name]
    case = case_of(problem_of("terms of sums over several calls", d, **options))
    spec, (dout, dlse) = dataclasses.replace(case.problem.spec(), partial=True), case.cotangents
    operands = jax.tree.map(jnp.asarray, case.operands)
    out, stats = autodiff.forward(spec, IMPLEMENTATION, operands)
    gradients = autodiff.backward(spec, IMPLEMENTATION, operands, Results(out.astype(spec.dtype), stats),
                                  Results(jnp.asarray(dout), jnp.asarray(with_rest(dlse))))
    found, budget = {"out": out, "dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}, budget_of(case)
    assert_within(budget, found)
    for name, x in found.items():
        wanted = getattr(budget.oracle, name)
        assert x.dtype == jnp.float32
        assert relative(x, wanted) < relative(x.astype(spec.dtype), wanted), name


# -- accuracy --------------------------------------------------------------------------------------------------------

@functools.lru_cache
def accuracy_case(d: int) -> tuple[Case, textbook.Results]:
    case = case_of(problem_of("what FlashAttention-3 is compared on", d, q_len=2048, kv_len=2048, q_heads=2))
    out, lse = case.cotangents
    case = case._replace(cotangents=(out, np.zeros_like(lse)))  # FlashAttention-3 has no gradient of lse
    return case, exact(case)


@each_direction
@each_d
def test_error_is_that_of_flash_attention_3(direction, d, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(cli.PEERS_FOLDER / "site")])
    fa3 = contestants.find(["fa3"], contestants.PEERS)[0]
    if fa3.missing():
        pytest.skip(fa3.missing())
    case, wanted = accuracy_case(d)
    found = jax.jit(ours(direction, case))(*case.arrays)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        call = fa3.attention(case.problem)
        theirs = jax.jit(functools.partial(results, direction, lambda *qkv: (call(*qkv),)))(*case.arrays[:4])
    errors = {name: (relative(found[name], getattr(wanted, name)), relative(theirs[name], getattr(wanted, name)))
              for name in theirs}
    assert all(our <= 1.02 * their for our, their in errors.values()), errors


@pytest.mark.parametrize("row_lse", (None, 200.0))
@each_d
def test_lse_to_five_digits(d, row_lse):
    case, wanted = accuracy_case(d)
    if row_lse is not None:
        case = case_of(dataclasses.replace(case.problem, q_len=900, kv_len=900, row_lse=row_lse))
        wanted = exact(case)
    lse = np.asarray(jax.jit(ours("forward", case))(*case.arrays)["lse"], np.float64)
    np.testing.assert_allclose(lse, wanted.lse, rtol=1e-5, atol=1e-5)


# -- scores that leave the maximum behind ----------------------------------------------------------------------------

JUMPS = {  # by how much keys score higher; tiles are walked from the last key to the first
    "rise": lambda key: 25.0 * ((2047 - key) // 128),
    "one-key": lambda key: 150.0 * (key == 300),
    "one-key-that-just-fits": lambda key: 50.0 * (key == 300),
    "one-key-and-twice": lambda key: 60.0 * (key == 300) + 87.0 * (key == 200),
    "one-key-and-then-higher": lambda key: 150.0 * (key == 300) + 300.0 * (key == 7),
    "the-last-tile": lambda key: 150.0 * (key < 5),
}


@each_direction
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
@pytest.mark.parametrize("d", (64, 128))
@pytest.mark.parametrize("name", JUMPS)
def test_scores_that_jump(direction, d, mask, name):
    """Where the forward does not look at a tile's maximum, weights grow until float32 is full."""
    case = case_of(problem_of(f"jumps: {name}", d, q_len=2048, kv_len=2048, q_heads=2, kv_heads=1, mask=mask))
    q, k = (np.array(x) for x in case.operands[:2])
    q[..., 0], k[..., 0] = 0, JUMPS[name](np.arange(2048))[:, None]
    q[:, ::3, :, 0] = np.sqrt(d)  # the other queries see nothing of it
    case = case._replace(operands=case.operands._replace(q=q, k=k))
    found = jax.jit(ours(direction, case))(*case.arrays)
    assert_right(case, found)


@pytest.mark.parametrize("d", (64, 128, 192))
def test_a_block_does_only_some_of_its_tiles_again(d):
    """About ten tiles a block, given up in two batch elements of five; a row's bits depend on its own tile only."""
    case = case_of(problem_of("jumps in some batch elements", d, d_v=min(d, 128), batch=2, q_len=2048, kv_len=2048,
                              q_heads=2))
    q, k, v = (np.array(x) for x in case.operands[:3])
    q[1, ..., 0], k[1, ..., 0] = np.sqrt(d), 150.0 * (np.arange(2048) == 300)[:, None]
    case = case._replace(operands=case.operands._replace(q=q, k=k))
    run = jax.jit(ours("forward", case))
    wanted = run(q, k, v)
    assert_right(case, wanted)
    pattern = np.array([0, 1, 0, 0, 1] * 8)
    found = run(*(x[pattern] for x in (q, k, v)))
    for name, x in found.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(wanted[name])[pattern], err_msg=name)


# -- what nothing may look at ----------------------------------------------------------------------------------------

def soil_free_memory(value: float) -> None:
    """Leaves `value` in memory that later arrays, and what lies past their ends, are taken from."""
    jax.block_until_ready(jnp.full((1 << 28,), value, jnp.bfloat16))


@each_direction
@pytest.mark.parametrize(("d", "layout"), [(64, "BHLD"), (128, "BLHD"), (256, "BLHD")])
def test_poison_outside_changes_nothing(direction, d, layout):
    """In idle keys and queries, and past the ends of every array.

    A tile that has met a bad value is added up again without tensor cores: right, but not the same bits.
    """
    case = case_of(problem_of("tails inside and at the end of the arrays", d, q_len=650, kv_len=610, layout=layout,
                              mask=Causal() & InBounds(q_len=570, kv_len=450)))
    run = jax.jit(ours(direction, case))
    for value in (np.nan, np.inf, 3e38):
        operands = inputs.poisoned(case.problem.spec(), case.operands, value)
        soil_free_memory(value)
        assert_right(case, run(*case._replace(operands=operands).arrays))


@each_direction
@each_d
def test_keys_that_only_padding_attends_to_are_not_looked_at(direction, d):
    case = case_of(problem_of("keys after the last query", d, q_len=650, kv_len=700))
    k, v = (np.array(x) for x in case.operands[1:3])
    k[:, 650:], v[:, 650:] = np.nan, np.nan
    case = case._replace(operands=case.operands._replace(k=k, v=v))
    assert_right(case, jax.jit(ours(direction, case))(*case.arrays))


@each_d
def test_a_bad_value_reaches_only_the_queries_that_attend_to_it(d):
    case = case_of(problem_of("0 * NaN is NaN, also in a tensor core", d, q_len=700, kv_len=700,
                              mask=Window(left=150, right=0)))
    run, v, bad = jax.jit(ours("forward", case)), case.operands.v, 333
    clean = np.asarray(run(*case.arrays)["out"], np.float32)
    for value in (np.nan, np.inf):
        v = v.copy()
        v[:, bad] = value
        out = np.asarray(run(*case._replace(operands=case.operands._replace(v=v)).arrays)["out"], np.float32)
        sees = (np.arange(700) >= bad) & (np.arange(700) <= bad + 150)
        assert not np.isfinite(out[:, sees]).any()
        largest = float(np.abs(np.asarray(case.operands.v, np.float32)).max())
        np.testing.assert_allclose(out[:, ~sees], clean[:, ~sees], rtol=0, atol=2 * 2.0**-8 * largest)


# -- schedules -------------------------------------------------------------------------------------------------------

def legal_schedules(kernel: str, problem: Problem, count: int) -> list[Any]:
    """The default with few blocks, so that each has many tiles, and random legal schedules."""
    default, reasons_against, *_ = map(pkgutil.resolve_name, tune.Target("hopper", kernel, problem).schedules)
    start, rng = default(problem.spec(), device.H100), np.random.default_rng(problem.d)
    found = [tune.vary(start, {"num_blocks": 2}) or start]
    for _ in range(100_000):
        schedule = start
        for name, values in {**tune.GRIDS[kernel], "num_blocks": (1, 5, 132)}.items():
            schedule = tune.vary(schedule, {name: values[rng.integers(len(values))]}) or schedule
        if not reasons_against(problem.spec(), schedule, device.H100.smem_bytes):
            found.append(schedule)
        if len(found) == count:
            break
    return found


@pytest.mark.timeout(150)
@each_direction
@each_d
def test_every_schedule_agrees_with_the_oracle(direction, d):
    case = case_of(problem_of("ragged, with masked and full tiles", d, q_len=700, kv_len=650))
    budget, wrong = budget_of(case), {}
    for schedule in legal_schedules(direction, case.problem, SCHEDULES_TRIED):
        with tune.scheduled(tune.Target("hopper", direction, case.problem), schedule):
            shares = used(budget, jax.jit(ours(direction, case))(*case.arrays))
        if max(shares.values()) > 1:
            wrong[str(schedule)] = shares
    assert not wrong


# -- repeated runs ---------------------------------------------------------------------------------------------------

def bits(x: Any) -> Any:
    return lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


@functools.partial(jax.jit, static_argnums=(0, 1))
def runs_that_differ(function: Any, times: int, *arrays: Any) -> dict[str, Any]:
    """How many of `times` runs give other bits than the first, for each result."""
    first = function(*arrays)

    def once(_: Any, counts: Any) -> Any:
        arrays_now, counts = lax.optimization_barrier((arrays, counts))  # so that a run is not moved out of the loop
        again = function(*arrays_now)
        return {name: counts[name] + jnp.any(bits(again[name]) != bits(first[name])).astype(jnp.int32)
                for name in first}
    return lax.fori_loop(0, times, once, {name: jnp.int32(0) for name in first})


@each_direction
@each_d
def test_repeated_runs_are_equal_bit_by_bit(direction, d):
    case = case_of(problem_of("some tiles a block", d, batch=4, q_heads=16, kv_heads=4, q_len=1500, kv_len=1500,
                              deterministic=True), inputs.device_normal)
    counts = jax.device_get(runs_that_differ(ours(direction, case), REPETITIONS, *case.arrays))
    assert not any(counts.values()), counts


# -- large grids and long sequences ----------------------------------------------------------------------------------

MANY = {
    "more-than-65535-heads": (64, dict(batch=MORE_THAN_A_GRID_HAS, q_heads=17, kv_heads=17, q_len=40, kv_len=40)),
    "many-tiles-a-block-d64": (64, dict(batch=64, q_len=777, kv_len=777)),
    "many-tiles-a-block-d128": (128, dict(batch=64, q_len=513, kv_len=513, layout="BHLD")),
    "many-tiles-a-block-d256": (256, dict(batch=64, q_len=513, kv_len=513)),
}


@each_direction
@pytest.mark.parametrize("name", MANY)
def test_large_grids(direction, name):
    """The first and the last element of the batch, which are problems of their own, and no NaN between them."""
    d, options = MANY[name]
    case = case_of(problem_of("pytorch #142228, and a deadlock of ours: grids beyond a block an SM", d, **options),
                   inputs.device_normal)
    found = jax.jit(ours(direction, case))(*case.arrays)
    assert all(bool(jnp.isfinite(x).all()) for x in found.values())
    for batch in (0, case.problem.batch - 1):
        part = case.part(batch)
        shares = used(budget_of(part), {name: x[batch:][:1] for name, x in found.items()})
        assert max(shares.values()) <= 1, (batch, shares)


def exact_rows(case: Case, rows: Any, head: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """out and lse of some queries of one head in float64, (rows, d_v) and (rows,)."""
    q, k, v = (np.asarray(x[0, :, h], np.float64) for x, h in zip(
        (case.operands.q[:, rows], *case.operands[1:3]), (head, *[head // case.problem.spec().group] * 2)))
    keep = case.problem.mask.canonical().keep(np.asarray(rows)[:, None], np.arange(len(k))[None])
    s = np.where(keep, q @ k.T * case.problem.spec().scale, -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    total = p.sum(axis=1)
    return p @ v / total[:, None], s.max(axis=1) + np.log(total)


@pytest.mark.parametrize("mask", [Causal(), Window(left=1023, right=0)], ids=str)
@pytest.mark.parametrize("length", LONG)
def test_long_sequences(length, mask):
    case = case_of(problem_of("one long sequence", 128, q_heads=1, kv_heads=1, q_len=length, kv_len=length, mask=mask),
                   inputs.device_normal)
    found = jax.jit(ours("forward", case))(*case.arrays)
    rows = np.array([0, 1, 127, 128, 1023, 1024, length // 2 - 1, length // 2, length - 129, length - 2, length - 1])
    out, lse = exact_rows(case, rows)
    errors = np.linalg.norm(np.asarray(found["out"][0, rows, 0], np.float64) - out, axis=1)
    assert (errors <= 2 * float(jnp.finfo(jnp.bfloat16).eps) * np.linalg.norm(out, axis=1)).all(), errors
    np.testing.assert_allclose(found["lse"][0, 0, rows], lse, rtol=1e-5, atol=1e-5)


def exact_gradients(case: Case, saved: Any, at: np.ndarray) -> dict[str, np.ndarray]:
    """dq of some queries, and dk and dv of the keys at the same positions, of one head in float64; `saved` is the
    forward's out and lse.
    """
    q, k, v, dout = (np.asarray(x[0, :, 0], np.float64) for x in (*case.operands[:3], case.cotangents[0]))
    lse, dlse = (np.asarray(x[0, 0], np.float64) for x in (saved["lse"], case.cotangents[1]))
    delta = (np.asarray(saved["out"][0, :, 0], np.float64) * dout).sum(axis=1) - dlse
    scale, mask, everywhere = case.problem.spec().scale, case.problem.mask.canonical(), np.arange(len(q))

    def weights(rows: Any, columns: Any) -> tuple[np.ndarray, np.ndarray]:
        keep = mask.keep(rows[:, None], columns[None])
        p = np.where(keep, np.exp(q[rows] @ k[columns].T * scale - lse[rows, None]), 0)
        return p, p * (dout[rows] @ v[columns].T - delta[rows, None])

    (_, ds), (p_t, ds_t) = weights(at, everywhere), weights(everywhere, at)
    return {"dq": scale * ds @ k, "dk": scale * ds_t.T @ q, "dv": p_t.T @ dout}


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_a_long_sequence(deterministic):
    length = LONG[0]
    case = case_of(problem_of("one long sequence", 128, q_heads=1, kv_heads=1, q_len=length, kv_len=length,
                              deterministic=deterministic), inputs.device_normal)
    at = np.array([0, 1, 127, 128, length // 2 - 1, length // 2, length - 129, length - 1])
    found = jax.jit(ours("backward", case))(*case.arrays)
    exact = exact_gradients(case, jax.jit(ours("forward", case))(*case.arrays), at)
    for name, rows in exact.items():
        errors = np.linalg.norm(np.asarray(found[name][0, at, 0], np.float64) - rows, axis=1)
        limits = 4 * float(jnp.finfo(jnp.bfloat16).eps) * np.linalg.norm(rows, axis=1) + 1e-6
        assert (errors <= limits).all(), (name, errors, limits)


# -- in a process of its own: compile time, the persistent cache, the sanitizer --------------------------------------

ONE_CALL = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from pallas_flash import Causal, Dense, SegmentIds, flash_attention

direction, implementation, options, length, d = *sys.argv[1:4], *map(int, sys.argv[4:])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
draw = lambda seed: np.random.default_rng(seed).standard_normal((1, length, 2, d)).astype(jnp.bfloat16)
arrays = jax.block_until_ready([jax.device_put(draw(seed)) for seed in range(4)])
ids = np.arange(length)[None] // 70
options = {"plain": dict(mask=Causal()), "documents": dict(mask=Causal() & SegmentIds(ids, ids)),
           "dropout": dict(mask=Causal(), dropout_rate=0.1, dropout_rng=jax.random.key(0)),
           "dense": dict(mask=Dense(np.random.default_rng(0).random((length, length)) < 0.3)),
           "bias": dict(mask=Causal(), bias=jax.device_put(np.ones((1, 2, length, length), jnp.bfloat16))),
           "sinks": dict(mask=Causal(), sinks=jax.device_put(np.ones(2, np.float32)))}[options]
learned = {name: options.pop(name) for name in ("bias", "sinks") if name in options}  # their gradients, too
attend = lambda q, k, v, learned: flash_attention(q, k, v, **options, **learned, implementation=implementation)

def run(q, k, v, dout):
    return attend(q, k, v, learned) if direction == "forward" else jax.vjp(attend, q, k, v, learned)[1](dout)

start = time.perf_counter()
found = jax.block_until_ready(jax.jit(run).lower(*arrays).compile()(*arrays))
print(json.dumps(dict(seconds=time.perf_counter() - start, hits=len(hits))))
assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(found))
"""


def one_call(direction: str, length: int, d: int, *prefix: str, options: str = "plain",
             implementation: str = IMPLEMENTATION, **environment: str) -> subprocess.CompletedProcess:
    """A causal call in a process of its own, which prints the seconds it took and how often the cache had it."""
    command = [*prefix, sys.executable, "-c", ONE_CALL, direction, implementation, options, str(length), str(d)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.alone
@pytest.mark.timeout(100)
@each_direction
@pytest.mark.parametrize("d", (128, 256))
def test_a_cold_call_takes_five_seconds_and_the_cache_serves_the_next_process(direction, d, tmp_path):
    """Lowered, compiled and run once: the kernel's machine code is made at the latest when it is first loaded."""
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
    done = [one_call(direction, 2048, d, **cache) for _ in range(2)]
    done += [one_call(direction, 2048, d)]  # cold too: something else may have slowed the first
    assert all(process.returncode == 0 for process in done), done[-1].stderr[-4000:]
    cold, warm, again = (json.loads(process.stdout.splitlines()[-1]) for process in done)
    seconds = min(cold["seconds"], again["seconds"])
    print(f"\n{direction} d {d}: {seconds:.1f} s cold, {warm['seconds']:.1f} s from the cache")
    assert cold["hits"] == again["hits"] == 0 and seconds <= COLD_SECONDS[direction], (cold, again)
    assert warm["hits"] > 0, warm


def check(direction: str, tool: str, options: str, implementation: str) -> None:
    """Runs a small call under a tool of `compute-sanitizer`, of which nothing may be found in our kernels.

    initcheck does not see what TMA writes: to it, a result copied to the host was never written, nor were dq's sums,
    which the last kernel reads. So it is asked about what our other kernels read.
    """
    command = sanitizer.command(tool, "attention_" if tool == "racecheck" else None)
    done = one_call(direction, 200, 64, *command, options=options, implementation=implementation,
                    **sanitizer.ENVIRONMENT)
    if tool != "initcheck":
        sanitizer.assert_nothing_found(tool, done)
        return
    text = done.stdout + done.stderr
    assert "ERROR SUMMARY" in text and "\"hits\"" in text, text[-4000:]
    assert not re.search(r"Uninitialized[^\n]*\n[^\n]*attention_(?!backward_finish)", text), text[-4000:]


@pytest.mark.timeout(240)
@each_direction
@pytest.mark.parametrize(("tool", "options"), (
    *(("memcheck", options) for options in ("plain", "documents", "dropout", "dense", "bias", "sinks")),
    *(("racecheck", options) for options in ("plain", "documents", "dense", "bias", "sinks")),
    ("initcheck", "plain"), ("initcheck", "dropout")))  # initcheck takes minutes for what XLA does for documents
def test_compute_sanitizer_finds_nothing(direction, tool, options):
    check(direction, tool, options, IMPLEMENTATION)
