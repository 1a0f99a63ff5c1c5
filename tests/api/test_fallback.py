"""The warning where an automatic choice leaves kernels written for the device: once a reason, never where one is named.

The device is assumed to be an H100; the calls run, or are traced, on a CPU.
"""

import dataclasses
import threading
import warnings

import jax
import jax.numpy as jnp
import pytest

from pallas_flash import (
    AttentionSpec,
    Causal,
    FallbackWarning,
    SegmentIds,
    context_parallel_attention,
    device,
    dispatch,
    dot_product_attention,
    explain,
    flash_attention,
)
from pallas_flash.flax import attention_fn
from pallas_flash.masks import Dense

Q, BIAS, LENGTHS = jnp.ones((2, 8, 2, 16), jnp.bfloat16), jnp.zeros((1, 2, 8, 1)), jnp.array([3, 8], jnp.int32)
WIDE = jnp.ones((1, 8, 2, 520), jnp.bfloat16)


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    with device.assume(device.H100):
        yield


@pytest.fixture
def seen():
    """The warnings that were given."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", FallbackWarning)
        yield found


def test_what_it_says(seen):
    ids = SegmentIds(jnp.zeros(8, int), jnp.zeros(8, int))
    flash_attention(Q, Q, Q, bias=BIAS, mask=ids & ids)
    (warning,) = seen
    text = str(warning.message)
    assert warning.category is FallbackWarning and warning.filename == __file__
    assert text.startswith("implementation='xla' runs AttentionSpec(") and " on NVIDIA H100 80GB HBM3, because" in text
    for part in ("takes one SegmentIds", "implementation='xla'", "filterwarnings"):
        assert part in text, part


def test_once_a_reason(seen):
    """Whatever Python remembers of lines, and in what order reasons are met."""
    for _ in range(2):
        flash_attention(Q, Q, Q, bias=BIAS, kv_lengths=LENGTHS)
    flash_attention(Q, Q, Q, bias=BIAS)
    dot_product_attention(Q, Q, Q, BIAS)
    assert len(seen) == 1
    flash_attention(WIDE, WIDE, WIDE, bias=BIAS)
    assert [str(w.message).count("d=520, d_v=520") for w in seen] == [0, 1]


def test_not_again_for_the_gradient_or_under_transformations(seen):
    loss = lambda q: flash_attention(q, q, q, bias=BIAS).astype("float32").sum()
    for function, q in ((jax.grad(loss), Q), (jax.jit(loss), Q), (jax.vmap(jax.grad(loss)), jnp.stack([Q, Q]))):
        jax.eval_shape(function, q)
    assert len(seen) == 1


@pytest.mark.parametrize("call", [
    lambda: flash_attention(Q, Q, Q, bias=BIAS, implementation="xla"),
    lambda: flash_attention(WIDE, WIDE, WIDE, implementation=("hopper", "xla")),
    lambda: jax.eval_shape(lambda: flash_attention(Q, Q, Q, mask=Causal())),
    lambda: flash_attention(Q[:0], Q[:0], Q[:0], bias=BIAS),
    lambda: explain(Q, Q, Q, bias=BIAS),
    lambda: explain(Q, Q, Q, bias=BIAS, device=device.H200),
], ids=["named", "named-second", "kernels", "empty", "explain", "explain-device"])
def test_silent(call, seen):
    call()
    assert not seen


T4 = dataclasses.replace(device.A100, name="Tesla T4", capability=(7, 5))


@pytest.mark.parametrize("where", [device.CPU, T4], ids=lambda where: where.name)
def test_silent_where_no_kernels_are_left(where, seen):
    with device.assume(where):
        flash_attention(Q, Q, Q, bias=BIAS)
    assert not seen


@pytest.mark.parametrize("where", [device.A100, device.B200, device.RTX_5090], ids=lambda where: where.name)
def test_the_kernels_of_other_gpus_are_left_aloud_and_once(where, seen):
    with device.assume(where):
        for _ in range(2):
            flash_attention(Q, Q, Q, bias=BIAS)
    text, = (str(warning.message) for warning in seen)
    assert "because 'ampere', written for this device, cannot" in text and "takes a bias of keys or of pairs" in text


def test_a_filter_makes_every_call_an_error():
    """Regression: were the reason remembered, only the first call would raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(2):
            with pytest.raises(FallbackWarning, match="takes a bias of keys or of pairs"):
                flash_attention(Q, Q, Q, bias=BIAS)


def test_a_filter_silences():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        flash_attention(Q, Q, Q, bias=BIAS)


def test_once_over_threads(seen):
    decision = dispatch.decide(AttentionSpec.of(Q, Q, Q, mask=Causal(), bias=BIAS), device.H100)
    threads = [threading.Thread(target=dispatch.warn_of_fallback, args=(decision,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1


def test_flax(seen):
    pytest.importorskip("flax")
    jax.eval_shape(lambda: attention_fn()(Q, Q, Q, mask=Dense(jnp.ones((1, 1, 8, 8), bool))))
    attention_fn(implementation="xla")(Q, Q, Q, bias=BIAS)
    assert not seen
    attention_fn()(Q, Q, Q, bias=BIAS)
    assert ["takes a bias of keys or of pairs" in str(w.message) for w in seen] == [True]


@pytest.mark.virtual
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_sequences_over_devices(strategy, seen):
    """Each strategy decides for its own parts, on each device, in both passes."""
    mesh = jax.make_mesh((2,), ("s",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.PartitionSpec(None, "s")

    def loss(q, implementation):
        bias = jnp.zeros((1, 2, 1, 1), jnp.bfloat16)
        return context_parallel_attention(
            q, q, q, axis_name="s", strategy=strategy, mask=Causal(), bias=bias, implementation=implementation,
            mesh=mesh, spec=place).astype("float32").sum()
    jax.eval_shape(jax.grad(lambda q: loss(q, "xla")), Q)
    assert not seen
    jax.eval_shape(jax.grad(lambda q: loss(q, None)), Q)
    assert len(seen) == 1 and "takes a bias of keys or of pairs" in str(seen[0].message)
