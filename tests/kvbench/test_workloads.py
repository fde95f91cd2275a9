"""Workloads are the same for the same seed, share what they say they share, and have the stated lengths."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from kvbench.workloads import WORKLOADS, Given, Message, Passage, Prose, Request, Scale
from kvkeep.errors import ConfigError

TRACE = [
    {"timestamp": 5000, "input_length": 1100, "output_length": 9, "hash_ids": [1, 2, 3]},
    {"timestamp": 2000, "input_length": 1024, "output_length": 500, "hash_ids": [1, 2]},
    {"timestamp": 8000, "input_length": 700, "output_length": 0, "hash_ids": [1, 9]},
]


def trace(folder: Path) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TRACE))
    return path


def build(name: str, scale: float, seed: int = 0, data: Path | None = None) -> tuple[list[Request], Prose]:
    prose = Prose(f"{seed} 1")
    return WORKLOADS[name].build(Given(Scale(scale), random.Random(seed), prose, data)), prose


def opening(request: Request, prose: Prose) -> str:
    return "".join(prose.text(message.parts) for message in request.opening)


def tokens(text: str, prose: Prose) -> int:
    return prose.tokens(text) if text else 0


def whole(requests: list[Request], prose: Prose) -> list[str]:
    return [opening(one, prose) + prose.text(one.says) for one in requests]


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_seed_decides_all(name: str, tmp_path: Path) -> None:
    data = trace(tmp_path) if name == "trace" else None
    first, again, other = (build(name, 0.1, seed, data) for seed in (3, 3, 4))
    assert first[0] == again[0]
    texts = whole(*first)
    assert texts == whole(*again)
    assert not set(texts) & set(whole(*other))
    assert [one.round for one in first[0][:3]] == [0, 0, 0]
    assert all(one.answer_tokens >= 1 for one in first[0])


@pytest.mark.parametrize(
    ("name", "documents", "questions", "context", "answer"),
    [("long_documents", 15, 20, 20_000, 100), ("short_documents", 320, 20, 400, 20)],
)
def test_documents_at_their_published_size(
    name: str, documents: int, questions: int, context: int, answer: int
) -> None:
    requests, prose = build(name, 1.0)
    by_document = {number: [r for r in requests if r.document == number] for number in ["0", "7", "14"]}
    assert len(requests) == documents * questions
    assert {len(asked) for asked in by_document.values()} == {questions}
    assert {r.answer_tokens for r in requests} == {answer}
    for asked in by_document.values():
        (text,) = {opening(r, prose) for r in asked}
        assert tokens(text, prose) == pytest.approx(context, rel=0.05)
        assert len({prose.text(r.says) for r in asked}) == questions
    order = [r.document for r in requests]
    assert order != sorted(order)
    small, _ = build(name, 0.01)
    assert len(small) == 20 * math.ceil(documents / 10)  # as many questions of each, at any scale


def test_mixed_has_long_prompts_among_streams() -> None:
    requests, prose = build("mixed", 1.0)
    long, short = ([r for r in requests if r.document == kind] for kind in ("long", "short"))
    assert (len(long), len(short)) == (100, 300)
    assert tokens(prose.text(long[0].says), prose) == pytest.approx(8000, rel=0.05)
    assert (long[0].answer_tokens, short[0].answer_tokens) == (8, 200)
    assert len(set(whole(requests, prose))) == 400
    places = [[r.document for r in requests[at : at + 4]].index("long") for at in range(0, 400, 4)]
    assert len(set(places)) == 4
    few, _ = build("mixed", 0.1)
    assert [sum(r.document == kind for r in few) for kind in ("long", "short")] == [32, 95]


def test_conversations_have_the_stated_lengths() -> None:
    answers, prompts, rounds, asks = [], [], [], []
    for seed in range(8):
        requests, prose = build("conversations", 1.0, seed)
        said: dict[int, int] = {}
        for one in requests:
            before = said.get(one.user, tokens(opening(one, prose), prose))
            asked = tokens(prose.text(one.says), prose)
            asks.append(asked)
            prompts.append(before + asked)
            answers.append(one.answer_tokens)
            said[one.user] = prompts[-1] + one.answer_tokens
        rounds += [2 + sum(one.user == user for one in requests) for user in range(40)]
        assert [one.user for one in requests[:40]] == list(range(40))  # in turn
    assert statistics.mean(answers) == pytest.approx(220, rel=0.06)
    assert (min(answers) >= 1, max(answers)) == (True, 690)
    assert statistics.mean(prompts) == pytest.approx(1200, rel=0.06)
    assert statistics.mean(asks) == pytest.approx(90, rel=0.1)
    assert set(rounds) == {5, 6, 7}


def test_history_is_two_rounds_and_comes_first() -> None:
    requests, _ = build("conversations", 0.2)
    assert {tuple(message.role for message in one.opening) for one in requests} == {
        ("user", "assistant", "user", "assistant")
    }
    by_user = [one for one in requests if one.user == 0]
    assert len({one.opening for one in by_user}) == 1
    assert [one.round for one in by_user] == list(range(len(by_user)))


def sharegpt(folder: Path, *talks: object) -> Path:
    path = folder / "talks.json"
    path.write_text(json.dumps(talks))
    return path


def talk(name: str, rounds: int) -> dict:
    turns = [("human", f"{name} asks {n}") for n in range(rounds)]
    said = [
        {"from": speaker, "value": text}
        for n, (_, ask) in enumerate(turns)
        for speaker, text in (("human", ask), ("gpt", f"{name} hears {n} " + "word " * 100))
    ]
    return {"id": name, "conversations": [{"from": "system", "value": "Be kind."}, *said]}


def test_conversations_of_a_file(tmp_path: Path) -> None:
    data = sharegpt(tmp_path, talk("a", 6), talk("b", 3), talk("c", 5))
    requests, prose = build("conversations", 1.0, 0, data)
    assert len(requests) == 4 + 3  # b has too few rounds
    first = next(one for one in requests if prose.text(one.says) == "a asks 2")
    assert [message.role for message in first.opening] == ["user", "assistant"] * 2
    assert opening(first, prose).startswith("a asks 0a hears 0 word")
    assert first.answer_tokens == pytest.approx(510 / 4.2, abs=2)
    small, prose = build("conversations", 0.1, 0, data)
    assert max(one.answer_tokens for one in small) == 12
    assert tokens(opening(small[0], prose), prose) < 45


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "cannot read"),
        ('[{"conversations": [{"from": "human", "value": "a"}]}, {"talk": 1}]', "conversation 2: "),
        ('[{"conversations": [{"from": "human", "value": 5}]}]', "conversation 1: "),
        ("[]", "no conversation of 5 rounds"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "talks.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        build("conversations", 1.0, 0, path)


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    requests, prose = build("trace", 1.0, 0, trace(tmp_path))
    assert [one.at for one in requests] == [0.0, 3.0, 6.0]
    assert [one.answer_tokens for one in requests] == [500, 9, 1]
    texts = [prose.text(one.says) for one in requests]
    assert texts[1].startswith(texts[0] + " ")  # blocks 1 and 2 in common
    block = prose.text((Passage("block 1", 512),)) + " "
    assert texts[2].startswith(block)
    assert not texts[2].startswith(texts[0])
    assert [tokens(text, prose) for text in texts] == [
        pytest.approx(length, rel=0.05) for length in (1024, 1100, 700)
    ]


def test_a_trace_scales_by_block(tmp_path: Path) -> None:
    requests, prose = build("trace", 0.125, 0, trace(tmp_path))
    assert [tokens(prose.text(one.says), prose) for one in requests] == [
        pytest.approx(length / 8, rel=0.08) for length in (1024, 1100, 700)
    ]
    assert [one.answer_tokens for one in requests] == [62, 1, 1]
    assert [one.at for one in requests] == [0.0, 3.0, 6.0]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_trace(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="is empty"):
        build("trace", 1.0, 0, path)


def test_rag_retrieves_popular_passages_in_changing_order() -> None:
    requests, prose = build("rag", 1.0)
    found = [one.document.split() for one in requests]
    assert {len(set(names)) for names in found} == {5}
    counts = [sum(str(number) in names for names in found) for number in range(150)]
    assert counts[0] > 3 * counts[20] > 0
    with_first = [names.index("0") for names in found if "0" in names]
    assert set(with_first) == set(range(5))
    text = prose.text(requests[0].says)
    assert text.count("Passage: ") == 5
    assert tokens(text, prose) == pytest.approx(5 * 512 + 40, rel=0.05)


def test_rag_has_its_passages_whatever_a_token_is() -> None:
    prose = Prose("wide tokens", chars_per_token=20.0)
    passages = prose.windows(150, 512)
    assert len(passages) == len({passage[:9] for passage in passages}) == 150
    assert min(map(len, passages)) >= 512 * 20


def test_agents_share_one_prefix_and_add_to_it() -> None:
    requests, prose = build("agent", 1.0)
    assert len({one.opening for one in requests}) == 1
    assert tokens(opening(requests[0], prose), prose) == pytest.approx(6000, rel=0.05)
    sizes = [tokens(prose.text(one.says), prose) for one in requests]
    assert min(sizes) >= 50
    assert max(sizes) <= 610
    assert len(requests) == 30 * 12


def test_unique_prompts_differ_from_their_first_word() -> None:
    requests, prose = build("unique", 1.0)
    texts = whole(requests, prose)
    assert len({text.split()[0] for text in texts}) == len(texts) == 200
    assert {one.opening for one in requests} == {()}


def test_the_rule_of_scale() -> None:
    scale = Scale(0.04)
    assert (scale.tokens(20_000, 256), scale.tokens(400, 256), scale.tokens(100, 8)) == (800, 256, 8)
    assert scale.tokens(100, 256) == 100  # never more than published
    assert (scale.count(15), scale.count(20), scale.count(320), scale.count(3, 5)) == (3, 4, 64, 3)
    assert (Scale(1.0).tokens(400, 256), Scale(1.0).count(15)) == (400, 15)


def test_prose_is_cut_by_the_servers_tokens() -> None:
    prose = Prose("a")
    long, short = (prose.passage(Passage("one", length)) for length in (200, 100))
    assert long.startswith(short)
    prose.calibrate(2 * prose.chars_per_token)
    assert prose.passage(Passage("one", 100)) == long
    assert prose.text(("Say: ", Passage("one", 100))) == "Say: " + long
    assert Prose("b").passage(Passage("one", 100)) != prose.passage(Passage("one", 100))
    assert Message("user", ("a",)) == Message("user", ("a",))
