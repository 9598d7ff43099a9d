"""The options of `earlyfusion serve`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from earlyfusion.errors import SettingError

MAX_HEAD_BYTES = 32_768  # of a request's line and headers
MAX_REPLICAS = 64
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#\s]+")
DELIVERIES = ("images", "markdown", "both")


@dataclass(frozen=True)
class ServeOptions:
    """Where to listen, which clients to answer, and the limits of requests.

    `name` is the model's name for clients; if empty, that of the loaded model. Without `api_keys`
    the server only listens on this machine. `lenient` ignores unknown fields. At most `max_queue`
    requests wait beside those that run. `public_url` begins the URLs of images; if empty, the URL
    of the request does. `max_images` and `max_total_pixels` are per request. In seconds: a stream
    that is silent for `keepalive` gets a comment, a reply may take `timeout`, replies may continue
    for `drain_seconds` after SIGTERM, and an engine whose step takes longer than `step_timeout` is
    restarted. Stored images, generated or uploaded, take at most `file_bytes`; the oldest are
    dropped first. `image_delivery` is the default of that field of chats: "images", "markdown" or
    "both". Raises `SettingError`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    name: str = ""
    lenient: bool = False
    max_queue: int = 256
    allow_image_urls: bool = False
    cors_origins: tuple[str, ...] = ()
    public_url: str = ""
    max_body_bytes: int = 20_000_000
    max_images: int = 16
    max_image_side: int = 8192
    max_image_pixels: int = 25_000_000
    max_total_pixels: int = 50_000_000
    file_bytes: int = 256_000_000
    keepalive: float = 15.0
    timeout: float = 600.0
    drain_seconds: float = 30.0
    step_timeout: float = 300.0
    image_delivery: str = "images"

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise SettingError(f"port={self.port} is not possible: use 0 (any free one) to 65,535")
        if self.max_queue < 0:
            raise SettingError(f"max_queue={self.max_queue} is not possible: use 0 or more")
        if self.file_bytes < 1:
            raise SettingError(f"file_bytes={self.file_bytes} is not possible: use 1 or more")
        if not self.step_timeout > 0:
            raise SettingError(f"step_timeout={self.step_timeout:g} is not possible: use above 0")
        if self.image_delivery not in DELIVERIES:
            raise SettingError.unknown("image_delivery", self.image_delivery, DELIVERIES)
        for origin in self.cors_origins:
            # Browsers send the header `Origin` without a path, so one with "/" would never match.
            if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
                raise SettingError(
                    f"cors_origin={origin[:60]!r} is not an origin: give a scheme and a host "
                    "without a path, as http://page.example"
                )
        if self.public_url and not re.match(r"https?://[^/?#\s]", self.public_url):
            raise SettingError(
                f"public_url={self.public_url[:60]!r} is not an address: begin it with http:// or "
                "https:// and a host"
            )
        for key in self.api_keys:
            if not key.isascii() or not key.strip() or len(key) < 8:
                raise SettingError("an API key has under 8 letters or others than ASCII: change it")
        if not (self.api_keys or is_loopback(self.host)):
            raise SettingError(
                f"host={self.host!r} is reached from other machines and there is no API key: "
                "give --api-key, or listen on 127.0.0.1"
            )


def adapters_of(given: Sequence[str], model: str) -> dict[str, str]:
    """The folders of adapters by name, from options NAME=FOLDER; `model` is the name of the base
    model. Raises `SettingError`."""
    folders: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder or not name.isprintable() or len(name) > 100:
            raise SettingError(
                f"adapter={text[:60]!r} is not possible: give a name of up to 100 letters and a "
                "folder, as --adapter short=./run/adapter"
            )
        if name in folders or name == model:
            other = "the model" if name == model else "another one"
            raise SettingError(
                f"an adapter and {other} are both named {name!r}: give each a name of its own"
            )
        folders[name] = folder
    return folders


def check_replicas(number: int) -> None:
    """Raise `SettingError` for a number of engines that is not possible."""
    if not 1 <= number <= MAX_REPLICAS:
        raise SettingError(f"replicas={number} is not possible: use 1 to {MAX_REPLICAS}")


@lru_cache(64)
def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
