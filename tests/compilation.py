"""Programs that compile fast, instead of being fast: nearly all the time of a small one is compilation.

For a CPU, where most optimisations are off, XLA's older emitters of fusions take the place of the newer ones, which
build pipelines of MLIR passes for each fusion: two thirds of the time of compiling a small program. An XLA without them
ignores it. For a GPU, XLA does not compile and time several programs for each matrix product to choose one: our own
kernels have none, and what a test compares them with need not be fast.
"""

import functools
from typing import Any

import jax
from jax._src import compiler  # where programs get their options
from jax._src.lib import xla_client

__all__ = ["install", "variables"]

OLDER_EMITTERS = "xla_cpu_disable_new_fusion_emitters"
UNTRIED = {"xla_gpu_autotune_level": 0}
"""An option of programs for a GPU: XLA tries out no matrix products."""


def variables(flags: str) -> dict[str, str]:
    """The variables of a process that compiles fast, with these XLA_FLAGS beside."""
    return dict(JAX_DISABLE_MOST_OPTIMIZATIONS="1", XLA_FLAGS=f"{flags} --xla_backend_extra_options={OLDER_EMITTERS}")


def install() -> None:
    """From now on it holds in this process, while `jax_disable_most_optimizations` is on.

    A JAX whose compiler has no such function runs the tests all the same, slowly, as `tests/test_conftest.py` says.
    """
    made = getattr(compiler, "get_compile_options", None)
    if made is not None and not isinstance(made, _Options):
        compiler.get_compile_options = _Options(made)


class _Options(functools.partial):
    """Makes a compilation's options as JAX does, and adds ours.

    The one for a CPU is added to the message that they are: it is an entry of a map, which JAX's own
    `compiler_options` cannot set.
    """

    def __call__(self, *args: Any, **keywords: Any) -> xla_client.CompileOptions:
        backend = keywords.get("backend")
        if backend is not None and backend.platform == "gpu":
            given = keywords.get("env_options_overrides") or {}
            return super().__call__(*args, **keywords | {"env_options_overrides": UNTRIED | given})
        options = super().__call__(*args, **keywords)
        if not jax.config.read("jax_disable_most_optimizations"):
            return options
        entry = _field(500, _field(1, OLDER_EMITTERS.encode()) + _field(2, b"true"))  # of xla_backend_extra_options
        appended = _field(3, _field(3, entry))  # executable_build_options, debug_options: messages that are merged
        return xla_client.CompileOptions.ParseFromString(options.SerializeAsString() + appended)


def _field(number: int, content: bytes) -> bytes:
    """A field of a message, as protocol buffers encode it."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + _varint(number >> 7)
