"""Proves every claim of the README, against a real Temporal server with real kills.

The orders of one group run side by side on one worker, once; each test then looks at one of them.
Every wait is bounded and polls for a condition; no test depends on something being fast.
"""

import asyncio
import importlib
import io
import itertools
import json
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent, TimerCanceledEventAttributes
from temporalio.client import (
    Client,
    WithStartWorkflowOperation,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
    WorkflowUpdateFailedError,
)
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Replayer, Worker

import charge_store as store
from activities import FAULTS, ORDER_STEPS, RULES, STEPS, Order, parse_order
from starter import (
    CRASH_TESTS,
    EXERCISES,
    HERE,
    SERVER_FLAGS,
    Stage,
    changed_copy,
    free_port,
    is_listening,
    persist,
    private_stage,
    sections,
    temporal_binary,
)
from worker import DATA_CONVERTER, make_workers
from workflows import ORDERS_QUEUE, SHIPPING_QUEUE, OrderWorkflow

SCRIPTS = ("charge_store.py", "worker.py", "starter.py", "signals.py")
BRIEF = timedelta(seconds=3)
LONG = 60  # seconds after which a wait has failed; far above what anything here takes
PATIENT = {"deadline_seconds": 600, "max_attempts": 0}
PAID = {"charge": "charged", "reservation": "reserved", "dispatch": "dispatched"}
UNPAID = {"reservation": "released"}
REFUNDED = {"charge": "refunded", "reservation": "released"}
VOIDED_CHARGE = REFUNDED | {"charge": "voided"}
VOIDED = REFUNDED | {"dispatch": "voided"}


def within(work: Coroutine[Any, Any, Any], seconds: float = LONG) -> Any:
    """Run async work in a loop of its own, bounded."""
    return asyncio.run(asyncio.wait_for(work, seconds))


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """Set a stage with a server and a ledger of its own; at the end the audit must be clean."""
    with asyncio.Runner() as runner:
        context = private_stage()
        stage = runner.run(context.__aenter__())
        yield stage
        violations = store.audit()
        runner.run(context.__aexit__(None, None, None))
    assert violations == []


@pytest.fixture(scope="session")
def worker(stage: Stage) -> subprocess.Popen[bytes]:
    """Run one worker process for the whole session."""
    return stage.start_worker()


async def connect(stage: Stage) -> Client:
    return await Client.connect(stage.address, data_converter=DATA_CONVERTER)


# Scenarios: an order, what people do to it and when, and how it must end.


