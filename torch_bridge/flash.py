"""`flash_attention`: attention with the arguments that PyTorch's scaled_dot_product_attention cannot say.

Only torch is used here and everything is traceable (see sdpa.py). Lengths, offsets and ids are tensors of the operator:
other values of the same shapes compile nothing. Sinks are applied to its results (lse.py).
"""

from typing import Literal, NamedTuple, Never, TypedDict, overload

import torch

from torch_bridge import eager, lse, messages, scoring, sdpa
from torch_bridge.arguments import Numbers, Operands

__all__ = ["Keywords", "Places", "SegmentIds", "Window", "attend", "checked_softcap", "flash_attention", "integers",
           "is_integer", "is_on_host", "prepare"]

Window = tuple[int | None, int | None]
"""How many keys a query sees before and after the aligned one; None: all."""
SegmentIds = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""(batch, length) of both sides, or those of queries and of keys."""


class Keywords(TypedDict, total=False):
    """The keywords of `flash_attention`, by which others hand them on; but for return_lse."""

    attn_mask: torch.Tensor | None
    is_causal: bool
    causal_offset: int | torch.Tensor | None
    window: Window | None
    softcap: float | None
    score: scoring.Function | None
    sinks: torch.Tensor | None
    segment_ids: SegmentIds | None
    q_lengths: torch.Tensor | None
    kv_lengths: torch.Tensor | None
    dropout_p: float
    scale: float | None
    deterministic: bool


@overload
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: torch.Tensor | None = None,
    is_causal: bool = False, causal_offset: int | torch.Tensor | None = None, window: Window | None = None,
    softcap: float | None = None, score: scoring.Function | None = None, sinks: torch.Tensor | None = None,
    segment_ids: SegmentIds | None = None,
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None, dropout_p: float = 0,
    scale: float | None = None, return_lse: Literal[False] = False, deterministic: bool = False,
) -> torch.Tensor: ...


@overload
def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: torch.Tensor | None = None,
    is_causal: bool = False, causal_offset: int | torch.Tensor | None = None, window: Window | None = None,
    softcap: float | None = None, score: scoring.Function | None = None, sinks: torch.Tensor | None = None,
    segment_ids: SegmentIds | None = None,
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None, dropout_p: float = 0,
    scale: float | None = None, return_lse: Literal[True], deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: torch.Tensor | None = None,
    is_causal: bool = False, causal_offset: int | torch.Tensor | None = None, window: Window | None = None,
    softcap: float | None = None, score: scoring.Function | None = None, sinks: torch.Tensor | None = None,
    segment_ids: SegmentIds | None = None,
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None, dropout_p: float = 0,
    scale: float | None = None, return_lse: bool = False, deterministic: bool = False,
    **unknown: Never,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out = dropout(softmax(score(softcap(scale * query key^T)) + attn_mask, where the masks keep)) value.

    Never O(L * S) memory. On CPU and CUDA tensors, with autograd, autocast, torch.func, torch.compile and torch.export,
    as `scaled_dot_product_attention`. A query attends to a key that all of attn_mask, is_causal, window, segment_ids
    and the lengths keep; one that attends to nothing gives 0 and an lse of -inf (with sinks: the sink).

    Args:
      query: (batch, Hq, L, E); bfloat16, float16, float32 or float64.
      key: (batch, H, S, E); Hq is a multiple of H (grouped queries), nothing is repeated.
      value: (batch, H, S, Ev).
      attn_mask: boolean (True attends) or float (added to the scores; it may require grad), broadcastable to
        (batch, Hq, L, S).
      is_causal: the query at i attends to the keys up to i + causal_offset.
      causal_offset: the position of the key aligned with the first query, for is_causal and window: a number, or
        integers (batch,). None is 0, as in SDPA; S - L aligns the last query with the last key.
      window: (left, right): the query at i attends to the keys from i + causal_offset - left to i + causal_offset +
        right. None in place of a number: no limit.
      softcap: scores become softcap * tanh(scores / softcap), before score and attn_mask.
      score: what becomes of each score before attn_mask: JAX's score functions, which are (score, batch, head, q_pos,
        kv_pos) -> score of scalars in jnp, or a `pallas_flash.Score`, such as `ALiBi(slopes)`, whose fields may hold
        tensors on the device of query; those of floats have a gradient.
      sinks: (Hq,), a logit of each head that joins the softmax of every row like the score of one more key, whose value
        is 0; never masked, capped or dropped. It may require grad.
      segment_ids: integers (batch, length) below 2^31, or a tuple of those of queries and those of keys: tokens attend
        within their segment; ids below 0 are padding.
      q_lengths, kv_lengths: integers (batch,): positions from there on are padding, whatever they hold. Below 0 is 0.
      dropout_p: the probability of dropping an attention weight, drawn from torch's generator.
      scale: multiplies the scores; None means 1 / sqrt(E).
      return_lse: also return lse.
      deterministic: gradients are bit-equal on every run; so they are with torch.use_deterministic_algorithms(True).

    Returns:
      out (batch, Hq, L, Ev), in the dtype of query and stored in its order; with return_lse (out, lse), lse (batch, Hq,
      L) being the natural logarithm of each row's sum of exponentials, sinks included, float32 (float64 for float64),
      with a gradient.

    Raises:
      RuntimeError, IndexError, TypeError, ValueError: as `scaled_dot_product_attention`; and where an argument that
        only this function has does not fit, with what must hold.
    """
    if unknown:
        raise messages.unknown_keyword(flash_attention, next(iter(unknown)))
    messages.require_bool("return_lse", return_lse)
    operands, numbers = prepare(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, causal_offset=causal_offset, window=window,
        softcap=softcap, score=score, sinks=sinks, segment_ids=segment_ids, q_lengths=q_lengths, kv_lengths=kv_lengths,
        dropout_p=dropout_p, scale=scale, deterministic=deterministic)
    out, found = attend(operands, numbers, sinks, return_lse)
    return out if found is None else (out, found)


