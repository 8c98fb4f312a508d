"""Who calls: from the credentials of a request to a tenant, and to the key that goes to the provider in their place."""

from __future__ import annotations

import hmac
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from meterlib.core.policy import Funding, fits
from meterlib.errors import PolicyError
from meterlib.gateway.answers import Refusal
from meterlib.gateway.headers import Headers, values_of
from meterlib.gateway.tokens import TOKEN_PREFIX, hash_of
from meterlib.settings import GatewaySettings, TenantSettings, check_tenants, tokens_of
from meterlib.store.telling import Log

log = Log("meterlib.gateway")

CREDENTIAL_BYTES_MAX = 4096
KEY_FILE_BYTES_MAX = 1024
_KEY_BYTES = 32
_LOOKED_UP = len("sha256:") + 16
"""A token is found by the first digits of its hash, and then compared in full, in a time that tells nothing."""


class Secret(str):
    """Text that no log, traceback or error shows by accident."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'…'"


class Caller:
    """Who a request is charged to, and how it is sent on.

    Attributes:
        tenant: the customer.
        funding: who pays the provider.
        key: a short name of the credential that was shown, which tells nothing of it.
        models: patterns of the models it may use; all, if there are none.
        credential: the header for the provider: its name and its value.
        digest_key: what digests of its prompts are made with, so that nobody can tell a prompt by trying; derived from
            what was shown, it is the same in all gateways. Empty until something was shown.
    """

    __slots__ = ("credential", "digest_key", "funding", "key", "models", "tenant")

    def __init__(
        self,
        tenant: str,
        funding: Funding,
        key: str,
        models: Sequence[str],
        credential: tuple[str, Secret],
        digest_key: bytes = b"",
    ) -> None:
        self.tenant = tenant
        self.funding = funding
        self.key = key
        self.models = models
        self.credential = credential
        self.digest_key = digest_key

    def may_use(self, model: str) -> bool:
        """Whether it may use a model."""
        return not self.models or any(fits(model, pattern) for pattern in self.models)

    def __repr__(self) -> str:
        return f"<Caller {self.tenant!r} {self.funding}>"


class _Token(NamedTuple):
    """A token that is known: its hash, whose it is, and until when, in seconds since 1970 UTC."""

    hash: str
    caller: Caller
    expires_s: float


_NOBODY = "sha256:" + "0" * 64


class _Shown(NamedTuple):
    """One credential of a request: the header it came in, its scheme there, and itself."""

    header: str
    scheme: str
    secret: Secret


class Callers:
    """Everyone who may call.

    Attributes:
        anyone: whether those may call that show no tenant's token, but a provider key of their own.

    Args:
        settings: the gateway's.
        tenants: the tenants, with the hashes of their tokens.
        environment: where the provider's keys are looked up.
        derivation_key: the secret that names of unknown callers are derived with.
        wall_s: the time of day, in seconds since 1970 UTC; tokens expire by it.

    Raises:
        PolicyError: a tenant's settings make no sense, or the key it needs is not in the environment.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        tenants: Sequence[TenantSettings],
        environment: Mapping[str, str],
        derivation_key: bytes,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        check_tenants(tenants)
        self._settings = settings
        self._derivation_key = derivation_key
        self._wall_s = wall_s
        self._known: dict[str, _Token] = {}
        for at, tenant in enumerate(tenants):
            for token in tokens_of(tenant):
                key = _upstream_key(settings, tenant, at, environment)
                models = tenant.models or settings.models
                caller = Caller(tenant.name, tenant.funding, token.hash[7:15], models, ("x-api-key", Secret(key)))
                expires_s = token.expires.timestamp() if token.expires else math.inf
                self._known[token.hash[:_LOOKED_UP]] = _Token(token.hash, caller, expires_s)
        self.anyone = anyone_may_call(settings, tenants)

    def caller_of(self, headers: Headers) -> Caller:
        """Who shows these credentials: `x-api-key` counts before `Authorization`, and a tenant's token before others.

        Raises:
            Refusal: 401; always the same, whatever is wrong, but for who has shown a token that has expired.
        """
        shown = _shown(headers)
        expired = None
        for credential in shown:
            token = self._of_token(credential.secret)
            if token and token.expires_s > self._wall_s():
                token.caller.digest_key = token.caller.digest_key or _digest_key(credential.secret)
                return token.caller
            expired = expired or token
        if expired:
            log.info("token.expired", tenant=expired.caller.tenant, key=expired.caller.key)
            raise Refusal(401, "authentication_error", "this token has expired; another one is needed")
        if self.anyone and shown and not shown[0].secret.startswith(TOKEN_PREFIX):
            return self._of_own_key(shown[0])
        raise Refusal(401, "authentication_error", "invalid x-api-key or Authorization header")

    def _of_token(self, secret: str) -> _Token | None:
        digest = hash_of(secret)
        found = self._known.get(digest[:_LOOKED_UP])
        same = hmac.compare_digest(found.hash if found else _NOBODY, digest)
        return found if same else None

    def _of_own_key(self, shown: _Shown) -> Caller:
        secret = shown.secret.encode("utf-8", "surrogateescape")
        name = hmac.digest(self._derivation_key, secret, "sha256").hex()[:16]
        tenant = self._settings.tenant or f"key-{name}"
        credential = ("x-api-key", shown.secret)
        if shown.scheme == "bearer":
            credential = ("authorization", Secret(f"Bearer {shown.secret}"))
        return Caller(tenant, "own", name[:8], self._settings.models, credential, _digest_key(shown.secret))


