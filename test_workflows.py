"""Proves every claim of the README, against a real Temporal server with real kills.

Many orders run side by side, once; each test then looks at one of them. Every wait is bounded and
polls for a condition. Where a busy machine was late for the 5 s of a slow step, the order is
played again, three times at most, with a warning.
"""

import asyncio
import atexit
import io
import itertools
import os
import re
import runpy
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.enums import v1 as enums
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import Client, WorkflowUpdateFailedError
from temporalio.common import RawValue
from temporalio.converter import DefaultPayloadConverter
from temporalio.exceptions import ApplicationError
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner, Worker

import charge_store as store
from activities import FAULTS, ORDER_STEPS, RULES, STEPS, Order, charge, parse_order
from signals import Event, Handle, code_failure, end_of, find_bars, lanes, read_events, read_history
from starter import AS_IT_WAS, BUG, EXERCISES, NAMES, Player, Verdict, edited, sections, start
from worker import (
    HERE,
    Stage,
    TolerantConverter,
    free_port,
    is_listening,
    private_stage,
    start_apart,
    temporal_binary,
)
from workflows import ORDERS_QUEUE, SHIPPING_QUEUE, OrderWorkflow

LONG = 60  # seconds after which a wait has failed; far above what anything here takes
PAID = {"charge": "charged", "reservation": "reserved", "dispatch": "dispatched"}
UNPAID = {"reservation": "released", "dispatch": "voided"}
REFUNDED, VOIDED = UNPAID | {"charge": "refunded"}, UNPAID | {"charge": "voided"}
RED = "\x1b[31mred\u202e\n"  # a colour, a reversal of the text and a line of its own
TYPED = ascii(RED)[1:-1]  # how it must be printed

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """Set a stage with a server, a worker and a ledger.

    The server is the one of docker-compose.yml, with a namespace for each wing.
    """
    ours = Stage.server_command
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        more = ["--ip", "127.0.0.1", *(f"--namespace={name}" for name in NAMESPACES)]
        words = [temporal_binary(), *composed_arguments(), *more]
        patch.setattr(Stage, "server_command", lambda stage: [*words, *ours(stage)[3:]])
        context = private_stage()
        stage = runner.run(context.__aenter__())
        patch.setenv("TEMPORAL_ADDRESS", stage.address)
        patch.setenv("TEMPORAL_CONFIG_FILE", os.devnull)
        stage.start_worker()
        yield stage
        runner.run(context.__aexit__(None, None, None))


def run(script: str, *words: str, code: Path = HERE, **environment: str) -> Done:
    """Run a command in pipes, bounded; without more it talks to the stage's server."""
    arguments = [sys.executable, str(code / script), *words]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    pipes |= {"cwd": code, "env": os.environ | environment, "errors": "replace"}
    return subprocess.run(arguments, timeout=5 * LONG, **pipes)  # all exercises take two minutes


def here(script: str, *words: str, **environment: str) -> Done:
    """Run a command in this process, to save the second of imports."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [script, *words])
        patch.setattr(atexit, "register", lambda function, *_: function)
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(Runtime, "set_default", lambda *_: None)  # which can be done only once
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(HERE / script), run_name="__main__")
    code = end.value.code
    if isinstance(code, str):
        return Done(words, 1, out.getvalue(), f"{err.getvalue()}{code}\n")
    return Done(words, int(code or 0), out.getvalue(), err.getvalue())


def answers(done: Done, code: int, says: str) -> None:
    """Check an exit code and words; all must be escaped; one line on stderr only if it failed."""
    assert done.returncode == code and says in (done.stderr if code else done.stdout), done
    assert (done.stdout + done.stderr).replace("\n", "").isprintable(), done
    assert len(done.stderr.splitlines()) == (code != 0), done


starter, signals = partial(here, "starter.py"), partial(here, "signals.py")
ledger_says = partial(here, "charge_store.py")


# What runs side by side, as most of what it does is to wait: tests, and the orders that tests look
# at. All talk to the one server; what harms its workers or its ledger has a wing of its own.

# First what lasts as long as all the rest, last what has to act within the 5 s of a slow step.
PHASES: list[dict[str, Callable[[Stage], Any]]] = [{}, {}, {}]


def side_by_side(work: Callable[[Stage], Any], phase: int = 1) -> Callable[..., Any]:
    """Have a test or a fixture, async or not, run at the same time as all that are marked so."""
    PHASES[phase][work.__name__] = work

    def result(begun: dict[str, Future[Any]]) -> Any:
        return begun[work.__name__].result()

    return result


beside, by_hand = partial(side_by_side, phase=0), partial(side_by_side, phase=2)


@pytest.fixture(scope="session")
def begun(stage: Stage, request: pytest.FixtureRequest) -> dict[str, Future[Any]]:
    """Run all of that, as far as it is needed, to its end."""

    def do(work: Callable[[Stage], Any]) -> Any:
        result = work(stage)
        return within(result, 5 * LONG) if asyncio.iscoroutine(result) else result

    items: Any = request.session.items
    needed = {name for item in items for name in (item.name, *item.fixturenames)}
    results: dict[str, Future[Any]] = {}
    for works in PHASES:
        # With fewer at once two cores would idle, with more orders would be late for slow steps.
        pool = ThreadPoolExecutor(4)
        results |= {n: pool.submit(do, work) for n, work in works.items() if n in needed}
        pool.shutdown(wait=works is not PHASES[0])
    return results


def within(work: Any, seconds: float = LONG) -> Any:
    """Run async work in a loop of its own, bounded."""
    return asyncio.run(asyncio.wait_for(work, seconds))


def changed_copy(folder: Path, file: str, text: str, instead: str) -> Path:
    """Copy our files with one text in one of them changed."""
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*", "*.db*"))
    source = (folder / file).read_text(encoding="utf-8")
    assert source.count(text) == 1, text
    (folder / file).write_text(source.replace(text, instead), encoding="utf-8")
    return folder


NAMESPACES = [f"wing-{number}" for number in range(14)]  # of the server; each wing takes one


class Wing(Stage):
    """A namespace of the stage's server, with workers and, if wanted, a ledger of its own."""

    logs: Path  # a Stage may have none

    def __init__(self, stage: Stage, *roles: str, own_ledger: bool = False) -> None:
        """Take a namespace, which no other has, and start workers of these roles."""
        name = NAMESPACES.pop()
        super().__init__(stage.folder / name, stage.address, stage.folder / f"{name}.log")
        self.folder.mkdir()
        self.client = Client(stage.client.service_client, namespace=name)
        self.main, self.store = stage, (self if own_ledger else stage).folder / "charge_store.db"
        for role in roles:
            self.start_worker(role)

    def environment(self) -> dict[str, str]:
        """Move a process to this wing, by the environment alone."""
        ours = {"TEMPORAL_NAMESPACE": self.client.namespace, "CHARGE_STORE": str(self.store)}
        return super().environment() | ours

    def run(self, script: str, *words: str) -> Done:
        """Run a command of this wing."""
        return run(script, *words, code=self.code, **self.environment())

    def start_worker(self, role: str = "all") -> subprocess.Popen[bytes]:
        """Start a worker that serves this wing alone and dies with the stage."""
        worker = super().start_worker(role)
        self.main.workers.append(worker)
        return worker


# Scenarios: an order, what people do to it and when, and how it must end.


class Scenario:
    """An order, the messages it gets (in which state, what, with what) and what must come of it.

    Instead of a state: START, with the order itself; NOW, at once; a step, once that has begun.
    """

    def __init__(
        self, ends: str, effects: dict[str, str], *sends: tuple[Any, ...], **fields: Any
    ) -> None:
        """Say the state, or the error's type, what the ledger must show, messages and the order."""
        self.ends, self.effects, self.sends = ends, effects, sends
        self.status = fields.pop("status", {})  # what else the query must tell
        self.fields = {"max_attempts": 3} | fields


completed = partial(Scenario, "COMPLETED", PAID)
cancelled = partial(Scenario, "CANCELLED", REFUNDED)
given_up = partial(Scenario, "OrderGivenUp", REFUNDED)
YES = ("START", "approve", "fine")
APPROVED = ("AWAITING_REVIEW", "approve", "fine")
RESET = ("COMPLETED", "RESET")
TIMED: dict[str, Any] = {"review": "timer", "review_seconds": 0.1}
SCENARIOS: dict[str, Scenario] = {
    "approved": completed(APPROVED, order_id="x" * 100),  # the longest id
    "approved before a review that is over at once": completed(YES, review_seconds=0),
    "deadline at once": Scenario("DeadlineExceeded", {}, YES, deadline_seconds=0),
    "deadline of two slow steps": Scenario(
        "DeadlineExceeded",
        REFUNDED,
        YES,
        receive_order="slow",
        charge_payment="slow",
        deadline_seconds=9.8,  # enough for one of them, on a busy machine too
    ),
    "deadline after dispatch": completed(YES, dispatch_carrier="slow", deadline_seconds=5),
    "a wait does not count": completed(**TIMED, deadline_seconds=20, wait_seconds=22),
    "a review does not count": completed(review="timer", deadline_seconds=20, review_seconds=22),
    "approved, moved and cancelled while compensating": Scenario(
        "EXPIRED",
        UNPAID,
        ("COMPENSATING", "approve", "late"),
        ("NOW", "update_address", "3"),
        ("NOW", "CANCEL"),
        release_inventory="slow",
        review_seconds=0.5,
        status={"decision": None, "address": "1 Main Street"},
    ),
    "cancelled both ways at once": cancelled(
        YES, ("charge_payment", "cancel", "one"), ("NOW", "CANCEL"), charge_payment="slow"
    ),
    "moved before it starts, rejected and cancelled after dispatch": completed(
        ("START", "update_address", "4 New Street"),
        ("DISPATCHED", "reject"),
        ("NOW", "cancel", "too late"),
        **TIMED,
        dispatch_carrier="slow",
        status={"address": "4 New Street", "decision": "approved", "shipping_attempts": 1},
    ),
    "cancelled again and again": completed(
        YES,
        ("record_outcome", "cancel", "1"),
        ("NOW", "CANCEL"),
        ("NOW", "cancel", "2"),
        record_outcome="slow",
        status={"note": "fine"},
    ),
    "cancelled before it starts": Scenario("CANCELLED", {}, ("START", "cancel", "no")),
    "all messages, in time and too late": cancelled(
        ("AWAITING_REVIEW", "update_address", "2 Side Street"),
        ("NOW", "update_address", " "),
        ("NOW", "approve", "fine"),
        ("prepare_package", "update_address", "3 Late Street"),
        ("NOW", "reject", "no"),
        ("NOW", "cancel"),  # which without a reason leaves the note
        charge_payment="flaky",
        prepare_package="slow",
        status={"address": "2 Side Street", "note": "fine"},
    ),
    "shipping cancelled alone": cancelled(
        YES, ("prepare_package", "CANCEL SHIPPING"), prepare_package="slow"
    ),
    "signals of any shape in the timer's window": Scenario(
        "REJECTED",
        UNPAID,
        ("START", "update_address", 5),
        ("AWAITING_REVIEW", "dispatch_failed", {"a": [1]}, "surplus"),
        ("NOW", "no_such_signal"),
        ("NOW", "reject", "n" * 600, "surplus"),
        review="timer",
        review_seconds=30,
    ),
    # A reset begins another run, which knows nothing of what the one before did. Once the package
    # has left the order is complete, whatever is asked of it then.
    "cancelled, reset to its review and approved": given_up(
        ("AWAITING_REVIEW", "cancel"), ("CANCELLED", "RESET", 3), APPROVED
    ),
    "reset past its deadline": completed(
        ("COMPLETED", "RESET WITH SIGNALS", 1), **TIMED, deadline_seconds=20, wait_seconds=22
    ),
    "reset while its old child still ships": completed(
        YES, ("prepare_package", "RESET WITH SIGNALS"), prepare_package="slow"
    ),
    "reset and cancelled, reset and expired, reset and approved": completed(
        APPROVED, RESET, ("AWAITING_REVIEW", "CANCEL"), RESET, RESET, APPROVED, review_seconds=10
    ),
}
# A cancel, by the signal and by Temporal itself, in each state and step it can come in.
CANCELS: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("WAITING", UNPAID, {"wait_seconds": 60}),
    ("AWAITING_REVIEW", UNPAID, {}),
    ("charge_payment", REFUNDED, {"charge_payment": "slow"}),
    ("charge_payment", VOIDED, {"charge_payment": "late"}),
    ("SHIPPING", REFUNDED, {"prepare_package": "slow"}),
    # A stop ends the shipping first, or the package would leave while the undos take their time.
    ("prepare_package", REFUNDED, {"prepare_package": "slow", "look_back": "slow"}),
]
for (state, left, fields), way in itertools.product(CANCELS, ("cancel", "CANCEL")):
    sends = [YES] * (state not in ("WAITING", "AWAITING_REVIEW")) + [(state, way, "stop")]
    SCENARIOS[f"{way} while {state} {fields}"] = Scenario("CANCELLED", left, *sends, **fields)
