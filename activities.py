"""The side effects of an order, as Temporal activities, and the Order itself with its faults.

An activity may do anything: write files, call providers, fail, hang, die with its process.
Temporal runs it again until it has an answer, so each one here is safe to repeat: it hands the
ledger an idempotency key. All are plain `def`, run in threads, because they block; blocking code
in an `async def` would freeze the whole worker.
"""

import logging
import os
import re
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError

import charge_store as store

T = TypeVar("T")
log = logging.getLogger("orders")

FAULTS = ("flaky", "down", "hang", "slow", "late", "crash-before", "crash-after", "random")
SLOW_SECONDS = 5  # long enough to kill the worker by hand in the middle of a charge
BEAT_SECONDS = 0.1  # how often a waiting activity says that it is alive, and looks for a cancel


class PaymentDeclined(Exception):
    """The card cannot pay. Asking again would not help."""


class Outage(Exception):
    """A simulated failure that asking again may mend."""


@dataclass(frozen=True)
class Order:
    """What a customer orders, how patient we are with it, and which steps shall go wrong."""

    order_id: str
    customer_id: str = "customer-123"
    amount_cents: int = 9999
    payment_id: str = ""  # the idempotency key of the charge; empty: "pay-<order_id>"
    address: str = "1 Main Street"
    card_expiry: str = "12/30"
    wait_seconds: float = 0
    review: str = "person"
    review_seconds: float | None = None  # None: 30 for a person, 2 for the timer
    deadline_seconds: float = 15
    max_attempts: int = 3  # of each step; 0: no limit
    simulate: dict[str, str] = field(default_factory=dict)  # {step: fault}


def like(pattern: str) -> Callable[[Any], bool]:
    """Make a test for text that is wholly like the pattern."""
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value, re.DOTALL))


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """Make a test for a whole number in range; True is not a number."""
    return lambda value: type(value) is int and low <= value <= high


def is_seconds(value: Any) -> bool:
    """Tell whether the value is a duration of at most a day; NaN and infinity are not."""
    return type(value) in (int, float) and 0 <= value <= 86_400


def is_faults(value: Any) -> bool:
    """Tell whether the value names known steps and known faults."""
    return isinstance(value, dict) and all(s in STEPS and f in FAULTS for s, f in value.items())


ID, ID_RULE = "[A-Za-z0-9._-]{1,100}", "must be 1 to 100 of the characters A-Z a-z 0-9 . _ -"
SECONDS_RULE = "must be 0 to 86400 seconds"
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "order_id": (like(f"{ID}|charge-{ID}-[0-9]{{1,9}}"), ID_RULE),
    "customer_id": (like(ID), ID_RULE),
    "amount_cents": (whole(1, 100_000_000), "must be 1 to 100000000 whole cents"),
    "payment_id": (like(f"|{ID}"), ID_RULE),
    "address": (like(r"(?=.*\S).{1,200}"), "must be 1 to 200 characters, not blank"),
    "card_expiry": (like("(0[1-9]|1[0-2])/[0-9]{2}"), "must be a month and a year like 12/30"),
    "wait_seconds": (is_seconds, SECONDS_RULE),
    "review": (like("person|timer"), "must be person or timer"),
    "review_seconds": (lambda value: value is None or is_seconds(value), SECONDS_RULE),
    "deadline_seconds": (is_seconds, SECONDS_RULE),
    "max_attempts": (whole(0, 100), "must be 0 (no limit) to 100"),
    "simulate": (is_faults, "must be {step: fault} with known names (starter.py order --help)"),
}


def invalid(problem: str) -> ApplicationError:
    """Build the error that refuses an order; trying again would not help."""
    return ApplicationError(problem, type="InvalidOrder", non_retryable=True)


