"""Real Postfix and Dovecot on loopback, on ports of their own choosing, with all state under one directory.

Used by the tests, by `make demo` and by the benchmarks. Both start as root in the foreground from configuration files written
here; nothing outside `root` is read or written (never /etc/postfix or /etc/dovecot), and only processes started here are ended,
by pid. Several of each may run side by side.

    with Lab(Path(tmp)) as lab:
        dovecot = lab.dovecot(users=["anna@a.example", "ben@b.example"])
        postfix = lab.postfix(next_hop=dovecot.lmtp_hop)
        ... smtplib.SMTP("127.0.0.1", postfix.port)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

HOST = "127.0.0.1"
START_SECONDS = 30
STOP_SECONDS = 10
PASSWORD = "secret"


class LabError(Exception):
    """A server did not start; the message holds the end of its log."""


def free_port() -> int:
    """A port that is free, and that no other process of a lab is given until this one ends. Below the ephemeral range, so that no
    outgoing connection takes it meanwhile."""
    for _ in range(1000):
        port = 10_000 + int.from_bytes(os.urandom(2), "big") % 20_000
        if not _reserve(port):
            continue
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise LabError("no free port")


_reserved: set[int] = set()     # ports given out here: the kernel's lock does not keep a process from taking it twice
_reservations: list[int] = []   # the one open file


def _reserve(port: int) -> bool:
    """One byte of a file is locked for each port; the kernel lets go of them when this process ends, in whatever way."""
    if port in _reserved:
        return False
    if not _reservations:
        name = Path(tempfile.gettempdir(), f"malote-lab-ports-{os.getuid()}")
        _reservations.append(os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    try:
        fcntl.lockf(_reservations[0], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _reserved.add(port)
    return True


def wait_for_port(port: int, *, process: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> None:
    """Until somebody listens on the port. Raises LabError, with the end of the log, when that takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((HOST, port)) == 0:
                return
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.03)
    tail = log.read_text(errors="replace")[-2000:] if log is not None and log.exists() else ""
    raise LabError(f"nothing listens on port {port}\n{tail}")


