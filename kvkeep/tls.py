"""TLS for every port that may leave the host: contexts from PEM files, TLS 1.2 or newer. With a CA for
clients a server asks each for its certificate (mTLS), and trusts no other CA for it. And tokens.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

from kvkeep.errors import ConfigError

__all__ = ["client_context", "read_token", "server_context"]


def server_context(
    cert: str | None, key: str | None, client_ca: str | None = None, *, optional: bool = False
) -> ssl.SSLContext:
    """What a server shows, from the file of its certificate (and those between it and the CA, in order) and
    of its key. `client_ca`: file of the CAs whose clients may connect; None: any may. `optional`: so may a
    client without a certificate, whose `peercert` is empty then. Raises ConfigError."""
    if cert is None or key is None:
        missing = "a key" if cert is not None else "a certificate" if key is not None else "both"
        raise ConfigError(
            f"TLS takes a certificate and its key, each as a PEM file: give {missing} too, or leave TLS out"
        )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, cert, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_OPTIONAL if optional else ssl.CERT_REQUIRED
    return context


def client_context(ca: str | None = None, cert: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """What a client trusts and shows; it checks the server's name. `ca`: file of the CAs to trust, and no
    others; None: the system's. `cert`, `key`: what it shows a server that asks. Raises ConfigError."""
    if (cert is None) != (key is None):
        raise ConfigError("a client's certificate and its key go together: give both as PEM files, or none")
    context = ssl.create_default_context() if ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        _trust(context, ca)
    if cert is not None and key is not None:
        _show(context, cert, key)
    return context


def _show(context: ssl.SSLContext, cert: str, key: str) -> None:
    _readable("certificate", cert)
    _readable("key", key)

    def encrypted() -> NoReturn:  # otherwise OpenSSL asks for it at the terminal
        raise ConfigError(
            f"the key in {key} is encrypted: write it without a password (openssl pkey -in … -out …), "
            "readable for this user only"
        )

    try:
        context.load_cert_chain(cert, key, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key} is not the key of the certificate in {cert}: give its own") from error
        raise ConfigError(
            f"{cert} and {key} are not PEM files of a certificate and its key ({error.reason or error}): "
            "each needs its -----BEGIN line; the server's own certificate comes first"
        ) from error


def _trust(context: ssl.SSLContext, ca: str) -> None:
    _readable("CA", ca)
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{ca} is no PEM file of a CA's certificate ({error.reason or error}): it needs a "
            "-----BEGIN CERTIFICATE----- line"
        ) from error


def _readable(what: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error.strerror}") from error


def read_token(path: str | Path) -> str:
    """The token in a file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token in {path}: {error}") from error
