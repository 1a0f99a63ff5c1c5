"""The Hopper forward kernel itself on a CPU: Pallas' GPU interpreter runs it, with its race detector, on small shapes.

What the interpreter lacks (products with an operand in registers, named barriers, votes) has its plain meaning inside
`interpreted()`; roles, rings, barriers, masks, tails and indices are those of the real kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # where the interpreter says whether it saw a race

from pallas_flash import device, masks, reference
from pallas_flash import dropout as bits
from pallas_flash.kernels.hopper import defaults, launches, rules
from pallas_flash.kernels.hopper.forward import kernel as forward
from pallas_flash.kernels.mosaic import dropout
from pallas_flash.kernels.mosaic.interpret import interpreted
from pallas_flash.spec import AttentionSpec, Operands

pytestmark = pytest.mark.interpreted
CAUSAL = masks.Causal()
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
SEED = 0x243F6A88, 0x85A308D3


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem of one to three tiles a head, and how its schedule differs from the default."""

    q_len: int
    kv_len: int
    schedule: dict
    mask: masks.Mask = CAUSAL
    heads: tuple[int, int] = (1, 1)
    d: tuple[int, int] = (64, 64)
    layout: str = "BLHD"
    dtype: str = "bfloat16"
    scale: float | None = None
    softcap: float | None = None
    bad_keys: tuple[int, ...] = ()
    jumps: tuple[tuple[int, int, float], ...] = ()  # keys [first, stop): how much higher every second query scores them
    v_scale: float = 1.0
    given_up: bool = False  # whether tiles must be given up and done again
    repaired: bool = False  # whether rows are spoiled even then
    partial: bool = False
    dropout_rate: float = 0.0  # then values are unit vectors, and out is the weights that are kept

    @property
    def seed(self):
        return jnp.array(SEED, jnp.uint32) if self.dropout_rate else None


