"""Notifications of a relay about recipients refused for good (RFC 3461, 3464, 6522, 6533): when there is one, what is in it, and
that no loop comes of it. Each is read by a strict parser of its own, and by real servers."""

from __future__ import annotations

import asyncio
import json
import re
import smtplib
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.incoming import limited
from lab.report import read_report
from lab.servers import Lab
from malote.audit import AuditLog
from malote.config import AuditConfig, RuleConfig
from malote.errors import Reply
from malote.outgoing import notify, submission
from malote.outgoing.notice import Refused, make_notice
from malote.outgoing.recorder import Recorder
from outgoing.harness import HOST, Answer, Gateway, Script, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL, DAVE = (person(f"{name}@test.example") for name in ("alice", "bob", "carol", "dave"))
EVERYBODY = [BOB.address, CAROL.address, DAVE.address]
MESSAGE = text(cc="carol@test.example")         # dave is Bcc: a copy of his own, refused below
GONE = "550 5.1.1 gone"


def relay(directory: Path, server: Upstream, *, rules: tuple[RuleConfig, ...] = (), **more: Any) -> Gateway:
    protocol = more.pop("protocol", "smtp")
    return Gateway(directory, upstream_config(server.port, protocol=protocol),
                   config={"partial_failure": "relay", "rules": rules}, **({"cards": (BOB, CAROL, DAVE)} | more))


