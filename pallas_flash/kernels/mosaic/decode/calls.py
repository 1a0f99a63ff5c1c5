"""The call of a kernel of decoding: its arrays, and the statistics that others read."""

import jax
import jax.numpy as jnp

from pallas_flash import quantised, softmax
from pallas_flash.kernels.mosaic.decode.added import types
from pallas_flash.kernels.mosaic.decode.work import fields
from pallas_flash.spec import AttentionSpec, Operands, Results

__all__ = ["SCALES", "anchored", "arrays", "inputs", "scale_types"]

SCALES = ("k_scale", "v_scale")


def scale_types(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """The scales of a cache in eight bits as a kernel reads them, (1|b 1|h 1 1) float32, h being query heads: as a bias
    is sharded.
    """
    return {name: jax.ShapeDtypeStruct((spec.batch if rows > 1 else 1, spec.q_heads if heads > 1 else 1, 1, 1),
                                       jnp.float32)
            for name, (rows, heads) in zip(SCALES, spec.cache_scales or ())}


def inputs(spec: AttentionSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of the call, by name: q, k, v, those of the mask, a bias, sinks, scales of a
    cache in eight bits, and the table of pages, where there are such.
    """
    stored = spec.dtype if spec.cache_scales is None else quantised.DTYPE
    found = {name: jax.ShapeDtypeStruct(shape, spec.dtype if name == "q" else stored)
             for name, shape in zip("qkv", spec.operand_shapes[:3])}
    found |= fields(spec) | types(spec) | scale_types(spec)
    if spec.page_table_shape is not None:
        found["page_table"] = jax.ShapeDtypeStruct(spec.page_table_shape, jnp.int32)
    return found


def arrays(spec: AttentionSpec, operands: Operands) -> tuple[list[jax.Array], str]:
    """The arrays of `inputs`, and their roles and those of the results (`mosaic.call.partitioned`)."""
    masks, pages = jax.tree.leaves(operands.mask), operands.page_table
    added = [x for x in (operands.bias, operands.sinks) if x is not None]
    for scale in operands.cache_scales or ():  # of key heads; as a bias is, of query heads
        added.append((scale if scale.shape[1] == 1 else jnp.repeat(scale, spec.group, axis=1))[..., None, None])
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
