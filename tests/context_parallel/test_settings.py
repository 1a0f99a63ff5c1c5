"""How attention is spread over devices, as a value: equal settings share compiled code, wrong ones are refused."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

import pallas_flash as pf


def test_equal_settings_are_equal():
    mesh = jax.make_mesh((1,), ("sequence",), devices=jax.devices()[:1])
    a, b = (pf.ContextParallel("sequence", "ring", mesh=mesh, spec=P(None, "sequence")) for _ in range(2))
    assert a == b != pf.ContextParallel("sequence") and hash(a) == hash(b)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(strategy="star"), r"strategy must be 'ring', 'all_gather', 'all_to_all' or None, got strategy='star'"),
    (dict(axis_name=3), "axis_name must be the name of one mesh axis, got axis_name=3"),
    (dict(load_balance="striped"), r"load_balance must be 'zigzag', 'zigzag_documents' or None, got .*'striped'"),
])
def test_what_does_not_exist_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pf.ContextParallel(**{"axis_name": "sequence"} | settings)
