"""Fetches pictures and videos by http(s) for requests, from the hosts that the operator named and from nowhere else.

A URL comes from anyone, and the server may be where others are not: its addresses are looked up here, each of them must
be public, and the connection goes to the address that was checked, whatever the name leads to a moment later. Every
redirect is treated so again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.server.errors import APIError

_MOST_REDIRECTS = 3
_MOST_URL = 4096
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _resolved(host: str, port: int) -> list[str]:
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def _connected(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), seconds)


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Gets what is behind URLs.

    Attributes:
        domains: hosts of which URLs are fetched.
        most_bytes: of a file.
        seconds: for all of it.
        resolve: addresses of a host.
        connect: to an address, a port, within seconds.
    """

    domains: frozenset[str]
    most_bytes: int
    seconds: float
    resolve: Callable[[str, int], list[str]] = _resolved
    connect: Callable[[str, int, float], socket.socket] = _connected

    def fetch(self, url: str, param: str) -> bytes:
        """The file at a URL, which is the field ``param`` of a request.

        Raises:
            APIError: 400 for a URL that is not to be fetched, 422 for one of which there is no file.
        """
        end = time.monotonic() + self.seconds
        for _ in range(1 + _MOST_REDIRECTS):
            parts = self._checked(url, param)
            host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
            address = self._address(host, port, param)
            try:
                found = self._get(parts, host, port, address, end, param)
            except (OSError, http.client.HTTPException, ssl.SSLError) as error:
                late = time.monotonic() >= end
                why = f"it takes more than {self.seconds:g} seconds" if late else type(error).__name__
                raise APIError(422, f"{param} cannot be fetched ({why}): send it as a data: URL.", param) from None
            if isinstance(found, bytes):
                return found
            try:
                following = urljoin(url, found)
            except ValueError:
                raise APIError(422, f"{param} leads to what is no URL: send it as a data: URL.", param) from None
            if url.lower().startswith("https:") and not following.lower().startswith("https:"):
                raise APIError(400, f"{param} leads from https to another scheme: send it as a data: URL.", param)
            url = following
        raise APIError(422, f"{param} leads to more than {_MOST_REDIRECTS} redirects: send it as a data: URL.", param)

    def _checked(self, url: str, param: str) -> SplitResult:
        """A URL's parts, of an allowed host; a redirect's, too."""
        try:
            parts = urlsplit(url)
            is_whole = parts.scheme in _PORTS and bool(parts.hostname) and len(url) <= _MOST_URL and parts.port != 0
        except ValueError:
            is_whole = False
        if not is_whole or not url.isascii() or not url.isprintable() or " " in url or "\\" in url or parts.username:
            raise APIError(400, f"{param} is no URL that can be fetched, found {shown(url)}.", param)
        if (parts.hostname or "").rstrip(".") not in self.domains:
            raise APIError(
                400,
                f"{param} is of a host that the server does not fetch from ({shown(parts.hostname)}): send the picture "
                "or video as a data: URL, or start the server with --allow-media-domain.",
                param,
                "media_domain_not_allowed",
            )
        return parts

    def _address(self, host: str, port: int, param: str) -> str:
        """An address of a host, all of which are public."""
        try:
            found = self.resolve(host, port)
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise APIError(422, f"{param} is of a host that has no address ({shown(host)}).", param)
        if not all(is_public(address) for address in found):
            raise APIError(
                400,
                f"{param} is of a host with an address that is not public ({shown(host)}).",
                param,
                "address_not_public",
            )
        return found[0]

    def _get(self, parts: SplitResult, host: str, port: int, address: str, end: float, param: str) -> bytes | str:
        """The file, or where it is instead."""
        with _until(end) as watch:
            plain = self.connect(address, port, max(0.001, end - time.monotonic()))
            watch(plain)
            connection = http.client.HTTPConnection(host, port)
            with contextlib.closing(connection):
                connection.sock = plain
                if parts.scheme == "https":
                    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
                    watch(connection.sock)
                    connection.default_port = _PORTS["https"]  # of which the Host header says nothing
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                headers = {"User-Agent": "pascalvl", "Accept": "image/*, video/*", "Accept-Encoding": "identity"}
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                if response.status in _REDIRECTS and (location := response.getheader("Location")):
                    return location
                if response.status != 200:
                    raise APIError(422, f"{param} cannot be fetched: its host answers {response.status}.", param)
                if response.getheader("Content-Encoding", "identity") != "identity":
                    raise APIError(422, f"{param} cannot be fetched: its host compresses it.", param)
                is_larger = (response.length or 0) > self.most_bytes
                content = b"" if is_larger else response.read(self.most_bytes + 1)
                if is_larger or len(content) > self.most_bytes:
                    raise APIError(413, f"{param} is too large: expected at most {self.most_bytes} bytes.", param)
                if response.length or time.monotonic() >= end:  # it was cut off
                    raise http.client.IncompleteRead(b"")
                return content


@contextlib.contextmanager
def _until(end: float) -> Iterator[Callable[[socket.socket], None]]:
    """Inside, sockets that are given are cut off at a time, however slowly something comes of them."""
    sockets: list[socket.socket] = []

    def cut() -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, end - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield sockets.append
    finally:
        timer.cancel()
        for each in sockets:
            each.close()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet at large, also where it stands for one of IPv4."""
    try:
        parsed: Address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed in _NAT64:
            return _is_public(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
        if "%" in address or parsed.ipv4_mapped or parsed.sixtofour or parsed.teredo:
            return False
        if parsed not in ipaddress.ip_network("2000::/3"):
            return False
    return _is_public(parsed)


def _is_public(address: Address) -> bool:
    return address.is_global and not (
        address.is_multicast
        or address.is_reserved
        or address.is_private
        or address.is_unspecified
        or address.is_loopback
    )


def domain(argument: str) -> str:
    """A host's name, as URLs have it; raises `UserError` for anything more."""
    name = argument.lower().rstrip(".")
    parts = urlsplit(f"//{name}")
    try:
        is_name = name.isascii() and bool(name) and parts.hostname == name and parts.port is None
    except ValueError:
        is_name = False
    if not is_name:
        raise UserError(f"expected a host's name such as images.example.com, found {shown(argument)}.")
    return name
