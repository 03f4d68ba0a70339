"""The names in a client's certificate, as the users file may list them. Pure: the TLS library has checked the chain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SHORT = {      # RFC 4514 section 3, and the mail address that many authorities put there
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC", "userId": "UID",
    "emailAddress": "emailAddress",
}
_SPECIAL = re.compile(r'[\\,+"<>;=]')      # RFC 4514 2.4: so that no value looks like two
_ESCAPED = r"\\\g<0>"


def certificate_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Of what `SSLObject.getpeercert` gives: mail addresses, host names, the whole subject, its common name; in that order.

    Nothing without a certificate that was verified: the library then gives nothing. The subject in the order of the
    certificate, as `O=Example,CN=anna`.
    """
    if not certificate:
        return ()
    alternative = certificate.get("subjectAltName", ())
    names = [value for kind in ("email", "DNS") for name, value in alternative if name == kind]
    subject = [pair for each in certificate.get("subject", ()) for pair in each]
    names.append(",".join(f"{_SHORT.get(name, name)}={_SPECIAL.sub(_ESCAPED, value)}" for name, value in subject))
    common = [value for name, value in subject if name == "commonName"]
    if len(common) == 1:
        names += common
    return tuple(dict.fromkeys(name for name in names if name))
