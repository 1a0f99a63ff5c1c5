"""The documentation: its Python runs on a CPU, each block after the one before it, and its links lead to files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def python_blocks(page):
    """A page's Python as one program, each line at its place on the page, so that errors name it."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_python_runs(page, tmp_path):
    for package in ("flax", "torch", "flatbuffers"):
        pytest.importorskip(package)
    program = tmp_path / Path(page).with_suffix(".py").name
    program.write_text(python_blocks(ROOT / page))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "error", program], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, f"{page}: exit {done.returncode}\n{done.stderr[-4000:]}"
    assert "implementation='xla'" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []
