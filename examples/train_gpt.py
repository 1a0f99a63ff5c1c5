"""Trains a small GPT (rotary, grouped-query, causal) in Flax with pallas_flash, beside Flax's default attention.

    python examples/train_gpt.py                                      two runs on the same text, compared
    python examples/train_gpt.py --attention flash --context 16384    more context than the default can hold
    python examples/train_gpt.py --attention flash,cudnn,xla --context 4096 --batch 4 --dim 1024 --heads 8 --layers 8 \\
        --remat --steps 40 --learning-rate 3e-4    a benchmark, on a GPU
    python examples/train_gpt.py --mesh data=2,sequence=2,tensor=2    on eight devices, beside a run on one

On a machine without GPUs, JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment makes
eight devices. A mesh may span several processes, on one machine or many: start each with --distributed and, where no
Slurm or the like tells them to JAX, the arguments of `jax.distributed.initialize`:

    python examples/train_gpt.py --mesh data=2,sequence=2,tensor=2 --distributed \\
        --coordinator-address localhost:9876 --num-processes 2 --process-id 0    and 1 for the other process

It learns the sources of Python's standard library, one character a token, on the GPU if there is one, in bfloat16.
"""

import argparse
import contextlib
import functools
import io
import time
from collections.abc import Callable, Iterator

import _mesh
import _options
import _report
import _text
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import pallas_flash
import pallas_flash.flax

THETA = 10_000.0  # longest wavelength of the rotary embedding, in units of 2 pi tokens


def rotate(x: jax.Array, positions: jax.Array | np.ndarray) -> jax.Array:
    """Rotary embedding of (batch, length, heads, dim), whose rows have these positions in the text, (length,) or
    (batch, length): pairs of features turned by position * frequency.
    """
    half = x.shape[-1] // 2
    frequency = THETA ** -(jnp.arange(half) / half)
    angle = jnp.asarray(positions)[..., None, None] * frequency  # (length, 1, dim / 2), of a batch or of all
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def jax_nn(implementation: str) -> Callable[..., jax.Array]:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, is_causal: bool, **_: object) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation=implementation)
    return attend


ATTENTION = {
    "flash": pallas_flash.flax.dot_product_attention,
    "default": nnx.dot_product_attention,
    "cudnn": jax_nn("cudnn"),
    "xla": jax_nn("xla"),
}
MESH = "mesh"  # ours, on the devices of --mesh


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, args: argparse.Namespace, attention_fn: Callable[..., jax.Array], devices: _mesh.Devices,
                 rngs: nnx.Rngs):
        def rotary_attention(query, key, value, **options):
            positions = devices.order(np.arange(query.shape[1]), axis=0)
            return attention_fn(rotate(query, positions), rotate(key, positions), value, **options)

        shared = dict(dtype=args.dtype, rngs=rngs)
        heads = dict(num_heads=args.heads, num_kv_heads=args.kv_heads, use_bias=False, decode=False)
        self.attention = nnx.MultiHeadAttention(in_features=args.dim, attention_fn=rotary_attention, **heads, **shared)
        self.attention_norm = nnx.RMSNorm(args.dim, **shared)
        self.mlp_norm = nnx.RMSNorm(args.dim, **shared)
        self.up = nnx.Linear(args.dim, 4 * args.dim, **shared)
        self.down = nnx.Linear(4 * args.dim, args.dim, **shared)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class GPT(nnx.Module):
    """Tokens (batch, length) -> float32 logits (batch, length, vocabulary)."""

    def __init__(self, args: argparse.Namespace, attention_fn: Callable[..., jax.Array], devices: _mesh.Devices):
        rngs = nnx.Rngs(args.seed)
        self.embedding = nnx.Embed(_text.VOCABULARY, args.dim, dtype=args.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(args, attention_fn, devices, rngs) for _ in range(args.layers)])
        self.norm = nnx.RMSNorm(args.dim, dtype=args.dtype, rngs=rngs)
        self.head = nnx.Linear(args.dim, _text.VOCABULARY, dtype=args.dtype, rngs=rngs)
        keep_attention = jax.checkpoint_policies.save_only_these_names(*pallas_flash.RESIDUAL_NAMES)
        self.run_block = nnx.remat(Block.__call__, policy=keep_attention) if args.remat else Block.__call__

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # A product instead of a lookup: the gradient of a lookup adds all tokens' gradients to few rows, one by one.
        weights = self.embedding.embedding[...].astype(self.embedding.dtype)
        x = jax.nn.one_hot(tokens, _text.VOCABULARY, dtype=weights.dtype) @ weights
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.head(self.norm(x)).astype(jnp.float32)


def loss_of(model: GPT, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of the labels (batch, length): each the token after that of `tokens`."""
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels).mean()


def batches(devices: _mesh.Devices, *where: object) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Tokens and labels, each (batch, length), on the devices and in their order."""
    for excerpt in _text.batches(*where):
        yield devices.put(excerpt[:, :-1]), devices.put(excerpt[:, 1:])


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model: GPT, optimizer: nnx.Optimizer, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens, labels)
    optimizer.update(model, gradients)
    return loss


