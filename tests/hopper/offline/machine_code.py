"""Makes machine code of Mosaic GPU modules; run by `tools`, in its own process.

    python -m tests.hopper.offline.machine_code

Reads the path of a module from each line of its input, and answers with a line of JSON: the kernel's name, registers,
spills, ptxas' advice, whether it multiplies, how often a step of its hot loop moves part of a descriptor out of a
vector register and touches a spilled one (`sass`), and whether it compiled. The environment is that of
`places.environment`. JAX's plugin asks for the ptxas on PATH once, so each ptxas has a process of its own.
"""

import ctypes
import functools
import itertools
import os
import re
import sys
from pathlib import Path

from tests.hopper.offline import sass, tools

_number = itertools.count()


@functools.cache
def _compiler():
    """The plugin's function, which takes a module and its length."""
    import jax.experimental.mosaic.gpu  # noqa: F401  # tells the plugin where its tools and its runtime library are
    import jax_plugins.xla_cuda13 as plugin
    compiler = ctypes.CDLL(str(plugin._get_library_path())).MosaicGpuCompile
    compiler.argtypes, compiler.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    return compiler


def _compile(module: bytes, said: Path) -> bool:
    """Compiles a module; `said` holds what the compiler wrote to stdout meanwhile.

    MOSAIC_GPU_DUMP_TO would give it a file for each part, and 200 MB of what each pass makes: half of the time.
    """
    sys.stdout.flush()
    stdout = os.dup(1)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        try:
            return bool(_compiler()(module, len(module)))
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)


def parts(text: str) -> tuple[str, str, str]:
    """PTX, ptxas' report and machine code in what the compiler wrote, one after the other; "" for what is missing."""
    ptx, start, rest = text.partition("\nptxas ")
    report, target, code = rest.partition("\n\t.target")
    return ptx, (start + report).strip(), target + code


@functools.cache
def compile_module(module: bytes) -> dict:
    """Compiles one module and reads what ptxas said of it; PTX, report and machine code stay in PALLAS_FLASH_DUMPS."""
    work = Path(os.environ["PALLAS_FLASH_DUMPS"])
    compiled = _compile(module, work / "said")
    ptx, report, code = parts((work / "said").read_text())
    number = lambda pattern: int(m.group(1)) if (m := re.search(pattern, report)) else None
    kernel = m.group(1) if (m := re.search(r"\.entry (\w+)_mosaic_gpu_kernel\b", ptx)) else None
    stem = f"{kernel}_{next(_number)}"
    for kind, part in (("ptx", ptx), ("ptxas", report), ("sass_ctrl", code)):
        (work / f"{stem}.{kind}").write_text(part)
    product = "HGMMA" if "HGMMA" in code else "HMMA"
    return dict(kernel=kernel, compiled=compiled, multiplies=product in code,
                moved_descriptors=sass.moved_descriptors(code), spills_inside=sass.spills_inside(code, product),
                unset_loads=sass.unset_loads(code),
                registers=number(r"Used (\d+) registers"), spill_bytes=number(r"(\d+) bytes spill stores"),
                advice=sorted(set(re.findall(r"C75\d\d", report))))


if __name__ == "__main__":
    tools.answer(lambda path: compile_module(Path(path).read_bytes()))
