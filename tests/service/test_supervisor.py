"""What the supervisor does with words and faults that come at the wrong moment; a worker's end of the channel is ours here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from malote.channel import Channel, read_reload
from malote.config import Config, LogConfig
from malote.supervisor import Slot, Supervisor

FIRST, BAD, GOOD = (Config(log=LogConfig(level=level)) for level in ("debug", "info", "warning"))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Lone:
    """A supervisor with one worker, that is this test."""

    def __init__(self, *given: Config) -> None:
        configs = iter(given)
        self.supervisor = Supervisor(FIRST, listeners=lambda _: {}, load=lambda: next(configs), work=lambda _: 0,
                                     new_owner=lambda: os.urandom(16))
        self.slot: Slot = self.supervisor._slots[0]
        self.slot.channel, self.worker = Channel.pair()
        self.supervisor._selector.register(self.slot.channel.socket, 1, self.slot)

    def close(self) -> None:
        for channel in (self.worker, self.slot.channel):
            if channel is not None:
                channel.close()
        self.supervisor._selector.close()
        self.supervisor._wake.close()
        self.supervisor._woken.close()

    def told(self) -> list[Config]:
        """Configurations that came since the last time."""
        found = []
        try:
            while (said := self.worker.hear()) is not None:
                found.append(read_reload(said)[0])
        except BlockingIOError:
            return found
        raise AssertionError("the supervisor is gone")

    def answer(self, word: str) -> None:
        self.worker.say(word)
        self.supervisor._hear(self.slot)


@pytest.fixture
def make() -> Iterator[Callable[..., Lone]]:
    made: list[Lone] = []

    def one(*given: Config) -> Lone:
        made.append(Lone(*given))
        return made[-1]

    yield one
    for lone in made:
        lone.close()


def test_a_reload_that_is_asked_for_during_another_waits_for_its_end(make: Callable[..., Lone]) -> None:
    """The worker's refusal is of the first: taken for one of the second, a good configuration would be given up for a bad one."""
    lone = make(BAD, GOOD)
    lone.supervisor._reload()
    lone.supervisor._reload()
    assert lone.told() == [BAD]
    lone.answer("refused")
    assert lone.told() == [FIRST]
    lone.answer("reloaded")
    lone.supervisor._turn_reload(0.0)
    assert lone.told() == [GOOD]
    lone.answer("reloaded")
    lone.supervisor._turn_reload(0.0)
    assert lone.supervisor.config == GOOD
    assert lone.supervisor._reload_by is None


def test_a_worker_that_is_late_is_not_said_to_have_it(make: Callable[..., Lone], capsys: pytest.CaptureFixture[str]) -> None:
    """An account's batch in hand may take longer than a reload is waited for."""
    lone = make(GOOD)
    lone.supervisor._reload()
    lone.supervisor._turn_reload(float("inf"))
    said = capsys.readouterr()
    assert "not taken the new configuration yet" in said.out + said.err
    assert lone.supervisor._reload_by is None


def test_a_worker_that_cannot_be_started_does_not_take_the_others_with_it(
    make: Callable[..., Lone], monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system may be short of processes for a moment: what runs goes on, and it is tried again."""
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    lone = make()
    lone.supervisor._close_channel(lone.slot)
    monkeypatch.setattr("os.fork", fork)
    before = open_files()
    lone.supervisor._start(lone.slot)
    assert lone.slot.pid == 0
    assert lone.slot.start_at is not None
    assert lone.slot.start_at > 0.0
    assert open_files() == before


def test_waiting_for_a_worker_that_hangs_is_waiting(make: Callable[..., Lone]) -> None:
    """The manager is not fed while a worker hangs, which must not be asked about without a pause until that is killed."""
    lone = make()
    lone.supervisor._watchdog, lone.supervisor._watchdog_at = 4.0, -1000.0
    lone.slot.start_at = None
    assert lone.supervisor._wait_seconds() > 0.0
