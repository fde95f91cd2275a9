"""What `--record` writes says which requests share how much, and nothing of what they say."""

import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.wire import record
from kvkeep.wire.messages import Reservation
from kvkeep.wire.record import Recorder

TOKENS, BYTES = 16, 5000


def keys(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(16, "little") for number in numbers)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Recorder]]:
    """Begin to record to a file of this name; no thread, the test drains."""
    recorders = list[Recorder]()

    def begin(name: str = "seen") -> Recorder:
        recorder = Recorder(str(tmp_path / name), clock)
        recorder.opened(3, TOKENS, BYTES)
        recorders.append(recorder)
        return recorder

    yield begin
    for recorder in recorders:
        if not recorder._stop.is_set():  # else the test has closed it
            recorder.close()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_waits_for_its_answer(start: Callable[..., Recorder], clock: Clock, tmp_path: Path) -> None:
    recorder = start()
    clock.now += 1.5
    recorder.looked_up(3, keys(1, 2, 3), 1, 7)
    recorder.saved(7, 1, keys(2, 3))  # the prompt, step by step
    recorder.saved(7, 2, keys(3, 4))
    recorder.saved(7, 4, keys(5))
    recorder.saved(7, 6, keys(9))  # behind a gap
    recorder.saved(8, 3, keys(9))  # of nobody
    recorder.saved(0, 3, keys(9))
    recorder.drain()
    assert lines(tmp_path / "seen") == []
    clock.now += 60.5
    recorder.drain()
    [line] = lines(tmp_path / "seen")
    ids = line.pop("hash_ids") + line.pop("output_ids")
    assert len(set(ids)) == 5
    assert all(0 <= number < 2**48 for number in ids)
    assert line == {
        "timestamp": 1500,
        "input_length": 3 * TOKENS,
        "output_length": 2 * TOKENS,
        "local": 1,
        "block_tokens": TOKENS,
        "block_bytes": BYTES,
        "namespace": 3,
    }
    recorder.saved(7, 5, keys(6))
    recorder.close()
    assert not recorder._by_epoch
    assert recorder._noted - recorder._taken == 0
    assert len(lines(tmp_path / "seen")) == 1


def test_a_request_that_waits_for_tiers_is_recorded_once(keeper_process, tmp_path: Path) -> None:
    below = f"fs://{tmp_path / 'kv'}?capacity=64MiB"
    keeper = keeper_process("--record", str(tmp_path / "seen"), "--tier", below)
    client = keeper.connect()
    space = client.open_namespace(bytes(32), "test", [(4096, None)], 1, 1, TOKENS)
    first = client.lookup(space, keys(1, 2), patience=1e6)
    settled = client.lookup(space, keys(1, 2), ticket=first.ticket)
    assert first.ticket
    assert first.epoch == settled.epoch, "it is one request, and what it saves is known by this"
    client.reserve(space, [Reservation(keys(1, 2, 3), [b"\1\1\1"], 0, settled.epoch)])
    keeper.close()
    [line] = lines(tmp_path / "seen")
    assert (line["input_length"], line["output_length"]) == (2 * TOKENS, TOKENS)


def test_ids_are_salted(start: Callable[..., Recorder], tmp_path: Path) -> None:
    for name in ("one", "two"):
        recorder = start(name)
        recorder.looked_up(3, keys(1, 2), 0, 1)
        recorder.looked_up(3, keys(1, 3), 0, 2)
        recorder.drain(everything=True)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for first, second in (one, two):
        assert first["hash_ids"][0] == second["hash_ids"][0]
        assert first["hash_ids"][1] != second["hash_ids"][1]
    assert not {*one[0]["hash_ids"], *one[1]["hash_ids"]} & {*two[0]["hash_ids"], *two[1]["hash_ids"]}
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600


def test_memory_is_bounded(
    start: Callable[..., Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_MOST_NOTED", 4 * (16 + 512))
    recorder = start()
    for epoch in range(1, 12):
        recorder.looked_up(3, keys(epoch), 0, epoch)
    assert recorder.figures()["dropped"] == 6
    recorder.drain()  # before their time, since there is little room
    assert len(lines(tmp_path / "seen")) == 3
    recorder.looked_up(3, keys(1), 0, 20)
    recorder.looked_up(4, keys(1), 0, 21)  # a namespace without tokens per chunk
    recorder.drain(everything=True)
    assert recorder.figures() == {
        "file": str(tmp_path / "seen"),
        "recording": True,
        "lines": 6,
        "dropped": 6,
    }


def test_a_full_file_becomes_another(
    start: Callable[..., Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "FILE_BYTES", 400)
    recorder = start()
    for epoch in range(1, 8):
        recorder.looked_up(3, keys(epoch), 0, epoch)
    recorder.drain(everything=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seen", "seen.1"]
    assert all(path.stat().st_size <= 400 for path in tmp_path.iterdir())
    assert len(lines(tmp_path / "seen")) + len(lines(tmp_path / "seen.1")) in (3, 4)
    recorder.close()
    last = (tmp_path / "seen").read_text()
    start()
    assert (tmp_path / "seen.1").read_text() == last, "an earlier run's file is kept once"


def test_a_full_disk_ends_it_with_one_warning(
    start: Callable[..., Recorder], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = start()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for epoch in range(1, 6):
        recorder.looked_up(3, keys(epoch), 0, epoch)
    with caplog.at_level(logging.WARNING):
        resource.setrlimit(resource.RLIMIT_FSIZE, (450, hard))
        try:
            recorder.drain(everything=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(lines(tmp_path / "seen")) == 2, "half a line was left"
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "nothing more is recorded" in caplog.text
    recorder.looked_up(3, keys(9), 0, 9)
    recorder.drain(everything=True)
    assert recorder.figures()["recording"] is False
    assert len(lines(tmp_path / "seen")) == 2


def test_a_keeper_records_what_it_is_asked(keeper_process, tmp_path: Path) -> None:
    keeper = keeper_process("--record", str(tmp_path / "seen"))
    client = keeper.connect()
    for tokens in (TOKENS, 0):  # the second engine does not tell
        space = client.open_namespace(bytes([tokens]) * 32, "test", [(5000, None), (9000, 2)], 1, 1, tokens)
        found = client.lookup(space, keys(1, 2))
        wanted = [b"\1\1\1"] * 2
        [reserved] = client.reserve(space, [Reservation(keys(1, 2, 3), wanted, 0, found.epoch)])
        client.commit(reserved.reservation, 0)
    assert client.status()["recorded"] == {
        "file": str(tmp_path / "seen"),
        "recording": True,
        "lines": 0,
        "dropped": 0,
    }
    keeper.close()
    [line] = lines(tmp_path / "seen")
    assert (line["input_length"], line["output_length"]) == (2 * TOKENS, TOKENS)
    assert (line["block_tokens"], line["block_bytes"]) == (TOKENS, 14000)


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot record"):
        Recorder(str(tmp_path / "nowhere" / "seen"))
    with pytest.raises(ConfigError, match="File exists"):
        Recorder(str(tmp_path))
    assert tmp_path.is_dir(), "it was moved out of the way"
    command = [sys.executable, "-m", "kvkeep.cli", "serve", "--memory", "16MiB", "--record", "/nowhere/seen"]
    command += ["--socket", str(tmp_path / "keeper.sock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "cannot record to /nowhere/seen" in done.stderr
    assert not (tmp_path / "keeper.sock").exists()
