"""One message for recipients of every kind, seen whole at the upstream server: each gets exactly what is his; and the server
fails at every step of every transaction while the client comes again: each is served once, or told to the sender once."""

from __future__ import annotations

import asyncio
import base64
import random
import re
import smtplib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.servers import Lab
from malote.config import LimitsConfig, RuleConfig
from malote.core.open import Opened
from malote.errors import Unreadable
from malote.store import Store
from outgoing.harness import Answer, Gateway, Received, Upstream, opened, person, submit, text, upstream_config, verdict

ALICE = person("alice@test.example")
RULES = (RuleConfig(recipients=("@never.example",), seal="never", mixed="split"),
         RuleConfig(recipients=("@list.example",), list=True), RuleConfig(mixed="split"))
MODES = ("personal", "relay")


def gateway(directory: Path, server: Upstream, cards: Sequence[Any], *, mode: str = "personal", **more: Any) -> Gateway:
    config = {"rules": RULES, "partial_failure": mode}
    return Gateway(directory, upstream_config(server.port, command_seconds=more.pop("command_seconds", 30)), cards=cards,
                   config=config, **more)


# ---- 200 recipients

VISIBLE = [f"to{number}@sealed.example" for number in range(60)] + [f"cc{number}@sealed.example" for number in range(50)]
HIDDEN = [f"bcc{number}@sealed.example" for number in range(30)]
LISTED = [f"member{number}@list.example" for number in range(30)]
PLAIN_SHOWN = [f"to{number}@never.example" for number in range(10)] + [f"cc{number}@nocard.example" for number in range(8)]
PLAIN_HIDDEN = [f"bcc{number}@never.example" for number in range(7)] + [f"bcc{number}@nocard.example" for number in range(5)]
ALL = [*VISIBLE, *HIDDEN, *LISTED, *PLAIN_SHOWN, *PLAIN_HIDDEN]
WITH_CARDS = {address: person(address) for address in (*VISIBLE, *HIDDEN, *LISTED, "to0@never.example")}


def visible_bytes(message: Received, reader: Opened | None) -> bytes:
    """Everything that somebody who can open this copy sees of it: envelope, outer message, each part decoded, manifest, text."""
    seen = [message.mail.encode(), *(line.encode() for line in message.rcpts), message.content]
    seen += [base64.b64decode(part) for part in re.findall(rb"base64\r\n.*?\r\n\r\n(.*?)\r\n--", message.content, re.DOTALL)]
    if reader is not None:
        seen += [repr(reader.manifest).encode(), reader.original]
    return b"\n".join(seen).lower()


