"""Calls of the operators on the direct path: which take it, with which plan, and their tensors in and out.

It is taken unless PALLAS_FLASH_DIRECT=0 is set, by what `why_not`, `why_not_gpu` and `requirements.why_not` have no
reason against. Where the last has one, or a plan cannot be made, a FallbackWarning says why, once for each reason, and
the call goes through DLPack.

A tensor that is stored as kernels can read it (storage.py), and aligned to 16 bytes, is read where it lies; any other
is copied by torch first. Results are dense. Plans stay loaded as long as the process lives: a captured CUDA graph holds
the addresses of their constants.
"""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_bridge import records, strides
from torch_bridge.arguments import LARGEST_NUMBER, PLACES, Cotangents, Numbers, Operands, PerArray, Results
from torch_bridge.direct import apart, cache, driver, launch, requirements, room, said, scored, shared, storage
from torch_bridge.direct.launch import ALIGNMENT
from torch_bridge.direct.parent import NoLaunchesError, NoPlanError
from torch_bridge.direct.plan import Kernel, Program
from torch_bridge.direct.problem import AnyProblem, Gpu, PassName, Problem, Request, versions
from torch_bridge.direct.runner import Runner

__all__ = ["DEVICES", "MOST_ALONE", "MOST_WITH_GRADIENTS", "PASSES", "VARIABLE", "Direct",
           "DirectCall", "direct_of", "expect", "find", "gpu_of", "is_at_hand", "is_loaded", "is_on", "known",
           "name_of", "of_hopper", "prepared", "problem_of", "reason_found", "request", "why_not", "why_not_device",
           "why_not_gpu"]

VARIABLE = "PALLAS_FLASH_DIRECT"
DEVICES = frozenset({"cuda"})
PASSES: tuple[PassName, ...] = ("forward", "backward")
_NAMES: dict[PassName, str] = {
    "forward": "the forward of scaled_dot_product_attention", "decode": "attention to a cache",
    "backward": "the backward of scaled_dot_product_attention",
    "backward_of_parts": "the backward of scaled_dot_product_attention",
    "dbias": "the gradient of scaled_dot_product_attention's attn_mask"}
_CAPABILITY = (8, 0)
"""From here on GPUs have kernels; `parent.NoLaunchesError` says of which problems they have none."""
_HOPPER = (9, 0)
"""Whose kernels alone are launched with a bias: to ask that elsewhere takes a process a problem."""
_DTYPES = (torch.bfloat16, torch.float16)
_BIASES = (torch.bfloat16, torch.float16, torch.float32)
_ANCHOR_ROWS = 128  # queries that a bias of keys may be anchored for at once (`pallas_flash.spec.ANCHOR_ROWS`)
_UNIT = 8  # of head dimensions, in elements (`pallas_flash.padding`)
_MAX_CHOICES = 4096
_GIVEN = "mask", "bias", *PLACES, "score_floats", "score_integers"
MOST_ALONE, MOST_WITH_GRADIENTS = 60, 150
"""Of PyTorch's kernels before the launches of a pass: of a forward alone, and of each pass of a call whose gradients
are asked for. At 3 us of the host each, more take it longer than DLPack does: 170 us a forward and 1,135 both, beside
20 and 210 (docs/notes/torch_bridge.md, 2026-11-30).
"""


# Where os.environ keeps variables: to ask itself for one that is not set takes 0.6 us. It is private, but for Python
# to keep them elsewhere only means to be asked itself.
_VALUES: dict[object, object] = getattr(os.environ, "_data", {})
_KEY = os.environ.encodekey(VARIABLE) if _VALUES else None
_ON = (None, b"1") if _VALUES else ()


def is_on() -> bool:
    """Whether PALLAS_FLASH_DIRECT is not 0; raises ValueError where it is neither that nor 1 nor empty."""
    if _VALUES.get(_KEY) in _ON:
        return True
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {value!r}. Set it to 0 to let JAX's runtime launch kernels.")
    return value != "0"


