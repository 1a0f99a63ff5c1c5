"""Score functions that are given, of the distance between query and key: ALiBi, and relative-position biases."""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import errors
from pallas_flash.arrays import Array, Float, Shaped
from pallas_flash.scores import Pairs, Score, is_static

__all__ = ["ALiBi", "RelativeBias", "alibi_slopes"]

Offset = int | np.integer | Shaped
"""The key position that is aligned with query 0: one for all, or () or (batch,) integers."""


def _distance(offset: Offset, batch: Array, q_pos: Array, kv_pos: Array) -> Array:
    """kv_pos - (q_pos + offset), the offset a number or of each batch entry."""
    if isinstance(offset, int | np.integer):
        return kv_pos - (q_pos + offset)
    given = jnp.asarray(offset)
    return kv_pos - (q_pos + (given[batch] if given.ndim else given))


def _check_offset(owner: str, offset: Offset) -> None:
    if isinstance(offset, int | np.integer) and not isinstance(offset, bool):
        return
    if isinstance(offset, int) or is_static(offset):
        given = f"{offset!r}"
    elif _is_of(offset, "integer") and len(offset.shape) <= 1:
        return
    else:
        given = f"{getattr(offset.dtype, 'name', offset.dtype)} of shape {tuple(offset.shape)}"
    raise errors.invalid(f"{owner}.offset must be an integer, or an integer array () or (batch,)", f"offset={given}",
                         "pass the key position that is aligned with query 0")


def _is_of(x: Shaped, kind: Literal["floating", "integer"]) -> bool:
    """Whether an array, or a tensor of PyTorch, which torch_bridge takes, holds such numbers."""
    if errors.is_torch(x):
        name = str(x.dtype)
        return "float" in name if kind == "floating" else "int" in name
    return bool(jnp.issubdtype(x.dtype, jnp.floating if kind == "floating" else jnp.integer))


def _check_array(label: str, x: Shaped, axes: tuple[str, ...]) -> None:
    is_array = hasattr(x, "shape")
    if not is_array or len(x.shape) != len(axes) or not _is_of(x, "floating"):
        given = f"{x.dtype} of shape {tuple(x.shape)}" if is_array else f"type {type(x).__name__}"
        raise errors.invalid(f"{label} must be a floating-point array ({', '.join(axes)}{',' * (len(axes) == 1)})",
                             given, "pass a JAX or NumPy array")


def _require_sizes(owner: str, arrays: Mapping[str, Offset], batch: int, heads: int) -> None:
    """Raises ValueError unless the offset is of `batch` entries, where it is of any, and the other array of `heads`."""
    for name, x in arrays.items():
        wanted, of = (batch, "batch entries") if name == "offset" else (heads, "heads")
        if not isinstance(x, int | np.integer) and x.shape and x.shape[0] != wanted:
            raise errors.invalid(f"{owner}.{name} must be of the {wanted} {of} of query", f"one of {x.shape[0]}",
                                 "give each its own; under shard_map, those of the shard")


