"""llm-d-router's own decoder, compiled from its public source, on our events: it reads what they say.

Where KVKEEP_LLMD_SOURCE names a folder with that source, and Go and its msgpack are there (Debian: golang-go,
golang-github-vmihailenco-msgpack.v5-dev): it installs nothing.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

from kvroute.events import Stored, pack
from tests.engines.vllm.test_events import BLOCK, Engine, words

pytestmark = pytest.mark.slow  # to import vLLM takes ten seconds

PACKAGE = "github.com/llm-d/llm-d-router/pkg/kvevents"
LIBRARIES = Path("/usr/share/gocode")
TOPIC = "kv@10.0.0.7:8000@Qwen/Qwen3-8B"
PROGRAM = f"""
package main

import (
	"encoding/json"
	"os"

	"{PACKAGE}"
	"{PACKAGE}/engineadapter"
)

func main() {{
	read, write := json.NewDecoder(os.Stdin), json.NewEncoder(os.Stdout)
	adapter := engineadapter.NewVLLMAdapter()
	for {{
		var message kvevents.RawMessage
		if read.Decode(&message) != nil {{
			return
		}}
		said := map[string]any{{}}
		pod, model, batch, err := adapter.ParseMessage(&message)
		if err != nil {{
			said["error"] = err.Error()
		}}
		events := []map[string]any{{}}
		for _, event := range batch.Events {{
			events = append(events, map[string]any{{"type": event.Type(), "event": event}})
		}}
		said["pod"], said["model"], said["events"] = pod, model, events
		if write.Encode(said) != nil {{
			return
		}}
	}}
}}
"""


class Decoder:
    """The decoder, as a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read(self, payload: bytes, topic: str = TOPIC) -> list[dict[str, Any]]:
        """What it makes of one message. Raises ValueError with what it objects to."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        message = {"Topic": topic, "Payload": base64.b64encode(payload).decode()}
        print(json.dumps(message), file=self._process.stdin, flush=True)
        said = json.loads(self._process.stdout.readline())
        if "error" in said:
            raise ValueError(said["error"])
        assert (said["pod"], said["model"]) == ("10.0.0.7:8000", "Qwen/Qwen3-8B")
        return [{"type": one["type"], **one["event"]} for one in said["events"]]

    def hear(self, events: Sequence[Any]) -> list[dict[str, Any]]:
        """The same, of events as vLLM's publisher sends them."""
        return self.read(msgspec.msgpack.encode(KVEventBatch(ts=1.0, events=events, data_parallel_rank=0)))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    source, go = os.environ.get("KVKEEP_LLMD_SOURCE"), shutil.which("go")
    if source is None or go is None or not (LIBRARIES / "src/github.com/vmihailenco/msgpack/v5").is_dir():
        pytest.skip("needs KVKEEP_LLMD_SOURCE, llm-d-router's source, and Go with msgpack")
    root = tmp_path_factory.mktemp("go")
    package, main = root / "src" / PACKAGE, root / "src" / "read"
    (package / "engineadapter").mkdir(parents=True)
    main.mkdir()
    origin = Path(source) / "pkg" / "kvevents"
    shutil.copy(origin / "events.go", package)
    for file in (origin / "engineadapter").glob("*.go"):
        if not file.name.endswith("_test.go"):
            shutil.copy(file, package / "engineadapter")
    (main / "main.go").write_text(PROGRAM)
    environ = {
        **os.environ,
        "GO111MODULE": "off",
        "GOPATH": f"{root}:{LIBRARIES}",
        "GOCACHE": str(root / "c"),
    }
    build = [go, "build", "-o", str(root / "program"), "read"]
    done = subprocess.run(build, env=environ, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [str(root / "program")], text=True, **pipes
    ) as process:  # its stdin closes at the end
        yield Decoder(process)


def fields(event: BlockStored | BlockRemoved) -> dict[str, Any]:
    """A stored or removed event of ours, in the decoder's words."""
    said = {"type": type(event).__name__, "BlockHashes": event.block_hashes, "DeviceTier": event.medium}
    said["GroupIdx"] = event.group_idx
    if isinstance(event, BlockStored):
        said |= {"Tokens": event.token_ids, "ParentHash": event.parent_block_hash or 0}
        said |= {"BlockSize": event.block_size, "LoraID": event.lora_id, "LoraName": event.lora_name}
        said |= {"ExtraKeys": event.extra_keys, "KVCacheSpecKind": event.kv_cache_spec_kind or ""}
        said["KVCacheSpecSlidingWindowSize"] = event.kv_cache_spec_sliding_window
    plain: dict[str, Any] = json.loads(json.dumps(said))  # tuples as lists
    return plain


def test_it_reads_what_was_stored_and_removed(
    decoder: Decoder, keeper_process: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    keeper = keeper_process("--tier", f"fs://{keeper_process.directory()}?capacity=64MiB&write=through")
    engine, prompt = Engine(keeper), words(100)
    engine.save(prompt)
    wait_until(lambda: keeper.figures()["tiers"][0]["stored"] == 3)
    told = list[Any]()

    def tell(medium: str, kind: type, count: int) -> None:
        def told_all() -> bool:
            told.extend(engine.step())
            mine = [one for one in told if isinstance(one, kind) and one.medium == medium]
            return sum(len(one.block_hashes) for one in mine) == count

        wait_until(told_all)

    tell("CPU", BlockStored, 6)
    tell("STORAGE", BlockStored, 6)
    engine.link.clear()
    tell("CPU", BlockRemoved, 6)
    assert decoder.hear(told) == [fields(event) for event in told]


def test_it_reads_a_tenants_salt_and_an_empty_cache(
    decoder: Decoder, keeper_process: Callable[..., Any]
) -> None:
    engine = Engine(keeper_process())
    engine.save(words(32, 3), cache_salt="tenant")
    (stored,) = engine.step()
    (read,) = decoder.hear([stored])
    assert read["ExtraKeys"] == [["tenant"], None]
    assert decoder.hear([AllBlocksCleared()])[0]["type"] == "AllBlocksCleared"


def test_it_reads_what_the_router_packs(decoder: Decoder) -> None:
    """Names below 2**32 it refuses (ebab687), with their whole message: one in four billion."""
    names = [2**64 - 1, 2**32]
    stored = Stored(names, 2**63, words(2 * BLOCK), BLOCK, medium="CPU")
    (read,) = decoder.read(pack(TOPIC, 0, 1.0, [stored])[2])
    assert (read["BlockHashes"], read["ParentHash"], read["Tokens"]) == (
        names,
        2**63,
        words(2 * BLOCK),
    )
    assert (read["BlockSize"], read["DeviceTier"]) == (BLOCK, "CPU")


def test_what_is_no_message_is_refused(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="unknown vLLM event tag"):
        decoder.read(msgspec.msgpack.encode([1.0, [{"type": "Unheard"}], 0]))
