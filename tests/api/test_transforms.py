"""JAX's transforms: each gives what the same function gives without it, and sharded inputs need no communication."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, normal
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_flash import (
    RESIDUAL_NAMES,
    Causal,
    Dense,
    InBounds,
    PrefixLM,
    SegmentIds,
    UnsupportedError,
    Window,
    autodiff,
    cache,
    flash_attention,
)

pytestmark = pytest.mark.usefixtures("small_tiles", "full_precision")

B, L, H, K, D = 4, 15, 4, 2, 4
Q, KEY, V = (jnp.asarray(normal(i, B, L, n, D)) for i, n in enumerate((H, K, K)))
DOUT = jnp.asarray(normal(3, B, L, H, D))


def attention(q, k, v, **keywords):
    return flash_attention(q, k, v, **dict(mask=Causal()) | keywords)


def backward(call, *arrays, dout=DOUT):
    """Gradients of a call with respect to all of its arrays."""
    return jax.vjp(call, *arrays)[1](dout)


reference = functools.partial(attention, implementation="reference")


# One call, transformed ------------------------------------------------------------------------------------------------

def results(q, k, v, dout, **keywords):
    """out and gradients."""
    out, vjp = jax.vjp(functools.partial(attention, **keywords), q, k, v)
    return out, vjp(dout)


def test_jit():
    wanted = results(Q, KEY, V, DOUT, implementation="reference")
    assert_agree(results(Q, KEY, V, DOUT), wanted)
    assert_agree(jax.jit(results)(Q, KEY, V, DOUT), wanted)


def test_calls_outside_of_jit_compile_once():
    """Regression: every such call compiled its loops again."""
    backward(attention, Q, KEY, V)
    before = autodiff.forward._cache_size(), autodiff.backward._cache_size()
    for _ in range(2):
        backward(lambda *qkv: attention(*qkv), Q, KEY, V)
    assert (autodiff.forward._cache_size(), autodiff.backward._cache_size()) == before


def test_grad_of_every_argument_alone():
    loss = lambda *qkv: (attention(*qkv) * DOUT).sum()
    grads = backward(attention, Q, KEY, V)
    assert_agree(tuple(jax.grad(loss, i)(Q, KEY, V) for i in range(3)), grads)
    value, (dq,) = jax.value_and_grad(loss, (0,))(Q, KEY, V)
    assert_agree((value, dq), ((attention(Q, KEY, V) * DOUT).sum(), grads[0]))


def test_linearize_and_transpose():
    out, linear = jax.linearize(attention, Q, KEY, V)
    assert_agree(out, attention(Q, KEY, V))
    assert_agree(jax.linear_transpose(linear, Q, KEY, V)(DOUT), backward(attention, Q, KEY, V))


def test_donation():
    wanted, donated = attention(Q, KEY, V), jnp.array(Q)
    assert_agree(jax.jit(attention, donate_argnums=0)(donated, KEY, V), wanted)
    assert donated.is_deleted()


def test_export_with_its_gradient():
    """To bytes and back, with a batch of any size."""
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (Q, KEY, V)]
    saved = jax.export.export(jax.jit(attention), platforms=("cpu", "cuda"))(*shapes).serialize(vjp_order=1)
    call = jax.export.deserialize(saved).call
    assert_agree(call(Q, KEY, V), attention(Q, KEY, V))
    assert_agree(backward(call, Q, KEY, V), backward(attention, Q, KEY, V))


def test_export_of_a_cache_of_any_batch_size():
    """Regression: an empty cache wanted a batch that is a number."""
    def call(q, k, v):
        filled = cache.append(cache.empty(q.shape[0], L + 2, KEY.shape[2], KEY.shape[3], dtype=k.dtype), k, v)
        return cache.attend(q, filled)

    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (Q, KEY, KEY)]
    exported = jax.export.export(jax.jit(call))(*shapes).call
    assert_agree(exported(Q, KEY, KEY), attention(Q, KEY, KEY, mask=Causal()))


SORTED_IDS = np.sort(np.random.default_rng(4).integers(0, 3, (B, L)).astype(np.int32))
ARRAYED = {
    "lengths": (lambda x: InBounds(kv_len=x), np.array([3, 9, 15, 0], np.int32)),
    "both lengths": (lambda x: InBounds(x, x), np.array([3, 9, 15, 0], np.int32)),
    "offsets": (lambda x: Causal(x), np.array([-3, 0, 2, 5], np.int32)),
    "windows": (lambda x: Window(x, x), np.array([1, 0, 2, 5], np.int32)),
    "prefixes": (lambda x: PrefixLM(x), np.array([3, 0, 2, 15], np.int32)),
    "segments": (lambda x: SegmentIds(x, x), SORTED_IDS),
    "segments and lengths": (lambda x: SegmentIds(x, x) & InBounds(kv_len=x[:, -1] + 9), SORTED_IDS),
    "dense": (lambda x: Dense(x), np.random.default_rng(5).random((B, 1, L, L)) < 0.5),
    "one length for all queries": (lambda x: InBounds(np.array([12], np.int32), x), np.array([3, 9, 15, 0], np.int32)),
}


@pytest.mark.parametrize("name", ARRAYED)
def test_export_of_masks_that_hold_arrays(name):
    """Regression: a TypeError about _DimExpr, from numpy's broadcast_shapes."""
    make, data = ARRAYED[name]
    call = jax.jit(lambda q, k, v, x: attention(q, k, v, mask=make(x)))
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (Q, KEY, V, data)]
    exported = jax.export.deserialize(jax.export.export(call)(*shapes).serialize(vjp_order=1)).call
    arrays = (Q, KEY, V, jnp.asarray(data))
    wanted = attention(Q, KEY, V, mask=make(arrays[3]), implementation="reference")
    assert_agree(exported(*arrays), wanted)
    assert_agree(exported(*(x[1:3] for x in arrays)), wanted[1:3])
    ours = backward(lambda q, k, v: exported(q, k, v, arrays[3]), Q, KEY, V)
    assert_agree(ours, backward(functools.partial(reference, mask=make(arrays[3])), Q, KEY, V))


