"""The simulator says what a real keeper does with the same requests, and answers what was asked."""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks.simulator import live_replay
from kvbench import simulate as bench
from kvbench.replay import Disk, Replayer
from kvbench.servers import own_keeper
from kvbench.trace import Trace, TraceError, read_trace
from kvkeep.cli.main import main
from kvkeep.errors import ConfigError
from kvkeep.keeper.policy import POLICIES, make_policy

SHARED = Path(__file__).parents[3] / "shared" / "traces" / "mooncake_conversation.jsonl"
EXAMPLE = Path(__file__).parents[2] / "docs" / "example-trace.jsonl"
PAGE = 4096
SPEEDS = bench.Speeds(10_000.0, 12.0, 2.0)


def conversations(requests: int = 260, sessions: int = 40, seed: int = 3) -> list[list[int]]:
    """Made up: each session begins with one of four shared texts, and every turn adds to it."""
    rng = np.random.default_rng(seed)
    shared = [list(range(10 * number, 10 * number + 6)) for number in range(4)]
    chains = [list(shared[number % 4]) for number in range(sessions)]
    made, fresh = [], 1000
    for _ in range(requests):
        chain = chains[int(rng.zipf(1.3)) % sessions]
        for _ in range(int(rng.integers(1, 5))):
            chain.append(fresh)
            fresh += 1
        made.append(list(chain[:40]))
    return made


def write(path: Path, chains: list[list[int]], **more: object) -> Path:
    request = {"timestamp": 0, "input_length": 512, "output_length": 1, **more}
    path.write_text("".join(json.dumps({**request, "hash_ids": chain}) + "\n" for chain in chains))
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return read_trace(write(tmp_path_factory.mktemp("trace") / "made-up.jsonl", conversations()))


