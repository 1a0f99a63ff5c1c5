"""Whether results are right, before they are timed: against float32 results of our blockwise kernels.

Only the first and the last (batch, key head) are compared, the ends of every array; the rest must be finite.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.contestants import SHARED, Arrays, Contestant, Exclusive, compiled
from pallas_flash import flash_attention
from pallas_flash.testing.problems import Problem

__all__ = ["Check"]


class Check:
    """The right results of one problem, computed when they are first asked for."""

    def __init__(self, problem: Problem, arrays: Arrays, gradients: bool, exclusive: Exclusive = SHARED) -> None:
        self.problem, self.arrays, self.gradients, self.exclusive = problem, arrays, gradients, exclusive
        self.group = problem.q_heads // problem.kv_heads
        self.corners = sorted({(0, 0), (problem.batch - 1, problem.kv_heads - 1)})

    @property
    def limit(self) -> float:
        """The relative error up to which a result counts as right: four roundings of its dtype, at least 1e-4."""
        return max(2 * float(jnp.finfo(self.problem.dtypes[0]).eps), 1e-4)

    def errors(self, contestant: Contestant, results: dict[str, Any]) -> dict[str, float]:
        """|result - truth| / |truth| of each result; infinite where an element is not finite."""
        return {name: self._error(contestant, name, array) for name, array in results.items()}

    def _error(self, contestant: Contestant, name: str, array: Any) -> float:
        found = np.stack([contestant.row(self.problem, array, batch, head) for batch, kv_head in self.corners
                          for head in self._heads(name, kv_head)])
        wanted = np.concatenate([truth[name] for truth in self._truths])
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        return error if contestant.is_finite(array) else float("inf")

    def _heads(self, name: str, kv_head: int) -> range:
        return range(kv_head, kv_head + 1) if name in ("dk", "dv") else range(kv_head * self.group,
                                                                             (kv_head + 1) * self.group)

    @functools.cached_property
    def _truths(self) -> list[dict[str, np.ndarray]]:
        """For each corner the results of its heads, (heads, length, dim)."""
        return [self._truth(*corner) for corner in self.corners]

    def _truth(self, batch: int, kv_head: int) -> dict[str, np.ndarray]:
        axis = self.problem.layout.index("H")
        by_heads = lambda x: np.asarray(jnp.moveaxis(x[0], axis - 1, 0))
        results = self.compute(*self._cut(self.arrays, batch, kv_head))
        return {name: by_heads(x) for name, x in results.items()}

    def _cut(self, arrays: Arrays, batch: int, kv_head: int) -> Arrays:
        """The inputs of one key head, float32."""
        def cut(x: Any, name: str) -> Any:
            heads = self._heads(name, kv_head)
            x = jax.lax.slice_in_dim(x[batch:batch + 1], heads.start, heads.stop, axis=self.problem.layout.index("H"))
            return x.astype(jnp.float32)
        return Arrays(*(cut(x, name) for x, name in zip(arrays, ("dq", "dk", "dv", "out"), strict=True)))

    @functools.cached_property
    def compute(self) -> Any:
        """The executable that gives right results, compiled when it is first asked for."""
        def attend(q: Any, k: Any, v: Any) -> Any:
            return flash_attention(q, k, v, mask=self.problem.mask, scale=self.problem.scale, implementation="xla",
                                   softcap=self.problem.softcap, layout=self.problem.layout)

        def everything(q: Any, k: Any, v: Any, dout: Any) -> dict[str, Any]:
            if not self.gradients:
                return {"out": attend(q, k, v)}
            out, vjp = jax.vjp(attend, q, k, v)
            return {"out": out} | dict(zip(("dq", "dk", "dv"), vjp(dout), strict=True))
        shapes = jax.eval_shape(lambda arrays: self._cut(arrays, *self.corners[0]), self.arrays)
        return compiled(everything, shapes, self.exclusive)
