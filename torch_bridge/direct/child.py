"""The process that makes a plan: JAX as a compiler, no torch, and nothing of its parent but a request.

    python child.py INDEX PATH < REQUEST

INDEX is the device as the driver counts, PATH where the plan goes, REQUEST a line, the text of a `Request`. Writes
lines of JSON: {"step": what was done} after each step, and at the end {"done": true}, or {"reason": why there can be no
plan}, with {"problem": true} if that is true of the problem whenever it is asked.
"""

import json
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_bridge.direct.problem import Request

HERE = Path(__file__).resolve().parent


def alone() -> None:
    """Makes the modules of this folder importable by their names without what imports torch: the package's own code."""
    package = types.ModuleType("torch_bridge")
    package.__path__ = [str(HERE.parent)]
    sys.modules["torch_bridge"] = package
    # First, in place of this folder, whose names are not those of modules; with PYTHONSAFEPATH it is not there.
    sys.path[:] = [str(HERE.parents[1]), *(path for path in sys.path if not path or Path(path).resolve() != HERE)]


def say(**line: object) -> None:
    """Writes a line that the parent reads."""
    print(json.dumps(line), flush=True)


def changed(request: "Request") -> str | None:
    """Why what is installed now has no part in a plan of that name; to be asked before JAX, which may set variables."""
    from torch_bridge.direct.problem import versions

    here = versions(int(request.versions["driver"]))
    names = [name for name in sorted(here) if here[name] != request.versions.get(name)]
    if not names:
        return None
    return (f"needs what this process started with, but a new one finds another {', '.join(names)}: start it again, "
            "with packages that a new process finds")


def main(index: int, path: Path, text: str) -> None:
    """Makes the plan."""
    from torch_bridge.direct.problem import Request

    request = Request.of(text)
    if reason := changed(request):
        say(reason=reason)
        return
    try:
        from pallas_flash import UnsupportedError
        from torch_bridge.direct import compile as compiling
        from torch_bridge.direct import driver, lower, plan, plugin
    except ModuleNotFoundError as error:
        say(reason=f"needs what pallas_flash imports in a new process of {sys.executable}, got {error}: install it "
                   "there, or name its folder in PYTHONPATH")
        return
    if reason := plugin.why_not():
        say(reason=reason)
        return
    say(step="imported JAX")
    if (found := driver.capability(index)) != request.gpu.capability:  # its machine code would be another GPU's
        say(reason=f"needs device {index} of the process that compiles to be of compute capability "
                   f"{request.gpu.capability}, as {request.gpu.name}, it is of {found}: it sees other devices. Set "
                   "CUDA_VISIBLE_DEVICES before CUDA is used")
        return
    try:
        program = lower.lower(request)
    except UnsupportedError as error:
        say(reason=str(error), problem=True)
        return
    except lower.LoweringError as error:
        say(reason=str(error))
        return
    say(step="lowered")
    compiled = compiling.compile_program(program, index, lambda step: say(step=step))
    path.write_bytes(plan.write(compiled, text))
    say(done=True)


if __name__ == "__main__":
    alone()
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.stdin.readline().rstrip())
