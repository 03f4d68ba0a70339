"""A real PostgreSQL of Debian's package, with all state under one directory, run as the package's user, ended by pid.

It listens on a UNIX socket below its directory, where everybody is trusted, and on loopback with TLS and a password.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lab.servers import HOST, LabError, free_port

START_SECONDS = 60
PASSWORD = "db secret"
SETTINGS = {        # quick rather than safe: the tests end its processes, not the machine
    "fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "shared_buffers": "32MB", "max_connections": "60",
    "deadlock_timeout": "100ms", "max_wal_size": "256MB", "autovacuum": "off", "logging_collector": "off",
}


def programs() -> Path:
    """Debian keeps them off the PATH, one directory for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found:
        raise LabError("PostgreSQL is not installed: tests/lab/debian-packages.sh does it")
    return found[-1]


def _user() -> str | None:
    """It refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@dataclass(slots=True)
class Postgres:
    root: Path
    certificate: Path | None = None
    key: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    made: int = 0

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def url(self, database: str, user: str = "malote") -> str:
        """By the socket."""
        return f"postgresql://{user}@/{database}?host={self.root}&port={self.port}"

    def start(self) -> None:
        self.root.mkdir(exist_ok=True)
        if not (self.data / "PG_VERSION").exists():
            self._make()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [programs() / "postgres", "-D", str(self.data)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.root,
                start_new_session=True, **_as(_user()))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            if self._psql("postgres", "SELECT 1", check=False).returncode == 0:
                return
            time.sleep(0.05)
        raise LabError(f"PostgreSQL did not start\n{self.log.read_text(errors='replace')[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT ends it at once and in order (its "fast"), SIGQUIT as a crash would."""
        if self.process is not None:
            self.process.send_signal(how)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def copy_to(self, replica: Postgres, *, follow: bool = False) -> None:
        """A standby with what is committed now. Where it has the same port, start it after this one has ended. `follow`: it
        takes over, asynchronously, what is committed here afterwards."""
        replica.root.mkdir()
        replica.root.chmod(0o755)
        if (user := _user()) is not None:
            shutil.chown(replica.root, user)
        subprocess.run([programs() / "pg_basebackup", "-h", str(self.root), "-p", str(self.port), "-U", "postgres", "-D",
                        str(replica.data), "--checkpoint=fast", "--wal-method=stream", "--no-sync"],
                       check=True, capture_output=True, cwd=self.root, **_as(user))
        (replica.data / "standby.signal").touch()
        with (replica.data / "postgresql.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{replica.root}'\nport = {replica.port}\n")
            if follow:
                file.write(f"primary_conninfo = 'host={self.root} port={self.port} user=postgres'\n")

    def catch_up(self, primary: Postgres) -> None:
        """Wait until everything of there is here."""
        wanted = primary.execute("postgres", "SELECT pg_current_wal_lsn()")
        deadline = time.monotonic() + START_SECONDS
        while self.execute("postgres", f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'") != "t":
            if time.monotonic() > deadline:
                raise LabError("the standby does not follow")
            time.sleep(0.02)

    def lag(self) -> None:
        """From now on nothing of the primary comes here."""
        self.execute("postgres", "ALTER SYSTEM SET primary_conninfo = ''", "SELECT pg_reload_conf()")
        deadline = time.monotonic() + START_SECONDS
        while self.execute("postgres", "SELECT count(*) FROM pg_stat_wal_receiver") != "0":
            if time.monotonic() > deadline:
                raise LabError("the standby goes on following")
            time.sleep(0.02)

    def promote(self) -> None:
        self.execute("postgres", "SELECT pg_promote()")

    def new_database(self, **options: str) -> str:
        """An empty one of its own; returns its name."""
        self.made += 1
        name = f"malote_{self.made}"
        self.execute("postgres", f"CREATE DATABASE {name} OWNER malote {' '.join(f'{k} {v}' for k, v in options.items())}")
        return name

    def execute(self, database: str, *commands: str) -> str:
        """As the superuser; what the commands print, one line for each row."""
        return self._psql(database, *commands).stdout.strip()

    def _psql(self, database: str, *commands: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        given = [part for command in commands for part in ("-c", command)]
        return subprocess.run(
            [programs() / "psql", "-h", str(self.root), "-p", str(self.port), "-U", "postgres", "-d", database, "-qAtX",
             "-v", "ON_ERROR_STOP=1", *given], check=check, capture_output=True, text=True)

    def _make(self) -> None:
        self.root.chmod(0o755)
        if (user := _user()) is not None:
            shutil.chown(self.root, user)
        subprocess.run([programs() / "initdb", "-D", str(self.data), "-U", "postgres", "--no-sync", "--encoding=UTF8",
                        "--locale=C.UTF-8", "--auth=trust"],
                       check=True, capture_output=True, cwd=self.root, **_as(user))
        settings = SETTINGS | {"listen_addresses": f"'{HOST},127.0.0.2'", "port": str(self.port),
                               "unix_socket_directories": f"'{self.root}'"}
        if self.certificate is not None and self.key is not None:
            for name, source in (("server.crt", self.certificate), ("server.key", self.key)):
                (self.data / name).write_bytes(source.read_bytes())
                (self.data / name).chmod(0o600)
                if user is not None:
                    shutil.chown(self.data / name, user)
            settings["ssl"] = "on"
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in (settings | dict(self.settings)).items())
        (self.data / "pg_hba.conf").write_text(
            "local all all trust\nlocal replication all trust\nhost all all 127.0.0.0/8 scram-sha-256\n")
        subprocess.run([programs() / "postgres", "--single", "-D", str(self.data), "postgres"], check=True, capture_output=True,
                       cwd=self.root, input=f"CREATE ROLE malote LOGIN PASSWORD '{PASSWORD}'\n".encode(), **_as(user))


def _as(user: str | None) -> dict[str, object]:
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
