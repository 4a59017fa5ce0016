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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from typing import Any, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError, CancelledError

import charge_store as store

T = TypeVar("T")
log = logging.getLogger("orders")

FAULTS = {
    "flaky": "the first two attempts fail, the third works: an outage that ends",
    "down": "every attempt fails: an outage that does not end",
    "hang": "no answer, once, until the timeout of 10 s or, in the story, a cancel ends it",
    "slow": "the effect happens, then the answer takes 5 s",
    "late": "the request reaches the provider 5 s late, once, even if the order was given up",
    "crash-before": "the worker process dies, once, before the effect",
    "crash-after": "the worker process dies, once, after the effect, before Temporal hears of it",
    "random": "one third fails, one third hangs, one third works; the same order draws the same",
}
SLOW_SECONDS = 5  # long enough to kill the worker by hand in the middle of a charge
BEAT_SECONDS = 0.1  # a waiting activity says so often that it lives, and looks whether to stop


class PaymentDeclined(Exception):
    """The card cannot pay. Asking again would not help."""


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


def number(low: int, high: int, *types: type) -> Callable[[Any], bool]:
    """Make a test for a number in range; True is none, and NaN and infinity are in no range."""
    return lambda value: type(value) in types and low <= value <= high


def is_faults(value: Any) -> bool:
    """Tell whether the value names known steps and known faults."""
    known = [(step, fault) for step in STEPS for fault in FAULTS]
    return isinstance(value, dict) and all(pair in known for pair in value.items())


ID, ID_RULE = "[A-Za-z0-9._-]{1,100}", "must be 1 to 100 of the characters A-Z a-z 0-9 . _ -"
SECONDS, SECONDS_RULE = number(0, 86_400, int, float), "must be 0 to 86400 seconds"
TEXT = like(".{1,200}")
# Of each field: a test of its value, and how to say what it must be. Workflows run this as well, so
# a change here meets old histories, as one of workflows.py does (exercise 11).
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "order_id": (like(f"{ID}|charge-{ID}-[0-9]{{1,9}}"), ID_RULE),
    "customer_id": (like(ID), ID_RULE),
    "amount_cents": (number(1, 100_000_000, int), "must be 1 to 100000000 whole cents"),
    # Empty means "pay-" and the order's id: that of the longest order id has to be valid too.
    "payment_id": (like("[A-Za-z0-9._-]{0,104}"), ID_RULE.replace("100", "104")),
    "address": (lambda v: TEXT(v) and not v.isspace(), "must be 1 to 200 characters, not blank"),
    "card_expiry": (like("(0[1-9]|1[0-2])/[0-9]{2}"), "must be a month and a year like 12/30"),
    "wait_seconds": (SECONDS, SECONDS_RULE),
    "review": (like("person|timer"), "must be person or timer"),
    "review_seconds": (lambda value: value is None or SECONDS(value), SECONDS_RULE),
    "deadline_seconds": (SECONDS, SECONDS_RULE),
    "max_attempts": (number(0, 100, int), "must be 0 (no limit) to 100"),
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
    for name in raw:
        if name not in RULES:
            raise invalid(f"{ascii(name)[:80]}: unknown field, must be of {', '.join(RULES)}")
    order = Order(**raw)
    for name, (is_valid, rule) in RULES.items():
        value = getattr(order, name)
        if not is_valid(value):
            raise invalid(f"{name}: {rule}, not {ascii(value)[:80]}")
    for taken in ("ship-",) if charge else ("ship-", "charge-"):
        if order.order_id.startswith(taken):
            raise invalid(f"order_id: must not begin with {taken}, as {order.order_id} does")
    if order.order_id != workflow_id:
        raise invalid(f"order_id: must be the workflow id {workflow_id!a}, not {order.order_id}")
    window = {"person": 30, "timer": 2}[order.review]
    return replace(
        order,
        payment_id=order.payment_id or f"pay-{order.order_id}",
        review_seconds=window if order.review_seconds is None else order.review_seconds,
    )


def attempt(order: Order, effect: Callable[[], T], doing: str = "", **payload: Any) -> T:
    """Make one attempt: note it with this payload, play its fault, do the effect, note its end."""
    step, number = activity.info().activity_type, activity.info().attempt
    doing = f"{doing or step} for {order.order_id}, attempt {number}"
    fault = order.simulate.get(step, "")
    started, ended = time.monotonic(), "ok"
    event = store.note(order.order_id, step, {**payload, "worker": os.getpid()}, number)
    log.info("%s ...", doing)
    try:
        fail_before(order, step, fault)
        result = effect()
        if fault == "slow":
            wait(SLOW_SECONDS)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
        log.info("%s, failed: %s", doing, error)
        raise
    finally:
        store.finish(event, ended, time.monotonic() - started)
    if fault == "crash-after" and claim(order, step, fault):
        crash(order, step)
    return result


def fail_before(order: Order, step: str, fault: str) -> None:
    """Play the faults that come before the effect."""
    if fault == "random":  # drawn from what is the same when the order is played again
        begun = store.count(order.order_id, step)
        draws = ["down", f"hang at attempt {begun}", ""]
        fault = Random(f"{order.order_id} {step} {begun}").choice(draws)
    if fault == "down" or (fault == "flaky" and store.count(order.order_id, step) <= 2):
        raise ConnectionError(f"simulated outage of {step}")
    if fault.startswith("hang") and claim(order, step, fault):
        wait(float("inf"))
    if fault == "late" and claim(order, step, fault):
        wait(SLOW_SECONDS, obedient=False)
    if fault == "crash-before" and claim(order, step, fault):
        crash(order, step)