def why_not(operands: Operands, numbers: Numbers) -> str | None:
    """Why the direct path does not take a call of CUDA tensors, as far as the call itself says; None: it does."""
    query, key, value, _, bias, *_ = operands
    fit = (query.shape[0] == value.shape[0] and key.shape == (*value.shape[:3], query.shape[3])
           and value.shape[1] > 0 and query.shape[1] % value.shape[1] == 0)
    rules = (
        (query.dtype in _DTYPES, f"it takes bfloat16 and float16, query.dtype is {query.dtype}"),
        (query.shape[3] % _UNIT == 0 == value.shape[3] % _UNIT,
         f"it takes head dimensions that are multiples of {_UNIT}, JAX pads copies of the others, "
         f"d={query.shape[3]}, d_v={value.shape[3]}"),
        (bias is None or bias.dtype in _BIASES, f"it takes no attn_mask of {None if bias is None else bias.dtype}"),
        (bias is None or bias.shape[2] > 1 or query.shape[2] <= _ANCHOR_ROWS or not _has_rule(operands, numbers),
         f"it takes a float attn_mask of keys beside a mask that is not causal for at most {_ANCHOR_ROWS} queries, "
         f"q_len={query.shape[2]}"),
        (numbers.dropout_p <= 1, f"it takes no such rate of dropout, {numbers.dropout_p}"),
        (numbers.left is None or numbers.right is None or numbers.left + numbers.right >= 0,
         f"it takes no such window, ({numbers.left}, {numbers.right})"),
        (numbers.softcap is None or 0 < numbers.softcap <= LARGEST_NUMBER,
         f"it takes no such soft cap, {numbers.softcap}"),
        (not numbers.partial, "it takes no partial attention yet"),
        *scored.rules(numbers.score, *query.shape[:2]),
        (numbers.scale is None or abs(numbers.scale) <= LARGEST_NUMBER, f"it takes no such scale, {numbers.scale}"),
        (fit, "the shapes of query, key and value do not fit"),  # what checks them says more
        (not operands.is_empty, "there is no output element or no key"),
    )
    return next((reason for holds, reason in rules if not holds), None)


def _has_rule(operands: Operands, numbers: Numbers) -> bool:
    """Whether there are other masks than a causal one, whose offset is a number."""
    return numbers.left is not None or operands.mask is not None or any(x is not None for x in operands.places)


def why_not_device(device: torch.device, only: str = "") -> str | None:
    """Why the direct path does not take calls on a GPU; None: it does.

    Args:
      only: what of the calls only Hopper's kernels are launched with; empty: nothing.
    """
    if torch.version.hip is not None:
        return "it launches through NVIDIA's driver, this PyTorch is built for AMD's GPUs"
    gpu = gpu_of(device)
    needed, found = (".".join(map(str, numbers)) for numbers in (_CAPABILITY, gpu.capability))
    if gpu.capability < _CAPABILITY:
        return f"it launches kernels for compute capability {needed} or higher, {gpu.name} has {found}"
    if only and gpu.capability != _HOPPER:
        return f"it launches kernels of {only} for compute capability 9.0 alone, {gpu.name} has {found}"
    return None


def why_not_gpu(operands: Operands, numbers: Numbers, device: torch.device) -> str | None:
    """`why_not_device` of such a call."""
    return why_not_device(device, of_hopper(operands, numbers))


def of_hopper(operands: Operands, numbers: Numbers) -> str:
    """What of a call only Hopper's kernels are launched with; empty: nothing."""
    return "a score function" if numbers.score is not None else "" if operands.bias is None else "a float attn_mask"


def reason_found(problem: AnyProblem, device: torch.device, pass_name: PassName = "forward") -> str | None:
    """Why a plan could not be made in this process; None: it could, or was not asked for. It holds for each pass
    that is not loaded: a forward that is goes directly, though its backward cannot.
    """
    return None if is_loaded(problem, pass_name, device) else _reasons.get((problem, device, _ALONE.get(pass_name)))