def _digest_key(secret: str) -> bytes:
    return hmac.digest(secret.encode("utf-8", "surrogateescape"), b"meterlib prompt", "sha256")


def anyone_may_call(settings: GatewaySettings, tenants: Sequence[TenantSettings]) -> bool:
    """Whether those may call that show no tenant's token, but a provider key of their own."""
    default = "known" if any(tenant.tokens for tenant in tenants) else "anyone"
    return (settings.callers or default) == "anyone"


def _shown(headers: Headers) -> list[_Shown]:
    """The credentials of a request that could be some; a header that is there twice makes all of them worthless."""
    found = []
    for header in ("x-api-key", "authorization"):
        values = values_of(headers, header)
        if len(values) > 1:
            return []
        for value in values:
            scheme, _, secret = ("", "", value) if header == "x-api-key" else value.partition(" ")
            scheme, secret = scheme.lower(), secret.strip()
            is_known = header == "x-api-key" or scheme in ("bearer", "token")
            if is_known and 0 < len(secret) <= CREDENTIAL_BYTES_MAX and secret.isascii() and secret.isprintable():
                found.append(_Shown(header, scheme, Secret(secret)))
    return found


def _upstream_key(settings: GatewaySettings, tenant: TenantSettings, at: int, environment: Mapping[str, str]) -> str:
    name = tenant.upstream_key_env or settings.upstream_key_env
    key = environment.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        path = f"tenant[{at}].upstream_key_env" if tenant.upstream_key_env else "gateway.upstream_key_env"
        raise PolicyError(path, f"the environment has no variable {name} with the provider's key of {tenant.name!r}")
    return key


def read_or_make_key(path: Path) -> bytes:
    """The key that names of unknown callers are derived with; made on first use, so that the names stay the same.

    Raises:
        PolicyError: the file cannot be read or made, or is no such key.
    """
    try:
        if not path.exists():
            _make_key(path)
        with path.open("rb") as file:
            key = bytes.fromhex(file.read(KEY_FILE_BYTES_MAX).decode())
    except OSError as error:
        raise PolicyError("gateway.key_file", f"{path} cannot be used: {error.strerror}") from None
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise PolicyError("gateway.key_file", f"{path} holds no key; remove it, and names of unknown callers change")
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with_key = path.with_name(f"{path.name}.{os.getpid()}")
    with_key.unlink(missing_ok=True)
    descriptor = os.open(with_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(with_key, path)  # which fails if the file is there, so that all processes have the same key
    finally:
        with_key.unlink()
