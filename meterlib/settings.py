"""What `meterlib.toml` says of gateway, tenants and billing: where it listens, who may call, where it exports to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from meterlib.core.checks import ATTRIBUTES_MAX, check_attributes, check_tenant, shown
from meterlib.core.money import fraction_of
from meterlib.core.periods import zone
from meterlib.core.policy import Tenant
from meterlib.errors import InvalidInput, PolicyError

TOKEN_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADER_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")
_DOTS = re.compile(r"(^|/)\.{1,2}(/|$)")
_PORT = re.compile(r"[0-9]{1,5}")
_SCHEMA = re.compile(r"(?!pg_)[a-z][a-z0-9_]{0,62}")
_WORD = re.compile(r"[!-+\--~]{1,256}")
_ATTRIBUTE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
_OWN_ATTRIBUTES = ("provider", "model", "key")

SEGMENT_ENTRIES_MAX = 1_000_000

CLAUDE_CODE_ATTRIBUTES = {
    "session": "x-claude-code-session-id",
    "agent": "x-claude-code-agent-id",
    "parent_agent": "x-claude-code-parent-agent-id",
}


class TokenSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token of a tenant's callers, in `tokens`; one that never expires may be just its hash there.

    Attributes:
        hash: of the token, as `meterlib token new` prints it.
        expires: from when on it is refused, such as `2027-01-31T00:00:00Z`; never by default.
    """

    hash: str
    expires: datetime | None = None


