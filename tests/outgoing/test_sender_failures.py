"""The upstream server fails at every step of every transaction, and our own parts fail anywhere: 250 is never said for what was
not accepted, nothing is sent twice, and nothing plain leaves that was to be sealed."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from malote.config import LimitsConfig, RuleConfig
from malote.core import blob as core_blob
from malote.core import seal as core_seal
from malote.core.card import Card
from malote.core.keys import SigningKey
from malote.core.policy import Policy
from malote.errors import StoreUnavailable
from malote.outgoing import copies, deciding, delivery, sender, submission
from malote.outgoing.delivery import Delivery
from malote.outgoing.directory import CardFinder
from malote.outgoing.inflight import InFlight
from malote.outgoing.transaction import Transaction
from malote.smtp.connection import UpstreamConnection
from malote.smtp.pool import Pool
from malote.smtp.relay import Upstream as Relay
from malote.store import Store
from outgoing.harness import Answer, Gateway, Upstream, opened, person, text, upstream_config, verdict

ALICE, BOB, CAROL, DAVE, EVE = (person(f"{name}@test.example") for name in ("alice", "bob", "carol", "dave", "eve"))
PEOPLE = {each.address: each for each in (BOB, CAROL, DAVE, EVE)}
MESSAGE = text(cc="carol@test.example")         # dave and eve are Bcc: three copies
STEPS = ("CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "BODY", "DOT", "DOT!", "RSET")
FAILURES: tuple[Answer, ...] = ("421 4.3.0 going down", "451 4.0.0 not now", "550 5.0.0 never", None)


def gateway(directory: Path, server: Upstream, **more: Any) -> Gateway:
    return Gateway(directory, upstream_config(server.port), **({"cards": tuple(PEOPLE.values())} | more))


def failing(step: str, number: int, answer: Answer) -> Callable[[str, str, int], Answer | bool]:
    return lambda at, argument, count: answer if (at, count) == (step, number) else False


def served(upstream: Upstream) -> Counter[str]:
    return Counter(address for message in upstream.messages for address in message.recipients)


async def fresh_for(directory: Path, upstream: Upstream) -> dict[str, list[str]]:
    """The verdicts that each recipient's malote gives, message by message in the order of arrival."""
    store = await Store.open(directory)
    try:
        return {address: [await verdict(store, message.content, PEOPLE[address], ALICE)
                          for message in upstream.messages if address in message.recipients]
                for address in served(upstream)}
    finally:
        await store.close()


@pytest.mark.parametrize(("step", "number", "answer"), [
    pytest.param(step, number, answer, id=f"{step}-{number}-{str(answer)[:3]}",
                 marks=pytest.mark.long if str(answer)[:3] == "421" and number > 2 else ())
    for step in STEPS for answer in FAILURES
    for number in range(1, {"MAIL": 5, "RCPT": 9, "DATA": 4, "BODY": 4, "DOT": 4, "DOT!": 4}.get(step, 3))
    if not (step == "DOT!" and str(answer)[0] == "5")])     # who keeps what it refuses for good cannot be known
