"""MAIL, RCPT, DATA and BDAT: one message from envelope to reply."""

from __future__ import annotations

import asyncio
import re

from aiosmtpd.smtp import syntax

from malote.errors import MaloteError, Reply, TooBusy
from malote.smtp.conversation import INTERNAL, Conversation
from malote.smtp.data import END, clean_lines, find_end, unstuff
from malote.smtp.networks import client_key
from malote.smtp.path import PathRefused, check_mail_parameters, check_rcpt_parameters, parse_path
from malote.smtp.rates import Rate
from malote.smtp.wire import MIN_DATA_RATE, TIMED_OUT, ClientGone, Phase

MAX_PIPELINED_RCPTS = 100   # given to the desk at once
SLOW_START_BLOCKS = 4       # that many whole block timeouts are forgiven before the least rate counts
BUSY = TooBusy().reply
TOO_BIG = Reply(552, "5.3.4", "Message is too large")
TOO_OFTEN = Reply(450, "4.7.1", "Too many messages from your address within a minute, try again later")
TOO_OFTEN_LOGIN = Reply(450, "4.7.1", "Too many messages of this login within a minute, try again later")
TOO_MANY = Reply(450, "4.7.1", "Too many recipients from your address within a minute, try again later")
TOO_MANY_LOGIN = Reply(450, "4.7.1", "Too many recipients of this login within a minute, try again later")
NO_RCPT = Reply(503, "5.5.1", "Send RCPT first")
NO_MAIL = Reply(503, "5.5.1", "Send MAIL first")
NO_HELO = Reply(503, "5.5.1", "Send EHLO first")

_BDAT = re.compile(r"([0-9]{1,18})(?: +(LAST))?", re.IGNORECASE)


