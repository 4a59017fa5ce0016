"""The starter: places orders, and plays the exercises, in which things are crashed on purpose.

Each exercise is a function that reads as a script. The machine plays it (`crash`), or a person
does, by the words of README.md (without arguments). `chaos` and `load` place a crowd of orders.
"""

import argparse
import asyncio
import inspect
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

if sys.platform != "win32":
    import resource

import charge_store as store
import signals
from activities import FAULTS, RULES, SLOW_SECONDS, STEPS, parse_order
from charge_store import printable, say
from signals import Keyboard, Screen
from worker import (
    DEFAULT_ADDRESS,
    HERE,
    Parser,
    Stage,
    client_config,
    command,
    connect,
    is_listening,
    kill_command,
    nearby,
    persist,
    private_stage,
    run_script,
    temporal_binary,
    web_ui,
)
from workflows import ORDERS_QUEUE, SHIPPING_QUEUE, ChargeWorkflow, OrderWorkflow

Kind = type[ChargeWorkflow | OrderWorkflow]

# One order or charge.


async def run_charge(options: argparse.Namespace) -> int:
    """Start a ChargeWorkflow. The same request has the same id: it is the same workflow."""
    raw = order_fields(options)
    raw["order_id"] = charge_id(raw)
    return await place(ChargeWorkflow, raw | {"max_attempts": 0}, options.wait_result)


async def run_order(options: argparse.Namespace) -> int:
    """Start an OrderWorkflow."""
    order_id = made_up_id() if options.order_id is None else options.order_id
    raw = order_fields(options) | {"order_id": order_id}
    return await place(OrderWorkflow, raw, options.wait_result)


def charge_id(raw: dict[str, Any]) -> str:
    """Name a charge by what is asked for, so that the same request is the same workflow."""
    return f"charge-{raw.get('customer_id', 'customer-123')}-{raw.get('amount_cents', 9999)}"


def made_up_id() -> str:
    """Make up an order id that no other order has."""
    return f"order-{uuid.uuid4().hex[:8]}"


def order_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the fields of the order that were given; the rest have defaults."""
    given = {name: getattr(options, name, None) for name in RULES}
    return {name: value for name, value in given.items() if value is not None}


async def place(kind: Kind, raw: dict[str, Any], wait: bool) -> int:
    """Start the workflow, or attach to it if it runs already, and follow it if asked to."""
    try:
        order = parse_order(raw, raw["order_id"], charge=kind is ChargeWorkflow)
    except ApplicationError as error:
        print(f"starter.py: {error.message}", file=sys.stderr)
        return 2
    async with temporal(quiet=False) as (client, stage):
        handle = client.get_workflow_handle(order.order_id)
        try:
            await start(client, kind, raw)
            say(f"{order.order_id} started: {order.customer_id}, {order.amount_cents / 100:.2f}")
        except WorkflowAlreadyStartedError:
            if (await handle.describe()).status != WorkflowExecutionStatus.RUNNING:
                sys.exit(
                    f"{order.order_id} has finished already: nothing was started; see: "
                    f"{command('signals.py')} events {order.order_id}"
                )
            say(f"{order.order_id} is running already: attached to it, nothing was started")
        address = client.service_client.config.target_host
        say(f"see it: {web_ui(address)}/namespaces/{client.namespace}/workflows/{order.order_id}")
        if stage:
            return await signals.follow(
                client, order.order_id, plain=True, each_time=partial(revive, stage)
            )
        if wait:
            return await signals.follow(client, order.order_id)
        say((await signals.picture(client, handle, await handle.describe()))[0])
        return 0


async def start(
    client: Client, kind: Kind, raw: dict[str, Any], once: bool = False, **options: Any
) -> WorkflowHandle[Any, Any]:
    """Start a workflow on an order. An order id is used once; a charge may be asked for again."""
    policy = WorkflowIDReusePolicy.REJECT_DUPLICATE
    if kind is ChargeWorkflow and not once:
        policy = WorkflowIDReusePolicy.ALLOW_DUPLICATE
    return await client.start_workflow(
        kind.__name__,
        raw,
        id=raw["order_id"],
        task_queue=ORDERS_QUEUE,
        id_reuse_policy=policy,
        **options,
    )


@asynccontextmanager
async def temporal(quiet: bool) -> AsyncIterator[tuple[Client, Stage | None]]:
    """Use the server that is there; if none was configured and none is there, bring up our own.

    quiet: our worker's lines go to a file and not to the screen.
    """
    if client_config() or await is_listening(DEFAULT_ADDRESS):
        yield await connect(), None
        return
    with TemporaryDirectory(prefix="orders-", ignore_cleanup_errors=True) as folder:
        logs = Path(folder) / "workers.log" if quiet else None
        stage = Stage(HERE, int(DEFAULT_ADDRESS.rpartition(":")[2]), logs)
        try:
            say(f"no server at {DEFAULT_ADDRESS}: starting one, and a worker, while this runs")
            client = await stage.start_server()
            kept = nearby(HERE / "temporal.db")
            say(f"Web UI: {web_ui(DEFAULT_ADDRESS)}  unfinished orders stay in {kept}")
            stage.start_worker()
            yield client, stage
        except RuntimeError as error:
            sys.exit(f"cannot start a Temporal server: {error}")
        finally:
            await stage.close()


def revive(stage: Stage) -> None:
    """Start another worker for each that died, and say so."""
    for pid in stage.revive():
        say(f"worker {pid} died; starting another")


# The exercises. `t` is the player, the machine or a person; README.md has the words for a person,
# a **Do.** for each act: kill, stop, start, restart, edit, shell, kill_server, start_server.

SLOW = {"charge_payment": "slow"}
ONCE: dict[str, Any] = {"charge": "charged", "reservation": "reserved", "dispatch": "dispatched"}
TWICE: dict[str, Any] = {kind: f"{status} 2" for kind, status in ONCE.items()}
REVIEWED: dict[str, Any] = {"review": "person", "review_seconds": 600}
# A workflow task that fails is tried again when its time is over: 10 s, if nothing else is said.
BRIEF = {"task_timeout": timedelta(seconds=1)}
# Edits, in the words of README.md: a file, a line in it, and what shall stand there instead.
REVIEW = "            await self._review()\n"
CHECK = '            await self._do(activities.validate_order, "VALIDATING")\n'
ENTER = '        self._enter("AWAITING_REVIEW")\n'
BUG = ("workflows.py", ENTER, '        raise RuntimeError("a bug")\n' + ENTER)
CHECKED = ("workflows.py", REVIEW, CHECK + REVIEW)
PATCHED = (
    "workflows.py",
    REVIEW,
    '            if workflow.patched("check again"):\n    ' + CHECK + REVIEW,
)
KEY = 'perform(order, "charge", order.payment_id)'
NO_KEY = ("activities.py", KEY, KEY[:-1] + ' + f"-{activity.info().attempt}")')


async def no_temporal(t: "Player") -> None:
    """The contrast, a plain background job: charged twice, and a waiting order lost."""
    async with t.contrast():
        charging, waiting = t.job("charging", 0), t.job("waiting", 3)
        await t.until("the provider has charged; its answer is on the way", charged("charging"))
        charging.kill()
        waiting.kill()
        t.tell(f"jobs {charging.pid}, charging, and {waiting.pid}, waiting, die")
        again = t.job("charging", 0)
        t.tell(f"the queue delivers the job again that nobody noted as done, to {again.pid}")
        await t.until("that job is done", lambda: again.poll() is not None)
        t.check("charged twice", len(store.effects_of("charging")) == 2)
        t.check("the waiting order is lost", not store.effects_of("waiting"))


async def timer(t: "Player") -> None:
    """A durable wait keeps its deadline while no worker lives."""
    order = await t.charge(**await t.asked(wait_seconds=5))
    await t.until("the wait has begun", t.waits(order))
    dead = await t.kill()
    await t.alone()
    await t.start()
    await t.ends(order, "charged", charge="charged")
    begin, end = await t.timer_of(order)
    wait = end - begin
    t.show(f"worker {dead} had died before the wait was over", t.killed_at < end)
    t.show("another was there before the wait was over", t.started_at < end)
    t.check(f"the wait took {wait:.1f} s", wait < t.orders[order]["wait_seconds"] + 1.5)


async def charge(t: "Player") -> None:
    """A worker ends in the middle of a charge, by Ctrl+C and by kill -9: charged once."""
    for end_worker in (t.stop, t.kill):
        order = await t.charge(simulate=SLOW)
        await t.until("the provider has charged; its answer, 5 s, is on the way", charged(order))
        await end_worker()
        await t.start()
        await t.until("attempt 2; the provider knows the key", begun(order, "charge_payment", 2))
        await t.ends(order, "charged", within=6.5, charge="charged 2")


async def approve(t: "Player") -> None:
    """An order waits for a person, and goes on at the approval."""
    order = await t.place(**REVIEWED)
    await t.until("the order waits for you", t.in_state(order, "AWAITING_REVIEW"))
    await t.shell(f"signals.py approve {order} --note 'looks good'", begun(order, "approve"))
    await t.ends(order, "COMPLETED", within=2, **ONCE)


async def outage(t: "Player") -> None:
    """An outage that ends costs tenths of a second; one that does not undoes the order."""
    order = await t.place(simulate={"charge_payment": "flaky"})
    await t.ends(order, "COMPLETED", **ONCE)
    t.show("three attempts", store.count(order, "charge_payment") >= 3)
    order = await t.place(simulate={"charge_payment": "down"}, max_attempts=3)
    await t.ends(order, "OrderGivenUp", reservation="released", charge="voided")
    t.check("three attempts", store.count(order, "charge_payment") == 3)


async def card(t: "Player") -> None:
    """A refusal is an answer: the charge is tried once, and what was begun is undone."""
    order = await t.place(card_expiry="12/23")
    await t.ends(order, "PaymentDeclined", reservation="released", charge="voided")
    t.check("one attempt", store.count(order, "charge_payment") == 1)


async def nobody(t: "Player") -> None:
    """Nobody approves: the review's window closes, and the goods are released."""
    seconds = t.time_for(1, person=10)
    order = await t.place(review="person", review_seconds=seconds)
    await t.ends(order, "EXPIRED", reservation="released")