flash_attention.__signature__ = messages.without_unknown(flash_attention)  # type: ignore[attr-defined]


def prepare(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, attn_mask: torch.Tensor | None = None,
    is_causal: bool = False, causal_offset: int | torch.Tensor | None = None, window: Window | None = None,
    softcap: float | None = None, score: scoring.Function | None = None, sinks: torch.Tensor | None = None,
    segment_ids: SegmentIds | None = None,
    q_lengths: torch.Tensor | None = None, kv_lengths: torch.Tensor | None = None, dropout_p: float = 0,
    scale: float | None = None, deterministic: bool = False,
) -> tuple[Operands, Numbers]:
    """The checked arguments of `flash_attention`, as the operator takes them; raises as it does."""
    call = sdpa.prepare(query, key, value, attn_mask, dropout_p, False, scale, True)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise messages.must("query, key and value must be (batch, heads, length, dim)", messages.shapes(
            query=query, key=key, value=value), "Merge or add axes")
    if sinks is not None:
        lse.check_sinks(sinks, query)
    messages.require_bool("deterministic", deterministic)
    places = Places(is_causal, causal_offset, window, segment_ids, q_lengths, kv_lengths)
    operands, numbers = places.within(call.operands, call.numbers)
    numbers = numbers._replace(softcap=checked_softcap(softcap), deterministic=numbers.deterministic or deterministic)
    if score is None:
        return operands, numbers
    name, floats, integers = scoring.named(score, operands.query)
    return operands._replace(score_floats=floats, score_integers=integers), numbers._replace(score=name)


