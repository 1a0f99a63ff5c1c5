"""A kernel call as one primitive, so that it runs inside `shard_map`, and so that `jit` splits it over devices.

Inside `shard_map`. Mosaic kernels refuse references that vary over manual mesh axes, and inside `shard_map` every
operand varies. The primitive hides this: its results vary like its operands, and the kernel in it is lowered without
the marks. Each device computes its own shard, so the result is the same.

Under `jit` with automatic axes. XLA cannot look into a kernel and would gather its operands on every device.
`partitioned` says which axes of the operands and results are batch and heads; XLA may split those, and each device
runs the computation of its own shard's spec. Lengths and head dimensions are never split. Arrays of a mask and a bias
are split along the axes that they have, and are whole along those that they are broadcast over. Where devices share a
key head, each sums the gradients over its own query heads, and an all-reduce adds these sums; so it does with the
gradient of a bias that they share.

Three kinds of calls are gathered, not split: those exported by `jax.export`, those inside a `shard_map` that leaves
some axes automatic, and those with a score function, which counts batch and heads of the whole. JAX's
`custom_partitioning` has two costs: a program with such a call is lowered for real devices (an abstract mesh is
refused) and for one mesh, and split programs are not found in the persistent compilation cache.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir

from pallas_flash import compat, errors, masks
from pallas_flash.device import Device
from pallas_flash.kernels.mosaic.target import lowering_for
from pallas_flash.spec import AttentionSpec

__all__ = ["partitioned", "unpartitioned"]

_kernel_p = Primitive("pallas_flash_kernel")
_kernel_p.multiple_results = True
compat.lower_with_devices(_kernel_p)


class Computation(Protocol):
    """What runs as one primitive, as `launch.Pass` does. The same object for the same computation: JAX's caches compare
    it.
    """

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each result: so nothing is traced to find them."""

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Computes the results."""


type Build = Callable[[AttentionSpec], Computation]
"""Makes the computation of a spec, with what depends on the spec (a table of tiles). It returns the same object for the
same spec."""


def unpartitioned(computation: Computation, device: Device, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Runs a computation as one primitive that is never split; lowered as it is outside `shard_map`."""
    return tuple(_kernel_p.bind(*arrays, computation=computation, device=device, split=None))


def partitioned(build: Build, roles: str, spec: AttentionSpec, *arrays: jax.Array,
                device: Device) -> tuple[jax.Array, ...]:
    """Runs the computation of a spec as one primitive; where XLA splits it over devices, each device runs that of its
    own shard's spec on its own shard's arrays.

    Args:
      build: the same object for the same computations.
      roles: of the arrays and of the results, as in "query key key -> query row":
        query: (batch, q_len, q_heads, any) in the spec's layout: q, out, dout, dq;
        key: (batch, kv_len, kv_heads, any) in the spec's layout: k, v, dk, dv; a result is a sum over query heads;
        row: (batch, q_heads, any, ...): the rows' statistics;
        field: (batch or 1, q_heads or 1, any, ...): an array of the spec's mask, all of which come in its order;
        bias: (batch or 1, q_heads or 1, any, any): the spec's bias, or what is made of it, or its sinks; a result is a
          sum over the axes that it does not have, of a computation that leaves it in float32 where the spec is
          `partial`;
        pages: (any, any, kv_heads, any) in the spec's layout: k and v in pages, of which every device takes all;
        table: (batch, any): of pages;
        whole: anything of which every device takes all.
      device: the kind of device, for which kernels are lowered, whatever JAX's default device is.
    """
    return tuple(_kernel_p.bind(*arrays, computation=build(spec), device=device,
                                split=Split(build, device, roles, spec)))


# -- the primitive ---------------------------------------------------------------------------------------------------

def _without_axes(aval: jax.core.AbstractValue) -> jax.core.ShapedArray:
    assert isinstance(aval, jax.core.ShapedArray)
    return jax.core.ShapedArray(aval.shape, aval.dtype)


@_kernel_p.def_abstract_eval
def _abstract(*avals: jax.core.ShapedArray, computation: Computation, device: Device,
              split: "Split | None") -> list[jax.core.ShapedArray]:
    del device, split
    return [avals[0].update(shape=kind.shape, dtype=kind.dtype) for kind in computation.result_types]


