"""A connection that goes, at any moment and in any manner, is noticed at once; servers that lie end it and nothing else."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lab.imap_peers import CAPABILITIES, Script, account, opened, scripted, secret, wired
from lab.servers import Dovecot, Lab
from malote.errors import MailboxError, MailboxLost
from malote.incoming.mailbox import Appended, Mailbox

MESSAGE = b"Subject: x\r\n\r\nhello\r\n"
Action = Callable[[Mailbox], Awaitable[object]]


async def _all(box: Mailbox) -> None:
    async for fetched in box.fetch_many([1, 2]):
        assert fetched.raw == MESSAGE


PHASES: list[tuple[bytes, Action]] = [
    (b"LIST", lambda box: box.list_folders()),
    (b"CREATE", lambda box: box.create_folder("New")),
    (b"SELECT", lambda box: box.select("INBOX")),
    (b"UID SEARCH", lambda box: box.search("ALL")),
    (b"BODY.PEEK[HEADER]", lambda box: box.peek_headers([1])),
    (b"BODYSTRUCTURE", lambda box: box.peek_structure([1])),
    (b"BODY.PEEK[]", _all),
    (b"APPEND", lambda box: box.append("INBOX", MESSAGE)),
    (b"y" * 70_000, lambda box: box.append("INBOX", MESSAGE + b"y" * 200_000)),      # in the middle of the literal
    (b"UID MOVE", lambda box: box.move([1], "Sent")),
    (b"STORE", lambda box: box.store_flags([1], add=["\\Seen"])),
    (b"EXPUNGE", lambda box: box.expunge([1])),
    (b"IDLE", lambda box: box.idle(30)),
    (b"DONE", lambda box: box.idle(0.05)),
    (b"NOOP", lambda box: box.noop()),
]


@pytest.fixture(scope="module")
def users(dovecot: Dovecot) -> list[str]:
    """Two users more."""
    names = ["lost1@test.example", "lost2@test.example"]
    dovecot.add_users(names)
    return names


@pytest.mark.parametrize(("said", "action"), PHASES, ids=[said[:18].decode() for said, _ in PHASES])
async def test_a_cut_in_every_phase(dovecot: Dovecot, users: list[str], said: bytes, action: Action) -> None:
    """aioimaplib waited for its timeout, or for ever. Here the command raises, and so does every later one, at once."""
    async with wired(dovecot.port) as wire, opened(wire.port, folder="INBOX", username=users[0]) as box:
        await box.append_many("INBOX", [(MESSAGE, (), None)] * 2)
        await box.list_folders()
        while await box.idle(0.01):
            pass
        wire.cut_when(said)
        with pytest.raises(MailboxLost):
            await action(box)
        assert box.lost.is_set()
        assert "connection" in box.lost_reason
        for later in (box.noop(), box.search("ALL"), box.idle(30), box.append("INBOX", MESSAGE)):
            with pytest.raises(MailboxLost):
                await later


@pytest.mark.parametrize("said", [b"CAPABILITY", b"AUTHENTICATE"])
async def test_a_cut_while_logging_in(dovecot: Dovecot, users: list[str], said: bytes) -> None:
    """Nothing is left behind by a login that does not end."""
    async with wired(dovecot.port) as wire:
        wire.cut_when(said)
        with pytest.raises(MailboxLost):
            await Mailbox.connect(account(wire.port, username=users[0]), password=secret)


async def test_a_cut_fails_everything_in_flight(dovecot: Dovecot, users: list[str]) -> None:
    """Several tasks wait on one connection; none is forgotten."""
    async with wired(dovecot.port) as wire, opened(wire.port, folder="INBOX", username=users[0]) as box:
        wire.freeze()
        waiting = [asyncio.create_task(work) for work in (box.noop(), box.append("INBOX", MESSAGE), box.sizes([1]), box.idle(30))]
        await asyncio.sleep(0.05)
        wire.cut()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [MailboxLost] * 4


async def test_a_wire_that_swallows_everything(dovecot: Dovecot, users: list[str]) -> None:
    """A NAT that forgot the connection: the command gives up after its time, the whole connection with it."""
    async with wired(dovecot.port) as wire, opened(wire.port, folder="INBOX", username=users[0], seconds=0.3) as box:
        wire.freeze()
        with pytest.raises(MailboxLost, match="in time"):
            await box.noop()
        with pytest.raises(MailboxLost):
            await box.select("INBOX")


async def test_a_cancelled_command_takes_the_connection_along(dovecot: Dovecot, users: list[str]) -> None:
    """Half a command on the wire would make the next answer somebody else's."""
    async with wired(dovecot.port) as wire, opened(wire.port, folder="INBOX", username=users[0]) as box:
        wire.freeze()
        task = asyncio.create_task(box.noop())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert box.lost.is_set()
    async with opened(dovecot.port, folder="INBOX", username=users[0]) as box:
        idling = asyncio.create_task(box.idle(30))
        await asyncio.sleep(0.05)
        idling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await idling
        assert box.lost.is_set()


