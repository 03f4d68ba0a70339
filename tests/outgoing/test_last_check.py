"""Whatever goes wrong inside, nothing plain leaves that was to be sealed: faults everywhere, a server that keeps every byte."""

from __future__ import annotations

import ast
import asyncio
import base64
import gc
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from malote.config import Level, LimitsConfig, RuleConfig
from malote.core.identity import parse_identity, serialize_identity
from malote.core.policy import Action, Decision
from malote.core.seal import SealedMessage
from malote.errors import NotProven
from malote.outgoing import clearance, copies, deciding, delivery, submission
from malote.outgoing.clearance import Clearance
from malote.outgoing.delivery import Delivery
from malote.outgoing.directory import CardFinder
from malote.outgoing.groups import Group, Kind
from malote.outgoing.transaction import Recipient
from malote.store.records import OutcomeEntry
from outgoing.faults import apply, forget, label_of, places, twists, used
from outgoing.harness import REQUIRE, ROOT, Gateway, Script, Upstream, person, text, upstream_config

ALICE, BOB, CAROL, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "carol", "dave"))
SECRET = "the secret text of this mail, and more of it in a second line"
MESSAGE = text(cc="carol@test.example", body=f"{SECRET}\r\n.{SECRET}\r\n", in_reply_to="<zero@test.example>",
               received="from pc by mx.test.example with ESMTP id 1 for <bob@test.example>; Mon, 23 Nov 2026 10:00:00 +0000")


def seen(wire: bytes | bytearray) -> list[str]:
    """What of the secret can be read in these bytes, as it is or in base64."""
    marks = {word: word.encode() for word in ("secret", "second line")}
    for shift in range(3):
        plain = b"x" * shift + b"the secret text of this mail"
        marks[f"base64 {shift}"] = base64.b64encode(plain)[4:24]
    flat = bytes(wire).replace(b"\r\n", b"")
    return [name for name, mark in marks.items() if mark in flat or mark in wire]


async def say(gw: Gateway, recipients: tuple[str, ...], content: bytes = MESSAGE) -> str:
    """One message over one connection, and everything that the server said. Gives up when it does not answer."""
    heard = bytearray()
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    try:
        lines = [b"EHLO client", b"MAIL FROM:<alice@test.example>", *(f"RCPT TO:<{each}>".encode() for each in recipients),
                 b"DATA", content.replace(b"\r\n.", b"\r\n..") + b".", b"QUIT"]
        heard += await reader.readline()
        for line in lines:
            writer.write(line + b"\r\n")
            while True:
                answer = await reader.readline()
                heard += answer
                if answer[3:4] != b"-":
                    break
            if not answer or (line == b"DATA" and not answer.startswith(b"354")):
                break
    finally:
        writer.close()
    return heard.decode()


# What decides. A fault that decides otherwise, and rightly in form, is another policy: no check after it can know.
DECIDES = ("malote.core.policy.", "malote.core.rules.", "malote.outgoing.offline.")
# What the next server said stands in a notice as it was (docs/threat-model.md 7.1).
THEIR_WORDS = ("malote.smtp.replies.", "malote.outgoing.delivery.outcome_of", "malote.outgoing.notice._reason")
# A reader that always says that it read something reads for ever; a server that cannot speak cannot close. Nothing leaves there.
NO_END = ("malote.core.address._Reader.", "malote.smtp.wire.encode_reply")
TWISTS = twists(MESSAGE, SECRET)
LIMITS = LimitsConfig(reply_within_seconds=0.7)
TO = ("bob@test.example", "carol@test.example", "dave@test.example")


@asynccontextmanager
async def gateway(directory: Path, upstream: Upstream, **more: Any) -> AsyncIterator[Gateway]:
    """With keys of its own: what they remember must not be a fault of another test."""
    alice = parse_identity(serialize_identity(ALICE))
    config = {"rules": REQUIRE, "partial_failure": "relay"} | more
    async with Gateway(directory, upstream_config(upstream.port), config=config, cards=(BOB, CAROL, DAVE), limits=LIMITS,
                       identities={alice.address: alice}) as gw:
        yield gw


async def say_all(gw: Gateway, number: int) -> str:
    content = MESSAGE.replace(b"<one@", b"<%d@" % number)
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(1):
            return await say(gw, TO, content)
    return ""


