"""How much a client or a login may do in a minute.

One number for each key: when all that was done would be paid off if it had come evenly (the generic cell rate algorithm). Whoever
was quiet may do a whole minute's worth at once, and from then on as much as the rate gives back.
"""

from __future__ import annotations

from malote.config import LimitsConfig
from malote.smtp.shared_table import SharedTable

ROWS = 16_384           # of eight keys: 2 MB, if that many come
MINUTE = 60.0


class Rate:
    """At most `per_minute` for each key; 0: no limit. Processes forked since it was made count together."""

    def __init__(self, per_minute: int = 0) -> None:
        self.per_minute = per_minute
        self._paid_at = SharedTable(ROWS)

    def take(self, key: str, now: float) -> bool:
        """Count one. False: too many, and it is not counted. `now` in seconds of a steady clock that all processes share; "" is
        nobody and unlimited."""
        if not self.per_minute or not key:
            return True
        paid_at = max(self._paid_at.get(key), now)
        step = MINUTE / self.per_minute
        if paid_at - now > MINUTE - step + 1e-6:
            return False
        self._paid_at.set(key, paid_at + step)
        return True


class Rates:
    """All that are counted. One object for the life of the service: a reload changes the numbers and forgets nothing."""

    def __init__(self) -> None:
        self.client_connections = Rate()
        self.client_messages = Rate()
        self.client_recipients = Rate()
        self.login_messages = Rate()
        self.login_recipients = Rate()

    def renew(self, limits: LimitsConfig) -> None:
        self.client_connections.per_minute = limits.client_connections_per_minute
        self.client_messages.per_minute = limits.client_messages_per_minute
        self.client_recipients.per_minute = limits.client_recipients_per_minute
        self.login_messages.per_minute = limits.login_messages_per_minute
        self.login_recipients.per_minute = limits.login_recipients_per_minute
