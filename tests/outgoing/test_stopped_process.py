"""A process that was stopped (SIGSTOP, a suspended machine) in the middle of a message that another has sent meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from outgoing.harness import Gateway, Upstream, person, text, upstream_config

BOB, NOBODY = person("bob@test.example"), "nobody@test.example"


@pytest.mark.parametrize("recipient", [BOB.address, NOBODY], ids=["sealed", "plain"])
async def test_no_final_dot_after_a_long_stop(tmp_path: Path, recipient: str) -> None:
    """Stopped between DATA and the dot, until others took it for dead and sent its message: then it sends nothing. Its client is
    told to come again, and finds that the message was taken."""
    stopped = [True]

    def script(at: str, _argument: str, _count: int) -> bool:
        if at == "DATA" and stopped and stopped.pop():
            one.store.tenure.lapse()
        return False
    content = text(to=recipient)
    async with Upstream(script) as server:
        config = upstream_config(server.port)
        async with Gateway(tmp_path, config, cards=(BOB,)) as one, Gateway(tmp_path, config, cards=(BOB,)) as two:
            await one.store.join(b"1" * 16)
            await two.store.join(b"2" * 16)
            first = await one.submit("alice@test.example", [recipient], content, polite=False)
            assert first.code == 451
            assert not server.messages
            await one.store.leave()         # as others see it
            assert (await two.submit("alice@test.example", [recipient], content, polite=False)).code == 250
            await one.store.renew_membership(0)
            again = await one.submit("alice@test.example", [recipient], content)
            assert again.code == 250
            assert len(server.messages) == 1, "sent twice"
            other = await one.submit("alice@test.example", [recipient], text(to=recipient))
            assert other.code == 250, "a new membership sends as before"
            assert len(server.messages) == 2
