"""Trains a small GPT (rotary, grouped-query, causal) in PyTorch with torch_bridge, beside PyTorch's own attention.

    python examples/train_gpt_torch.py                       two runs on the same text, compared
    python examples/train_gpt_torch.py --attention flash     one of them alone

On a GPU, if there is one, under bfloat16 autocast. The model is the one of train_gpt.py; `ATTENTION` holds the one line
in which the two runs differ.
"""

import argparse
import time
from collections.abc import Callable

import _options
import _report
import _text
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import torch_bridge

ATTENTION = {
    "flash": torch_bridge.scaled_dot_product_attention,
    "default": functional.scaled_dot_product_attention,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, length, dim): pairs of features turned by position * frequency."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** -(torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[2], device=x.device)[:, None] * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: argparse.Namespace, attend: Callable[..., Tensor]):
        super().__init__()
        self.attend = attend
        self.head_dim = args.dim // args.heads
        self.query = nn.Linear(args.dim, args.dim, bias=False)
        self.key = nn.Linear(args.dim, args.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(args.dim, args.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(args.dim, args.dim, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(args.dim), nn.RMSNorm(args.dim)
        self.mlp = nn.Sequential(nn.Linear(args.dim, 4 * args.dim), nn.GELU("tanh"), nn.Linear(4 * args.dim, args.dim))

    def attention(self, x: Tensor) -> Tensor:
        split_heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (batch, heads, length, dim)
        q, k, v = (split_heads(project(x)) for project in (self.query, self.key, self.value))
        out = self.attend(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def make_model(args: argparse.Namespace, name: str) -> nn.Module:
    """Tokens (batch, length) -> logits (batch, length, vocabulary); equal arguments give equal weights."""
    torch.manual_seed(args.seed)
    blocks = [Block(args, ATTENTION[name]) for _ in range(args.layers)]
    ends = [nn.RMSNorm(args.dim), nn.Linear(args.dim, _text.VOCABULARY)]
    return nn.Sequential(nn.Embedding(_text.VOCABULARY, args.dim), *blocks, *ends).to(DEVICE)


def loss_of(model: nn.Module, tokens: np.ndarray, dtype: str) -> Tensor:
    """Mean cross entropy, in nats, of each token of (batch, length + 1) given those before it."""
    batch = torch.from_numpy(tokens).long().to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(name: str, args: argparse.Namespace, text: np.ndarray, held_out: np.ndarray) -> _report.Run:
    """Trains a new model with the attention called `name`, on batches that depend on the seed alone."""
    model, run = make_model(args, name), _report.Run(name)
    optimizer = torch.optim.AdamW(model.parameters(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(0.1, 1.5 / max(args.steps, 2))  # a part of all steps; one step would be a division by 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.steps,
                                                   pct_start=warmup)
    losses: list[Tensor] = []
    start = 0.0
    with tqdm(total=args.steps, desc=name, unit="step") as progress:
        for tokens in _text.batches(text, args.steps, args.batch, args.context, args.seed):
            loss = loss_of(model, tokens, args.dtype)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if len(losses) == _report.WARM_UP:
                loss.item()  # waits
                start = time.perf_counter()
            if len(losses) % 10 == 0:  # an old loss: waiting for the device would leave it idle until the next step
                progress.set_postfix(loss=f"{losses[-10].item():.3f}", refresh=False)
            progress.update()
        losses[-1].item()  # waits
        run.measure(args, start)
    run.losses = torch.stack(losses).tolist()

    excerpts = _text.batches(held_out, 8, args.batch, args.context, args.seed)
    with torch.no_grad():
        run.held_out_loss = float(np.mean([loss_of(model, tokens, args.dtype).item() for tokens in excerpts]))
    return run


def which_implementation(args: argparse.Namespace) -> str:
    """What torch_bridge says about the attention of this model."""
    shape = lambda heads: (args.batch, heads, args.context, args.dim // args.heads)
    dtype = getattr(torch, args.dtype)
    query, key = (torch.empty(shape(heads), dtype=dtype, device=DEVICE) for heads in (args.heads, args.kv_heads))
    return torch_bridge.explain(query, key, key, is_causal=True, enable_gqa=True)


def main() -> None:
    args = _options.training_parser(__doc__, list(ATTENTION), "outputs/train_gpt_torch_loss.png").parse_args()
    args.dtype = args.dtype or _options.default_dtype(DEVICE)
    if DEVICE == "cpu":  # threads that wait for each other on busy cores make so small a model 10 times slower
        torch.set_num_threads(1)
    text, held_out = _text.standard_library()
    print(f"{len(text):,} characters to learn, {len(held_out):,} held out; on {DEVICE}")
    print(which_implementation(args))
    runs = [train(name, args, text, held_out) for name in args.attention]
    _report.finish(runs, args, f"PyTorch on {DEVICE}")


if __name__ == "__main__":
    main()
