"""The order of a sequence that is cut over devices: which rows each holds, so that all have equal work.

Under a causal mask the last queries see the most keys. With "zigzag" the sequence is cut into 2 n pieces, and device i
of n holds the pieces i and 2 n - 1 - i: one early, one late. With "zigzag_documents" each document of a packed row is
cut so. The devices then hold equal parts, one after the other, of a reordered axis.
"""

import operator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_flash import arguments, errors, sharding
from pallas_flash.arguments import Boundaries

__all__ = ["LOAD_BALANCES", "LoadBalance", "boundaries", "positions", "reorder", "require_integers", "rise"]

LoadBalance = Literal["zigzag", "zigzag_documents"] | None
"""How a sequence is cut over devices; None: into n equal parts in their own order."""
LOAD_BALANCES = ("zigzag", "zigzag_documents", None)


def reorder[A: (np.ndarray, jax.Array)](
    x: A, n: int, axis: int = 1, *, inverse: bool = False, load_balance: LoadBalance = "zigzag",
    cu_seqlens: Boundaries | None = None,
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
    starts = boundaries(n, x.shape[axis], load_balance, cu_seqlens)
    if load_balance is None:
        return x
    pieces, size = _pieces(n, starts)
    pieces = np.argsort(pieces) if inverse else pieces
    cut = (*x.shape[:axis], len(pieces), size, *x.shape[axis + 1:])
    if isinstance(x, np.ndarray):
        return np.take(x.reshape(cut), pieces, axis=axis).reshape(x.shape)

    def take(x: jax.Array) -> jax.Array:
        if load_balance == "zigzag":
            return _zigzag(x, n, axis, inverse)
        return jnp.take(x.reshape(cut), pieces, axis=axis, unique_indices=True).reshape(x.shape)
    return sharding.automatic(take, jax.typeof(x).sharding.spec, x)


def _zigzag(x: jax.Array, n: int, axis: int, inverse: bool) -> jax.Array:
    """`reorder` in slices: their transpose is slices again, that of reading at indices a scatter."""
    before, piece, behind = x.shape[:axis], x.shape[axis] // (2 * n), x.shape[axis + 1:]
    split = (n, 2) if inverse else (2, n)
    halves = x.reshape(*before, *split, piece, *behind)
    halves_axis = axis + 1 if inverse else axis
    early, late = (jax.lax.index_in_dim(halves, half, halves_axis, keepdims=False) for half in (0, 1))
    joined = jnp.stack([early, jnp.flip(late, axis)], axis if inverse else axis + 1)
    return joined.reshape(x.shape)


def positions(
    axis_name: str, length: int, *, load_balance: LoadBalance = "zigzag", cu_seqlens: Boundaries | None = None,
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
      load_balance, cu_seqlens: as in `reorder`; cu_seqlens is that of the whole row. It may be traced, so that one
        program serves all batches: repeat its last number to fill it up to a fixed number of documents. What it holds
        is then not checked.

    Raises:
      ValueError: outside of `shard_map` over `axis_name`, or for lengths that do not divide, as in `reorder`.
    """
    try:
        n, device = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    except NameError as error:
        raise errors.invalid("positions must be called inside shard_map over axis_name", f"{axis_name=} and no such "
                             "axis here", "elsewhere, use reorder(np.arange(S), n, axis=0)") from error
    rows = jnp.arange(operator.index(length), dtype=jnp.int32)
    if isinstance(cu_seqlens, jax.core.Tracer) and load_balance == "zigzag_documents":
        starts = cu_seqlens.astype(jnp.int32)
    else:
        starts = jnp.asarray(boundaries(n, n * length, load_balance, cu_seqlens), jnp.int32)
    if load_balance is None:
        return device * length + rows
    document = jnp.searchsorted(starts // n, rows, side="right") - 1
    start, piece = starts[document], (starts[document + 1] - starts[document]) // (2 * n)
    inside = rows - start // n  # its two pieces of this document, one after the other
    return start + jnp.where(inside < piece, device * piece, (2 * n - 2 - device) * piece) + inside


def boundaries(n: int, length: int, load_balance: LoadBalance, cu_seqlens: Boundaries | None) -> np.ndarray:
    """Where the documents begin and end, from 0 to length; one document unless they are balanced. All are checked."""
    errors.require_count("n", n, 1, "pass the number of devices along the sequence")
    if load_balance not in LOAD_BALANCES:
        raise errors.invalid('load_balance must be "zigzag", "zigzag_documents" or None', f"{load_balance=}",
                             "pass one of these")
    starts = np.array([0, length])
    if load_balance == "zigzag_documents":
        starts = _documents(length, cu_seqlens)
    elif cu_seqlens is not None:
        raise errors.invalid('cu_seqlens goes with load_balance="zigzag_documents"', f"{load_balance=}",
                             "leave cu_seqlens out, or balance the documents")
    name, cuts = ("n", n) if load_balance is None else ("2 n", 2 * n)
    lengths = np.diff(starts)
    for i in np.flatnonzero(lengths % cuts)[:1]:
        what = f"document {i}" if load_balance == "zigzag_documents" else "the sequence"
        raise errors.invalid(f"the length of {what} must divide by {name} = {cuts} for {load_balance=} and {n=}",
                             f"length {lengths[i]}", f"pad it to {-(-lengths[i] // cuts) * cuts}")
    return starts


def _documents(length: int, cu_seqlens: Boundaries | None) -> np.ndarray:
    if cu_seqlens is None or isinstance(cu_seqlens, jax.core.Tracer):
        raise errors.invalid('cu_seqlens must be on the host for load_balance="zigzag_documents"',
                             "None" if cu_seqlens is None else "a traced array",
                             "pass a list or a NumPy array, where batches are made")
    starts = np.asarray(require_integers(cu_seqlens)).astype(np.int64)
    if not rise(starts) or starts[-1] != length:
        raise errors.invalid(f"cu_seqlens must rise from 0 to the length of the sequence, {length}",
                             f"cu_seqlens={starts.tolist()}", "make padding at the end a document of its own")
    return starts


def require_integers(cu_seqlens: Boundaries) -> np.ndarray | jax.Array:
    """`cu_seqlens` as an array, which may be traced; raises unless it is (documents + 1,) integers."""
    starts = cu_seqlens if isinstance(cu_seqlens, jax.Array) else np.asarray(cu_seqlens)
    if starts.ndim != 1 or starts.shape[0] < 2 or not jnp.issubdtype(starts.dtype, jnp.integer):
        raise errors.invalid("cu_seqlens must be integers (documents + 1,)",
                             f"cu_seqlens with dtype={starts.dtype}, shape={starts.shape}",
                             "pass the first row of each document, and where the last one ends")
    return starts


def rise(starts: np.ndarray) -> bool:
    """Whether boundaries begin at 0 and never fall."""
    return bool(starts[0] == 0 and np.all(np.diff(starts) >= 0))


def _pieces(n: int, starts: np.ndarray) -> tuple[np.ndarray, int]:
    """The reordered sequence as pieces of the original one: their numbers there, and the rows of each."""
    halves = np.diff(starts) // (2 * n)  # rows of each of a device's two pieces of a document
    size = max(1, int(np.gcd.reduce(halves)))
    held = np.stack([np.arange(n), 2 * n - 1 - np.arange(n)], axis=1)[:, :, None]
    of_documents = [start // size + (held * count + np.arange(count)).reshape(n, -1)
                    for start, count in zip(starts, halves // size)]
    return np.concatenate(of_documents, axis=1).reshape(-1), size
