"""What differs between the supported JAX releases, and the only file that may touch `jax._src`; each use with its
reason."""

from typing import Any

import jax

__all__ = ["backends_are_initialized", "concrete", "from_dlpack", "lower_with_devices", "to_dlpack", "vary_like",
           "varying_axes"]


def concrete(x: Any) -> jax.Array | None:
    """The array whose values `x` is or, under `grad` and `vmap` outside of `jit`, stands for; None inside `jit`.

    Tracers of derivatives keep it as `primal`, those of vmap as `val`: JAX documents neither.
    """
    while isinstance(x, jax.core.Tracer):
        x = getattr(x, "primal", getattr(x, "val", None))
    return x if isinstance(x, jax.Array) else None


def varying_axes(array: Any) -> frozenset[str]:
    """The `shard_map` axes over which an array varies (`vma` until JAX 0.10, the manual axis type since)."""
    aval = jax.typeof(array)
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    return frozenset(aval.manual_axis_type.varying)


def vary_like[T](tree: T, *like: Any) -> T:
    """`tree` marked as varying over the `shard_map` axes over which any leaf of `like` varies.

    A loop's carry must vary over the same axes before and after a step; zeros made inside `shard_map` vary over none.
    """
    axes = frozenset[str]().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(like)))
    if not axes:
        return tree

    def mark(leaf: Any) -> Any:
        missing = axes - varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf
    return jax.tree.map(mark, tree)


def lower_with_devices(primitive: Any) -> None:
    """Tells JAX that the lowering of a primitive needs to know the devices and their mesh, as `custom_partitioning` in
    it does; there is no public way.
    """
    from jax._src import dispatch
    dispatch.prim_requires_devices_during_lowering.add(primitive)


# --- DLPack (torch_bridge) -------------------------------------------------------------------------------------------


def from_dlpack(producer: Any, device: jax.Device, *, is_ordered: bool = True) -> jax.Array:
    """A zero-copy JAX array on `device` from an object with `__dlpack__(stream=)` and `__dlpack_device__()`.

    The same as `jax.dlpack.from_dlpack(producer)` for a dense array, without its look-up of the device and without the
    `jnp.asarray` at its end, which take 50 us of a call that has 200. If not `is_ordered`, the array counts as ready:
    the producer gets no stream, and the runtime records no event, nor a callback after it, on one of its own.
    """
    if _import_capsule is None:
        return jax.dlpack.from_dlpack(producer)
    has_stream = is_ordered and device.platform != "cpu"
    stream = device.get_stream_for_external_ready_events() if has_stream else None
    return _import_capsule(producer.__dlpack__(stream=stream), device, stream)


def to_dlpack(array: Any, stream: int) -> Any:
    """The "dltensor" capsule of a GPU array on one device; `stream`, CUDA's number of one, waits for the array.

    The same as `array.__dlpack__(stream=stream)` without its checks, which take 3 us for each result of a call.
    """
    if _export_capsule is None:
        return array.__dlpack__(stream=stream)
    return _export_capsule(array, stream=stream)


def _private(name: str) -> Any:
    """A function of the runtime under `jax.dlpack`, or None where it is not the one of JAX 0.11."""
    if jax.__version_info__[:2] != (0, 11):
        return None
    try:
        from jax._src.lib import _jax
        return getattr(_jax, name, None)
    except ImportError:
        return None


_import_capsule = _private("dlpack_managed_tensor_to_buffer")
_export_capsule = _private("buffer_to_dlpack_managed_tensor")


def backends_are_initialized() -> bool:
    """True if JAX has started its backends, so that settings read at the start no longer count. False if not known."""
    try:
        from jax._src import xla_bridge
        return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):
        return False