async def test_one_failure_anywhere_and_a_retry(tmp_path: Path, step: str, number: int, answer: Answer) -> None:
    """Four recipients, three copies; one step goes wrong; the client comes again if it is told to."""
    async with Upstream(failing(step, number, answer)) as upstream, gateway(tmp_path / "gw", upstream) as gw:
        done = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, polite=False)
        accepted = {address for address, reply in done.rcpts.items() if reply.startswith("250")}
        temporary = done.code // 100 == 4 or any(reply[0] == "4" for reply in done.rcpts.values())
        if done.code == 250:
            assert set(served(upstream)) == accepted, "250 is for everybody who was accepted at RCPT"
        if done.code == 554 and "NOT sent to" in done.data:
            named = re.search(r"Sent to (.*)\n", done.data)
            assert named is not None
            assert set(named[1].split(", ")) == set(served(upstream))
        if temporary:
            upstream.script = None
            rest = [address for address in PEOPLE if done.code != 250 or done.rcpts[address][0] == "4"]
            again = await gw.submit(ALICE.address, rest, MESSAGE, polite=False)
            assert again.code == 250
            assert set(served(upstream)) == set(PEOPLE)
    # what was refused or not confirmed by a server that had accepted it may come twice, and is then seen to be the same
    for verdicts in (await fresh_for(tmp_path / "receivers", upstream)).values():
        assert verdicts == ["FRESH"] + ["DUPLICATE"] * (len(verdicts) - 1)
        if len(verdicts) > 1:
            assert step == "DOT!", "doubled though the server never had it unconfirmed"
    assert b"the secret" not in upstream.wire


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("answer", FAILURES, ids=str)
async def test_a_failure_in_the_middle_of_a_large_body(tmp_path: Path, answer: Answer, number: int) -> None:
    """Much of the text is still to be written: what the server has is no message, and nobody has one twice."""
    content = text(cc="carol@test.example", body="the secret text of many lines, and nothing else\r\n" * 20_000)
    async with Upstream(failing("BODY", number, answer)) as upstream, gateway(tmp_path / "gw", upstream) as gw:
        done = await gw.submit(ALICE.address, list(PEOPLE), content, polite=False)
        assert done.code == (554 if str(answer)[0] == "5" else 451), done
        if done.code == 451:
            assert (await gw.submit(ALICE.address, list(PEOPLE), content, polite=False)).code == 250
            assert served(upstream) == dict.fromkeys(PEOPLE, 1)
    assert set(served(upstream).values()) == {1}
    assert b"the secret" not in upstream.wire


@pytest.mark.parametrize("answer", ["451 4.0.0 not now", "550 5.1.1 no such user"])
async def test_a_refusal_at_rcpt_reaches_the_client_as_it_is(tmp_path: Path, answer: str) -> None:
    async with Upstream(failing("RCPT", 2, answer)) as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address, CAROL.address], MESSAGE)
    assert done.rcpts == {BOB.address: "250 2.1.5 recipient fine", CAROL.address: answer}
    assert done.code == 250
    assert served(upstream) == {BOB.address: 1}


async def test_a_refusal_at_data_reaches_the_client_as_it_is(tmp_path: Path) -> None:
    for number, answer in enumerate(("552 5.2.2 over quota", "452 4.2.2 busy")):
        async with Upstream(failing("DOT", 1, answer)) as upstream, gateway(tmp_path / str(number), upstream) as gw:
            assert (await gw.submit(ALICE.address, [BOB.address], text())).data == answer


async def test_an_upstream_that_cannot_be_reached_is_temporary_for_each_recipient(tmp_path: Path) -> None:
    async with Upstream() as upstream:
        config = upstream_config(upstream.port)
    async with Gateway(tmp_path, config, cards=(BOB,)) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).data.startswith("451 4.4.1")


async def test_an_upstream_that_does_not_answer_in_time_leaves_it_in_doubt(tmp_path: Path) -> None:
    limits = LimitsConfig(reply_within_seconds=0.5)
    async with Upstream(failing("DOT!", 1, "")) as upstream, gateway(tmp_path / "gw", upstream, limits=limits) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], text())
        assert done.data.startswith("451 4.4.2")
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
    assert await fresh_for(tmp_path / "bob", upstream) == {BOB.address: ["FRESH", "DUPLICATE"]}


async def test_the_time_for_a_reply_bounds_all_copies_together(tmp_path: Path) -> None:
    limits = LimitsConfig(reply_within_seconds=0.5)

    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "" if step == "DATA" and number > 1 else False
    async with Upstream(script) as upstream, gateway(tmp_path / "gw", upstream, limits=limits) as gw:
        done = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, polite=False)
        assert done.data.startswith("451 4.3.0 Accepted for")
        upstream.script = None
        assert (await gw.submit(ALICE.address, list(PEOPLE), MESSAGE)).code == 250
    assert served(upstream) == dict.fromkeys(PEOPLE, 1), "nobody twice"


