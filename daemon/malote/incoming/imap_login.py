"""Opening an IMAP connection: TLS, certificate and name, then the login (RFC 8314, RFC 3501 6.2, RFC 4959, RFC 7628).

Nothing about the account leaves before TLS stands, except on loopback where `security = "none"` allows it. What the server said
before TLS is forgotten. No error text holds a password, a token, or the server's words about a login: servers echo what they got.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import os
import socket
import ssl
from collections.abc import Awaitable, Callable

from aioimaplib import aioimaplib

from malote.config import AccountConfig, Security
from malote.errors import ConfigError, MailboxError, MailboxLost
from malote.incoming.imap_exchange import Exchange
from malote.incoming.imap_names import astring
from malote.incoming.imap_protocol import MailProtocol
from malote.private_files import run_token_command

CONNECT_SECONDS = 30.0          # name look-up, TCP, TLS and greeting together
MAX_CAPABILITIES = 1000

_LOGIN_HINT = "check username and password, and whether the provider wants an application password"
_OAUTH_HINT = "check username, and that token_command gives a token for it, not expired, with the right to read mail"

Password = Callable[[], Awaitable[str]]


class MailClient(aioimaplib.IMAP4):     # type: ignore[misc]
    """aioimaplib's client, speaking through `MailProtocol`."""

    def __init__(self, host: str, port: int, *, ssl_context: ssl.SSLContext | None, max_literal: int) -> None:
        self._max_literal = max_literal
        super().__init__(host, port, ssl_context=ssl_context)

    def create_client(self, host: str, port: int, loop: asyncio.AbstractEventLoop | None,
                      conn_lost_cb: Callable[[Exception | None], None] | None = None,
                      ssl_context: ssl.SSLContext | None = None) -> None:
        running = loop or asyncio.get_running_loop()
        self.protocol = MailProtocol(running, max_literal=self._max_literal)
        self._client_task = running.create_task(running.create_connection(lambda: self.protocol, host, port, ssl=ssl_context))

    async def _wait_connection_and_hello(self) -> None:
        await self._client_task     # a refused connection, a failed name look-up or a TLS error is raised here
        await self.protocol.greeted.wait()
        if self.protocol.lost.is_set():
            raise MailboxLost(self.protocol.lost_reason)

    def abort(self) -> None:
        """Close at once, whatever the state."""
        self._client_task.cancel()
        self.protocol.fail("the connection was closed on our side")


async def open_connection(account: AccountConfig, password: Password, context: ssl.SSLContext | None, *,
                          max_literal: int, command_seconds: float) -> MailClient:
    """A logged-in connection with the capabilities announced after login. Raises `MailboxError`, `MailboxLost`, `ConfigError`."""
    tls = _checked_context(account, context)
    client = MailClient(account.host, account.port, ssl_context=tls if account.security is Security.TLS else None,
                        max_literal=max_literal)
    try:
        await _greet(client, account)
        if account.security is Security.STARTTLS and tls is not None:
            await _start_tls(client.protocol, tls, account.host, command_seconds)
        await read_capabilities(client.protocol, command_seconds)
        if not client.protocol.preauth:
            await _login(client.protocol, account, password, command_seconds)
            await read_capabilities(client.protocol, command_seconds)   # Dovecot announces MOVE only now
    except BaseException:
        client.abort()
        raise
    return client


def _checked_context(account: AccountConfig, context: ssl.SSLContext | None) -> ssl.SSLContext | None:
    if account.security is Security.NONE:
        return None
    if context is None:
        try:
            context = ssl.create_default_context(cafile=str(account.ca_file) if account.ca_file else None)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"account {account.name}: ca_file cannot be read as PEM certificates") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not context.check_hostname or context.verify_mode is not ssl.CERT_REQUIRED:
        raise ConfigError(f"account {account.name}: TLS without checking certificate and name is not accepted")
    return context


async def _greet(client: MailClient, account: AccountConfig) -> None:
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            await client._wait_connection_and_hello()
    except TimeoutError:
        raise MailboxLost(f"{account.host} did not answer within {CONNECT_SECONDS:.0f} seconds", code="NOANSWER",
                          hint="check host, port and security of the account") from None
    except ssl.SSLCertVerificationError as error:
        raise MailboxLost(f"the certificate of {account.host} is not accepted: {error.verify_message}",
                          code="CERTIFICATE", hint="set ca_file if the server has a certificate of its own") from error
    except (OSError, UnicodeError) as error:
        raise MailboxLost(f"{account.host}, port {account.port} cannot be reached ({_reason(error)})", code="UNREACHABLE",
                          hint="check host, port and security of the account, and whether its server is up") from error
    protocol = client.protocol
    keep_alive(protocol.transport.get_extra_info("socket"))
    encrypted = account.security is Security.TLS
    if account.security is Security.NONE:
        _check_loopback(protocol.transport, account)
    if protocol.preauth and not encrypted:
        raise MailboxLost("the mail server greets as already logged in, before TLS", code="PREAUTH")     # RFC 9051 7.1.4


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return "no TLS"
    if not isinstance(error, OSError):
        return "not a host name"
    # asyncio's own text repeats address and port, and getaddrinfo's numbers are negative
    return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or type(error).__name__


def _check_loopback(transport: asyncio.Transport, account: AccountConfig) -> None:
    peer = transport.get_extra_info("peername")
    address = ipaddress.ip_address(peer[0].partition("%")[0]) if isinstance(peer, tuple) else None
    if address is None or not address.is_loopback:
        raise ConfigError(f'account {account.name}: security = "none" is accepted only for loopback addresses',
                          hint='set security = "tls" or "starttls"')


