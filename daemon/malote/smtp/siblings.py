"""Numbers that the workers of one service have in common: each writes its own, all see the sum (memory shared since the fork).

Limits hold for the whole service this way, however unevenly the work is spread. There is no lock: two workers that look at the
same moment may together go over a limit by one connection, or one message.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from malote.smtp.rates import Rates
from malote.smtp.shared_table import SharedTable

_CONNECTIONS: Final = 0
_MEMORY: Final = 1
_CLIENT_ROWS = 1024     # of eight clients each: 128 KB for each worker, if that many are connected


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


class SharedClients:
    """How many connections each client has with this process, and with the others."""

    __slots__ = ("_others", "_own")

    def __init__(self, tables: Sequence[SharedTable], own: int) -> None:
        self._own = tables[own]
        self._others = (*tables[:own], *tables[own + 1:])

    def set(self, client: str, count: int) -> None:
        self._own.set(client, count)

    def others(self, client: str) -> int:
        return int(sum(table.get(client) for table in self._others))


class Siblings:
    """Made by the supervisor before it forks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.rates = Rates()        # what clients and logins did lately, whoever served them
        self._clients = [SharedTable(_CLIENT_ROWS) for _ in range(count)]
        self._values = memoryview(mmap.mmap(-1, 2 * 8 * count)).cast("Q")   # zero, shared over fork(2)

    def connections(self, slot: int) -> SharedNumber:
        return self._number(_CONNECTIONS, slot)

    def clients(self, slot: int) -> SharedClients:
        return SharedClients(self._clients, slot)

    def memory(self, slot: int) -> SharedNumber:
        return self._number(_MEMORY, slot)

    def clear(self, slot: int) -> None:
        """That worker is gone, and what it held with it."""
        self._number(_CONNECTIONS, slot).set(0)
        self._number(_MEMORY, slot).set(0)
        self._clients[slot].clear()

    def _number(self, kind: int, slot: int) -> SharedNumber:
        return SharedNumber(self._values[kind * self._count:(kind + 1) * self._count], slot)
