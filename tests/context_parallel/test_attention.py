"""`context_parallel_attention` on virtual devices against one device: the catalogue, transformations, bad input."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_flash as pf
from pallas_flash.testing import conformance, problems
from tests.context_parallel import spread

pytestmark = pytest.mark.virtual

CASES = [
    ("mask-full", 4, None), ("mask-causal", 8, "zigzag"), ("mask-causal-empty-rows", 2, "zigzag"),
    ("mask-window-causal", 4, "zigzag"), ("mask-window-beside", 2, None), ("mask-window-per-batch", 2, None),
    ("mask-lengths", 2, None), ("mask-causal-segments", 2, "zigzag"), ("mask-window-prefix", 2, "zigzag"),
    ("mask-everywhere-masked", 2, "zigzag"), ("shape-mqa", 4, "zigzag"), ("shape-odd-d", 2, "zigzag"),
    ("bias-1x2x150x150", 2, "zigzag"), ("bias-2x1x1x150", 4, None), ("bias-masks", 2, "zigzag"),
    ("mask-causal-lengths", 4, "zigzag"),
    ("dropout", 2, "zigzag"), ("everything", 2, None), ("large-rows", 2, "zigzag"),
]
"""Of the catalogue, one or two for each kind of array, mask and shape; devices and order vary."""


@pytest.mark.parametrize(("name", "n", "load_balance"), CASES)
def test_the_catalogue(x64, name, n, load_balance):
    problem = problems.find(name)
    operands, cotangents = conformance.random_case(problem, "float64")
    found = spread.results(problem, operands, cotangents, n, strategy="ring", load_balance=load_balance)
    used = conformance.budget(problem, "float64", operands, cotangents).used(found)
    assert max(used.values()) <= 1, used


def test_the_cases_are_of_the_catalogue():
    assert not [name for name, _, _ in CASES if spread.why_not(problems.find(name))]


OTHER_STRATEGIES = [
    ("mask-causal", "all_gather", 8), ("mask-window-causal", "all_to_all", 2), ("shape-mqa", "all_to_all", 4),
    ("bias-1x2x150x150", "all_gather", 4), ("dropout", "all_gather", 8), ("softcap", "all_to_all", 2),
    ("large-rows", "all_gather", 2), ("mask-causal-segments", "all_to_all", 2),
]


@pytest.mark.parametrize(("name", "strategy", "n"), OTHER_STRATEGIES)
def test_the_catalogue_by_other_strategies(x64, name, strategy, n):
    assert_exact(name, strategy, n)


def assert_exact(name, strategy, n):
    problem = problems.find(name)
    operands, cotangents = conformance.random_case(problem, "float64")
    found = spread.results(problem, operands, cotangents, n, strategy=strategy)
    used = conformance.budget(problem, "float64", operands, cotangents).used(found)
    assert max(used.values()) <= 1, used


WHOLE = [(problem.name, strategy, n) for problem in problems.CONFORMANCE if not spread.why_not(problem)
         for strategy in ("ring", "all_gather", "all_to_all") for n in (2, 4, 8)]


@pytest.mark.parametrize(("name", "strategy", "n"),
                         WHOLE if "PALLAS_FLASH_WHOLE_CATALOGUE" in os.environ else WHOLE[5::97])
def test_the_whole_catalogue(x64, name, strategy, n):
    """A few of it. All takes half an hour: set PALLAS_FLASH_WHOLE_CATALOGUE where strategies or masks have changed."""
    try:
        assert_exact(name, strategy, n)
    except pf.UnsupportedError as error:
        assert strategy == "all_to_all", error  # heads that do not divide, and others of `test_reasons_against`


@pytest.mark.parametrize("n", [2, 4, 8])
def test_bfloat16_errs_no_more_than_on_one_device(n):
    """Partial results are not rounded. lse is float32, and has one rounding more for each device."""
    problem = problems.find("shape-gqa")
    operands, cotangents = conformance.random_case(problem, "bfloat16")
    budget = conformance.budget(problem, "bfloat16", operands, cotangents)
    one = conformance.compiled(problem, "xla")(operands, cotangents)
    found = spread.results(problem, operands, cotangents, n, strategy="ring")
    assert max(budget.used(found).values()) <= 1

    def rms_error(results, name):
        difference = np.asarray(getattr(results, name), np.float64) - getattr(budget.oracle, name)
        return np.sqrt(np.mean(difference**2))
    for name in ("out", "dq", "dk", "dv"):
        assert rms_error(found, name) <= 1.05 * rms_error(one, name)


# --- small arrays of a whole sequence --------------------------------------------------------------------------------

LENGTH = 32


def qkv(dtype="float32", heads=4, kv_heads=2, batch=2, length=LENGTH):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, length, h, 8)), dtype) for h in (heads, kv_heads, kv_heads)]


def whole(n, **options):
    """A function of q, k, v in their own order, computed by n devices."""
    balance = options.get("load_balance", "zigzag")
    order = functools.partial(pf.reorder, n=n, load_balance=balance)
    if balance == "zigzag_documents":
        order = functools.partial(order, cu_seqlens=np.asarray(options["cu_seqlens"]))
    options = {"axis_name": spread.AXIS, "strategy": "ring", "mesh": spread.mesh_of(n), "spec": P(None, spread.AXIS),
               "mask": pf.Causal(), **options}

    def call(*arrays):
        out = pf.context_parallel_attention(*(order(x) for x in arrays), **options)
        return order(out, inverse=True)
    return call


def gradients(function, arrays):
    @functools.partial(jax.jit, compiler_options=conformance._fast_to_compile())
    def run(arrays):
        out, vjp = jax.vjp(function, *arrays)
        return out, vjp(jnp.cos(out))
    return run(arrays)


def assert_close(found, wanted, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("load_balance", ["zigzag_documents", "zigzag"])
def test_documents(x64, load_balance):
    """Each balanced by itself, or where they happen to lie; boundaries may be traced."""
    starts = np.array([0, 8, 24, LENGTH])
    ids = np.repeat(np.arange(3), np.diff(starts))[None]
    arrays = qkv("float64")
    one = functools.partial(pf.flash_attention, mask=pf.Causal(), segment_ids=jnp.asarray(ids.repeat(2, 0)))
    wanted = gradients(one, arrays)

    def many(*arrays_and_starts):
        *arrays, traced = arrays_and_starts
        order = functools.partial(pf.reorder, n=4, load_balance=load_balance,
                                  cu_seqlens=starts if load_balance == "zigzag_documents" else None)
        out = pf.context_parallel_attention(
            *map(order, arrays), axis_name=spread.AXIS, strategy="ring", mesh=spread.mesh_of(4),
            spec=P(None, spread.AXIS), mask=pf.Causal(), load_balance=load_balance, cu_seqlens=traced)
        return order(out, inverse=True)
    found = gradients(lambda *x: many(*x, jnp.asarray(starts, jnp.int32)), arrays)
    assert_close(found, wanted)


def test_segment_ids_of_balanced_documents(x64):
    """Regression: ids were taken for those of pieces, and early pieces saw the late ones of other documents. Each entry
    of the batch may have documents of its own.
    """
    boundaries = [np.array([0, 8, 24, LENGTH]), np.array([0, 16, LENGTH])]
    ids = np.stack([np.repeat([0, 1, -1], [8, 16, 8]), np.repeat([5, 2], 16)])
    orders = [functools.partial(pf.reorder, n=4, axis=0, load_balance="zigzag_documents", cu_seqlens=starts)
              for starts in boundaries]

    def order(x, inverse=False):
        return jnp.stack([each(jnp.asarray(x[i]), inverse=inverse) for i, each in enumerate(orders)])

    def many(*arrays):
        return order(pf.context_parallel_attention(
            *map(order, arrays), axis_name=spread.AXIS, strategy="ring", mesh=spread.mesh_of(4),
            spec=P(None, spread.AXIS), mask=pf.Causal(), load_balance="zigzag_documents", segment_ids=order(ids)), True)
    arrays = qkv("float64")
    one = functools.partial(pf.flash_attention, mask=pf.Causal(), segment_ids=jnp.asarray(ids))
    assert_close(gradients(many, arrays), gradients(one, arrays))


def test_what_lies_past_the_last_document_is_padding(x64):
    q, k, v = qkv("float64")
    out = jax.jit(whole(2, cu_seqlens=np.array([0, 10, 20])))(q, k, v)
    ids = np.array([0] * 10 + [1] * 10 + [-1] * 12)[None].repeat(2, 0)
    assert_close(out, pf.flash_attention(q, k, v, mask=pf.Causal(), segment_ids=jnp.asarray(ids)))
    assert (out[:, 20:] == 0).all()


def test_sinks(x64):
    q, k, v = qkv("float64")
    sinks = jnp.asarray([0.5, -1.0, 3.0, 0.0])

    def plain(q, k, v, sinks):
        s = jnp.einsum("bqhd,bshd->bhqs", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(8)
        s = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool))[None, None], s, -jnp.inf)
        s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], axis=-1)
        return jnp.einsum("bhqs,bshd->bqhd", jax.nn.softmax(s)[..., :-1], jnp.repeat(v, 2, axis=2))
    wanted = gradients(plain, (q, k, v, sinks))
    found = gradients(lambda q, k, v, sinks: whole(2, sinks=sinks)(q, k, v), (q, k, v, sinks))
    assert_close(found, wanted)


def test_batch_and_heads_are_cut_too(x64):
    """With dropout: the bits are those of one device, on automatic and on explicit axes."""
    arrays, rng = qkv("float64"), jax.random.key(3)
    options = dict(mask=pf.Causal(), dropout_rate=0.3, dropout_rng=rng)
    wanted = gradients(functools.partial(pf.flash_attention, **options), arrays)
    order = functools.partial(pf.reorder, n=2)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(kind,) * 3)
        place = P("data", "sequence", "tensor")
        there = [jax.device_put(order(x), NamedSharding(mesh, place)) for x in arrays]
        given = {} if kind == AxisType.Explicit else dict(mesh=mesh, spec=place)
        call = functools.partial(pf.context_parallel_attention, axis_name="sequence", strategy="ring", **options,
                                 **given)
        with jax.set_mesh(mesh):
            found = gradients(call, there)
        assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, place), 4)
        assert_close([order(np.asarray(x), inverse=True) for x in jax.tree.leaves(found)], jax.tree.leaves(wanted))


def test_inside_shard_map_dropout_needs_a_key_for_each_shard():
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)

    def local(*arrays):
        return pf.context_parallel_attention(*arrays, axis_name="sequence", strategy="ring", dropout_rate=0.5,
                                             dropout_rng=jax.random.key(0))
    run = jax.shard_map(local, mesh=mesh, in_specs=P("data", "sequence"), out_specs=P("data", "sequence"))
    with pytest.raises(ValueError, match=r"dropout_rng must vary.*it does not vary over \['data'\]"):
        jax.eval_shape(run, *qkv())


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_repeated_runs_are_bit_equal(strategy):
    run = functools.partial(gradients, jax.jit(whole(4, strategy=strategy, deterministic=True)))
    first, second = run(qkv()), run(qkv())
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_nan_of_other_documents_and_later_keys_does_not_leak():
    starts = np.array([0, 8, LENGTH])
    q, k, v = qkv()
    poisoned = [x.at[:, 20:].set(jnp.nan) for x in (k, v)]
    for options in (dict(), dict(cu_seqlens=starts, load_balance="zigzag_documents")):
        call = jax.jit(whole(2, **options))
        clean, found = call(q, k, v), call(q, *poisoned)
        assert jnp.array_equal(found[:, :20], clean[:, :20]) and jnp.isnan(found[:, 20:]).any()


@pytest.mark.parametrize("load_balance", [None, "zigzag"])
def test_nan_of_keys_that_no_step_needs_does_not_leak(load_balance):
    """Regression: a device without a pair in a step computes along, and the rest of its statistics was kept."""
    q, k, v = qkv()
    k, v = (x.at[:, 20:].set(jnp.nan) for x in (k, v))
    out = jax.jit(whole(4, load_balance=load_balance))(q, k, v)
    assert jnp.isfinite(out[:, :20]).all() and jnp.isnan(out[:, 20:]).all()


def test_a_query_that_is_not_cut_is_refused():
    """Regression: each device took the whole sequence for its part of a longer one."""
    local = functools.partial(pf.context_parallel_attention, axis_name=spread.AXIS, mask=pf.Causal())
    run = jax.shard_map(local, mesh=spread.mesh_of(2), in_specs=P(), out_specs=P(None, spread.AXIS))
    with pytest.raises(ValueError, match=r"query must be cut over the mesh axis 'sequence', got it varies over \[\]"):
        jax.eval_shape(run, *qkv())


@pytest.mark.parametrize("ids", [[0, 1, 2], [5, 2**30, 3]])
def test_ids_of_balanced_documents_may_be_any(x64, ids):
    """Regression: ids from 2^30 on became padding."""
    starts = np.array([0, 8, 24, LENGTH])
    row = jnp.asarray(np.repeat(ids, np.diff(starts))[None].repeat(2, 0), jnp.int32)
    order = functools.partial(pf.reorder, n=2, load_balance="zigzag_documents", cu_seqlens=starts)
    options = dict(mesh=spread.mesh_of(2), spec=P(None, spread.AXIS), load_balance="zigzag_documents")
    out = pf.context_parallel_attention(*map(order, qkv("float64")), axis_name=spread.AXIS, mask=pf.Causal(),
                                        segment_ids=order(row), **options)
    assert_close(order(out, inverse=True), pf.flash_attention(*qkv("float64"), mask=pf.Causal(), segment_ids=row))


def test_user_masks_may_ask_jax(x64):
    @dataclasses.dataclass(frozen=True)
    class Blocks(pf.Mask):
        def keep(self, q_pos, kv_pos):
            return q_pos // 8 >= kv_pos // 8

        def kv_bounds(self, q_lo, q_hi):
            return pf.masks.Bounds(0, 0, jnp.asarray(q_lo) // 8 * 8 + 8, (jnp.asarray(q_hi) + 7) // 8 * 8)

        def moved(self, q_lo, kv_lo):
            return self if q_lo == kv_lo else pf.Full() if q_lo > kv_lo else pf.Window(left=-40, right=50)
    arrays = qkv("float64")
    assert_close(jax.jit(whole(2, mask=Blocks()))(*arrays), pf.flash_attention(*arrays, mask=Blocks()))


@dataclasses.dataclass(frozen=True)
class HereOnly(pf.Mask):
    """Of a piece of the sequence, whose place is not compared."""

    place: int = dataclasses.field(compare=False)

    def keep(self, q_pos, kv_pos):
        return q_pos + self.place >= kv_pos


def test_pieces_whose_masks_are_equal_but_not_the_same():
    """Regression: pairs of chunks with other masks shared a call, and were computed with the first one's."""
    @dataclasses.dataclass(frozen=True)
    class Everywhere(pf.Mask):
        def keep(self, q_pos, kv_pos):
            return q_pos >= kv_pos

        def moved(self, q_lo, kv_lo):
            return HereOnly(q_lo - kv_lo)
    with pytest.raises(ValueError, match=r"all fields of a class of masks must take part in comparison.* for place"):
        whole(2, mask=Everywhere())(*qkv())


