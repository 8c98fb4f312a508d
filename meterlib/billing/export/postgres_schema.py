"""What stands in PostgreSQL: a table of entries, verbatim, a checkpoint for each shard, and a view with columns.

`ledger` has the parts of an entry's line (see rows.py) as they are in the store, byte for byte. PostgreSQL parses the
JSON in them itself, once, when a row is written; the view `entries` takes its columns from that, so they cannot differ
from what was booked. They have the names that they have in the archive, and the same meaning.
"""

from __future__ import annotations

from string import Template

from meterlib.billing.archive.rows import COUNTS, VERBATIM

VERSION = 1

_TYPES = {"BIGINT": "bigint", "VARCHAR": "text"}
_VERBATIM = "\n".join(f"    {name} {_TYPES[kind]} NOT NULL," for name, kind in VERBATIM.items())
_COUNTS = "\n".join(
    f"    (outcome_json #>> '{{usage,{place.replace('.', ',')}}}')::bigint AS {column},"
    for column, place in COUNTS.items()
)
_DDL = Template("""\
CREATE SCHEMA IF NOT EXISTS ${schema};

CREATE TABLE ${schema}.about (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    version integer NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO ${schema}.about (version) VALUES (${version});

CREATE TABLE ${schema}.ledger (
    shard integer NOT NULL,
${verbatim}
    call_json jsonb GENERATED ALWAYS AS (nullif(call, '')::jsonb) STORED,
    outcome_json jsonb GENERATED ALWAYS AS (nullif(outcome, '')::jsonb) STORED,
    PRIMARY KEY (epoch, shard, n)
);
CREATE INDEX ledger_booked_at ON ${schema}.ledger USING brin (booked_at);

CREATE TABLE ${schema}.checkpoints (
    shard integer PRIMARY KEY,
    epoch text NOT NULL,
    n bigint NOT NULL,
    link bytea NOT NULL
);

CREATE TABLE ${schema}.set_aside (
    epoch text NOT NULL,
    shard integer NOT NULL,
    n bigint NOT NULL,
    entry text NOT NULL,
    PRIMARY KEY (epoch, shard, n)
);

CREATE VIEW ${schema}.entries AS SELECT
    epoch, shard, n, kind, after, reservation_id, reserved_at, booked_at, digest,
    call_json ->> 'tenant' AS tenant,
    coalesce(call_json ->> 'funding', 'hosted') AS funding,
    call_json #>> '{attributes,provider}' AS provider,
    call_json #>> '{attributes,model}' AS model,
    coalesce(call_json -> 'attributes', '{}') AS attributes,
    coalesce(outcome_json ->> 'quality', 'final') AS quality,
${counts}
    outcome_json #>> '{usage,service_tier}' AS service_tier,
    outcome_json #>> '{usage,speed}' AS speed,
    outcome_json #>> '{usage,inference_geo}' AS inference_geo,
    outcome_json #> '{usage,iterations}' AS iterations,
    outcome_json #> '{usage,amounts}' AS amounts,
    outcome_json -> 'facts' AS facts,
    outcome_json ->> 'adjusts' AS adjusts,
    outcome_json ->> 'reason' AS reason,
    outcome_json ->> 'actor' AS actor
FROM ${schema}.ledger;
""")


def ddl(schema: str) -> str:
    """The statements that make the schema; to be run once, by a role that may."""
    return _DDL.substitute(schema=schema, version=VERSION, verbatim=_VERBATIM, counts=_COUNTS)
