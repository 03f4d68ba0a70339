"""OAuth 2 tokens that a real Dovecot checks by itself: JSON web tokens (RFC 7519, HS256) under a key that it holds."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path

KEY = os.urandom(32)


def oauth_settings(directory: Path) -> str:
    """For the `extra` of a Dovecot: it takes tokens beside passwords. What it reads is put into `directory`."""
    keys = directory / "default" / "HS256"
    keys.mkdir(parents=True)
    (keys / "default").write_bytes(base64.b64encode(KEY))
    settings = directory / "oauth2.conf"
    settings.write_text(f"introspection_mode = local\nlocal_validation_key_dict = fs:posix:prefix={directory}/\n"
                        "username_attribute = sub\n")
    return f"""
auth_mechanisms = plain login xoauth2 oauthbearer
passdb {{
  driver = oauth2
  mechanisms = xoauth2 oauthbearer
  args = {settings}
}}
"""


def access_token(user: str, *, key: bytes = KEY, good_for_seconds: int = 600) -> str:
    now = int(time.time())
    head = _part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
    body = _part(json.dumps({"sub": user, "iat": now - 3600, "exp": now + good_for_seconds}).encode())
    return f"{head}.{body}.{_part(hmac.digest(key, f'{head}.{body}'.encode(), hashlib.sha256))}"


def _part(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