def test_under_vmap_scan_and_remat(x64):
    arrays = qkv("float64", batch=1)
    wanted = gradients(functools.partial(pf.flash_attention, mask=pf.Causal()), arrays)
    call = whole(2)

    def layers(*arrays):
        kept = jax.checkpoint_policies.save_only_these_names(*pf.RESIDUAL_NAMES)
        step = jax.checkpoint(lambda q, _: (call(q, *arrays[1:]), None), policy=kept)
        return jax.lax.scan(step, arrays[0], length=1)[0]
    assert_close(gradients(layers, arrays), wanted)
    stacked = [jnp.stack([x, 2 * x]) for x in arrays]
    assert_close(jax.jit(jax.vmap(call))(*stacked)[0], wanted[0])


def test_remat_by_names_does_not_run_the_ring_again():
    call, arrays = whole(2), qkv()

    def hops(policy):
        loss = jax.checkpoint(lambda *x: jnp.sum(call(*x)), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss))(*arrays)).count("ppermute")
    by_names = hops(jax.checkpoint_policies.save_only_these_names(*pf.RESIDUAL_NAMES))
    assert by_names < hops(jax.checkpoint_policies.nothing_saveable)


def test_a_whole_ring_on_one_device(x64):
    """`vmap` with an axis name: how a ring is tried out."""
    q, k, v = qkv("float64")
    shards = [jnp.stack(jnp.split(pf.reorder(x, 2), 2, axis=1)) for x in (q, k, v)]
    local = functools.partial(pf.context_parallel_attention, axis_name="i", strategy="ring", mask=pf.Causal())
    out = jnp.concatenate(list(jax.vmap(local, axis_name="i")(*shards)), axis=1)
    assert_close(pf.reorder(out, 2, inverse=True), pf.flash_attention(q, k, v, mask=pf.Causal()))


