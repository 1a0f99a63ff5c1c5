"""The gradients of what completes scores, a bias or a score function's arrays, behind those of q, k and v: computations
of their own, left out of a program that does not ask for them.
"""

import jax
import jax.numpy as jnp

from pallas_flash.arrays import Array, Int
from pallas_flash.kernels.mosaic.call import Build
from pallas_flash.kernels.mosaic.dbias import dbias
from pallas_flash.kernels.mosaic.dscore import dscore
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["with_score_gradients"]


def with_score_gradients(spec: AttentionSpec, operands: Operands, found: Gradients[jax.Array],
                         results: Results[Array], cotangents: Results[Array], keys: tuple[Int[Array, "b h 2"], ...],
                         build: Build | None = None) -> Gradients[jax.Array]:
    """The gradients found, and those of a bias and of a score function's arrays, where there are such.

    Args:
      results: of a partial backward without out (`autodiff.without_out`).
      keys, build: see `dbias.dbias`.
    """
    if results.out is None:
        results = results._replace(out=jnp.zeros_like(cotangents.out))  # which is what it means
    if spec.bias is not None:
        found = found._replace(dbias=dbias(spec, operands, results, cotangents, keys, build))
    if operands.score:
        found = found._replace(dscore=dscore(spec, operands, results, cotangents, keys))
    return found
