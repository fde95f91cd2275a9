"""Real text of any length that every machine has: paragraphs of Python's reference, in a seeded order.

The text is the running interpreter's (`pydoc_data.topics`), so it is the same on every run of one Python,
not across its versions.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pydoc_data.topics import topics
from typing import NamedTuple

__all__ = ["CHARS_PER_TOKEN", "Passage", "Prose", "paragraphs"]

CHARS_PER_TOKEN = 4.2
"""Of this text, by the tokenizers of SmolLM2 and Gemma 3 within a tenth; only until a server is asked."""

_CACHED_PASSAGES = 2048
_SHORT, _LONG = 80, 1200  # characters; shorter ones are headings, longer ones tables of hundreds of lines


class Passage(NamedTuple):
    """Text by name and length: equal keys of one length are equal text, others differ from their start."""

    key: str
    tokens: int


class Prose:
    """Makes passages. Another `salt` (a seed, a rate) gives other text of the same lengths."""

    def __init__(self, salt: str, chars_per_token: float = CHARS_PER_TOKEN) -> None:
        self._salt = salt
        self.chars_per_token = chars_per_token
        self.passage = lru_cache(_CACHED_PASSAGES)(self._passage)
        """Cached `_passage`: many requests share their documents."""

    def calibrate(self, chars_per_token: float) -> None:
        """Make what follows to the measure of a server's own tokenizer."""
        self.chars_per_token = chars_per_token
        self.passage.cache_clear()

    def text(self, parts: Iterable[str | Passage]) -> str:
        """Literal text and passages, joined."""
        return "".join(part if isinstance(part, str) else self.passage(part) for part in parts)

    def windows(self, count: int, tokens: int) -> list[str]:
        """`count` pieces of about `tokens` tokens of running text, in the reference's own order; where that
        ends it begins anew."""
        rest = itertools.cycle(" ".join(paragraphs()).split(" "))
        openings = (self._tag(f"window {number}") for number in range(count))
        return [_take(rest, opening, self._chars(tokens)) for opening in openings]

    def tokens(self, text: str) -> int:
        """About how many tokens a given text has, at least one."""
        return max(1, round(len(text) / self.chars_per_token))

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text, about `tokens` tokens of it, whole words."""
        chars = self._chars(tokens)
        return text if len(text) <= chars else text[:chars].rpartition(" ")[0] or text[:chars]

    def _passage(self, passage: Passage) -> str:
        chars = self._chars(passage.tokens)
        draw = random.Random(f"{self._salt}/{passage.key}")
        pieces, size = [self._tag(passage.key)], 0
        while size < chars:
            pieces.append(draw.choice(paragraphs()))
            size += len(pieces[-1]) + 1
        return self.cut(" ".join(pieces), passage.tokens)

    def _tag(self, key: str) -> str:
        # What makes two passages differ in their first tokens, so that no cache finds one in the other.
        return hashlib.blake2b(f"{self._salt}/{key}".encode(), digest_size=4).hexdigest() + ":"

    def _chars(self, tokens: int) -> int:
        return max(1, round(tokens * self.chars_per_token))


@cache
def paragraphs() -> list[str]:
    """Paragraphs of Python's reference in its order, without headings and large tables."""
    texts = (" ".join(text.split()) for name in sorted(topics) for text in topics[name].split("\n\n"))
    return [text for text in texts if _SHORT <= len(text) <= _LONG]


def _take(words: Iterator[str], opening: str, chars: int) -> str:
    """`opening` and words up to `chars` characters."""
    size, taken = len(opening), [opening]
    while size < chars:
        taken.append(next(words))
        size += len(taken[-1]) + 1
    return " ".join(taken)