@dataclass
class Scenario:
    """An order, the messages it gets (in which state, what, with what) and what must come of it."""

    ends: str  # the state, or the type of the error that it failed with
    effects: dict[str, str]  # what the ledger must show, {kind: status}
    order: dict[str, Any] = field(default_factory=dict)
    sends: list[tuple[str, str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What came of a scenario."""

    ended: str
    status: dict[str, Any]
    effects: dict[str, str]
    events: list[dict[str, Any]]
    history: WorkflowHistory


YES = [("START", "approve", "fine")]
SLOW_CHARGE = {"simulate": {"charge_payment": "slow"}}
SCENARIOS: dict[str, Scenario] = {
    "approved": Scenario("COMPLETED", PAID, {}, [("AWAITING_REVIEW", "approve", "fine")]),
    "approved by timer": Scenario("COMPLETED", PAID, {"review": "timer", "review_seconds": 0.5}),
    "approved before it starts": Scenario("COMPLETED", PAID, {"review_seconds": 0}, YES),
    "approved while it waits": Scenario(
        "COMPLETED", PAID, {"wait_seconds": 5, "review_seconds": 0}, [("WAITING", "approve", "")]
    ),
    "approved twice": Scenario("COMPLETED", PAID, {}, [*YES, ("NOW", "approve", "again")]),
    "rejected": Scenario("REJECTED", UNPAID, {}, [("AWAITING_REVIEW", "reject", "no")]),
    "rejected before it starts": Scenario("REJECTED", UNPAID, {}, [("START", "reject", "no")]),
    "rejected in the timer's window": Scenario(
        "REJECTED",
        UNPAID,
        {"review": "timer", "review_seconds": 30},
        [("AWAITING_REVIEW", "reject", "no")],
    ),
    "the first decision stands": Scenario(
        "REJECTED", UNPAID, {"wait_seconds": 2}, [("START", "reject", "1"), ("NOW", "approve", "2")]
    ),
    "rejected too late": Scenario(
        "COMPLETED", PAID, SLOW_CHARGE, [*YES, ("CHARGING", "reject", "")]
    ),
    "expired": Scenario("EXPIRED", UNPAID, {"review_seconds": 0.5}),
    "card expired": Scenario("PaymentDeclined", VOIDED_CHARGE, {"card_expiry": "12/23"}, YES),
    "deadline while charging": Scenario(
        "DeadlineExceeded", REFUNDED, {"deadline_seconds": 4} | SLOW_CHARGE, YES
    ),
    "deadline while shipping": Scenario(
        "DeadlineExceeded",
        VOIDED,
        {"deadline_seconds": 4, "simulate": {"prepare_package": "hang"}},
        YES,
    ),
    "deadline after dispatch": Scenario(
        "COMPLETED", PAID, {"deadline_seconds": 4, "simulate": {"dispatch_carrier": "slow"}}, YES
    ),
    "deadline at once": Scenario("DeadlineExceeded", {}, {"deadline_seconds": 0}, YES),
    "review and wait do not count": Scenario(
        "COMPLETED",
        PAID,
        {"deadline_seconds": 4, "wait_seconds": 3, "review": "timer", "review_seconds": 3},
    ),
    "dispatch fails three times": Scenario(
        "OrderGivenUp", VOIDED, {"simulate": {"dispatch_carrier": "down"}}, YES
    ),
    "reserving fails for good": Scenario(
        "OrderGivenUp",
        {"reservation": "voided"},
        {"simulate": {"reserve_inventory": "down"}},
        YES,
    ),
    "cancelled while compensating": Scenario(
        "PaymentDeclined",
        VOIDED_CHARGE,
        {"card_expiry": "12/23", "simulate": {"refund_payment": "slow"}},
        [*YES, ("COMPENSATING", "cancel", "again"), ("COMPENSATING", "CANCEL", None)],
    ),
    "cancelled both ways at once": Scenario(
        "CANCELLED",
        REFUNDED,
        SLOW_CHARGE,
        [*YES, ("CHARGING", "cancel", "one"), ("NOW", "CANCEL", None)],
    ),
    "cancelled before a late dispatch": Scenario(
        "CANCELLED",
        VOIDED,
        {"simulate": {"dispatch_carrier": "late"}},
        [*YES, ("dispatch_carrier", "cancel", "in time")],
    ),
    "cancelled after dispatch": Scenario(
        "COMPLETED",
        PAID,
        {"simulate": {"dispatch_carrier": "slow"}},
        [*YES, ("DISPATCHED", "cancel", "too late")],
    ),
    "cancelled again and again": Scenario(
        "COMPLETED",
        PAID,
        {"simulate": {"record_outcome": "slow"}},
        [*YES, ("record_outcome", "cancel", "1"), ("NOW", "CANCEL", None), ("NOW", "cancel", "2")],
    ),
    "cancelled before it starts": Scenario("CANCELLED", {}, {}, [("START", "cancel", "no")]),
    "address changed": Scenario(
        "COMPLETED",
        PAID,
        {},
        [("START", "update_address", "2 Side Street"), ("AWAITING_REVIEW", "approve", "")],
    ),
    "address changed too late": Scenario(
        "COMPLETED",
        PAID,
        {"simulate": {"prepare_package": "slow"}},
        [*YES, ("SHIPPING", "update_address", "3 Late Street")],
    ),
    "signals of any shape": Scenario(
        "REJECTED",
        UNPAID,
        {},
        [
            ("START", "update_address", 5),
            ("AWAITING_REVIEW", "dispatch_failed", [{"a": [1]}, "surplus"]),
            ("NOW", "no_such_signal", None),
            ("NOW", "reject", ["n" * 600, "surplus"]),
        ],
    ),
    "shipping cancelled alone": Scenario(
        "CANCELLED",
        VOIDED,
        {"simulate": {"prepare_package": "late"}},
        [*YES, ("prepare_package", "CANCEL SHIPPING", None)],
    ),
}
# A cancel, by the signal and by Temporal itself, in each state it can come in.
CANCELS: list[tuple[str, dict[str, str], dict[str, Any], str]] = [
    ("WAITING", UNPAID, {"wait_seconds": 60}, ""),
    ("AWAITING_REVIEW", UNPAID, {}, ""),
    ("CHARGING", REFUNDED, SLOW_CHARGE, "slow"),
    ("CHARGING", VOIDED_CHARGE, {"simulate": {"charge_payment": "late"}}, "late"),
    ("SHIPPING", VOIDED, {"simulate": {"prepare_package": "slow"}}, "slow"),
]
for state, left, order, fault in CANCELS:
    for way in ("cancel", "CANCEL"):
        sends = [*(YES if fault else []), (state, way, "stop")]
        SCENARIOS[f"{way} while {state} {fault}"] = Scenario("CANCELLED", left, order, sends)


async def play(client: Client, scenario: Scenario, stage: Stage | None) -> Outcome:
    """Place a scenario's order, send its messages, and gather what came of it."""
    order_id = f"test-{uuid.uuid4().hex[:12]}"
    raw = PATIENT | {"max_attempts": 3, "order_id": order_id} | scenario.order
    first = next((send for send in scenario.sends if send[0] == "START"), None)
    handle = await persist(
        lambda: client.start_workflow(
            "OrderWorkflow",
            raw,
            id=order_id,
            task_queue=ORDERS_QUEUE,
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal=first[1] if first else None,
            start_signal_args=arguments(first[2]) if first else [],
        )
    )
    for state, name, argument in scenario.sends:
        if state == "START":
            continue
        if state != "NOW":
            await reach(handle, state)
        if name == "KILL" and stage:
            for process in stage.workers:
                process.kill()
        elif name == "KILL SERVER" and stage:
            await stage.kill_server()
            await stage.start_server()
        elif name.startswith("CANCEL"):
            target = f"ship-{order_id}" if name == "CANCEL SHIPPING" else order_id
            await persist(client.get_workflow_handle(target).cancel)
        else:
            await persist(partial(handle.signal, name, args=arguments(argument)))
    return await gather(handle)


def arguments(argument: Any) -> list[Any]:
    """Make a list of a signal's arguments."""
    return argument if isinstance(argument, list) else [argument]


async def status_of(handle: WorkflowHandle[Any, Any]) -> dict[str, Any]:
    """Query an order's status, again while there is no worker or no server."""
    while True:
        with suppress(RPCError):
            status: dict[str, Any] = await handle.query("status", rpc_timeout=BRIEF)
            return status


async def reach(handle: WorkflowHandle[Any, Any], state: str) -> None:
    """Wait until the order is in a state, or until a step of it has begun."""
    for _ in range(LONG * 10):
        if state in STEPS or state == "DISPATCHED":
            if store.count(handle.id, state) or "dispatch" in ledger(handle.id):
                return
        elif (await status_of(handle))["state"] == state:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{handle.id} did not reach {state}")


def ledger(order_id: str, what: str = "status") -> dict[str, Any]:
    """Read an order's effects: {kind: status}."""
    rows = store.select("SELECT * FROM effects WHERE order_id = ? ORDER BY rowid", order_id)
    assert len({row["kind"] for row in rows}) == len(rows), (
        f"{order_id} has an effect twice: {rows}"
    )
    return {row["kind"]: row[what] for row in rows}


async def gather(handle: WorkflowHandle[Any, Any]) -> Outcome:
    """Wait for an order's end and collect what it left."""
    try:
        ended = await persist(handle.result)
    except WorkflowFailureError as error:
        assert isinstance(error.cause, ApplicationError), error.cause
        ended = str(error.cause.type)
    return Outcome(
        ended,
        await status_of(handle),
        ledger(handle.id),
        store.select("SELECT * FROM events WHERE order_id = ? ORDER BY id", handle.id),
        await persist(handle.fetch_history),
    )


async def play_all(
    client: Client, scenarios: dict[str, Scenario], stage: Stage | None = None, at_once: int = 24
) -> dict[str, Any]:
    """Play scenarios side by side and keep what each gave; those against the clock come first.

    So few at once that a message comes within the 5 s in which its step is slow.
    """
    urgent = {n: s for n, s in scenarios.items() if s.order.get("deadline_seconds", 600) < 600}
    places = asyncio.Semaphore(at_once)

    async def one(scenario: Scenario) -> Outcome:
        async with places:
            return await asyncio.wait_for(play(client, scenario, stage), 2 * LONG)

    results: dict[str, Any] = {}
    for group in (urgent, {n: s for n, s in scenarios.items() if n not in urgent}):
        outcomes = await asyncio.gather(*map(one, group.values()), return_exceptions=True)
        results |= zip(group, outcomes, strict=True)
    return results


@pytest.fixture(scope="session")
def played(stage: Stage, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Play all scenarios, and every fault that passes on every activity, on a worker process."""

    async def work() -> dict[str, Any]:
        client = await connect(stage)
        outcomes = await play_all(client, SCENARIOS)
        stuck = asyncio.gather(*(play_down(client, step) for step in STEPS))
        outcomes |= await play_all(client, FAULTY, at_once=44)
        return outcomes | dict(zip(STEPS, await stuck, strict=True))

    outcomes: dict[str, Any] = within(work(), 5 * LONG)
    return outcomes


async def play_down(client: Client, step: str) -> str:
    """Play an outage without end of one step: tell how the order ended, or where it is stuck."""
    simulate = {step: "down"} | (GIVEN_UP if step in UNDO_STEPS else {})
    raw: dict[str, Any] = {"order_id": f"down-{step}", "simulate": simulate}
    raw["deadline_seconds"] = 600
    handle = await client.start_workflow(
        "OrderWorkflow",
        raw,
        id=raw["order_id"],
        task_queue=ORDERS_QUEUE,
        start_signal="approve",
    )
    if step not in (*UNDO_STEPS, "record_decision", "record_outcome"):
        return (await gather(handle)).ended
    while store.count(handle.id, step) < 6:
        await asyncio.sleep(0.1)
    state = str((await status_of(handle))["state"])
    await handle.terminate()
    return state


def check(name: str, scenario: Scenario, outcome: Outcome | BaseException) -> None:
    """Compare what came of a scenario with what must come of it."""
    if isinstance(outcome, BaseException):
        raise outcome
    assert (outcome.ended, outcome.effects) == (scenario.ends, scenario.effects)
    state = scenario.ends if scenario.ends.isupper() else "FAILED"
    assert outcome.status["state"] == state
    # Nothing comes after the outcome but the attempts at writing it down.
    last = [e for e in outcome.events if e["type"] not in ("fault", "record_outcome")][-1]
    assert (last["type"], json.loads(last["payload_json"])["state"]) == ("outcome", state)


@pytest.mark.parametrize("name", SCENARIOS)
def test_order_ends_as_told(name: str, played: dict[str, Any]) -> None:
    check(name, SCENARIOS[name], played[name])


# Every fault on every activity. The undo steps need an order that is given up: its packing fails.

UNDO_STEPS = ("void_dispatch", "refund_payment", "release_inventory")
GIVEN_UP = {"prepare_package": "down"}


def with_fault(step: str, fault: str, fields: dict[str, Any]) -> Scenario:
    """Make a scenario in which a step meets a fault."""
    if step in UNDO_STEPS:
        sends = [*YES, ("prepare_package", "cancel", "")]
        return Scenario("CANCELLED", VOIDED, fields | {"simulate": GIVEN_UP | {step: fault}}, sends)
    return Scenario("COMPLETED", PAID, fields | {"simulate": {step: fault}}, YES)


FAULTY = {
    f"{step} {fault}": with_fault(step, fault, {})
    for step in STEPS
    for fault in ("flaky", "hang", "slow", "late")
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_that_passes_changes_nothing(name: str, played: dict[str, Any]) -> None:
    check(name, FAULTY[name], played[name])
    step, fault = name.split()
    attempts = [event for event in played[name].events if event["type"] == step]
    wanted = {"flaky": 3, "hang": 2}.get(fault, 1)
    assert len(attempts) == wanted, attempts


@pytest.mark.parametrize("step", STEPS)
def test_an_outage_without_end_fails_the_order_but_never_its_compensation(
    step: str, played: dict[str, Any]
) -> None:
    if step in UNDO_STEPS:
        assert played[step] == "COMPENSATING"
    elif step.startswith("record"):
        assert played[step] == "SHIPPING"  # all is done, only the last word is not written yet
    else:
        assert played[step] == "OrderGivenUp"
        assert "charged" not in ledger(f"down-{step}").values()


# The crash matrix: a process dies in every activity, before and after its effect.

CRASHES = {
    f"{step} {fault}": with_fault(step, fault, PATIENT)
    for step in STEPS
    for fault in ("crash-before", "crash-after")
} | {
    "worker killed in the review": Scenario(
        "COMPLETED",
        PAID,
        PATIENT | {"review_seconds": 60},
        [("AWAITING_REVIEW", "KILL", None), ("NOW", "approve", "")],
    ),
    "worker killed while the child runs": Scenario(
        "COMPLETED",
        PAID,
        PATIENT | {"simulate": {"prepare_package": "slow"}},
        [*YES, ("prepare_package", "KILL", None)],
    ),
    "server killed in a charge": Scenario(
        "COMPLETED", PAID, PATIENT | SLOW_CHARGE, [*YES, ("charge_payment", "KILL SERVER", None)]
    ),
    # So long that it still waits when, amid all those crashes, a worker has time to say so.
    "server killed in a wait": Scenario(
        "COMPLETED", PAID, PATIENT | {"wait_seconds": 15}, [*YES, ("WAITING", "KILL SERVER", None)]
    ),
}
CALM = {"COMPLETED": "approved", "CANCELLED": "cancel while SHIPPING slow"}  # the same without


@pytest.fixture(scope="session")
def crashed(stage: Stage) -> dict[str, Any]:
    """Play the crash matrix on some workers, each revived when it dies."""
    for process in list(stage.workers):
        stage.kill_worker(process)
    for _ in range(5):  # the fewer there are, the more orders each death holds up
        stage.start_worker()

    async def work() -> dict[str, Any]:
        client = await connect(stage)
        reviving = asyncio.create_task(revive(stage))
        outcomes = await play_all(client, CRASHES, stage, at_once=44)
        reviving.cancel()
        return outcomes

    outcomes: dict[str, Any] = within(work(), 5 * LONG)
    return outcomes


async def revive(stage: Stage) -> None:
    """Start another worker whenever one has died."""
    while True:
        stage.revive()
        await asyncio.sleep(0.1)


def rows(outcome: Outcome) -> list[tuple[Any, ...]]:
    """List what an order left in the ledger, without its id."""
    order_id = outcome.status["order_id"]
    return sorted(
        (
            row["kind"],
            row["idempotency_key"].replace(order_id, ""),
            row["amount_cents"],
            row["status"],
        )
        for row in store.select("SELECT * FROM effects WHERE order_id = ?", order_id)
    )


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_leaves_the_same_ledger_as_a_calm_run(
    name: str, played: dict[str, Any], crashed: dict[str, Any]
) -> None:
    scenario, outcome = CRASHES[name], crashed[name]
    check(name, scenario, outcome)
    assert rows(outcome) == rows(played[CALM[scenario.ends]])
    step, _, fault = name.partition(" ")
    if fault.startswith("crash"):
        assert json.dumps({step: fault}) in [event["payload_json"] for event in outcome.events]


@pytest.fixture(scope="session")
def replayed(stage: Stage, played: dict[str, Any]) -> dict[str, Any]:
    """Play all scenarios on workers that remember nothing: each step replays from the start."""
    for process in list(stage.workers):
        stage.kill_worker(process)

    async def work() -> dict[str, Any]:
        client = await connect(stage)
        forgetful, shipping = make_workers(client, max_cached_workflows=0)
        async with forgetful, shipping:
            return await play_all(client, SCENARIOS)

    outcomes: dict[str, Any] = within(work(), 5 * LONG)
    stage.start_worker()
    return outcomes


@pytest.mark.parametrize("name", SCENARIOS)
def test_order_ends_the_same_when_each_step_is_replayed(
    name: str, replayed: dict[str, Any]
) -> None:
    check(name, SCENARIOS[name], replayed[name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_history_replays(name: str, played: dict[str, Any]) -> None:
    within(Replayer(workflows=[OrderWorkflow]).replay_workflow(played[name].history))


@pytest.mark.parametrize("name", ["approved", "dispatch fails three times", "card expired"])
def test_each_prefix_of_a_history_replays(name: str, played: dict[str, Any]) -> None:
    history = played[name].history

    async def work() -> None:
        for i, event in enumerate(history.events):
            if event.HasField("workflow_task_completed_event_attributes"):
                prefix = WorkflowHistory(history.workflow_id, history.events[: i + 1])
                await Replayer(workflows=[OrderWorkflow]).replay_workflow(prefix)

    within(work())


@pytest.mark.parametrize("way", ["cancel", "CANCEL", "deadline"])
def test_a_stop_is_obeyed_that_comes_together_with_a_steps_answer(stage: Stage, way: str) -> None:
    """Both reach the workflow in one task; the `await` returns the answer and drops the stop."""
    order_id, queue = f"together-{way}", f"together-{way}-tq"
    deadline = 3 if way == "deadline" else 600

    async def work() -> Outcome:
        client = await connect(stage)
        deciding: dict[str, Any] = {"task_queue": queue, "workflows": [OrderWorkflow]}
        doing: dict[str, Any] = {
            "task_queue": queue,
            "activities": ORDER_STEPS,
            "activity_executor": threads,
        }
        raw = {"order_id": order_id, "deadline_seconds": deadline}
        handle = await client.start_workflow("OrderWorkflow", raw, id=order_id, task_queue=queue)
        async with Worker(client, **deciding):
            while not (await handle.describe()).raw_description.pending_activities:
                await asyncio.sleep(0.05)
        async with Worker(client, **doing):
            while (await handle.describe()).raw_description.pending_activities:
                await asyncio.sleep(0.05)
        if way == "deadline":
            await asyncio.sleep(deadline)
        else:
            await (handle.cancel() if way == "CANCEL" else handle.signal("cancel"))
        async with Worker(client, **deciding), Worker(client, **doing):
            return await gather(handle)

    with ThreadPoolExecutor(4) as threads:
        outcome = within(work())
    assert outcome.ended == ("DeadlineExceeded" if way == "deadline" else "CANCELLED")
    assert outcome.effects == {}
    # If the server was not busy enough to fire the timer late, replay what would have been then.
    if outcome.history.events[9].HasField("timer_fired_event_attributes"):
        within(Replayer(workflows=[OrderWorkflow]).replay_workflow(with_late_timer(outcome)))


def with_late_timer(outcome: Outcome) -> WorkflowHistory:
    """Tell such a history as if a busy server had not fired the deadline's timer by that task."""
    events = [HistoryEvent.FromString(e.SerializeToString()) for e in outcome.history.events[:13]]
    fired = events.pop(9).timer_fired_event_attributes
    _, completed, record_outcome = events[9:]
    attributes = TimerCanceledEventAttributes(
        timer_id=fired.timer_id,
        started_event_id=fired.started_event_id,
        workflow_task_completed_event_id=11,
    )
    events.insert(
        11,
        HistoryEvent(
            event_type=EventType.EVENT_TYPE_TIMER_CANCELED,
            timer_canceled_event_attributes=attributes,
        ),
    )
    for number, event in enumerate(events, 1):
        event.event_id = number
    completed.workflow_task_completed_event_attributes.started_event_id = 10
    record_outcome.activity_task_scheduled_event_attributes.workflow_task_completed_event_id = 11
    return WorkflowHistory(outcome.history.workflow_id, events)


RED = "\x1b[31mred\u202e\n"  # a colour, a reversal of the text and a line of its own
NAN, INF = float("nan"), float("inf")
STUCK = "prepare_package=down"

# The limits of an order: {field: (good values, bad values)}.

BAD_ID = [" ", "a b", "x" * 101, "a\n", "ä", "٣", "a/b", 5, None, True, ["a"]]
BAD_SECONDS = [-0.1, 86_400.1, NAN, INF, -INF, 10**400, "5", True, [1]]
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "order_id": (["A-z.0_9", "x" * 100, "a-ship-1"], ["", "ship-1", "charge-1", *BAD_ID]),
    "customer_id": (["a", "x" * 100, "ship-1"], ["", *BAD_ID]),
    "amount_cents": ([1, 10**8], [0, -1, 10**8 + 1, 12.5, 100.0, True, "100", None, NAN, INF]),
    "payment_id": (["p", "x" * 100], BAD_ID),
    "address": (["1", " 1 ", "x" * 200, RED], ["", " \t\n", "x" * 201, 5, None, ["1"]]),
    "card_expiry": (["01/30", "12/99"], ["", "13/30", "00/30", "1/30", "12/2030", "12/30\n", 1230]),
    "wait_seconds": ([0, 0.5, 86_400], [*BAD_SECONDS, None]),
    "review": (["person", "timer"], ["", "Person", "timer\n", None, True]),
    "review_seconds": ([0, 0.5, 86_400], BAD_SECONDS),
    "deadline_seconds": ([0, 0.5, 86_400], [*BAD_SECONDS, None]),
    "max_attempts": ([0, 100], [-1, 101, 2.5, 1.0, True, "3", None, NAN]),
    "simulate": (
        [{}, {"charge_payment": "down", "release_inventory": "crash-after"}],
        [None, [], "down", {"x": "down"}, {"charge_payment": "x"}, {"charge_payment": ["down"]}],
    ),
    "colour": ([], ["red"]),  # unknown
}


@pytest.mark.parametrize("field", LIMITS)
def test_a_value_within_its_limits_is_taken_and_any_other_refused_by_name(field: str) -> None:
    good, bad = LIMITS[field]
    for value in good:
        raw: dict[str, Any] = {"order_id": "order-1"} | {field: value}
        assert getattr(parse_order(raw, raw["order_id"]), field) == value
    for value in bad:
        raw = {"order_id": "order-1"} | {field: value}
        with pytest.raises(ApplicationError) as refused:
            pytest.fail(f"taken: {parse_order(raw, raw['order_id'])}")
        assert field in refused.value.message.split(":")[0]
        assert (refused.value.type, refused.value.non_retryable) == ("InvalidOrder", True)
        assert refused.value.message.isprintable()


def test_an_order_id_is_the_workflow_id_and_defaults_are_filled_in() -> None:
    with pytest.raises(ApplicationError, match=r"order_id: .*other"):
        parse_order({"order_id": "a"}, "other")
    order = parse_order({"order_id": "a"}, "a")
    assert order == Order("a", payment_id="pay-a", review_seconds=30)
    assert parse_order(asdict(order), "a") == order
    assert parse_order({"order_id": "a", "review": "timer"}, "a").review_seconds == 2
    assert parse_order({"order_id": "charge-a-1"}, "charge-a-1", charge=True).payment_id


# The ledger and the audit, without Temporal.

CHARGE = ("charge", "k", "o", "c", 5)
UNDONE = [*(REFUNDED | {"dispatch": "dispatched"}).items(), *((kind, "voided") for kind in PAID)]


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep one test's ledger in a file of its own."""
    monkeypatch.setenv("CHARGE_STORE", str(tmp_path / "store.db"))


def test_a_charge_many_ask_for_is_made_once_and_each_request_counts(empty_store: None) -> None:
    hammer = f"import charge_store as s\nfor _ in range(50): s.perform(*{CHARGE})"
    processes = [subprocess.Popen([sys.executable, "-c", hammer], cwd=HERE) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        receipts = list(threads.map(lambda _: store.perform(*CHARGE), range(8 * 50)))
    assert [process.wait(LONG) for process in processes] == [0] * 4
    [row] = store.select("SELECT * FROM charges")
    assert (row["status"], row["requests"]) == ("charged", 600)
    assert {receipt["created_at"] for receipt in receipts} == {row["created_at"]}


@pytest.mark.parametrize("owner", [("o2", "c", 5), ("o", "c2", 5), ("o", "c", 6)])
def test_a_key_of_another_order_customer_or_amount_charges_and_refunds_nothing(
    owner: tuple[str, str, int], empty_store: None
) -> None:
    other = ("charge", "k", *owner)
    first = store.perform(*CHARGE)
    with pytest.raises(store.PaymentConflict):
        store.perform(*other)
    assert store.undo(*other) == "not ours"
    assert store.perform(*CHARGE) == first | {"requests": 3}
    assert [store.undo(*CHARGE), store.undo(*other)] == ["refunded", "not ours"]


@pytest.mark.parametrize(("kind", "undone"), UNDONE)
def test_what_was_undone_is_refused_for_good_and_a_package_that_left_stays_away(
    kind: str, undone: str, empty_store: None
) -> None:
    effect = (kind, "k", "o", "c", 5)
    if undone != "voided":
        store.perform(*effect)
    assert [store.undo(*effect), store.undo(*effect)] == [undone, undone]
    if undone == "dispatched":
        assert store.perform(*effect)["requests"] == 2
    else:
        with pytest.raises(store.OrderGivenUp):
            store.perform(*effect)
    assert ledger("o") == {kind: undone}


def test_a_note_is_written_once_and_each_attempt_leaves_a_row(empty_store: None) -> None:
    noted = [store.record("o", "approve", {"n": n}) for n in (1, 1, 2)]
    assert [bool(id_) for id_ in noted] == [True, False, True]
    # Each new child begins at attempt 1 again.
    tried = {store.record("o", "prepare_package", {}, attempt=1) for _ in range(2)}
    assert len(tried) == 2 and 0 not in tried
    assert (store.count("o", "approve"), store.count("o", "prepare_package")) == (2, 2)


def test_a_store_that_is_deleted_is_made_anew_and_keeps_all_it_is_given(empty_store: None) -> None:
    look = (
        "import charge_store as s; print(len(s.select('SELECT * FROM charges')), s.count('o', 'x'))"
    )
    charge, note = partial(store.perform, *CHARGE), partial(store.record, "o", "x", {}, 1)
    for first, second in ((charge, note), (note, charge), (charge, note)):
        first()
        second()
        seen = subprocess.run(
            [sys.executable, "-c", look], cwd=HERE, capture_output=True, text=True, timeout=LONG
        )
        assert seen.stdout == "1 1\n", seen
        store.store_path().unlink()


def test_money_and_decisions_are_on_disk_when_answered_and_notes_soon_after(
    empty_store: None,
) -> None:
    ran: dict[str, list[str]] = {"FULL": [], "NORMAL": []}
    for level, number in (("FULL", 2), ("NORMAL", 1)):
        with store.connect(level) as connection:
            assert connection.execute("PRAGMA synchronous").fetchone()[0] == number
            connection.set_trace_callback(ran[level].append)
    store.perform(*CHARGE)
    store.undo(*CHARGE)
    store.record("o", "approve", {})
    assert (len(ran["FULL"]), len(ran["NORMAL"])) == (3, 0)
    store.finish(store.record("o", "charge_payment", {}, 1), "ok", 1)
    assert (len(ran["FULL"]), len(ran["NORMAL"])) == (3, 2)


ALL = "charge reservation dispatch"
AUDITED = [  # effects in force, outcomes in turn, and how many lines the audit must give
    ("", "", 0),
    (ALL, "COMPLETED", 0),
    (ALL, "FAILED COMPLETED", 0),
    (ALL, "COMPLETED FAILED", 3),
    (ALL, "", 0),
    ("charge reservation", "COMPLETED", 1),
    ("", "COMPLETED", 3),
    ("charge", "REJECTED", 1),
    ("", "EXPIRED", 0),
    (f"charge {ALL}", "", 1),
    (f"charge {ALL}", "COMPLETED", 1),
    ("dispatch dispatch reservation reservation", "", 2),
]


@pytest.mark.parametrize(("in_force", "outcomes", "violations"), AUDITED)
def test_the_audit_has_a_line_for_each_effect_that_does_not_fit_the_last_outcome(
    in_force: str, outcomes: str, violations: int, empty_store: None
) -> None:
    for number, kind in enumerate(in_force.split()):
        store.perform(kind, f"k{number}", RED, "c", 5)
        store.undo(kind, f"v{number}", RED, "c", 5)  # what is voided counts for nothing
    for state in outcomes.split():
        store.record(RED, "outcome", {"state": state})
    done = cli("charge_store.py --audit")
    assert (done.returncode, done.stderr) == (violations > 0, "") and "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == max(violations, 1)


# Orders that our scripts would not send: straight to the server.


@pytest.fixture(scope="session")
def served(stage: Stage, worker: subprocess.Popen[bytes]) -> Stage:
    """Set the stage with a worker on it."""
    return stage


def bounded(test: Callable[[Client], Coroutine[Any, Any, None]]) -> Callable[[Stage], None]:
    """Make a test of an async one: in a loop of its own, with a client, bounded."""

    async def work(stage: Stage) -> None:
        await test(await connect(stage))

    return lambda served: within(work(served))


WHOLE: list[Any] = [[], [None], ["an order"], [5], [{}], [[{"order_id": "bad-"}]]]
WHOLE += [[{"order_id": "bad-other"}], [{"order_id": "bad-1"}, {"order_id": "bad-1"}]]
FIELDS: list[Any] = [{"colour": "red"}, {"max_attempts": -1}, {"wait_seconds": NAN}]
FIELDS += [{"review_seconds": 1e300}, {"amount_cents": True}, {"deadline_seconds": "5"}]
KINDS = {
    "OrderWorkflow": (ORDERS_QUEUE, "", ""),
    "ChargeWorkflow": (ORDERS_QUEUE, "charge-", "charge-"),
    "ShippingWorkflow": (SHIPPING_QUEUE, "ship-", ""),
}


@bounded
async def test_a_malformed_order_fails_at_once_and_leaves_no_trace(client: Client) -> None:
    async def send(kind: str, inputs: Any) -> str:
        (queue, prefix, order_prefix), name = KINDS[kind], f"bad-{uuid.uuid4().hex}"
        if isinstance(inputs, dict):
            inputs = [{"order_id": order_prefix + name} | inputs]
        sent = client.execute_workflow(kind, args=inputs, id=prefix + name, task_queue=queue)
        with pytest.raises(WorkflowFailureError) as failed:
            await asyncio.wait_for(sent, LONG / 2)
        return str(getattr(failed.value.cause, "type", failed.value.cause))

    sent = [(kind, inputs) for kind in KINDS for inputs in [*WHOLE, *FIELDS]]
    ends = await asyncio.gather(*(send(*one) for one in sent), return_exceptions=True)
    wrong = [(*one, end) for one, end in zip(sent, ends, strict=True) if end != "InvalidOrder"]
    assert wrong == []
    left = store.select("SELECT order_id FROM events UNION SELECT order_id FROM effects")
    assert not [row for row in left if "bad-" in row["order_id"]]


# Updates, and the trail that an order leaves.


async def place(client: Client, approved: bool = True, **fields: Any) -> WorkflowHandle[Any, Any]:
    """Place an order, approved in advance or not."""
    raw = PATIENT | {"order_id": f"more-{uuid.uuid4().hex}"} | fields
    yes = "approve" if approved else None
    return await client.start_workflow(
        "OrderWorkflow", raw, id=raw["order_id"], task_queue=ORDERS_QUEUE, start_signal=yes
    )


async def refusal(handle: WorkflowHandle[Any, Any], address: str) -> str:
    """Update the address, which must be refused, and return the reason."""
    with pytest.raises((WorkflowUpdateFailedError, RPCError)) as refused:
        await handle.execute_update("update_address", address)
    return str(refused.value.__cause__ or refused.value)


async def updates(handle: WorkflowHandle[Any, Any]) -> int:
    """Count the events of updates in a history."""
    history = await handle.fetch_history()
    return sum("_update_" in str(event.WhichOneof("attributes")) for event in history.events)


def notes(order_id: str, *types: str) -> list[tuple[str, dict[str, Any]]]:
    """Read an order's events of these types: their types and payloads."""
    rows = store.select("SELECT * FROM events WHERE order_id = ? ORDER BY id", order_id)
    return [(r["type"], json.loads(r["payload_json"])) for r in rows if r["type"] in types]


@bounded
async def test_an_address_changes_and_a_refused_update_leaves_no_event(client: Client) -> None:
    handle = await place(client, approved=False)
    await reach(handle, "AWAITING_REVIEW")
    for bad in (" ", "x" * 201):
        assert "must be 1 to 200 characters" in await refusal(handle, bad)
    assert await updates(handle) == 0
    assert await handle.execute_update("update_address", "2 Side Street") == "2 Side Street"
    assert (await handle.query("status"))["address"] == "2 Side Street"
    await handle.signal("approve")
    assert (await gather(handle)).ended == "COMPLETED"
    sent = notes(handle.id, "prepare_package", "dispatch_carrier")
    assert [payload["address"] for _, payload in sent] == ["2 Side Street"] * 2
    assert "completed" in await refusal(handle, "3 Late Street")


@bounded
async def test_once_shipping_has_begun_the_address_stays(client: Client) -> None:
    simulate = {"prepare_package": "down"}
    handle = await place(client, approved=False, address="1 Own Road", simulate=simulate)
    await handle.signal("approve", "fine")
    await reach(handle, "prepare_package")
    assert "too late, the order is SHIPPING" in await refusal(handle, "3 Late Street")
    for address in ("3 Late Street", " "):
        await handle.signal("update_address", address)
    await handle.signal("cancel")
    outcome = await gather(handle)
    assert (outcome.ended, outcome.effects) == ("CANCELLED", VOIDED)
    assert outcome.status["note"] == "fine"  # a cancel without a reason leaves it
    assert (outcome.status["address"], await updates(handle)) == ("1 Own Road", 0)
    assert notes(handle.id, "prepare_package")[0][1]["address"] == "1 Own Road"
    blank, late = sorted(
        (payload["address"], payload["reason"])
        for _, payload in notes(handle.id, "address_refused")
    )
    assert blank[0] == " " and late == ("3 Late Street", "too late, the order is SHIPPING")


@bounded
async def test_an_update_sent_with_its_order_runs_before_the_first_line(client: Client) -> None:
    raw = PATIENT | {"order_id": "more-start", "review": "timer", "review_seconds": 0}
    fail = WorkflowIDConflictPolicy.FAIL
    start: WithStartWorkflowOperation[Any, Any] = WithStartWorkflowOperation(
        "OrderWorkflow", raw, id="more-start", task_queue=ORDERS_QUEUE, id_conflict_policy=fail
    )
    answer = await client.execute_update_with_start_workflow(
        "update_address", "4 New Street", start_workflow_operation=start
    )
    assert answer == "4 New Street"
    assert (await gather(await start.workflow_handle())).ended == "COMPLETED"
    assert notes("more-start", "dispatch_carrier")[0][1]["address"] == "4 New Street"


@bounded
async def test_attempts_and_decisions_leave_rows_and_the_outcome_is_last(client: Client) -> None:
    simulate = {"charge_payment": "flaky", "prepare_package": "down"}
    handle = await place(client, simulate=simulate)
    await reach(handle, "prepare_package")
    await handle.signal("reject", "too late")
    await handle.signal("cancel", "enough")
    outcome = await gather(handle)
    names: dict[int, str] = {}
    begun = Counter[tuple[str, int]]()
    for event in outcome.history.events:
        names[event.event_id] = event.activity_task_scheduled_event_attributes.activity_type.name
        start = event.activity_task_started_event_attributes
        begun.update((names[start.scheduled_event_id], n + 1) for n in range(start.attempt))
    rows = [row for row in outcome.events if row["type"] in {*STEPS} - {"prepare_package"}]
    assert Counter((row["type"], row["attempt"]) for row in rows) == begun
    assert begun["charge_payment", 3] == begun["refund_payment", 1] == 1
    assert all(p["seconds"] >= 0 and p["ended"] for _, p in notes(handle.id, *STEPS))
    charges = [payload["ended"] for _, payload in notes(handle.id, "charge_payment")]
    assert [ended.split(":")[0] for ended in charges] == ["Outage", "Outage", "ok"]
    [(_, received)] = notes(handle.id, "receive_order")
    order = parse_order(PATIENT | {"order_id": handle.id, "simulate": simulate}, handle.id)
    assert received.items() >= asdict(order).items()
    told = {
        (name, payload.get("note", payload.get("reason")), payload.get("counts"))
        for name, payload in notes(handle.id, "approve", "reject", "cancel", "outcome")
    }
    decided = {("approve", "", True), ("reject", "too late", False), ("cancel", "enough", None)}
    assert told == decided | {("outcome", None, None)}
    assert outcome.events[-1]["type"] == "outcome" and outcome.effects == VOIDED


@bounded
async def test_a_second_order_on_one_payment_id_leaves_the_first_its_charge(client: Client) -> None:
    first, second = [await gather(await place(client, payment_id="pay-more")) for _ in range(2)]
    assert (first.ended, second.ended) == ("COMPLETED", "PaymentConflict")
    assert second.effects == UNPAID and ledger(first.status["order_id"]) == PAID


# The command lines, as processes: an exit code, something that must be said, and the command as in
# a shell, in which some words stand for others and {a,b} for each of a and b.

NOT_THERE = "TEMPORAL_ADDRESS=127.0.0.1:1"  # nothing listens there
WORDS = {"EMPTY": "", "BLANK": " ", "RED": RED, "--RED": f"--{RED}", "NOT_UTF8": "\udcff"}
WORDS |= {f"X{n}": "x" * n for n in (101, 201, 501, 2000)}
TYPED = ascii(RED)[1:-1]  # how RED must be printed
WORDY = """
2 | starter.py | starter.py {--RED,order EMPTY,order ship-1,order charge-1,order RED,order X101}
2 | starter.py | starter.py order {--RED,--review=x,--card-expiry=13/30,--deadline=-1}
2 | --amount | starter.py order --amount {1.234,-1,abc,EMPTY,nan,1e3}
2 | amount_cents | starter.py {order --amount 1000000.01,charge --amount 0}
2 | address | starter.py order --address {EMPTY,BLANK,X201}
2 | starter.py | starter.py {order --payment-id EMPTY,charge --customer-id EMPTY,charge surplus}
2 | seconds | starter.py {order --wait nan,order --review-seconds inf,charge --wait -1}
2 | attempts | starter.py order --max-attempts {101,1.5}
2 | STEP=FAULT | starter.py order --simulate {charge_payment,step=down,charge_payment=RED}
2 | signals.py | signals.py {RED,status,update-address o,approve o --RED,list --limit -1}
2 | 500 | signals.py {approve o --note,cancel o --reason} X501
2 | .py | {worker.py EMPTY,worker.py RED,charge_store.py --RED}
0 | usage: | {worker.py,charge_store.py,starter.py charge,starter.py order,starter.py crash} --help
0 | usage: | starter.py {chaos --help,--help}
0 | usage: | signals.py {approve,cancel,update-address,watch,history,list} --help
"""
ANSWERS = f"""
2 | LOG_LEVEL | LOG_LEVEL=RED worker.py
2 | starter.py | starter.py order {{NOT_UTF8,--amount --RED}}
2 | 500 | signals.py approve o --note X501
0 | usage: | signals.py --help
1 | see: | signals.py {{approve,reject,cancel,status,watch,history,events}} nobody
1 | see: | signals.py {{update-address nobody 3,approve X2000}}
2 | not valid text | signals.py {{status,events}} NOT_UTF8
1 | see: | signals.py status EMPTY
1 | nothing of | charge_store.py RED
1 | no Temporal server | {NOT_THERE} {{starter.py order,signals.py approve o}}
1 | no Temporal server | TEMPORAL_ADDRESS={{127.0.0.1:1,RED,SILENT}} worker.py
1 | configuration | TEMPORAL_PROFILE=no-such worker.py
1 | CHARGE_STORE | CHARGE_STORE=no-such-folder/store.db charge_store.py
"""
STORIES = f"""
an order is followed to its end and then it is too late
0 | done COMPLETED | starter.py order done --review timer --review-seconds 0 --wait-result
1 | finished already: nothing was started | starter.py order done
1 | too late | signals.py {{approve done,reject done,cancel done,update-address done 3}}
0 | COMPLETED | signals.py {{status,watch,events}} done
0 | the workflow is complete | signals.py history done
0 | requests 1, charged once | charge_store.py done

a running order is attached to and what people typed is escaped
0 | open started | starter.py order open --address RED --review-seconds 600 --deadline 600
0 | open is running already | starter.py order open
0 | {TYPED} | signals.py status open
1 | must be 1 to 200 characters | signals.py update-address open BLANK
0 | open: goes to | signals.py update-address open X101
0 | reject sent | signals.py reject open --note RED
0 | open REJECTED | signals.py watch open
0 | note={TYPED} | signals.py events open
0 | address={TYPED} | charge_store.py open

the first decision stands and to be cancelled is not to fail
0 | late started | starter.py order late --deadline 600 --max-attempts 0 --simulate {STUCK}
0 | approve sent | signals.py approve late
1 | only recorded | signals.py reject late
0 | cancel sent | signals.py cancel late
0 | late CANCELLED | signals.py watch late

an order that failed says why
1 | card expired 12/20 | starter.py order bad --card-expiry 12/20 --review timer --wait-result
1 | bad FAILED | signals.py watch bad

the same charge again is the same workflow and charged once
0 | charge-c-1230 charged | starter.py charge --customer-id c --amount 12.3 --wait-result
0 | charge-c-1230 charged | starter.py charge --customer-id c --amount 12.30 --wait-result
0 | requests 2, charged once | charge_store.py charge-c-1230

an id that somebody else gave a workflow is escaped
1 | too late | signals.py {{approve RED,update-address RED 3}}
1 | {TYPED} FAILED | signals.py watch RED
0 | {TYPED} | signals.py {{status RED,list}}
"""
ALONE = """
0 | no worker answers; start one | starter.py order new
1 | no worker answers; start one | signals.py {status new,update-address new 3}
0 | approve sent; no worker answers | signals.py approve new
"""
Steps = list[tuple[int, str, str]]
Done = subprocess.CompletedProcess[str]


def steps(text: str) -> Steps:
    """Read lines of: exit code | what must be said | command."""
    parts = [line.split(" | ") for line in text.strip().splitlines()]
    return [(int(code), says, one) for code, says, many in parts for one in expand(many)]


def expand(line: str) -> list[str]:
    """Spell {a,b} out, as a shell does."""
    head, brace, rest = line.partition("{")
    values, _, tail = rest.partition("}")
    return [o for v in values.split(",") for o in expand(head + v + tail)] if brace else [line]


STORY = [story.partition("\n") for story in STORIES.strip().split("\n\n")]
FLOWS = {title: steps(text) for title, _, text in STORY}
FLOWS |= {step[2]: [step] for step in steps(ANSWERS)}


def cli(line: str, **environment: str) -> Done:
    """Run a command in pipes, bounded."""
    words = line.split(" ")
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = WORDS.get(value, value)
    arguments = [sys.executable, *(WORDS.get(word, word) for word in words)]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    pipes |= {"cwd": HERE, "env": os.environ | environment, "errors": "replace"}
    try:
        return subprocess.run(arguments, timeout=30, **pipes)
    except subprocess.TimeoutExpired:
        return Done(arguments, 124, "", "no end after 30 s")


def here(line: str) -> Done:
    """Run a command in this process, to save the second of imports, if it only looks at words."""
    arguments = [WORDS.get(word, word) for word in line.split(" ")]
    out, err, at_kill = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", arguments)
        patch.setenv(*NOT_THERE.split("="))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HERE / arguments[0]), run_name="__main__")
    signal.signal(signal.SIGTERM, at_kill)
    assert isinstance(end.value.code, int)
    return Done(arguments, end.value.code, out.getvalue(), err.getvalue())


def check_step(step: tuple[int, str, str], done: Done) -> None:
    """Compare an answer: the code, the words; all escaped; one line on stderr only if it failed."""
    code, says, line = step
    assert done.returncode == code and says in (done.stderr if code else done.stdout), (line, done)
    assert (done.stdout + done.stderr).replace("\n", "").isprintable(), (line, done)
    assert len(done.stderr.splitlines()) == (code != 0), (line, done.stderr)


def run_flows(flows: dict[str, Steps], address: str) -> dict[str, list[Done]]:
    """Run flows side by side, and the steps of each in turn."""

    def run(flow: Steps) -> list[Done]:
        return [cli(line, TEMPORAL_ADDRESS=address) for _, _, line in flow]

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(flows, pool.map(run, flows.values()), strict=True))


