"""InfiniStore's own server for the tests: in an environment of its own, with an RDMA device that is none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from tests.tiers.place import free_port

_HERE = Path(__file__).parent / "infinistore_server"
_PACKAGES = ["uvloop==0.21.0", "fastapi", "uvicorn", "numpy"]  # other versions of uvloop bring another libuv
_SERVER = "infinistore==0.2.35"  # without torch, which it names and its server does not use


def environment() -> Path:
    """Its interpreter, made beside ours once; skips the test where it cannot be made."""
    home = Path(sys.prefix) / "infinistore-server"
    python, done = home / "bin" / "python", home / "done"
    if not done.exists():
        _install(home, python)
        done.touch()
    tried = subprocess.run(
        [str(python), "-c", "import infinistore"], capture_output=True, text=True, timeout=60, check=False
    )
    if "cannot open shared object" in tried.stderr:
        pytest.skip(f"{tried.stderr.strip().splitlines()[-1]}: apt-get install libibverbs1 librdmacm1")
    return python


def _install(home: Path, python: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    try:
        venv.create(home, with_pip=True)
        for words in (["--no-deps", _SERVER], _PACKAGES):
            command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *words]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        pytest.skip(f"InfiniStore's server cannot be installed: {str(said).strip().splitlines()[-1]}")


def fake_device(directory: Path) -> Path:
    """The library with the device; skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the RDMA device that InfiniStore's server wants")
    library = directory / "verbs.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_HERE / "verbs.c")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return library


class Server:
    """Runs in `directory`; `port` is its own for good, so that it can be started again."""

    def __init__(self, python: Path, directory: Path, gigabytes: int = 1) -> None:
        self.port = free_port()
        self._directory, self._python, self._gigabytes = directory, python, gigabytes
        self._library = fake_device(directory)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        words = [str(self._python), str(_HERE / "serve.py"), "--service-port", str(self.port)]
        words += ["--manage-port", str(free_port()), "--dev-name", "fake_0", "--log-level", "error"]
        words += ["--prealloc-size", str(self._gigabytes), "--minimal-allocate-size", "16"]
        environ = {**os.environ, "LD_PRELOAD": str(self._library)}
        with (self._directory / "log").open("a") as log:
            self._process = subprocess.Popen(
                words, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + 60
        while self.alive and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"InfiniStore's server does not start: see {self._directory / 'log'}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
