"""Where a model and its batches lie: on one device, or cut over a mesh of devices with the axes data, sequence, tensor.

Data: sequences of a batch. Sequence: each sequence, in the order of `pallas_flash.reorder`. Tensor: heads of attention
and features between the two layers of an MLP. XLA finds the rest, and the collectives, from these.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_flash
import pallas_flash.flax

AXES = ("data", "sequence", "tensor")

BATCH = P("data", "sequence")  # tokens (batch, length)
HEADS = P("data", "sequence", "tensor")  # queries, keys, values (batch, length, heads, head_dim)
PARAMETERS = {  # by layer, and number of axes; every device has the whole of all others
    **dict.fromkeys([("query", 3), ("key", 3), ("value", 3)], P(None, "tensor")),  # (dim, heads, head_dim)
    ("out", 3): P("tensor"),  # (heads, head_dim, dim)
    ("up", 2): P(None, "tensor"), ("up", 1): P("tensor"),  # (dim, features) and the bias
    ("down", 2): P("tensor"),  # (features, dim)
}


class OneDevice:
    """Nothing is cut."""

    def order(self, x: np.ndarray, axis: int = 1) -> np.ndarray:
        return x

    def put(self, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x)

    def place(self, module: nnx.Module) -> None:
        pass


@dataclass(frozen=True)
class ManyDevices:
    """Everything is cut over a mesh, whose devices may belong to several processes that all run the same program."""

    mesh: Mesh
    strategy: str | None

    def attention_fn(self) -> Callable[..., jax.Array]:
        parallel = pallas_flash.ContextParallel("sequence", self.strategy, mesh=self.mesh, spec=HEADS)
        return pallas_flash.flax.attention_fn(context_parallel=parallel)

    def order(self, x: np.ndarray, axis: int = 1) -> np.ndarray:
        """Puts a sequence axis into the order of the devices."""
        return pallas_flash.reorder(x, self.mesh.shape["sequence"], axis)

    def put(self, x: np.ndarray) -> jax.Array:
        """(batch, length) of the original order -> the devices; each process has all of x and puts its own part."""
        x = self.order(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(self.mesh, BATCH), x.__getitem__)

    def place(self, module: nnx.Module) -> None:
        """Cuts the parameters of a model, or the state of its optimizer, which every process has made equal."""
        nnx.update(module, jax.tree_util.tree_map_with_path(self._place, nnx.state(module)))

    def _place(self, path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
        place = next((place for (name, ndim), place in PARAMETERS.items() if name in names and ndim == x.ndim), P())
        return jax.device_put(x, NamedSharding(self.mesh, place))


Devices = OneDevice | ManyDevices


def sizes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes from "data=2,sequence=4"; axes not named have size 1."""
    given = dict(item.split("=") for item in text.split(","))
    if unknown := set(given) - set(AXES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(AXES)}")
    return {name: int(given.get(name, 1)) for name in AXES}


def make(args: argparse.Namespace) -> ManyDevices:
    """The mesh that the options ask for; SystemExit where it does not fit the devices or the model."""
    data, sequence, tensor = args.mesh.values()
    if math.prod(args.mesh.values()) != jax.device_count():
        raise SystemExit(f"--mesh has {math.prod(args.mesh.values())} devices, there are {jax.device_count()}. On a "
                         "CPU, set XLA_FLAGS=--xla_force_host_platform_device_count to the number")
    for name, value, parts in (("--batch", args.batch, data), ("--context", args.context, 2 * sequence),
                               ("--kv-heads", args.kv_heads, tensor), ("--heads", args.heads, tensor)):
        if value % parts:
            raise SystemExit(f"{name} must divide by {parts} on this mesh, got {value}")
    automatic = (jax.sharding.AxisType.Auto,) * len(AXES)
    return ManyDevices(jax.make_mesh((data, sequence, tensor), AXES, axis_types=automatic), args.strategy)
