"""Decoding's reads alone as `bench.decode` launches them from PyTorch: up to the compiler, without a GPU."""

import dataclasses

import pytest

from bench import decode
from bridge.direct import CACHE, H200
from torch_bridge.direct import lower
from torch_bridge.direct.problem import Request


@pytest.mark.parametrize("more", [dict(), dict(page=16), dict(q_len=3)], ids=str)
def test_the_reads_that_are_timed_in_a_graph_are_the_bridges_kernel_without_products(more):
    problem, gpu = decode.Problem(2, 512, (4, 2), 64, **more), H200
    found = decode._lowered_reads(problem, gpu)
    right = None if problem.q_len == 1 else 0  # behind one query there is no key
    asked = dataclasses.replace(CACHE, q_heads=4, q_len=problem.q_len, window=(None, right))
    if problem.page:
        asked = dataclasses.replace(asked, pages=(64, 16), given=(*asked.given, ("page_table", (2, 32), "int32")))
    plain = lower.lower(Request(asked, "decode", gpu, {}, "hopper"))
    q, filled = problem.arrays()
    from_jax, spec = decode._spec(problem, q, filled), lower.spec_of(asked)
    assert dataclasses.replace(from_jax, mask=spec.mask) == spec
    assert (found.inputs, found.results, found.restored) == (plain.inputs, plain.results, plain.restored)
    assert found.buffers == plain.buffers
    (step,), (of_plain,) = found.steps, plain.steps
    assert step.arrays == of_plain.arrays
    multiplies = b"wgmma" in of_plain.kernel.code, b"wgmma" in step.kernel.code
    assert multiplies == (True, False)
