"""The documentation: its Python runs on a CPU, each block after the one before it, and its links lead to files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests import compilation

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
    if page != "README.md":
        environment |= compilation.variables(environment.get("XLA_FLAGS", ""))
    done = subprocess.run([sys.executable, "-W", "error", program], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, f"{page}: exit {done.returncode}\n{done.stderr[-4000:]}"
    assert "implementation='xla'" in done.stdout


def test_the_table_of_what_runs_where_is_what_dispatch_says():
    """`python -m bench report` writes it. With JAX 0.12 a Hopper GPU's compiler may have its say."""
    pytest.importorskip("matplotlib")
    if jax.__version_info__ >= (0, 12):
        pytest.skip("the table is that of JAX 0.11")
    from bench import records, report
    block = next(match for match in report.MARKERS.finditer((ROOT / "README.md").read_text())
                 if match["name"] == "coverage")
    assert block[0] == f"{block[1]}{report.block('coverage', records.read(records.RESULTS))}\n{block[3]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("docs/notes/*.md"))],
                         ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_into_pages_lead_to_headings(page):
    """Regression: `make docs` warned, which is an error there, of a link to a heading deeper than it looks."""
    deepest = int(re.search(r"^myst_heading_anchors = (\d)", (ROOT / "docs/conf.py").read_text(), re.MULTILINE)[1])

    def anchors(path):
        headings = re.findall(rf"^#{{1,{deepest}}} (.+)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\((?!https?:)([^)\s#]*\.md)?#([^)\s]+)\)", page.read_text())
    assert [link for link in links if link[1] not in anchors(page.parent / link[0] if link[0] else page)] == []
