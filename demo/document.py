"""A long real document that every machine has: Python's own language reference, from the standard library.

`document` is the demo's long context, `documents` gives as many different ones as a bench asks for. The
text is the running interpreter's, so it is the same on every run of one Python, not across versions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Protocol

# The simple and compound statements, in reading order; QUESTIONS ask about these.
_STATEMENTS = (
    *("if", "while", "for", "break", "continue", "pass", "return", "assert", "del", "raise", "try", "with"),
    *("global", "nonlocal", "import", "function", "class"),
)

QUESTIONS: list[str] = [
    "Which exception is raised when an assert fails?",
    "What does the while statement do?",
    "What is the for statement used for?",
    "What is the with statement used for?",
    "What does the raise statement do?",
]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ...


def document(tokenizer: Tokenizer, min_tokens: int = 6000, max_tokens: int = 7000) -> str:
    """Return the reference of Python's statements, cut at the first paragraph end past `min_tokens`."""
    return documents(tokenizer, 1, min_tokens, max_tokens)[0]


def documents(tokenizer: Tokenizer, n: int, min_tokens: int = 6000, max_tokens: int = 7000) -> list[str]:
    """Return `n` documents of `min_tokens` to `max_tokens` tokens, special tokens not counted.

    Each goes on where the one before ended (the reference starts again after about 110,000 tokens) and
    opens with a title of its own, so that no two share a prefix longer than a few words. The first is
    `document`. ValueError: the bounds are so close that no run of paragraphs fits between them.
    """
    paragraphs = _paragraphs()
    source = itertools.cycle(paragraphs)
    limit = 2 * len(paragraphs) + max_tokens
    titles = (f"Part {part} of the Python reference" for part in range(1, n + 1))
    return [
        _cut(tokenizer, title, itertools.islice(source, limit), min_tokens, max_tokens) for title in titles
    ]


def _paragraphs() -> list[str]:
    names = [name for name in _STATEMENTS if name in topics]
    names += sorted(topics.keys() - set(names))
    return [text.rstrip() for name in names for text in topics[name].strip().split("\n\n") if text.strip()]


def _cut(tokenizer: Tokenizer, title: str, source: Iterator[str], min_tokens: int, max_tokens: int) -> str:
    text, estimate = title, _count(tokenizer, title)
    for paragraph in source:
        addition = "\n\n" + paragraph
        size = _count(tokenizer, addition)
        if estimate + size > max_tokens:
            continue  # a table of thousands of tokens: the next, smaller paragraph does
        text += addition
        estimate += size
        # Counted piece by piece until here: tokenizing all of it again at each step would take seconds.
        if estimate >= min_tokens:
            estimate = _count(tokenizer, text)
            if min_tokens <= estimate <= max_tokens:
                return text
    raise ValueError(f"no run of paragraphs has {min_tokens} to {max_tokens} tokens: widen the bounds")


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))