def attend(operands: Operands, numbers: Numbers, sinks: torch.Tensor | None, return_lse: bool,
           whole: tuple[torch.Tensor, ...] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of a checked call; lse is None if it is not asked for.

    Args:
      whole: the tensors that hold query, key and value, as `eager.attend_parts` takes them; None: each is one.
    """
    if sinks is None and not return_lse:
        return eager.attend(operands, numbers) if whole is None else eager.attend_parts(whole, operands, numbers), None
    out, found = eager.attend_with_lse(operands, numbers)
    if sinks is not None:
        out, found = lse.with_sinks(out, found, sinks)
    return out, found if return_lse else None


class Places(NamedTuple):
    """The arguments that say which positions attend, as the caller gave them."""

    is_causal: bool
    causal_offset: int | torch.Tensor | None
    window: Window | None
    segment_ids: SegmentIds | None
    q_lengths: torch.Tensor | None
    kv_lengths: torch.Tensor | None

    def within(self, operands: Operands, numbers: Numbers) -> tuple[Operands, Numbers]:
        """The operands and numbers of a call with these in them."""
        query, offset = operands.query, self.causal_offset
        left, right = self.sides(numbers)
        if isinstance(offset, torch.Tensor):
            operands = operands._replace(offsets=integers("causal_offset", offset, query))
        elif offset is not None:
            if not is_integer(offset):
                raise TypeError(f"causal_offset must be int, a Tensor or None, got causal_offset={offset!r}. Pass a "
                                "number of keys.")
            numbers = numbers._replace(offset=offset)
        if self.segment_ids is not None:
            q_ids, kv_ids = self._ids(query, operands.key)
            operands = operands._replace(q_ids=q_ids, kv_ids=kv_ids)
        lengths = {name: integers(name, given, query)
                   for name, given in (("q_lengths", self.q_lengths), ("kv_lengths", self.kv_lengths))
                   if given is not None}
        return operands._replace(**lengths), numbers._replace(left=left, right=right)

    def sides(self, numbers: Numbers) -> tuple[int | None, int | None]:
        """How many keys are seen on each side of the aligned one."""
        messages.require_bool("is_causal", self.is_causal)
        has_rule = self.is_causal or self.window is not None
        if self.causal_offset is not None and not has_rule:
            raise ValueError("causal_offset needs is_causal=True or a window, got neither. Leave it out, or pass one "
                             "of them.")
        if numbers.right is not None:  # attn_mask is a CausalBias
            if has_rule:
                raise ValueError("a CausalBias as attn_mask is a causal rule of its own, got is_causal or window with "
                                 "it. Pass is_causal=True and causal_offset instead.")
            return numbers.left, numbers.right
        left, right = (None, None) if self.window is None else _checked_window(self.window)
        if self.is_causal:
            right = 0 if right is None else min(right, 0)
        if left is not None and right is not None and right < -left:
            raise ValueError("window needs -left <= right, which is at most 0 with is_causal, got "
                             f"window={self.window}, is_causal={self.is_causal}. Count the keys seen on each side of "
                             "the aligned one; None, not -1, is no limit.")
        return left, right

    def _ids(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.segment_ids
        if not isinstance(given, tuple):
            if query.shape[2] != key.shape[2]:
                raise messages.must("segment_ids must be a tuple (q_ids, kv_ids) where query and key differ in length",
                                    messages.shapes(query=query, key=key), "Pass the ids of both")
            assert given is not None
            ids = integers("segment_ids", given, query, query.shape[2], is_id=True)
            return ids, ids
        if len(given) != 2:
            raise messages.must("segment_ids must be a Tensor, or a tuple (q_ids, kv_ids)",
                                f"len(segment_ids)={len(given)}", "Pass integers of shape (batch, length)")
        return (integers("segment_ids[0]", given[0], query, query.shape[2], is_id=True),
                integers("segment_ids[1]", given[1], query, key.shape[2], is_id=True))


_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_FAR = 2**30
"""Beyond any position."""


def integers(name: str, given: torch.Tensor, query: torch.Tensor, length: int | None = None,
             is_id: bool = False) -> torch.Tensor:
    """A tensor of positions, or of ids, as the operator takes it: int32 (batch,), or (batch, length).

    Positions beyond 2^30 are as good as that. An axis of batch may be 1, and that of positions missing.
    """
    batch = query.shape[0]
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} must be a Tensor of integers, not {type(given).__name__}. Wrap it: torch.tensor(...) "
                        "on the device of query.")
    wanted = (batch,) if length is None else (batch, length)
    one = given.shape == (1, *wanted[1:]) or (length is None and given.dim() == 0)
    if given.dtype not in _INTEGERS or given.device != query.device or not (one or given.shape == wanted):
        axes = "(batch,)" if length is None else "(batch, length)"
        raise messages.must(
            f"{name} must hold integers of shape {axes} = {wanted} on {query.device}",
            f"{name}.dtype={given.dtype}, {name}.shape={tuple(given.shape)}, {name}.device={given.device}",
            "Cast, reshape or move it" if length is not None else _instead_of_a_mask(name, given))
    if given.dtype == torch.int64:
        if is_id and is_on_host(given) and given.numel() and given.max() >= 2**31:
            raise ValueError(f"{name} must be below 2^31, got max({name})={given.max()}. Number the segments from 0.")
        given = given.clamp(-1, 2**31 - 1) if is_id else given.clamp(-_FAR, _FAR)
    return given.to(torch.int32).expand(wanted)


def _instead_of_a_mask(name: str, given: torch.Tensor) -> str:
    """What to do where one number of each batch entry is wanted, for a tensor that may mark each position."""
    if given.dim() < 2 or given.shape[-1] < 2:
        return "Cast, reshape or move it"
    place = "None, :, None" if name == "q_lengths" else "None, None, :"
    test = "" if given.dtype == torch.bool else " != 0"
    return (f"A tensor (batch, length) that marks positions is a mask: pass attn_mask=x[:, {place}]{test}, or "
            f"segment_ids with -1 at padding, to torch_bridge.flash_attention; where those that count come first, "
            f"(x != 0).sum(1) counts them")


def is_on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be asked for without waiting for a GPU or breaking a trace."""
    return (not torch.compiler.is_compiling() and type(tensor) is torch.Tensor and tensor.is_cpu
            and not torch._C._are_functorch_transforms_active())


def is_integer(number: object) -> bool:
    """Whether it is an int, or stands for one while torch traces lengths that vary."""
    return isinstance(number, (int, torch.SymInt)) and not isinstance(number, bool)


def _checked_window(window: object) -> Window:
    if not isinstance(window, tuple | list) or len(window) != 2 or any(
            side is not None and not is_integer(side) for side in window):
        raise TypeError(f"window must be (left, right), each an int or None, got {window=}. Count the keys seen on "
                        "each side of the aligned one; None is no limit.")
    left, right = window
    return left, right


def checked_softcap(softcap: float | None) -> float | None:
    """softcap as a float; raises ValueError for what is neither a number to cap at nor None."""
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, (int, float)) or not 1e-30 <= softcap <= 1e30:
        raise ValueError(f"softcap must be a number from 1e-30 to 1e30, or None, got {softcap=}. Pass None for no cap.")
    return float(softcap)
