"""Whether rated rows are what the archived entries cost, from the files alone: no store, no settings, no price book.

Of each file the digest, the range and the sums are checked; of each row that its price times its quantity is its cost,
that its customer's price follows from the list price by the terms the file names, and that it is of an entry of the
archive and of all that it used. That is done by rating the entries once more, by the prices and terms that the files
say they were rated by; corrections by those of their calls. Whether those are the provider's, no archive can tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from meterlib.billing import duck
from meterlib.billing.archive.archive import Archive
from meterlib.billing.archive.segments import Segment, VanishedError, digest_of_file
from meterlib.billing.archive.verify import Mark
from meterlib.billing.postings.closes import Close, closes_of, file_of
from meterlib.billing.postings.closing import Closing
from meterlib.billing.postings.pieces import (
    STORED,
    Made,
    RatedFile,
    RatedFiles,
    sums_of,
    terms_by_tenant,
)
from meterlib.billing.postings.posted import Before
from meterlib.billing.postings.postings import Postings
from meterlib.billing.postings.rater import Block, Prices, stage_block
from meterlib.billing.postings.reposts import Repost, reposts_of
from meterlib.billing.prices.pinned import PinnedBooks
from meterlib.billing.prices.prices import PER, PriceBooks
from meterlib.billing.prices.terms import LIST
from meterlib.billing.rating.rated import COSTS
from meterlib.billing.rating.rerating import RERATED_LINES, TAKEN_BACK
from meterlib.errors import IntegrityError


class RatedVerdict(msgspec.Struct, kw_only=True):
    """What was found of rated rows and closes.

    Attributes:
        files: how many files of rated rows were checked.
        rows: how many rows are in them.
        unpriced: how many of those have no price.
        reratings: how many re-ratings were posted.
        closes: the periods that are closed.
        problems: what is wrong; empty if nothing is.
    """

    files: int = 0
    rows: int = 0
    unpriced: int = 0
    reratings: int = 0
    closes: list[str] = []
    problems: list[str] = []


def marks_of(archive: Archive) -> list[Mark]:
    """The links that rated files and closes have of the archive's entries; what cannot be read is told elsewhere."""
    found: list[Mark] = []
    files = RatedFiles(archive)
    for shard in files.shards():
        for file in files.listed(shard):
            try:
                facts = files.facts(file)
            except IntegrityError:
                continue
            problem = f"{file.path}: its rows are of other entries than those up to {shard}:{facts.last} in the archive"
            found.append(Mark(shard=shard, epoch=facts.epoch, n=facts.last, link=facts.link, problem=problem))
    try:
        closes = closes_of(archive.path)
    except IntegrityError:
        closes = []
    for close in closes:
        file_name = file_of(archive.path, close.period)
        for one in close.shards:
            problem = f"{file_name}: entry {one.shard}:{one.last} is not in the archive as it was closed"
            found.append(Mark(shard=one.shard, epoch=one.epoch, n=one.last, link=one.link, problem=problem))
    return found


