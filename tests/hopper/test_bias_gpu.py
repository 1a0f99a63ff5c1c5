"""The kernel of the gradient of a bias of pairs on a GPU; `test_features_gpu` has it against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, flash_attention

pytestmark = pytest.mark.gpu


BATCH, LENGTH, HEADS, DIM = 3, 500, 2, 128


def arrays(dtype):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, dout = (jax.random.normal(key, (BATCH, LENGTH, HEADS, DIM), jnp.bfloat16) for key in keys[:4])
    bias = jax.random.normal(keys[4], (1, HEADS, LENGTH, LENGTH), dtype)
    return q, k, v, bias.at[:, :, ::7, 60:80].set(-jnp.inf), dout


def gradient(name, q, k, v, bias, dout):
    call = lambda bias: flash_attention(q, k, v, bias=bias, mask=Causal(), implementation=name)
    found, = jax.vjp(call, bias)[1](dout)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_bad_value_reaches_the_rows_that_see_it_alone(dtype):
    """As in `xla`; and the gradient has the same bits on every run."""
    q, k, v, bias, dout = arrays(dtype)
    v = v.at[1, 300].set(jnp.nan)
    run = jax.jit(gradient, static_argnums=0)
    found, again, wanted = (np.asarray(run(name, q, k, v, bias, dout), np.float32)
                            for name in ("hopper", "hopper", "xla"))
    np.testing.assert_array_equal(found, again)
    sees, hidden = np.arange(LENGTH) >= 300, np.asarray(bias == -jnp.inf) | ~np.tri(LENGTH, dtype=bool)
    assert not found[hidden].any()
    assert np.isnan(found[:, :, sees][~hidden[:, :, sees]]).all()
    assert np.isfinite(found[:, :, ~sees]).all()
    np.testing.assert_allclose(found[:, :, ~sees], wanted[:, :, ~sees], rtol=0.03, atol=0.01)


def test_a_program_that_does_not_ask_for_it_does_not_compute_it():
    q, k, v, bias, dout = arrays("bfloat16")

    def gradients(q, bias):
        return jax.vjp(lambda q, bias: flash_attention(q, k, v, bias=bias, mask=Causal(), implementation="hopper"),
                       q, bias)[1](dout)
    kernels = [jax.jit(run).lower(q, bias).compile().as_text().count('custom_call_target="mosaic_gpu')
               for run in (gradients, lambda q, bias: gradients(q, bias)[0])]
    assert kernels[0] == kernels[1] + 2, "`prepare` once more, and the kernel"
