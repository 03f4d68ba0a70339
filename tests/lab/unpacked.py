"""Real Exim and Cyrus IMAP on loopback, run from packages that are only unpacked (`debian-servers.sh`), never installed.

As in `servers`: ports of their own, all state under one directory, started as root, ended by pid.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from lab.servers import HOST, PASSWORD, STOP_SECONDS, free_port, wait_for_port

UNPACKED = Path(__file__).resolve().parents[2] / ".lab" / "root"
MISSING = "" if (UNPACKED / "usr/sbin/exim4").exists() and os.getuid() == 0 else (
    "Exim and Cyrus are not unpacked: run `make setup` as root on Debian")


@cache
def _programs() -> Path:
    """The unpacked tree where the servers' own users can reach it: a clone may lie where only root may look."""
    if all(place.stat().st_mode & 0o001 for place in UNPACKED.parents):
        return UNPACKED
    place = Path(tempfile.mkdtemp(prefix="malote-programs-"))
    atexit.register(shutil.rmtree, place)
    place.chmod(0o755)
    return Path(shutil.copytree(UNPACKED, place / "root", symlinks=True))


def _environment(root: Path) -> dict[str, str]:
    """The libraries that came with the packages; and, for Exim, the user whom its package would have made."""
    machines = ("x86_64-linux-gnu", "aarch64-linux-gnu", "")
    libraries = [_programs() / place / machine for place in ("usr/lib", "lib") for machine in machines]
    passwd, group = root / "passwd", root / "group"
    passwd.write_text(Path("/etc/passwd").read_text() + f"Debian-exim:x:8:8::{root}:/bin/false\n")
    group.write_text(Path("/etc/group").read_text() + "Debian-exim:x:8:\n")
    [wrapper] = _programs().glob("usr/lib/*/libnss_wrapper.so")
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "LD_LIBRARY_PATH": ":".join(str(each) for each in libraries),
            "LD_PRELOAD": str(wrapper), "NSS_WRAPPER_PASSWD": str(passwd), "NSS_WRAPPER_GROUP": str(group)}


