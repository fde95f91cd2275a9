"""Keys of real vLLM requests with multimodal content; no engine is started, and no model needed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from kvkeep.cli.prompt import chain
from kvkeep.engines.vllm import requests
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.identity import KEY_BYTES, fingerprint, tenant_of

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds

CHUNK, COUNT = 16, 8
TOKENS = [7] * (CHUNK * COUNT)  # placeholders and text alike: only the features differ
Image = tuple[str, int, int]
"""Hash, first token and length."""


def tracked(*images: Image) -> Tracked:
    features = [
        MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset, length), name)
        for name, offset, length in images
    ]
    sampling = SamplingParams(max_tokens=1)
    request = Request("r", list(TOKENS), sampling, None, mm_features=features)
    return Tracked(request, fingerprint({"model": "m"}), CHUNK)


def keys(*images: Image) -> list[bytes]:
    """One key per chunk of a prompt with these images."""
    joined = tracked(*images).keys(0, COUNT)
    assert len(joined) == COUNT * KEY_BYTES
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        (None, ""),
        ({"traceparent": "00-a-b-01"}, "00-a-b-01"),
        ({"traceparent": "00-a-b-01", "tracestate": "x=1,y=2"}, "00-a-b-01 x=1,y=2"),
        ({"traceparent": "00-a-b-01", "tracestate": "x" * 513}, "00-a-b-01"),
        ({"tracestate": "x=1"}, ""),
    ],
)
def test_a_requests_trace(headers: dict[str, str] | None, trace: str) -> None:
    request = Request("r", list(TOKENS), SamplingParams(max_tokens=1), None, trace_headers=headers)
    assert Tracked(request, fingerprint({"model": "m"}), CHUNK).trace == trace


@pytest.mark.parametrize("offset", [0, 1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK + 3])
def test_an_image_is_in_the_key_from_its_first_chunk_on(offset: int, length: int) -> None:
    one, same = keys(("a", offset, length)), keys(("a", offset, length))
    other, none = keys(("b", offset, length)), keys()
    first = offset // CHUNK
    assert one == same
    for different in (other, none):
        assert one[:first] == different[:first]
        assert not set(one[first:]) & set(different[first:])


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([("a", 16, 4), ("b", 20, 4)], [("b", 16, 4), ("a", 20, 4)]),  # exchanged
        ([("a", 16, 4), ("b", 20, 4)], [("a", 16, 4), ("c", 20, 4)]),  # the second one of a chunk
        ([("a", 16, 4)], [("a", 17, 4)]),  # moved within its chunk
        ([("a", 16, 40)], [("a", 16, 20), ("a", 36, 20)]),  # one large one, or two small ones
        ([("a", 16, 4)], [("a", 16, 4), ("a", 40, 4)]),
    ],
)
def test_what_images_and_where_is_told_apart(one: list[Image], two: list[Image]) -> None:
    assert keys(*one)[0] == keys(*two)[0]
    assert keys(*one)[-1] != keys(*two)[-1]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_keys_do_not_depend_on_when_they_are_asked_for(step: int) -> None:
    images = [("a", 3, 20), ("b", 30, 1), ("c", 31, 50), ("d", 100, 28)]
    pieces, growing = b"", tracked(*images)
    for last in range(step, COUNT + step, step):
        pieces += growing.keys(last - step, min(last, COUNT))
    assert pieces == b"".join(keys(*images))


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_the_command_line_makes_the_same_keys(salt: str | None) -> None:
    """Those of `kvkeep lookup` and `pin`, of the same tokens and salt."""
    prompt, print_ = list(range(3 * CHUNK + 5)), fingerprint({"model": "m"})
    request = Request("r", prompt, SamplingParams(max_tokens=1), None, cache_salt=salt)
    space = {"fingerprint": print_.hex(), "chunk_tokens": CHUNK}
    tracked = Tracked(request, print_, CHUNK)
    assert chain(space, prompt, salt) == tracked.keys(0, 3)
    assert tracked.tenant == tenant_of(salt)


def test_media_that_come_with_an_update_count(tmp_path: Path) -> None:
    """A prompt that is streamed begins as text; vLLM adds what comes later to the same request."""
    ends = []
    for name in ("a", "b"):
        growing = tracked()
        text = growing.keys(0, 2)
        growing.request.mm_features = tracked((name, 3 * CHUNK, 20)).request.mm_features
        ends.append((text, growing.keys(2, COUNT)))
    assert ends[0][0] == ends[1][0] == b"".join(keys()[:2])
    assert ends[0][1] != ends[1][1]


def test_an_adapter_that_was_replaced_under_a_running_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does not read a known number's files again: it computes on with the first ones."""
    warned: list[str] = []
    monkeypatch.setattr(requests.log, "warning", lambda text, *given: warned.append(text % given))
    monkeypatch.setattr(requests, "_first_seen", {})
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, other):
        (folder / "adapter_model.bin").write_bytes(folder.name.encode())

    def adapted(number: int, folder: Path = tmp_path) -> bytes:
        lora = LoRARequest("adapter", number, str(folder))
        request = Request("r", list(TOKENS), SamplingParams(max_tokens=1), None, lora_request=lora)
        return Tracked(request, fingerprint({"model": "m"}), CHUNK).keys(0, COUNT)

    first = adapted(7)
    assert first
    assert adapted(7) == first
    (tmp_path / "adapter_model.bin").write_bytes(b"second!")
    assert adapted(7) == b"", "neither kept nor served"
    second = adapted(8)
    assert second
    assert second != first
    (tmp_path / "adapter_model.bin").write_bytes(tmp_path.name.encode())
    assert adapted(7) == b"", "vLLM may have evicted it and read it again in between"
    assert len(warned) == 1
    assert adapted(9)
    assert adapted(9, other) == b"", "another path does not make it read again"
    assert len(warned) == 2


@pytest.mark.parametrize("token", [-1, 2**31, None])
def test_a_token_id_that_is_none_costs_that_request_its_cache(token: int | None) -> None:
    odd: list[int] = [*TOKENS[1:], token]  # type: ignore[list-item]
    request = Request("r", odd, SamplingParams(max_tokens=1), None)
    one = Tracked(request, fingerprint({"model": "m"}), CHUNK)
    assert one.keys(0, COUNT - 1)
    assert one.keys(0, COUNT) == b""
    assert not one.cacheable