TIMES = dict(warpgroups=1, block_kv=64, maxima=4)
"""A schedule in which maxima are not taken at the steps 5, 7, 9, 10 and 11 of twelve: key tiles 6, 4, 2, 1 and 0."""
BOUNDED = dict(warpgroups=2, block_kv=64, bounded=True)
CASES = {
    "two-blocks": Case(200, 200, dict(warpgroups=2, block_kv=64), heads=(2, 2)),
    "one-row": Case(1, 1, dict(warpgroups=1, block_kv=64)),
    "ragged": Case(101, 77, dict(warpgroups=2, block_kv=32), masks.Full()),
    "groups-bhld": Case(70, 130, dict(warpgroups=1, block_kv=64), masks.Causal(60), heads=(4, 2), layout="BHLD"),
    "window": Case(300, 300, dict(warpgroups=2, block_kv=32), masks.Window(40, 5)),
    "empty-rows": Case(150, 40, dict(warpgroups=2, block_kv=32), masks.Window(0, 3, -70)),
    "d72-d40": Case(64, 64, dict(warpgroups=1, block_kv=32), d=(72, 40)),
    "d192-in-turns": Case(100, 100, dict(warpgroups=1, block_kv=48, out_chunks=1), d=(192, 128)),
    "over-the-query": Case(130, 130, dict(warpgroups=2, block_kv=64, out_chunks=0, query_buffers=1)),
    "one-stage": Case(300, 300, dict(warpgroups=2, block_kv=32, num_stages=1, query_buffers=1)),
    "softcap": Case(100, 100, dict(warpgroups=1, block_kv=64), softcap=3.0),
    "bounded-window": Case(130, 300, BOUNDED, masks.Window(90, 5, 100), softcap=3.0),
    "bounded-empty-rows-ragged": Case(150, 40, BOUNDED, masks.Window(0, 3, -70), scale=-0.7, softcap=1.0),
    "bounded-low": Case(64, 300, BOUNDED, masks.Full(), jumps=((0, 300, -300.0),), softcap=55.0),
    "bounded-high-and-low": Case(64, 300, BOUNDED, masks.Causal(236), jumps=((0, 100, 300.0), (100, 300, -300.0)),
                                 softcap=55.0),
    "bounded-nan-key": Case(130, 130, BOUNDED, softcap=3.0, bad_keys=(5, 100)),
    "bounded-dropout": Case(110, 110, BOUNDED, heads=(2, 1), d=(64, 112), softcap=3.0, dropout_rate=0.3),
    "negative-scale": Case(100, 100, dict(warpgroups=1, block_kv=64), scale=-0.2),
    "tiny-scale": Case(100, 100, dict(warpgroups=1, block_kv=64), scale=1e-46),
    "large-scores": Case(300, 300, dict(warpgroups=2, block_kv=32), scale=3.0),
    "large-scores-with-slack": Case(300, 300, dict(warpgroups=2, block_kv=32, long_keys=100), scale=3.0),
    "float16": Case(100, 100, dict(warpgroups=1, block_kv=64, slack=0.0), dtype="float16"),
    "within": Case(300, 300, dict(warpgroups=2, block_kv=64, maxima=0, held_columns=0)),
    "at-times": Case(300, 600, TIMES | dict(warpgroups=2), masks.Causal(300)),
    "at-times-window": Case(64, 700, TIMES, masks.Window(500, 20, 640)),
    "grows": Case(64, 768, TIMES, masks.Full(), jumps=((0, 64, 90.0), (64, 128, 60.0), (128, 192, 30.0))),
    "grows-late": Case(64, 768, TIMES | dict(held_columns=16), masks.Full(), jumps=((10, 11, 60.0), (384, 448, 25.0))),
    "overflows": Case(64, 768, TIMES, masks.Full(), jumps=((0, 768, -300.0), (150, 151, -180.0)), given_up=True),
    "overflows-and-falls": Case(64, 768, TIMES, masks.Full(), jumps=((0, 64, 190.0), (150, 151, 120.0)), given_up=True),
    "overflows-last": Case(100, 740, TIMES, masks.Causal(650), jumps=((3, 9, 120.0),), given_up=True),
    "fits": Case(64, 768, TIMES, masks.Full(), jumps=((150, 151, 45.0),)),
    "just-fits-float32": Case(64, 768, TIMES, masks.Full(), jumps=((150, 151, 86.0),), given_up=True),
    "sum-overflows": Case(8, 768, TIMES, masks.Full(), jumps=((0, 64, 88.0),), v_scale=2.0**-20, given_up=True),
    "overflows-here-and-there": Case(830, 830, TIMES | dict(warpgroups=2), jumps=((130, 131, 120.0),), given_up=True),
    "sums-overflow": Case(64, 768, TIMES, masks.Full(), jumps=((10, 11, 61.0),), v_scale=2.0**42, given_up=True),
    "sums-overflow-causal": Case(70, 740, TIMES, masks.Causal(670), jumps=((0, 64, 55.0),), v_scale=2.0**60,
                                 given_up=True),
    "huge-scores": Case(64, 768, TIMES, masks.Full(), scale=1e9, given_up=True, repaired=True),
    "partial-ragged-gqa": Case(70, 77, dict(warpgroups=1, block_kv=64, out_chunks=0), masks.Full(), heads=(2, 1),
                               d=(128, 72), layout="BHLD", partial=True),
    "partial-overflows": Case(64, 768, TIMES, masks.Full(), jumps=((0, 768, -300.0), (150, 151, -180.0)), given_up=True,
                              partial=True),
    "nan-key": Case(130, 130, dict(warpgroups=2, block_kv=64), bad_keys=(5, 100)),
    "at-times-nan-keys": Case(64, 768, TIMES, masks.Causal(704), bad_keys=(740, 765)),
    "at-times-softcap": Case(70, 700, TIMES | dict(num_stages=1), masks.Causal(600), scale=2.0, softcap=80.0),
    "at-times-negative-scale": Case(70, 700, TIMES | dict(warpgroups=2, held_columns=32), masks.Window(600, 3, 630),
                                    scale=-0.7),
    "dropout": Case(110, 110, dict(warpgroups=1, block_kv=64), heads=(2, 1), d=(64, 112), bad_keys=(100,),
                    dropout_rate=0.3),
    "nan-key-window": Case(200, 200, dict(warpgroups=2, block_kv=32), masks.Window(30, 5), heads=(2, 1), layout="BHLD",
                           bad_keys=(60,)),
}


def operands(case):
    """q, k, v, of which no query that attends to none of `bad_keys` may see their values."""
    rng = np.random.default_rng(0)
    shape = (lambda n, h, d: (1, n, h, d)) if case.layout == "BLHD" else (lambda n, h, d: (1, h, n, d))
    sizes = ((case.q_len, case.heads[0], case.d[0]), (case.kv_len, case.heads[1], case.d[0]),
             (case.kv_len, case.heads[1], case.d[1]))
    q, k, v = (rng.standard_normal(shape(*size), np.float32) for size in sizes)
    axis = 1 if case.layout == "BLHD" else 2
    if case.jumps:  # through the first column, which counts for nothing else
        index = lambda positions: (slice(None),) * axis + (positions, ..., 0)
        q[..., 0], k[..., 0] = 0, 0
        q[index(slice(0, None, 2))] = np.sqrt(case.d[0])
        for first, stop, by in case.jumps:
            k[index(slice(first, stop))] = by
    if case.dropout_rate:
        v = np.broadcast_to(np.eye(case.kv_len, case.d[1])[None, :, None], shape(*sizes[2]))
    return [jnp.asarray(x).astype(case.dtype) for x in (q, k, v * case.v_scale)]


