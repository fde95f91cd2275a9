"""KV events without an engine: real requests of vLLM, a real keeper, and a strict consumer."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_events import AllBlocksCleared, KVEventBatch
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from kvkeep.engines.link import Opened
from kvkeep.engines.vllm.events import Events, events_wanted
from kvkeep.engines.vllm.requests import Tracked
from kvkeep.wire.client import Connection
from kvkeep.wire.messages import Reservation
from tests.engines.vllm.consumer import Consumer

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds

BLOCK, CHUNK = 16, 32
SLOT = 64 << 10
SHAPE = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
FULL = FullAttentionSpec(**SHAPE)
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=48)

init_none_hash(sha256_cbor)


def words(count: int, seed: int = 1) -> list[int]:
    return [seed * 1000 + at for at in range(count)]


class Engine:
    """As much of an engine as events see: requests that find and save chunks, and a consumer at its end."""

    def __init__(self, keeper: Any, *specs: Any, name: str = "engine", **options: Any) -> None:
        self.now = 0.0
        vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(
                block_size=BLOCK, prefix_match_unit=None, enable_prefix_caching=True
            ),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            kv_transfer_config=object(),
        )
        self.specs = specs or (FULL,)
        groups = [KVCacheGroupSpec(["layer"], spec) for spec in self.specs]
        kv_config = SimpleNamespace(kv_cache_groups=groups)
        self.pool = SimpleNamespace(kv_event_queue=[])
        self.events = Events(vllm_config, kv_config, clock=lambda: self.now, **options)
        self.events.bind(self.pool)
        self.consumer = Consumer(BLOCK)
        self.name = name
        self.opened: Opened | None = None
        self.attach(keeper, 0)

    def attach(self, keeper: Any, epoch: int) -> None:
        self.link: Connection = keeper.connect(f"{self.name}:{epoch}")
        windows = [None if spec is FULL else 2 for spec in self.specs]
        space = self.link.open_namespace(b"f" * 32, "test", [(SLOT, window) for window in windows], 1, 1)
        self.opened = Opened(self.link, space, epoch, b"f" * 32)

    def request(self, tokens: list[int], **options: Any) -> Tracked:
        request = Request(
            f"r{time.monotonic_ns()}",
            tokens,
            SamplingParams(max_tokens=1),
            None,
            block_hasher=get_request_block_hasher(BLOCK, sha256_cbor),
            **options,
        )
        return Tracked(request, b"f" * 32, CHUNK)

    def save(self, tokens: list[int], commit: bool = True, **options: Any) -> int:
        """A request that computes all of it; returns its reservation."""
        assert self.opened is not None
        tracked, count = self.request(tokens, **options), len(tokens) // CHUNK
        wanted = [b"\1" * count] * len(self.specs)
        item = Reservation(tracked.keys(0, count), wanted, 0, 0)
        [done] = self.link.reserve(self.opened.namespace, [item])
        self.events.met(tracked, b"f" * 32, CHUNK, 0, count)
        self.events.awaiting(sum(int((row >= 0).sum()) for row in done.offsets))
        if commit:
            self.link.commit(done.reservation, 0)
        return done.reservation

    def step(self, seconds: float = 1.0) -> list[Any]:
        """One step's events, read by the consumer as they come over the wire."""
        self.now += seconds
        self.events.look_out()
        local, self.pool.kv_event_queue = self.pool.kv_event_queue, []
        events = [*local, *self.events.take(self.opened)]
        self.consumer.read(msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events)))
        return events

    def cpu(self, tokens: list[int], **options: Any) -> int:
        return self.consumer.prefix(tokens, "CPU", **options)


@pytest.fixture
def keeper(keeper_process: Callable[..., Any]) -> Any:
    return keeper_process(memory="16MiB")


def test_only_where_the_operator_wants_them() -> None:
    for config, wanted in ((None, False), (False, False), (True, True)):
        events = None if config is None else SimpleNamespace(enable_kv_cache_events=config)
        assert events_wanted(SimpleNamespace(kv_events_config=events)) is wanted