def test_export():
    call = jax.jit(whole(2))
    arrays = [jax.device_put(x, NamedSharding(spread.mesh_of(2), P(None, spread.AXIS))) for x in qkv()]
    exported = jax.export.deserialize(jax.export.export(call)(*arrays).serialize())
    assert jnp.array_equal(jax.jit(exported.call)(*arrays), call(*arrays))


def test_a_query_may_be_donated():
    mesh, spec = spread.mesh_of(2), P(None, spread.AXIS)
    call = functools.partial(pf.context_parallel_attention, axis_name=spread.AXIS, mask=pf.Causal(), mesh=mesh,
                             spec=spec)
    arrays = [jax.device_put(x, NamedSharding(mesh, spec)) for x in qkv()]
    expected = np.asarray(call(*arrays))
    out = jax.jit(call, donate_argnums=0)(*arrays)
    assert arrays[0].is_deleted() and not arrays[1].is_deleted()
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_other_values_compile_nothing():
    """Lengths and boundaries of documents are data."""
    traces = []

    @jax.jit
    def run(q, k, v, starts, lengths):
        traces.append(None)
        return whole(2, cu_seqlens=starts, mask=pf.Causal() & pf.InBounds(kv_len=lengths))(q, k, v)
    for starts, lengths in (([0, 8, 32], [32, 20]), ([0, 14, 32], [5, 32])):
        run(*qkv(), jnp.array(starts, jnp.int32), jnp.array(lengths, jnp.int32))
    assert len(traces) == 1