def without_dave(count: int = 3) -> Script:
    """Refuses dave, but not yet at the client's own RCPT."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return GONE if step == "RCPT" and "dave" in argument and number > count else False
    return script


def notices(upstream: Upstream) -> list[bytes]:
    return [message.content for message in upstream.messages if b"multipart/report" in message.content]


# ---- what is in it

ANY_TEXT = st.text(max_size=80)
XTEXT = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7e, exclude_characters="+="), min_size=1, max_size=40).flatmap(
    lambda plain: st.sampled_from([plain, f"{plain}+0D+0AStatus:+202.0.0", "+0D+0A+0D+0A--=_mlt", f"+00{plain}", f"{plain}+2B"]))
ADDRESSES = st.sampled_from(
    ["no@b.example", '"a b"@b.example', "jos\u00e9@b.example", "a+b=c\\d\u00e9@b.example", "\u7528@\u4f8b.example"])
ORCPTS = st.one_of(st.just(""), XTEXT.map("rfc822;".__add__),
                   st.sampled_from(["utf-8;jos\\x{E9}@b.example", "utf-8;jos\u00e9@b.example"]))
REMOTES = st.sampled_from(["", "mx.b.example", "127.0.0.1", "::1"])
REPLIES = st.builds(Reply, st.integers(500, 599), st.sampled_from(["", "5.1.1", "4.0.0"]), ANY_TEXT)


@given(st.lists(st.builds(Refused, ADDRESSES, REPLIES, ORCPTS, REMOTES), min_size=1, max_size=5), XTEXT)
def test_whatever_client_and_server_said_it_is_a_report_as_the_standard_has_it(
        refused: list[Refused], envelope_id: str) -> None:
    """Replies of hostile servers, ENVID and ORCPT of hostile clients: no field, part or boundary comes of them."""
    report = read_report(make_notice(
        refused, sender="alice@a.example", host="gw.example", outer_headers=b"From: alice@a.example\r\n",
        envelope_id=envelope_id, token="ab" * 16, arrived_ms=1_795_392_000_000, now_ms=1_795_392_000_000))
    assert len(report.recipients) == len(refused)
    assert report.per_message.keys() == {"original-envelope-id", "reporting-mta", "arrival-date"}
    for item, fields in zip(refused, report.recipients, strict=True):
        assert ("original-recipient" in fields) == bool(item.original_recipient)


async def test_envid_orcpt_and_notify_are_honoured_and_ret_brings_no_text(tmp_path: Path) -> None:
    rcpt = {DAVE.address: ["NOTIFY=FAILURE,DELAY", "ORCPT=rfc822;D+2Bave@Test.Example"]}
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, EVERYBODY, MESSAGE, mail=["RET=FULL", "ENVID=Q+3DQ"], rcpt=rcpt)
        assert done.data == "250 2.0.0 Accepted for 2 recipients, the sender is notified of 1 refused"
    notice = upstream.messages[-1]
    assert (notice.sender, notice.recipients) == ("", [ALICE.address])
    assert "RET=" not in notice.mail, "RFC 3461 6.1"
    assert "ENVID=" not in notice.mail
    assert notice.rcpts == ["RCPT TO:<alice@test.example> NOTIFY=NEVER"]
    report = read_report(notice.content)
    assert report.message["To"] == ALICE.address
    assert report.per_message["original-envelope-id"] == "Q=Q"
    assert report.per_message["reporting-mta"] == "dns; gateway.test.example"
    assert report.recipients == [{
        "original-recipient": "rfc822; D+ave@Test.Example", "final-recipient": "rfc822; dave@test.example", "action": "failed",
        "status": "5.1.1", "remote-mta": f"dns; [{HOST}]", "diagnostic-code": "smtp; 550 5.1.1 gone"}]
    assert b"secret" not in upstream.wire
    assert b"one@test.example" not in upstream.wire, "the inner Message-ID stays inside"
    left_with = re.search(rb"\nMessage-ID: (\S+)", upstream.messages[0].content)
    assert left_with is not None
    assert report.headers["Message-ID"] == left_with[1].decode(), "names the copy that the others got"
    assert report.headers["Subject"] == "[...]"


@pytest.mark.parametrize(("notify", "told"), [
    (None, True), ("FAILURE", True), ("delay,failure", True), ("NEVER", False), ("SUCCESS", False), ("SUCCESS,DELAY", False)])
async def test_notify_decides(tmp_path: Path, notify: str | None, told: bool) -> None:
    rcpt = {DAVE.address: [f"NOTIFY={notify}"]} if notify else {}
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, EVERYBODY, MESSAGE, rcpt=rcpt, polite=False)
        assert done.code == 250
        assert done.data.endswith("notified of 1 refused" if told else "notified of 0 refused and did not want to be of 1")
        count = len(upstream.messages)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE, rcpt=rcpt, polite=False)).code == 250
        assert len(upstream.messages) == count, "a client that did not get the 250 causes neither mail nor notification"
    assert len(notices(upstream)) == told


async def test_a_server_without_dsn_is_not_spoken_to_in_it(tmp_path: Path) -> None:
    async with Upstream(without_dave(), extensions=("PIPELINING", "SIZE 1000000")) as upstream, relay(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
    assert upstream.messages[-1].rcpts == ["RCPT TO:<alice@test.example>"]
    read_report(upstream.messages[-1].content)


async def test_a_sender_beyond_ascii_is_told_too(tmp_path: Path) -> None:
    jose = person("jos\u00e9@test.example")
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream, identities={jose.address: jose}) as gw:
        content = text(sender=jose.address, cc="carol@test.example")
        assert (await gw.submit(jose.address, EVERYBODY, content, mail=["SMTPUTF8"])).code == 250
    notice = upstream.messages[-1]
    assert "SMTPUTF8" in notice.mail
    assert "BODY=8BITMIME" in notice.mail
    report = read_report(notice.content)
    assert report.message["To"] == jose.address
    assert report.headers_type == "message/global-headers"


async def test_of_mail_that_left_as_it_is_the_notification_names_the_message(tmp_path: Path) -> None:
    def script(step: str, argument: str, _number: int) -> Answer | bool:
        return "552 5.2.2 full" if step == "DOT" and "second" in argument else False
    people = ["first@else.example", "second@else.example"]
    async with Upstream(script, lmtp=True) as upstream, relay(tmp_path, upstream, protocol="lmtp") as gw:
        content = text(to=", ".join(people))
        assert (await gw.submit(ALICE.address, people, content, polite=False)).code == 250
        assert (await gw.submit(ALICE.address, people, content, polite=False)).code == 250
    assert len(upstream.messages) == 2, "the retry of a client that did not get the 250 sends nothing"
    report = read_report(upstream.messages[-1].content)
    assert [fields["status"] for fields in report.recipients] == ["5.2.2"]
    assert report.headers["Message-ID"] == "<one@test.example>"
    assert b"the secret" not in upstream.messages[-1].content


# ---- when there is one

async def test_a_notification_is_not_sealed_whatever_the_rules_and_cards(tmp_path: Path) -> None:
    """The sender has a card and everything must be sealed; who reports a failure signs nothing, and there is no text in it."""
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream, rules=(RuleConfig(seal="require"),)) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
    [notice] = notices(upstream)
    read_report(notice)
    assert b"vnd.malote" not in notice
    assert b"secret" not in upstream.wire


@pytest.mark.parametrize(("sender", "submitted", "told"), [
    (ALICE.address, "auto-generated", True), (ALICE.address, "no", True), (ALICE.address, "auto-replied", False),
    (ALICE.address, "Auto-Replied (vacation); owner=x", False), (ALICE.address, "auto-notified", False), ("", "", False)])
async def test_what_answers_by_itself_is_not_answered(tmp_path: Path, sender: str, submitted: str, told: bool) -> None:
    """Neither the null sender nor the answer of a program: the client hears it, in 554, as the next to be told."""
    content = text(cc="carol@test.example", auto_submitted=submitted)
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream) as gw:
        done = await gw.submit(sender, EVERYBODY, content)
    assert done.code == (250 if told else 554)
    assert len(notices(upstream)) == told
    if not told:
        assert "NOT sent to dave@test.example" in done.data
    assert sorted(a for message in upstream.messages if message.sender == sender or not told for a in message.recipients) == [
        BOB.address, CAROL.address]


async def test_a_notification_sent_through_us_again_ends_there(tmp_path: Path) -> None:
    """Ours comes back as mail to be relayed, as where two gateways are each other's upstream: it fails without another one."""
    async with Upstream(without_dave()) as upstream, relay(tmp_path / "one", upstream) as gw:
        await gw.submit(ALICE.address, EVERYBODY, MESSAGE)
    [notice] = notices(upstream)
    async with Upstream(without_dave(2)) as upstream, relay(tmp_path / "two", upstream, cards=(), identities={}) as gw:
        done = await gw.submit("", ["x@else.example", "y@else.example"], notice)
        assert done.code == 250
        assert upstream.messages[0].content.endswith(notice), "passes as it is"
        upstream.script = lambda step, _argument, _number: GONE if step == "DOT" else False
        assert (await gw.submit("", ["x@else.example"], notice)).code == 550
    assert len(upstream.messages) == 1