def make_certificate(directory: Path, name: str = "tls", hosts: Sequence[str] = ("localhost", "mx.test.example"),
                     days: int = 3650) -> tuple[Path, Path]:
    """A self-signed certificate for loopback; returns (certificate, key). It is its own certificate authority."""
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    if not certificate.exists():
        names = ",".join([*(f"DNS:{host}" for host in hosts), f"IP:{HOST}"])
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", str(days),
             "-subj", f"/CN={hosts[0]}", "-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(certificate)],
            check=True, capture_output=True)
        certificate.chmod(0o644)
    return certificate, key


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(slots=True)
class Dovecot:
    """IMAP (STARTTLS offered, plain allowed), IMAPS, LMTP and a SASL server for Postfix; Maildir; virtual users."""

    root: Path
    certificate: Path
    key: Path
    users: Sequence[str]
    passwords: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""                     # more configuration
    port: int = field(default_factory=free_port)
    imaps_port: int = field(default_factory=free_port)
    lmtp_port: int = field(default_factory=free_port)
    auth_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def lmtp_hop(self) -> str:
        """For Postfix's `next_hop`."""
        return f"lmtp:inet:{HOST}:{self.lmtp_port}"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def maildir(self, user: str) -> Path:
        """INBOX of the user on disk (subfolders are `.Name` inside it)."""
        return self.root / "mail" / user / "Maildir"

    def messages(self, user: str, folder: str = "INBOX") -> list[bytes]:
        """The raw bytes of all messages in a folder, oldest delivery first, read from disk."""
        base = self.maildir(user)
        if folder != "INBOX":
            base = base / ("." + folder.replace("/", "."))
        files = [path for part in ("cur", "new") for path in (base / part).glob("*")]
        return [path.read_bytes() for path in sorted(files, key=lambda path: path.name)]

    def start(self) -> None:
        (self.root / "mail").mkdir(parents=True, exist_ok=True)
        (self.root / "state").mkdir(exist_ok=True)
        self.root.chmod(0o755)
        shutil.chown(self.root / "mail", "mail", "mail")
        users = self.root / "users"
        users.write_text("".join(f"{user}:{self.passwords.get(user, PASSWORD)}::::::\n" for user in self.users))
        users.chmod(0o644)
        configuration = self.root / "dovecot.conf"
        configuration.write_text(self._configuration())
        with (self.root / "output").open("wb") as output:
            self.process = subprocess.Popen(["dovecot", "-F", "-c", str(configuration)], stdout=output, stderr=output,
                                            stdin=subprocess.DEVNULL, start_new_session=True)
        for port in (self.port, self.imaps_port, self.lmtp_port, self.auth_port):
            wait_for_port(port, process=self.process, log=self.log)

    def stop(self) -> None:
        if self.process is not None:
            _stop(self.process)
            with contextlib.suppress(ProcessLookupError):       # those of clients in IDLE outlive it by up to ten seconds
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def add_user(self, user: str, password: str = PASSWORD) -> None:
        """A user more, known when this returns."""
        self.add_users([user], password)

    def add_users(self, users: Sequence[str], password: str = PASSWORD) -> None:
        """Several users more, known when this returns: Dovecot looks at the file once in each second of the clock."""
        with (self.root / "users").open("a") as file:
            file.writelines(f"{user}:{password}::::::\n" for user in users)
        time.sleep(1.02 - time.time() % 1)

    def _configuration(self) -> str:
        return f"""
base_dir = {self.root}/run
state_dir = {self.root}/state
log_path = {self.log}
info_log_path = {self.log}
instance_name = malote-{self.port}
listen = {HOST}
protocols = imap lmtp
default_internal_user = dovecot
default_login_user = dovenull
default_process_limit = 200
default_client_limit = 2000
first_valid_uid = 1
ssl = yes
ssl_cert = <{self.certificate}
ssl_key = <{self.key}
ssl_min_protocol = TLSv1.2
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_failure_delay = 0
mail_location = maildir:~/Maildir
mail_max_userip_connections = 200
mailbox_list_index = yes
maildir_copy_with_hardlinks = yes
mail_fsync = optimized
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {self.root}/users
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {self.root}/users
  default_fields = uid=mail gid=mail home={self.root}/mail/%u
}}
namespace inbox {{
  inbox = yes
  separator = /
  mailbox Drafts {{
    auto = create
    special_use = \\Drafts
  }}
  mailbox Sent {{
    auto = create
    special_use = \\Sent
  }}
  mailbox Spam {{
    auto = create
    special_use = \\Junk
  }}
}}
service imap-login {{
  inet_listener imap {{
    port = {self.port}
  }}
  inet_listener imaps {{
    port = {self.imaps_port}
  }}
  service_count = 0
}}
service lmtp {{
  inet_listener lmtp {{
    address = {HOST}
    port = {self.lmtp_port}
  }}
}}
service auth {{
  inet_listener {{
    address = {HOST}
    port = {self.auth_port}
  }}
}}
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0666
  }}
}}
protocol lmtp {{
  auth_username_format = %Lu
}}
lmtp_save_to_detail_mailbox = no
recipient_delimiter = +
{self.extra}
"""


POSTFIX_SERVICES = """
pickup    unix  n - n 60 1 pickup
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
verify    unix  - - n - 1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp      unix  - - n - - smtp
relay     unix  - - n - - smtp
showq     unix  n - n - - showq
error     unix  - - n - - error
retry     unix  - - n - - error
discard   unix  - - n - - discard
lmtp      unix  - - n - - lmtp
anvil     unix  - - n - 1 anvil
scache    unix  - - n - 1 scache
postlog   unix-dgram n - n - 1 postlogd
"""


