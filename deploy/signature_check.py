"""Check of a detached signature of an artifact, and what it shares with `sign`.

Source: OpenSSF Model Signing, https://github.com/sigstore/model-transparency.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.deploy.strict_json import json_object
from errata.errors import ArtifactCorruptError, ArtifactError, first_line

_CURVES = "an elliptic curve key of P-256, P-384 or P-521 in PEM"


def check_signature(root: Path, digests: Mapping[str, str], signature: Path, public_key: Path) -> None:
    """Check that the owner of the key has signed the very files of an artifact.

    `digests` are the SHA-256 of all its files, the manifest's included, by path; that they are plain, and no
    others are there, was checked.

    Raises:
        ArtifactCorruptError: the signature is damaged, or of other files.
        ArtifactError: the key or the signature cannot be read, or `model-signing` is not installed.
    """
    verifying, hashing = library("verifying"), library("hashing")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # the libraries below raise errors of any class
        raise key_refusal(public_key, error, "public") from error
    payload = _payload(signature)
    try:
        config.set_hashing_config(every_file(hashing)).verify(root, signature)
    except Exception as error:  # the libraries below raise errors of any class
        raise _refusal(root, signature, public_key, error, _first_difference(payload, digests)) from error
    if missing := sorted(set(digests) - set(_signed(payload))):  # it may say that it left files out
        raise ArtifactCorruptError(
            f"{signature} does not cover {missing[0]}; sign the artifact with `errata sign`"
        )


def library(part: str) -> Any:
    """Return a module of `model-signing`, an optional package that is slow to import.

    Raises:
        ArtifactError: it, or what it needs, is not installed.
    """
    try:
        import model_signing
    except ImportError as error:
        raise ArtifactError(
            f"signatures need model-signing ({error}); `pip install 'errata[sign]'`"
        ) from error
    return getattr(model_signing, part)


def every_file(hashing: Any) -> Any:
    """Return a configuration that hashes each file as a whole, those that belong to git included."""
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[], ignore_git_paths=False)


def key_refusal(key: Path, error: Exception, kind: str) -> ArtifactError:
    """Return what to say of a key that the libraries refused; `kind` is "private" or "public"."""
    if isinstance(error, OSError):
        return ArtifactError(f"cannot read the key {key}: {error.strerror}; give {_CURVES}")
    reason = first_line(error)
    if isinstance(error, TypeError) and "encrypted" in reason:
        return ArtifactError(f"the key {key} is encrypted; give its password")
    return ArtifactError(f"{key} is not a usable {kind} key: {reason[:200]}; give {_CURVES}")


def _payload(signature: Path) -> dict[str, Any]:
    """Return what the signature vouches for, if it holds.

    Raises:
        ArtifactError: there is no such file.
        ArtifactCorruptError: it is no signature.
    """
    if not signature.is_file():
        raise ArtifactError(f"{signature} is not a file; give the one that `errata sign` wrote")
    try:
        bundle = json_object(signature)
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        if not isinstance(hint, str) or not hint:
            raise TypeError("no key identifier")
        if len(bundle["dsseEnvelope"]["signatures"]) != 1:
            raise TypeError("not one signature")
        payload: dict[str, Any] = json.loads(
            base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)
        )
        payload["predicate"]["resources"][0]["name"]
    except (ArtifactCorruptError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactCorruptError(
            f"{signature} is damaged, or was not written by `errata sign`: {reason}; fetch it again"
        ) from error
    return payload


def _signed(payload: dict[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file that was signed, by path."""
    return {str(resource["name"]): str(resource["digest"]) for resource in payload["predicate"]["resources"]}


def _first_difference(payload: dict[str, Any], digests: Mapping[str, str]) -> str:
    try:
        signed = _signed(payload)
    except (KeyError, TypeError):
        return "an unknown file"
    names = sorted(set(signed) | set(digests))
    return next((name for name in names if signed.get(name) != digests.get(name)), "an unknown file")


def _refusal(
    root: Path, signature: Path, public_key: Path, error: Exception, different: str
) -> ArtifactError:
    reason = " ".join(str(error).split())[:200]
    if reason.startswith("Key mismatch"):
        return ArtifactError(
            f"{signature} was not made with the private key of {public_key}; give its maker's public key, "
            "or do not trust it"
        )
    if reason.startswith("Signature mismatch"):
        return ArtifactCorruptError(
            f"{signature} is of another artifact than {root}: {different[:200]!r} is not the file that was "
            "signed; fetch both again"
        )
    return ArtifactCorruptError(
        f"{signature} is damaged: it is not valid for the key {public_key} "
        f"({reason or type(error).__name__}); fetch it again"
    )
