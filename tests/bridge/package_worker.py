"""A GPT, compiled ahead of time or exported, in a package. Run by test_direct_compile.py and test_compile_gpu.py.

    python package_worker.py make|run|export|load cpu|cuda ours|torch PATH

With "torch" PyTorch's own attention is in the place of ours. Prints, after "run" and "load", whether JAX was imported.
Where it dies of a signal, or has not ended after `SECONDS`, the standard error says in which line.
"""

import faulthandler
import sys
from pathlib import Path

import torch
import torch._inductor.cpu_vec_isa

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch_bridge
from bridge.gpt import Gpt

INDUCTOR = {"aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False}  # which one file alone would read

SECONDS = 300


def try_no_vector_instructions():
    """Else the making and the loading of a package alike ask what vector instructions the CPU has (the loading for the
    sake of one warning): with AMX ten runs of a compiler and of a Python that imports torch, 30 s and more, each time.
    """
    torch._inductor.cpu_vec_isa.supported_vec_isa_list.clear()


def main(way, device, whose, path):
    if whose == "torch":
        torch_bridge.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, x = Gpt(128, 2, blocks=1).to(device, dtype).eval(), torch.randint(50, (2, 40), device=device)
    with torch.no_grad():
        if way in ("make", "export"):
            program = torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
            if way == "export":
                torch.export.save(program, path)
                return
            torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=INDUCTOR)
            return
        packaged = torch.export.load(path).module() if way == "load" else torch._inductor.aoti_load_package(path)
        for length in (40, 17):
            x = torch.randint(50, (2, length), device=device)
            found, wanted = packaged(x).double(), model(x).double()
            assert ((found - wanted).norm() / wanted.norm()).item() < (1e-2 if device == "cuda" else 1e-5)
    print("jax" in sys.modules, flush=True)


if __name__ == "__main__":
    faulthandler.enable(all_threads=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try_no_vector_instructions()
    main(*sys.argv[1:])
