"""TLS contexts: who is let in, what is refused, and what a wrong file is called."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from kvkeep.errors import ConfigError
from kvkeep.tls import client_context, server_context

trustme = pytest.importorskip("trustme")


class Files(NamedTuple):
    """PEM files: of one CA, its server and its client, and of a CA that nobody knows."""

    ca: str
    cert: str
    key: str
    client_cert: str
    client_key: str
    other_ca: str
    other_cert: str
    other_key: str


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("pem")
    files = []
    ours, other = trustme.CA(), trustme.CA()
    for name, ca, identities in (("ours", ours, ("127.0.0.1", "client")), ("other", other, ("client",))):
        ca.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
        files.append(str(folder / f"{name}-ca.pem"))
        for identity in identities:
            issued = ca.issue_cert(identity)
            cert, key = folder / f"{name}-{identity}.pem", folder / f"{name}-{identity}.key"
            cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
            issued.private_key_pem.write_to_path(str(key))
            files += [str(cert), str(key)]
    return Files(*files)


def greet(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "127.0.0.1") -> bytes:
    """One handshake and a byte from the server, over a socket pair. Raises what the client sees."""
    here, there = socket.socketpair()
    here.settimeout(5)
    there.settimeout(5)

    def serve() -> None:
        try:
            with server.wrap_socket(there, server_side=True) as tls:
                tls.sendall(b"x")
                tls.recv(1)
        except OSError:
            there.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(here, server_hostname=name) as tls:
            return tls.recv(1)
    finally:
        here.close()
        thread.join(5)


def test_a_client_that_trusts_the_ca_gets_in(pem: Files) -> None:
    assert greet(server_context(pem.cert, pem.key), client_context(pem.ca)) == b"x"


@pytest.mark.parametrize("ca", ["other_ca", None])
def test_a_server_of_an_unknown_ca_is_refused(pem: Files, ca: str | None) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(server_context(pem.cert, pem.key), client_context(ca and getattr(pem, ca)))


def test_a_server_of_another_name_is_refused(pem: Files) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        greet(server_context(pem.cert, pem.key), client_context(pem.ca), "elsewhere.example")


def test_with_a_client_ca_only_its_clients_get_in(pem: Files) -> None:
    server = server_context(pem.cert, pem.key, pem.ca)
    assert greet(server, client_context(pem.ca, pem.client_cert, pem.client_key)) == b"x"
    for cert, key in ((None, None), (pem.other_cert, pem.other_key)):
        with pytest.raises(OSError):  # TLS 1.3 tells a client at its first read
            assert greet(server, client_context(pem.ca, cert, key)) == b"x"


def test_old_versions_are_not_spoken(pem: Files) -> None:
    for context in (server_context(pem.cert, pem.key), client_context(pem.ca), client_context()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_wrong_files_are_named(pem: Files, tmp_path: Path) -> None:
    none, text = str(tmp_path / "none.pem"), str(tmp_path / "text.pem")
    Path(text).write_text("not PEM\n")
    for parts, words in (
        ((none, pem.key), rf"certificate file {none}"),
        ((pem.cert, none), rf"key file {none}"),
        ((pem.cert, pem.key, none), rf"CA file {none}"),
        ((text, pem.key), rf"{text} and {pem.key} are not PEM"),
        ((pem.cert, text), "are not PEM"),
        ((pem.cert, pem.client_key), "is not the key of the certificate"),
        ((pem.cert, pem.key, text), f"{text} is no PEM file of a CA"),
        ((pem.cert, None), "give a key too"),
        ((None, pem.key), "give a certificate too"),
        ((None, None, pem.ca), "give both too"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_context(*parts)
    for options, words in (
        ((none,), "CA file"),
        ((pem.ca, pem.client_cert), "go together"),
        ((pem.ca, pem.client_cert, pem.key), "is not the key"),
    ):
        with pytest.raises(ConfigError, match=words):
            client_context(*options)


def test_an_encrypted_key_is_an_error_and_no_question(pem: Files, tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    plain = serialization.load_pem_private_key(Path(pem.key).read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ConfigError, match="encrypted"):
        server_context(pem.cert, str(locked))
