"""The mailbox over a real Dovecot, with other clients at work in it."""

from __future__ import annotations

import asyncio
import imaplib
import os
import ssl
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.imap_peers import account, opened, secret
from lab.servers import PASSWORD, Dovecot
from malote.errors import ConfigError, MailboxError, MailboxLost
from malote.incoming.mailbox import Mailbox, appendable

MESSAGE = b"Subject: x\r\nMalote: 1\r\n\r\nhello\r\n"


@pytest.fixture(scope="module")
def users(dovecot: Dovecot) -> Iterator[str]:
    """Users with empty mailboxes, made together since making one takes up to a second."""
    names = [f"box{number}-{os.getpid()}@test.example" for number in range(100)]
    dovecot.add_users(names)
    return iter(names)


@pytest.fixture
def user(users: Iterator[str]) -> str:
    """A user with an empty mailbox of their own."""
    return next(users)


@contextmanager
def other_client(dovecot: Dovecot, user: str, folder: str = "INBOX") -> Iterator[imaplib.IMAP4]:
    """The person's own mail program."""
    client = imaplib.IMAP4("127.0.0.1", dovecot.port)
    try:
        client.login(user, PASSWORD)
        client.select(folder)
        yield client
    finally:
        client.logout()


async def test_tls_starttls_and_clear_on_loopback(dovecot: Dovecot, user: str) -> None:
    """Each way in ends in a working, logged-in connection whose capabilities are those after login (MOVE only shows then)."""
    for security, port, host in (("tls", dovecot.imaps_port, "localhost"), ("starttls", dovecot.port, "localhost"),
                                 ("none", dovecot.port, "127.0.0.1")):
        async with opened(port, folder="INBOX", username=user, security=security, host=host, ca_file=dovecot.certificate) as box:
            assert (box.has_move, box.has_uidplus, box.has_idle) == (True, True, True), security
            encrypted = box._protocol.transport.get_extra_info("ssl_object")
            assert (encrypted is not None) == (security != "none")


@pytest.mark.parametrize("security", ["tls", "starttls"])
async def test_a_certificate_that_nobody_vouches_for_is_refused(dovecot: Dovecot, user: str, security: str) -> None:
    """No password goes to whoever answers on the port."""
    asked = []

    async def password() -> str:
        asked.append(1)
        return PASSWORD

    port = dovecot.imaps_port if security == "tls" else dovecot.port
    cfg = account(port, username=user, security=security, host="localhost")
    with pytest.raises(MailboxLost) as caught:
        await Mailbox.connect(cfg, password=password)
    assert caught.value.code == "CERTIFICATE"
    assert not asked
    await asyncio.sleep(0)


async def test_a_context_that_checks_nothing_is_refused(dovecot: Dovecot, user: str) -> None:
    """A caller cannot turn verification off by accident."""
    context = ssl.create_default_context()
    context.check_hostname = False
    with pytest.raises(ConfigError, match="without checking"):
        await Mailbox.connect(account(dovecot.imaps_port, username=user, security="tls"), password=secret, ssl_context=context)


async def test_a_wrong_password_is_a_refusal_without_words_of_the_server(dovecot: Dovecot, user: str) -> None:
    """Servers echo what they got; nothing of it may reach a log."""
    async def wrong() -> str:
        return "not-the-secret"

    for auth in ("login", "plain"):
        with pytest.raises(MailboxError) as caught:
            await Mailbox.connect(account(dovecot.port, username=user, auth=auth), password=wrong)
        assert caught.value.code == "AUTHENTICATIONFAILED"
        assert not isinstance(caught.value, MailboxLost)
        assert "not-the-secret" not in str(caught.value)


@pytest.mark.parametrize("auth", ["login", "plain"])
async def test_passwords_with_quotes_and_8_bit(dovecot: Dovecot, auth: str) -> None:
    """aioimaplib sends BAD syntax for such names and passwords."""
    name, odd = f"odd-{auth}-{os.getpid()}@test.example", 'p "q\\ ä€ )'
    dovecot.add_user(name, odd)

    async def password() -> str:
        return odd

    box = await Mailbox.connect(account(dovecot.port, username=name, auth=auth), password=password)
    assert (await box.select("INBOX")).exists == 0
    await box.logout()


