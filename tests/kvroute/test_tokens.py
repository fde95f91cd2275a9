"""Tokens of prompts: from a tokenizer of one's own, from an engine, and what is remembered of them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kvkeep.errors import ConfigError
from kvroute.request import read_body
from kvroute.tokens import Cached, LocalTokens, cut
from tests.kvroute.scene import DOCUMENT, Scene, played, scene

WORDS = [f"word{number}" for number in range(400)]
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if tools %}tools {{ tools | tojson }} {% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if shout %}!{% endif %}{% if messages[0]['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vocabulary = {
        word: number for number, word in enumerate(["<s>", "<unk>", *WORDS, "<user>", "<assistant>"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings_ = {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    return tmp_path


def ids(source: LocalTokens, chat: bool = False, **body: Any) -> list[int] | None:
    read = read_body(json.dumps({"model": "m", **body}).encode(), chat=chat)
    found = asyncio.run(source.tokens(read, []))
    return None if found is None else found.tolist()


def words(*numbers: int) -> str:
    return " ".join(WORDS[number] for number in numbers)


def test_a_completion_begins_as_the_tokenizer_says(folder: Path) -> None:
    source = LocalTokens(str(folder))
    assert ids(source, prompt=words(0, 1)) == [0, 2, 3]
    assert ids(source, prompt=[words(0, 1), words(5)]) == [0, 2, 3]
    assert ids(source, prompt=[7, 8]) == [7, 8]
    assert ids(source, prompt=[[7, 8], [9]]) == [7, 8]
    for nothing in ("", [], [""], [[]], [-1], [1 << 40], [None], [1, "a"], [{}]):
        assert ids(source, prompt=nothing) is None


def test_a_chat_is_rendered(folder: Path) -> None:
    source, user, assistant = LocalTokens(str(folder)), 402, 403
    message = {"role": "user", "content": words(0, 1)}
    assert ids(source, chat=True, messages=[message]) == [1, 2, 3, assistant]  # "<s><user>" is one word here
    parts = [{"type": "text", "text": WORDS[0]}, {"type": "text", "text": WORDS[1]}]
    assert ids(source, chat=True, messages=[message | {"content": parts}]) == [1, 2, 3, assistant]
    assert ids(source, chat=True, messages=[message, message])[3:] == [user, 2, 3, assistant]
    assert len(ids(source, chat=True, messages=[message], tools=[{"a": 1}])) == 7
    assert ids(source, chat=True, messages=[message], chat_template_kwargs={"shout": True})[-1] == 1
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    for wrong in ("no", image, [{}], [7]):
        assert ids(source, chat=True, messages=[message | {"content": wrong}]) is None
    assert ids(source, chat=True, messages=[7]) is None


def test_without_a_template_chats_have_no_tokens(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    source = LocalTokens(str(folder))
    assert ids(source, chat=True, messages=[{"role": "user", "content": "a"}]) is None
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    source = LocalTokens(str(folder))
    assert ids(source, chat=True, messages=[{"role": "user", "content": words(3)}]) == [5]


def test_what_prompts_share_is_tokenized_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LocalTokens(str(folder))
    long = " ".join(WORDS * 3)
    first = ids(source, prompt=f"{long} {words(7)}")
    encoded, encode = [], source._encode
    monkeypatch.setattr(source, "_encode", lambda pieces: encoded.extend(pieces) or encode(pieces))
    assert ids(source, prompt=f"{long} {words(8)}") == [*first[:-1], 10]
    assert len(encoded) == 1
    assert first == [0, *[number + 2 for number in range(400)] * 3, 9]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \n", max_size=3000), max_size=4).map("".join), st.text("ab ", max_size=50)
)
def test_pieces_are_the_text_and_depend_on_what_is_before(text: str, more: str) -> None:
    pieces = cut(text)
    assert "".join(pieces) == text
    assert all(piece.endswith(("a", "b", "\n")) for piece in pieces[:-1])
    assert cut(text + more)[: max(0, len(pieces) - 1)] == pieces[:-1]


def test_what_is_no_tokenizer(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        LocalTokens(str(tmp_path / "nowhere"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{% if %}"}')
    with pytest.raises(ConfigError, match="template"):
        LocalTokens(str(folder))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        LocalTokens(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer"):
        LocalTokens(str(folder))


def test_what_is_remembered_is_bounded() -> None:
    cached = Cached(most=10)
    for number in range(4):
        cached.put(b"%d" % number, np.zeros(3, np.uint32))
        assert cached.get(b"0") is not None
    assert [cached.get(b"%d" % number) is not None for number in range(4)] == [True, False, True, True]
    cached.put(b"large", np.zeros(11, np.uint32))
    assert cached.get(b"large") is None


async def _unknown(s: Scene) -> float:
    return (await s.metrics())["kvroute_unknown_tokens_total"]


def test_engines_are_asked_once_for_a_prompt() -> None:
    async def play() -> None:
        async with scene(1) as s:
            for _ in range(3):
                await s.ask(DOCUMENT)
            await s.ask(list(range(100)))
            assert s.engines[0].stats.tokenized == 1
            assert (await s.metrics())["kvroute_prompt_tokens_total"] == 3 * 400 + 100
            assert await _unknown(s) == 0

    played(play)


@pytest.mark.parametrize("answer", [{"tokens": [-1]}, {"tokens": "x"}, {}, None])
def test_engines_that_cannot_say(answer: dict | None) -> None:
    async def play() -> None:
        async with scene(2) as s:
            for one in s.engines:
                one.tokenized = answer
            await s.ask(DOCUMENT)
            assert await _unknown(s) == 1
            assert min(one.stats.requests for one in s.engines) == 0

    played(play)


def test_a_router_with_a_tokenizer_asks_no_engine(folder: Path) -> None:
    async def play() -> None:
        async with scene(1, tokenizer=str(folder)) as s:
            await s.ask(DOCUMENT)
            assert s.engines[0].stats.tokenized == 0
            assert (await s.metrics())["kvroute_prompt_tokens_total"] == 401

    played(play)
