"""Which model classes `attn_implementation="pallas"` takes: those whose attention layers call transformers'
`AttentionInterface`.

A model that computes attention itself makes its mask by the name all the same. Ours is boolean, True where a key is
kept; such a model adds the mask to the scores, or fills where it is True, and loses causality without an error.
transformers refuses "sdpa" by a flag of the class and takes any registered name; what a class calls is found in its
source, which is how transformers itself decides whether the implementation can be changed.
"""

import ast
import functools
import importlib
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils import logging

__all__ = ["guard"]

logger = logging.get_logger(__name__)

_INTERFACE = {"ALL_ATTENTION_FUNCTIONS", "AttentionInterface"}
_names: set[str] = set()


def guard(name: str) -> None:
    """From now on no model is built with, or changed to, `attn_implementation=name` that would not call it right.

    A check before `PreTrainedModel.get_correct_attn_implementation`, which every model asks before its layers are made.
    """
    _names.add(name)
    asked = transformers.PreTrainedModel.get_correct_attn_implementation
    if getattr(asked, "_pallas_flash_guard", False):
        return

    @functools.wraps(asked)
    def checked(self: transformers.PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in _names:
            _check(type(self), requested_attention)
        found: str = asked(self, requested_attention, *args, **kwargs)
        return found

    checked._pallas_flash_guard = True  # type: ignore[attr-defined]
    transformers.PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]  # no hook


def _check(model: type, name: str) -> None:
    """Raises where the model would not start or be wrong; says so where it would never call ours.

    Raises:
      NotImplementedError: it chooses among layers of its own, or applies masks to scores itself.
    """
    found = _source(model)
    missing = next((key for key, table in found.tables if name not in table), None)
    if missing is not None:
        raise _refusal(model, name, f"which chooses its attention from {missing}")
    if found.uses_interface or not found.attention:
        return
    layers = ", ".join(sorted(found.attention))
    if found.makes_masks:
        raise _refusal(model, name, f"whose {layers} applies its mask itself: a boolean one would be added to the "
                                    "scores as a number, or fill what it shall keep")
    logger.warning_once(f"{model.__name__} computes attention itself, in {layers}: attn_implementation={name!r} "
                        "changes nothing there, and pallas_flash is not called.")


def _refusal(model: type, name: str, found: str) -> NotImplementedError:
    other = 'attn_implementation="sdpa" or "eager"' if getattr(model, "_supports_sdpa", False) else (
        'attn_implementation="eager"')
    return NotImplementedError(
        f"attn_implementation={name!r} needs attention layers that call transformers' AttentionInterface, got "
        f"{model.__name__}, {found}. Use {other}, for a part of a model under the name of its config: "
        f'attn_implementation={{"": {name!r}, "decoder": "eager"}}.')


# --- what a class calls ----------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What the source of a model says, but for the models in it, which are asked on their own."""

    uses_interface: bool
    makes_masks: bool
    attention: set[str]  # modules of its own that are called attention
    tables: list[tuple[str, Mapping[str, object]]]  # from which a layer is taken by the name of the implementation


@functools.cache
def _source(model: type) -> _Source:
    """Of all classes and functions of its modules that the model's own classes name, directly or by others."""
    names: set[str] = set()
    attention: set[str] = set()
    tables: list[tuple[str, Mapping[str, object]]] = []
    for base in model.__mro__:
        if issubclass(base, transformers.PreTrainedModel) and base is not transformers.PreTrainedModel:
            module = importlib.import_module(base.__module__)
            nodes = _reached(module, base.__name__, model)
            for node in nodes.values():
                names |= _named(node)
                tables += _tables(node, module)
            attention |= {key for key in nodes if "Attention" in key and _is_layer(getattr(module, key, None))}
    makes_masks = any(x.startswith("create_") and "mask" in x for x in names)
    return _Source(bool(names & _INTERFACE), makes_masks, attention, tables)


def _reached(module: ModuleType, start: str, model: type) -> dict[str, ast.AST]:
    """Definitions of the module by their names."""
    definitions, found, left = _definitions(module), dict[str, ast.AST](), [start]
    while left:
        name = left.pop()
        value = getattr(module, name, None)
        is_other_model = isinstance(value, type) and issubclass(value, transformers.PreTrainedModel) and (
            not issubclass(model, value))
        if name in found or name not in definitions or is_other_model:
            continue
        found[name] = definitions[name]
        left += _named(found[name])
    return found


@functools.cache
def _definitions(module: ModuleType) -> dict[str, ast.AST]:
    """Of a module without source, as of a notebook: none."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):
        return {}
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    return found


def _named(node: ast.AST) -> set[str]:
    """Names in a definition, but for `_init_weights`, which asks for layers of all models of a module."""
    inner = [x for x in node.body if getattr(x, "name", "") != "_init_weights"] if isinstance(node, ast.ClassDef) else (
        [node])
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    return {x.id for part in (*inner, *bases) for x in ast.walk(part) if isinstance(x, ast.Name)}


def _tables(node: ast.AST, module: ModuleType) -> list[tuple[str, Mapping[str, object]]]:
    """Of `TABLE[config._attn_implementation]`, also by a variable."""
    found = [(x.value.id, getattr(module, x.value.id, None)) for x in ast.walk(node)
             if isinstance(x, ast.Subscript) and isinstance(x.value, ast.Name)]
    return [(name, table) for name, table in found if isinstance(table, Mapping) and "eager" in table]


def _is_layer(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, torch.nn.Module)
