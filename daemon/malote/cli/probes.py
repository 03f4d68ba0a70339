"""What `malote check` tries on this machine: cryptography, store, keys, secrets of files, listeners, clock."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from malote.cli.findings import Finding, Findings, State, fault, ok, warning
from malote.cli.keystore import describe, now_ms, show_date
from malote.cli.settings import is_missing
from malote.cli.unlock import read_passphrase
from malote.config import Config, KeysConfig, ListenerConfig
from malote.core.address import domain_of
from malote.core.card import Card, parse_card
from malote.core.keyring import KeyringKey, unlock_identity
from malote.core.primitives import check_post_quantum
from malote.errors import ConfigError, FormatError, MaloteError
from malote.incoming.account import account_addresses
from malote.outgoing.users import load_users
from malote.smtp.listener import server_tls_context
from malote.store import LockedIdentity, PostgresPlace, Store

SOON_DAYS = 30                  # before a card or certificate ends, it is said
SMALL_DISK_BYTES = 100 * 1024 * 1024
CLOCK_SECONDS = 600             # as clock_skew_seconds: senders' clocks that differ by more make mail FUTURE
# Validity ::= SEQUENCE { notBefore Time, notAfter Time }, RFC 5280 4.1.2.5, as DER has it: UTCTime or GeneralizedTime, in UTC
_VALIDITY = re.compile(rb"\x30.(?:\x17\x0d\d{12}|\x18\x0f\d{14})Z(?:\x17\x0d(\d{12})|\x18\x0f(\d{14}))Z", re.DOTALL)


async def crypto_probe() -> Findings:
    try:
        check_post_quantum()
    except MaloteError as error:
        yield fault("cryptography", error)
    else:
        yield ok("cryptography", "ML-KEM-768 and ML-DSA-65 are there")


async def store_probe(store: Store | None, error: MaloteError | None, path: Path | PostgresPlace) -> Findings:
    if isinstance(path, PostgresPlace):
        yield fault("store", error) if error is not None else ok("store", "the database opens, and takes our login")
        return
    if store is None:
        if not os.path.lexists(path):   # noqa: ASYNC240 -- one look, nothing else runs
            yield Finding("store", State.FAULT, f"there is none in {path}", "malote keys new ADDRESS makes it")
        elif error is not None:
            yield fault("store", error)
        return
    yield ok("store", f"{path}: opens, and is its owner's alone")
    if not os.access(path, os.W_OK | os.X_OK):
        yield Finding("store", State.FAULT, f"{path}: cannot be written by this user", "it must belong to who runs malote")
    free = shutil.disk_usage(path).free
    if free < SMALL_DISK_BYTES:
        yield warning("store", f"its disk has only {free // 1_000_000} MB left", "make room: without it no mail is taken in")


async def keys_probe(store: Store, config: Config) -> Findings:
    header = await store.keyring_header()
    records = await store.identities()
    if header is None or not records:
        yield Finding("keys", State.FAULT, "you have no keys yet: nothing can be sealed or opened", "malote keys new ADDRESS")
        return
    yield _unlock(header, records, config.keys)
    for record in records:
        yield card_lifetime(parse_card(record.card_raw))
    held = {record.address for record in records}
    for account in config.accounts:
        what = f"account {account.name}: keys"
        try:
            wanted = account_addresses(account)
        except FormatError as error:
            yield fault(what, error, "mend accounts.addresses")
            continue
        found = [address for address in wanted if address in held or f"@{domain_of(address)}" in held]
        missing = [address for address in wanted if address not in found]
        if found and not missing:
            yield ok(what, f"there are keys for {', '.join(found)}")
        elif found:
            yield warning(what, f"there are none for {', '.join(missing)}", f"malote keys new {missing[0]}")
        else:
            yield Finding(what, State.FAULT, f"there are none for {', '.join(wanted) or 'its user name, which is no address'}",
                          f"malote keys new {wanted[0]}" if wanted else "set addresses of the account")


def _unlock(header: bytes, records: list[LockedIdentity], config: KeysConfig) -> Finding:
    if config.unlock == "credential" and not os.environ.get("CREDENTIALS_DIRECTORY"):
        return warning("keys", f"not unlocked: the credential {config.credential} exists only inside the service",
                       "docs/operating.md, Setting up as a service: as_malote check")
    if config.unlock == "prompt" and not _has_terminal():
        return warning("keys", "not unlocked: there is no terminal to ask for the passphrase on")
    try:
        keyring = KeyringKey.from_header(header, read_passphrase(config))
        for record in records:
            unlock_identity(keyring, record.address, record.locked)
    except MaloteError as error:
        return fault("keys", error, "use the passphrase that malote keys new was given; or malote keys restore BACKUP")
    return ok("keys", f"unlocked: {len(records)} identit{'y' if len(records) == 1 else 'ies'}")


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def card_lifetime(card: Card) -> Finding:
    what, entry = f"card of {card.address}", describe(card, own=True)
    until, cure = show_date(entry["usable_until_ms"]), f"malote keys rotate {card.address}, then send the new card"
    if entry["expired"]:
        return Finding(what, State.FAULT, f"has expired on {until}: nobody can seal mail to you", cure)
    if entry["usable_until_ms"] - now_ms() < SOON_DAYS * 86_400_000:
        return warning(what, f"ends on {until}", cure)
    return ok(what, f"good until {until}")


# --- listeners


async def listener_probe(listener: ListenerConfig) -> Findings:
    what = f"listener {listener.socket or f'{listener.host}:{listener.port}'}"
    yield _place(what, listener)
    try:
        if server_tls_context(listener) is not None and listener.certificate is not None:
            yield certificate_lifetime(f"{what}: certificate", listener.certificate)
        if listener.users_file is not None:
            load_users(listener.users_file)
            yield ok(f"{what}: users_file", "can be read")
    except MaloteError as error:
        yield fault(f"{what}: certificate or users_file", error, "mend the file, or what the configuration names")
    if listener.certificate_key is not None and _others_read(listener.certificate_key):
        yield warning(f"{what}: certificate_key", "can be read by other users", f"chmod 600 {listener.certificate_key}")


def _others_read(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except OSError:
        return False        # that it cannot be read has been said


def _place(what: str, listener: ListenerConfig) -> Finding:
    if listener.socket is not None:
        parent = listener.socket.parent
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK):     # noqa: PTH112 -- Path.is_dir raises, for some faults
            return Finding(what, State.FAULT, f"{parent}: no directory that this user can write",
                           "RuntimeDirectory= of the unit, or mkdir")
        return ok(what, "its directory can be written")
    try:
        with socket.create_server((listener.host, listener.port), family=_family(listener.host)):
            return ok(what, "is free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if _greets_as_ours(listener):
                return ok(what, "malote listens there now")
            return Finding(what, State.FAULT, "another program listens there", "set another port, or stop that program")
        cure = ("ports below 1024 need CAP_NET_BIND_SERVICE" if error.errno == errno.EACCES
                else "set host to an address of this machine")
        return Finding(what, State.FAULT, f"cannot be listened on ({error.strerror})", cure)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _greets_as_ours(listener: ListenerConfig) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE      # nothing is said to it, its greeting is read
    try:
        with socket.create_connection((listener.host, listener.port), 5) as plain:
            sock = context.wrap_socket(plain) if listener.tls == "tls" else plain
            return b"ESMTP malote" in sock.recv(512)
    except OSError:
        return False


def certificate_lifetime(what: str, path: Path) -> Finding:
    text = path.read_text("ascii", "replace")
    pem = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
    found = _VALIDITY.search(ssl.PEM_cert_to_DER_cert(pem[0])) if pem else None
    if found is None:
        return warning(what, "its end cannot be read")
    digits = (found[1] or found[2]).decode()
    if found[1]:        # UTCTime: two digits for the years 1950 to 2049
        digits = ("19" if digits[:2] >= "50" else "20") + digits
    ends = datetime.strptime(digits, "%Y%m%d%H%M%S").replace(tzinfo=UTC)
    left = ends.timestamp() - time.time()
    if left < 0:
        return Finding(what, State.FAULT, f"has expired on {ends.date()}", "renew it, then systemctl reload malote")
    if left < SOON_DAYS * 86_400:
        return warning(what, f"ends on {ends.date()}", "renew it, then systemctl reload malote")
    return ok(what, f"good until {ends.date()}")


# --- clock


async def clock_probe(store: Store | None, newest: Mapping[str, int]) -> Findings:
    """`newest`: when the mail servers say that the newest mail of each account came. They tell no other time."""
    now = now_ms()
    if store is not None:
        latest = max((entry.at_ms for entry in await store.recent_outcomes(1)), default=0)
        if latest > now + CLOCK_SECONDS * 1000:
            yield Finding("clock", State.FAULT, f"is before what malote last did, on {show_date(latest)}",
                          "set the clock: timedatectl set-ntp true; if it was wrong then, and is right now: malote store renew")
            return
    ahead = [name for name, at_ms in newest.items() if at_ms > now + CLOCK_SECONDS * 1000]
    if ahead:
        yield Finding("clock", State.FAULT, f"the mail server of {', '.join(ahead)} has mail from later than now",
                      "one of the two clocks is wrong: compare with another; timedatectl set-ntp true")
    elif newest:
        yield ok("clock", f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}, not before the newest mail at the servers")
    else:
        yield warning("clock", f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}; not compared, no server tells the time",
                      "timedatectl says whether it is synchronised")


def check_maildir(path: Path) -> None:
    """Raises `ConfigError` if mail cannot be put there."""
    place = path
    while is_missing(place) and place != place.parent:
        place = place.parent
    if not os.path.isdir(place) or not os.access(place, os.W_OK | os.X_OK):     # noqa: PTH112 -- as above
        raise ConfigError(f"{place}: no directory that this user can write",
                          hint="ReadWritePaths= of the unit, or another maildir")
