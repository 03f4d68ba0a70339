"""The arguments of MAIL and RCPT: path and ESMTP parameters, by one regular expression each (RFC 5321 4.1.2, RFC 3461 4)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from malote.errors import Reply

# RFC 5321 4.1.2. UTF-8 beyond ASCII as RFC 6531 3.3 allows; surrogates are bytes that were not UTF-8 and match nothing.
_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\u0080-\ud7ff\ue000-\U0010ffff-]"
_DOT_STRING = rf"{_ATEXT}+(?:\.{_ATEXT}+)*"
_QUOTED = r'"(?:[ !#-\[\]-~\u0080-\ud7ff\ue000-\U0010ffff]|\\[ -~])*"'
_LABEL = r"[A-Za-z0-9_\u0080-\ud7ff\ue000-\U0010ffff](?:[A-Za-z0-9_\u0080-\ud7ff\ue000-\U0010ffff-]*" \
         r"[A-Za-z0-9_\u0080-\ud7ff\ue000-\U0010ffff])?"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[!-Z^-~]+\])"
_MAILBOX = re.compile(rf"(?:{_DOT_STRING}|{_QUOTED})@{_DOMAIN}")
# A source route is accepted and dropped (RFC 5321 appendix C). "<" may come after blanks: many programs send them.
_ARGUMENT = re.compile(
    r'(?:FROM|TO): *<(?:@[^:<>"\s]*:)?((?:[^<>"\\]|"(?:[^"\\]|\\.)*")*)>(?: +(.*))?', re.IGNORECASE | re.DOTALL)
_KEYWORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
_VALUE = re.compile(r"[!-<>-~\u0080-\ud7ff\ue000-\U0010ffff]+")     # esmtp-value, with UTF-8 for ORCPT (RFC 6533)
_NOTIFY = re.compile(r"NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2}", re.IGNORECASE)
_XTEXT = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})*")

MAX_PATH = 512          # RFC 5321 4.5.3.1.3 says 256; half as much again in UTF-8, and long test addresses
MAX_ENVID = 100         # RFC 3461 4.4
MAX_ORCPT = 500         # RFC 3461 4.2

# Between malotes: how many have asked the next one about a message without content yet. Each waits for the next one's
# answer to RCPT, so those that forward to each other must notice it before Received lines can tell them.
HOPS = "XMALOTE-HOPS"
MAX_ASKING = 8
LOOP = Reply(554, "5.4.6", "Mail servers forward this message to each other in a loop; nothing was sent")

# Which extension a parameter belongs to; "" is always there.
MAIL_PARAMETERS: Mapping[str, str] = {
    "SIZE": "", "AUTH": "", "BODY": "8BITMIME", "SMTPUTF8": "SMTPUTF8", "RET": "DSN", "ENVID": "DSN", "REQUIRETLS": "REQUIRETLS",
    HOPS: HOPS,
}
RCPT_PARAMETERS: Mapping[str, str] = {"NOTIFY": "DSN", "ORCPT": "DSN"}

_NOT_OFFERED = Reply(555, "5.5.4", "Parameter not recognised or not offered here")


class PathRefused(Exception):
    """Carries the reply; never leaves the server."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


def parse_path(argument: str, keyword: str) -> tuple[str, dict[str, str | bool]]:
    """`FROM:<address> K=V ...` -> address as sent and parameters. Keyword is "FROM:" or "TO:". Raises `PathRefused`.

    The address is "" only for `FROM:<>`. Parameter keywords in capitals, values untouched: ENVID and ORCPT are case-sensitive.
    """
    match = _ARGUMENT.fullmatch(argument) if argument[: len(keyword)].upper() == keyword else None
    if match is None:
        raise PathRefused(Reply(501, "5.5.2", f"Syntax: {keyword}<address>"))
    address: str = match[1]
    if not _is_address(address, keyword):
        raise PathRefused(Reply(501, "5.1.7" if keyword == "FROM:" else "5.1.3", "Bad address syntax"))
    parameters: dict[str, str | bool] = {}
    if match[2]:
        for part in match[2].split(" "):
            if not part:
                continue
            name, equals, value = part.partition("=")
            name = name.upper()
            given = value if equals else True
            # the same twice is harmless, and smtplib's send_message does it; two values are not
            if not _KEYWORD.fullmatch(name) or (equals and not _VALUE.fullmatch(value)) or parameters.get(name, given) != given:
                raise PathRefused(Reply(501, "5.5.4", "Syntax error in parameters"))
            parameters[name] = given
    return address, parameters


