"""Logs of the keeper's process: lines for people, or one JSON object a line for a log store."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping

__all__ = ["set_up"]


class _Json(logging.Formatter):
    """`event` is the message before its arguments are filled in: the same for all lines of one kind.
    Arguments that have names, `log.info("%(tier)s is back", {"tier": …})`, are fields too."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{stamp}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "event": str(record.msg),
        }
        if isinstance(record.args, Mapping):
            line = {**line, **record.args, **line}  # ours keep their meaning
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up(kind: str) -> None:
    """Log to standard error from INFO on; `kind` is text or json."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    handler.setFormatter(_Json() if kind == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
