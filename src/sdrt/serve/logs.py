"""The server's log on standard error: a line for each event, as text or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

log = logging.getLogger("sdrt.serve")


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Write a line for people, and a traceback below it where there is one."""
        line = f"sdrt: {_printable(record.getMessage())}"
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """Write one JSON object."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if record.exc_info is not None:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry | getattr(record, "facts", {}))


def set_up(form: str) -> None:
    """Send the server's log and that of its HTTP library to standard error.

    Parameters
    ----------
    form
        ``text`` or ``json``.

    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for logger, level in ((log, logging.INFO), (logging.getLogger("uvicorn"), logging.ERROR)):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _printable(text: str) -> str:
    """Keep what clients send from breaking lines or steering a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
