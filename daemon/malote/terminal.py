"""Lines for people: broken between words where a terminal shows them, and never where a program reads them."""

from __future__ import annotations

import re
import shutil
from typing import TextIO

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def fitted(line: str, stream: TextIO, *, indent: int) -> str:
    """`line` as `stream` should get it: as it is, unless that is a terminal that it is too wide for. What follows the first line
    is indented. A word is never broken: paths and addresses can be copied."""
    if not stream.isatty():
        return line
    width = shutil.get_terminal_size().columns
    return "\n".join(_wrapped(one, width, indent) for one in line.split("\n"))


def _wrapped(line: str, width: int, indent: int) -> str:
    if _length(line) <= width:
        return line
    lead = " " * (len(line) - len(line.lstrip(" ")))
    lines, current = [], ""
    for word in re.findall(r" *[^ ]+", line):      # with the spaces before it: columns stay
        if current.strip() and _length(current) + _length(word) > width:
            lines.append(current)
            current = lead + " " * indent + word.lstrip(" ")
        else:
            current += word
    return "\n".join([*lines, current])


def _length(text: str) -> int:
    return len(_COLOUR.sub("", text))
