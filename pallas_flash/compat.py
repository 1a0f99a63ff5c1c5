"""What differs between the supported JAX releases, and the only file that may touch `jax._src`; each use with its
reason."""

from typing import Any

import jax

__all__ = ["vary_like"]


def _varying_axes(array: Any) -> frozenset[str]:
    """The `shard_map` axes over which an array varies (`vma` until JAX 0.10, the manual axis type since)."""
    aval = jax.typeof(array)
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    return frozenset(aval.manual_axis_type.varying)


def vary_like[T](tree: T, *like: Any) -> T:
    """`tree` marked as varying over the `shard_map` axes over which any leaf of `like` varies.

    A loop's carry must vary over the same axes before and after a step; zeros made inside `shard_map` vary over none.
    """
    axes = frozenset[str]().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(like)))
    if not axes:
        return tree

    def mark(leaf: Any) -> Any:
        missing = axes - _varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf
    return jax.tree.map(mark, tree)