def train(name: str, devices: _mesh.Devices, args: argparse.Namespace, text: np.ndarray,
          held_out: np.ndarray) -> tuple[GPT, _report.Run]:
    """Trains a new model with the attention called `name`; equal arguments give equal weights and batches."""
    attention_fn = ATTENTION[name] if name in ATTENTION else devices.attention_fn()
    model, run = GPT(args, attention_fn, devices), _report.Run(name)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, args.steps // 10, args.steps)
    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    devices.place(model)
    devices.place(optimizer)

    losses: list[jax.Array] = []
    start = 0.0
    with tqdm(total=args.steps, desc=name, unit="step", disable=jax.process_index() > 0) as progress:
        for tokens, labels in batches(devices, text, args.steps, args.batch, args.context, args.seed):
            losses.append(train_step(model, optimizer, tokens, labels))
            if len(losses) == _report.WARM_UP:
                jax.block_until_ready(losses[-1])
                start = time.perf_counter()
            if len(losses) % 10 == 0:  # an old loss: waiting for the device would leave it idle until the next step
                progress.set_postfix(loss=f"{losses[-10]:.3f}", refresh=False)
            progress.update()
        jax.block_until_ready(losses[-1])
        run.measure(args, start)
    run.losses = np.asarray(jnp.stack(losses)).tolist()  # compiles

    evaluate = nnx.jit(loss_of)
    excerpts = batches(devices, held_out, 8, args.batch, args.context, args.seed)
    run.held_out_loss = float(np.mean([evaluate(model, *excerpt) for excerpt in excerpts]))
    return model, run


def generate(model: GPT, prompt: str, length: int, seed: int, window: int = 128, temperature: float = 0.7) -> str:
    """Continues the prompt by `length` characters, each seeing at most `window` before it."""

    @nnx.jit
    def next_token(model: GPT, tokens: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, model(tokens[None])[0, last] / temperature)

    tokens = _text.encode(prompt).tolist()
    for key in jax.random.split(jax.random.key(seed), length):
        seen = tokens[-window:]
        padded = np.pad(seen, (0, window - len(seen)))  # what comes later is not attended to
        tokens.append(int(next_token(model, jnp.asarray(padded), jnp.asarray(len(seen) - 1), key)))
    return _text.decode(np.array(tokens))


def which_implementation(args: argparse.Namespace) -> str:
    """What pallas_flash says about the attention of this model, on one device and on those of the mesh."""
    def shapes(data: int, sequence: int, tensor: int) -> list[jax.ShapeDtypeStruct]:
        shape = args.batch // data, args.context // sequence, args.dim // args.heads
        return [jax.ShapeDtypeStruct((*shape[:2], heads // tensor, shape[2]), args.dtype)
                for heads in (args.heads, args.kv_heads, args.kv_heads)]

    causal = pallas_flash.Causal()
    found = pallas_flash.explain(*shapes(1, 1, 1), mask=causal)
    if args.mesh:
        found += "\n" + pallas_flash.explain_context_parallel(
            *shapes(**args.mesh), num_devices=args.mesh["sequence"], strategy=args.strategy, mask=causal)
    return found


def options() -> argparse.Namespace:
    parser = _options.training_parser(__doc__, [*ATTENTION, MESH], "outputs/train_gpt_loss.png")
    parser.set_defaults(attention=None)
    parser.add_argument(
        "--remat", action="store_true", help="recompute blocks in the backward pass, not their attention"
    )
    parser.add_argument("--mesh", type=_mesh.sizes, metavar="AXIS=SIZE,...",
                        help="the sizes of data, sequence and tensor for a run called mesh on all devices; --attention "
                             "is then mesh,flash by default")
    parser.add_argument("--strategy", choices=["ring", "all_gather", "all_to_all"], help="of a sequence's devices")
    parser.add_argument("--distributed", action="store_true", help="the mesh spans several processes")
    parser.add_argument("--coordinator-address", metavar="HOST:PORT", help="of process 0")
    parser.add_argument("--num-processes", type=int, metavar="N")
    parser.add_argument("--process-id", type=int, metavar="I")
    args = parser.parse_args()
    args.attention = args.attention or ([MESH, "flash"] if args.mesh else ["flash", "default"])
    if (MESH in args.attention) != bool(args.mesh):
        parser.error("--mesh goes with the attention mesh")
    return args


def main(args: argparse.Namespace) -> None:
    mesh = _mesh.make(args) if args.mesh else None
    text, held_out = _text.standard_library()
    device = jax.local_devices()[0].device_kind
    print(f"{len(text):,} characters to learn, {len(held_out):,} held out; on {jax.device_count()} x {device}")
    print(which_implementation(args))

    runs, on_one_device = [], None
    for name in args.attention:
        devices = mesh if mesh and name == MESH else _mesh.OneDevice()
        model, run = train(name, devices, args, text, held_out)
        runs.append(run)
        on_one_device = (name, model) if name != MESH else on_one_device
    if on_one_device:
        name, model = on_one_device
        print(f"a sample of {name}:\n{generate(model, 'def ', 200, args.seed)}\n")
    if jax.process_index() == 0:
        _report.finish(runs, args, f"JAX on {device}")


if __name__ == "__main__":
    args = options()
    if args.distributed:
        jax.distributed.initialize(args.coordinator_address, args.num_processes, args.process_id)
    args.dtype = args.dtype or _options.default_dtype(jax.default_backend())
    with contextlib.redirect_stdout(io.StringIO()) if jax.process_index() else contextlib.nullcontext():
        main(args)