async def test_nobody_is_notified_of_what_is_not_for_good_or_not_partial(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "451 4.2.1 later" if step == "RCPT" and "dave" in argument and number > 3 else False
    async with Upstream(script) as upstream, relay(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 451
        upstream.script = lambda step, _argument, _number: GONE if step == "DOT" else False
        assert (await gw.submit(ALICE.address, EVERYBODY, text(message_id="<2@test.example>"))).code == 550, "refused for all"
    assert notices(upstream) == []


@pytest.mark.parametrize("step", ["MAIL", "RCPT", "DATA", "DOT"])
async def test_a_notification_that_is_refused_makes_the_message_temporary_until_it_is_not(tmp_path: Path, step: str) -> None:
    inner = without_dave()
    in_notice = False

    def script(at: str, argument: str, number: int) -> Answer | bool:
        nonlocal in_notice
        in_notice = argument.startswith("MAIL FROM:<>") if at == "MAIL" else in_notice
        return "550 5.7.1 no bounces" if in_notice and at == step else inner(at, argument, number)
    async with Upstream(script) as upstream, relay(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False)
        assert done.data == "451 4.3.0 Some recipients were refused and the sender cannot be notified now, try again later"
        assert len(upstream.messages) == 1, "the others are served"
        upstream.script = without_dave(upstream.steps.count("RCPT") + 3)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
    assert len(upstream.messages) == 2
    assert len(notices(upstream)) == 1


async def test_a_notification_in_doubt_comes_again_as_the_same_message(tmp_path: Path) -> None:
    """The server took it and its reply was lost: the client comes again, and so does the notification (RFC 1047)."""
    inner = without_dave()

    def script(at: str, argument: str, number: int) -> Answer | bool:
        return None if at == "DOT!" and argument.startswith("MAIL FROM:<>") else inner(at, argument, number)
    async with Upstream(script) as upstream, relay(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False)).code == 451
        upstream.script = without_dave(upstream.steps.count("RCPT") + 3)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
    first, second = (read_report(notice).message["Message-ID"] for notice in notices(upstream))
    assert first == second


async def test_whom_a_rule_leaves_out_the_sender_is_told_of_too(tmp_path: Path) -> None:
    """`mixed = "split"` and no card under `require`: it was us who refused, and no other server is named."""
    rules = (RuleConfig(seal="require", mixed="split", accept_encrypted=True),)
    async with Upstream() as upstream, relay(tmp_path, upstream, rules=rules) as gw:
        done = await gw.submit(ALICE.address, [BOB.address, "nobody@else.example"], text(cc="nobody@else.example"))
        assert done.code == 250
    [notice] = notices(upstream)
    [fields] = read_report(notice).recipients
    assert fields["final-recipient"] == "rfc822; nobody@else.example"
    assert "No key for nobody@else.example" in fields["diagnostic-code"]
    assert "remote-mta" not in fields


async def test_who_never_got_it_is_missing_nothing_by_the_next_one(tmp_path: Path) -> None:
    """The number that was refused and told is burnt: it is no gap at the receiver."""
    async with Upstream(without_dave()) as upstream, relay(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
        upstream.script = None
        assert (await gw.submit(ALICE.address, [DAVE.address], text(message_id="<2@test.example>"))).code == 250
    later = opened(upstream.messages[-1].content, DAVE, ALICE).unsealed
    assert (later.serial, later.prev) == (2, 0)


async def test_identical_messages_at_once_are_one_notification(tmp_path: Path) -> None:
    async with Upstream(without_dave(6)) as upstream, relay(tmp_path, upstream) as gw:
        done = await asyncio.gather(*(gw.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False) for _ in range(2)))
    assert [each.code for each in done] == [250, 250]
    assert len(notices(upstream)) == 1
    assert len(upstream.messages) == 2


@pytest.mark.parametrize(("required", "taken"), [(False, True), (True, True), (True, False)])
async def test_the_audit_log_has_a_line_for_it(tmp_path: Path, required: bool, taken: bool) -> None:
    """`required`: one before it leaves, too."""
    audit = AuditLog(AuditConfig(file=tmp_path / "audit", required=required))
    inner = without_dave()

    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "451 4.0.0 no" if "MAIL FROM:<>" in argument and not taken else inner(step, argument, number)
    async with Upstream(script) as upstream, relay(tmp_path / "gw", upstream) as gw:
        gw.submissions.reporter.recorder = lambda: Recorder(audit, lambda: 0)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == (250 if taken else 451)
        count = len(upstream.messages)
    await audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_bytes().splitlines()]
    told = [line for line in lines if line["what"] == "notification"]
    assert [line["step"] for line in told] == ["leaving", "done"][not required:]
    assert (told[-1]["about"], told[-1]["states"]) == (1, {"accepted" if taken else "deferred": 1})
    assert told[-1]["id"] == lines[0]["id"]
    assert count == 1 + taken, "one copy for two, and the notification"
    assert b"secret" not in (tmp_path / "audit").read_bytes()


