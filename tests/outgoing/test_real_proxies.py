"""Real programs that stand between a client and the gateway: haproxy with PROXY headers, Postfix with XFORWARD."""

from __future__ import annotations

import asyncio
import shutil
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.servers import Lab, free_port, wait_for_port
from malote.config import LimitsConfig, ListenerConfig
from malote.outgoing.users import hash_password
from outgoing.harness import HOST, Gateway, Upstream, person, text, upstream_config

ALICE, BOB = person("alice@test.example"), person("bob@test.example")
OURS, OTHER = "127.0.0.5", "127.0.0.6"      # addresses of clients: all of 127.0.0.0/8 is this machine's


@contextmanager
def haproxy(root: Path, bind: str, server: str) -> Iterator[int]:
    """With one line each of its configuration, `{port}` to be filled in by us; the port that clients connect to."""
    port = free_port()
    config = root / f"haproxy-{port}.cfg"
    config.write_text("defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n"
                      f"listen smtp\n  bind {HOST}:{port} {bind}\n  server malote {server}\n")
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin")
    assert program is not None, "tests/lab/debian-packages.sh installs it"
    process = subprocess.Popen([program, "-db", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process=process)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def client(port: int, source: str, *, context: ssl.SSLContext | None = None) -> smtplib.SMTP:
    """Past the greeting; with a context, TLS from the first byte."""
    if context is not None:
        return smtplib.SMTP_SSL(HOST, port, "client", timeout=30, source_address=(source, 0), context=context)
    return smtplib.SMTP(HOST, port, "client", timeout=30, source_address=(source, 0))


def users_file(directory: Path) -> Path:
    path = directory / "users"
    path.write_text(f"anna:{hash_password('pw', memory_kib=64, iterations=1, lanes=1)}:alice@test.example\n")   # for testing!
    path.chmod(0o600)
    return path


def listening(lab: Lab, tls: str = "none", **more: Any) -> ListenerConfig:
    files = {} if tls == "none" else {"certificate": lab.certificate, "certificate_key": lab.key}
    return ListenerConfig.model_validate({"host": HOST, "auth": "none", "tls": tls, "proxies": (HOST,), **files, **more})


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c"])
@pytest.mark.parametrize("tls", ["none", "starttls", "tls"])
async def test_haproxy_in_front(tmp_path: Path, lab: Lab, option: str, tls: Any) -> None:
    """It says who the client is, and that client is in the network or is not. TLS goes through it to the gateway."""
    trusted = lab.client_tls()
    trusted.check_hostname = False      # smtplib asks for the address; the certificate has the name
    listener = listening(lab, tls, networks=(OURS,))
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, cards=(BOB,)) as gw:
        def attempt() -> None:
            with haproxy(tmp_path, "", f"{HOST}:{gw.port} {option}") as port:
                with client(port, OURS, context=trusted if tls == "tls" else None) as ours:
                    if tls == "starttls":
                        ours.starttls(context=trusted)
                    ours.sendmail(ALICE.address, [BOB.address], text())
                with pytest.raises(smtplib.SMTPConnectError) as caught:
                    client(port, OTHER, context=trusted if tls == "tls" else None)
                assert caught.value.smtp_code == 554
                assert b"Mail from 127.0.0.6 is not taken here" in caught.value.smtp_error
        await asyncio.to_thread(attempt)
    assert len(upstream.messages) == 1


