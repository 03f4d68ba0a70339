"""The configuration: read once, strict, typed. `malote.example.toml` beside this file lists every key at its default.

An unknown key, section or value is a `ConfigError` that names file and key. Secrets are never in this file: only the paths of
the files that hold them (0600 enforced where they are read) or the names of systemd credentials.
"""

from __future__ import annotations

import ipaddress
import json
import tomllib
from collections.abc import Iterator
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from malote.errors import ConfigError

OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]   # "" says: not set
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


def _checked_network(name: str) -> str:
    if name != "unix":
        ipaddress.ip_network(name)      # its ValueError says what is wrong, as "has host bits set"
    return name


Network = Annotated[str, AfterValidator(_checked_network)]      # an address, a network, or "unix": whoever opens the UNIX socket


class Section(BaseModel):
    """A table of the file: no unknown keys, no silent conversion of types, unchangeable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Security(StrEnum):
    """How a connection that we open is protected."""

    STARTTLS = "starttls"   # required: without it nothing is sent, not even the login
    TLS = "tls"             # TLS from the first byte (RFC 8314)
    NONE = "none"           # clear text: accepted only for loopback addresses and UNIX sockets


class ServiceConfig(Section):
    workers: int = Field(1, ge=1, le=64)    # processes that share the listening sockets; 1: one process and no other


class StoreConfig(Section):
    path: OptionalPath = None    # directory; default: /var/lib/malote for root or the service, XDG data directory for a person
    url: str = ""                # postgresql://...: the store is in that database, path only holds the locks of this node
    password_file: OptionalPath = None      # of the database user; else ~/.pgpass, or none where a socket knows its peer
    ca_file: OptionalPath = None            # of the database server; default: the system's certificate authorities
    remember_days: int = Field(400, ge=28)      # how long a message is remembered; a repeat after that is LATE, never FRESH


class KeysConfig(Section):
    unlock: Literal["prompt", "file", "credential"] = "prompt"
    file: OptionalPath = None            # with unlock = "file": holds the passphrase; refused unless 0600 or 0400
    credential: str = "malote-keys"     # with unlock = "credential": name below $CREDENTIALS_DIRECTORY


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"        # auto: text on a terminal, JSON otherwise
    addresses: bool = False             # whether the line of a message names its addresses


class MetricsConfig(Section):
    """Prometheus metrics, /healthz and /readyz on a port of this machine."""

    host: str = "127.0.0.1"             # loopback only: numbers about mail are nobody else's business
    port: int = Field(0, ge=0, le=65535)    # 0: none


class AuditConfig(Section):
    """The chained record of what left (docs/operating.md, The audit log)."""

    file: OptionalPath = None           # none: nothing is recorded
    required: bool = False              # a copy leaves only when its line is on the disk; else 451
    addresses: bool = False             # whether the lines name sender and recipients
    rotate_bytes: int = Field(256 * 1024 * 1024, ge=0)     # above it a new file is begun; 0: never


class ListenerConfig(Section):
    """One address on which mail to be sent is taken in."""

    host: str = "127.0.0.1"
    port: Port = 2525
    socket: OptionalPath = None          # a UNIX socket instead of host and port; the peer's uid is its authentication
    socket_mode: int = Field(0o666, ge=0, le=0o777)     # who may connect is decided by uid and the directory, as for /dev/log
    socket_group: str = ""
    networks: tuple[Network, ...] = ()      # whose connections are taken; none: all
    proxies: tuple[Network, ...] = ()       # peers that begin with a PROXY header, which says who the client is
    xclient: tuple[Network, ...] = ()       # peers that may speak for others: XCLIENT, XFORWARD
    tls: Literal["none", "starttls", "tls"] = "none"
    certificate: OptionalPath = None
    certificate_key: OptionalPath = None
    client_ca: OptionalPath = None       # clients with a certificate of these authorities are logged in, by users_file
    auth: Literal["pass-through", "upstream", "local", "certificate", "peer", "none"] = "pass-through"
    users_file: OptionalPath = None      # lines `login:argon2id hash:address,address`
    senders: Literal["auto", "own", "any"] = "auto"     # auto: own, where the upstream server does not know the login

    @property
    def place(self) -> tuple[str, int]:
        """What it listens on: host and port, or the path of the socket and 0."""
        return (self.host, self.port) if self.socket is None else (str(self.socket), 0)


class UpstreamConfig(Section):
    """The server that carries our mail on."""

    host: str = ""                      # no default: the one thing that must be said
    port: Port = 587
    socket: OptionalPath = None          # a UNIX socket instead, for LMTP
    protocol: Literal["smtp", "lmtp"] = "smtp"
    security: Security = Security.STARTTLS
    ca_file: OptionalPath = None         # default: the system's certificate authorities
    username: str = ""                  # configured credentials; empty: the client's own are passed through
    password_file: OptionalPath = None
    token_command: tuple[str, ...] = ()     # prints an OAuth 2 access token; used instead of a password
    auth: Literal["auto", "plain", "login", "xoauth2", "oauthbearer"] = "auto"
    connections: int = Field(20, ge=1, le=1000)         # pooled connections at most, with configured credentials
    upstream_connections: int = Field(2, ge=1, le=20)   # of one message whose recipients get different bytes
    connect_seconds: Seconds = 30
    command_seconds: Seconds = 300      # RFC 5321 4.5.3.2: MAIL, RCPT 5 minutes, DATA initiation 2 minutes
    data_block_seconds: Seconds = 180   # RFC 5321 4.5.3.2.5
    data_done_seconds: Seconds = 600    # RFC 5321 4.5.3.2.6
    helo_name: str = Field("", pattern=r"^[!-~]{0,255}$")   # default: this host's name


class LimitsConfig(Section):
    max_message_bytes: int = Field(50 * 1024 * 1024, ge=64 * 1024)      # taken in; SIZE says less if upstream takes less
    memory_budget: int = Field(512 * 1024 * 1024, ge=16 * 1024 * 1024)  # bytes of all messages in flight; above it 452
    connections: int = Field(200, ge=1)
    client_connections: int = Field(100, ge=0)              # of one client address at once; 0: no limit, as in those below
    client_connections_per_minute: int = Field(0, ge=0)
    client_messages_per_minute: int = Field(0, ge=0)
    client_recipients_per_minute: int = Field(0, ge=0)
    login_messages_per_minute: int = Field(0, ge=0)
    login_recipients_per_minute: int = Field(0, ge=0)
    recipients: int = Field(1000, ge=1)
    command_seconds: Seconds = 300
    data_block_seconds: Seconds = 180
    reply_within_seconds: Seconds = 240     # what is not done by then is answered 451
    retry_memory_hours: int = Field(24, ge=1)
    bare_line_ends: Literal["refuse", "normalise"] = "refuse"


class Level(StrEnum):
    """What a rule asks for, weakest first."""

    NEVER = "never"
    PREFER = "prefer"
    REQUIRE = "require"
    REFUSE = "refuse"       # such mail does not leave at all


class Kind(StrEnum):
    """What mail says of itself that programs write and read."""

    CALENDAR = "calendar"           # an invitation, or the answer to one
    BOUNCE = "bounce"               # a report about other mail, or mail of nobody (null sender)
    AUTO_REPLY = "auto-reply"       # a program answers: "I am on holiday"
    AUTOMATIC = "automatic"         # a program writes of its own: password resets, alarms, receipts
    LIST = "list"                   # what a mailing list sends out


class RuleConfig(Section):
    """One row of the administrator's table.

    A row without conditions on the content ends the walk: the first of those that matches is the floor. A row with some
    that stands before it and matches too only adds to it, as users decide what is in a message.
    """

    recipients: tuple[str, ...] = ("*",)    # `*`, `@example.org`, `@*.example.org`, `anna@example.org`
    senders: tuple[str, ...] = ("*",)       # the From address; then who hands in mail must be one that it belongs to
    direction: Literal["any", "outbound", "internal", "inbound"] = "any"    # told by outgoing.domains
    min_bytes: int = Field(0, ge=0)         # this large or larger
    headers: tuple[str, ...] = ()           # `Name` or `Name: text with *`, one of them
    subjects: tuple[str, ...] = ()          # text with *, one of them
    kinds: tuple[Kind, ...] = ()            # one of them
    seal: Level = Level.PREFER
    allow_no: bool = False                  # whether a user's `Malote-Seal: no` is obeyed
    mixed: Literal["refuse", "split"] = "refuse"
    accept_encrypted: bool = False          # whether OpenPGP or S/MIME mail counts as sealed
    list: bool = False                      # recipients here come from an expanded list: up to 100 share a copy
    shadow: bool = False                    # on trial: the table is obeyed without it, what it would change is written down

    @property
    def on_content(self) -> bool:
        """Whether it asks for what only the content shows."""
        return bool(self.min_bytes or self.headers or self.subjects or self.kinds)

    @property
    def on_sender(self) -> bool:
        """Whether it asks for what only From shows."""
        return "*" not in self.senders or self.direction in ("internal", "inbound")


class OutgoingConfig(Section):
    enabled: bool = True
    listeners: tuple[ListenerConfig, ...] = (ListenerConfig(),)
    upstream: UpstreamConfig = UpstreamConfig()
    rules: tuple[RuleConfig, ...] = ()      # after the last: prefer, and require for whoever has or ever had a card
    domains: tuple[str, ...] = ()           # ours: `example.org`, `*.example.org`; for `direction` in rules
    seal_tag: str = ""                      # in a subject it says what `Malote-Seal: yes` says, and is removed; "": none
    clear_tag: str = ""                     # the same for `Malote-Seal: no`
    seal_to_self: bool = False
    fold: bool = True
    partial_failure: Literal["personal", "relay"] = "personal"
    shadow: bool = False                    # NOTHING IS SEALED: all mail passes as it came, and what the rules would do is noted


class OpeningConfig(Section):
    """One address on which mail for our own people is taken in, opened, and handed to their mail server."""

    host: str = "127.0.0.1"
    port: Port = 2626
    socket: OptionalPath = None          # a UNIX socket instead of host and port
    socket_mode: int = Field(0o666, ge=0, le=0o777)
    socket_group: str = ""
    protocol: Literal["lmtp", "smtp"] = "lmtp"      # lmtp: each recipient has an answer of its own
    networks: tuple[Network, ...] = ()      # whose connections are taken; none: all
    proxies: tuple[Network, ...] = ()
    tls: Literal["none", "starttls", "tls"] = "none"
    certificate: OptionalPath = None
    certificate_key: OptionalPath = None
    quarantine: str                         # no default: "refuse", or an address, as "{local}+quarantine@{domain}"
    late_days: int = Field(7, ge=1)
    clock_skew_seconds: int = Field(600, ge=0)
    upstream: UpstreamConfig                # the mail server of the recipients

    @property
    def listener(self) -> ListenerConfig:
        """What of it concerns the socket."""
        return ListenerConfig(host=self.host, port=self.port, socket=self.socket, socket_mode=self.socket_mode,
                              socket_group=self.socket_group, networks=self.networks, proxies=self.proxies, tls=self.tls,
                              certificate=self.certificate, certificate_key=self.certificate_key, auth="none")

    @property
    def place(self) -> tuple[str, int]:
        return self.listener.place


class IncomingConfig(Section):
    listeners: tuple[OpeningConfig, ...] = ()


class AccountConfig(Section):
    """One IMAP mailbox that is watched."""

    name: str
    host: str
    port: Port = 993
    security: Security = Security.TLS
    ca_file: OptionalPath = None
    username: str
    password_file: OptionalPath = None
    credential: str = ""                    # name of a systemd credential that holds the password
    token_command: tuple[str, ...] = ()
    auth: Literal["auto", "login", "plain", "xoauth2", "oauthbearer"] = "auto"
    addresses: tuple[str, ...] = ()         # whose keys open mail here; default: the username if it is an address
    trusted_gateways: tuple[Path, ...] = ()     # files of `malote gateway export`, 0600: their verdicts are believed here
    folders: tuple[str, ...] = ("INBOX", "\\Junk")
    deliver: Literal["replace", "folder", "maildir"]    # no default: it decides who can read the opened mail
    deliver_folder: str = "Malote/Opened"   # with deliver = "folder"
    maildir: OptionalPath = None             # with deliver = "maildir"
    sealed_folder: str = "Malote/Sealed"
    quarantine_folder: str = "Malote/Quarantine"
    keep_sealed_days: int = Field(0, ge=0)  # after the mail arrived; 0: for ever
    poll_seconds: Seconds = 60              # where the server has no IDLE
    idle_seconds: Seconds = 1500            # RFC 2177: re-issue IDLE before 29 minutes
    late_days: int = Field(7, ge=1)
    clock_skew_seconds: int = Field(600, ge=0)


class Config(Section):
    service: ServiceConfig = ServiceConfig()
    store: StoreConfig = StoreConfig()
    keys: KeysConfig = KeysConfig()
    log: LogConfig = LogConfig()
    metrics: MetricsConfig = MetricsConfig()
    audit: AuditConfig = AuditConfig()
    outgoing: OutgoingConfig = OutgoingConfig()
    incoming: IncomingConfig = IncomingConfig()
    limits: LimitsConfig = LimitsConfig()
    accounts: tuple[AccountConfig, ...] = ()


def load_config(path: Path) -> Config:
    """Read and check the file. Raises `ConfigError` that lists every fault, each with file, key and cure."""
    try:
        text = path.read_bytes().decode()
        table = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file",
                          hint="malote init ADDRESS writes one; malote init --example lists every key") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    return parse_config(table, source=str(path))


def parse_config(table: dict[str, Any], *, source: str) -> Config:
    """Check a table already read from `source`. Raises `ConfigError` that lists every fault."""
    try:
        # the JSON rules of strict mode: "25" is no number, yet a list is a tuple and a string a path
        return Config.model_validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, source))) from None     # its own text repeats the values


def _faults(error: ValidationError, source: str) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        key = ".".join(str(part + 1) if isinstance(part, int) else part for part in fault["loc"]) or "(file)"
        match fault["type"]:
            case "extra_forbidden":
                text = f"unknown key; {_known_keys(fault['loc'])}"
            case "missing":
                text = "must be set, there is no default"
            case _:
                text = fault["msg"][0].lower() + fault["msg"][1:]
        yield f"{source}: {key}: {text}"


def _known_keys(loc: tuple[int | str, ...]) -> str:
    """The cure for an unknown key: the one that was probably meant, or all that its table has."""
    section: Any = Config
    for part in loc[:-1]:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        while not hasattr(section, "model_fields"):     # tuple[X, ...], X | None
            section = get_args(section)[0]
    known = sorted(section.model_fields)
    close = get_close_matches(str(loc[-1]), known, 1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known)}"


def is_loopback(host: str) -> bool:
    """Whether a host or address of the configuration is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
