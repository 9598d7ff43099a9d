"""Fetches images from URLs, for servers that are started with --allow-image-urls.

A URL is parsed once and its host is resolved once. The connection goes to the IP address that was
checked, so a host that resolves differently the second time changes nothing. Only public addresses
are allowed, over http and https on their standard ports, with few redirects (each checked like the
first URL), and limits on bytes and time.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from threading import Timer
from time import monotonic
from typing import TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from earlyfusion.serve.errors import ApiError

MAX_BYTES = 20_000_000
SECONDS = 10.0
MAX_SECONDS = 30.0  # for all images of a request
REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_CHUNK = 65_536
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]")
# ipaddress calls these ranges global, but they can lead to a private network: NAT64, 6to4 and
# Teredo addresses contain an IPv4 address of anyone's choice.
_TUNNELS = [
    ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]

Resolve: TypeAlias = Callable[[str, int], list[str]]
"""From a host and a port to the host's IP addresses."""


def fetch_image(url: str, resolve: Resolve | None = None, seconds: float = SECONDS) -> bytes:
    """The bytes at a URL, which must arrive within `seconds`, at most `SECONDS`. Raises
    `ApiError`."""
    end = monotonic() + min(seconds, SECONDS)
    for _ in range(REDIRECTS + 1):
        parts, address = check_url(url, resolve)
        reply = _get(parts, address, end)
        if isinstance(reply, bytes):
            return reply
        url = urljoin(url, reply)
    raise _refused(f"it redirects more than {REDIRECTS} times")


def check_url(url: str, resolve: Resolve | None = None) -> tuple[SplitResult, str]:
    """The parts of a URL, and a public IP address of its host. Raises `ApiError`."""
    # Refuse what different parsers read differently.
    if not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise _refused("it holds blanks, control characters, backslashes or letters beyond ASCII")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("it is malformed") from None
    if parts.scheme not in _PORTS:
        raise _refused("only http and https are fetched")
    if "@" in parts.netloc:
        raise _refused("it holds a user's name")
    host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc.rstrip(":")
    if _HOST.fullmatch(host) is None:
        raise _refused("its host is malformed")
    expected = _PORTS[parts.scheme]
    if port not in (None, expected):
        raise _refused(f"only port {expected} is fetched from")
    return parts, _public_address(host.strip("[]"), expected, resolve or _resolve_host)


def _public_address(host: str, port: int, resolve: Resolve) -> str:
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError):
        addresses = []
    if not addresses:
        raise _refused("its host has no address")
    # All of them: their order may change.
    if not all(map(_is_public_address, addresses)):
        raise _refused("its host is not on the public internet")
    return addresses[0]


def _resolve_host(host: str, port: int) -> list[str]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in entries]


def _is_public_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return _is_public_address(str(address.ipv4_mapped))
        if any(address in tunnel for tunnel in _TUNNELS):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _get(parts: SplitResult, address: str, end: float) -> bytes | str:
    """The body of the reply, or the URL that it redirects to."""
    connection = _PinnedConnection(parts, address, end)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # The socket's own timeout starts again with each byte.
    timer = Timer(max(end - monotonic(), 0), connection.abort)
    timer.start()
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "earlyfusion"})
        reply = connection.getresponse()
        if reply.status in (301, 302, 303, 307, 308):
            return reply.getheader("Location") or ""
        if reply.status != 200:
            raise _refused("its server does not answer with status 200")
        return _body(reply, end)
    except (OSError, http.client.HTTPException):
        raise _refused("its server cannot be reached in time") from None
    finally:
        timer.cancel()
        connection.close()


def _body(reply: http.client.HTTPResponse, end: float) -> bytes:
    data = b""
    while chunk := reply.read1(_CHUNK):
        data += chunk
        if len(data) > MAX_BYTES:
            raise _refused(f"it has over {MAX_BYTES:,} bytes, the limit")
    if monotonic() > end:
        raise TimeoutError
    return data


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to a given IP address of a host."""

    def __init__(self, parts: SplitResult, address: str, end: float) -> None:
        super().__init__(parts.hostname or "", _PORTS[parts.scheme])
        self._secure, self._address, self._end = parts.scheme == "https", address, end
        # Kept for `abort`: http.client drops `sock` when a reply without a length begins.
        self._socket: socket.socket | None = None

    def connect(self) -> None:
        left = max(self._end - monotonic(), 0.01)
        self.sock = self._socket = socket.create_connection((self._address, self.port), left)
        if self._secure:
            secure = ssl.create_default_context().wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock = self._socket = secure
            secure.do_handshake()

    def abort(self) -> None:
        """Close the connection, even while it waits; called from another thread."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _refused(why: str) -> ApiError:
    return ApiError(
        400,
        f"the image's address is not fetched, as {why}: send the image as a data URL",
        code="image_url_refused",
    )