@pytest.mark.parametrize("dtype", [np.uint32, np.int64, np.uint64, np.int16])
@pytest.mark.parametrize("wrap", ["jit", "scan", "grad"])
def test_segment_ids_of_any_integer_type_closed_over(wrap, dtype):
    """Regression: ConcretizationTypeError, from the check of values that int32 cannot hold."""
    with jax.enable_x64(dtype in (np.int64, np.uint64)):
        q, k, v = (jnp.asarray(x) for x in (Q, KEY, V))
        ids, wanted = jnp.asarray(SORTED_IDS.astype(dtype)), attention(Q, KEY, V, segment_ids=SORTED_IDS)
        call = lambda q: attention(q, k, v, segment_ids=ids)
        wrapped = {"jit": jax.jit(call), "grad": lambda q: jax.vjp(jax.jit(call), q)[0],
                   "scan": lambda q: jax.lax.scan(lambda _, q: (None, call(q)), None, q[None])[1][0]}[wrap]
        assert_agree(wrapped(q), wanted)
        if dtype is np.uint32:
            ids = ids.at[0, 0].set(2**31)
            with pytest.raises(ValueError, match=r"SegmentIds.q_ids must fit 32-bit integers"):
                jax.jit(lambda q: attention(q, k, v, segment_ids=ids))(q)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_checkify_finds_no_nan_where_a_row_has_no_keys(implementation):
    """Regression: "nan generated by primitive: sub", of a difference of infinities that no result had in it."""
    call = functools.partial(attention, kv_lengths=np.array([0, 3, 15, 9]), implementation=implementation)
    error, (out, _) = checkify.checkify(
        jax.jit(lambda *x: (call(*x), backward(call, *x))), errors=checkify.float_checks)(Q, KEY, V)
    error.throw()
    assert_agree(out, call(Q, KEY, V))


def test_lists_of_traced_numbers():
    """Regression: TracerArrayConversionError of NumPy's conversion."""
    found = jax.jit(lambda n: attention(Q, KEY, V, kv_lengths=[n, 3, n + 2, 9]))(4)
    assert_agree(found, attention(Q, KEY, V, kv_lengths=[4, 3, 6, 9]))
    found = jax.jit(lambda n: attention(Q[0], KEY[0], V[0], cu_seqlens_q=[0, n, 15]))(4)
    assert_agree(found, attention(Q[0], KEY[0], V[0], cu_seqlens_q=[0, 4, 15]))
    with pytest.raises(ValueError, match="segment_ids must be lists of equal lengths"):
        jax.jit(lambda n: attention(Q, KEY, V, segment_ids=[[n], [n, n]]))(4)


