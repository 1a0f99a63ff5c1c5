"""Causal attention, its gradient, and which implementation computes it."""

import jax
import jax.numpy as jnp

from pallas_flash import Causal, explain, flash_attention

q_key, k_key, v_key = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(q_key, (2, 512, 8, 64), jnp.bfloat16)  # (batch, length, query heads, head dim)
key = jax.random.normal(k_key, (2, 512, 2, 64), jnp.bfloat16)  # (batch, length, key heads, head dim): each serves four
value = jax.random.normal(v_key, (2, 512, 2, 64), jnp.bfloat16)

print(explain(query, key, value, mask=Causal()))
out, pullback = jax.vjp(lambda *qkv: flash_attention(*qkv, mask=Causal()), query, key, value)
print("out", out.shape, out.dtype, "gradients", *(gradient.shape for gradient in pullback(jnp.ones_like(out))))
