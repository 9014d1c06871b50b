"""Who calls: what a server knows and counts of each caller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# The one caller of a server that asks nobody for a name.
ANONYMOUS: Final = "anonymous"


@dataclass(eq=False, slots=True)
class Principal:
    """A caller by name; belongs to the event loop.

    Attributes:
        name: From its token or its certificate.
    """

    name: str


class Principals:
    """One `Principal` for each name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Principal] = {}

    def get(self, name: str) -> Principal:
        """Return the caller of that name."""
        principal = self._by_name.get(name)
        if principal is None:
            principal = self._by_name[name] = Principal(name)
        return principal
