"""`kvkeep fsck` on a directory: finds what is damaged, changes nothing unless told to, and then mends it."""

import json
from pathlib import Path

import pytest

from kvkeep.cli import main
from kvkeep.tiers.base import Put
from kvkeep.tiers.open import open_tier
from tests.tiers.fs_place import FsPlace
from tests.tiers.place import PAGE, buffers_of, closing, keys_of


@pytest.fixture
def place(tmp_path: Path) -> FsPlace:
    """A hundred sealed values of several lengths in two namespaces, and one larger than a batch of fsck's."""
    place = FsPlace(tmp_path / "kv")
    keys = [*keys_of(50, 1), *(b"another!" + key[8:] for key in keys_of(50, 2)), *keys_of(1, 3)]
    sizes = [PAGE * (1 + number % 5) for number in range(100)] + [65 << 20]
    with closing(open_tier(f"fs://{place.root}?capacity=1GiB").tier) as tier:
        assert tier.put(keys, buffers_of(sizes, 1)) == [Put.STORED] * 101
    return place


def fsck(place: FsPlace, *options: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = main(["fsck", f"fs://{place.root}?write=never", "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def look(place: FsPlace) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in place.root.rglob("*")}


def test_a_clean_tier(place: FsPlace, capsys: pytest.CaptureFixture[str]) -> None:
    before = look(place)
    code, report = fsck(place, capsys=capsys)
    assert code == 0
    nbytes = 20 * 15 * PAGE + (65 << 20)
    assert (report["values"], report["bytes"], report["damaged"], report["temporaries"]) == (
        101,
        nbytes,
        0,
        0,
    )
    assert (report["recorded_bytes"], report["recorded_values"]) == (nbytes, 101)
    assert (report["real_bytes"], report["real_values"]) == (nbytes, 101)
    assert look(place) == before


def test_damage_is_found_and_only_repaired_when_asked(
    place: FsPlace, capsys: pytest.CaptureFixture[str]
) -> None:
    flipped, cut, foreign, other = keys_of(50, 1)[:4]
    value = bytearray(place.read(flipped) or b"")
    value[17] ^= 1
    place.write(flipped, bytes(value))
    place.write(cut, (place.read(cut) or b"")[:-1])
    place.write(foreign, b"")
    place.write(other, place.read(keys_of(50, 1)[9]) or b"")
    dead = place.root / "tmp" / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "3").write_bytes(b"x" * 10)
    before = look(place)
    code, report = fsck(place, capsys=capsys)
    assert code == 1
    assert (report["values"], report["damaged"], report["temporaries"], report["repaired"]) == (
        101,
        4,
        1,
        False,
    )
    assert f"{other[:8].hex()}/{other[8:].hex()}" in report["damaged_keys"]
    assert report["recorded_bytes"] > report["real_bytes"]
    assert look(place) == before
    code, report = fsck(place, "--repair", capsys=capsys)
    assert (code, report["damaged"], report["temporaries"], report["repaired"]) == (0, 4, 1, True)
    code, report = fsck(place, capsys=capsys)
    assert (code, report["values"], report["damaged"], report["temporaries"]) == (0, 97, 0, 0)
    assert report["recorded_bytes"] == report["real_bytes"] == place.used_bytes()
    assert report["recorded_values"] == report["real_values"] == 97


def test_it_runs_beside_those_that_write(place: FsPlace, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(open_tier(f"fs://{place.root}").tier) as tier:
        code, report = fsck(place, "--repair", capsys=capsys)
        assert (code, report["values"]) == (0, 101)
        assert tier.put(keys_of(3, 7), buffers_of([PAGE] * 3)) == [Put.STORED] * 3
        assert tier.usage().values == 104


def test_for_people(
    place: FsPlace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    for key in keys_of(50, 1)[:30]:
        place.write(key, b"")
    assert main(["fsck", f"fs://{place.root}"]) == 1
    out = capsys.readouterr().out
    for said in ("101 values", "30 found", "and 10 more", "0 of dead writers", "too high"):
        assert said in out
    assert main(["fsck", f"fs://{place.root}", "--repair"]) == 0
    out = capsys.readouterr().out
    for said in ("30 deleted", "put right"):
        assert said in out


@pytest.mark.parametrize(
    ("url", "message"), [("fs:///{}/nothing", "not there"), ("fs:///{}/kv?repair=yes", "unknown option")]
)
def test_what_cannot_be_checked(
    place: FsPlace, url: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fsck", url.format(str(place.root.parent).lstrip("/"))]) == 2
    assert message in capsys.readouterr().err
