"""Metrics, health and audit log of the real daemon."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import smtplib
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.daemon import Home, free_port, listener, rule
from lab.servers import HOST
from malote.core.audit import parse_line
from malote.errors import ExitCode
from outgoing.harness import Upstream

ANNA, BEN, CLEO = "anna@a.example", "ben@b.example", "cleo@c.example"
SECRET = "the secret subject"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with Anna's keys and Ben's card, and what `malote keys show` says of that; made once, as it takes its time."""
    root = tmp_path_factory.mktemp("keys")
    anna, ben = Home(root / "anna"), Home(root / "ben")
    for home in (anna, ben):
        home.configure("")
    anna.keys("new", ANNA, "--algorithm", "ed25519")
    ben.keys("new", BEN, "--algorithm", "ed25519")
    ben.keys("export", BEN, "-o", str(root / "ben.card"))
    anna.keys("import", str(root / "ben.card"))
    (root / "ben.shown").write_text(re.sub(r"\s+", " ", ben.keys("show", BEN)))
    return root


class Site:
    """A home with Anna's keys and Ben's card, and the ports it uses."""

    def __init__(self, home: Home, keys: Path, upstream: int) -> None:
        self.home = home
        self.port, self.metrics, self.upstream = free_port(), free_port(), upstream
        self.audit = home.root / "audit.jsonl"
        self.ben = (keys / "ben.shown").read_text()
        shutil.copytree(keys / "anna" / "store", home.root / "store")
        self.configure()

    def configure(self, audit: str | None = None, metrics: str | None = None, more: str = "") -> None:
        audit = f'[audit]\nfile = "{self.audit}"\n' if audit is None else audit
        metrics = f"[metrics]\nport = {self.metrics}\n" if metrics is None else metrics
        self.home.configure(
            f'{audit}{metrics}{listener(self.port, "auth = " + chr(34) + "none" + chr(34))}'
            f'[outgoing.upstream]\nhost = "127.0.0.1"\nport = {self.upstream}\nsecurity = "none"\n{rule("prefer")}{more}')

    def send(self, recipients: list[str], sender: str = ANNA) -> None:
        with smtplib.SMTP(HOST, self.port) as client:
            client.sendmail(sender, recipients, (
                f"From: {sender}\r\nTo: {', '.join(recipients)}\r\nSubject: {SECRET}\r\nDate: Mon, 23 Nov 2026 10:00:00 +0000\r\n"
                "Message-ID: <one@a.example>\r\n\r\nthe secret text\r\n").encode())

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.metrics}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def value(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return float(sample.value)
        return 0.0

    def lines(self) -> list[dict[str, Any]]:
        return [parse_line(line) for line in self.audit.read_bytes().splitlines()] if self.audit.exists() else []


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as server:
        yield server


@pytest.fixture
async def site(home: Home, keys: Path, upstream: Upstream) -> Site:
    return Site(home, keys, upstream.port)


async def test_messages_are_counted_and_no_address_is_shown(site: Site, upstream: Upstream) -> None:
    def run() -> None:
        with site.home.daemon() as daemon:
            site.send([BEN])
            site.send([BEN])
            site.send([CLEO])
            with pytest.raises(smtplib.SMTPDataError):      # half would be clear
                site.send([BEN, CLEO])
            code, text = site.get("/metrics")
            assert code == 200
            assert site.value("malote_messages_total", direction="out", outcome="sealed", verdict="") == 2
            assert site.value("malote_messages_total", direction="out", outcome="plain", verdict="") == 1
            assert site.value("malote_messages_total", direction="out", outcome="refused", verdict="") == 1
            assert site.value("malote_message_seconds_count", direction="out") >= 3
            assert site.value("malote_own_cards", state="good") == 1
            assert site.value("malote_own_card_first_end_timestamp_seconds") > 1.79e9
            assert site.value("malote_memory_budget_bytes") == 512 * 1024 * 1024
            assert site.value("malote_connections_limit") == 200
            assert site.value("malote_upstream_connects_total") >= 1
            assert site.value("malote_ready", check="store") == 1
            assert site.value("malote_audit_written_lines_total") >= 3
            for private in ("@", "anna", "a.example", "b.example", "127.0.0.1", str(site.home.root)):
                assert private not in text.lower(), private
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    assert len(upstream.messages) == 3


async def test_a_kind_of_message_is_there_before_the_first_of_it(site: Site) -> None:
    """`increase()` sees nothing where a series begins at 1: the one message that an alert waits for would go unseen."""
    def run() -> None:
        with site.home.daemon() as daemon:
            text = site.get("/metrics")[1]
            for labels in ('direction="out",outcome="stopped",verdict=""',
                           'direction="in",outcome="quarantined",verdict="DUPLICATE"'):
                assert f"malote_messages_total{{{labels}}} 0.0\n" in text
            assert 'malote_message_seconds_count{direction="in"} 0.0\n' in text
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


async def test_scrapers_that_never_finish_hurt_nobody(site: Site) -> None:
    """Half requests, and answers that are not read: they hold few descriptors, mail goes on, and who asks next is answered."""
    def run() -> None:
        with site.home.daemon() as daemon, ExitStack() as slow:
            before = len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))
            for number in range(150):
                client = slow.enter_context(socket.create_connection((HOST, site.metrics), 5))
                with suppress(ConnectionError):     # the oldest are let go
                    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n" + b"\r\n" * (number % 2))
            site.send([BEN])
            assert site.value("malote_messages_total", direction="out", outcome="sealed", verdict="") == 1
            assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) - before < 60
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


