"""One of several processes, on CPU: attention of DTensors by each rule; alone, FSDP around a GPT. For test_sharding.py.

    python sharded_worker.py RANK SIZE PORT
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import torch_bridge
from torch_bridge import scaled_dot_product_attention as OURS


def tensors(q_heads, kv_heads, batch=4):
    torch.manual_seed(0)
    return [torch.randn(batch, h, 5, 8) for h in (q_heads, kv_heads, kv_heads)]


def check(mesh, given, placements, **options):
    """out and gradients equal those of whole tensors; out keeps its placement: nothing was gathered."""
    whole = [x.clone().requires_grad_() for x in given]
    parts = [distribute_tensor(x, mesh, p).requires_grad_() for x, p in zip(given, placements)]
    out, ours = OURS(*whole, **options), OURS(*parts, **options)
    assert isinstance(ours, DTensor) and ours.placements == tuple(placements[0]), ours.placements
    torch.testing.assert_close(ours.full_tensor(), out)
    dout = torch.randn_like(out)
    torch.distributed.broadcast(dout, 0)
    out.backward(dout)
    ours.backward(distribute_tensor(dout, mesh, placements[0]))
    for x, y in zip(whole, parts):
        torch.testing.assert_close(y.grad.full_tensor(), x.grad)


def rules(size):
    mesh = init_device_mesh("cpu", (size,))
    for placement in (Shard(0), Shard(1)):
        check(mesh, tensors(4, 2), [[placement]] * 3, is_causal=True, enable_gqa=True)
    check(mesh, tensors(4, 1), [[Shard(1)], [Replicate()], [Replicate()]], enable_gqa=True)
    with torch.no_grad():
        for heads, axis in ((6, 3), 1), ((4, 4), 2):  # no whole groups, and by length: gathered
            parts = [distribute_tensor(x, mesh, [Shard(axis)]) for x in tensors(*heads)]
            torch.testing.assert_close(OURS(*parts, enable_gqa=True).full_tensor(),
                                       OURS(*tensors(*heads), enable_gqa=True))
    q, k, v = (distribute_tensor(x, mesh, [Shard(0)]) for x in tensors(4, 4))
    lengths = distribute_tensor(torch.tensor([1, 2, 3, 4], dtype=torch.int32), mesh, [Shard(0)])
    bias, whole = torch.randn(1, 4, 5, 5), tensors(4, 4)
    torch.distributed.broadcast(bias, 0)
    leaf, shared = bias.clone().requires_grad_(), distribute_tensor(bias, mesh, [Replicate()]).requires_grad_()
    expected = torch_bridge.flash_attention(*whole, attn_mask=leaf, kv_lengths=torch.tensor([1, 2, 3, 4]))
    out = torch_bridge.flash_attention(q, k, v, attn_mask=shared, kv_lengths=lengths)
    assert out.placements == (Shard(0),)
    torch.testing.assert_close(out.full_tensor(), expected)
    expected.sum().backward()
    out.sum().backward()
    torch.testing.assert_close(shared.grad.full_tensor(), leaf.grad)


def dropout(rank, size):
    """A call is computed whole, by one seed, whatever the processes have drawn before. Those outside the mesh need not
    know of it, as in pipelines: objects were gathered from all, for which a GPU is waited for besides.
    """
    dropout_on(init_device_mesh("cpu", (size,)), rank, [Replicate()], [Shard(0)], [Shard(1)], [Shard(2)])
    dropout_on(init_device_mesh("cpu", (1, size)), rank, [Replicate(), Shard(0)])
    part = DeviceMesh("cpu", [0])
    if rank == 0:
        dropout_on(part, rank, [Shard(0)])


def dropout_on(mesh, rank, *placements):
    whole = [x.requires_grad_() for x in tensors(4, 2)]
    for placed in placements:
        parts = [distribute_tensor(x.detach(), mesh, placed).requires_grad_() for x in whole]
        dout = torch.ones(4, 4, 5, 8)
        torch.manual_seed(7)
        out = OURS(*whole, dropout_p=0.5, is_causal=True, enable_gqa=True)
        torch.manual_seed(7 + rank)
        ours = OURS(*parts, dropout_p=0.5, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(ours.full_tensor(), out)
        for x, y in zip(torch.autograd.grad(out, whole, dout),
                        torch.autograd.grad(ours, parts, distribute_tensor(dout, mesh, ours.placements))):
            torch.testing.assert_close(y.full_tensor(), x)
    compiled = torch.compile(OURS, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7 + rank)
    with torch.no_grad():
        ours = compiled(*parts, dropout_p=0.5, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours.full_tensor(), out)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return x + self.out(OURS(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def fsdp(rank, size):
    """A step of FSDP, with and without checkpoints of activations, has the losses of a model that is whole."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    def losses(shard, checkpoint):
        torch.manual_seed(1)
        blocks = [Block(), Block()]
        model = torch.nn.Sequential(*(map(checkpoint_wrapper, blocks) if checkpoint else blocks))
        if shard:
            mesh = init_device_mesh("cpu", (size,))
            for block in model:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer, x = torch.optim.SGD(model.parameters(), 0.3), torch.randn(2 * size, 6, 32)
        mine = x[2 * rank:2 * rank + 2] if shard else x
        for _ in range(3):
            loss = model(mine).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach().clone()
            if shard:
                dist.all_reduce(total, dist.ReduceOp.SUM)
                total /= size
            yield total.item()

    wanted = [*losses(False, False)]
    for checkpoint in (False, True):
        found = [*losses(True, checkpoint)]
        assert max(abs(a - b) for a, b in zip(found, wanted)) < 1e-5, (found, wanted)


def main(rank, size, port):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    rules(size) if size > 1 else fsdp(rank, size)
    dropout(rank, size)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