async def test_a_restarted_server(lab: Lab) -> None:
    """IDLE ends with MailboxLost as the server goes, and a new connection finds everything."""
    server = lab.dovecot(["re@test.example"])
    async with opened(server.port, folder="INBOX", username="re@test.example") as box:
        stored = await box.append("INBOX", MESSAGE)
        while await box.idle(0.05):
            pass
        waiting = asyncio.create_task(box.idle(30))
        await asyncio.sleep(0.05)
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGKILL)       # asked to stop, Dovecot lets an IDLE live for 10 seconds
        with pytest.raises(MailboxLost):
            await waiting
        await asyncio.to_thread(server.restart)
    async with opened(server.port, folder="INBOX", username="re@test.example") as box:
        assert stored is not None
        assert await box.search("ALL") == [stored.uid]


async def test_logout_never_hangs_and_never_raises(dovecot: Dovecot, users: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopping the service must not wait for a mail server that is gone."""
    monkeypatch.setattr("malote.incoming.mailbox.LOGOUT_SECONDS", 0.1)
    async with wired(dovecot.port) as wire, opened(wire.port, username=users[0]) as box:
        wire.freeze()
        started = time.monotonic()
        await box.logout()
        assert box.lost.is_set()
        assert time.monotonic() - started < 60
        await box.logout()


# --- servers that do not follow the protocol ---

LIES: list[tuple[str, bytes, bytes, Action]] = [
    ("garbage", b"NOOP", b"\x00\xff garbage\r\n", lambda box: box.noop()),
    ("no-response", b"NOOP", b"HTTP/1.1 200 OK\r\n", lambda box: box.noop()),
    ("wrong-tag", b"NOOP", b"ZZZ999 OK done\r\n", lambda box: box.noop()),
    ("tag-without-status", b"NOOP", b"%s MAYBE\r\n", lambda box: box.noop()),
    ("bye", b"NOOP", b"* BYE [UNAVAILABLE] going down\r\n", lambda box: box.noop()),
    ("stray-plus", b"NOOP", b"+ go on\r\n", lambda box: box.noop()),
    ("second-plus", b"IDLE", b"+ idling\r\n+ idling\r\n", lambda box: box.idle(5)),
    ("huge-literal", b"BODY.PEEK[]", b"* 1 FETCH (UID 1 BODY[] {4000000000}\r\n", lambda box: box.fetch(1, size=5)),
    ("unasked-size", b"BODY.PEEK[]", b"* 1 FETCH (UID 1 FLAGS () BODY[] {1500000}\r\n" + b"x" * 1_500_000 + b")\r\n",
     lambda box: box.fetch(1, size=5)),
    ("open-parenthesis", b"BODY.PEEK[]", b"* 1 FETCH (UID 1 (\r\n", lambda box: box.fetch(1, size=5)),
    ("no-date", b"BODY.PEEK[]", b"* 1 FETCH (UID 1 FLAGS () BODY[] {1}\r\nx)\r\n", lambda box: box.fetch(1, size=5)),
    ("uid-of-nothing", b"BODY.PEEK[]", b"* 1 FETCH (UID 0 BODY[] {1}\r\nx)\r\n", lambda box: box.fetch(1, size=5)),
    ("search-of-words", b"SEARCH", b"* SEARCH 1 two 3\r\n%s OK done\r\n", lambda box: box.search("ALL")),
    ("search-of-all-numbers", b"SEARCH", b'* ESEARCH (TAG "%s") UID ALL 1:4294967295\r\n%s OK done\r\n',
     lambda box: box.search("ALL")),
    ("copyuid-of-others", b"MOVE", b"* OK [COPYUID 7 1:2 5:6] moved\r\n%s OK done\r\n", lambda box: box.move([1], "Sealed")),
    ("copyuid-uneven", b"MOVE", b"* OK [COPYUID 7 1 5:6] moved\r\n%s OK done\r\n", lambda box: box.move([1], "Sealed")),
    ("copyuid-of-garbage", b"MOVE", b"%s OK [COPYUID x y z] moved\r\n", lambda box: box.move([1], "Sealed")),
    ("copyuid-to-one", b"MOVE", b"%s OK [COPYUID 7 1:2 5,5] moved\r\n", lambda box: box.move([1, 2], "Sealed")),
    ("appenduid-of-garbage", b"APPEND", b"%s OK [APPENDUID 7 0] stored\r\n", lambda box: box.append("Sealed", MESSAGE)),
    ("appenduid-of-two", b"APPEND", b"%s OK [APPENDUID 7 1:2] stored\r\n", lambda box: box.append("Sealed", MESSAGE)),
    ("list-of-nothing", b"LIST", b"* LIST\r\n%s OK done\r\n", lambda box: box.list_folders()),
    ("other-uidvalidity", b"NOOP", b"* OK [UIDVALIDITY 8] changed\r\n%s OK done\r\n", lambda box: box.noop()),
]


@pytest.mark.parametrize(("said", "answer", "action"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
async def test_a_server_that_cannot_be_followed_is_left(said: bytes, answer: bytes, action: Action) -> None:
    """Never another exception, never a wait, never an answer made of nonsense."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"SELECT")
        await script.send(b"* OK [UIDVALIDITY 7] x", b"* 3 EXISTS", tag + b" OK selected")
        tag = await script.until(said)
        await script.send_raw(answer.replace(b"%s", tag))
        await script.gone()

    async with scripted(play) as port, opened(port, max_message_bytes=2_000_000) as box:
        await box.select("INBOX")
        with pytest.raises(MailboxLost):
            await action(box)
        assert box.lost.is_set()


async def test_an_endless_line_and_endless_chatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server may make us hold is bounded, also in many small answers."""
    monkeypatch.setattr("malote.incoming.imap_frame.MAX_LINE", 100_000)

    async def long_line(script: Script) -> None:
        await script.begin(b"LIST")
        while True:
            await script.send_raw(b"* LIST () NIL " + b"x" * 10_000)

    async def many_lines(script: Script) -> None:
        await script.begin(b"LIST")
        while True:
            await script.send(b"* LIST () NIL " + b"x" * 10_000)

    for play in (long_line, many_lines):
        async with scripted(play) as port, opened(port) as box:
            with pytest.raises(MailboxLost, match=r"too long|larger than"):
                await box.list_folders()


@pytest.mark.parametrize("code", ["OVERQUOTA", "TRYCREATE", "LIMIT", "TOOBIG", "INUSE"])
async def test_refusals_keep_their_code_and_the_connection(code: str) -> None:
    """The receiver decides by the code whether to wait, to make the folder, or to tell somebody."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"APPEND")
        await script.read(len(MESSAGE) + 2)
        await script.send(tag + f" NO [{code}] \x1b[2J no".encode())
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        with pytest.raises(MailboxError) as caught:
            await box.append("Sealed", MESSAGE)
        assert caught.value.code == code
        assert not isinstance(caught.value, MailboxLost)
        assert str(caught.value).isprintable()
        await box.noop()


async def test_a_refused_literal_is_not_sent() -> None:
    """Without LITERAL+ the server may refuse before the message is sent; aioimaplib then sent it into the next command."""
    after: list[bytes] = []

    async def play(script: Script) -> None:
        tag = await script.begin(b"APPEND", "IMAP4rev1 UIDPLUS")
        await script.send(tag + b" NO [OVERQUOTA] full")
        tag = await script.until(b"NOOP")
        after.append(script.heard[-1])
        await script.send(tag + b" OK done")

    async with scripted(play) as port, opened(port) as box:
        with pytest.raises(MailboxError) as caught:
            await box.append("Sealed", MESSAGE)
        assert caught.value.code == "OVERQUOTA"
        await box.noop()
    assert after[0].endswith(b" NOOP")


async def test_a_refused_group_is_stored_one_by_one() -> None:
    """MULTIAPPEND is all or nothing; one message over the quota must not keep the others out, nor double them."""
    refused: list[int] = []

    async def play(script: Script) -> None:
        tag = await script.begin(b"APPEND", CAPABILITIES + " MULTIAPPEND")
        await script.read(len(MESSAGE))
        for _ in range(2):
            await script.line()
            await script.read(len(MESSAGE))
        await script.line()
        await script.send(tag + b" NO [OVERQUOTA] full")
        for number in range(3):
            tag = await script.until(b"APPEND")
            await script.read(len(MESSAGE) + 2)
            refused.append(number)
            await script.send(tag + (b" NO [OVERQUOTA] full" if number == 1 else b" OK [APPENDUID 7 %d] x" % (number + 10)))

    async with scripted(play) as port, opened(port) as box:
        outcomes = await box.append_many("Sealed", [(MESSAGE, (), None)] * 3)
    assert refused == [0, 1, 2]
    assert [outcomes[0], outcomes[2]] == [Appended(7, 10), Appended(7, 12)]
    assert isinstance(outcomes[1], MailboxError)
    assert outcomes[1].code == "OVERQUOTA"


async def test_fifty_thousand_uids_on_one_line_and_in_ranges() -> None:
    """A large mailbox answers SEARCH with hundreds of kilobytes, in pieces."""
    uids = list(range(1_000_000, 1_100_000, 2))

    async def play(script: Script) -> None:
        tag = await script.begin(b"SEARCH")
        line = b"* SEARCH " + b" ".join(b"%d" % uid for uid in uids) + b"\r\n"
        for start in range(0, len(line), 1000):
            await script.send_raw(line[start:start + 1000])
        await script.send(tag + b" OK done")
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        await box.select("INBOX")
        assert await box.search("ALL") == uids


async def test_answers_of_other_commands_and_clients_are_told_apart() -> None:
    """Flags changed by others, answers out of order and given twice: each message comes once, and is the one asked for."""
    async def play(script: Script) -> None:
        first = await script.begin(b"BODY.PEEK[]")
        second = await script.until(b"BODY.PEEK[]")
        item = b'FLAGS () INTERNALDATE "17-Jul-1996 02:44:25 -0700" BODY[] {1}\r\n'
        await script.send(b"* 1 FETCH (FLAGS (\\Seen))", b"* 9 FETCH (UID 99 " + item + b"9)",
                          b"* 2 FETCH (UID 2 " + item + b"2)", b"* 1 FETCH (UID 1 FLAGS (\\Seen))",
                          b"* 1 FETCH (UID 1 " + item + b"1)",
                          b"* 1 FETCH (UID 1 " + item + b"x)", second + b" OK done", b"* 5 EXISTS", first + b" OK done")
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        await box.select("INBOX")
        got = [(fetched.uid, fetched.raw) async for fetched in box.fetch_many([1, 2], sizes={1: 10, 2: 10}, batch_bytes=10)]
        assert got == [(1, b"1"), (2, b"2")]
        assert await box.idle(5)        # the EXISTS among the answers was not lost


async def test_still_here_is_no_news() -> None:
    """Servers keep NATs awake with an untagged OK during IDLE."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"IDLE")
        await script.send(b"+ idling", b"* OK Still here", b"* 1 FETCH (FLAGS (\\Seen))", b"* 0 RECENT")
        assert await script.line() == b"DONE"
        await script.send(tag + b" OK done")
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        await box.select("INBOX")
        assert not await box.idle(0.1)


@pytest.mark.parametrize(("answer", "code"), [
    (b"* OK [UIDNEXT 5] x", "NOUIDVALIDITY"),
    (b"* OK [UIDVALIDITY 5] x\r\n* NO [UIDNOTSTICKY] x", "UIDNOTSTICKY"),
])
async def test_folders_that_cannot_be_watched(answer: bytes, code: str) -> None:
    """Without lasting UIDs there is no telling what was seen."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"SELECT")
        await script.send(answer, tag + b" OK done")
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        with pytest.raises(MailboxError) as caught:
            await box.select("INBOX")
        assert caught.value.code == code


async def test_a_folder_without_keywords_and_read_only() -> None:
    """PERMANENTFLAGS without \\* means that our marks are not kept."""
    async def play(script: Script) -> None:
        tag = await script.begin(b"SELECT")
        await script.send(b"* OK [UIDVALIDITY 5] x", b"* OK [PERMANENTFLAGS (\\Seen)] x", tag + b" OK [READ-ONLY] done")
        await script.until(b"nothing")

    async with scripted(play) as port, opened(port) as box:
        selected = await box.select("INBOX")
        assert (selected.keywords, selected.read_only, selected.uidvalidity, selected.uidnext) == (False, True, 5, 0)


async def test_names_of_another_server() -> None:
    """Courier and Cyrus: a dot between levels, everything below INBOX; the configuration keeps its slash."""
    made: list[bytes] = []

    async def play(script: Script) -> None:
        await script.send(b"* OK hi")
        folders = [b'* LIST (\\HasChildren) "." INBOX', b'* LIST () "." INBOX.Spam', b'* LIST () "." "INBOX.Odd&Name"']
        while True:
            word = b"LIST" if not script.heard else b""
            tag = await script.until(word, "IMAP4rev1 NAMESPACE")
            rest = script.heard[-1].partition(b" ")[2]
            if rest.startswith(b"NAMESPACE"):
                await script.send(b'* NAMESPACE (("INBOX." ".")) NIL NIL', tag + b" OK done")
            elif rest == b'LIST "" ""':
                await script.send(b'* LIST (\\Noselect) "." ""', tag + b" OK done")
            elif rest.startswith(b"LIST"):
                await script.send(*folders, tag + b" OK done")
            elif rest.startswith(b"CREATE"):
                made.append(rest)
                folders.append(b'* LIST () "." ' + rest.removeprefix(b"CREATE "))
                await script.send(tag + b" OK done")
            elif rest.startswith(b"CAPABILITY"):
                await script.send(b"* CAPABILITY IMAP4rev1 NAMESPACE", tag + b" OK done")
            else:
                await script.send(tag + b" OK done")

    async with scripted(play) as port, opened(port) as box:
        junk = await box.resolve("\\Junk")
        assert junk is not None
        assert junk.wire == b"INBOX.Spam"
        sealed = await box.create_folder("Malote/Sealed")
        assert (sealed.name, made) == ("INBOX.Malote.Sealed", [b'CREATE "INBOX.Malote.Sealed"'])
        assert await box.resolve("Malote/Sealed") == await box.resolve("INBOX.Malote.Sealed") == sealed
        odd = await box.resolve("INBOX.Odd&Name")
        assert odd is not None
        assert odd.wire == b"INBOX.Odd&Name"        # not modified UTF-7, and still the name of a folder


ACTIONS = [action for said, action in PHASES if said != b"IDLE" and len(said) < 100]
SCRAPS = [b"* ", b"+ ", b"%s ", b"OK", b"NO", b"BAD", b" [", b"]", b"COPYUID 7 1 5", b"APPENDUID 7 5", b"1 FETCH (UID 1 ",
          b"FLAGS ()", b" INTERNALDATE \"17-Jul-1996 02:44:25 -0700\"", b" BODY[] {3}\r\nabc", b")", b"\r\n", b"\r\n",
          b"LIST () \"/\" Sent", b"{9}", b"3 EXISTS", b"SEARCH 1", b"\x00", b"\xff", b" ", b"BYE", b"BODYSTRUCTURE (",
          b"* OK x\r\n", b"%s OK x\r\n", b"+ x\r\n"]


@pytest.mark.parametrize("seed", range(20))
async def test_any_answers_end_in_a_value_or_in_one_of_two_errors(seed: int) -> None:
    """Whatever is sent back to whichever command, the caller gets a result, MailboxError or MailboxLost."""
    dice = random.Random(seed)

    async def play(script: Script) -> None:
        tag = await script.begin(b"SELECT")
        await script.send(b"* OK [UIDVALIDITY 7] x", b"* 3 EXISTS", tag + b" OK selected")
        while True:
            tag = (await script.line()).partition(b" ")[0]
            scraps = dice.choices(SCRAPS, k=dice.randrange(1, 12))
            await script.send_raw(b"".join(scraps).replace(b"%s", tag) + dice.choice([b"", b"\r\n", b"\r\n%s OK\r\n" % tag]))

    async with scripted(play) as port:
        for action in ACTIONS:
            async with opened(port, seconds=0.05) as box:
                await box.select("INBOX")
                try:
                    await asyncio.wait_for(action(box), 20)
                except MailboxError as error:
                    assert box.lost.is_set() or not isinstance(error, MailboxLost)      # noqa: PT017 - either is fine


def test_the_source_has_no_way_around_the_one_end() -> None:
    """The socket is closed in one place, so that no command is left waiting."""
    package = Path(__file__).parents[2] / "daemon" / "malote" / "incoming"
    aborts = [path.name for path in package.glob("imap_*.py") for line in path.read_text().splitlines()
              if "transport.abort()" in line]
    assert aborts == ["imap_protocol.py"]
