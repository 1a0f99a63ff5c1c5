"""What a first `generate` of a process takes: `python -m bench.first_generate ATTENTION CACHE TOKENS DEVICE`.

A Llama with random weights writes TOKENS tokens. ATTENTION is "sdpa" or "pallas", CACHE "dynamic" or "static" (without
torch.compile, which transformers would otherwise start by itself). Everything but torch_bridge is imported, and the
model is on DEVICE, before it prints "ready"; then it waits for a line, and prints one JSON object. Seconds are those
until the tokens are there; "import" is of torch_bridge and its registration. It imports no module of bench that imports
JAX, since whether torch_bridge does is one of the things that it tells.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import waiting

__all__ = ["measure"]

BATCH, PROMPT, VOCABULARY = 2, 30, 256
DIMS = {"cuda": 64, "cpu": 16}
"""The size of a head; there are 4, and 2 of keys."""


def _model(device: str) -> Any:
    dim = DIMS[device]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4 * dim, intermediate_size=8 * dim, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, initializer_range=0.1)
    return LlamaForCausalLM(config).to(device=device, dtype=torch.bfloat16).eval()


def _largest_error(model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    """|logits - truth| / |truth| of the worst token, where the truth is "eager" on the whole text, without a cache."""
    model.float().set_attn_implementation("eager")
    with torch.no_grad():
        truth = model(tokens[:, :-1]).logits[:, PROMPT - 1:]
    return float(((logits.float() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())


def measure(attention: str, cache: str, tokens: int, device: str, wait: Callable[[], None] = lambda: None,
            ) -> dict[str, Any]:
    """Seconds of the import and of two times to generate, how wrong the logits are, and whether JAX was imported."""
    model = _model(device)
    model.set_attn_implementation("sdpa")
    prompt = torch.randint(2, VOCABULARY, (BATCH, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    wait()
    seconds: dict[str, float] = {}

    def timed[T](name: str, call: Callable[[], T]) -> T:
        begin = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begin
        return result

    def register() -> None:
        import torch_bridge
        torch_bridge.transformers.register()
        model.set_attn_implementation(attention)

    def generate() -> Any:
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, cache_implementation=cache, disable_compile=True, return_dict_in_generate=True,
            output_logits=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        timed("import", register if attention == "pallas" else lambda: None)
        written = timed("generate", generate)
        timed("second generate", generate)
    return {"seconds": seconds, "imports_jax": "jax" in sys.modules,
            "error": _largest_error(model, written.sequences, torch.stack(written.logits, 1)),
            "warnings": [str(x.message) for x in warned if x.category.__name__ == "FallbackWarning"]}


def main() -> None:
    """Prints the object."""
    attention, cache, tokens, device = sys.argv[1:]
    print(json.dumps(measure(attention, cache, int(tokens), device, waiting.wait_for_word)), flush=True)


if __name__ == "__main__":
    main()
