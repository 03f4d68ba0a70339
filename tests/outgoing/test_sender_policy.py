"""What is refused, and when: at RCPT what the envelope shows, at DATA what only the content shows. Nothing plain leaves then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from malote.config import RuleConfig
from malote.core.identity import new_identity
from malote.core.keys import SignatureAlgorithm
from outgoing.harness import NOW_MS, REQUIRE, Gateway, Upstream, opened, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))
STRANGER = "stranger@else.example"
OPENPGP = ('Content-Type: multipart/encrypted; protocol="application/pgp-encrypted"; boundary=x\r\n\r\n--x\r\n'
           "Content-Type: application/pgp-encrypted\r\n\r\nVersion: 1\r\n\r\n--x\r\n"
           "Content-Type: application/octet-stream\r\n\r\n"
           "-----BEGIN PGP MESSAGE-----\r\n\r\nhQEMA+lhpKKOqZk8AQf/ZZZZ\r\n=AAAA\r\n-----END PGP MESSAGE-----\r\n\r\n--x--\r\n")


def gateway(directory: Path, server: Upstream, rules: tuple[RuleConfig, ...] = (), **more: Any) -> Gateway:
    return Gateway(directory, upstream_config(server.port), config={"rules": rules}, **({"cards": (BOB, CAROL)} | more))


async def test_require_without_card_is_refused_at_rcpt_naming_the_way_out(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, REQUIRE) as gw:
        done = await gw.submit(ALICE.address, [STRANGER, BOB.address], text())
        assert done.rcpts[STRANGER].startswith("550 5.7.1 No key for stranger@else.example; nothing was sent")
        assert "malote keys import" in done.rcpts[STRANGER]
        assert done.code == 250, "the recipient with a card goes on"
    assert [message.recipients for message in upstream.messages] == [[BOB.address]]
    assert STRANGER.encode() not in upstream.wire


@pytest.mark.parametrize("address", ["bob..x@test.example", "bob@[300.1.1.1]", "b\u200bob@test.example"])
async def test_what_has_no_canonical_form_is_553(tmp_path: Path, address: str) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [address], text(), mail=["SMTPUTF8"])
    assert done.rcpts[address][:3] in ("553", "501")
    assert "5.1.3" in done.rcpts[address]
    assert upstream.messages == []


SPELLINGS = ["BOB@TEST.EXAMPLE", '"bob"@test.example', '"b\\ob"@Test.example',
             "bob@\uff54\uff45\uff53\uff54.example", "bob@test\u3002example", "bob@te\u00adst.example"]
ROUTES = ["bob%test.example@relay.example", "test.example!bob@relay.example", '"bob@test.example"@relay.example',
          "bob%test.example%c.example@relay.example", "BOB%TEST.EXAMPLE@relay.example",
          "x.example!test.example!bob@relay.example"]
NOBODY = ["bob@test.example.", "bob@.test.example", '"bob"x@test.example', "bob@test.example\u3002"]


@pytest.mark.parametrize("rules", [(), (RuleConfig(recipients=("@test.example",), seal="require"),)], ids=["card", "rule"])
async def test_no_spelling_of_an_address_and_no_route_to_it_is_a_way_out_in_clear(
        tmp_path: Path, rules: tuple[RuleConfig, ...]) -> None:
    """Bob has a card (or his domain a rule): however he is written, his mail is sealed or refused. A relay in between may
    follow a route in the local part, as Postfix and Sendmail do for clients they trust."""
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        for number, spelled in enumerate([*SPELLINGS, *ROUTES, *NOBODY]):
            content = text(message_id=f"<{number}@test.example>")
            before = len(upstream.messages)
            done = await gw.submit(ALICE.address, [spelled], content, mail=["SMTPUTF8"])
            if spelled in SPELLINGS:
                assert done.code == 250, spelled
                assert opened(upstream.messages[-1].content, BOB, ALICE).signature == "valid"
            elif spelled in ROUTES:
                assert done.data.startswith("550 5.7.1 Mail for "), spelled
                assert "@test.example must be sealed" in done.data or "@c.example must" in done.data
            else:
                assert done.code in (501, 553), spelled
            assert len(upstream.messages) == before + (spelled in SPELLINGS)
        assert b"the secret" not in upstream.wire
        assert (await gw.submit(ALICE.address, ["bob%else.example@relay.example"], text())).code == 250, "leads to nobody sealed"


async def test_who_ever_had_a_card_is_not_written_to_in_clear(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))).code == 250
        await gw.store.remove_card(BOB.address)
        done = await gw.submit(ALICE.address, [BOB.address], text())
        assert done.rcpts[BOB.address].startswith("550 5.7.1")
        expired = new_identity("old@test.example", SignatureAlgorithm.ED25519, NOW_MS - 1000 * 86_400_000)
        await gw.give_card(expired)
        assert (await gw.submit(ALICE.address, [expired.address], text())).rcpts[expired.address].startswith("550 5.7.1")
    assert len(upstream.messages) == 1


async def test_sealed_for_one_and_clear_for_another_is_refused_whole(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address, STRANGER], text(cc=STRANGER))
        assert done.data.startswith("550 5.7.1")
        assert BOB.address in done.data
        assert STRANGER in done.data
        again = await gw.submit(ALICE.address, [BOB.address], text())
        assert again.code == 250, "the connection goes on after the refusal"
    assert len(upstream.messages) == 1


async def test_from_without_identity_is_plain_under_prefer_and_refused_under_require(tmp_path: Path) -> None:
    other = "nobody@test.example"
    rules = (RuleConfig(recipients=("@strict.example",), seal="require"),)
    strict = person("s@strict.example")
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules, cards=(BOB, strict)) as gw:
        assert (await gw.submit(other, [STRANGER], text(other, STRANGER))).code == 250
        for recipient in (BOB.address, strict.address):
            done = await gw.submit(other, [recipient], text(other, recipient))
            assert done.data.startswith("550 5.7.1 No identity for nobody@test.example")
            assert "malote keys new" in done.data
    [message] = upstream.messages
    assert message.content.endswith(text(other, STRANGER))


@pytest.mark.parametrize("sender", ["a@test.example, b@test.example", "", "not an address"])
async def test_a_message_without_one_author_is_refused(tmp_path: Path, sender: str) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, [STRANGER], text(sender))).code in (550, 554)
        two = text().replace(b"From", b"From: mallory@test.example\r\nFrom")
        assert (await gw.submit(ALICE.address, [BOB.address], two)).code in (550, 554)
    assert upstream.messages == []


@pytest.mark.parametrize(("rules", "outcome"), [((RuleConfig(allow_no=True),), "plain"), ((), "sealed"), (REQUIRE, "sealed")])
async def test_the_users_no_counts_only_where_a_rule_says_so(tmp_path: Path, rules: tuple[RuleConfig, ...], outcome: str) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream, rules) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text(malote_seal="no"))).code == 250
    [message] = upstream.messages
    assert b"alote-Seal" not in message.content
    if outcome == "plain":
        assert message.content.endswith(text())
        assert "RET" not in message.mail, "begun as sealed, so begun anew"
    else:
        assert b"secret" not in upstream.wire
        assert opened(message.content, BOB, ALICE).original == text()


async def test_the_users_yes_refuses_whom_no_card_is_held_for(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [STRANGER], text(malote_seal="Yes"))
        assert done.data.startswith("550 5.7.1 No key for stranger@else.example")
        assert (await gw.submit(ALICE.address, [STRANGER], text(malote_seal="perhaps"))).code == 554
    assert upstream.messages == []


async def test_encrypted_mail_is_sealed_like_any_other_unless_a_rule_accepts_it(tmp_path: Path) -> None:
    encrypted = text(to=f"{BOB.address}, {STRANGER}").split(b"\r\n\r\n")[0] + b"\r\n" + OPENPGP.encode()
    accepting = (RuleConfig(recipients=("@else.example",), seal="require", accept_encrypted=True),)
    async with Upstream() as upstream, gateway(tmp_path, upstream, accepting) as gw:
        assert (await gw.submit(ALICE.address, [STRANGER], encrypted)).code == 250
        assert upstream.messages[0].content.endswith(encrypted)
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER))).data.startswith("550 5.7.1 No key for")
        assert (await gw.submit(ALICE.address, [BOB.address], encrypted)).code == 250
        assert opened(upstream.messages[1].content, BOB, ALICE).original == encrypted
        both = await gw.submit(ALICE.address, [BOB.address, STRANGER], encrypted + b"\r\n")
        assert both.code == 250, "encrypted is not clear: no mix"
    assert len(upstream.messages) == 4


async def test_what_is_sealed_already_passes_as_it_is(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path / "one", upstream) as gw:
        await gw.submit(ALICE.address, [BOB.address], text())
    sealed = upstream.messages[0].content
    async with Upstream() as next_hop, gateway(tmp_path / "two", next_hop) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], sealed)).code == 250
    assert next_hop.messages[0].content.endswith(sealed)


async def test_a_loop_is_cut(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        done = await gw.submit(ALICE.address, [BOB.address], b"Received: by x; Mon, 23 Nov 2026 10:00:00 +0000\r\n" * 51 + text())
    assert done.data.startswith("554 5.4.6")
    assert upstream.messages == []


async def test_a_gateways_card_serves_who_has_none_and_never_replaces_ones_own(tmp_path: Path) -> None:
    domain = person("@firm.example")
    person_there = person("ann@firm.example")
    async with Upstream() as upstream, gateway(tmp_path, upstream, cards=(domain, person_there)) as gw:
        for recipient, reader in (("zoe@firm.example", domain), ("ann@firm.example", person_there)):
            assert (await gw.submit(ALICE.address, [recipient], text(to=recipient))).code == 250
            assert opened(upstream.messages[-1].content, reader, ALICE).original == text(to=recipient)
        await gw.store.remove_card("ann@firm.example")
        done = await gw.submit(ALICE.address, ["ann@firm.example"], text(to="ann@firm.example"))
        assert done.rcpts["ann@firm.example"].startswith("550 5.7.1"), "a gateway must not read what was for the person alone"
    assert len(upstream.messages) == 2


async def test_an_organisations_identity_signs_for_the_people_of_its_domain(tmp_path: Path) -> None:
    domain = person("@test.example")
    async with Upstream() as upstream, gateway(tmp_path, upstream, identities={"@test.example": domain}, cards=(BOB,)) as gw:
        assert (await gw.submit("carl@test.example", [BOB.address], text("Carl <carl@test.example>"))).code == 250
    got = opened(upstream.messages[0].content, BOB, domain)
    assert got.signature == "valid"
    assert (got.manifest.sender, got.manifest.scope) == ("carl@test.example", "gateway")


async def test_a_reply_to_sealed_mail_leaves_sealed_or_not_at_all(tmp_path: Path) -> None:
    """RFC 9787 5.4: what it quotes was sealed. Known by In-Reply-To or References, from mail that was sealed or opened here."""
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text(message_id="<first@test.example>"))).code == 250
        gw.store.remember_outer_id("<second@else.example>", "<outer@else.example>", NOW_MS)
        for fields in ({"in_reply_to": "<first@test.example>"}, {"references": "<x@y>\r\n <second@else.example>"}):
            done = await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER, **fields))
            assert done.code == 550
            assert done.data.startswith("550 5.7.1 This answers sealed mail, but there is no key for stranger@else.example")
        assert (await gw.submit(ALICE.address, [STRANGER], text(to=STRANGER, in_reply_to="<other@x.example>"))).code == 250
        assert (await gw.submit(ALICE.address, [BOB.address], text(in_reply_to="<first@test.example>"))).code == 250
    assert [message.recipients for message in upstream.messages] == [[BOB.address], [STRANGER], [BOB.address]]


async def test_a_reply_to_opened_mail_goes_only_to_those_who_had_part_in_it(tmp_path: Path) -> None:
    """RFC 9787 5.4, RFC 9788 6.2: nobody is let into a sealed conversation by a slip, nor by a hostile Cc that was not signed.
    What In-Reply-To names counts, else the nearest in References; the author himself is never an outsider."""
    async with Upstream() as upstream, gateway(tmp_path, upstream, (RuleConfig(recipients=("@test.example",)),)) as gw:
        gw.store.remember_outer_id("<old@x.example>", "<o1@x.example>", NOW_MS, {BOB.address, CAROL.address, ALICE.address})
        gw.store.remember_outer_id("<new@x.example>", "<o2@x.example>", NOW_MS, {BOB.address})
        for fields in ({"in_reply_to": "<new@x.example>"},
                       {"references": "<old@x.example> <new@x.example> <unknown@x.example>"},
                       {"in_reply_to": "<new@x.example>", "references": "<new@x.example> <old@x.example>"},
                       {"in_reply_to": "<old@x.example> <new@x.example>"}):
            done = await gw.submit(ALICE.address, [BOB.address, CAROL.address], text(**fields))
            assert done.data.startswith("550 5.7.1 This answers sealed mail that carol@test.example had no part in; nothing")
            assert "Malote-Seal: yes" in done.data
        assert upstream.messages == []
        for fields in ({"in_reply_to": "<old@x.example>"}, {"references": "<new@x.example> <old@x.example>"},
                       {"in_reply_to": "<new@x.example>", "malote_seal": "yes"}):
            content = text(message_id=f"<{len(upstream.messages)}@test.example>", **fields)
            assert (await gw.submit(ALICE.address, [BOB.address, CAROL.address], content)).code == 250, fields
        assert (await gw.submit(ALICE.address, [ALICE.address], text(in_reply_to="<new@x.example>"))).code == 250
    assert b"secret" not in upstream.wire


async def test_an_override_of_a_reply_in_clear_needs_a_rule_that_allows_it(tmp_path: Path) -> None:
    rules = (RuleConfig(recipients=(STRANGER,), allow_no=True),)
    reply = text(to=STRANGER, in_reply_to="<new@x.example>", malote_seal="no")
    for given, code in ((rules, 250), ((), 550)):
        async with Upstream() as upstream, gateway(tmp_path / str(code), upstream, given) as gw:
            gw.store.remember_outer_id("<new@x.example>", "", NOW_MS, {BOB.address})
            assert (await gw.submit(ALICE.address, [STRANGER], reply)).code == code
        assert len(upstream.messages) == (code == 250)
