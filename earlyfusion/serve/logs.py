"""The log of the server's and the engine's process: JSON lines on standard error."""

from __future__ import annotations

import json
import logging
import sys
from time import gmtime, strftime
from typing import Any

_REQUEST = ("request_id", "method", "path", "status", "ms")
_FIELDS = (*_REQUEST, "failures", "reason", "done", "of", "bytes")


class JsonLines(logging.Formatter):
    """One JSON object per record. Records hold no prompts and no replies."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(record.created)),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.processName != "MainProcess":
            entry["process"] = record.processName
        entry |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_as_json() -> None:
    """Write this process's records, uvicorn's included, to standard error, one JSON object per
    line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("earlyfusion.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
