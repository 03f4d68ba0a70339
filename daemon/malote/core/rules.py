"""The administrator's table in the form in which it is asked: made once, then each recipient costs a few look-ups.

A pattern is kept as the text of its canonical form, so a pattern names an address exactly if it is one of the address's `keys`.
A rule is filed under its recipients, or if they are everybody under its senders; what is left stands in one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from malote.config import Kind, Level, OutgoingConfig, RuleConfig
from malote.core.address import canonical_address, canonical_domain, domain_of
from malote.core.content import Content, Glob, HeaderGlob, Wanted, make_glob, make_header_glob
from malote.core.tags import tag_fault
from malote.errors import FormatError

Direction = Literal["outbound", "internal", "inbound"]

_EVERYBODY = "*"


def parse_pattern(text: str) -> str:
    """One entry of `recipients` or `senders`, in canonical form. `@*.example.org` is every domain below, not example.org itself.

    Raises `FormatError`.
    """
    if text == _EVERYBODY:
        return _EVERYBODY
    if text.startswith("@*."):
        return f"@*.{canonical_domain(text[3:])}"
    if text.startswith("@"):
        return f"@{canonical_domain(text[1:])}"
    if "*" in text:
        raise FormatError("a pattern is *, @example.org, @*.example.org or anna@example.org")
    return canonical_address(text)


def keys_of(address: str) -> list[str]:
    """Every pattern that names this canonical address, but `*`."""
    domain = domain_of(address)
    keys = [address, f"@{domain}"]
    while (dot := domain.find(".")) >= 0:
        domain = domain[dot + 1:]
        keys.append(f"@*.{domain}")
    return keys


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a rule asks of the content: one of each kind of condition that it has must be met."""

    min_bytes: int
    headers: tuple[HeaderGlob, ...]
    subjects: tuple[Glob, ...]
    kinds: frozenset[Kind]

    def met(self, content: Content) -> bool:
        if content.size < self.min_bytes or (self.kinds and not self.kinds & content.kinds):
            return False
        if self.headers and not any(header.met(_folded(content, header.name)) for header in self.headers):
            return False
        return not self.subjects or any(self._is_subject(subject) for subject in _folded(content, "subject") or [""])

    def _is_subject(self, folded: str) -> bool:
        return any(glob.met(folded) for glob in self.subjects)


def _folded(content: Content, name: str) -> list[str]:
    return [value.casefold() for value in content.fields.get(name, ())]


@dataclass(frozen=True, slots=True)
class Row:
    index: int                              # in the table; -1: the row after the last
    rule: RuleConfig
    recipients: frozenset[str] | None       # None: everybody
    senders: frozenset[str] | None
    conditions: Conditions | None           # None: it does not ask for the content

    @property
    def lets_pass(self) -> bool:
        """Whether some content without a card could leave under it."""
        rule = self.rule
        return rule.seal in (Level.NEVER, Level.PREFER) or rule.allow_no or rule.accept_encrypted


DEFAULT_ROW = Row(-1, RuleConfig(), None, None, None)


