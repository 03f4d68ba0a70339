"""The pure parts of sending: who shares bytes, what is answered, what the upstream is told, who may be signed for."""

from __future__ import annotations

import asyncio
import email
import email.policy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from malote.errors import ConfigError, Reply, SenderRefused
from malote.outgoing.answers import LINE_CHARACTERS, MAX_NAMED, Answer, Outcome, State, decide_answer, outcome_of
from malote.outgoing.envelope import estimated_size, mail_params, same_transaction
from malote.outgoing.groups import MAX_PER_COPY, Kind, Member, group_members
from malote.outgoing.identities import Submitter, decide_signer, login_addresses
from malote.outgoing.inflight import InFlight, Turn
from malote.outgoing.notice import Refused, make_notice
from malote.outgoing.passthrough import login_of
from malote.outgoing.users import hash_password, load_users
from outgoing.harness import person

OK, FULL, GONE = Reply(250, "2.0.0", "queued as 1"), Reply(452, "4.2.2", "mailbox full"), Reply(550, "5.1.1", "no such user")
CHEAP = {"memory_kib": 64, "iterations": 1, "lanes": 1}     # only for testing!


# ---- groups

ADDRESSES = st.lists(st.integers(0, 400).map(lambda number: f"r{number}@b.example"), unique=True, max_size=300)


@given(ADDRESSES, st.data())
def test_every_recipient_is_in_one_copy_and_no_bcc_is_beside_another(addresses: list[str], data: st.DataObject) -> None:
    shown = frozenset(data.draw(st.sets(st.sampled_from(addresses)))) if addresses else frozenset()
    members = [Member(address, data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.sampled_from([b"1", b"2"])))
               for address in addresses]
    groups = group_members(members, shown, reserve=1)
    by_address = {member.address: member for member in members}
    assert sorted(address for group in groups for address in group.addresses) == sorted(addresses)
    order = [list(Kind).index(group.kind) for group in groups]
    assert order == sorted(order), "the visible group goes first"
    for group in groups:
        own = [by_address[address] for address in group.addresses]
        assert all(member.sealed == group.sealed for member in own)
        if group.sealed:
            assert len(own) < MAX_PER_COPY
            assert len({member.stream for member in own}) == 1
        match group.kind:
            case Kind.VISIBLE:
                assert all(member.address in shown for member in own)
            case Kind.BCC:
                assert len(own) == 1
                assert own[0].address not in shown
                assert not own[0].listed
            case Kind.LIST:
                assert all(member.listed and member.address not in shown for member in own)


def test_all_plain_recipients_share_one_body_whoever_is_shown() -> None:
    members = [Member(f"r{number}@b.example", sealed=False) for number in range(250)]
    assert [len(group.addresses) for group in group_members(members, frozenset())] == [250]


# ---- answers

def outcomes(*replies: Reply) -> dict[str, Outcome]:
    return {f"r{number}@b.example": outcome_of(reply) for number, reply in enumerate(replies, 1)}


def test_250_only_when_everybody_was_accepted() -> None:
    assert decide_answer(outcomes(OK, OK), relay=False, can_notify=True).reply == OK
    for other in (FULL, GONE):
        answer = decide_answer(outcomes(OK, other), relay=False, can_notify=True)
        assert answer.reply.code >= 400
        assert not answer.notify


def test_one_temporary_failure_makes_the_whole_temporary() -> None:
    for relay in (True, False):
        answer = decide_answer(outcomes(OK, GONE, FULL), relay=relay, can_notify=True)
        assert answer.reply.code == 451
        assert not answer.notify
    doubt = outcomes(OK) | {"x@b.example": Outcome(State.IN_DOUBT, FULL)}
    assert decide_answer(doubt, relay=True, can_notify=True).reply.code == 451


def test_the_upstreams_own_reply_is_passed_on_when_it_is_the_same_for_all() -> None:
    for reply in (OK, FULL, GONE):
        assert decide_answer(outcomes(reply, reply), relay=False, can_notify=True).reply == reply


