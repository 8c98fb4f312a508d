"""What the doctor says of the tokens of tenants' callers: those that are refused by now, and those that soon are."""

from __future__ import annotations

from collections.abc import Iterator

from meterlib.cli.doctor_findings import Finding, ok, warning
from meterlib.config import Config
from meterlib.settings import tokens_of

SOON_S = 14 * 86_400


def examine(config: Config, wall_s: float) -> Iterator[Finding]:
    """Each token that has expired, or does within two weeks; tokens are named as reports name them, by `key`."""
    found = []
    total = 0
    for tenant in config.tenant:
        for token in tokens_of(tenant):
            total += 1
            if token.expires is None or token.expires.timestamp() - wall_s > SOON_S:
                continue
            over = token.expires.timestamp() <= wall_s
            check = f"token {token.hash[7:15]}"
            told = f"of {tenant.name}, {'has expired' if over else 'expires'} at {token.expires}"
            advice = (
                "take it out of [[tenant]] tokens" if over else "make another one: meterlib token new --expires 90d"
            )
            found.append(warning(check, told, advice))
    if total and not found:
        yield ok("tokens", f"{total}; none expires within {SOON_S // 86_400} days")
    yield from found
