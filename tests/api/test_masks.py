"""Every mask's tile classification against brute force, seen from query tiles and from key tiles.

A classification is sound if no tile with a kept pair is skipped and no tile called full has a dropped pair. It is exact
if, besides, every tile without a kept pair is skipped and every tile that keeps all its pairs is called full.

    Full, Window, Causal, InBounds, PrefixLM   exact;
    SegmentIds                                 exact for packed sequences (see `is_packed`), sound for any ids;
    Dense                                      sound;
    a & b                                      sound; "full" is exact where it is for a and for b; skipping is exact for
                                               windows that meet, and for the bounds of ragged tails with any of these.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import UnsupportedError, check_mask, flash_attention, masks, tiles
from pallas_flash.masks import Bounds, Causal, Dense, Full, InBounds, Mask, PrefixLM, SegmentIds, Window

pytestmark = pytest.mark.optimised  # rounding and memory are the machine code's

BLOCKS = ((1, 1), (1, 3), (3, 1), (2, 3), (4, 4))
SHAPES = ((1, 1), (1, 6), (7, 1), (5, 5), (4, 9), (9, 4), (8, 8))
DIRECTIONS = ("kv", "q")
SKIPPED, PARTIAL, FULL = 0, 1, 2

WINDOWS = [Window(left, right, offset) for left, right, offset in itertools.product(
    (-2, 0, 1, 3, masks.UNBOUNDED), (-3, -1, 0, 2, masks.UNBOUNDED), (-10, -3, 0, 1, 4, 12)) if -left <= right]
IN_BOUNDS = [InBounds(q_len, kv_len) for q_len, kv_len in itertools.product((0, 1, 4, 7, masks.UNBOUNDED), repeat=2)]
PREFIXES = [*(PrefixLM(prefix) for prefix in (0, 1, 3, 4, 9, 20)),
            *(PrefixLM(*given) for given in itertools.product((0, 3, 9), (-10, -2, 1, 6)))]
EXACT = [Full(), *WINDOWS, *IN_BOUNDS, *PREFIXES]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Queries and keys cut into tiles. The keys of ragged tiles are asked about past the end, as kernels do."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int

    def axis(self, direction: str) -> tuple[int, int, int, int]:
        """(length, block, other length, other block) of the tiles that ask, and of the tiles asked about."""
        q, kv = (self.q_len, self.block_q), (self.kv_len, self.block_kv)
        return (*q, *kv) if direction == "kv" else (*kv, *q)

    def keep(self, mask: Mask, direction: str) -> np.ndarray:
        """Which pairs a mask keeps, (asking positions, positions asked about up to the end of the last tile)."""
        length, _, other_length, other_block = self.axis(direction)
        pos, other = np.arange(length)[:, None], np.arange(-(-other_length // other_block) * other_block)[None, :]
        pair = (pos, other) if direction == "kv" else (other, pos)
        return np.broadcast_to(np.asarray(mask.keep(*pair)), (length, other.size))

    def brute_force(self, mask: Mask, direction: str) -> np.ndarray:
        """SKIPPED, PARTIAL or FULL for every tile, (asking tiles, tiles asked about), from `keep` alone."""
        _, block, _, other_block = self.axis(direction)
        keep = self.keep(mask, direction)
        rows = [keep[lo : lo + block] for lo in range(0, keep.shape[0], block)]
        by_tile = [row.reshape(row.shape[0], -1, other_block) for row in rows]
        return np.array([np.where(t.all((0, 2)), FULL, np.where(t.any((0, 2)), PARTIAL, SKIPPED)) for t in by_tile])

    def classified(self, mask: Mask, direction: str) -> np.ndarray:
        """The same from the mask's bounds, by the code that the kernels run."""
        length, block, other_length, other_block = self.axis(direction)
        tile = np.arange(-(-length // block))
        ask = tiles.kv_tiles if direction == "kv" else tiles.q_tiles
        found = ask(mask, tiles.interval(tile, block, length), other_block, other_length)
        return from_ranges(found, tile.size, -(-other_length // other_block))


def from_ranges(ranges: tiles.TileRange, num_tiles: int, num_others: int) -> np.ndarray:
    """SKIPPED, PARTIAL or FULL for every pair of tiles, from one TileRange an asking tile."""
    start, full_start, full_stop, stop = (np.broadcast_to(np.asarray(x), (num_tiles,))[:, None] for x in ranges)
    assert ((start >= 0) & (start <= full_start) & (full_start <= full_stop) & (full_stop <= stop)).all()
    assert (stop <= num_others).all()
    other = np.arange(num_others)[None, :]
    inside = (start <= other) & (other < stop)
    return np.where((full_start <= other) & (other < full_stop), FULL, np.where(inside, PARTIAL, SKIPPED))


def grids(shapes=SHAPES):
    return [Grid(*shape, *blocks) for shape in shapes for blocks in BLOCKS]


def is_sound(found: np.ndarray, truth: np.ndarray) -> bool:
    return bool(((found != SKIPPED) | (truth == SKIPPED)).all() and ((found != FULL) | (truth == FULL)).all())


def is_exact(mask: Mask, shapes=SHAPES) -> bool:
    return all(np.array_equal(grid.classified(mask, direction), grid.brute_force(mask, direction))
               for grid in grids(shapes) for direction in DIRECTIONS)


@pytest.mark.parametrize("kind", ["Full", "Window", "InBounds", "PrefixLM"])
def test_classification_is_exact(kind):
    for mask in EXACT:
        if type(mask).__name__ == kind:
            for grid, direction in itertools.product(grids(), DIRECTIONS):
                found, truth = grid.classified(mask, direction), grid.brute_force(mask, direction)
                assert np.array_equal(found, truth), f"{mask} from {direction} tiles on {grid}:\n{found}\nnot\n{truth}"


def test_causal_is_a_window():
    assert Causal() == Window(right=0)
    assert Causal(offset=3).keep(2, 5)
    assert not Causal(offset=3).keep(2, 6)


@pytest.mark.parametrize("mask", [
    *EXACT[::7], *PREFIXES, Causal(2) & InBounds(3, 6), Window(np.array(1), right=np.array(0)) & PrefixLM(4)], ids=str)
@pytest.mark.parametrize(("q_lo", "kv_lo"), [(0, 0), (3, 0), (0, 2), (5, 4), (2, 7)])
def test_a_mask_of_a_part(mask, q_lo, kv_lo):
    q_pos, kv_pos = np.arange(6)[:, None], np.arange(5)[None, :]
    whole, part = mask.keep(q_pos + q_lo, kv_pos + kv_lo), mask.moved(q_lo, kv_lo)
    assert np.array_equal(np.asarray(part.keep(q_pos, kv_pos)), np.asarray(whole))
    assert mask.parts[1:] or is_exact(part, shapes=((5, 5),))


def test_a_mask_without_moved_says_what_to_define():
    with pytest.raises(UnsupportedError, match=r"SegmentIds.*Define it: the mask whose keep\(q, k\)"):
        SegmentIds(np.zeros(4, int), np.zeros(4, int)).moved(2, 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_positions_stay_32_bit_in_64_bit_mode(x64, direction):
    """Regression: lengths without another bound were int64, which JAX refuses to join with int32 where it is strict."""
    ask = tiles.kv_tiles if direction == "kv" else tiles.q_tiles
    for mask in (InBounds(6, 7), InBounds(6, 7) & PrefixLM(3), InBounds(6, 7) & Causal()):
        def dtypes(lo, mask=mask):
            found = ask(mask, (lo, lo + 2), 3, 8)
            assert {x.dtype for x in found if isinstance(x, jax.Array)} == {np.dtype(np.int32)}
        jax.make_jaxpr(dtypes)(jnp.int32(4))


# Intersections --------------------------------------------------------------------------------------------------------

SOME_OF_EACH = [Full(), Causal(), Causal(-3), Causal(4), Window(1, 2), Window(3, -1, 2), InBounds(4, 7), InBounds(7, 4),
                PrefixLM(3), PrefixLM(9)]


@pytest.mark.parametrize("a", SOME_OF_EACH, ids=str)
def test_intersections_are_sound_and_full_tiles_exact(a):
    for b, grid, direction in itertools.product(SOME_OF_EACH, grids(((4, 9), (8, 8))), DIRECTIONS):
        found, truth = grid.classified(a & b, direction), grid.brute_force(a & b, direction)
        assert is_sound(found, truth), f"{a & b} from {direction} tiles on {grid}"
        assert np.array_equal(found == FULL, truth == FULL), f"{a & b} from {direction} tiles on {grid}"


def test_windows_that_meet_intersect_exactly():
    some = [Causal(), Causal(2), Window(left=3), Window(2, 1), Window(4, 2, 1)]
    assert all(is_exact(a & b, ((4, 9), (8, 8))) for a, b in itertools.product(some, repeat=2))


@pytest.mark.parametrize("mask", [*WINDOWS[::7], *PREFIXES], ids=str)
def test_ragged_tails_cost_no_tile(mask):
    """Tiles are asked about the interval clamped to the real length, so the mask of the tails skips no less."""
    for grid, direction in itertools.product(grids(((5, 5), (4, 9), (9, 4))), DIRECTIONS):
        inside = InBounds(grid.q_len, grid.kv_len)
        found, truth = grid.classified(mask & inside, direction), grid.brute_force(mask & inside, direction)
        assert np.array_equal(found, truth), f"{mask} from {direction} tiles on {grid}"


# Masks that hold arrays -----------------------------------------------------------------------------------------------

def classified_all(stack: Mask, grid: Grid, direction: str) -> np.ndarray:
    """Classifications of a stack of canonical masks, (masks, asking tiles, tiles asked about), in one compiled call."""
    length, block, other_length, other_block = grid.axis(direction)
    ask = tiles.kv_tiles if direction == "kv" else tiles.q_tiles
    tile = jnp.arange(-(-length // block))

    @jax.jit
    @jax.vmap
    def ranges(mask):
        return jax.vmap(lambda t: ask(mask, tiles.interval(t, block, length), other_block, other_length))(tile)

    found = jax.tree.map(np.asarray, ranges(stack))
    return np.stack([from_ranges(tiles.TileRange(*x), tile.size, -(-other_length // other_block)) for x in zip(*found)])


def is_packed(q_ids: np.ndarray, kv_ids: np.ndarray) -> bool:
    """Ids that do not decrease, with no padding but at the end, where both sequences hold the same segments."""
    def laid_out(ids):
        real = ids[ids >= 0]
        return (np.diff(real) >= 0).all() and (ids[: real.size] >= 0).all()
    return bool(laid_out(q_ids) and laid_out(kv_ids) and set(q_ids[q_ids >= 0]) == set(kv_ids[kv_ids >= 0]))


def id_sequences(length: int, ids: range) -> np.ndarray:
    return np.array(list(itertools.product(ids, repeat=length)), np.int32)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("blocks", [(1, 1), (2, 2), (1, 3), (3, 2)], ids=str)
def test_every_short_packing(direction, blocks):
    """All sequences of 4 ids among padding, 0 and 1, for queries and for keys: 81 x 81 masks."""
    ids = id_sequences(4, range(-1, 2))
    q_ids, kv_ids = (x.reshape(-1, 4) for x in np.broadcast_arrays(ids[:, None], ids[None, :]))
    check_packings(q_ids, kv_ids, Grid(4, 4, *blocks), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_longer_packings(direction):
    rng = np.random.default_rng(0)
    starts = rng.random((2000, 11)) < 0.25
    kv_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    q_ids = kv_ids[:, -7:].copy()
    q_ids[rng.random(q_ids.shape) < 0.02] = -1
    check_packings(q_ids, kv_ids, Grid(7, 11, 3, 2), direction)


def check_packings(q_ids: np.ndarray, kv_ids: np.ndarray, grid: Grid, direction: str) -> None:
    """Asserts that the classification of every pair of id sequences is sound, and exact where both are packed."""
    inside = InBounds(grid.q_len, grid.kv_len)
    found = classified_all(SegmentIds(q_ids[:, None, None], kv_ids[:, None, None]) & inside, grid, direction)
    exact = 0
    for classes, q, kv in zip(found, q_ids, kv_ids, strict=True):
        truth = grid.brute_force(_ids_as_dense(q, kv, grid) & inside, direction)
        assert is_sound(classes, truth), f"{q=} {kv=} from {direction} tiles on {grid}"
        if is_packed(q, kv):
            exact += 1
            assert np.array_equal(classes, truth), f"{q=} {kv=} from {direction} tiles on {grid}:\n{classes}\n{truth}"
    assert exact > 20


@dataclasses.dataclass(frozen=True)
class HostDense(Mask):
    """A boolean numpy array, read on the host: what brute force compares with."""

    attend: Any

    def keep(self, q_pos, kv_pos):
        rows, columns = self.attend.shape
        return self.attend[np.minimum(q_pos, rows - 1), np.minimum(kv_pos, columns - 1)]


def _ids_as_dense(q_ids: np.ndarray, kv_ids: np.ndarray, grid: Grid) -> HostDense:
    return HostDense((q_ids[:, None] == kv_ids[None, :]) & (q_ids[:, None] >= 0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_dense_is_sound(direction):
    attend = np.random.default_rng(0).random((50, 1, 1, 5, 6)) < 0.7
    attend[0], attend[1] = True, False
    grid = Grid(5, 6, 2, 3)
    found = classified_all(Dense(attend), grid, direction)
    assert all(is_sound(classes, grid.brute_force(HostDense(a[0, 0]), direction)) for classes, a in zip(found, attend))


BATCHED = {
    "per-batch bounds": lambda pick: InBounds(pick([0, 3, 8]), pick([8, 0, 5])) & Causal(),
    "per-batch offset": lambda pick: Window(2, 1, pick([-4, 0, 5])),
    "per-batch window": lambda pick: Window(pick([0, 2, 7]), pick([0, 3, 1])),
    "per-batch prefix": lambda pick: PrefixLM(pick([0, 3, 9])),
    "bounds and prefix": lambda pick: PrefixLM(pick([0, 3, 9])) & InBounds(kv_len=pick([8, 1, 6])),
    "segments": lambda pick: Causal() & SegmentIds(
        pick([[0] * 8, [0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, -1, -1]]),
        pick([[0] * 8, [0, 0, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, -1]])),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_shares_sound_tiles(name, direction):
    """One loop serves the batch: its tiles must be sound for every element, and for one element what they are alone."""
    make, grid = BATCHED[name], Grid(8, 8, 2, 3)
    shared = classified_all(_stacked([make(np.array).canonical()]), grid, direction)[0]
    for element in range(3):
        alone = make(lambda values, element=element: np.array(values[element : element + 1])).canonical()
        plain = make(lambda values, element=element: np.array(values)[element])
        truth = grid.brute_force(plain, direction)
        assert is_sound(shared, truth)
        assert is_sound(classified_all(_stacked([alone]), grid, direction)[0], truth)
        assert (shared >= np.minimum(truth, PARTIAL)).all()


def _stacked(some: list[Mask]) -> Mask:
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *some)


# The checker itself ---------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Mutant(Mask):
    """A mask with one of its bounds moved by `shift` positions, seen from one side."""

    mask: Mask
    direction: str
    bound: str
    shift: int

    def _moved(self, bounds: Bounds, direction: str) -> Bounds:
        moved = {self.bound: getattr(bounds, self.bound) + self.shift} if direction == self.direction else {}
        return bounds._replace(**moved)

    def keep(self, q_pos, kv_pos):
        return self.mask.keep(q_pos, kv_pos)

    def kv_bounds(self, q_lo, q_hi):
        return self._moved(self.mask.kv_bounds(q_lo, q_hi), "kv")

    def q_bounds(self, kv_lo, kv_hi):
        return self._moved(self.mask.q_bounds(kv_lo, kv_hi), "q")


def mutants(mask: Mask, bounds=Bounds._fields):
    return [Mutant(mask, *change) for change in itertools.product(DIRECTIONS, bounds, (-1, 1))]


@pytest.mark.parametrize(
    "mutant", [*mutants(Window(3, 2)), *mutants(Window(3, 2, -1)), *mutants(Window(2, 0, 2))], ids=str)
def test_a_window_off_by_one_is_caught(mutant):
    assert is_exact(mutant.mask, ((8, 8),))
    assert not is_exact(mutant, ((8, 8),))


@pytest.mark.parametrize("mutant", [
    *(m for m in mutants(PrefixLM(3), ("full_hi", "hi")) if m.direction == "kv"),
    *(m for m in mutants(PrefixLM(3), ("lo", "full_lo")) if m.direction == "q" and m.shift > 0),
    *mutants(InBounds(7, 6), ("full_hi", "hi")),
    *(m for m in mutants(InBounds(7, 6), ("lo", "full_lo")) if m.shift > 0)], ids=str)
def test_other_bounds_off_by_one_are_caught(mutant):
    """Every bound that is not at the start of the sequences, or without end."""
    assert is_exact(mutant.mask, ((8, 8), (9, 4)))
    assert not is_exact(mutant, ((8, 8), (9, 4)))


# check_mask -----------------------------------------------------------------------------------------------------------

ARRAYED = [Window(left=np.array([1, 3]), right=2), InBounds(kv_len=np.array([0, 5])), PrefixLM(np.array([2, 9])),
           SegmentIds(np.array([[0, 0, 1, 1, 2, -1], [1, 0, 1, 0, -1, 2]]), np.array([[0, 1, 1, 2, 2, 2, -1]] * 2)),
           Dense(np.random.default_rng(0).random((2, 3, 6, 7)) < 0.5)]


@pytest.mark.parametrize("mask", [*SOME_OF_EACH, *WINDOWS[::9], *ARRAYED, Causal() & Dense(np.eye(6, 7, dtype=bool))],
                         ids=str)
def test_check_mask_passes_what_is_right(mask):
    check_mask(mask, 6, 7)


@pytest.mark.parametrize(
    "mutant", [*mutants(Window(3, 2, -1)), *mutants(PrefixLM(3)), *mutants(InBounds(5, 6))], ids=str)
def test_check_mask_raises_where_a_bound_is_wrong_and_nowhere_else(mutant):
    unsound = [not is_sound(grid.classified(mutant, direction), grid.brute_force(mutant, direction))
               for grid, direction in itertools.product(grids(((7, 8),)), DIRECTIONS)]
    if any(unsound):
        with pytest.raises(ValueError, match=rf"^Mutant.{mutant.direction}_bounds of the tile of .* as {mutant.bound}"):
            check_mask(mutant, 7, 8)
    elif mutant.shift == (-1 if mutant.bound in ("lo", "full_hi") else 1):  # looser
        check_mask(mutant, 7, 8)


@pytest.mark.parametrize(("q", "kv"), [(0, 1), (1, 0), (1, 1)])
def test_check_mask_catches_a_mask_that_moves_wrongly(q, kv):
    @dataclasses.dataclass(frozen=True)
    class Odd(Window):
        def moved(self, q_lo, kv_lo):
            return Odd(self.left, self.right, self.offset + q * q_lo - kv * kv_lo)
    if (q, kv) == (1, 1):
        check_mask(Odd(3, 2, 1), 20, 23)
    else:
        with pytest.raises(ValueError, match=r"Odd\.moved\(.*must keep of the pair"):
            check_mask(Odd(3, 2, 1), 20, 23)


def test_check_mask_names_the_tile_the_bound_and_what_keep_says():
    with pytest.raises(ValueError) as error:
        check_mask(Causal() & Mutant(Window(left=3), "kv", "lo", 1), 9, 9)
    assert str(error.value) == (
        "Mutant.kv_bounds of the tile of queries [3, 4) must give at most 0 as lo, or a pair that attends is skipped, "
        "got kv_bounds(3, 4)=Bounds(lo=1, full_lo=0, full_hi=1073741828, hi=1073741828), keep(q_pos=3, kv_pos=0)=True. "
        "Mend the bounds, or leave both methods out: then nothing is skipped.")


def rule(keep, kv_bounds=None):
    """A class of masks from plain functions, and one of it."""
    methods = {"keep": lambda self, q_pos, kv_pos: keep(q_pos, kv_pos)}
    if kv_bounds is not None:
        methods["kv_bounds"] = lambda self, lo, hi: kv_bounds(lo, hi)
    return dataclasses.dataclass(frozen=True)(type("Rule", (Mask,), methods))()


CAUSAL = lambda q_pos, kv_pos: kv_pos <= q_pos
NOT_A_MASK = {
    "Rule.keep must return booleans": rule(lambda q_pos, kv_pos: q_pos - kv_pos),
    "Rule.keep must return booleans of the shape": rule(lambda q_pos, kv_pos: masks.maximum(q_pos, kv_pos)[None] > 3),
    "Rule.keep must work on traced positions": rule(lambda q_pos, kv_pos: kv_pos <= int(np.max(q_pos))),
    "Rule.kv_bounds must work on traced positions, got error=TracerBoolConversionError": rule(
        CAUSAL, lambda lo, hi: Bounds(0, 0, lo + 1 if np.all(lo > 3) else 0, hi)),
    "Rule.kv_bounds must return integers": rule(CAUSAL, lambda lo, hi: Bounds(0, 0, (lo + 1) / 2, hi)),
    "Rule.kv_bounds must give the same for plain and for traced": rule(CAUSAL, lambda lo, hi: Bounds(
        0, 0, 0, hi + (2 if isinstance(hi, np.ndarray) else 0))),
}


@pytest.mark.parametrize(("message", "mask"), NOT_A_MASK.items(), ids=NOT_A_MASK)
def test_check_mask_names_other_mistakes(message, mask):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, 5, 6)


# Asking ---------------------------------------------------------------------------------------------------------------

def test_a_mask_without_bounds_skips_nothing():
    """Regression: an empty NotImplementedError."""
    mask = rule(lambda q_pos, kv_pos: (q_pos + kv_pos) % 3 > 0)
    check_mask(mask, 6, 7)
    for grid, direction in itertools.product(grids(((8, 8),)), DIRECTIONS):
        assert (grid.classified(mask, direction) == PARTIAL).all()
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 130, 2, 8)).astype(np.float32)
    results = [jax.vjp(lambda *qkv, name=name: flash_attention(*qkv, mask=mask, implementation=name), q, k, v)
               for name in ("xla", "reference")]
    for ours, wanted in zip(*(jax.tree.leaves((out, vjp(v))) for out, vjp in results)):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [int, np.int32, np.int64, np.uint32])
def test_far_windows(kind):
    """Numbers beyond any sequence mean "unlimited", and are cut so that their sums fit int32.

    Regression: an offset's `limit` of 2^30 for 2^29 passed, and Window(right=2**31 - 1, offset=2**31 - 1) was wrong.
    """
    far, q_pos, kv_pos = 2**31 - 1, np.arange(4), np.arange(5)
    for left, right, offset in itertools.product((0, far), (0, far), (-far, 0, far)):
        if kind is np.uint32 and offset < 0:
            continue
        distance = kv_pos - (q_pos[:, None] + offset)  # int64: exact
        wanted = ((left == far) | (-left <= distance)) & ((right == far) | (distance <= right))
        mask = Window(*(x if kind is int else np.array([x], kind) for x in (left, right, offset))).canonical()
        keep, bounds = (masks.over_batch(mask, ask) for ask in (
            lambda part: part.keep(jnp.arange(4)[:, None], jnp.arange(5)[None, :]),
            lambda part: part.kv_bounds(jnp.int32(0), jnp.int32(4))))
        assert np.array_equal(keep[0, 0], wanted), (left, right, offset)
        lo, hi = np.clip([int(bounds[0][0, 0]), int(bounds[3][0, 0])], 0, 5)
        assert not wanted[:, :lo].any() and not wanted[:, hi:].any(), (left, right, offset)


# tiles.py -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mask", [Full(), Causal(), Window(3, 2, 1), PrefixLM(5) & InBounds(9, 10)], ids=str)
def test_traced_ranges_equal_plain_ones(mask):
    ask = jax.jit(lambda tile: (tiles.kv_tiles(mask, tiles.interval(tile, 2, 9), 3, 11),
                                tiles.q_tiles(mask, tiles.interval(tile, 3, 11), 2, 9)))
    for tile in range(4):
        plain = (tiles.kv_tiles(mask, tiles.interval(tile, 2, 9), 3, 11),
                 tiles.q_tiles(mask, tiles.interval(tile, 3, 11), 2, 9))
        assert jax.tree.map(int, ask(tile)) == jax.tree.map(int, plain)


@pytest.mark.parametrize("traced", [False, True])
def test_sweep_visits_every_tile_once_partial_ones_first(traced):
    def visit(ranges):
        def step(tile, carry, masked):
            log, count = carry
            return log.at[count].set(jnp.array([tile, int(masked)])), count + 1
        return tiles.sweep(tiles.TileRange(*ranges), step, (jnp.full((8, 2), -1), jnp.int32(0)))

    run = jax.jit(visit) if traced else visit
    for ranges in itertools.combinations_with_replacement(range(6), 4):
        start, full_start, full_stop, stop = ranges
        log, count = run(ranges)
        assert int(count) == stop - start
        expected = sorted(([tile, not full_start <= tile < full_stop] for tile in range(start, stop)),
                          key=lambda visit: not visit[1])
        assert np.array_equal(np.asarray(log)[: stop - start], np.array(expected, int).reshape(-1, 2))
        if not traced and sum(ranges) > 8:
            break  # each plain range compiles its own loops


@pytest.mark.parametrize("seed", range(20))
def test_smallest_covering(seed):
    rng = np.random.default_rng(seed)
    size, count = rng.integers(1, 40), rng.integers(0, 30)
    begin = rng.integers(0, size, count)
    end = np.minimum(begin + rng.integers(0, size + 1, count), size)
    value = rng.integers(-99, 99, count)
    wanted = [min((int(v) for b, e, v in zip(begin, end, value) if b <= i < e), default=np.iinfo(np.int64).max)
              for i in range(size)]
    assert tiles.smallest_covering(begin, end, value, int(size)).tolist() == wanted


def test_sweep_of_a_plain_empty_range_traces_nothing():
    def step(tile, carry, masked):
        assert not masked, "the partial segments are empty"
        return carry + tile
    assert int(tiles.sweep(tiles.TileRange(1, 1, 4, 4), step, jnp.int32(0))) == 6


def test_sweep_of_partial_tiles_alone_traces_no_other_step():
    def step(tile, carry, masked):
        assert masked, "all tiles are partial"
        return carry + tile

    @jax.jit
    def traced(start, full_start, full_stop, stop):
        needed = tiles.all_partial(tiles.TileRange(start, full_start, full_stop, stop))
        return tiles.sweep(needed, step, jnp.int32(0))
    assert int(traced(1, 2, 3, 5)) == 10


@pytest.mark.parametrize("kind", ["Full", "Window", "InBounds", "PrefixLM"])
def test_attended_pairs(kind):
    for mask, (q_len, kv_len) in itertools.product(EXACT, SHAPES):
        if type(mask).__name__ == kind:
            expected = Grid(q_len, kv_len, 1, 1).keep(mask, "kv").sum()
            assert tiles.attended_pairs(mask, q_len, kv_len) == expected, f"{mask} {q_len=} {kv_len=}"


def test_attended_pairs_of_intersections():
    for a, b in itertools.product(SOME_OF_EACH, repeat=2):
        assert tiles.attended_pairs(a & b, 8, 9) == Grid(8, 9, 1, 1).keep(a & b, "kv").sum(), f"{a & b}"


def test_attended_pairs_of_long_sequences_are_counted_from_bounds():
    n = 1 << 19
    assert tiles.attended_pairs(Causal(), n, n) == n * (n + 1) // 2
    assert tiles.attended_pairs(Full(), n, n) == n * n


@pytest.mark.parametrize("block", [1, 3, 8])
def test_interval_is_clamped(block):
    for length in (1, 5, 8, 9):
        count = tiles.cdiv(length, block)
        pos = [p for tile in range(count) for p in range(*tiles.interval(tile, block, length))]
        assert pos == list(range(length))


def test_over_batch_joins_parts_of_different_batch_axes():
    dense = np.random.default_rng(0).random((1, 3, 4, 4)) < 0.5
    mask = (PrefixLM(np.array([1, 3])) & Dense(dense)).canonical()
    pos = jnp.arange(4)
    bounds = masks.over_batch(mask, lambda part: part.kv_bounds(0, 4))
    assert np.broadcast_shapes(*(x.shape for x in bounds)) == (2, 3)
    keep = masks.over_batch(mask, lambda part: part.keep(pos[:, None], pos[None, :]))
    prefix = np.stack([np.asarray(PrefixLM(n).keep(pos[:, None], pos[None, :])) for n in (1, 3)])
    assert np.array_equal(keep, prefix[:, None] & dense)
