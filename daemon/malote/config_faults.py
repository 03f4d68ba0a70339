"""What is wrong with a configuration that the schema (config.py) takes: keys that need each other, and what would be unsafe."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence

from malote.config import AccountConfig, Config, ListenerConfig, Security, StoreConfig, UpstreamConfig, is_loopback
from malote.database_url import parse_url
from malote.errors import ConfigError

_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`.{|}~-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*")
MIN_PREFIX = 7      # 10.0.0.0/8 and fc00::/7 are somebody's own; more is anybody's


def config_faults(config: Config) -> list[str]:
    """What the schema cannot see: keys that need each other, and arrangements that would send secrets in clear.

    Each is `key: what is wrong; the cure`. An empty list means that the daemon may start.
    """
    faults = [] if config.keys.unlock != "file" or config.keys.file else ['keys.file: must be set with keys.unlock = "file"']
    faults += _store_faults(config.store)
    if config.metrics.port and not is_loopback(config.metrics.host):
        faults.append("metrics.host: must be an address of this machine alone, as 127.0.0.1; for a scraper elsewhere put a proxy "
                      "that asks who it is in front")
    if config.metrics.port and config.metrics.port + config.service.workers - 1 > 65535:
        faults.append("metrics.port: each worker has its own, from this one on; set a smaller one")
    if config.audit.required and config.audit.file is None:
        faults.append("audit.file: must be set with audit.required; name the file, or remove audit.required")
    if config.outgoing.enabled:
        faults += _upstream_faults("outgoing.upstream", config.outgoing.upstream, ", or set outgoing.enabled = false")
        places = [listener.place for listener in config.outgoing.listeners]
        for number, listener in enumerate(config.outgoing.listeners, 1):
            faults += [f"outgoing.listeners.{number}.{fault}" for fault in _listener_faults(listener, config.outgoing.upstream)]
            if (first := places.index(listener.place) + 1) != number:
                faults.append(f"outgoing.listeners.{number}: has the address of outgoing.listeners.{first}; each needs its own")
        if not config.outgoing.listeners:
            faults.append("outgoing.listeners: there is none; remove the key for the default, or set outgoing.enabled = false")
    elif not config.accounts and not config.incoming.listeners:
        faults.append("outgoing.enabled: is false, and there are no accounts and no incoming.listeners: nothing would be done")
    faults += _incoming_faults(config)
    names = [account.name for account in config.accounts]
    for number, account in enumerate(config.accounts, 1):
        faults += [f"accounts.{number}.{fault}" for fault in _account_faults(account, config.store.remember_days)]
        if names.index(account.name) != number - 1:
            faults.append(f"accounts.{number}.name: {account.name!r} is taken by another account; each needs a name of its own")
    return faults


def _store_faults(store: StoreConfig) -> Iterator[str]:
    if store.url:
        try:
            parse_url(store.url)
        except ConfigError as error:
            yield f"{error}; {error.hint}"
    elif store.password_file or store.ca_file:
        yield "store.url: must be set with password_file or ca_file, which are for a database; or remove those"


def _upstream_faults(key: str, upstream: UpstreamConfig, way_out: str = "") -> Iterator[str]:
    if not upstream.host and not upstream.socket:
        yield f"{key}.host: must be set; name the server that carries your mail on{way_out}"
    if upstream.host and upstream.security is Security.NONE and not is_loopback(upstream.host):
        yield f'{key}.security: "none" would send mail in clear over the network; use "starttls" or "tls"'
    if upstream.username and not upstream.password_file and not upstream.token_command:
        yield f"{key}.password_file: must be set with username (or token_command); without a username the client's login is used"
    if not upstream.username and (upstream.password_file or upstream.token_command):
        yield f"{key}.username: must be set with password_file or token_command"


def _listener_faults(listener: ListenerConfig, upstream: UpstreamConfig) -> Iterator[str]:
    local = listener.socket is not None or is_loopback(listener.host)
    if listener.tls != "none" and not (listener.certificate and listener.certificate_key):
        yield f'certificate: tls = "{listener.tls}" needs certificate and certificate_key'
    yield from _login_faults(listener, upstream)
    if listener.auth == "none" and (not listener.networks or _holds_all(listener.networks)):
        if not local:
            yield 'auth: "none" on an address that others reach is an open relay; use "pass-through" or "local", or set networks'
        elif listener.proxies:
            yield 'auth: "none" behind proxies is an open relay for all whom they let in; set networks to those who may send'
    for key, peers in (("proxies", listener.proxies), ("xclient", listener.xclient)):
        if _holds_all(peers):
            yield f"{key}: would believe everybody who says to speak for others; list only the addresses of your own machines"
    if not local and listener.tls == "none":
        yield 'tls: "none" would show logins and mail to the network; use "starttls" or "tls"'


def _login_faults(listener: ListenerConfig, upstream: UpstreamConfig) -> Iterator[str]:
    if listener.auth in ("local", "certificate") and not listener.users_file:
        yield f'users_file: must be set with auth = "{listener.auth}"'
    if listener.auth == "certificate" and not listener.client_ca:
        yield 'client_ca: must be set with auth = "certificate"; it names who signs the certificates of clients'
    if listener.client_ca and listener.auth not in ("local", "certificate"):
        yield 'client_ca: has no effect with this auth; use auth = "certificate", or "local" to take passwords too'
    if listener.client_ca and listener.tls == "none":
        yield 'client_ca: needs tls = "starttls" or "tls"'
    if listener.senders == "own" and listener.auth == "none" and not listener.xclient:
        yield 'senders: "own" needs a login, and auth = "none" asks for none'
    if listener.auth == "peer" and not listener.socket:
        yield 'auth: "peer" is the user at the other end of a UNIX socket; set socket'
    if upstream.username and listener.auth == "pass-through":
        yield 'auth: "pass-through" has no use for the configured upstream.username; use "upstream", "local" or "peer"'
    if upstream.username and listener.auth == "none":
        yield 'auth: "none" would let anybody who reaches the port send with upstream.username; use "local" or "peer"'


def _incoming_faults(config: Config) -> Iterator[str]:
    taken = [listener.place for listener in config.outgoing.listeners] if config.outgoing.enabled else []
    for number, listener in enumerate(config.incoming.listeners, 1):
        key = f"incoming.listeners.{number}"
        yield from _upstream_faults(f"{key}.upstream", listener.upstream)
        if listener.place in taken:
            yield f"{key}: has the address of another listener; each needs its own"
        taken.append(listener.place)
        if listener.tls != "none" and not (listener.certificate and listener.certificate_key):
            yield f'{key}.certificate: tls = "{listener.tls}" needs certificate and certificate_key'
        local, open_to_all = listener.socket is not None or is_loopback(listener.host), _lets_all(listener.networks)
        if local and open_to_all and listener.proxies:
            yield f"{key}.networks: must name whose mail is taken, since proxies let others in: your own mail servers"
        if _holds_all(listener.proxies):
            yield f"{key}.proxies: would believe everybody who says to speak for others; list only your own machines"
        if not local:
            if open_to_all:
                yield f"{key}.networks: must name whose mail is taken, since others reach this address: your own mail servers"
            if listener.tls == "none":
                yield f'{key}.tls: "none" would show mail to the network; use "starttls" or "tls"'
        example = listener.quarantine.replace("{local}", "a").replace("{domain}", "example.org")
        if listener.quarantine != "refuse" and not _ADDRESS.fullmatch(example):
            yield key + '.quarantine: must be "refuse" or an address: quarantine@example.org, {local}+quarantine@{domain}'
        if listener.late_days * 2 > config.store.remember_days:
            yield (f"{key}.late_days: must be at most half of store.remember_days ({config.store.remember_days}), "
                   "or repeats could come in as fresh mail")


def _lets_all(networks: Sequence[str]) -> bool:
    return not networks or _holds_all(networks)


def _holds_all(names: Sequence[str]) -> bool:
    """Whether a network among them is the whole internet, or a good part of it."""
    return any(ipaddress.ip_network(name).prefixlen < MIN_PREFIX for name in names if name != "unix")


def _account_faults(account: AccountConfig, remember_days: int) -> Iterator[str]:
    secrets = [bool(account.password_file), bool(account.credential), bool(account.token_command)]
    if sum(secrets) != 1:
        yield "password_file: set exactly one of password_file, credential, token_command"
    if account.security is Security.NONE and not is_loopback(account.host):
        yield 'security: "none" would send your login in clear over the network; use "tls" or "starttls"'
    if account.deliver == "maildir" and not account.maildir:
        yield 'maildir: must be set with deliver = "maildir"'
    if not account.folders:
        yield "folders: there must be at least one to watch"
    if account.late_days * 2 > remember_days:
        yield f"late_days: must be at most half of store.remember_days ({remember_days}), or repeats could come in as fresh mail"
    if 0 < account.keep_sealed_days <= account.late_days:
        # a device that was off learns from the sealed originals what the others have opened
        yield f"keep_sealed_days: must be longer than late_days ({account.late_days}), or 0: your other devices need them"
    ours = [account.sealed_folder, account.quarantine_folder]
    if account.deliver == "folder":
        ours.append(account.deliver_folder)
    if len(set(ours)) != len(ours) or any(folder in account.folders for folder in ours):
        yield "folders: sealed_folder, quarantine_folder and deliver_folder must differ from each other and from folders"