class TenantSettings(Tenant, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table `[[tenant]]`: a customer's limits, and who calls on its behalf.

    Attributes:
        tokens: hashes of the tokens that its callers show, as `meterlib token new` prints them, or tables of a hash
            and when it expires.
        upstream_key_env: the environment variable with the provider's key for its calls; by default the gateway's.
        models: names or patterns with `*` of the models it may use; by default those of the gateway.
        discount: off the list price of its hosted calls, such as `"10%"`; by default that of `[billing]`.
        markup: on what the discount left; by default that of `[billing]`.
        platform_fee: on the list price of calls with its own key; by default that of `[billing]`.
    """

    tokens: Sequence[str | TokenSettings] = ()
    upstream_key_env: str | None = None
    models: Sequence[str] = ()
    discount: str | None = None
    markup: str | None = None
    platform_fee: str | None = None


class BillingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[billing]`: where the ledger is exported to, and at what prices usage is rated.

    Attributes:
        archive: the folder of the archive; in a file, a relative one is meant from where the file is.
        segment_entries: how many entries of a shard make one file of the archive; another number holds from then on.
        postgres: a PostgreSQL database to export to as well, `postgresql://user@host:5432/name`, without a password.
        postgres_env: the environment variable with that URL, in its stead; it may hold a password.
        postgres_schema: the schema that everything is in there.
        book: a file with prices of one's own, which go before all others; `meterlib prices import` writes it.
        fallback: where prices are looked up that neither that book nor the one that comes with meterlib has:
            `genai-prices`, if it is installed, or `none`.
        discount: off the list price of hosted calls, such as `"10%"`, for tenants that have none of their own.
        markup: on what the discount left.
        platform_fee: on the list price of calls with a tenant's own key.
        upstream_discount: off the list price, of what the provider takes from you.
        budget_basis: what limits over `cost_nanousd` count: `list` prices, or what is `billed`. By default what is
            billed for hosted calls, and list prices for those with a tenant's own key, which is what they cost it.
        unpriced: what becomes of a call that such a limit cannot count, since its model has no price: `deny`, or
            `allow` it to pass uncounted.
        tz: IANA name of the zone that billing periods are months of.
        issuer: your name, as invoices and FOCUS files say it; these files need one.
    """

    archive: str = "meterlib-archive"
    segment_entries: int = 50_000
    postgres: str | None = None
    postgres_env: str | None = None
    postgres_schema: str = "meterlib"
    book: str | None = None
    fallback: Literal["genai-prices", "none"] = "genai-prices"
    discount: str = "0%"
    markup: str = "0%"
    platform_fee: str = "0%"
    upstream_discount: str = "0%"
    budget_basis: Literal["list", "billed"] | None = None
    unpriced: Literal["deny", "allow"] = "deny"
    tz: str = "UTC"
    issuer: str | None = None

    def __post_init__(self) -> None:
        _check_zone(self.tz, "billing.tz")
        if self.issuer is not None and not (isinstance(self.issuer, str) and self.issuer.strip()):
            raise PolicyError("billing.issuer", "the name of who issues invoices is needed; leave it out for none")
        if not isinstance(self.archive, str) or not self.archive.strip():
            raise PolicyError("billing.archive", "the name of a folder is needed")
        if type(self.segment_entries) is not int or not 1 <= self.segment_entries <= SEGMENT_ENTRIES_MAX:
            problem = f"1 to {SEGMENT_ENTRIES_MAX} are allowed, not {shown(self.segment_entries)}"
            raise PolicyError("billing.segment_entries", problem)
        _check_postgres(self)
        if self.book is not None and not str(self.book).strip():
            raise PolicyError("billing.book", "the name of a file is needed; leave the setting out for none")
        if self.fallback not in ("genai-prices", "none"):
            raise PolicyError("billing.fallback", f"{shown(self.fallback)} is not one of genai-prices, none")
        if self.budget_basis not in ("list", "billed", None):
            raise PolicyError("billing.budget_basis", f"{shown(self.budget_basis)} is not one of list, billed")
        if self.unpriced not in ("deny", "allow"):
            raise PolicyError("billing.unpriced", f"{shown(self.unpriced)} is not one of deny, allow")
        for name in (*_TERMS, "upstream_discount"):
            _check_percent(getattr(self, name), f"billing.{name}", name)


def _check_postgres(settings: BillingSettings) -> None:
    """The URL is not repeated, since it may hold a password."""
    if settings.postgres is not None:
        if settings.postgres_env is not None:
            raise PolicyError("billing.postgres_env", "names a second place; leave out this or billing.postgres")
        try:
            parts = urlsplit(settings.postgres)
            fits, secret = parts.scheme in ("postgresql", "postgres"), parts.password or "password" in parts.query
        except ValueError:
            fits, secret = False, None
        if not fits:
            raise PolicyError("billing.postgres", "is no URL such as 'postgresql://user@host:5432/name'")
        if secret:
            problem = "holds a password, which does not belong into settings: name a variable with the URL in"
            raise PolicyError("billing.postgres", f"{problem} billing.postgres_env, or use ~/.pgpass")
    if settings.postgres_env is not None:
        _check_environment_name(settings.postgres_env, "billing.postgres_env")
    if not isinstance(settings.postgres_schema, str) or not _SCHEMA.fullmatch(settings.postgres_schema):
        problem = f"{shown(settings.postgres_schema)} is no name of a schema: a-z, 0-9 and _, a letter first"
        raise PolicyError("billing.postgres_schema", problem)


_TERMS = ("discount", "markup", "platform_fee")


def _check_zone(tz: object, path: str) -> None:
    try:
        zone(str(tz))
    except (OSError, ValueError, KeyError):
        problem = f"{shown(tz)} is no IANA time zone, such as 'Europe/Berlin'"
        raise PolicyError(path, problem) from None


def _check_percent(percent: str, path: str, name: str) -> None:
    try:
        fraction = fraction_of(percent)
    except ValueError as error:
        raise PolicyError(path, str(error)) from None
    if fraction > 1 and name.endswith("discount"):
        raise PolicyError(path, f"a discount is at most 100%, not {shown(percent)}")


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[gateway]`; each setting has a default that serves one developer on one machine.

    Attributes:
        listen: `host:port` to listen at.
        base_path: what all paths begin with, such as `/v3/ai/anthropic`.
        upstream: the provider's base URL. Calls go nowhere else, whatever they say. Its certificate is checked against
            the system's authorities, or those that the environment variable SSL_CERT_FILE names.
        upstream_key_env: the environment variable with the provider's key for hosted tenants.
        provider: the value of the attribute `provider`.
        callers: `known`: only tenants' tokens are let in. `anyone`: other credentials are taken for the caller's own
            provider key and passed on, metered under a name derived from it. By default `known` once any tenant has a
            token.
        tenant: one name for all callers whose credential is no token, in place of one for each credential.
        key_file: where the key is kept that those names are derived with; made on first use. By default it is in the
            embedded store's folder, or else `meterlib-gateway.key` in the folder that the gateway runs in. Gateways
            that share a store need the same one, or else a caller has another name at each.
        attributes: further attributes of calls, each with the header that tells it; by default Claude Code's `session`,
            `agent`, and the `parent_agent` of an agent that another one has begun.
        models: names or patterns with `*` of the models that may be used; all by default.
        betas: the values of `anthropic-beta` that are passed on, the others being dropped; all by default. A body that
            uses what was dropped is refused by the provider: callers of Claude Code then need
            `CLAUDE_CODE_DISABLE_EXPERIMENTAL_BETAS=1`.
        ratelimit_headers: whose numbers a caller with its own provider key sees: `ours`, or `upstream` where no limit
            of ours says anything.
        count_invalid_requests: whether a call whose body makes no sense counts as a request.
        count_tokens_per_minute: how many calls of `count_tokens` a tenant may make in any minute, in each process.
        on_disconnect: what happens to an answer whose reader left. `drain`: it is read to its end, so that the numbers
            are the provider's; `cancel`: it is given up, and what was seen of it counts. By default `drain` for hosted
            tenants and `cancel` for callers with their own key.
        drain_ms: how long an answer without reader is read on.
        shutdown_ms: how long open answers may go on when the gateway is stopped.
        lease_ms: how long a call may stay unsettled when a gateway dies; running calls are prolonged.
        body_bytes_max: the largest request, and the largest it may become when decompressed.
        body_timeout_ms: within which time a request has to be there.
        keepalive_ms: how long a connection may be without a complete request head.
        write_timeout_ms: how long a client may take to read nothing of what waits for it.
        ping_after_ms: after which silence of the provider a stream is kept alive by a ping; 0 for never.
        connections_max: how many clients may be connected at once.
        connections_per_address_max: how many of them from one address (of IPv6, from one network of 64 bits), so that
            nobody takes all places. Behind a proxy of yours, which all clients come from, let it be `connections_max`.
        upstream_connect_timeout_ms: within which time the provider has to be reached.
        upstream_idle_timeout_ms: how long the provider may be silent.
        upstream_timeout_ms: how long a call may take altogether.
    """

    listen: str = "127.0.0.1:8787"
    base_path: str = ""
    upstream: str = "https://api.anthropic.com"
    upstream_key_env: str = "ANTHROPIC_API_KEY"
    provider: str = "anthropic"
    callers: Literal["known", "anyone"] | None = None
    tenant: str | None = None
    key_file: str | None = None
    attributes: Mapping[str, str] = msgspec.field(default_factory=lambda: dict(CLAUDE_CODE_ATTRIBUTES))
    models: Sequence[str] = ()
    betas: Sequence[str] | None = None
    ratelimit_headers: Literal["ours", "upstream"] = "upstream"
    count_invalid_requests: bool = True
    count_tokens_per_minute: int = 2_000
    on_disconnect: Literal["drain", "cancel"] | None = None
    drain_ms: int = 60_000
    shutdown_ms: int = 30_000
    lease_ms: int = 600_000
    body_bytes_max: int = 32 << 20
    body_timeout_ms: int = 120_000
    keepalive_ms: int = 75_000
    write_timeout_ms: int = 60_000
    ping_after_ms: int = 15_000
    connections_max: int = 10_000
    connections_per_address_max: int = 2_500
    upstream_connect_timeout_ms: int = 5_000
    upstream_idle_timeout_ms: int = 600_000
    upstream_timeout_ms: int = 3_600_000

    def __post_init__(self) -> None:
        for name in ("listen", "base_path", "upstream", "upstream_key_env", "provider"):
            if not isinstance(getattr(self, name), str):
                raise PolicyError(f"gateway.{name}", f"text is needed, not {type(getattr(self, name)).__name__}")
        _check_listen(self.listen)
        _check_upstream(self.upstream)
        if not _PATH.fullmatch(self.base_path) or _DOTS.search(self.base_path):
            raise PolicyError("gateway.base_path", f"{self.base_path!r:.60} is no path such as '/v3/ai/anthropic'")
        _check_environment_name(self.upstream_key_env, "gateway.upstream_key_env")
        _check_names(self)
        _check_attributes(self.attributes)
        _check_patterns(self.models, "gateway.models")
        if self.betas is not None:
            _check_patterns(self.betas, "gateway.betas")
        for name, words in _CHOICES.items():
            if getattr(self, name) not in words:
                told = ", ".join(word for word in words if word)
                raise PolicyError(f"gateway.{name}", f"{shown(getattr(self, name))} is not one of {told}")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise PolicyError(f"gateway.{name}", f"{least} to {most} are allowed, not {shown(value)}")
        if type(self.count_invalid_requests) is not bool:
            raise PolicyError("gateway.count_invalid_requests", "true or false is needed")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen at."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


_DAY_MS = 86_400_000
_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "callers": ("known", "anyone", None),
    "ratelimit_headers": ("ours", "upstream"),
    "on_disconnect": ("drain", "cancel", None),
}
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "count_tokens_per_minute": (0, 1_000_000),
    "drain_ms": (0, _DAY_MS),
    "shutdown_ms": (0, _DAY_MS),
    "lease_ms": (1_000, _DAY_MS),
    "body_bytes_max": (1, 1 << 30),
    "body_timeout_ms": (1, _DAY_MS),
    "keepalive_ms": (1, _DAY_MS),
    "write_timeout_ms": (1, _DAY_MS),
    "ping_after_ms": (0, _DAY_MS),
    "connections_max": (1, 1_000_000),
    "connections_per_address_max": (1, 1_000_000),
    "upstream_connect_timeout_ms": (1, _DAY_MS),
    "upstream_idle_timeout_ms": (1, _DAY_MS),
    "upstream_timeout_ms": (1, _DAY_MS),
}


def tokens_of(tenant: TenantSettings) -> list[TokenSettings]:
    """The tokens of a tenant's callers, those that are just hashes too."""
    return [token if isinstance(token, TokenSettings) else TokenSettings(hash=token) for token in tenant.tokens]


def check_tenants(tenants: Sequence[TenantSettings]) -> None:
    """Pass if the tenants' tokens, keys and models make sense, and no token is two tenants'.

    Raises:
        PolicyError: with the path of the setting; it never repeats what was found, which may be a secret.
    """
    owners: dict[str, int] = {}
    for at, tenant in enumerate(tenants):
        path = f"tenant[{at}]"
        for position, token in enumerate(tokens_of(tenant)):
            _check_token(token, f"{path}.tokens[{position}]")
            if token.hash in owners:
                raise PolicyError(f"{path}.tokens[{position}]", f"is a token of tenant[{owners[token.hash]}] already")
            owners[token.hash] = at
        for name in _TERMS:
            if getattr(tenant, name) is not None:
                _check_percent(getattr(tenant, name), f"{path}.{name}", name)
        _check_patterns(tenant.models, f"{path}.models")
        if tenant.upstream_key_env is not None:
            _check_environment_name(tenant.upstream_key_env, f"{path}.upstream_key_env")
        elif tenant.funding == "own" and tenant.tokens:
            problem = "is missing: a tenant with tokens and funding = 'own' needs its own provider key"
            raise PolicyError(f"{path}.upstream_key_env", problem)


def _check_token(token: TokenSettings, path: str) -> None:
    if not isinstance(token.hash, str) or not TOKEN_HASH.fullmatch(token.hash):
        problem = "is no hash of a token: sha256: and 64 hexadecimal digits, as `meterlib token new` prints it"
        raise PolicyError(path, problem)
    if token.expires is not None and not (isinstance(token.expires, datetime) and token.expires.tzinfo):
        problem = "a time with its offset from UTC is needed, such as 2027-01-31T00:00:00Z"
        raise PolicyError(f"{path}.expires", problem)


def _check_listen(listen: str) -> None:
    host, _, port = listen.rpartition(":")
    if not host or not _PORT.fullmatch(port) or int(port) > 65_535:
        raise PolicyError("gateway.listen", f"{listen!r:.60} is no host:port, such as '127.0.0.1:8787'")


def _check_upstream(upstream: str) -> None:
    """The URL is not repeated, since it may hold a password."""
    try:
        parts = urlsplit(upstream)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    path = parts.path.rstrip("/") if fits else ".."
    if _DOTS.search(path) or not _PATH.fullmatch(path) or "@" in upstream or "?" in upstream or "#" in upstream:
        problem = "is no base URL such as 'https://api.anthropic.com': http or https, a host, perhaps a port and a path"
        raise PolicyError("gateway.upstream", problem)


def _check_environment_name(name: str, path: str) -> None:
    if not _ENVIRONMENT_NAME.fullmatch(name):
        problem = "is no name of an environment variable; keys themselves do not belong into settings"
        raise PolicyError(path, problem)


def _check_names(settings: GatewaySettings) -> None:
    """What names calls in the store must be fit for it, or else every call would fail."""
    try:
        check_attributes({"provider": settings.provider}, "gateway")
    except InvalidInput as error:
        raise PolicyError("gateway.provider", str(error).partition(": ")[2]) from None
    try:
        if settings.tenant is not None:
            check_tenant(settings.tenant)
    except InvalidInput as error:
        raise PolicyError("gateway.tenant", str(error).partition(": ")[2]) from None
    if settings.key_file is not None and not str(settings.key_file).strip():
        raise PolicyError("gateway.key_file", "the name of a file is needed; leave the setting out for the usual one")


def _check_patterns(patterns: object, path: str) -> None:
    if isinstance(patterns, str) or not isinstance(patterns, Sequence):
        raise PolicyError(path, "a list of texts is needed")
    for at, pattern in enumerate(patterns):
        if not isinstance(pattern, str) or not _WORD.fullmatch(pattern):
            raise PolicyError(f"{path}[{at}]", "is no name: 1 to 256 printable ASCII characters without space or comma")


def _check_attributes(attributes: object) -> None:
    if not isinstance(attributes, Mapping):
        raise PolicyError("gateway.attributes", "a table of names and headers is needed")
    most = ATTRIBUTES_MAX - len(_OWN_ATTRIBUTES)
    if len(attributes) > most:
        raise PolicyError("gateway.attributes", f"at most {most}, not {len(attributes)}")
    for name, header in attributes.items():
        if not isinstance(name, str) or not isinstance(header, str):
            raise PolicyError("gateway.attributes", "a table of names and headers is needed")
        _check_attribute(name, header)


def _check_attribute(name: str, header: str) -> None:
    path = f"gateway.attributes.{name:.64}"
    if not _ATTRIBUTE_NAME.fullmatch(name) or name == "tenant" or name in _OWN_ATTRIBUTES:
        raise PolicyError(path, f"is no name for a further attribute (taken: tenant, {', '.join(_OWN_ATTRIBUTES)})")
    if not _HEADER_NAME.fullmatch(header):
        raise PolicyError(path, f"{header!r:.60} is no name of a header")
    if header.lower() in ("authorization", "x-api-key", "cookie", "proxy-authorization"):
        raise PolicyError(path, f"{header!r} holds a credential, which must never reach the store")
