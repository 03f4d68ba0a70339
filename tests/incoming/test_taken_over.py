"""A watcher whose mailbox another process has taken over: it sends not one command more, wherever it was stopped."""

from __future__ import annotations

import pytest

from lab.incoming import SEALED, Box, verdicts
from malote.errors import LeaseLost, MailboxLost
from malote.incoming.arbiter import CONTEST_MS
from malote.incoming.watcher import Watcher, now_ms


def stopped_before(watcher: Watcher, step: int) -> list[int]:
    """It may send that many commands, and then is not the one to do so. Counts those that it wanted to send."""
    asked = [0]

    def may_act() -> bool:
        asked[0] += 1
        return asked[0] <= step
    watcher._may_act = may_act
    return asked


async def test_stopped_anywhere_another_goes_on(box: Box) -> None:
    """After each number of commands: the other, which has the same store, opens what is there, and all of it is opened once."""
    store, late, steps = await box.open_store(), [0], 0
    clock = lambda: now_ms() + late[0]      # noqa: E731
    for step in range(100):
        box.client.put(box.seal())
        first, second = [await box.watcher(store, device=device * 16, clock=clock) for device in "0f"]
        asked = stopped_before(first, step)
        try:
            await first.run_once()
            break
        except MailboxLost:
            assert asked[0] <= step + 2, "it went on to ask"    # the command, and LOGOUT
        steps += 1
        await second.run_once()
        late[0] += CONTEST_MS + 1000    # of two copies one is taken back when it is known that the other stays
        await second.run_once()
        assert verdicts(box.client.messages()) == ["FRESH"] * (step + 1)
        assert len(box.client.uids(SEALED)) == step + 1
    assert steps > 5, "it was stopped nowhere"


async def test_without_its_lease_a_message_is_left_alone(box: Box) -> None:
    """Its clock says nothing, the database does: judged by nobody, it stays as it came for the one who watches now."""
    store = await box.open_store("a")
    await store.join(b"1" * 16)
    box.client.put(box.seal())
    watcher = await box.watcher(store)
    with pytest.raises(LeaseLost):
        await watcher.run_once()
    assert verdicts(box.client.messages()) != ["FRESH"]
    assert box.client.uids(SEALED) == []
    assert await store.take_lease("box")
    await watcher.run_once()
    assert verdicts(box.client.messages()) == ["FRESH"]