async def address(t: "Player") -> None:
    """A change of address or a cancel comes in time or too late; the order says which."""
    order = await t.place(**REVIEWED, simulate={"prepare_package": "slow"})
    await t.until("the order waits for you", t.in_state(order, "AWAITING_REVIEW"))
    change = f"signals.py update-address {order}"
    await t.shell(f"{change} '2 Side Street'", begun(order, "update_address"))
    await t.shell(f"signals.py approve {order}", begun(order, "approve"))
    await t.until("it is packed, which takes 5 s", begun(order, "prepare_package"))
    said = await t.shell(f"{change} '3 Late Street'")
    t.show("the second change came too late", "too late, the order is SHIPPING" in said)
    await t.ends(order, "COMPLETED", **ONCE)
    sent = events_of(order, "dispatch_carrier")
    t.check("it left for 2 Side Street", sent[0]["address"] == "2 Side Street")
    order = await t.place(**REVIEWED)
    await t.until("a second order waits for you", t.in_state(order, "AWAITING_REVIEW"))
    await t.shell(f"signals.py cancel {order} --reason 'changed my mind'", begun(order, "cancel"))
    await t.ends(order, "CANCELLED", reservation="released")


async def shipping(t: "Player") -> None:
    """Without a shipping worker paid orders wait; a carrier that is down undoes its order."""
    await t.restart("orders")
    order = await t.place()
    await t.until("the order is paid; its package waits", t.in_state(order, "SHIPPING"))
    packers = [event["worker"] for event in events_of(order, "prepare_package")]
    t.show(f"nobody ships, but worker {packers}", not packers)
    await t.start("shipping")
    await t.ends(order, "COMPLETED", within=1, **ONCE)
    order = await t.place(simulate={"dispatch_carrier": "down"}, max_attempts=3)
    await t.ends(
        order, "OrderGivenUp", charge="refunded", reservation="released", dispatch="voided"
    )
    t.check("nine attempts", store.count(order, "dispatch_carrier") == 9)


async def bug(t: "Player") -> None:
    """A workflow meets a bug: the order waits, and goes on when the bug is mended."""
    await t.edit(BUG)
    await t.restart()
    order = await t.place(options=BRIEF)
    await t.until("the workflow task fails and is tried again", t.code_fails(order))
    await t.edit(None)
    await t.restart()
    await t.ends(order, "COMPLETED", within=4, **ONCE)


async def server(t: "Player") -> None:
    """The Temporal server dies in the middle of a wait and a charge, and forgets nothing."""
    waiting = await t.place(wait_seconds=t.time_for(3, person=15))
    charging = await t.place(simulate=SLOW)
    await t.until("one order waits, one is being charged", charged(charging))
    await t.kill_server()
    await t.until("no server answers", t.server_is_dead)
    await t.start_server()
    for order in (charging, waiting):  # an answer that met no server is asked for again
        await t.ends(order, "COMPLETED", within=10, **ONCE)


async def deploy(t: "Player") -> None:
    """Changed code must fit the histories of running orders; `patched` makes it fit."""
    order = await t.place(**REVIEWED, options=BRIEF)
    await t.until("the order waits for you", t.in_state(order, "AWAITING_REVIEW"))
    await t.edit(CHECKED)
    await t.restart()
    await t.shell(f"signals.py approve {order}", t.code_fails(order))
    await t.until("the new code does not fit the history", t.code_fails(order))
    await t.edit(PATCHED)
    await t.restart()
    await t.ends(order, "COMPLETED", within=4, **ONCE)
    await t.edit(None)
    await t.restart()


async def reset(t: "Player") -> None:
    """A reset runs an order again from its beginning: nothing is charged or sent twice."""
    back = "temporal workflow reset --type FirstWorkflowTask --reason lesson --workflow-id"
    order = await t.place()
    await t.ends(order, "COMPLETED", **ONCE)
    await t.shell(f"{back} {order}", begun(order, "receive_order", 2))
    await t.ends(order, "COMPLETED", **TWICE)
    order = await t.place(**REVIEWED)
    await t.until("a second order waits for you", t.in_state(order, "AWAITING_REVIEW"))
    await t.shell(f"signals.py approve {order}", begun(order, "approve"))
    await t.ends(order, "COMPLETED", **ONCE)
    await t.shell(f"{back} {order} --reapply-exclude Signal", begun(order, "receive_order", 2))
    await t.until("it waits for you once more", t.in_state(order, "AWAITING_REVIEW"))
    await t.shell(f"signals.py cancel {order}", begun(order, "cancel"))
    await t.ends(order, "COMPLETED", within=2, **ONCE)


