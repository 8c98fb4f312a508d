"""The house rules that nobody has to remember: which way imports point, and that nothing is written twice."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import meterlib
from meterlib.core import rules
from meterlib.store import scripts

ROOT = Path(meterlib.__file__).parent
LUA = scripts.lua_folder()
VERBS = sorted(path.stem for path in LUA.glob("*.lua"))

MAY_IMPORT = {
    "core": {"core", "errors"},
    "store": {"core", "errors", "store"},
    "waiting": {"errors", "store"},
    "local": {"core", "errors", "meter", "store"},
    "meter": {"core", "errors", "local", "store", "waiting"},
    "testing": {"core", "errors", "meter"},
    "settings": {"core", "errors"},
    "config": {"core", "errors", "meter", "settings", "store"},
    "billing": {"billing", "core", "errors", "store"},
    "gateway": {"config", "core", "errors", "gateway", "meter", "settings", "store"},
    "demo": {"billing", "core", "demo", "errors", "gateway", "meter", "store"},
    "cli": {"billing", "cli", "config", "core", "demo", "errors", "gateway", "settings", "store", "testing"},
}
EXCEPTIONS = {
    # Policy.load is where who has a policy in hand looks for it; the settings are read when it is called.
    "core/policy.py": {"config"},
    # Budgets in dollars: what a call costs is told before it is sent. Loaded only where a limit counts that.
    "gateway/assembly.py": {"billing"},
}
IMPURE = {"asyncio", "datetime.now", "os", "random", "redis", "secrets", "socket", "subprocess", "threading", "time"}


def modules() -> list[tuple[str, ast.Module]]:
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in sorted(ROOT.rglob("*.py"))]


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_one_way() -> None:
    """Whoever reads the core need not know the store, and whoever reads the store need not know its users."""
    for name, tree in modules():
        part = name.split("/")[0].removesuffix(".py")
        if part not in MAY_IMPORT:
            continue
        parts = {module.split(".")[1] for module in imported(tree) if module.startswith("meterlib.")}
        parts = {module for module in parts if module.islower()}  # `from meterlib import Meter` is anybody's
        allowed = MAY_IMPORT[part] | EXCEPTIONS.get(name, set())

        assert parts <= allowed, f"{name} imports {sorted(parts - allowed)}"


def test_each_exception_to_that_is_needed() -> None:
    """An exception that nobody takes is taken away, and none is wider than one edge."""
    trees = dict(modules())
    for name, parts in EXCEPTIONS.items():
        top = {node.module for node in trees[name].body if isinstance(node, ast.ImportFrom)}
        for part in parts:
            assert any(_is_of(module, part) for module in imported(trees[name])), f"{name} does not import {part}"
            assert not any(_is_of(str(module), part) for module in top), f"{name} imports {part} when it is imported"


def _is_of(module: str, part: str) -> bool:
    return module == f"meterlib.{part}" or module.startswith(f"meterlib.{part}.")


def test_the_gateway_knows_of_billing_only_what_calls_cost() -> None:
    """Nothing that exports, rates or reports is on a call's way."""
    for name, tree in modules():
        if name.startswith("gateway/"):
            known = {module for module in imported(tree) if module.startswith("meterlib.billing.")}
            allowed = {"meterlib.billing.rating.budget", "meterlib.billing.prices.pricing"}
            folders = {module.rpartition(".")[0] for module in allowed}  # as `from … import` names them, too

            assert known <= allowed | folders, f"{name} imports {sorted(known)}"


def test_the_core_is_pure() -> None:
    """No clock, no I/O, no randomness and no redis in the core."""
    for name, tree in modules():
        if name.startswith("core/"):
            roots = {module.split(".")[0] for module in imported(tree)}

            assert not roots & IMPURE, f"{name} imports {sorted(roots & IMPURE)}"


