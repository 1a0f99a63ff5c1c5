"""A pass, forward or backward, as a list of kernel launches: what JAX runs, and what another runtime can launch itself.

Between launches there is no other work: each reads arrays of the call, constants, and what launches before it wrote.
Before the first there may be: arrays of a mask become what kernels read (`Pass.make`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import masks
from pallas_flash.spec import Operands

__all__ = ["Launch", "Pass", "WithArrays"]


class Launch(NamedTuple):
    """A launch of one kernel. Arrays have names, by which launches find them.

    An output may be a part of the array that is described: a kernel writes only heads and columns that its spec has.

    Attributes:
      kernel: takes the inputs in their order, and returns the outputs as a tuple in theirs. Inputs that it updates are
        references (`jax.Ref`).
      inputs: the arrays that it reads.
      outputs: shape and dtype of each array that it makes.
      updates: those of the inputs to which it writes in place.
      build: makes the kernel for other types of its outputs (`writing`), given as `out_type`; None: there are none.
    """

    kernel: "Kernel"
    inputs: tuple[str, ...]
    outputs: dict[str, jax.ShapeDtypeStruct]
    updates: tuple[str, ...] = ()
    build: Callable[..., "Kernel"] | None = None

    @classmethod
    def of(cls, build: Callable[..., "Kernel"], inputs: tuple[str, ...], outputs: dict[str, jax.ShapeDtypeStruct],
           updates: tuple[str, ...] = ()) -> Self:
        """The launch of what `build` makes for these outputs."""
        return cls(build(out_type=(*outputs.values(),)), inputs, outputs, updates, build)

    def reading(self, names: dict[str, str]) -> "Launch":
        """The launch with other arrays, named by the values, in the place of some of its inputs."""
        return self._replace(inputs=tuple(names.get(name, name) for name in self.inputs))

    def writing(self, types: Mapping[str, jax.ShapeDtypeStruct]) -> "Launch":
        """The launch whose outputs are parts of arrays of these types, from their first elements on: some heads, or
        some columns of all heads. What else is in the arrays stays as it is. Raises ValueError where it cannot.
        """
        outputs = {name: types.get(name, kind) for name, kind in self.outputs.items()}
        if outputs == self.outputs:
            return self
        if self.build is None:
            raise ValueError(f"a launch must be made by Launch.of to write parts of arrays, got one of {[*outputs]}")
        return self._replace(kernel=self.build(out_type=(*outputs.values(),)), outputs=outputs)


type Kernel = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """Launches in their order, and where their arrays come from. Called with arrays, JAX runs them.

    Attributes:
      inputs: shape and dtype of each array of the call, in the order of the call's arguments.
      constants: arrays whose values are known when the list is made.
      launches: an array that one updates is read by later ones as it is then.
      results: the names of what the pass returns.
      make: (the call's operands) -> by name, those of the inputs that are no arrays of the call, for a runtime that
        makes them itself; None: there are none, or JAX makes them (`WithArrays`).
      restored: those of the constants that launches update and leave as they were. A runtime may keep them from one
        call to the next; calls that run at the same time need their own.
    """

    inputs: dict[str, jax.ShapeDtypeStruct]
    constants: dict[str, np.ndarray]
    launches: tuple[Launch, ...]
    results: tuple[str, ...]
    make: Callable[[Operands], dict[str, jax.Array]] | None = None
    restored: tuple[str, ...] = ()

    def writing(self, types: Mapping[str, jax.ShapeDtypeStruct]) -> "Pass":
        """The pass whose results are parts of arrays of these types: see `Launch.writing`."""
        return dataclasses.replace(self, launches=tuple(launch.writing(types) for launch in self.launches))

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape and dtype of each result."""
        types = self.inputs.copy()
        for launch in self.launches:
            types |= launch.outputs
        return tuple(types[name] for name in self.results)

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        found = dict(zip(self.inputs, arrays, strict=True))
        for name, x in found.items():
            assert x.shape == self.inputs[name].shape, (name, x.shape, self.inputs[name].shape)
        found |= {name: jnp.asarray(x) for name, x in self.constants.items()}
        updated: dict[str, jax.Ref] = {}

        def value(name: str) -> jax.Array:
            return updated[name][...] if name in updated else found[name]

        for launch in self.launches:
            updated |= {name: jax.new_ref(value(name)) for name in launch.updates}
            given = (updated[name] if name in launch.updates else value(name) for name in launch.inputs)
            found |= zip(launch.outputs, launch.kernel(*given), strict=True)
        return tuple(map(value, self.results))


@dataclasses.dataclass(frozen=True, eq=False)
class WithArrays:
    """A pass whose mask holds arrays: a function of the arrays of the call, then those of the mask, then others.

    Attributes:
      mask: of the spec; its leaves are shapes.
      make: (the mask, the others) -> by name, what the launches read in their place.
      others: how many others there are.
    """

    launched: Pass
    mask: masks.Mask
    make: Callable[[masks.Mask, tuple[jax.Array, ...]], dict[str, jax.Array]]
    others: int = 0

    @property
    def result_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return self.launched.result_types

    def __call__(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        fields, structure = jax.tree.flatten(self.mask)
        end = len(arrays) - self.others
        count = end - len(fields)
        made = self.make(jax.tree.unflatten(structure, arrays[count:end]), arrays[end:])
        return self.launched(*arrays[:count], *(made[name] for name in self.launched.inputs if name in made))