@pytest.mark.parametrize("step", steps(WORDY), ids=lambda step: step[2])
def test_wrong_usage_exits_2_with_one_line_and_each_command_has_help(
    step: tuple[int, str, str],
) -> None:
    check_step(step, here(step[2]))


@pytest.fixture(scope="session")
def told(served: Stage) -> dict[str, list[Done]]:
    """Run all flows on a stage with a worker, where one workflow has an id of RED."""

    async def work() -> None:
        client = await connect(served)
        with pytest.raises(WorkflowFailureError):
            await client.execute_workflow("OrderWorkflow", id=RED, task_queue=ORDERS_QUEUE)

    within(work())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        WORDS["SILENT"] = f"127.0.0.1:{silent.getsockname()[1]}"
        return run_flows(FLOWS, served.address)


@pytest.mark.parametrize("name", FLOWS)
def test_commands_answer_by_exit_code_and_in_one_line_if_they_fail(
    name: str, told: dict[str, list[Done]]
) -> None:
    for step, done in zip(FLOWS[name], told[name], strict=True):
        check_step(step, done)


@pytest.fixture(scope="module")
def alone() -> list[Done]:
    """Run commands on a stage without a worker; then start one and stop it by Ctrl+C."""

    async def work() -> list[Done]:
        async with private_stage() as stage:
            first, *rest = steps(ALONE)
            answers = run_flows({"": [first]}, stage.address)
            answers |= run_flows({step[2]: [step] for step in rest}, stage.address)
            worker = stage.start_worker()
            while not store.count("new", "receive_order"):
                await asyncio.sleep(0.1)
            worker.send_signal(signal.SIGINT)
            code = await asyncio.to_thread(worker.wait, LONG / 2)
            log = (stage.folder / "workers.log").read_text()
            return [*(done for [done] in answers.values()), Done([], code, log, "")]

    answers: list[Done] = within(work())
    return answers


