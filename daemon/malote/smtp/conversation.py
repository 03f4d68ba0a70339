"""One client connection from greeting to end: reading commands, errors at the border, shutdown. The commands are elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import ssl
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import structlog

from malote.errors import MaloteError, Reply
from malote.smtp.auth import AuthFault
from malote.smtp.budget import MemoryBudget
from malote.smtp.certificates import certificate_names
from malote.smtp.desk import ClientSession, Desk, Offer
from malote.smtp.networks import NONE, UNIX, UNKNOWN, Networks, client_key, is_loopback
from malote.smtp.open_connections import Connections
from malote.smtp.path import PathRefused
from malote.smtp.proxy_header import Origin
from malote.smtp.wire import ClientGone, ClientWire, LineFault, Phase, peer_uid

log = structlog.get_logger("malote.smtp.server")
T = TypeVar("T")

MAX_FAULTS = 20             # protocol errors of one connection; after them 421
FAIR_COMMANDS = 20          # of one connection that may be worked off in a row
MAX_IDLE_COMMANDS = 1000    # commands between two messages; NOOP once per 299 s would hold a connection for ever
TLS_HANDSHAKE_SECONDS = 30
CLOSING = Reply(421, "4.3.2", "Service is stopping, try again later")
GIVE_WAY = Reply(421, "4.3.2", "Nothing was sent for a while and others wait, connect again")
OVERDUE = Reply(451, "4.4.2", "Took too long, nothing more was sent, try again later")
INTERNAL = MaloteError.default_reply

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """`handler_seconds`: until the desk has answered, whatever it does; a backstop behind the desk's own limits."""

    hostname: str
    max_message_bytes: int = 50 * 1024 * 1024
    max_recipients: int = 1000
    command_seconds: float = 300
    data_block_seconds: float = 180
    handler_seconds: float = 300
    normalise: bool = False
    tls_context: ssl.SSLContext | None = None
    implicit_tls: bool = False      # TLS from the first byte (RFC 8314)
    require_tls: bool = False       # for peers that are not this machine
    networks: Networks = NONE       # who may connect; empty: all
    proxies: Networks = NONE        # who begins with a PROXY header (gate.py)
    xclient: Networks = NONE        # who may say for whom it speaks (XCLIENT, XFORWARD)


