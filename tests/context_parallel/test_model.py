"""The cost model of context parallelism: the efficiencies that the design was chosen by, bytes, and the choice."""

import dataclasses

import jax
import numpy as np
import pytest

import pallas_flash
from pallas_flash import device
from pallas_flash.context_parallel import model, plan
from pallas_flash.errors import UnsupportedError


def problem(thousands, n, **changes):
    """One causal layer of 32:8 heads, d 128, bfloat16, on n devices."""
    sizes = dict(batch=1, length=thousands * 1024 // n, n=n, q_heads=32, kv_heads=8, d=128, d_v=128, itemsize=2,
                 share=0.5)
    return model.Problem(**sizes | changes)


MEASURED = [
    # thousands of positions, strategy, efficiency of the forward and of both passes on two H200s (`bench.ring`)
    (32, "ring", 0.840, 0.884), (32, "all_gather", 0.793, 0.852), (32, "all_to_all", 0.820, 0.900),
    (128, "ring", 0.961, 0.971), (128, "all_gather", 0.834, 0.926), (128, "all_to_all", 0.944, 0.979),
]


@pytest.mark.parametrize(("thousands", "strategy", "forward", "both"), MEASURED)
def test_efficiency_is_that_of_two_gpus(thousands, strategy, forward, both):
    sizes, rates = problem(thousands, 2), model.rates(device.H200)
    least, found = model.attention_seconds(sizes, rates), model.estimate(strategy, sizes, rates)
    assert least[0] / found.forward_s == pytest.approx(forward, abs=0.025)
    assert sum(least) / found.seconds == pytest.approx(both, abs=0.025)


@pytest.mark.parametrize("thousands", [32, 128])
def test_what_was_fastest_is_chosen(thousands):
    """Regression: an all-gather, the slowest of the three, was thought to lose least of both passes."""
    measured = {strategy: both for size, strategy, _, both in MEASURED if size == thousands}
    assert model.choose(problem(thousands, 2), model.rates(device.H200)).strategy == max(measured, key=measured.get)


def test_a_mask_that_keeps_all_has_no_place():
    """Its kernels are the plain ones after an all-gather, too."""
    rates = model.rates(device.H200)
    sizes = [problem(128, 2, share=share) for share in (0.999, 1)]
    placed, plain = (model.estimate("all_gather", one, rates).forward_s for one in sizes)
    assert placed / plain > 1.1
    assert plain - model.attention_seconds(sizes[1], rates)[0] < 2e-3


def test_bytes_of_a_ring_are_those_of_its_permutes():
    """7 hops of K and V forward; backward 7 of K and V and 8 of the float32 sums, of which the last brings them home:
    1,007 MB in the program compiled for 8 devices."""
    found = model.estimate("ring", problem(64, 8), model.rates(device.H200))
    keys = 2 * 8192 * 8 * (128 + 128)
    assert found.bytes_forward == 7 * keys
    assert found.bytes_backward == 7 * keys + 8 * 2 * keys
    assert round((found.bytes_forward + found.bytes_backward) / 1e6) == 1007


def test_steps_out_of_reach_cost_nothing():
    whole, window = (model.estimate("ring", problem(64, 8, share=0.06, steps=steps), model.rates(device.H200))
                     for steps in (None, 2))
    assert window.bytes_forward * 7 == whole.bytes_forward
    assert window.seconds < whole.seconds
    alone = model.estimate("ring", problem(64, 8, steps=1), model.rates(device.H200))
    assert (alone.bytes_forward, alone.bytes_backward) == (0, 0)


def test_memory_of_a_ring_does_not_grow_with_the_sequence():
    """At 8k positions a device, whatever the number of devices; 339 MB in the compiled forward."""
    rates = model.rates(device.H200)
    few, many = (model.estimate("ring", problem(8 * n, n), rates).transient_bytes for n in (4, 64))
    assert few == many
    assert model.estimate("all_gather", problem(512, 64), rates).transient_bytes > many


def test_repeated_key_heads_are_paid_for():
    """8 devices get a head each, of 2 bytes where each has its own and of 4 where it is repeated."""
    few, many = (model.estimate("all_to_all", problem(64, 8, kv_heads=heads), model.rates(device.H200))
                 for heads in (1, 8))
    assert few.bytes_forward - many.bytes_forward == 2 * 7 * 8192 * (128 + 128)


