"""Forward kernels without row maxima on a GPU, for scores that a soft cap bounds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_flash import Causal, InBounds, SegmentIds, Window, device, flash_attention
from pallas_flash.kernels.hopper import defaults
from pallas_flash.spec import AttentionSpec

pytestmark = pytest.mark.gpu

BATCH, LENGTH, HEADS, KEY_HEADS = 2, 1000, 4, 2
IDS = np.repeat(np.arange(3, dtype=np.int32), [300, 1, 699])[None]
MASKS = {"causal": Causal(), "window": Window(200, 30), "idle-rows": Window(0, 3, -70),
         "documents": Causal() & SegmentIds(IDS, IDS), "lengths": InBounds(kv_len=np.array([0, 613], np.int32))}


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("softcap", [2.0, 55.0])
@pytest.mark.parametrize("name", MASKS)
def test_scores_at_both_ends_of_the_cap(name, softcap, d):
    """Keys of the first half have scores at the upper end for one half of the queries, and the others at the lower end;
    what the mask hides from all is NaN."""
    rng, mask = np.random.default_rng(0), MASKS[name]
    q, k, v = (rng.standard_normal((BATCH, LENGTH, heads, d), np.float32) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    q[:, ::2, :, 0], k[:, :LENGTH // 2, :, 0], k[:, LENGTH // 2:, :, 0] = 300 * d**0.5, 2, -2
    k, v = (np.where(np.arange(LENGTH)[:, None, None] < 613, x, np.nan) if name == "lengths" else x for x in (k, v))
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    default = defaults.default_forward(AttentionSpec.of(q, k, v, mask=mask, softcap=softcap), device.current())

    def attend(implementation):
        return jax.jit(lambda q, k, v: flash_attention(
            q, k, v, mask=mask, softcap=softcap, return_lse=True, implementation=implementation))(q, k, v)
    jax.clear_caches()
    with defaults.assume(dataclasses.replace(default, bounded=True, maxima=0)):
        found = attend("hopper")
    jax.clear_caches()
    for x, wanted, tolerance in zip(found, attend("reference"), (2e-2, 2e-3), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(wanted, np.float32), atol=tolerance, rtol=1e-5)
