"""What `malote check` and `malote log --shadow` say of shadow mode."""

from __future__ import annotations

import asyncio
import json

from lab.daemon import Home
from lab.servers import free_port
from malote.core.policy import Action
from malote.outgoing.shadow import Reason, Would, entries
from malote.store import Store
from malote.store.records import OutcomeEntry


def configure(home: Home, more: str = "") -> None:
    home.configure(f"""
[outgoing]
shadow = true
[[outgoing.listeners]]
port = {free_port()}
[outgoing.upstream]
host = "127.0.0.1"
port = {free_port()}
security = "none"
{more}
""")


async def write(home: Home) -> None:
    store = await Store.open(home.root / "store")
    try:
        store.log_outcome(OutcomeEntry(at_ms=1_795_392_000_000, direction="out", outcome="shadow", recipients=3, detail="250"))
        judged = [Would("bob@b.example", Action.SEAL, 0, Reason.CARD), Would("x@c.example", Action.REFUSE, 0, Reason.NO_CARD),
                  Would("y@c.example", Action.REFUSE, None, Reason.NO_CARD)]
        for entry in entries(judged, message_id="01", now_ms=1_795_392_000_000):
            store.log_outcome(entry)
    finally:
        await store.close()


def test_the_summary_for_people_and_for_scripts(home: Home) -> None:
    configure(home)
    asyncio.run(write(home))
    done = home.malote("log", "--shadow")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.decode().split())
    assert "in 1 messages" in text
    assert "rule would seal would let pass would refuse 1 1 0 1 default 0 0 1 all 1 0 2" in text
    assert "would refuse: 2 no card" in text
    assert "no card for recipients at: 2 c.example" in text
    told = json.loads(home.malote("log", "--shadow", "--json").stdout)
    assert told["actions"] == {"seal": 1, "refuse": 2}
    assert told["domains"] == {"c.example": 2}
    lines = home.malote("log", "--json").stdout.decode().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["shadow"], "the log itself has the message, once"


def test_nothing_yet(home: Home) -> None:
    configure(home)
    asyncio.run(write(home))
    other = Home(home.root / "other")
    configure(other)
    other.keys("new", "anna@a.example", "--algorithm", "ed25519")
    done = other.malote("log", "--shadow")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr == b"malote: nothing was sent in shadow mode\n"


def test_check_warns_and_refuses_what_means_nothing(home: Home) -> None:
    configure(home, '[[outgoing.rules]]\nseal = "require"\n')
    found = [json.loads(line) for line in home.malote("check", "--json").stdout.splitlines()]
    [warning] = [each for each in found if each["what"] == "shadow mode"]
    assert warning["state"] == "warning"
    assert "NOTHING IS SEALED" in warning["text"]
    assert "rules 1" in warning["text"]
    configure(home, "[[outgoing.rules]]\nshadow = true\n")
    found = [json.loads(line) for line in home.malote("check", "--json").stdout.splitlines()]
    assert any("outgoing.rules.1.shadow" in each["text"] for each in found if each["state"] == "fault")


def test_the_daemon_says_it_at_its_start(home: Home) -> None:
    configure(home)
    home.keys("new", "anna@a.example", "--algorithm", "ed25519")
    with home.daemon() as daemon:
        daemon.stop()
    assert "NOTHING IS SEALED" in daemon.log.read_text()
