"""The documentation: its Python runs on a CPU, each block after the one before it, and its links lead to files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import test_architecture as architecture

from tests import compilation

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])


def python_blocks(page):
    """A page's Python as one program, each line at its place on the page, so that errors name it. A block that needs
    more than the page, a model to download say, begins with more than ```python.
    """
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line == "```python", ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize(("page", "printed"), [
    ("README.md", "implementation='xla'"), ("docs/guide.md", "implementation='xla'"),
    ("docs/torch_bridge.md", "backward, xla")])
def test_python_runs(page, printed, tmp_path):
    for package in ("flax", "torch", "flatbuffers"):
        pytest.importorskip(package)
    program = tmp_path / f"page_{Path(page).stem}.py"  # a page may have the name of a package
    program.write_text(python_blocks(ROOT / page))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    if page != "README.md":
        environment |= compilation.variables(environment.get("XLA_FLAGS", ""))
    done = subprocess.run([sys.executable, "-W", "error", program], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0, f"{page}: exit {done.returncode}\n{done.stderr[-4000:]}"
    assert printed in done.stdout


@pytest.mark.parametrize(("page", "blocks"), [
    ("README.md", ["speed", "gpus", "calls", "headline", "slower"]), ("docs/benchmarks.md", ["benchmarks"])])
def test_generated_tables_are_what_dispatch_and_the_records_say(page, blocks):
    """`python -m bench report` writes them. With JAX 0.12 a Hopper GPU's compiler may have its say."""
    pytest.importorskip("matplotlib")
    if jax.__version_info__ >= (0, 12):
        pytest.skip("the tables are those of JAX 0.11")
    from bench import records, report
    found = records.read(records.RESULTS)
    for record in found:
        record["device_name"] = record["environment"]["device"]
    written = {match["name"]: match[0] for match in report.MARKERS.finditer((ROOT / page).read_text())}
    assert list(written) == blocks
    for name in blocks:
        assert report.block(name, found) in written[name], f"{page}: run `python -m bench report`"


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


def layers():
    """The rows of the picture of layers in docs/structure.md, from the top: the modules of each."""
    text = (ROOT / "docs/structure.md").read_text().partition("<!-- layers -->\n```text\n")[2].partition("```")[0]
    return [set(re.split(r" {2,}", line.strip())[1:]) for line in text.splitlines()]


def test_the_picture_of_layers_is_that_of_the_imports():
    row = {module: i for i, modules in enumerate(layers()) for module in modules}
    name = lambda path: "/".join(path[:1 + (path[0] == "kernels")])
    wrong, seen = [], set()
    for path in sorted(ROOT.glob("pallas_flash/**/*.py")):
        module = tuple(architecture.module_name(path).split(".")[1:])
        if not module or module[0] in ("testing", "__main__") or module == ("kernels",):
            continue
        seen.add(name(module))
        for target in architecture.ours(architecture.tree(path)):
            is_support = module[0] == "dispatch" and target[0] == "kernels"
            if target != ("",) and not is_support and row[name(target)] < row[name(module)]:
                wrong.append(f"{'.'.join(module)} imports {'.'.join(target)}")
    assert wrong == [] and seen == set(row)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    """Of this project, by the end of their path; `your_script.py` and a note that is an example are not."""
    folders = ("pallas_flash", "torch_bridge", "tests", "bench", "examples", "docs")
    files = [path.relative_to(ROOT).as_posix() for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text())
    assert [x for x in named if x != "setup.py" and not any(f"/{path}".endswith(f"/{x}") for path in files)] == []
