"""2^x by a polynomial: the PTX of one number, run here step by step in float32."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash.kernels.ampere import exponentials
from pallas_flash.kernels.mosaic.interpret import interpreted

_NUMBERS = np.concatenate([np.linspace(-140, 40, 400_001), np.arange(-130, 40), np.arange(-130, 40) + 0.5,
                           [-np.inf, np.nan, -3e38]]).astype(np.float32)


def _fma(a, b, c):
    return np.float32(a.astype(np.float64) * b + c)


_OPERATIONS = {
    "max.NaN.f32": np.maximum, "add.rn.f32": np.add, "sub.rn.f32": np.subtract, "mul.rn.f32": np.multiply,
    "fma.rn.f32": _fma, "mov.f32": lambda x: x,
}


def _run(text, x):
    """What PTX makes of an array, its operand $1; its result is $0."""
    values = {"$1": x}
    for step in re.sub(r"[{}]", "", text).split(";"):
        if not step.strip() or step.split()[0] == ".reg":
            continue
        name, operands = step.split(None, 1)
        to, *given = (operand.strip() for operand in operands.split(","))
        literal = lambda operand: np.uint32(int(operand[2:], 16)).view(np.float32)
        args = [literal(g) if g.startswith("0f") else values.get(g) for g in given]
        if name == "mov.b32":
            values[to] = args[0].view(np.uint32 if to == "b" else np.float32)
        elif name == "shl.b32":
            values[to] = args[0] << np.uint32(given[1])
        else:
            values[to] = np.broadcast_to(np.float32(_OPERATIONS[name](*args)), x.shape).copy()
    return values["$0"]


def _ptx(x):
    with np.errstate(invalid="ignore"):  # NaN
        return _run(exponentials._text(), x)


def _plain(x):
    tile = jnp.asarray(np.resize(x, (64, -(-x.size // 64))))
    with interpreted():
        return np.asarray(exponentials._polynomial(tile)).reshape(-1)[:x.size]


@pytest.mark.parametrize("exp2", [_ptx, _plain], ids=["ptx", "plain"])
def test_it_is_as_exact_as_the_special_function_unit(exp2):
    found, exact = exp2(_NUMBERS), np.exp2(_NUMBERS.astype(np.float64))
    assert np.array_equal(np.isnan(found), np.isnan(_NUMBERS))
    normal = _NUMBERS >= -126
    assert np.abs(found[normal] / exact[normal] - 1).max() < 2.0**-21.9
    assert not found[_NUMBERS < -127].any() and (found[~np.isnan(found)] >= 0).all()


def test_a_share_of_all_columns_is_computed():
    x = jnp.asarray(np.random.default_rng(0).uniform(-20, 2, (64, 64)), jnp.float32)
    with interpreted():
        plain, made = (np.asarray(exponentials.exp2(x, count)) for count in (0, 3))
    assert np.array_equal(plain, np.asarray(jnp.exp2(x)))
    differ = (made != plain).reshape(64, 8, 8).any((0, 2))
    assert differ.sum() == 3 and np.allclose(made, plain, rtol=4e-7)
