"""What the direct path needs of an installation, asked of packages and files: JAX is not imported."""

import functools
import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from torch_bridge.direct import driver

__all__ = ["FILE", "PACKAGE", "SUPPORTED", "plugin", "why_not", "why_not_version"]

SUPPORTED = ((0, 11), (0, 12))
"""The releases of JAX of which plugin.py knows what they keep to themselves."""
PACKAGE, FILE = "jax_plugins.xla_cuda13", "xla_cuda_plugin.so"


@functools.cache
def why_not() -> str | None:
    """Why no call of this process can take the direct path; None if nothing is known against it."""
    if platform.system() != "Linux":
        return f"needs Linux, this is {platform.system()}"
    if getattr(sys, "frozen", False) or not sys.executable:  # it would start the application again
        return f"needs a Python to start a process that compiles, sys.executable is {sys.executable!r}"
    if not Path(__file__).exists():  # a plan's name holds a digest of sources, and that process runs one of them
        return f"needs pallas_flash installed as files, not in an archive, this is {__file__}"
    if reason := why_not_version(_version("jax")):
        return reason
    if plugin() is None:
        return f"needs {FILE} of {PACKAGE}, which is not there: install jax[cuda13]"
    try:
        driver.library()
    except RuntimeError as error:
        return str(error)
    return None


def why_not_version(found: str | None) -> str | None:
    """Why a release of JAX cannot compile for the direct path; None if it can, or could with its plugin."""
    if found is not None and tuple(map(int, re.findall(r"\d+", found)[:2])) in SUPPORTED:
        return None
    return (f"needs JAX {' or '.join('.'.join(map(str, v)) for v in SUPPORTED)}, "
            f"{'which is not installed' if found is None else f'jax is {found}'}")


def plugin() -> Path | None:
    """The library of JAX's plugin; None where it is not installed. The package is not imported: that would load it."""
    if importlib.util.find_spec(PACKAGE.split(".")[0]) is None:
        return None
    found = importlib.util.find_spec(PACKAGE)
    path = Path(found.origin).with_name(FILE) if found is not None and found.origin else None
    return path if path is not None and path.exists() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
