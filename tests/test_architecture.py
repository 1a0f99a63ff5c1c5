"""Who may import whom, and how large things may grow: read from the source, so that nothing has to run."""

import ast
import functools
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {path.stem for path in ROOT.glob("pallas_flash/*") if path.stem != "__init__"}
SOURCES = sorted([*ROOT.glob("pallas_flash/**/*.py"), *ROOT.glob("torch_bridge/**/*.py")])

FOUNDATIONS = {"errors", "masks", "scores", "spec"}
ARROWS = {
    "arrays": set(), "arithmetic": set(),
    "": {"attention", "autodiff", "context_parallel", "errors", "mask_check", "masks", "relative_scores", "scores",
         "spec"},
    "arguments": {*FOUNDATIONS},
    "attention": {"arguments", "autodiff", "compat", "device", "dispatch", "forks", "packed", *FOUNDATIONS},
    "cache": {"arguments", "autodiff", "compat", "device", "dispatch", "filled", "forks", "paging", "quantised",
              "sharding", "storage", *FOUNDATIONS},
    "storage": {"arguments", "mask_fields", "paging", "quantised", *FOUNDATIONS},
    "packed": {"arguments", "mask_fields", *FOUNDATIONS},
    "autodiff": {"device", "dispatch", "filled", "sharding", "sinks", "softmax", *FOUNDATIONS},  # dispatch: the passes
    "sharding": {"compat", "spec"},
    "sinks": {"compat", "sharding", "spec"},
    "launches": {"device", "dispatch", "errors", "spec"},  # and what a launch is
    "dispatch": {"device", "errors", "padding", "spec"},  # and each kernels package's support
    "spec": {"errors", "masks", "paging", "scores", "softmax"},  # softmax: what a bias is anchored at
    "scores": {"errors", "mask_fields"},  # fields: those of a score function are kept as those of a mask
    "relative_scores": {"errors", "scores"},
    "padding": {"spec"},
    "paging": set(),
    "quantised": {"paging"},
    "filled": {"mask_fields", "masks", "paging"},
    "mask_fields": {"errors"},
    "masks": {"arithmetic", "errors", "mask_fields"},
    "mask_check": {"errors", "forks", "masks"},
    "tiles": {"masks"},  # for Bounds, and minimum and maximum of plain and traced positions
    "reference": {"dropout", "paging", "quantised", "softmax", *FOUNDATIONS},
    "flax": {"arguments", "attention", "context_parallel", "dispatch", "filled", "forks", *FOUNDATIONS},
    "forks": {"compat"},
    "device": {"compat"},  # what an array is under a tracer
    "diagnosis": {"attention", "device", "masks"},  # what it reports on
    "check": {"attention", "device", "diagnosis", "dispatch", "masks", "spec"},
    "__main__": {"check", "diagnosis"},
    "context_parallel": {"arguments", "attention", "autodiff", "compat", "context_parallel", "device", "dispatch",
                         "dropout", "forks", "sharding", "sinks", "softmax", *FOUNDATIONS},
    "softmax": set(), "dropout": set(), "errors": set(), "compat": set(),
}
"""Which modules of pallas_flash each may import; those of a package may import each other."""
FOR_KERNELS = {"compat", "device", "dropout", "filled", "packed", "padding", "paging", "quantised", "softmax", "tiles",
               *FOUNDATIONS}

ON_MOSAIC = {"ampere", "hopper"}
"""The kernels packages that may import `kernels.mosaic`; no package may import any other one."""

