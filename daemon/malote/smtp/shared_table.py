"""A number for each of many keys, in memory that all processes forked since see: for limits that hold for all workers together.

Of fixed size, and lossy: where more than eight keys meet in one row, the smallest number makes way. There is no lock: of two
processes that write the same number at the same moment one is not counted. For a limit on what clients do, both are small.
"""

from __future__ import annotations

import mmap

WAYS = 8


class SharedTable:
    """`rows` of eight numbers, 128 bytes a row, taken from the system when a row is first used. Numbers are >= 0; 0 is none."""

    __slots__ = ("_keys", "_memory", "_numbers", "_rows")

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._memory = memoryview(mmap.mmap(-1, 2 * 8 * WAYS * rows))   # zero, shared over fork(2)
        self._keys = self._memory[:8 * WAYS * rows].cast("q")
        self._numbers = self._memory[8 * WAYS * rows:].cast("d")

    def get(self, key: str) -> float:
        """0 for a key that is not there, or is there no more."""
        mark = _mark(key)
        first = mark % self._rows * WAYS
        row = self._keys[first:first + WAYS].tolist()
        return self._numbers[first + row.index(mark)] if mark in row else 0.0

    def set(self, key: str, number: float) -> None:
        mark = _mark(key)
        first = mark % self._rows * WAYS
        row = self._keys[first:first + WAYS].tolist()
        if mark in row:
            place = first + row.index(mark)
        else:
            numbers = self._numbers[first:first + WAYS].tolist()
            place = first + numbers.index(min(numbers))
            self._keys[place] = mark
        self._numbers[place] = number

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))


def _mark(key: str) -> int:
    """Python's own hash: keyed at random, so that nobody can choose keys that meet; after fork(2) the same in all processes."""
    return hash(key) or 1
