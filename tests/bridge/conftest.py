"""Fixtures of the torch tests: a fixed seed, and no warnings from torch's compiler."""

import warnings

import pytest
import torch

import torch_bridge


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="package")
def first_device():
    """tests/conftest.py starts JAX, which leaves the thread on the last GPU (torch_bridge/context.py)."""
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(0)


@pytest.fixture(autouse=True, scope="package")
def nothing_compiled_before(tmp_path_factory):
    """torch keeps what it compiles by the names of our operators, whatever they return since: not across runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True, scope="package")
def forward_mode():
    """torch uses `torch.jit.script`, which warns, when forward mode is first used in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._decomp.decompositions_for_jvp  # noqa: F401


@pytest.fixture(params=["dlpack", "direct"])
def asked(request, monkeypatch):
    """Each way to the kernels of a GPU, asked for; a call that the direct one does not take goes the other."""
    monkeypatch.setenv("PALLAS_FLASH_DIRECT", "1" if request.param == "direct" else "0")
    return request.param


@pytest.fixture
def path(asked):
    """Each way to the kernels of a GPU; a test that did not take it fails."""
    direct = lambda: sum(row.calls for row in torch_bridge.report() if "launched directly" in row.problem)
    before = direct()
    yield asked
    assert (direct() > before) == (asked == "direct")


@pytest.fixture
def quiet():
    """For torch.compile and its like: warnings of torch's own machinery, such as deprecations, are not ours.

    That goes for the reset too: in torch 2.11 it imports inductor, which uses `torch.jit.script_method`, deprecated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        torch.compiler.reset()
