"""What decoding on Hopper does without other kernels beside its own: lengths as they are, and sequences that have lost
keys."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree

from pallas_flash import Causal, Window, cache, device
from pallas_flash.kernels.hopper import defaults, launches
from pallas_flash.kernels.mosaic.interpret import interpreted
from tests.hopper.offline import places
from tests.hopper.test_decode import Case, assert_right, call_of, exact, ours, rows, stored


def losing(case: Case) -> tuple[np.ndarray, cache.Cache, list[bool], tuple[np.ndarray, np.ndarray]]:
    """Queries and a cache in pages whose first sequences have lost keys: one more than there is room for, as many as
    an int32 can say, in a missing page before, in and after those that a window reads; and what is exact.
    """
    q, k, v = rows(case)
    whole = stored(case, k, v)
    lengths, table = np.array(case.lengths), np.array(whole.page_table)
    lengths[0], lengths[1], lengths[6] = case.capacity + 1, 2**31 - 1, -2**31  # the last is as good as 0
    for of, page in ((2, 0), (3, -2), (4, -1)):
        table[of, page] = whole.pages.number + of
    is_lost = [True] * 5 + [False] * (case.batch - 5)
    given = dataclasses.replace(whole, lengths=jnp.asarray(lengths, jnp.int32), page_table=jnp.asarray(table))
    np.testing.assert_array_equal(given.overflowed, is_lost)
    out, lse = exact(case, q, k, v)
    out[:5], lse[:5] = np.nan, np.nan
    return q, given, is_lost, (out, lse)


LOSING = Case((64,) * 5 + (64, 0, 33), 2, (2, 1), (16, 16), 64, 16, rule=Causal() & Window(left=20))


@pytest.mark.interpreted
def test_sequences_that_have_lost_keys_are_nan():
    """Found in the kernel, by the blocks that share a head: no other kernel runs."""
    q, given, _, wanted = losing(LOSING)
    call = call_of(LOSING, q, given)
    schedule = dataclasses.replace(defaults.default_forward(call.spec, device.H100), num_blocks=7, block_kv=16)
    operands = call.operands()
    with interpreted():
        out, stats = jax.jit(launches.forward(call.spec, schedule))(
            *operands[:3], *jax.tree.leaves(operands.mask), operands.page_table)
    assert_right(LOSING, out, stats[:, :, 0], wanted)


@pytest.mark.skipif(places.why_not() is not None, reason=str(places.why_not()))
def test_a_decoding_loop_runs_little_beside_the_kernel(tmp_path):
    """A layer appends in three kernels, keys, values and lengths, and attends in one, whose counters are set in one
    more; all of a step is one CUDA graph. Regression: bounds of lengths, what is inside of the cache, and results of
    lost sequences were four more. Sinks were one more, too, and a bias was refused.
    """
    programs = ["one", "pages", "sinks and a bias"]
    environment = places.environment(tmp_path, next(iter(places.compilers().values())))
    environment = {name: value for name, value in environment.items() if not name.startswith("MOSAIC_GPU_DUMP")}
    environment["XLA_FLAGS"] = "--xla_dump_to=. --xla_dump_hlo_as_text"
    done = subprocess.run([places.interpreter(), "-m", "tests.hopper.offline.decoding_loop", *programs],
                          cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["program"] for report in reports] == programs
    for report in reports:
        kinds, layers = report["kinds"], report["kinds"]["kCustomCall"]
        assert layers == 4
        assert sum(kinds.values()) <= 5 * layers + 1, report  # and the loop's own counter
        assert report["outside"] == 0, report


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.parametrize("capacity", [64, 8192])
def test_sequences_that_have_lost_keys_are_nan_on_a_gpu(capacity):
    """With gradients of 0 for them, and those of `xla` for the others."""
    case = dataclasses.replace(LOSING, capacity=capacity, lengths=(capacity,) * 6 + (0, capacity // 2 + 1))
    q, given, is_lost, wanted = losing(case)
    assert_right(case, *ours(case)(q, given), wanted)

    def gradients(implementation):
        def loss(q, key, given):  # whose lengths are traced: known ones must not be negative
            out = cache.attend(q, dataclasses.replace(given, key=key), mask=case.rule, implementation=implementation)
            return jnp.nansum(out.astype("float32"))
        return jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(q), given.key, given)

    found = gradients("hopper")
    assert not np.asarray(found[0], np.float32)[is_lost].any()
    assert_agree(found, gradients("xla"))