@functools.partial(jax.jit, static_argnums=0)
def _run(computation: Computation, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Runs a computation; `jit` keeps its trace, so that kernels are traced once for all programs that hold them."""
    return computation(*arrays)


def _lower(ctx: mlir.LoweringRuleContext, *args: ir.Value, computation: Computation, device: Device,
           split: "Split | None") -> Sequence[ir.Value | Sequence[ir.Value]]:
    platforms = ctx.module_context.platforms
    if len(platforms) > 1:
        raise errors.unsupported(f"a kernel in a program for {' and '.join(platforms)}", ["it runs on GPUs alone"],
                                 'export a program for each platform, or name implementation="xla"')
    function: Callable[..., tuple[jax.Array, ...]] = functools.partial(_run, computation)
    target = lowering_for(device) if platforms == ("cuda",) else contextlib.nullcontext()
    plain = ctx.replace(avals_in=[_without_axes(aval) for aval in ctx.avals_in],
                        avals_out=[_without_axes(aval) for aval in ctx.avals_out])
    if split is not None and split.is_possible and _is_automatic(ctx.module_context):
        function, target = _splitting(split), contextlib.nullcontext()  # a shard's computation comes here, too
    with target:
        return mlir.lower_fun(function, multiple_results=True)(plain, *args)


def _is_automatic(context: mlir.ModuleContext) -> bool:
    """Whether XLA partitions the module for the devices of one mesh, in this process."""
    axes = context.axis_context
    return (getattr(axes, "abstract_mesh", None) is not None and len(getattr(axes, "device_assignment", None) or ()) > 1
            and not context.lowering_parameters.for_export and jax.config.jax_use_shardy_partitioner)


mlir.register_lowering(_kernel_p, _lower)
_kernel_p.def_impl(lambda *args, **params: jax.jit(functools.partial(_kernel_p.bind, **params))(*args))


# -- splitting -------------------------------------------------------------------------------------------------------

type Shardings = tuple[NamedSharding, ...]

_NO_MESH = jax.sharding.AbstractMesh((), ())
"""What a shard's computation is traced under: a mesh of explicit axes that `jax.set_mesh` left would have what the
shard makes annotated for the whole program, after XLA has partitioned it.
"""

_LEADING = "batch", "q_heads"
"""The first two axes of the arrays of a mask and of a bias."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A call of `partitioned`. An axis is "batch", "q_heads", "kv_heads", or "" for those that stay whole."""

    build: Build
    device: Device
    roles: str
    spec: AttentionSpec

    @property
    def is_possible(self) -> bool:
        """Whether the shards of a problem are problems by themselves: those of a mask or a bias whose arrays are not
        among the call's are not, nor is a score function, which counts batch and heads of the whole. Dropout's bits
        are: each batch entry and head brings its own key.
        """
        spec, given = self.spec, self.names[0]
        has_all = given.count("field") == len(jax.tree.leaves(spec.mask)) and (spec.bias is None or "bias" in given)
        return has_all and spec.score is None

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """The roles of the arrays and of the results."""
        arrays, results = self.roles.split("->")
        return arrays.split(), results.split()

    def axes(self, role: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """What each axis of an array is."""
        heads = {"query": "q_heads", "key": "kv_heads", "row": "q_heads", "field": "q_heads", "bias": "q_heads",
                 "pages": "kv_heads", "table": "", "whole": ""}[role]
        rank = len(shape)
        if role == "table":
            return ("batch", *[""] * (rank - 1))
        if role == "pages":
            return ("", "", heads, "") if self.spec.layout == "BLHD" else ("", heads, "", "")
        if not heads:
            return ("",) * rank
        if role in ("field", "bias"):
            return *(axis if size > 1 else "" for axis, size in zip(("batch", heads), shape)), *[""] * (rank - 2)
        if role == "row" or self.spec.layout == "BHLD":
            return ("batch", heads, *[""] * (rank - 2))
        return "batch", "", heads, ""

    def rule(self, _: Mesh, arrays: Sequence[jax.ShapeDtypeStruct],
             results: Sequence[jax.ShapeDtypeStruct]) -> tuple[str, dict[str, int | tuple[str, ...]]]:
        """Shardy's einsum-like rule: a letter for each axis that may be split, one of its own for each that must
        not be.
        """
        grouped = 1 < self.spec.group < self.spec.q_heads and not {"key", "pages"}.isdisjoint(self.roles.split())
        q_heads, kv_heads = ("(g r)", "g") if grouped else ("h", "h" if self.spec.group == 1 else "")
        letters, whole = {"batch": "b", "q_heads": q_heads, "kv_heads": kv_heads, "": ""}, itertools.count()

        def side(roles: list[str], types: Sequence[jax.ShapeDtypeStruct]) -> str:
            words = [[letters[axis] or f"w{next(whole)}" for axis in self.axes(role, kind.shape)]
                     for role, kind in zip(roles, types, strict=True)]
            return ", ".join(map(" ".join, words))

        text = " -> ".join(map(side, self.names, (arrays, results)))
        sizes = {"r": self.spec.group} if grouped else {}
        return text, sizes | dict(need_replication_factors=tuple(f"w{i}" for i in range(next(whole))))

    def mesh_axes(self, mesh: Mesh, arrays: list[tuple[str, jax.ShapeDtypeStruct]]) -> dict[str, tuple[str, ...]]:
        """The mesh axes that split batch, q_heads and kv_heads: those of the first array that is split there, as far
        as they divide.
        """
        found: dict[str, tuple[str, ...]] = {}
        for role, array in arrays:
            partition = (*array.sharding.spec, *[None] * len(array.shape))
            for axis, names in zip(self.axes(role, array.shape), partition):
                if names:
                    found.setdefault(axis, (names,) if isinstance(names, str) else tuple(names))
        spec, heads = self.spec, found.get("q_heads", found.get("kv_heads", ()))
        shared = _dividing(mesh, heads, spec.kv_heads)
        one_left = spec.kv_heads == _size(mesh, shared)
        return {"": (), "batch": _dividing(mesh, found.get("batch", ()), spec.batch), "kv_heads": shared,
                "q_heads": _dividing(mesh, heads, spec.q_heads) if one_left else shared}

    def local(self, counts: dict[str, int]) -> AttentionSpec:
        """The spec of a shard, with so many batch entries and heads."""
        def own(field: masks.ArrayField) -> masks.ArrayField:
            lead = (min(size, counts[axis]) for size, axis in zip(field.shape, _LEADING))
            return masks.ArrayField((*lead, *field.shape[2:]), field.dtype)

        mask: masks.Mask = jax.tree.map(own, self.spec.mask)
        bias, sinks = (None if x is None else own(x) for x in (self.spec.bias, self.spec.sinks))
        return dataclasses.replace(self.spec, batch=counts["batch"], q_heads=counts["q_heads"],
                                   kv_heads=counts["kv_heads"], mask=mask, bias=bias, sinks=sinks)

    def sharers(self, role: str, shape: tuple[int, ...], mesh_axes: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The mesh axes over whose devices a result is to be summed."""
        if role == "key":
            return mesh_axes["q_heads"][len(mesh_axes["kv_heads"]):]
        if role == "bias":
            return tuple(name for axis, size in zip(_LEADING, shape) if size == 1 for name in mesh_axes[axis])
        return ()

    def partition(self, mesh: Mesh, arrays: Sequence[jax.ShapeDtypeStruct],
                  results: Sequence[jax.ShapeDtypeStruct]) -> tuple[Mesh, Callable[..., tuple[jax.Array, ...]],
                                                                    Shardings, Shardings]:
        """Returns what `custom_partitioning` asks for: the mesh, the computation of a shard, and the shardings of
        results and of arrays.
        """
        roles = self.names
        mesh_axes = self.mesh_axes(mesh, [*zip(roles[0], arrays, strict=True), *zip(roles[1], results, strict=True)])
        counts = {axis: getattr(self.spec, axis) // _size(mesh, names) for axis, names in mesh_axes.items() if axis}
        local, kinds = self.local(counts), [kind.dtype for kind in results]
        sharers = [self.sharers(role, kind.shape, mesh_axes) for role, kind in zip(roles[1], results)]
        if any(role == "bias" and axes for role, axes in zip(roles[1], sharers)):
            local = dataclasses.replace(local, partial=True)

        def shard(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            with jax.sharding.use_abstract_mesh(_NO_MESH):
                found = unpartitioned(self.build(local), self.device, *arrays)
                return tuple(_summed(x, axes, dtype) if axes else x for x, axes, dtype in zip(found, sharers, kinds))

        def sharding(role: str, array: jax.ShapeDtypeStruct) -> NamedSharding:
            split = (mesh_axes[axis] or None for axis in self.axes(role, array.shape))
            return NamedSharding(mesh, PartitionSpec(*split))

        return mesh, shard, tuple(map(sharding, roles[1], results)), tuple(map(sharding, roles[0], arrays))


def _summed(x: jax.Array, axes: tuple[str, ...], dtype: np.dtype) -> jax.Array:
    return jax.lax.psum(x.astype(jnp.float32), axes).astype(dtype)


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _dividing(mesh: Mesh, names: tuple[str, ...], count: int) -> tuple[str, ...]:
    """The longest start of `names` whose devices divide `count`."""
    return next(names[:n] for n in range(len(names), -1, -1) if count % _size(mesh, names[:n]) == 0)


@functools.lru_cache(maxsize=1024)
def _splitting(split: Split) -> Callable[..., tuple[jax.Array, ...]]:
    whole = functools.partial(unpartitioned, split.build(split.spec), split.device)  # a primitive: it has no constants
    call = custom_partitioning(whole)
    call.def_partition(split.partition, sharding_rule=split.rule)
    return call