@contextmanager
def _running(command: Sequence[str], root: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (root / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
                                   env=_environment(root))
    try:
        wait_for_port(port, process=process, log=log if log.exists() else root / "output")
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):      # what it has started for connections and deliveries
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(slots=True)
class Exim:
    """SMTP on `port` (STARTTLS offered); everything goes to `next_port` by SMTP or LMTP. `settings` go to the main section."""

    root: Path
    certificate: Path
    key: Path
    next_port: int
    protocol: str = "smtp"
    settings: Mapping[str, str] = field(default_factory=dict)
    rcpt_acl: str = ""
    port: int = field(default_factory=free_port)

    @property
    def log(self) -> Path:
        return self.root / "log" / "mainlog"

    def queued(self) -> int:
        return len(list((self.root / "spool" / "input").rglob("*-H")))

    @contextmanager
    def running(self) -> Iterator[Exim]:
        for name in ("spool", "log"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for source, name in ((self.certificate, "tls.crt"), (self.key, "tls.key")):
            shutil.copy(source, self.root / name)
        for path in (self.root, *self.root.iterdir()):
            shutil.chown(path, "mail", "mail")
        configuration = self.root / "exim.conf"
        configuration.write_text(self._configuration())
        with _running([str(_programs() / "usr/sbin/exim4"), "-C", str(configuration), "-bdf", "-q1s"], self.root, self.port,
                      self.log):
            yield self

    def _configuration(self) -> str:
        main = {
            "exim_path": str(_programs() / "usr/sbin/exim4"), "spool_directory": f"{self.root}/spool",
            "log_file_path": f"{self.root}/log/%slog", "pid_file_path": f"{self.root}/pid",
            "primary_hostname": "exim.test.example", "qualify_domain": "test.example", "daemon_smtp_ports": str(self.port),
            "local_interfaces": HOST, "tls_advertise_hosts": "*", "tls_certificate": f"{self.root}/tls.crt",
            "tls_privatekey": f"{self.root}/tls.key", "smtputf8_advertise_hosts": "*", "dsn_advertise_hosts": "*",
            "message_size_limit": "1M", "host_lookup": "", "rfc1413_hosts": "", "acl_smtp_rcpt": "recipients",
            "acl_smtp_data": "any", "keep_environment": "*", "never_users": "", "deliver_drop_privilege": "true", **self.settings,
        }
        return "".join(f"{name} = {value}\n" for name, value in main.items()) + f"""
begin acl
any:
  accept
recipients:
{self.rcpt_acl}  accept
begin routers
all:
  driver = manualroute
  route_list = * {HOST} byname
  self = send
  transport = out
begin transports
out:
  driver = smtp
  protocol = {self.protocol}
  port = {self.next_port}
  hosts_avoid_tls = *
  allow_localhost
begin retry
* * F,1h,1s
"""


@dataclass(slots=True)
class Cyrus:
    """IMAP on `port` (STARTTLS offered, plain allowed), IMAPS, with IDLE told at once; a mailbox is made at first login."""

    root: Path
    certificate: Path
    key: Path
    users: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    imaps_port: int = field(default_factory=free_port)

    @contextmanager
    def running(self) -> Iterator[Cyrus]:
        for name in ("conf/db", "conf/socket", "conf/proc", "conf/log", "proc", "lock", "spool/stage.", "sock"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for source, name in ((self.certificate, "tls.crt"), (self.key, "tls.key")):
            shutil.copy(source, self.root / name)
        (self.root / "imapd.conf").write_text("".join(f"{name}: {value}\n" for name, value in self._settings().items()))
        (self.root / "cyrus.conf").write_text(self._services())
        for user in self.users:
            for realm in ("test.example", "cyrus.test.example"):     # the default domain is cut off, the server's name put on
                subprocess.run([_programs() / "usr/sbin/saslpasswd2", "-p", "-c", "-f", self.root / "sasldb2", "-u", realm,
                                user.split("@")[0]], input=PASSWORD.encode(), env=_environment(self.root), check=True)
        for path in (self.root, *self.root.rglob("*")):
            shutil.chown(path, "mail", "mail")
        command = [str(_programs() / "usr/lib/cyrus/bin/master"), "-C", f"{self.root}/imapd.conf",
                   "-M", f"{self.root}/cyrus.conf", "-p", f"{self.root}/pid"]
        with _running(command, self.root, self.port, self.root / "output"):
            yield self

    def _settings(self) -> dict[str, str]:
        return {
            "configdirectory": f"{self.root}/conf", "proc_path": f"{self.root}/proc", "mboxname_lockpath": f"{self.root}/lock",
            "defaultpartition": "default", "partition-default": f"{self.root}/spool", "cyrus_user": "mail",
            "cyrus_group": "mail", "servername": "cyrus.test.example", "allowplaintext": "yes",
            "sasl_pwcheck_method": "auxprop", "sasl_auxprop_plugin": "sasldb", "sasl_sasldb_path": f"{self.root}/sasldb2",
            "sasl_mech_list": "PLAIN LOGIN", "virtdomains": "userid", "defaultdomain": "test.example",
            "unixhierarchysep": "yes", "altnamespace": "yes", "autocreate_quota": "0", "autocreate_post": "yes",
            "tls_session_timeout": "0",
            "tls_server_cert": f"{self.root}/tls.crt", "tls_server_key": f"{self.root}/tls.key",
            "idlesocket": f"{self.root}/sock/idle", "imapidlepoll": "60", "notifysocket": f"{self.root}/sock/notify",
            "conversations": "no", **self.settings,
        }

    def _services(self) -> str:
        programs, options = _programs() / "usr/lib/cyrus/bin", f"-C {self.root}/imapd.conf"
        return f"""START {{
  recover cmd="{programs}/ctl_cyrusdb {options} -r"
  idled cmd="{programs}/idled {options}"
}}
SERVICES {{
  imap cmd="{programs}/imapd {options} -U 30" listen="{HOST}:{self.port}" prefork=1 maxchild=100
  imaps cmd="{programs}/imapd {options} -s -U 30" listen="{HOST}:{self.imaps_port}" prefork=0 maxchild=100
}}
"""
