"""Biases and score functions in the kernels with mma.sync on a GPU, with the cases of the Hopper kernels: out, lse and
all gradients, also with NaN and infinities in what they and masks hide.
"""

import numpy as np
import pytest
from agreement import assert_within
from hopper import test_features_gpu as features
from hopper import test_scores_gpu as scores
from hopper.test_sweep import budget_of, problem_of

from pallas_flash.testing import conformance, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

BIAS = [("keys", (64, 64)), ("keys-gqa-heads-first", (128, 128)), ("keys-softcap", (96, 96)),
        ("keys-dropout", (192, 128)), ("keys-documents", (64, 64)), ("keys-deterministic", (128, 128)),
        ("keys-float16", (64, 64)), ("pairs", (128, 128)), ("pairs-gqa-heads-first", (64, 64)),
        ("pairs-softcap-window", (128, 128)), ("pairs-dropout", (64, 64)), ("pairs-whole-tiles", (128, 128))]
SCORES = [("alibi", 128), ("alibi-offsets", 64), ("alibi-documents", 128), ("alibi-dropout", 64), ("table", 128),
          ("table-float16", 64), ("capped", 64), ("capped-deterministic", 128), ("steep-float16", 128),
          ("everything", 64)]


@pytest.mark.parametrize(("name", "dims"), BIAS, ids=str)
def test_biases_agree_with_the_oracle(name, dims):
    shape = dict(q_len=features.Q_LEN, kv_len=features.KV_LEN)
    problem = problem_of(f"bias-{name}", dims, **(shape | features.BIAS[name]))
    operands, cotangents = conformance.random_case(problem, problem.dtypes[0])
    operands = operands._replace(bias=features.far(problem.bias).astype(operands.bias.dtype))
    budget = budget_of(problem, operands, cotangents)
    for given in (operands, inputs.poisoned(problem.spec(), operands)):
        assert_within(budget, features.run(problem, given, cotangents, implementation="ampere"))


@pytest.mark.parametrize(("name", "d"), SCORES)
def test_score_functions_agree_with_the_reference(name, d):
    scores.assert_agrees_with_the_reference(name, d, "ampere")


@pytest.mark.parametrize("deterministic", [False, True])
def test_keys_that_a_function_hides_reach_nothing(deterministic):
    """The mask keeps their tiles whole."""
    name, (q, k, v, dout) = f"everything{'-deterministic' * deterministic}", scores.arrays_of(64)
    clean = scores.program(name, "ampere", "bfloat16", q, k, v, dout)
    bad = [x.at[:, 5::11].set(np.nan) for x in (k, v)]
    found = scores.program(name, "ampere", "bfloat16", q, *bad, dout)
    scores.agree(found, clean)
    for gradient in found[3:5]:  # dk, dv
        assert not np.asarray(gradient, np.float32)[:, 5::11].any()
