"""One message: opened, delivered and verified before its original goes, whatever it holds and wherever things break."""

from __future__ import annotations

from email.header import decode_header, make_header

from lab.incoming import QUARANTINE, SEALED, Box, note, verdict, verdicts


async def test_a_sealed_message_is_replaced_by_its_original(box: Box) -> None:
    """The opened copy is the outer Received lines, our headers and the original, byte for byte; the sealed one is kept."""
    original = note(to=box.user, more="In-Reply-To: <first@sender.example>\r\nReferences: <first@sender.example>\r\n")
    sealed = box.seal(original)
    box.client.put(sealed)
    await (await box.watcher(await box.open_store())).run_once()
    [raw] = box.client.fetch()
    [message] = box.client.messages()
    assert raw.startswith(sealed.split(b"\r\n")[0] + b"\r\nMalote-Verdict: FRESH;")
    assert raw.endswith(original)
    assert verdict(message) == "FRESH"
    assert str(make_header(decode_header(message["Subject"]))) == "Grüße"
    assert message["References"] == "<first@sender.example>"
    assert box.client.fetch(SEALED) == [sealed]
    assert box.client.uids(QUARANTINE) == []


async def test_flags_and_date_are_those_of_the_original(box: Box) -> None:
    box.client.put(box.seal(), flags="(\\Seen \\Flagged $Work)", date="05-Nov-2026 08:09:10 +0100")
    box.client.put(box.seal())
    await (await box.watcher(await box.open_store())).run_once()
    first, second = box.client.uids()
    assert box.client.status_of(first) == ({"\\Seen", "\\Flagged", "$Work"}, "05-Nov-2026 07:09:10 +0000")
    assert box.client.status_of(second)[0] == set()


async def test_plain_mail_stays_untouched(box: Box) -> None:
    box.client.put(note("plain"))
    uids = box.client.uids()
    await (await box.watcher(await box.open_store())).run_once()
    assert box.client.uids() == uids
    assert verdicts(box.client.messages()) == ["None"]
