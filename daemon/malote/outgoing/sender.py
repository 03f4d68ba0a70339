"""The desk behind one listener: who the client is, what is answered to MAIL and RCPT, and the message handed to `Submissions`."""

from __future__ import annotations

import os
import pwd
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import cast

import structlog

from malote.config import ListenerConfig, OutgoingConfig
from malote.core.address import canonical_address
from malote.errors import FormatError, MaloteError, Reply, UpstreamError
from malote.outgoing.identities import Submitter, check_own, login_addresses
from malote.outgoing.passthrough import MECHANISMS, Listener, login_of
from malote.outgoing.sizes import largest_original
from malote.outgoing.submission import Submissions
from malote.outgoing.transaction import Transaction
from malote.outgoing.users import User, Users
from malote.smtp.desk import AuthOutcome, ClientSession, Offer, Params
from malote.smtp.lanes import Lane, OwnLane, PooledLane
from malote.smtp.networks import client_key
from malote.smtp.path import HOPS, LOOP, MAX_ASKING
from malote.smtp.relay import Upstream, UpstreamConnection
from malote.smtp.sizes import announced_limit
from malote.store.records import SendPlan
from malote.store.store import Store

log = structlog.get_logger("malote.outgoing")

_MAIL_OK = Reply(250, "2.1.0", "Sender ok")
_RCPT_KEPT = Reply(250, "2.1.5", "Recipient ok")
_BAD_RECIPIENT = Reply(553, "5.1.3", "This is no mail address")
_LOGIN_NEEDED = Reply(530, "5.7.0", "Log in first")
_CERTIFICATE_NEEDED = Reply(530, "5.7.0", "A TLS client certificate is needed here")
_NOT_LISTED = Reply(550, "5.7.1", "Your TLS client certificate is not among those that may send here")
_NOT_KNOWN = Reply(550, "5.7.1", "This user of the machine may not send here")
_NO_LOGIN_HERE = Reply(550, "5.7.1", "Mail is sent on with a configured login, so this listener must ask for one too")
_WELCOME = Reply(235, "2.7.0", "Logged in")
_WRONG = Reply(535, "5.7.8", "Login or password is wrong")
_NOT_NOW = Reply(454, "4.7.0", "The mail server that knows this login cannot be asked now, try again later")
_NO_MECHANISM = Reply(504, "5.5.4", "This way to log in is not offered")
_NO_TRANSACTION = Reply(503, "5.5.1", "Send MAIL first")

MAX_ANSWERED = 1000     # messages of one connection that wait for the proof that their replies were read
USER_SECONDS = 10       # how long the name of a user of this machine is remembered

_EXTERNAL = "EXTERNAL"  # RFC 4422 appendix A: by the certificate; some mail programs ask for it though they have shown theirs

_CARRIED = frozenset({"8BITMIME", "SMTPUTF8", "DSN", "REQUIRETLS"})     # extensions that are offered if the upstream has them


@dataclass(slots=True)
class SessionState:
    """What the desk knows of one client connection."""

    lane: Lane
    submitter: Submitter = field(default_factory=Submitter)
    tx: Transaction | None = None
    answered: list[SendPlan] = field(default_factory=list)      # told 250, not yet known to have read it


