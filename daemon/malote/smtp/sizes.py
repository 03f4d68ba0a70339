"""The size limit that an upstream server announces (RFC 1870)."""

from __future__ import annotations

from collections.abc import Mapping


def announced_limit(extensions: Mapping[str, str]) -> int:
    """The largest message, in bytes, that a server with these EHLO keywords takes; 0: it names no limit (RFC 1870 section 4)."""
    value = extensions.get("SIZE", "")
    return int(value) if value.isascii() and value.isdigit() else 0
