"""Dropout: Threefry itself, the statistics of its bits, and that every implementation drops the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree, normal
from jax.extend.random import threefry_2x32 as jax_threefry

from pallas_flash import Causal, Full, autodiff, dropout, flash_attention
from pallas_flash.kernels.xla import schedule
from pallas_flash.spec import AttentionSpec, Operands, Results

pytestmark = pytest.mark.usefixtures("small_tiles")

# Random123's known answers for threefry2x32, 20 and 13 rounds (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    (20, (0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    (20, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    (20, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    (13, (0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x9D1C5EC6, 0x8BD50731)),
    (13, (0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
    (13, (0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "wanted"), KNOWN_ANSWERS)
def test_known_answers(rounds, counter, key, wanted):
    words = [tuple(np.array(word, np.uint32) for word in pair) for pair in (key, counter)]
    with np.errstate(over="ignore"):
        found = dropout.threefry_2x32(*words, rounds=rounds)
    assert tuple(int(x) for x in found) == wanted


def test_20_rounds_are_those_of_jax():
    bits = np.random.default_rng(0).integers(0, 2**32, (4, 64), dtype=np.uint32)
    key, counter = (bits[0, 0], bits[1, 0]), (bits[2], bits[3])
    found = jnp.concatenate(dropout.threefry_2x32(key, counter))
    assert np.array_equal(found, jax_threefry(jnp.array(key), jnp.concatenate(counter)))


# Which weights drop: the definition, in plain Python, and what it gave in the first release --------------------------

def threefry(key, counter, rounds):
    """Threefry-2x32 as the paper writes it, in Python's integers."""
    mask, (x0, x1) = 2**32 - 1, counter
    words = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    rotations = (13, 15, 26, 6, 17, 29, 16, 24)
    for i in range(rounds):
        if i % 4 == 0:  # a subkey is added before each four rounds
            x0, x1 = (x0 + words[i // 4 % 3]) & mask, (x1 + words[(i // 4 + 1) % 3] + i // 4) & mask
        x0 = (x0 + x1) & mask
        x1 = ((x1 << rotations[i % 8] | x1 >> 32 - rotations[i % 8]) & mask) ^ x0
    if rounds % 4 == 0:
        x0, x1 = (x0 + words[rounds // 4 % 3]) & mask, (x1 + words[(rounds // 4 + 1) % 3] + rounds // 4) & mask
    return x0, x1


def is_kept(seed, batch, head, q, k, rate):
    """One draw of four numbers of 16 bits for the pairs of q, q + 8 and k, k + 8."""
    (q_square, q_row, q_in), (k_square, k_column, k_in) = ((p // 16, p // 8 % 2, p % 8) for p in (q, k))
    key = threefry(seed, (batch, head), 20)
    word = threefry(key, (8 * q_square + q_in, 8 * k_square + k_in), 13)[q_row]
    return (word // 2**16 if k_column else word % 2**16) >= round(rate * 2**16)


SEED, RATE, SIDE = (0x243F6A88, 0x85A308D3), 0.3, 16
GOLDEN = {  # (batch, head): bit 16 * q + k, from the least significant, is 1 where the weight of (q, k) is kept
    (0, 0): 0x33C96EF587F615BFBFDC7CBBB7EFBC7AAAF4535F57AF16FF9B8CEDDE7ACFBF3E,
    (0, 1): 0xDFA3BEFD2B9FB70DF1578F3E33A45AAFBEFDEE9F95DF36F6ED51B7FEB51D7C1A,
    (1, 0): 0xF3C7BBFEAB13F71FE5F565E1F1F7FF48DFDB6FF37FEBFFD3BFC1FAFB6F6BD76F,
    (3, 7): 0xF3FF3D35DFFB3E8DB3EFCF0FB69D9FDBF3ED77973E297FD796FBEC669FEFDDF5,
}


def as_number(kept):
    """The bits of (16, 16) booleans."""
    return sum(int(bit) << i for i, bit in enumerate(np.asarray(kept).ravel()))


@pytest.mark.parametrize("place", GOLDEN)
def test_the_same_weights_drop_in_every_release(place):
    """A stored number, against the rule of this project: one seed must drop the same weights for ever, and nothing else
    tells. The mutation of 13 rounds to 12 passed all other tests.
    """
    defined = [[is_kept(SEED, *place, q, k, RATE) for k in range(SIDE)] for q in range(SIDE)]
    assert as_number(defined) == GOLDEN[place]
    assert as_number(keep(SEED, 4, 8, SIDE, SIDE, RATE)[place]) == GOLDEN[place]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_attention_drops_those_weights(implementation):
    """With equal scores and the unit vectors as values, the output is the kept weights."""
    q = np.zeros((4, SIDE, 8, 2), np.float32)
    v = np.broadcast_to(np.eye(SIDE, dtype=np.float32)[:, None], (4, SIDE, 8, SIDE))
    rng = np.array(SEED, np.uint32)
    out = flash_attention(q, q, v, dropout_rate=RATE, dropout_rng=rng, implementation=implementation)
    for (batch, head), golden in GOLDEN.items():
        assert as_number(out[batch, :, head] > 0) == golden


def test_far_places_follow_the_definition():
    """Also past 2^16 queries and keys, and past 2^16 batch elements and heads."""
    places = np.random.default_rng(0).integers(0, [2**20, 2**17, 2**30, 2**30], (64, 4))
    found = compiled_keep(np.array(SEED, np.uint32), *places.T.astype(np.uint32), RATE)
    assert np.asarray(found).tolist() == [is_kept(SEED, *map(int, place), RATE) for place in places]


@functools.cache
def keep(seed, batch, heads, q_len, kv_len, rate):
    grid = np.ogrid[:batch, :heads, :q_len, :kv_len]
    return np.asarray(compiled_keep(np.array(seed, np.uint32), *grid, rate))


compiled_keep = jax.jit(dropout.keep, static_argnums=5)


def is_fair(kept, rate):
    """Whether the number of weights kept is within 5 standard deviations of what independent draws would keep."""
    deviation = np.sqrt(kept.size * rate * (1 - rate))
    return abs(kept.sum() - kept.size * (1 - rate)) <= 5 * deviation


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_rate(rate):
    kept = keep((1, 2), 4, 4, 128, 128, rate)
    assert is_fair(kept, rate)
    for axis in range(4):  # no batch, head, row or column is treated apart
        others = tuple(i for i in range(4) if i != axis)
        counts = kept.sum(others)
        size = kept.size // kept.shape[axis]
        assert np.abs(counts - size * (1 - rate)).max() <= 6 * np.sqrt(size * rate * (1 - rate)) + 1


@pytest.mark.parametrize("step", [1, 2, 8, 16])
@pytest.mark.parametrize("axis", range(4))
def test_neighbours_are_independent(axis, step):
    """Two weights some steps apart along any axis agree half of the time at rate 1/2, also those of one draw (8)."""
    kept = keep((3, 4), 4, 4, 128, 128, 0.5) if axis > 1 else keep((3, 4), 20, 20, 16, 16, 0.5)
    before, after = (np.take(kept, range(i, kept.shape[axis] - step + i), axis) for i in (0, step))
    assert is_fair(before == after, 0.5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_pairs_of_a_draw_are_independent(rate):
    """All sixteen patterns of {q, q + 8} x {k, k + 8} come as often as they would by four independent draws."""
    kept = keep((1, 2), 4, 4, 128, 128, rate)
    squares = kept.reshape(16, 8, 2, 8, 8, 2, 8)  # (batch and head, q square, q & 8, q & 7, k square, k & 8, k & 7)
    four = np.moveaxis(squares, (2, 5), (-2, -1)).reshape(-1, 4)
    counts = np.bincount(four @ [1, 2, 4, 8], minlength=16)
    ones = np.array([number.bit_count() for number in range(16)])
    expected = len(four) * (1 - rate) ** ones * rate ** (4 - ones)
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared of 15 degrees: 1 in 10,000 is above 44.3


def test_no_symmetry_of_positions():
    kept = keep((3, 4), 4, 4, 128, 128, 0.5)
    assert is_fair(kept[0, 0] == kept[0, 0].T, 0.5)
    assert is_fair(kept[0, 0] == kept[0, 1].T, 0.5)


@pytest.mark.parametrize("other", [(7, 9), (8, 8), (8, 7)])
def test_seeds_are_independent(other):
    assert is_fair(keep((7, 8), 4, 4, 128, 128, 0.5) == keep(other, 4, 4, 128, 128, 0.5), 0.5)


def test_a_higher_rate_drops_more_of_the_same():
    low, high = (keep((1, 2), 4, 4, 128, 128, rate) for rate in (0.1, 0.5))
    assert not (high & ~low).any()


# Rates ----------------------------------------------------------------------------------------------------------------

def test_the_keep_rate_is_a_multiple_of_one_in_65536():
    assert dropout.keep_rate(0.1) == 58982 / 65536
    assert dropout.factor(0.1) == 65536 / 58982
    assert (dropout.keep_rate(0.25), dropout.factor(0.25)) == (0.75, 4 / 3)
    for rate in np.random.default_rng(0).random(100):
        assert abs(dropout.keep_rate(rate) - (1 - rate)) <= 2**-17


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_weights_are_scaled_by_the_exact_keep_rate(implementation, x64):
    """Regression: by 1 / (1 - rate), their mean would be off by up to 7.6e-6 of them."""
    q, v = np.zeros((1, 16, 1, 2)), np.eye(16)[None, :, None]
    out = flash_attention(q, q, v, dropout_rate=0.3, dropout_rng=np.array(SEED, np.uint32),
                          implementation=implementation)
    kept = np.unique(np.asarray(out))[1:]
    np.testing.assert_allclose(kept, 65536 / (65536 - 19661) / 16, rtol=1e-14)
    assert abs(kept * 16 * 0.7 - 1).max() > 1e-6


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_smallest_rates_drop_nothing(implementation):
    """Up to 2^-17 the threshold is 0: all weights are kept, and not scaled."""
    rate = 7e-6
    assert (dropout.threshold(rate), dropout.keep_rate(rate), dropout.factor(rate)) == (0, 1.0, 1.0)
    assert keep((1, 2), 4, 4, 128, 128, rate).all()
    call = functools.partial(flash_attention, Q, K, V, dropout_rng=jax.random.key(0), implementation=implementation)
    assert_agree(call(dropout_rate=rate), call())


@pytest.mark.parametrize("rate", [1.0, 1 - 2.0**-18])
def test_the_largest_rates_drop_everything(rate):
    assert (dropout.threshold(rate), dropout.keep_rate(rate), dropout.factor(rate)) == (65536, 0.0, 0.0)
    assert not keep((1, 2), 4, 4, 128, 128, rate).any()
    assert not flash_attention(Q, K, V, dropout_rate=rate, dropout_rng=jax.random.key(0)).any()


def test_rates_0_and_1():
    assert keep((1, 2), 1, 2, 8, 8, 0.0).all()
    assert not keep((1, 2), 1, 2, 8, 8, 1.0).any()
    assert keep((1, 2), 3, 2, 5, 4, 1.0).shape == (3, 2, 5, 4)


# In attention ---------------------------------------------------------------------------------------------------------

Q, K, V = normal(0, 2, 15, 4, 4), normal(1, 2, 15, 2, 4), normal(2, 2, 15, 2, 3)


def results(implementation, *, rate=0.4, layout="BLHD"):
    """out, lse and the gradients of a random function of both."""
    def call(q, k, v):
        return flash_attention(q, k, v, mask=Causal(), dropout_rate=rate, dropout_rng=jax.random.key(0),
                               return_lse=True, layout=layout, implementation=implementation)
    order = (0, 1, 2, 3) if layout == "BLHD" else (0, 2, 1, 3)
    out, vjp = jax.vjp(call, *(jnp.asarray(x.transpose(order)) for x in (Q, K, V)))
    return out, vjp((jnp.asarray(normal(3, *out[0].shape)), jnp.asarray(normal(4, *out[1].shape))))


@pytest.mark.parametrize(("layout", "block"), [("BLHD", 8), ("BHLD", 4)])
def test_xla_drops_what_the_reference_drops(layout, block, monkeypatch):
    """In any layout and whatever the size of its tiles; forward and backward."""
    monkeypatch.setattr(schedule, "TARGET_BLOCK", block)
    assert_agree(results("xla", layout=layout), results("reference", layout=layout))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rate_1_gives_zeros_and_the_lse_of_all_weights(implementation):
    (out, lse), _ = results(implementation, rate=1.0)
    assert not out.any()
    assert_agree(lse, results("reference", rate=0.0)[0][1])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rate_1_gradients_come_from_lse_alone(implementation):
    def lse_alone(q, k, v):
        out, lse = flash_attention(q, k, v, mask=Causal(), return_lse=True, implementation="reference")
        return jnp.zeros_like(out), lse
    out, vjp = jax.vjp(lse_alone, *map(jnp.asarray, (Q, K, V)))
    wanted = vjp((jnp.zeros_like(out[0]), jnp.asarray(normal(4, *out[1].shape))))
    assert_agree(results(implementation, rate=1.0)[1], wanted)


# Parts of a problem ---------------------------------------------------------------------------------------------------

def kept_by(implementation, shape, origin=None):
    """Which weights of a problem (batch, heads, length, length) count in out, and which in dv: with equal scores and
    unit vectors as values and as dout, out and dv are the weights that are kept.
    """
    batch, heads, length, _ = shape
    zeros = jnp.zeros((batch, length, heads, 4))
    unit = jnp.broadcast_to(jnp.eye(length)[:, None], (batch, length, heads, length))
    spec = AttentionSpec.of(zeros, zeros, unit, dropout_rate=RATE, dropout_moved=0 if origin is None else 1)
    seed, origin = jnp.array(SEED, jnp.uint32), None if origin is None else jnp.array(origin, jnp.int32)
    operands = Operands(q=zeros, k=zeros, v=unit, bias=None, score=(), mask=spec.mask, score_integers=(),
                        dropout_seed=seed, dropout_origin=origin, page_table=None)
    found = autodiff.forward(spec, implementation, operands)
    cotangents = Results(unit, jnp.zeros_like(found.stats))
    dv = autodiff.backward(spec, implementation, operands, found, cotangents).dv
    return np.asarray(found.out > 0).transpose(0, 2, 1, 3), np.asarray(dv > 0).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_part_drops_what_the_whole_drops_there(implementation):
    whole, (out, dv) = keep(SEED, 3, 4, 40, 40, RATE), kept_by(implementation, (2, 2, 13, 13), (1, 2, 5, 26))
    assert np.array_equal(out, whole[1:3, 2:4, 5:18, 26:39])
    assert np.array_equal(dv, out)


def test_the_whole_begins_at_0():
    assert np.array_equal(kept_by("xla", (2, 2, 13, 13), (0, 0, 0, 0)), kept_by("xla", (2, 2, 13, 13)))


def test_an_origin_needs_dropout():
    q = jnp.zeros((1, 3, 1, 4))
    operands = Operands(q, q, q, None, (), Full(), (), None, jnp.zeros(4, jnp.int32), None)
    with pytest.raises(ValueError, match=r"dropout_origin must have shape None .* got dropout_origin.shape=\(4,\)"):
        autodiff.forward(AttentionSpec.of(q, q, q), "xla", operands)


def test_rate_0_needs_no_key_and_changes_nothing():
    plain = flash_attention(Q, K, V, mask=Causal())
    assert np.array_equal(plain, flash_attention(Q, K, V, mask=Causal(), dropout_rate=0.0))
    assert np.array_equal(plain, flash_attention(Q, K, V, mask=Causal(), dropout_rate=0, dropout_rng=jax.random.key(1)))


def test_keys():
    """One key gives one result, typed or not; another key another; so does a seed that is given directly."""
    call = jax.jit(lambda rng: flash_attention(Q, K, V, dropout_rate=0.5, dropout_rng=rng, implementation="reference"))
    first = call(jax.random.key(0))
    assert np.array_equal(first, call(jax.random.key(0)))
    assert not np.array_equal(first, call(jax.random.key(1)))
    seeds = [jnp.array(words, jnp.uint32) for words in ((0, 0), (0, 1))]
    assert not np.array_equal(call(seeds[0]), call(seeds[1]))


def test_the_mean_over_keys_is_attention_without_dropout():
    """E[drop(P)] = P: over 400 keys the mean is within 6 of its standard errors of the plain output."""
    q, k, v = (jnp.asarray(x) for x in (Q, K, V))
    plain = flash_attention(q, k, v, implementation="reference")
    call = lambda rng: flash_attention(q, k, v, dropout_rate=0.5, dropout_rng=rng, implementation="reference")
    draws = np.asarray(jax.jit(jax.vmap(call))(jax.random.split(jax.random.key(0), 400)))
    errors = (draws.mean(0) - plain) / (draws.std(0) / np.sqrt(400))
    assert np.abs(errors).max() <= 6