def test_the_cheapest_is_chosen():
    for sizes in (problem(32, 4), problem(128, 8), problem(64, 8, q_heads=30, kv_heads=10)):
        choice = model.choose(sizes, model.rates(device.H200))
        able = [found for found in choice.estimates if not found.reasons_against]
        assert choice.strategy == min(able, key=lambda found: found.forward_s + found.backward_s).strategy
        assert {found.strategy for found in choice.estimates} == {"ring", "all_gather", "all_to_all"}


def test_heads_that_do_not_divide():
    sizes = problem(64, 8, q_heads=12, kv_heads=4)
    choice = model.choose(sizes, model.rates(device.H200))
    assert choice.strategy != "all_to_all"
    assert "q_heads=12, devices=8" in str(choice)
    with pytest.raises(UnsupportedError, match=r"'all_to_all' cannot run attention of 8 devices.*needs query"):
        model.choose(sizes, model.rates(device.H200), "all_to_all")


def test_a_gather_that_fills_the_memory_is_not_chosen_but_may_be_named():
    sizes = problem(1024, 8, q_heads=12, kv_heads=12)
    choice = model.choose(sizes, model.rates(device.H200))
    assert choice.strategy == "ring"
    assert "at most 10% of the device's 141 GB" in str(choice)
    assert model.choose(sizes, model.rates(device.H200), "all_gather").strategy == "all_gather"


def test_reasons_from_outside():
    against = {name: ["needs a mask that moves"] for name in ("ring", "all_gather")}
    assert model.choose(problem(64, 8), model.rates(device.H200), against=against).strategy == "all_to_all"
    with pytest.raises(UnsupportedError, match=r"no strategy can.*ring: needs.*all_gather: needs.*all_to_all: needs"):
        model.choose(problem(64, 8, q_heads=12, kv_heads=4), model.rates(device.H200), against=against)


def test_a_strategy_that_does_not_exist():
    with pytest.raises(ValueError, match=r"strategy must be None or one of 'ring', 'all_gather', 'all_to_all', got"):
        model.choose(problem(64, 8), model.rates(device.H200), "ulysses")


def test_rates_of_devices():
    assert model.rates(device.H100).memory_bytes == 80e9
    assert model.rates(device.H200).memory_bytes == 141e9
    for other in (device.CPU, device.A100):
        assert "this device was not measured" in model.rates(other).source
    for where in (device.H200, device.A100):
        assert "by rates of " in pallas_flash.explain_context_parallel(*PART, num_devices=4, device=where)


def test_an_estimate_prints_its_units():
    text = str(model.estimate("ring", problem(64, 8), model.rates(device.H200)))
    assert "sends 235 MB and 772 MB" in text, text
    assert text.startswith("ring: forward 8."), text


PART = [jax.ShapeDtypeStruct((1, 8192, heads, 128), "bfloat16") for heads in (32, 8, 8)]


@pytest.mark.parametrize(("options", "lines"), [
    (dict(strategy="ring", has_documents=True), ["keys of the device 3 before: batch=2", "SegmentIds", "'hopper'"]),
    (dict(strategy="ring"), ["keys of the device 0 before: batch=1, heads=32:8, len=8192x8192", "'hopper'"]),
    (dict(strategy="all_gather"), ["2 calls, each batch=1, heads=32:8, len=4096x32768", "'hopper'"]),
    (dict(strategy="all_to_all"), ["one call, batch=1, heads=8:2, len=32768x32768", "'hopper'"]),
    (dict(strategy="all_to_all", load_balance="zigzag_documents", has_documents=True),
     ["UnsupportedError: strategy='all_to_all'"]),
    (dict(mask=pallas_flash.Dense(np.ones((8192, 8192), bool))), ["UnsupportedError", "Dense holds an array"]),
])
def test_explain_says_what_runs(options, lines):
    with device.assume(device.H100):
        text = pallas_flash.explain_context_parallel(*PART, num_devices=4, **{"mask": pallas_flash.Causal(), **options})
    for line in lines:
        assert line in text


@dataclasses.dataclass(frozen=True)
class Absolute(pallas_flash.Mask):
    """Causal, and keeps the positions of the whole sequence in each piece, as an attribute that is compared."""

    q_lo: int = 0
    kv_lo: int = 0

    def keep(self, q_pos, kv_pos):
        return q_pos + self.q_lo >= kv_pos + self.kv_lo

    def kv_bounds(self, q_lo, q_hi):
        first = q_lo + self.q_lo - self.kv_lo + 1
        return pallas_flash.masks.Bounds(0, 0, first, first + q_hi - 1 - q_lo)

    def moved(self, q_lo, kv_lo):
        return Absolute(self.q_lo + q_lo, self.kv_lo + kv_lo)