async def test_a_relay_tells_the_sender_by_mail_and_only_then_says_250(tmp_path: Path) -> None:
    refuse: list[str] = ["dave"]

    def script(step: str, argument: str, number: int) -> Answer | bool:
        lost = any(name in argument for name in refuse)
        return "550 5.1.1 gone" if step == "RCPT" and lost and number > 4 else False
    config = {"partial_failure": "relay"}
    async with Upstream(script) as upstream, gateway(tmp_path, upstream, config=config) as gw:
        done = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, mail=["ENVID=QQ1"])
        assert done.data == "250 2.0.0 Accepted for 3 recipients, the sender is notified of 1 refused"
        notice = upstream.messages[-1]
        assert (notice.sender, notice.recipients) == ("", [ALICE.address])
        for wanted in (b"multipart/report", b"Final-Recipient: rfc822; dave@test.example", b"550 5.1.1 gone", b"Subject: [...]",
                       b"Original-Envelope-Id: QQ1"):
            assert wanted in notice.content
        assert b"secret" not in upstream.wire
        assert b"one@test.example" not in upstream.wire

        upstream.steps.clear()
        refuse.append("MAIL FROM:<>")       # now the notification cannot be sent
        upstream.script = lambda step, argument, number: (
            "451 4.0.0 no" if step == "MAIL" and "<>" in argument else script(step, argument, number))
        second = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE.replace(b"<one@", b"<two@"))
        assert second.code == 451


async def test_no_notification_of_a_notification(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "550 5.1.1 gone" if step == "RCPT" and "dave" in argument and number > 4 else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream, config={"partial_failure": "relay"}) as gw:
        done = await gw.submit("", list(PEOPLE), MESSAGE)
        assert done.code == 554
        assert "NOT sent to dave" in done.data
    assert len(upstream.messages) == 2, "no message more than the two copies"


async def test_who_asked_not_to_be_notified_is_not(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "550 5.1.1 gone" if step == "RCPT" and "dave" in argument and number > 4 else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream, config={"partial_failure": "relay"}) as gw:
        done = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, rcpt={DAVE.address: ["NOTIFY=NEVER"]})
    assert done.code == 250
    assert all(message.sender for message in upstream.messages)


# ---- given up in the middle


@types.coroutine
def given_up(work: Coroutine[Any, Any, Any], at: int, cut: list[int]) -> Generator[Any, Any, Any]:
    """As the task of `work` that is cancelled when it goes on for the `at`th time. `cut`: gets the number if it came to that."""
    for step in itertools.count():
        try:
            if step == at:
                cut.append(at)
                waits_for = work.throw(asyncio.CancelledError())
            else:
                waits_for = work.send(None)
        except StopIteration as done:
            return done.value
        yield waits_for


async def test_given_up_at_any_moment(tmp_path: Path) -> None:
    """A message for four, one of them refused after the others were served, so that the sender is told: cancelled wherever it
    waits. The client comes again; nobody has it as two messages, nothing leaves in clear, and there is one notification."""
    for at in itertools.count():
        cut: list[int] = []
        first = True

        def script(step: str, argument: str, number: int) -> Answer | bool:
            mine = 4 if first else 4 + upstream.before  # type: ignore[attr-defined]  # noqa: B023
            return "550 5.1.1 gone" if step == "RCPT" and "dave" in argument and number > mine else False
        async with Upstream(script) as upstream, gateway(
                tmp_path / f"gw{at}", upstream, config={"partial_failure": "relay"}) as gw:
            real = gw.desk.data

            async def data(*arguments: Any) -> Any:
                return await given_up(real(*arguments), at, cut)  # noqa: B023
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(gw.desk, "data", data)
                done = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, polite=False)
            first, upstream.before = False, upstream.steps.count("RCPT")  # type: ignore[attr-defined]
            assert done.code == (451 if cut else 250)
            again = await gw.submit(ALICE.address, list(PEOPLE), MESSAGE, polite=False)
            assert again.code == 250, at
        told = {match[1] for message in upstream.messages
                if not message.sender and (match := re.search(rb"Message-ID: (\S+)", message.content)) is not None}
        assert len(told) == 1, at
        upstream.messages = [message for message in upstream.messages if message.sender]
        assert set(served(upstream)) == set(PEOPLE) - {DAVE.address}
        for verdicts in (await fresh_for(tmp_path / f"receivers{at}", upstream)).values():
            assert verdicts == ["FRESH"] + ["DUPLICATE"] * (len(verdicts) - 1)
        assert b"the secret" not in upstream.wire
        if not cut:
            assert at > 8
            break


