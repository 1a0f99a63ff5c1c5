"""What a call costs the host, apart from the computation: a problem too small to keep any device busy."""

from typing import Any

import jax

from bench import timing
from bench.contestants import Arrays, Contestant, JaxContestant, inputs_of
from pallas_flash.masks import Causal
from pallas_flash.testing.problems import Problem

__all__ = ["TINY", "measure"]

TINY = Problem("host-tiny", "too small to keep a device busy", batch=1, q_heads=2, kv_heads=2, q_len=64, kv_len=64,
               d=64, d_v=64, mask=Causal(), dtypes=("bfloat16",), tags=("host",))


def _call(contestant: Contestant, arrays: Arrays, direction: str) -> timing.Call:
    """A call as users write it: a jitted function for JAX, an eager one for PyTorch."""
    if not isinstance(contestant, JaxContestant):
        return contestant.prepare(TINY, arrays, direction).call
    attend = contestant.attention(TINY)
    if direction == "forward":
        jitted, args = jax.jit(attend), arrays[:3]
    else:
        jitted, args = jax.jit(lambda q, k, v, dout: jax.vjp(attend, q, k, v)[1](dout)), arrays[:4]
    return timing.Call(lambda: jitted(*args), jax.block_until_ready)


def measure(contestants: list[Contestant], common: dict[str, Any], say: Any = print) -> list[dict[str, Any]]:
    """One record a contestant and direction, in microseconds a call."""
    arrays, found = inputs_of(TINY), []
    for direction in ("forward", "both"):
        for contestant in contestants:
            reason = contestant.why_not(TINY)
            if not reason:
                try:
                    call = _call(contestant, arrays, direction)
                    call.finish()
                    seconds = timing.host_seconds(call)
                except Exception as error:  # whatever a peer raises
                    reason = f"{type(error).__name__}: {error}"[:300]
                else:
                    found.append(common | dict(
                        kind="host", problem=TINY.name, direction=direction, contestant=contestant.name,
                        label=contestant.label, host_us=seconds * 1e6))
                    continue
            say(f"{TINY.name} {direction}: without {contestant.label}: {reason}")
    return found
