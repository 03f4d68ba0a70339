"""Numbers that the workers of one service have in common: each writes its own, all see the sum (memory shared since the fork).

Limits hold for the whole service this way, however unevenly the work is spread. There is no lock: two workers that look at the
same moment may together go over a limit by one connection, or one message.
"""

from __future__ import annotations

import mmap
from typing import Final

_CONNECTIONS: Final = 0
_MEMORY: Final = 1


class SharedNumber:
    """This process's number, and the sum of the others'."""

    __slots__ = ("_own", "_values")

    def __init__(self, values: memoryview[int], own: int) -> None:
        self._values = values
        self._own = own

    def set(self, value: int) -> None:
        self._values[self._own] = value

    def others(self) -> int:
        return sum(self._values) - self._values[self._own]


class Siblings:
    """Made by the supervisor before it forks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values = memoryview(mmap.mmap(-1, 2 * 8 * count)).cast("Q")   # zero, shared over fork(2)

    def connections(self, slot: int) -> SharedNumber:
        return self._number(_CONNECTIONS, slot)

    def memory(self, slot: int) -> SharedNumber:
        return self._number(_MEMORY, slot)

    def clear(self, slot: int) -> None:
        """That worker is gone, and what it held with it."""
        self._number(_CONNECTIONS, slot).set(0)
        self._number(_MEMORY, slot).set(0)

    def _number(self, kind: int, slot: int) -> SharedNumber:
        return SharedNumber(self._values[kind * self._count:(kind + 1) * self._count], slot)
