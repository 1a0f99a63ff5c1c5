"""The order of a sequence that is cut over devices: which rows each holds, so that all have equal work.

Under a causal mask the last queries see the most keys. With "zigzag" the sequence is cut into 2 n pieces, and device i
of n holds the pieces i and 2 n - 1 - i: one early, one late. With "zigzag_documents" each document of a packed row is
cut so. The devices then hold equal parts, one after the other, of a reordered axis.
"""

import operator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import arguments, compat, errors, sharding

__all__ = ["LOAD_BALANCES", "LoadBalance", "positions", "reorder"]

LoadBalance = Literal["zigzag", "zigzag_documents"] | None
"""How a sequence is cut over devices; None: into n equal parts in their own order."""
LOAD_BALANCES = ("zigzag", "zigzag_documents", None)


def reorder[A: (np.ndarray, jax.Array)](
    x: A, n: int, axis: int = 1, *, inverse: bool = False, load_balance: LoadBalance = "zigzag", cu_seqlens: Any = None,
) -> A:
    """Puts a sequence into the order in which n devices hold it; `inverse=True` undoes that.

    Whatever has a sequence axis is given to `context_parallel_attention` in this order: reorder tokens, labels,
    segment ids and positions once, where batches are made, and both axes of a bias.

    Args:
      x: a NumPy array, which stays one, or a JAX array.
      n: the number of devices along the sequence's axis of the mesh.
      axis: the sequence axis of x, its length S.
      inverse: from the order of the devices to the original one.
      load_balance: "zigzag": device i holds the pieces i and 2 n - 1 - i of the 2 n equal pieces of the sequence.
        "zigzag_documents": device i holds those two pieces of every document, document after document. None: device i
        holds the part i of n; nothing moves.
      cu_seqlens: for "zigzag_documents", integers (documents + 1,) on the host, the same for the whole batch: document
        j is the rows from cu_seqlens[j] to cu_seqlens[j + 1]. The first is 0 and the last S.

    Returns:
      An array of the shape, dtype and kind of x.

    Raises:
      ValueError: S, or the length of a document, does not divide by 2 n (by n for None); the message says what to pad
        it to. Or an argument is none of the above.
    """
    arguments.array("x", x)
    if not -x.ndim <= operator.index(axis) < x.ndim:
        raise errors.invalid("axis must be one of x", f"axis={axis}, x.shape={x.shape}", "pass that of the sequence")
    errors.require_bool("inverse", inverse)
    axis %= x.ndim
    order = _Order.of(n, x.shape[axis], load_balance, cu_seqlens)
    if load_balance is None:
        return x
    pieces = np.argsort(order.pieces, axis=None) if inverse else order.pieces.reshape(-1)
    cut = (*x.shape[:axis], len(pieces), order.size, *x.shape[axis + 1:])
    if isinstance(x, np.ndarray):
        return np.take(x.reshape(cut), pieces, axis=axis).reshape(x.shape)
    take = lambda x: jnp.take(x.reshape(cut), pieces, axis=axis, unique_indices=True).reshape(x.shape)
    return sharding.automatic(take, jax.typeof(x).sharding.spec, x)


def positions(
    axis_name: str, length: int, *, load_balance: LoadBalance = "zigzag", cu_seqlens: Any = None,
) -> jax.Array:
    """The positions in the original sequence of the rows that this device holds: int32 (length,).

    For rotary embeddings, inside `shard_map` over `axis_name`. Elsewhere, `reorder(np.arange(S), n, axis=0)` gives
    those of all devices.

    With "zigzag_documents" they count from the start of the packed row, as positions of masks do. Rotary embeddings
    depend on differences alone and need nothing else; what counts from the start of each document (a learned embedding)
    takes it off:

        starts = jnp.asarray(cu_seqlens)
        in_document = rows - starts[jnp.searchsorted(starts, rows, side="right") - 1]  # rows = positions(...)

    Args:
      axis_name: the axis of the mesh over which the sequence is cut.
      length: the number of rows of each device.
      load_balance, cu_seqlens: as in `reorder`; cu_seqlens is that of the whole row.

    Raises:
      ValueError: outside of `shard_map` over `axis_name`, or for lengths that do not divide, as in `reorder`.
    """
    try:
        n, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    except NameError as error:
        raise errors.invalid("positions must be called inside shard_map over axis_name", f"{axis_name=} and no such "
                             "axis here", "elsewhere, use reorder(np.arange(S), n, axis=0)") from error
    order = _Order.of(n, n * operator.index(length), load_balance, cu_seqlens)
    starts = jnp.asarray(order.pieces * order.size, jnp.int32)[device]
    return (starts[:, None] + jnp.arange(order.size, dtype=jnp.int32)[None]).reshape(length)


