"""Every test runs with strict dtype and rank promotion, on eight virtual CPU devices where there is no GPU."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (the flags must be set before JAX starts)
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def has_hopper() -> bool:
    """True where JAX's first device is a Hopper GPU."""
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a Hopper GPU; elsewhere they are skipped."""
    if not has_hopper():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU"))


@pytest.fixture
def x64():
    """float64 arrays for the time of a test."""
    with jax.enable_x64(True):
        yield