@pytest.mark.parametrize("name", ["Mit Leer", 'a "quoted" \\ name', "Entwürfe & mehr", "[Gmail]/All Mail", "台北/日本語",
                                  "😀", "(x) {3}", "A* B", "NIL", "%percent", "Malote/Sealed"])
async def test_folders_of_every_name(dovecot: Dovecot, user: str, name: str) -> None:
    """Each can be made, found again, filled, opened and moved into."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        made = await box.create_folder(name)
        assert made == await box.create_folder(name)
        assert name in {folder.name for folder in await box.list_folders() if folder.selectable}
        assert await box.append(name, MESSAGE) is not None
        there = await box.append("INBOX", MESSAGE)
        assert there is not None
        assert (await box.move([there.uid], name)).keys() == {there.uid}
        assert (await box.status(name)).messages == 2
        assert (await box.select(name)).exists == 2
    async with opened(dovecot.port, folder=name, username=user) as box:
        assert await box.search("ALL") == [1, 2]


async def test_special_use_and_names_of_the_configuration(dovecot: Dovecot, user: str) -> None:
    """`\\Junk` is whatever the server marks so, INBOX has no case, what does not exist is None and no guess."""
    async with opened(dovecot.port, username=user) as box:
        junk = await box.resolve("\\Junk")
        assert junk is not None
        assert "\\junk" in junk.flags
        sent = await box.find_special_use("\\Sent")
        assert sent is not None
        assert sent.name == "Sent"
        inbox = await box.resolve("inbox")
        assert inbox is not None
        assert inbox.wire == b"INBOX"
        assert await box.resolve("No/Such") is None
        assert await box.resolve("\\Flagged") is None
        with pytest.raises(MailboxError) as caught:
            await box.select("No/Such")
        assert caught.value.code == "NONEXISTENT"


async def test_a_folder_deleted_by_somebody_else(dovecot: Dovecot, user: str) -> None:
    """The cached list is out of date: the server's code comes through, and the connection lives on."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        await box.create_folder("Gone")
        with other_client(dovecot, user) as other:
            other.delete("Gone")
        with pytest.raises(MailboxError) as caught:
            await box.append("Gone", MESSAGE)
        assert caught.value.code == "TRYCREATE"
        with pytest.raises(MailboxError) as caught:
            await box.select("Gone")
        assert caught.value.code in ("NONEXISTENT", "NO")
        with pytest.raises(MailboxError) as caught:
            await box.search("ALL")         # the failed SELECT left no folder open, and we know it
        assert caught.value.code == "STATE"
        assert (await box.select("INBOX")).uidvalidity > 0


async def test_a_folder_made_anew_has_another_uidvalidity(dovecot: Dovecot, user: str) -> None:
    """Old UIDs mean nothing then."""
    async with opened(dovecot.port, username=user) as box:
        await box.create_folder("Again")
        first = await box.select("Again")
        await box.select("INBOX")
        with other_client(dovecot, user) as other:
            other.delete("Again")
            await asyncio.sleep(1.1)        # Dovecot's UIDVALIDITY counts seconds
            other.create("Again")
        assert (await box.select("Again")).uidvalidity != first.uidvalidity


async def test_two_clients_that_make_one_folder_see_the_same(dovecot: Dovecot, user: str) -> None:
    """Dovecot answers STATUS with UIDVALIDITY 0 meanwhile; taken as it is, the folder would seem to have gone backwards."""
    async def make(box: Mailbox, name: str) -> int:
        await box.create_folder(name)
        return (await box.status(name)).uidvalidity

    async with opened(dovecot.port, username=user) as one, opened(dovecot.port, username=user) as two:
        for number in range(30):
            first, second = await asyncio.gather(make(one, f"F{number}"), make(two, f"F{number}"))
            assert first == second == (await one.select(f"F{number}")).uidvalidity