@dataclass(slots=True)
class Postfix:
    """SMTP on `port` (STARTTLS offered) and, with an `auth_port` of Dovecot, submission on `submission_port`.

    `next_hop` is Postfix's own notation, e.g. `lmtp:inet:127.0.0.1:24`, `smtp:[127.0.0.1]:25`, `discard:`.
    `settings` go to main.cf last and so win; `services` are more lines for master.cf.
    """

    root: Path
    certificate: Path
    key: Path
    next_hop: str
    auth_port: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    services: str = ""
    port: int = field(default_factory=free_port)
    submission_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.root / "maillog"

    def start(self) -> None:
        for name in ("etc", "queue", "data"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        shutil.chown(self.root / "data", "postfix")
        etc = self.root / "etc"
        (etc / "main.cf").write_text(self._main())
        (etc / "master.cf").write_text(self._master())
        subprocess.run(["postfix", "-c", str(etc), "set-permissions"], capture_output=True, check=False)
        with (self.root / "output").open("wb") as output:
            self.process = subprocess.Popen(["postfix", "-c", str(etc), "start-fg"], stdout=output, stderr=output,
                                            stdin=subprocess.DEVNULL, start_new_session=True)
        wait_for_port(self.port, process=self.process, log=self.log)

    def stop(self) -> None:
        if self.process is not None:
            pid_file = self.root / "queue" / "pid" / "master.pid"
            if self.process.poll() is None and pid_file.exists():
                try:
                    os.kill(int(pid_file.read_text()), signal.SIGTERM)
                except (ProcessLookupError, ValueError):
                    pass
                else:
                    try:
                        self.process.wait(STOP_SECONDS)
                    except subprocess.TimeoutExpired:
                        _stop(self.process)
            _stop(self.process)
            self.process = None

    def queued(self) -> int:
        """How many messages wait in the queue."""
        return sum(1 for name in ("incoming", "active", "deferred", "maildrop")
                   for path in (self.root / "queue" / name).rglob("*") if path.is_file())

    def flush(self) -> None:
        subprocess.run(["postfix", "-c", str(self.root / "etc"), "flush"], capture_output=True, check=False)

    def _main(self) -> str:
        settings = {
            "compatibility_level": "3.6", "queue_directory": f"{self.root}/queue", "data_directory": f"{self.root}/data",
            "command_directory": "/usr/sbin", "daemon_directory": "/usr/lib/postfix/sbin", "mail_owner": "postfix",
            "setgid_group": "postdrop", "inet_interfaces": HOST, "inet_protocols": "ipv4", "myhostname": "mx.test.example",
            "mydomain": "test.example", "mydestination": "", "local_recipient_maps": "", "alias_maps": "", "alias_database": "",
            "mynetworks": "127.0.0.0/8", "smtpd_relay_restrictions": "permit_mynetworks, reject",
            "smtpd_recipient_restrictions": "permit_mynetworks, reject", "maillog_file": str(self.log),
            "maillog_file_prefixes": str(self.root), "smtpd_tls_security_level": "may",
            "smtpd_tls_cert_file": str(self.certificate), "smtpd_tls_key_file": str(self.key), "smtp_tls_security_level": "none",
            "default_transport": self.next_hop, "relay_transport": self.next_hop, "virtual_transport": self.next_hop,
            "default_destination_recipient_limit": "1000", "lmtp_destination_recipient_limit": "1000",
            "smtputf8_enable": "yes", "message_size_limit": "104857600", "mailbox_size_limit": "0",
            # the client's bytes stay as they are: no header rewriting, no header but Received
            "local_header_rewrite_clients": "", "enable_original_recipient": "no", "always_add_missing_headers": "no",
            "smtpd_client_connection_rate_limit": "0", "smtpd_client_connection_count_limit": "0",
            "disable_dns_lookups": "yes", "smtp_host_lookup": "native", "notify_classes": "", "bounce_queue_lifetime": "0",
            "minimal_backoff_time": "1s", "maximal_backoff_time": "2s", "queue_run_delay": "1s",
            **self.settings,
        }
        return "".join(f"{name} = {value}\n" for name, value in settings.items())

    def _master(self) -> str:
        lines = f"{HOST}:{self.port} inet n - n - - smtpd\n"
        if self.auth_port is not None:
            lines += f"""{HOST}:{self.submission_port} inet n - n - - smtpd
  -o smtpd_tls_security_level=encrypt
  -o smtpd_sasl_auth_enable=yes
  -o smtpd_sasl_type=dovecot
  -o smtpd_sasl_path=inet:{HOST}:{self.auth_port}
  -o smtpd_relay_restrictions=permit_sasl_authenticated,reject
  -o smtpd_recipient_restrictions=permit_sasl_authenticated,reject
"""
        return lines + self.services + POSTFIX_SERVICES


@dataclass(slots=True)
class Sink:
    """Postfix's smtp-sink: takes all mail and drops it, or with `dump` keeps each message in a file of that directory; with
    `counter`, a file, it tells how many it has."""

    options: Sequence[str] = ()
    dump: Path | None = None
    counter: Path | None = None
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        keep = ["-d", f"{self.dump}/%Y%m%d%H%M%S."] if self.dump is not None else []
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            shutil.chown(self.dump, "postfix")
        count = ["-c"] if self.counter is not None else []
        command = [_sbin("smtp-sink"), "-u", "postfix", *self.options, *keep, *count, f"inet:{HOST}:{self.port}", "1000"]
        with (self.counter or Path(os.devnull)).open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL, start_new_session=True)
        wait_for_port(self.port, process=self.process)

    def messages(self) -> int:
        """From the end of its `counter`: `sess=12 quit=11 mesg=13` and a carriage return, each time something happens."""
        assert self.counter is not None
        with self.counter.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 200))
            found = re.findall(rb"mesg=(\d+)\r", file.read())
        return int(found[-1]) if found else 0

    def stop(self) -> None:
        if self.process is not None:
            _stop(self.process)
            self.process = None


