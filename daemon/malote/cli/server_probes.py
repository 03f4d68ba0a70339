"""What `malote check` tries at the servers: reach, TLS, login, and what they can do. Nothing is sent, no mail is changed."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence

from malote.cli.findings import Finding, Findings, State, fault, ok, warning
from malote.cli.probes import check_maildir
from malote.config import AccountConfig, Config, OpeningConfig, Security
from malote.credentials import account_password, trusted_gateways, upstream_credentials
from malote.errors import MailboxError, MaloteError, SecretUnavailable
from malote.incoming.account import account_addresses
from malote.incoming.mailbox import Folder, Mailbox, Quota
from malote.smtp.relay import Upstream, UpstreamConnection
from malote.smtp.sasl import login

READERS = {
    "replace": "opened mail replaces the sealed one in the mailbox: you and your mail provider can read it",
    "folder": "opened mail goes to a folder of the mailbox: you and your mail provider can read it",
    "maildir": "opened mail goes to a Maildir on this machine: you alone can read it",
}
NEARLY_FULL = 0.9       # of a quota
_USEFUL = ("PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "SIZE")


async def upstream_probe(config: Config) -> Findings:
    settings = config.outgoing.upstream
    what = f"sending through {settings.socket or f'{settings.host}:{settings.port}'}"
    try:
        connection = await Upstream(settings).connect()
    except MaloteError as error:
        yield fault(what, error, "check host, port and security of outgoing.upstream, and ca_file")
        return
    try:
        offers = [name for name in _USEFUL if name in connection.extensions]
        how = "TLS, certificate verified" if connection.tls else "without TLS, on this machine"
        yield ok(what, f"reached, {how}; it offers {', '.join(offers) or 'no extensions'}")
        async for finding in _upstream_login(config, connection, what):
            yield finding
    finally:
        await connection.quit()


async def next_hop_probe(opening: OpeningConfig) -> Findings:
    """The mail server behind an opening listener."""
    settings = opening.upstream
    what = f"delivery to {settings.socket or f'{settings.host}:{settings.port}'}"
    try:
        connection = await Upstream(settings).connect()
    except MaloteError as error:
        yield fault(what, error, "check host, port, protocol and security of incoming.listeners.upstream, and ca_file")
        return
    try:
        how = "TLS, certificate verified" if connection.tls else "without TLS, on this machine"
        yield ok(what, f"reached by {settings.protocol.upper()}, {how}")
        if settings.username:
            await login(connection, await upstream_credentials(settings), settings.auth)
            yield ok(f"{what}: login", f"accepted for {settings.username}")
        if "8BITMIME" not in connection.extensions:
            yield warning(f"{what}: 8BITMIME", "is not offered, so text beyond ASCII arrives as an attachment",
                          "let that server offer 8BITMIME, as all current ones can")
    except MaloteError as error:
        yield fault(f"{what}: login", error, "check username, and password_file or token_command")
    finally:
        await connection.quit()


async def _upstream_login(config: Config, connection: UpstreamConnection, what: str) -> Findings:
    settings = config.outgoing.upstream
    if settings.username:
        try:
            await login(connection, await upstream_credentials(settings), settings.auth)
        except SecretUnavailable as error:
            yield fault(f"{what}: password", error, "mend password_file or token_command of outgoing.upstream")
        except MaloteError as error:
            yield fault(f"{what}: login", error, "check username and password, and whether an application password is wanted")
        else:
            yield ok(f"{what}: login", f"accepted for {settings.username}")
    elif any(listener.auth == "pass-through" for listener in config.outgoing.listeners):
        mechanisms = connection.auth_mechanisms()
        if mechanisms:
            yield ok(f"{what}: login", f"your mail program's own, by {', '.join(mechanisms)}")
        else:
            yield warning(f"{what}: login", "the server offers none, so your mail program cannot log in",
                          "the port for submission is 587 or 465, not 25")


async def account_probe(account: AccountConfig, newest: MutableMapping[str, int]) -> Findings:
    """Notes in `newest` when the newest mail of the account came."""
    what = f"account {account.name}"
    yield ok(f"{what}: readers", READERS[account.deliver])
    if account.maildir is not None and account.deliver == "maildir":
        try:
            check_maildir(account.maildir)
        except MaloteError as error:
            yield fault(f"{what}: maildir", error)
    try:
        box = await Mailbox.connect(account, password=lambda: account_password(account))
    except SecretUnavailable as error:
        yield _secret(what, error, account)
        return
    except MaloteError as error:
        yield fault(what, error, "check host, port, security, username and password of the account")
        return
    try:
        how = "without TLS, on this machine" if account.security is Security.NONE else "TLS, certificate verified"
        yield ok(what, f"reached {account.host}:{account.port}, {how}; logged in")
        for finding in _trusted(what, account):
            yield finding
        yield _abilities(what, box)
        async for finding in _folders(what, account, box, newest):
            yield finding
    except MailboxError as error:
        yield fault(what, error, "ask the mail provider; the account's log there says more")
    finally:
        await box.logout()


def _trusted(what: str, account: AccountConfig) -> Iterator[Finding]:
    if not account.trusted_gateways:
        return
    try:
        keys = trusted_gateways(account)
    except SecretUnavailable as error:
        yield fault(f"{what}: trusted gateways", error)
        return
    own = account_addresses(account)
    if any(key.of(address) is not None for key in keys for address in own):
        yield ok(f"{what}: trusted gateways", f"{len(keys)} keys, for {', '.join(key.holder for key in keys)}")
    else:
        yield warning(f"{what}: trusted gateways", "none of the keys is for an address of this account: nothing is believed")


def _secret(what: str, error: SecretUnavailable, account: AccountConfig) -> Finding:
    """The server was reached: it is only then that the secret is read."""
    if account.credential and "CREDENTIALS_DIRECTORY" in str(error):
        return warning(f"{what}: login", f"not tried: the credential {account.credential} exists only inside the service")
    return fault(f"{what}: password", error, "mend password_file, credential or token_command of the account")


def _abilities(what: str, box: Mailbox) -> Finding:
    abilities = {"MOVE": box.has_move, "UIDPLUS": box.has_uidplus, "IDLE": box.has_idle}
    missing = [name for name, there in abilities.items() if not there]
    if not missing:
        return ok(f"{what}: server", "MOVE, UIDPLUS and IDLE: several devices may watch it")
    text = f"lacks {', '.join(missing)}"
    if missing != ["IDLE"]:
        return warning(f"{what}: server", f"{text}: one watcher only may run on this mailbox",
                       "let one device watch it, the others read what it opens")
    return warning(f"{what}: server", f"{text}: new mail is looked for every poll_seconds")


async def _folders(what: str, account: AccountConfig, box: Mailbox, newest: MutableMapping[str, int]) -> Findings:
    found = []
    for name in account.folders:
        folder = await box.resolve(name)
        if folder is None:
            yield warning(f"{what}: folder {name}", "is not there", "take it out of folders, or make it")
        else:
            found.append(folder)
    if not found:
        yield Finding(f"{what}: folders", State.FAULT, "none of them is there, so nothing is watched", "set folders")
        return
    yield await _room(what, account, box, found)
    selected = await box.select(found[0], read_only=True)
    yield ok(f"{what}: folders", f"{', '.join(folder.name for folder in found)}; {selected.exists} messages in the first")
    if selected.uidnext > 1 and (last := await box.search_after(selected.uidnext - 2)):
        for peeked in await box.peek_headers(last[-1:]):
            newest[account.name] = peeked.internal_date_ms


async def _room(what: str, account: AccountConfig, box: Mailbox, folders: Sequence[Folder]) -> Finding:
    """How full the mailbox is, and whether the copies of what is sealed there still fit beside the originals."""
    what = f"{what}: room"
    try:
        quotas = await box.quotas("INBOX")
    except MailboxError as error:
        if box.lost.is_set():
            raise
        return warning(what, f"its server does not say how much there is ({error.code})", "ask the mail provider")
    if not quotas:
        return ok(what, "its server tells of no limit")
    full = ", ".join(_how_full(quota) for quota in quotas)
    if account.deliver == "maildir":
        return ok(what, f"{full}; opened mail needs none there")
    if all(quota.left >= max(quota.used, 1) for quota in quotas):      # room for a second copy of everything
        return ok(what, full)
    sealed = await _sealed_sizes(box, folders)
    need = {"STORAGE": sum(sealed), "MESSAGE": len(sealed)}
    short = [quota for quota in quotas if need[quota.resource] > quota.left]
    if short:
        return warning(what, f"{full}: too little to open the {len(sealed)} sealed messages there beside their originals",
                       "make room, or set keep_sealed_days; what does not fit stays sealed and is tried again")
    if any(quota.used >= NEARLY_FULL * quota.limit for quota in quotas):
        return warning(what, f"{full}: each mail needs room twice, sealed and opened", "make room, or set keep_sealed_days")
    return ok(what, full)


async def _sealed_sizes(box: Mailbox, folders: Sequence[Folder]) -> list[int]:
    """In bytes, of the messages with our mark on the outside; opened ones bear another."""
    sizes: list[int] = []
    for folder in folders:
        await box.select(folder, read_only=True)
        uids = await box.search('HEADER Malote "1" NOT HEADER Malote-Verdict ""')
        sizes += (await box.sizes(uids)).values()
    return sizes


def _how_full(quota: Quota) -> str:
    share = f"{100 * quota.used // quota.limit} % full" if quota.limit else "no room at all"
    if quota.resource == "MESSAGE":
        return f"{share}, {quota.used} of {quota.limit} messages"
    return f"{share}, {_size(quota.used)} of {_size(quota.limit)}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
