"""The port of this machine on which /metrics, /healthz and /readyz are answered (aiohttp).

`/healthz`: the process lives and its event loop turns. `/readyz`: it can take mail now, else 503 with the reasons; a balancer
takes it out meanwhile, also while it ends.
"""

from __future__ import annotations

import asyncio
import json
import os

from aiohttp import web

from malote.config import MetricsConfig
from malote.errors import ConfigError
from malote.health import Health
from malote.metrics import CONTENT_TYPE, Metrics

SHUTDOWN_SECONDS = 1.0
MAX_CONNECTIONS = 32    # Prometheus, a balancer and a curl need one each; beyond it the oldest goes, which nobody reads any more


class Monitor:
    """One listening socket; `open` and `close`."""

    def __init__(self, metrics: Metrics, health: Health) -> None:
        self._metrics = metrics
        self._health = health
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self.address: tuple[str, int] | None = None

    async def open(self, config: MetricsConfig, *, offset: int = 0) -> None:
        """On `config.port` + `offset`. Raises `ConfigError` when that cannot be listened on."""
        application = web.Application(client_max_size=1024)
        application.router.add_get("/metrics", self._show_metrics)
        application.router.add_get("/healthz", self._show_health)
        application.router.add_get("/readyz", self._show_readiness)
        runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=SHUTDOWN_SECONDS)
        await runner.setup()
        server, port = runner.server, config.port + offset
        assert server is not None       # noqa: S101 -- there is one after setup

        def accept() -> asyncio.Protocol:
            for oldest in server.connections[:len(server.connections) - MAX_CONNECTIONS + 1]:
                if oldest.transport is not None:
                    oldest.transport.abort()
            return server()

        try:
            self._listening = await asyncio.get_running_loop().create_server(accept, config.host, port)
        except OSError as error:
            await runner.cleanup()
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else "no such address"
            raise ConfigError(f"metrics: cannot listen on {config.host} port {port} ({why})",
                              hint="set another metrics.port") from error
        self._runner = runner
        self.address = (config.host, port)

    async def close(self) -> None:
        runner, self._runner, self.address = self._runner, None, None
        if self._listening is not None:
            self._listening.close()
        if runner is not None:
            await runner.cleanup()

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        await self._health.faults()     # so that what `malote_ready` says is of now
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _show_health(self, _request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _show_readiness(self, _request: web.Request) -> web.Response:
        faults = await self._health.faults()
        answer = json.dumps({"ready": not faults, "reasons": faults}) + "\n"
        return web.Response(text=answer, status=503 if faults else 200, content_type="application/json")