async def late(t: "Player") -> None:
    """A charge or a dispatch that arrives after its order was given up is refused."""
    charging = await t.place(simulate={"charge_payment": "late"})
    shipping = await t.place(simulate={"dispatch_carrier": "late"})
    for order, step in ((charging, "charge_payment"), (shipping, "dispatch_carrier")):
        await t.until(f"{step}, 5 s late, is on its way", begun(order, step))
        await t.shell(f"signals.py cancel {order}", begun(order, "cancel"))
    await t.ends(charging, "CANCELLED", charge="voided 1", reservation="released")
    left: dict[str, Any] = {"charge": "refunded", "reservation": "released", "dispatch": "voided 1"}
    await t.ends(shipping, "CANCELLED", within=6, **left)


async def points(t: "Player") -> None:
    """A worker dies before the charge, after it, after the dispatch: it does not matter where."""
    for step, fault, asked in (
        ("charge_payment", "crash-before", {}),
        ("charge_payment", "crash-after", {"charge": "charged 2"}),
        ("dispatch_carrier", "crash-after", {"dispatch": "dispatched 2"}),
    ):
        order = await t.place(simulate={step: fault})
        await t.until(f"the worker has died: {fault} of {step}", t.died(order, step))
        await t.start()
        await t.ends(order, "COMPLETED", within=2, **ONCE | asked)
        t.show("a second attempt", store.count(order, step) >= 2)


async def no_key(t: "Player") -> None:
    """The contrast, exercise 2 with a key that changes on each attempt: charged twice."""
    async with t.contrast():
        await t.edit(NO_KEY)
        await t.start()
        order = await t.place(simulate=SLOW)
        await t.until("the provider has charged; its answer, 5 s, is on the way", charged(order))
        await t.kill()
        await t.start()
        await t.until("the order has ended", t.ended(order))
        t.show("a second attempt", store.count(order, "charge_payment") >= 2)
        charges = [row for row in store.effects_of(order) if row["status"] == "charged"]
        t.check("charged twice", len(charges) == 2)


Exercise = Callable[["Player"], Awaitable[None]]
EXERCISES: list[Exercise] = [
    *(no_temporal, timer, charge, approve, outage, card, nobody, address),
    *(shipping, bug, server, deploy, reset, late, points, no_key),
]
NAMES = [exercise.__name__.replace("_", "-") for exercise in EXERCISES]


def plain_job(order_id: str, wait_seconds: float) -> None:
    """Do an order as a background job without Temporal: all it knows is in its memory."""
    time.sleep(wait_seconds)
    key = uuid.uuid4().hex  # made up at each delivery: there is nowhere to remember it
    store.perform("charge", key, order_id, "customer-123", 9999)
    time.sleep(SLOW_SECONDS)  # the provider's answer is on the way


# What can be seen from the ledger alone.

Sight = Callable[[], Any]  # tells, perhaps only when awaited, whether something is to be seen


def charged(order_id: str) -> Sight:
    """See that the provider has charged."""
    return lambda: any(row["kind"] == "charge" for row in store.effects_of(order_id))


def begun(order_id: str, type_: str, times: int = 1) -> Sight:
    """See that so many attempts at a step have begun, or so many messages have come."""
    return lambda: store.count(order_id, type_) >= times


def events_of(order_id: str, type_: str) -> list[dict[str, Any]]:
    """Read the payloads of an order's events of one type."""
    query = "SELECT payload_json FROM events WHERE order_id = ? AND type = ? ORDER BY id"
    return [json.loads(row["payload_json"]) for row in store.select(query, order_id, type_)]


# The players.


class NotHeld(Exception):
    """Something is not as it must be."""


class NotShown(Exception):
    """What an exercise is about did not happen."""


class EndOfInput(Exception):
    """A person has left: the end of input, Ctrl+D, or q."""


PATIENT: dict[str, Any] = {
    "deadline_seconds": 600,
    "max_attempts": 0,
    "review": "timer",
    "review_seconds": 0.1,
}


