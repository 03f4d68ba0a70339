"""Real clients hand mail to the gateway; a real Postfix takes it from there; what lies in the Dovecot mailbox opens."""

from __future__ import annotations

import asyncio
import smtplib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.policy import SMTPUTF8
from itertools import count
from pathlib import Path

import pytest

from lab.servers import PASSWORD, Dovecot, Lab, Postfix
from malote.config import ListenerConfig, RuleConfig
from malote.core.identity import Identity
from outgoing.harness import HOST, Gateway, Upstream, opened, person, text, upstream_config

ALICE = person("alice@test.example")
_numbers = count(1)


@pytest.fixture(scope="module", autouse=True)
def readers(dovecot: Dovecot) -> None:
    """Mailboxes for all, at once: Dovecot takes a second to see new ones."""
    dovecot.add_users([f"reader-{number}@test.example" for number in range(1, 150)])


@pytest.fixture
async def gateway(tmp_path: Path, postfix: Postfix) -> AsyncIterator[Gateway]:
    async with Gateway(tmp_path, upstream_config(postfix.port), config={"rules": (RuleConfig(seal="require"),)}) as gw:
        yield gw


async def reader(gateway: Gateway) -> Identity:
    """Somebody new with keys and a mailbox."""
    identity = person(f"reader-{next(_numbers)}@test.example")
    await gateway.give_card(identity)
    return identity


async def delivered(dovecot: Dovecot, identity: Identity, wanted: int = 1) -> list[bytes]:
    deadline = time.monotonic() + 30
    while len(messages := dovecot.messages(identity.address)) < wanted and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return messages


async def original(dovecot: Dovecot, identity: Identity) -> bytes:
    """The one message in this mailbox, opened with CRLF as it was sealed."""
    [raw] = await delivered(dovecot, identity)
    got = opened(raw, identity, ALICE)
    assert (got.signature, got.addressed) == ("valid", True)
    assert not got.outer_differences
    return got.original


