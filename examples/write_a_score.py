"""A new score function, with numbers that are learned. One class; JAX differentiates it.

It runs on every device: inputs of 16 bits in the kernels of NVIDIA GPUs since Ampere, all others in `xla`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import Causal, Score, flash_attention


@dataclass(frozen=True)
class Fading(Score):
    """Scores of keys far away fade, by a half-life of each head; keys in the same line of text gain a learned amount.

    It is written for one pair of a query and a key: all five arguments are numbers.
    """

    half_lives: jax.Array  # (heads,), has a gradient
    gains: jax.Array  # (heads,), has a gradient
    lines: jax.Array  # (batch, length) integers, the line of each token

    def __call__(self, score, batch, head, q_pos, kv_pos):
        distance = abs(q_pos - kv_pos).astype(score.dtype)
        same_line = self.lines[batch, q_pos] == self.lines[batch, kv_pos]
        return score * jnp.exp2(-distance / self.half_lives[head]) + jnp.where(same_line, self.gains[head], 0)


def main():
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 1, 300, 2, 64))  # each (batch, length, heads, dim)
    lines = jnp.arange(300, dtype="int32")[None] // 12
    half_lives, gains = jnp.array([20.0, 200.0]), jnp.array([0.0, 1.0])

    def run(implementation):
        def attend(q, k, v, half_lives, gains):
            return flash_attention(q, k, v, score=Fading(half_lives, gains, lines), mask=Causal(),
                                   implementation=implementation)
        out, pullback = jax.vjp(attend, q, k, v, half_lives, gains)
        return out, *pullback(dout)

    names = ["out", "dq", "dk", "dv", "dhalf_lives", "dgains"]
    for name, ours, exact in zip(names, run(None), run("reference")):
        error = np.max(np.abs(ours - exact)) / np.max(np.abs(exact))
        print(f"{name}: relative difference from the reference {error:.1e}")
        assert error < 1e-4

    # Where there is nothing to learn, a plain function is enough. Define it once: a call compiles for each function.
    out = flash_attention(q, k, v, score=lambda score, batch, head, q_pos, kv_pos: jnp.maximum(score, 0.1 * score))
    print("leaky scores:", out.shape)


if __name__ == "__main__":
    main()
