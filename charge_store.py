"""The outside world: a ledger that plays the payment provider, the warehouse and the carrier.

Temporal runs an activity again until it has an answer, so a provider may be asked twice. Only the
one who is asked can make that harmless, by an idempotency key; an activity cannot. This file is
that provider, in one SQLite file, with no Temporal in it. Beside the ledger stands the audit
trail: an event for each attempt, fault, human decision and outcome.
"""

import argparse
import atexit
import io
import json
import os
import shutil
import signal
import sqlite3
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS effects (
    kind TEXT, idempotency_key TEXT, order_id TEXT, customer_id TEXT, amount_cents INTEGER,
    status TEXT, requests INTEGER, created_at REAL, PRIMARY KEY (kind, idempotency_key)
);
CREATE INDEX IF NOT EXISTS effects_by_order ON effects (order_id);
CREATE VIEW IF NOT EXISTS charges AS
    SELECT idempotency_key, order_id, customer_id, amount_cents, status, requests, created_at
    FROM effects WHERE kind = 'charge';
-- An event is an attempt at an activity, or, with attempt 0, a note, which is stored once.
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY, order_id TEXT, type TEXT, attempt INTEGER, payload_json TEXT, ts REAL
);
CREATE INDEX IF NOT EXISTS events_by_order ON events (order_id);
CREATE UNIQUE INDEX IF NOT EXISTS notes ON events (order_id, type, payload_json) WHERE attempt = 0;
"""
# What each kind of effect is called in force and when undone. A package that left cannot be undone.
IN_FORCE = {"charge": "charged", "reservation": "reserved", "dispatch": "dispatched"}
UNDONE = {"charge": "refunded", "reservation": "released", "dispatch": "dispatched"}


class PaymentConflict(Exception):
    """The key belongs to another order, customer or amount: the request is only counted."""


class OrderGivenUp(Exception):
    """The provider refuses: the effect was undone, or forbidden before it came (a tombstone).

    An order that meets this has FAILED, with this as its type, unless its package has left.
    """


class OrderConflict(Exception):
    """The order id was used before, for an order with other contents."""


# The ledger. Each statement is a transaction: it happens whole or not at all.


def perform(
    kind: str, key: str, order_id: str, customer_id: str, amount_cents: int
) -> dict[str, Any]:
    """Do the effect once; asked again, count the request and return the first receipt.

    Raises PaymentConflict if the key is another's, OrderGivenUp if the effect was undone.
    """
    owner = (order_id, customer_id, amount_cents)
    [row] = execute(  # inserted now or there before: one row either way
        "INSERT INTO effects VALUES (?, ?, ?, ?, ?, ?, 1, ?)"
        " ON CONFLICT DO UPDATE SET requests = effects.requests + 1 RETURNING *",
        *(kind, key, *owner, IN_FORCE[kind], time.time()),
    )
    if (row["order_id"], row["customer_id"], row["amount_cents"]) != owner:
        raise PaymentConflict(f"{kind} key {key} belongs to another order, customer or amount")
    if row["status"] != IN_FORCE[kind]:
        raise OrderGivenUp(f"{kind} {key} is {row['status']}: the order was given up")
    return row


def undo(kind: str, key: str, order_id: str, customer_id: str, amount_cents: int) -> str:
    """Undo the effect; return the status it has now, or "not ours": then nothing was done.

    not there yet    a row is left that is `voided`: a tombstone, which refuses the effect for good
    in force         it is undone: refunded, released
    otherwise        it stays as it is
    """
    effect = (kind, key, order_id, customer_id, amount_cents)
    rows = execute(
        "INSERT INTO effects VALUES (?, ?, ?, ?, ?, 'voided', 0, ?) ON CONFLICT DO UPDATE"
        " SET status = CASE effects.status WHEN ? THEN ? ELSE effects.status END"
        " WHERE effects.order_id = excluded.order_id AND effects.customer_id = excluded.customer_id"
        " AND effects.amount_cents = excluded.amount_cents RETURNING status",
        *(*effect, time.time(), IN_FORCE[kind], UNDONE[kind]),
    )
    return str(rows[0]["status"]) if rows else "not ours"


# The audit trail.


def note(order_id: str, type_: str, payload: dict[str, Any], attempt: int = 0) -> int:
    """Write an event: that an attempt begins, or a note, once; return its id, 0 for an old note."""
    rows = execute(
        "INSERT INTO events (order_id, type, attempt, payload_json, ts) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT DO NOTHING RETURNING id",
        *(order_id, type_, attempt, json.dumps(payload), time.time()),
        synchronous="NORMAL" if attempt else "FULL",
    )
    return int(rows[0]["id"]) if rows else 0


def finish(event_id: int, ended: str, seconds: float) -> None:
    """Add to an attempt's event how it ended and after how many seconds.

    An attempt whose process died has neither. One that ended ok may be followed by another all the
    same: the effect happened and the ledger knows it, but Temporal never got the answer.
    """
    statement = "UPDATE events SET payload_json ="
    statement += " json_set(payload_json, '$.ended', ?, '$.seconds', ?) WHERE id = ?"
    with suppress(sqlite3.Error):  # this is a note; what counts is the attempt's answer
        execute(statement, ended, round(seconds, 3), event_id, synchronous="NORMAL")


def look_back(contents: dict[str, Any], run_id: str, first_run_id: str) -> bool:
    """Tell whether another run than this one received the order.

    Raises OrderConflict if its id was first used for another customer, amount, payment or address.
    What our own first run received is never another's: since then defaults may have changed.
    """
    runs = events_of(contents["order_id"], "receive_order")
    bought = ("customer_id", "amount_cents", "payment_id", "address")
    first = runs[0] if runs else contents
    ours = first.get("run") == first_run_id
    if not ours and any(first[name] != contents[name] for name in bought):
        raise OrderConflict(f"order_id: {contents['order_id']} was used before, for another order")
    return any(run.get("run") != run_id for run in runs)


def events_of(order_id: str, *types: str) -> list[dict[str, Any]]:
    """Read an order's events, of these types or all, each with what its payload holds."""
    rows = execute("SELECT * FROM events WHERE order_id = ? ORDER BY id", order_id)
    return [json.loads(r["payload_json"]) | r for r in rows if not types or r["type"] in types]