@pytest.mark.parametrize("name", ["q_lengths", "kv_lengths"])
def test_no_lengths_of_no_batch_entries(name):
    """Regression: an empty list was refused, as one of floats."""
    assert attention(Q[:0], KEY[:0], V[:0], **{name: []}).shape == (0, L, H, D)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_debug_infs_where_a_row_has_no_keys(implementation):
    """Regression: lse is -inf there, and a program's result, though nobody asked for it."""
    call = functools.partial(attention, kv_lengths=np.array([0, 3, 15, 9]), implementation=implementation)
    wanted = call(Q, KEY, V), backward(call, Q, KEY, V)
    with jax.debug_infs(True):
        assert_agree(call(Q, KEY, V), wanted[0])
        assert_agree(backward(call, Q, KEY, V), wanted[1])
        assert_agree(jax.jit(lambda *x: backward(call, *x))(Q, KEY, V), wanted[1])
        assert_agree(call(Q, KEY[:, :0], V[:, :0], kv_lengths=None), jnp.zeros_like(Q))
        with pytest.raises(FloatingPointError):  # asked for, it is the row's value
            call(Q, KEY, V, return_lse=True)


def test_dtypes_of_gradients():
    arrays = (Q.astype(jnp.bfloat16), KEY.astype(jnp.bfloat16), V.astype(jnp.bfloat16), jnp.zeros((L, L)))
    shapes = jax.eval_shape(lambda *x: backward(lambda q, k, v, bias: attention(q, k, v, bias=bias), *x,
                                                dout=DOUT.astype(jnp.bfloat16)), *arrays)
    assert [(x.shape, x.dtype) for x in shapes] == [(x.shape, x.dtype) for x in arrays]


# vmap -----------------------------------------------------------------------------------------------------------------

N = 3
QS, KEYS, VS, DOUTS = (jnp.asarray(normal(10 + i, N, *x.shape)) for i, x in enumerate((Q, KEY, V, DOUT)))


def stacked(call, *in_axes):
    """A call for each element of mapped arguments, one after the other."""
    def run(*arrays):
        results = [call(*(x if axis is None else x[i] for x, axis in zip(arrays, in_axes))) for i in range(N)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    return run


def compare_vmap(call, wanted, in_axes, arrays):
    assert_agree(jax.vmap(call, in_axes)(*arrays), stacked(wanted, *in_axes)(*arrays))


def test_vmap():
    compare_vmap(attention, attention, (0, 0, 0), (QS, KEYS, VS))


def test_vmap_with_shared_keys_and_values():
    compare_vmap(attention, attention, (0, None, None), (QS, KEY, V))


def test_vmap_of_vmap():
    """Keys are mapped by the outer one alone, values by the inner one alone."""
    found = jax.vmap(jax.vmap(attention, (0, None, 0)), (None, 0, None))(QS, KEYS, VS)
    wanted = stacked(stacked(attention, 0, None, 0), None, 0, None)(QS, KEYS, VS)
    assert_agree(found, wanted)


def test_vmap_over_heads():
    """Grouped queries written as a vmap: each key head with its query heads."""
    split = lambda x: jnp.moveaxis(x.reshape(B, L, K, -1, D), 2, 0)
    found = jax.vmap(attention)(*map(split, (Q, KEY, V)))
    assert_agree(jnp.moveaxis(found, 0, 2).reshape(Q.shape), attention(Q, KEY, V))


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None)])
def test_vmap_of_grad(in_axes):
    """Of shared keys too: a gradient for each. (jax #38495: vmap(grad) crashed.)"""
    arrays = (QS, *((KEYS, VS) if in_axes[1] == 0 else (KEY, V)), DOUTS)
    gradients = lambda call: lambda *x: backward(call, *x[:3], dout=x[3])
    compare_vmap(gradients(attention), gradients(attention), (*in_axes, 0), arrays)


def test_grad_of_vmap():
    """With shared keys: their gradients are summed."""
    found = backward(jax.vmap(attention, (0, None, None)), QS, KEY, V, dout=DOUTS)
    each = [backward(attention, QS[i], KEY, V, dout=DOUTS[i]) for i in range(N)]
    assert_agree(found, (jnp.stack([dq for dq, _, _ in each]), *(sum(x[i] for x in each) for i in (1, 2))))