def recompute_nothing(block, tile, rows):
    """In place of `forward.repair.recompute`, where nothing needs it."""
    nan = lambda *shape: jnp.full(shape, jnp.nan, jnp.float32)
    return nan(64), nan(64), nan(64, block.spec.d_v)


def run(case, spec, q, k, v):
    default = defaults.default_forward(spec, device.H100)
    schedule = dataclasses.replace(default, **(dict(num_blocks=2, maxima=0) | case.schedule))
    assert rules.reasons_against(spec, schedule, 232_448) == []
    keys = dropout.inputs(spec, Operands(q, k, v, None, (), case.mask, (), case.seed, None, None))
    with interpreted(detect_races=True):
        out, stats = launches.forward(spec, schedule)(q, k, v, *keys)
        out.block_until_ready()
    assert not gpu_callbacks.get_races().races_found
    return out, stats


def rows_last(case, x):
    x = np.asarray(x, np.float64)
    return x if case.layout == "BHLD" else np.swapaxes(x, 1, 2)


@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_the_oracle(name, monkeypatch):
    case = CASES[name]
    if not (case.bad_keys or case.repaired):
        monkeypatch.setattr(forward, "recompute", recompute_nothing)
    if not (case.given_up or case.bad_keys):
        monkeypatch.setattr(forward, "give_up", give_nothing_up)
    check(case)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.given_up])
def test_what_is_given_up_has_to_be(name, monkeypatch):
    monkeypatch.setattr(forward, "give_up", give_nothing_up)
    with pytest.raises(AssertionError, match=r"Mismatched elements|(nan|inf) location"):
        check(CASES[name])


def give_nothing_up(block, tile, rows, spoiled):
    """In place of `forward.give_up`: what is spoiled stays so."""


def check(case):
    q, k, v = operands(case)
    options = dict(layout=case.layout, mask=case.mask, scale=case.scale, softcap=case.softcap,
                   dropout_rate=case.dropout_rate)
    spec = AttentionSpec.of(q, k, v, partial=case.partial, **options)
    bad = list(case.bad_keys)
    axis = 1 if case.layout == "BLHD" else 2
    poisoned = v.at[(slice(None),) * axis + (jnp.asarray(bad, int),)].set(jnp.nan) if bad else v
    out, stats = run(case, spec, q, k, poisoned)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        wide_spec = AttentionSpec.of(*wide, **options)
        results = reference.forward(wide_spec, Operands(*wide, None, (), case.mask, (), case.seed, None, None))
        expected, expected_lse = np.asarray(results[0]), np.asarray(results[1])[:, :, 0]
    keep = np.broadcast_to(case.mask.keep(np.arange(case.q_len)[:, None], np.arange(case.kv_len)[None]),
                           (case.q_len, case.kv_len))
    sees_bad = keep[:, bad].any(axis=1)
    assert out.dtype == spec.result_dtype
    out, expected = rows_last(case, out), rows_last(case, expected)
    largest = np.abs(np.asarray(v, np.float64)).max()
    np.testing.assert_allclose(out[:, :, ~sees_bad], expected[:, :, ~sees_bad], rtol=0,
                               atol=2 * ROUNDING[case.dtype] * largest)
    if case.partial:
        error = lambda x: np.linalg.norm((np.asarray(x, np.float64) - expected)[:, :, ~sees_bad])
        assert error(out) < error(jnp.asarray(out, case.dtype)), "nothing is gained by results in float32"
    assert np.isnan(out[:, :, sees_bad]).all()
    np.testing.assert_allclose(stats[:, :, 0], expected_lse, rtol=1e-5, atol=1e-4)
    assert (out[:, :, ~keep.any(axis=1)] == 0).all()
    if case.dropout_rate:
        kept = bits.keep(case.seed, *np.ogrid[:1, :case.heads[0], :case.q_len, :case.kv_len], case.dropout_rate)
        kept = (np.asarray(kept) & keep)[:, :, ~sees_bad]
        np.testing.assert_array_equal(out[:, :, ~sees_bad, :case.kv_len] > 0, kept)
