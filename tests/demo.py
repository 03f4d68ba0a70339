"""`make demo`: the main job on real servers, told stage by stage. Exits 0 only if each stage really happened.

Anna's program hands a mail to malote's proxy; Postfix and Dovecot carry it; Ben's malote watches his mailbox and opens it. Then
somebody who recorded the sealed mail sends it again, sends it damaged, and Anna writes to a person without a key.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import imaplib
import json
import os
import re
import signal
import smtplib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lab.servers import HOST, PASSWORD, Dovecot, Lab, Postfix, free_port, wait_for_port

ANNA, BEN, CLEO = "anna@north.example", "ben@south.example", "cleo@elsewhere.example"
SUBJECT = "Übernahmeangebot — streng vertraulich"
TEXT = "We offer 4.2 million; nobody else knows. Žádný spěch."
ATTACHMENT = bytes(range(256)) * 40
WAIT_SECONDS = 30
MALOTE = [sys.executable, "-m", "malote"]

COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BOLD, DIM, GREEN, RED, PLAIN = ("\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m") if COLOUR else ("",) * 5


class StageFailed(Exception):
    """What should have happened and did not."""


def check(holds: bool, claim: str) -> None:
    if not holds:
        raise StageFailed(claim)
    print(f"   {GREEN}✓{PLAIN} {claim}")


def show(text: str) -> None:
    for line in text.rstrip("\n").split("\n"):
        print(f"   {DIM}│ {line}{PLAIN}")


def stage(number: int, title: str) -> None:
    print(f"\n{BOLD}{number}. {title}{PLAIN}")


class Person:
    """Somebody with a malote of their own: configuration, store and keys in one directory."""

    def __init__(self, address: str, root: Path) -> None:
        self.address = address
        self.root = root / address.partition("@")[0]
        self.root.mkdir(mode=0o700)
        self.config = self.root / "malote.toml"
        self.log = self.root / "log"
        self.process: subprocess.Popen[bytes] | None = None
        for name, secret in (("passphrase", os.urandom(16).hex()), ("password", PASSWORD)):
            (self.root / name).touch(0o600)
            (self.root / name).write_text(secret)

    def configure(self, sections: str) -> None:
        self.config.write_text(f"""
[store]
path = "{self.root}/store"

[keys]
unlock = "file"
file = "{self.root}/passphrase"

{sections}""")

    def malote(self, *arguments: str, stdin: bytes | None = None) -> str:
        command = [*MALOTE, "--config", str(self.config), *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, check=False)
        if done.returncode != 0:
            raise StageFailed(f"malote {' '.join(arguments)}: {done.stderr.decode(errors='replace')}")
        return done.stdout.decode()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*MALOTE, "--config", str(self.config), "run"], stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(WAIT_SECONDS)
            self.process = None


def anna_sections(listen: int, postfix: Postfix, certificate: Path) -> str:
    return f"""
[[outgoing.listeners]]
port = {listen}

[outgoing.upstream]
host = "localhost"
port = {postfix.submission_port}
ca_file = "{certificate}"

[[outgoing.rules]]
recipients = ["*"]
seal = "require"
"""


def ben_sections(dovecot: Dovecot, certificate: Path, root: Path) -> str:
    return f"""
[outgoing]
enabled = false

[[accounts]]
name = "ben"
host = "localhost"
port = {dovecot.imaps_port}
ca_file = "{certificate}"
username = "{BEN}"
password_file = "{root}/ben/password"
deliver = "replace"
"""


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            raise StageFailed(f"not within {WAIT_SECONDS} s: {what}")
        time.sleep(0.1)


@contextmanager
def mailbox(dovecot: Dovecot, lab: Lab, folder: str) -> Iterator[imaplib.IMAP4]:
    """Ben's own mail program looks into a folder."""
    with imaplib.IMAP4_SSL("localhost", dovecot.imaps_port, ssl_context=lab.client_tls()) as client:
        client.login(BEN, PASSWORD)
        client.select(f'"{folder}"', readonly=True)
        yield client


def messages(dovecot: Dovecot, lab: Lab, folder: str) -> list[bytes]:
    with mailbox(dovecot, lab, folder) as client:
        if client.state != "SELECTED":
            return []
        numbers = client.search(None, "ALL")[1][0].split()
        return [client.fetch(number.decode(), "(BODY.PEEK[])")[1][0][1] for number in numbers]  # type: ignore[index]


def verdict_of(raw: bytes) -> str:
    value = str(email.message_from_bytes(raw, policy=email.policy.default)["Malote-Verdict"] or "")
    return re.split(r"[;\s]", value.strip(), maxsplit=1)[0]