def test_vmap_over_masks_bias_and_keys_of_dropout():
    """Everything that is data may differ from call to call."""
    def call(implementation):
        def run(q, bias, offset, lengths, ids, rng):
            return flash_attention(q, KEY, V, bias=bias, mask=Window(9, 0, offset), kv_lengths=lengths, segment_ids=ids,
                                   dropout_rate=0.3, dropout_rng=rng, implementation=implementation)
        return run
    arrays = (QS, jnp.asarray(normal(6, N, L, L)), jnp.arange(N), jnp.asarray([[9, 0, 15, 3], [15] * B, [1, 2, 3, 4]]),
              jnp.sort(jax.random.randint(jax.random.key(0), (N, B, L), 0, 3)), jax.random.split(jax.random.key(1), N))
    compare_vmap(call("xla"), call("reference"), (0,) * 6, arrays)


def test_jacobian():
    """jacrev is a vmap of the backward."""
    small = lambda call: lambda q: call(q, KEY[:1], V[:1])[0, -1, :, 0]
    assert_agree(jax.jacrev(small(attention))(Q[:1]), jax.jit(jax.jacrev(small(reference)))(Q[:1]))


# Loops and rematerialisation ------------------------------------------------------------------------------------------

SCALES = jnp.linspace(0.5, 1.5, 3)


def layer(x, scale):
    """Self-attention with a residual connection; its keys and values are the first heads."""
    return x + scale * attention(x, x[:, :, :K], x[:, :, :K])


def test_scan_over_layers():
    def scanned(x):
        return jax.lax.scan(lambda x, scale: (layer(x, scale), None), x, SCALES)[0]

    def unrolled(x):
        return functools.reduce(layer, SCALES, x)
    assert_agree(backward(scanned, Q), backward(unrolled, Q))


def compiled_remat(checkpoint):
    """out and gradient of a layer that is a checkpoint in some way, and the loops of the program."""
    @jax.jit
    def run(x):
        out, vjp = jax.vjp(lambda x: checkpoint(layer)(x, 0.5), x)
        return out, vjp(DOUT)
    compiled = run.lower(Q).compile()
    return compiled(Q), len(re.findall(r" while\(", compiled.as_text()))


def test_remat_that_keeps_the_residuals_runs_the_forward_once():
    policy = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)
    wanted, loops = compiled_remat(lambda layer: layer)
    keeping, loops_keeping = compiled_remat(functools.partial(jax.checkpoint, policy=policy))
    forgetting, loops_forgetting = compiled_remat(jax.checkpoint)
    assert_agree(keeping, wanted)
    assert_agree(forgetting, wanted)
    assert loops_keeping == loops < loops_forgetting


# Derivatives that only the reference has ------------------------------------------------------------------------------

def loss(call):
    return lambda q: (call(q, KEY[:1], V[:1]) ** 2).sum()