async def test_under_audit_required_no_notification_leaves_without_its_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = AuditLog(AuditConfig(file=tmp_path / "audit", required=True))

    async def full(*_: Any) -> bool:
        return False
    monkeypatch.setattr(Recorder, "notifying", full)
    async with Upstream(without_dave()) as upstream, relay(tmp_path / "gw", upstream) as gw:
        gw.submissions.reporter.recorder = lambda: Recorder(audit, lambda: 0)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False)).code == 451
        assert not notices(upstream)
        monkeypatch.undo()
        upstream.script = without_dave(upstream.steps.count("RCPT") + 3)
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE)).code == 250
    assert len(notices(upstream)) == 1
    await audit.close()


@pytest.mark.parametrize("fails", [False, True])
async def test_identical_messages_at_two_processes_are_one_notification(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """The second comes while the first has everything but its notification behind it. It waits, and if the first cannot tell the
    sender, it does."""
    there, go_on = asyncio.Event(), asyncio.Event()
    real = notify.notify_sender

    async def slow(*arguments: Any, **options: Any) -> bool:
        if there.is_set():
            return await real(*arguments, **options)
        there.set()
        await go_on.wait()
        return False if fails else await real(*arguments, **options)
    monkeypatch.setattr(submission, "notify_sender", slow)

    def script(step: str, argument: str, number: int) -> Answer | bool:
        """Dave is fine when a client asks, and not when his copy comes."""
        return GONE if step == "RCPT" and "dave" in argument and number not in (3, 9) else False
    async with Upstream(script) as upstream, relay(tmp_path, upstream) as one, relay(tmp_path, upstream) as two:
        for number, gw in enumerate((one, two)):
            await gw.store.join(b"%d" % number * 16)
        first = asyncio.create_task(one.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False))
        await there.wait()
        asked = upstream.steps.count("RCPT")
        second = asyncio.create_task(two.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False))
        async with asyncio.timeout(30):
            while upstream.steps.count("RCPT") < asked + len(EVERYBODY):
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)        # time enough to do it wrong
        assert not notices(upstream)
        go_on.set()
        assert [(await task).code for task in (first, second)] == [451 if fails else 250, 250]
    assert len(notices(upstream)) == 1
    assert Counter(address for message in upstream.messages for address in message.recipients) == Counter(
        [BOB.address, CAROL.address, ALICE.address])


