"""The SMTP server that mail clients and MTAs hand their mail to: aiosmtpd's `SMTP` with its faults overridden.

aiosmtpd 1.4.6 cancels a relay when its timer or an EOF comes, answers exceptions with their text and a permanent error, and
costs four to seven times a plain protocol (its faults are listed in tests/outgoing/test_server_faults.py, each with the test
that pins the cure). What remains of it is the convention of commands: `smtp_*` methods with `syntax`. It is driven by a `Desk`.
"""

from __future__ import annotations

import base64
import re
from typing import Any

from aiosmtpd.smtp import SMTP, syntax

from malote.errors import Reply
from malote.smtp.auth import MAX_AUTH_FAILURES, AuthFault, decode_answer, parse_auth
from malote.smtp.conversation import INTERNAL, ServerSettings, log
from malote.smtp.forwarded import XCLIENT, XFORWARD
from malote.smtp.message_commands import NO_HELO, MessageCommands
from malote.smtp.path import HOPS, PathRefused
from malote.smtp.peer_commands import PeerCommands
from malote.smtp.wire import ClientGone, LineFault, Phase

__all__ = ["ServerSettings", "SubmissionServer"]

OK = Reply(250, "2.0.0", "Ok")
_HELO = re.compile(r"[!#-'*-:=?-\[\]-~\u00a1-\ud7ff\ue000-\U0010ffff]{1,255}")     # fit to stand in a Received line


class SubmissionServer(MessageCommands, PeerCommands, SMTP):  # type: ignore[misc]  # aiosmtpd is not typed
    """One connection. aiosmtpd's constructor is not called: it spends 77 us on reflection that is done here once."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.commands = _commands_of(cls)

    @syntax("EHLO hostname")
    async def smtp_EHLO(self, hostname: str) -> None:  # noqa: N802 - aiosmtpd's convention
        await self._greet(hostname, esmtp=True)
        offer = self._offer = await self._ask(self._desk.offer(self.client))
        lines = [self._settings.hostname, "PIPELINING", f"SIZE {self._size_limit}", "ENHANCEDSTATUSCODES", "CHUNKING"]
        lines += [name for name in ("8BITMIME", "SMTPUTF8", "DSN", "REQUIRETLS", HOPS) if name in self._extensions]
        if self._settings.tls_context is not None and not self.client.tls:
            lines.append("STARTTLS")
        if self._may_speak_for_others:
            lines += [f"XCLIENT {' '.join(XCLIENT)}", f"XFORWARD {' '.join(XFORWARD)}"]
        if offer.auth and self._private:
            lines.append(f"AUTH {' '.join(offer.auth)}")
        self.say(Reply(250, "", "\n".join(lines)))

    @syntax("HELO hostname")
    async def smtp_HELO(self, hostname: str) -> None:  # noqa: N802
        await self._greet(hostname, esmtp=False)
        self._offer = await self._ask(self._desk.offer(self.client))
        self.say(Reply(250, "", self._settings.hostname))

    async def _greet(self, hostname: str, *, esmtp: bool) -> None:
        if not _HELO.fullmatch(hostname):
            raise PathRefused(Reply(501, "5.5.4", "Syntax: EHLO hostname"))
        await self._reset()
        self.client.helo = hostname
        self.client.esmtp = esmtp

    @syntax("STARTTLS", when="tls_context")
    async def smtp_STARTTLS(self, argument: str) -> None:  # noqa: N802
        if self._settings.tls_context is None:
            return self._fault(Reply(502, "5.5.1", "TLS is not available here"))
        if self.client.tls or self.client.login:
            return self._fault(Reply(503, "5.5.1", "TLS is active" if self.client.tls else "Too late for STARTTLS"))
        if argument:
            return self._fault(Reply(501, "5.5.4", "Syntax: STARTTLS"))
        await self._reset()
        self.say(Reply(220, "2.0.0", "Ready to start TLS"))
        self.flush()
        await self._start_tls()
        return None

    @syntax("AUTH mechanism [initial-response]")
    async def smtp_AUTH(self, argument: str) -> None:  # noqa: N802
        client = self.client
        if not client.helo or not client.esmtp:
            return self._fault(NO_HELO)
        if client.login or self._open:
            return self._fault(Reply(503, "5.5.1", "Already authenticated" if client.login else "Not inside a transaction"))
        if not self._private:
            return self._fault(Reply(538, "5.7.11", "Encryption required, send STARTTLS first"))
        mechanism, initial = parse_auth(argument)
        if mechanism not in self._offer.auth:
            return self._fault(Reply(504, "5.5.4", "Mechanism not offered"))
        client._challenge = self._challenge
        self._cancelled_auth = None
        try:
            outcome = await self._ask(self._desk.authenticate(client, mechanism, initial))
        finally:
            client._challenge = None
        reply = self._cancelled_auth or outcome.reply
        if reply.code == 235:
            client.login = outcome.login
        else:
            self._auth_failures += 1
            log.info("login refused", session=client.id, reply=reply.code, client=client.peer)
        self.say(reply)
        if self._auth_failures >= MAX_AUTH_FAILURES:
            self.hang_up(Reply(421, "4.7.0", "Too many failed logins"))
            raise ClientGone
        return None

    async def _challenge(self, text: bytes) -> bytes | None:
        self.say(Reply(334, "", base64.b64encode(text).decode()))
        self.enter(Phase.COMMAND, self._settings.command_seconds)
        try:
            return decode_answer(await self.read_line())
        except AuthFault as fault:
            self._cancelled_auth = fault.reply
        except LineFault as fault:
            self._cancelled_auth = fault.reply
        finally:
            self.enter(Phase.HANDLER, self._settings.handler_seconds)
        return None

    @syntax("NOOP [ignored]")
    async def smtp_NOOP(self, _argument: str) -> None:  # noqa: N802
        self.say(OK)

    @syntax("RSET")
    async def smtp_RSET(self, argument: str) -> None:  # noqa: N802
        if argument:
            return self._fault(Reply(501, "5.5.4", "Syntax: RSET"))
        await self._reset()
        self.say(OK)
        return None

    @syntax("VRFY address")
    async def smtp_VRFY(self, _argument: str) -> None:  # noqa: N802
        self.say(Reply(252, "2.1.5", "Cannot verify, send the mail and see"))

    @syntax("HELP")
    async def smtp_HELP(self, _argument: str) -> None:  # noqa: N802
        self.say(Reply(214, "2.0.0", "See RFC 5321 and malote(1)"))

    @syntax("QUIT")
    async def smtp_QUIT(self, _argument: str) -> None:  # noqa: N802
        await self._reset()
        self.hang_up(Reply(221, "2.0.0", "Bye"))
        raise ClientGone

    # aiosmtpd's own hooks, for the commands that are still its

    async def handle_exception(self, error: Exception) -> str:
        """aiosmtpd's hook; its own answer would be a permanent one with the exception's text."""
        self._log_fault(error)
        return str(INTERNAL)

    async def push(self, status: str | bytes) -> None:
        """For the commands that are still aiosmtpd's: its replies lack enhanced codes."""
        text = status.decode("utf-8", "replace") if isinstance(status, bytes) else status
        self.say(Reply(int(text[:3]), f"{text[0]}.0.0", text[4:]))

    async def check_helo_needed(self, helo: str = "HELO") -> bool:
        return False

    async def check_auth_needed(self, caller_method: str) -> bool:
        return False


def _commands_of(cls: type[SubmissionServer]) -> dict[str, Any]:
    return {name[5:]: getattr(cls, name) for name in dir(cls) if name.startswith("smtp_")}


SubmissionServer.commands = _commands_of(SubmissionServer)
