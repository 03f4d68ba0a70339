"""The users file: local logins, and which addresses a login may have signed.

One user a line, `login:argon2id hash:address,address`. The hash is a PHC string (`$argon2id$v=19$m=65536,t=3,p=4$salt$hash`, as
the `argon2` command and most libraries write it); empty, it says that the login has no password here: it is one of the upstream
server (pass-through), of this machine (a user name or uid at a UNIX socket), or a name in a client's certificate. An address
`@example.org` stands for all of that domain, `*` for every address: a mail server that has made sure who writes. Lines that are
empty or begin with `#` are skipped.
"""

from __future__ import annotations

import asyncio
import base64
import re
import stat
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from weakref import WeakValueDictionary

from malote.core.address import canonical_card_address
from malote.core.primitives import argon2id, equal, random_bytes
from malote.errors import ConfigError, FormatError
from malote.outgoing.identities import ANY

# RFC 9106 section 4, second recommended option: 64 MiB, 3 passes, 4 lanes
MEMORY_KIB, ITERATIONS, LANES = 64 * 1024, 3, 4
MAX_MEMORY_KIB = 1024 * 1024    # bounds what one line of the file can make a login cost
MAX_ITERATIONS = 20

# One at once (primitives.argon2id), in a thread of its own: clients that leave while they wait leave nothing behind in the
# threads that seal
_CHECKING = ThreadPoolExecutor(1, thread_name_prefix="password")

_PHC = re.compile(r"\$argon2id\$v=19\$m=(\d{1,7}),t=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{11,86})\$([A-Za-z0-9+/]{43})")


@dataclass(frozen=True, slots=True)
class PasswordHash:
    memory_kib: int
    iterations: int
    lanes: int
    salt: bytes
    digest: bytes

    def fits(self, password: bytes) -> bool:
        """Takes about 100 ms; releases the GIL."""
        digest = argon2id(password, self.salt, memory_kib=self.memory_kib, iterations=self.iterations, lanes=self.lanes)
        return equal(digest, self.digest)


@dataclass(frozen=True, slots=True)
class User:
    login: str
    password: PasswordHash | None
    addresses: frozenset[str]


class Users:
    """What the file said when it was read."""

    def __init__(self, users: Mapping[str, User] = MappingProxyType({})) -> None:
        self._users = users
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        # an unknown login costs as much as a known one: the time does not tell which logins there are
        costs = Counter((user.password.memory_kib, user.password.iterations, user.password.lanes)
                        for user in users.values() if user.password is not None)
        usual = costs.most_common(1)[0][0] if costs else (MEMORY_KIB, ITERATIONS, LANES)
        self._nobody = PasswordHash(*usual, random_bytes(16), bytes(32))

    def all(self) -> tuple[User, ...]:
        return tuple(self._users.values())

    def get(self, login: str) -> User | None:
        return self._users.get(login)

    async def check_password(self, login: str, password: str, client: str = "") -> User | None:
        """The user, or None for a wrong password, an unknown login, or one that has no password here.

        Clients take turns: whoever guesses on many connections makes others wait for one of his guesses, not for all.
        """
        user = self._users.get(login)
        known = user.password if user is not None else None
        turn = self._turns.setdefault(client, asyncio.Lock())
        async with turn:
            fits = await asyncio.get_running_loop().run_in_executor(_CHECKING, (known or self._nobody).fits, password.encode())
        return user if fits and known is not None else None


def load_users(path: Path) -> Users:
    """Raises `ConfigError` naming file and line."""
    try:
        if path.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
            raise ConfigError(f"{path}: others can read the password hashes in it, or change them", hint=f"chmod o= {path}")
        text = path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error
    return parse_users(text, path)


def parse_users(text: str, path: Path) -> Users:
    """Raises `ConfigError` naming file and line."""
    users: dict[str, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            user = _parse_line(line.strip(), f"{path}: line {number}")
            if user.login in users:
                raise ConfigError(f"{path}: line {number}: this login has a line already")
            users[user.login] = user
    return Users(users)


def _parse_line(line: str, where: str) -> User:
    parts = line.split(":")
    if len(parts) != 3 or not parts[0]:
        raise ConfigError(f"{where}: expected login:argon2id hash:address,address")
    login, phc, addresses = parts
    try:
        canonical = frozenset(ANY if address.strip() == ANY else canonical_card_address(address.strip())
                              for address in addresses.split(",") if address.strip())
    except FormatError as error:
        raise ConfigError(f"{where}: the third part has something that is no address") from error
    return User(login, _parse_hash(phc, where) if phc else None, canonical)


def _parse_hash(phc: str, where: str) -> PasswordHash:
    match = _PHC.fullmatch(phc)
    if match is None:
        raise ConfigError(f"{where}: the second part is no argon2id hash of 32 bytes ($argon2id$v=19$...)")
    memory_kib, iterations, lanes = int(match[1]), int(match[2]), int(match[3])
    if not (8 * lanes <= memory_kib <= MAX_MEMORY_KIB and 1 <= iterations <= MAX_ITERATIONS and lanes >= 1):
        raise ConfigError(f"{where}: the costs of the hash are out of bounds")
    return PasswordHash(memory_kib, iterations, lanes, _decode(match[4]), _decode(match[5]))


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4))


def hash_password(password: str, *, memory_kib: int = MEMORY_KIB, iterations: int = ITERATIONS, lanes: int = LANES) -> str:
    """The second part of a line. Fewer KiB and iterations: only for testing."""
    salt = random_bytes(16)
    digest = argon2id(password.encode(), salt, memory_kib=memory_kib, iterations=iterations, lanes=lanes)
    return f"$argon2id$v=19$m={memory_kib},t={iterations},p={lanes}${_encode(salt)}${_encode(digest)}"


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")