def test_a_chunk_is_announced_when_it_is_there_and_not_before(keeper: Any) -> None:
    engine, prompt = Engine(keeper), words(100)
    reservation = engine.save(prompt, commit=False)
    assert engine.step(0.1) == []
    assert engine.events.pending  # the engine steps on, to announce what no further request would bring
    engine.link.commit(reservation, 0)
    stored = engine.step(0.1)
    assert [len(event.block_hashes) for event in stored] == [2, 2, 2]
    assert [event.medium for event in stored] == ["CPU"] * 3
    assert [event.kv_cache_spec_kind for event in stored] == ["full_attention"] * 3
    assert not engine.events.pending
    assert engine.cpu(prompt) == 96
    # By the engine's own hashes: who follows its GPU blocks goes on into ours.
    request = engine.request(prompt).request
    own = [int.from_bytes(name, "big") % 2**64 for name in request.block_hashes]
    assert [key for event in stored for key in event.block_hashes] == own
    assert engine.step() == []


def test_a_save_that_is_given_up_is_waited_for_a_moment_only(keeper: Any) -> None:
    engine = Engine(keeper)
    engine.link.abort(engine.save(words(64), commit=False))
    assert engine.step(0.1) == []
    assert engine.events.pending
    engine.now += 1.0
    assert not engine.events.pending
    assert engine.step() == []


def test_what_the_keeper_evicts_or_clears_is_taken_back(keeper: Any) -> None:
    engine = Engine(keeper)
    prompts = [words(64, seed) for seed in range(1, 250)]  # 31 MiB in an arena of 16
    for prompt in prompts:
        engine.save(prompt)
        engine.step(0.2)
    told = {seed for seed, prompt in enumerate(prompts) if engine.cpu(prompt) == 64}
    assert 0 not in told
    assert len(prompts) - 1 in told
    assert len(told) * 2 * SLOT <= 16 << 20
    lease = {seed for seed, prompt in enumerate(prompts) if held(engine, prompt) == 2}
    assert told == lease
    engine.link.clear()
    engine.step()
    assert not any(engine.consumer.held.values())


def held(engine: Engine, tokens: list[int]) -> int:
    assert engine.opened is not None
    count = len(tokens) // CHUNK
    found = engine.link.lookup(engine.opened.namespace, engine.request(tokens).keys(0, count), recompute=-1.0)
    engine.link.release(found.lease)
    return found.chunks


def test_what_a_directory_evicts_is_taken_back(keeper_process: Callable[..., Any]) -> None:
    """Without a request that asks for it: only new prompts come, and what is below is bounded."""
    where = keeper_process.directory()
    keeper = keeper_process("--tier", f"fs://{where}?capacity=4MiB", memory="2MiB")
    engine, prompts = Engine(keeper), [words(4 * CHUNK, seed) for seed in range(1, 33)]

    def stored(prompt: list[int]) -> int:
        return engine.consumer.prefix(prompt, "STORAGE")

    def settled() -> bool:
        engine.step()
        (tier,) = keeper.figures()["tiers"]
        return tier["waiting_chunks"] == 0

    for prompt in prompts:
        engine.save(prompt)
        deadline = time.monotonic() + 20
        while not settled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    engine.step()
    files = [file for file in where.glob("*/*/*") if len(file.name) == 32]
    assert len(engine.consumer.held["STORAGE", 0]) == 2 * len(files) < 2 * 4 * len(prompts)
    assert stored(prompts[0]) == 0
    assert stored(prompts[-1]) == 4 * CHUNK


