"""The page at /: its static files, and the headers that restrict what a browser does with them."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No content from other servers, no inline scripts, no HTML made from strings.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # the browser asks each time; an unchanged file is a 304
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _PageFile:
    """A file of the page, read once."""

    def __init__(self, name: str, data: bytes) -> None:
        self._data, self._type = data, _TYPES[Path(name).suffix]
        self._tag = f'"{sha256(data).hexdigest()[:24]}"'

    def response(self, request: Request) -> Response:
        headers = _HEADERS | {"ETag": self._tag}
        cached = request.headers.get("if-none-match", "")
        if self._tag in (tag.strip().removeprefix("W/") for tag in cached.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self._data, media_type=self._type, headers=headers)


def _read_files() -> dict[str, _PageFile]:
    """The page's files by the paths at which they are served."""
    folder = files("earlyfusion.serve").joinpath("page")
    page_files = {}
    for file in folder.iterdir():
        if Path(file.name).suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            page_files[path] = _PageFile(file.name, file.read_bytes())
    return page_files


_FILES = _read_files()
# They need no API key, as they are the same on every server.
PAGE_PATHS = frozenset(_FILES)


def page_routes() -> APIRouter:
    """A route for each file of the page."""
    router = APIRouter(include_in_schema=False)
    for path, file in _FILES.items():
        router.add_api_route(path, file.response, methods=["GET", "HEAD"])
    return router
