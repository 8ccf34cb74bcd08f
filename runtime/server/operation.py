"""The process: a socket, signals, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from pascalvl.plugins.errors import UserError, reason
from pascalvl.runtime.server.app import create_app
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


def address_of(bound: socket.socket) -> str:
    """The URL that a bound socket is reached by."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches a bound socket."""
    host = bound.getsockname()[0]
    return host == "::1" or host.startswith("127.")


class _Server(uvicorn.Server):
    """Leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, bound: socket.socket, listening: Callable[[], None] = lambda: None) -> int:
    """Serve until a signal comes; returns the exit code.

    With SIGTERM, SIGINT or SIGHUP, nobody is let in any more, and answers end: 0. Those that have not within the
    config's time are ended; and with a second signal, all are at once: 128 and its number, as with other commands.

    Args:
        service: of which the app is made.
        bound: a socket; it is closed in the end.
        listening: is called when clients can connect.
    """
    with contextlib.closing(bound):
        return asyncio.run(_serve(service, bound, listening))


async def _serve(service: Service, bound: socket.socket, listening: Callable[[], None]) -> int:
    config, seconds = service.config, int(service.config.write_seconds * 1000)
    # For clients that are gone, or take nothing, when nothing is written any more: sockets of connections inherit it.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server = _Server(
        uvicorn.Config(
            create_app(service),
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
        await service.drain()
        server.should_exit = True

    def handle(number: int) -> None:
        nonlocal draining
        came.append(number)
        if draining is None:
            draining = asyncio.ensure_future(drain())
        else:
            service.engine.close()
            server.should_exit = server.force_exit = True

    with _handled(loop, handle):
        serving = asyncio.ensure_future(server.serve([bound]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            listening()
        await serving
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