def parse_order(raw: Any, workflow_id: str, charge: bool = False) -> Order:
    """Check every field of an order strictly and fill in the defaults that depend on others.

    `charge` is for ChargeWorkflow, whose order ids may begin with "charge-".
    Raises ApplicationError of type InvalidOrder that names the field.
    """
    if not isinstance(raw, dict) or "order_id" not in raw:
        raise invalid(f"order_id: missing; an order is a JSON object, not {ascii(raw)[:80]}")
    if unknown := raw.keys() - RULES.keys():
        raise invalid(
            f"{ascii(min(unknown, key=str))[:80]}: unknown field, must be of {', '.join(RULES)}"
        )
    order = Order(**raw)
    for name, (valid, rule) in RULES.items():
        if not valid(value := getattr(order, name)):
            raise invalid(f"{name}: {rule}, not {ascii(value)[:80]}")
    if order.order_id.startswith("ship-" if charge else ("ship-", "charge-")):
        raise invalid(f"order_id: must not begin with ship- or charge-, as {order.order_id} does")
    if order.order_id != workflow_id:
        raise invalid(f"order_id: must be the workflow id {workflow_id!a}, not {order.order_id}")
    window = {"person": 30, "timer": 2}[order.review]
    return replace(
        order,
        payment_id=order.payment_id or f"pay-{order.order_id}",
        review_seconds=window if order.review_seconds is None else order.review_seconds,
    )


@dataclass(frozen=True)
class Note:
    """Something to write into the audit trail: a human decision, or the outcome."""

    order: Order
    type: str
    payload: dict[str, Any]


@activity.defn
def receive_order(order: Order) -> None:
    """Write the order down as it came."""
    _attempt(order, "receiving", _nothing, **asdict(order))


@activity.defn
def validate_order(order: Order) -> None:
    """Check the order once more: who called us is not our concern, what we accept is."""
    workflow_id = activity.info().workflow_id or ""
    _attempt(order, "validating", partial(parse_order, asdict(order), workflow_id))


@activity.defn
def reserve_inventory(order: Order) -> dict[str, Any]:
    """Put the goods aside."""
    return _attempt(order, "reserving", partial(_ask, order, "reservation", order.order_id))


@activity.defn
def charge_payment(order: Order) -> dict[str, Any]:
    """Take the money. The key is the order's payment id: it means the same on every attempt."""
    amount = f"{order.amount_cents / 100:.2f}"
    doing = f"charging {order.customer_id} {amount}"
    return _attempt(order, doing, partial(_charge, order))


@activity.defn
def prepare_package(order: Order) -> None:
    """Pack the goods."""
    _attempt(order, "packing", _nothing, address=order.address)


@activity.defn
def dispatch_carrier(order: Order) -> dict[str, Any]:
    """Hand the package to the carrier. This is what cannot be undone."""
    ask = partial(_ask, order, "dispatch", order.order_id)
    return _attempt(order, "dispatching", ask, address=order.address)


@activity.defn
def void_dispatch(order: Order) -> str:
    """Forbid the dispatch, unless it has happened; return which: "voided" or "dispatched"."""
    return _attempt(
        order, "voiding the dispatch", partial(_undo, order, "dispatch", order.order_id)
    )


@activity.defn
def refund_payment(order: Order) -> str:
    """Give the money back; if none was taken yet, forbid taking it late."""
    return _attempt(order, "refunding", partial(_undo, order, "charge", order.payment_id))


@activity.defn
def release_inventory(order: Order) -> str:
    """Put the goods back on the shelf; if none were taken yet, forbid taking them late."""
    return _attempt(order, "releasing", partial(_undo, order, "reservation", order.order_id))


@activity.defn
def record_decision(note: Note) -> None:
    """Write down what a person asked for."""
    _attempt(note.order, f"recording {note.type}", partial(_write, note))


@activity.defn
def record_outcome(note: Note) -> None:
    """Write down how the order ended."""
    _attempt(note.order, f"recording {note.payload['state']}", partial(_write, note))


ORDER_STEPS: list[Callable[..., Any]] = [
    *(receive_order, validate_order, reserve_inventory, charge_payment),
    *(void_dispatch, refund_payment, release_inventory),
    *(record_decision, record_outcome),
]
SHIPPING_STEPS: list[Callable[..., Any]] = [prepare_package, dispatch_carrier]
STEPS = [step.__name__ for step in ORDER_STEPS + SHIPPING_STEPS]