@dataclasses.dataclass(frozen=True)
class ALiBi(Score):
    """``score - slopes[head] * |q_pos + offset - kv_pos|`` (Press et al., 2022, arXiv:2108.12409).

    Attributes:
      slopes: (q_heads,), floating-point; they have a gradient. `alibi_slopes` gives those of the paper.
      offset: the key position that is aligned with query 0, as in `Causal`: an integer, or an integer array () or
        (batch,).
    """

    slopes: Shaped
    offset: Offset = 0
    is_additive: ClassVar[bool] = True
    is_relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_array("ALiBi.slopes", self.slopes, ("q_heads",))
        _check_offset("ALiBi", self.offset)

    def require_sizes(self, batch: int, heads: int) -> None:
        _require_sizes("ALiBi", dict(slopes=self.slopes, offset=self.offset), batch, heads)

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        distance = abs(_distance(self.offset, batch, q_pos, kv_pos)).astype(score.dtype)
        return score - jnp.asarray(self.slopes)[head] * distance


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of the paper, (heads,) float32: 2^(-8 i / n) for head i = 1 to n, n a power of two. For another number
    of heads, those of the power of two below it, then every other one of the power above."""
    errors.require_count("heads", heads, 1, "pass the number of query heads")
    power = 1 << (int(heads).bit_length() - 1)
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    rest = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([first, rest]).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RelativeBias(Score):
    """score + table[head, c], c the column of the distance kv_pos - (q_pos + offset); distances beyond the table have
    its first or last column.

    Attributes:
      table: (q_heads, distances), floating-point; it has a gradient. -inf hides pairs.
      zero: the column of distance 0; None: the middle one of an odd number.
      offset: the key position that is aligned with query 0, as in `Causal`: an integer, or an integer array () or
        (batch,).
    """

    table: Shaped
    zero: int | None = None
    offset: Offset = 0
    is_additive: ClassVar[bool] = True
    is_relative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_array("RelativeBias.table", self.table, ("q_heads", "distances"))
        _check_offset("RelativeBias", self.offset)
        if self.zero is not None and (not isinstance(self.zero, int | np.integer) or isinstance(self.zero, bool)):
            raise errors.invalid("RelativeBias.zero must be a Python integer or None", f"zero={self.zero!r}",
                                 "pass the column of distance 0; what changes from call to call is the offset")
        columns = self.table.shape[1]
        if not columns or (self.zero is None and columns % 2 == 0):
            raise errors.invalid("RelativeBias.table must have an odd number of distances, or `zero` be given",
                                 f"table.shape={tuple(self.table.shape)}", "pass the column of distance 0 as zero=")

    @classmethod
    def t5(cls, embedding: Array | np.ndarray, *, bidirectional: bool, max_distance: int = 128,
           offset: Offset = 0) -> "RelativeBias":
        """The relative-position bias of T5 (Raffel et al., 2020, arXiv:1910.10683).

        Args:
          embedding: (buckets, q_heads), floating-point: `relative_attention_bias.weight` in Hugging Face.
          bidirectional: True in an encoder: half of the buckets are of keys after the query. False in a decoder: they
            all have bucket 0.
          max_distance: from which distance on all are of the last bucket.
        """
        _check_array("embedding", embedding, ("buckets", "q_heads"))
        errors.require_bool("bidirectional", bidirectional)
        columns = _t5_buckets(embedding.shape[0], bidirectional, max_distance)
        table = embedding if errors.is_torch(embedding) else jnp.asarray(embedding)
        return cls(table.T[:, columns], offset=offset)

    @property
    def _zero(self) -> int:
        return self.table.shape[1] // 2 if self.zero is None else self.zero

    def require_sizes(self, batch: int, heads: int) -> None:
        _require_sizes("RelativeBias", dict(table=self.table, offset=self.offset), batch, heads)

    def __call__(self, score: Array, batch: Array, head: Array, q_pos: Array, kv_pos: Array) -> Array:
        column = _distance(self.offset, batch, q_pos, kv_pos) + self._zero
        return score + jnp.asarray(self.table)[head, jnp.clip(column, 0, self.table.shape[1] - 1)]

    def expanded(self, q_len: int, kv_len: int) -> Score:
        """A column for each distance that there is: distances along a tile are then one slice, and so are their sums.

        By slices and copies of the ends, so that the gradient is sums in a fixed order.
        """
        if not isinstance(self.offset, int | np.integer):
            return self
        table = jnp.asarray(self.table)
        columns, length = table.shape[1], q_len + kv_len
        lo = self._zero - int(self.offset) - (q_len - 1)  # the column of the first distance
        before = min(max(-lo, 0), length)
        inside = table[:, min(max(lo, 0), columns):max(min(columns, lo + length), 0)]
        after = length - before - inside.shape[1]
        ends = (jnp.broadcast_to(table[:, at:][:, :1], (table.shape[0], n))
                for at, n in ((0, before), (columns - 1, after)))
        first, last = ends
        return _Diagonals(jnp.concatenate([first, inside, last], axis=1), q_len)


def _t5_buckets(buckets: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    """The bucket of each distance from -max_distance to max_distance, in float32 as in the original."""
    distance = np.arange(-max_distance, max_distance + 1)
    count = buckets // 2 if bidirectional else buckets
    exact = count // 2
    if exact < 1 or max_distance <= exact:
        raise errors.invalid("a T5 bias needs 2 buckets a direction or more, and max_distance beyond half of them",
                             f"{buckets=}, {bidirectional=}, {max_distance=}", "pass those of the model")
    far = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    ratio = np.log(np.maximum(far, exact).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact))
    large = np.minimum(exact + (ratio * np.float32(count - exact)).astype(np.int64), count - 1)
    return np.where(far < exact, far, large) + (count * (distance > 0) if bidirectional else 0)


@dataclasses.dataclass(frozen=True)
class _Diagonals(Score):
    """score + terms[head, kv_pos - q_pos + q_len - 1]: a term for each distance of q_len queries and some keys, and one
    more."""

    terms: Array
    q_len: int
    is_additive: ClassVar[bool] = True
    is_relative: ClassVar[bool] = True

    def on_tile(self, score: Float[Array, "b h q s"], pairs: Pairs) -> Float[Array, "b h q s"]:
        heads, rows, columns = score.shape[1:]
        length = rows + columns  # the distances of the tile from its last query to its first key on, and one more
        start = pairs.kv_pos.reshape(-1)[0] - pairs.q_pos.reshape(-1)[-1] + self.q_len - 1
        band = jax.lax.dynamic_slice_in_dim(self.terms, start, length, 1)
        # Row i is the band from rows - 1 - i on: copies of it, one after the other, cut at one less than its length.
        copies = jnp.broadcast_to(band[:, None], (heads, rows, length)).reshape(heads, -1)
        moved = copies[:, rows - 1:rows * length - 1].reshape(heads, rows, length - 1)
        return score + moved[None, :, :, :columns]
