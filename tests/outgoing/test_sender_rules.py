"""Rules on the sender, the direction and the content; tags; who is left out and who is told: through the real proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from malote.config import Kind, ListenerConfig, RuleConfig
from malote.outgoing.users import hash_password
from outgoing.harness import HOST, REQUIRE, Answer, Gateway, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))
STRANGER = "stranger@else.example"
CHEAP = {"memory_kib": 64, "iterations": 1, "lanes": 1}     # only for testing!


def gateway(directory: Path, server: Upstream, rules: tuple[RuleConfig, ...] = (), *, config: dict[str, Any] | None = None,
            **more: Any) -> Gateway:
    return Gateway(directory, upstream_config(server.port), config={"rules": rules} | (config or {}),
                   **({"cards": (BOB, CAROL)} | more))


# ---- what the content asks for

@pytest.mark.parametrize(("rule", "fields"), [
    (RuleConfig(subjects=("*[geheim]*",), seal="require"), {"subject": "=?utf-8?q?Pl=C3=A4ne_=5BGeheim=5D?="}),
    (RuleConfig(headers=("Sensitivity: company-*",), seal="require"), {"sensitivity": "Company-Confidential"}),
    (RuleConfig(min_bytes=10_000, seal="require"), {"body": "the secret text\r\n" * 1000}),
    (RuleConfig(kinds=(Kind.CALENDAR,), seal="require"), {"content_type": "text/calendar; method=REQUEST"}),
    (RuleConfig(subjects=("*geheim*",), seal="refuse"), {"subject": "geheim"}),
])
async def test_content_that_must_not_leave_in_clear(tmp_path: Path, rule: RuleConfig, fields: dict[str, str]) -> None:
    """At DATA, as RCPT does not show it; other mail to the same recipient, and below the same rule, leaves as before."""
    async with Upstream() as upstream, gateway(tmp_path, upstream, (rule, RuleConfig(seal="never"))) as gw:
        done = await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER, **fields))
        assert done.rcpts[STRANGER].startswith("250")
        assert done.data.startswith("550 5.7.1 ")
        assert "nothing was sent" in done.data
        assert upstream.messages == []
        assert b"secret" not in upstream.wire
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))).code == 250
        to_bob = await gw.submit(ALICE.address, [BOB.address], text(**fields))
        if rule.seal == "refuse":
            assert to_bob.data.startswith("550 5.7.1 Rule 1 forbids this mail to bob@test.example")
        else:
            assert opened(upstream.messages[-1].content, BOB, ALICE).original == text(**fields)
    assert len(upstream.messages) == 1 + (rule.seal != "refuse")


async def test_a_route_around_a_rule_on_the_content(tmp_path: Path) -> None:
    """The rule names the domain behind the route, and only the content shows that it counts."""
    rules = (RuleConfig(recipients=("@strict.example",), subjects=("*geheim*",), seal="require"),)
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        for subject, code in (("geheim", 550), ("lunch", 250)):
            done = await gw.submit(ALICE.address, ["x%strict.example@relay.example"], text(subject=subject))
            assert done.code == code
    assert len(upstream.messages) == 1


# ---- who writes, and which way

async def test_rules_tell_senders_apart_only_where_they_are_known(tmp_path: Path) -> None:
    """Else whoever wants the weaker rule writes another From. A login may use its own addresses and no other."""
    users = tmp_path / "users"
    users.write_text(f"anna:{hash_password('pw', **CHEAP)}:alice@test.example\n")
    users.chmod(0o600)
    listener = ListenerConfig(host=HOST, auth="local", users_file=users, senders="any")
    rules = (RuleConfig(senders=("bot@test.example",), seal="never"), RuleConfig(senders=("@test.example",), seal="require"))
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules, listener=listener) as gw:
        login = ("anna", "pw")
        done = await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER), login=login)
        assert done.data.startswith("550 5.7.1 No key for stranger@else.example")
        for mail_from in (ALICE.address, "bot@test.example", ""):
            done = await gw.submit(mail_from, [STRANGER], text("bot@test.example", STRANGER), login=login)
            assert done.data.startswith("550 5.7.1 The From address is not one of this login")
        assert upstream.messages == []
        assert b"secret" not in upstream.wire
        assert (await gw.submit(ALICE.address, [BOB.address], text(), login=login)).code == 250
    assert len(upstream.messages) == 1


async def test_behind_a_server_that_knows_its_users_rules_go_by_from(tmp_path: Path) -> None:
    rules = (RuleConfig(senders=("bot@test.example",), seal="never"), RuleConfig(senders=("@test.example",), seal="require"))
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        assert (await gw.submit("bounces@test.example", [BOB.address], text("bot@test.example"))).code == 250
        assert b"the secret text" in upstream.messages[0].content
        assert (await gw.submit("bot@test.example", [STRANGER], text(to=STRANGER))).code == 550, "the envelope does not count"


async def test_directions(tmp_path: Path) -> None:
    rules = (RuleConfig(direction="internal", seal="never"), RuleConfig(direction="outbound", seal="require"))
    config = {"domains": ("test.example",)}
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules, config=config) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        assert b"the secret text" in upstream.messages[0].content
        refused = await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))
        assert refused.rcpts[STRANGER].startswith("550 5.7.1 No key for"), "the envelope shows it"


# ---- tags

async def test_a_tag_in_the_subject_asks_for_sealing_and_is_gone(tmp_path: Path) -> None:
    config = {"seal_tag": "[seal]", "clear_tag": "[clear]"}
    async with Upstream() as upstream, gateway(tmp_path, upstream, (RuleConfig(allow_no=True),), config=config) as gw:
        refused = await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER, subject="the secret [Seal] subject"))
        assert refused.data.startswith("550 5.7.1 No key for stranger@else.example")
        assert upstream.messages == []
        assert (await gw.submit(ALICE.address, [BOB.address], text(subject="[seal] the secret subject"))).code == 250
        assert opened(upstream.messages[0].content, BOB, ALICE).original == text()
        assert b"secret" not in upstream.wire
        assert (await gw.submit(ALICE.address, [BOB.address], text(subject="the secret subject [clear]"))).code == 250
        assert upstream.messages[1].content.endswith(text()), "in clear, byte for byte but for the tag"
        both = await gw.submit(ALICE.address, [BOB.address], text(subject="[clear] [seal]"))
        assert both.data.startswith("554 5.6.0 The tag in the subject and the Malote-Seal field contradict each other")
    assert len(upstream.messages) == 2


async def test_the_clear_tag_lowers_nothing_without_allow_no(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, REQUIRE, config={"clear_tag": "[clear]"}) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text(subject="[clear] the secret subject"))).code == 250
    assert opened(upstream.messages[0].content, BOB, ALICE).original == text()
    assert b"secret" not in upstream.wire


# ---- refuse, and who is left out

async def test_refuse_is_said_at_rcpt(tmp_path: Path) -> None:
    rules = (RuleConfig(recipients=("@else.example",), seal="refuse"),)
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        done = await gw.submit(ALICE.address, [STRANGER, BOB.address], text())
        assert done.rcpts[STRANGER] == ("550 5.7.1 Rule 1 forbids this mail to stranger@else.example; nothing was sent. "
                                        "Whoever runs this mail server can change the rule")
        assert done.code == 250
    assert [message.recipients for message in upstream.messages] == [[BOB.address]]


SPLIT = (RuleConfig(recipients=("@else.example",), mixed="split"),)
BOTH = [BOB.address, STRANGER]
TO_BOTH = text(cc=STRANGER)


async def test_split_names_who_got_it_in_clear(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, SPLIT) as gw:
        done = await gw.submit(ALICE.address, BOTH, TO_BOTH)
        assert done.code == 250
        assert "NOT sealed for stranger@else.example" in done.data
    assert sorted(message.recipients for message in upstream.messages) == [[BOB.address], [STRANGER]]


@pytest.mark.parametrize("mode", ["personal", "relay"])
async def test_whose_key_is_missing_is_left_out_and_reported(tmp_path: Path, mode: str) -> None:
    """Only the content shows that the stranger's mail must be sealed, and his rule splits: the others get it, and the sender is
    told. The upstream transaction in which he was accepted does not carry it."""
    async with Upstream() as upstream, gateway(tmp_path, upstream, SPLIT, config={"partial_failure": mode}) as gw:
        content = text(cc=STRANGER, malote_seal="yes")
        done = await gw.submit(ALICE.address, BOTH, content)
        sealed = [message for message in upstream.messages if message.recipients == [BOB.address]]
        assert opened(sealed[0].content, BOB, ALICE).original == TO_BOTH
        assert len(sealed) == 1
        if mode == "personal":
            assert done.code == 554
            assert "NOT sent to stranger@else.example" in done.data
            assert "No key for stranger@else.example; not sent to them" in done.data.replace("\n", " ")
            assert len(upstream.messages) == 1
        else:
            assert done.code == 250
            [notice] = [message for message in upstream.messages if message.sender == ""]
            assert notice.recipients == [ALICE.address]
            assert b"stranger@else.example" in notice.content
            assert b"No key for" in notice.content
            assert len(upstream.messages) == 2
        assert all(STRANGER not in message.recipients for message in upstream.messages)
        assert b"secret" not in upstream.wire


async def test_all_who_lack_a_key_are_not_left_out_but_refused(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, (RuleConfig(mixed="split"),)) as gw:
        done = await gw.submit(ALICE.address, [STRANGER, "other@else.example"], text(to=STRANGER, malote_seal="yes"))
        assert done.data.startswith("550 5.7.1 No key for stranger@else.example, other@else.example; nothing was sent")
    assert upstream.messages == []


async def test_a_retry_after_one_was_left_out_reaches_nobody_twice(tmp_path: Path) -> None:
    failed: list[str] = []

    def script(step: str, argument: str, number: int) -> Answer | bool:
        if step == "DOT" and not failed:
            failed.append(argument)
            return "451 4.3.0 later"
        return False
    rules = (RuleConfig(recipients=("@else.example",), mixed="split"), RuleConfig())
    async with Upstream(script) as upstream, gateway(tmp_path, upstream, rules) as gw:
        content = text(cc=STRANGER, malote_seal="yes")
        recipients = [BOB.address, CAROL.address, STRANGER]
        assert (await gw.submit(ALICE.address, recipients, content, polite=False)).code == 451
        assert (await gw.submit(ALICE.address, recipients, content, polite=False)).code == 554
        assert (await gw.submit(ALICE.address, recipients, content, polite=False)).code == 554
    got = sorted(recipient for message in upstream.messages for recipient in message.recipients)
    assert got == [BOB.address, CAROL.address]


# ---- mail of programs: what happens without any rule for it (docs/operating.md, "Mail that programs write")

INVITATION = ("Content-Type: multipart/alternative; boundary=b\r\n\r\n"
              "--b\r\nContent-Type: text/plain\r\n\r\nthe secret meeting\r\n"
              "--b\r\nContent-Type: text/calendar; charset=utf-8; method=REQUEST\r\n\r\nBEGIN:VCALENDAR\r\nMETHOD:REQUEST\r\n"
              "END:VCALENDAR\r\n--b--\r\n")
REPORT = ("Content-Type: multipart/report; report-type=delivery-status; boundary=b\r\nAuto-Submitted: auto-replied\r\n\r\n"
          "--b\r\n\r\nthe secret could not be delivered\r\n"
          "--b\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; x\r\n\r\n--b--\r\n")


def program(kind: str, sender: str, to: str) -> bytes:
    fields = {
        "calendar": INVITATION,
        "password-reset": "Auto-Submitted: auto-generated\r\n\r\nThe secret code is 1234\r\n",
        "bounce": REPORT,
        "auto-reply": "Auto-Submitted: auto-replied (vacation)\r\nPrecedence: bulk\r\n\r\nthe secret beach\r\n",
        "list": "List-Id: Friends <friends.test.example>\r\nPrecedence: list\r\n\r\nthe secret party\r\n",
    }[kind]
    head = (f"From: {sender}\r\nTo: {to}\r\nSubject: s\r\nDate: Mon, 23 Nov 2026 10:00:00 +0000\r\n"
            "Message-ID: <p@test.example>\r\n")
    return (head + fields).encode()


PROGRAMS = ["calendar", "password-reset", "bounce", "auto-reply", "list"]


@pytest.mark.parametrize("kind", PROGRAMS)
async def test_by_default_mail_of_programs_is_mail_like_any_other(tmp_path: Path, kind: str) -> None:
    """Sealed for whoever has a card, clear for who never had one, refused for who had one; and never sealed unsigned."""
    mail_from = "" if kind == "bounce" else ALICE.address
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        content = program(kind, ALICE.address, BOB.address)
        assert (await gw.submit(mail_from, [BOB.address], content)).code == 250
        assert opened(upstream.messages[0].content, BOB, ALICE).original == content
        assert b"secret" not in upstream.wire
        await gw.store.remove_card(BOB.address)
        refused = await gw.submit(mail_from, [BOB.address], content)
        assert refused.rcpts[BOB.address].startswith("550 5.7.1 No key for bob@test.example that is still good")
        unknown = await gw.submit(mail_from, [CAROL.address], program(kind, "daemon@test.example", CAROL.address))
        assert unknown.data.startswith("550 5.7.1 No identity for daemon@test.example to sign with")
        assert b"secret" not in upstream.wire
        clear = program(kind, "daemon@test.example", STRANGER)
        assert (await gw.submit(mail_from, [STRANGER], clear)).code == 250
        assert upstream.messages[1].content.endswith(clear)
    assert len(upstream.messages) == 2


@pytest.mark.parametrize("kind", PROGRAMS)
async def test_a_rule_may_let_mail_of_programs_go_in_clear(tmp_path: Path, kind: str) -> None:
    """By its kind where the rule below allows a no (anybody can write such a field); by its sender without that."""
    word = {"password-reset": "automatic"}.get(kind, kind)
    by_kind = RuleConfig(kinds=(Kind(word),), seal="never")
    by_sender = RuleConfig(senders=("daemon@test.example",), seal="never")
    content = program(kind, "daemon@test.example", BOB.address)
    for number, (rules, code) in enumerate([
            ((by_kind, RuleConfig(allow_no=True)), 250), ((by_kind,), 550), ((by_sender, REQUIRE[0]), 250)]):
        async with Upstream() as upstream, gateway(tmp_path / str(number), upstream, rules) as gw:
            done = await gw.submit("" if kind == "bounce" else ALICE.address, [BOB.address], content)
            assert done.code == code, number
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
        assert [message.content.endswith(content) for message in upstream.messages] == [True, False][code == 550:]


async def test_an_automatic_reply_to_opened_mail_is_sealed_or_not_sent(tmp_path: Path) -> None:
    rules = (RuleConfig(kinds=(Kind.AUTO_REPLY,), seal="never"), RuleConfig(allow_no=True))
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        gw.store.remember_outer_id("<m@else.example>", "<o@else.example>", 1, {STRANGER})
        reply = b"In-Reply-To: <m@else.example>\r\n" + program("auto-reply", ALICE.address, STRANGER)
        assert (await gw.submit(ALICE.address, [STRANGER], reply)).data.startswith("550 5.7.1 This answers sealed mail")
    assert upstream.messages == []