class Player:
    """Plays exercises unattended, on a stage of its own, and tells what happens."""

    def __init__(self, client: Client, stage: Stage | None, private: bool = True) -> None:
        """Play on a stage, or on a server and workers that others run; private: the stage is ours
        alone, so that its workers may run changed copies of our scripts."""
        self._client, self.stage, self.private, self.code = client, stage, private, HERE
        self.orders: dict[str, dict[str, Any]] = {}  # what was placed, by order id
        self.began = self.since = self.killed_at = self.started_at = time.time()

    @property
    def client(self) -> Client:
        """Return the client of the stage's newest server."""
        return self.stage.client if self.stage else self._client

    @property
    def address(self) -> str:
        """Tell where the server is."""
        return self.stage.address if self.stage else self.client.service_client.config.target_host

    def handle(self, order_id: str) -> signals.Handle:
        """Get at an order's newest run."""
        return self.client.get_workflow_handle(order_id)

    async def play(self, exercise: Exercise) -> str:
        """Play an exercise; return `held`, `not shown: ...` or `NOT HELD: ...`."""
        self.orders, self.code = {}, HERE
        self.began = self.since = time.time()
        try:
            await self.get_ready()
            await self.bounded(exercise(self))
            ours = tuple(f"{order_id} (" for order_id in self.orders)
            wrong = [line for line in store.audit()[1] if line.startswith(ours or "-")]
            self.check("audit clean", not wrong, "; ".join(wrong))
            verdict = "held"
        except NotShown as error:
            verdict = f"not shown: {error}"
        except NotHeld as error:
            verdict = f"NOT HELD: {error}"
        except TimeoutError:
            verdict = "NOT HELD: not done in time"
        await self.show_evidence()
        say(verdict)
        return verdict

    async def get_ready(self) -> None:
        """Have exactly one worker, of our own scripts."""
        assert self.stage
        for worker in list(self.stage.workers):
            self.stage.kill_worker(worker)
        self.tell(f"worker {self.stage.start_worker().pid} starts")

    async def bounded(self, script: Awaitable[None]) -> None:
        """Play a script within 90 s."""
        await asyncio.wait_for(script, 90)

    # What an exercise places.

    async def place(
        self, kind: Kind = OrderWorkflow, options: dict[str, Any] | None = None, **fields: Any
    ) -> str:
        """Place an order and return its id; a charge that was made before, one cent dearer."""
        while True:
            raw = PATIENT | fields | {"order_id": made_up_id()}
            if kind is ChargeWorkflow:
                raw["order_id"] = charge_id(raw)
            with suppress(WorkflowAlreadyStartedError):
                if not store.effects_of(raw["order_id"]):
                    await start(self.client, kind, raw, once=True, **options or {})
                    break
            # The same request is the same charge: to make another one, ask for another amount.
            fields["amount_cents"] = raw.get("amount_cents", 9999) + 1
            self.tell(f"{raw['order_id']} was asked for before: a new one takes a cent more")
        self.orders[raw["order_id"]] = raw
        self.since = time.time()
        self.tell(f"{raw['order_id']} is placed")
        return str(raw["order_id"])

    async def charge(self, **fields: Any) -> str:
        """Place a charge alone: lesson one."""
        return await self.place(ChargeWorkflow, **fields)

    async def asked(self, **defaults: Any) -> dict[str, Any]:
        """Let a person choose the customer, the amount and the wait."""
        return defaults

    def time_for(self, machine: float, person: float) -> float:
        """Choose how long something takes: a person needs longer than a machine."""
        return machine

    def job(self, order_id: str, wait_seconds: float) -> subprocess.Popen[bytes]:
        """Start a plain background job."""
        line = f"import starter; starter.plain_job({order_id!r}, {wait_seconds})"
        return subprocess.Popen([sys.executable, "-c", line], cwd=HERE)

    @asynccontextmanager
    async def contrast(self) -> AsyncIterator[None]:
        """Have a server and a ledger apart, as what is played here charges twice."""
        stage, private = self.stage, self.private
        async with private_stage() as self.stage:
            self.private = True
            try:
                yield
            finally:
                await self.show_evidence()
                self.stage, self.private, self.orders = stage, private, {}

    # What is seen.

    async def until(self, words: str, sight: Sight) -> None:
        """Wait until something is seen, and tell it."""
        while not await persist(partial(sees, sight)):
            await asyncio.sleep(0.05)
        if words:
            self.tell(words)

    def ended(self, order_id: str) -> Sight:
        """See that an order has ended."""

        async def sight() -> bool:
            return (await self.handle(order_id).describe()).status != signals.RUNNING

        return sight

    def in_state(self, order_id: str, state: str) -> Sight:
        """See that an order says that it is in a state."""

        async def sight() -> bool:
            return (await signals.ask(self.handle(order_id)))[1] == state

        return sight

    def code_fails(self, order_id: str) -> Sight:
        """See that the workflow task fails in our code."""
        return lambda: signals.code_fails(self.handle(order_id))

    def waits(self, order_id: str) -> Sight:
        """See that an order's timer has begun."""

        async def sight() -> bool:
            return await self.timer_of(order_id) != (0, 0)

        return sight

    def died(self, order_id: str, step: str) -> Sight:
        """See that the process of the newest attempt at a step is dead."""

        def sight() -> bool:
            attempts = events_of(order_id, step)
            return bool(attempts) and not self.is_alive(attempts[-1]["worker"])

        return sight

    async def server_is_dead(self) -> bool:
        """See that nothing listens where the server was."""
        return not await is_listening(self.address)

    async def timer_of(self, order_id: str) -> tuple[float, float]:
        """Read when an order's first timer began and when it fired, as Unix times; 0: not yet."""
        begin = end = 0.0
        async for event in self.handle(order_id).fetch_history_events():
            at = event.event_time.ToNanoseconds() / 1e9
            if event.HasField("timer_started_event_attributes"):
                begin = begin or at
            if event.HasField("timer_fired_event_attributes"):
                end = end or at
        return begin, end

    def is_alive(self, pid: int) -> bool:
        """Tell whether a process on this machine lives."""
        for worker in self.stage.workers if self.stage else ():
            if worker.pid == pid:
                return worker.poll() is None
        if sys.platform == "win32":
            found = subprocess.run(["tasklist", "/FI", f"PID eq {pid}"], capture_output=True)
            return str(pid).encode() in found.stdout
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError) as error:
            return isinstance(error, PermissionError)
        return True

    async def workers(self, queue: str = ORDERS_QUEUE) -> list[int]:
        """List the living processes on this machine that ask a task queue for work.

        The server lists dead ones too, for over a minute: that list alone is no proof of life.
        """
        request = DescribeTaskQueueRequest(
            namespace=self.client.namespace,
            task_queue=TaskQueue(name=queue),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        )
        answer = await self.client.workflow_service.describe_task_queue(request)
        found = [poller.identity.partition("@") for poller in answer.pollers]
        here = {int(pid) for pid, _, host in found if host == HOST}
        return sorted(pid for pid in here if self.is_alive(pid))

    async def worker(self) -> int:
        """Find the process that has the newest order, by its last attempt or by the history."""
        order_id = list(self.orders)[-1]
        query = "SELECT payload_json FROM events WHERE order_id = ? AND attempt > 0 ORDER BY id"
        while True:
            if attempts := store.select(query, order_id):
                return int(json.loads(attempts[-1]["payload_json"])["worker"])
            async for event in self.handle(order_id).fetch_history_events():
                if event.HasField("workflow_task_completed_event_attributes"):
                    identity = event.workflow_task_completed_event_attributes.identity
                    return int(identity.partition("@")[0])
            await asyncio.sleep(0.1)

    async def alone(self) -> None:
        """Make sure that no worker is left for orders."""
        if others := await persist(self.workers):
            raise NotShown(f"worker {others[0]} serves {ORDERS_QUEUE} too: stop it first")

    # What is done. Each of these is one **Do.** of README.md.

    async def act(
        self,
        enter: str,
        told: str,
        do: Callable[[], Awaitable[Any]] | None,
        typed: str = "",
        done: Sight | None = None,
    ) -> None:
        """Do something and tell it. A person is told what Enter does, or what to type elsewhere,
        which `done` sees; without `do` that is the only way."""
        assert do
        await do()
        self.tell(told)
        self.since = time.time()

    async def kill(self) -> int:
        """Kill the worker that has the newest order, as kill -9 does; return its pid."""
        pid, number = await self.worker(), getattr(signal, "SIGKILL", signal.SIGTERM)
        do = partial(self.end, pid, number)
        told = f"worker {pid} is dead"
        await self.act(f"kills worker {pid}", told, do, kill_command(pid), self.gone(pid))
        self.killed_at = time.time()
        return pid

    async def stop(self) -> None:
        """Stop the worker that has the newest order, as Ctrl+C does."""
        pid = await self.worker()
        do, told = partial(self.end, pid, signal.SIGINT), f"worker {pid} has stopped"
        typed = "Ctrl+C in its terminal"
        await self.act(f"stops worker {pid}", told, do, typed, self.gone(pid))

    def gone(self, pid: int) -> Sight:
        """See that a process has ended."""
        return lambda: not self.is_alive(pid)

    async def end(self, pid: int, number: int) -> None:
        """Send a process a signal and wait for its end."""
        if not self.patient:
            await asyncio.sleep(1)  # for the picture: what it was doing takes some room there
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        while self.is_alive(pid):
            await asyncio.sleep(0.02)
        self.bury()

    def bury(self) -> None:
        """Forget workers of ours that are dead, as they were to be."""
        if self.stage:
            self.stage.workers = [w for w in self.stage.workers if w.poll() is None]

    async def start(self, role: str = "all", restart: bool = False) -> None:
        """Start a worker; restart: after all others were stopped, as by Ctrl+C."""
        before = await self.living()

        async def do() -> None:
            assert self.stage
            for pid in before if restart else ():
                await self.end(pid, signal.SIGINT)
            self.bury()
            self.stage.start_worker(role, self.code)

        async def done() -> bool:
            now = await self.living()
            return bool(now - before) and not (restart and now & before)

        typed = command("worker.py") + ("" if role == "all" else f" {role}")
        only = "" if role == "all" else f" for {role} only"
        enter = f"restarts the worker{only}" if restart else f"starts another worker{only}"
        told = f"a new worker starts{only}"
        typed = f"Ctrl+C in its terminal, then {typed}" if restart else typed
        await self.act(enter, told, do if self.stage else None, typed, done)
        self.started_at = time.time()

    async def restart(self, role: str = "all") -> None:
        """Stop all workers, as Ctrl+C does, and start one."""
        await self.start(role, restart=True)

    async def living(self) -> set[int]:
        """Find the workers that live, of both task queues."""
        found = set(await persist(self.workers))
        found |= set(await persist(partial(self.workers, SHIPPING_QUEUE)))
        ours = self.stage.workers if self.stage else []
        return found | {worker.pid for worker in ours if worker.poll() is None}

    async def edit(self, change: tuple[str, str, str] | None) -> None:
        """Change a line of our scripts, or undo that: in a copy."""
        assert self.stage
        folder = self.stage.folder / uuid.uuid4().hex

        async def do() -> None:
            self.code = changed_copy(folder, *change) if change else HERE

        if change:
            await self.act(f"changes {change[0]}, in a copy", f"{change[0]} is changed", do)
        else:
            await self.act("undoes the change", "the change is undone", do)

    async def kill_server(self) -> None:
        """Kill the server."""
        do = self.stage.kill_server if self.stage else None
        typed = "Ctrl+C in its terminal"
        await self.act("kills the server", "the server is dead", do, typed, self.server_is_dead)

    async def start_server(self) -> None:
        """Start the server on the same file."""

        async def lives() -> bool:
            return not await self.server_is_dead()

        do = self.stage.start_server if self.stage else None
        typed = f"{command('worker.py')} server"
        await self.act("starts the server again", "the server lives", do, typed, lives)

    async def shell(self, line: str, done: Sight | None = None) -> str:
        """Run a command, wait until its effect is seen, and return what it said."""
        first, *words = shlex.split(line)
        script = [sys.executable, str(HERE / first)]
        if first == "temporal":
            script = [temporal_binary() or first]
        said = ""

        async def do() -> None:
            nonlocal said
            process = await asyncio.create_subprocess_exec(
                *(*script, *words),
                env=os.environ | {"TEMPORAL_ADDRESS": self.address},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            said = (await process.communicate())[0].decode().strip()

        typed = line if first == "temporal" else line.replace(first, command(first), 1)
        await self.act("runs it", line, do, typed, done)
        if said:
            self.tell(said.splitlines()[-1])
        if done:
            await self.until("", done)
        return said

    # What must be true.

    async def ends(self, order_id: str, end: str, within: float = 0, **effects: Any) -> None:
        """Wait for an order's end; it must be this one, within so many seconds of the last act.

        `effects` are what the ledger must show, {kind: "status" or "status least_requests"}.
        """
        await self.until(f"{order_id} has ended", self.ended(order_id))
        took = time.time() - self.since
        result = await persist(lambda: end_of(self.handle(order_id)))
        self.check(result, result == end, f"{order_id} ended {result}, not {end}")
        found: dict[str, dict[str, Any]] = {}
        for _ in range(100):  # what comes late comes within 5 s
            found = {row["kind"]: row for row in store.effects_of(order_id)}
            if all(enough(found.get(kind), effect) for kind, effect in effects.items()):
                break
            await asyncio.sleep(0.1)
        statuses = {kind: row["status"] for kind, row in found.items()}
        wanted = {kind: effect.partition(" ")[0] for kind, effect in effects.items()}
        told = "; ".join(store.proof(row) for row in found.values())
        self.check("", statuses == wanted, f"the ledger has {told}")
        for kind, effect in effects.items():
            self.show(f"{kind} asked for often enough: {effect}", enough(found[kind], effect))
        if within and not self.patient:
            # On a busy machine things take longer; what hangs takes longer still.
            self.check(
                f"should take {within:g} s, took {took:.1f} s", took < within + 15, "too slow"
            )

    patient = False

    def check(self, words: str, held: bool, instead: str = "") -> None:
        """Tell what is as it must be, or end the exercise with what is there instead."""
        if not held:
            raise NotHeld(instead or f"it is not true that {words}")
        if words:
            self.tell(words)

    def show(self, words: str, shown: bool) -> None:
        """End the exercise if what it is about did not happen."""
        if not shown:
            raise NotShown(f"it did not happen: {words}")

    def tell(self, words: str) -> None:
        """Print what happens, with the seconds since the exercise began."""
        say(f"{time.time() - self.began:6.1f} s  {words}", indent=10)

    async def show_evidence(self) -> None:
        """Draw the lives of the orders, and print their effects."""
        for order_id in self.orders:
            print(f"\n{order_id}")
            await persist(partial(signals.show_lanes, self.handle(order_id)))


HOST = socket.gethostname()


async def sees(sight: Sight) -> bool:
    """Look, which may take awaiting."""
    seen = sight()
    return bool(await seen if inspect.isawaitable(seen) else seen)


async def end_of(handle: signals.Handle) -> str:
    """Tell how a workflow ended: its result, or its error's type."""
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        return str(getattr(error.cause, "type", error.cause))
    return str(result["status"] if isinstance(result, dict) else result)


def enough(row: dict[str, Any] | None, effect: str) -> bool:
    """Tell whether an effect is there, as `status` or `status least_requests`."""
    status, _, least = effect.partition(" ")
    return row is not None and row["status"] == status and row["requests"] >= int(least or 0)


def changed_copy(folder: Path, file: str, text: str, instead: str) -> Path:
    """Copy our scripts with one text in one file changed."""
    folder.mkdir()
    for script in HERE.glob("*.py"):
        shutil.copy(script, folder)
    source = (folder / file).read_text(encoding="utf-8")
    if source.count(text) != 1:
        raise AssertionError(f"{file} has {text!r} {source.count(text)} times")
    (folder / file).write_text(source.replace(text, instead), encoding="utf-8")
    return folder


class Person(Player):
    """Has a person do each thing, by the words of README.md, and goes on when it has happened."""

    patient = True

    def __init__(self, client: Client, stage: Stage | None) -> None:
        super().__init__(client, stage, private=False)
        self.keyboard = Keyboard()
        self.parts: list[str] = []

    async def lead(self, number: int) -> bool:
        """Lead through an exercise: predict, do, see, explain; return whether it held."""
        title, text = sections()[number]
        head, *self.parts = re.split(
            r"^(?=\*\*(?:Predict|Do|Observe|Explain)\.\*\*)", text, flags=re.M
        )
        print(f"\nExercise {number}: {title}\n{plain(head)}\n")
        self.show_part("Predict")
        self.given: dict[str, Any] = {}
        if "t.asked(" not in inspect.getsource(EXERCISES[number]):
            await self.ask("Enter begins: ")
        verdict = await self.play(EXERCISES[number])
        if verdict != "held":
            say("So nothing is explained: play it again, it is offered below.")
            return False
        store.note(f"exercise {number}", "held", {})
        self.parts = [part for part in self.parts if part.startswith("**Explain")]
        self.show_part("Explain")
        return True

    async def ask(self, question: str) -> str:
        """Ask; q and the end of input leave."""
        answer = await self.keyboard.ask(question)
        if answer is None or answer.lower() == "q":
            raise EndOfInput
        return answer

    async def prompt(self, question: str, default: str, read: Callable[[str], Any]) -> Any:
        """Ask until the answer can be read; nothing takes the default."""
        while True:
            try:
                return read(await self.ask(f"{question} [{default}]: ") or default)
            except argparse.ArgumentTypeError as error:
                say(f"  {error}")

    async def asked(self, **defaults: Any) -> dict[str, Any]:
        """Let a person choose the customer, the amount and the wait."""
        return {name: await self.prompt(*PROMPTS[name]) for name in PROMPTS}

    def time_for(self, machine: float, person: float) -> float:
        """Choose how long something takes: a person needs longer than a machine."""
        return person

    def show_part(self, label: str) -> None:
        """Print the next part of README.md if it has this label."""
        if self.parts and self.parts[0].startswith(f"**{label}.**"):
            print(plain(self.parts.pop(0)) + "\n", flush=True)

    async def get_ready(self) -> None:
        """Have a worker, ours or another's."""
        screen = Screen()
        if self.stage and not any(worker.poll() is None for worker in self.stage.workers):
            self.stage.workers.clear()
            self.stage.start_worker()
        while not (found := await persist(self.workers)):
            ours = "waiting for our worker"
            screen.show(ours if self.stage else f"no worker; start one: {command('worker.py')}")
            await asyncio.sleep(0.2)
        screen.clear()
        if len(found) > 1:
            pids = ", ".join(map(str, found))
            say(f"Workers {pids} all serve {ORDERS_QUEUE}: to kill one will show little.")

    async def bounded(self, script: Awaitable[None]) -> None:
        """Play a script as long as a person needs."""
        await script

    async def act(
        self,
        enter: str,
        told: str,
        do: Callable[[], Awaitable[Any]] | None,
        typed: str = "",
        done: Sight | None = None,
    ) -> None:
        """Ask for something, do it on Enter if we can, and go on when it is done."""
        self.show_part("Do")
        other = f" (or: {typed})" if typed else ""
        say(f"{'':10}Enter {enter}{other}" if do else f"{'':10}Now you: {typed}", indent=10)
        was_over, line = await self.over(), asyncio.create_task(self.keyboard.line())
        try:
            while not (done and await self.sees(done)):
                await asyncio.wait([line], timeout=0.2)
                over = not was_over and await self.over()
                if line.done():
                    if line.result() is None or line.result() in ("q", "Q"):
                        raise EndOfInput
                    if do and not over:
                        await do()
                        break
                    say(f"{'':10}that is not done yet: {typed}")
                    line = asyncio.create_task(self.keyboard.line())
                if over and not (done and await self.sees(done)):
                    raise NotShown(f"too late: the order had ended before it was so: {told}")
        finally:
            line.cancel()
        self.tell(told)
        self.since = time.time()

    async def sees(self, sight: Sight) -> bool:
        """Look, while the server may be dead or about to die."""
        with suppress(TimeoutError, RPCError):
            return await asyncio.wait_for(sees(sight), 6)
        return False

    async def over(self) -> bool:
        """Tell whether the newest order has ended, if there is one."""
        return bool(self.orders) and await self.sees(self.ended(list(self.orders)[-1]))

    async def until(self, words: str, sight: Sight) -> None:
        """Wait until something is seen or the order has ended without it, and say for what."""
        screen, hint, since = Screen(), "", time.monotonic()
        look = asyncio.create_task(self.sees(sight))
        while not (look.done() and look.result()):
            if look.done():
                if not hint and await self.over() and not await self.sees(sight):
                    raise NotShown(f"the order has ended without it: {words}")
                if self.stage and not await self.sees(sight) and (dead := self.stage.revive()):
                    self.tell(f"worker {dead[0]} died too early; another one starts")
                look = asyncio.create_task(self.sees(sight))
            await asyncio.wait([look], timeout=0.3)
            if time.monotonic() > since + 1:
                hint = await self.trouble()
                screen.show(f"waiting until {words or 'it is done'}{hint}")
        screen.clear()
        if words:
            self.tell(words)

    async def trouble(self) -> str:
        """Say what is missing, if it is the server or a worker."""
        if await self.server_is_dead():
            return f": the server does not answer; start it: {command('worker.py')} server"
        with suppress(RPCError):
            if not await self.workers():
                return f": no worker is there; start one: {command('worker.py')}"
        return ""

    async def say_what_is_left(self) -> None:
        """Say which orders still run, and how to end them."""
        for order_id in self.orders:
            if not await self.sees(self.ended(order_id)):
                say(f"{order_id} still runs; end it: temporal workflow cancel -w {order_id}")

    async def edit(self, change: tuple[str, str, str] | None) -> None:
        """Have a line of our scripts changed by hand; in a contrast, in a copy."""
        if self.private:
            await super().edit(change)
            return
        undone = {(file, new) for file, _, new in (BUG, CHECKED, PATCHED)}

        def done() -> bool:
            texts = {file: (HERE / file).read_text(encoding="utf-8") for file, _ in undone}
            if change:
                return change[2] in texts[change[0]]
            return not any(new in texts[file] for file, new in undone)

        file = change[0] if change else "workflows.py"
        told = f"{file} has the new lines" if change else f"{file} is as it was"
        await self.act("", told, None, f"edit {file} and save it", done)


def sections() -> dict[int, tuple[str, str]]:
    """Read the exercises from README.md: {number: (title, text)}."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^(?=##+ )", readme, flags=re.MULTILINE)
    found = [(re.match(r"### Exercise (\d+): (.*)\n", part), part) for part in parts]
    return {int(m[1]): (m[2], part[m.end() :]) for m, part in found if m}


def plain(markdown: str) -> str:
    """Turn Markdown into text for a terminal: no fences, code indented."""
    lines, code = [], False
    for line in markdown.strip().splitlines():
        if line.startswith("```"):
            code = not code
        else:
            lines.append("    " + line if code else line.replace("**", "").replace("`", ""))
    return "\n".join(lines)


async def run_prompts(_: argparse.Namespace) -> int:
    """Offer the exercises and lead through them until the person leaves; exit 1 if one failed."""
    async with temporal(quiet=True) as (client, stage):
        person, number, results = Person(client, stage), 1, dict[int, bool]()
        address = person.address
        say(f"server: {address}, namespace {client.namespace}, Web UI: {web_ui(address)}")
        try:
            while True:
                done = {row["order_id"] for row in store.select(HELD)}
                for n, section in sections().items():
                    say(f"{'x' if f'exercise {n}' in done else ' '} {n:2}  {section[0]}")
                number = await person.prompt("Exercise, or q", str(number), chosen)
                results[number] = await person.lead(number)
                number = (number + results[number]) % len(EXERCISES)
        except EndOfInput:
            return 0 if all(results.values()) else 1
        finally:
            await person.say_what_is_left()


HELD = "SELECT order_id FROM events WHERE type = 'held'"


def chosen(text: str) -> int:
    """Read the number or the name of an exercise."""
    if text in NAMES:
        return NAMES.index(text)
    if text not in map(str, range(len(NAMES))):
        there = ", ".join(f"{number} {name}" for number, name in enumerate(NAMES))
        raise argparse.ArgumentTypeError(f"no exercise {printable(text)[:80]}; there are {there}")
    return int(text)


async def run_crash(options: argparse.Namespace) -> int:
    """Play exercises on a stage of our own; exit 0 if all held."""
    rows = []
    async with private_stage() as stage:
        say(f"a server of our own at {stage.address}, Web UI: {web_ui(stage.address)}")
        player = Player(stage.client, stage)
        for number in options.names or range(len(EXERCISES)):
            claim = f"{number} {NAMES[number]}: {EXERCISES[number].__doc__}"
            print()
            say(claim, indent=4)
            verdict = await player.play(EXERCISES[number])
            rows.append(
                f"{verdict.partition(':')[0]:9} {time.time() - player.began:5.1f} s  {claim}"
            )
    print()
    for row in rows:
        say(row, indent=20)
    return 0 if all(row.startswith("held ") for row in rows) else 1


# The crowd: many orders at once, with kills or without.

IN_FLIGHT = 200  # more wait for each other, and the server lets only some hundreds wait for results
CROWD: list[tuple[set[str], dict[str, Any], str]] = [
    # (how an order of this kind may end, its fields, how people treat it)
    ({"COMPLETED"}, {}, ""),
    ({"COMPLETED"}, {"wait_seconds": 3}, ""),
    ({"COMPLETED"}, {"simulate": {"charge_payment": "slow"}}, ""),
    ({"COMPLETED"}, {"simulate": {"charge_payment": "flaky", "dispatch_carrier": "flaky"}}, ""),
    ({"COMPLETED"}, {"simulate": {"reserve_inventory": "random"}}, ""),
    ({"REJECTED"}, {"review": "person", "review_seconds": 600}, "reject"),
    ({"CANCELLED"}, {"wait_seconds": 600}, "cancel"),
    ({"COMPLETED", "CANCELLED"}, {"simulate": {"charge_payment": "late"}}, "cancel"),
    ({"COMPLETED", "CANCELLED"}, {"simulate": {"dispatch_carrier": "slow"}}, "cancel"),
]


class Crowd:
    """Many orders, drawn from a seed, and the kills that they must survive."""

    def __init__(self, stage: Stage, options: argparse.Namespace) -> None:
        self.stage, self.options = stage, options
        self.random = random.Random(options.seed)
        fields = {"wait_seconds": options.wait_seconds, "review_seconds": 0}
        kinds = CROWD if options.kills else [({"COMPLETED"}, fields, "")]
        # Drawn before anything runs: the same seed gives the same orders, whatever the kills do.
        self.drawn = {f"crowd-{n}": self.random.choice(kinds) for n in range(options.orders)}
        self.placed: dict[str, float] = {}
        self.workers_killed = self.server_killed = 0
        self.screen = Screen()

    async def run(self) -> list[str]:
        """Place the orders, kill between them, wait for all to end; return what went wrong."""
        for _ in range(2 if self.options.kills else 1):
            self.stage.start_worker()
        work = asyncio.gather(self.place_all(), self.kill_some())
        # A second an order is ten times what it costs; what is not done then is lost.
        end = time.monotonic() + 120 + 2 * self.options.wait_seconds + self.options.orders
        while time.monotonic() < end and not (work.done() and self.ended() == len(self.drawn)):
            self.stage.revive()
            self.screen.show(self.line())
            await asyncio.wait([work], timeout=0.5) if not work.done() else await asyncio.sleep(0.2)
        self.screen.clear()
        say(self.line())
        work.done() and work.result()
        ends = endings()
        lost = [f"{order_id}: lost" for order_id in self.drawn if order_id not in ends]
        odd = [f"{id_}: {end}" for id_, (end, _) in ends.items() if end not in self.drawn[id_][0]]
        return lost + odd + store.audit()[1]

    async def place_all(self) -> None:
        """Place the orders, not too many in flight, spread over the kills, as people would."""
        pause, treating = 1.5 * self.options.kills / self.options.orders, []
        for order_id, (_, fields, signal_name) in self.drawn.items():
            while not self.options.wait_seconds and len(self.placed) - self.ended() >= IN_FLIGHT:
                await asyncio.sleep(0.05)
            self.placed[order_id] = time.time()
            # When 10,000 wake, an order may have its next turn only minutes later: not its fault.
            raw = PATIENT | {"deadline_seconds": 86_400} | fields | {"order_id": order_id}
            treating.append(asyncio.create_task(self.treat(raw, signal_name)))
            await asyncio.sleep(pause)
        await asyncio.gather(*treating)

    async def treat(self, raw: dict[str, Any], signal_name: str) -> None:
        """Place an order and signal it; call again while the server is down."""
        with suppress(WorkflowAlreadyStartedError):  # by the try before, whose answer was lost
            await persist(lambda: start(self.stage.client, OrderWorkflow, raw))
        if signal_name:
            await asyncio.sleep(1)
            handle = self.stage.client.get_workflow_handle(raw["order_id"])
            try:
                await persist(lambda: handle.signal(signal_name))
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:  # too late: the order has ended
                    raise

    async def kill_some(self) -> None:
        """Kill a worker now and then, every other one in a charge or a dispatch; the server too."""
        for kill in range(self.options.kills):
            await asyncio.sleep(self.random.uniform(0.5, 2.5))
            living = [worker for worker in self.stage.workers if worker.poll() is None]
            victim = self.random.choice(living or self.stage.workers)
            for _ in range(30 if kill % 2 == 0 else 0):
                if busy := [w for w in living if w.pid in in_flight()]:
                    victim = busy[0]
                    break
                await asyncio.sleep(0.1)
            if victim in self.stage.workers:
                self.stage.kill_worker(victim)
                self.stage.start_worker()
                self.workers_killed += 1
            if kill % 5 == 4:
                await self.stage.kill_server()
                await self.stage.start_server()
                self.server_killed += 1

    def ended(self) -> int:
        """Count the orders that have an outcome."""
        rows = store.select(
            "SELECT count(DISTINCT order_id) AS n FROM events WHERE type = 'outcome'"
        )
        return int(rows[0]["n"])

    def line(self) -> str:
        """Tell how it goes."""
        told = f"orders {self.ended()}/{len(self.drawn)}"
        if self.options.kills:
            told += f" · killed {self.workers_killed} workers, {self.server_killed} servers"
        return f"{told} · asked more than once {asked_again()} · charged twice {charged_twice()}"


def in_flight() -> set[int]:
    """Find the workers in whose hands a charge or a dispatch is that the provider has done."""
    query = (
        "SELECT payload_json FROM events JOIN effects USING (order_id) WHERE attempt > 0"
        " AND json_extract(payload_json, '$.ended') IS NULL AND events.ts > ?"
        " AND (type, kind) IN"
        " (VALUES ('charge_payment', 'charge'), ('dispatch_carrier', 'dispatch'))"
    )
    rows = store.select(query, time.time() - SLOW_SECONDS)
    return {json.loads(row["payload_json"])["worker"] for row in rows}


def asked_again() -> int:
    """Count the effects for which a provider was asked more than once."""
    return int(store.select("SELECT count(*) AS n FROM effects WHERE requests > 1")[0]["n"])


def charged_twice() -> int:
    """Count the orders with more than one charge in force."""
    charged = "SELECT order_id FROM charges WHERE status = 'charged' GROUP BY order_id"
    return len(store.select(f"{charged} HAVING count(*) > 1"))


def endings() -> dict[str, tuple[str, float]]:
    """Read how and when the orders ended: {order id: (state, Unix time)}."""
    outcomes = store.select("SELECT * FROM events WHERE type = 'outcome' ORDER BY id")
    return {
        row["order_id"]: (json.loads(row["payload_json"])["state"], row["ts"]) for row in outcomes
    }


async def run_crowd(options: argparse.Namespace) -> int:
    """Run many orders, under kills if asked to; exit 0 if each ended as it may."""
    began = time.monotonic()
    async with private_stage() as stage:
        crowd = Crowd(stage, options)
        wrong = await crowd.run()
        seconds, ends = time.monotonic() - began, endings()
        for worker in list(stage.workers):
            stage.kill_worker(worker)
        worker_cpu, memory = children_used()
        await stage.kill_server()
        server_cpu = children_used()[0] - worker_cpu
        told = ", ".join(
            f"{end} {n}" for end, n in sorted(Counter(e for e, _ in ends.values()).items())
        )
        say(f"{seconds:.1f} s, {options.orders / seconds:.1f} orders/s; {told}")
        if not options.kills and ends:
            took = sorted(ts - crowd.placed[id_] for id_, (_, ts) in ends.items())
            say(f"median {median(took):.2f} s, 99th percentile {took[len(took) * 99 // 100]:.2f} s")
            each = 1000 / options.orders
            say(f"CPU ms per order: worker {worker_cpu * each:.0f}, server {server_cpu * each:.0f}")
            say(f"worker memory {memory:.0f} MB at most")
        for line in wrong:
            print(printable(line), file=sys.stderr)
        shown = asked_again() or not options.kills
        good = "held: no order lost, none charged twice, audit clean"
        nothing = "not shown: no provider was asked more than once"
        say("NOT HELD" if wrong else good if shown else nothing)
    return 0 if shown and not wrong else 1


def children_used() -> tuple[float, float]:
    """Return what our ended processes used: CPU seconds, and the memory of the largest in MB."""
    if sys.platform == "win32":
        return float("nan"), float("nan")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return used.ru_utime + used.ru_stime, used.ru_maxrss / unit


# The command line.


def cents(text: str) -> int:
    """Read an amount typed with at most two decimals, such as 99.99, as cents."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError("must be an amount like 99.99")
    whole, _, part = text.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0"))


def ruled(name: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Make a reader for a field of the order that keeps its rule."""

    def read(text: str) -> Any:
        valid, rule = RULES[name]
        try:
            value = convert(text)
        except ValueError:
            value = None
        if not valid(value):
            raise argparse.ArgumentTypeError(rule)
        return value

    return read


def given(text: str) -> str:
    """Refuse an empty argument: it is not the same as a missing one."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


PROMPTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "customer_id": ("Customer ID", "customer-123", ruled("customer_id")),
    "amount_cents": ("Amount", "99.99", ruled("amount_cents", cents)),
    "wait_seconds": ("Wait seconds", "10", ruled("wait_seconds", float)),
}


def fault(text: str) -> tuple[str, str]:
    """Read STEP=FAULT."""
    step, _, name = text.partition("=")
    if step not in STEPS or name not in FAULTS:
        raise argparse.ArgumentTypeError("must be STEP=FAULT with names from --help")
    return step, name


def add_orders(commands: Any) -> None:
    """Add the commands that place one order; their options are its fields."""
    faults = "\n".join(f"  {name:13} {meaning}" for name, meaning in FAULTS.items())
    steps = textwrap.fill(f"STEP is one of {', '.join(STEPS)}.", 79)
    shape = {
        "epilog": f"{steps} FAULT is one of\n{faults}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    charge = commands.add_parser("charge", help="wait, then charge: lesson one", **shape)
    order = commands.add_parser("order", help="place an order", **shape)
    order.add_argument("order_id", nargs="?", help="made up if missing")
    for sub in (charge, order):
        sub.add_argument("--customer-id", help="default customer-123")
        sub.add_argument("--amount", dest="amount_cents", type=cents, help="default 99.99")
        sub.add_argument("--wait", dest="wait_seconds", type=float, help="seconds; default 0")
        sub.add_argument("--simulate", type=fault, action="append", metavar="STEP=FAULT")
        sub.add_argument("--wait-result", action="store_true", help="follow it to its end")
    order.add_argument("--payment-id", type=given, help="default pay-<order id>")
    order.add_argument("--address", help="default 1 Main Street")
    order.add_argument("--card-expiry", metavar="MM/YY", help="default 12/30")
    order.add_argument("--review", choices=["person", "timer"], help="default person")
    order.add_argument("--review-seconds", type=float, help="default 30 for a person, 2 for timer")
    order.add_argument("--deadline", dest="deadline_seconds", type=float, help="default 15")
    order.add_argument("--max-attempts", type=int, help="of each step; default 3; 0: no limit")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Place orders, and crash things on purpose.")
    commands = parser.add_subparsers(dest="command", title="commands (without one: the exercises)")
    add_orders(commands)
    crash = commands.add_parser("crash", help="the exercises, played by the machine")
    named = f"default all: {', '.join(NAMES)}; or a number from 0"
    crash.add_argument("names", nargs="*", type=chosen, metavar="NAME", help=named)
    chaos = commands.add_parser("chaos", help="a crowd of orders under kills")
    chaos.add_argument("--orders", type=signals.positive, default=60, help="default 60")
    chaos.add_argument("--kills", type=signals.positive, default=10, help="of workers; default 10")
    chaos.add_argument("--seed", type=int, default=1, help="of what is drawn; default 1")
    chaos.set_defaults(wait_seconds=0)
    load = commands.add_parser("load", help="a crowd of orders, and what each costs")
    load.add_argument("--orders", type=signals.positive, default=200, help="default 200")
    seconds = ruled("wait_seconds", float)
    load.add_argument(
        "--wait", dest="wait_seconds", type=seconds, default=0, help="seconds they sleep first"
    )
    load.set_defaults(kills=0, seed=1)
    options: argparse.Namespace = parser.parse_args()
    if getattr(options, "simulate", None):
        options.simulate = dict(options.simulate)
    return options


def main() -> int:
    """Run one command."""
    options = parse_arguments()
    # A plain kill, or the end of the terminal, should clean up after us like Ctrl+C.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    commands = {
        "charge": run_charge,
        "order": run_order,
        "crash": run_crash,
        "chaos": run_crowd,
        "load": run_crowd,
        None: run_prompts,
    }
    return asyncio.run(commands[options.command](options))


if __name__ == "__main__":
    run_script(main)
