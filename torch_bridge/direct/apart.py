"""Work apart from the call that needs it: in a thread of its own.

What the state of a thread changes is not changed there: tracers and modes of torch do not see the work, the memory that
it keeps comes from no pool of a CUDA graph, and it waits for no stream of the caller's.
"""

import concurrent.futures
import threading
from collections.abc import Callable

__all__ = ["run"]


def run[**P, R](function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """What the function returns, or raises, in a new thread; in this one where none can start, at exit or at a limit.
    """
    found = concurrent.futures.Future[R]()

    def fulfil() -> None:
        try:
            found.set_result(function(*args, **kwargs))
        except BaseException as error:  # whatever it is, it is raised where it is waited for
            found.set_exception(error)

    try:
        threading.Thread(target=fulfil, name=f"pallas_flash: {function.__name__}", daemon=True).start()
    except RuntimeError:
        return function(*args, **kwargs)
    return found.result()
