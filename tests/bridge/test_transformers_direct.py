"""Hugging Face's models on the direct path, up to the launch: tiny ones in bfloat16, whose kernels a stand-in computes
(test_direct.py), against themselves through DLPack. That these agree with eager is tested in test_transformers.py.
"""

import functools

import pytest
import torch

from bridge.test_direct import launched  # noqa: F401
from torch_bridge.direct import attention

transformers = pytest.importorskip("transformers")

from bridge import test_transformers as models  # noqa: E402
from bridge.test_transformers import from_zero, registered  # noqa: E402, F401

CASES = [*((name, "left") for name in models.MODELS), ("Llama", "packed"), ("Mistral", "packed"), ("Gemma2", "right")]


@functools.cache
def causal_lm(name):
    return models.causal_lm.__wrapped__(name, dtype="bfloat16").bfloat16()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_both_passes_of_every_layer_are_launched(launched, monkeypatch, name, case):  # noqa: F811
    """With grouped heads, windows, soft caps, sinks, padding and packed sequences: logits and gradients."""
    model, inputs = causal_lm(name), models.INPUTS[case]()
    logits, gradients = models.results(model, "pallas", inputs)
    layers = model.config.num_hidden_layers
    assert launched == ["forward"] * layers + ["backward"] * layers and models.written_out() == []
    monkeypatch.setenv(attention.VARIABLE, "0")
    expected, wanted = models.results(model, "pallas", inputs)
    assert len(launched) == 2 * layers
    assert models.distance(logits.float(), expected.float()) < 3e-2
    assert gradients.keys() == wanted.keys()
    every, exact = (torch.cat([x.float().flatten() for x in found.values()]) for found in (gradients, wanted))
    assert ((every - exact).norm() / exact.norm()).item() < 5e-2
