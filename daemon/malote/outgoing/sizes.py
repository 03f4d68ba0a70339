"""Which SIZE to offer so that the sealed message fits the upstream server's limit."""

from __future__ import annotations

# docs/format.md, Structure: the note, the outer headers, MIME headers, signature and manifest.
FIXED_BYTES = 64 * 1024
# One key-blob part: 1222 bytes in base64 lines (1.7 kB) and its MIME headers, and one entry of the manifest.
RECIPIENT_BYTES = 2400
# Base64 in lines of 76 with CRLF is 78/57; Padme padding adds at most 3 % above 64 KiB.
GROWTH_PERMILLE = 1410


def largest_original(upstream_size: int, recipients: int = 100) -> int:
    """The largest submitted message, in bytes, whose sealed form for that many recipients fits `upstream_size` bytes.

    0 means no limit, both ways. 100 recipients is the most that one sealed copy has (docs/format.md, Limits).
    """
    if upstream_size == 0:
        return 0
    return max(1, (upstream_size - FIXED_BYTES - RECIPIENT_BYTES * recipients) * 1000 // GROWTH_PERMILLE)