for task, left in ((-1, UNPAID), (-5, VOIDED)):  # its very end, the moment when it expired
    expired = Scenario("EXPIRED", left, ("EXPIRED", "RESET", task), review_seconds=0.5)
    SCENARIOS[f"expired, and reset to {task}"] = expired
# What must be done is tried without end, whatever max_attempts says: `flaky` works at the third.
UNDO_STEPS = ("look_back", "void_dispatch", "refund_payment", "release_inventory")
MUST_BE_DONE = dict.fromkeys([*UNDO_STEPS, "record_decision", "record_outcome"], "flaky")
SCENARIOS["undone by flaky steps"] = cancelled(
    YES, ("prepare_package", "cancel"), prepare_package="slow", max_attempts=2, **MUST_BE_DONE
)
# An order that is reset while it is undone is not taken up again: or it would be charged and sent,
# and then the refund of the run before would land.
for task in (0, 3):  # its start, its review
    sends = [YES, ("charge_payment", "cancel"), ("refund_payment", "RESET", task)]
    undone = given_up(*sends, charge_payment="slow", refund_payment="late")
    SCENARIOS[f"reset to {task} while undone"] = undone
# An outage of a step, and what is left when its attempts are used up; of the charge: exercise 4.
for step, left in (
    ("receive_order", {}),
    ("reserve_inventory", UNPAID | {"reservation": "voided"}),
    ("prepare_package", REFUNDED),
):
    SCENARIOS[f"{step} is down"] = Scenario("OrderGivenUp", left, YES, **{step: "down"})
# Every fault that passes on every activity, a death of its process too: a few orders, in which one
# step after the other meets it, and which end with the same ledger as in a calm run. The undo steps
# need an order that is given up: its packing fails.
OTHERS = [step for step in STEPS if step not in UNDO_STEPS]
GROUPS = {"undo": UNDO_STEPS, "even": OTHERS[::2], "odd": OTHERS[1::2]}
for group, fault in itertools.product(GROUPS, sorted(FAULTS.keys() - {"down", "random"})):
    # As many attempts as it takes: a busy machine misses a heartbeat now and then.
    fields = {"max_attempts": 0} | dict.fromkeys(GROUPS[group], fault)
    faulty = completed(YES, **fields)
    if group == "undo":
        faulty = cancelled(YES, ("prepare_package", "cancel"), prepare_package="down", **fields)
    SCENARIOS[f"{group} {fault}"] = faulty
CRASHES = [name for name in SCENARIOS if "crash" in name]
LEAST_ATTEMPTS = {"flaky": 3, "hang": 2, "crash-before": 2, "crash-after": 2}


async def place(stage: Stage, message: str = "", *given: Any, **fields: Any) -> Handle:
    """Place a patient order, with a message if there is one; of steps, fields are their faults."""
    raw = {"order_id": f"test-{uuid.uuid4().hex[:12]}", "deadline_seconds": 600, "max_attempts": 0}
    faults = {step: fields.pop(step) for step in STEPS if step in fields}
    raw |= {"simulate": faults} | fields
    await start(stage.client, raw, start_signal=message or None, start_signal_args=given)
    return stage.client.get_workflow_handle(str(raw["order_id"]))  # of its newest run


async def play(stage: Stage, scenario: Scenario) -> Handle:
    """Place a scenario's order, send its messages, and see it end."""
    first = [message for when, *message in scenario.sends if when == "START"]
    handle = await place(stage, *(first[0] if first else ()), **scenario.fields)
    for when, name, *given in scenario.sends[len(first) :]:
        if when != "NOW":
            await reach(handle, when)
        await send(stage, handle, name, *given)
    await end_of(handle)
    return handle


async def send(stage: Stage, handle: Handle, name: str, *given: Any) -> None:
    """Send an order a message, or do what its name says; an order that has ended hears nothing."""
    if name.startswith("RESET"):
        await reset(stage, handle, name == "RESET", *given)
        return
    target = f"ship-{handle.id}" if name == "CANCEL SHIPPING" else handle.id
    try:
        if name.startswith("CANCEL"):
            await stage.client.get_workflow_handle(target).cancel()
        else:
            await handle.signal(name, args=given)
    except RPCError as error:
        if error.status != RPCStatusCode.NOT_FOUND:
            raise


async def reset(stage: Stage, handle: Handle, forget: bool, task: int = 0) -> None:
    """Reset an order to its first workflow task, or a later one, and forget its signals or not."""
    history = await handle.fetch_history()
    tasks = [e for e in history.events if e.HasField("workflow_task_completed_event_attributes")]
    words = [temporal_binary(), "workflow", "reset", "--workflow-id", handle.id]
    words += ["--event-id", str(tasks[task].event_id), "--reason", "to see what comes of it"]
    words += ["--reapply-exclude", "Signal"] if forget else []
    process = await asyncio.create_subprocess_exec(*words, env=stage.environment())
    assert await asyncio.wait_for(process.wait(), LONG) == 0


ENDS = ("COMPLETED", "CANCELLED", "REJECTED", "EXPIRED", "FAILED")


async def status_of(handle: Handle) -> dict[str, Any]:
    """Query an order's status, again while there is no worker."""
    query = partial(handle.query, rpc_timeout=timedelta(seconds=3))
    return dict(await seen(query, "status"))


async def reach(handle: Handle, state: str) -> None:
    """Wait until the order is in a state or beyond, or until a step of it has begun."""

    async def reached() -> bool:
        if state == "DISPATCHED":
            return "dispatch" in ledger(handle.id)
        if state in STEPS:
            return bool(store.events_of(handle.id, state, "outcome"))
        return (await status_of(handle))["state"] in (state, *ENDS)

    await seen(reached)


async def seen(sight: Callable[..., Any], *given: Any) -> Any:
    """Look, it may be async, until there is something to see, bounded; return that."""
    async with asyncio.timeout(LONG):
        while True:
            with suppress(RPCError):  # nobody answers yet
                found = sight(*given)
                found = await found if asyncio.iscoroutine(found) else found
                if found:
                    return found
            await asyncio.sleep(0.4)  # each look costs a busy machine some ms


def ledger(order_id: str, what: str = "status") -> dict[str, Any]:
    """Read an order's effects: {kind: status}."""
    rows = store.effects_of(order_id)
    assert len({row["kind"] for row in rows}) == len(rows), f"{order_id}: one twice in {rows}"
    return {row["kind"]: row[what] for row in rows}


async def play_all(stage: Stage, names: list[str]) -> dict[str, Any]:
    """Play scenarios side by side, the longest first, the briefest last: {name: order}.

    So few at once that a message comes within the 5 s in which its step is slow.
    """
    names = sorted(names, key=lambda name: -SCENARIOS[name].fields.get("deadline_seconds", 10))
    places = asyncio.Semaphore(20)

    async def one(name: str) -> Handle:
        async with places:
            for _ in range(3):
                handle = await asyncio.wait_for(play(stage, SCENARIOS[name]), 2 * LONG)
                if not await was_late(SCENARIOS[name], handle):
                    break
                warnings.warn(f"{name}: a busy machine was late for its slow step", stacklevel=1)
        return handle

    orders = await asyncio.gather(*map(one, names), return_exceptions=True)
    return dict(zip(names, orders, strict=True))


@pytest.fixture(scope="session")
@side_by_side
async def played(stage: Stage) -> dict[str, Any]:
    """Play all scenarios; what kills workers, in a wing in which each is revived."""
    wing = Wing(stage, "all", "all", "all")  # the fewer, the more orders each death holds up
    calm = [name for name in SCENARIOS if name not in CRASHES]
    playing = asyncio.gather(play_all(stage, calm), play_all(wing, CRASHES))
    while not playing.done():
        wing.revive()
        await asyncio.sleep(0.1)
    ended, survived = await playing
    return ended | survived


