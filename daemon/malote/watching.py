"""The watchers of all accounts: started, restarted, replaced and ended; where several processes share the store, those that are
this one's share."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from malote.config import AccountConfig, Config
from malote.credentials import account_password, trusted_gateways
from malote.errors import ConfigError, FormatError, MaloteError
from malote.identities import Keyring
from malote.incoming.account import account_addresses, account_keys, device_name
from malote.incoming.watcher import Watcher
from malote.membership import FIRST_LOOK_SECONDS, LAST_SECONDS, RENEW_SECONDS, Membership
from malote.store import Store

RESTART_SECONDS = 60.0          # after a fault that only the configuration, or a new version, can mend
# What a watcher does while it connects or waits for news can be broken off at any point; a batch under way is finished.
INTERRUPTIBLE = frozenset({"new", "connecting", "waiting"})
IDLE_END_SECONDS = 3.0          # for the server to answer DONE; then it is interrupted too

log = structlog.get_logger("malote.service")


@dataclass(slots=True)
class Watched:
    """A watcher with its task."""

    account: AccountConfig
    log_addresses: bool
    watcher: Watcher
    task: asyncio.Task[None]


def check_accounts(config: Config) -> None:
    """Raises `ConfigError` for what the schema cannot see and a watcher would stumble over."""
    faults = []
    for number, account in enumerate(config.accounts, 1):
        try:
            account_addresses(account)
        except FormatError as error:
            faults.append(f"accounts.{number}.addresses: {error}")
    if faults:
        raise ConfigError("\n".join(faults))


class Accounts:
    """The watched accounts. `end_seconds`: how long a batch under way may take when its watcher is told to stop.

    `membership`: other processes have the same accounts. Only those are watched whose lease this one has; `share` sees to that.
    """

    def __init__(self, store: Store, keyring: Keyring, *, end_seconds: float) -> None:
        self._store = store
        self._keyring = keyring
        self._end_seconds = end_seconds
        self._watched: dict[str, Watched] = {}
        self._stopping = asyncio.Event()
        self._wanted: dict[str, AccountConfig] = {}
        self._log_addresses = False
        self._membership: Membership | None = None
        self._worker = 0
        self._leased: set[str] = set()      # ours; of what is `_watched` all is
        self._kept: set[str] = set()        # of those, what nobody else took
        self._changing = asyncio.Lock()     # one reload, look or loss at a time

    @property
    def names(self) -> list[str]:
        return list(self._watched)

    @property
    def states(self) -> dict[str, int]:
        """How many watchers are in which state."""
        return dict(Counter(watched.watcher.state for watched in self._watched.values()))

    async def apply(self, config: Config) -> None:
        """Leave alone whose account did not change; end the others; start what is new."""
        async with self._changing:
            wanted = self._wanted = {account.name: account for account in config.accounts}
            self._log_addresses = config.log.addresses
            ended = [watched for name, watched in self._watched.items()
                     if wanted.get(name) != watched.account or watched.log_addresses != config.log.addresses]
            for watched in ended:
                del self._watched[watched.account.name]
            await self._end(ended, self._end_seconds)
            if self._membership is not None:
                self._membership.accounts = len(wanted)
                await self._give_back([name for name in self._leased if name not in wanted])
            await self._start()

    async def _start(self) -> None:
        """What is ours to watch and is not watched."""
        device = device_name(await self._store.local_key("device"), self._worker)
        for name, account in self._wanted.items():
            if name not in self._watched and (self._membership is None or name in self._leased):
                self._watched[name] = self._watch(account, device, log_addresses=self._log_addresses)

    # --- sharing with other processes ---

    def share_with(self, membership: Membership, worker: int) -> None:
        """Before the first `apply`. `worker`: which of this service's."""
        self._membership, self._worker = membership, worker

    async def share(self) -> None:
        """For ever: take what is free and our share, give back what is more than that."""
        assert self._membership is not None     # noqa: S101 -- called after `share_with`
        overdue: set[str] = set()
        wait = FIRST_LOOK_SECONDS
        while True:
            await asyncio.sleep(wait)
            wait = RENEW_SECONDS
            try:
                async with self._changing:
                    await self._look(self._membership, overdue)
            except MaloteError as error:
                log.warning("store not available", fault=str(error))
            except Exception:       # the next look is another try
                log.exception("fault while sharing accounts")

    async def _look(self, membership: Membership, overdue: set[str]) -> None:
        if lost := await membership.lost(self._leased):
            log.error("accounts lost to other processes", count=len(lost))
            await self._end([self._watched[name] for name in lost if name in self._watched], 0.0)
            for name in lost:
                self._watched.pop(name, None)
                self._leased.discard(name)
                self._kept.discard(name)
        late = overdue.copy()
        take, give = await membership.look(list(self._wanted), self._leased, overdue, self._kept)
        if give:
            await self._end([self._watched[name] for name in give if name in self._watched], self._end_seconds)
            for name in give:
                self._watched.pop(name, None)
            await self._give_back(give)
        for name in take:
            if self._stopping.is_set() or not await membership.take(name):
                continue
            log.info("account taken", account=name)
            self._leased.add(name)
            overdue.discard(name)
            if name in late:
                self._kept.add(name)
        await self._start()

    async def _give_back(self, names: Sequence[str]) -> None:
        assert self._membership is not None     # noqa: S101 -- only where it is shared
        for name in names:
            self._leased.discard(name)
            self._kept.discard(name)
            await self._membership.give_back(name)
            log.info("account given back", account=name)

    async def let_go(self, seconds: float) -> None:
        """Of all, within that time: soon another process may have them."""
        self._leased.clear()
        self._kept.clear()
        watched, self._watched = list(self._watched.values()), {}
        await self._end(watched, seconds)

    async def stop(self) -> None:
        """End all: at once what waits or connects, the others after the batch in hand."""
        self._stopping.set()
        watched, self._watched = list(self._watched.values()), {}
        await self._end(watched, self._end_seconds)

    def look_now(self) -> None:
        """Keys or cards have changed."""
        for watched in self._watched.values():
            watched.watcher.look_now()

    def _watch(self, account: AccountConfig, device: str, *, log_addresses: bool) -> Watched:
        addresses = account_addresses(account)
        tenure = self._membership.tenure if self._membership is not None else None
        watcher = Watcher(account, store=self._store, device=device, password=lambda: account_password(account),
                          may_act=None if tenure is None else lambda: tenure.seconds_left > LAST_SECONDS,
                          keys=lambda: replace(account_keys(self._keyring.identities.values(), addresses),
                                               trusted=trusted_gateways(account)), log_addresses=log_addresses)
        task = asyncio.create_task(self._keep_watching(watcher.run, account.name), name=f"watch {account.name}")
        return Watched(account, log_addresses, watcher, task)

    async def _keep_watching(self, run: Callable[[], Awaitable[None]], name: str) -> None:
        """One account's trouble is that account's alone."""
        while not self._stopping.is_set():
            try:
                await run()
                return
            except MaloteError as error:
                log.error("account not watched", account=name, fault=str(error), hint=error.hint)
            except Exception:
                log.exception("watcher failed", account=name)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), RESTART_SECONDS)

    async def _end(self, ended: Sequence[Watched], seconds: float) -> None:
        for watched in ended:
            watched.watcher.stop()
        began = time.monotonic()
        left = list(ended)
        while left and (passed := time.monotonic() - began) < seconds:
            for watched in left:
                state = watched.watcher.state
                if state in INTERRUPTIBLE or (state == "watching" and passed > IDLE_END_SECONDS):
                    watched.task.cancel()
            await asyncio.wait([watched.task for watched in left], timeout=min(0.5, seconds))
            left = [watched for watched in left if not watched.task.done()]
        for watched in left:
            log.warning("watcher cut off at the end", account=watched.account.name)
            watched.task.cancel()
        await asyncio.gather(*(watched.task for watched in ended), return_exceptions=True)