def test_a_person_is_told_who_got_it_and_who_did_not() -> None:
    reply = decide_answer(outcomes(OK, GONE), relay=False, can_notify=True).reply
    assert reply.code == 554
    assert "Sent to r1@b.example" in reply.text
    assert "NOT sent to r2@b.example" in reply.text
    assert "550 5.1.1 no such user" in reply.text


def test_a_relay_notifies_and_never_the_null_sender() -> None:
    assert decide_answer(outcomes(OK, GONE), relay=True, can_notify=True) == Answer(
        Reply(250, "2.0.0", "Accepted for 1 recipients, the sender is notified of 1 refused"),
        notify=("r2@b.example",), settled=("r2@b.example",))
    assert decide_answer(outcomes(OK, GONE), relay=True, can_notify=False).reply.code == 554


def test_who_wants_no_notification_gets_none_and_the_reply_says_so() -> None:
    answer = decide_answer(outcomes(OK, GONE, GONE), relay=True, can_notify=True, silent=frozenset({"r2@b.example"}))
    assert answer.reply.text == "Accepted for 1 recipients, the sender is notified of 1 refused and did not want to be of 1"
    assert (answer.notify, answer.settled) == (("r3@b.example",), ("r2@b.example", "r3@b.example"))


def test_a_reply_about_many_recipients_stays_one_that_clients_show() -> None:
    many = {f"r{number}@{'long' * 12}.example": outcome_of(GONE if number % 2 else OK) for number in range(1000)}
    reply = decide_answer(many, relay=False, can_notify=True).reply
    assert len(reply.text.split("\n")) < 20
    assert all(len(line) <= LINE_CHARACTERS for line in reply.text.split("\n"))
    assert f"and {500 - MAX_NAMED} more" in reply.text.replace("\n", " ")


def test_addresses_in_a_reply_are_visible_ascii() -> None:
    odd = {"jos\u00e9@b.example": outcome_of(OK), '"a\u202eb"@b.example': outcome_of(GONE)}
    assert str(decide_answer(odd, relay=False, can_notify=True).reply).replace("\r\n", "").isascii()


def test_what_is_no_known_reply_is_temporary() -> None:
    assert outcome_of(Reply(354, "", "go on")).state is State.DEFERRED


# ---- notice

