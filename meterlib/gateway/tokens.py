"""Tokens that tenants' callers show: how they are made, and what is kept of them. Pure but for the random bits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets

TOKEN_PREFIX = "ml_"
_BYTES = 32


def new_token() -> str:
    """A token of 256 random bits that scanners for leaked secrets can recognise: `ml_`, 43 characters, a checksum."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(_BYTES)).decode().rstrip("=")
    return f"{TOKEN_PREFIX}{secret}{binascii.crc32(secret.encode()):08x}"


def hash_of(token: str) -> str:
    """What settings hold in place of a token. Random bits of that number need no slow hash."""
    return f"sha256:{hashlib.sha256(token.encode('utf-8', 'surrogateescape')).hexdigest()}"
