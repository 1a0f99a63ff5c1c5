"""Generates text with a cache of keys and values, from the GPT of train_gpt.py after a moment of training.

    python examples/generate.py                   with a cache, and without one, which must give the same
    python examples/generate.py --page-size 16    the cache in pages, handed out in any order

Prompts of different lengths are read at once, each in its own row of the batch; then every step adds a token to each.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator

import _mesh
import _options
import _text
import jax
import jax.numpy as jnp
import numpy as np
import train_gpt
from flax import nnx
from tqdm import tqdm

from pallas_flash import cache

PROMPTS = ["def ", "class Reader", "import ", "    for i in range(", "if __name__ ==", "    return self", "try:\n", "#"]
TEMPERATURE = 0.5
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""Largest difference allowed between a logit with the cache and without it, by the type of the activations."""


class CachedAttention(nnx.Module):
    """Causal attention to all tokens so far, whose keys, rotated by their positions, and values it keeps."""

    def __init__(self, empty: cache.Cache):
        self.cache = nnx.Cache(empty)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **_: object) -> jax.Array:
        filled = self.cache.get_value()
        positions = filled.lengths[:, None] + jnp.arange(query.shape[1])  # (batch, new tokens)
        filled = cache.append(filled, train_gpt.rotate(key, positions), value)
        self.cache.set_value(filled)
        return cache.attend(train_gpt.rotate(query, positions), filled)


