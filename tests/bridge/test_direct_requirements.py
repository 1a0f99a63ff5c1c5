"""What the direct path needs of an installation: each thing that is missing is named, before a process is started."""

import platform
import re
import sys

import pytest

from torch_bridge.direct import driver, requirements


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """An installation that has everything, whatever this one has."""
    (tmp_path / requirements.FILE).touch()
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(requirements, "_version", lambda package: "0.11.2.dev7")
    monkeypatch.setattr(requirements, "plugin", lambda: tmp_path / requirements.FILE)
    monkeypatch.setattr(driver, "library", lambda: None)
    assert requirements.why_not.__wrapped__() is None
    return monkeypatch


def no_driver():
    raise RuntimeError("libcuda.so.1, NVIDIA's driver, must be there")


@pytest.mark.parametrize("change, said", [
    (lambda patch: patch.setattr(platform, "system", lambda: "Windows"), r"needs Linux, this is Windows"),
    (lambda patch: patch.setattr(sys, "frozen", True, raising=False), r"needs a Python to start a process"),
    (lambda patch: patch.setattr(sys, "executable", None), r"sys\.executable is None"),
    (lambda patch: patch.setattr(requirements, "__file__", "/a.zip/torch_bridge/x.py"), r"files, not in an archive"),
    (lambda patch: patch.setattr(requirements, "_version", lambda package: None), r"JAX 0\.11 or 0\.12, which is not"),
    (lambda patch: patch.setattr(requirements, "_version", lambda package: "0.13.0"), r"or 0\.12, jax is 0\.13"),
    (lambda patch: patch.setattr(requirements, "plugin", lambda: None), r"not there: install jax\[cuda13\]"),
    (lambda patch: patch.setattr(driver, "library", no_driver), r"libcuda\.so\.1, NVIDIA's driver, must be there"),
])
def test_what_is_missing_is_named(whole, change, said):
    change(whole)
    assert re.search(said, requirements.why_not.__wrapped__())


def test_it_is_asked_of_this_installation():
    assert requirements._version("jax").startswith("0.") and requirements._version("no-such-package") is None
    assert requirements.why_not_version(requirements._version("jax")) is None, "the release that is tested"
    assert requirements.plugin() is None or requirements.plugin().exists()