def test_a_notice_is_a_report_with_outer_headers_and_nothing_of_the_message() -> None:
    raw = make_notice(
        [Refused("no@b.example", Reply(550, "5.1.1", "no\nsuch user"), "rfc822;No+2B1@b.example"),
         Refused("jos\u00e9@b.example", Reply(552, "", "full"))],
        sender="alice@a.example", host="gw.example", outer_headers=b"From: alice@a.example\r\nSubject: [...]\r\n",
        envelope_id="QQ+3D1", token="ab" * 16, arrived_ms=1_795_392_000_000, now_ms=1_795_392_000_000)
    assert raw.isascii()
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert message.get_content_type() == "multipart/report"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["To"] == "alice@a.example"
    human, status, headers = message.iter_parts()
    assert "no@b.example" in human.get_content()
    whole, first, second = cast("list[EmailMessage]", status.get_payload())
    assert whole["Reporting-MTA"] == "dns; gw.example"
    assert whole["Original-Envelope-Id"] == "QQ=1"
    assert first["Final-Recipient"] == "rfc822; no@b.example"
    assert first["Original-Recipient"] == "rfc822; No+1@b.example"
    assert (first["Action"], first["Status"]) == ("failed", "5.1.1")
    assert first["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
    assert second["Final-Recipient"] == "utf-8; jos\\x{E9}@b.example"
    assert second["Status"] == "5.0.0"
    assert headers.get_content_type() == "text/rfc822-headers"
    assert "[...]" in str(headers.get_payload())


# ---- parameters

EXTENSIONS = {"SIZE": "1000000", "DSN": "", "8BITMIME": "", "SMTPUTF8": "", "AUTH": "PLAIN", "REQUIRETLS": ""}
CLIENT: dict[str, str | bool] = {
    "SIZE": "1000", "BODY": "8BITMIME", "RET": "FULL", "ENVID": "QQ1", "AUTH": "<>", "REQUIRETLS": True, "SMTPUTF8": True}


def params(*, sealed: bool, addresses: tuple[str, ...] = ("a@a.example", "b@b.example"), utf8: bool = False,
           extensions: dict[str, str] = EXTENSIONS) -> dict[str, str | bool]:
    return mail_params(CLIENT, sealed=sealed, size=500, addresses=addresses, utf8_header=utf8, extensions=extensions)


def test_sealed_mail_goes_as_7_bit_and_its_bounces_without_body() -> None:
    assert params(sealed=True) == {"SIZE": "500", "RET": "HDRS", "ENVID": "QQ1", "AUTH": "<>", "REQUIRETLS": True}


def test_plain_mail_keeps_what_the_client_said() -> None:
    assert params(sealed=False) == CLIENT | {"SIZE": "500"}


def test_smtputf8_for_an_address_or_header_that_needs_it() -> None:
    assert params(sealed=True, addresses=("a@a.example", "jos\u00e9@b.example"))["SMTPUTF8"] is True
    assert params(sealed=True, utf8=True)["SMTPUTF8"] is True


def test_nothing_is_said_that_the_server_does_not_know_unless_it_must_be_obeyed() -> None:
    assert params(sealed=True, extensions={}) == {"REQUIRETLS": True}


def test_a_transaction_is_reused_only_if_its_promises_are_the_same() -> None:
    assert same_transaction(params(sealed=True), params(sealed=True) | {"SIZE": "9"})
    assert not same_transaction(params(sealed=True), params(sealed=False))


@pytest.mark.parametrize(("sealed", "fold", "limit", "size"), [
    (False, True, 0, 100_512), (True, True, 0, 144_768), (True, False, 0, 184_768), (True, True, 120_000, 120_000)])
def test_the_announced_size_is_an_estimate_that_never_refuses(sealed: bool, fold: bool, limit: int, size: int) -> None:
    assert estimated_size({"SIZE": "100000"}, sealed=sealed, fold=fold, limit=limit) == size


def test_no_size_where_the_client_gave_none() -> None:
    assert estimated_size({}, sealed=True, fold=True, limit=0) == 0


# ---- who may be signed for

ALICE, GATEWAY = person("alice@test.example"), person("@test.example")


def test_only_the_owner_of_the_address_has_it_signed() -> None:
    identities = {ALICE.address: ALICE}
    owner = Submitter("alice@test.example", frozenset({"alice@test.example"}))
    assert decide_signer(identities, owner, "alice@test.example") is ALICE
    for other in (Submitter(), Submitter("bob", frozenset({"bob@test.example"})), Submitter("x", frozenset({"@other.example"}))):
        with pytest.raises(SenderRefused):
            decide_signer(identities, other, "alice@test.example")


def test_an_address_without_identity_is_nobodys_to_sign() -> None:
    assert decide_signer({ALICE.address: ALICE}, Submitter(anyone=True), "carol@else.example") is None


def test_a_gateway_signs_for_its_domain_but_only_for_the_owner_of_the_address() -> None:
    identities = {"@test.example": GATEWAY}
    assert decide_signer(identities, Submitter("b", frozenset({"bob@test.example"})), "bob@test.example") is GATEWAY
    with pytest.raises(SenderRefused):
        decide_signer(identities, Submitter("b", frozenset({"bob@test.example"})), "carol@test.example")
    assert decide_signer(identities, Submitter(anyone=True), "bob@sub.test.example") is None


def test_a_login_that_is_an_address_owns_it_and_any_other_owns_nothing() -> None:
    assert login_addresses("Alice@Test.Example") == {"alice@test.example"}
    assert login_addresses("alice") == frozenset()


@pytest.mark.parametrize(("mechanism", "message", "login"), [
    ("PLAIN", b"\0alice@a.example\0pw", "alice@a.example"),
    ("PLAIN", b"alice@a.example\0alice@a.example\0pw", "alice@a.example"),
    ("PLAIN", b"bob@a.example\0alice@a.example\0pw", ""),           # acts for another: bound to neither
    ("PLAIN", b"alice@a.example", ""),
    ("PLAIN", b"\0alice\xff\0pw", ""),
    ("LOGIN", b"alice@a.example", "alice@a.example"),
    ("XOAUTH2", b"user=alice@a.example\x01auth=Bearer t\x01\x01", "alice@a.example"),
    ("XOAUTH2", b"user=alice@a.example\x01user=bob@a.example\x01auth=Bearer t\x01\x01", ""),
    ("OAUTHBEARER", b"n,a=al=2Cice@a.example,\x01auth=Bearer t\x01\x01", "al,ice@a.example"),
    ("OAUTHBEARER", b"n,,\x01auth=Bearer t\x01\x01", ""),
    ("CRAM-MD5", b"alice 0123", ""),
])
def test_the_login_is_taken_from_the_clients_message_or_not_at_all(mechanism: str, message: bytes, login: str) -> None:
    assert login_of(mechanism, message) == login


# ---- users file

def users_file(path: Path, text: str) -> Path:
    file = path / "users"
    file.write_text(text)
    file.chmod(0o640)
    return file


async def test_a_password_opens_its_own_login_only(tmp_path: Path) -> None:
    users = load_users(users_file(tmp_path, f"# people\nanna:{hash_password('pa:ss', **CHEAP)}:Anna@A.example, @b.example\n"
                                            "ben::ben@a.example\n"))
    anna = await users.check_password("anna", "pa:ss")
    assert anna is not None
    assert anna.addresses == {"anna@a.example", "@b.example"}
    for login, password in (("anna", "wrong"), ("anna", ""), ("ben", ""), ("nobody", "pa:ss")):
        assert await users.check_password(login, password) is None
    ben = users.get("ben")
    assert ben is not None
    assert ben.addresses == {"ben@a.example"}


@pytest.mark.parametrize("line", [
    "anna", "anna:hash", "anna:$2b$12$bcrypt:a@a.example", ":x:a@a.example", "anna::not an address",
    "anna:$argon2id$v=19$m=9999999,t=1,p=1$c29tZXNhbHQ$" + "A" * 43 + ":a@a.example", "anna::a@a.example\nanna::b@a.example"])
def test_a_bad_users_file_is_refused_by_line_without_repeating_it(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"line [12]") as caught:
        load_users(users_file(tmp_path, line + "\n"))
    assert "argon2id$v=19$m=9" not in str(caught.value)


def test_a_users_file_that_everybody_can_read_is_refused(tmp_path: Path) -> None:
    file = users_file(tmp_path, "")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="others can read"):
        load_users(file)