async def test_two_hundred_recipients_of_every_kind_each_get_exactly_what_is_theirs(tmp_path: Path) -> None:
    assert len(ALL) == 200
    shown_to, shown_cc = [a for a in ALL if a.startswith("to")], [a for a in ALL if a.startswith("cc")]
    header = f"Bcc: {', '.join((*HIDDEN, *PLAIN_HIDDEN))}\r\n".replace(", ", ",\r\n ").encode()
    submitted = text(to=",\r\n ".join(shown_to), cc=",\r\n ".join((*shown_cc, "team@list.example")))
    order = random.Random(1).sample(ALL, len(ALL))     # as no client would sort them
    rcpt = {address: ["NOTIFY=FAILURE", f"ORCPT=rfc822;{address}"] for address in ALL}
    async with Upstream() as upstream, gateway(tmp_path, upstream, tuple(WITH_CARDS.values())) as gw:
        done = await gw.submit(ALICE.address, order, header + submitted, rcpt=rcpt)
    assert done.code == 250
    served = Counter(address for message in upstream.messages for address in message.recipients)
    assert served == Counter(ALL), "each once"
    hidden = {*HIDDEN, *PLAIN_HIDDEN}
    ids, numbers = set(), set()
    for message in upstream.messages:
        own = set(message.recipients)
        assert {line.split(" ", 2)[2] for line in message.rcpts} == {f"NOTIFY=FAILURE ORCPT=rfc822;{a}" for a in own}, \
            "each RCPT has its own parameters and nobody else's"
        if own & {*PLAIN_SHOWN, *PLAIN_HIDDEN}:
            assert own == {*PLAIN_SHOWN, *PLAIN_HIDDEN}, "one body for all that leaves as it is"
            assert re.fullmatch(rb"Received: [^\r]*\r\n [^\r]*\r\n", message.content.removesuffix(submitted)), "and ours on top"
            assert not any(address.encode() in message.content for address in hidden)
            continue
        assert b"the secret" not in message.content
        for address in own:
            got = opened(message.content, WITH_CARDS[address], ALICE)
            assert (got.original, got.signature, got.unsealed.recipient) == (submitted, "valid", address)
            ids.add(got.manifest.id)
            numbers.add((address, got.unsealed.stream, got.unsealed.serial, got.unsealed.prev))
            entries = {entry.address for entry in got.manifest.recipients}
            assert entries == ({None} if own <= set(LISTED) else own), "the manifest names this copy's readers, or nobody"
        seen = visible_bytes(message, got)
        for other in hidden - own:
            assert other.encode() not in seen, "a Bcc is in no byte of any other copy"
        assert len(own) == 1 if own & set(HIDDEN) else own <= set(VISIBLE) or own <= set(LISTED)
        stranger = HIDDEN[0] if HIDDEN[0] not in own else HIDDEN[1]
        with pytest.raises(Unreadable):
            opened(message.content, WITH_CARDS[stranger], ALICE)
    assert len(ids) == 1, "one submission, one id"
    assert len(numbers) == len(VISIBLE) + len(HIDDEN) + len(LISTED)


@pytest.mark.long
async def test_two_hundred_real_mailboxes_each_get_one_mail_and_their_own(lab: Lab, tmp_path: Path) -> None:
    """The same through a real Postfix, which splits and queues as it likes, into real mailboxes of a Dovecot."""
    dovecot = await asyncio.to_thread(lab.dovecot, ALL)
    postfix = await asyncio.to_thread(lab.postfix, dovecot.lmtp_hop)
    shown = {name: ",\r\n ".join(address for address in ALL if address.startswith(name)) for name in ("to", "cc")}
    submitted = text(**shown)
    config = {"rules": RULES}
    async with Gateway(tmp_path, upstream_config(postfix.port), cards=tuple(WITH_CARDS.values()), config=config) as gw:
        done = await gw.submit(ALICE.address, ALL, submitted)
        assert done.code == 250
    async with asyncio.timeout(120):
        while postfix.queued() or not all(dovecot.messages(address) for address in ALL):
            await asyncio.sleep(0.2)
    text_part = submitted.partition(b"\r\n\r\n")[2]
    for address in ALL:
        [message] = dovecot.messages(address)
        if address in (*PLAIN_SHOWN, *PLAIN_HIDDEN):
            assert message.replace(b"\r\n", b"\n").endswith(text_part.replace(b"\r\n", b"\n"))
        else:
            assert opened(message, WITH_CARDS[address], ALICE).original == submitted
            assert b"the secret" not in message
        # Postfix's and Dovecot's own trace names the one whose mailbox it is
        assert not [other for other in (*HIDDEN, *PLAIN_HIDDEN) if other != address and other.encode() in message]
    for server in (postfix, dovecot):
        await asyncio.to_thread(server.stop)


# ---- failing anywhere

PEOPLE = {address: person(address) for address in
          ("bob@sealed.example", "carol@sealed.example", "dave@hidden.example", "eve@hidden.example",
           "one@list.example", "two@list.example")}
PLAIN = ("paul@never.example", "nora@nocard.example")
RECIPIENTS = [*PEOPLE, *PLAIN]
TO = "bob@sealed.example, paul@never.example"
CC = "carol@sealed.example, team@list.example"
ANSWERS: tuple[Answer, ...] = ("421 4.3.2 going down", "451 4.0.0 not now", "550 5.0.0 never", None, "")
QUICK = {"limits": LimitsConfig(reply_within_seconds=0.4), "command_seconds": 0.4}     # for servers that hang