async def test_off_is_the_default(site: Site) -> None:
    site.configure(audit="", metrics="")

    def run() -> None:
        with site.home.daemon() as daemon:
            site.send([BEN])
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, site.metrics), 5)
            maps = Path(f"/proc/{daemon.pid}/maps").read_text()
            assert "aiohttp" not in maps        # nothing of it is even loaded
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    assert site.lines() == []


async def test_alive_and_ready_and_why_not(site: Site, upstream: Upstream) -> None:
    """The reasons are fixed sentences: no path, no host, no address."""
    site.upstream = free_port()         # nobody there
    site.configure()

    def run() -> None:
        with site.home.daemon() as daemon:
            assert site.get("/healthz") == (200, "alive\n")
            code, text = site.get("/readyz")
            assert (code, json.loads(text)) == (503, {"ready": False, "reasons": ["the next mail server cannot be reached"]})
            site.upstream = upstream.port
            site.configure()
            daemon.reload()
            daemon.until(lambda: site.get("/readyz")[0] == 200, "ready")
            assert json.loads(site.get("/readyz")[1]) == {"ready": True, "reasons": []}
            assert site.get("/metrics/x")[0] == site.get("/")[0] == 404
            # while it ends: somebody is still in the middle of a message
            with closing(smtplib.SMTP(HOST, site.port)) as client:
                client.ehlo()
                client.mail(ANNA)
                client.rcpt(BEN)
                assert client.docmd("DATA")[0] == 354
                daemon.signal(signal.SIGTERM)
                daemon.wait_for_state("STOPPING=1")
                code, text = site.get("/readyz")
                assert (code, json.loads(text)["reasons"]) == (503, ["it is starting or stopping"])
                client.send(f"From: {ANNA}\r\nTo: {BEN}\r\n\r\nx\r\n.\r\n".encode())
                assert client.getreply()[0] == 250
            assert daemon.wait() == 0
    await asyncio.to_thread(run)


async def test_keys_that_cannot_be_unlocked_are_no_readiness(site: Site) -> None:
    """Somebody made them under another passphrase than the one that the daemon is given."""
    shutil.rmtree(site.home.root / "store")

    def run() -> None:
        with site.home.daemon() as daemon:
            assert site.get("/readyz")[0] == 200
            given = (site.home.root / "passphrase").read_text()
            site.home.secret("passphrase", "another passphrase")
            site.home.keys("new", ANNA, "--algorithm", "ed25519")
            site.home.secret("passphrase", given)
            daemon.until(lambda: site.get("/readyz")[0] == 503, "the keys are looked at")
            assert json.loads(site.get("/readyz")[1])["reasons"] == ["its keys cannot be unlocked"]
            assert site.value("malote_ready", check="keys") == 0
            site.home.secret("passphrase", "another passphrase")
            daemon.reload()         # or a minute later by itself
            daemon.until(lambda: site.get("/readyz")[0] == 200, "unlocked")
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


@pytest.mark.long
async def test_a_store_that_cannot_be_written_is_not_ready(site: Site) -> None:
    def run() -> None:
        with site.home.daemon() as daemon:
            with sqlite3.connect(site.home.root / "store" / "store.sqlite", isolation_level=None) as other:
                other.execute("BEGIN IMMEDIATE")        # nobody else can write
                daemon.until(lambda: site.get("/readyz")[0] == 503, "the store is locked")
                assert "the store cannot be written" in json.loads(site.get("/readyz")[1])["reasons"]
                assert site.get("/healthz")[0] == 200
                other.execute("ROLLBACK")
            other.close()
            daemon.until(lambda: site.get("/readyz")[0] == 200, "ready again")
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