def _is_address(address: str, keyword: str) -> bool:
    if len(address.encode(errors="surrogateescape")) > MAX_PATH:
        return False
    if keyword == "FROM:":
        return not address or _MAILBOX.fullmatch(address) is not None
    return _MAILBOX.fullmatch(address) is not None or address.lower() == "postmaster"       # RFC 5321 4.1.1.3


def check_mail_parameters(address: str, parameters: Mapping[str, str | bool], offered: frozenset[str]) -> int:
    """Raises `PathRefused`; returns the announced size in bytes, 0 if none."""
    _check_offered(parameters, MAIL_PARAMETERS, offered)
    size = parameters.get("SIZE", "0")
    if not isinstance(size, str) or not (size.isascii() and size.isdigit() and len(size) <= 20):    # RFC 1870 section 3
        raise PathRefused(Reply(501, "5.5.4", "SIZE needs a number"))
    if str(parameters.get("BODY", "7BIT")).upper() not in ("7BIT", "8BITMIME"):
        raise PathRefused(Reply(501, "5.5.4", "BODY can be 7BIT or 8BITMIME"))
    if parameters.get("SMTPUTF8", True) is not True or parameters.get("REQUIRETLS", True) is not True:
        raise PathRefused(Reply(501, "5.5.4", "SMTPUTF8 and REQUIRETLS take no value"))
    if str(parameters.get("RET", "FULL")).upper() not in ("FULL", "HDRS"):
        raise PathRefused(Reply(501, "5.5.4", "RET can be FULL or HDRS"))
    hops = parameters.get(HOPS, "0")
    if not isinstance(hops, str) or not (hops.isascii() and hops.isdigit() and len(hops) <= 3):
        raise PathRefused(Reply(501, "5.5.4", f"{HOPS} needs a number"))
    envid = parameters.get("ENVID", "x")
    if not isinstance(envid, str) or len(envid) > MAX_ENVID or not _XTEXT.fullmatch(envid):
        raise PathRefused(Reply(501, "5.5.4", "ENVID needs at most 100 characters of xtext"))
    if not address.isascii() and "SMTPUTF8" not in parameters:
        raise PathRefused(Reply(553, "5.6.7", "This address needs the SMTPUTF8 parameter"))     # RFC 6531 3.5
    return int(size)


def check_rcpt_parameters(address: str, parameters: Mapping[str, str | bool], offered: frozenset[str], smtputf8: bool) -> None:
    """Raises `PathRefused`."""
    _check_offered(parameters, RCPT_PARAMETERS, offered)
    if not _NOTIFY.fullmatch(str(parameters.get("NOTIFY", "NEVER"))):
        raise PathRefused(Reply(501, "5.5.4", "NOTIFY can be NEVER, or of SUCCESS, FAILURE, DELAY"))
    orcpt = parameters.get("ORCPT", "rfc822;x")
    if not isinstance(orcpt, str) or ";" not in orcpt or len(orcpt) > MAX_ORCPT:
        raise PathRefused(Reply(501, "5.5.4", "ORCPT needs an address type and an address"))
    if not smtputf8 and not (address.isascii() and orcpt.isascii()):
        raise PathRefused(Reply(553, "5.6.7", "This address needs the SMTPUTF8 parameter of MAIL"))


def _check_offered(parameters: Mapping[str, str | bool], known: Mapping[str, str], offered: frozenset[str]) -> None:
    for name in parameters:
        extension = known.get(name)
        if extension is None or (extension and extension not in offered):
            raise PathRefused(_NOT_OFFERED)