def test_without_a_worker_a_signal_is_kept_and_a_question_is_given_up(alone: list[Done]) -> None:
    for step, done in zip(steps(ALONE), alone[:-1], strict=True):
        check_step(step, done)


def test_a_worker_stops_on_ctrl_c_in_good_order(alone: list[Done]) -> None:
    check_step((0, "stopped", "worker.py"), alone[-1])


def test_load_ends_by_itself_with_what_an_order_costs_and_a_clean_audit() -> None:
    """Two of them side by side: each sets a stage of its own."""
    with ThreadPoolExecutor(2) as pool:
        lines = [f"starter.py load --orders 20{wait}" for wait in ("", " --wait 1")]
        loaded, slept = pool.map(cli, lines)
    assert (loaded.returncode, loaded.stderr, slept.returncode, slept.stderr) == (0, "", 0, "")
    number = "nan" if sys.platform == "win32" else r"[1-9]\d*"  # nobody measures it there
    told = [
        r"20/20\n\d+\.\d orders/s, .* s in all\n",
        r"median .* s, 99th percentile .* s\n",
        rf"CPU ms per order: worker {number}, server {number}\n",
        rf"worker memory {number} MB at most\naudit clean\n",
    ]
    assert re.search("".join(told), loaded.stdout), loaded.stdout
    assert re.search("".join([told[0], *told[2:]]), slept.stdout), slept.stdout