class Client:
    """Comes again as a mail server does: for those who were refused for now, until each is accepted or refused for good."""

    def __init__(self, gateway: Gateway, content: bytes) -> None:
        self.gateway = gateway
        self.content = content
        self.accepted: set[str] = set()
        self.refused: dict[str, str] = {}
        self.tries = 0

    async def run(self) -> None:
        async with asyncio.timeout(120):
            while waiting := [a for a in RECIPIENTS if a not in self.accepted and a not in self.refused]:
                self.tries += 1
                await self._try(waiting)

    async def _try(self, waiting: list[str]) -> None:
        try:
            done = await asyncio.to_thread(submit, self.gateway.port, ALICE.address, waiting, self.content, polite=False)
        except (smtplib.SMTPException, OSError):
            return
        took = [address for address, reply in done.rcpts.items() if reply.startswith("250")]
        self.refused |= {address: reply for address, reply in done.rcpts.items() if reply.startswith("5")}
        if not took:
            return
        if done.code == 250:
            self.accepted.update(took)
        elif done.code // 100 == 5:
            self.refused |= dict.fromkeys(took, done.data)


def served(upstream: Upstream) -> Counter[str]:
    return Counter(address for message in upstream.messages if message.sender for address in message.recipients)


def notices(upstream: Upstream) -> list[bytes]:
    return [message.content for message in upstream.messages if not message.sender]


async def check(directory: Path, upstream: Upstream, client: Client, *, unconfirmed: bool) -> None:
    """`unconfirmed`: the server took a message and did not say so, which alone may bring it twice."""
    assert b"the secret" not in b"".join(
        message.content for message in upstream.messages if not set(message.recipients) & set(PLAIN))
    counts = served(upstream)
    told = Counter(address for notice in {re.search(rb"\nMessage-ID: (\S+)", n)[1]: n for n in notices(upstream)}.values()  # type: ignore[index]
                   for address in RECIPIENTS if f"Final-Recipient: rfc822; {address}\r\n".encode() in notice)
    for address in RECIPIENTS:
        reply = client.refused.get(address, "")
        if address in client.accepted:
            assert (counts[address] > 0) != (told[address] > 0), f"{address}: served, or its failure told, never both or neither"
            assert told[address] <= 1
        elif counts[address]:
            assert re.search(rf"(?<!NOT )[Ss]ent to [^\n]*{address}", reply.replace(address + "\n", address)), reply
    store = await Store.open(directory)
    try:
        for address, reader in PEOPLE.items():
            mine = [message.content for message in upstream.messages if address in message.recipients]
            verdicts = [await verdict(store, content, reader, ALICE) for content in mine]
            assert verdicts == ["FRESH"] * bool(mine) + ["DUPLICATE"] * (len(verdicts) - 1)
            assert len(verdicts) <= 1 or unconfirmed
            for content in mine:
                assert opened(content, reader, ALICE).original == client.content
    finally:
        await store.close()
    for address in PLAIN:
        assert counts[address] <= 1 or unconfirmed


async def one_failure(directory: Path, mode: str, step: str, number: int, answer: Answer, *, lost: str = "") -> None:
    """`lost`: a recipient whom the server refuses for good in the transactions that follow the client's own."""
    def script(at: str, argument: str, count: int) -> Answer | bool:
        if (at, count) == (step, number):
            return answer
        return "550 5.1.1 gone" if lost and at == "RCPT" and lost in argument and count > len(RECIPIENTS) else False
    more: dict[str, Any] = {"mode": mode, **(QUICK if answer == "" else {})}
    async with Upstream(script) as upstream, gateway(directory / "gw", upstream, tuple(PEOPLE.values()), **more) as gw:
        client = Client(gw, text(to=TO, cc=CC))
        await client.run()
        assert client.tries <= 2 or answer == "", "one failure costs one more try"
        count = len(upstream.messages)
        if set(RECIPIENTS) == client.accepted:      # the client did not get our last reply, and comes once more
            again = await gw.submit(ALICE.address, RECIPIENTS, client.content, polite=False)
            assert again.code == 250
            assert len(upstream.messages) == count, "nobody is served, and the sender is not told, again"
    await check(directory / "receivers", upstream, client, unconfirmed=step == "DOT!" or answer == "")


