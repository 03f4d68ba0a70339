"""One IMAP command and the answers to it: aioimaplib's `Command`, with structured answers and a bound on what they may hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import cast

from aioimaplib import aioimaplib

from malote.errors import MailboxError, MailboxLost
from malote.incoming.imap_names import Literal
from malote.incoming.imap_parse import Data, Status

STATUS_BUDGET = 64 * 1024 * 1024    # bytes that the answers to one command may hold, if it does not say otherwise

Piece = bytes | Literal


class Exchange(aioimaplib.Command):     # type: ignore[misc]
    """One command and the answers to it. `wants` are the names of the untagged data that belong to it.

    `answer` gives the client's next line whenever the server sends `+`; without it only literals may be asked for.
    """

    def __init__(self, name: str, tag: str, pieces: Sequence[Piece] = (), *, wants: frozenset[str] = frozenset(),
                 prefix: str = "", seconds: float, budget: int = STATUS_BUDGET,
                 take: Callable[[Data], bool] | None = None, answer: Callable[[bytes], bytes] | None = None) -> None:
        super().__init__(name, tag, prefix=prefix or None)
        self.pieces = pieces
        self.wants = wants
        self.seconds = seconds
        self.budget = budget
        self.take = take
        self.answer = answer
        self.data: list[Data] = []
        self.codes: list[Status] = []       # untagged status with a code, as COPYUID of a MOVE (RFC 6851 4.3)
        self.status: Status | None = None
        self.continued: asyncio.Event | None = None     # set by `+`, and by the end of the command

    def offer(self, response: Data, size: int) -> bool:
        """Keep an untagged response if it is ours. Raises `ValueError` if the answers grow beyond the budget."""
        if response.name not in self.wants or (self.take is not None and not self.take(response)):
            return False
        self.budget -= size
        if self.budget < 0:
            raise ValueError("an answer larger than what was asked for")
        if self.take is None:
            self.data.append(response)
        return True

    @property
    def done(self) -> bool:
        return cast(bool, self._event.is_set())

    def finish(self, status: Status) -> None:
        self.status = status
        self.close(status.text.encode(), status.result)
        if self.continued is not None:
            self.continued.set()

    def break_off(self, reason: str) -> None:
        self._exception = MailboxLost(reason)
        self.close(b"", "KO")
        if self.continued is not None:
            self.continued.set()

    def ok(self, what: str) -> Status:
        """The final status, or `MailboxError` with its code for NO and BAD. `what` names the action for people."""
        if self.status is None:
            raise MailboxLost("the connection is gone")
        if self.status.result != "OK":
            said = f": {self.status.text}" if self.status.text else ""
            raise MailboxError(f"the mail server refused to {what}{said}", code=self.status.code or self.status.result)
        return self.status