# The README: what it names exists, what it tells to type is understood.

TEMPORAL = str(temporal_binary())
README = (HERE / "README.md").read_text(encoding="utf-8")
BASH = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
TABLED = re.findall(r"`(python [^`]*)`", README)
OURS = sorted(
    {m for line in [*BASH, *TABLED] for m in re.findall(r"\w+\.py(?: [^&|;#>]*)?$", line)}
)
SERVERS = sorted({m for line in BASH for m in re.findall(r"\btemporal [^&|;#>]*", line)})


@pytest.mark.parametrize("line", OURS)
def test_each_command_in_the_readme_is_understood(line: str) -> None:
    script, *words = shlex.split(line)
    if script in ("test_workflows.py",):
        return
    module = importlib.import_module(script.removesuffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        module.parse_arguments()


@pytest.mark.parametrize("line", SERVERS)
def test_each_flag_of_temporals_own_command_in_the_readme_exists(line: str) -> None:
    words = shlex.split(line)
    verbs = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
    told = subprocess.run([TEMPORAL, *verbs, "--help"], capture_output=True, text=True, timeout=30)
    assert told.returncode == 0
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in told.stdout, word


def test_each_file_and_each_of_our_flags_in_the_readme_exists() -> None:
    made_here = {"charge_store.db", "temporal.db"}
    for name in re.findall(r"`([\w.]+\.(?:py|yml|txt|md|db))`", README):
        assert name in made_here or (HERE / name).is_file(), name
    known = "".join((HERE / script).read_text() for script in SCRIPTS)
    for row in re.findall(r"^\| `(--[\w-]+)", README, re.MULTILINE):
        assert f'"{row}"' in known, row
    for words in (STEPS, FAULTS, RULES, [test.name for test in CRASH_TESTS], ["no-temporal"]):
        for word in words:
            assert f"`{word}`" in README, word


def test_each_exercise_has_its_words_and_as_many_parts_to_do_as_the_starter_waits_for() -> None:
    assert sections().keys() == EXERCISES.keys()
    for number, (_, text) in sections().items():
        beats = [beat for beat in EXERCISES[number].beats if str(beat).startswith("do ")]
        assert text.count("\n**Do.**") == len(beats), number
        for label in ("Predict", "Observe", "Explain"):
            assert text.count(f"\n**{label}.**") == 1, (number, label)


# The server of docker-compose.yml, with the binary from pip: namespaces, HTTP, the same flags.


@pytest.fixture(scope="session")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run that server on ports of its own, and a worker in each of two namespaces."""
    folder, port = tmp_path_factory.mktemp("composed"), free_port()
    ports = ["--port", port, "--http-port", port + 10, "--ui-port", port + 1000]
    here = ["--ip", "127.0.0.1", "--db-filename", folder / "temporal.db", "--namespace", "other"]
    environment = {"TEMPORAL_ADDRESS": f"127.0.0.1:{port}"}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("CHARGE_STORE", str(folder / "charge_store.db"))
        for words, more in (
            ([TEMPORAL, *composed_arguments(), *ports, *here, "--output", "none"], {}),
            ([sys.executable, "worker.py"], environment),
            ([sys.executable, "worker.py"], environment | {"TEMPORAL_NAMESPACE": "other"}),
        ):
            until_listening(port, bool(more))
            process = subprocess.Popen([*map(str, words)], cwd=HERE, env=os.environ | more)
            stack.callback(process.wait, LONG)
            stack.callback(process.kill)
        yield port
        assert store.audit() == []


def composed_arguments() -> list[str]:
    """Read the server's arguments out of docker-compose.yml."""
    text = (HERE / "docker-compose.yml").read_text(encoding="utf-8")
    return re.findall(r"^      - (\S+)", text.split("command:")[1].split("ports:")[0], re.MULTILINE)


def until_listening(port: int, wanted: bool) -> None:
    """Wait until the server accepts connections, if it is wanted."""
    end = time.monotonic() + LONG
    while wanted and not asyncio.run(is_listening(f"127.0.0.1:{port}")):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_docker_compose_starts_the_server_with_the_flags_of_the_scripts() -> None:
    flags = [f"{f}={v}" for f, v in zip(SERVER_FLAGS[::2], SERVER_FLAGS[1::2], strict=True)]
    assert [word for word in composed_arguments() if word in flags] == flags


def test_the_environment_alone_moves_everything_to_another_namespace(composed: int) -> None:
    there = {"TEMPORAL_ADDRESS": f"127.0.0.1:{composed}", "TEMPORAL_NAMESPACE": "other"}
    placed = cli("starter.py order elsewhere --review timer --wait-result", **there)
    assert (placed.returncode, placed.stderr) == (0, "")
    assert "elsewhere COMPLETED" in placed.stdout
    assert cli("signals.py status elsewhere", **there).returncode == 0
    there["TEMPORAL_NAMESPACE"] = "default"
    assert "unknown order" in cli("signals.py status elsewhere", **there).stderr


def test_the_readmes_curl_commands_take_an_order_to_its_end(composed: int) -> None:
    section = README.split("\n## The same with `curl`\n")[1].split("\n## ")[0]
    script = "\necho\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    script = script.replace("localhost:7243", f"127.0.0.1:{composed + 10}")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done
    answers = done.stdout.replace(" ", "")
    for answer in ('"started":true', '"state":"', '"success":["2SideStreet"]', '["COMPLETED"]'):
        assert answer in answers, answer


# The exercises, as a person at a terminal goes through them.


class Terminal:
    """A program in a pseudo-terminal: read until it says something, type."""

    def __init__(self, words: list[str], **environment: str) -> None:
        import fcntl  # the other tests run on Windows too, where this one and its terminal is not
        import struct
        import termios

        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.process = subprocess.Popen(words, cwd=HERE, env=os.environ | environment, **pipes)
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read until the pattern comes; what was read up to it is forgotten."""
        end = time.monotonic() + LONG
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern} in {self.text[-2000:]}"
            if select.select([self.master], [], [], 1)[0]:
                with suppress(OSError):  # the program has ended
                    self.text += os.read(self.master, 65536).decode()
        self.text = self.text[found.end() :]
        return found

    def type(self, line: str) -> None:
        """Type a line."""
        os.write(self.master, f"{line}\n".encode())

    def close(self) -> int:
        """Wait for the program's end and return its exit code."""
        code = self.process.wait(LONG)
        os.close(self.master)
        return code


def begin(stage: Stage, number: str, customer: str, wait: str) -> Terminal:
    """Choose an exercise, answer its questions, one of them wrong at first."""
    terminal = Terminal([sys.executable, "starter.py"], TEMPORAL_ADDRESS=stage.address)
    for question, answer in (
        (r"Exercise \[1\]: ", "99"),
        (r"must be one of[^\n]*\n", number),
        (r"Customer ID \[customer-123\]: ", "no spaces"),
        (r"must be 1 to 100[^\n]*\n", customer),
        (r"Amount \[99.99\]: ", "1.234"),
        (r"must be an amount[^\n]*\n", "5"),
        (r"Wait seconds \[10\]: ", "-1"),
        (r"must be 0 to 86400[^\n]*\n", wait),
    ):
        terminal.read_until(question)
        terminal.type(answer)
    return terminal


def test_exercise_1_sees_the_worker_die_and_another_take_over(one_worker: Stage) -> None:
    terminal = begin(one_worker, "1", "pty-1", "5")
    terminal.read_until("go on: ")
    terminal.type("")
    pid = terminal.read_until(r"kill -9 (\d+)")[1]
    assert int(pid) == one_worker.workers[0].pid
    one_worker.kill_worker(one_worker.workers[0])
    terminal.read_until("python worker.py")
    successor = one_worker.start_worker().pid
    terminal.read_until("requests 1, charged once")
    terminal.read_until(f"charge_payment runs on worker {successor}")
    terminal.read_until("Explain.")
    assert terminal.close() == 0


def test_exercise_2_shows_that_ctrl_c_and_a_kill_differ(one_worker: Stage) -> None:
    terminal = begin(one_worker, "2", "pty-2", "1")
    terminal.read_until("go on: ")
    terminal.type("")
    for number, stop in enumerate((signal.SIGINT, signal.SIGKILL)):
        order_id = f"charge-pty-2-{500 + number}"
        terminal.read_until(f"{order_id} is placed")
        until_charged(order_id)
        worker = one_worker.workers.pop()
        worker.send_signal(stop)
        worker.wait(LONG)
        one_worker.start_worker()
    for reason in ("shutting down", "fell silent"):
        terminal.read_until("requests 2, charged once")
        terminal.read_until(reason)
    terminal.read_until("Explain.")
    assert terminal.close() == 0


def until_charged(order_id: str) -> None:
    """Wait until the provider has charged."""
    end = time.monotonic() + LONG
    while "charge" not in ledger(order_id):
        assert time.monotonic() < end, order_id
        time.sleep(0.05)


@pytest.fixture
def one_worker(stage: Stage) -> Stage:
    """Leave exactly one worker on the stage."""
    for process in list(stage.workers):
        stage.kill_worker(process)
    stage.start_worker()
    return stage


def test_end_of_input_takes_the_defaults(tmp_path: Path) -> None:
    """Without a server, a worker or a person: the starter brings the first two."""
    # The default address of a copy of ours, so that a server of the reader's is left alone.
    address = f'"localhost:{free_port()}"'
    copy = changed_copy(tmp_path / "copy", "worker.py", '"localhost:7233"', address)
    brief = (copy / "starter.py").read_text().replace('"Wait seconds", "10"', '"Wait seconds", "1"')
    (copy / "starter.py").write_text(brief)
    shutil.copy(HERE / "README.md", copy)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TEMPORAL_")}
    environment["CHARGE_STORE"] = str(tmp_path / "charge_store.db")
    for words in (["starter.py"], ["starter.py", "order", "--review", "timer", "--wait-result"]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=copy,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * LONG,
        )
        assert (done.returncode, done.stderr) == (0, ""), done
    assert "COMPLETED" in done.stdout
