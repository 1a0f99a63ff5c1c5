"""What pyproject.toml cannot say: the README of an index page, whose links and images are addresses of this version."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def long_description() -> str:
    """README.md with each relative address made absolute, at the tag of this version."""
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "pallas_flash" / "__init__.py").read_text(), re.M)[1]

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({home}/{kind}/v{version}/{match['path']})"
    relative = r"(?P<image>!?)\[(?P<text>[^\]\n]*)\]\((?![a-z]+:|#)(?P<path>[^)\s]+)\)"
    return re.sub(relative, absolute, (ROOT / "README.md").read_text())


setup(long_description=long_description(), long_description_content_type="text/markdown")