def keep_alive(sock: socket.socket | None) -> None:
    """Let the kernel notice a peer that is gone without a word, as behind a NAT that forgot: after about 4 minutes."""
    if sock is None:
        return
    with contextlib.suppress(OSError):      # a courtesy: the timers of the commands notice it too, later
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _start_tls(protocol: MailProtocol, context: ssl.SSLContext, host: str, seconds: float) -> None:
    try:
        await protocol.start_tls(context, host, seconds)
    except ssl.SSLCertVerificationError as error:
        raise MailboxLost(f"the certificate of {host} is not accepted: {error.verify_message}",
                          code="CERTIFICATE", hint="set ca_file if the server has a certificate of its own") from error
    except OSError as error:
        raise MailboxLost(f"TLS with {host} failed ({_reason(error)})") from error


async def read_capabilities(protocol: MailProtocol, seconds: float) -> None:
    """Ask, and believe only this answer: what was announced before TLS or login is no longer true."""
    command = Exchange("CAPABILITY", protocol.new_tag(), wants=frozenset({"CAPABILITY"}), seconds=seconds)
    await protocol.execute(command)
    command.ok("say what it can do")
    words = [word for data in command.data for word in data.rest.upper().split()][:MAX_CAPABILITIES]
    protocol.capabilities = {word.decode("ascii", "replace") for word in words}
    if not protocol.capabilities & {"IMAP4REV1", "IMAP4REV2"}:
        protocol.fail("the server does not speak IMAP4rev1")
        raise MailboxLost(protocol.lost_reason)


# --- login ---

async def _login(protocol: MailProtocol, account: AccountConfig, password: Password, seconds: float) -> None:
    mechanism = choose_mechanism(protocol.capabilities, account)
    by_token = mechanism in ("XOAUTH2", "OAUTHBEARER")
    if by_token:
        secret = await run_token_command(account.token_command) if account.token_command else await password()
    else:
        secret = await password()
    if mechanism == "LOGIN":
        command = Exchange("LOGIN", protocol.new_tag(), (astring(account.username), astring(secret)), seconds=seconds)
    else:
        command = _authenticate(protocol, mechanism, account, secret, seconds)
    await protocol.execute(command)
    if command.status is None or command.status.result != "OK":
        code = command.status.code if command.status is not None else ""
        raise MailboxError(f"account {account.name}: the mail server refused the {'token' if by_token else 'login'}",
                           code=code or "AUTHENTICATIONFAILED", hint=_OAUTH_HINT if by_token else _LOGIN_HINT)
    protocol.state = aioimaplib.AUTH


def choose_mechanism(capabilities: set[str], account: AccountConfig) -> str:
    """`LOGIN`, `PLAIN`, `XOAUTH2` or `OAUTHBEARER`. Raises `MailboxError` if the server offers none that fits."""
    automatic = ("OAUTHBEARER", "XOAUTH2") if account.token_command else ("PLAIN", "LOGIN")
    order = automatic if account.auth == "auto" else (account.auth.upper(),)
    for mechanism in order:
        if f"AUTH={mechanism}" in capabilities and mechanism != "LOGIN":
            return mechanism
        if mechanism == "LOGIN" and "LOGINDISABLED" not in capabilities:
            return mechanism
    raise MailboxError(f"account {account.name}: the mail server does not offer {' or '.join(order)} here", code="NOAUTH",
                       hint="set auth to a mechanism that it offers")


def _authenticate(protocol: MailProtocol, mechanism: str, account: AccountConfig, secret: str, seconds: float) -> Exchange:
    """AUTHENTICATE, with the initial response where the server takes it (RFC 4959), else after its `+`.

    A rejected token is answered by a challenge that the client must answer before the server says NO (RFC 7628 3.2.3).
    """
    response = base64.b64encode(sasl_response(mechanism, account, secret))
    dismissal = b"AQ==" if mechanism == "OAUTHBEARER" else b""
    inline = "SASL-IR" in protocol.capabilities
    pending = [] if inline else [response]

    def answer(_challenge: bytes) -> bytes:
        return (pending.pop() if pending else dismissal) + b"\r\n"

    pieces = (mechanism.encode(), response) if inline else (mechanism.encode(),)
    return Exchange("AUTHENTICATE", protocol.new_tag(), pieces, seconds=seconds, answer=answer)


def sasl_response(mechanism: str, account: AccountConfig, secret: str) -> bytes:
    """The client's message: RFC 4616 for PLAIN, RFC 7628 3.1 for OAUTHBEARER, Google's and Microsoft's form for XOAUTH2."""
    forbidden = "\0" if mechanism == "PLAIN" else "\0\1\r\n"
    if any(sign in account.username + secret for sign in forbidden):
        raise MailboxError(f"account {account.name}: username or secret holds a character that {mechanism} cannot carry",
                           code="CANNOT")
    if mechanism == "PLAIN":
        return f"\0{account.username}\0{secret}".encode()
    if mechanism == "XOAUTH2":
        return f"user={account.username}\1auth=Bearer {secret}\1\1".encode()
    name = account.username.replace("=", "=3D").replace(",", "=2C")     # RFC 5801 4, saslname
    return f"n,a={name},\1host={account.host}\1port={account.port}\1auth=Bearer {secret}\1\1".encode()
