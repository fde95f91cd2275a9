"""PEM files for tests of TLS: of one CA, its server on 127.0.0.1 and its client, and of a CA nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest


class Pem(NamedTuple):
    """Paths. `other_…`: of a CA that nobody trusts."""

    ca: str
    cert: str
    key: str
    client_cert: str
    client_key: str
    other_ca: str
    other_cert: str
    other_key: str

    @property
    def server(self) -> tuple[str, str, str]:
        """What a server takes that wants clients' certificates."""
        return self.cert, self.key, self.ca

    @property
    def options(self) -> str:
        """The same as a keeper's `--http` takes it."""
        return f"cert={self.cert}&key={self.key}&ca={self.ca}"

    @property
    def client(self) -> tuple[str, str, str]:
        """What its client takes."""
        return self.ca, self.client_cert, self.client_key


def make(folder: Path) -> Pem:
    """Write them."""
    trustme = pytest.importorskip("trustme", reason="makes certificates: pip install trustme")
    files = []
    for name, identities in (("ours", ("127.0.0.1", "client")), ("other", ("client",))):
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
        files.append(str(folder / f"{name}-ca.pem"))
        for identity in identities:
            issued = authority.issue_cert(identity)
            cert, key = folder / f"{name}-{identity}.pem", folder / f"{name}-{identity}.key"
            cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
            issued.private_key_pem.write_to_path(str(key))
            files += [str(cert), str(key)]
    return Pem(*files)