def test_an_engine_announces_what_another_one_saved_once_it_meets_it(keeper: Any) -> None:
    first, second, prompt = Engine(keeper), Engine(keeper, name="second"), words(100)
    first.save(prompt)
    first.step()
    assert second.step() == []
    second.events.met(second.request(prompt), b"f" * 32, CHUNK, 0, 2)  # it finds two of the three
    second.step()
    assert (first.cpu(prompt), second.cpu(prompt)) == (96, 64)
    first.link.clear()
    first.step()
    second.step()
    assert (first.cpu(prompt), second.cpu(prompt)) == (0, 0)


def test_groups_are_told_apart(keeper: Any) -> None:
    engine, prompt = Engine(keeper, FULL, SLIDING), words(64)
    engine.save(prompt)
    stored = engine.step()
    assert {(event.group_idx, event.kv_cache_spec_kind) for event in stored} == {
        (0, "full_attention"),
        (1, "sliding_window"),
    }
    assert {event.kv_cache_spec_sliding_window for event in stored} == {None, 48}
    assert engine.cpu(prompt) == engine.cpu(prompt, group=1) == 64
    engine.link.clear()
    assert {event.group_idx for event in engine.step()} == {0, 1}
    assert not any(engine.consumer.held.values())


def test_lora_and_salt_are_in_the_event(keeper: Any) -> None:
    engine = Engine(keeper)
    engine.save(words(32), cache_salt="tenant", lora_request=LoRARequest("adapter", 3, "/nowhere"))
    [event] = engine.step()
    assert (event.lora_name, event.lora_id) == ("adapter", 3)
    assert event.extra_keys == [("adapter", "tenant"), ("adapter",)]


def test_a_wipe_of_the_engine_s_own_cache_is_followed_by_all_that_is_kept(keeper: Any) -> None:
    """Consumers forget all of an engine then, also what lies elsewhere."""
    engine, prompt = Engine(keeper), words(100)
    engine.save(prompt)
    engine.step()
    engine.save(words(32, 5))
    engine.pool.kv_event_queue.append(AllBlocksCleared())
    engine.step()
    assert engine.cpu(prompt) == 96
    assert engine.cpu(words(32, 5)) == 32
    engine.events.forget()  # and with a reset of the connector, of nothing
    engine.pool.kv_event_queue.append(AllBlocksCleared())
    engine.step()
    assert not any(engine.consumer.held.values())


def test_a_lost_keeper_and_its_successor(keeper: Any, keeper_process: Callable[..., Any]) -> None:
    engine, prompt = Engine(keeper), words(100)
    engine.save(prompt)
    engine.step()
    lost, engine.opened = engine.opened, None
    engine.step()
    assert engine.cpu(prompt) == 0
    engine.opened = lost  # it had only been slow: what is still there is announced again
    engine.step()
    assert engine.cpu(prompt) == 96
    engine.attach(keeper_process(memory="16MiB"), 1)  # and one that holds nothing
    engine.step()
    assert engine.cpu(prompt) == 0
    engine.save(prompt)
    engine.step()
    assert engine.cpu(prompt) == 96


def test_an_engine_that_fell_behind_asks_again(keeper_process: Callable[..., Any]) -> None:
    short = "from kvkeep.keeper import journal; journal.Journal.__init__.__defaults__ = (4,)"
    engine = Engine(keeper_process(memory="16MiB", patch=short))
    prompts = [words(64, seed) for seed in range(1, 40)]
    for prompt in prompts[:4]:
        engine.save(prompt)
    engine.step()
    assert engine.cpu(prompts[0]) == 64
    engine.link.clear()
    other = Engine(SimpleNamespace(connect=lambda session: engine.link), name="other")
    for prompt in prompts[4:]:
        other.save(prompt)
    for _ in range(3):
        engine.step()
    assert not any(engine.consumer.held.values())


def test_what_is_remembered_is_bounded_and_the_oldest_is_taken_back(keeper: Any) -> None:
    engine = Engine(keeper, most=4)
    prompts = [words(64, seed) for seed in range(1, 5)]
    for prompt in prompts:
        engine.save(prompt)
        engine.step()
    assert [engine.cpu(prompt) for prompt in prompts] == [0, 0, 64, 64]