async def test_a_message_comes_back_with_bytes_flags_and_date(dovecot: Dovecot, user: str) -> None:
    """What APPEND stores is what FETCH gives: 8-bit, long lines, no final line end, flags, keywords and date."""
    raw = b"Subject: \xc3\xa9\xff\r\n\r\n" + b"z" * 5000 + b"\r\n.\r\n)\r\n{5}\r\n* 1 FETCH\r\n\x01\x80 end"
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        stored = await box.append("INBOX", raw, ["\\Seen", "\\Flagged", "$Forwarded", "\\Recent"], " 7-Jul-1996 02:44:25 -0700")
        assert stored is not None
        assert box.selected is not None
        assert stored.uidvalidity == box.selected.uidvalidity
        assert box.selected.keywords
        fetched = await box.fetch(stored.uid)
        assert fetched is not None
        assert fetched.raw == raw
        assert set(fetched.flags) - {"\\Recent"} == {"\\Seen", "\\Flagged", "$Forwarded"}
        assert fetched.internal_date_ms == 836732665000
        again = await box.append("INBOX", fetched.raw, fetched.flags, fetched.internal_date)
        assert again is not None
        second = await box.fetch(again.uid, size=len(raw))
        assert second is not None
        assert (second.raw, second.internal_date_ms) == (raw, fetched.internal_date_ms)


async def test_looking_does_not_mark_as_read(dovecot: Dovecot, user: str) -> None:
    """The person sees an unread message although the watcher has read it."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        stored = await box.append("INBOX", MESSAGE)
        assert stored is not None
        await box.fetch(stored.uid)
        await box.peek_bytes(stored.uid, "", 0, 10)
        (peeked,) = await box.peek_headers([stored.uid, 999], ["Malote", "X-None"])
        assert peeked.header == b"Malote: 1\r\n\r\n"
        assert peeked.size == len(MESSAGE)
        assert "\\Seen" not in peeked.flags
        (whole,) = await box.peek_headers([stored.uid])
        assert whole.header == b"Subject: x\r\nMalote: 1\r\n\r\n"


@pytest.mark.parametrize(("raw", "code"), [(b"a\0b", "NUL"), (b"a: b\r\n\r\nc\rd\r\n", "BARECR"), (b"x\r", "BARECR"),
                                             (b"\r\r\n", "BARECR")])
async def test_what_imap_cannot_carry_is_said_before_anything_is_sent(dovecot: Dovecot, user: str, raw: bytes, code: str) -> None:
    """Dovecot would store something else than it was given; the other messages of the batch are stored."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        with pytest.raises(MailboxError) as caught:
            await box.append("INBOX", raw)
        assert caught.value.code == code
        good, bad, fine = await box.append_many("INBOX", [(MESSAGE, (), None), (raw, (), None), (b"a: b\n\nc\n", (), "")])
        assert isinstance(bad, MailboxError)
        assert not isinstance(good, MailboxError | None)
        assert not isinstance(fine, MailboxError | None)
        fetched = await box.fetch(fine.uid)
        assert fetched is not None
        assert fetched.raw == appendable(b"a: b\n\nc\n") == b"a: b\r\n\r\nc\r\n"


async def test_ten_megabytes_cost_their_size_once(dovecot: Dovecot, user: str) -> None:
    """A large message is byte for byte the same, and is in memory once while it arrives."""
    raw = b"Subject: big\r\n\r\n" + os.urandom(5 * 1024 * 1024).hex().encode() + b"\r\n"
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        stored = await box.append("INBOX", raw)
        assert stored is not None
        tracemalloc.start()
        try:
            fetched = await box.fetch(stored.uid)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert fetched is not None
        assert fetched.raw == raw
        assert peak < 1.5 * len(raw)


