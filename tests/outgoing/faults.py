"""Putting a fault into any function of the sending side: what it gives back is replaced, in any of many ways."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import enum
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

import malote.core
import malote.outgoing
import malote.smtp

Twist = Callable[[Any], Any]
_DEPTH = 4      # of values inside values


class Fault(Exception):
    """Nothing of ours: what a bug would raise."""


def places(*left_out: str) -> list[tuple[Any, str]]:
    """Every function, method and property of core, outgoing and smtp, in every module that has it: holder and name.

    `left_out`: names that begin with one of these, as "malote.core.proof.".
    """
    found: dict[str, tuple[Any, str]] = {}
    for package in (malote.core, malote.outgoing, malote.smtp):
        for entry in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            for holder, name, label in _members(module):
                if not label.startswith(left_out):
                    found[label] = (holder, name)
    return [found[label] for label in sorted(found)]


def used(holders: list[tuple[Any, str]], run: Callable[[], object]) -> list[tuple[Any, str]]:
    """Those of the places that `run` comes to."""
    seen: set[int] = set()

    def note(number: int) -> Twist:
        def twist(value: Any) -> Any:
            seen.add(number)
            return value
        return twist
    with pytest.MonkeyPatch.context() as patch:
        for number, place in enumerate(holders):
            apply(patch, place, note(number))
        forget()
        run()
    forget()
    return [place for number, place in enumerate(holders) if number in seen]


def forget() -> None:
    """Empty every cache: what a fault gave must not be remembered, and what was remembered would hide a fault."""
    for package in (malote.core, malote.outgoing, malote.smtp):
        for entry in pkgutil.iter_modules(package.__path__):
            for value in vars(importlib.import_module(f"{package.__name__}.{entry.name}")).values():
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def label_of(place: tuple[Any, str]) -> str:
    holder, name = place
    prefix = holder.__name__ if inspect.ismodule(holder) else f"{holder.__module__}.{holder.__qualname__}"
    return f"{prefix}.{name}"


def _members(module: Any) -> Iterator[tuple[Any, str, str]]:
    for name, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and not issubclass(value, enum.Enum):
            for inner, member in vars(value).items():
                plain = inspect.isfunction(member) or isinstance(member, property | functools.cached_property | classmethod)
                if plain and (not inner.startswith("__") or inner == "__init__"):
                    yield value, inner, f"{module.__name__}.{value.__qualname__}.{inner}"
        elif callable(value) and not inspect.isclass(value) and str(getattr(value, "__module__", "")).startswith("malote."):
            yield module, name, f"{module.__name__}.{name}"


def apply(patch: pytest.MonkeyPatch, place: tuple[Any, str], twist: Twist) -> None:
    """From now on, whatever is asked there is answered with what `twist` makes of the true answer."""
    holder, name = place
    real = inspect.getattr_static(holder, name)
    patch.setattr(holder, name, _twisted(real, twist))


def _twisted(real: Any, twist: Twist) -> Any:
    if isinstance(real, property):
        return property(lambda self: twist(real.fget(self)))    # type: ignore[misc]
    if isinstance(real, functools.cached_property):
        return property(lambda self: twist(real.func(self)))
    if isinstance(real, classmethod):
        return classmethod(_twisted(real.__func__, twist))
    if inspect.iscoroutinefunction(real):
        @functools.wraps(real)
        async def later(*args: Any, **options: Any) -> Any:
            return twist(await real(*args, **options))
        return later

    @functools.wraps(real)
    def now(*args: Any, **options: Any) -> Any:
        return twist(real(*args, **options))
    return now


def inside(value: Any, change: Callable[[bytes], bytes], text: Callable[[str], str], depth: int = _DEPTH) -> Any:
    """The same value, in which all bytes and texts, however deep, are changed. What was decided (an enumeration) stays."""
    if isinstance(value, enum.Enum) or depth == 0:
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return type(value)(change(bytes(value)))
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: inside(each, change, text, depth - 1) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(inside(each, change, text, depth - 1) for each in value)
    if isinstance(value, tuple | list | set | frozenset):
        return type(value)([inside(each, change, text, depth - 1) for each in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(changed, field.name, inside(getattr(value, field.name, None), change, text, depth - 1))
        return changed
    return value


def twists(original: bytes, text: str) -> dict[str, Twist]:
    """By name. `original`, `text`: what must not be seen, in bytes and as a text of one line."""
    def fail(_: Any) -> Any:
        raise Fault("the mind of the program")

    def give_up(error: type[BaseException]) -> Twist:
        def twist(_: Any) -> Any:
            raise error("the mind of the program")
        return twist
    return {
        "raises": fail, "memory": give_up(MemoryError), "cancelled": give_up(asyncio.CancelledError),
        "nothing": lambda _: None, "false": lambda _: False, "true": lambda _: True,
        "empty": lambda _: b"", "object": lambda _: object(), "number": lambda _: 1 << 62,
        "original": lambda _: original, "buffer": lambda _: bytearray(original), "text": lambda _: text,
        "list": lambda _: [original], "pair": lambda _: (original, original),
        "all of it": lambda value: inside(value, lambda _: original, lambda _: text),
        "at the end": lambda value: inside(value, lambda each: each + original, lambda each: each + text),
        "in front": lambda value: inside(value, lambda each: original + each, lambda each: text + each),
        "amid": lambda value: inside(value, lambda each: each[:9] + original + each[9:], lambda each: each[:9] + text + each[9:]),
    }
