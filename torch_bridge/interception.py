"""Whether something other than autograd and a device's kernels sees the operations of a thread."""

import torch
from torch.autograd import forward_ad

__all__ = ["functions_intercept", "nothing_intercepts"]

# The keys that a thread adds to those of tensors where nothing intercepts calls. Modes, transforms and tracers of every
# kind add their own.
_OTHER_KEYS = ~(torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
                | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr()
_included_keys = torch._C._dispatch_tls_local_include_set
_count_functions = torch._C._len_torch_function_stack


def nothing_intercepts() -> bool:
    """Whether operations on plain tensors dispatch to autograd and their device's kernels only."""
    return not (_included_keys().raw_repr() & _OTHER_KEYS or functions_intercept())


def functions_intercept() -> bool:
    """Whether what no dispatch key tells of, and so no guard (direct/guards.py), may intercept operations: a level of
    forward mode, or a mode of __torch_function__.
    """
    return forward_ad._current_level >= 0 or _count_functions() > 0
