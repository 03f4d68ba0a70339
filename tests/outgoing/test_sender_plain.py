"""Mail that leaves unsealed: sent once for each time the client means it, without a row in the journal beforehand."""

from __future__ import annotations

from pathlib import Path

from outgoing.harness import Answer, Gateway, Upstream, person, text, upstream_config

ALICE, BOB, CAROL = (person(f"{name}@test.example") for name in ("alice", "bob", "carol"))


def gateway(directory: Path, upstream: Upstream, **more: object) -> Gateway:
    return Gateway(directory / "gateway", upstream_config(upstream.port, **more))      # no cards: nothing is sealed


async def test_sent_again_on_purpose_arrives_again(tmp_path: Path) -> None:
    async with Upstream() as upstream, gateway(tmp_path, upstream) as gw:
        for _ in range(3):
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
    assert [message.content.count(b"the secret text") for message in upstream.messages] == [1, 1, 1]


async def test_a_client_that_was_lost_gets_its_answer_without_a_second_copy(tmp_path: Path) -> None:
    """Its retries come at once, and to a process that was started again."""
    async with Upstream() as upstream:
        for _ in range(2):
            async with gateway(tmp_path, upstream) as gw:
                for _ in range(2):
                    assert (await gw.submit(ALICE.address, [BOB.address], text(), polite=False)).code == 250
        assert len(upstream.messages) == 1
        async with gateway(tmp_path, upstream) as gw:
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250, "this one reads its reply"
            assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250, "so this is a new message"
    assert len(upstream.messages) == 2


async def test_a_retry_of_what_is_in_doubt_has_the_same_bytes(tmp_path: Path) -> None:
    """Twice is possible (RFC 1047); then both have the id by which readers tell that they are one, also where we added it."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return None if step == "DOT!" and number == 1 else False
    for number, submitted in enumerate((text(), text(message_id=""), text(date=""))):
        async with Upstream(script) as upstream, gateway(tmp_path / str(number), upstream) as gw:
            assert (await gw.submit(ALICE.address, [BOB.address], submitted)).code == 451
            assert (await gw.submit(ALICE.address, [BOB.address], submitted)).code == 250
        first, second = (message.content.partition(b"+0000\r\n")[2] for message in upstream.messages)
        assert first == second, "all after our Received line"
        assert first.count(b"Message-ID: ") == first.count(b"Date: ") == 1


async def test_of_several_recipients_only_who_lacks_it_gets_it(tmp_path: Path) -> None:
    """LMTP answers for each."""
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "451 4.2.2 mailbox full" if step == "DOT" and number == 2 else False
    async with Upstream(script, lmtp=True) as upstream, gateway(tmp_path, upstream, protocol="lmtp") as gw:
        both = [BOB.address, CAROL.address]
        assert (await gw.submit(ALICE.address, both, text())).code == 451
        assert (await gw.submit(ALICE.address, both, text())).code == 250
    assert [message.recipients for message in upstream.messages] == [[BOB.address], [CAROL.address]]


async def test_after_a_refusal_the_message_is_tried_again(tmp_path: Path) -> None:
    def script(step: str, argument: str, number: int) -> Answer | bool:
        return "554 5.7.1 not this" if step == "DOT" and number == 1 else False
    async with Upstream(script) as upstream, gateway(tmp_path, upstream) as gw:
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 554
        assert (await gw.submit(ALICE.address, [BOB.address], text())).code == 250
    assert len(upstream.messages) == 1