def refuse_every_other() -> Script:
    """Dave, when his own copy comes, after he was accepted: so the sender is notified."""
    asked = itertools.count()
    return lambda step, argument, number: (
        "550 5.1.1 no" if step == "RCPT" and "dave" in argument and next(asked) % 2 else False)


async def with_faults(directory: Path, place: tuple[Any, str], kinds: Iterable[str]) -> None:
    with capture_logs():        # showing a traceback takes a hundred times as long as sending a message
        await _with_faults(directory, place, kinds)


async def _with_faults(directory: Path, place: tuple[Any, str], kinds: Iterable[str]) -> None:
    async with Upstream(refuse_every_other()) as upstream, gateway(directory, upstream) as gw:
        for number, kind in enumerate(kinds):
            forget()
            with pytest.MonkeyPatch.context() as patch:
                apply(patch, place, TWISTS[kind])
                heard = await say_all(gw, number)
            assert "mind of the program" not in heard
            assert not seen(upstream.wire), f"{label_of(place)}: {kind}"


@lru_cache
def chain() -> list[tuple[Any, str]]:
    """Every function that a message to three recipients comes by, with one that is refused."""
    async def run() -> None:
        async with Upstream(refuse_every_other()) as upstream:
            with TemporaryDirectory() as directory:
                async with gateway(Path(directory), upstream) as gw:
                    await say_all(gw, 0)
    return used(places(*DECIDES, *THEIR_WORDS, *NO_END), lambda: asyncio.run(run()))


