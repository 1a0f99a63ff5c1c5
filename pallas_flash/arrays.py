"""What annotations of arrays are written with, in the form of jaxtyping: `Float[Array, "b t h d"]`.

To Python and to a type checker each is the array's type alone (`typing.Annotated`); the axes are for the reader. The
letters are the same everywhere:

    b  batch          t  query length, q_len    h  query heads        d  dims of query and key
    g  query heads    s  key length, kv_len     k  key heads          v  dims of value and out
       of a group

Operands are written in the layout "BLHD"; in "BHLD" their middle axes change places. `1|b` is an axis of size 1 or b.
"""

from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Int

import jax
import numpy as np
from jax import Array

__all__ = ["Array", "Bool", "Float", "Int", "Shaped"]

Shaped = Array | np.ndarray | jax.ShapeDtypeStruct
"""What has a shape and a dtype."""
