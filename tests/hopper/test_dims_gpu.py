"""Head dimensions that are no multiples of 8, and those above 256, on a Hopper GPU: forward, lse and all gradients of
copies against the formulas in float64, in every form of the kernels that they come to.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_within

from hopper.test_sweep import budget_of, problem_of
from pallas_flash import Causal, Dense, InBounds, SegmentIds, Window, device, dispatch, flash_attention
from pallas_flash.kernels.hopper import defaults
from pallas_flash.kernels.hopper.schedule import BackwardSchedule
from pallas_flash.testing import conformance, inputs

pytestmark = pytest.mark.gpu

LEN = 300
IDS = np.arange(LEN) // 90
CASES = {  # what they are padded to: 8, 24 and 40, 64 (fused), 104, 128 (fused), 256 (split)
    "d1": ((1, 1), dict()),
    "d20-33-gqa": ((20, 33), dict(q_heads=4, layout="BHLD", mask=Window(100, 20))),
    "d60": ((60, 64), dict(softcap=2.0)),
    "d100-lengths": ((100, 100), dict(mask=Causal() & InBounds(kv_len=np.array([LEN, 70])))),
    "d125-documents-dropout": ((125, 125), dict(mask=Causal() & SegmentIds(IDS, IDS), dropout_rate=0.2)),
    "d125-deterministic": ((125, 125), dict(deterministic=True, dtypes=("float16",))),
    "d250": ((250, 254), dict()),
    "d60-dense-bias": ((60, 60), dict(mask=Dense(np.random.default_rng(0).random((2, 1, LEN, LEN)) < 0.5),
                                      bias=(1, 2, LEN, LEN))),
    "d512": ((512, 512), dict(q_heads=4)),
    "d500-20-documents-dropout": ((500, 20), dict(mask=Causal() & SegmentIds(IDS, IDS), dropout_rate=0.2)),
    "d384-softcap": ((384, 384), dict(softcap=2.0, layout="BHLD")),
    "d320-large-rows": ((320, 256), dict(row_lse=200.0)),
    "d320-window-gqa-float16": ((320, 320), dict(q_heads=4, mask=Window(100, 20), dtypes=("float16",))),
    "d512-lengths-bias-ragged": ((512, 512), dict(mask=Causal() & InBounds(kv_len=np.array([LEN, 70])),
                                                  bias=(2, 1, 1, LEN))),
    "d384-128-pairs": ((384, 128), dict(bias=(1, 2, 200, LEN), q_len=200, mask=Causal(100))),
    "d128-512-dense": ((128, 512), dict(mask=Dense(np.random.default_rng(1).random((2, 1, LEN, LEN)) < 0.5))),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_oracle(name):
    """With NaN in what masks hide."""
    dims, options = CASES[name]
    problem = problem_of(name, dims, **(dict(q_len=LEN, kv_len=LEN) | options))
    operands, cotangents = conformance.random_case(problem, problem.dtypes[0])
    assert conformance.supports(problem, problem.dtypes[0], "hopper")
    found = conformance.compiled(problem, "hopper")(inputs.poisoned(problem.spec(), operands), cotangents)
    assert_within(budget_of(problem, operands, cotangents), found._asdict())


@pytest.mark.parametrize("cluster", [1, 2])
def test_wide_heads_with_and_without_a_cluster(cluster):
    """Many key tiles, of which the last is alone in its cluster; the same bits in every run."""
    length = 1080 + cluster  # a program of its own, not one that was traced with the other schedule
    problem = problem_of("cluster", (512, 512), q_len=length, kv_len=length, mask=Window(700, 0))
    operands, cotangents = conformance.random_case(problem, problem.dtypes[0])
    spec = problem.spec()
    schedule = defaults.default_backward(spec, device.current())
    kernels = (dataclasses.replace(kernel, cluster=cluster, num_sms=device.current().num_sms // cluster)
               for kernel in (schedule.kv, schedule.dq, schedule.dv))
    jax.clear_caches()
    with defaults.assume(BackwardSchedule(*kernels)):
        found = conformance.compiled(problem, "hopper")(operands, cotangents)
        again = conformance.compiled(problem, "hopper")(operands, cotangents)
    jax.clear_caches()
    assert_within(budget_of(problem, operands, cotangents), found._asdict())
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(*(np.asarray(getattr(x, name), np.float32) for x in (found, again)), err_msg=name)


def test_an_automatic_choice_takes_them():
    q = jnp.ones((1, 128, 2, 20), "bfloat16")
    spec = problem_of("choice", (20, 20)).spec()
    assert dispatch.decide(spec, device.current()).implementation.name == "hopper"
    assert "mosaic_gpu" in jax.jit(lambda q: flash_attention(q, q, q)).lower(q).compile().as_text()