def _nothing() -> None:
    """Have no effect on the outside world."""


def _ask(order: Order, kind: str, key: str) -> dict[str, Any]:
    """Ask the provider for an effect and say when it had been done before."""
    receipt = store.perform(kind, key, order.order_id, order.customer_id, order.amount_cents)
    if receipt["requests"] > 1:
        again = "already %s: same receipt (requests %d) for %s"
        log.info(again, receipt["status"], receipt["requests"], order.order_id)
    return receipt


def _charge(order: Order) -> dict[str, Any]:
    """Ask for the charge, unless the card has expired: it is good to the end of its month."""
    month, year = order.card_expiry.split("/")
    today = datetime.now(UTC)
    if (2000 + int(year), int(month)) < (today.year, today.month):
        raise PaymentDeclined(f"card expired {order.card_expiry}")
    return _ask(order, "charge", order.payment_id)


def _undo(order: Order, kind: str, key: str) -> str:
    """Ask the provider to undo an effect, or never to do it."""
    return store.undo(kind, key, order.order_id, order.customer_id, order.amount_cents)


def _attempt(order: Order, doing: str, effect: Callable[[], T], **details: Any) -> T:
    """Make one attempt: note it, play its fault, do the effect, note how it ended."""
    step, attempt = activity.info().activity_type, activity.info().attempt
    fault = order.simulate.get(step, "")
    started, ended, event = time.monotonic(), "ok", 0
    try:
        # A cancel raises in this thread, between any two lines: the shield makes a call to the
        # ledger happen whole or not at all.
        with activity.shield_thread_cancel_exception():
            event = store.record(order.order_id, step, details, attempt)
        log.info("%s for %s ... (attempt %d)", doing, order.order_id, attempt)
        _fail(order, step, fault)
        with activity.shield_thread_cancel_exception():
            if fault == "late" and _once(order, step, fault):
                _wait(SLOW_SECONDS)
            result = effect()
        if fault == "slow":
            _wait(SLOW_SECONDS)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
        log.info("%s for %s failed (attempt %d): %s", doing, order.order_id, attempt, error)
        raise
    finally:
        with activity.shield_thread_cancel_exception():
            store.finish(event, ended, time.monotonic() - started)
    if fault == "crash-after" and _once(order, step, fault):
        _crash(doing, order)
    return result


def _fail(order: Order, step: str, fault: str) -> None:
    """Play the faults that come before the effect."""
    begun = 0
    if fault in ("flaky", "random"):
        with activity.shield_thread_cancel_exception():
            begun = store.count(order.order_id, step)
    if fault == "random":  # drawn from what is the same when the test runs again
        draw = zlib.crc32(f"{order.order_id} {step} {begun}".encode()) % 3
        fault = ("down", "hang", "")[draw]
    if fault == "down" or (fault == "flaky" and begun <= 2):
        raise Outage(f"simulated outage of {step}")
    if fault == "hang" and _once(order, step, f"hang {begun}" if begun else fault):
        _wait(float("inf"))
    if fault == "crash-before" and _once(order, step, fault):
        _crash(step, order)


def _once(order: Order, step: str, fault: str) -> bool:
    """Tell whether the fault has yet to fire, and note that it now does.

    The attempt number would not do: another order's crash may have used up the first attempt.
    """
    with activity.shield_thread_cancel_exception():
        return store.record(order.order_id, "fault", {step: fault}) > 0


def _wait(seconds: float) -> None:
    """Pass the time, beating: the server sees that we live, and a cancel reaches us."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        activity.heartbeat()
        time.sleep(min(BEAT_SECONDS, left))


def _crash(doing: str, order: Order) -> None:
    """Die here, at once and without cleaning up, as under kill -9."""
    log.info("worker %d dies while %s for %s", os.getpid(), doing, order.order_id)
    os._exit(137)  # 128 + 9: what a shell reports after kill -9


def _write(note: Note) -> None:
    """Write the note, once, however often we are asked."""
    store.record(note.order.order_id, note.type, note.payload)
