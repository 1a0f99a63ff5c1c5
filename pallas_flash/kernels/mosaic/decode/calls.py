"""The call of a kernel of decoding: its arrays, and the statistics that others read."""

import jax
import jax.numpy as jnp

from pallas_flash import softmax
from pallas_flash.kernels.mosaic.decode.added import types
from pallas_flash.kernels.mosaic.decode.work import fields
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["anchored", "arrays", "inputs"]


def inputs(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of the call, by name: q, k, v, those of the mask, a bias, sinks, and the table of
    pages, where there are such.
    """
    shapes = zip("qkv", spec.operand_shapes[:3])
    found = {name: jax.ShapeDtypeStruct(shape, spec.dtype) for name, shape in shapes} | fields(spec) | types(spec)
    if spec.page_table_shape is not None:
        found["page_table"] = jax.ShapeDtypeStruct(spec.page_table_shape, jnp.int32)
    return found


def arrays(operands: Operands) -> tuple[list[jax.Array], str]:
    """The arrays of `inputs`, and their roles and those of the results (`mosaic.call.partitioned`)."""
    masks, pages = jax.tree.leaves(operands.mask), operands.page_table
    added = [x for x in (operands.bias, operands.sinks) if x is not None]
    key, table = ("key", "") if pages is None else ("pages", "table ")
    roles = f"query {key} {key} {'field ' * len(masks)}{'bias ' * len(added)}{table}-> query row"
    return [operands.q, operands.k, operands.v, *masks, *added, *([] if pages is None else [pages])], roles


def anchored(spec: AttentionSpec, operands: Operands, results: Results[jax.Array]) -> Results[jax.Array]:
    """The results with the statistics of anchored scores, of those of the scores as they are. XLA computes none of it
    where nobody reads the statistics.
    """
    if spec.bias is None:
        return results
    anchor = jnp.broadcast_to(spec.anchor(operands)[..., 0].astype(jnp.float32), spec.lse_shape)
    return results._replace(stats=softmax.shifted(results.stats, -anchor, 1.0))