async def was_late(scenario: Scenario, handle: Handle) -> bool:
    """Tell whether a wrong end is but a busy machine's: what had to come in a slow step did not.

    The deadline came before that step, or the step was done before the order was stopped.
    """
    slow = {step for step in STEPS if scenario.fields.get(step) in ("slow", "late")}
    begun = [event for event in store.events_of(handle.id) if event["type"] in slow]
    missed = scenario.ends != "COMPLETED" and begun and begun[-1].get("ended") == "ok"
    right = (await end_of(handle), ledger(handle.id)) == (scenario.ends, scenario.effects)
    return not right and bool(missed or slow - {event["type"] for event in begun})


async def check(scenario: Scenario, handle: Handle | BaseException) -> None:
    """See an order's end, and compare what it left with what must come of it."""
    if isinstance(handle, BaseException):
        raise handle
    order_id, ended = handle.id, await end_of(handle)
    assert (ended, ledger(order_id)) == (scenario.ends, scenario.effects)
    state = ended if ended.isupper() else "FAILED"
    assert (await status_of(handle)).items() >= (scenario.status | {"state": state}).items()
    events = store.events_of(order_id)
    for step in STEPS:
        fault = scenario.fields.get(step, "")
        assert store.count(order_id, step) >= LEAST_ATTEMPTS.get(fault, 0), step
        noted = any(event.get(step) == fault for event in events)  # it fires once
        assert noted == (fault in ("hang", "late", "crash-before", "crash-after")), step
    # Nothing comes after the outcome but the attempts at writing it down, and those of a child that
    # has not heard yet that it is cancelled: the tombstone refuses what it may still try.
    after = ("fault", "record_outcome", "prepare_package", "dispatch_carrier")
    last = [event for event in events if event["type"] not in after][-1]
    assert (last["type"], last.get("state")) == ("outcome", state)


@pytest.mark.parametrize("name", SCENARIOS)
def test_order_ends_as_told(name: str, played: dict[str, Any]) -> None:
    within(check(SCENARIOS[name], played[name]))


def test_each_run_writes_its_decisions_and_its_outcome(played: dict[str, Any]) -> None:
    """Of the same words too."""
    order_id = played["reset and cancelled, reset and expired, reset and approved"].id
    assert (store.count(order_id, "approve"), store.count(order_id, "outcome")) == (2, 4)


def test_each_timer_is_called_what_it_is(played: dict[str, Any]) -> None:
    """The Web UI shows these names."""
    events = within(read_history(played["a wait does not count"]))
    timers = [event.name for event in events if event.kind == "TIMER_STARTED"]
    assert timers == ["Deadline", "Requested wait", "Review by timer", "Deadline"]


def test_each_history_replays_and_each_prefix_of_some(played: dict[str, Any]) -> None:
    """As on a worker that remembers nothing, after each workflow task."""
    orders = [order for order in played.values() if not isinstance(order, Exception)]
    histories = [within(order.fetch_history()) for order in orders]
    for name in ("approved", "prepare_package is down", "all messages, in time and too late"):
        history = within(played[name].fetch_history())
        for i, event in enumerate(history.events, 1):
            if event.HasField("workflow_task_completed_event_attributes"):
                histories.append(replace(history, events=history.events[:i]))
    # Not in a sandbox, which takes most of the time and has no say in what a replay finds.
    runner = UnsandboxedWorkflowRunner()
    replayer = Replayer(workflows=[OrderWorkflow], workflow_runner=runner)
    for history in histories:
        within(replayer.replay_workflow(history))


@side_by_side
async def test_a_timeout_that_our_code_raises_undoes_the_order_too(stage: Stage) -> None:
    """To Temporal it is a failure of the workflow, as an ApplicationError is."""
    wing = Wing(stage)
    raises = "        raise TimeoutError\n"
    wing.code = changed_copy(wing.folder / "code", "workflows.py", BUG[1], raises)
    wing.start_worker()
    await check(Scenario("OrderGivenUp", UNPAID), await place(wing))


@side_by_side
async def test_of_an_order_whose_code_fails_that_is_told(stage: Stage) -> None:
    """When its status is asked for, and when it is to go on."""
    wing = Wing(stage, "all")
    handle = await place(wing, review_seconds=600)
    await reach(handle, "AWAITING_REVIEW")
    wing.kill_worker(wing.workers[0])
    other = ("workflows.py", "step.validate_order,", "step.charge_payment,")
    wing.code = changed_copy(wing.folder / "code", *other)
    wing.start_worker()
    for _ in range(2):
        told = partial(wing.run, "signals.py", "status", handle.id)
        await seen(lambda told=told: "the workflow's code fails; see:" in told().stderr)
        await handle.signal("approve")
        await seen(code_failure, handle)


def test_only_what_a_workflow_is_given_may_be_anything() -> None:
    """An answer taken for another would be worse: a refund of a package that has left, say."""
    converter, [payload] = TolerantConverter(), DefaultPayloadConverter().to_payloads([{"a": 1}])
    payload.data = b"{"
    assert isinstance(converter.from_payloads([payload])[0], RuntimeError)
    with pytest.raises(RuntimeError):
        converter.from_payloads([payload], [str])


@side_by_side
async def test_a_stop_is_obeyed_that_comes_together_with_a_steps_answer(stage: Stage) -> None:
    """Both reach the workflow in one task: the `await` has the answer and drops the stop."""
    wing, threads = Wing(stage, "shipping"), ThreadPoolExecutor(4)
    serving = partial(Worker, wing.client, task_queue=ORDERS_QUEUE)
    deciding = partial(serving, workflows=[OrderWorkflow])
    doing = partial(serving, activities=ORDER_STEPS, activity_executor=threads)
    shipped = await place(wing, "approve", prepare_package="slow")
    async with deciding(), doing():
        await reach(shipped, "prepare_package")
    await wing.client.get_workflow_handle(f"ship-{shipped.id}").terminate()
    await shipped.cancel()
    late, *stopped = [await place(wing, deadline_seconds=seconds) for seconds in (5, 600, 600)]

    async def pending(number: int) -> None:
        for handle in (late, *stopped):
            while len((await handle.describe()).raw_description.pending_activities) != number:
                await asyncio.sleep(0.05)

    async with deciding():
        await pending(1)
    async with doing():
        await pending(0)
    for handle, way in zip(stopped, ("cancel", "CANCEL"), strict=True):
        await send(wing, handle, way)
    await asyncio.sleep(5)
    async with deciding(), doing():
        ends = [(await end_of(order), ledger(order.id)) for order in (shipped, late, *stopped)]
    threads.shutdown()
    assert ends.pop(0) == ("CANCELLED", REFUNDED)
    assert ends == [("DeadlineExceeded", {}), ("CANCELLED", {}), ("CANCELLED", {})]


NAN, INF = float("nan"), float("inf")

# The limits of an order: {field: (good values, bad values)}.

BAD_ID = [" ", "a b", "x" * 101, "a\n", "ä", "٣", "a/b", 5, None, True, ["a"]]
BAD_SECONDS = [-0.1, 86_400.1, NAN, INF, -INF, 10**400, "5", True, [1]]
LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "order_id": (["A-z.0_9", "x" * 100, "a-ship-1"], ["", "ship-1", "charge-1", *BAD_ID]),
    "customer_id": (["a", "x" * 100, "ship-1"], ["", *BAD_ID]),
    "amount_cents": ([1, 10**8], [0, -1, 10**8 + 1, 12.5, 100.0, True, "100", None, NAN, INF]),
    "payment_id": (["p", "x" * 104], [bad * 2 if bad == "x" * 101 else bad for bad in BAD_ID]),
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


def test_defaults_are_filled_in() -> None:
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