# what falls over in the middle does not tidy up: tasks, sockets
UNTIDY = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@UNTIDY
@given(st.data())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answer_of_any_function_and_nothing_plain_leaves(
        tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A function that the message comes by, from the hands of the client's server to the socket of the next: it raises, gives
    nothing, gives the original, or gives what it should with the original somewhere inside."""
    inner = [place for place in chain() if not label_of(place).startswith("malote.smtp.") or "smtp.connection" in label_of(place)]
    place = data.draw(st.sampled_from(inner), label="place")
    kinds = data.draw(st.lists(st.sampled_from(sorted(TWISTS)), min_size=5, max_size=5, unique=True), label="kinds")
    asyncio.run(with_faults(tmp_path_factory.mktemp("fault") / "store", place, kinds))
    gc.collect()        # here, where it is expected


@UNTIDY
@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_every_answer_of_every_function(tmp_path: Path, part: int) -> None:
    for number, place in enumerate(chain()[part::20]):
        asyncio.run(with_faults(tmp_path / str(number), place, TWISTS))
    gc.collect()


@UNTIDY
def test_without_the_check_these_faults_leak(tmp_path: Path) -> None:
    """So the two tests above would see it."""
    def wave_through(letter: copies.Letter, group: Group, copy: copies.Copy) -> Clearance:
        raw = copy.raw if isinstance(copy.raw, bytes) else b""
        return Clearance(raw, True, False, "", tuple(letter.recipients[each] for each in group.addresses))

    for place, kind in (((copies, "seal"), "all of it"), ((submission, "received_line"), "original")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delivery, "clear", wave_through)
            patch.setattr(Clearance, "check", lambda *_: None)
            with pytest.raises(AssertionError, match=kind):
                asyncio.run(with_faults(tmp_path / kind, place, [kind]))
    gc.collect()


# --- what is stopped, and how


async def stopped(tmp_path: Path, patch: Callable[[pytest.MonkeyPatch], None]) -> tuple[str, list[OutcomeEntry], Upstream]:
    """What the client heard, what `malote log` shows, what the server got. The next message, without the fault, goes through."""
    async with Upstream() as upstream, gateway(tmp_path / "store", upstream) as gw:
        with pytest.MonkeyPatch.context() as fault:
            patch(fault)
            heard = await say_all(gw, 1)
        forget()
        await gw.store.flush()
        outcomes = await gw.store.recent_outcomes(1)
        assert not seen(upstream.wire)
        again = await say_all(gw, 1)
        assert "250 2.0.0 queued" in again or "250 2.0.0 Accepted for 3" in again, "the client comes again"
        return heard, outcomes, upstream


async def test_it_is_temporary_said_loud_and_without_a_word_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    def seal_nothing(original: bytes, **_: Any) -> SealedMessage:
        return SealedMessage(original, bytearray(original), b"")
    heard, outcomes, upstream = await stopped(tmp_path, lambda patch: patch.setattr(copies, "seal", seal_nothing))
    assert "451 4.3.0 The message failed the last check before sending, nothing was sent, try again later" in heard
    assert [(entry.outcome, entry.detail) for entry in outcomes] == [("stopped", "451 by the last check: Received")]
    logged = caplog.text + capsys.readouterr().out
    assert "stopped by the last check" in logged
    assert "error" in logged
    assert "secret" not in logged
    assert Counter(each for message in upstream.messages for each in message.recipients) == dict.fromkeys(TO, 1)


def change_after(name: str, change: Callable[[Recipient], None]) -> Callable[[pytest.MonkeyPatch], None]:
    """Something changes the recipients between the making of a copy and its sending."""
    def patch(fault: pytest.MonkeyPatch) -> None:
        real = getattr(Delivery, name)

        async def first(self: Delivery, *args: Any) -> Any:
            for recipient in self.letter.recipients.values():
                change(recipient)
            return await real(self, *args)
        fault.setattr(Delivery, name, first)
    return patch


PLAIN = RuleConfig(seal="never")


@pytest.mark.parametrize("field", ["action", "decision"])
async def test_plain_text_is_for_those_alone_for_whom_it_was_decided_at_the_last_moment(tmp_path: Path, field: str) -> None:
    def change(recipient: Recipient) -> None:
        sealed = Action.SEAL if field == "action" else replace(recipient.decision, action=Action.SEAL)
        setattr(recipient, field, sealed)
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules=(PLAIN,)) as gw:
        with pytest.MonkeyPatch.context() as fault:
            change_after("_data", change)(fault)
            assert "451 4.3.0 The message failed the last check" in await say_all(gw, 1)
        assert not upstream.messages
        assert not seen(upstream.wire)
        assert "250 2.0.0" in await say_all(gw, 2), "and without the fault it is sent, in clear"
        assert SECRET.encode() in upstream.wire


async def test_plain_copies_for_those_who_get_it_sealed_are_not_even_made(tmp_path: Path) -> None:
    def all_plain(members: Any, shown: Any, **_: Any) -> tuple[Group, ...]:
        return (Group(Kind.PLAIN, tuple(member.address for member in members)),)
    heard, *_ = await stopped(tmp_path, lambda patch: patch.setattr(submission, "group_members", all_plain))
    assert "451 4.3.0" in heard


async def test_a_sealed_copy_goes_to_nobody_else(tmp_path: Path) -> None:
    """Also not where the server was told of one recipient too many."""
    def also_dave(fault: pytest.MonkeyPatch) -> None:
        real = Clearance.check
        fault.setattr(Clearance, "check", lambda self, content, paths: real(self, content, [*paths, "eve@test.example"]))
    heard, outcomes, _ = await stopped(tmp_path, also_dave)
    assert "451 4.3.0 The message failed the last check" in heard
    assert outcomes[0].detail == "451 by the last check: recipients who are not of this copy"


async def test_nobody_gets_what_is_sealed_to_somebody_elses_key(tmp_path: Path) -> None:
    """Cards that were mixed up: what leaves then could be opened by the wrong person, and not by the right one."""
    def mixed_up(fault: pytest.MonkeyPatch) -> None:
        real = CardFinder.find

        async def find(self: CardFinder, address: str, now_ms: int) -> Any:
            return await real(self, DAVE.address if address == BOB.address else address, now_ms)
        fault.setattr(CardFinder, "find", find)
    heard, outcomes, _ = await stopped(tmp_path, mixed_up)
    assert "451 4.3.0" in heard
    assert outcomes[0].detail == "451 by the last check: somebody else's card"


@pytest.mark.parametrize("answer", ["malote", "openpgp", "smime"])
async def test_who_says_that_text_is_encrypted_is_not_believed(tmp_path: Path, answer: str) -> None:
    """The one wrong answer about content that would let a required message leave as it is."""
    rules = (RuleConfig(seal="require", accept_encrypted=True),)
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules=rules) as gw:
        with pytest.MonkeyPatch.context() as fault:
            fault.setattr(deciding, "decide_encrypted", lambda _: answer)
            assert "451 4.3.0 The message failed the last check" in await say_all(gw, 1)
        assert not seen(upstream.wire)


def test_recipients_who_may_not_know_of_each_other_share_no_copy() -> None:
    """Bcc: whoever is not shown in To and Cc is alone in his copy, unless a rule says that he is of a list."""
    letter = copies.Letter(
        original=MESSAGE, message_id="", sender_address=ALICE.address, identity=None, recipients={}, rows={}, submission_id=b"",
        sent_at_ms=0, received=b"", known_outer_ids={}, fold=True, shown=frozenset({"bob@test.example"}))
    async def check() -> None:
        decision = decided(Level.REQUIRE, Action.SEAL)
        letter.recipients = {
            each.address: Recipient(each.address, each.address, {}, each.card, True, decision, action=Action.SEAL)
            for each in (BOB, DAVE)}
        with pytest.raises(NotProven, match="know of each other"):
            clearance.clear(letter, Group(Kind.VISIBLE, tuple(letter.recipients)), copies.Copy(b"", sealed=True))
    asyncio.run(check())


def decided(level: Level, action: Action, *, covered: bool = False) -> Decision:
    return Decision("x@test.example", action, level, None, "", "refuse", accept_encrypted=False, list=False, covered=covered)


@pytest.mark.parametrize(("decision", "may"), [
    (decided(Level.NEVER, Action.PLAIN), True), (decided(Level.PREFER, Action.PLAIN), True),
    (decided(Level.REQUIRE, Action.PLAIN), False), (decided(Level.NEVER, Action.SEAL), False),
    (decided(Level.NEVER, Action.REFUSE), False),
], ids=lambda value: f"{value.level} {value.action}" if isinstance(value, Decision) else "")
async def test_a_decision_that_contradicts_itself_is_none(decision: Decision, may: bool) -> None:
    recipient = Recipient("x@test.example", "x@test.example", {}, None, False, decision, action=Action.PLAIN)
    cleared = Clearance(b"", False, False, "", (recipient,))
    if may:
        cleared.check(b"", ["x@test.example"])
    else:
        with pytest.raises(NotProven):
            cleared.check(b"", ["x@test.example"])


async def test_what_was_looked_at_is_what_is_written_and_to_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes are not enough where they were sealed; a notice is for the sender; who says encrypted means these bytes."""
    required = decided(Level.REQUIRE, Action.SEAL)
    sealed = Recipient("x@test.example", "x@test.example", {}, None, False, required, action=Action.SEAL)
    with pytest.raises(NotProven, match="looked at"):
        Clearance(b"sealed", True, False, "", (sealed,)).check(bytearray(b"sealed"), ["x@test.example"])
    covered = replace(sealed, action=Action.PLAIN, decision=decided(Level.REQUIRE, Action.PLAIN, covered=True))
    letter = copies.Letter(
        original=MESSAGE, message_id="", sender_address=ALICE.address, identity=None, recipients={covered.address: covered},
        rows={}, submission_id=b"", sent_at_ms=0, received=b"", known_outer_ids={}, fold=True, shown=frozenset())
    monkeypatch.setattr(clearance, "check_covered", lambda _: None)
    group = Group(Kind.PLAIN, (covered.address,))
    clearance.clear(letter, group, copies.Copy(MESSAGE, sealed=False))
    with pytest.raises(NotProven, match="that are encrypted"):
        clearance.clear(letter, group, copies.Copy(MESSAGE + b"x", sealed=False))
    with pytest.raises(NotProven, match="somebody else"):
        clearance.NoticeClearance(letter, ALICE.address).check(b"", [BOB.address])


def test_nothing_is_given_to_the_server_without_the_gate() -> None:
    """Every call that hands over a message, on this side of the program, says what is to be asked first."""
    calls = [
        (path.name, call)
        for path in (ROOT / "daemon/malote/outgoing").glob("*.py") for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "data"
    ]
    assert calls
    for name, call in calls:
        assert any(keyword.arg == "gate" for keyword in call.keywords), name