def problem_of(operands: Operands, numbers: Numbers) -> Problem:
    """The problem of a call, in the layout in which the fewest elements are copied. What is copied is dense then."""
    query, key, value, *_ = operands
    layout = storage.layout_of((query, key, value))
    outer = [storage.outer_of(x, layout) or (x.shape[1], x.shape[3]) for x in (query, key, value)]
    (batch, q_heads, q_len, d), (_, kv_heads, kv_len, d_v) = query.shape, value.shape
    left, right = (None if side is None else int(side) for side in (numbers.left, numbers.right))
    given = tuple((name, storage.shape_given(name, x), str(x.dtype).removeprefix("torch."))
                  for name in _GIVEN if (x := getattr(operands, name)) is not None)
    if numbers.dropout_p > 0:  # a seed is drawn when the call is made
        given = (*given, ("seed", (2,), "int32"))
    return Problem(layout=layout,
                   dtype="bfloat16" if query.dtype == torch.bfloat16 else "float16", batch=batch, q_heads=q_heads,
                   kv_heads=kv_heads, q_len=q_len, kv_len=kv_len, d=d, d_v=d_v,
                   window=(left, right, int(numbers.offset), numbers.ends_aligned), scale=numbers.scale,
                   softcap=numbers.softcap, deterministic=numbers.deterministic, outer=(outer[0], outer[1], outer[2]),
                   given=given, dropout_p=numbers.dropout_p, score=numbers.score,
                   score_ir=scored.text(numbers.score))


def request(problem: AnyProblem, pass_name: PassName, device: torch.device) -> Request:
    """What the plan of a pass is found by. A forward is deterministic in any case, and has one plan for both."""
    if pass_name == "forward" and isinstance(problem, Problem):
        problem = dataclasses.replace(problem, deterministic=False)
    return Request(problem, pass_name, gpu_of(device), versions(driver.version()))


def gpu_of(device: torch.device) -> Gpu:
    """A GPU, as torch's runtime describes it."""
    x = torch.cuda.get_device_properties(device)
    return Gpu(x.name, (x.major, x.minor), x.multi_processor_count, x.shared_memory_per_block_optin)


