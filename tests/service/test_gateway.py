"""The opening listener in the daemon, between real servers: Postfix in front, Dovecot or another Postfix behind."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import smtplib
import socket
import sys
import time
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path

import pytest

from lab import killed
from lab.daemon import Daemon, Home, account, free_port
from lab.gateway import Lmtp, codes
from lab.incoming import Sender, note, verdicts
from lab.servers import HOST, Dovecot, Lab, Postfix
from malote.core.card import armor, parse_armored
from malote.core.outer import outer_headers
from malote.core.seal import SealRecipient, seal
from malote.incoming.watcher import now_ms

QUARANTINE = "gateway-quarantine@test.example"


@pytest.fixture(scope="module")
def users(dovecot: Dovecot) -> Callable[[], str]:
    names = [f"gw{number}@test.example" for number in range(20)]
    dovecot.add_users([QUARANTINE, *names])
    return iter(names).__next__


def gateway(home: Home, port: int, next_hop: int, *, protocol: str = "lmtp", next_protocol: str = "lmtp", more: str = "",
            limits: str = "") -> None:
    home.configure(f"""
[outgoing]
enabled = false
[[incoming.listeners]]
port = {port}
protocol = "{protocol}"
quarantine = "{QUARANTINE}"
{more}
[incoming.listeners.upstream]
host = "{HOST}"
port = {next_hop}
protocol = "{next_protocol}"
security = "none"
[limits]
{limits}
""")


def make_keys(home: Home, *addresses: str) -> Sender:
    """Keys for these people, and somebody whose card the gateway holds."""
    sender = Sender()
    for address in addresses:
        home.keys("new", address, "--algorithm", "ed25519")
    card = home.root / "anna.card"
    card.write_text(armor(sender.identity.card))
    home.keys("import", str(card))
    time.sleep(0.002)       # what is sealed in the millisecond of the import is from before it
    return sender


def sealed(home: Home, sender: Sender, original: bytes, *addresses: str, key_of: str = "") -> bytes:
    cards = {address: parse_armored(home.keys("export", key_of or address))[0] for address in addresses}
    sent = now_ms()
    recipients = [SealRecipient(address, cards[address].encryption_key(sent), "to", sender.stream[:7] + bytes([number]), 1, 0)
                  for number, address in enumerate(addresses)]
    outer = outer_headers(original, sent_at_ms=sent, sender_domain="sender.example", received=b"", known_outer_ids={})
    return seal(original, identity=sender.identity, recipients=recipients, submission_id=sender.stream * 2, sent_at_ms=sent,
                outer=outer).raw


def hand_in(postfix: Postfix, raw: bytes, *recipients: str) -> None:
    with smtplib.SMTP(HOST, postfix.port, timeout=30) as client:
        client.sendmail("anna@sender.example", recipients, raw)


def wait_for(dovecot: Dovecot, user: str, count: int, daemon: Daemon) -> list[bytes]:
    daemon.until(lambda: len(dovecot.messages(user)) >= count, f"{count} messages for {user}")
    return [raw.replace(b"\r\n", b"\n") for raw in dovecot.messages(user)]


def drained(postfix: Postfix, daemon: Daemon) -> None:
    def empty() -> bool:
        postfix.flush()     # else it may rest a destination that was cut off for longer than we wait
        return postfix.queued() == 0
    daemon.until(empty, "an empty queue")


def test_between_postfix_and_dovecot_by_lmtp(home: Home, lab: Lab, dovecot: Dovecot, users: Callable[[], str]) -> None:
    """Sealed for one, with the key of the domain for another, and plain for both: each gets what is his, once."""
    anna, ben, port = users(), users(), free_port()
    gateway(home, port, dovecot.lmtp_port)
    sender = make_keys(home, anna, "@test.example")
    front = lab.postfix(f"lmtp:inet:{HOST}:{port}")
    original, plain = note(to=anna), note(to=f"{anna}, {ben}", subject="plain")
    with home.daemon() as daemon:
        raw = sealed(home, sender, original, anna)
        hand_in(front, raw, anna)
        hand_in(front, sealed(home, Sender("eve@sender.example"), original, ben, key_of="@test.example"), ben)
        hand_in(front, plain, anna, ben)
        [*for_anna] = wait_for(dovecot, anna, 2, daemon)
        [*for_ben] = wait_for(dovecot, ben, 2, daemon)
        hand_in(front, raw, anna)
        daemon.wait_for_log('"verdict": "DUPLICATE"')
        drained(front, daemon)
        assert len(dovecot.messages(anna)) == 2
    front.stop()
    opened = [each for each in for_anna if b"Malote-Verdict" in each]
    assert verdicts([message_from_bytes(each) for each in opened]) == ["FRESH"]
    assert opened[0].endswith(original.replace(b"\r\n", b"\n"))
    assert verdicts([message_from_bytes(each) for each in for_ben if b"Malote-Verdict" in each]) == ["UNKNOWN-SENDER"]
    assert sum(each.endswith(plain.replace(b"\r\n", b"\n")) for each in for_anna + for_ben) == 2
    log = daemon.text()
    assert anna not in log
    assert "Guten Tag" not in log


@pytest.mark.parametrize(("protocol", "next_protocol"), [
    ("smtp", "smtp"), pytest.param("smtp", "lmtp", marks=pytest.mark.long), pytest.param("lmtp", "smtp", marks=pytest.mark.long)])
def test_between_servers_by_smtp(protocol: str, next_protocol: str, home: Home, lab: Lab, dovecot: Dovecot,
                                 users: Callable[[], str]) -> None:
    """SMTP in, out, or both, and two recipients in one transaction whose bodies differ, sealed and plain."""
    anna, ben, port = users(), users(), free_port()
    back = lab.postfix(dovecot.lmtp_hop)
    next_hop = back.port if next_protocol == "smtp" else dovecot.lmtp_port
    gateway(home, port, next_hop, protocol=protocol, next_protocol=next_protocol)
    sender = make_keys(home, anna, ben)
    front = lab.postfix(f"smtp:[{HOST}]:{port}" if protocol == "smtp" else f"lmtp:inet:{HOST}:{port}")
    original, plain = note(to=f"{anna}, {ben}"), note("plain", to=f"{anna}, {ben}")
    with home.daemon() as daemon:
        hand_in(front, sealed(home, sender, original, anna, ben), anna, ben)
        hand_in(front, plain, anna, ben)
        arrived = {user: wait_for(dovecot, user, 2, daemon) for user in (anna, ben)}
        drained(front, daemon)
        drained(back, daemon)
        assert {user: len(dovecot.messages(user)) for user in arrived} == {anna: 2, ben: 2}
    for server in (front, back):
        server.stop()
    for user, messages in arrived.items():
        [opened] = [each for each in messages if b"Malote-Verdict" in each]
        [other] = [each for each in messages if each != opened]
        assert verdicts([message_from_bytes(opened)]) == ["FRESH"]
        assert user in " ".join(str(message_from_bytes(opened)["Malote-Verdict"]).split())
        assert opened.endswith(original.replace(b"\r\n", b"\n"))
        assert other.endswith(plain.replace(b"\r\n", b"\n"))


def test_a_watcher_behind_the_gateway_believes_it_once(home: Home, lab: Lab, dovecot: Dovecot, users: Callable[[], str],
                                                       tmp_path: Path) -> None:
    """Postfix, gateway, Dovecot, and the watcher of a person who has the gateway's key for her mailbox and no other. What was
    recorded and is brought in past the gateway is no fresh mail."""
    anna, port = users(), free_port()
    gateway(home, port, dovecot.lmtp_port)
    sender = make_keys(home, "@test.example")
    phone = Home(tmp_path / "phone")
    done = home.malote("gateway", "export", anna, "-o", str(phone.root / "gateway.key"))
    assert done.returncode == 0, done.stderr
    assert (phone.root / "gateway.key").stat().st_mode & 0o777 == 0o600
    assert home.malote("gateway", "export", anna, "-o", str(phone.root / "gateway.key")).returncode == 2     # never written over
    more = f'deliver = "replace"\ntrusted_gateways = ["{phone.root}/gateway.key"]'
    phone.configure("[outgoing]\nenabled = false\n" + account(anna, dovecot.imaps_port, lab.certificate, phone, more=more))
    front, past = lab.postfix(f"lmtp:inet:{HOST}:{port}"), lab.postfix(dovecot.lmtp_hop)
    original = note(to=anna)
    with home.daemon() as daemon, phone.daemon() as watching:
        hand_in(front, sealed(home, sender, original, anna, key_of="@test.example"), anna)
        watching.wait_for_log('"outcome": "opened by gateway"')
        [opened] = wait_for(dovecot, anna, 1, daemon)
        recorded = opened.replace(b"\n", b"\r\n")
        hand_in(past, recorded, anna)
        hand_in(past, b"Subject: another\r\n" + recorded, anna)
        watching.wait_for_log('"verdict": "DUPLICATE"')
        watching.wait_for_log('"verdict": "FORGED"')
    for server in (front, past):
        server.stop()
    assert [raw.replace(b"\r\n", b"\n") for raw in dovecot.messages(anna)] == [opened]
    assert verdicts([message_from_bytes(opened)]) == ["FRESH"]
    assert opened.endswith(original.replace(b"\r\n", b"\n"))
    key = (phone.root / "gateway.key").read_text().split()[-1]
    assert key not in daemon.text() + watching.text()


@pytest.mark.long
def test_a_loop_through_a_queue_ends_in_one_bounce(home: Home, lab: Lab) -> None:
    """Gateway and Postfix hand each mail to each other: no RCPT shows that, only the trace does. The sender hears of it once,
    and what is said to him, which runs in the same circle, is dropped and not answered."""
    port = free_port()
    front = lab.postfix(f"lmtp:inet:{HOST}:{port}")
    gateway(home, port, front.port, next_protocol="smtp")
    with home.daemon() as daemon:
        hand_in(front, note(to="somebody@test.example"), "somebody@test.example")
        daemon.until(lambda: "status=bounced" in front.log.read_text(), "a bounce")
        drained(front, daemon)
    front.stop()
    log = front.log.read_text()
    assert log.count("sender non-delivery notification") == 1
    assert "5.4.6" in log


@pytest.mark.long
@pytest.mark.parametrize("step", killed.STEPS)
def test_killed_between_the_next_servers_answer_and_ours(
        step: str, home: Home, lab: Lab, dovecot: Dovecot, users: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Postfix brings the message again. Written down: the second is DUPLICATE. Not yet: it is delivered again, and says that it
    may be the second (nobody can know). Never lost, and never twice as if nothing had happened."""
    anna, port = users(), free_port()
    gateway(home, port, dovecot.lmtp_port, limits="reply_within_seconds = 2.0")
    sender = make_keys(home, anna)
    front = lab.postfix(f"lmtp:inet:{HOST}:{port}")
    monkeypatch.setattr("lab.daemon.MALOTE", (sys.executable, killed.__file__))
    raw = sealed(home, sender, note(to=anna), anna)
    doomed = home.daemon()
    with doomed.start(MALOTE_TEST_STEP=step):
        hand_in(front, raw, anna)
        process = doomed.process
        assert process is not None

        def gone() -> bool:
            front.flush()       # where the first try took too long for Postfix or for the daemon, it would rest for minutes
            return process.poll() is not None
        doomed.until(gone, "a killed daemon")
        assert doomed.wait() == -9
    monkeypatch.undo()
    before = len(dovecot.messages(QUARANTINE))
    with home.daemon() as daemon:
        drained(front, daemon)
    front.stop()
    messages = [message_from_bytes(each) for each in dovecot.messages(anna)]
    quarantined = dovecot.messages(QUARANTINE)[before:]
    assert "FRESH" in verdicts(messages)
    notes = sorted("notes=AGAIN" in " ".join(str(message["Malote-Verdict"]).split()) for message in messages)
    if step == "written down":
        assert (notes, len(quarantined)) == ([False], 1)
    elif step == "judged":      # nothing had been sent; nobody can know that either
        assert (notes, len(quarantined)) == ([True], 0)
    else:
        assert (notes, len(quarantined)) == ([False, True], 0)