def claim(order: Order, step: str, fault: str) -> bool:
    """Claim a fault that fires once per order and step; return whether nobody had it before."""
    # The attempt's number would not do: another order's crash may have used up the first one.
    return store.note(order.order_id, "fault", {step: fault}) > 0


def wait(seconds: float, obedient: bool = True) -> None:
    """Pass the time, beating; stop if told to, by a cancel, say, or by the worker's own end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        activity.heartbeat()
        if obedient and activity.is_cancelled():
            raise CancelledError("told to stop")
        time.sleep(min(BEAT_SECONDS, left))


def crash(order: Order, step: str) -> None:
    """Die here, at once and without cleaning up, as under kill -9."""
    log.info("worker %d dies in %s of %s", os.getpid(), step, order.order_id)
    os._exit(137)  # 128 + 9: what a shell reports after kill -9


def perform(order: Order, kind: str, key: str) -> dict[str, Any]:
    """Ask the provider for an effect and say when it had been done before."""
    receipt = store.perform(kind, key, order.order_id, order.customer_id, order.amount_cents)
    if receipt["requests"] > 1:
        log.info("already %s: same receipt (requests %d)", receipt["status"], receipt["requests"])
    return receipt


def write(order: Order, notes: list[dict[str, Any]]) -> None:
    """Write notes, each once a run, however often we are asked; all but its type is its payload."""
    run = {"run": activity.info().workflow_run_id}  # after a reset their numbers begin at 1 again
    for note in notes:
        activity.heartbeat()
        payload = {name: value for name, value in note.items() if name != "type"}
        store.note(order.order_id, note["type"], payload | run)


def charge(order: Order) -> dict[str, Any]:
    """Ask for the charge, unless its card expired, at a month's end, before it was ever asked."""
    month, year = order.card_expiry.split("/")
    today = datetime.now(UTC)
    asked = "charge" in [effect["kind"] for effect in store.effects_of(order.order_id)]
    if not asked and (2000 + int(year), int(month)) < (today.year, today.month):
        raise PaymentDeclined(f"card expired {order.card_expiry}")
    return perform(order, "charge", order.payment_id)


def undo(order: Order, kind: str, key: str) -> str:
    """Ask the provider to undo an effect, or never to do it."""
    return store.undo(kind, key, order.order_id, order.customer_id, order.amount_cents)


# The activities. Their first sentences are what Temporal's Web UI calls them.
# A cancel is not thrown into the thread, where logging may hold its lock: wait() looks for it.
in_thread = activity.defn(no_thread_cancel_exception=True)


@in_thread
def receive_order(order: Order, first_run: str) -> None:
    """Write the order down, and refuse it if its id is another's."""
    contents, run_id = asdict(order), activity.info().workflow_run_id or ""
    attempt(order, lambda: store.look_back(contents, run_id, first_run), run=run_id, **contents)


@in_thread
def validate_order(order: Order) -> None:
    """Check the order. Again: an activity does not rely on what its caller has checked."""
    attempt(order, lambda: parse_order(asdict(order), activity.info().workflow_id or ""))


@in_thread
def reserve_inventory(order: Order) -> dict[str, Any]:
    """Put the goods aside."""
    return attempt(order, lambda: perform(order, "reservation", order.order_id))


@in_thread
def charge_payment(order: Order) -> dict[str, Any]:
    """Charge the customer. The key is the payment id: it means the same on every attempt."""
    doing = f"charging {order.customer_id} {order.amount_cents / 100:.2f}"
    return attempt(order, lambda: charge(order), doing)


@in_thread
def prepare_package(order: Order) -> None:
    """Pack the goods."""
    attempt(order, lambda: None, address=order.address)


@in_thread
def dispatch_carrier(order: Order) -> dict[str, Any]:
    """Hand over to the carrier. This is what cannot be undone."""
    return attempt(order, lambda: perform(order, "dispatch", order.order_id), address=order.address)


@in_thread
def look_back(order: Order, first_run: str) -> bool:
    """Tell whether another run received the order before; refuse it if its id is another's."""
    run_id = activity.info().workflow_run_id or ""
    return attempt(order, lambda: store.look_back(asdict(order), run_id, first_run))


@in_thread
def void_dispatch(order: Order) -> str:
    """Forbid the dispatch. Return "voided", or "dispatched" if it has happened."""
    return attempt(order, lambda: undo(order, "dispatch", order.order_id))


@in_thread
def refund_payment(order: Order) -> str:
    """Give the money back. If none was taken yet, forbid taking it late."""
    return attempt(order, lambda: undo(order, "charge", order.payment_id))


@in_thread
def release_inventory(order: Order) -> str:
    """Put the goods back. If none were taken yet, forbid taking them late."""
    return attempt(order, lambda: undo(order, "reservation", order.order_id))


@in_thread
def record_decision(order: Order, notes: list[dict[str, Any]]) -> None:
    """Write down what people asked for."""
    attempt(order, lambda: write(order, notes))


@in_thread
def record_outcome(order: Order, outcome: dict[str, Any]) -> None:
    """Write down how this run ended: an order that was reset has an outcome for each."""
    note = {"type": "outcome", **outcome}
    attempt(order, lambda: write(order, [note]), f"recording {outcome['state']}")


Steps = list[Callable[..., Any]]
UNDOS: Steps = [release_inventory, refund_payment]  # in the order of the steps
ORDER_STEPS: Steps = [receive_order, validate_order, reserve_inventory, charge_payment, *UNDOS]
ORDER_STEPS += [void_dispatch, look_back, record_decision, record_outcome]
SHIPPING_STEPS: Steps = [prepare_package, dispatch_carrier]
STEPS = [step.__name__ for step in ORDER_STEPS + SHIPPING_STEPS]