def test_a_charge_many_ask_for_is_made_once_and_each_request_counts(
    empty_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy disk one of 600 may wait for longer than an attempt does.
    monkeypatch.setattr(store, "PATIENCE_SECONDS", LONG)
    hammer = f"import charge_store as s\ns.PATIENCE_SECONDS = {LONG}\n"
    hammer += f"for _ in range(50): s.perform(*{CHARGE})"
    processes = [subprocess.Popen([sys.executable, "-c", hammer], cwd=HERE) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        receipts = list(threads.map(lambda _: store.perform(*CHARGE), range(8 * 50)))
    assert [process.wait(LONG) for process in processes] == [0] * 4
    [row] = store.execute("SELECT * FROM charges")
    assert (row["status"], row["requests"]) == ("charged", 600)
    assert {receipt["created_at"] for receipt in receipts} == {row["created_at"]}


def test_a_key_of_another_order_customer_or_amount_does_nothing(empty_store: None) -> None:
    first = store.perform(*CHARGE)
    for owner in ("o2", "c", 5), ("o", "c2", 5), ("o", "c", 6):
        with pytest.raises(store.PaymentConflict):
            store.perform("charge", "k", *owner)
        assert store.undo("charge", "k", *owner) == "not ours"
    assert store.perform(*CHARGE) == first | {"requests": 5}


def test_a_card_is_good_for_its_whole_month_and_for_what_was_asked_in_it(empty_store: None) -> None:
    now = datetime.now(UTC)
    assert charge(Order("good", card_expiry=f"{now:%m/%y}"))["requests"] == 1
    order = Order("o", payment_id="k", card_expiry=f"{now - timedelta(days=now.day):%m/%y}")
    with pytest.raises(Exception, match="card expired"):
        charge(order)
    store.perform("charge", "k", "o", order.customer_id, order.amount_cents)
    assert charge(order)["requests"] == 2


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


def test_a_store_that_is_not_there_is_not_clean_and_is_made_anew(empty_store: None) -> None:
    path = store.store_path()
    for _ in range(2):
        answers(ledger_says("--audit"), 1, str(path))
        assert not path.exists()
        store.note("o", "x", {}, 1)
        store.perform(*CHARGE)
        with closing(sqlite3.connect(path)) as another:
            for table in ("effects", "events"):
                assert another.execute(f"SELECT order_id FROM {table}").fetchall() == [("o",)]
        path.unlink()


def test_money_and_decisions_are_on_disk_when_answered(empty_store: None) -> None:
    ran: list[str] = []
    store.execute("SELECT 1")
    [connection] = store._opened.values()
    connection.set_trace_callback(ran.append)
    for level, call in (
        ("FULL", partial(store.perform, *CHARGE)),
        ("FULL", partial(store.undo, *CHARGE)),
        ("FULL", partial(store.note, "o", "approve", {})),
        ("NORMAL", partial(store.note, "o", "charge_payment", {}, 1)),  # soon after
    ):
        call()
        assert ran[-2] == f"PRAGMA synchronous = {level}" and ran[-1].startswith("INSERT")


def test_what_a_killed_process_wrote_is_in_the_file_once_opened(empty_store: None) -> None:
    write = f"import os, charge_store as s; s.perform(*{CHARGE}); os._exit(137)"
    assert subprocess.run([sys.executable, "-c", write], cwd=HERE).returncode == 137
    assert store.effects_of("o")  # which opens it
    copy = shutil.copy(store.store_path(), store.store_path().with_name("without-its-wal.db"))
    with closing(sqlite3.connect(copy)) as alone:
        assert len(alone.execute("SELECT * FROM effects").fetchall()) == 1


ALL = "charge reservation dispatch"
AUDITED = [  # effects in force, outcomes in turn, and how many lines the audit must give
    ("", "", 0),
    (ALL, "COMPLETED", 0),
    (ALL, "FAILED COMPLETED", 0),
    (ALL, "COMPLETED FAILED", 3),
    (ALL, "", 0),
    ("", "COMPLETED", 3),
    ("", "EXPIRED", 0),
    (f"charge {ALL}", "", 1),
    (f"charge {ALL}", "COMPLETED", 1),
    ("dispatch reservation", "", 1),
    ("dispatch dispatch reservation reservation", "", 3),
]


@pytest.mark.parametrize(("in_force", "outcomes", "violations"), AUDITED)
def test_the_audit_has_a_line_for_each_effect_that_does_not_fit_the_last_outcome(
    in_force: str, outcomes: str, violations: int, empty_store: None
) -> None:
    for number, kind in enumerate(in_force.split()):
        store.perform(kind, f"k{number}", RED, "c", 5)
        store.undo(kind, f"v{number}", RED, "c", 5)  # what is voided counts for nothing
    for number, state in enumerate(outcomes.split()):
        store.note(RED, "outcome", {"state": state, "run": number})
    orders, lines = store.audit()
    assert (len(orders), len(lines)) == (bool(in_force or outcomes), violations)
    done = ledger_says("--audit")
    assert done.returncode == (violations > 0) and "\x1b" not in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) >= max(violations, 1)


# Orders that our scripts would not send: straight to the server.

NOT_JSON = RawValue(Payload(metadata={"encoding": b"json/plain"}, data=b"{"))
MALFORMED: list[Any] = [[], [None], ["an order"], [5], [{}], [[{"order_id": "bad-"}]], [NOT_JSON]]
MALFORMED += [[{"order_id": "bad-other"}], [{"order_id": "bad-1"}, {"order_id": "bad-1"}]]
KINDS = [("OrderWorkflow", ORDERS_QUEUE), ("ChargeWorkflow", ORDERS_QUEUE)]
KINDS += [("ShippingWorkflow", SHIPPING_QUEUE)]


@side_by_side
async def test_a_malformed_order_fails_at_once_and_leaves_no_trace(stage: Stage) -> None:
    """Each field alone: see LIMITS."""

    async def send(kind: tuple[str, str], inputs: list[Any]) -> str:
        options: dict[str, Any] = {"id": f"bad-{uuid.uuid4().hex}", "task_queue": kind[1]}
        return await end_of(await stage.client.start_workflow(kind[0], args=inputs, **options))

    sent = list(itertools.product(KINDS, MALFORMED))
    ends = await asyncio.gather(*(send(*one) for one in sent))
    wrong = [(*one, end) for one, end in zip(sent, ends, strict=True) if end != "InvalidOrder"]
    assert wrong == []
    left = store.execute("SELECT order_id FROM events UNION SELECT order_id FROM effects")
    assert not [row for row in left if "bad-" in row["order_id"]]


# Messages, and the trail that an order leaves.


def test_each_message_leaves_a_row_and_a_refused_address_its_reason(played: dict[str, Any]) -> None:
    """Of updates, which answer, exercise 7 and the floods tell."""
    events = store.events_of(played["all messages, in time and too late"].id)
    told = {
        (row["type"], row.get("note", row.get("address")), row.get("reason", row.get("counts")))
        for row in events
        if not row["attempt"]
    }
    assert told == {
        ("update_address", "2 Side Street", None),
        ("address_refused", " ", "address must be 1 to 200 characters, not blank"),
        ("approve", "fine", True),
        ("address_refused", "3 Late Street", "too late, the order is SHIPPING"),
        ("reject", "no", False),
        ("cancel", None, ""),
        ("outcome", None, None),
    }


def test_each_attempt_leaves_a_row_that_says_how_it_ended(played: dict[str, Any]) -> None:
    """Of the other steps LEAST_ATTEMPTS tells."""
    order_id = played["all messages, in time and too late"].id
    charges = store.events_of(order_id, "charge_payment")
    ends = [(r["attempt"], r["ended"].split(":")[0]) for r in charges if r["seconds"] >= 0]
    assert ends == [(1, "ConnectionError"), (2, "ConnectionError"), (3, "ok")]
    [order] = store.events_of(order_id, "receive_order")
    assert order.keys() >= RULES.keys() and order["simulate"]["charge_payment"] == "flaky"


@side_by_side
async def test_a_second_order_on_one_payment_id_leaves_the_first_its_charge(stage: Stage) -> None:
    for ended, left in ("COMPLETED", PAID), ("PaymentConflict", UNPAID):
        order = await place(stage, "approve", payment_id="pay-more")
        assert (await end_of(order), ledger(order.id)) == (ended, left)
    [charge] = store.execute("SELECT * FROM charges WHERE idempotency_key = 'pay-more'")
    assert (charge["status"], charge["requests"]) == ("charged", 2)


@side_by_side
async def test_an_order_that_code_with_other_defaults_received_is_no_other(stage: Stage) -> None:
    """It is received once more after a reset, and looked back at before it is undone."""
    wing = Wing(stage, "all")
    handle = await place(wing, "approve", prepare_package="down")
    await reach(handle, "prepare_package")
    wing.kill_worker(wing.workers[0])
    change = ("activities.py", '"1 Main Street"', '"2 Main"')
    wing.code = changed_copy(wing.folder / "code", *change)
    wing.start_worker()
    await send(wing, handle, "RESET WITH SIGNALS")
    await reach(handle, "SHIPPING")
    await send(wing, handle, "cancel")
    await check(cancelled(), handle)


@side_by_side
async def test_an_order_id_that_the_server_forgot_is_the_same_or_refused(stage: Stage) -> None:
    """Also if it is cancelled before its first line: what has happened has happened."""
    wing = Wing(stage, "all")  # whose server knows nothing of what the ledger knows
    for message, amount, ended, requests in (
        ("approve", 9999, "COMPLETED", 2),
        ("cancel", 9999, "COMPLETED", 1),
        ("cancel", 5, "OrderConflict", 1),
        ("approve", 5, "OrderConflict", 1),
    ):
        first = await place(stage, "approve")
        await check(completed(), first)
        again = await place(wing, message, order_id=first.id, amount_cents=amount)
        assert (await end_of(again), ledger(first.id)) == (ended, PAID)
        assert ledger(first.id, "requests")["charge"] == requests
    await send(wing, again, "RESET WITH SIGNALS")
    assert await end_of(again) == "OrderConflict" and store.count(first.id, "outcome") == 1


# Floods of messages, before, during and after a death.

MOVES = [("update_address", "2 Side Street"), ("update_address", " "), ("dispatch_failed", "?")]
MIX = [*MOVES, ("approve", "again"), ("reject", "again")]


async def flood(handle: Handle, times: int, kinds: list[tuple[str, str]]) -> None:
    """Send all of these signals so many times."""
    for _ in range(times):
        await asyncio.gather(*(handle.signal(*kind) for kind in kinds))


async def check_flood(handle: Handle, sent: int) -> None:
    """See an order ended by its first decision, with each message written down or counted."""
    await check(completed(status={"decision": "approved"}), handle)
    sorts = ("approve", "reject", "update_address", "address_refused", "dispatch_failed")
    [told] = store.events_of(handle.id, "outcome")
    assert len(store.events_of(handle.id, *sorts)) + told.get("messages_not_kept", 0) == sent


@side_by_side
async def test_an_order_outlives_the_messages_that_come_while_no_worker_lives(stage: Stage) -> None:
    wing = Wing(stage)
    handle = await place(wing, "approve", "first", review_seconds=600)
    update = asyncio.create_task(handle.execute_update("update_address", "4 New Street"))
    await flood(handle, 420, MIX)
    wing.start_worker()
    # On two cores that do nothing else this takes a few seconds; 60 is what we promise.
    async with asyncio.timeout(2 * LONG):
        await check_flood(handle, 1 + 1 + 420 * 5)
        assert await update == "4 New Street"  # by a handler that ran before run()'s first line


@side_by_side
async def test_an_order_outlives_messages_around_deaths_and_waits_no_10_s(stage: Stage) -> None:
    """After deaths in the review, and one while the child runs."""
    wing = Wing(stage, "all")
    handle = await place(wing, review_seconds=600, prepare_package="slow")
    await reach(handle, "AWAITING_REVIEW")
    await flood(handle, 130, MOVES)
    for _ in range(10):
        await handle.execute_update("update_address", "3 Own Street")
        with pytest.raises(WorkflowUpdateFailedError):
            await handle.execute_update("update_address", " ")
    wing.kill_worker(wing.workers[0])
    await asyncio.sleep(0.5)  # so that the server knows: else it may hand the task to the dead
    await flood(handle, 30, MOVES)
    wing.start_worker()
    await flood(handle, 30, MOVES)
    wing.kill_worker(wing.workers[0])
    await handle.signal("approve", "first")
    await flood(handle, 30, MOVES)
    await handle.signal("reject", "second")
    wing.start_worker()
    await reach(handle, "prepare_package")
    wing.kill_worker(wing.workers[0])
    wing.start_worker()
    await check_flood(handle, 130 * 3 + 10 + 3 * 30 * 3 + 2)
    events = await read_history(handle)
    # Ten were accepted and done. One that is refused leaves no event.
    assert sum(event.kind.startswith("UPDATE_") for event in events) == 20
    waits = [
        event.at - events[event.begun - 1].at
        for event in events
        if event.kind == "WORKFLOW_TASK_TIMED_OUT"
        and event.a.timeout_type == enums.TimeoutType.TIMEOUT_TYPE_SCHEDULE_TO_START
    ]
    # By the server's own clock: so long did the task wait for the dead worker.
    assert waits and max(waits) < 5


# The command lines.

NOWHERE = "127.0.0.1:1"  # nothing listens there
LASTING = ["--deadline", "600", "--max-attempts", "0"]
TIMER = ["--review", "timer", "--review-seconds", "0"]
QUICK = [*TIMER, "--wait-result"]

WRONG = [  # what the one line must name, a command, and each of its last words
    ("starter.py", "starter.py", [f"--{RED}"]),
    ("starter.py", "starter.py order", ["", "ship-1", "charge-1", RED, "x" * 101, f"--{RED}"]),
    ("starter.py", "starter.py order", ["--review=x", "--card-expiry=13/30", "--deadline=-1"]),
    ("starter.py", "starter.py order", ["--payment-id=", "\udcff", f"--amount=--{RED}"]),
    ("starter.py", "starter.py charge", ["--customer-id=", "surplus"]),
    ("--amount", "starter.py order --amount", ["1.234", "-1", "abc", "", "nan", "1e3", "9" * 5000]),
    ("amount_cents", "starter.py order --amount", ["1000000.01", "0"]),
    ("simulate", "starter.py order --simulate", ["charge_payment", f"charge_payment={RED}"]),
    ("14 points, 15 no-key", "starter.py crash", ["16", "x", RED]),
    ("signals.py", "signals.py", [RED, "status", "--limit"]),
    ("signals.py", "signals.py update-address", ["o"]),
    ("signals.py", "signals.py list", ["--limit=-1", "--limit=" + "9" * 5000]),
    ("signals.py", "signals.py approve o", [f"--{RED}"]),
    ("500", "signals.py approve o --note", ["x" * 501]),
    ("not valid text", "signals.py events", ["\udcff"]),
    ("worker.py", "worker.py", ["", RED]),
    ("charge_store.py", "charge_store.py", [f"--{RED}"]),
]


@pytest.mark.parametrize(("says", "line", "wrong"), WRONG)
def test_wrong_usage_exits_2_with_one_line(says: str, line: str, wrong: list[str]) -> None:
    for word in wrong:
        answers(here(*line.split(), word, TEMPORAL_ADDRESS=NOWHERE), 2, says)


def test_an_order_that_nobody_knows_is_named_with_the_command_that_lists_them(stage: Stage) -> None:
    for verb in ("approve", "reject", "cancel", "status", "watch", "history", "events"):
        answers(signals(verb, "nobody"), 1, "see:")
    answers(signals("update-address", "nobody", "3"), 1, "see:")
    answers(signals("approve", "x" * 2000), 1, "see:")
    answers(signals("status", ""), 1, "see:")
    answers(signals("approve"), 1, "name an order: ")  # none is offered without a terminal
    for unknown in (RED, "\udcff"):
        answers(ledger_says(unknown), 1, "nothing of")


def test_an_order_is_followed_to_its_end_and_then_it_is_too_late(stage: Stage) -> None:
    answers(starter("order", "done", *QUICK), 0, "done COMPLETED")
    answers(starter("order", "done"), 1, "finished already: nothing was started")
    for verb in ("approve", "reject", "cancel"):
        answers(signals(verb, "done"), 1, "too late")
    answers(signals("update-address", "done", "3"), 1, "too late")
    for verb in ("status", "watch", "events"):
        answers(signals(verb, "done"), 0, "COMPLETED")
    answers(signals("history", "done"), 0, "the workflow is complete")
    answers(signals("status", "ship-done"), 0, "COMPLETED")
    answers(starter("order", "bad", *QUICK, "--card-expiry", "12/20"), 1, "card expired 12/20")
    undone = ["order", "undone", "--review-seconds", "0", "--simulate", "release_inventory=down"]
    answers(starter(*undone), 0, "undone started")
    within(seen(store.count, "undone", "release_inventory"))
    answers(signals("cancel", "undone"), 1, "is being undone already")
    within(stage.client.get_workflow_handle("undone").terminate())
    answers(signals("status", "undone"), 0, "COMPENSATING, then TERMINATED: nothing was undone")


def test_a_running_order_is_attached_to_and_what_others_typed_is_escaped(stage: Stage) -> None:
    """Addresses, notes, and the id that somebody gave a workflow without our scripts."""
    order = ["order", "open", "--review-seconds", "600", "--deadline", "600"]
    answers(starter(*order, "--address", RED), 0, "open started")
    answers(starter(*order), 0, "open is running already")
    answers(signals("status", "open"), 0, TYPED)
    answers(signals("update-address", "open", " "), 1, "must be 1 to 200 characters")
    answers(signals("update-address", "open", "x" * 101), 0, "open: goes to")
    answers(signals("reject", "open", "--note", RED), 0, "reject sent")
    answers(signals("watch", "open"), 0, "open REJECTED")
    answers(signals("status", "open"), 0, TYPED)  # the address was changed: this is the note
    answers(signals("events", "open"), 0, f"note={TYPED}")
    refused = stage.client.start_workflow("OrderWorkflow", id=RED, task_queue=ORDERS_QUEUE)
    assert within(end_of(within(refused))) == "InvalidOrder"
    answers(signals("approve", RED), 1, "too late")
    answers(signals("watch", RED), 1, f"{TYPED} FAILED")
    for words in (["status", RED], ["list"]):
        answers(signals(*words), 0, TYPED)


def test_the_same_charge_again_is_the_same_workflow_and_charged_once(stage: Stage) -> None:
    for amount in ("12.3", "12.30"):
        charge = ["charge", "--customer-id=c", "--amount", amount, "--wait=0.1", "--wait-result"]
        answers(starter(*charge), 0, "charge-c-1230 charged")
    answers(ledger_says("charge-c-1230"), 0, "requests 2, charged once")
    answers(signals("approve", "charge-c-1230"), 1, "is no order")


def test_the_list_has_the_newest_first_amounts_and_other_runs(played: dict[str, Any]) -> None:
    answers(starter("order", "listed-1", *LASTING), 0, "started")  # it goes on: the oldest lasts
    for order_id in ("listed-2", "listed-3"):
        answers(starter("order", order_id, *QUICK), 0, "COMPLETED")
    rows = signals("list", "--limit", "2").stdout.splitlines()
    assert [row.split()[4] for row in rows[:2]] == ["listed-3", "listed-2"]
    assert re.fullmatch(r"\d+ older ones are not shown; --limit \d+ shows all", rows[2])
    everything = signals("list", "--limit", rows[2].split()[-3]).stdout
    assert "not shown" not in everything and "99.99  listed-1" in everything
    assert re.search(r"99\.99  test-\w+  \(another run of it\)", everything)  # after a reset


def test_the_first_decision_stands_and_what_has_ended_is_not_told_as_going_on(stage: Stage) -> None:
    """To be cancelled is not to fail; what it leaves behind, nobody waits for."""
    late = ["order", "late", *LASTING, "--simulate", "charge_payment=late"]
    answers(starter(*late), 0, "late started")
    answers(signals("approve", "late"), 0, "approve sent")
    answers(signals("reject", "late"), 1, "only recorded")
    within(seen(store.count, "late", "charge_payment"))
    answers(signals("history", "late"), 0, "      now  charge_payment\n")
    answers(signals("cancel", "late"), 0, "cancel sent")
    answers(signals("watch", "late"), 0, "late CANCELLED")
    done = signals("history", "late")
    answers(done, 0, "the workflow is complete")
    assert " now " not in done.stdout and "X its worker died" not in done.stdout


@side_by_side
def test_what_stops_a_script_is_said_in_one_line(_: Stage) -> None:
    for line in ("worker.py", "starter.py order", "signals.py approve o"):
        nobody = run(*line.split(), TEMPORAL_ADDRESS=NOWHERE)
        answers(nobody, 1, f"no Temporal server answers at {NOWHERE}; to start one")
        assert "worker.py server" in nobody.stderr
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (f"127.0.0.1:{silent.getsockname()[1]}", RED):
            answers(run("worker.py", TEMPORAL_ADDRESS=address), 1, "no Temporal server")
    answers(run("worker.py", TEMPORAL_PROFILE="no-such"), 1, "configuration")
    answers(run("worker.py", LOG_LEVEL=RED), 2, "LOG_LEVEL")
    answers(run("charge_store.py", CHARGE_STORE="no-such-folder/store.db"), 1, "CHARGE_STORE")


@side_by_side
async def test_without_a_worker_a_signal_is_kept_and_a_question_is_given_up(stage: Stage) -> None:
    """In another namespace, by the environment alone. Then the worker is stopped."""
    wing = Wing(stage)
    answers(wing.run("signals.py", "list"), 0, "no orders yet")
    answers(wing.run("starter.py", "order", "new", *LASTING), 0, "no worker answers; start one")
    answers(wing.run("signals.py", "history", "new"), 0, "no worker has taken it up yet")
    answers(wing.run("signals.py", "status", "new"), 1, "no worker answers; start one")
    answers(wing.run("signals.py", "update-address", "new", "3"), 1, "no worker answers; start one")
    answers(wing.run("signals.py", "approve", "new"), 0, "approve sent; no worker answers")
    worker = wing.start_worker()
    answers(wing.run("signals.py", "watch", "new"), 0, "new COMPLETED")
    stuck = ["order", "stuck", *LASTING, "--simulate", "receive_order=down"]
    answers(wing.run("starter.py", *stuck), 0, "stuck started")
    worker.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(worker.wait, LONG) == 0
    assert "stopped" in wing.logs.read_text() and "Traceback" not in wing.logs.read_text()


@side_by_side
async def test_a_locked_ledger_is_outlived_and_keeps_nobody_who_leaves(stage: Stage) -> None:
    wing = Wing(stage, "all", own_ledger=True)
    order = ["order", "locked", *LASTING, *TIMER]
    await seen(lambda: "serves" in wing.logs.read_text())
    with closing(sqlite3.connect(wing.store, timeout=LONG, isolation_level=None)) as another:
        another.execute("BEGIN IMMEDIATE")
        answers(wing.run("starter.py", *order), 0, "locked started")
        time.sleep(4)  # longer than anybody waits for a lock at once
        another.execute("ROLLBACK")
        answers(wing.run("signals.py", "watch", "locked"), 0, "locked COMPLETED")
        another.execute("BEGIN IMMEDIATE")
        order[1] = "stopped"
        answers(wing.run("starter.py", *order), 0, "stopped started")
        time.sleep(2)
        wing.workers[0].send_signal(signal.SIGINT)
        # Alone on two cores it takes 2 s; it was 68 s once.
        assert wing.workers[0].wait(LONG / 3) == 0


@side_by_side
def test_a_closed_input_or_output_is_no_reason_for_a_traceback(_: Stage) -> None:
    looks = ["signals.py approve <&-", "signals.py list >&-", "charge_store.py --audit >&-"]
    looks += ["charge_store.py >&-", "starter.py order closed <&- >&-", "worker.py --help >&-"]
    for line in looks:
        words = ["bash", "-c", f"exec {shlex.quote(sys.executable)} {line}"]
        done = subprocess.run(words, cwd=HERE, capture_output=True, text=True, timeout=LONG)
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done


@side_by_side
def test_load_ends_by_itself_with_what_an_order_costs_and_a_clean_audit(_: Stage) -> None:
    loaded = run("starter.py", "load", "--orders", "10", "--wait", "0.5")
    answers(loaded, 0, "10/10")
    assert "99th percentile" in loaded.stdout and "audit clean" in loaded.stdout, loaded
    number = r"[1-9]\d*"
    told = rf"CPU ms per order: worker {number}, server {number}\nworker memory {number} MB at most"
    assert re.search(told, loaded.stdout), loaded


@side_by_side
async def test_who_leaves_at_any_moment_leaves_nothing_behind(stage: Stage) -> None:
    # In the server's start, then in the play.
    for number, seconds, line in (1, 0, "crash timer"), (15, 3, "chaos"), (2, 3, "crash timer"):
        folder = stage.folder / f"left-{number}-{line[:5]}"
        folder.mkdir()
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pipes |= {"env": os.environ | {"TMPDIR": str(folder)}, "start_new_session": True}
        pipes["cwd"] = HERE
        with subprocess.Popen([sys.executable, "starter.py", *line.split()], **pipes) as starter:
            await seen(lambda folder: any(folder.glob("orders-*/temporal.db")), folder)
            time.sleep(seconds)
            for _ in range(2):  # in a hurry, and to its whole group, as a terminal does it
                os.killpg(starter.pid, number)
                time.sleep(0.03)
            assert starter.communicate(timeout=LONG)[1] == b""
        # The second may meet a Python that has ended, which a shell calls 128 + number too.
        assert starter.returncode in (128 + number, -number)
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True)
        assert str(folder) not in processes.stdout and not any(folder.iterdir())