def verify_rated(archive: Archive, advance: Callable[[int], None] = lambda count: None) -> RatedVerdict:
    """Check all rated rows and closes of an archive; problems are in the verdict.

    Args:
        archive: where.
        advance: is told how many entries were checked, as it goes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _RatedCheck(archive, Path(scratch), advance).verdict()


class _RatedCheck:
    def __init__(self, archive: Archive, scratch: Path, advance: Callable[[int], None]) -> None:
        self._archive = archive
        self._files = RatedFiles(archive)
        self._scratch = scratch
        self._advance = advance
        self._found = RatedVerdict()
        self._database = duck.connect(scratch)
        self._ends: set[int] = set()

    def verdict(self) -> RatedVerdict:
        closes = self._guarded(lambda: closes_of(self._archive.path)) or []
        self._ends = {close.until_ms for close in closes}
        self._foreign_files()
        for shard in self._files.shards():
            for file in self._way(shard):
                self._guarded(partial(self._check_file, file), file.path)
                self._advance(file.segment.last - file.segment.first + 1)
        reposts = self._guarded(lambda: reposts_of(self._files.path)) or []
        for at, repost in enumerate(reposts):
            self._check_repost(repost, reposts[:at])
        self._found.reratings = len(reposts)
        if not self._found.problems:
            self._check_closes(closes)
        self._database.close()
        return self._found

    def _guarded(self, look: Callable[[], Any], file: Path | None = None) -> Any:
        """What a look finds; None, and a problem, if it cannot be had."""
        try:
            return look()
        except IntegrityError as error:
            if str(error) not in self._found.problems:  # which a look at all files of a shard may have found already
                self._found.problems.append(str(error))
        except VanishedError as error:
            self._found.problems.append(f"{error} was joined with other files meanwhile: check again")
        except duck.failure() as error:
            self._found.problems.append(f"{file or self._files.path} cannot be read: {str(error).splitlines()[0]}")
        return None

    def _way(self, shard: int) -> list[RatedFile]:
        way = self._guarded(lambda: self._files.way(shard))
        return way if way is not None else self._files.listed(shard)

    def _foreign_files(self) -> None:
        for shard in self._files.shards():
            known = {file.path for file in self._files.listed(shard)}
            for file in sorted(self._files.folder(shard).rglob("*")):
                if file.is_file() and file not in known:
                    self._found.problems.append(f"{file} is not the name of a file of rated rows of shard {shard}")

    # ── One file of first ratings ─────────────────────────────────────────────────────────────────────────────────────

    def _check_file(self, file: RatedFile) -> None:
        if digest_of_file(file.path) != file.segment.digest:
            raise _damaged(file.path, "is damaged, or not the file of that name: its digest is another")
        facts = self._files.facts(file)
        self._stage(file.path)
        sums = sums_of(self._database, "checked")
        self._found.files += 1
        self._found.rows += int(sums["rows"])
        self._found.unpriced += int(sums["unpriced"])
        if wrong := [name for name, total in sums.items() if facts.sums.get(name) != total]:
            raise _damaged(file.path, f"control totals differ: {', '.join(wrong)}")
        self._check_rows(file.path, file.segment, "line >= 0 AND posting = if(reverses < 0, 1, -1)")
        self._check_entries(file, facts.made)

    def _stage(self, *files: Path) -> None:
        listed = ", ".join(duck.quoted(file) for file in files)
        self._database.execute(f"CREATE OR REPLACE TEMP TABLE checked AS SELECT * FROM read_parquet([{listed}])")

    def _check_rows(self, file: Path, segment: Segment, shape: str) -> None:
        """Each row is of the range, its costs are its prices times its quantity, and its key is its own."""
        epoch = duck.quoted(segment.epoch)
        place = f"shard = {segment.shard} AND epoch = {epoch} AND n BETWEEN {segment.first} AND {segment.last}"
        self._refuse(file, f"NOT ({place})", "is of an entry that is none of the file's")
        self._refuse(file, f"NOT ({shape})", "has a line that no rating makes")
        self._refuse(file, f"NOT ({_COHERENT})", "is priced and unpriced at once")
        self._refuse(file, f"unpriced = '' AND NOT ({_PRODUCTS})", "does not cost its price times its quantity")
        self._refuse(file, f"unpriced = '' AND NOT ({_FUNDING})", "has a price that its funding does not allow")
        doubled = self._rows("SELECT n, line FROM checked GROUP BY n, line HAVING count(*) > 1 ORDER BY ALL LIMIT 1")
        if doubled:
            raise _damaged(file, f"line {doubled[0][1]} of entry {segment.shard}:{doubled[0][0]} is there twice")

    def _refuse(self, file: Path, condition: str, problem: str) -> None:
        wrong = self._rows(f"SELECT shard, n, line FROM checked WHERE {condition} ORDER BY n, line LIMIT 1")
        if wrong:
            shard, n, line = wrong[0]
            raise _damaged(file, f"line {line} of entry {shard}:{n} {problem}")

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self._database.execute(query).fetchall()
        return found

    def _check_entries(self, file: RatedFile, several: Sequence[Made]) -> None:
        """The rows are of what the archive's entries used, all of it and nothing else, at the pinned prices."""
        segment = file.segment
        held = self._held(segment)
        if not held or held[0].first > segment.first or held[-1].last < segment.last:
            entries = f"{segment.shard}:{segment.first}-{segment.last}"
            raise _damaged(file.path, f"the archive does not have all of its entries {entries}")
        ranges = [(made.first, made.last) for made in several]
        if [first for first, _ in ranges] + [segment.last + 1] != [segment.first] + [last + 1 for _, last in ranges]:
            raise _damaged(file.path, "does not say what all of its rows were made with")
        for made in several:
            self._stage_again(segment, made, held, Before(self._files, made.reposts))
            self._check_range(file.path, segment, made)

    def _held(self, segment: Segment) -> list[Segment]:
        """The archive's segments that have entries of a range."""
        return [
            one
            for one in self._archive.segments(segment.shard)
            if one.epoch == segment.epoch and one.first <= segment.last and one.last >= segment.first
        ]

    def _stage_again(self, segment: Segment, made: Made, held: Sequence[Segment], before: Before | None) -> None:
        """Rate the entries of a range once more, by what their rows were made with."""
        segments = tuple(one for one in held if one.first <= made.last and one.last >= made.first)
        block = Block(shard=segment.shard, first=made.first, last=made.last, follows=("", 0), segments=segments)
        terms = terms_by_tenant(made.terms)
        prices = Prices(books=PinnedBooks(made.scales, PriceBooks()), terms_of=lambda tenant: terms.get(tenant, LIST))
        stage_block(self._database, self._archive, block, prices, self._scratch, before=before)

    def _check_range(self, file: Path, segment: Segment, made: Made) -> None:
        within = f"(SELECT * FROM checked WHERE n BETWEEN {made.first} AND {made.last})"
        if self._differing(_PRICED, within) is not None:
            if (n := self._differing(_USED, within)) is not None:
                raise _damaged(file, f"the rows of entry {segment.shard}:{n} are not of what it used")
            entry = f"{segment.shard}:{self._differing(_PRICED, within)}"
            raise _damaged(file, f"the rows of entry {entry} do not have the prices that it was rated by")
        untils = ", ".join(map(str, sorted(self._ends))) or "-1"
        moved = self._rows(
            f"SELECT n FROM (SELECT DISTINCT n, booked_at_ms AS b, touches_ms AS t FROM {within}) c"
            " JOIN (SELECT DISTINCT n, booked_at_ms AS b, touches_ms AS t FROM rated) r USING (n)"
            f" WHERE (c.b <> r.b AND (c.b < r.b OR c.b NOT IN ({untils}))) OR (c.b = r.b AND c.t <> r.t)"
            " ORDER BY n LIMIT 1"
        )
        if moved:
            raise _damaged(file, f"entry {segment.shard}:{moved[0][0]} was booked at another time than it says")

    def _differing(self, query: str, rows: str) -> int | None:
        """The first entry of which some rows are not those that rating makes; None if there is none."""
        told, expected = query.format(table=rows), query.format(table="rated")
        differs = f"(({told}) EXCEPT ALL ({expected})) UNION ALL (({expected}) EXCEPT ALL ({told}))"
        found: int | None = self._rows(f"SELECT min(n) FROM ({differs})")[0][0]
        return found

    # ── Re-ratings ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_repost(self, repost: Repost, before: Sequence[Repost]) -> None:
        extra = {file.name for file in repost.folder.iterdir()} - {*repost.files, "manifest.json"}
        for name in sorted(extra):
            self._found.problems.append(f"{repost.folder / name} is not a file of re-rating {repost.number}")
        named = sorted(segment for name in repost.files if (segment := Segment.named(name)) is not None)
        for one, other in pairwise(named):
            if (one.epoch, one.shard) == (other.epoch, other.shard) and other.first <= one.last:
                entries = f"{one.shard}:{other.first}-{min(one.last, other.last)}"
                self._found.problems.append(f"{repost.folder / other.name}: entries {entries} are in another file, too")
        for name in repost.files:
            path = repost.folder / name
            self._guarded(partial(self._check_reposted, repost, path, before), path)

    def _check_reposted(self, repost: Repost, path: Path, before: Sequence[Repost]) -> None:
        segment = Segment.named(path.name)
        if segment is None or digest_of_file(path) != segment.digest:
            raise _damaged(path, "is damaged, or not the file of that name: its digest is another")
        self._stage(path)
        sums = sums_of(self._database, "checked")
        self._found.files += 1
        self._found.rows += int(sums["rows"])
        if sums != repost.manifest.files[path.name]:
            raise _damaged(path, "control totals differ from those of the manifest")
        start = RERATED_LINES * repost.number
        self._check_rows(path, segment, f"line >= {start} AND line < {start + RERATED_LINES}")
        told = repost.manifest
        made = Made(first=segment.first, last=segment.last, library="", terms=told.terms, scales=told.scales)
        self._check_taken_back(path, segment, before)
        self._check_posted_anew(path, segment, made, start)

    def _check_posted_anew(self, path: Path, segment: Segment, made: Made, start: int) -> None:
        """What is posted anew is what the entries cost at the prices and terms of the re-rating."""
        held = self._held(segment)
        if not held or held[0].first > segment.first or held[-1].last < segment.last:
            return  # which the file of their first rating says already
        self._stage_again(segment, made, held, None)
        columns = ", ".join(f"({name} = '') AS {name}" if name == "unpriced" else name for name in _OF_PRICE)
        wrong = self._rows(
            f"(SELECT n, line - {start}, {columns} FROM checked WHERE line & {TAKEN_BACK} = 0)"
            f" EXCEPT ALL (SELECT n, line, {columns} FROM rated) ORDER BY n LIMIT 1"
        )
        if wrong:
            entry = f"{segment.shard}:{wrong[0][0]}"
            raise _damaged(path, f"the rows of entry {entry} do not have the prices that it was rated by")

    def _check_taken_back(self, path: Path, segment: Segment, before: Sequence[Repost]) -> None:
        """What is taken back stood, is taken back in full and once, and what it was of is posted anew."""
        overlapping = [
            file.path
            for file in self._files.way(segment.shard)
            if file.segment.epoch == segment.epoch
            and file.segment.first <= segment.last
            and file.segment.last >= segment.first
        ]
        listed = ", ".join(duck.quoted(file) for file in [*overlapping, *(p for one in before for p in one.paths())])
        earlier = (
            f"SELECT * FROM read_parquet([{listed}]) WHERE shard = {segment.shard}"
            f" AND epoch = {duck.quoted(segment.epoch)} AND n BETWEEN {segment.first} AND {segment.last}"
        )
        negated = " OR ".join(f"t.{name} IS DISTINCT FROM -o.{name}" for name in ("quantity", "posting", *COSTS))
        wrong = self._rows(
            f"WITH earlier AS ({earlier})"
            f" SELECT t.n, t.line FROM (SELECT * FROM checked WHERE line & {TAKEN_BACK} <> 0) t"
            " LEFT JOIN earlier o ON o.n = t.n AND o.line = t.reverses"
            f" LEFT JOIN (SELECT n, reverses FROM earlier WHERE line & {TAKEN_BACK} <> 0) g"
            " ON g.n = t.n AND g.reverses = t.reverses"
            f" WHERE o.n IS NULL OR g.n IS NOT NULL OR {negated} ORDER BY ALL LIMIT 1"
        )
        if wrong:
            n, line = wrong[0]
            raise _damaged(path, f"line {line} of entry {segment.shard}:{n} does not take back what stood")
        unequal = self._rows(
            "SELECT n FROM checked WHERE charge = 'usage' GROUP BY n, provider, model, token_type"
            " HAVING sum(quantity) <> 0 ORDER BY n LIMIT 1"
        )
        if unequal:
            raise _damaged(path, f"entry {segment.shard}:{unequal[0][0]} is posted anew with another quantity")

    # ── Closes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_closes(self, closes: Sequence[Close]) -> None:
        for close in closes:
            self._found.closes.append(close.period)
            file = file_of(self._archive.path, close.period)
            for difference in self._guarded(partial(self._differences, close), file) or ():
                self._found.problems.append(f"{file}: its {difference} are not what the archive's files come to")

    def _differences(self, close: Close) -> list[str]:
        return Closing(Postings(self._archive, close.tz), close.period).differences()