class Table:
    """The rules and our domains. Raises `FormatError` for a pattern that is none (`rule_faults` names all). `trial`: those with
    `shadow` count too."""

    def __init__(self, rules: Sequence[RuleConfig] = (), domains: Iterable[str] = (), *, trial: bool = False) -> None:
        self.rules = tuple(rules)
        self._domains = frozenset(_domain_pattern(domain) for domain in domains)
        self._rows = [_row(index, rule) for index, rule in enumerate(self.rules)]
        self._by_recipient: dict[str, list[int]] = defaultdict(list)
        self._by_sender: dict[str, list[int]] = defaultdict(list)
        self._for_all: list[int] = []
        rows = [row for row in self._rows if trial or not row.rule.shadow]
        self._file(rows)
        self.empty = not rows
        self.asks_sender = any(row.rule.on_sender for row in rows)
        self.asks_content = any(row.rule.on_content for row in rows)
        self.wanted = Wanted(
            frozenset(header.name for row in rows if row.conditions for header in row.conditions.headers)
            | ({"subject"} if any(row.rule.subjects for row in rows) else set()),
            any(row.rule.kinds for row in rows))
        # the first rule filed under its senders, whom RCPT does not show, under which mail without a card could leave
        self._first_open = min((row.index for row in rows if row.recipients is None and row.senders is not None
                                and row.conditions is None and row.lets_pass), default=len(self.rules))

    def _file(self, rows: Iterable[Row]) -> None:
        ended = False       # rows for all after the first that always matches are never reached
        for row in rows:
            if row.recipients is not None:
                for key in row.recipients:
                    self._by_recipient[key].append(row.index)
            elif row.senders is not None:
                for key in row.senders:
                    self._by_sender[key].append(row.index)
            elif not ended:
                self._for_all.append(row.index)
                ended = row.conditions is None and row.rule.direction == "any"

    def direction(self, sender: str, recipient: str) -> Direction:
        """Of mail between these canonical addresses, by `domains`."""
        if not self._ours(recipient):
            return "outbound"
        return "internal" if self._ours(sender) else "inbound"

    def _ours(self, address: str) -> bool:
        return any(key in self._domains for key in keys_of(address)[1:])

    def walk(self, sender: str, recipient: str) -> Iterator[Row]:
        """The rules that speak of mail between these two, in order, whatever its content. The last, and no other, has no
        condition on that: the first of those, or the default row."""
        names = keys_of(recipient) if self._by_recipient else ()
        for index in self._candidates(names, keys_of(sender) if self._by_sender else ()):
            row = self._rows[index]
            if self._speaks_of(row, sender, recipient):
                yield row
                if row.conditions is None:
                    return
        yield DEFAULT_ROW

    def _speaks_of(self, row: Row, sender: str, recipient: str) -> bool:
        if row.senders is not None and row.senders.isdisjoint(keys_of(sender)):
            return False
        return row.rule.direction == "any" or row.rule.direction == self.direction(sender, recipient)

    def envelope_row(self, recipient: str) -> Row | None:
        """The row that `walk` ends with, as far as it is known before the sender is. None: that may be one under which mail
        could leave without a card. Where it is not the one returned, it refuses such mail as well."""
        for index in self._candidates(keys_of(recipient) if self._by_recipient else (), ()):
            row = self._rows[index]
            if row.conditions is not None:
                continue        # only adds
            if index > self._first_open:
                return None
            direction = row.rule.direction
            if direction != "any" and (direction == "outbound") == self._ours(recipient):
                continue        # not of mail to him
            if not row.rule.on_sender:
                return row
            if row.lets_pass:
                return None
        return DEFAULT_ROW if self._first_open == len(self.rules) else None

    def _candidates(self, recipient_keys: Iterable[str], sender_keys: Iterable[str]) -> list[int]:
        found = [index for key in recipient_keys for index in self._by_recipient.get(key, ())]
        found += [index for key in sender_keys for index in self._by_sender.get(key, ())]
        return sorted({*found, *self._for_all}) if found else self._for_all


def _row(index: int, rule: RuleConfig) -> Row:
    conditions = None
    if rule.on_content:
        conditions = Conditions(rule.min_bytes, tuple(make_header_glob(text) for text in rule.headers),
                                tuple(make_glob(text) for text in rule.subjects), frozenset(rule.kinds))
    return Row(index, rule, _names(rule.recipients), _names(rule.senders), conditions)


def _names(patterns: Iterable[str]) -> frozenset[str] | None:
    """None: everybody."""
    names = frozenset(map(parse_pattern, patterns))
    return None if _EVERYBODY in names else names


def _domain_pattern(text: str) -> str:
    if text.startswith("@"):
        raise FormatError("a domain is example.org or *.example.org")
    return parse_pattern(f"@{text}")


def rule_faults(config: OutgoingConfig) -> list[str]:
    """What would make a rule be missed or say something else than it seems to, as `key: what is wrong; the cure`."""
    faults: list[str] = []
    for index, rule in enumerate(config.rules, 1):
        faults += [f"outgoing.rules.{index}.{fault}" for fault in _faults(rule, bool(config.domains))]
    for number, domain in enumerate(config.domains, 1):
        try:
            _domain_pattern(domain)
        except FormatError:
            faults.append(f"outgoing.domains.{number}: {domain!r} is no domain; write example.org or *.example.org")
    for key, tag in (("seal_tag", config.seal_tag), ("clear_tag", config.clear_tag)):
        if fault := tag_fault(tag):
            faults.append(f"outgoing.{key}: {fault}")
    if config.shadow:
        faults += [f"outgoing.rules.{index}.shadow: means nothing with outgoing.shadow = true; remove one of the two"
                   for index, rule in enumerate(config.rules, 1) if rule.shadow]
    one, other = config.seal_tag.lower(), config.clear_tag.lower()
    if one and other and (one in other or other in one):
        faults.append("outgoing.clear_tag: and seal_tag must not be part of each other")
    return faults


def _faults(rule: RuleConfig, domains: bool) -> Iterator[str]:
    for key, patterns in (("recipients", rule.recipients), ("senders", rule.senders)):
        for text in patterns:
            try:
                parse_pattern(text)
            except FormatError:
                yield f"{key}: {text!r} names nobody; write *, @example.org, @*.example.org or anna@example.org"
        if not patterns:
            yield f"{key}: names nobody, the rule is never used; remove it"
    for text in rule.headers:
        try:
            make_header_glob(text)
        except FormatError:
            yield f"headers: {text!r} is no header field; write `Name` or `Name: text with *`"
    if "" in rule.subjects:
        yield "subjects: \"\" is the subject of mail without one; write * for any"
    if rule.direction != "any" and not domains:
        yield "direction: needs outgoing.domains, the domains that are yours"
    if rule.seal is Level.REFUSE and (rule.allow_no or rule.accept_encrypted or rule.list):
        yield 'seal: "refuse" leaves nothing to allow; remove allow_no, accept_encrypted and list'