def test_only_the_store_knows_redis() -> None:
    """Another client library or another store would be one folder's matter."""
    for name, tree in modules():
        if not name.startswith(("store/", "cli/doctor", "demo/")):
            assert "redis" not in {module.split(".")[0] for module in imported(tree)}, name


def test_sync_and_async_faces_have_the_same_verbs() -> None:
    """Who knows Meter knows AsyncMeter."""
    for plain, awaited in [
        (meterlib.Meter, meterlib.AsyncMeter),
        (meterlib.Reservation, meterlib.AsyncReservation),
    ]:
        for name, method in inspect.getmembers(plain, inspect.isfunction):
            if name.startswith("_") or name == "close":
                continue
            twin = getattr(awaited, name)

            assert list(inspect.signature(method).parameters.values()) == list(
                inspect.signature(twin).parameters.values()
            ), name


@pytest.mark.parametrize("verb", VERBS)
def test_every_script_is_called_by_the_names_in_its_header(verb: str) -> None:
    """A wrong or missing name fails before the store is touched."""
    text = scripts.expand(verb)
    scripts.check_contract(verb, text)
    binding = next(iter(scripts.bindings(text)))[2]

    with pytest.raises(scripts.ContractError, match=binding):
        scripts.check_contract(verb, re.sub(rf"local {binding}( +)=", r"local wrong_name\1=", text, count=1))


@pytest.mark.parametrize("verb", VERBS)
def test_every_value_that_a_script_takes_is_named_in_its_header(verb: str) -> None:
    """Values come packed, one behind the other: a name out of place would be another value."""
    text = scripts.expand(verb)
    wrong = [
        re.sub(rf"^(local|--  ) {name} ", r"\1 wrong_name ", text, count=1, flags=re.MULTILINE)
        for _, _, name in scripts.bindings(text)
    ]
    for taking in re.findall(
        r"local [a-z]\w*, [a-z][\w,\s]*= from_bytes\((?:CALL|OPERATION|LIMIT|PAYLOAD|UNIT|RENUMBERED),", text
    ):
        first, second = re.findall(r"\w+", taking)[1:3]
        wrong.append(text.replace(taking, taking.replace(f"local {first}, {second}", f"local {second}, {first}")))

    assert len(wrong) > 5
    for changed in wrong:
        assert changed != text
        with pytest.raises(scripts.ContractError):
            scripts.check_contract(verb, changed)


@pytest.mark.parametrize("verb", VERBS)
def test_every_script_has_a_twin_of_its_name(verb: str) -> None:
    """Each rule can be read in Python."""
    assert callable(getattr(rules, verb))


@pytest.mark.parametrize("path", sorted(LUA.rglob("*.lua")), ids=lambda path: path.name)
def test_scripts_keep_off_what_differs_between_servers(path: Path) -> None:
    """Numbers are formatted whole, keys are declared, and nothing is used that fakeredis or Redis 7.0 lack."""
    text = path.read_text()

    assert text.startswith((f"-- {path.stem}", f"-- {path.name}"))
    assert not re.search(r"cjson|cmsgpack|bit\.|sha1hex|tostring|KEYS\[[^1-5]", text)
    assert set(re.findall(r"\bstruct\.(\w+)", text)) <= {"pack", "unpack"}
    assert all(re.fullmatch(r">[sd]+", form) for form in re.findall(r"'([<>=!][^']*)'", text)), "beyond the stand-in"
    assert not re.search(r"'(GET|SET|HSET|HGET|ZADD|XADD)', *'", text), "a key by name"
    assert max(len(line) for line in text.splitlines()) <= 120


def test_no_function_outgrows_a_screen() -> None:
    """Functions can be read without scrolling."""
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]

                assert lines <= 60, f"{name}: {node.name} has {lines} lines"


def test_every_module_opens_with_a_sentence() -> None:
    """What a file holds is said in its first line."""
    for name, tree in modules():
        assert ast.get_docstring(tree), name
