"""The templates in config/ and the snippets of docs/relay.md, run by the programs that they are for; ports and paths differ."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import smtplib
import subprocess
import textwrap
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lab.daemon import Daemon, Home, free_port
from lab.servers import HOST, PASSWORD, Dovecot, Lab
from lab.unpacked import MISSING, Exim
from malote.config import parse_config
from malote.config_faults import config_faults
from malote.core.parts import find_parts
from malote.core.rules import rule_faults
from malote.metrics import AuditNumbers, Metrics, Numbers, UpstreamNumbers
from malote.outgoing.users import hash_password
from malote.store.records import OutcomeEntry
from outgoing.harness import Received, Upstream

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
GUIDE = (ROOT / "docs" / "relay.md").read_text()
ANNA, BEN, CLEO, DORA = "anna@example.org", "ben@partner.example", "cleo@elsewhere.example", "dora@partner.example"


def template(name: str, **changes: str) -> str:
    """The file, with each old text (a keyword's `_` apart, given by value) replaced; each must be in it."""
    text = (CONFIG / name).read_text()
    for change in changes.values():
        old, new = change.split(" => ")
        assert old in text, f"{name}: {old}"
        text = text.replace(old, new)
    return text


def main_cf(text: str) -> dict[str, str]:
    return {name.strip(): value.strip() for name, _, value in
            (line.partition("=") for line in text.splitlines() if line and not line.startswith("#"))}


def services(text: str) -> str:
    return "".join(f"{line}\n" for line in text.splitlines() if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the domain's key, made as the guide says, and with Ben's card."""
    root = tmp_path_factory.mktemp("keys")
    ours, ben = Home(root / "ours"), Home(root / "ben")
    for home in (ours, ben):
        home.configure("")
    command = re.search(r"as_malote keys new (@example\.org .*)", GUIDE)
    assert command is not None
    ours.keys("new", *command[1].split())
    ben.keys("new", BEN, "--algorithm", "ed25519")
    ben.keys("export", BEN, "-o", str(root / "ben.card"))
    ours.keys("import", str(root / "ben.card"))
    return root / "ours" / "store"


class Relay:
    """malote with config/relay.toml."""

    def __init__(self, home: Home, keys: Path, back: int) -> None:
        self.home = home
        self.port, self.metrics = free_port(), free_port()
        shutil.copytree(keys, home.root / "store")
        text = template("relay.toml", port=f"port = 2525 => port = {self.port}", back=f"port = 10026 => port = {back}",
                        metrics=f"port = 9625 => port = {self.metrics}", workers="workers = 2 => workers = 1",
                        audit=f"/var/lib/malote/audit.jsonl => {home.root}/audit.jsonl",
                        unlock=f'unlock = "credential" => unlock = "file"\nfile = "{home.root}/passphrase"')
        home.config.write_text(f'{text}\n[store]\npath = "{home.root}/store"\n[log]\nformat = "json"\n')

    @contextmanager
    def running(self) -> Iterator[Daemon]:
        with self.home.daemon() as daemon:
            yield daemon
            assert daemon.stop() == 0


@pytest.fixture
async def world() -> AsyncIterator[Upstream]:
    """Where the MTA's mail goes in the end."""
    async with Upstream() as server:
        yield server


def text(sender: str, recipient: str) -> bytes:
    return (f"From: {sender}\r\nTo: {recipient}\r\nSubject: the secret subject\r\nDate: Mon, 23 Nov 2026 10:00:00 +0000\r\n"
            f"Message-ID: <one@example.org>\r\n\r\nthe secret text\r\n").encode()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check_what_arrived(messages: list[Received]) -> None:
    """Ben's is sealed, Cleo's is as it was, each once."""
    by_recipient = {message.recipients[0]: message for message in messages}
    assert sorted(by_recipient) == [BEN, CLEO]
    assert len(messages) == 2
    assert find_parts(by_recipient[BEN].content) is not None
    assert b"secret" not in by_recipient[BEN].content
    assert b"the secret text" in by_recipient[CLEO].content


async def test_postfix_after_the_queue(home: Home, keys: Path, lab: Lab, world: Upstream) -> None:
    """What is refused by a rule is returned to the sender by Postfix."""
    back = free_port()
    relay = Relay(home, keys, back)

    def run() -> None:
        settings = main_cf(template("postfix/content-filter.main.cf", port=f":2525 => :{relay.port}"))
        more = services(template("postfix/content-filter.master.cf", port=f":10026 => :{back}"))
        postfix = lab.postfix(f"smtp:[{HOST}]:{world.port}", settings=settings, services=more)
        with relay.running():
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(ANNA, [DORA], text(ANNA, DORA))
            until(lambda: len(world.messages) == 3)
            bounce = world.messages[2]
            assert bounce.recipients == [ANNA]
            assert b"No key for" in bounce.content
        done = home.malote("audit", "verify")
        assert done.returncode == 0, done.stdout.decode()
    await asyncio.to_thread(run)


async def test_postfix_before_the_queue(home: Home, keys: Path, lab: Lab, dovecot: Dovecot, world: Upstream) -> None:
    """A refusal is the mail program's own answer."""
    back, submission = free_port(), free_port()
    relay = Relay(home, keys, back)

    def run() -> None:
        more = services(template("postfix/before-queue.master.cf", port=f":2525 => :{relay.port}", back=f":10026 => :{back}",
                                 submission=f"\nsubmission inet => \n{HOST}:{submission} inet"))
        postfix = lab.postfix(f"smtp:[{HOST}]:{world.port}", services=more, settings={
            "smtpd_sasl_type": "dovecot", "smtpd_sasl_path": f"inet:{HOST}:{dovecot.auth_port}"})
        assert postfix.port
        with relay.running(), smtplib.SMTP("localhost", submission) as client:
            client.starttls(context=lab.client_tls())
            client.login("alice@test.example", PASSWORD)
            client.sendmail(ANNA, [BEN], text(ANNA, BEN))
            client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            with pytest.raises((smtplib.SMTPRecipientsRefused, smtplib.SMTPDataError)) as caught:
                client.sendmail(ANNA, [DORA], text(ANNA, DORA))
            assert "No key for" in str(caught.value)
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
        lines = [json.loads(line) for line in (home.root / "audit.jsonl").read_text().splitlines()]
        [refused] = [line for line in lines if line["what"] == "refused"]       # before its message came
        assert (refused["recipients"], refused["reply"], refused["reason"], refused["id"]) == (1, 550, "no card", "")
        assert [line["step"] for line in lines if line["what"] == "sealed"] == ["leaving", "done"]
    await asyncio.to_thread(run)


async def test_postfix_with_a_smart_host(home: Home, keys: Path, lab: Lab, world: Upstream) -> None:
    relay = Relay(home, keys, world.port)

    def run() -> None:
        settings = main_cf(template("postfix/smart-host.main.cf", port=f":2525 => :{relay.port}"))
        postfix = lab.postfix("smtp:", settings={**settings, "default_transport": "smtp", "relay_transport": "smtp"})
        with relay.running():
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
    await asyncio.to_thread(run)


class TemplateExim(Exim):
    """The main section of the lab's, and what the template has for each section, before a router to the world."""

    template = ""

    def _configuration(self) -> str:
        main, rest = Exim._configuration(self).split("begin acl", 1)
        parts = {part.split()[0] if part.startswith("main") else part.split()[1].rstrip(",;"): part.split("\n", 1)[1]
                 for part in self.template.split("# --- ")[1:]}
        if "main" in parts:
            main = re.sub(r"daemon_smtp_ports = .*\n", parts.pop("main"), main)
        rest += "begin authenticators\n"
        for section in ("routers", "transports", "authenticators"):
            rest = rest.replace(f"begin {section}\n", f"begin {section}\n{parts.pop(section, '')}\n")
        assert not parts
        return f"{main}domainlist local_domains = localhost.invalid\nbegin acl{rest}"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
async def test_exim(home: Home, keys: Path, lab: Lab, world: Upstream) -> None:
    back = free_port()
    relay = Relay(home, keys, back)
    root = lab.root / "exim-template"
    root.mkdir()
    exim = TemplateExim(root, lab.certificate, lab.key, world.port)
    TemplateExim.template = template("exim/malote.conf", ports=f"25 : 10026 => {exim.port} : {back}",
                                     back=f"{{10026}} => {{{back}}}", port=f"port = 2525 => port = {relay.port}")

    def run() -> None:
        with exim.running(), relay.running():
            with smtplib.SMTP(HOST, exim.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
            # malote keeps its connection to Exim, and Exim lets nothing lie that comes over it
            with smtplib.SMTP(HOST, exim.port) as client:
                for _ in range(15):
                    client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 17)
        assert "no immediate delivery" not in exim.log.read_text()
    await asyncio.to_thread(run)


class Provider:
    """A mail server that wants a login, and malote in front of it, as the guide says of smart hosts; `password` is the MTA's."""

    password = "pass^word"      # Exim gives a meaning to ^

    def __init__(self, home: Home, keys: Path, lab: Lab, dovecot: Dovecot, world: Upstream) -> None:
        server = lab.postfix(f"smtp:[{HOST}]:{world.port}", auth_port=dovecot.auth_port)
        relay = Relay(home, keys, 10026)
        users = home.secret("users", f"mta:{hash_password(self.password)}:*\n")
        [snippet] = snippets("users_file")
        old = tomllib.loads(home.config.read_text())["outgoing"]["listeners"][0]
        assert old == {"port": relay.port, "auth": "none"}
        self.relay, self.port = relay, relay.port
        changed = re.sub(r"(?s)\[\[outgoing.listeners\]\].*?(?=\n\[outgoing.upstream\])", lambda _: snippet.replace(
            "port = 2525", f"port = {relay.port}").replace("/etc/malote/users", str(users)), home.config.read_text())
        changed = re.sub(r"(?s)\[outgoing.upstream\].*?\n\n", lambda _: (
            f'[outgoing.upstream]\nhost = "localhost"\nport = {server.submission_port}\nca_file = "{lab.certificate}"\n'
            f'username = "alice@test.example"\npassword_file = "{home.root}/password"\n\n'), changed)
        home.config.write_text(changed)


async def test_postfix_with_a_smart_host_that_wants_a_login(home: Home, keys: Path, lab: Lab, dovecot: Dovecot,
                                                            world: Upstream) -> None:
    """Nobody else on this machine may use the login that malote has at the provider; bounces and forwarded mail pass."""
    def run() -> None:
        provider = Provider(home, keys, lab, dovecot, world)
        table = home.secret("malote.password", f"[{HOST}]:{provider.port} mta:{provider.password}\n")
        (home.root / "main.cf").write_text("compatibility_level = 3.6\n")      # a machine may have none of its own
        subprocess.run(["/usr/sbin/postmap", "-c", str(home.root), f"hash:{table}"], check=True)
        settings = main_cf(template("postfix/smart-host-login.main.cf", port=f":2525 => :{provider.port}",
                                    table=f"/etc/postfix/malote.password => {table}"))
        table.with_name("malote.password.db").chmod(0o644)
        for place in (home.root, *home.root.parents):
            if place.stat().st_uid == os.getuid() and place != Path("/"):
                place.chmod(place.stat().st_mode | 0o011)
        postfix = lab.postfix("smtp:", settings={**settings, "default_transport": "smtp", "relay_transport": "smtp"})
        with provider.relay.running():
            with smtplib.SMTP(HOST, provider.port) as client:       # somebody on this machine
                client.ehlo()
                assert client.docmd("MAIL", f"FROM:<{ANNA}>")[0] == 530
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
                client.sendmail("", [DORA.replace("partner", "elsewhere")], text("eve@elsewhere.example", DORA))
            until(lambda: len(world.messages) == 3)
            forwarded = [message for message in world.messages if "dora" in message.recipients[0]]
            assert len(forwarded) == 1
            check_what_arrived([message for message in world.messages if message not in forwarded])
    await asyncio.to_thread(run)


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
async def test_exim_with_a_smart_host_that_wants_a_login(home: Home, keys: Path, lab: Lab, dovecot: Dovecot,
                                                         world: Upstream) -> None:
    def run() -> None:
        provider = Provider(home, keys, lab, dovecot, world)
        root = lab.root / "exim-smart-host"
        root.mkdir()
        password = root / "malote.password"
        password.write_text(f"{provider.password}\n")
        exim = TemplateExim(root, lab.certificate, lab.key, 1)
        TemplateExim.template = template("exim/smart-host.conf", port=f"port = 2525 => port = {provider.port}",
                                         password=f"/etc/exim4/malote.password => {password}")
        with exim.running(), provider.relay.running():
            with smtplib.SMTP(HOST, exim.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
    await asyncio.to_thread(run)


async def test_a_smart_host_over_the_network(home: Home, keys: Path, lab: Lab, world: Upstream) -> None:
    """What Exchange, Microsoft and Google reach, TLS with a name that they verify, and only from their addresses; a Postfix that
    verifies stands in for them."""
    relay = Relay(home, keys, world.port)
    port = relay.port

    def configure(network: str) -> None:
        shared = template("smart-host.toml", host=f'host = "192.0.2.10" => host = "{HOST}"', port=f"port = 25  => port = {port} ",
                          certificate=f"/etc/malote/relay.pem => {lab.certificate}", key=f"/etc/malote/relay.key => {lab.key}",
                          network=f'"192.0.2.20" => "{network}"', back=f"port = 10026 => port = {world.port}",
                          metrics=f"port = 9625 => port = {relay.metrics}",
                          workers="workers = 2 => workers = 1", audit=f"/var/lib/malote/audit.jsonl => {home.root}/audit.jsonl",
                          unlock=f'unlock = "credential" => unlock = "file"\nfile = "{home.root}/passphrase"')
        home.config.write_text(f'{shared}\n[store]\npath = "{home.root}/store"\n[log]\nformat = "json"\n')

    def run() -> None:
        configure(HOST)
        postfix = lab.postfix("smtp:", settings={
            "relayhost": f"[localhost]:{port}", "default_transport": "smtp", "relay_transport": "smtp",
            "smtp_tls_security_level": "secure", "smtp_tls_secure_cert_match": "hostname",
            "smtp_tls_CAfile": str(lab.certificate)})
        with home.daemon() as daemon:
            with smtplib.SMTP(HOST, postfix.port) as client:
                client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
            until(lambda: len(world.messages) == 2)
            check_what_arrived(world.messages)
            configure("192.0.2.20")
            daemon.reload()
            with pytest.raises(smtplib.SMTPConnectError) as caught:
                smtplib.SMTP(HOST, port)
            assert caught.value.smtp_code == 554
            assert daemon.stop() == 0
    await asyncio.to_thread(run)


HAPROXY = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/sbin:/bin")


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
async def test_haproxy(home: Home, keys: Path, world: Upstream) -> None:
    """As in the guide, the listener expects the PROXY header of haproxy; a node that is down is passed by."""
    relay, front, other = Relay(home, keys, world.port), free_port(), free_port()
    home.config.write_text(home.config.read_text().replace(
        f'port = {relay.port}\nauth = "none"',
        f'port = {relay.port}\nauth = "none"\nproxies = ["127.0.0.1"]\nnetworks = ["127.0.0.0/8"]'))
    config = home.root / "haproxy.cfg"
    config.write_text(template("haproxy/haproxy.cfg", front=f"bind 127.0.0.1:2500 => bind 127.0.0.1:{front}",
                               one=f"127.0.0.1:2525 => 127.0.0.1:{relay.port}", two=f"127.0.0.1:2526 => 127.0.0.1:{other}"))
    assert HAPROXY is not None
    assert subprocess.run([HAPROXY, "-c", "-f", str(CONFIG / "haproxy/haproxy.cfg")], capture_output=True).returncode == 0

    def run() -> None:
        with relay.running(), (home.root / "haproxy.log").open("wb") as log:
            with subprocess.Popen([HAPROXY, "-db", "-f", str(config)], stdout=log, stderr=log) as proxy:
                try:
                    until(lambda: _greeted(front))
                    with smtplib.SMTP(HOST, front) as client:
                        client.sendmail(ANNA, [BEN], text(ANNA, BEN))
                        client.sendmail(ANNA, [CLEO], text(ANNA, CLEO))
                finally:
                    proxy.kill()
            check_what_arrived(world.messages)
    await asyncio.to_thread(run)


def _greeted(port: int) -> bool:
    try:
        with smtplib.SMTP(HOST, port, timeout=5) as client:
            return client.noop()[0] == 250
    except (OSError, smtplib.SMTPException):
        return False


# --- the configuration of malote itself


def test_the_configuration_of_the_relay_has_no_fault() -> None:
    for name in ("relay.toml", "smart-host.toml"):
        config = parse_config(tomllib.loads((CONFIG / name).read_text()), source=name)
        assert config_faults(config) == []
        assert rule_faults(config.outgoing) == []


def snippets(word: str) -> list[str]:
    """The tables that the guide shows."""
    found = [textwrap.dedent(block) for block in re.findall(r"(?m)(?:^    \[\[.*\n(?:^    .*\n)*)", GUIDE)]
    assert len(found) == 4
    return [each for each in found if word in each]


def test_the_snippet_for_smart_hosts_is_what_their_configuration_has() -> None:
    [snippet] = snippets("relay.pem")
    whole = tomllib.loads((CONFIG / "smart-host.toml").read_text())
    assert tomllib.loads(snippet)["outgoing"]["listeners"] == whole["outgoing"]["listeners"]


def test_the_snippets_of_the_guide_have_no_fault() -> None:
    """In place of, or beside, what is in config/relay.toml."""
    relay = tomllib.loads((CONFIG / "relay.toml").read_text())
    for snippet in snippets("[["):
        more = tomllib.loads(snippet)
        table = {**relay, **more, "outgoing": {**relay["outgoing"], **more.get("outgoing", {})}}
        assert config_faults(parse_config(table, source="relay.md")) == []


async def test_what_arrives_is_opened(home: Home, keys: Path, lab: Lab, tmp_path: Path, world: Upstream) -> None:
    """Sealed mail to Anna, by another house, goes through Postfix and the gateway of the guide, and comes out opened."""
    shutil.copytree(keys, home.root / "store")
    port, theirs = free_port(), Home(tmp_path / "theirs")
    theirs.configure("")
    theirs.keys("new", BEN, "--algorithm", "ed25519")
    home.configure("")
    home.keys("export", "@example.org", "-o", str(tmp_path / "ours.card"))
    theirs.keys("import", str(tmp_path / "ours.card"))
    sealed = theirs.malote("seal", "--to", ANNA, stdin=text(BEN, ANNA))
    assert sealed.returncode == 0, sealed.stderr.decode()
    async with Upstream(lmtp=True) as mailboxes:
        [snippet] = snippets("incoming")
        snippet = snippet.replace("port = 2626", f"port = {port}").replace("port = 24 ", f"port = {mailboxes.port} ")
        home.configure(f"{snippet}\n[outgoing]\nenabled = false\n")

        def run() -> None:
            settings = main_cf(template("postfix/opening.main.cf", port=f":2626 => :{port}"))
            postfix = lab.postfix("smtp:", settings={**settings, "virtual_mailbox_domains": "example.org"})
            with home.daemon() as daemon:
                with smtplib.SMTP(HOST, postfix.port) as client:
                    client.sendmail(BEN, [ANNA], sealed.stdout)
                until(lambda: len(mailboxes.messages) == 1)
                assert daemon.stop() == 0
        await asyncio.to_thread(run)
    [message] = mailboxes.messages
    assert b"the secret text" in message.content
    assert b"Malote-Verdict:" in message.content


def test_the_guide_names_files_and_commands_that_exist() -> None:
    for name in re.findall(r"`config/([\w./-]+)`", GUIDE):
        assert (CONFIG / name).is_file(), name
    from malote.cli.main import COMMANDS

    for command in re.findall(r"(?:as_malote|`malote) ([a-z]+)", GUIDE):
        assert command in COMMANDS, command
    for link in re.findall(r"\]\(([\w.]+)", GUIDE):
        assert (ROOT / "docs" / link).is_file(), link


# --- Prometheus and Grafana


class Everything:
    """Numbers with every part of them."""

    def numbers(self) -> Numbers:
        return Numbers(
            connections=1, connections_limit=2, memory_used=3, memory_limit=4, in_flight=5, listeners=1, store_failing=False,
            card_ends_ms=(2**42,), accounts={"watching": 1},
            upstream=UpstreamNumbers(1, 2, 3.0, {"idle": 1, "leased": 0, "opening": 0}), audit=AuditNumbers(False, 0, 1, 0),
            ready={"running": True, "listeners": True, "keys": True, "store": True, "upstream": True, "audit": True})


def exported() -> dict[str, set[str]]:
    """The names that /metrics has, with the labels of each."""
    metrics = Metrics(Everything())
    for direction in ("in", "out"):
        metrics.note(OutcomeEntry(at_ms=1, direction=direction, outcome="x", message_id="1", took_ms=5))
    found: dict[str, set[str]] = {"up": {"job", "instance"}}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    return found


def expressions() -> list[str]:
    """Of the alerts and of the panels."""
    rules = re.findall(r"(?m)^ +expr: (.*)$", (CONFIG / "prometheus/malote.rules.yml").read_text())
    board = json.loads((CONFIG / "grafana/malote.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(rules) == 14
    assert len(panels) > 20
    return rules + panels


@pytest.mark.parametrize("expression", expressions())
def test_alerts_and_panels_ask_for_what_there_is(expression: str) -> None:
    """A misspelt name is no error in Prometheus: the alert would just never come."""
    names = exported()
    used = re.findall(r"\b((?:malote|process)_\w+|up)\b(?:\{([^}]*)\})?", expression)
    assert used
    for name, selector in used:
        assert name in names, name
        for label, value in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', selector):
            assert label in names[name], f"{name}{{{label}}}"
            if label == "check":
                assert set(value.split("|")) <= set(Everything().numbers().ready), value
    for label in re.findall(r"by \(([^)]*)\)", expression):
        for each in label.replace(" ", "").split(","):
            assert any(each in names[name] for name, _ in used), each


FETCHED = ROOT / ".lab" / "promtool"        # tests/lab/debian-servers.sh
PROMTOOL = str(FETCHED) if FETCHED.exists() else shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not there: run `make setup` as root on Debian")


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_reads_the_rules() -> None:
    promtool("check", "rules", CONFIG / "prometheus" / "malote.rules.yml")
    promtool("check", "config", CONFIG / "prometheus" / "scrape.yml")


@needs_promtool
def test_each_alert_comes_when_it_should_and_only_then(tmp_path: Path) -> None:
    """What sets it off is in alerts_test.yml; the same file has an installation that is well, with its ups and downs."""
    text = (ROOT / "tests/running/alerts_test.yml").read_text()
    for name in re.findall(r"alert: (\w+)", (CONFIG / "prometheus/malote.rules.yml").read_text()):
        assert f'alertname="{name}"' in text, name
    (tmp_path / "test.yml").write_text(text.replace("RULES", str(CONFIG / "prometheus/malote.rules.yml")))
    promtool("test", "rules", tmp_path / "test.yml")


@needs_promtool
def test_panels_ask_in_the_language_of_prometheus(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(expressions())]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))      # JSON is YAML
    promtool("check", "rules", tmp_path / "panels.yml")


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = json.loads((CONFIG / "grafana/malote.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
