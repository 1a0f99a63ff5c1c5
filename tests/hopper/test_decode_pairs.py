"""Every pair of features of attention to a cache: in as few cases as hold all pairs, through `xla` on any machine, and
through the kernel on a Hopper GPU. What the cache holds past lengths, and in pages of nobody, is NaN.
"""

import itertools

import numpy as np
import pytest

from pallas_flash import Causal, Full, PrefixLM, Window, cache
from tests.hopper.test_decode import Case, Chunks, assert_right, bias_of, exact, in_layout, ours, rows, sinks_of, stored

LENGTHS = (0, 1, 70, 130)
FEATURES = {
    "layout": [dict(layout=layout) for layout in ("BLHD", "BHLD")],
    "pages": [dict(page=page) for page in (0, 16, 64)],
    "dtype": [dict(dtype=dtype) for dtype in ("bfloat16", "float16")],
    "dims": [dict(d=d) for d in ((64, 64), (128, 128), (192, 128), (256, 256))],
    "rows": [dict(q_len=1, heads=(4, 2)), dict(q_len=3, heads=(4, 4)), dict(q_len=4, heads=(8, 1)),
             dict(q_len=1, heads=(32, 1))],
    "rule": [dict(), dict(rule=Full()), dict(rule=Causal() & Window(left=50)), dict(rule=PrefixLM(40)),
             dict(rule=Chunks(60))],
    "numbers of rules": [dict(), dict(in_arrays=True)],
    "softcap": [dict(), dict(softcap=3.0)],
    "scale": [dict(), dict(scale=-0.3)],
    "bias": [dict(), dict(bias=(4, 1)), dict(bias=(1, 0), bias_dtype="bfloat16")],
    "sinks": [dict(), dict(sinks=True)],
    "bad values": [dict(), dict(bad=(1, 2))],
}
"""Of each feature, what a case has of it; heads of a bias: 0 stands for all."""
IN_ARRAYS = {str(Causal() & Window(left=50)): Causal() & Window(left=np.full(4, 50)),
             str(PrefixLM(40)): PrefixLM(np.full(4, 40))}
"""Rules whose numbers may be those of each sequence."""


def choices() -> list[tuple[int, ...]]:
    """Of each case, which of what each feature has: greedily, until every pair of two features' is in one of them."""
    sizes = [len(levels) for levels in FEATURES.values()]
    left = {(a, i, b, j) for a, b in itertools.combinations(range(len(sizes)), 2)
            for i in range(sizes[a]) for j in range(sizes[b])}
    found = []
    while left:
        a, i, b, j = min(left)
        own = {a: i, b: j}
        for feature, size in enumerate(sizes):
            if feature not in own:
                news = [sum(tuple(sum(sorted([(other, k), (feature, level)]), ())) in left for other, k in own.items())
                        for level in range(size)]
                own[feature] = int(np.argmax(news))
        chosen = tuple(own[feature] for feature in range(len(sizes)))
        left -= {(a, chosen[a], b, chosen[b]) for a, b in itertools.combinations(range(len(sizes)), 2)}
        found.append(chosen)
    return found


CHOICES = choices()


def case_of(chosen: tuple[int, ...]) -> Case:
    fields = dict(capacity=192)
    for level, levels in zip(chosen, FEATURES.values(), strict=True):
        fields |= levels[level]
    if fields.get("bias", (1, 1))[1] == 0:
        fields["bias"] = 1, fields["heads"][0]
    if fields.pop("in_arrays", False):
        fields["mask"] = IN_ARRAYS.get(str(fields.get("rule")))
    return Case(LENGTHS, **fields)


CASES = [*map(case_of, CHOICES)]
"""Each case has every feature one way or another, and all pairs of ways are in one of them."""


def test_all_pairs_are_there():
    names = [*FEATURES]
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs = {(chosen[a], chosen[b]) for chosen in CHOICES}
        assert len(pairs) == len(FEATURES[names[a]]) * len(FEATURES[names[b]]), (names[a], names[b])
    assert len(CASES) <= 30


@pytest.mark.parametrize("number", range(len(CASES)))
def test_xla_is_right(number):
    case = CASES[number]
    q, k, v = rows(case)
    found = cache.attend(in_layout(case, q), stored(case, k, v), bias=bias_of(case), sinks=sinks_of(case),
                         return_lse=True, implementation="xla", **case.options)
    assert_right(case, *found, exact(case, q, k, v))


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_kernel_is_right(number):
    case = CASES[number]
    q, k, v = rows(case)
    assert_right(case, *ours(case)(in_layout(case, q), stored(case, k, v)), exact(case, q, k, v))
