"""Options: one name everywhere, and a clear word about each mistake."""

import os
import tempfile
from pathlib import Path

import pytest

from kvkeep import config
from kvkeep.cli import main
from kvkeep.config import EngineConfig, KeeperConfig, load, parse_bytes
from kvkeep.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4GiB", 4 << 30),
        ("4G", 4 << 30),
        ("500 MB", 500_000_000),
        (77, 77),
        ("1.5k", 1536),
        ("3tb", 3 * 10**12),
    ],
)
def test_sizes(text, nbytes) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "-1", "4 parsecs", "GiB", None, "1e9"])
def test_what_is_no_size(text) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'memory'"):
        load(EngineConfig, {"memroy": 1}, {})
    with pytest.raises(ConfigError, match="known options"):
        load(EngineConfig, {"zzz": 1}, {})


def test_options_win_over_the_environment() -> None:
    environ = {"KVKEEP_MEMORY": "1GiB", "KVKEEP_COPY_THREADS": "2"}
    config = load(EngineConfig, {"memory": "2GiB", "save-decoded": "no"}, environ)
    assert (config.memory, config.copy_threads, config.save_decoded) == (2 << 30, 2, False)
    assert load(EngineConfig, {"socket": None, "chunk_tokens": None}, {}) == EngineConfig()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (KeeperConfig, {"socket": "s", "memory": "900TiB"}, "more than this machine's"),
        (KeeperConfig, {"socket": "s" * 200}, "longer than"),
        (KeeperConfig, {"socket": "s", "linger": -1}, "linger"),
        (KeeperConfig, {"socket": "s", "prefault": "perhaps"}, "prefault"),
        (EngineConfig, {"timeout": 0}, "timeout"),
        (EngineConfig, {"copy_threads": -1}, "copy_threads"),
        (EngineConfig, {"load_by": "layer"}, "load_by must be one of auto, layers, request"),
        (EngineConfig, {"copy_threads": "many"}, "copy_threads"),
        (EngineConfig, {"chunk_tokens": -16}, "chunk_tokens"),
    ],
)
def test_a_wrong_value_is_named(kind, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        load(kind, options, {})


def test_sizes_are_exact_and_bounded() -> None:
    assert parse_bytes(2**53 + 1) == 2**53 + 1
    assert parse_bytes("9" * 20) == int("9" * 20)
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes("9" * 400)


@pytest.mark.parametrize("text", ["1", "true", "Yes", "ON", True])
def test_yes(text) -> None:
    assert load(KeeperConfig, {"socket": "s", "huge-pages": text}, {}).huge_pages is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF", False])
def test_no(text) -> None:
    assert load(KeeperConfig, {"socket": "s", "prefault": text}, {}).prefault is False


def test_a_socket_path_may_be_as_long_as_the_system_allows() -> None:
    assert load(KeeperConfig, {"socket": "s" * 107}, {}).socket == "s" * 107
    with pytest.raises(ConfigError, match="longer than 107"):
        load(KeeperConfig, {"socket": "ü" * 54}, {})


def test_a_folder_that_another_user_made_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In /tmp anybody can, to serve our engines."""
    for name in ("XDG_RUNTIME_DIR", "KVKEEP_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours = config.runtime_dir()
    assert ours.parent == tmp_path
    ours.mkdir(mode=0o700)
    assert config.runtime_dir() == ours
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"kvkeep-{other}").symlink_to(ours)
    with pytest.raises(ConfigError, match="belongs to user"):
        config.runtime_dir()
    assert main(["status"]) == 2
    assert "set XDG_RUNTIME_DIR, or KVKEEP_SOCKET" in capsys.readouterr().err
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert config.runtime_dir() == tmp_path / "kvkeep"
