"""Where a command finds its configuration and its store."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import platformdirs

from malote.config import Config, load_config
from malote.errors import ConfigError
from malote.store import PostgresPlace, configured_place

SYSTEM_CONFIG = Path("/etc/malote/malote.toml")
SYSTEM_STORE = Path("/var/lib/malote")


def is_missing(path: Path) -> bool:
    """Whether there is nothing of that name. What cannot even be looked at is not missing: whoever opens it says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def check_reachable(path: Path) -> None:
    """Raises `ConfigError` for a file that this user cannot look at."""
    try:
        path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be looked at ({error.strerror})", hint="whose home is it? see $HOME") from error


@dataclass
class Settings:
    """`context.obj` of every command. The file is read when it is first needed, so that `--help` works without it."""

    config_path: Path
    named: bool     # by --config or $MALOTE_CONFIG

    @classmethod
    def at(cls, path: Path | None) -> Settings:
        if path is not None:
            return cls(path, named=True)
        return cls(SYSTEM_CONFIG if os.geteuid() == 0 else platformdirs.user_config_path("malote") / "malote.toml", named=False)

    @cached_property
    def config(self) -> Config:
        """Raises `ConfigError`. What `--config` names must be there."""
        return load_config(self.config_path)

    @cached_property
    def config_or_defaults(self) -> Config:
        """For commands that work before there is a configuration, as `malote keys new` does."""
        return Config() if not self.named and is_missing(self.config_path) else self.config

    @property
    def store_path(self) -> Path:
        """The store's directory: configured, given to the service by systemd (StateDirectory=), or where such data belongs."""
        configured = self.config_or_defaults.store.path
        if configured is not None:
            return configured
        given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        if given:
            return Path(given)
        return SYSTEM_STORE if os.geteuid() == 0 else platformdirs.user_data_path("malote")

    @property
    def store_place(self) -> Path | PostgresPlace:
        """What to open: that directory, or the database of `store.url`."""
        return configured_place(self.config_or_defaults.store, self.store_path)
