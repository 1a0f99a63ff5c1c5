"""What is published: the sdist holds all that its tests need, the wheel runs in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pallas_flash

ROOT = Path(__file__).parent.parent
HAS_BUILD = subprocess.run([sys.executable, "-c", "import build, setuptools"], capture_output=True).returncode == 0
needs_build = pytest.mark.skipif(not HAS_BUILD, reason="needs the packages build and setuptools")


def run(*command, cwd, **changes):
    """A process without the variables of this test run; its output, both streams together."""
    hidden = ("JAX_", "XLA_FLAGS", "PYTEST_", "PYTHON", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)} | changes
    return subprocess.run(command, cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def checked(*command, cwd, **changes):
    done = run(*command, cwd=cwd, **changes)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel, made from the sdist as on an index; from a copy, in which nothing was built before."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", ".*_cache", "*.egg-info", "build",
                                                             "dist", "_build", "__pycache__"))
    checked(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy), cwd=out)
    sdist, = out.glob("*.tar.gz")
    wheel, = out.glob("*.whl")
    return sdist, wheel


@needs_build
def test_the_sdist_holds_its_tests(built, tmp_path):
    """Regression: it lacked conftest, helpers, docs, examples, bench and constraints, and 9 files could not be
    collected; on one device another could not, either."""
    with tarfile.open(built[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    root, = tmp_path.iterdir()
    for name in ("Makefile", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".ci/run", "docs/conf.py",
                 "docs/images/memory.png", "examples/quickstart.py", "bench/report.py",
                 "tests/hopper/offline/driver.c"):
        assert (root / name).is_file(), f"{name} is missing"
    one_device = "--xla_force_host_platform_device_count=1"
    text = checked(sys.executable, "-m", "pytest", "tests", "--collect-only", "-q", "-p", "no:cacheprovider", cwd=root,
                   XLA_FLAGS=one_device, JAX_PLATFORMS="cpu")
    assert "test_packaging.py::test_the_sdist_holds_its_tests" in text


@needs_build
def test_what_an_index_shows(built):
    with zipfile.ZipFile(built[1]) as archive:
        name, = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(name).decode()
        assert not any(name.startswith(("tests/", "bench/", "docs/")) for name in archive.namelist())
    assert f"\nVersion: {pallas_flash.__version__}\n" in metadata
    assert "\nProject-URL: Issues, https://" in metadata
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata.split("\n\n", 1)[1])
    assert any(target.endswith("docs/images/speed.png") for target in targets)
    assert [target for target in targets if not target.startswith("https://")] == [], "links lead nowhere"


@needs_build
def test_the_wheel_in_an_empty_environment(built, tmp_path):
    """With JAX and NumPy alone: the quickstart, the diagnosis, and what torch_bridge says without PyTorch."""
    python = tmp_path / "empty" / "bin" / "python"
    install = installer(tmp_path / "empty")
    done = run(*install, "-c", str(ROOT / "constraints.txt"), str(built[1]), cwd=tmp_path)
    if done.returncode and run(*install, "numpy", cwd=tmp_path).returncode:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout
    assert "gradients (2, 512, 8, 64)" in checked(python, str(ROOT / "examples" / "quickstart.py"), cwd=tmp_path)
    text = checked(python, "-m", "pallas_flash", cwd=tmp_path)
    assert "implementation='" in text and "flax is not installed" in text and "died" not in text
    done = run(python, "-c", "import torch_bridge", cwd=tmp_path)
    assert done.returncode == 1 and 'pip install "pallas_flash[torch]"' in done.stdout


def installer(place):
    """Makes an empty environment; the command that installs into it."""
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():
        checked(uv, "venv", "--python", sys.executable, str(place), cwd=place.parent)
        return [uv, "pip", "install", "--python", str(place / "bin" / "python")]
    checked(sys.executable, "-m", "venv", str(place), cwd=place.parent)
    return [str(place / "bin" / "python"), "-m", "pip", "install"]


def test_the_changelog_has_this_version():
    """A tag of this tree is a release: its version stands in the changelog, and nothing is left over."""
    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first and first[1] == pallas_flash.__version__


def test_development_needs_no_cuda_plugin():
    """Regression: `dev` brought it, and starting JAX on a machine without a driver ended in a segmentation fault."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in set(extras) - {"cuda13", "offline"}:
        assert not any("cuda" in requirement for requirement in extras[extra]), extra
