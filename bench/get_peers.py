"""Puts the peers that have no place in our dependencies into a folder: FlashAttention-3 (dew_flash_attn) and Tokamax.

FOLDER/site then goes on PYTHONPATH (bench looks into .peers/site by itself). About 40 MiB: dew_flash_attn is trimmed to
FlashAttention-3's C++ kernels for sm_90a, called through XLA's FFI; Tokamax's profiler is stubbed out. They expect jax,
flax, absl-py, jaxtyping, tqdm and typing_extensions to be installed.
"""

import pathlib
import shutil
import subprocess
import sys
import zipfile

__all__ = ["get"]

WHEELS = ("dew-flash-attn-cu13==0.3.6", "tokamax==0.0.17", "qwix", "einshape", "immutabledict", "tensorboardx",
          "annotated_types", "typing_inspection")
# FlashAttention-2's library is 340 MB, and PyTorch brings its own: only version 3 is loaded.
ONLY_VERSION_3 = (
    ('_library, _two = _load("libdew_flash_attn.so", "dew_flash_architectures")', "_library, _two = None, ()"),
    ('for library, prefix in ((_library, "dew_flash_mha"), (_library3, "dew_flash3_mha")):',
     'for library, prefix in ((_library3, "dew_flash3_mha"),):'))


def get(folder: pathlib.Path) -> pathlib.Path:
    """Downloads and unpacks the wheels with pip; returns the folder for PYTHONPATH."""
    wheels, site = folder / "wheels", folder / "site"
    shutil.rmtree(folder, ignore_errors=True)
    site.mkdir(parents=True)
    download = (sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels))
    subprocess.run([*download, "pydantic"], check=True)  # with pydantic_core, which it pins
    subprocess.run([*download, "--no-deps", *WHEELS], check=True)
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("typing_extensions"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [n for n in archive.namelist() if not n.endswith("libdew_flash_attn.so")])
    shutil.rmtree(wheels)
    _keep_version_3(site / "dew_flash_attn" / "__init__.py")
    _stub_profiler(site / "xprof" / "cli" / "tools")
    return site


def _keep_version_3(init: pathlib.Path) -> None:
    text = init.read_text()
    for old, new in ONLY_VERSION_3:
        if old not in text:
            raise SystemExit(f"dew_flash_attn is not as expected: look for {old!r} in {init}")
        text = text.replace(old, new)
    init.write_text(text)


def _stub_profiler(package: pathlib.Path) -> None:
    package.mkdir(parents=True)
    for folder in (package.parent.parent, package.parent, package):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "def get_kernel_stats_tool(*args, **kwargs):\n    raise NotImplementedError('profiling is stubbed out')\n")
