"""What each gradient of float32 inputs is made of; no Mosaic in here."""

from typing import NamedTuple

__all__ = ["KINDS", "Kind"]


class Kind(NamedTuple):
    """A gradient: a block keeps tiles of its own rows, and walks over tiles of the other axis."""

    own: tuple[str, ...]
    others: tuple[str, str]  # scores are products of own[0] and others[0]
    added: int  # which of the others is added up

    @property
    def of_queries(self) -> bool:
        """Whether a block keeps queries."""
        return self.own[0] == "q"

    @property
    def stages(self) -> tuple[int, int]:
        """Slots of the rings of the others: what fits with 128 columns."""
        return 2, 2 if len(self.own) == 1 else 1


KINDS = {"dq": Kind(("q", "dout"), ("k", "v"), 0), "dk": Kind(("k", "v"), ("q", "dout"), 0),
         "dv": Kind(("k",), ("q", "dout"), 1)}
