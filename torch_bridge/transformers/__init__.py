"""Hugging Face transformers: `register()` makes `attn_implementation="pallas"` a name that its models take.

    masks.py       transformers' mask functions, read as rules: bounds and ids
    rule.py        a rule as a tensor that is written out only where somebody looks into it
    models.py      which model classes call transformers' AttentionInterface, asked before one is built
    attention.py   the call of a model's attention layer -> torch_bridge.flash_attention
    buckets.py     lengths that share a compiled program

transformers is imported by `register()`, not before.
"""

from collections.abc import Callable

from torch_bridge.transformers.buckets import bucket

__all__ = ["bucket", "register"]


def register(name: str = "pallas", *, buckets: Callable[[int], int] | None = bucket) -> None:
    """Registers attention and mask functions with transformers, for `attn_implementation=name`.

        torch_bridge.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pallas")

    Results are those of transformers' own "eager", without its O(length^2) memory where the mask is causal, a sliding
    window, chunks, padding on any side, packed sequences (`position_ids`), or several of these; any other is written
    out, and `torch_bridge.report()` counts it and says why. Attention weights are not returned.

    A model whose layers apply their mask themselves, without transformers' `AttentionInterface` (Bloom, MPT, XGLM,
    Falcon), is a NotImplementedError where it is built with this name: `register()` puts that check before
    `transformers.PreTrainedModel.get_correct_attn_implementation`. Layers that it does not find raise where they add
    the mask to scores, or fill by it.

    Args:
      name: what `attn_implementation` shall be called; without "flash", by which transformers means its own kernels.
      buckets: the length to which sequences are padded where no gradient is needed, so that generating compiles once
        for many lengths; None: they are not padded, and each new length compiles.

    Raises:
      ModuleNotFoundError: transformers is not installed.
      ValueError: the name has "flash" or "|" in it.
      TypeError: buckets is not a function.
    """
    if "flash" in name or "|" in name or not name:
        raise ValueError('name must not be empty, nor contain "flash" or "|", to which transformers gives a meaning of '
                         f'its own, got {name=}. Leave it out: "pallas".')
    if buckets is not None and not callable(buckets):
        raise TypeError(f"buckets must be a function length -> length, or None, got {buckets=}. Leave it out for the "
                        "lengths of torch_bridge.transformers.bucket.")
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # transformers is there, and what is missing is its own
            raise
        raise ModuleNotFoundError('torch_bridge.transformers needs transformers: pip install "transformers>=5.17"',
                                  name="transformers") from error
    from torch_bridge.transformers import attention, masks, models

    models.guard(name)
    transformers.AttentionInterface.register(name, attention.Attention(buckets))
    transformers.AttentionMaskInterface.register(name, masks.mask)
