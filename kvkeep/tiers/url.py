"""Tier URLs: `scheme://user:password@host:port/path?option=value`, parsed once, all options known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from kvkeep.config import parse_bytes, parse_flag
from kvkeep.errors import ConfigError

__all__ = ["TierURL", "parse_seconds"]

_T = TypeVar("_T")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class TierURL:
    """A URL whose options are taken one by one; what nobody took is an error that names the nearest."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError if `url` cannot be a tier's."""
        self._given = url
        try:
            parts = urlsplit(url)
            self.hosts = [_host_port(text) for text in parts.netloc.rpartition("@")[2].split(",")]
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError as error:
            raise ConfigError(f"cannot read the tier URL {url!r}: {error}") from error
        if not parts.scheme or "://" not in url:
            raise ConfigError(f"{url!r} is not a tier URL: write it as fs:///data/kv or redis://host:6379")
        self._parts: SplitResult = parts
        self.scheme = parts.scheme.lower()
        self.host, self.port = self.hosts[0]  # `hosts`: of the list where the URL has one, as for sentinels
        self.netloc = parts.netloc
        self.path = unquote(parts.path)
        self.user = unquote(parts.username) if parts.username is not None else None
        self.password = unquote(parts.password) if parts.password is not None else None
        self._options = dict(pairs)
        self._taken: set[str] = set()

    def __str__(self) -> str:
        """The URL without its password, for logs and figures."""
        password = self._parts.password
        return self._given if password is None else self._given.replace(f":{password}@", ":***@", 1)

    def inner(self, scheme: str) -> TierURL:
        """The same URL under another scheme; options taken from it count for this one too."""
        other = TierURL(self._given)
        other.scheme = scheme
        other._options, other._taken = self._options, self._taken
        return other

    def suggest(self, name: str, value: str) -> None:
        """Set an option that the URL does not give; a tier that does not know it goes without."""
        if name not in self._options:
            self._options[name] = value
            self._taken.add(name)

    def take(self, name: str, parse: Callable[[str], _T], default: _T) -> _T:
        """Option `name`, parsed; ConfigError where it does not parse."""
        self._taken.add(name)
        if name not in self._options:
            return default
        try:
            return parse(self._options[name])
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{self}: {name}={self._options[name]!r}: {error}") from error

    def take_bytes(self, name: str, default: int | None) -> int | None:
        """Option `name` as a size: 500GiB, 4MB."""
        return self.take(name, parse_bytes, default)

    def take_seconds(self, name: str, default: float) -> float:
        """Option `name` as a time: 200ms, 5s, 1h."""
        return self.take(name, parse_seconds, default)

    def take_timeout(self, default: float) -> float:
        """Option `timeout`: more than 0 seconds."""
        if not (seconds := self.take_seconds("timeout", default)):
            raise ConfigError(f"{self}: timeout must be more than 0")
        return seconds

    def take_flag(self, name: str, default: bool) -> bool:
        """Option `name` as yes (or nothing) or no."""
        return self.take(name, lambda text: parse_flag(text or "yes"), default)

    def take_count(self, name: str, default: int) -> int:
        """Option `name` as a whole number above 0."""
        count = self.take(name, int, default)
        if count < 1:
            raise ConfigError(f"{self}: {name} must be 1 or more")
        return count

    def take_choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        """Option `name` as one of `choices`."""
        value = self.take(name, str, default)
        if value not in choices:
            raise ConfigError(f"{self}: {name} must be one of {', '.join(choices)}, not {value!r}")
        return value

    def finish(self) -> None:
        """Raise ConfigError if an option is left that nobody knows."""
        for name in self._options.keys() - self._taken:
            near = difflib.get_close_matches(name, self._taken, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(self._taken))}"
            raise ConfigError(f"{self}: unknown option {name!r}: {hint}")


def _host_port(text: str) -> tuple[str, int | None]:
    parts = urlsplit(f"//{text}")
    return parts.hostname or "", parts.port


def parse_seconds(text: str) -> float:
    """Seconds from "200ms", "5s", "1h" or "2.5". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _SECONDS:
        raise ValueError("not a time: write it as 200ms, 5s or 1h")
    return float(match[1]) * _SECONDS[match[2]]
