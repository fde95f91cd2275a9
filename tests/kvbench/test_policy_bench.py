"""The replay counts what it says it counts, and Belady's is the most that can be had."""

import argparse
import json
from functools import cache
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench import policy as bench
from kvbench.replay import Replayer
from kvbench.trace import Trace, TraceError, read_trace
from kvkeep.cli.main import main
from kvkeep.keeper.policy import DEFAULT_POLICY, POLICIES, make_policy

SHARED = Path(__file__).parents[3] / "shared" / "traces"
# The middle request is not worth admitting: LRU gives up block 1 for it, the best policy does not.
CHAINS = [[7, 1], [7, 2], [7, 1]]


def write(path: Path, chains: list[list[int]]) -> Path:
    request = {"timestamp": 0, "input_length": 512, "output_length": 1}
    path.write_text("".join(json.dumps({**request, "hash_ids": chain}) + "\n" for chain in chains))
    return path


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(arguments))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.jsonl", CHAINS)


def test_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny), "--json", "--policies", "lru", "--capacities", "0.67,1") == 0
    out, err = capsys.readouterr()
    rows = [("lru", 0.67, 2 / 6), ("lru", 1.0, 3 / 6), ("belady", 0.67, 3 / 6), ("belady", 1.0, 3 / 6)]
    assert json.loads(out) == {
        "trace": str(tiny),
        "unique_blocks": 3,
        "default": DEFAULT_POLICY,
        "results": [{"policy": p, "capacity_fraction": c, "hit_ratio": h} for p, c, h in rows],
    }
    assert err == ""


def test_table(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny)) == 0
    out = capsys.readouterr().out
    for word in [*POLICIES, "belady", "(default)", "10 %", "25 %", "ns/op", "3 unique"]:
        assert word in out


GOOD = b'{"timestamp":0,"input_length":9,"output_length":9,"hash_ids":[1,2]}\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b'{"timestamp":0,"input_length":9,"output_length":9,"hash_ids":[]}\n', "is empty"),
        (GOOD + b"timestamp,hash_ids\n", "line 2: JSON is malformed"),
        (GOOD + b"\xff\xfe\n", "line 2: "),
        (b'{"timestamp":0,"input_length":9,"output_length":9}', "line 1: .*hash_ids"),
        (b'{"input_length":9,"output_length":9,"hash_ids":[1]}', "line 1: .*timestamp"),
        (GOOD.replace(b"[1,2]", b'["a"]'), "line 1: Expected `int`"),
        (GOOD.replace(b"[1,2]", b"[1,99999999999999999999]"), "line 1: "),
        (GOOD.replace(b"[1,2]", b"[1,1]"), "names a block twice"),
    ],
)
def test_bad_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=complaint):
        read_trace(path)
    assert main(["bench", "policy", str(path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    assert "ive " in err or "orrect " in err, "the message does not say what to do"


def test_missing_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "policy", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "cannot read the trace" in capsys.readouterr().err
    assert main(["bench", "policy", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    "option", ["--policies=clock", "--capacities=0", "--capacities=1.5", "--capacities=x"]
)
def test_bad_option(tiny: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(str(tiny), option)
    assert exit_.value.code == 2
    assert option.split("=")[1] in capsys.readouterr().err


# Blocks of a binary tree: the parent of block b is (b - 1) // 2, so each id stands for one prefix.
def _path(block: int) -> list[int]:
    return [*_path((block - 1) // 2), block] if block else [0]


@cache
def _best(chains: tuple[tuple[int, ...], ...], held: frozenset[int], capacity: int) -> int:
    """Try every set of blocks that could be kept after each request."""
    if not chains:
        return 0
    chain, rest = chains[0], chains[1:]
    hits = next((depth for depth, block in enumerate(chain) if block not in held), len(chain))
    everything = sorted(held | set(chain))
    kept = combinations(everything, min(capacity, len(everything)))
    return hits + max(_best(rest, frozenset(blocks), capacity) for blocks in kept)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(0, 6).map(_path), min_size=1, max_size=6), st.integers(1, 4))
def test_belady_is_optimal(paths: list[list[int]], capacity: int) -> None:
    unique = len({block for path in paths for block in path})
    trace = Trace.of([np.array(path) for path in paths], 7)
    best = bench.belady_hits(trace, capacity)
    assert best == _best(tuple(map(tuple, paths)), frozenset(), capacity)
    for name in POLICIES:
        replay = Replayer(make_policy(name, capacity), trace, capacity).run(trace)
        assert replay.hits <= best
        if capacity >= unique:
            assert replay.hits == best


@pytest.mark.parametrize(
    ("name", "figure"), [("mooncake_conversation", 0.260), ("mooncake_synthetic", 0.444)]
)
def test_public_trace(tmp_path: Path, name: str, figure: float) -> None:
    source = SHARED / f"{name}.jsonl"
    if not source.exists():
        pytest.skip(f"needs Mooncake's public trace at ../shared/traces/{source.name}")
    with source.open("rb") as lines:
        (tmp_path / "slice.jsonl").write_bytes(b"".join(islice(lines, 4000)))
    trace = read_trace(tmp_path / "slice.jsonl")
    ratios = {name: bench.measure(trace, name, 0.25).hit_ratio for name in [*POLICIES, bench.BELADY]}
    assert ratios["lru"] == pytest.approx(figure, abs=0.002)
    assert max(ratios.values()) == ratios[bench.BELADY]
    assert min(ratios.values()) > figure - 0.02
