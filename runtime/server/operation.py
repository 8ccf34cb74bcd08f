"""The process: a socket, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from pascalvl.plugins.errors import UserError, reason
from pascalvl.runtime.server.app import create_app
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.connection import connection_class
from pascalvl.runtime.server.service import Service

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
_SIGNALLED = 128
_BACKLOG = 512


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet; raises `UserError` where the address cannot be had."""
    try:
        if not 0 <= port < 1 << 16:  # of a larger one, the system takes a part
            raise OverflowError("ports are from 0 to 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(
            f"the server cannot listen at {host}, port {port} ({reason(error)}): give another --host or --port."
        ) from error
    return bound


def unix_socket(path: str) -> socket.socket:
    """A socket that nobody can connect to yet, at a path where there may be one of a process that has ended."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(path)
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL that a bound socket is reached by."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches a bound socket."""
    host = bound.getsockname()[0]
    return host == "::1" or host.startswith("127.")


class Operated(Protocol):
    """What is at work behind an app."""

    config: ServerConfig

    async def drain(self) -> None:
        """Let nobody in any more, and wait until all answers have ended, or are ended."""

    def close(self) -> None:
        """End all answers at once."""


class EndedEarly(Exception):
    """What an app needs has ended before it could begin, and told why.

    Args:
        code: its exit code.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, bound: socket.socket, listening: Callable[[], None] = lambda: None) -> int:
    """Serve a model until a signal comes; for arguments and what is returned see `operate`."""
    return operate(create_app(service), service, bound, listening)


def operate(
    app: ASGIApp,
    operated: Operated,
    bound: socket.socket,
    listening: Callable[[], None],
    running: AbstractAsyncContextManager[object] | None = None,
) -> int:
    """Serve until a signal comes; returns the exit code.

    With SIGTERM, SIGINT or SIGHUP, nobody is let in any more, and answers end: 0. Those that have not within the
    config's time are ended; and with a second signal, all are at once: 128 and its number, as with other commands.

    Args:
        app: what is served.
        operated: what is at work behind it.
        bound: a socket; it is closed in the end.
        listening: is called when clients can connect.
        running: is open while clients can; may raise `EndedEarly` as it is opened.
    """
    with contextlib.closing(bound):
        return asyncio.run(_operate(app, operated, bound, listening, running or contextlib.nullcontext()))


async def _operate(
    app: ASGIApp,
    operated: Operated,
    bound: socket.socket,
    listening: Callable[[], None],
    running: AbstractAsyncContextManager[object],
) -> int:
    config, milliseconds = operated.config, int(operated.config.write_seconds * 1000)
    if bound.family != socket.AF_UNIX:
        # For clients that are gone, or take nothing, when nothing is written any more: sockets of connections inherit
        # it.
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server = _Server(
        uvicorn.Config(
            app,
            http=connection_class(config),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=5,
        )
    )
    loop = asyncio.get_running_loop()
    came: list[int] = []
    draining: asyncio.Task[None] | None = None

    async def drain() -> None:
        await operated.drain()
        server.should_exit = True

    def handle(number: int) -> None:
        nonlocal draining
        came.append(number)
        if draining is None:
            draining = asyncio.ensure_future(drain())
        else:
            operated.close()
            server.should_exit = server.force_exit = True

    with _handled(loop, handle):
        try:
            async with running:
                serving = asyncio.ensure_future(server.serve([bound]))
                while not server.started and not serving.done():
                    await asyncio.sleep(0.01)
                if server.started:
                    listening()
                await serving
                if server.force_exit:
                    await server.lifespan.shutdown()  # which uvicorn then leaves out
        except EndedEarly as error:
            return _SIGNALLED + came[-1] if came else error.code
        finally:
            if draining is not None:
                draining.cancel()
    return _SIGNALLED + came[-1] if len(came) > 1 else 0


@contextlib.contextmanager
def _handled(loop: asyncio.AbstractEventLoop, handle: Callable[[int], None]) -> Iterator[None]:
    """Inside, signals are handled by the loop."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if previous[number] is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
            signal.signal(number, previous[number])
