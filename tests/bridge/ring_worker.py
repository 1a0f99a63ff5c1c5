"""One of the processes of test_ring.py: rank, size, folder. Results are saved there, by rank."""

import datetime
import sys
from pathlib import Path

import jax
import torch
import torch.distributed as dist
import torch.nn.functional as F

from torch_bridge import activation

RANK, SIZE, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])


def step(attention, tensors):
    """out and gradients of the local parts."""
    *leaves, dout = (x.detach().requires_grad_() for x in tensors)
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def rings(case):
    """The ring of the docs."""
    code = {}
    exec((FOLDER / "ring.py").read_text(), code)
    for dtype in (torch.float64, torch.bfloat16):
        yield dtype, step(code["ring_attention"], [code["zigzag"](x.to(dtype)) for x in case])


def torchs(case):
    """torch's own ring over the flash backend's operators, with the kernels that `activate` registers on CUDA."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_scaled_dot_product_flash_attention", activation._forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", activation._backward, "CPU")

    def scaled_dot_product_attention(*args, is_causal):  # as torch's function does on CUDA
        return torch.ops.aten._scaled_dot_product_flash_attention(*args, is_causal=is_causal)[0]
    F.scaled_dot_product_attention = scaled_dot_product_attention
    heads = case[0].shape[1]
    parts = [x.float().repeat_interleave(heads // x.shape[1], dim=1) for x in case]
    with context_parallel(init_device_mesh("cpu", (SIZE,)), buffers=parts, buffer_seq_dims=[2] * len(parts)):
        return step(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), parts)


jax.config.update("jax_disable_most_optimizations", True)
dist.init_process_group("gloo", init_method=f"file://{FOLDER / 'store'}", rank=RANK, world_size=SIZE,
                        timeout=datetime.timedelta(seconds=100))
case = torch.load(FOLDER / "case.pt")
found = {"torch": torchs(case), **dict(rings(case))}
torch.save(found, FOLDER / f"found{RANK}.pt")
dist.destroy_process_group()
