"""The outside world: a ledger that plays the payment provider, the warehouse and the carrier.

Temporal runs an activity again until it has an answer, so a provider may be asked twice. Only the
one who is asked can make that harmless, by an idempotency key; an activity cannot. This file is
that provider, in one SQLite file, with no Temporal in it. Beside the ledger stands the audit
trail: an event for each attempt, fault, human decision and outcome.
"""

import argparse
import io
import json
import os
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

SCHEMA = """
CREATE TABLE IF NOT EXISTS effects (
    kind TEXT, idempotency_key TEXT, order_id TEXT, customer_id TEXT, amount_cents INTEGER,
    status TEXT, requests INTEGER, created_at REAL, PRIMARY KEY (kind, idempotency_key)
);
CREATE INDEX IF NOT EXISTS effects_by_order ON effects (order_id);
CREATE VIEW IF NOT EXISTS charges AS
    SELECT idempotency_key, order_id, customer_id, amount_cents, status, requests, created_at
    FROM effects WHERE kind = 'charge';
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, order_id TEXT, type TEXT, attempt INTEGER, payload_json TEXT, ts REAL
);
CREATE INDEX IF NOT EXISTS events_by_order ON events (order_id, type);
CREATE UNIQUE INDEX IF NOT EXISTS notes ON events (order_id, type, payload_json) WHERE attempt = 0;
"""
# What each kind of effect is called in force and when undone. A package that left stays away.
IN_FORCE = {"charge": "charged", "reservation": "reserved", "dispatch": "dispatched"}
UNDONE = {"charge": "refunded", "reservation": "released", "dispatch": "dispatched"}


class PaymentConflict(Exception):
    """The key belongs to another order, customer or amount: the request is only counted."""


class OrderGivenUp(Exception):
    """The effect was undone, or refused in advance, because its order was given up."""


BESIDE = str(Path(__file__).with_name("charge_store.db"))


def store_path() -> Path:
    """Name the SQLite file: CHARGE_STORE, or charge_store.db beside the scripts."""
    return Path(_store_name())


def _store_name() -> str:
    """Name it as text: making a Path for each statement took a tenth of the charges per second."""
    return os.environ.get("CHARGE_STORE") or BESIDE


_lock = threading.Lock()
# At most one entry: for a file's identity, a connection to it for each PRAGMA synchronous.
_opened: dict[object, dict[str, sqlite3.Connection]] = {}


@contextmanager
def connect(synchronous: str = "FULL") -> Iterator[sqlite3.Connection]:
    """Hold a connection that all threads share; each statement is a transaction of its own.

    FULL: what was answered is on disk, even if the power fails. NORMAL, for the notes about an
    attempt: safe from kill -9, and on disk with the next FULL; 18 FULL commits in an order instead
    of 4 cost 12 % of its CPU.

    A connection for each call took seven times as long, as each close folded the WAL back into the
    file; one for each thread made some wait over a second, as SQLite's writers do not queue.
    """
    with _lock:
        name = _store_name()
        if (connections := _opened.get(_identity(name))) is None:
            _close()  # another store, or somebody deleted this one
            connections = {level: _open(name, level) for level in ("FULL", "NORMAL")}
            # What a killed process wrote last may not be on disk; asking again may write nothing.
            connections["FULL"].execute("PRAGMA wal_checkpoint").fetchone()
            _opened[_identity(name)] = connections
        yield connections[synchronous]


def close() -> None:
    """Close the file, so that it can be deleted on Windows too; the next call opens it again."""
    with _lock:
        _close()


def _close() -> None:
    """Close the connections while holding the lock."""
    while _opened:
        for connection in _opened.popitem()[1].values():
            connection.close()


def _identity(name: str) -> object:
    """Tell one file from another that later has its name."""
    try:
        return name, os.stat(name).st_ino
    except FileNotFoundError:
        return None


