"""`workers` processes that do the same work, and the one that starts them, watches over them and starts them again.

The supervisor binds the listening sockets, unlocks the keys and then forks: a worker finds both in its memory, so that no secret
ever is in an argument, the environment or a file, and a worker that is started again needs no passphrase. It holds no database
and no mail itself, has one thread and no event loop, and forks at any time because of that.

A worker that dies takes its connections with it: their clients come again, to another worker, and the journal knows what they
have sent. One that ends at once, again and again, cannot be helped: then the service ends, loudly.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from malote.channel import Channel, Place, Said, check_number, read_reload, say_reload
from malote.config import Config, ListenerConfig
from malote.errors import ConfigError, ExitCode, MaloteError
from malote.logs import flush_logs
from malote.notify import notify, notify_reloading, watchdog_seconds
from malote.smtp.siblings import Siblings
from malote.smtp.sockets import Activated, bind, close_all

START_SECONDS = 90.0        # for a worker to be ready; then it is killed and started again
RELOAD_SECONDS = 60.0       # for all workers to take a new configuration
SETTLED_SECONDS = 1.0       # a worker that was ready for as long as this did not end at once
AT_ONCE_MOST = 5            # ends at once in a row, of one worker: then the service ends
BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)     # before it is started again, the first time within RECENT_SECONDS, the second ...
RECENT_SECONDS = 60.0
RETRY_SECONDS = 2.0         # until the next try where the system had no process or descriptor for one
END_SECONDS = 280.0         # for the workers to finish; longer than a worker's own limit, shorter than the unit's TimeoutStopSec
TURN_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

log = structlog.get_logger("malote.supervisor")


@dataclass(slots=True)
class Post:
    """What a worker is given; the only `Manager` it knows is its supervisor."""

    slot: int
    config: Config
    sockets: dict[Place, list[socket.socket]]
    channel: Channel
    siblings: Siblings
    owner: bytes                    # names this worker among all that share the store
    before: bytes                   # the worker in whose place it was started; b"" for the first
    alive_seconds: float | None

    def ready(self, status: str) -> None:
        self.channel.say("ready", status=status)

    def alive(self) -> None:
        self.channel.say("alive")

    def reloading(self) -> None:
        """The supervisor has said so."""

    def reloaded(self, *, fault: str = "") -> None:
        self.channel.say("refused" if fault else "reloaded")

    def stopping(self) -> None:
        """The supervisor says so."""

    def orders(self) -> list[tuple[Config, dict[Place, list[socket.socket]]] | None]:
        """Configurations to be taken, as far as they have come; None: stop."""
        given: list[tuple[Config, dict[Place, list[socket.socket]]] | None] = []
        with suppress(BlockingIOError):
            while True:
                said = self.channel.hear()
                given.append(read_reload(said) if said is not None and said.word == "reload" else None)
                if given[-1] is None:
                    break
        return given


Work = Callable[[Post], int]        # the life of a worker; its exit code


@dataclass(slots=True)
class Slot:
    """One of the `workers` and what is known of the process in it."""

    number: int
    pid: int = 0
    channel: Channel | None = None
    owner: bytes = b""
    began: float = 0.0              # monotonic, like all times here
    ready_at: float | None = None
    fed: float = 0.0
    at_once: int = 0                # ends at once in a row
    ends: list[float] = field(default_factory=list)     # those within RECENT_SECONDS
    start_at: float | None = 0.0    # when to start it; None: it runs, or is not to run any more
    reloading: bool = False


@dataclass(slots=True)
class Bound:
    """The listening sockets of all workers."""

    activated: Activated = field(default_factory=Activated)
    sockets: dict[Place, list[socket.socket]] = field(default_factory=dict)
    _made: dict[Place, ListenerConfig] = field(default_factory=dict)       # by us: a path of ours goes with its socket

    def apply(self, listeners: dict[Place, ListenerConfig]) -> None:
        """Bind what is new, close what is no longer wanted. Raises `ConfigError`; then nothing has changed."""
        fresh: dict[Place, list[socket.socket]] = {}
        made: dict[Place, ListenerConfig] = {}
        try:
            for place, listener in listeners.items():
                if place not in self.sockets:
                    fresh[place] = self.activated.find(listener)
                    if not fresh[place]:
                        fresh[place], made[place] = bind(listener), listener
            check_number(self.sockets | fresh)
        except ConfigError:
            for place, sockets in fresh.items():
                self._close(sockets, made.get(place))
            raise
        for place in [place for place in self.sockets if place not in listeners]:
            self._close(self.sockets.pop(place), self._made.pop(place, None))
        self.sockets |= fresh
        self._made |= made

    def close(self) -> None:
        self.apply({})

    @staticmethod
    def _close(sockets: list[socket.socket], made: ListenerConfig | None) -> None:
        close_all(sockets)
        if made is not None and made.socket is not None:
            made.socket.unlink(missing_ok=True)


class Supervisor:
    """`listeners`: what a configuration listens on. `load`: the configuration anew, checked, with what needs a restart as it is.
    `work`: what a worker does. `new_owner`: names one."""

    def __init__(self, config: Config, *, listeners: Callable[[Config], dict[Place, ListenerConfig]], load: Callable[[], Config],
                 work: Work, new_owner: Callable[[], bytes]) -> None:
        self.config = config
        self._listeners = listeners
        self._load = load
        self._work = work
        self._new_owner = new_owner
        self._slots = [Slot(number) for number in range(config.service.workers)]
        self._siblings = Siblings(len(self._slots))
        self._bound = Bound()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._watchdog = watchdog_seconds()
        self._watchdog_at = 0.0
        self._ready = False
        self._stop_by: float | None = None
        self._failure: MaloteError | None = None
        self._reload_by: float | None = None
        self._before_reload: Config | None = None
        self._reload_again = False      # asked for while another one was under way

    def run(self) -> None:
        """Until told to stop, and all workers have ended. Raises `MaloteError` when they cannot be started, or kept running."""
        self._bound.apply(self._listeners(self.config))
        for address in self._bound.activated.unused(list(self._listeners(self.config).values())):
            log.warning("systemd holds a socket that no listener of the configuration has", address=address)
        self._hear_signals()
        gc.collect()
        gc.freeze()         # what is there now is shared with all workers for as long as nobody writes to it
        try:
            while self._stop_by is None or any(slot.pid for slot in self._slots):
                self._turn()
        finally:
            self._bound.close()
            for slot in self._slots:
                if slot.pid:
                    os.kill(slot.pid, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
        log.info("stopped")
        if self._failure is not None:
            raise self._failure

    # --- one turn ---

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._wait_seconds()):
            if key.data is None:
                self._heed_signals()
            else:
                self._hear(key.data)
        self._reap()
        now = time.monotonic()
        for slot in self._slots:
            if slot.start_at is not None and slot.start_at <= now and self._stop_by is None:
                self._start(slot)
        self._kill_late(now)
        self._feed_watchdog(now)
        self._turn_reload(now)

    def _turn_reload(self, now: float) -> None:
        if self._reload_by is not None and (now > self._reload_by or not any(slot.reloading for slot in self._slots)):
            self._end_reload(refused=False)

    def _wait_seconds(self) -> float:
        now = time.monotonic()
        due = [slot.start_at for slot in self._slots if slot.start_at is not None and self._stop_by is None]
        turn = TURN_SECONDS if self._watchdog is None else min(TURN_SECONDS, self._watchdog / 4)
        return max(0.0, min([turn, *(at - now for at in due)]))

    def _hear_signals(self) -> None:
        for end in (self._wake, self._woken):
            end.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)      # what counts is that `select` wakes up
        signal.set_wakeup_fd(self._woken.fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def _heed_signals(self) -> None:
        numbers: set[int] = set()
        with suppress(BlockingIOError):
            numbers.update(self._wake.recv(4096))
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            self._stop()
        elif signal.SIGHUP in numbers:
            self._reload()

    def _hear(self, slot: Slot) -> None:
        with suppress(BlockingIOError):
            while slot.channel is not None:
                said = slot.channel.hear()
                if said is None:
                    self._close_channel(slot)
                    return
                self._heed(slot, said)

    def _heed(self, slot: Slot, said: Said) -> None:
        slot.fed = time.monotonic()
        match said.word:
            case "ready":
                slot.ready_at = slot.fed
                if not self._ready and all(each.ready_at is not None for each in self._slots):
                    self._ready = True
                    log.info("ready", workers=len(self._slots))
                    notify("READY=1", f"STATUS={len(self._slots)} workers, {said.values.get('status', '')}")
            case "reloaded":
                slot.reloading = False
            case "refused":
                slot.reloading = False
                self._end_reload(refused=True)

    # --- a worker's beginning and end ---

    def _start(self, slot: Slot) -> None:
        try:
            ours, theirs = Channel.pair()
        except OSError as error:
            self._cannot_start(slot, error)
            return
        before, owner = slot.owner, self._new_owner()
        flush_logs()
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)      # none may come to the child as if it were the parent
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            ours.close()
            theirs.close()
            self._cannot_start(slot, error)
            return
        if not pid:
            self._be_worker(Post(slot.number, self.config, self._bound.sockets, theirs, self._siblings, owner, before,
                                 self._watchdog / 2 if self._watchdog is not None else None), ours)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)
        theirs.close()
        now = time.monotonic()
        slot.pid, slot.channel, slot.owner, slot.began, slot.fed = pid, ours, owner, now, now
        slot.ready_at = slot.start_at = None
        slot.reloading = False      # it was started with the newest
        self._selector.register(ours.socket, selectors.EVENT_READ, slot)

    def _cannot_start(self, slot: Slot, error: OSError) -> None:
        """No process or descriptor is left just now. The other workers go on."""
        log.error("worker cannot be started, tried again soon", worker=slot.number, reason=error.strerror)
        slot.start_at = time.monotonic() + RETRY_SECONDS

    def _be_worker(self, post: Post, supervisors_end: Channel) -> None:
        """In the child. Never returns, and runs nothing that belongs to the parent."""
        code = int(ExitCode.FAILED)
        try:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
            for channel in (supervisors_end, *(slot.channel for slot in self._slots if slot.channel is not None)):
                channel.close()     # or nobody would notice that the supervisor is gone
            self._selector.close()
            self._wake.close()
            self._woken.close()
            close_all(self._bound.activated.sockets)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            structlog.contextvars.bind_contextvars(worker=post.slot)
            code = self._work(post)
        except MaloteError as error:
            log.error("worker cannot go on", fault=str(error), hint=error.hint)
            code = int(error.exit_code)
        except Exception:
            log.exception("worker failed")
        finally:
            flush_logs()
            os._exit(code)

    def _close_channel(self, slot: Slot) -> None:
        if slot.channel is not None:
            self._selector.unregister(slot.channel.socket)
            slot.channel.close()
            slot.channel = None

    def _reap(self) -> None:
        for slot in self._slots:
            if slot.pid:
                pid, status = os.waitpid(slot.pid, os.WNOHANG)
                if pid:
                    self._hear(slot)        # its last words
                    self._is_gone(slot, os.waitstatus_to_exitcode(status))

    def _is_gone(self, slot: Slot, code: int) -> None:
        self._close_channel(slot)
        self._siblings.clear(slot.number)
        pid, slot.pid, slot.reloading = slot.pid, 0, False
        if self._stop_by is not None:
            return
        now = time.monotonic()
        at_once = slot.ready_at is None or now - slot.ready_at < SETTLED_SECONDS
        slot.at_once = slot.at_once + 1 if at_once else 0
        log.error("worker ended", worker=slot.number, pid=pid, code=code)
        if not self._ready and code > 0:        # what it needs is missing: that does not come by itself
            self._give_up(code, f"a worker could not be started (exit code {code}); its own line in the log says why")
        elif slot.at_once >= AT_ONCE_MOST:
            self._give_up(int(ExitCode.FAILED), f"worker {slot.number} ended at once {slot.at_once} times in a row")
        else:
            slot.ends = [*(at for at in slot.ends if now - at < RECENT_SECONDS), now]
            slot.start_at = now + BACKOFF_SECONDS[min(len(slot.ends), len(BACKOFF_SECONDS)) - 1]

    def _give_up(self, code: int, why: str) -> None:
        log.critical("gives up, the other workers end too", fault=why)
        self._failure = MaloteError(why, hint="see the lines of the log before this one")
        self._failure.exit_code = ExitCode(code) if code in list(ExitCode) else ExitCode.FAILED
        self._stop()

    def _kill_late(self, now: float) -> None:
        """What hangs is ended, so that it is started again. Its clients come again, as after any other crash."""
        for slot in self._slots:
            if not slot.pid:
                continue
            if self._stop_by is not None:
                late = now > self._stop_by
            elif slot.ready_at is None:
                late = now - slot.began > START_SECONDS
            else:
                late = self._watchdog is not None and now - slot.fed > 1.5 * self._watchdog
            if late:
                log.error("worker does not answer and is killed", worker=slot.number, pid=slot.pid)
                os.kill(slot.pid, signal.SIGKILL)

    # --- as a whole ---

    def _stop(self) -> None:
        if self._stop_by is not None:
            return
        self._stop_by = time.monotonic() + END_SECONDS
        notify("STOPPING=1")
        self._bound.close()
        for slot in self._slots:
            slot.start_at = None
            if slot.pid and (slot.channel is None or not slot.channel.say("stop")):
                os.kill(slot.pid, signal.SIGTERM)

    def _feed_watchdog(self, now: float) -> None:
        """While all workers feed it. One that is being started again is looked after by us, and no reason to end the others."""
        if self._watchdog is None or now < self._watchdog_at + self._watchdog / 2:
            return
        if all(not slot.pid or slot.ready_at is None or now - slot.fed <= self._watchdog for slot in self._slots):
            self._watchdog_at = now
            notify("WATCHDOG=1")

    def _reload(self) -> None:
        """All workers, or none: when one refuses, the others get the old configuration back."""
        if self._reload_by is not None:     # what workers say now is of the one before
            self._reload_again = True
            return
        notify_reloading()
        try:
            config = self._load()
            self._bound.apply(self._listeners(config))
        except MaloteError as error:
            log.error("not reloaded, the old configuration stays", fault=str(error), hint=error.hint)
            notify("READY=1")
            return
        except Exception:
            log.exception("not reloaded, the old configuration stays")
            notify("READY=1")
            return
        self._before_reload, self.config = self.config, config
        self._announce()

    def _announce(self) -> None:
        self._reload_by = time.monotonic() + RELOAD_SECONDS
        for slot in self._slots:
            slot.reloading = slot.channel is not None and say_reload(slot.channel, self.config, self._bound.sockets)

    def _end_reload(self, *, refused: bool) -> None:
        before, self._before_reload = self._before_reload, None
        if refused and before is not None:
            log.error("not reloaded, the old configuration stays")
            try:
                self._bound.apply(self._listeners(before))
            except ConfigError as error:    # somebody else has taken what was closed meanwhile
                self._give_up(int(error.exit_code), str(error))
                return
            self.config = before
            self._announce()
            return
        self._reload_by = None
        late = [slot.number for slot in self._slots if slot.reloading]
        if late:
            log.warning("workers have not taken the new configuration yet", workers=late)
        elif before is not None:
            log.info("reloaded", workers=len(self._slots))
        notify("READY=1")
        if self._reload_again:
            self._reload_again = False
            self._reload()