@dataclass(frozen=True)
class _Order:
    """The reordered sequence as pieces of `size` rows of the original one; `pieces` (n, pieces of a device) numbers
    them.
    """

    pieces: np.ndarray
    size: int

    @classmethod
    def of(cls, n: int, length: int, load_balance: LoadBalance, cu_seqlens: object) -> "_Order":
        if operator.index(n) < 1:
            raise errors.invalid("n must be at least 1", f"{n=}", "pass the number of devices along the sequence")
        if load_balance not in LOAD_BALANCES:
            raise errors.invalid('load_balance must be "zigzag", "zigzag_documents" or None', f"{load_balance=}",
                                 "pass one of these")
        starts = _boundaries(length, load_balance, cu_seqlens)
        cuts = n if load_balance is None else 2 * n
        lengths = np.diff(starts)
        for i in np.flatnonzero(lengths % cuts)[:1]:
            raise _does_not_divide(n, cuts, starts, int(i), load_balance)
        size = max(1, int(np.gcd.reduce(lengths // cuts)))
        held = np.arange(cuts).reshape(n, -1)
        if load_balance is not None:
            held = np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1)
        of_documents = [start // size + (held[:, :, None] * count + np.arange(count)).reshape(n, -1)
                        for start, count in zip(starts, lengths // cuts // size)]
        return cls(np.concatenate(of_documents, axis=1), size)


def _boundaries(length: int, load_balance: LoadBalance, cu_seqlens: object) -> np.ndarray:
    """Where the documents begin and end, from 0 to length; one document unless they are balanced."""
    if load_balance != "zigzag_documents":
        if cu_seqlens is not None:
            raise errors.invalid('cu_seqlens goes with load_balance="zigzag_documents"', f"{load_balance=}",
                                 "leave cu_seqlens out, or balance the documents")
        return np.array([0, length])
    known = cu_seqlens if not isinstance(cu_seqlens, jax.Array) else compat.concrete(cu_seqlens)
    if known is None:
        raise errors.invalid('cu_seqlens must be on the host for load_balance="zigzag_documents"',
                             "None" if cu_seqlens is None else "a traced array",
                             "pass a NumPy array or a list: which rows a device holds is fixed when a program is made")
    starts = np.asarray(known)
    if starts.ndim != 1 or len(starts) < 2 or starts.dtype.kind not in "iu":
        raise errors.invalid("cu_seqlens must be integers (documents + 1,)", f"{cu_seqlens=}",
                             "pass the first row of each document, and the length")
    starts = starts.astype(np.int64)
    if starts[0] != 0 or starts[-1] != length or np.any(np.diff(starts) < 0):
        raise errors.invalid(f"cu_seqlens must rise from 0 to the length of the sequence, {length}",
                             f"cu_seqlens={starts.tolist()}", "make padding at the end a document of its own")
    return starts


def _does_not_divide(n: int, cuts: int, starts: np.ndarray, i: int, load_balance: LoadBalance) -> ValueError:
    length = int(starts[i + 1] - starts[i])
    what = f"the length of document {i}" if load_balance == "zigzag_documents" else "the length of the sequence"
    return errors.invalid(f"{what} must divide by {'n' if cuts == n else '2 n'} = {cuts} for {load_balance=} and {n=}",
                          f"length {length}", f"pad it to {-(-length // cuts) * cuts}")