@side_by_side
async def test_the_server_command_is_the_server_and_keeps_its_data(stage: Stage) -> None:
    copy = apart(stage.folder / "server")
    address = re.findall(r"localhost:\d+", (copy / "worker.py").read_text())[0]
    with socket.create_server(("127.0.0.1", int(address.partition(":")[2]) + 1000)):
        nobody = run("starter.py", "order", code=copy, TEMPORAL_ADDRESS="")
        answers(nobody, 1, "cannot start a Temporal server")
    for known in (False, True):
        words = [sys.executable, "worker.py", "server"]
        server = start_apart(words, cwd=copy, stdout=subprocess.PIPE)
        stage.workers.append(server)  # it does not outlive the stage
        await seen(is_listening, address)
        if known:
            answers(run("worker.py", "server", code=copy), 1, f"{address} is taken")
        order = run("starter.py", "order", "kept", code=copy, TEMPORAL_ADDRESS=address)
        answers(order, 0, "is running already" if known else "kept started")
        if not known:
            watch = Terminal(copy, "signals.py", "watch", "kept")
        watch.talk("no worker answers")
        server.kill()
        watch.talk("no answer; the server keeps the order, so we wait for it")
        told = server.communicate(timeout=LONG)[0].decode()
        assert f"kill it: kill -9 {server.pid}" in told
    watch.process.send_signal(signal.SIGINT)
    assert watch.close() == 130


