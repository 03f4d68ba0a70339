"""Addresses: one canonical string per mailbox, and a reader for From, To and Cc that cannot be talked into another answer.

Keys are found, rules are matched and recipients are compared by the canonical form, so two spellings of one mailbox must give
one string, and what has no certain meaning is refused rather than guessed at.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import idna

from malote.errors import FormatError

# RFC 5321 4.5.3.1 names 64, 255 and 256, and asks not to impose them: bounce addresses (VERP, SRS) have longer local parts.
MAX_LOCAL_BYTES = 255
# Characters before NFC, which takes quadratic time for long runs of combining marks. It makes at most four characters one
# (Greek), which then has two bytes or more: longer text cannot become short enough.
MAX_LOCAL_EXPANDED = 2 * MAX_LOCAL_BYTES
MAX_DOMAIN_BYTES = 253              # RFC 1035 2.3.4, written without the final dot
MAX_HEADER_VALUE_BYTES = 1024 * 1024    # 10,000 recipients of 100 bytes; the reader is linear, this bounds what it is given
MAX_COMMENT_DEPTH = 20
MAX_ROUTES = 10                     # ways to read a local part as a route, good or not; each costs a look-up
# A message's few addresses are read at MAIL or RCPT, for policy, for the outer header and for the manifest, 20 us each time
_REMEMBERED = 4096                  # values, and only short ones: half a megabyte at most
_REMEMBERED_CHARACTERS = 128

# RFC 5322 3.2.3 atext, extended by RFC 6532 3.2 to any character beyond ASCII (which of those is decided by `_check_characters`)
_ATEXT = r"A-Za-z0-9!#$%&'*+\-/=?^_`{|}~\u0080-\U0010ffff"
_DOT_ATOM = re.compile(rf"[{_ATEXT}]+(?:\.[{_ATEXT}]+)*")
_PHRASE_ATOM = re.compile(rf"[{_ATEXT}.]+")     # obs-phrase (RFC 5322 4.1): "John Q. Public" unquoted is everywhere
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_LITERAL = re.compile(r"\[[A-Za-z0-9:.]+\]")
_DOMAIN = re.compile(r"[A-Za-z0-9_\-.\u0080-\U0010ffff]+")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")     # RFC 1123 2.1; the underscore is in use
_CFWS_PLAIN = re.compile(r"[ \t]+")
_COMMENT_TEXT = re.compile(r"[^()\\]+")
_ROUTE = re.compile(r"[@%!]")
_FOLD = re.compile(r"\r?\n(?=[ \t])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_UPPER = {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}

_FORM = "an address is written anna@example.org"


def canonical_address(text: str) -> str:
    """The canonical form of an addr-spec (RFC 5321 4.1.2 Mailbox, RFC 6531): no display name, no angle brackets, no white space.

    Domain: A-labels in lower case, or a canonical address literal. Local part: NFC, ASCII letters in lower case (no mail system
    in use tells them apart, and a key found for one spelling must be found for the other), quoted only if it has to be.
    Raises `FormatError`.
    """
    return _known_address(text) if len(text) <= _REMEMBERED_CHARACTERS else _canonical(text)


def _canonical(text: str) -> str:
    match = _QUOTED.match(text)
    if match:
        local, rest = _unquote(match[1]), text[match.end():]
        if not rest.startswith("@"):
            raise FormatError("address has no domain", hint=_FORM)
        domain = rest[1:]
    else:
        local, found, domain = text.rpartition("@")
        if not found:
            raise FormatError("address has no domain", hint=_FORM)
    return _canonical_local(local, quoted=match is not None) + "@" + canonical_domain(domain)


_known_address = lru_cache(maxsize=_REMEMBERED)(_canonical)


def canonical_card_address(text: str) -> str:
    """As `canonical_address`, and the form "@domain" that the card of a gateway has."""
    return "@" + canonical_domain(text[1:]) if text.startswith("@") else canonical_address(text)


def domain_of(address: str) -> str:
    """The domain of a canonical address or gateway."""
    return address.rpartition("@")[2]


def routed_addresses(address: str) -> list[str]:
    """Where a server that follows routes in local parts would carry mail for this canonical address: `bob%b.example@relay`,
    `b.example!bob@relay`, `"bob@b.example"@relay` are bob@b.example at the relay (RFC 1123 5.2.16, RFC 5321 appendix C).

    Raises `FormatError` for more than `MAX_ROUTES`.
    """
    local = address.rpartition("@")[0]
    if not _ROUTE.search(local):
        return []
    found: list[str] = []
    waiting = [_unquote(local[1:-1]) if local.startswith('"') else local]
    seen = set(waiting)
    looks = 0
    while waiting:
        text = waiting.pop()
        for mark in "@%!":
            left, middle, right = text.partition(mark) if mark == "!" else text.rpartition(mark)
            if not middle:
                continue
            looks += 1      # also those that lead nowhere: there are up to three to the power of the marks
            if looks > MAX_ROUTES:
                raise FormatError("address has too many routes in its local part")
            person, domain = (right, left) if mark == "!" else (left, right)
            if person not in seen:
                seen.add(person)
                waiting.append(person)
            try:
                found.append(canonical_address(f"{_quoted(person)}@{domain}"))
            except FormatError:     # such as 100%@b.example: no route, or one that leads nowhere
                continue
    return found


def is_gateway(address: str) -> bool:
    return address.startswith("@")


def canonical_domain(text: str) -> str:
    """Lower-case A-labels (RFC 5890), or `[192.0.2.1]`, `[IPv6:2001:db8::1]`. Raises `FormatError`, also for a final dot."""
    if _LITERAL.fullmatch(text):
        return _canonical_literal(text[1:-1])
    domain = text
    if not text.isascii():
        if len(text) > MAX_DOMAIN_BYTES:
            raise FormatError("domain of an address is too long")
        try:
            domain = idna.encode(text, uts46=True).decode()
        except (idna.IDNAError, UnicodeError):
            raise FormatError("domain of an address is not a valid internationalised name") from None
    domain = domain.translate(_UPPER)
    if len(domain) > MAX_DOMAIN_BYTES or not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise FormatError("domain of an address is not valid")
    return domain


def _canonical_literal(text: str) -> str:
    try:
        if text[:5].lower() == "ipv6:":
            return f"[IPv6:{ipaddress.IPv6Address(text[5:])}]"
        return f"[{ipaddress.IPv4Address(text)}]"
    except ValueError:
        raise FormatError("address literal is not valid") from None


def _canonical_local(text: str, *, quoted: bool) -> str:
    if len(text) > MAX_LOCAL_EXPANDED:
        raise FormatError("local part of an address is too long")
    # NFC first, for the Kelvin sign is K; and again, for h with a macron below is one character and H with it is not
    local = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).translate(_UPPER))
    _check_characters(local)
    if len(local.encode()) > MAX_LOCAL_BYTES:
        raise FormatError("local part of an address is too long")
    if _DOT_ATOM.fullmatch(local):
        return local
    if not quoted:
        raise FormatError("local part of an address is not valid")
    return _quoted(local)


def _quoted(local: str) -> str:
    return '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'


def _check_characters(local: str) -> None:
    """Refuse what cannot be seen or typed: control and format characters, surrogates, every space but the plain one."""
    for character in local:
        if character > "~" or character < " ":
            category = unicodedata.category(character)
            if category in {"Cc", "Cf", "Cs"} or category[0] == "Z":
                raise FormatError("local part of an address has an invisible character")


def _unquote(content: str) -> str:
    return re.sub(r"\\(.)", r"\1", content, flags=re.DOTALL)


# --- header fields


def parse_mailboxes(header_value: str | bytes) -> list[str]:
    """The canonical addresses of a mailbox or address list (RFC 5322 3.4), in order, with repetitions; groups are flattened.

    Strict: display names, comments and encoded-words never become addresses, and an addr-spec with white space or comments
    inside, a route, or anything the grammar does not know raises `FormatError`; so does a value too long. Empty members are
    accepted (RFC 5322 4.4), an empty value gives an empty list.
    """
    if len(header_value) <= _REMEMBERED_CHARACTERS:
        return list(_known_mailboxes(header_value))
    return list(_mailboxes(header_value))


def _mailboxes(header_value: str | bytes) -> tuple[str, ...]:
    if len(header_value) > MAX_HEADER_VALUE_BYTES:
        raise FormatError("address list is too long")
    text = header_value.decode("utf-8", "surrogateescape") if isinstance(header_value, bytes) else header_value
    text = _FOLD.sub("", text)
    if _CONTROL.search(text):
        raise FormatError("address list has a control character")
    return tuple(_Reader(text).address_list())


_known_mailboxes = lru_cache(maxsize=_REMEMBERED)(_mailboxes)


@dataclass(slots=True)
class _Reader:
    """A reader of one unfolded value; `position` only goes forward, so the time is linear."""

    text: str
    position: int = 0

    def peek(self) -> str:
        return self.text[self.position:self.position + 1]

    def take(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self.text, self.position)
        if match is None:
            return None
        self.position = match.end()
        return match[0]

    def skip_cfws(self) -> None:
        """White space and comments, which may nest (RFC 5322 3.2.2)."""
        while self.take(_CFWS_PLAIN) or self.peek() == "(":
            if self.peek() == "(":
                self.skip_comment()

    def skip_comment(self) -> None:
        depth = 0
        while character := self.peek():
            if character == "\\":
                self.position += 2
                continue
            if self.take(_COMMENT_TEXT):
                continue
            self.position += 1
            depth += 1 if character == "(" else -1
            if depth == 0:
                return
            if depth > MAX_COMMENT_DEPTH:
                raise FormatError("comments in an address list are nested too deep")
        raise FormatError("comment in an address list does not end")

    def address_list(self) -> list[str]:
        addresses: list[str] = []
        in_group = False
        while True:
            self.skip_cfws()
            character = self.peek()
            if character == "":
                break
            if character == ",":
                self.position += 1
            elif character == ";" and in_group:
                self.position += 1
                in_group = False
                self.expect_end_of_member("")
            elif self.member(addresses, in_group=in_group):
                in_group = True
            else:
                self.expect_end_of_member(";" if in_group else "")
        if in_group:
            raise FormatError("group in an address list does not end")
        return addresses

    def expect_end_of_member(self, also: str) -> None:
        self.skip_cfws()
        if self.peek() not in {"", ",", also}:
            raise FormatError("address list is not valid: something follows an address")

    def member(self, addresses: list[str], *, in_group: bool) -> bool:
        """One mailbox, appended; or the beginning of a group, then True."""
        start = self.position
        bare = self.addr_spec()
        if bare is not None:
            addresses.append(bare)
            return False
        self.position = start
        named = self.phrase()
        match self.peek():
            case "<":
                self.position += 1
                self.skip_cfws()
                address = self.addr_spec()
                self.skip_cfws()
                if address is None or self.peek() != ">":
                    raise FormatError("address list is not valid: no plain address between < and >")
                self.position += 1
                addresses.append(address)
                return False
            case ":" if named and not in_group:
                self.position += 1
                return True
        raise FormatError("address list is not valid")

    def phrase(self) -> bool:
        """The display name, whose words are not looked at. Whether there was one."""
        start = self.position
        while self.take(_PHRASE_ATOM) or self.take(_QUOTED):
            self.skip_cfws()
        return self.position > start

    def addr_spec(self) -> str | None:
        """local "@" domain without anything between; None, with the position anywhere, if there is none here."""
        local = self.take(_QUOTED) or self.take(_DOT_ATOM)
        if local is None or self.peek() != "@":
            return None
        self.position += 1
        domain = self.take(_LITERAL) or self.take(_DOMAIN)
        if domain is None:
            raise FormatError("address in an address list has no domain")
        return canonical_address(f"{local}@{domain}")