DERIVATIVES = {
    "linearize": lambda f, q: jax.linearize(f, q)[1](q),
    "linearize under jit": lambda f, q: jax.jit(lambda q: jax.linearize(f, q)[1](q))(q),
    "linearize of jit": lambda f, q: jax.linearize(jax.jit(f), q)[1](q),
    "jvp under jit": lambda f, q: jax.jit(lambda q: jax.jvp(f, (q,), (q,)))(q),
    "jvp of jit": lambda f, q: jax.jvp(jax.jit(f), (q,), (q,)),
    "jvp of checkpoint": lambda f, q: jax.jvp(jax.checkpoint(f), (q,), (q,)),
    "jvp of scan": lambda f, q: jax.jvp(lambda q: jax.lax.scan(lambda x, _: (x, f(x)), q, None, 2), (q,), (q,)),
    "jacfwd of jit": lambda f, q: jax.jacfwd(jax.jit(f))(q),
    "jvp of jit of vmap": lambda f, q: jax.jvp(jax.jit(jax.vmap(f)), (q[None],), (q[None],)),
    "vmap of jvp": lambda f, q: jax.vmap(lambda q: jax.jvp(f, (q,), (q,)))(q[None]),
    "jvp": lambda f, q: jax.jvp(f, (q,), (q,)),
    "jacfwd": lambda f, q: jax.jacfwd(f)(q),
    "jvp of vmap": lambda f, q: jax.jvp(jax.vmap(f), (q[None],), (q[None],)),
    "hessian": lambda f, q: jax.hessian(f)(q),
    "hessian under jit": lambda f, q: jax.jit(jax.hessian(f))(q),
    "grad of grad": lambda f, q: jax.grad(lambda q: jax.grad(f)(q).sum())(q),
    "grad of a jitted grad": lambda f, q: jax.grad(lambda q: jax.jit(jax.grad(f))(q).sum())(q),
    "hessian vector product": lambda f, q: jax.jvp(jax.grad(f), (q,), (q,)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_other_derivatives_name_what_has_them(derivative):
    with pytest.raises(UnsupportedError, match=r'reverse-mode derivative only.*with implementation="reference"'):
        derivative(loss(attention), Q[:1])


def naive(q, k, v):
    """Causal attention from jax.nn's softmax."""
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    s = jnp.einsum("bqhd,bshd->bhqs", q, k) / np.float32(np.sqrt(D))
    p = jax.nn.softmax(jnp.where(np.tri(q.shape[1], dtype=bool), s, -jnp.inf))
    return jnp.einsum("bhqs,bshd->bqhd", p, v)


@pytest.mark.parametrize("name", ["jvp", "hessian under jit", "grad of a jitted grad"])
def test_the_reference_has_all_derivatives(name):
    call = DERIVATIVES[name]
    assert_agree(call(loss(reference), Q[:1]), call(loss(naive), Q[:1]))


# Several devices ------------------------------------------------------------------------------------------------------

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
PLACES = {
    "batch": P("x"),
    "heads": P(None, None, "y"),  # each device has whole groups: its query heads and their key heads
    "batch and heads": P("x", None, "y"),
}
DROPOUT = dict(mask=Window(3, 2), softcap=2.0, dropout_rate=0.3)


def mesh(kind=AxisType.Auto):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def heads_first(place):
    return P(*(place[i] if i < len(place) else None for i in (0, 2)))


def collectives(compiled):
    return [name for name in COLLECTIVES if name in compiled.as_text()]


def placed(mesh, places, arrays):
    return [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip(arrays, places)]


def run_sharded(function, arrays):
    """The results of a compiled function, which must hold no collective and keep the inputs' shardings."""
    compiled = jax.jit(function).lower(*arrays).compile()
    assert collectives(compiled) == []
    found = compiled(*arrays)
    for result, array in zip(jax.tree.leaves(found), (arrays[0], *arrays[:3])):
        assert result.sharding.is_equivalent_to(array.sharding, result.ndim)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_sharded_inputs_need_no_communication(place):
    arrays = placed(mesh(), [place] * 4, (Q, KEY, V, DOUT))
    assert_agree(run_sharded(results, arrays), results(Q, KEY, V, DOUT))


def test_sharded_inputs_of_the_other_layout():
    arrays = [x.swapaxes(1, 2) for x in (Q, KEY, V, DOUT)]
    call = functools.partial(results, layout="BHLD", dropout_rng=jax.random.key(0), **DROPOUT)
    found = run_sharded(call, placed(mesh(), [heads_first(PLACES["batch and heads"])] * 4, arrays))
    assert_agree(found, call(*arrays))


def test_a_sharded_length_communicates():
    """The control: collectives are seen where there must be some."""
    arrays = placed(mesh(), [P(None, "y")] * 3, (Q[:, :14], KEY[:, :14], V[:, :14]))
    assert collectives(jax.jit(attention).lower(*arrays).compile())


@pytest.mark.parametrize("with_mesh", [False, True])
def test_explicit_shardings(with_mesh):
    """Regression: in explicit mode, the default of jax.make_mesh, the loops' zeros had no sharding."""
    where = mesh(AxisType.Explicit)
    arrays = placed(where, [PLACES["batch and heads"]] * 4, (Q, KEY, V, DOUT))
    with jax.set_mesh(where if with_mesh else None):
        assert_agree(run_sharded(results, arrays), results(Q, KEY, V, DOUT))


def test_shard_map():
    """Also the check of what varies over which axis, which is on."""
    place = PLACES["batch and heads"]
    mapped = jax.shard_map(results, mesh=mesh(), in_specs=place, out_specs=place)
    compiled = jax.jit(mapped).lower(Q, KEY, V, DOUT).compile()
    assert collectives(compiled) == []
    assert_agree(compiled(Q, KEY, V, DOUT), results(Q, KEY, V, DOUT))


def test_lengths_of_shards():
    """Under jit devices agree on the bounds of their loops; under shard_map each has its own."""
    def call(q, k, v, dout, lengths):
        return results(q, k, v, dout, kv_lengths=lengths)
    place, lengths = PLACES["batch"], jnp.arange(B, dtype=jnp.int32) * 4
    arrays = placed(mesh(), [place] * 5, (Q, KEY, V, DOUT, lengths))
    shared = jax.jit(call).lower(*arrays).compile()
    mapped = jax.jit(jax.shard_map(call, mesh=mesh(), in_specs=place, out_specs=place)).lower(*arrays).compile()
    assert [collectives(shared), collectives(mapped)] == [["all-reduce"], []]
    for found in (shared(*arrays), mapped(*arrays)):
        assert_agree(found, call(Q, KEY, V, DOUT, lengths))


@pytest.mark.parametrize("folded", [(), ("x",)])
def test_shards_that_would_drop_alike_are_refused(folded):
    """Regression: with one key for all, each shard drew the bits of the first."""
    def call(q, rng):
        for axis in folded:
            rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
        return attention(q, q, q, dropout_rate=0.5, dropout_rng=rng)
    place = PLACES["batch and heads"]
    missing = tuple(sorted({"x", "y"} - set(folded)))
    with pytest.raises(ValueError, match=re.escape(
            f"got axes of query, key and value=['x', 'y'], axes of dropout_rng={list(folded)}. Fold the shard in: "
            f"jax.random.fold_in(dropout_rng, jax.lax.axis_index({missing})).")):
        jax.shard_map(call, mesh=mesh(), in_specs=(place, P()), out_specs=place)(Q, jax.random.key(0))


def test_one_shard_needs_no_key_of_its_own():
    """Regression: axes of size 1, over which nothing is shared, were refused too."""
    where, rng = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2), jax.random.key(0)
    call = lambda q, rng: attention(q, q, q, dropout_rate=0.5, dropout_rng=rng)
    place = PLACES["batch and heads"]
    assert_agree(jax.shard_map(call, mesh=where, in_specs=(place, P()), out_specs=place)(Q, rng), call(Q, rng))


def test_shards_drop_apart():
    """With the shard folded into the key, as the error says; the gradients too."""
    def call(q, k, v, dout, rng):
        rng = jax.random.fold_in(rng, jax.lax.axis_index(("x", "y")))
        return results(q, k, v, dout, dropout_rate=0.5, dropout_rng=rng)
    place, rng = PLACES["batch and heads"], jax.random.key(0)
    arrays = [jnp.broadcast_to(x[:1, :, :1], x.shape) for x in (Q, KEY, V, DOUT)]
    mapped = jax.jit(jax.shard_map(call, mesh=mesh(), in_specs=(*[place] * 4, P()), out_specs=place))
    out, (dq, _, _) = mapped(*arrays, rng)
    shards = [(slice(b, b + 1), slice(None), slice(h, h + H // 2)) for b in range(B) for h in (0, H // 2)]
    for i, a in enumerate(shards):
        key = jax.random.fold_in(rng, i)
        wanted = results(*(x[:1, :, :n] for x, n in zip(arrays, (H // 2, K // 2, K // 2, H // 2))), dropout_rate=0.5,
                         dropout_rng=key, implementation="reference")
        assert_agree((out[a], dq[a]), (wanted[0], wanted[1][0]))
        assert all(not np.array_equal(out[a], out[b]) for b in shards[:i])


def test_shard_map_of_everything_sums_the_gradients_of_what_devices_share():
    """Regression: one key head for query heads on two devices, and a bias for sequences on four, were type errors."""
    def call(q, k, v, bias, data):
        ids, lengths, dout, dlse = data
        run = lambda q, k, v, bias: attention(q, k, v, bias=bias, segment_ids=ids, kv_lengths=lengths, return_lse=True)
        found, vjp = jax.vjp(run, q, k, v, bias)
        return found, vjp((dout, dlse))
    ids, lengths = np.sort(np.random.default_rng(0).integers(0, 3, (B, L))), np.array([9, 0, 15, 3])
    arrays = (Q, KEY[:, :, :1], V[:, :, :1], normal(5, 1, H, L, L), (ids, lengths, DOUT, normal(6, B, H, L)))
    q, lse = P("x", None, "y"), P("x", "y")
    inputs, data = (q, P("x"), P("x"), P(None, "y")), (P("x"), P("x"), q, lse)
    mapped = jax.shard_map(call, mesh=mesh(), in_specs=(*inputs, data), out_specs=((q, lse), inputs))
    compiled = jax.jit(mapped).lower(*arrays).compile()
    assert collectives(compiled) == ["all-reduce"]
    assert_agree(compiled(*arrays), call(*arrays))
