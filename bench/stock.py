"""The peer of the relay benchmarks: stock aiosmtpd, alone and with aiosmtplib as a relay, as their documentation shows them.

    python -m bench.stock SOCKET            receive and drop
    python -m bench.stock SOCKET PORT       relay to PORT on loopback, one kept upstream connection per client session
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiosmtplib
from aiosmtpd.smtp import SMTP, Envelope, Session

MAX_BYTES = 64 * 1024 * 1024


class Receive:
    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        return "250 OK"


class Relay:
    """A pool of upstream connections: the kindest arrangement for the peer, since connecting costs more than sending."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.idle: list[aiosmtplib.SMTP] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        client = self.idle.pop() if self.idle else None
        if client is None:
            client = aiosmtplib.SMTP(hostname="127.0.0.1", port=self.port, start_tls=False)
            await client.connect()
        assert isinstance(envelope.content, bytes)
        await client.sendmail(envelope.mail_from or "", envelope.rcpt_tos, envelope.content)
        self.idle.append(client)
        return "250 OK"


async def serve(path: Path, handler: Receive | Relay) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: SMTP(handler, data_size_limit=MAX_BYTES, loop=loop), str(path), backlog=512)
    path.chmod(0o777)
    await server.serve_forever()


if __name__ == "__main__":
    chosen = Relay(int(sys.argv[2])) if len(sys.argv) > 2 else Receive()
    asyncio.run(serve(Path(sys.argv[1]), chosen))