@pytest.mark.parametrize(("mask", "line"), [
    # each device: two triangles of its own and a square; then two squares a step, of which one call serves all
    (pallas_flash.Causal(), "calls of a pass: 4, of which 2 differ and are compiled"),
    # 8 chunks, each with those before it: 28 squares need no mask, 8 triangles are 8 masks
    (Absolute(), "calls of a pass: 12, of which 10 differ and are compiled")], ids=["shared", "absolute"])
def test_explain_says_how_many_calls_differ(mask, line):
    with device.assume(device.H100):
        text = pallas_flash.explain_context_parallel(*PART, num_devices=4, strategy="ring", mask=mask)
    assert line in text, text


@pytest.mark.parametrize(("mask", "kinds"), [
    (pallas_flash.Causal(), 2), (pallas_flash.PrefixLM(1000), 3), (pallas_flash.InBounds(30000, 30000), 4),
    (pallas_flash.InBounds(30000, 30000) & pallas_flash.Causal(), 4)], ids=str)
def test_pieces_where_a_mask_is_the_same_share_a_call(mask, kinds):
    """Regression: prefixes that end before a piece were another mask in each piece, and each device computed the pairs
    of all others beside its own: 17 pairs in the first step, where causal takes 3.
    """
    found = plan.steps(mask, plan.Chunking(8, 8192, "zigzag"), plan.Sharing(stacks=True, joins=False))
    assert len({call.mask for step in found for call in step.calls}) == kinds
    assert sum(len(call.picks) for call in found[0].calls) <= 4


@pytest.mark.parametrize("mask", [
    *(pallas_flash.PrefixLM(prefix, offset) for prefix in (-9, 0, 1, 5, 40) for offset in (-70, -7, 0, 3, 50)),
    *(pallas_flash.InBounds(q_len, kv_len) for q_len in (5, 40) for kv_len in (0, 9, 70)),
    pallas_flash.PrefixLM(5, 2) & pallas_flash.InBounds(30, 30) & pallas_flash.Window(left=9)], ids=str)
def test_the_mask_of_a_piece_is_that_of_the_whole(mask):
    size, pos = 6, np.arange(6)
    for q_lo in range(0, 36, size):
        for kv_lo in range(0, 36, size):
            part = plan.part_of(mask, q_lo, kv_lo, size)
            found = False if part is None else part.keep(pos[:, None], pos)
            assert np.array_equal(np.broadcast_to(found, (size, size)), mask.keep(pos[:, None] + q_lo, pos + kv_lo))


def test_explain_refuses_what_the_call_refuses():
    with device.assume(device.A100):
        text = pallas_flash.explain_context_parallel(*PART, num_devices=4, implementation="hopper")
    assert text.startswith("UnsupportedError: implementation='hopper' cannot run")
    with pytest.raises(ValueError, match="num_devices must be an integer of at least 1"):
        pallas_flash.explain_context_parallel(*PART, num_devices=0)
    with pytest.raises(ValueError, match="num_devices must be an integer of at least 1, got num_devices=True"):
        pallas_flash.explain_context_parallel(*PART, num_devices=True)
    with pytest.raises(ValueError, match="has_documents must be True or False, got has_documents='no'"):
        pallas_flash.explain_context_parallel(*PART, num_devices=4, has_documents="no")
    with pytest.raises(ValueError, match="query must be an array"):
        pallas_flash.explain_context_parallel([1], *PART[1:], num_devices=4)
    with pytest.raises(ValueError, match=r"device must be a pallas_flash\.device\.Device"):
        pallas_flash.explain_context_parallel(*PART, num_devices=4, device="H100")


def test_explain_of_a_device_that_is_named():
    """As `explain` and `cache.explain` have it: the error for it named num_devices."""
    with device.assume(device.A100):
        assumed = pallas_flash.explain_context_parallel(*PART, num_devices=np.int64(4))
    assert pallas_flash.explain_context_parallel(*PART, num_devices=4, device=device.A100) == assumed
    assert "'hopper'" in pallas_flash.explain_context_parallel(*PART, num_devices=4, device=device.H100)