class MessageCommands(Conversation):
    """Methods named as aiosmtpd names them: `smtp_` and the verb."""

    @syntax("MAIL FROM:<address>", extended=" [SP parameters]")
    async def smtp_MAIL(self, argument: str) -> None:  # noqa: N802
        if not self.client.helo:
            return self._fault(NO_HELO)
        if self._open:
            return self._fault(Reply(503, "5.5.1", "Nested MAIL"))
        address, parameters = parse_path(argument, "FROM:")
        if parameters and not self.client.esmtp:
            return self._fault(Reply(501, "5.5.4", "Parameters need EHLO"))
        size = check_mail_parameters(address, parameters, self._extensions)
        if size > self._size_limit:
            return self._fault(self._too_big)
        self._budget.check_room(size)
        self.client.smtputf8 = "SMTPUTF8" in parameters
        self._open = True
        reply = await self._ask(self._desk.mail(self.client, address, parameters))
        if reply.code // 100 == 2:      # by now the desk has said who it is
            rates = self._connections.rates
            reply = self._too_often(rates.client_messages, rates.login_messages, TOO_OFTEN, TOO_OFTEN_LOGIN) or reply
        if reply.code // 100 != 2:
            await self._reset()
        self.say(reply)
        return None

    def _too_often(self, by_client: Rate, by_login: Rate, client_reply: Reply, login_reply: Reply) -> Reply | None:
        """Count one for the client and one for its login; the refusal if there were too many in the last minute."""
        if not by_client.per_minute and not by_login.per_minute:
            return None
        client, now = self.client, self.loop.time()
        if not by_client.take(client_key(client.forwarded or client.peer), now):
            return client_reply
        return None if by_login.take(client.user, now) else login_reply

    @property
    def _too_big(self) -> Reply:
        return Reply(TOO_BIG.code, TOO_BIG.enhanced, f"{TOO_BIG.text}, at most {self._size_limit} bytes")

    @syntax("RCPT TO:<address>", extended=" [SP parameters]")
    async def smtp_RCPT(self, argument: str) -> None:  # noqa: N802
        """Pipelined RCPT go to the desk together; replies keep the client's order, so nothing else is answered between them."""
        more = len(self._rcpts_out) < MAX_PIPELINED_RCPTS and self.has_come(b"RCPT ")
        if not more and not self._rcpts_out:
            self.say(await self._rcpt(argument))
            return
        self._rcpts_out.append(self.loop.create_task(self._rcpt(argument)))
        if more:
            return
        waiting, self._rcpts_out = self._rcpts_out, []
        try:
            for each in waiting:
                self.say(await each)
        except BaseException:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            if self._overdue:
                self.hang_up(TIMED_OUT)     # replies are missing: one 451 would be taken for another recipient's
            raise

    async def _rcpt(self, argument: str) -> Reply:
        if not self._open:
            return NO_MAIL
        if self._bdat is not None:
            return Reply(503, "5.5.1", "RCPT after BDAT")
        try:
            address, parameters = parse_path(argument, "TO:")
            if parameters and not self.client.esmtp:
                return Reply(501, "5.5.4", "Parameters need EHLO")
            check_rcpt_parameters(address, parameters, self._extensions, self.client.smtputf8)
        except PathRefused as refusal:
            return refusal.reply
        if self._accepted >= self._settings.max_recipients:
            most = self._settings.max_recipients
            return Reply(452, "4.5.3", f"Too many recipients, at most {most} in one message; send the others after this one")
        rates = self._connections.rates
        if (too_many := self._too_often(rates.client_recipients, rates.login_recipients, TOO_MANY, TOO_MANY_LOGIN)) is not None:
            return too_many
        self._accepted += 1     # before the desk answers: others run beside this one
        reply = INTERNAL
        try:
            reply = await self._ask(self._desk.rcpt(self.client, address, parameters))
        except MaloteError as error:
            reply = error.reply
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        except Exception as error:  # noqa: BLE001 - the border
            self._log_fault(error)
        finally:
            if reply.code // 100 != 2:
                self._accepted -= 1
        return reply

    @syntax("DATA")
    async def smtp_DATA(self, argument: str) -> None:  # noqa: N802
        if not self._open:
            return self._fault(NO_MAIL)
        if self._bdat is not None:
            return self._fault(Reply(503, "5.5.1", "DATA after BDAT"))
        if not self._accepted:
            return self._fault(NO_RCPT)
        if argument:
            return self._fault(Reply(501, "5.5.4", "Syntax: DATA"))
        self.say(Reply(354, "", "End data with <CR><LF>.<CR><LF>"))
        await self._finish(await self._read_body())
        return None

    async def _finish(self, content: bytearray | Reply) -> None:
        """Hand the message over and answer. The memory stays charged until then."""
        if isinstance(content, Reply):
            reply = content
        else:
            clean = clean_lines(content, normalise=self._settings.normalise)
            del content
            self.client._kept = False
            self._in_data = True
            self.enter(Phase.HANDLER, self._settings.handler_seconds)
            reply = await self._desk.data(self.client, clean)
            self._open = False
            self._idle_commands = 0
            del clean
        await self._reset()
        self.say_final(reply)

    async def _read_body(self) -> bytearray | Reply:
        """The message up to CRLF.CRLF, dots removed; or the refusal, with everything up to there read and dropped."""
        out = self._buffer = bytearray(b"\r\n") + self._buffer
        scanned = 0
        refusal: Reply | None = None
        dropped = 0
        started = self.loop.time()
        self.enter(Phase.DATA, self._settings.data_block_seconds)
        while True:
            end = find_end(out, scanned)
            # dot-stuffing makes a message at most half as long again, and the end may be there in part
            refusal = refusal or self._charge(len(out) - 1 - len(END) if end < 0 else end, self._size_limit * 3 // 2)
            if end >= 0:
                self._buffer = out[end + len(END):]       # what the client pipelined after it
                if refusal is not None:
                    return refusal
                del out[end + 2:]
                content = unstuff(out)
                return content if len(content) <= self._size_limit else self._too_big
            if refusal is not None:     # drain without keeping; the last bytes may be the beginning of the end
                dropped += max(0, len(out) - (len(END) - 1))
                del out[:-(len(END) - 1)]
                self._check_drained(dropped, refusal)
            scanned = len(out)
            total = dropped + scanned
            await self.wait_for_bytes()
            self._next_block(started, total)

    def _next_block(self, started: float, received: int) -> None:
        """A block timer that each chunk restarts, and a whole that must keep up a least rate."""
        settings = self._settings
        whole = started + SLOW_START_BLOCKS * settings.data_block_seconds + received / MIN_DATA_RATE
        self.enter(Phase.DATA, max(0, min(settings.data_block_seconds, whole - self.loop.time())))

    def _charge(self, size: int, limit: int) -> Reply | None:
        """Charge the budget as the message grows to `size` bytes. A refusal gives everything back."""
        if size > limit:
            refusal = self._too_big
        elif size > self._charged and not self._budget.charge(size - self._charged):
            refusal = BUSY
        else:
            self._charged = max(size, self._charged)
            return None
        self._release()
        return refusal

    def _check_drained(self, dropped: int, refusal: Reply) -> None:
        if dropped > 4 * self._settings.max_message_bytes:
            self.hang_up(Reply(421, refusal.enhanced.replace("5", "4", 1), refusal.text))
            raise ClientGone

    @syntax("BDAT size [LAST]")
    async def smtp_BDAT(self, argument: str) -> None:  # noqa: N802
        """RFC 3030. The octets that follow are read whatever the answer is: else they would be taken for commands."""
        match = _BDAT.fullmatch(argument)
        if match is None:
            self.hang_up(Reply(421, "4.5.4", "Syntax: BDAT size [LAST]"))    # unknown length: cannot go on
            raise ClientGone
        size, last = int(match[1]), bool(match[2])
        refusal = None if self._accepted else NO_RCPT if self._open else NO_MAIL
        if self._bdat is None:
            self._bdat = bytearray()
        refusal = await self._read_octets(size, self._bdat, refusal)
        if refusal is not None:
            # the transaction is over: chunks that are on their way already get 503 each (RFC 3030 section 2)
            await self._reset()
            self.say_final(refusal)
        elif not last:
            self.say(Reply(250, "2.0.0", f"{size} octets received"))
        else:
            content, self._bdat = self._bdat, None
            await self._finish(content)

    async def _read_octets(self, size: int, into: bytearray, refusal: Reply | None) -> Reply | None:
        """Append exactly that many to `into`; with a refusal, old or new, read and drop them."""
        started = self.loop.time()
        self.enter(Phase.DATA, self._settings.data_block_seconds)
        left = size
        while left:
            take = min(left, len(self._buffer))
            if not take:
                await self.wait_for_bytes()
                self._next_block(started, size - left)
                continue
            refusal = refusal or self._charge(len(into) + take, self._size_limit)
            left -= take
            if refusal is None:
                into += memoryview(self._buffer)[:take]
            else:
                into.clear()
                self._check_drained(size - left, refusal)
            del self._buffer[:take]
        return refusal