# The README: what it names exists, what it tells to type is understood.

README = (HERE / "README.md").read_text(encoding="utf-8")
BASH = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
TOLD = [*BASH.splitlines(), *re.findall(r"`((?:python|temporal) [^`]*)`", README)]
OURS = sorted({m for line in TOLD for m in re.findall(r"\w+\.py(?: [^&|;#>]*)?$", line)})
SERVERS = sorted({m for line in TOLD for m in re.findall(r"\btemporal [^&|;#>]*", line)})


@pytest.mark.parametrize("line", OURS)
def test_each_command_in_the_readme_is_understood_and_has_help(
    line: str, empty_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So far as to begin with what it does, which it then does not."""
    monkeypatch.setattr(asyncio, "run", lambda work: work.close())
    script, *words = shlex.split(line)
    if script != "test_workflows.py":
        assert here(script, *words).returncode != 2
        for command in ([script], [script, *words]):
            answers(here(*command, "--help"), 0, "usage:")


@pytest.mark.parametrize("line", SERVERS)
def test_each_flag_of_temporals_own_command_in_the_readme_exists(line: str) -> None:
    words = shlex.split(line)
    verbs = list(itertools.takewhile(lambda word: not word.startswith("-"), words[1:]))
    helped = [temporal_binary(), *verbs, "--help"]
    told = subprocess.run(helped, capture_output=True, text=True, timeout=LONG)
    assert told.returncode == 0
    for word in words:
        assert not word.startswith("--") or word.partition("=")[0] in told.stdout, word


# The server of docker-compose.yml, which the stage runs too: namespaces, HTTP, the same flags.


def composed_arguments() -> list[str]:
    """Read the server's arguments out of docker-compose.yml."""
    text = (HERE / "docker-compose.yml").read_text(encoding="utf-8")
    return re.findall(r"^      - (\S+)", text.split("command:")[1].split("ports:")[0], re.MULTILINE)


def test_docker_compose_starts_the_server_with_the_flags_of_the_scripts() -> None:
    kinds = ("--sqlite-pragma", "--dynamic-config-value")
    ours = Stage(HERE, NOWHERE).server_command()
    flags = [f"{flag}={value}" for flag, value in itertools.pairwise(ours) if flag in kinds]
    assert [word for word in composed_arguments() if word in flags] == flags != []


def test_the_readmes_curl_commands_take_an_order_to_its_end(stage: Stage) -> None:
    section = README.split("\n## The same with `curl`\n")[1].split("\n## ")[0]
    script = "\necho\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
    port = int(stage.address.rpartition(":")[2]) + 10
    script = script.replace("localhost:7243", f"127.0.0.1:{port}")
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0, done
    answers = done.stdout.replace(" ", "")
    for answer in ('"started":true', '"state":"', '"success":["2SideStreet"]', '["COMPLETED"]'):
        assert answer in answers, answer


def test_each_file_and_each_of_our_flags_in_the_readme_exists() -> None:
    made_here = {"charge_store.db", "temporal.db"}
    for name in re.findall(r"`([\w.]+\.(?:py|yml|txt|md|db))`", README):
        assert name in made_here or (HERE / name).is_file(), name
    known = (HERE / "starter.py").read_text(encoding="utf-8")
    for row in re.findall(r"^\| `(--[\w-]+)", README, re.MULTILINE):
        assert f'"{row}"' in known, row
    for words in (STEPS, FAULTS, RULES, NAMES):
        for word in words:
            assert f"`{word}`" in README, word


# The exercises: their words, their edits, the machine's play and a person's.


def counting() -> Any:
    """Make a player that does nothing, and notes what a person would be asked to do."""
    player: Any = Player(Stage(HERE, NOWHERE))
    player.orders = [""]
    player.turn = AsyncMock(return_value=False)
    player.place, player.in_history = AsyncMock(return_value=""), AsyncMock(return_value=[0.0] * 2)
    player.pollers, player.until, player.ends = AsyncMock(return_value=[]), AsyncMock(), AsyncMock()
    player.edit = AsyncMock()
    player.check = player.show = player.tell = player.note = Mock()
    return player


@pytest.mark.parametrize("number", range(len(EXERCISES)))
def test_each_exercise_has_its_words_and_a_part_to_do_for_each_thing_to_be_done(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(sections()) == list(range(len(EXERCISES)))
    text = sections()[number][1]
    monkeypatch.setattr("starter.plain_job", lambda *_: Mock(pid=0))
    seen = [{"address": "2 Side Street", "worker": 1}]
    monkeypatch.setattr("charge_store.events_of", lambda *_: seen)
    player = counting()
    within(EXERCISES[number](player))
    acts = player.turn.await_count + player.edit.await_count
    assert text.count("\nDo. ") == acts
    assert len(text.split("\n\n")) == 4 + acts  # each is a paragraph
    for _, old, new in [call.args[0] for call in player.edit.await_args_list]:
        for line in set(new.splitlines()) - set(old.splitlines()):
            assert line.strip() in text, line
    for label in ("Predict", "Observe", "Explain"):
        assert text.count(f"\n{label}. ") == 1, label
    told = re.findall(rf"^\| {number} \|.*?\|.*?\|(.*?)\|", README, re.MULTILINE)[0]
    for seconds in {call.kwargs.get("within", 0) for call in player.ends.await_args_list} - {0}:
        assert re.search(rf"(?<!\.)\b{seconds:g}\b(?!\.)", told), seconds


@pytest.mark.parametrize(
    ("name", "seen", "verdict"),
    [
        ("charge", [{}], "did not end by Ctrl.C"),
        ("charge", [{"ended": "CancelledError: told to stop"}], "did not end by kill -9"),
        ("address", [{"address": "5 Wrong Road"}], "was changed to"),
        ("server", [{"worker": 1}, {"worker": 2}], "not the same worker"),
        ("late", [{"ended": "ok"}], "arrived before the cancel"),
        ("points", [], "worker 1, which nobody thought of, serves orders-tq and"),
    ],
)
def test_what_was_done_otherwise_than_asked_for_does_not_hold(
    name: str, seen: list[dict[str, Any]], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charge_store.events_of", lambda *_: seen)
    player = counting()
    player.show, player.kill = partial(Player.show, player), AsyncMock()
    player.pollers = AsyncMock(return_value=[1] * (not seen))
    player.shell = AsyncMock(return_value="too late, the order is SHIPPING")
    with pytest.raises(Verdict, match=f"not shown: .*{verdict}"):
        within(EXERCISES[NAMES.index(name)](player))


def test_what_the_audit_finds_does_not_hold_whatever_else_was_shown(empty_store: None) -> None:
    async def charge_twice(t: Player) -> None:
        t.orders.append("twice")
        for key in ("k1", "k2"):
            store.perform("charge", key, "twice", "c", 5)
        t.show(False, "something")

    player: Any = Player(Stage(HERE, NOWHERE))
    player.prepare = AsyncMock()
    assert within(player.play(charge_twice)).startswith("NOT HELD: twice (unfinished): 2 x charge")


def test_another_end_or_ledger_than_there_must_be_does_not_hold(
    empty_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "sleep", AsyncMock())  # no wait for what may still come
    player: Any = Player(Stage(HERE, NOWHERE))
    player.until = AsyncMock(return_value="COMPLETED")
    with pytest.raises(Verdict, match=r"not shown: .*store\.db does not know o"):
        within(player.ends("o", "COMPLETED", []))
    store.note("o", "charge_payment", {}, 1)
    store.perform(*CHARGE)
    for end, effects, asked, verdict in (
        ("EXPIRED", ["charge charged"], 1, "NOT HELD: o ended COMPLETED, .*be: EXPIRED with"),
        ("COMPLETED", [], 1, "NOT HELD: .*0.05: requests 1, charged once, should be: COMPLETED"),
        ("COMPLETED", ["charge charged"], 2, "not shown: a provider was not asked again"),
    ):
        with pytest.raises(Verdict, match=verdict):
            within(player.ends("o", end, effects, charge=asked))


def test_a_worker_that_serves_one_queue_is_none_for_the_other() -> None:
    player = counting()
    player.pollers = AsyncMock(side_effect=lambda *queues: [1] * (ORDERS_QUEUE in queues))
    player.server_is_dead = AsyncMock(return_value=False)
    player.orders = []
    for role, serves in ("orders", True), ("shipping", False), ("all", False):
        assert within(player.served(role)) is serves
    told = within(player.trouble())
    assert re.match(f"no worker serves {SHIPPING_QUEUE}; start it: .*worker.py shipping", told)
    player.pollers = AsyncMock(return_value=[])
    assert re.match("no worker; start it: .*worker.py$", within(player.trouble()))
    player.server_is_dead = AsyncMock(return_value=True)
    assert re.match("no server; start it: .*worker.py server$", within(player.trouble()))


def test_an_edit_is_seen_in_a_persons_own_file(tmp_path: Path) -> None:
    """What Enter does to the copy, and undoes there, the exercises show."""

    def looks(folder: Path) -> list[Any]:
        return [within(counting().sees(edited, folder, change)) for change in (BUG, AS_IT_WAS)]

    assert looks(tmp_path) == [None, None]  # an editor that saves may have renamed the file away
    assert looks(HERE) == [False, True]
    assert looks(changed_copy(tmp_path / "own", *BUG)) == [True, False]


class Terminal:
    """A script in a pseudo-terminal, to talk with; bounded."""

    def __init__(self, folder: Path, *words: str, **environment: str) -> None:
        """Start it; if no other is named, the ledger stands beside the scripts."""
        self.text, self.end, (self.master, slave) = "", time.monotonic() + 3 * LONG, os.openpty()
        alone = {"COLUMNS": "80", "LINES": "24", "TEMPORAL_ADDRESS": "", "CHARGE_STORE": ""}
        options: dict[str, Any] = {"cwd": folder, "env": os.environ | alone | environment}
        options["preexec_fn"] = partial(os.login_tty, slave)
        self.process = subprocess.Popen([sys.executable, *words], **options)
        os.close(slave)

    def talk(self, *parts: str | tuple[str, str]) -> re.Match[str]:
        """Read until each pattern comes, and type the answer if it has one; return the last match.

        What was read up to it is forgotten.
        """
        for part in parts:
            pattern, *answers = [part] if isinstance(part, str) else part
            while not (found := re.search(pattern, self.text)):
                assert self.read(), f"no {pattern} in {self.text[-2000:]}"
            self.text, last = self.text[found.end() :], found
            for answer in answers:
                os.write(self.master, f"{answer}\n".encode())
        return last

    def read(self) -> bool:
        """Read what there is; tell whether more may come."""
        assert time.monotonic() < self.end, self.text[-2000:]
        if not select.select([self.master], [], [], 0.2)[0]:
            return True
        new = b""
        with suppress(OSError):  # on Linux, when the program has ended
            new = os.read(self.master, 65536)
        self.text += new.decode(errors="replace")
        return new != b""

    def close(self) -> int:
        """Read until the program's end, and return its exit code."""
        while self.read():
            pass
        os.close(self.master)
        return self.process.wait(LONG)


def apart(folder: Path) -> Path:
    """Copy the scripts with a default address of their own, where no server is."""
    address = f'"localhost:{free_port()}"'
    return changed_copy(folder, "worker.py", '"localhost:7233"', address)


def leave(terminal: Terminal, typed: bytes, told: str) -> int:
    """Leave in a wait: what is not done yet is named, and what becomes of it; return the code."""
    terminal.talk((r"q \[\d\]: ", "nobody"), ("Enter begins: ", ""))
    order = terminal.talk(r"(order-\w+) is placed")[1]
    terminal.talk("waiting until")
    os.write(terminal.master, typed)
    terminal.talk(rf"{order}: not done yet{told}")
    code = terminal.close()
    assert "Traceback" not in terminal.text
    return code


@by_hand
def test_enter_all_the_way_plays_exercise_1_and_its_crash_is_real(stage: Stage) -> None:
    """One terminal, no server, no worker: the starter brings them and ends them, by Ctrl+C too."""
    copy = apart(stage.folder / "enter")
    terminal = Terminal(copy, "starter.py")
    server = terminal.talk(r"server: ([^,]+),")[1]
    terminal.talk((r"q \[1\]: ", ""), ("Enter begins: ", ""), (r"\[customer-123\]: ", ""))
    terminal.talk((r"Amount \[99.99\]: ", "9" * 5000), (r"must be an amount.*\n", "5"))
    terminal.talk((r"Wait seconds \[10\]: ", "86400"), (r"must be 2 to 60 seconds.*\n", "6"))
    victim = int(terminal.talk(r"Enter to kill worker (\d+)")[1])
    os.kill(victim, 0)
    terminal.talk(("", ""), f"worker {victim} is dead")
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    terminal.talk(("Enter to start another worker", ""), r"Temporal +Wait before the charge =")
    assert terminal.talk(r"worker (\d+) +-? *X")[1] == str(victim)
    terminal.talk("requests 1, charged once", r"\nheld\r\n")
    terminal.talk((r"Observe\.(?s:.*)Enter goes on: ", ""))
    terminal.talk((r"Explain\.(?s:.*)to the menu: ", ""), r"\nx  1 ", (r"q \[2\]: ", "no-temporal"))
    terminal.talk(("Enter begins: ", ""), "charged twice", r"\nheld\r\n", ("goes on: ", ""))
    terminal.talk(("to the menu: ", ""), r"\nx  0 (?s:.*)\nx  1 ", (r"q \[2\]: ", "x"))
    assert leave(terminal, b"\x03", r", and kept in temporal\.db") == 130
    assert not within(is_listening(server))
    audit = run("charge_store.py", "--audit", CHARGE_STORE=str(copy / "charge_store.db"))
    answers(audit, 0, "audit: 2 orders, clean")


@by_hand
def test_exercise_2_sees_what_a_person_does_in_other_terminals(stage: Stage) -> None:
    wing = Wing(stage, "all", own_ledger=True)
    terminal = Terminal(HERE, "starter.py", **wing.environment())
    terminal.talk((r"q \[1\]: ", "2"), ("Enter begins: ", ""))
    for stop, seen in ((signal.SIGINT, "has stopped"), (signal.SIGKILL, "is dead")):
        worker = wing.workers.pop()
        terminal.talk(rf"Enter to (stop|kill) worker {worker.pid},")
        worker.send_signal(stop)
        worker.wait(LONG)
        terminal.talk(f"worker {worker.pid} {seen}", ("Now ", ""), "not done yet: start another")
        wing.start_worker()
        terminal.talk("a new worker starts", "attempt 2")
        if stop == signal.SIGINT:
            terminal.talk(("Enter places a second charge: ", ""))
    for mark in ("/", "X"):
        terminal.talk(rf"worker \d+ +[- ]*(?:charge )?=*{mark}", "requests 2, charged once")
    terminal.talk(r"\nheld\r\n", ("Enter goes on: ", "q"))
    assert terminal.close() == 0


@by_hand
async def test_what_showed_nothing_is_not_explained_and_is_offered_again(stage: Stage) -> None:
    """What came too late, and what a second worker did of which nobody thought: it is named."""
    wing = Wing(stage, "all", own_ledger=True)
    terminal = Terminal(HERE, "starter.py", **wing.environment())
    terminal.talk((r"q \[1\]: ", "charge"), ("Enter begins: ", ""), "Enter to stop worker")
    told = terminal.talk((r"not shown: too late(?s:.*)to the menu: ", ""))[0]
    assert not re.search("Explain|Enter goes on", told)
    terminal.talk(r"q \[2\]: ")
    wing.start_worker()
    await seen(lambda: wing.logs.read_text().count("stop it: Ctrl+C") == 2)
    terminal.talk(("", "99"), ("must be one of 0 no-temporal, .*", "1"), ("begins: ", ""))
    terminal.talk(("123]: ", "pty-9"), (r"99\]: ", "1"), (r"10\]: ", "8"))
    terminal.talk(("Enter to kill worker", ""))
    named = terminal.talk(r"not shown: [^(]*?(\d+)[^(]*serves")[1]
    assert int(named) in {worker.pid for worker in wing.workers}
    terminal.talk(("Enter goes to the menu: ", ""))
    assert leave(terminal, b"\x04", r"; to end one:\s+temporal workflow") == 1  # Ctrl+D
    assert "not held, or left before: timer, charge, nobody" in terminal.text


@by_hand
async def test_an_order_is_picked_by_number_by_id_or_the_only_one_by_enter(stage: Stage) -> None:
    wing = Wing(stage, "all")
    busy = await place(wing, "approve", charge_payment="down")
    waiting = [await place(wing, amount_cents=1234) for _ in range(3)]
    for handle in waiting:
        await reach(handle, "AWAITING_REVIEW")

    def talk(*parts: str | tuple[str, str], verb: str = "approve") -> re.Match[str]:
        terminal = Terminal(HERE, "signals.py", verb, **wing.environment())
        last = terminal.talk(*parts)
        assert terminal.close() == (0 if "sent;" in last[0] else 1)
        return last

    sent = r"(\S+): approve sent;"
    wrong = [(r"Which one, or q: ", typed) for typed in ("", "4", busy.id)]
    rule = r"must be a number from 1 to 3 or one of these ids"
    listed = r"3  AWAITING_REVIEW +12\.34"
    first = talk(listed, *wrong, rule, ("or q: ", "3"), sent)[1]
    second, third = [handle.id for handle in waiting if handle.id != first]
    talk(("or q: ", "q"), "no approve was sent")
    talk(("or q: ", second), f"{second}: approve sent;")
    talk((r"or q \[1\]: ", ""), f"{third}: approve sent;")
    talk("no order waits to approve")
    talk(rf"1  CHARGING +99\.99  {busy.id}", ("or q: ", "q"), "no cancel was sent", verb="cancel")


@side_by_side
async def test_a_strange_server_and_a_worker_that_cannot_start_are_named(stage: Stage) -> None:
    """And not waited for."""
    wing = Wing(stage)
    with pytest.raises(Verdict, match="not shown: the server does not know nobody"):
        await Player(wing).ends("nobody", "COMPLETED", [])
    wing.code = wing.folder
    (wing.code / "worker.py").write_text("print('this is why'); raise SystemExit(2)")
    wing.start_worker().wait()
    with pytest.raises(Verdict, match="not shown: no worker can start: this is why"):
        await Player(wing).until("", lambda: False)
    with pytest.raises(SystemExit, match="this is why"):
        while True:
            wing.revive()
            await asyncio.sleep(0.05)


@side_by_side
def test_a_crowd_in_which_nobody_was_asked_twice_shows_nothing(_: Stage) -> None:
    """Seed 7 draws one order, which is rejected: no provider is asked for its money."""
    done = run("starter.py", "chaos", "--orders", "1", "--kills", "1", "--seed", "7")
    assert (done.returncode, done.stderr) == (1, "")
    assert "asked more than once 0" in done.stdout and "not shown" in done.stdout


# Lanes: true to the ledger, and 79 columns wide.


@pytest.mark.parametrize("name", CRASHES)
def test_each_attempt_is_a_bar_and_each_death_a_cross(name: str, played: dict[str, Any]) -> None:
    rows = store.events_of(played[name].id)
    bars = find_bars(within(read_history(played[name])), rows, time.time())
    for columns in (79, 59):
        assert max(map(len, lanes(bars, columns))) <= columns
    bars = [bar for bar in bars if bar.lane != "Temporal" and bar.mark not in "-?"]
    assert [bar.begin for bar in bars] == [row["ts"] for row in rows if row["attempt"]]
    crosses = {bar.name for bar in bars if bar.mark == "X"}
    assert crosses >= {step.partition("_")[0] for step in GROUPS[name.split()[0]]}


END = Event("COMPLETED", 10, None, 99, "", "")


def ran(worker: int, at: float, how: str = "COMPLETED") -> Event:
    """Make the event of a worker that ran the workflow's code."""
    return Event(f"WORKFLOW_TASK_{how}", at, None, 0, "", f"worker {worker}")


def timed(name: str, begin: float, end: float) -> list[Event]:
    """Make the events of a timer."""
    moments = {"TIMER_STARTED": begin, "TIMER_FIRED": end}
    return [Event(kind, at, None, 1, name, "") for kind, at in moments.items()]


def row(type_: str, ts: float, attempt: int = 0, **payload: Any) -> dict[str, Any]:
    """Make an event as the ledger keeps it."""
    return {"type": type_, "ts": ts, "attempt": attempt, **payload}


CHARGING = partial(row, "charge_payment")
PICTURES: dict[str, tuple[list[Event], list[dict[str, Any]], str]] = {
    # (history, ledger, what is drawn at 11 s)
    "who idles is killed or stopped, one dies at work; short bars; one goes on after the end": (
        [ran(1, 0), *timed("1/2 x", 0, 8), ran(2, 1), Event("SIGNALED", 9, None, 9, "", ""), END],
        [
            row("receive_order", 0, 1, worker=5, ended="Outage", seconds=0.01),
            row("killed", 2, worker=1),
            row("stopped", 4, worker=2),
            CHARGING(4, 1, worker=3),
            row("killed", 5, worker=3),
            row("dispatch_carrier", 6, 1, worker=6),
            CHARGING(8, 2, worker=4, ended="ok", seconds=2),
            row("record_outcome", 10, 1, worker=5, ended="ok", seconds=0.01),
            row("killed", 11, worker=4),  # after the end
        ],
        """               0 s           5 s          10 s
Temporal       1/2 x ================|  !
worker 1       -    X
worker 5       x receive           record |
worker 2          -       /
worker 3                  ===X charge
worker 6                       dispatch =====>
worker 4                      charge =====|
               X its worker died   x failed
               / stopped   ! message   > goes
               on   | end   - ran the code""",
    ),
    "an order goes on: no server, then none again, code that fails, dead workers, not followed": (
        [*timed("wait", 0, 8)[:1], ran(1, 0, "FAILED"), ran(1, 3, "FAILED")],
        [
            row("prepare_package", 1, 1, worker=3),  # 10 s ago: nobody has seen its worker die
            row("server", 4, state="dead"),
            row("server", 5, state="lives"),
            CHARGING(5, 1, worker=2),
            row("killed", 8, worker=2),
            row("server", 9, state="dead"),
        ],
        """               0 s           5 s          10 s
Temporal       wait ======....==========.....>
worker 1       ?       ?
worker 3          prepare ===================>
worker 2                     charge =X""",
    ),
    "a worker died that fell silent or whose answer was lost; who lives failed or was stopped": (
        [ran(1, 0.5), *timed("Deadline", 0, 9), ran(2, 10), END],
        [
            CHARGING(0, 1, worker=1),
            row("record_decision", 1, 1, worker=5, ended="ok", seconds=1),
            CHARGING(3, 2, worker=2),
            row("dispatch_carrier", 4, 1, worker=4, ended="ok", seconds=1),
            CHARGING(6, 3, worker=3, ended="ok", seconds=3),
            row("dispatch_carrier", 6, 2, worker=2, ended="CancelledError: stop", seconds=2),
            row("record_decision", 9, 1, worker=3, ended="ok", seconds=0.7),  # by another run
            row("record_decision", 10, 2, worker=2, ended="ok", seconds=0),
        ],
        """               0 s            5 s         10 s
Temporal
worker 1       ======X charge
worker 5          ===| record
worker 2         charge ======x  ======/     |
worker 4                   ===X dispatch
worker 3                         charge ==|=X""",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_lanes_draw_what_happened(name: str) -> None:
    history, ledger_rows, picture = PICTURES[name]
    drawn, told = lanes(find_bars(history, ledger_rows, 11), 46), picture.splitlines()
    assert drawn[: len(told)] == told
    assert all(line[0] == " " for line in drawn[len(told) :])  # the legend


@pytest.mark.parametrize("waits", [[], timed("wait", 0, 600)])
def test_a_long_time_in_which_nothing_is_done_is_shortened_and_told(waits: list[Event]) -> None:
    events = [ran(1, 0), *waits, ran(2, 600), ran(2, 600.1), END]
    for columns in (46, 60, 79):
        clock, temporal, *more = lanes(find_bars(events, [], 700), columns)
        assert clock.endswith(" 10 min") and "~~~" in temporal and "time shortened" in more[2]
        assert max(map(len, [clock, temporal, *more])) <= columns
    bars = find_bars([ran(1, 0), ran(2, 11), END], [], 700)
    assert "~" not in "".join(lanes(bars))
    clock = lanes(find_bars([ran(1, 0), ran(1, 150), ran(1, 300), END], [], 700))[0]
    assert clock.endswith(" 5 min")  # which is not the end of 2.5 min


def test_a_task_that_a_message_overtook_is_no_failure_of_the_code() -> None:
    """Of a failure without words its type is told."""
    for cause, marks, told in (
        ("UNHANDLED_COMMAND", [], None),
        ("NON_DETERMINISTIC_ERROR", ["?"], "AssertionError"),
    ):
        event = HistoryEvent(event_type=enums.EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED)
        failed = event.workflow_task_failed_event_attributes
        failed.cause = enums.WorkflowTaskFailedCause.Value(f"WORKFLOW_TASK_FAILED_CAUSE_{cause}")
        failed.identity = "1@here"
        failed.failure.application_failure_info.type = "AssertionError"
        assert [bar.mark for bar in find_bars(read_events([event]), [], 0)] == marks
        handle = MagicMock()
        handle.fetch_history_events.return_value.__aiter__.return_value = [event]
        assert within(code_failure(handle)) == told


def test_a_narrow_terminal_gets_a_command_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    ours = "/a/long/path/to/python signals.py approve order-12345678-of-many-words"
    temporals = "temporal workflow reset --type FirstWorkflowTask --workflow-id order-12345678"
    told = (f"decide: {ours}", f"{'word ' * 20}; see: {ours}", f"          or: {temporals}")
    for message, typed in zip(told, (ours, ours, temporals), strict=True):
        terminal, pipe = io.StringIO(), io.StringIO()
        terminal.isatty = lambda: True  # type: ignore[method-assign]
        *words, last = store.fit(message, terminal).splitlines()
        assert last == typed and max(map(len, words)) < 60
        assert store.fit(message, pipe) == message
    # What was typed as an answer is no command of ours.
    assert max(map(len, store.fit(f"no {ours}{', word' * 20}", terminal).splitlines())) < 80


@beside
def test_all_sixteen_exercises_hold_when_the_machine_plays_them(stage: Stage) -> None:
    """As on the machine of somebody who has a profile for another server."""
    profile = stage.folder / "temporalio" / "temporal.toml"
    profile.parent.mkdir()
    profile.write_text('[profile.default]\nnamespace = "elsewhere"\n')
    done = run("starter.py", "crash", XDG_CONFIG_HOME=str(stage.folder))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-3000:]
    verdicts = re.findall(r"^held +[0-9.]+ s +(\d+) ", done.stdout, re.MULTILINE)
    assert verdicts == [str(number) for number in range(16)]
    lanes_told = re.findall(r"^(?:Temporal|worker \d+ ).*", done.stdout, re.MULTILINE)
    assert len(lanes_told) > 32 and max(map(len, lanes_told)) < 80


def test_after_all_of_this_the_audit_is_clean(stage: Stage, played: dict[str, Any]) -> None:
    """And no event loop printed a traceback, of a timer that had fired before it was set, say."""
    orders, violations = store.audit()
    assert violations == [] and len(orders) >= len(played)
    log = (stage.folder / "workers.log").read_text(encoding="utf-8")
    assert "receive_order for" in log and "Exception in callback" not in log