def _open(name: str, synchronous: str) -> sqlite3.Connection:
    """Open a store, and make what is missing in it."""
    # Other processes write to the file too: wait for them, up to 30 s.
    connection = sqlite3.connect(name, timeout=30, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'notes'").fetchone():
        _create(connection)
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """Make the tables, all or none, however many processes come first at once."""
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:  # the switch does not wait for its lock
            if "locked" not in str(error):
                raise
            time.sleep(0.01)
    connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")


def perform(
    kind: str, key: str, order_id: str, customer_id: str, amount_cents: int
) -> dict[str, Any]:
    """Do the effect once; asked again, count the request and return the first receipt.

    Raises PaymentConflict if the key is another's, OrderGivenUp if the effect was undone.
    """
    with connect() as connection:
        [row] = connection.execute(
            "INSERT INTO effects VALUES (?, ?, ?, ?, ?, ?, 1, ?)"
            " ON CONFLICT DO UPDATE SET requests = requests + 1 RETURNING *",
            (kind, key, order_id, customer_id, amount_cents, IN_FORCE[kind], time.time()),
        ).fetchall()
    owner = (row["order_id"], row["customer_id"], row["amount_cents"])
    if owner != (order_id, customer_id, amount_cents):
        raise PaymentConflict(f"{kind} key {key} belongs to another order, customer or amount")
    if row["status"] != IN_FORCE[kind]:
        raise OrderGivenUp(f"{kind} {key} is {row['status']}: the order was given up")
    return dict(row)


def undo(kind: str, key: str, order_id: str, customer_id: str, amount_cents: int) -> str:
    """Undo the effect; if it has not happened, leave a voided row that refuses it for good.

    Returns the status it has now, or "not ours" if the key is another's: then nothing is done.
    """
    effect = (kind, key, order_id, customer_id, amount_cents)
    with connect() as connection:
        rows = connection.execute(
            "INSERT INTO effects VALUES (?, ?, ?, ?, ?, 'voided', 0, ?) ON CONFLICT DO UPDATE"
            " SET status = CASE status WHEN ? THEN ? ELSE status END"
            " WHERE order_id = excluded.order_id AND customer_id = excluded.customer_id"
            " AND amount_cents = excluded.amount_cents RETURNING status",
            (*effect, time.time(), IN_FORCE[kind], UNDONE[kind]),
        ).fetchall()
    return str(rows[0]["status"]) if rows else "not ours"


def record(order_id: str, type_: str, payload: dict[str, Any], attempt: int = 0) -> int:
    """Append an event and return its id; return 0 if it is no attempt and stands there already."""
    with connect("NORMAL" if attempt else "FULL") as connection:
        rows = connection.execute(
            "INSERT INTO events (order_id, type, attempt, payload_json, ts) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT DO NOTHING RETURNING id",
            (order_id, type_, attempt, json.dumps(payload), time.time()),
        ).fetchall()
    return int(rows[0]["id"]) if rows else 0


def finish(event_id: int, ended: str, seconds: float) -> None:
    """Add to an attempt's event how it ended and after how many seconds."""
    with connect("NORMAL") as connection:
        connection.execute(
            "UPDATE events SET payload_json = json_set(payload_json, '$.ended', ?, '$.seconds', ?)"
            " WHERE id = ?",
            (ended, round(seconds, 3), event_id),
        )


def count(order_id: str, type_: str) -> int:
    """Count an order's events of one type."""
    return len(select("SELECT id FROM events WHERE order_id = ? AND type = ?", order_id, type_))


def select(query: str, *values: Any) -> list[dict[str, Any]]:
    """Read rows as dictionaries."""
    with connect() as connection:
        return [dict(row) for row in connection.execute(query, values).fetchall()]


def audit() -> list[str]:
    """Return a line for each order whose effects do not fit its last outcome."""
    orders = select(
        "SELECT id.order_id, (SELECT payload_json FROM events WHERE order_id = id.order_id"
        " AND type = 'outcome' ORDER BY events.id DESC LIMIT 1) AS outcome,"
        " total(kind = 'charge' AND status = 'charged') AS charge,"
        " total(kind = 'reservation' AND status = 'reserved') AS reservation,"
        " total(kind = 'dispatch' AND status = 'dispatched') AS dispatch"
        " FROM (SELECT order_id FROM effects UNION SELECT order_id FROM events) AS id"
        " LEFT JOIN effects USING (order_id) GROUP BY id.order_id"
    )
    violations = []
    for order in orders:
        state = json.loads(order["outcome"])["state"] if order["outcome"] else "unfinished"
        allowed = {"COMPLETED": {1}, "unfinished": {0, 1}}.get(state, {0})
        for kind, status in IN_FORCE.items():
            if order[kind] not in allowed:
                wanted = " or ".join(map(str, sorted(allowed)))
                violations.append(
                    f"{printable(order['order_id'])} ({state}): {order[kind]:.0f} {kind} {status}"
                    f" and in force, should be {wanted}"
                )
    return violations


# What all scripts print with, and the command line.


def printable(text: object) -> str:
    """Escape what could move a cursor, change a colour or hide: outside text meets a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def table(rows: list[dict[str, Any]]) -> str:
    """Align rows under their column names; on a terminal, cut what does not fit its width."""
    lines = [list(rows[0])] + [[printable(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip()[:width] for line in lines)


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, escaped, and exits 2."""

    def error(self, message: str) -> NoReturn:
        """Say it and exit."""
        self.exit(2, f"{self.prog}: {printable(message)} (see: {self.prog} --help)\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but not what a terminal sent that is no text in its encoding."""
        for text in sys.argv[1:]:
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.error(f"{text}: not valid text")
        return super().parse_args(args, namespace)


def events(order_id: str) -> list[dict[str, Any]]:
    """Tell an order's events, oldest first; an attempt without an end never gave an answer."""
    rows = select("SELECT * FROM events WHERE order_id = ? ORDER BY id", order_id)
    told = []
    for row in rows:
        payload = json.loads(row["payload_json"])
        ended, seconds = payload.pop("ended", "no answer"), payload.pop("seconds", 0)
        answer = f"{ended} after {seconds:.1f} s" if seconds else ended
        told.append(
            {
                "seconds": f"{row['ts'] - rows[0]['ts']:7.2f}",
                "event": row["type"],
                "attempt": row["attempt"] or "",
                "ended": answer if row["attempt"] else "",  # a note is no attempt
                "details": ", ".join(f"{name}={value}" for name, value in payload.items()),
            }
        )
    return told


def effects(order_id: str | None = None, limit: int = 20) -> list[dict[str, Any]]:
    """Tell the newest effects, of one order or of all, each with its proof."""
    rows = select(
        "SELECT * FROM effects WHERE ?1 IS NULL OR order_id = ?1 ORDER BY created_at DESC LIMIT ?2",
        order_id,
        limit,
    )
    return [
        {
            "effect": row["kind"],
            "amount": f"{row['amount_cents'] / 100:.2f}",
            "proof": f"requests {row['requests']}, {row['status']}"
            + (" once" if row["status"] == IN_FORCE[row["kind"]] else ""),
            "customer": row["customer_id"],
            "idempotency key": row["idempotency_key"],
            "order": row["order_id"],
        }
        for row in reversed(rows)
    ]


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's main; whatever stops it leaves an exit code and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        try:
            sys.exit(main())
        except SystemExit as stop:  # its text may hold what came from outside
            if not isinstance(stop.code, str):
                raise
            sys.exit(printable(stop.code))
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell reports after Ctrl+C
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os._exit(0)
    except sqlite3.Error as error:
        sys.exit(f"{store_path()}: {error}; name a writable file in CHARGE_STORE")
    except OSError as error:  # a full disk behind the output, say
        sys.exit(f"cannot go on: {error}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Show the ledger and the audit trail, or audit them.")
    parser.add_argument("order_id", nargs="?", help="show this order's effects and events")
    parser.add_argument("--audit", action="store_true", help="check it; exit 1 if it is off")
    options: argparse.Namespace = parser.parse_args()
    return options


def main() -> int:
    """Print the ledger, one order's trail, or the audit."""
    options = parse_arguments()
    if options.audit:
        violations = audit()
        print("\n".join(violations) or f"audit: {store_path().name} is clean")
        return 1 if violations else 0
    ledger = effects(options.order_id)
    trail = events(options.order_id) if options.order_id is not None else []
    if options.order_id is not None and not ledger and not trail:
        sys.exit(f"nothing of '{printable(options.order_id)}' in {store_path()}")
    print(table(ledger) if ledger else f"{store_path()}: nothing charged, reserved or sent yet")
    if trail:
        print("\n" + table(trail))
    return 0


if __name__ == "__main__":
    run_script(main)
