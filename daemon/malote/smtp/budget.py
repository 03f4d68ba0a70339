"""The memory budget: how many bytes of messages may be in flight at once, over all connections."""

from __future__ import annotations

from malote.errors import TooBusy
from malote.smtp.siblings import SharedNumber

# What a message costs at its peak, per byte of it: the submitted bytes, the edited original, the sealed payload, its base64
# text (1.41 times) with the part of it that the socket has not taken yet. A bench checks the sum (memory-25mb: 5 with Python).
MEMORY_FACTOR = 5


class MemoryBudget:
    """Counts message bytes against `total_bytes` of memory. Never waits: who does not fit is told to come back."""

    def __init__(self, total_bytes: int, factor: int = MEMORY_FACTOR) -> None:
        self.total_bytes = total_bytes
        self.used_bytes = 0
        self.shared: SharedNumber | None = None     # with the other workers of the service: the budget is for all of them
        self._factor = factor

    def check_room(self, message_bytes: int) -> None:
        """Raises `TooBusy` if a message of that size would not fit now. Reserves nothing: a client that announces SIZE= and
        then sends nothing would shut out all others for free."""
        if self._used_by_all() + message_bytes * self._factor > self.total_bytes:
            raise TooBusy

    def charge(self, message_bytes: int) -> bool:
        """Take room for that many more bytes. False: no room, nothing taken."""
        cost = message_bytes * self._factor
        if self._used_by_all() + cost > self.total_bytes:
            return False
        self._use(self.used_bytes + cost)
        return True

    def release(self, message_bytes: int) -> None:
        self._use(self.used_bytes - message_bytes * self._factor)

    def _used_by_all(self) -> int:
        return self.used_bytes if self.shared is None else self.used_bytes + self.shared.others()

    def _use(self, used_bytes: int) -> None:
        self.used_bytes = used_bytes
        if self.shared is not None:
            self.shared.set(used_bytes)
