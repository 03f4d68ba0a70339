"""The ESMTP parameters that go to the upstream server, from those that the client gave. Pure.

What is sealed leaves as 7-bit text, so BODY is dropped, and SMTPUTF8 too unless an address needs it. Bounces of sealed mail
bring back headers only (RET=HDRS): the sender has the text, and a hundred megabytes of ciphertext help nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from malote.smtp.desk import Params
from malote.smtp.path import HOPS

# A sealed message with folded attachments: Padme adds 12 % at most, the rest is a note, blobs, manifest and signature.
SEALED_PERCENT = 112
UNFOLDED_PERCENT = 152
SEALED_FIXED_BYTES = 32 * 1024
PLAIN_FIXED_BYTES = 512         # our Received line, Date, Message-ID


def mail_params(client: Params, *, sealed: bool, size: int, addresses: Iterable[str], utf8_header: bool,
                extensions: Mapping[str, str]) -> dict[str, str | bool]:
    """For MAIL. `size` in bytes, 0 if unknown; `addresses` of the envelope, as spelled; `utf8_header`: of what is sent."""
    params: dict[str, str | bool] = {}
    if size and "SIZE" in extensions:
        params["SIZE"] = str(size)
    if not sealed and "BODY" in client:
        params["BODY"] = client["BODY"]
    if utf8_header or not all(map(str.isascii, addresses)) or (not sealed and "SMTPUTF8" in client):
        params["SMTPUTF8"] = True
    if "DSN" in extensions:
        if sealed:
            params["RET"] = "HDRS"
        elif "RET" in client:
            params["RET"] = client["RET"]
        if "ENVID" in client:
            params["ENVID"] = client["ENVID"]
    if "AUTH" in client and "AUTH" in extensions:       # RFC 4954 section 5: dropped towards a server that does not know it
        params["AUTH"] = client["AUTH"]
    if "REQUIRETLS" in client:
        params["REQUIRETLS"] = True
    if HOPS in extensions:
        params[HOPS] = str(int(client.get(HOPS, 0)) + 1)
    return params


def same_transaction(opened: Params, wanted: Params) -> bool:
    """Whether a transaction begun with one set of parameters can carry a message that wants the other. SIZE is an estimate."""
    return {k: v for k, v in opened.items() if k != "SIZE"} == {k: v for k, v in wanted.items() if k != "SIZE"}


def estimated_size(client: Params, *, sealed: bool, fold: bool, limit: int) -> int:
    """What to announce before the message is there, from what the client announced; 0: it announced nothing.

    Never above `limit` (bytes; 0: none): what the client may announce was made to fit (sizes.py); an estimate must not refuse it.
    """
    size = client.get("SIZE", "0")
    if not isinstance(size, str) or not int(size):
        return 0
    if not sealed:
        return int(size) + PLAIN_FIXED_BYTES
    estimate = int(size) * (SEALED_PERCENT if fold else UNFOLDED_PERCENT) // 100 + SEALED_FIXED_BYTES
    return min(estimate, limit) if limit else estimate