_PRICE_NAMES = [cost.replace("cost", "price") for cost in COSTS]
_COHERENT = " AND ".join(
    [
        "(unpriced = '') = (currency <> '')",
        *(f"(unpriced = '') = ({name} IS NOT NULL)" for name in (*COSTS, *_PRICE_NAMES)),
    ]
)


def _product(name: str) -> Iterator[str]:
    price = name.replace("cost", "price")
    each = f"({price} * if(per = 1000000, 0.000001, 0.001)::DECIMAL(7,6))::DECIMAL(18,12)"
    yield f"{name} = (quantity::DECIMAL(19,0) * {each})::DECIMAL(38,12)"


_PRODUCTS = " AND ".join(
    [
        *(product for name in COSTS for product in _product(name)),
        "per = CASE token_type " + " ".join(f"WHEN '{kind}' THEN {per}" for kind, per in PER.items()) + " ELSE per END",
    ]
)
_FUNDING = (
    "CASE WHEN charge = 'platform_fee' THEN funding = 'own' AND list_price = 0 AND upstream_price = 0"
    " AND billed_price = contracted_price"
    " WHEN funding = 'own' THEN billed_price = 0 AND upstream_price = 0 AND contracted_price = list_price"
    " ELSE billed_price = contracted_price END"
)
_USED = (
    "SELECT n, if(kind = 'adjusted', -1, line) AS line, kind, at_ms, tenant, funding, provider, model, pass_kind,"
    " token_type, variant, geo, quality, sum(quantity) AS quantity FROM {table}"
    " WHERE charge = 'usage' GROUP BY ALL HAVING sum(quantity) <> 0 OR kind <> 'adjusted'"
)


_OF_PRICE = [name for name in STORED if name not in ("line", "flags", "reverses", "booked_at_ms", "touches_ms")]
_PRICED = (
    f"SELECT line, reverses, {', '.join(name for name in _OF_PRICE if name != 'unpriced')}, (unpriced = '') AS priced"
    " FROM {table}"
)
"""All that a row says, but for words that a later version may choose otherwise."""


def _damaged(file: Path, problem: str) -> IntegrityError:
    return IntegrityError("damaged", f"{file}: {problem}")
