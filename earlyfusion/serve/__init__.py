"""The server: OpenAI's API with text and images in any order, in and out.

driver.py steps the engine; protocol.py and app.py are what clients see; the other files turn one
into the other. No model code here: all work is done by a `Chameleon`.
"""

from __future__ import annotations

from importlib.util import find_spec

from earlyfusion.errors import SettingError

_NEEDED = ("fastapi", "prometheus_client", "pydantic", "python_multipart", "uvicorn")


def check_installed() -> None:
    """Raise `SettingError` unless the packages of the extra "serve" are there."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise SettingError(
            f"the server needs {missing[0]}, which is not installed: "
            "pip install 'earlyfusion[serve]'"
        )