class Conversation(ClientWire):
    """What all commands stand on. `commands`: SMTP verb in capitals -> method."""

    commands: ClassVar[dict[str, Callable[[Any, str], Awaitable[None]]]] = {}

    def __init__(self, settings: ServerSettings, desk: Desk, connections: Connections, budget: MemoryBudget,
                 origin: Origin | None = None) -> None:
        ClientWire.__init__(self, asyncio.get_running_loop())
        self._settings = settings
        self._desk = desk
        self._connections = connections
        self._budget = budget
        self._origin = origin
        self.task: asyncio.Task[None] | None = None
        self.client: ClientSession = ClientSession(id="", peer="")
        self._offer = Offer()
        self._open = False              # MAIL was accepted
        self._accepted = 0
        self._rcpts_out: list[asyncio.Task[Reply]] = []
        self._bdat: bytearray | None = None     # chunks so far
        self._charged = 0
        self._faults = 0
        self._idle_commands = 0
        self._auth_failures = 0
        self._cancelled_auth: Reply | None = None
        self._in_data = False
        self._overdue = False
        self._stopping = False
        self._ending = False            # the conversation is over; the desk is tidying up
        self._may_speak_for_others = False      # told by the peer, whoever it speaks for
        self._peer_is_here = False
        self._named = False                     # it has said for whom
        self._shaking_hands = False             # STARTTLS
        self._entered_tls = False       # at the proxy in front of us, which is on this machine

    # life of a connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)
        self.wire_made(stream)
        self.client = self._session_of(stream)
        self._peer_is_here = self.client.loopback
        self._may_speak_for_others = self.client.peer in self._settings.xclient
        refusal = self._admit()
        if refusal is not None:
            self.hang_up(refusal)
            return
        if stream.get_extra_info("ssl_object") is not None:
            self._now_over_tls(stream)
        self.task = self.loop.create_task(self._handle_client())

    def _session_of(self, stream: asyncio.Transport) -> ClientSession:
        peer, number, origin = stream.get_extra_info("peername"), next(_numbers), self._origin
        if isinstance(peer, tuple):
            session = ClientSession(f"c{number}", peer[0], None, is_loopback(peer[0]))
        else:
            session = ClientSession(f"c{number}", UNIX, peer_uid(stream.get_extra_info("socket")), True)
        if origin is not None:
            # an address of the proxy's machine is one of this machine only if the proxy is here; the proxy itself is no client
            self._entered_tls = origin.tls and session.loopback
            session.loopback = session.loopback and is_loopback(origin.address)
            session.peer_uid = None
            if not origin.local:
                session.peer = origin.address or UNKNOWN
        return session

    def _admit(self) -> Reply | None:
        """The refusal, if this client may not connect, or not now. Proxies and peers that speak for others have no limits of
        their own: those whom they speak for do."""
        peer, networks = self.client.peer, self._settings.networks
        trusted = (self._origin is not None and self._origin.local) or peer in self._settings.xclient
        if networks and peer not in networks and peer != UNIX and not trusted:
            return self._refused(Reply(554, "5.7.1", f"Mail from {peer} is not taken here, it is in no network of this server"))
        refusal = self._connections.admit(self, "" if trusted else client_key(peer))
        return refusal if refusal is None else self._refused(refusal)

    def _refused(self, reply: Reply) -> Reply:
        log.info("client refused", session=self.client.id, reply=reply.code, reason=reply.enhanced, client=self.client.peer)
        return reply

    def connection_lost(self, error: Exception | None) -> None:
        """Before our first final dot upstream a vanished client ends the work, after it the work goes on."""
        busy = self._phase is Phase.HANDLER and self._waiter is None and not self._ending
        self.wire_lost()
        if busy and self.task is not None and not (self._in_data and self.client._kept):
            self.task.cancel()

    @property
    def desk(self) -> Desk:
        return self._desk

    def stop(self) -> None:
        """Graceful: 421 now if idle, else after the message in hand."""
        self._stopping = True
        if self._phase is Phase.COMMAND:
            self.hang_up(CLOSING)

    @property
    def idle_since(self) -> float | None:
        waits = self._waiter is not None or self._shaking_hands
        if self._phase is Phase.COMMAND and waits and not self._open and not self._eof:
            return self._waiting_since
        return None

    @property
    def logged_in(self) -> bool:
        return bool(self.client.user)

    def give_way(self) -> None:
        if self._shaking_hands:     # no word would be understood
            self.cut_off()
        else:
            self.hang_up(GIVE_WAY)

    def cut_off(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        if self.task is not None:
            self.task.cancel()

    def timed_out(self) -> None:
        """Idle: 421. Desk too slow: 451, and cancelled unless the message may already be accepted upstream."""
        if self._phase is not Phase.HANDLER:
            super().timed_out()
        elif self._in_data and self.client._kept:
            self.hang_up(OVERDUE)
        elif self.task is not None:
            self._overdue = True
            self.task.cancel()

    async def _handle_client(self) -> None:
        try:
            self.say(self._greeting)
            for number in itertools.count(1):
                await self._one_command()
                if not number % FAIR_COMMANDS:      # all of them may be in the buffer: others have their turn
                    await asyncio.sleep(0)
        except ClientGone:
            pass
        finally:
            self._ending = True
            self.hang_up()
            try:
                await self._end()
            finally:
                self._connections.discard(self)

    async def _end(self) -> None:
        try:
            if self._open:
                await self._reset()
        finally:
            self._release()
            self.stop_timer()
            try:
                await self._desk.close(self.client)
            except Exception as error:  # noqa: BLE001 - the border: nobody is left to be told
                self._log_fault(error)

    async def _one_command(self) -> None:
        settings = self._settings
        self._check_stopping()
        try:
            line, proof = await self.read_command(settings.command_seconds)
        except LineFault as fault:
            self._fault(fault.reply)
            return
        if proof:
            self._tell_read()
        self._check_stopping()
        verb, _, rest = line.partition(b" ")
        name = verb.decode("ascii", "replace").upper()
        method = self.commands.get(name)
        self._idle_commands += 1
        if method is None:
            self._fault(Reply(500, "5.5.2", "Command not recognised"))
        elif self._idle_commands > MAX_IDLE_COMMANDS + settings.max_recipients:
            self.hang_up(Reply(421, "4.7.0", "Too many commands without a message"))
            raise ClientGone
        elif self._tls_missing(name):
            self._fault(Reply(530, "5.7.0", "Send STARTTLS first"))
        else:
            await self._run(method, rest.decode("utf-8", "surrogateescape").strip(" \t"))

    def _check_stopping(self) -> None:
        if self._stopping:
            self.hang_up(CLOSING)
            raise ClientGone

    async def _run(self, method: Callable[[Any, str], Awaitable[None]], argument: str) -> None:
        try:
            await method(self, argument)
            return
        except (PathRefused, AuthFault) as refusal:
            self._fault(refusal.reply)
            return
        except ClientGone:
            raise
        except asyncio.CancelledError:
            if self.task is None or (self.task.cancelling() and not self._overdue):
                raise
            reply = INTERNAL    # not this task was cancelled but something that the desk waited for
            if self._overdue:
                self._overdue = False
                self.task.uncancel()
                reply = OVERDUE
        except MaloteError as error:
            reply = error.reply
        except Exception as error:  # noqa: BLE001 - the border: unknown is temporary and says nothing of the inside
            self._log_fault(error)
            reply = INTERNAL
        answer = self.say_final if self._in_data else self.say
        await self._reset()
        answer(reply)

    def _tell_read(self) -> None:
        try:
            self._desk.reply_read(self.client)
        except Exception as error:  # noqa: BLE001 - the border: a fault here is none of this command's
            self._log_fault(error)

    def _log_fault(self, error: Exception) -> None:
        # the exception's own text may hold an address or a piece of the message: it is not logged
        frame = traceback.extract_tb(error.__traceback__)[-1]
        log.error("fault", session=self.client.id, error=type(error).__name__, where=f"{frame.filename}:{frame.lineno}")

    def _fault(self, reply: Reply) -> None:
        """An error of the client's; too many end the connection."""
        self._faults += 1
        if self._faults > MAX_FAULTS:
            self.hang_up(Reply(421, "4.7.0", "Too many errors"))
            raise ClientGone
        self.say(reply)

    def _tls_missing(self, name: str) -> bool:
        return (
            self._settings.require_tls and not self._private
            and name not in ("EHLO", "HELO", "STARTTLS", "NOOP", "QUIT", "RSET")
        )

    async def _ask(self, awaitable: Awaitable[T]) -> T:
        """Let the desk work, under the handler's timer."""
        self.enter(Phase.HANDLER, self._settings.handler_seconds)
        return await awaitable

    async def _reset(self) -> None:
        """Forget the transaction, here and at the desk."""
        was_open, self._open = self._open, False
        self._accepted = 0
        self._bdat = None
        self._in_data = False
        self.client.smtputf8 = False
        self.client.forwarded = ""
        self._release()
        if was_open:
            try:
                await self._ask(self._desk.reset(self.client))
            except Exception as error:  # noqa: BLE001 - the border: the transaction is over for the client either way
                self._log_fault(error)

    def _release(self) -> None:
        if self._charged:
            self._budget.release(self._charged)
            self._charged = 0

    async def _start_tls(self) -> None:
        """What was said in clear does not count (RFC 3207 4.2), and what was sent ahead is thrown away (injection)."""
        context = self._settings.tls_context
        if self.transport is None or context is None:
            raise ClientGone
        self._buffer.clear()
        self._read_paused = False
        self.enter(Phase.COMMAND, TLS_HANDSHAKE_SECONDS + 5)
        self._shaking_hands = True
        try:
            transport = await self.loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=TLS_HANDSHAKE_SECONDS)
        except (OSError, EOFError) as error:
            raise ClientGone from error
        finally:
            self._shaking_hands = False
        if transport is None or self._eof:
            raise ClientGone
        self._now_over_tls(transport)
        self.client.helo = ""
        self._offer = Offer()

    def _now_over_tls(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self._over_tls = True
        self.client.tls = True
        ssl_object = transport.get_extra_info("ssl_object")
        self.client.tls_version = ssl_object.version() or ""
        if not self._named:     # else it is the peer's own
            self.client.certificate = certificate_names(ssl_object.getpeercert())

    @property
    def _greeting(self) -> Reply:
        return Reply(220, "", f"{self._settings.hostname} ESMTP malote")

    @property
    def _private(self) -> bool:
        """Whether a password may be sent on this connection."""
        return self.client.tls or self.client.loopback or self._entered_tls

    @property
    def _extensions(self) -> frozenset[str]:
        if not self.client.esmtp:
            return frozenset()
        # RFC 8689 4.2.1: REQUIRETLS only where the connection is encrypted
        return self._offer.extensions if self.client.tls else self._offer.extensions - {"REQUIRETLS"}

    @property
    def _size_limit(self) -> int:
        most = self._settings.max_message_bytes
        return min(most, self._offer.size) if self._offer.size else most