async def test_whom_the_server_refuses_at_the_retry_though_he_has_had_it(tmp_path: Path) -> None:
    """Bob is served, Carol waits; when the client comes again, Bob's server refuses him at RCPT. Passed on, that would be a
    bounce for a message that he has."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        if step != "RCPT" or number <= 3:
            return False
        return "451 4.2.1 later" if number <= 6 and "carol" in argument else GONE if number > 6 and "bob" in argument else False
    async with Upstream(script) as upstream, relay(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, EVERYBODY, MESSAGE, polite=False)).code == 451
        again = await gw.submit(ALICE.address, EVERYBODY, MESSAGE)
        assert (again.rcpts[BOB.address][:3], again.code) == ("250", 250)
    assert notices(upstream) == []
    assert Counter(address for message in upstream.messages for address in message.recipients) == dict.fromkeys(EVERYBODY, 1)


# ---- real servers

async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.05)


def hand_in(port: int, recipients: list[str], content: bytes) -> None:
    with smtplib.SMTP(HOST, port) as client:
        client.sendmail(ALICE.address, recipients, content)


async def test_between_a_real_postfix_and_a_real_dovecot_with_a_full_mailbox(lab: Lab, tmp_path: Path) -> None:
    """Postfix hands in, Dovecot takes by LMTP and answers for each recipient: one is over quota, for good. The others have the
    message, the sender has the notification, and Postfix has nothing left to try or to tell."""
    full = "full@quota.example"
    people = {name: f"{name}{uuid.uuid4().hex[:8]}@quota.example" for name in ("sender", "reader")}
    dovecot = await asyncio.to_thread(lab.dovecot, [full, *people.values()], extra=limited("storage=1M"))
    for _ in range(2):
        with smtplib.LMTP(HOST, dovecot.lmtp_port) as client:
            client.sendmail("x@else.example", [full], b"Subject: x\r\n\r\n" + (b"y" * 70 + b"\r\n") * 8_000)
    sender, reader = person(people["sender"]), person(people["reader"])
    async with Gateway(tmp_path, upstream_config(dovecot.lmtp_port, protocol="lmtp"), identities={sender.address: sender},
                       cards=(reader, person(full)), config={"partial_failure": "relay"}) as gw:
        postfix = await asyncio.to_thread(lab.postfix, f"smtp:[{HOST}]:{gw.port}")
        content = text(sender=sender.address, to=f"{reader.address}, {full}", body=("z" * 70 + "\r\n") * 10_000)

        def send() -> None:
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(sender.address, [reader.address, full], content)
        await asyncio.to_thread(send)
        await until(lambda: len(dovecot.messages(sender.address)) == 1 and not postfix.queued())
        await asyncio.to_thread(postfix.stop)
    [delivered], [notice] = dovecot.messages(reader.address), dovecot.messages(sender.address)
    assert opened(delivered, reader, sender).original.endswith(content.split(b"\r\n\r\n", 1)[1])
    report = read_report(as_sent(notice))
    assert [(fields["final-recipient"], fields["status"]) for fields in report.recipients] == [(f"rfc822; {full}", "5.2.2")]
    assert "quota" in report.recipients[0]["diagnostic-code"].lower()
    assert b"zzzz" not in notice
    await asyncio.to_thread(dovecot.stop)


async def test_through_a_real_postfix_that_refuses_what_it_can_read(lab: Lab, tmp_path: Path) -> None:
    """A filter at the upstream refuses the copy that leaves as it is, for good, and takes the sealed one and the notification."""
    sender, reader = person("sender@filter.example"), person("reader@filter.example")
    dovecot = await asyncio.to_thread(lab.dovecot, [sender.address, reader.address, "plain@filter.example"])
    checks = lab.root / f"checks{uuid.uuid4().hex}"
    checks.write_text("/the secret/ REJECT no secrets here\n")
    checks.chmod(0o644)
    postfix = await asyncio.to_thread(lab.postfix, dovecot.lmtp_hop, settings={"body_checks": f"regexp:{checks}"})
    config = {"partial_failure": "relay", "rules": (RuleConfig(mixed="split"),)}
    async with Gateway(tmp_path, upstream_config(postfix.port), identities={sender.address: sender}, cards=(reader,),
                       config=config) as gw:
        content = text(sender=sender.address, to=f"{reader.address}, plain@filter.example")
        done = await gw.submit(sender.address, [reader.address, "plain@filter.example"], content, mail=["ENVID=E1"])
        assert done.code == 250, done
        await until(lambda: len(dovecot.messages(sender.address)) == 1 and len(dovecot.messages(reader.address)) == 1)
    report = read_report(as_sent(dovecot.messages(sender.address)[0]))
    assert report.per_message["original-envelope-id"] == "E1"
    assert [(fields["final-recipient"], fields["status"]) for fields in report.recipients] == [
        ("rfc822; plain@filter.example", "5.7.1")]
    assert "no secrets here" in report.human
    assert dovecot.messages("plain@filter.example") == []
    assert opened(dovecot.messages(reader.address)[0], reader, sender).original == content
    for server in (postfix, dovecot):
        await asyncio.to_thread(server.stop)


def as_sent(raw: bytes) -> bytes:
    """A message out of a maildir: CRLF again, without the trace fields of the servers that carried it."""
    raw = raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    return raw[raw.index(b"From: Mail Delivery System"):]
