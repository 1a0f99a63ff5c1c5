"""What callers on several devices need: operands of one kind under `shard_map`, results placed like them in explicit
mode.

Under `jit` with automatic axes nothing is needed: batch and heads are batch dimensions of every product, and XLA keeps
their sharding. But where a mask holds arrays (lengths, segments), which tiles are needed is known only at run time:
devices that share a loop then agree on its bounds, an all-reduce of two integers a step. Under `shard_map` each device
has its own loop, and nothing is exchanged.
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_flash import compat
from pallas_flash.spec import AttentionSpec, Gradients, Operands, Results

__all__ = ["automatic", "explicit_mesh", "gradient_places", "lse_place", "place", "result_places", "vary_together"]


def vary_together[T](operands: T) -> T:
    """Marks all operands as varying over the `shard_map` axes over which any of them varies.

    The cotangent of one that was shared by devices (a bias, a key head of several query heads) is then summed over
    them, by the transpose of this.
    """
    return compat.vary_like(operands, operands)


def automatic[*Args, R](function: Callable[[*Args], R], places: object, *args: *Args) -> R:
    """function(*args), with the mesh axes that args are explicitly sharded over made automatic inside.

    In explicit mode every operation of a kernel's loops would need a sharding; so only the results do.

    Args:
      function: of arrays, to a pytree of arrays.
      places: the PartitionSpecs of the results, the same pytree.
    """
    mesh = explicit_mesh(args)
    if mesh is None:
        return function(*args)
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    results: R = jax.sharding.auto_axes(
        function, axes=axes, out_sharding=jax.tree.map(lambda place: NamedSharding(mesh, place), places))(*args)
    return results


def result_places(spec: AttentionSpec, operands: Operands) -> Results[PartitionSpec]:
    """Where out and the statistics of rows lie: as the query does."""
    batch, heads, length = lse_place(spec, operands)
    return Results(out=PartitionSpec(*place(operands.q)[:3], None), stats=PartitionSpec(batch, heads, None, length))


def lse_place(spec: AttentionSpec, operands: Operands) -> PartitionSpec:
    """Where lse lies: as the query does."""
    return PartitionSpec(*(place(operands.q)[spec.layout.index(axis)] for axis in "BHL"))


def gradient_places(operands: Operands) -> Gradients[PartitionSpec]:
    """Where the gradients lie: each as its operand does."""
    found = operands.differentiable.gradients(place)
    return found if operands.sinks is None else found._replace(dsinks=place(operands.sinks))


def place(array: jax.Array) -> PartitionSpec:
    """Where an array lies."""
    spec: PartitionSpec = jax.typeof(array).sharding.spec
    return spec


def explicit_mesh(args: object) -> AbstractMesh | None:
    """The mesh over whose explicit axes arrays lie, or None."""
    meshes = (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(args))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