# ---- our own parts fail

class Broken(Exception):
    """Nothing of ours: what a bug or a full memory would raise."""


RULES = (RuleConfig(subjects=("*secret*",), seal="require"), RuleConfig(seal="require"))

PLACES: list[tuple[Any, str]] = [
    (CardFinder, "find"), (Store, "cards"), (Store, "had_card"), (Store, "begin_send"), (Store, "begin_plain"),
    (Store, "finish_send"),
    (Store, "finish_send_later"), (Store, "local_key"), (Store, "known_messages"), (Store, "remember_outer_id"),
    (Store, "log_outcome"),
    (submission, "prepare"), (submission, "complete"), (Policy, "decide_recipient"), (Policy, "decide_message"),
    (deciding, "decide_encrypted"),
    (deciding, "decide_refusal"), (deciding, "read_content"), (deciding, "decide_signer"), (submission, "group_members"),
    (submission, "hmac_sha256"), (deciding, "threading_ids"), (submission, "decide_answer"), (submission, "received_line"),
    (copies, "seal"), (copies, "outer_headers"), (delivery, "make_copy"), (delivery, "mail_params"),
    (delivery, "same_transaction"), (Relay, "begin"), (Relay, "release"), (UpstreamConnection, "mail"),
    (UpstreamConnection, "rcpt"), (UpstreamConnection, "data"), (UpstreamConnection, "rset"),
    (Pool, "acquire"), (Pool, "unpark"), (Pool, "release"), (Delivery, "run"), (Delivery, "_settle"),
    (InFlight, "take"), (Transaction, "rcpt"), (Transaction, "end"), (Transaction, "hold"), (sender, "canonical_address"),
    (delivery, "outcome_of"), (core_seal, "serialize_manifest"), (core_seal, "read_inner"), (core_blob, "wrap_session_key"),
    (SigningKey, "sign"), (Card, "encryption_key"),
]


@given(place=st.sampled_from(PLACES), error=st.sampled_from([Broken, StoreUnavailable, MemoryError, OSError, KeyError]),
       call=st.integers(1, 3), many=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=90)
def test_whatever_breaks_nothing_plain_leaves_and_250_is_true(
        tmp_path_factory: pytest.TempPathFactory, place: tuple[Any, str], error: type[Exception], call: int, many: bool) -> None:
    """Rules say sealed. Any exception from any collaborator, at its first, second or third call: the bytes at the upstream server
    never hold the text, and 250 means that everybody was served."""
    asyncio.run(_break(tmp_path_factory.mktemp("fault"), place, error, call, many))


async def _break(directory: Path, place: tuple[Any, str], error: type[Exception], call: int, many: bool) -> None:
    where, name = place
    real = getattr(where, name)
    calls = 0

    def broken(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error("marker of the inside")
        return real(*args, **options)

    async def broken_async(*args: Any, **options: Any) -> Any:
        return await broken(*args, **options)
    recipients = list(PEOPLE) if many else [BOB.address]
    content = text(cc="carol@test.example", in_reply_to="<zero@test.example>")
    async with Upstream() as upstream, gateway(directory, upstream, config={"rules": RULES}) as gw:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, broken_async if inspect.iscoroutinefunction(real) else broken)
            done = await gw.submit(ALICE.address, recipients, content, polite=False)
        assert "marker" not in done.data + str(done.rcpts)
        assert b"the secret" not in upstream.wire
        accepted = {address for address, reply in done.rcpts.items() if reply.startswith("250")}
        if done.code == 250:
            assert set(served(upstream)) == accepted
        else:
            assert done.code // 100 == 4, "unknown means temporary"
        again = await gw.submit(ALICE.address, recipients, content, polite=False)
        assert again.code == 250, "and it recovers"
        assert set(served(upstream)) == set(recipients)
    for address in recipients:
        messages = [message for message in upstream.messages if address in message.recipients]
        ids = {(got.manifest.id, got.manifest.sha512) for message in messages
               for got in [opened(message.content, PEOPLE[address], ALICE)]}
        if len(messages) > 1 and len(ids) > 1:
            assert done.code == 250, "sent twice as two messages though the client was told to come again"
