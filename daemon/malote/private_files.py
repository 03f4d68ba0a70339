"""Secrets that are not in the configuration: files that only their owner may read, systemd credentials, token commands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
from collections.abc import Sequence
from pathlib import Path

from malote.errors import MaloteError, SecretUnavailable

MAX_SECRET_BYTES = 4096
MAX_TOKEN_BYTES = 64 * 1024         # OAuth 2 tokens of some providers take 4 KiB, and may come with JSON around them
TOKEN_SECONDS = 60.0                # a helper may have to refresh its token over the network


def read_private_file(path: Path, *, error: type[MaloteError] = SecretUnavailable) -> bytes:
    """The content without its line end. Raises `error` for a file that is missing, empty, somebody else's, or open to others."""
    data, status = _read(path, error)
    mode = stat.S_IMODE(status.st_mode)
    if status.st_uid != os.geteuid():
        raise error(f"{path}: belongs to another user, not used", hint="it must belong to the user that runs malote")
    if mode not in {0o600, 0o400}:
        raise error(f"{path}: has mode {mode:04o}, not used: its owner alone must be able to read it", hint=f"chmod 600 {path}")
    return _checked(data, str(path), error)


def read_credential(name: str, *, error: type[MaloteError] = SecretUnavailable) -> bytes:
    """systemd.exec(5), LoadCredential=. Its directory is the service's alone; an access list may show as group bits."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise error(f"there is no systemd credential {name}: $CREDENTIALS_DIRECTORY is not set",
                    hint=f"LoadCredential={name}:PATH in the unit")
    if "/" in name or name in {"", ".", ".."}:
        raise error(f"{name!r} is not the name of a credential")
    path = Path(directory, name)
    data, status = _read(path, error)
    if status.st_mode & 0o007:
        raise error(f"{path}: others may read it, not used")
    return _checked(data, str(path), error)


def write_private_file(path: Path, data: bytes) -> None:
    """A new file for its owner alone, on the disk with its name when this returns. Raises `OSError`; then there is nothing of
    it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(path.parent)
    except BaseException:       # half of it would be taken for the whole, and be in the way of the next attempt
        path.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """So that names made there survive a power cut. Raises `OSError`."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path, error: type[MaloteError]) -> tuple[bytes, os.stat_result]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)      # NONBLOCK: a FIFO must not hang the start
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: is not a plain file")
            return file.read(MAX_SECRET_BYTES + 1).removesuffix(b"\n").removesuffix(b"\r"), status
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from cause


def _checked(secret: bytes, name: str, error: type[MaloteError]) -> bytes:
    if not secret:
        raise error(f"{name}: is empty")
    if len(secret) > MAX_SECRET_BYTES:
        raise error(f"{name}: is longer than {MAX_SECRET_BYTES} bytes")
    return secret


async def run_token_command(command: Sequence[str], *, seconds: float = TOKEN_SECONDS) -> str:
    """The OAuth 2 access token that a helper prints, plain or as JSON with `access_token`. No shell; what it says on stderr is
    dropped, since it may hold the token. Raises `SecretUnavailable`."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True)
    except OSError as error:
        raise SecretUnavailable(f"token_command cannot be started ({error.strerror})") from error
    output = b""
    try:
        async with asyncio.timeout(seconds):
            while process.stdout is not None and len(output) <= MAX_TOKEN_BYTES and (more := await process.stdout.read(4096)):
                output += more
            if len(output) <= MAX_TOKEN_BYTES:
                await process.wait()
    except TimeoutError:
        raise SecretUnavailable(f"token_command did not end within {seconds:.0f} seconds") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)      # and what it started, which would hold the pipe open
            await process.wait()
    if process.returncode != 0 or len(output) > MAX_TOKEN_BYTES:
        raise SecretUnavailable(f"token_command failed (exit code {process.returncode})")
    return _token(output)


def _token(output: bytes) -> str:
    try:
        text = output.decode("ascii").strip()
        if text.startswith("{"):
            text = json.loads(text)["access_token"]
    except (ValueError, KeyError, TypeError):
        text = ""
    if not isinstance(text, str) or not text or any(not "!" <= sign <= "~" for sign in text):
        raise SecretUnavailable("token_command did not print an access token")
    return text
