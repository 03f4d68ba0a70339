"""The configuration: read once, strict, typed. `config/malote.example.toml` lists every key at its default.

An unknown key, section or value is a `ConfigError` that names file and key. Secrets are never in this file: only the paths of
the files that hold them (0600 enforced where they are read) or the names of systemd credentials.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from malote.errors import ConfigError

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of the file: no unknown keys, no silent conversion of types, unchangeable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, str_strip_whitespace=True)


class Security(StrEnum):
    """How a connection that we open is protected."""

    STARTTLS = "starttls"   # required: without it nothing is sent, not even the login
    TLS = "tls"             # TLS from the first byte (RFC 8314)
    NONE = "none"           # clear text: accepted only for loopback addresses and UNIX sockets


class StoreConfig(Section):
    path: Path | None = None    # directory; default: /var/lib/malote for root or the service, XDG data directory for a person
    remember_days: int = Field(400, ge=28)      # how long a message is remembered; a repeat after that is LATE, never FRESH


class KeysConfig(Section):
    unlock: Literal["prompt", "file", "credential"] = "prompt"
    file: Path | None = None            # with unlock = "file": holds the passphrase; refused unless 0600 or 0400
    credential: str = "malote-keys"     # with unlock = "credential": name below $CREDENTIALS_DIRECTORY


class LogConfig(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"        # auto: text on a terminal, JSON otherwise
    addresses: bool = False             # whether the line of a message names its addresses


class ListenerConfig(Section):
    """One address on which mail to be sent is taken in."""

    host: str = "127.0.0.1"
    port: Port = 2525
    socket: Path | None = None          # a UNIX socket instead of host and port; the peer's uid is its authentication
    tls: Literal["none", "starttls", "tls"] = "none"
    certificate: Path | None = None
    certificate_key: Path | None = None
    auth: Literal["pass-through", "local", "peer", "none"] = "pass-through"
    users_file: Path | None = None      # with auth = "local": lines `login:argon2id hash:address,address`


class UpstreamConfig(Section):
    """The server that carries our mail on."""

    host: str = ""                      # no default: the one thing that must be said
    port: Port = 587
    socket: Path | None = None          # a UNIX socket instead, for LMTP
    protocol: Literal["smtp", "lmtp"] = "smtp"
    security: Security = Security.STARTTLS
    ca_file: Path | None = None         # default: the system's certificate authorities
    username: str = ""                  # configured credentials; empty: the client's own are passed through
    password_file: Path | None = None
    token_command: tuple[str, ...] = ()     # prints an OAuth 2 access token; used instead of a password
    auth: Literal["auto", "plain", "login", "xoauth2", "oauthbearer"] = "auto"
    connections: int = Field(20, ge=1, le=1000)         # pooled connections at most, with configured credentials
    upstream_connections: int = Field(2, ge=1, le=20)   # of one message whose recipients get different bytes
    connect_seconds: Seconds = 30
    command_seconds: Seconds = 300      # RFC 5321 4.5.3.2: MAIL, RCPT 5 minutes, DATA initiation 2 minutes
    data_block_seconds: Seconds = 180   # RFC 5321 4.5.3.2.5
    data_done_seconds: Seconds = 600    # RFC 5321 4.5.3.2.6
    helo_name: str = ""                 # default: this host's name


class LimitsConfig(Section):
    max_message_bytes: int = Field(50 * 1024 * 1024, ge=64 * 1024)      # taken in; SIZE says less if upstream takes less
    memory_budget: int = Field(512 * 1024 * 1024, ge=16 * 1024 * 1024)  # bytes of all messages in flight; above it 452
    connections: int = Field(200, ge=1)
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


class RuleConfig(Section):
    """One row of the administrator's table; the first that matches a recipient counts."""

    recipients: tuple[str, ...] = ("*",)    # `*`, `@example.org`, `@*.example.org`, `anna@example.org`
    seal: Level = Level.PREFER
    allow_no: bool = False                  # whether a user's `Malote-Seal: no` is obeyed
    mixed: Literal["refuse", "split"] = "refuse"
    accept_encrypted: bool = False          # whether OpenPGP or S/MIME mail counts as sealed
    list: bool = False                      # recipients here come from an expanded list: up to 100 share a copy


class OutgoingConfig(Section):
    enabled: bool = True
    listeners: tuple[ListenerConfig, ...] = (ListenerConfig(),)
    upstream: UpstreamConfig = UpstreamConfig()
    rules: tuple[RuleConfig, ...] = ()      # after the last: prefer, and require for whoever has or ever had a card
    seal_to_self: bool = False
    fold: bool = True
    partial_failure: Literal["personal", "relay"] = "personal"


class AccountConfig(Section):
    """One IMAP mailbox that is watched."""

    name: str
    host: str
    port: Port = 993
    security: Security = Security.TLS
    ca_file: Path | None = None
    username: str
    password_file: Path | None = None
    credential: str = ""                    # name of a systemd credential that holds the password
    token_command: tuple[str, ...] = ()
    auth: Literal["auto", "login", "plain", "xoauth2", "oauthbearer"] = "auto"
    addresses: tuple[str, ...] = ()         # whose keys open mail here; default: the username if it is an address
    folders: tuple[str, ...] = ("INBOX", "\\Junk")
    deliver: Literal["replace", "folder", "maildir"]    # no default: it decides who can read the opened mail
    deliver_folder: str = "Malote/Opened"   # with deliver = "folder"
    maildir: Path | None = None             # with deliver = "maildir"
    sealed_folder: str = "Malote/Sealed"
    quarantine_folder: str = "Malote/Quarantine"
    keep_sealed_days: int = Field(0, ge=0)  # 0: for ever
    poll_seconds: Seconds = 60              # where the server has no IDLE
    idle_seconds: Seconds = 1500            # RFC 2177: re-issue IDLE before 29 minutes
    late_days: int = Field(7, ge=1)
    clock_skew_seconds: int = Field(600, ge=0)


class Config(Section):
    store: StoreConfig = StoreConfig()
    keys: KeysConfig = KeysConfig()
    log: LogConfig = LogConfig()
    outgoing: OutgoingConfig = OutgoingConfig()
    limits: LimitsConfig = LimitsConfig()
    accounts: tuple[AccountConfig, ...] = ()


def load_config(path: Path) -> Config:
    """Read and check the file. Raises `ConfigError` that lists every fault, each with file, key and cure."""
    try:
        text = path.read_bytes().decode()
        table = tomllib.loads(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file", hint="copy config/malote.example.toml there and edit it") from error
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
        return Config.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(error, source))) from None     # its own text repeats the values


def _faults(error: ValidationError, source: str) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        key = ".".join(str(part + 1) if isinstance(part, int) else part for part in fault["loc"]) or "(file)"
        match fault["type"]:
            case "extra_forbidden":
                text = "unknown key; see config/malote.example.toml for those there are"
            case "missing":
                text = "must be set, there is no default"
            case _:
                text = fault["msg"][0].lower() + fault["msg"][1:]
        yield f"{source}: {key}: {text}"