def _sbin(name: str) -> str:
    return shutil.which(name, path=f"/usr/sbin:{os.environ.get('PATH', '')}") or name


Server = TypeVar("Server", Dovecot, Postfix, Sink)


class Lab:
    """Starts servers under one directory and ends them all when left."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self._open_to_server_users()
        self.certificate, self.key = make_certificate(self.root)
        self._servers: list[Dovecot | Postfix | Sink] = []

    def dovecot(self, users: Sequence[str], *, extra: str = "", passwords: Mapping[str, str] | None = None) -> Dovecot:
        server = Dovecot(self.root / f"dovecot{len(self._servers)}", self.certificate, self.key, users, passwords or {}, extra)
        server.root.mkdir()
        return self._started(server)

    def postfix(self, next_hop: str, *, auth_port: int | None = None, settings: Mapping[str, str] | None = None,
                services: str = "") -> Postfix:
        root = self.root / f"postfix{len(self._servers)}"
        return self._started(Postfix(root, self.certificate, self.key, next_hop, auth_port, settings or {}, services))

    def sink(self, *options: str, dump: Path | None = None, counter: Path | None = None) -> Sink:
        return self._started(Sink(options, dump, counter))

    def client_tls(self) -> ssl.SSLContext:
        """A context that trusts this lab's certificate and checks names."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def close(self) -> None:
        while self._servers:
            self._servers.pop().stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _started(self, server: Server) -> Server:
        self._servers.append(server)
        server.start()
        return server

    def _open_to_server_users(self) -> None:
        """The servers' own users must be able to walk down to their files; temporary directories are 0700."""
        for directory in (self.root, *self.root.parents):
            if not directory.stat().st_mode & 0o001 and directory.stat().st_uid == os.getuid() and directory != Path.home():
                directory.chmod(directory.stat().st_mode | 0o011)