def both(trace: Trace, policy: str, memory: int, disk: int, write: str, folder: Path) -> tuple[float, float]:
    """Hit ratio of a real keeper and of the simulator, with room for so many blocks."""
    options = ["--policy", policy]
    if disk:
        options += ["--tier", f"fs://{folder}/kv?capacity={disk * PAGE}&write={write}"]
    with own_keeper(memory * PAGE, *options) as connection:
        live = live_replay(connection, trace)
    counters = live.figures["counters"]
    if not disk:
        assert (counters["hit_chunks"], counters["asked_chunks"]) == (live.hits, trace.blocks)
    sizes = bench.Sizes.choose(trace, 7, trace.block_tokens, None)  # 3584 bytes: a page, with its seal
    cell = bench.Cell(policy, memory * PAGE, disk * PAGE)
    simulated = bench.simulate(trace, cell, sizes, SPEEDS, write == "second-touch")
    if not disk:
        assert counters["stored_chunks"] * sizes.block_bytes == simulated.saved_bytes
    return live.hits / trace.blocks, simulated.hit_ratio


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_alone_hits_as_a_real_keeper_does(trace: Trace, policy: str, tmp_path: Path) -> None:
    live, simulated = both(trace, policy, trace.unique // 4, 0, "through", tmp_path)
    assert live == simulated
    assert 0.1 < live < 0.9, "nothing was shown"


@pytest.mark.parametrize("write", ["through", "second-touch"])
@pytest.mark.parametrize("policy", POLICIES)
def test_with_disk_it_is_within_a_point(trace: Trace, policy: str, write: str, tmp_path: Path) -> None:
    live, simulated = both(trace, policy, trace.unique // 8, trace.unique // 3, write, tmp_path)
    assert live == pytest.approx(simulated, abs=0.01)


def test_a_public_trace_within_a_point(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip(f"needs Mooncake's public trace at ../shared/traces/{SHARED.name}")
    with SHARED.open("rb") as lines:
        (tmp_path / "slice.jsonl").write_bytes(b"".join(islice(lines, 200)))
    public = read_trace(tmp_path / "slice.jsonl")
    live, simulated = both(public, "lru", public.unique // 10, public.unique // 2, "through", tmp_path)
    assert live == pytest.approx(simulated, abs=0.01)


def test_what_a_live_keeper_records_simulates_alike(trace: Trace, tmp_path: Path) -> None:
    room, disk = trace.unique // 8, trace.unique // 3
    with own_keeper(
        room * PAGE, "--record", f"{tmp_path}/seen", "--tier", f"fs://{tmp_path}/kv?capacity={disk * PAGE}"
    ) as connection:
        live = live_replay(connection, trace)
    recorded = read_trace(tmp_path / "seen")
    assert [len(chain) for chain in recorded.chains] == [len(chain) for chain in trace.chains]
    assert (recorded.unique, recorded.block_tokens) == (trace.unique, trace.block_tokens)
    sizes = bench.Sizes.choose(recorded, None, None, None)
    assert (sizes.chunk_tokens, sizes.block_bytes) == (recorded.block_tokens, recorded.block_bytes)
    simulated = bench.simulate(recorded, bench.Cell("lru", room * PAGE, disk * PAGE), sizes, SPEEDS)
    assert live.hits / trace.blocks == pytest.approx(simulated.hit_ratio, abs=0.01)


def test_local_blocks_and_answers() -> None:
    # The second request's engine has block 1 itself, and block 3 is the first one's answer.
    chains = [np.array([0, 1, 2]), np.array([0, 1, 2, 3])]
    trace = Trace(chains, 4, [2, 4], [0, 1], [1024, 2000])
    replay = Replayer(make_policy("lru", 8), trace, 8).run(trace)
    assert trace.blocks == 5
    assert (replay.hits, replay.saved) == (2 - 1 + 1, 4)
    assert replay.hit_tokens == 1024  # blocks 1 and 2, both whole


def test_a_block_that_is_not_full_saves_what_it_holds(tmp_path: Path) -> None:
    # Prompts of 100 tokens in a block of 512: nine of ten are hits, and no more can be saved than there is.
    trace = read_trace(write(tmp_path / "short.jsonl", [[7]] * 10, input_length=100))
    sizes = bench.Sizes.choose(trace, 7, trace.block_tokens, None)
    found = bench.simulate(trace, bench.Cell("lru", 64 * PAGE, 0), sizes, bench.Speeds(10_000.0, 1e6, 2.0))
    assert found.hit_ratio == 0.9
    assert found.ttft_saved_ratio == pytest.approx(0.9, abs=1e-4)
    assert found.ttft_saved_s == pytest.approx(0.009, rel=1e-3)


def test_requests_come_in_the_order_of_their_times(tmp_path: Path) -> None:
    lines = [{"timestamp": at, "input_length": 512, "output_length": 1, "hash_ids": [at]} for at in (3, 1, 2)]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [chain.tolist() for chain in read_trace(tmp_path / "late.jsonl").chains] == [[0], [1], [2]]


def test_a_disk_keeps_to_its_room_and_what_is_used() -> None:
    disk = Disk(600, 5000)
    disk.write(np.arange(500))
    for start in range(500, 5000, 50):
        disk.use(np.arange(20))
        disk.write(np.arange(start, start + 50))
        assert len(disk) == int(disk.holds.sum()) <= 600
    assert disk.holds[:20].all(), "what is used all the time was given up"
    assert not disk.holds[20:300].any(), "old ones are still there"
    assert disk.written == 5000
    disk.write(np.arange(1000))
    assert len(disk) <= 600


def test_a_disk_slower_than_computing_is_not_read(trace: Trace) -> None:
    sizes = bench.Sizes.choose(trace, 7, trace.block_tokens, None)
    cell = bench.Cell("lru", 64 * PAGE, 10_000 * PAGE)
    slow = bench.simulate(trace, cell, sizes, bench.Speeds(1e9, 12.0, 0.001))
    fast = bench.simulate(trace, cell, sizes, SPEEDS)
    assert slow.disk_read_bytes == 0 < fast.disk_read_bytes
    assert slow.hit_ratio < fast.hit_ratio


def test_sizes() -> None:
    assert {name: heads.bytes_per_token for name, heads in bench.MODELS.items()} == {
        "smollm2": 23_040,
        "qwen2.5-7b": 57_344,
        "llama-8b": 131_072,
        "llama-70b": 327_680,
    }
    trace = Trace.of([np.array([0])], 1)
    sizes = bench.Sizes.choose(trace, None, None, None)
    assert sizes == (512, 512 * 131_072, 16)
    assert sizes.memory(8 << 30, tiers=False) == (128, 128)
    assert sizes.memory(8 << 30, tiers=True)[0] == 31 * 128 * 16 // 512  # a page more for the seal
    assert bench.Sizes.choose(trace, None, None, "smollm2").chunk_tokens == 48
    with pytest.raises(ConfigError, match="less than one block"):
        sizes.disk(1 << 20)
    assert sizes.memory(sizes.least, tiers=True) == (1, 1)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


def test_json_answer_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", conversations())
    picture = tmp_path / "t.png"
    options = ["--memory", "10%,30%,100%", "--disk", "0,200%", "--policies", "lru,arc"]
    options += ["--bytes-per-token", "7", "--chunk-tokens", "512"]
    assert run(str(path), "--json", "--plot", str(picture), *options) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = said["results"]
    assert len(rows) == 12
    assert (rows[0]["policy"], rows[0]["disk_bytes"]) == ("lru", 0)
    assert rows[0]["memory_bytes"] == round(0.1 * said["distinct_bytes"])
    for row in rows:
        assert 0 <= row["disk_hit_ratio"] <= row["hit_ratio"] <= said["best_hit_ratio"] + 1e-9
        assert row["loaded_bytes"] == pytest.approx(row["hit_ratio"] * said["blocks"] * said["block_bytes"])
    assert rows[2]["hit_ratio"] > rows[0]["hit_ratio"]
    alone, below = said["answer"]
    assert (alone["disk_bytes"], below["memory_bytes"]) == (0, rows[0]["memory_bytes"])
    assert min(alone["hit_ratio"], below["hit_ratio"]) >= 0.9 * said["best_hit_ratio"]
    assert run(str(path), *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "90 % of the best possible hit ratio" in printed
    assert "without disk" in printed
    assert run(str(path), *options, "--disk", "0", "--memory", "0.1%") == 0
    assert "not reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"hash_ids": [1, 2], "local": 3}, "local is 3, of 2"),
        ({"hash_ids": [1], "output_ids": [1]}, "names a block twice"),
        ({"hash_ids": [1], "block_tokens": 16}, "more than one model"),
        ({"hash_ids": [1], "block_tokens": 0}, ">= 1"),
        ({"hash_ids": 1}, "hash_ids"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, more: dict[str, object], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "bad.jsonl", [[7]])
    path.write_text(path.read_text() + json.dumps({**json.loads(path.read_text()), **more}) + "\n")
    with pytest.raises(TraceError, match=f"line 2: .*{complaint}"):
        read_trace(path)
    assert main(["bench", "simulate", str(path)]) == 2
    assert "line 2" in capsys.readouterr().err
    assert main(["bench", "simulate", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize(
    "option",
    [
        "--memory=many",
        "--memory=-1%",
        "--disk=x%",
        "--memory=nan%",
        "--prefill-tokens-per-s=0",
        "--model=gpt",
    ],
)
def test_bad_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("trace", option)
    assert exit_.value.code == 2
    assert option.split("=", maxsplit=1)[0] in capsys.readouterr().err


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", conversations(20))
    with pytest.raises(ConfigError, match="cannot write the picture"):
        run(str(path), "--memory", "100%", "--disk", "0", "--plot", str(tmp_path / "nowhere" / "t.png"))


def test_the_example_of_the_docs_is_what_it_says() -> None:
    lines = [json.loads(line) for line in EXAMPLE.read_text().splitlines()]
    assert [line["hash_ids"] for line in lines] == conversations(150, 25)