async def run(*command: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return await asyncio.to_thread(subprocess.run, command, input=stdin, capture_output=True, check=False, timeout=60)


async def test_smtplib_with_attachment_and_non_ascii_subject(gateway: Gateway, dovecot: Dovecot) -> None:
    bob = await reader(gateway)
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"], message["To"], message["Subject"] = "Älice <alice@test.example>", bob.address, "Grüße – streng geheim"
    message.set_content("Der geheime Text\n")
    message.add_attachment(bytes(range(256)) * 100, maintype="application", subtype="octet-stream", filename="ä.bin")
    sent = message.as_bytes()

    def send() -> None:
        with smtplib.SMTP(HOST, gateway.port) as client:
            client.sendmail(ALICE.address, [bob.address], sent)
    await asyncio.to_thread(send)
    got = await original(dovecot, bob)
    assert got.endswith(sent)
    assert got.startswith(b"Date: ")


async def test_swaks(gateway: Gateway, dovecot: Dovecot, tmp_path: Path) -> None:
    bob = await reader(gateway)
    (tmp_path / "file.bin").write_bytes(b"attached" * 5000)
    done = await run("swaks", "--server", HOST, "--port", str(gateway.port), "--from", ALICE.address, "--to", bob.address,
                     "--header", "Subject: =?utf-8?q?f=C3=BCr_dich?=", "--body", "the body", "--attach", f"@{tmp_path}/file.bin")
    assert done.returncode == 0, done.stdout.decode()
    assert b"Subject: =?utf-8?q?f=C3=BCr_dich?=" in await original(dovecot, bob)


async def test_swaks_is_refused_at_rcpt_for_whom_no_card_is_held(gateway: Gateway, dovecot: Dovecot) -> None:
    done = await run("swaks", "--server", HOST, "--port", str(gateway.port), "--from", ALICE.address, "--to", "judy@test.example")
    assert done.returncode == 24     # swaks: no recipient was accepted
    assert b"550 5.7.1 No key for judy@test.example" in done.stdout
    assert dovecot.messages("judy@test.example") == []


async def test_msmtp(gateway: Gateway, dovecot: Dovecot) -> None:
    bob, hidden = await reader(gateway), await reader(gateway)
    sent = text(to=bob.address, message_id="").replace(b"\r\n", b"\n")
    done = await run("msmtp", "--host", HOST, "--port", str(gateway.port), "--auth=off", "--tls=off", "--from", ALICE.address,
                     "--", bob.address, hidden.address, stdin=b"Bcc: " + hidden.address.encode() + b"\n" + sent)
    assert done.returncode == 0, done.stderr.decode()
    assert hidden.address.encode() not in await original(dovecot, bob)
    assert await original(dovecot, hidden) == await original(dovecot, bob)


async def test_curl(gateway: Gateway, dovecot: Dovecot, tmp_path: Path) -> None:
    bob = await reader(gateway)
    (tmp_path / "message").write_bytes(text(to=bob.address))
    done = await run("curl", "-sS", f"smtp://{HOST}:{gateway.port}", "--mail-from", ALICE.address, "--mail-rcpt", bob.address,
                     "-T", str(tmp_path / "message"))
    assert done.returncode == 0, done.stderr.decode()
    assert await original(dovecot, bob) == text(to=bob.address)


async def test_postfix_as_client_with_many_recipients(gateway: Gateway, dovecot: Dovecot, lab: Lab) -> None:
    """It pipelines, splits at 50 recipients and sends both transactions at once with the same bytes."""
    config = {"smtp_destination_recipient_limit": "50", "smtp_header_checks": "", "always_add_missing_headers": "yes"}
    client = lab.postfix(f"smtp:[{HOST}]:{gateway.port}", settings=config)
    try:
        people = [await reader(gateway) for _ in range(60)]
        sent = text(to=",\r\n ".join(each.address for each in people[:58]))

        def send() -> None:
            with smtplib.SMTP(HOST, client.port) as connection:
                connection.sendmail(ALICE.address, [each.address for each in people], sent)
        await asyncio.to_thread(send)
        originals = {await original(dovecot, each) for each in people}
        [got] = originals
        assert got.endswith(sent)
        assert got.startswith(b"Received: ")
        for each in people:
            [raw] = dovecot.messages(each.address)
            for hidden in people[58:]:
                if each is not hidden:
                    assert hidden.address.encode() not in raw.replace(b"Delivered-To: ", b"")
        deadline = time.monotonic() + 10
        while client.queued() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert client.queued() == 0
    finally:
        await asyncio.to_thread(client.stop)


async def test_postfix_bounces_what_policy_refuses_and_sends_the_rest(gateway: Gateway, dovecot: Dovecot, lab: Lab) -> None:
    client = lab.postfix(f"smtp:[{HOST}]:{gateway.port}")
    try:
        bob = await reader(gateway)

        def send() -> None:
            with smtplib.SMTP(HOST, client.port) as connection:
                connection.sendmail(ALICE.address, [bob.address, "judy@test.example"], text(to=bob.address))
        await asyncio.to_thread(send)
        assert (await original(dovecot, bob)).endswith(text(to=bob.address))
        deadline = time.monotonic() + 20
        while "status=bounced" not in client.log.read_text() and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        assert "No key for judy@test.example" in client.log.read_text()
    finally:
        await asyncio.to_thread(client.stop)
    assert dovecot.messages("judy@test.example") == []


@pytest.mark.parametrize(("name", "body"), [
    ("8-bit", "Grüße, 8 bit\r\n".encode() * 50), ("long-lines", b"x" * 2000 + b"\r\n" + b"y" * 998 + b"\r\n"),
    ("dots", b".\r\n..\r\n.x\r\n"), ("empty", b"")])
async def test_odd_bodies_arrive_byte_for_byte(gateway: Gateway, dovecot: Dovecot, name: str, body: bytes) -> None:
    bob = await reader(gateway)
    sent = text(to=bob.address).split(b"\r\n\r\n")[0] + b"\r\n\r\n" + body

    def send() -> None:
        with smtplib.SMTP(HOST, gateway.port) as client:
            client.sendmail(ALICE.address, [bob.address], sent, ["BODY=8BITMIME"])
    await asyncio.to_thread(send)
    assert await original(dovecot, bob) == sent


async def test_smtputf8_through_a_real_postfix(lab: Lab, tmp_path: Path) -> None:
    """Dovecot's LMTP takes no SMTPUTF8, so a server of ours stands behind Postfix."""
    jose = person("jos\u00e9@test.example")
    message = EmailMessage(policy=SMTPUTF8)
    message["From"], message["To"], message["Subject"] = ALICE.address, jose.address, "ñ"
    message.set_content("¡hola!\n")
    async with Upstream() as last:
        postfix = await asyncio.to_thread(lab.postfix, f"smtp:[{HOST}]:{last.port}")
        try:
            async with Gateway(tmp_path, upstream_config(postfix.port), cards=(jose,)) as gw:
                def send() -> None:
                    with smtplib.SMTP(HOST, gw.port) as client:
                        client.send_message(message)
                await asyncio.to_thread(send)
                deadline = time.monotonic() + 30
                while not last.messages and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
        finally:
            await asyncio.to_thread(postfix.stop)
    [arrived] = last.messages
    assert "SMTPUTF8" in arrived.mail
    assert opened(arrived.content, jose, ALICE).original.endswith(message.as_bytes(policy=SMTPUTF8))


async def test_a_40_mb_attachment(gateway: Gateway, dovecot: Dovecot) -> None:
    bob = await reader(gateway)
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"], message["To"], message["Subject"] = ALICE.address, bob.address, "big"
    message["Date"], message["Message-ID"] = "Mon, 23 Nov 2026 10:00:00 +0000", "<big@test.example>"
    message.add_attachment(b"\x01\x80big\r\n" * (30 * 1024 * 1024 // 7), maintype="application", subtype="octet-stream")
    sent = message.as_bytes()
    assert len(sent) > 40 * 1024 * 1024

    def send() -> None:
        with smtplib.SMTP(HOST, gateway.port, timeout=120) as client:
            client.sendmail(ALICE.address, [bob.address], sent)
    await asyncio.to_thread(send)
    assert await original(dovecot, bob) == sent
    [raw] = dovecot.messages(bob.address)
    assert len(raw) < len(sent) * 1.05, "a sealed message is about as large as the plain one"


async def test_a_client_that_closes_its_half_still_gets_its_reply(gateway: Gateway, dovecot: Dovecot) -> None:
    bob = await reader(gateway)

    def send() -> bytes:
        with socket.create_connection((HOST, gateway.port), timeout=30) as client:
            stream = client.makefile("rb")
            for line in (b"", b"EHLO x", b"MAIL FROM:<alice@test.example>", b"RCPT TO:<" + bob.address.encode() + b">", b"DATA"):
                if line:
                    client.sendall(line + b"\r\n")
                while stream.readline()[3:4] == b"-":
                    pass
            client.sendall(text(to=bob.address) + b".\r\n")
            client.shutdown(socket.SHUT_WR)
            return stream.read()
    assert (await asyncio.to_thread(send)).startswith(b"250 2.0.0")
    assert await original(dovecot, bob) == text(to=bob.address)


PHASES: Sequence[bytes] = (b"EHLO x\r\n", b"MAIL FROM:<alice@test.example>\r\n", b"RCPT TO:<%s>\r\n", b"DATA\r\n", b"From: al")


@pytest.mark.parametrize("phase", range(len(PHASES)))
async def test_a_client_that_vanishes_in_any_phase_has_sent_nothing(gateway: Gateway, dovecot: Dovecot, phase: int) -> None:
    bob = await reader(gateway)

    def send() -> None:
        with socket.create_connection((HOST, gateway.port), timeout=30) as client:
            for number in range(phase + 1):
                line = PHASES[number]
                client.sendall(line % bob.address.encode() if b"%s" in line else line)
                if number < 4:
                    client.recv(4096)
    await asyncio.to_thread(send)
    while len(gateway.connections):
        await asyncio.sleep(0.02)
    await gateway.submit(ALICE.address, [bob.address], text(to=bob.address))
    assert await original(dovecot, bob) == text(to=bob.address), "and the next one is served"


async def test_pass_through_login_at_a_real_server(tmp_path: Path, postfix: Postfix, dovecot: Dovecot, lab: Lab) -> None:
    """STARTTLS upstream with a verified certificate; Dovecot checks the password; malote never knows it."""
    config = upstream_config(postfix.submission_port, host="localhost", security="starttls")
    async with Gateway(tmp_path, config, ListenerConfig(host=HOST), tls_context=lab.client_tls()) as gw:
        bob = await reader(gw)
        done = await gw.submit(ALICE.address, [bob.address], text(to=bob.address), login=("alice@test.example", PASSWORD))
        assert done.code == 250
        assert await original(dovecot, bob) == text(to=bob.address)
        with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
            await gw.submit(ALICE.address, [bob.address], text(to=bob.address), login=("alice@test.example", "wrong"))
        assert caught.value.smtp_code == 535
        other = await gw.submit(ALICE.address, [bob.address], text(to=bob.address), login=("bob@test.example", PASSWORD))
        assert other.code == 550
        assert len(dovecot.messages(bob.address)) == 1