@pytest.mark.parametrize("mode", ["jvp", "second"])
def test_derivatives_that_do_not_exist(mode):
    call, arrays = whole(2), qkv()
    run = (lambda: jax.jvp(call, arrays, arrays)) if mode == "jvp" else (
        lambda: jax.grad(lambda q: jnp.sum(jax.grad(lambda q: jnp.sum(call(q, *arrays[1:])))(q)))(arrays[0]))
    with pytest.raises(pf.UnsupportedError, match="context_parallel_attention has a reverse-mode derivative only"):
        run()


@dataclasses.dataclass(frozen=True)
class Mine(pf.Mask):
    """A mask of a user's that does not say what a part of it is."""

    def keep(self, q_pos, kv_pos):
        return q_pos % 2 == kv_pos % 2


BAD = {
    "2 n = 4 for load_balance='zigzag', got length 6 on n=2 devices. Pad it to 8": dict(length=6),
    "query and key must have the same length": dict(key_length=16),
    "must be inside shard_map over axis_name, or know how whole arrays are cut": dict(mesh=None),
    "mesh must be a Mesh or an AbstractMesh of JAX": dict(mesh=lambda: "sequence"),
    "the length must be cut over 'sequence' alone": dict(spec=P("sequence")),
    "must be divisible by the 2 devices along sequence, got query.shape=(2, 7, 4, 8). Pad it to 8": dict(length=7),
    "documents must be given with load_balance=": dict(load_balance="zigzag_documents"),
    "rise from 0 to at most the length of the sequence, 32, got cu_seqlens=[16, 12, 4]. Pass boundaries, not lengths":
        dict(cu_seqlens=np.array([16, 12, 4])),
    "at most the length of the sequence, 32, got cu_seqlens=[0, 40]": dict(cu_seqlens=jnp.array([0, 40])),
    "cu_seqlens must be integers (documents + 1,)": dict(cu_seqlens=np.array([0.0, 32.0])),
    "the length of document 0 must divide by 2 n = 4": dict(
        cu_seqlens=np.array([0, 6, 32]), load_balance="zigzag_documents"),
    "arrays must lie on the mesh where its axes are explicit": dict(
        mesh=lambda: jax.make_mesh((8,), ("sequence",))),  # made when the test runs: one device collects it, too
    "segment_ids and cu_seqlens say the same": dict(
        segment_ids=np.zeros((2, LENGTH), int), cu_seqlens=np.array([0, 32])),
    "balances mask=Causal(), there is mask=Window": dict(
        load_balance="zigzag_documents", cu_seqlens=np.array([0, 32]), mask=pf.Window(3, 0)),
    "a mask of whole arrays with Dense: it holds an array over positions": dict(
        mask=pf.Dense(np.ones((LENGTH, LENGTH), bool))),
    "bias must have shape (2, 4, 16, 32)": dict(bias=jnp.zeros((1, 1, LENGTH, LENGTH + 1))),
    "the documents [0, 1, 0] of the first device. Number them": dict(
        load_balance="zigzag_documents", segment_ids=np.tile(np.repeat([0, 1, 0], [4, 4, 8]), 2)[None]),
    "and rows of each to every device, with": dict(
        load_balance="zigzag_documents", segment_ids=np.repeat([0, 1], [16, 16])[None]),
    "segment_ids must be an array, or a tuple (q_ids, kv_ids)": dict(segment_ids=(np.zeros((1, LENGTH), int),) * 3),
    "SegmentIds.q_ids must fit 32-bit integers": dict(segment_ids=np.full((1, LENGTH), 2**33)),
    "bias can be float64 only in JAX's 64-bit mode": dict(bias=np.zeros((1, 1, 1, LENGTH))),
    "spec must name axes of the mesh": dict(spec=P("data", "sequence")),
    "a mask of whole arrays with SegmentIds": dict(mask=pf.SegmentIds(*[np.zeros((1, LENGTH), int)] * 2)),
    "sinks must have shape (q_heads,) = (4,)": dict(sinks=jnp.zeros(3)),
    "load_balance must be": dict(load_balance="striped"),
    "strategy must be None or one of": dict(strategy="tree"),
    "dropout_rate must be a Python number in [0, 1], got dropout_rate=array": dict(dropout_rate=np.ones(3)),
    "scale must be a Python number": dict(scale=np.ones(3)),
    "Mine for a part of a sequence": dict(mask=Mine()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_says_what_to_do(message):
    given = dict(BAD[message])
    q, k, v = qkv(length=given.pop("length", LENGTH))
    key_length = given.pop("key_length", q.shape[1])
    options = {"axis_name": "sequence", "strategy": "ring", "mesh": lambda: spread.mesh_of(2),
               "spec": P(None, "sequence"), **given}
    options["mesh"] = options["mesh"] and options["mesh"]()
    with pytest.raises(ValueError) as caught:
        pf.context_parallel_attention(q, k[:, :key_length], v[:, :key_length], **options)
    assert message in str(caught.value)
