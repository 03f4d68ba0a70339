"""`malote inspect`: the structure of a sealed message, read without any key."""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from malote.core.blob import parse_key_blob
from malote.core.parts import FoundParts, find_parts
from malote.core.payload import HEADER_BYTES, parse_header
from malote.core.primitives import CHUNK_BYTES, TAG_BYTES, sha256
from malote.errors import ExitCode, Unreadable


@click.command(short_help="Show the structure of a sealed message, without keys.")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def inspect(file: BinaryIO, as_json: bool) -> int:
    """Show the structure of the sealed message in FILE ("-" or nothing: standard input), without keys.

    Nothing shown here is proven: it is what anybody sees who holds the message.
    """
    found = find_parts(file.read())
    if found is None:
        click.echo("malote: there is nothing sealed in this message", err=True)
        return int(ExitCode.UNREADABLE)
    description = describe(found)
    if as_json:
        click.echo(json.dumps(description, indent=2))
    else:
        _print(description)
    return int(ExitCode.OK)


def describe(found: FoundParts) -> dict[str, Any]:
    """What `--json` prints. Parts that are damaged are named with what is wrong, and do not hide the others."""
    payloads = [_payload(part.raw) for part in found.payloads]
    eids = {payload["eid"]: number for number, payload in enumerate(payloads, 1) if "eid" in payload}
    return {
        "outer": [{"name": name, "value": value} for name, value in found.outer],
        "forwarded": found.forwarded,
        "damaged_parts": found.damaged,
        "sealed_parts": payloads,
        "key_blobs": [_blob(part.raw, part.kid, eids) for part in found.blobs],
    }


def _payload(raw: bytes) -> dict[str, Any]:
    try:
        header = parse_header(raw)
    except Unreadable as error:
        return {"bytes": len(raw), "fault": error.reason}
    rest = len(raw) - HEADER_BYTES
    return {
        "bytes": len(raw), "version": 1, "suite": 1, "eid": header.eid.hex(), "chunks": rest // (CHUNK_BYTES + TAG_BYTES) + 1,
        "sha256": sha256(raw).hex(),
    }


def _blob(raw: bytes, kid: str, eids: dict[str, int]) -> dict[str, Any]:
    try:
        parsed = parse_key_blob(raw)
    except Unreadable as error:
        return {"bytes": len(raw), "fault": error.reason}
    return {"bytes": len(raw), "kid": kid, "eid": parsed.eid.hex(), "sealed_part": eids.get(parsed.eid.hex(), 0),
            "sha256": parsed.hash.hex()}


def _print(description: dict[str, Any]) -> None:
    console = Console(highlight=False)
    outer = Table("outer header (in clear)", "", box=None, pad_edge=False)
    for entry in description["outer"]:
        outer.add_row(_safe(entry["name"]), _safe(entry["value"]))
    console.print(outer)
    for number, payload in enumerate(description["sealed_parts"], 1):
        chunks = f"{payload['chunks']} chunk{'' if payload['chunks'] == 1 else 's'}" if "chunks" in payload else ""
        what = payload.get("fault") or f"MLT1 suite {payload['suite']}, {chunks}, envelope {payload['eid']}"
        console.print(f"\nsealed part {number}: {payload['bytes']} bytes, {what}")
    blobs = description["key_blobs"]
    console.print(f"\nkey blobs: {len(blobs)}")
    for blob in blobs:
        where = f"of sealed part {blob['sealed_part']}" if blob.get("sealed_part") else "of no sealed part here"
        hint = f"key hint {blob['kid']}" if blob.get("kid") else "no key hint"
        console.print(f"  {blob['bytes']} bytes, " + blob.get("fault", f"{hint}, {where}"))
    if description["damaged_parts"]:
        console.print(f"\ndamaged parts: {description['damaged_parts']}")
    if description["forwarded"]:
        console.print("\nlies in an attached message: somebody forwarded it")


def _safe(text: str) -> Text:
    """Header values come from strangers: control characters must not reach the terminal."""
    text = text.replace("\t", " ")      # of folded lines
    return Text("".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text))