class Sender:
    """Implements `Desk` for one listener. `users`: local logins, or the addresses of others' logins (users.py)."""

    def __init__(self, *, listener: ListenerConfig, config: OutgoingConfig, upstream: Upstream, submissions: Submissions,
                 store: Store, users: Users) -> None:
        self._listener = listener
        self._config = config
        self._upstream = upstream
        self._submissions = submissions
        self._store = store
        self._users = users
        self._own_login = bool(config.upstream.username)
        self._pooled = PooledLane(upstream, config.upstream.upstream_connections)

        # where nobody after us sees the login, nobody else can hold it to its addresses
        self._binds = listener.senders == "own" or (listener.senders == "auto" and listener.auth not in ("pass-through", "none"))
        self._asks_upstream = listener.auth == "upstream" or self._passes_through

    @property
    def _passes_through(self) -> bool:
        return self._listener.auth == "pass-through" and not self._own_login

    # who is it

    async def offer(self, session: ClientSession) -> Offer:
        """What the upstream server can carry. Raises `UpstreamError` when that cannot be found out."""
        known = session.state is not None
        state = await self._state(session)
        if known and not session.login:     # TLS may have begun since, and shown a certificate
            state.submitter = self._first_submitter(session)
        extensions = state.lane.extensions if isinstance(state.lane, OwnLane) else await self._pooled.ask()
        largest = largest_original(announced_limit(extensions))
        return Offer((_CARRIED & extensions.keys()) | {HOPS}, largest, self._mechanisms(session, state.lane))

    def _mechanisms(self, session: ClientSession, lane: Lane) -> tuple[str, ...]:
        match self._listener.auth:
            case "pass-through" | "upstream":
                offered = lane.extensions.get("AUTH", "").upper().split() if self._asks_upstream else ()
                return tuple(name for name in MECHANISMS if name in offered)
            case "local":
                return ("PLAIN", "LOGIN", *self._external(session))
            case "certificate":
                return self._external(session)
            case _:
                return ()

    def _external(self, session: ClientSession) -> tuple[str, ...]:
        return (_EXTERNAL,) if self._certified(session) is not None else ()

    def _certified(self, session: ClientSession) -> User | None:
        """The user of the first name in the client's certificate that the users file lists."""
        return next((user for name in session.certificate if (user := self._users.get(name)) is not None), None)

    async def authenticate(self, session: ClientSession, mechanism: str, initial: bytes | None) -> AuthOutcome:
        state = await self._state(session)
        if mechanism not in self._mechanisms(session, state.lane):
            return AuthOutcome(_NO_MECHANISM)
        if mechanism == _EXTERNAL:
            return await self._check_certificate(session, state, initial)
        if self._listener.auth == "local":
            return await self._check_local(session, state, mechanism, initial)
        try:
            if isinstance(state.lane, OwnLane):
                return await self._ask_upstream(session, state, state.lane.connection, mechanism, initial)
            connection = await self._upstream.connect()     # of its own: the pooled ones are logged in already, or must not be
            try:
                return await self._ask_upstream(session, state, connection, mechanism, initial)
            finally:
                await connection.quit()
        except UpstreamError as error:      # RFC 4954 section 6: 454, after which no mail program asks for another password
            log.warning("upstream", session=session.id, fault=str(error))
            return AuthOutcome(_NOT_NOW)

    async def _check_certificate(self, session: ClientSession, state: SessionState, initial: bytes | None) -> AuthOutcome:
        user = self._certified(session)
        wanted = initial if initial is not None else await session.challenge(b"")
        if user is None or wanted not in (b"", user.login.encode()):    # RFC 4422 A.1: for nobody but itself
            return AuthOutcome(_WRONG)
        state.submitter = self._submitter(user.login, user.addresses)
        return AuthOutcome(_WELCOME, user.login)

    async def _ask_upstream(self, session: ClientSession, state: SessionState, connection: UpstreamConnection, mechanism: str,
                            initial: bytes | None) -> AuthOutcome:
        """The client's own login, on a connection that is the client's alone. The answer is the upstream server's."""
        listener = Listener(mechanism, initial, session.challenge)
        reply = await connection.authenticate(mechanism, initial, listener.answer)
        if reply.code != 235:
            return AuthOutcome(reply)
        state.submitter = self._of_login(listener.login)
        return AuthOutcome(reply, listener.login or "(unnamed)")

    def _of_login(self, login: str) -> Submitter:
        """Somebody else has checked the password: the users file, if there is one, knows the addresses."""
        user = self._users.get(login)
        return self._submitter(login, user.addresses if user is not None else login_addresses(login))

    def _submitter(self, login: str, addresses: frozenset[str]) -> Submitter:
        return Submitter(login, addresses, bound=self._binds)

    async def _check_local(self, session: ClientSession, state: SessionState, mechanism: str,
                           initial: bytes | None) -> AuthOutcome:
        login, password = await _login_and_password(session, mechanism, initial)
        user = await self._users.check_password(login, password, client_key(session.peer) or str(session.peer_uid))
        if user is None:
            return AuthOutcome(_WRONG)
        state.submitter = self._submitter(login, user.addresses)
        return AuthOutcome(_WELCOME, login)

    async def _state(self, session: ClientSession) -> SessionState:
        if session.state is None:
            lane: Lane = OwnLane(await self._upstream.connect()) if self._passes_through else self._pooled
            session.state = SessionState(lane, self._first_submitter(session))
        return cast(SessionState, session.state)

    def _first_submitter(self, session: ClientSession) -> Submitter:
        """Who the client is before it has logged in."""
        submitter = self._without_auth(session)
        session.known = submitter.login
        return submitter

    def _without_auth(self, session: ClientSession) -> Submitter:
        if session.vouched:
            return replace(self._of_login(session.vouched), bound=self._listener.senders != "any")
        user = self._certified(session)
        if user is not None:
            return self._submitter(user.login, user.addresses)
        match self._listener.auth:
            case "none":
                return Submitter(anyone=not self._own_login and not self._binds, bound=self._binds)
            case "peer" if session.peer_uid is not None:
                return self._local_user(session.peer_uid)
            case _:
                return Submitter(bound=self._binds)

    def _local_user(self, uid: int) -> Submitter:
        """The user at the other end of a UNIX socket. Whoever runs this program may use all that is in its store anyway."""
        name = _user_name(uid, int(time.monotonic() / USER_SECONDS))
        user = self._users.get(name) or self._users.get(str(uid))
        if user is not None:
            return self._submitter(name, user.addresses)
        return Submitter(name, anyone=True) if uid == os.geteuid() else Submitter()

    def _check_may_send(self, session: ClientSession, state: SessionState) -> None:
        """Raises `MaloteError` for a client that must log in first.

        With pass-through the upstream server decides who may send, but it sees this machine, which it may trust by its address:
        without a login only programs on this machine pass, as they could connect there themselves.
        """
        if state.submitter.login:
            return
        match self._listener.auth:
            case "local":
                raise MaloteError("no login", reply=_LOGIN_NEEDED)
            case "upstream" if not session.login:
                raise MaloteError("no login", reply=_LOGIN_NEEDED)
            case "certificate":
                raise MaloteError("no certificate", reply=_NOT_LISTED if session.certificate else _CERTIFICATE_NEEDED)
            case "peer":
                raise MaloteError("a user that is not listed", reply=_NOT_KNOWN)
            case "pass-through" if not session.login and not session.loopback:
                raise MaloteError("no login, from the network", reply=_LOGIN_NEEDED)
            case "none" | "pass-through" if self._own_login:
                raise MaloteError("no login, but the upstream has one", reply=_NO_LOGIN_HERE)

    # one message

    async def mail(self, session: ClientSession, address: str, params: Params) -> Reply:
        if int(params.get(HOPS, 0)) >= MAX_ASKING:
            return LOOP
        state = await self._state(session)
        self._check_may_send(session, state)
        if state.submitter.bound:
            self._check_own(state.submitter, address)
        if state.tx is not None:
            await state.tx.end()
        state.tx = Transaction(address, params, state.lane, fold=self._config.fold)
        return _MAIL_OK

    def _check_own(self, submitter: Submitter, address: str) -> None:
        """Raises `SenderRefused`."""
        try:
            canonical = canonical_address(address) if address else ""
        except FormatError:
            canonical = address     # not one that a login could own
        check_own(submitter, canonical)

    async def rcpt(self, session: ClientSession, address: str, params: Params) -> Reply:
        tx = cast(SessionState, session.state).tx
        if tx is None:
            return _NO_TRANSACTION
        try:
            try:
                canonical = canonical_address(address)
            except FormatError:
                return _BAD_RECIPIENT
            recipient = await self._submissions.decider.recipient(canonical, address, params, tx.sender)
            reply = await tx.rcpt(recipient)
            if reply.code // 100 == 5 and await self._store.is_served(canonical):
                tx.keep(recipient, reply)   # if it is the same message, its client must not bounce it
                return _RCPT_KEPT
            return reply
        except MaloteError as error:    # of this recipient alone: the others of the transaction go on
            if isinstance(error, UpstreamError):
                log.warning("upstream", session=session.id, fault=str(error))
            else:
                self._submissions.reporter.refused_recipient(session, tx.sender, canonical, error)
            return error.reply

    async def data(self, session: ClientSession, content: bytearray) -> Reply:
        state = cast(SessionState, session.state)
        tx = state.tx
        if tx is None:
            return _NO_TRANSACTION
        tx.hold()
        try:
            finished = await self._submissions.send(session, tx, state.submitter, content)
        finally:
            state.tx = None
            await tx.end()
        if finished.plan is not None:
            state.answered.append(finished.plan)
            del state.answered[:-MAX_ANSWERED]      # who never proves that it reads anything is remembered by the journal
        return finished.reply

    async def reset(self, session: ClientSession) -> None:
        state = cast(SessionState | None, session.state)
        if state is not None and state.tx is not None:
            tx, state.tx = state.tx, None
            await tx.end()

    async def close(self, session: ClientSession) -> None:
        await self.reset(session)
        state = cast(SessionState | None, session.state)
        session.state = None
        if state is not None and isinstance(state.lane, OwnLane):
            await state.lane.connection.quit()

    def reply_read(self, session: ClientSession) -> None:
        state = cast(SessionState | None, session.state)
        if state is not None:
            for plan in state.answered:
                self._store.forget_send(plan)
            state.answered.clear()


@lru_cache(maxsize=1024)
def _user_name(uid: int, _now: int) -> str:
    """Asking reads a file, or a directory service, for each connection."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


async def _login_and_password(session: ClientSession, mechanism: str, initial: bytes | None) -> tuple[str, str]:
    """From PLAIN (RFC 4616) or LOGIN. Two empty strings when the client gave up or sent something else."""
    if mechanism == "PLAIN":
        message = initial if initial is not None else await session.challenge(b"")
        login = login_of("PLAIN", message or b"")
        password = (message or b"").split(b"\0")[-1] if login else b""
    else:
        name = initial if initial is not None else await session.challenge(b"Username:")
        answer = await session.challenge(b"Password:") if name is not None else None
        login, password = login_of("LOGIN", name or b"") if answer is not None else "", answer or b""
    try:
        return login, password.decode()
    except UnicodeDecodeError:
        return "", ""