async def test_a_metrics_port_that_is_taken_is_a_fault_and_a_reload_survives_it(site: Site) -> None:
    def run() -> None:
        with socket.create_server((HOST, site.metrics)):
            done = site.home.malote("run")
            assert done.returncode == ExitCode.CONFIG
            assert f"cannot listen on {HOST} port {site.metrics}" in done.stderr.decode()
        with site.home.daemon() as daemon:
            assert site.get("/healthz")[0] == 200
            old = site.metrics
            with socket.create_server((HOST, 0)) as taken:
                site.configure(metrics=f"[metrics]\nport = {taken.getsockname()[1]}\n")
                daemon.reload()
                daemon.wait_for_log("not reloaded")
            assert site.get("/healthz")[0] == 200
            site.metrics = free_port()
            site.configure()
            daemon.reload()
            assert site.get("/healthz")[0] == 200
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, old), 5)
            site.send([BEN])
            site.configure(metrics="")
            daemon.reload()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, site.metrics), 5)
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


async def test_the_audit_log_says_what_left(site: Site, upstream: Upstream) -> None:
    def run() -> None:
        with site.home.daemon() as daemon:
            site.send([BEN])
            site.send([CLEO])
            with pytest.raises(smtplib.SMTPDataError):
                site.send([BEN, CLEO])
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    sealed, plain, refused = site.lines()
    assert (sealed["what"], sealed["step"], sealed["recipients"], sealed["rules"]) == ("sealed", "done", 1, [1])
    assert (sealed["algorithm"], sealed["to"], sealed["states"]) == ("ed25519", "visible", {"accepted": 1})
    assert sealed["cards"][0] in site.ben
    assert (plain["what"], plain["states"], "cards" in plain) == ("plain", {"accepted": 1}, False)
    assert (refused["what"], refused["recipients"], refused["reply"]) == ("refused", 2, 550)
    assert len(sealed["id"]) == 32
    assert sealed["id"] != plain["id"]
    text = site.audit.read_text()
    for private in ("@", "anna", "secret", "Subject", "one@a"):
        assert private not in text, private
    done = await asyncio.to_thread(site.home.malote, "audit", "verify", "--json")
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["lines"] == 3
    site.audit.write_text(text.replace('"plain"', '"sealed"', 1))
    done = await asyncio.to_thread(site.home.malote, "audit", "verify")
    assert done.returncode == ExitCode.CHECK
    assert "line 2 was changed" in done.stdout.decode()


async def test_addresses_only_where_they_are_asked_for(site: Site) -> None:
    site.configure(audit=f'[audit]\nfile = "{site.audit}"\naddresses = true\n')

    def run() -> None:
        with site.home.daemon() as daemon:
            site.send([BEN])
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    [line] = site.lines()
    assert (line["from"], line["addresses"]) == (ANNA, [BEN])
    assert "secret" not in site.audit.read_text()


async def test_a_split_names_who_was_left_out_and_shadow_mode_what_left(site: Site, upstream: Upstream) -> None:
    """Every recipient of every message has a line, whatever was decided for it."""
    home = site.home
    split = 'mixed = "split"\n[[outgoing.rules]]\nrecipients = ["@c.example"]\nseal = "require"\nmixed = "split"\n'
    text = home.config.read_text().replace(rule("prefer"), f'[[outgoing.rules]]\nrecipients = ["@b.example"]\n{split}')
    home.config.write_text(text)

    def run() -> None:
        with home.daemon() as daemon:
            site.send([BEN])
            with smtplib.SMTP(HOST, site.port) as client:
                assert client.sendmail(ANNA, [BEN, CLEO], (
                    f"From: {ANNA}\r\nTo: {BEN}, {CLEO}\r\nDate: Mon, 23 Nov 2026 10:00:00 +0000\r\n"
                    "Message-ID: <two@a.example>\r\n\r\nx\r\n").encode()).keys() == {CLEO}
            assert site.value("malote_shadow") == 0
            home.config.write_text(text.replace("[outgoing.upstream]", "[outgoing]\nshadow = true\n[outgoing.upstream]"))
            daemon.reload()
            site.send([BEN, CLEO])
            assert site.value("malote_shadow") == 1
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    found = [(line["what"], line["recipients"], line.get("rules")) for line in site.lines()]
    assert found == [("sealed", 1, [1]), ("refused", 1, None), ("sealed", 1, [1]), ("plain", 2, [0])]