@pytest.mark.parametrize("option", ["send-proxy-v2-ssl", "send-proxy-v2"])
async def test_tls_that_ends_at_haproxy(tmp_path: Path, lab: Lab, option: str) -> None:
    """Told so, the gateway lets the client log in; else it must think that the password would come in clear. The client is one
    from another machine, as the test, itself a proxy in front of haproxy, says."""
    pem = tmp_path / "haproxy.pem"
    pem.write_bytes(lab.certificate.read_bytes() + lab.key.read_bytes())
    listener = listening(lab, auth="local", users_file=users_file(tmp_path))
    trusted = lab.client_tls()
    trusted.check_hostname = False
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, cards=(BOB,)) as gw:
        def attempt() -> bool:
            with haproxy(tmp_path, f"accept-proxy ssl crt {pem}", f"{HOST}:{gw.port} {option}") as port:
                raw = socket.create_connection((HOST, port), 30)
                raw.sendall(b"PROXY TCP4 203.0.113.9 198.51.100.1 40000 25\r\n")
                session = smtplib.SMTP(local_hostname="client")
                session.sock = trusted.wrap_socket(raw, server_hostname="localhost")
                assert session.getreply()[0] == 220
                session.ehlo()
                offered = session.has_extn("auth")
                if offered:
                    session.login("anna", "pw")
                    session.sendmail(ALICE.address, [BOB.address], text())
                session.quit()
                return offered
        assert await asyncio.to_thread(attempt) is (option == "send-proxy-v2-ssl")
    assert len(upstream.messages) == (option == "send-proxy-v2-ssl")


async def test_postfix_before_the_queue_says_for_whom_it_speaks(tmp_path: Path, lab: Lab) -> None:
    """smtpd_proxy_filter: Postfix sends XFORWARD, and the limit is that of its client, who gets our reply as it is. What others
    send meanwhile is not concerned."""
    listener = listening(lab, proxies=(), xclient=(HOST,))
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, cards=(BOB,),
            limits=LimitsConfig(client_messages_per_minute=1)) as gw:
        postfix = await asyncio.to_thread(
            lab.postfix, "discard:", settings={"smtpd_proxy_filter": f"{HOST}:{gw.port}"})

        def attempt(source: str, number: int) -> str:
            with client(postfix.port, source) as session:
                session.ehlo()
                for step in (lambda: session.mail(ALICE.address), lambda: session.rcpt(BOB.address),
                             lambda: session.data(text(message_id=f"<{number}@test.example>"))):
                    try:
                        code, said = step()
                    except smtplib.SMTPDataError as error:
                        code, said = error.smtp_code, error.smtp_error if isinstance(error.smtp_error, bytes) else b""
                    if code != 250:
                        break
                return f"{code} {said.decode()}"
        assert (await asyncio.to_thread(attempt, OURS, 1)).startswith("250")
        assert (await asyncio.to_thread(attempt, OURS, 2)).startswith("450 4.7.1 Too many messages from your address")
        assert (await asyncio.to_thread(attempt, OTHER, 3)).startswith("250")
    assert len(upstream.messages) == 2


@pytest.mark.parametrize("sent", ["yes", "no"])
async def test_postfix_after_the_queue_says_for_whom_it_speaks(tmp_path: Path, lab: Lab, sent: str) -> None:
    """smtp_send_xforward_command. Without it the mail is Postfix's own: a peer that is trusted, counted by its address."""
    listener = listening(lab, proxies=(), xclient=(HOST,))
    async with Upstream() as upstream, Gateway(
            tmp_path / "gw", upstream_config(upstream.port), listener, cards=(BOB,),
            limits=LimitsConfig(client_messages_per_minute=2)) as gw:
        postfix = await asyncio.to_thread(lab.postfix, f"smtp:[{HOST}]:{gw.port}", settings={
            "smtp_send_xforward_command": sent, "minimal_backoff_time": "300s", "maximal_backoff_time": "300s"})

        def attempt() -> None:
            for number, source in enumerate((OURS, OURS, OTHER, OTHER)):
                with client(postfix.port, source) as session:
                    session.sendmail(ALICE.address, [BOB.address], text(message_id=f"<{number}@test.example>"))
        await asyncio.to_thread(attempt)
        async with asyncio.timeout(40):
            while len(upstream.messages) < (4 if sent == "yes" else 2) or (
                    sent == "no" and b"Too many messages" not in postfix.log.read_bytes()):
                await asyncio.sleep(0.05)
    assert len(upstream.messages) == (4 if sent == "yes" else 2)