async def test_a_message_above_the_limit_is_named_and_stops_nothing(dovecot: Dovecot, user: str) -> None:
    """One huge message must not keep the others from being read."""
    async with opened(dovecot.port, folder="INBOX", username=user, max_message_bytes=1000) as box:
        small = await box.append("INBOX", MESSAGE)
        large = await box.append("INBOX", MESSAGE + b"y" * 2000)
        assert small is not None
        assert large is not None
        with pytest.raises(MailboxError) as caught:
            await box.fetch(large.uid)
        assert caught.value.code == "TOOBIG"
        assert [fetched.uid async for fetched in box.fetch_many([large.uid, small.uid])] == [small.uid]
        assert (await box.sizes([large.uid])) == {large.uid: len(MESSAGE) + 2000}


async def test_three_thousand_messages_while_others_work(dovecot: Dovecot, user: str) -> None:
    """Flags of 3,000 messages broke aioimaplib; the person's client flags and deletes meanwhile, and every UID stays itself."""
    items = [(b"Subject: %d\r\n\r\nbody %d\r\n" % (number, number), ("\\Seen",), None) for number in range(3000)]
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        stored = await box.append_many("INBOX", items)
        uids = [one.uid for one in stored if one is not None and not isinstance(one, MailboxError)]
        assert len(uids) == 3000
        place = {uid: number for number, uid in enumerate(uids)}
        assert await box.search_after(0) == uids
        assert await box.search_after(uids[-1]) == []

        def meddle() -> None:
            with other_client(dovecot, user) as other:
                for uid in uids[10:1000:99]:
                    other.uid("STORE", str(uid), "+FLAGS", "(\\Flagged $Mine)")
                for uid in uids[20:2990:297]:
                    other.uid("STORE", str(uid), "+FLAGS", "(\\Deleted)")
                other.expunge()

        meddling = asyncio.create_task(asyncio.to_thread(meddle))
        for _ in range(2):
            peeked = {one.uid: one for one in await box.peek_headers(uids, ["Subject"])}
            assert all(one.header == b"Subject: %d\r\n\r\n" % place[uid] for uid, one in list(peeked.items())[::50])
            async for fetched in box.fetch_many(uids):
                assert fetched.raw == items[place[fetched.uid]][0]
        await meddling
        gone = uids[20:2990:297]
        assert await box.search("ALL") == [uid for uid in uids if uid not in gone]
        assert await box.fetch(gone[0]) is None
        assert await box.fetch(gone[0], size=10) is None
        assert [fetched.uid async for fetched in box.fetch_many([gone[0], uids[0]])] == [uids[0]]
        assert gone[0] not in await box.peek_structure([gone[0], uids[1]])


async def test_batches_are_bounded_and_a_loop_may_be_left(dovecot: Dovecot, user: str) -> None:
    """Large mail does not add up in memory; leaving the loop early leaves the connection usable."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        raw = MESSAGE + b"y" * 40_000 + b"\r\n"
        stored = await box.append_many("INBOX", [(raw, (), None)] * 30)
        uids = [one.uid for one in stored if one is not None and not isinstance(one, MailboxError)]
        before = box._protocol.tagnum
        assert [fetched.uid async for fetched in box.fetch_many(uids, batch_bytes=100_000)] == uids
        assert box._protocol.tagnum - before == 1 + 15          # sizes, then two messages a batch
        async for fetched in box.fetch_many(uids, batch_bytes=100_000):
            assert fetched.raw == raw
            break
        assert await box.search("ALL") == uids


async def test_moving_says_what_was_moved(dovecot: Dovecot, user: str) -> None:
    """The answer decides which copy is kept: exactly the moved, none that was gone."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        await box.create_folder("Malote/Sealed")
        stored = await box.append_many("INBOX", [(b"Subject: %d\r\n\r\n" % number, (), None) for number in range(5)])
        uids = [one.uid for one in stored if one is not None and not isinstance(one, MailboxError)]
        with other_client(dovecot, user) as other:
            other.uid("STORE", str(uids[1]), "+FLAGS", "(\\Deleted)")
            other.expunge()
        moved = await box.move([*uids[:4], 4000], "Malote/Sealed")
        assert moved.keys() == {uids[0], uids[2], uids[3]}
        assert await box.move(uids[:4], "Malote/Sealed") == {}
        assert await box.search("ALL") == [uids[4]]
        await box.select("Malote/Sealed")
        headers = {one.uid: one.header for one in await box.peek_headers(moved.values())}
        assert headers == {moved[uids[number]]: b"Subject: %d\r\n\r\n" % number for number in (0, 2, 3)}