# ---- identical messages in flight

@asynccontextmanager
async def turn_of(inflight: InFlight, key: str = "same") -> AsyncIterator[Turn]:
    turn = inflight.take(key) or await inflight.wait(key)
    try:
        yield turn
    finally:
        inflight.give_back(key, turn)


async def test_an_identical_message_waits_and_takes_over_what_was_accepted() -> None:
    inflight, order = InFlight(), []

    async def send(name: str, accepted: str) -> set[str]:
        async with turn_of(inflight) as turn:
            order.append(f"{name} begins")
            await asyncio.sleep(0.01)
            turn.accepted[accepted] = OK
            order.append(f"{name} ends")
            return set(turn.earlier)
    first, second, third = await asyncio.gather(send("1", "a"), send("2", "b"), send("3", "c"))
    assert order == ["1 begins", "1 ends", "2 begins", "2 ends", "3 begins", "3 ends"]
    assert (first, second, third) == (set(), {"a"}, {"a", "b"})
    assert len(inflight) == 0


async def test_a_message_that_fails_lets_the_next_one_go() -> None:
    inflight = InFlight()
    with pytest.raises(ZeroDivisionError):
        async with turn_of(inflight):
            raise ZeroDivisionError
    async with turn_of(inflight) as turn:
        assert turn.earlier == {}


async def test_giving_up_waiting_does_not_disturb_the_one_waited_for() -> None:
    inflight = InFlight()
    async with turn_of(inflight) as first:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), turn_of(inflight):
                pytest.fail("must wait")
        first.accepted["a"] = OK
    async with turn_of(inflight, "other"), turn_of(inflight) as later:
        assert later.earlier == {}
