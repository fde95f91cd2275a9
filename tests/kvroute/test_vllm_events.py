"""vLLM's own publisher, without an engine: we read what it sends, and its replay answers what we ask."""

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from kvroute.index import Held, Index
from kvroute.subscribe import Source, Subscriber, _of_rank

# The module of vLLM as it is installed; of what it imports, names only: all of vLLM takes half a minute.
PUBLISHER = """
import importlib.util, logging, sys, types

root = importlib.util.find_spec("vllm").submodule_search_locations[0]

def module(name, **names):
    sys.modules[name] = made = types.ModuleType(name)
    made.__dict__.update(names)
    made.__path__ = [root + name.removeprefix("vllm").replace(".", "/")]

for name in ("vllm", "vllm.distributed", "vllm.config", "vllm.utils", "vllm.v1", "vllm.v1.core"):
    module(name)
module("vllm.config.kv_events", KVEventsConfig=types.SimpleNamespace)
module("vllm.logger", init_logger=logging.getLogger)
network = ("get_ip", "get_tcp_uri", "is_valid_ipv6_address", "split_zmq_path")
module("vllm.utils.network_utils", **dict.fromkeys(network))
module("vllm.v1.core.kv_cache_utils", ExternalBlockHash=bytes | int)
from vllm.distributed.kv_events import (
    AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher,
)

publisher = ZmqEventPublisher(0, f"ipc://{sys.argv[1]}/events", f"ipc://{sys.argv[1]}/replay", topic="kv@a@m")

def named(number):
    return number if number % 2 else number.to_bytes(32, "big")

def stored(first, count, medium="GPU", **more):
    names, ids = [named(first + n) for n in range(count)], [*range(first, first + 16 * count)]
    return BlockStored(block_hashes=names, parent_block_hash=None, token_ids=ids, block_size=16, lora_id=None,
                       medium=medium, lora_name=None, **more)

def removed(number, medium="GPU"):
    return BlockRemoved(block_hashes=[named(number)], medium=medium)

print("ready", flush=True)
for line in sys.stdin:
    publisher.publish(KVEventBatch(ts=1.0, events=eval(line)))
    print("done", flush=True)
"""


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_events_of_vllm(child_process: Callable[..., Any], tmp_path: Path) -> None:
    child = child_process(PUBLISHER, str(tmp_path))
    assert child.line() == "ready"

    def publish(events: str) -> None:
        child.say(events)
        assert child.line() == "done"

    child.say("[print(ZmqEventPublisher.offset_endpoint_port('tcp://h:5557', 3), flush=True)] and []")
    assert [child.line(), child.line()] == [_of_rank("tcp://h:5557", 3), "done"]

    async def play() -> None:
        index = Index()
        subscriber = Subscriber(index)

        async def until(first: int, blocks: int, held: Held | None, **more: Any) -> None:
            for _ in range(2000):
                found = index.lookup(range(first, first + 16 * blocks), **more).get("engine")
                if found == held:
                    return
                await asyncio.sleep(0.005)
            raise AssertionError((found, held, subscriber.counters))

        # Before we are there: only a replay has it.
        publish("[stored(1000, 3), stored(2000, 2, extra_keys=[('tenant',), None])]")
        publish("[removed(1002), stored(1001, 1, 'CPU', group_idx=0, kv_cache_spec_kind='full_attention')]")
        source = Source(f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay", "kv@")
        subscriber.follow("engine", source)
        await until(1000, 3, Held(32, 0, 0))
        await until(2000, 2, Held(32, 0, 0), extra="tenant")
        assert subscriber.counters.messages == 0
        # And as it comes.
        publish("[stored(3000, 4, 'STORAGE')]")
        await until(3000, 4, Held(0, 0, 64))
        publish("[AllBlocksCleared()]")
        await until(3000, 4, None)
        assert subscriber.counters.messages >= 1
        assert (subscriber.decoder.bad_messages, subscriber.decoder.bad_events) == (0, 0)
        assert (index.orphans, index.refused) == (0, 0)
        assert subscriber.counters.resets == subscriber.counters.restarts == 0
        # A router that starts with what this one knew.
        publish("[stored(5000, 3, 'STORAGE')]")
        await until(5000, 3, Held(0, 0, 48))
        parts, seed = await subscriber.parts(), index.seed
        await subscriber.close()
        publish("[stored(6000, 1), removed(5002, 'STORAGE')]")
        index = Index()
        subscriber = Subscriber(index)
        index.seed, subscriber.saved = seed, {("engine", 0): parts}
        subscriber.follow("engine", source)
        await until(6000, 1, Held(16, 0, 0))
        await until(5000, 3, Held(0, 0, 32))
        assert (subscriber.counters.restored, subscriber.counters.replayed) == (3, 2)
        await subscriber.close()

    asyncio.run(play())