def submit(listen: int, root: Path) -> str:
    """Anna's mail program: swaks, with login, an attachment and a subject that is not ASCII."""
    attachment = root / "offer.bin"
    attachment.write_bytes(ATTACHMENT)
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = f"Anna <{ANNA}>", f"Ben <{BEN}>", SUBJECT
    message.set_content(TEXT)
    message.add_attachment(ATTACHMENT, maintype="application", subtype="octet-stream", filename="offer.bin")
    file = root / "message.eml"
    file.write_bytes(message.as_bytes())
    done = subprocess.run(
        ["swaks", "--server", HOST, "--port", str(listen), "--from", ANNA, "--to", BEN, "--auth", "PLAIN", "--auth-user", ANNA,
         "--auth-password", PASSWORD, "--auth-hide-password", "--data", f"@{file}", "--suppress-data"],
        capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StageFailed(f"swaks:\n{done.stdout}{done.stderr}")
    return done.stdout


def is_telling(line: str) -> bool:
    """A line of the SMTP dialogue that helps to understand it: no list of extensions, no login."""
    command = line.strip()[2:].strip()
    return line.strip()[:2] in ("->", "<-") and not command.startswith("250-") and "AUTH" not in command.upper()


def run(root: Path, *, keep: bool) -> None:
    with Lab(root / "servers") as lab:
        stage(1, "Real mail servers, on loopback only")
        dovecot = lab.dovecot([ANNA, BEN])
        postfix = lab.postfix(dovecot.lmtp_hop, auth_port=dovecot.auth_port)
        check(True, f"Postfix takes submissions on port {postfix.submission_port}, Dovecot serves IMAP on {dovecot.imaps_port}")

        stage(2, "Two people make keys and exchange their cards")
        anna, ben = Person(ANNA, root), Person(BEN, root)
        listen = free_port()
        anna.configure(anna_sections(listen, postfix, lab.certificate))
        ben.configure(ben_sections(dovecot, lab.certificate, root))
        for person, other in ((anna, ben), (ben, anna)):
            person.malote("keys", "new", person.address)
            other.malote("keys", "import", "-", stdin=person.malote("keys", "export", person.address).encode())
        show(ben.malote("keys", "list"))
        check(ANNA in ben.malote("keys", "list") and BEN in anna.malote("keys", "list"), "each holds the other's card")

        try:
            story(lab, dovecot, postfix, anna, ben, listen, root)
            if keep:
                wait_for_visitor(dovecot, lab, anna, ben, listen)
        finally:
            for person in (anna, ben):
                person.stop()


def story(lab: Lab, dovecot: Dovecot, postfix: Postfix, anna: Person, ben: Person, listen: int, root: Path) -> None:
    stage(3, "Anna sends: her mail program talks to malote, malote seals and hands on to Postfix")
    anna.start()
    wait_for_port(listen, process=anna.process, log=anna.log)
    dialogue = submit(listen, root)
    show("\n".join(line for line in dialogue.splitlines() if is_telling(line)))
    check("250" in dialogue, "250 only after Postfix's own 250")

    stage(4, "What lies in Ben's mailbox, seen by whoever runs the server")
    wait_until(lambda: len(messages(dovecot, lab, "INBOX")) == 1, "the sealed mail in the mailbox")
    [sealed] = messages(dovecot, lab, "INBOX")
    show_sealed(sealed)
    check(b"bernahme" not in sealed and b"offer.bin" not in sealed and TEXT[:10].encode() not in sealed,
          "no subject, no text, no file name; only who writes to whom and when")
    kinds = [part.get_content_type() for part in email.message_from_bytes(sealed).walk()]
    check(kinds.count("application/vnd.malote.key-blob") == 1 and kinds.count("application/vnd.malote.sealed") == 1,
          "a note, one key blob (for Ben), one sealed part")

    stage(5, "Ben's malote opens it: decrypted, signature, timestamp and serial number checked")
    ben.start()
    # the opened copy is stored and verified before the sealed one is moved away: for a moment there are both
    wait_until(lambda: [bool(verdict_of(raw)) for raw in messages(dovecot, lab, "INBOX")] == [True], "the opened mail alone")
    [opened] = messages(dovecot, lab, "INBOX")
    message = email.message_from_bytes(opened, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    [attachment] = list(message.iter_attachments())
    show(f"From: {message['From']}\nSubject: {message['Subject']}\nMalote-Verdict: {verdict_of(opened)}\n\n"
         f"{message.get_body().get_content().strip()}\n[{attachment.get_filename()}, {len(attachment.get_content())} bytes]")  # type: ignore[union-attr]
    check(message["Subject"] == SUBJECT and attachment.get_content() == ATTACHMENT, "subject, text and attachment are Anna's")
    check(verdict_of(opened) == "FRESH", "verdict FRESH: signed by Anna, to Ben, never seen before")

    stage(6, "The classic attack: somebody recorded the sealed mail and its key blob and sends both again")
    inject(postfix, sealed)
    wait_until(lambda: len(messages(dovecot, lab, "Malote/Quarantine")) == 1 and len(messages(dovecot, lab, "INBOX")) == 1,
               "the repeat in quarantine, and not in the inbox")
    wait_until(lambda: "DUPLICATE" in ben.malote("log", "--json"), "the repeat in the log")
    show(ben.malote("log"))
    check(len(messages(dovecot, lab, "Malote/Quarantine")) == 1,
          "verdict DUPLICATE: the repeat is in Malote/Quarantine, not in the inbox")
    check([verdict_of(raw) for raw in messages(dovecot, lab, "INBOX")] == ["FRESH"], "the inbox still holds exactly one mail")

    stage(7, "A single bit of the sealed mail changed on the way")
    inject(postfix, flip_one_bit(sealed))
    wait_until(lambda: "UNREADABLE" in ben.malote("log", "--json"), "the damaged mail in the log")
    left = messages(dovecot, lab, "INBOX")
    check(len(left) == 2 and sorted(verdict_of(raw) for raw in left) == ["", "FRESH"],
          "refused whole: nothing of it was shown, the original stays as it came")

    stage(8, "Anna writes to somebody whose key she does not have, under the rule `require`")
    with smtplib.SMTP(HOST, listen) as client:
        client.login(ANNA, PASSWORD)
        client.mail(ANNA)
        code, text = client.rcpt(CLEO)
        client.rset()
    show(f"RCPT TO:<{CLEO}>\n{code} {text.decode()}")
    check(code == 550, "refused before a single byte of the mail was handed over; nothing left in clear")
    check(json.loads(anna.malote("log", "--json").splitlines()[0]) is not None, "`malote log` tells both of them what happened")


def show_sealed(sealed: bytes) -> None:
    lines = sealed.decode().replace("\r\n", "\n").split("\n")
    shown, body_lines = [], 0
    for line in lines:
        body_lines = body_lines + 1 if re.fullmatch(r"[A-Za-z0-9+/=]{60,}", line) else 0
        if body_lines == 2:
            shown.append("  ... base64 ...")
        if body_lines < 2:
            shown.append(line[:110])
    show("\n".join(shown))


def inject(postfix: Postfix, raw: bytes) -> None:
    """The attacker hands bytes straight to Ben's mail server, with an envelope of their own."""
    with smtplib.SMTP(HOST, postfix.port) as client:
        client.sendmail("mallory@evil.example", [BEN], raw)


def flip_one_bit(sealed: bytes) -> bytes:
    """In the middle of the sealed part: one base64 digit becomes another that differs in one bit."""
    digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    place = sealed.rindex(b"application/vnd.malote.sealed")
    place = sealed.index(b"\r\n\r\n", place) + 4 + 2000
    while sealed[place : place + 1] not in digits or not sealed[place : place + 1].strip():
        place += 1
    flipped = digits[digits.index(sealed[place]) ^ 1]
    return sealed[:place] + bytes([flipped]) + sealed[place + 1 :]


def wait_for_visitor(dovecot: Dovecot, lab: Lab, anna: Person, ben: Person, listen: int) -> None:
    print(f"""
{BOLD}It keeps running. Try it with your own mail program:{PLAIN}
   send as Anna    SMTP {HOST}:{listen}, no TLS, login {ANNA} / {PASSWORD}
                   swaks --server {HOST}:{listen} --auth PLAIN --auth-user {ANNA} \\
                     --auth-password {PASSWORD} --from {ANNA} --to {BEN}
   read as Ben     IMAP localhost:{dovecot.imaps_port}, TLS, login {BEN} / {PASSWORD}, the newest:
                   curl --cacert {lab.certificate} \\
                     -u {BEN}:{PASSWORD} "imaps://localhost:{dovecot.imaps_port}/INBOX;MAILINDEX=*"
   malote's own    {sys.executable} -m malote \\
                     --config {ben.config} log
   its logs        {anna.log}  {ben.log}
Ctrl-C ends it and removes everything.""", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave everything running and say how to use it")
    keep = parser.parse_args().keep
    if os.getuid() != 0:
        print("malote: make demo must run as root: Postfix and Dovecot start as root and then change to users of their own\n"
              "malote: nothing was started; it uses loopback ports and a temporary directory only: sudo make demo",
              file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="malote-demo-") as root:
        try:
            run(Path(root), keep=keep)
        except StageFailed as error:
            print(f"   {RED}✗ {error}{PLAIN}", file=sys.stderr)
            for log in Path(root).glob("*/log"):
                print(f"--- {log.parent.name}'s log\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
            return 1
    print(f"\n{GREEN}{BOLD}All stages really happened.{PLAIN} Next: README.md, \"For yourself\".")
    return 0


if __name__ == "__main__":
    sys.exit(main())
