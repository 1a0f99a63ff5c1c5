"""Which rows each device holds, against the definition written out piece by piece."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import pallas_flash as pf

pytestmark = pytest.mark.virtual

DOCUMENTS = [0, 16, 16, 24, 104]  # lengths 16, 0, 8, 80: all divide by 2 * 4
CASES = {
    "zigzag": dict(load_balance="zigzag"),
    "documents": dict(load_balance="zigzag_documents", cu_seqlens=DOCUMENTS),
    "none": dict(load_balance=None),
}
every_order = pytest.mark.parametrize("case", CASES)


def written_out(length, n, load_balance, cu_seqlens=None):
    """The original position of every row of the reordered sequence."""
    if load_balance is None:
        return list(range(length))
    starts = [0, length] if cu_seqlens is None else cu_seqlens
    rows = []
    for i in range(n):
        for start, end in itertools.pairwise(starts):
            piece = (end - start) // (2 * n)
            for number in (i, 2 * n - 1 - i):
                rows += range(start + number * piece, start + (number + 1) * piece)
    return rows


@every_order
@pytest.mark.parametrize("n", [1, 2, 4])
def test_rows_are_where_the_definition_says(case, n):
    wanted = written_out(104, n, **CASES[case])
    assert sorted(wanted) == list(range(104))
    np.testing.assert_array_equal(pf.reorder(np.arange(104), n, axis=0, **CASES[case]), wanted)


@every_order
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_inverse_undoes_it_on_any_axis_and_kind_of_array(case, axis):
    shape = [2, 3, 5]
    shape[axis] = 104
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    run = functools.partial(pf.reorder, n=4, axis=axis, **CASES[case])
    there = run(x)
    assert type(there) is np.ndarray and there.dtype == np.float32
    np.testing.assert_array_equal(there, np.take(x, written_out(104, 4, **CASES[case]), axis))
    np.testing.assert_array_equal(run(there, inverse=True), x)
    in_jax = jax.jit(run)(x)
    np.testing.assert_array_equal(in_jax, there)
    np.testing.assert_array_equal(run(jnp.asarray(there), inverse=True), x)


def test_the_gradient_goes_back_to_where_rows_came_from():
    weights = np.arange(16.0, dtype=np.float32)
    gradient = jax.grad(lambda x: jnp.sum(pf.reorder(x, 2, axis=0) * weights))(jnp.ones(16))
    np.testing.assert_array_equal(gradient, pf.reorder(weights, 2, axis=0, inverse=True))


def test_an_empty_array_stays_one():
    assert pf.reorder(np.zeros((2, 0, 3)), 4).shape == (2, 0, 3)
    assert pf.reorder(jnp.zeros((0, 16)), 4).shape == (0, 16)


def make_mesh(n, kind=AxisType.Auto):
    return jax.make_mesh((n,), ("sequence",), devices=jax.devices()[:n], axis_types=(kind,))


@every_order
@pytest.mark.parametrize("n", [1, 4])
def test_positions_are_those_of_the_rows_a_device_holds(case, n):
    local = functools.partial(pf.positions, "sequence", 104 // n, **CASES[case])
    run = jax.jit(jax.shard_map(local, mesh=make_mesh(n), in_specs=(), out_specs=P("sequence")))
    found = run()
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, pf.reorder(np.arange(104), n, axis=0, **CASES[case]))


def test_positions_of_boundaries_that_differ_from_batch_to_batch():
    local = functools.partial(pf.positions, "sequence", 26, load_balance="zigzag_documents")
    traced = jax.jit(jax.shard_map(lambda starts: local(cu_seqlens=starts), mesh=make_mesh(4), in_specs=P(),
                                   out_specs=P("sequence")))
    for starts in (DOCUMENTS, [0, 104, 104, 104, 104]):
        wanted = pf.reorder(np.arange(104), 4, axis=0, load_balance="zigzag_documents", cu_seqlens=starts)
        np.testing.assert_array_equal(traced(np.array(starts)), wanted)
    assert traced._cache_size() == 1


def test_positions_in_their_documents_by_the_formula_of_the_docstring():
    starts, rows = jnp.asarray(DOCUMENTS), pf.reorder(np.arange(104), 4, axis=0, **CASES["documents"])
    in_document = rows - starts[jnp.searchsorted(starts, rows, side="right") - 1]
    wanted = np.concatenate([np.arange(16), np.arange(8), np.arange(80)])
    np.testing.assert_array_equal(in_document, pf.reorder(wanted, 4, axis=0, **CASES["documents"]))


def test_an_axis_sharded_explicitly_keeps_its_place():
    mesh = make_mesh(4, AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.arange(32).reshape(2, 16), P(None, "sequence"))
        found = jax.jit(functools.partial(pf.reorder, n=4))(x)
        assert jax.typeof(found).sharding.spec == P(None, "sequence")
    np.testing.assert_array_equal(found, pf.reorder(np.asarray(x), 4))


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(n=3), r"the length of the sequence must divide by 2 n = 6 for load_balance='zigzag' and n=3, got length 20\. "
     r"Pad it to 24\."),
    (dict(n=3, load_balance=None), r"must divide by n = 3 .* got length 20\. Pad it to 21\."),
    (dict(n=2, load_balance="zigzag_documents", cu_seqlens=[0, 8, 17, 20]),
     r"the length of document 1 must divide by 2 n = 4 .* got length 9\. Pad it to 12\."),
    (dict(n=2, load_balance="zigzag_documents"), r'on the host for load_balance="zigzag_documents", got None'),
    (dict(n=2, load_balance="zigzag_documents", cu_seqlens=[0, 8]), r"rise from 0 to the length of the sequence, 20"),
    (dict(n=2, load_balance="zigzag_documents", cu_seqlens=[4, 20]), r"rise from 0"),
    (dict(n=2, load_balance="zigzag_documents", cu_seqlens=[0, 12, 8, 20]), r"rise from 0"),
    (dict(n=2, load_balance="zigzag_documents", cu_seqlens=[0.0, 20.0]), r"integers \(documents \+ 1,\)"),
    (dict(n=2, cu_seqlens=[0, 20]), r'cu_seqlens goes with load_balance="zigzag_documents", got load_balance=\'zigzag'),
    (dict(n=2, load_balance="striped"), r"got load_balance='striped'"),
    (dict(n=0), "n must be an integer of at least 1, got n=0"),
    (dict(n=2.0), "n must be an integer of at least 1, got n=2.0"),
    (dict(n=True), "n must be an integer of at least 1, got n=True"),
    (dict(n=2, axis=2), r"axis must be one of x, got axis=2"),
    (dict(n=2, inverse=1), "inverse must be True or False"),
])
def test_what_does_not_hold_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        pf.reorder(np.zeros((1, 20)), **arguments)


def test_a_list_is_no_array():
    with pytest.raises(ValueError, match="x must be an array"):
        pf.reorder([[1, 2]], 1)


def test_traced_boundaries_are_refused():
    run = jax.jit(lambda x, starts: pf.reorder(x, 2, load_balance="zigzag_documents", cu_seqlens=starts))
    with pytest.raises(ValueError, match=r"must be on the host .* got a traced array"):
        run(np.zeros((1, 8)), np.array([0, 8]))


def test_positions_outside_of_shard_map_say_what_to_use():
    with pytest.raises(ValueError, match=r"inside shard_map over axis_name, got axis_name='sequence'.*Elsewhere"):
        pf.positions("sequence", 8)


def test_positions_of_a_length_that_does_not_divide():
    local = functools.partial(pf.positions, "sequence", 3)
    with pytest.raises(ValueError, match=r"must divide by 2 n = 8 .* got length 12\. Pad it to 16"):
        jax.shard_map(local, mesh=make_mesh(4), in_specs=(), out_specs=P("sequence"))()
