"""The server end of LMTP (RFC 2033): LHLO in the place of EHLO, and an answer to each message for each of its recipients."""

from __future__ import annotations

from dataclasses import dataclass

from aiosmtpd.smtp import syntax

from malote.errors import MaloteError, Reply
from malote.smtp.server import SubmissionServer

_USE_LHLO = Reply(500, "5.5.1", "This is LMTP, send LHLO")     # RFC 2033 4.1: EHLO and HELO must not be accepted


@dataclass(frozen=True, slots=True)
class Replies(Reply):
    """What became of a message for each recipient, in the order of RCPT; as a reply itself, all that SMTP has room for."""

    each: tuple[Reply, ...] = ()


class LmtpServer(SubmissionServer):
    """One LMTP connection."""

    _due = 1        # answers to the message under way: one for each recipient that was accepted (RFC 2033 4.2)

    @syntax("LHLO hostname")
    async def smtp_LHLO(self, hostname: str) -> None:  # noqa: N802 - aiosmtpd's convention
        await super().smtp_EHLO(hostname)

    @syntax("LHLO hostname")
    async def smtp_EHLO(self, _hostname: str) -> None:  # noqa: N802
        self._fault(_USE_LHLO)

    @syntax("LHLO hostname")
    async def smtp_HELO(self, _hostname: str) -> None:  # noqa: N802
        self._fault(_USE_LHLO)

    @syntax("DATA")
    async def smtp_DATA(self, argument: str) -> None:  # noqa: N802
        self._due = self._accepted
        await super().smtp_DATA(argument)

    @syntax("BDAT size [LAST]")
    async def smtp_BDAT(self, argument: str) -> None:  # noqa: N802
        # a chunk that is not the last has one answer of its own (RFC 3030 section 2)
        self._due = self._accepted if argument.upper().endswith("LAST") else 1
        await super().smtp_BDAT(argument)

    async def _finish(self, content: bytearray | Reply) -> None:
        try:
            await super()._finish(content)
        except MaloteError as error:
            if self._in_data:       # the desk's: answered with the others of its kind
                raise
            await self._reset()
            self.say_final(error.reply)

    def say_final(self, reply: Reply) -> None:
        each = reply.each if isinstance(reply, Replies) else (reply,) * max(1, self._due)
        for one in each[:-1]:
            self.say(one)
        super().say_final(each[-1])