def free(port: int) -> bool:
    try:
        with socket.create_server((HOST, port)):
            return True
    except OSError:
        return False


async def test_workers_have_ports_of_their_own_and_one_audit_log(site: Site, upstream: Upstream) -> None:
    while not free(site.metrics + 1):
        site.metrics = free_port()
    site.configure()
    site.home.config.write_text("[service]\nworkers = 2\n" + site.home.config.read_text())

    def run() -> None:
        with site.home.daemon() as daemon:
            for _ in range(12):
                site.send([BEN])
            counts = []
            for _ in range(2):
                assert site.get("/readyz")[0] == 200
                counts.append(site.value("malote_messages_total", direction="out", outcome="sealed", verdict=""))
                site.metrics += 1
            assert sum(counts) == 12
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    assert len(site.lines()) == 12
    assert (await asyncio.to_thread(site.home.malote, "audit", "verify")).returncode == 0


async def test_required_means_that_nothing_leaves_without_its_line(site: Site, upstream: Upstream) -> None:
    """/dev/full behind the name: the line cannot be written. 451, and the upstream server has seen no message; as soon as it
    can be written the client's next try goes through, once."""
    site.configure(audit=f'[audit]\nfile = "{site.audit}"\nrequired = true\n')

    def run() -> None:
        with site.home.daemon() as daemon:
            site.send([BEN])
            site.audit.rename(site.audit.with_name("aside"))
            site.audit.symlink_to("/dev/full")      # O_NOFOLLOW: it cannot be opened
            for _ in range(2):
                with pytest.raises(smtplib.SMTPDataError) as caught:
                    site.send([BEN])
                assert caught.value.smtp_code == 451
                assert b"audit log" in caught.value.smtp_error
            assert "the audit log cannot be written" in site.get("/readyz")[1]
            assert site.value("malote_audit_failing") == 1
            assert len(upstream.messages) == 1
            site.audit.unlink()
            site.audit.with_name("aside").rename(site.audit)
            site.send([BEN])
            assert site.value("malote_audit_failing") == 0
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    assert len(upstream.messages) == 2
    steps = [(line["step"], line.get("states")) for line in site.lines()]
    assert steps == [("leaving", None), ("done", {"accepted": 1})] * 2
    assert (await asyncio.to_thread(site.home.malote, "audit", "verify")).returncode == 0


async def test_not_required_means_that_mail_goes_on(site: Site, upstream: Upstream) -> None:
    """And the lines come later, none missing."""
    def run() -> None:
        with site.home.daemon() as daemon:
            site.audit.rename(site.audit.with_name("aside"))
            site.audit.symlink_to("/dev/full")
            for _ in range(3):
                site.send([BEN])
            daemon.until(lambda: site.value("malote_audit_failing") == 1, "failing")
            assert site.value("malote_audit_waiting_lines") == 3
            assert site.get("/readyz")[0] == 200
            site.audit.unlink()
            site.audit.with_name("aside").rename(site.audit)
            daemon.until(lambda: len(site.lines()) == 3, "the lines")
            assert daemon.stop() == 0
    await asyncio.to_thread(run)
    assert len(upstream.messages) == 3
    assert (await asyncio.to_thread(site.home.malote, "audit", "verify")).returncode == 0


async def test_kill_9_in_the_middle_leaves_a_line_for_what_may_have_left(site: Site, upstream: Upstream) -> None:
    site.configure(audit=f'[audit]\nfile = "{site.audit}"\nrequired = true\n')
    upstream.script = lambda step, *_: "" if step == "DOT" else False       # never answers the final dot

    def run() -> None:
        with site.home.daemon() as daemon, closing(smtplib.SMTP(HOST, site.port)) as client:
            client.ehlo()
            client.mail(ANNA)
            client.rcpt(BEN)
            assert client.docmd("DATA")[0] == 354
            client.send(f"From: {ANNA}\r\nTo: {BEN}\r\n\r\nx\r\n.\r\n".encode())
            daemon.until(lambda: "DOT" in upstream.steps, "the message is out")
            assert daemon.process is not None
            daemon.process.kill()
            daemon.wait()
    await asyncio.to_thread(run)
    [line] = site.lines()
    assert (line["step"], line["what"]) == ("leaving", "sealed")
    assert (await asyncio.to_thread(site.home.malote, "audit", "verify")).returncode == 0