def count(order_id: str, type_: str) -> int:
    """Count an order's events of one type."""
    return len(events_of(order_id, type_))


def effects_of(order_id: str) -> list[dict[str, Any]]:
    """Read an order's effects in the order in which they came."""
    return execute("SELECT * FROM effects WHERE order_id = ? ORDER BY created_at", order_id)


def audit() -> tuple[dict[str, str], list[str]]:
    """Return each order's last outcome, and a line for each effect that does not fit it.

    A charge alone has no outcome; like an order that still runs it may have one effect of a kind.
    """
    known = "SELECT order_id FROM events WHERE attempt UNION SELECT order_id FROM effects"
    states = {row["order_id"]: "unfinished" for row in execute(known)}
    for row in execute("SELECT * FROM events WHERE type = 'outcome' ORDER BY id"):
        states[row["order_id"]] = json.loads(row["payload_json"])["state"]  # the last run's stays
    counted = Counter((row["order_id"], row["status"]) for row in execute("SELECT * FROM effects"))
    violations = []
    for order_id, state in states.items():
        allowed = {"COMPLETED": [1], "unfinished": [0, 1]}.get(state, [0])
        for kind, status in IN_FORCE.items():
            if (found := counted[order_id, status]) not in allowed:
                violations.append(f"{order_id} ({state}): {found} x {kind} {status}")
        if counted[order_id, "dispatched"] > counted[order_id, "charged"]:
            violations.append(f"{order_id} ({state}): dispatched and not charged")
    return states, violations


# The file.

# A statement that meets others who write, or open the file, is repeated for so long; then the
# attempt fails, for Temporal to repeat it. (Nobody waits inside SQLite: one who did would hold up
# all threads.) Temporal gives a silent attempt up after 1 s: HEARTBEAT in workflows.py.
PATIENCE_SECONDS = 1
_turn = threading.RLock()
_opened: dict[tuple[Path, int], sqlite3.Connection] = {}  # at most one, by file name and inode


def store_path() -> Path:
    """Name the SQLite file: CHARGE_STORE, or charge_store.db beside the scripts."""
    return Path(os.environ.get("CHARGE_STORE") or Path(__file__).with_name("charge_store.db"))


