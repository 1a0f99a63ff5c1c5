"""How a model's attention is spread over a sequence's devices, as one value."""

from dataclasses import dataclass
from typing import get_args

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pallas_flash import errors
from pallas_flash.context_parallel.model import Strategy
from pallas_flash.context_parallel.order import LOAD_BALANCES, LoadBalance

__all__ = ["ContextParallel", "require_axis_name"]


@dataclass(frozen=True)
class ContextParallel:
    """The arguments of `context_parallel_attention` that are the same in every layer and every call.

    Attributes:
      axis_name: the axis of the mesh over which sequences are cut.
      strategy, load_balance: as in `context_parallel_attention`.
      mesh, spec: where the axes of the mesh are automatic (plain `jit`): the mesh, and the PartitionSpec of (batch,
        length, heads). Leave them out inside `shard_map`, and on explicit axes, where arrays say where they lie.

    Raises:
      ValueError: for a strategy or a load balance that does not exist, or an axis name that is no string.
    """

    axis_name: str
    strategy: Strategy | None = None
    load_balance: LoadBalance = "zigzag"
    mesh: Mesh | AbstractMesh | None = None
    spec: PartitionSpec | None = None

    def __post_init__(self) -> None:
        require_axis_name(self.axis_name)
        for name, known in (("strategy", (*get_args(Strategy), None)), ("load_balance", LOAD_BALANCES)):
            if (given := getattr(self, name)) not in known:
                raise errors.invalid(f"{name} must be {', '.join(map(repr, known[:-1]))} or None", f"{name}={given!r}",
                                     "pass one of these")


def require_axis_name(name: object) -> None:
    """Raises ValueError unless `name` can be that of one axis of a mesh."""
    if not isinstance(name, str):
        raise errors.invalid("axis_name must be the name of one mesh axis", f"axis_name={name!r}", "pass a string")
