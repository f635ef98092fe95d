"""uvicorn around the application: slow clients, and a stop that finishes what has begun."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .engine import Engine


logger = logging.getLogger("latentforge.server")


class PatientProtocol(H11Protocol):
    """Closes connections that take too long to say what they want; uvicorn itself would hold them for ever."""

    HEADER_SECONDS = 20.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._arm()

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.HEADER_SECONDS, self._too_slow)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._disarm()
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)


class GracefulServer(uvicorn.Server):
    """Ends with status 0 on SIGTERM and SIGINT: no new connections, `engine` finishes what it has for
    `drain_seconds`; a second signal waits for nothing."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float):
        super().__init__(config)
        self.engine, self.drain_seconds = engine, drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again when it is done, and the process would end with 143
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit:
            self.force_exit = True
        else:
            logger.warning("stopping: what has begun may take %g s to finish", self.drain_seconds)
            self.engine.refuse()
        self.should_exit = True

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            where = "http://{}:{}".format(*sockets[0].getsockname()[:2])
            print(f"serving at {where} (documentation at {where}/docs)", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        drained = asyncio.create_task(asyncio.to_thread(self.engine.close, self.drain_seconds))
        await super().shutdown(sockets)
        await drained


def serve(app: Any, engine: Engine, host: str, port: int, drain_seconds: float, max_connections: int) -> None:
    """Until a signal comes.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        # uvicorn's own ends the process with a line of its log
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port} ({error.strerror}): pass another --port or --host.") from error
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PatientProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        limit_concurrency=max_connections,
        # answers that are not finished then are cut
        timeout_graceful_shutdown=round(drain_seconds + 5),
    )
    with listener:
        GracefulServer(config, engine, drain_seconds).run(sockets=[listener])