def empty_cache(args: argparse.Namespace, batch: int, capacity: int) -> cache.Cache:
    """That of one layer, for `capacity` tokens of each sequence."""
    heads, dim = args.kv_heads, args.dim // args.heads
    if not args.page_size:
        return cache.empty(batch, capacity, heads, dim, dtype=args.dtype)
    count = -(-capacity // args.page_size)
    table = np.random.default_rng(args.seed).permutation(batch * count).reshape(batch, count)
    return cache.empty_paged(table, (batch * count, args.page_size), heads, dim, dtype=args.dtype)


def with_caches(model: train_gpt.GPT, empty: cache.Cache) -> train_gpt.GPT:
    """The model, with the same parameters, whose layers keep keys and values."""
    model = nnx.merge(*nnx.split(model))
    for block in model.blocks:
        block.attention.attention_fn = nnx.data(CachedAttention(jax.tree.map(jnp.copy, empty)))
    return model


def hide_padding(model: train_gpt.GPT, lengths: jax.Array) -> None:
    """Ends each sequence after its own prompt: what comes next is written over the padding."""
    for block in model.blocks:
        kept = block.attention.attention_fn.cache
        kept.set_value(dataclasses.replace(kept.get_value(), lengths=lengths))


def with_a_cache(model: train_gpt.GPT, empty: cache.Cache, prompts: np.ndarray, lengths: np.ndarray,
                 noise: jax.Array) -> Iterator[jax.Array]:
    """The scores of each new token, (batch, vocabulary): logits plus noise. The largest is the token, and read next."""
    graph, caches, rest = nnx.split(with_caches(model, empty), nnx.Cache, ...)

    @functools.partial(jax.jit, donate_argnums=0)  # so that caches are written in place
    def read(caches: nnx.State, tokens: jax.Array, lengths: jax.Array | None) -> tuple[nnx.State, jax.Array]:
        model = nnx.merge(graph, caches, rest)
        logits = model(tokens)
        if lengths is not None:
            hide_padding(model, lengths)
        last = logits[:, -1] if lengths is None else logits[jnp.arange(len(lengths)), lengths - 1]
        return nnx.state(model, nnx.Cache), last

    caches, logits = read(caches, jnp.asarray(prompts), jnp.asarray(lengths))
    yield (scores := logits + noise[0])
    for of_step in noise[1:]:
        caches, logits = read(caches, scores.argmax(axis=-1)[:, None], None)
        yield (scores := logits + of_step)


def without_a_cache(model: train_gpt.GPT, prompts: np.ndarray, lengths: np.ndarray,
                    noise: jax.Array) -> Iterator[jax.Array]:
    """The same; each step computes the keys of all tokens again."""
    @nnx.jit
    def read(model: train_gpt.GPT, tokens: jax.Array, last: jax.Array) -> jax.Array:
        return model(tokens)[jnp.arange(len(last)), last]

    tokens, rows = jnp.pad(prompts, ((0, 0), (0, len(noise)))), jnp.arange(len(lengths))
    for step, of_step in enumerate(noise):
        scores = read(model, tokens, lengths + step - 1) + of_step
        yield scores
        tokens = tokens.at[rows, lengths + step].set(scores.argmax(axis=-1).astype(tokens.dtype))


def timed(name: str, steps: Iterator[jax.Array], batch: int, count: int) -> np.ndarray:
    """The scores of all steps, (steps, batch, vocabulary); says how many tokens a second there were."""
    found, start = [], 0.0
    with tqdm(total=batch * count, desc=name, unit="token") as progress:
        for scores in steps:
            found.append(jax.block_until_ready(scores))
            if len(found) == 2:  # the first two compile
                start = time.perf_counter()
            progress.update(batch)
    speed = batch * (count - 2) / (time.perf_counter() - start)
    print(f"{name}: {speed:,.0f} tokens/s")
    return np.stack(found)


def compare(ours: np.ndarray, theirs: np.ndarray, dtype: str) -> str:
    """A line on how far scores differ; AssertionError if that is more than rounding. Two tokens that are equally likely
    but for rounding may part the texts of a row: what follows is not compared.
    """
    parted = np.cumsum(ours.argmax(axis=-1) != theirs.argmax(axis=-1), axis=0)
    same_text = np.concatenate([np.zeros_like(parted[:1]), parted[:-1]]) == 0  # (steps, batch): up to here
    difference = np.abs(ours - theirs).max(axis=-1, where=same_text[..., None], initial=0).max()
    same = np.mean(parted[-1] == 0)
    line = f"largest difference of scores {difference:.1e}, {same:.0%} of the texts are the same"
    if same < 1:
        line += ": in the others two tokens came closer than that, and after another token comes another text"
    assert difference < TOLERANCE[dtype], f"{line}, expected less than {TOLERANCE[dtype]}"
    return line


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, help="to generate in each sequence, at least 3")
    parser.add_argument("--page-size", type=int, default=0, help="positions a page, a multiple of 16; 0: contiguous")
    parser.add_argument("--steps", type=int, default=100, help="of training")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    _options.add_dtype(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(batch=8, context=128, learning_rate=3e-3, remat=False)  # of training
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    model, run = train_gpt.train("flash", _mesh.OneDevice(), args, *_text.standard_library())
    print(f"trained to {run.held_out_loss:.3f} nats per character of held-out text")
    lengths = np.array([len(prompt) for prompt in PROMPTS], np.int32)
    prompts = np.stack([_text.encode(prompt.ljust(lengths.max())) for prompt in PROMPTS])
    empty = empty_cache(args, len(PROMPTS), prompts.shape[1] + args.tokens)
    query = jax.ShapeDtypeStruct((len(PROMPTS), 1, args.heads, args.dim // args.heads), args.dtype)
    print(cache.explain(query, empty))

    shape = args.tokens, len(PROMPTS), _text.VOCABULARY
    noise = TEMPERATURE * jax.random.gumbel(jax.random.key(args.seed), shape)  # the largest sum is a sample
    ours = timed("with a cache", with_a_cache(model, empty, prompts, lengths, noise), *shape[1::-1])
    theirs = timed("without", without_a_cache(model, prompts, lengths, noise), *shape[1::-1])
    for prompt, tokens in zip(PROMPTS[:3], ours.argmax(axis=-1).T):
        print(f"---\n{prompt}{_text.decode(tokens)}")
    print(f"---\n{compare(ours, theirs, args.dtype)}")


if __name__ == "__main__":
    args = options()
    args.dtype = args.dtype or _options.default_dtype(jax.default_backend())
    with jax.default_matmul_precision("float32" if args.dtype == "float32" else None):
        main(args)
