"""How many floating-point operations the operators do, for torch.utils.flop_counter.

Counted as that module counts those of torch's own attention: the products of all queries with all keys, two in the
forward and five in the backward, whatever a mask or a rule leaves out. The module takes 0.2 s to import, and few use
it: the formulas are added to it when somebody imports it.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from torch_bridge import cached, ops  # noqa: F401  which define them

__all__ = ["register"]

_COUNTER = "torch.utils.flop_counter"

type _Shape = Sequence[int]


def register() -> None:
    """Has torch.utils.flop_counter count the operators, now or once it is imported."""
    if _COUNTER in sys.modules:
        _add_formulas()
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport:
    """A finder that adds the formulas after the module has run, and then takes itself out.

    Looking for the module imports nothing, so it stays until then. `sys.meta_path` is replaced, not changed, since
    another thread may be going through it.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: ModuleType) -> None:
                execute(module)
                sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
                _add_formulas()
            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def _add_formulas() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    packets = torch.ops.pallas_flash
    for formula, targets in (
            (_forward, (packets.attention, packets.attention_direct)),
            (_backward, (packets.attention_backward, packets.attention_backward_direct)),
            (_to_cache, (packets.attention_to_cache, packets.attention_to_cache_direct))):
        register_flop_formula([target for target in targets if target not in flop_registry])(formula)


def _forward(query: _Shape, key: _Shape, value: _Shape, *_: object, **__: object) -> int:
    """Of (batch, heads, length, dim)."""
    return _of_products(query, key[2], query[3] + value[3])


def _backward(query: _Shape, key: _Shape, value: _Shape, *_: object, **__: object) -> int:
    """Scores again, dq and dk; the gradient of the weights, and dv."""
    return _of_products(query, key[2], 3 * query[3] + 2 * value[3])


def _to_cache(query: _Shape, key: _Shape, value: _Shape, lengths: _Shape, table: _Shape | None, *_: object,
              **__: object) -> int:
    """Of all positions that a sequence of the cache has room for."""
    return _of_products(query, key[2] if table is None else key[2] * table[1], query[3] + value[3])


def _of_products(query: _Shape, keys: int, width: int) -> int:
    batch, heads, queries, _ = query
    return 2 * batch * heads * queries * keys * width
