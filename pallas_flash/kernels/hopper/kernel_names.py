"""The names of the kernels of a pass, which need no Mosaic to be told."""

from pallas_flash.kernels.hopper.schedule import (
    BackwardSchedule,
    DecodeSchedule,
    Float32BackwardSchedule,
    Float32Schedule,
    ForwardSchedule,
    SplitSchedule,
    WideSchedule,
)

__all__ = ["kernels"]


def kernels(schedule: ForwardSchedule | DecodeSchedule | BackwardSchedule) -> tuple[str, ...]:
    """The names of the kernels that a pass launches, in order (`launches`, which needs Mosaic, makes them)."""
    if isinstance(schedule, DecodeSchedule):
        return ("attention_decode",)
    if isinstance(schedule, Float32Schedule):
        return (*("attention_split",) * 3, "attention_forward_float32")
    if isinstance(schedule, Float32BackwardSchedule):
        return *("attention_split",) * 3, "attention_prepare_float32", *("attention_gradient_float32",) * 3
    of_mask = ("attention_mask",) * schedule.mask_kernel
    if isinstance(schedule, ForwardSchedule):
        return (*of_mask, "attention_forward")
    if isinstance(schedule.kv, WideSchedule):
        return (*of_mask, "attention_backward_prepare",
                *(f"attention_backward_wide_{name}" for name in ("dv", "dk", "dq")))
    keys = "attention_backward_split" if isinstance(schedule.kv, SplitSchedule) else "attention_backward_kv"
    last = ("attention_backward_dq",) if schedule.dq is not None else ("attention_backward_finish",)
    return (*of_mask, "attention_backward_prepare", keys, *(() if schedule.kv.rounds_dq else last))