async def test_two_watchers_move_every_message_once_or_can_tell(dovecot: Dovecot, user: str) -> None:
    """No message is left or lost. Where Dovecot tells both that they moved it, it lies there twice under two new UIDs, by which
    both can tell who was first; whoever was not told so finds it gone."""
    async with opened(dovecot.port, folder="INBOX", username=user) as one:
        await one.create_folder("Malote/Sealed")
        await one.append_many("INBOX", [(b"Subject: %d\r\n\r\n" % number, (), None) for number in range(60)])
        uids = await one.search("ALL")
        claims: list[tuple[int, int]] = []

        async def claim(box: Mailbox, order: list[int]) -> None:
            for uid in order:
                claims.extend((await box.move([uid], "Malote/Sealed")).items())

        async with opened(dovecot.port, folder="INBOX", username=user) as two:
            await asyncio.gather(claim(one, uids), claim(two, uids[::-1]))
        assert sorted({source for source, _ in claims}) == uids
        assert len({target for _, target in claims}) == len(claims)
        assert await one.search("ALL") == []
        await one.select("Malote/Sealed")
        stored = {peeked.uid: peeked.header for peeked in await one.peek_headers(await one.search("ALL"))}
        assert stored == {target: b"Subject: %d\r\n\r\n" % uids.index(source) for source, target in claims}


async def test_expunge_deletes_ours_and_nobody_elses(dovecot: Dovecot, user: str) -> None:
    """A message that the person has marked deleted, and may still want back, stays; closing the folder deletes nothing."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        await box.append_many("INBOX", [(MESSAGE, ("\\Deleted",), None), (MESSAGE, (), None), (MESSAGE, (), None)])
        theirs, ours, rest = await box.search("ALL")
        await box.expunge([ours])
        assert await box.search("ALL") == [theirs, rest]
        await box.unselect()
        with pytest.raises(MailboxError):
            await box.search("ALL")
        await box.select("INBOX")
        assert await box.search("ALL") == [theirs, rest]


@pytest.mark.parametrize("missing", [{"UIDPLUS"}, {"MOVE"}, {"MOVE", "UIDPLUS"}, {"UNSELECT"}, {"LITERAL+"}, {"ESEARCH"},
                                     {"MULTIAPPEND"}, {"LITERAL+", "MULTIAPPEND"}, {"NAMESPACE"}, {"LIST-EXTENDED"}])
async def test_servers_that_lack_an_extension(dovecot: Dovecot, user: str, missing: set[str]) -> None:
    """Everything works without each of them; what cannot be known (the new UID) is 0, and nobody else's mail is deleted."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        box._protocol.capabilities -= missing
        await box.create_folder("Out")
        await box.append_many("INBOX", [(b"Subject: %d\r\n\r\n" % number, ("\\Seen",), None) for number in range(4)])
        uids = await box.search("ALL")
        assert len(uids) == 4
        moved = await box.move([uids[0], 999], "Out")
        assert moved.keys() == {uids[0]}
        assert list(moved.values()) == [1]
        await box.expunge([uids[1]])
        assert await box.search("ALL") == uids[2:]
        await box.unselect()
        await box.select("INBOX")
        assert len([fetched async for fetched in box.fetch_many(uids)]) == 2
        if "UIDPLUS" in missing:
            await box.store_flags([uids[3]], add=["\\Deleted"])
            with pytest.raises(MailboxError) as caught:
                await box.expunge([uids[2]])
            assert caught.value.code == "NOUIDPLUS"
            assert await box.search("ALL") == uids[2:]


