"""Where the rows of a part of a problem lie: in arrays that are larger than the part, and whose results are merged.

A kernel that merges (`merging`) has an array "places", int32 (batch, 4): for each batch entry of the part the entry of
all whole arrays, and the first row in q and dout, in k and v, and in the state. So rows are read where they lie, and
parts of several places are one launch. Other kernels have no such array, and pay nothing.
"""

import enum
from typing import NamedTuple

from pallas_flash.kernels.mosaic.types import Index, Ref

__all__ = ["Located", "Place", "locate"]


class Place(enum.IntEnum):
    """The columns of "places"."""

    ENTRY = 0
    QUERY = 1
    KEY = 2
    STATE = 3


class Located(NamedTuple):
    """Where a batch entry of a part lies in a whole array."""

    batch: Index
    first: Index | None  # row; None: arrays are no larger than the part

    def row(self, row: Index) -> Index:
        """A row of the part, in the whole array."""
        return row if self.first is None else self.first + row


def locate(gmem: dict[str, Ref], place: Place, batch: Index) -> Located:
    """Where a batch entry lies in the arrays of a place, of a kernel with these arrays in global memory."""
    if "places" not in gmem:
        return Located(batch, None)
    places = gmem["places"]
    return Located(places[batch, int(Place.ENTRY)], places[batch, int(place)])
