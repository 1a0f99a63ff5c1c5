"""What differs between the supported JAX releases, and the only file that may touch `jax._src`; each use with its
reason."""

import contextlib
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Protocol

import jax
from jax.extend.core import Primitive

__all__ = ["DLPackProducer", "JaxDevice", "RegisterLayout", "backends_are_initialized", "concrete", "dividing_axes",
           "from_dlpack", "kept_apart", "lower_with_devices", "to_dlpack", "vary_like", "varying_axes"]

if TYPE_CHECKING:
    from jax._src.pallas.mosaic_gpu.core import SomeLayout

type RegisterLayout = SomeLayout
"""A layout of registers: `plgpu.Layout` and its reductions, whose common type has no public name."""

JaxDevice = jax.Device
"""A device as JAX has it; what dispatch sees of it is `device.Device`."""


def concrete(x: object) -> jax.Array | None:
    """The array whose values `x` is or, under `grad` and `vmap` outside of `jit`, stands for; None inside `jit`.

    Tracers of derivatives keep it as `primal`, those of vmap as `val`: JAX documents neither.
    """
    while isinstance(x, jax.core.Tracer):
        x = getattr(x, "primal", getattr(x, "val", None))
    return x if isinstance(x, jax.Array) else None


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The `shard_map` axes over which an array varies (`vma` until JAX 0.10, the manual axis type since)."""
    aval = jax.typeof(array)
    if hasattr(aval, "vma"):
        return frozenset(aval.vma)
    return frozenset(aval.manual_axis_type.varying)


def dividing_axes(*arrays: jax.Array) -> set[str]:
    """The `shard_map` axes of more than one device over which any of the arrays varies."""
    return {axis for x in arrays for axis in varying_axes(x) if jax.lax.axis_size(axis) > 1}


def vary_like[T](tree: T, *like: object) -> T:
    """`tree` marked as varying over the `shard_map` axes over which any leaf of `like` varies.

    A loop's carry must vary over the same axes before and after a step; zeros made inside `shard_map` vary over none.
    """
    axes = frozenset[str]().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(like)))
    if not axes:
        return tree

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf
    marked: T = jax.tree.map(mark, tree)
    return marked


def lower_with_devices(primitive: Primitive) -> None:
    """Tells JAX that the lowering of a primitive needs to know the devices and their mesh, as `custom_partitioning` in
    it does; there is no public way.
    """
    from jax._src import dispatch
    dispatch.prim_requires_devices_during_lowering.add(primitive)


def kept_apart(value: Hashable) -> contextlib.AbstractContextManager[object]:
    """A context whose traces and programs JAX keeps apart from those of other values: what is traced in it depends on
    `value`. JAX has such contexts for its own settings alone, and no public way to make one.
    """
    return contextlib.nullcontext() if _context is None else _context(value)


def _new_context() -> Callable[[Hashable], contextlib.AbstractContextManager[object]] | None:
    try:
        from jax._src import config
        made: Callable[[Hashable], contextlib.AbstractContextManager[object]] = config.State[Hashable](
            "pallas_flash_assumed", None, "What is taken for granted while tracing.", include_in_jit_key=True,
            include_in_trace_context=True)
    except (ImportError, AttributeError, TypeError):
        return None
    return made


_context = _new_context()


# --- DLPack (torch_bridge) -------------------------------------------------------------------------------------------


class DLPackProducer(Protocol):
    """What DLPack's protocol asks of an array that is handed over."""

    def __dlpack__(self, *, stream: int | None) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


def from_dlpack(producer: DLPackProducer, device: jax.Device, *, is_ordered: bool = True) -> jax.Array:
    """A zero-copy JAX array on `device` from an object with `__dlpack__(stream=)` and `__dlpack_device__()`.

    The same as `jax.dlpack.from_dlpack(producer)` for a dense array, without its look-up of the device and without the
    `jnp.asarray` at its end, which take 50 us of a call that has 200. If not `is_ordered`, the array counts as ready:
    the producer gets no stream, and the runtime records no event, nor a callback after it, on one of its own.
    """
    if _import_capsule is None:
        array: jax.Array = jax.dlpack.from_dlpack(producer)
        return array
    has_stream = is_ordered and device.platform != "cpu"
    stream = device.get_stream_for_external_ready_events() if has_stream else None
    return _import_capsule(producer.__dlpack__(stream=stream), device, stream)


def to_dlpack(array: jax.Array, stream: int) -> object:
    """The "dltensor" capsule of a GPU array on one device; `stream`, CUDA's number of one, waits for the array.

    The same as `array.__dlpack__(stream=stream)` without its checks, which take 3 us for each result of a call.
    """
    if _export_capsule is None:
        return array.__dlpack__(stream=stream)  # type: ignore[call-arg]  # jax.Array's stub lacks it
    return _export_capsule(array, stream=stream)


def _private(name: str) -> Any:
    """The runtime's function of that name, which `jax.dlpack` calls in JAX 0.11; None in other releases."""
    if jax.__version_info__[:2] != (0, 11):
        return None
    try:
        from jax._src.lib import _jax  # type: ignore[attr-defined]
        return getattr(_jax, name, None)
    except ImportError:
        return None


_import_capsule: Callable[[object, jax.Device, int | None], jax.Array] | None = _private(
    "dlpack_managed_tensor_to_buffer")
_export_capsule: Callable[..., object] | None = _private("buffer_to_dlpack_managed_tensor")


def backends_are_initialized() -> bool:
    """True if JAX has started its backends, after which their settings are fixed. False if that is not known."""
    try:
        from jax._src import xla_bridge
        return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):
        return False
