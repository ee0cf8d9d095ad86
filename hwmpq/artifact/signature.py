"""An ed25519 signature over the bytes of manifest.json, which hold the hashes of all else.

`manifest.sig` is the bare signature, 64 bytes; keys are PEM files, as OpenSSL makes and reads them:
openssl pkeyutl -verify -rawin -pubin -inkey KEY.pub -in manifest.json -sigfile manifest.sig
Source: RFC 8032 (the algorithm), RFC 8410 (the keys).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hwmpq.errors import InputError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

FILE = "manifest.sig"
#: Names the file of the public key that every artifact loaded here must be signed with.
POLICY = "HWMPQ_REQUIRE_SIGNATURE"


def required(key: str | Path | None = None) -> tuple[Path, ...]:
    """The keys that must have signed: the policy's and the caller's; neither replaces the other."""
    return tuple(Path(k) for k in (os.environ.get(POLICY), key) if k)


def require(key: Path) -> None:
    """Make a key the policy of this process and its children. Raises InputError beside another."""
    policy = os.environ.get(POLICY)
    if policy and Path(policy).resolve() != key.resolve():
        raise InputError(
            "two keys are required at once", f"{key} and {policy} ({POLICY})", "one of them"
        )
    os.environ[POLICY] = str(key.resolve())


def check(folder: Path, manifest: bytes, signature: bytes, key: Path) -> None:
    """signature: b"" where there is none. Raises InputError unless the key signed these bytes."""
    public = _public_key(key)
    if not signature:
        raise InputError(
            f"artifact {folder} is not signed", f"no {FILE}", f"a signature by {key}",
            "Do not run it; get the signed artifact.",
        )  # fmt: skip
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(signature, manifest)
    except InvalidSignature:
        raise InputError(
            f"the signature of artifact {folder} does not fit",
            "another key's, or that of another manifest", f"a signature by {key}", "Do not run it.",
        ) from None  # fmt: skip


def sign(folder: Path, manifest: bytes, key: Path) -> Path:
    """Sign the manifest's bytes; a signature that was there is replaced. Raises InputError."""
    signature, place = _private_key(key).sign(manifest), folder / FILE
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{folder.name}.", dir=folder.parent)
        with open(descriptor, "wb") as file:
            file.write(signature)
        os.chmod(aside, 0o644)
        os.replace(aside, place)
    except OSError as error:
        raise InputError(f"cannot write {place}", error.strerror) from error
    return place


def keygen(path: Path) -> Path:
    """Write a new private key that its owner alone may read, and beside it the public one.

    Returns the public one's path. Raises InputError where one of them exists.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private, pem = Ed25519PrivateKey.generate(), form.Encoding.PEM
    public = path.with_name(path.name + ".pub")
    files = {
        path: private.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption()),
        public: private.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo),
    }
    for place, content in files.items():
        try:
            mode = 0o600 if place == path else 0o644
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            raise InputError(
                f"cannot write the key {place}", error.strerror, None, "Choose a new name."
            ) from error
    return public


def _public_key(path: Path) -> Ed25519PublicKey:
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the public key {path}", error, "a PEM file") from error
    if not isinstance(found, Ed25519PublicKey):
        raise InputError(f"kind of key in {path}", type(found).__name__, "ed25519")
    return found


def _private_key(path: Path) -> Ed25519PrivateKey:
    _need_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        found = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"cannot read the private key {path}", error, "a PEM file without a password"
        ) from error
    if not isinstance(found, Ed25519PrivateKey):
        raise InputError(f"kind of key in {path}", type(found).__name__, "ed25519")
    return found


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography", error, None,
            "Run: pip install 'hwmpq[sign]'",
        ) from error  # fmt: skip
