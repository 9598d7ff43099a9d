"""The server: OpenAI's API with text and images in any order, in and out.

protocol.py holds the request bodies and app.py the routes; driver.py runs the engine, and the other
files connect the two. There is no model code here: a `Chameleon` does all the work.
"""

from __future__ import annotations

from importlib.util import find_spec

from earlyfusion.errors import SettingError

_NEEDED = ("fastapi", "prometheus_client", "pydantic", "python_multipart", "uvicorn")


def check_installed() -> None:
    """Raise `SettingError` unless the packages of the extra "serve" are installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise SettingError(
            f"the server needs {missing[0]}, which is not installed: "
            "pip install 'earlyfusion[serve]'"
        )