async def test_flags_are_set_and_cleared(dovecot: Dovecot, user: str) -> None:
    """Marks of ours are a courtesy to people; they must not disturb others' flags."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        await box.append("INBOX", MESSAGE, ["\\Flagged", "Old"])
        await box.store_flags([1, 7], add=["$Malote", "\\Seen"], remove=["Old"])
        (peeked,) = await box.peek_headers([1])
        assert set(peeked.flags) - {"\\Recent"} == {"\\Flagged", "\\Seen", "$Malote"}


async def test_attachments_are_peeked_without_fetching_the_mail(dovecot: Dovecot, user: str) -> None:
    """The catch-up scan needs types, sizes and first bytes only."""
    raw = (b'MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary="b"\r\n\r\n'
           b"--b\r\nContent-Type: text/plain\r\n\r\nnote\r\n"
           b'--b\r\nContent-Type: application/octet-stream; name="x.bin"\r\nContent-Transfer-Encoding: base64\r\n\r\n'
           + b"QUJDREVG" * 1000 + b"\r\n--b--\r\n")
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        await box.append_many("INBOX", [(raw, (), None), (MESSAGE, (), None)])
        structure = await box.peek_structure(await box.search("ALL"))
        assert [(part.section, part.media_type, part.encoding, part.name) for part in structure[1]] == [
            ("1", "text/plain", "7bit", ""), ("2", "application/octet-stream", "base64", "x.bin")]
        assert structure[1][1].size == 8000
        found = await box.peek_parts([(1, "2"), (1, ""), (2, "1"), (9, "1")], 16)
        assert found == {(1, "2"): b"QUJDREVGQUJDREVG", (1, ""): raw[:16], (2, "1"): b"hello\r\n"}
        assert await box.peek_bytes(1, "2", 8, 4) == b"QUJD"
        with pytest.raises(MailboxError):
            await box.peek_parts([(1, "2]<0.1> FLAGS")], 16)


async def test_idle_hears_new_mail_and_forgets_no_news(dovecot: Dovecot, user: str) -> None:
    """Mail between two IDLEs, and during other commands, ends the next IDLE at once."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        assert not await box.idle(0.05)
        assert not await box.idle(0.05)
        waiting = asyncio.create_task(box.idle(30))
        await asyncio.sleep(0.05)
        with other_client(dovecot, user) as other:
            other.append("INBOX", "", "", MESSAGE)
            assert await waiting
            assert await box.search_after(0) == [1]
            other.append("INBOX", "", "", MESSAGE)
            await box.noop()                            # the EXISTS comes here, not during IDLE
            assert await box.idle(30)
            assert not await box.idle(0.05)
            waiting = asyncio.create_task(box.idle(30))
            await asyncio.sleep(0.05)
            box.wake()
            assert await waiting
            other.store("1", "+FLAGS", "\\Deleted")
            other.expunge()
            assert await box.idle(30)


async def test_without_idle_it_polls(dovecot: Dovecot, user: str) -> None:
    """Servers without IDLE are asked every poll_seconds."""
    async with opened(dovecot.port, folder="INBOX", username=user, poll_seconds=0.05) as box:
        box._protocol.capabilities -= {"IDLE"}
        assert not box.has_idle
        assert not await box.idle(30)
        with other_client(dovecot, user) as other:
            other.append("INBOX", "", "", MESSAGE)
        assert await box.idle(30)


async def test_search_by_the_mark_and_by_the_hint(dovecot: Dovecot, user: str) -> None:
    """The two searches the receiver lives on; criteria that would end the line are refused."""
    async with opened(dovecot.port, folder="INBOX", username=user) as box:
        for raw in (b"A: b\r\n\r\n", MESSAGE, b"Malote-Mark: 0a-1\r\n\r\n"):
            await box.append("INBOX", raw)
        assert await box.search('HEADER Malote ""') == [2]
        assert await box.search('HEADER Malote-Mark "0a-1"') == [3]
        for criteria in ("ALL\r\nA1 LOGOUT", "SUBJECT é", "ALL\0"):
            with pytest.raises(MailboxError):
                await box.search(criteria)
        with pytest.raises(MailboxError) as caught:
            await box.search("NONSENSE")
        assert caught.value.code in ("BAD", "NO")
        assert await box.search("ALL") == [1, 2, 3]
