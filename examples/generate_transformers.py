"""Generates text with a Hugging Face model whose attention is pallas_flash, beside the model's own attention.

    python examples/generate_transformers.py                          a small Llama, prompts of several lengths
    python examples/generate_transformers.py --cache static           with a cache of fixed size
    python examples/generate_transformers.py --attention sdpa,pallas  beside PyTorch's function

The model has random weights, so it needs no download and writes nonsense: what counts is that all write the same.
`torch_bridge.transformers.register()` is the one line that a model of your own needs.
"""

import argparse
import time

import _text
import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import torch_bridge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = ["def main():", "import numpy as", "for line in sys.stdin:\n    print(line", "class"]
PADDING = 0
TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest difference allowed between the logits of two kinds of attention, as a part of the largest logit."""


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with grouped queries and random weights."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=_text.VOCABULARY, hidden_size=args.dim, intermediate_size=3 * args.dim,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096, pad_token_id=PADDING, bos_token_id=1, eos_token_id=None, initializer_range=0.1)
    return LlamaForCausalLM(config).to(device=DEVICE, dtype=getattr(torch, args.dtype)).eval()


def left_padded(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (batch, length) that end together, and which of them are no padding."""
    encoded = [_text.encode(prompt) for prompt in prompts]
    length = max(map(len, encoded))
    tokens = np.stack([np.pad(row, (length - len(row), 0), constant_values=PADDING) for row in encoded])
    ids = torch.from_numpy(tokens).long().to(DEVICE)
    return ids, (ids != PADDING).long()


class Progress(StoppingCriteria):
    """Moves a bar on with each token; stops nothing."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: LlamaForCausalLM, name: str, args: argparse.Namespace) -> torch.Tensor:
    """Tokens (batch, length) with the attention called `name`; prints the speed of a first and of a second time."""
    ids, mask = left_padded(PROMPTS)
    model.set_attn_implementation(name)
    for time_of in ("first", "second"):
        with tqdm(total=args.tokens, desc=f"{name}, {time_of} time", unit="token") as bar:
            start = time.perf_counter()
            written = model.generate(ids, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False,
                                     cache_implementation=args.cache, stopping_criteria=[Progress(bar)])
            written = written.cpu()  # waits
            seconds = time.perf_counter() - start
        print(f"{name}, {time_of} time: {len(ids) * args.tokens / seconds:,.0f} tokens/s")
    return written


def logits(model: LlamaForCausalLM, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Those of the whole text (batch, length, vocabulary), in one pass."""
    model.set_attn_implementation(name)
    tokens = tokens.to(DEVICE)
    with torch.no_grad():
        return model(tokens, attention_mask=(tokens != PADDING).long()).logits.float()


def compare(model: LlamaForCausalLM, names: list[str], texts: list[torch.Tensor], dtype: str) -> None:
    """Prints how far apart two kinds of attention are; AssertionError if that is more than rounding explains."""
    expected = logits(model, names[0], texts[0])
    real = (texts[0] != PADDING).to(DEVICE)
    for name, text in zip(names[1:], texts[1:]):
        difference = (logits(model, name, texts[0]) - expected)[real].abs().max() / expected[real].abs().max()
        same = (text == texts[0]).float().mean()
        print(f"{names[0]} and {name}: {same:.0%} of the tokens are the same, largest difference of logits "
              f"{difference:.1e} of the largest")
        assert difference < TOLERANCE[dtype], f"expected less than {TOLERANCE[dtype]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=lambda text: text.split(","), default=["eager", "pallas"],
                        metavar="NAME,...", help="of eager, sdpa, pallas; default: eager,pallas")
    parser.add_argument("--tokens", type=int, default=40, help="to generate")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="bfloat16" if DEVICE == "cuda" else "float32")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if DEVICE == "cpu":  # threads that wait for each other on busy cores make so small a model slower
        torch.set_num_threads(1)
    torch_bridge.transformers.register()
    model = make_model(args)
    texts = [generate(model, name, args) for name in args.attention]
    compare(model, args.attention, texts, args.dtype)
    print("What ran:", torch_bridge.report(), sep="\n")


if __name__ == "__main__":
    main()