async def test_two_workers_make_one_of_the_same_mail_fresh(home: Home, dovecot: Dovecot, users: Callable[[], str]) -> None:
    """The workers know nothing of each other's memory, so one that finds the message being delivered elsewhere says 451."""
    anna, port = users(), free_port()
    gateway(home, port, dovecot.lmtp_port)
    home.config.write_text(home.config.read_text() + "[service]\nworkers = 2\n")
    sender = make_keys(home, anna)
    raw = sealed(home, sender, note(to=anna), anna)
    before = len(dovecot.messages(QUARANTINE))
    with home.daemon() as daemon:
        answers = await asyncio.gather(*(Lmtp(port).send(raw, anna) for _ in range(12)))
        later = await Lmtp(port).send(raw, anna)
        assert daemon.stop() == 0
    said = [code for each in answers for code in codes(each)]
    assert set(said) <= {250, 451}
    assert codes(later) == [250]
    assert verdicts([message_from_bytes(each) for each in dovecot.messages(anna)]) == ["FRESH"]
    assert len(dovecot.messages(QUARANTINE)) - before == said.count(250)      # one fresh, and the later one too is a repeat


def test_a_reload_takes_the_listener_with_it(home: Home, dovecot: Dovecot, users: Callable[[], str]) -> None:
    """Another protocol on the same port, a listener that is gone, and one that cannot be opened: that changes nothing."""
    port, other = free_port(), free_port()
    gateway(home, port, dovecot.lmtp_port)
    with home.daemon() as daemon:
        assert greeting(port).startswith(b"500")
        gateway(home, port, dovecot.lmtp_port, protocol="smtp")
        daemon.reload()
        assert greeting(port).startswith(b"250")
        gateway(home, other, dovecot.lmtp_port, more='tls = "starttls"\ncertificate = "/nowhere"\ncertificate_key = "/nowhere"')
        daemon.reload()
        assert greeting(port).startswith(b"250")
        gateway(home, other, dovecot.lmtp_port)
        daemon.reload()
        assert greeting(other).startswith(b"500")
        with pytest.raises(ConnectionRefusedError):
            greeting(port)
        assert daemon.stop() == 0