def execute(statement: str, *values: Any, synchronous: str = "FULL") -> list[dict[str, Any]]:
    """Run a statement, which is a transaction, on the connection of all threads; return its rows.

    FULL: what was answered is on disk, even if the power fails. NORMAL, for what is written about
    attempts: safe from kill -9, and on disk with the next FULL (12 % less CPU an order).
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with _turn:
                connection = _connect()
                connection.execute(f"PRAGMA synchronous = {synchronous}")
                return [dict(row) for row in connection.execute(statement, values).fetchall()]
        except sqlite3.OperationalError as error:  # nothing of the statement happened
            if "locked" not in str(error) or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _connect() -> sqlite3.Connection:
    """Return the connection of all threads; open the file and make what is missing in it."""
    path = store_path()
    if not path.exists() or (path, path.stat().st_ino) not in _opened:
        close()  # CHARGE_STORE names another one, or somebody deleted this one
        if sqlite3.sqlite_version_info < (3, 35):
            sys.exit(f"SQLite {sqlite3.sqlite_version} is too old, the ledger needs 3.35 or newer")
        connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        _opened[path, -1] = connection  # not ready yet
        connection.row_factory = sqlite3.Row
        connection.executescript(SCHEMA)
        # What a killed process wrote last may not be on disk, and its repetition, which changes no
        # row, would not put it there: flush now.
        connection.execute("PRAGMA wal_checkpoint").fetchone()
        _opened[path, path.stat().st_ino] = _opened.pop((path, -1))
    [connection] = _opened.values()
    return connection


@atexit.register
def close() -> None:
    """Close the file, so that it can be deleted on Windows too; the next call opens it again."""
    with _turn:
        while _opened:
            _opened.popitem()[1].close()


# What it says.


def printable(text: object) -> str:
    """Escape what could move a cursor, change a colour or hide: outside text meets a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def fit(text: object, stream: TextIO, indent: int = 0) -> str:
    """Escape a line; for a terminal break it at words, but leave the command at its end whole."""
    line, columns = printable(text), shutil.get_terminal_size().columns
    if not stream or not stream.isatty() or len(line) < columns:
        return line
    wrapper = textwrap.TextWrapper(columns - 1, subsequent_indent=" " * indent)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    words, _, typed = line.rpartition(": ")
    if not words or not any(name in typed for name in (".py", "temporal ")):
        return wrapper.fill(line)
    return f"{wrapper.fill(words)}:\n{typed}"


def say(text: object, indent: int = 0) -> None:
    """Print a line; its further lines on a terminal are indented."""
    print(fit(text, sys.stdout, indent), flush=True)


def proof(effect: dict[str, Any]) -> str:
    """Tell an effect: what was asked for, how often, and what came of it."""
    once = " once" if effect["status"] == IN_FORCE[effect["kind"]] else ""
    amount = f"{effect['amount_cents'] / 100:.2f}"
    return f"{effect['kind']} {amount}: requests {effect['requests']}, {effect['status']}{once}"


def say_order(order_id: str) -> bool:
    """Print an order's events, with the seconds since the first, and its effects."""
    events = events_of(order_id)
    for event in events:
        payload = json.loads(event["payload_json"])
        told = f"{event['ts'] - events[0]['ts']:8.2f} s  {event['type']}"
        if event["attempt"]:
            told += f", attempt {event['attempt']}, worker {payload.pop('worker', '?')}"
            ended, seconds = payload.pop("ended", "no answer"), payload.pop("seconds", 0)
            told += f": {ended}" + (f" after {seconds:.1f} s" if seconds >= 0.1 else "")
        details = ", ".join(f"{name}={value}" for name, value in payload.items())
        say(told + (f" ({details})" if details else ""), indent=12)
    effects = effects_of(order_id)
    for effect in effects:
        say(f"{proof(effect)} (key {effect['idempotency_key']})", indent=12)
    return bool(events or effects)


def main() -> int:
    """Print the ledger, one order's effects and events, or the audit."""
    parser = argparse.ArgumentParser(description="Show the ledger and the events, or audit them.")
    parser.add_argument("order_id", nargs="?", help="show this order's effects and events")
    parser.add_argument("--audit", action="store_true", help="check all of it; exit 1 if it is off")
    options, unknown = parser.parse_known_args()
    if unknown:
        parser.exit(2, f"charge_store.py: unknown: {' '.join(map(ascii, unknown))} (see: --help)\n")
    path = printable(store_path())
    if options.audit:
        if not store_path().exists():
            sys.exit(f"{path} is not there: nothing to audit")
        orders, violations = audit()
        for line in violations or [f"audit: {len(orders)} orders, clean"]:
            say(line)
        return 1 if violations else 0
    if options.order_id is not None:
        order_id = printable(options.order_id)  # what is no text SQLite would not look for
        if not say_order(order_id):
            sys.exit(f"nothing of '{order_id}' in {path}")
        return 0
    newest = execute("SELECT * FROM effects ORDER BY created_at DESC LIMIT 20")
    for effect in reversed(newest):
        say(f"{proof(effect):48}  {effect['order_id']} (key {effect['idempotency_key']})", 4)
    if not newest:
        say(f"{path}: nothing charged, reserved or sent yet")
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does by itself
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl+C ends it without a traceback
    if sys.platform != "win32":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # and so does `| head`
    try:
        sys.exit(main())
    except (sqlite3.Error, OSError) as error:
        sys.exit(f"{printable(store_path())}: {error}; name a writable file in CHARGE_STORE")