async def steps_of(directory: Path, mode: str, *, lost: str = "") -> Counter[str]:
    """How often each step happens when all goes well."""
    def script(at: str, argument: str, count: int) -> Answer | bool:
        return "550 5.1.1 gone" if lost and at == "RCPT" and lost in argument and count > len(RECIPIENTS) else False
    async with Upstream(script) as upstream, gateway(directory, upstream, tuple(PEOPLE.values()), mode=mode) as gw:
        await Client(gw, text(to=TO, cc=CC)).run()
        return Counter(upstream.steps)


async def every_failure(directory: Path, mode: str, answer: Answer, *, lost: str = "", only: Sequence[str] = ()) -> int:
    steps = await steps_of(directory / "well", mode, lost=lost)
    places = [(step, number) for step, count in steps.items() if (step != "QUIT" or answer != "") and (not only or step in only)
              for number in range(1, count + 1) if not (step == "DOT!" and str(answer)[:1] == "5")]
    room = asyncio.Semaphore(16 if answer == "" else 4)

    async def run(step: str, number: int) -> None:
        async with room:
            await one_failure(directory / f"{step}{number}", mode, step, number, answer, lost=lost)
    await asyncio.gather(*(run(*place) for place in places))
    return len(places)


def each_answer(*quick: str) -> pytest.MarkDecorator:
    names = ("421", "451", "550", "cut", "hang")
    return pytest.mark.parametrize("answer", [
        pytest.param(answer, id=name, marks=() if name in quick else pytest.mark.long)
        for name, answer in zip(names, ANSWERS, strict=True)])


@each_answer("451")
async def test_a_failure_at_any_step_of_any_transaction(tmp_path: Path, answer: Answer) -> None:
    """The client's own transaction, then the visible copy, the plain, the list, and each Bcc: every step of each."""
    assert await every_failure(tmp_path, "personal", answer) >= 37


@each_answer("cut")
async def test_a_relay_whose_notification_fails_at_any_step(tmp_path: Path, answer: Answer) -> None:
    """One Bcc is refused for good once the others are served; a failure at any step, those of the notification included."""
    assert await every_failure(tmp_path, "relay", answer, lost="dave") >= 40


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.long if seed > 1 else ()) for seed in range(40)])
async def test_one_failure_after_another(tmp_path: Path, seed: int) -> None:
    """Up to 25 failures at steps that chance chooses; those for good only once the client's own transaction is over: what the
    server refuses for good after it took it, is for the client both."""
    chance = random.Random(seed)
    left, at_data = 25, False

    def script(at: str, _argument: str, _count: int) -> Answer | bool:
        nonlocal left
        if at in ("QUIT", "DOT!") or not left or chance.random() > 0.2:
            return False
        left -= 1
        answer = chance.choice((*ANSWERS[:-1], "451 4.0.0 not now"))
        return "451 4.0.0 not now" if str(answer)[0] == "5" and not at_data else answer

    mode = MODES[seed % 2]
    async with Upstream(script) as upstream, gateway(tmp_path / "gw", upstream, tuple(PEOPLE.values()), mode=mode) as gw:
        real = gw.desk.data

        async def data(*arguments: Any) -> Any:
            nonlocal at_data
            at_data = True
            try:
                return await real(*arguments)
            finally:
                at_data = False
        gw.desk.data = data  # type: ignore[method-assign]
        client = Client(gw, text(to=TO, cc=CC))
        await client.run()
    await check(tmp_path / "receivers", upstream, client, unconfirmed=False)