def test_ready_counts_the_listener_and_the_server_behind_it(home: Home, dovecot: Dovecot) -> None:
    """A balancer must not send mail to a gateway that cannot hand it on."""
    port, metrics = free_port(), free_port()

    def ready() -> int:
        with contextlib.closing(http.client.HTTPConnection(HOST, metrics, timeout=20)) as client:
            client.request("GET", "/readyz")
            return client.getresponse().status

    numbers = f"[metrics]\nport = {metrics}\n"
    gateway(home, port, free_port(), limits="connections = 50\n" + numbers)
    make_keys(home, "@test.example")
    with home.daemon() as daemon:
        assert ready() == 503
        gateway(home, port, dovecot.lmtp_port, limits="connections = 50\n" + numbers)
        daemon.reload()
        daemon.until(lambda: ready() == 200, "ready")
        assert daemon.stop() == 0


def test_check_tries_the_listener_and_the_server_behind_it(home: Home, dovecot: Dovecot) -> None:
    port = free_port()
    for next_hop, code in ((dovecot.lmtp_port, 0), (free_port(), 7), (dovecot.port, 7)):      # nobody there; IMAP there
        gateway(home, port, next_hop)
        if code == 0:
            make_keys(home, "@test.example")
        done = home.malote("check", "--json")
        found = {each["what"]: each for each in map(json.loads, done.stdout.decode().splitlines())}
        assert done.returncode == code, found
        assert found[f"listener {HOST}:{port}"]["state"] == "ok"
        assert found[f"delivery to {HOST}:{next_hop}"]["state"] == ("fault" if code else "ok")


def greeting(port: int) -> bytes:
    """What EHLO is answered: LMTP does not know it."""
    with socket.create_connection((HOST, port), timeout=20) as sock:
        file = sock.makefile("rb")
        file.readline()
        sock.sendall(b"EHLO client.test.example\r\n")
        return file.readline()
