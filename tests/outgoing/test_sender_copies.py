"""Who gets which bytes, seen at the upstream server: sharing, Bcc, lists, the sender's own blob, split, parameters."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from malote.config import RuleConfig
from malote.core import encrypted, primitives
from malote.core.identity import new_identity
from malote.core.keys import SignatureAlgorithm
from malote.core.open import Opened
from malote.errors import Unreadable
from malote.outgoing import copies, deciding, delivery, submission
from malote.outgoing.delivery import INLINE_BYTES
from malote.smtp.desk import ClientSession
from outgoing.harness import NOW_MS, Gateway, Received, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL, DAVE, EVE = (person(f"{name}@test.example") for name in ("alice", "bob", "carol", "dave", "eve"))
EVERYBODY = (BOB, CAROL, DAVE, EVE)


def gateway(directory: Path, server: Upstream, *, protocol: str = "smtp", **more: Any) -> Gateway:
    return Gateway(directory, upstream_config(server.port, protocol=protocol), **({"cards": EVERYBODY} | more))


def shape(messages: list[Received]) -> list[list[str]]:
    return [[address.split("@")[0] for address in message.recipients] for message in messages]


def visible_bytes(message: Received, reader: Opened | None) -> bytes:
    """Everything that somebody who can open this copy can see of it: envelope, outer message with every base64 part decoded,
    manifest, original."""
    seen = [message.mail.encode(), *(line.encode() for line in message.rcpts), message.content]
    seen += [base64.b64decode(part) for part in re.findall(rb"base64\r\n.*?\r\n\r\n(.*?)\r\n--", message.content, re.DOTALL)]
    if reader is not None:
        seen += [repr(reader.manifest).encode(), reader.original]
    return b"\n".join(seen).lower()


async def test_one_body_for_all_uses_the_transaction_that_is_open(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        submitted = text(cc="Carol <CAROL@test.example>")
        done = await gw.submit(ALICE.address, [BOB.address, CAROL.address], submitted)
    assert done.data == "250 2.0.0 queued as TEST", "the upstream's own reply"
    assert shape(upstream.messages) == [["bob", "carol"]]
    assert upstream.steps.count("MAIL") == 1
    for reader in (BOB, CAROL):
        assert opened(upstream.messages[0].content, reader, ALICE).original == submitted
    assert b"secret" not in upstream.wire


async def test_each_bcc_gets_a_copy_alone_and_is_in_no_byte_of_any_other(tmp_path: Path) -> None:
    header = b"bCC:\r\n dave@test.example,\r\n\tEVE@test.example\r\n"
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        submitted = header + text(cc="carol@test.example")
        done = await gw.submit(ALICE.address, [each.address for each in (DAVE, BOB, EVE, CAROL)], submitted)
    assert done.code == 250
    assert shape(upstream.messages)[0] == ["bob", "carol"], "the visible group first"
    assert sorted(shape(upstream.messages)[1:]) == [["dave"], ["eve"]]
    readers = {"bob": BOB, "dave": DAVE, "eve": EVE}
    ids = set()
    for message in upstream.messages:
        name = message.recipients[0].split("@")[0]
        seen = visible_bytes(message, got := opened(message.content, readers[name], ALICE))
        assert got.original == text(cc="carol@test.example")
        ids.add(got.manifest.id)
        for hidden in (DAVE, EVE):
            if hidden is not readers[name]:
                key = hidden.card.encryption_key(got.manifest.sent_at_ms)
                assert hidden.address.encode() not in seen
                for trace in (key.id, key.id.hex().encode(), key.id[:8].hex().encode()):
                    assert trace not in seen
                with pytest.raises(Unreadable):
                    opened(message.content, hidden, ALICE)
        blobs = message.content.count(b"vnd.malote.key-blob")
        assert blobs == len(message.recipients)
        assert message.content.count(b"kid=") == (2 if name == "bob" else 0), "no key id in a copy for one unseen reader"
    assert len(ids) == 1, "one submission, one id"


async def test_a_bcc_header_does_not_leave_with_plain_mail_either(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=()) as gw:
        hidden = b"Resent-BCC: eve@test.example\r\nbcc : dave@test.example,\r\n eve@test.example\r\n"
        submitted = text().replace(b"Subject", hidden + b"Subject")
        done = await gw.submit(ALICE.address, [BOB.address, DAVE.address], submitted)
    assert done.code == 250
    [message] = upstream.messages
    assert message.content.endswith(text())
    assert message.content.startswith(b"Received: by gateway.test.example (malote) with ESMTP;")
    assert b"eve@" not in message.content
    assert b"dave@" not in message.content


async def test_recipients_that_resent_fields_show_are_no_bcc(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address, CAROL.address], text(resent_to="carol@test.example"))
    assert shape(upstream.messages) == [["bob", "carol"]]


async def test_a_to_field_that_cannot_be_read_shows_nobody(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address, CAROL.address], text(to="bob@test.example, <<carol@test.example"))
    assert done.code == 250
    assert sorted(shape(upstream.messages)) == [["bob"], ["carol"]]


async def test_an_expanded_list_shares_copies_without_naming_its_members(tmp_path: Path) -> None:
    members = [person(f"member{number}@list.example") for number in range(5)]
    config = {"rules": (RuleConfig(recipients=("@list.example",), list=True),)}
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=(*members, BOB), config=config) as gw:
        await gw.submit(ALICE.address, [BOB.address, *(each.address for each in members)], text(cc="team@list.example"))
    assert [len(message.recipients) for message in upstream.messages] == [1, 5]
    copy = upstream.messages[1]
    for each in members:
        manifest = opened(copy.content, each, ALICE).manifest
        assert all(entry.address is None for entry in manifest.recipients)
    assert b"kid=" not in copy.content


async def test_more_than_100_visible_recipients_are_several_copies(tmp_path: Path) -> None:
    many = [person(f"p{number}@many.example") for number in range(103)]
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=many) as gw:
        addresses = [each.address for each in many]
        done = await gw.submit(ALICE.address, addresses, text(to=",\r\n ".join(addresses)))
    assert done.code == 250
    assert sorted(len(message.recipients) for message in upstream.messages) == [3, 100]
    assert max(map(len, upstream.messages[0].content.split(b"\r\n"))) <= 998


async def test_a_blob_to_oneself_only_where_it_shows_no_bcc(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, config={"seal_to_self": True}) as gw:
        await gw.submit(ALICE.address, [BOB.address, DAVE.address], text())
        await gw.submit(ALICE.address, [ALICE.address], text(to="alice@test.example", message_id="<two@test.example>"))
        await gw.submit(ALICE.address, [DAVE.address], text(message_id="<three@test.example>"))
        shared, alone, own, hidden = upstream.messages
        assert (shape([shared]), shape([alone])) == ([["bob"]], [["dave"]])
        assert opened(shared.content, ALICE, ALICE).original == text()
        for copy in (alone, hidden):
            with pytest.raises(Unreadable):
                opened(copy.content, ALICE, ALICE)
        assert own.content.count(b"vnd.malote.key-blob") == 1


async def test_split_sends_each_what_the_rules_say(tmp_path: Path) -> None:
    config = {"rules": (RuleConfig(mixed="split"),)}
    stranger = "stranger@else.example"
    async with Upstream() as upstream, gateway(tmp_path, upstream, config=config) as gw:
        done = await gw.submit(ALICE.address, [stranger, BOB.address, DAVE.address], text(cc=stranger),
                               mail=["BODY=8BITMIME", "RET=FULL", "ENVID=QQ1"])
    assert done.code == 250
    by_name = {message.recipients[0].split("@")[0]: message for message in upstream.messages}
    assert sorted(by_name) == ["bob", "dave", "stranger"]
    assert by_name["stranger"].content.endswith(text(cc=stranger))
    assert "BODY=8BITMIME" in by_name["stranger"].mail
    assert "RET=FULL" in by_name["stranger"].mail
    for name in ("bob", "dave"):
        assert b"the secret" not in by_name[name].content
        assert "RET=HDRS" in by_name[name].mail
        assert "BODY" not in by_name[name].mail
    assert all("ENVID=QQ1" in message.mail for message in upstream.messages)


async def test_sealed_8_bit_mail_needs_no_8bitmime_upstream(tmp_path: Path) -> None:
    body = "Grüße aus Köln, 8 bit"
    async with Upstream(extensions=("PIPELINING", "SIZE 1000000")) as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], text(body=body))
        assert done.code == 250
        assert upstream.messages[0].content.isascii()
        assert opened(upstream.messages[0].content, BOB, ALICE).original == text(body=body)
        plain = await gw.submit(ALICE.address, ["x@else.example"], text(to="x@else.example", body=body))
        assert plain.data.startswith("554 5.6.3"), "and plain 8-bit mail is refused there, not mangled"
    assert len(upstream.messages) == 1


async def test_size_is_what_is_really_sent_when_a_transaction_is_begun_anew(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address, DAVE.address], text())
    for message in upstream.messages:
        size = int(re.search(r"SIZE=(\d+)", message.mail)[1])  # type: ignore[index]
        assert size == len(message.content)


async def test_a_size_that_is_no_number_is_no_limit(tmp_path: Path) -> None:
    """int() takes fewer digits than str.isdigit() knows: each recipient was answered 451."""
    async with Upstream(extensions=("PIPELINING", "SIZE \u00b2")) as upstream, \
            Gateway(tmp_path, upstream_config(upstream.port), cards=(BOB,)) as gw:
        for number in range(2):
            assert (await gw.submit(ALICE.address, [BOB.address], text(message_id=f"<{number}@test.example>"))).code == 250


async def test_orcpt_and_notify_stay_with_their_recipient(tmp_path: Path) -> None:
    rcpt = {BOB.address: ["NOTIFY=FAILURE", "ORCPT=rfc822;Bob@test.example"],
            DAVE.address: ["NOTIFY=NEVER", "ORCPT=rfc822;Dave@test.example"]}
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address, DAVE.address], text(), rcpt=rcpt)
    lines = {message.recipients[0]: message.rcpts for message in upstream.messages}
    assert lines == {
        BOB.address: ["RCPT TO:<bob@test.example> NOTIFY=FAILURE ORCPT=rfc822;Bob@test.example"],
        DAVE.address: ["RCPT TO:<dave@test.example> NOTIFY=NEVER ORCPT=rfc822;Dave@test.example"]}


async def test_addresses_beyond_ascii_ask_for_smtputf8(tmp_path: Path) -> None:
    jose = person("jos\u00e9@test.example")
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=(jose, BOB)) as gw:
        async def send(recipient: str, number: str) -> str:
            submitted = text(to=recipient, message_id=f"<{number}@test.example>")
            return (await gw.submit(ALICE.address, [recipient], submitted, mail=["SMTPUTF8"])).data
        assert (await send("jos\u00e9@test.example", "1")).startswith("250")
        assert (await send(BOB.address, "2")).startswith("250")
    first, second = upstream.messages
    assert "SMTPUTF8" in first.mail
    assert "SMTPUTF8" not in second.mail, "an ASCII envelope must not be refused by a next server that lacks it"
    assert opened(first.content, jose, ALICE).original == text(to="jos\u00e9@test.example", message_id="<1@test.example>")


async def test_a_missing_date_and_message_id_are_in_the_original(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address, DAVE.address], text(date="", message_id=""))
    shared, alone = upstream.messages
    original = opened(shared.content, BOB, ALICE).original
    assert opened(alone.content, DAVE, ALICE).original == original
    assert re.match(rb"Date: \w{3}, \d+ .* \+0000\r\nMessage-ID: <[0-9a-f]{32}@test\.example>\r\nFrom: ", original)


async def test_a_reply_is_threaded_by_outer_ids_only(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address], text())
        await gw.submit(ALICE.address, [BOB.address], text(message_id="<two@test.example>", in_reply_to="<one@test.example>",
                                                           references="<zero@else.example> <one@test.example>"))
    first, second = (message.content for message in upstream.messages)
    outer = re.search(rb"\nMessage-ID: (\S+)", first)
    assert outer is not None
    assert b"\nIn-Reply-To: " + outer[1] in second
    assert b"one@test" not in first + second
    assert b"zero@else" not in second


async def test_the_same_mailbox_twice_is_one_recipient(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address, "BOB@Test.Example"], text())
    assert [reply[:3] for reply in done.rcpts.values()] == ["250", "250"]
    assert [message.rcpts for message in upstream.messages] == [["RCPT TO:<bob@test.example>"]]


async def test_lmtp_upstream_has_an_outcome_for_each_recipient(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> str | bool:
        return "550 5.1.1 no carol" if step == "DOT" and "carol" in argument else False
    async with Upstream(script, lmtp=True) as upstream, gateway(tmp_path, upstream, protocol="lmtp") as gw:
        done = await gw.submit(ALICE.address, [BOB.address, CAROL.address], text(cc="carol@test.example"))
    assert done.code == 554
    assert "Sent to bob@test.example" in done.data
    assert "NOT sent to carol@test.example" in done.data
    assert shape(upstream.messages) == [["bob"]]


async def test_a_large_message_is_sealed_off_the_loop_and_its_submitted_bytes_are_given_back(tmp_path: Path) -> None:
    """Above 64 KB hashing and sealing run in threads; a removed Bcc makes the hash read the body in place."""
    content = bytearray(b"Bcc: dave@test.example\r\n" + text(body="x" * 70 + "\r\n" + "large\r\n" * 50_000))
    wanted = bytes(content).split(b"\r\n", 1)[1]
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        session = ClientSession("s1", "127.0.0.1")
        await gw.desk.offer(session)
        await gw.desk.mail(session, ALICE.address, {})
        for each in (BOB, DAVE):
            assert (await gw.desk.rcpt(session, each.address, {})).code == 250
        assert (await gw.desk.data(session, content)).code == 250
        assert len(content) == 0
        await gw.desk.close(session)
    readers = {each.address: each for each in (BOB, DAVE)}
    assert len(upstream.messages) == 2
    for message in upstream.messages:
        assert opened(message.content, readers[message.recipients[0]], ALICE).original == wanted


@pytest.mark.parametrize(("size", "algorithm", "inline"), [
    (100, SignatureAlgorithm.ED25519, True), (200_000, SignatureAlgorithm.ED25519, False),
    (100, SignatureAlgorithm.HYBRID, False),
])
async def test_large_work_leaves_the_loop_free(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, algorithm: SignatureAlgorithm, inline: bool) -> None:
    """Looking into a large message, hashing and sealing it, and an ML-DSA signature, happen in a thread: other clients are served
    meanwhile."""
    threads: dict[str, str] = {}

    def note(module: Any, name: str, real: Callable[..., Any]) -> None:
        def noted(*arguments: Any) -> Any:
            threads[name] = threading.current_thread().name
            return real(*arguments)
        monkeypatch.setattr(module, name, noted)
    note(delivery, "make_copy", copies.make_copy)
    note(deciding, "decide_encrypted", encrypted.decide_encrypted)
    note(submission, "hmac_sha256", primitives.hmac_sha256)
    alice = new_identity(ALICE.address, algorithm, NOW_MS - 86_400_000)
    async with Upstream() as upstream, gateway(tmp_path, upstream, identities={ALICE.address: alice}) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text(body=("x" * 70 + "\r\n") * (size // 70)))).code == 250
    assert {name: thread.startswith("malote-seal") for name, thread in threads.items()} == {
        "make_copy": not inline, "decide_encrypted": size > INLINE_BYTES, "hmac_sha256": size > INLINE_BYTES}
