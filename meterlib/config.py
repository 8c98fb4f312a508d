"""`meterlib.toml`: every setting with its default, read once and checked in full, so that nothing is wrong later."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import msgspec
from msgspec import inspect

from meterlib.core.policy import Limit, Policy, Tenant, nearest
from meterlib.errors import InvalidInput, PolicyError
from meterlib.meter import AsyncMeter, Meter
from meterlib.settings import BillingSettings, GatewaySettings, TenantSettings, check_tenants
from meterlib.store.connect import check_url
from meterlib.store.embedded import parse_embedded_url
from meterlib.store.options import Clock, StoreOptions

FILE_NAME = "meterlib.toml"
FILE_BYTES_MAX = 1 << 20
DEFAULT_URL = "embedded://./meterlib-data"
GATEWAY_JOURNAL = "meterlib-settlements.journal"

SWEEP_INTERVAL_MS_MAX = 3_600_000


class StoreSettings(StoreOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[store]`: where limits and ledger are kept, and how; the rest is as in `StoreOptions`.

    Attributes:
        url: as `Meter.connect` takes it; in a file, `embedded://./folder` is meant from where the file is.
        when_down: what a reserve does while the store is down: `deny`, or `allow` it to pass unmetered.
        journal: a local file for settlements that the store cannot take; none by default.
        sweep_interval_ms: within which time the background sweep has looked at every shard; 0 for never.
    """

    url: str = DEFAULT_URL
    when_down: Literal["deny", "allow"] = "deny"
    journal: str | None = None
    sweep_interval_ms: int = 10_000

    @property
    def options(self) -> StoreOptions:
        """The part of the settings that says how a store is used."""
        return StoreOptions(**{name: getattr(self, name) for name in StoreOptions.__struct_fields__})


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of one `meterlib.toml`.

    Attributes:
        store: the table `[store]`.
        preset: the name of a policy whose limits come first; see `Policy.preset`.
        limit: the tables `[[limit]]`.
        tenant: the tables `[[tenant]]`.
        gateway: the table `[gateway]`.
        billing: the table `[billing]`.

    Raises:
        PolicyError: with the path of the setting, what was found, and what is allowed.
    """

    store: StoreSettings = StoreSettings()
    gateway: GatewaySettings = GatewaySettings()
    billing: BillingSettings = BillingSettings()
    preset: str | None = None
    limit: list[Limit] = []
    tenant: list[TenantSettings] = []

    def __post_init__(self) -> None:
        _check_store(self.store)
        check_tenants(self.tenant)
        for at, limit in enumerate(self.policy.limits):
            if limit.shared and self.store.shards != 1:
                path = f"limit[{at - len(self._preset_limits)}].shared"
                raise PolicyError(path, f"needs [store] shards = 1, and there are {self.store.shards}")

    @property
    def policy(self) -> Policy:
        """The limits, the preset's first, and the tenants."""
        own = Policy(limits=tuple(self.limit))  # first alone, so that an error counts the limits as the file does
        taken = {limit.name for limit in self._preset_limits}
        for at, limit in enumerate(own.limits):
            if limit.name in taken:
                problem = f"{limit.name!r} is the name of a limit of the preset {self.preset!r} already"
                raise PolicyError(f"limit[{at}].name", problem)
        tenants = [Tenant(name=told.name, quotas=told.quotas, funding=told.funding) for told in self.tenant]
        return Policy(limits=(*self._preset_limits, *own.limits), tenants=tenants)

    @property
    def gateway_folder(self) -> Path:
        """Where the gateway has its files that no setting names: the embedded store's folder, or that it runs in."""
        url = self.store.url
        return Path(parse_embedded_url(url)) if url.startswith("embedded://") else Path()

    @property
    def journal(self) -> str | None:
        """Where settlements may wait on this machine: the file that is named, or else the gateway's, if it is there."""
        usual = self.gateway_folder / GATEWAY_JOURNAL
        return self.store.journal or (str(usual) if usual.exists() else None)

    @property
    def _preset_limits(self) -> Sequence[Limit]:
        return Policy.preset(self.preset).limits if self.preset is not None else ()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Config:
        """The settings of a file.

        Relative places in it (`embedded://./…`, journal, archive, key file, book) are meant from the file's folder.

        Raises:
            PolicyError: the file cannot be read, is no TOML (with the line), or a setting is not acceptable (with its
                path: `limit[0].window`).
        """
        file = Path(path)
        data = _parsed(file)
        try:
            _check(data, inspect.type_info(cls), "")
            config = msgspec.convert(data, cls)
        except (PolicyError, msgspec.ValidationError) as error:
            raise _placed(error, file) from None
        folder = file.absolute().parent
        store = _from_folder(config.store, folder)
        key_file = config.gateway.key_file and os.path.normpath(folder / Path(config.gateway.key_file).expanduser())
        gateway = msgspec.structs.replace(config.gateway, key_file=key_file)
        book = config.billing.book and os.path.normpath(folder / Path(config.billing.book).expanduser())
        archive = os.path.normpath(folder / Path(config.billing.archive).expanduser())
        billing = msgspec.structs.replace(config.billing, book=book, archive=archive)
        return msgspec.structs.replace(config, store=store, gateway=gateway, billing=billing)

    @classmethod
    def find(cls, path: str | os.PathLike[str] | None = None) -> Config:
        """The settings of the file that was named; else of `meterlib.toml` here, if there is one; else the defaults."""
        if path is not None:
            return cls.load(path)
        here = Path(FILE_NAME)
        return cls.load(here) if here.exists() else cls()

    def connect(self, *, clock: Clock | None = None) -> Meter:
        """A meter with these settings; opens nothing before the first call."""
        return Meter.connect(self.store.url, self.policy, clock=clock, **self._arguments())

    def connect_async(self, *, clock: Clock | None = None) -> AsyncMeter:
        """An async meter with these settings; opens nothing before the first call."""
        return AsyncMeter.connect(self.store.url, self.policy, clock=clock, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        return {
            "options": self.store.options,
            "when_down": self.store.when_down,
            "journal": self.store.journal,
            "sweep_interval_ms": self.store.sweep_interval_ms,
        }


def _parsed(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise PolicyError("", f"{file} cannot be read: {error.strerror}") from None
    if len(data) > FILE_BYTES_MAX:
        raise PolicyError("", f"{file} is larger than {FILE_BYTES_MAX} bytes, so it is no settings file")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError("", f"{file}, line {line}: this is no UTF-8 text") from None
    except RecursionError:
        raise PolicyError("", f"{file}: lists or tables are nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyError("", _explained(file, str(error), lines=data.rstrip().count(b"\n") + 1)) from None
    except ValueError:  # the one thing that tomllib leaves to int()
        raise PolicyError("", f"{file}: a number has far too many digits") from None


def _explained(file: Path, error: str, lines: int) -> str:
    """What tomllib says, with the line in front, and clearer where a setting or a table is there twice."""
    problem, _, place = error.partition(" (at ")
    where = place.rstrip(")").replace("end of document", f"line {lines}")
    if "Cannot overwrite" in problem:
        problem = "a setting is given twice"
    elif twice := re.fullmatch(r"Cannot (?:declare|mutate) (?:immutable namespace )?\((.*?),?\)(?: twice)?", problem):
        problem = f"the table [{twice[1].replace(chr(39), '').replace(', ', '.')}] is begun twice"
    return f"{file}, {where}: {problem}"


def _placed(error: Exception, file: Path) -> PolicyError:
    """The error with the file's name in it; msgspec wraps those that a record raises when it is made."""
    cause = error if isinstance(error, PolicyError) else error.__cause__
    path = cause.path if isinstance(cause, PolicyError) else ""
    problem = str(cause or error).removeprefix(f"{path}: ")
    return PolicyError(path, f"{problem} (in {file})")


# ── Whether the data fit the settings ─────────────────────────────────────────────────────────────────────────────────


def _check(value: object, wanted: inspect.Type, path: str) -> None:
    """Hold decoded TOML against the type of a setting; a PolicyError names the innermost place that does not fit."""
    if isinstance(wanted, inspect.UnionType):
        fitting = [kind for kind in wanted.types if _fits(value, kind)]
        if not fitting:
            raise _mismatch(value, wanted, path)
        return _check(value, fitting[0], path)
    if not _fits(value, wanted):
        raise _mismatch(value, wanted, path)
    if isinstance(wanted, inspect.StructType):
        _check_table(value, wanted, path)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            _check(item, wanted.item_type, f"{path}[{at}]")  # type: ignore[attr-defined]
    elif isinstance(wanted, inspect.DictType):
        for name, item in value.items():  # type: ignore[attr-defined]
            _check(item, wanted.value_type, f"{path}.{name}")
    elif isinstance(wanted, inspect.LiteralType) and value not in wanted.values:
        raise _mismatch(value, wanted, path)
    return None


def _check_table(value: Any, wanted: inspect.StructType, path: str) -> None:
    fields = {field.encode_name: field for field in wanted.fields}
    at = f"{path}." if path else ""
    for name in value:
        if name not in fields:
            raise PolicyError(f"{at}{name:.80}", f"there is no such setting{nearest(name, list(fields))}")
    for name, field in fields.items():
        if name in value:
            _check(value[name], field.type, at + name)
        elif field.required:
            raise PolicyError(at + name, f"is missing; {_words(field.type)} is needed")


_NATIVE: dict[type[inspect.Type], type] = {
    inspect.StrType: str,
    inspect.LiteralType: str,
    inspect.IntType: int,
    inspect.BoolType: bool,
    inspect.ListType: list,
    inspect.VarTupleType: list,
    inspect.DictType: dict,
    inspect.StructType: dict,
    inspect.DateTimeType: datetime,
}
_WORDS: dict[type, str] = {
    str: "text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
    datetime: "a time such as 2027-01-31T00:00:00Z",
}


def _fits(value: object, wanted: inspect.Type) -> bool:
    return type(value) is _NATIVE.get(type(wanted))


def _words(wanted: inspect.Type) -> str:
    """What is allowed, in words."""
    if isinstance(wanted, inspect.UnionType):
        return " or ".join(_words(kind) for kind in wanted.types if not isinstance(kind, inspect.NoneType))
    if isinstance(wanted, inspect.LiteralType):
        return "one of " + ", ".join(sorted(str(value) for value in wanted.values))
    return _WORDS[_NATIVE[type(wanted)]]


def _mismatch(value: object, wanted: inspect.Type, path: str) -> PolicyError:
    may_be_secret = path in ("store.url", "gateway.upstream") or ".tokens" in path
    hidden = may_be_secret or not isinstance(value, str | int | float)
    found = _WORDS.get(type(value), f"a {type(value).__name__}") if hidden else f"{value!r:.60}"
    if isinstance(value, bool):
        found = str(value).lower()
    problem = f"{_words(wanted)} is needed, not {found}"
    natives = [_NATIVE.get(type(kind)) for kind in getattr(wanted, "types", (wanted,))]
    if isinstance(value, dict) and list in natives:
        problem += f"; begin each with [[{path}]], in two pairs of brackets"
    elif isinstance(value, list) and dict in natives:
        problem += f"; begin it with [{path}], in one pair of brackets"
    elif isinstance(value, str) and list in natives and not hidden:
        problem += f"; write [{value!r:.60}]"
    elif isinstance(value, float) and int in natives and value.is_integer():
        problem += f"; write {int(value)}"
    elif isinstance(value, str) and isinstance(wanted, inspect.LiteralType):
        problem += nearest(value, [str(word) for word in wanted.values]).partition(" (valid")[0]
    return PolicyError(path, problem)


def _check_store(store: StoreSettings) -> None:
    options = store.options  # which look after themselves
    if options.deadline_ms < options.timeout_ms:
        problem = f"{options.deadline_ms} is less than timeout_ms = {options.timeout_ms}: not even one try would fit"
        raise PolicyError("store.deadline_ms", problem)
    if not 0 <= store.sweep_interval_ms <= SWEEP_INTERVAL_MS_MAX:
        problem = f"0 to {SWEEP_INTERVAL_MS_MAX} are allowed, not {store.sweep_interval_ms!r:.40}"
        raise PolicyError("store.sweep_interval_ms", problem)
    if store.journal is not None and not store.journal.strip():
        raise PolicyError("store.journal", "the name of a file is needed; leave the setting out for none")
    try:
        check_url(store.url)
    except InvalidInput as error:
        raise PolicyError("store.url", str(error).removeprefix("url: ")) from None


def _from_folder(store: StoreSettings, folder: Path) -> StoreSettings:
    """The settings with whatever is relative in them made absolute."""
    url, journal = store.url, store.journal
    if url.startswith("embedded://."):
        url = "embedded://" + quote(os.path.normpath(folder / parse_embedded_url(url)))
    if journal is not None:
        journal = os.path.normpath(folder / Path(journal).expanduser())
    return msgspec.structs.replace(store, url=url, journal=journal)