class Direct:
    """A problem on a device: its passes, each found or compiled when it is first asked for."""

    def __init__(self, key: "_Key") -> None:
        self.key, (self.problem, self.device) = key, key
        self.strides = (*self.problem.strides().values(),)  # of query, key and value in the layout
        self.runs: records.Runs  # once a pass is loaded
        self.runners: dict[PassName, Runner] = {}  # of the passes that are prepared
        self._expected: dict[PassName, cache.Pending | None] = {}
        self._zeros: torch.Tensor | None = None  # the cotangent of statistics that nobody differentiates
        self.unread: torch.Tensor | None = None  # where statistics go that nobody reads, if a forward is prepared
        self._lock = threading.Lock()

    def expect(self, pass_name: PassName) -> None:
        """Has the plan of a pass made meanwhile, if there is none; what cannot be is said when the pass is prepared."""
        wanted = request(self.problem, pass_name, self.device)
        if pass_name in self._expected or pass_name in self.runners or cache.is_kept(wanted):
            return
        self._expected[pass_name] = None
        room.make_room(self.device)
        with contextlib.suppress(RuntimeError):  # no thread can start: it is made when prepared
            self._expected[pass_name] = cache.Pending(wanted, self.device.index or 0)

    def require_no_capture(self, pass_name: PassName) -> None:
        """Raises RuntimeError where torch captures a CUDA graph: loading a plan copies constants, which cannot be part
        of one, and compiling it would keep the capture waiting.
        """
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{_NAMES[pass_name]} must have run once before it is captured in a CUDA graph, got a "
                               f"first call of {self.problem} inside a capture. Call it before with tensors of the "
                               "same shapes and strides.")

    def prepare(self, pass_name: PassName) -> None:
        """Loads the plan of a pass, if that is not done.

        Raises:
          RuntimeError: inside a capture (`require_no_capture`), or in a process forked after a plan was loaded.
          NoPlanError, DriverError: it cannot be made, kept or loaded.
        """
        if pass_name in self.runners:
            return
        self.require_no_capture(pass_name)
        launch.require_no_fork()
        with self._lock:
            if pass_name not in self.runners:
                program, runner = apart.run(self._load, pass_name)
                # If a filter makes it an error, nothing is kept, and it comes again.
                what = f"implementation={program.implementation!r} runs {self.problem} on {gpu_of(self.device).name}"
                said.warn_of_left(what, program.left)
                self.runners[pass_name] = runner

    def _load(self, pass_name: PassName) -> tuple[Program[Kernel], Runner]:
        program = self._program(pass_name)
        self.runs = records.Runs(f"{self.problem}, launched directly", program.implementation, program.reasons_by_name)
        if "dstats" in program.buffers:  # what reads a cotangent of the statistics
            if self._zeros is None:  # its address is known to shortcuts, and to captured graphs
                self._zeros = shared.zeros(program.buffers["dstats"].shape, self.device)
        elif pass_name == "forward":
            self.unread = shared.unread(program.buffers["stats"].shape, self.device)
        return program, Runner(program, self.device)

    def _program(self, pass_name: PassName) -> Program[Kernel]:
        pending = self._expected.pop(pass_name, None)
        if pending is not None:
            return pending.result()
        wanted = request(self.problem, pass_name, self.device)
        if not cache.is_kept(wanted):
            room.make_room(self.device)
        return cache.find(wanted, self.device.index or 0)

    def forward(self, operands: Operands) -> list[torch.Tensor]:
        """out, dense in the layout, and the statistics."""
        return self.runners["forward"]([*map(self._operand, operands[:3], self.strides)], self._given_of(operands))

    def backward(self, operands: Operands, results: Results, dout: torch.Tensor, dstats: torch.Tensor | None,
                 pass_name: PassName = "backward", grads: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The gradients of query, key and value, dense in the layout, or in `grads`, if these are given; or of the
        bias, padded to whole tiles.
        """
        out, stats = results
        dtype = operands.query.dtype
        tensors = [*map(self._operand, operands[:3], self.strides), self._given(out.to(dtype)),
                   strides.sharable(stats, ALIGNMENT), self._given(dout.to(dtype))]
        assert self._zeros is not None
        tensors.append(self._zeros if dstats is None else strides.sharable(dstats, ALIGNMENT))
        return self.runners[pass_name](tensors, self._given_of(operands),
                                       [strides.in_layout(x, self.problem.layout) for x in grads])

    def address_of_zeros(self) -> int:
        """Of the cotangent of statistics that nobody differentiates, if a backward is prepared."""
        assert self._zeros is not None
        return self._zeros.data_ptr()

    def runner(self, pass_name: PassName) -> Runner | None:
        """What runs a pass, if it is prepared."""
        return self.runners.get(pass_name)

    def try_prepare(self, pass_name: PassName, then: PassName | None = None) -> bool:
        """Prepares a pass, and has that of the next made meanwhile; where it cannot be, warns with the reason, and
        returns False from then on.

        Raises:
          RuntimeError: as `prepare`.
        """
        if pass_name in self.runners:
            return True
        kind = *self.key, _ALONE.get(pass_name)
        if kind in _reasons:
            return False
        self.require_no_capture(pass_name)
        try:
            if then is not None:
                self.expect(then)
            self.prepare(pass_name)
        except NoLaunchesError as error:  # what is run instead says why
            _reasons[kind] = str(error)
            return False
        except (NoPlanError, driver.DriverError) as error:
            way = _INSTEAD.get(pass_name, "through DLPack")
            said.warn_of_fallback(f"the {pass_name} of {self.problem} goes {way}", str(error), VARIABLE)
            _reasons[kind] = str(error)  # after the warning: if a filter makes it an error, it comes again
            return False
        return True

    def _operand(self, tensor: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
        return strides.placed(strides.in_layout(tensor, self.problem.layout), wanted, ALIGNMENT)

    def _given_of(self, operands: Operands) -> list[torch.Tensor]:
        return [storage.given(name, getattr(operands, name), shape) for name, shape, _ in self.problem.given]

    def _given(self, tensor: torch.Tensor) -> torch.Tensor:
        return strides.sharable(strides.in_layout(tensor, self.problem.layout), ALIGNMENT)


# --- which calls -----------------------------------------------------------------------------------------------------

_Key = tuple[AnyProblem, torch.device]
_directs: dict[_Key, Direct] = {}
_reasons: dict[tuple[AnyProblem, torch.device, PassName | None], str] = {}
"""Why there is no plan, of the problems of which one could not be made; by itself of a pass of `_ALONE`."""
_ALONE: dict[PassName, PassName] = {"dbias": "dbias", "backward_of_parts": "backward_of_parts"}
_INSTEAD: dict[PassName, str] = {"decode": "to the kernels of attention with lengths",
                                 "backward_of_parts": "to that of dense gradients, which are copied"}


class DirectCall(NamedTuple):
    """Calls of the same shapes, strides, dtypes and numbers on the direct path."""

    direct: Direct
    out_strides: tuple[int, ...]
    grad_strides: tuple[tuple[int, ...], ...]  # of query, key and value
    is_in_place: bool  # tensors are read, and results written, where they lie: only what is not aligned is copied

    def forward(self, operands: Operands) -> Results:
        """out, stored as query is, and the statistics of rows."""
        out, stats = self.direct.forward(operands)
        self.direct.runs.count("forward")
        return Results(self._stored(out, self.out_strides), stats)

    def backward(self, operands: Operands, results: Results, cotangents: Cotangents,
                 wants_bias: bool = False) -> PerArray[torch.Tensor | None]:
        """The gradients of query, key and value, and of the bias if it is wanted, each stored as its tensor."""
        dout, dstats = cotangents
        dout = torch.zeros_like(results.out) if dout is None else dout
        grads = self.direct.backward(operands, results, dout, dstats)
        self.direct.runs.count("backward")
        dq, dk, dv = map(self._stored, grads, self.grad_strides)
        dbias = None
        if wants_bias and (bias := operands.bias) is not None:
            (found,) = self.direct.backward(operands, results, dout, dstats, "dbias")
            found = found[:, :, :bias.shape[2], :bias.shape[3]].to(bias.dtype)
            dbias = strides.with_strides(found, torch.empty_like(bias, device="meta").stride())
        return PerArray(query=dq, key=dk, value=dv, bias=dbias, score_floats=None)

    def may_write(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether `write_gradients` takes these: those of operands that are read where they lie, and stored alike."""
        stored = zip(grads, self.direct.strides, strict=True)
        return self.is_in_place and all(
            strides.same_memory(x.shape, x.stride(), wanted)
            for x, wanted in ((strides.in_layout(x, self.direct.problem.layout), wanted) for x, wanted in stored))

    def write_gradients(self, operands: Operands, results: Results, dout: torch.Tensor,
                        grads: Sequence[torch.Tensor]) -> None:
        """Writes the gradients of query, key and value where `may_write` says that it may, and nothing else."""
        self.direct.backward(operands, results, dout, None, "backward_of_parts", grads)
        self.direct.runs.count("backward")

    def slow_reason(self, pass_name: PassName, most: float) -> str | None:
        """Why DLPack is faster; None: it is not, or there is no plan, or a capture is under way, which DLPack refuses.

        Args:
          most: so many of PyTorch's kernels are none too many.
        """
        runner = self.direct.runner(pass_name)
        if runner is None or runner.num_kernels <= most or (
                self.direct.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        return (f"about {runner.num_kernels} small kernels of PyTorch would make what the {pass_name} reads, which "
                "takes longer: in a CUDA graph, or a program of torch.compile, it is launched directly")

    def _stored(self, tensor: torch.Tensor, wanted: tuple[int, ...]) -> torch.Tensor:
        return strides.with_strides(strides.in_layout(tensor, self.direct.problem.layout), wanted)


_choices: dict[tuple[object, ...], DirectCall | None] = {}
"""What calls of these shapes, strides, dtypes and numbers take; None: DLPack."""


def find(operands: Operands, numbers: Numbers, pass_name: PassName, *, then: PassName | None = None
         ) -> DirectCall | None:
    """What runs a pass of a call on the direct path, its plan loaded; None: the call goes through DLPack.

    Args:
      then: a pass that will follow, whose plan may be made at the same time; the backward in the place of that
        of parts, where operands are copied.

    Raises:
      RuntimeError: as `Direct.prepare`.
    """
    if operands.query.device.type not in DEVICES or not is_on():
        return None
    name = name_of(operands, numbers)
    try:
        choice = _choices[name]
    except KeyError:
        choice = _choice(operands, numbers) if _is_taken(operands, numbers) else None
        if len(_choices) >= _MAX_CHOICES:
            _choices.clear()
        _choices[name] = choice
    if then == "backward_of_parts" and choice is not None and not choice.is_in_place:
        then = "backward"
    if choice is None or not choice.direct.try_prepare(pass_name, then):
        return None
    return choice


def _is_taken(operands: Operands, numbers: Numbers) -> bool:
    """Whether nothing is against it; warns where only the installation is."""
    if why_not(operands, numbers) or why_not_gpu(operands, numbers, operands.query.device):
        return False
    reason = requirements.why_not()
    if reason is not None:
        said.warn_of_fallback("calls go through DLPack", reason, VARIABLE)
    return reason is None


def direct_of(key: _Key) -> Direct:
    """The same object for the same problem and device."""
    return _directs.setdefault(key, Direct(key))


def prepared(operands: Operands, numbers: Numbers, device: torch.device, pass_name: PassName) -> bool:
    """Whether a pass of calls like this one, which the direct path takes, has its plan loaded on a device, now at the
    latest; where it cannot be, a warning says why. Of the operands, shapes, strides and dtypes count.
    """
    return direct_of((problem_of(operands, numbers), device)).try_prepare(pass_name)


def is_loaded(problem: AnyProblem, pass_name: PassName, device: torch.device) -> bool:
    """Whether the plan of a pass is loaded."""
    direct = _directs.get((problem, device))
    return direct is not None and direct.runner(pass_name) is not None


def is_at_hand(problem: Problem, pass_name: PassName, device: torch.device) -> bool:
    """Whether the plan of a pass is loaded, or on disk."""
    return is_loaded(problem, pass_name, device) or cache.is_kept(request(problem, pass_name, device))


def expect(problem: Problem, pass_name: PassName, device: torch.device) -> None:
    """`Direct.expect` of a pass of a problem."""
    direct_of((problem, device)).expect(pass_name)


def known(operands: Operands, numbers: Numbers) -> DirectCall | None:
    """What `find` found for a call of these shapes, strides, dtypes and numbers; None: nothing, or it was not asked."""
    return _choices.get(name_of(operands, numbers))


def name_of(operands: Operands, numbers: Numbers) -> tuple[object, ...]:
    """All but the numbers in its tensors that decides how a call is computed."""
    query, key, value, mask, bias, *_ = operands
    return (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), query.dtype,
            query.device, mask if mask is None else mask.shape, bias if bias is None else (bias.shape, bias.dtype),
            *(x if x is None else x.shape for x in operands.places), numbers)


def _choice(operands: Operands, numbers: Numbers) -> DirectCall:
    out_strides = strides.like_query(operands.query, operands.value.shape[3])
    grad_strides = *(torch.empty_like(x, device="meta").stride() for x in operands[:3]),  # dense, in the order of x
    direct = direct_of((problem_of(operands, numbers), operands.query.device))
    layout = direct.problem.layout
    in_layout = (strides.in_layout(x, layout) for x in operands[:3])
    is_read = all(strides.same_memory(x.shape, x.stride(), wanted)
                  for x, wanted in zip(in_layout, direct.strides, strict=True))
    shapes = (*operands.query.shape[:3], operands.value.shape[3]), *(x.shape for x in operands[:3])
    results = (torch.empty_strided(shape, wanted, device="meta")
               for shape, wanted in zip(shapes, (out_strides, *grad_strides), strict=True))
    is_written = all(strides.in_layout(x, layout).is_contiguous() for x in results)
    return DirectCall(direct, out_strides, grad_strides, is_read and is_written)
