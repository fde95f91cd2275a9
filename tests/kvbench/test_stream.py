"""What a stream says and when, event by event; and everything that is no such stream."""

from __future__ import annotations

import json
import random

import pytest

from kvbench.load.stream import AnswerStream, StreamError

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def lines(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def text(piece: str, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "text": piece, "finish_reason": finish}]}


def delta(piece: dict, finish: str | None = None) -> dict:
    return {"choices": [{"index": 0, "delta": piece, "finish_reason": finish}]}


COMPLETION = lines(text(" a"), text(""), text(" b", "length"), {"choices": [], "usage": USAGE})
CHAT = lines(
    delta({"role": "assistant", "content": ""}),
    delta({"reasoning_content": "hm"}),
    delta({"content": " a"}),
    delta({"content": " b"}),
    delta({}, "stop"),
    {"choices": [], "usage": USAGE},
)


@pytest.mark.parametrize("data", [COMPLETION, CHAT], ids=["completion", "chat"])
def test_pieces_and_usage(data: bytes) -> None:
    stream = AnswerStream()
    for now, line in enumerate((data + b"data: [DONE]\n\n").splitlines(keepends=True)):
        stream.feed(line, float(now))
    stream.finish()
    assert stream.text == " a b"
    assert (stream.prompt_tokens, stream.cached_tokens, stream.output_tokens) == (9, 4, 3)
    # A token without text counts in a completion; the event that names the role counts in no chat.
    assert stream.times == ([0.0, 2.0, 4.0] if data is COMPLETION else [2.0, 4.0, 6.0])


def test_events_may_come_in_any_pieces() -> None:
    data = b": a comment\r\n\r\n" + COMPLETION.replace(b"\n", b"\r\n") + b"data: [DONE]\n\n"
    draw = random.Random(3)
    for _ in range(50):
        stream, rest = AnswerStream(), data
        while rest:
            size = draw.randint(1, 40)
            stream.feed(rest[:size], 1.0)
            rest = rest[size:]
        stream.finish()
        assert (stream.text, len(stream.times)) == (" a b", 3)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "broke off"),
        (lines(text(" a")), "broke off"),
        (lines(text(" a", "stop")) + b"data: [DONE]\n\n", "no usage"),
        (lines({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n", "without a token"),
        (lines({"error": {"message": "out of memory"}}), "out of memory"),
        (b"data: {not json}\n", "malformed"),
        (b'data: "a string"\n', "malformed"),
        (b'data: {"choices": [{"text": "\xff"}]}\n', "malformed"),
        (lines({"choices": [{"text": 5}]}), "malformed"),
    ],
)
def test_what_is_no_answer(data: bytes, complaint: str) -> None:
    def read() -> None:
        stream = AnswerStream()
        stream.feed(data, 0.0)
        stream.finish()

    with pytest.raises(StreamError, match=complaint):
        read()


def test_an_answer_without_text_has_a_time() -> None:
    """A model may end at once: one token, which is the end of the answer."""
    stream = AnswerStream()
    stream.feed(lines(delta({"role": "assistant", "content": ""}), delta({}, "stop")), 1.0)
    stream.feed(lines({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n", 2.0)
    stream.finish()
    assert stream.times == [1.0]