MOSAIC = "jax.experimental.pallas.mosaic_gpu"
PRIVATE = "jax._" + "src"
MAX_LINES = 480  # a file has about 400
MAX_PARAMETERS = 7
MAX_ANY = 100  # 37 on 2026-11-30: 26 in pallas_flash, 11 in torch_bridge
"""In both packages, imports included. Where numbers are plain or traced, the leaves of a tree are asked for, or a list
becomes an array, it says what there is to say; elsewhere it hides an array that was forgotten."""
MANY_PARAMETERS = {
    # public signatures, which name every argument of the problem, and what mirrors them
    "pallas_flash/attention.py": {"flash_attention", "explain", "dot_product_attention"},
    "pallas_flash/cache.py": {"attend", "explain"},
    "pallas_flash/storage.py": {"empty", "empty_paged"},
    "pallas_flash/spec.py": {"of"},
    "pallas_flash/flax.py": {"__call__"},
    "pallas_flash/context_parallel/attention.py": {"context_parallel_attention"},
    "pallas_flash/context_parallel/explanation.py": {"explain_context_parallel"},
    "torch_bridge/sdpa.py": {"scaled_dot_product_attention", "prepare"},
    "torch_bridge/explanation.py": {"explain", "precompile"},
    "torch_bridge/flash.py": {"flash_attention", "prepare"},
    "torch_bridge/flash_attn.py": {  # flash-attn's signatures
        "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache"},
    "torch_bridge/partial.py": {"partial_attention", "partial_attention_backward"},
    "torch_bridge/activation.py": {"_backward"},  # aten's
    "torch_bridge/varlen.py": {"_forward", "_forward_into", "_backward"},
    # what transformers calls
    "torch_bridge/transformers/attention.py": {"__call__"},
    "torch_bridge/transformers/masks.py": {"mask"},
    "torch_bridge/patching.py": {"scaled_dot_product_attention", "_attend"},
}


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(source):
    """The modules that a syntax tree imports anywhere, also inside functions; `from a import b` counts as a.b."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(source):
    """What it imports of pallas_flash, as ("masks",) or ("kernels", "xla", "forward"); ("",) for public names."""
    for name in imports(source):
        package, *parts = name.split(".")
        if package == "pallas_flash":
            yield tuple(parts) if parts and parts[0] in MODULES else ("",)


def allowed(module, target):
    """Whether a module of pallas_flash, named by its path in the package, may import another."""
    if target[0] in ("arithmetic", "arrays"):  # words for annotations; positions
        return module[0] != "errors"
    if module[0] == "testing":
        return target[0] != "kernels"
    if module[0] == "kernels":
        if target[0] == "kernels":
            own_package, shared = target[:2] == module[:2], target[1:2] == ("mosaic",)
            return own_package or (shared and module[1] in ON_MOSAIC)
        return target[0] in FOR_KERNELS
    if module[0] == "dispatch" and target[0] == "kernels":
        return len(target) > 2 and target[2] == "support"
    if module[0] == "launches" and target[0] == "kernels":
        return target[1:3] in (("mosaic", "launch"), ("mosaic", "target"))
    return target[0] in ARROWS[module[0]]


def wrong_arrows(module, source):
    return [f"{'.'.join(module)} imports {'.'.join(target)}" for target in ours(source) if not allowed(module, target)]


@pytest.mark.parametrize("path", sorted(ROOT.glob("pallas_flash/**/*.py")), ids=module_name)
def test_arrows(path):
    module = tuple(module_name(path).split(".")[1:]) or ("",)
    assert wrong_arrows(module, tree(path)) == []


@pytest.mark.parametrize(("module", "source"), [
    ("kernels.xla.forward", "from pallas_flash import autodiff"),
    ("kernels.xla.forward", "from pallas_flash.kernels.hopper import schedule"),
    ("kernels.xla.forward", "from pallas_flash.kernels.mosaic import scheduling"),
    ("kernels.hopper.calls", "from pallas_flash.kernels.xla import forward"),
    ("kernels.ampere.calls", "from pallas_flash.kernels.hopper import schedule"),
    ("kernels.mosaic.ptx", "from pallas_flash.kernels.hopper import schedule"),
    ("kernels.mosaic.call", "from pallas_flash.kernels.xla.blocks import Blocks"),
    ("kernels.mosaic.call", "from pallas_flash import autodiff"),
    ("kernels.hopper.forward.kernel", "from pallas_flash.kernels import xla"),
    ("kernels.xla.forward", "def f():\n    import pallas_flash.dispatch"),
    ("masks", "from pallas_flash.tiles import cdiv"),
    ("softmax", "import pallas_flash"),
    ("dispatch", "from pallas_flash.kernels.xla import forward"),
    ("launches", "from pallas_flash.kernels.hopper import launches"),
])
def test_wrong_arrows_are_seen(module, source):
    assert wrong_arrows(tuple(module.split(".")), ast.parse(source))


def importers(*names):
    """The files that import one of the packages."""
    return {path.relative_to(ROOT).as_posix() for path in SOURCES
            if any(name == found or found.startswith(name + ".") for found in imports(tree(path)) for name in names)}


def test_only_compat_touches_what_is_private_in_jax():
    assert {path.relative_to(ROOT).as_posix() for path in SOURCES if PRIVATE in path.read_text()} <= {
        "pallas_flash/compat.py"}


def test_no_module_imports_a_private_name_of_another():
    found = {path.relative_to(ROOT).as_posix(): name for path in SOURCES for name in imports(tree(path))
             if re.match(r"(pallas_flash|torch_bridge)\b.*\._(?!_)", name)}
    assert found == {}


def test_flax_and_torch_have_their_places():
    assert importers("flax") == {"pallas_flash/flax.py"}
    assert all(path.startswith("torch_bridge/") for path in importers("torch"))
    assert all(path.startswith("torch_bridge/transformers/") for path in importers("transformers"))


def test_jax_meets_torch_in_one_file():
    assert importers("jax") & importers("torch") == {"torch_bridge/exchange.py"}


def test_who_compiles_imports_no_torch_and_who_launches_no_jax():
    """Within direct/: said.py imports JAX to warn, where a call goes through DLPack after all."""
    direct = lambda *names: {path.rpartition("/")[2] for path in importers(*names) if "/direct/" in path}
    assert direct("torch") == {
        "allocation.py", "attention.py", "counters.py", "decoding.py", "guards.py", "lengths.py", "operations.py",
        "reasons.py", "repeated.py", "room.py", "runner.py", "shared.py", "shortcut.py", "storage.py", "tracing.py"}
    assert direct("jax", "pallas_flash") == {"beside.py", "child.py", "lower.py", "plugin.py", "said.py", "score_ir.py"}


def test_the_bridge_imports_no_kernel():
    in_bridge = {path for path in importers("pallas_flash.kernels") if path.startswith("torch_bridge/")}
    assert not in_bridge, "a kernel is launched through one public function of pallas_flash"


def test_kernels_do_not_ask_whether_they_are_interpreted():
    """What the interpreter cannot run has a plain meaning (`interpreted_as`): only that decorator knows of the mode."""
    mode = re.compile(r"_in_flight|is_interpret|\binterpreted\(|force_gpu_interpret_mode")
    found = {path.relative_to(ROOT).as_posix() for path in SOURCES if mode.search(path.read_text())}
    assert found == {"pallas_flash/kernels/mosaic/interpret.py"}


def kernel_sources(path):
    """A file of a kernels package, and what it imports of kernels packages, directly or not."""
    found, files = set(), [path]
    while files:
        found.add(file := files.pop())
        for target in ours(tree(file)):
            if target[0] == "kernels":
                parents = [ROOT / "pallas_flash" / pathlib.Path(*target[:n]) for n in range(2, len(target) + 1)]
                files += {parent.with_suffix(".py") for parent in parents if parent.with_suffix(".py").exists()} - found
    return found


def test_dispatch_reads_no_mosaic():
    """What dispatch imports of a kernels package, and what that imports in turn, are read on any machine."""
    for path in ROOT.glob("pallas_flash/kernels/*/support.py"):
        files = kernel_sources(path)
        assert not any("pallas" in name.split(".") or "mlir" in name for file in files for name in imports(tree(file)))


FLOORS = ("units", "schedule", "work", "memory", "rules", "defaults")
"""What says how fast, from the ground up: each module imports only those before it, and no Mosaic."""


@pytest.mark.parametrize(("package", "floor"), [
    (package, floor) for package in sorted(ON_MOSAIC) for floor in FLOORS if (package, floor) != ("ampere", "units")])
def test_floors_stand_on_those_before(package, floor):
    source = tree(ROOT / f"pallas_flash/kernels/{package}/{floor}.py")
    own = {target[2] for target in ours(source) if target[:2] == ("kernels", package)}
    assert own <= set(FLOORS[:FLOORS.index(floor)])
    assert not any("pallas" in name.split(".") or "mlir" in name for name in imports(source))


def test_importing_pulls_in_neither_frameworks_nor_mosaic():
    program = f"import sys, pallas_flash; print(*sorted({{'flax', 'torch', {MOSAIC!r}}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_sizes(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: split it"
    exempt = MANY_PARAMETERS.get(path.relative_to(ROOT).as_posix(), set())
    counts = parameter_counts(path)
    assert {name: count for name, count in counts.items() if count > MAX_PARAMETERS and name not in exempt} == {}


def parameter_counts(path):
    """The parameters of every function of a file."""
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    arguments = [[*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] for f in functions]
    return {f.name: sum(a.arg not in ("self", "cls") for a in names) for f, names in zip(functions, arguments)}


def test_exemptions_are_needed():
    for path in SOURCES:
        exempt = MANY_PARAMETERS.get(path.relative_to(ROOT).as_posix(), set())
        assert exempt <= {name for name, count in parameter_counts(path).items() if count > MAX_PARAMETERS}


def test_few_annotations_are_any():
    counts = {path.relative_to(ROOT).as_posix(): len(re.findall(r"\bAny\b", path.read_text())) for path in SOURCES}
    most = sorted(counts, key=lambda name: -counts[name])[:5]
    assert sum(counts.values()) <= MAX_ANY, (
        f"Any is written {sum(counts.values())} times (37 on 2026-11-30), most in {most}: name the type")
