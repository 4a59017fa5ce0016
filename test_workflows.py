"""Proves every claim of the README, against a real Temporal server with real kills.

The orders of one group run side by side on one worker, once; each test then looks at one of them.
Every wait is bounded and polls for a condition; no test depends on something being fast.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import uuid
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowHistory,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.worker import Replayer, Worker

import charge_store as store
from activities import ORDER_STEPS, STEPS
from starter import Stage, private_stage
from worker import DATA_CONVERTER, make_workers
from workflows import ORDERS_QUEUE, OrderWorkflow

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
    handle = await client.start_workflow(
        "OrderWorkflow",
        raw,
        id=order_id,
        task_queue=ORDERS_QUEUE,
        start_signal=first[1] if first else None,
        start_signal_args=arguments(first[2]) if first else [],
    )
    for state, name, argument in scenario.sends:
        if state == "START":
            continue
        if state != "NOW":
            await reach(handle, state)
        if name == "KILL" and stage:
            stage.workers[-1].kill()
        elif name == "KILL SERVER" and stage:
            await stage.kill_server()
            await stage.start_server()
        elif name.startswith("CANCEL"):
            target = f"ship-{order_id}" if name == "CANCEL SHIPPING" else order_id
            await client.get_workflow_handle(target).cancel()
        else:
            await handle.signal(name, args=arguments(argument))
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
        ended = await handle.result()
    except WorkflowFailureError as error:
        assert isinstance(error.cause, ApplicationError), error.cause
        ended = str(error.cause.type)
    return Outcome(
        ended,
        await status_of(handle),
        ledger(handle.id),
        store.select("SELECT * FROM events WHERE order_id = ? ORDER BY id", handle.id),
        await handle.fetch_history(),
    )


async def play_all(
    client: Client, scenarios: dict[str, Scenario], stage: Stage | None = None
) -> dict[str, Any]:
    """Play scenarios side by side, but not so many that a step takes long; keep what each gave."""
    places = asyncio.Semaphore(24)

    async def one(scenario: Scenario) -> Outcome:
        async with places:
            return await asyncio.wait_for(play(client, scenario, stage), 2 * LONG)

    results = await asyncio.gather(*map(one, scenarios.values()), return_exceptions=True)
    return dict(zip(scenarios, results, strict=True))


@pytest.fixture(scope="session")
def played(stage: Stage, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Play all scenarios on a worker process."""

    async def work() -> dict[str, Any]:
        return await play_all(await connect(stage), SCENARIOS)

    outcomes: dict[str, Any] = within(work(), 5 * LONG)
    return outcomes


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


# Every fault on every activity. The undo steps need an order that is given up: its dispatch fails.

UNDO_STEPS = ("void_dispatch", "refund_payment", "release_inventory")
GIVEN_UP = {"dispatch_carrier": "down"}
FAULTY = {
    f"{step} {fault}": Scenario("OrderGivenUp", VOIDED, {"simulate": GIVEN_UP | {step: fault}}, YES)
    if step in UNDO_STEPS
    else Scenario("COMPLETED", PAID, {"simulate": {step: fault}}, YES)
    for step in STEPS
    for fault in ("flaky", "hang", "slow", "late")
}


@pytest.fixture(scope="session")
def faulty(stage: Stage, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Play every fault that passes on every activity."""

    async def work() -> dict[str, Any]:
        return await play_all(await connect(stage), FAULTY)

    outcomes: dict[str, Any] = within(work(), 5 * LONG)
    return outcomes


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_that_passes_changes_nothing(name: str, faulty: dict[str, Any]) -> None:
    check(name, FAULTY[name], faulty[name])
    step, fault = name.split()
    attempts = [event for event in faulty[name].events if event["type"] == step]
    wanted = {"flaky": 3, "hang": 2}.get(fault, 1)
    assert len(attempts) == wanted, attempts


@pytest.fixture(scope="session")
def down(stage: Stage, worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Play an outage without an end on every activity; look at orders that cannot end, end them."""

    async def one(client: Client, step: str) -> str:
        simulate = {step: "down"} | (GIVEN_UP if step in UNDO_STEPS else {})
        raw: dict[str, Any] = {"order_id": f"down-{step}", "simulate": simulate}
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
        state = str((await handle.query("status"))["state"])
        await handle.terminate()
        return state

    async def work() -> dict[str, Any]:
        client = await connect(stage)
        ends = await asyncio.gather(*(one(client, step) for step in STEPS))
        return dict(zip(STEPS, ends, strict=True))

    states: dict[str, Any] = within(work())
    return states


@pytest.mark.parametrize("step", STEPS)
def test_an_outage_without_end_fails_the_order_but_never_its_compensation(
    step: str, down: dict[str, Any]
) -> None:
    if step in UNDO_STEPS:
        assert down[step] == "COMPENSATING"
    elif step.startswith("record"):
        assert down[step] == "SHIPPING"  # all is done, only the last word is not written yet
    else:
        assert down[step] == "OrderGivenUp"
        assert "charged" not in ledger(f"down-{step}").values()


# The crash matrix: a process dies in every activity, before and after its effect.

GIVEN_UP_LATE = [*YES, ("prepare_package", "cancel", "")]
CRASHES = {
    f"{step} {fault}": Scenario(
        "CANCELLED",
        VOIDED,
        PATIENT | {"simulate": {"prepare_package": "down", step: fault}},
        GIVEN_UP_LATE,
    )
    if step in UNDO_STEPS
    else Scenario("COMPLETED", PAID, PATIENT | {"simulate": {step: fault}}, YES)
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
    "server killed in a wait": Scenario(
        "COMPLETED", PAID, PATIENT | {"wait_seconds": 3}, [*YES, ("WAITING", "KILL SERVER", None)]
    ),
}
CALM = {
    "COMPLETED": Scenario("COMPLETED", PAID, {}, YES),
    "CANCELLED": Scenario(
        "CANCELLED", VOIDED, PATIENT | {"simulate": {"prepare_package": "down"}}, GIVEN_UP_LATE
    ),
}


@pytest.fixture(scope="session")
def crashed(stage: Stage) -> dict[str, Any]:
    """Play the crash matrix on one worker at a time, and the same orders in a calm run."""
    for process in list(stage.workers):
        stage.kill_worker(process)
    stage.start_worker()

    async def work() -> dict[str, Any]:
        client = await connect(stage)
        calm = await play_all(client, CALM, stage)
        reviving = asyncio.create_task(revive(stage))
        outcomes = await play_all(client, CRASHES, stage)
        reviving.cancel()
        return calm | outcomes

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
def test_a_crash_leaves_the_same_ledger_as_a_calm_run(name: str, crashed: dict[str, Any]) -> None:
    scenario, outcome = CRASHES[name], crashed[name]
    check(name, scenario, outcome)
    assert rows(outcome) == rows(crashed[scenario.ends])
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
def test_each_prefix_of_a_history_replays(name: str, played: dict[str, Any]) -> None:
    history = played[name].history

    async def work() -> None:
        replayer = Replayer(workflows=[OrderWorkflow])
        for i, event in enumerate(history.events):
            if event.HasField("workflow_task_completed_event_attributes"):
                prefix = WorkflowHistory(history.workflow_id, history.events[: i + 1])
                await replayer.replay_workflow(prefix)
        await replayer.replay_workflow(history)

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
