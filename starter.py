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
import signal
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
from signals import Screen
from worker import (
    DEFAULT_ADDRESS,
    HERE,
    Parser,
    Stage,
    changed_copy,
    client_config,
    command,
    connect,
    is_listening,
    is_process,
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


def charge_id(raw: dict[str, Any]) -> str:
    """Name a charge by what is asked for, so that the same request is the same workflow."""
    return f"charge-{raw.get('customer_id', 'customer-123')}-{raw.get('amount_cents', 9999)}"


def made_up_id() -> str:
    """Make up an order id that no other order has."""
    return f"order-{uuid.uuid4().hex[:8]}"


async def place(options: argparse.Namespace) -> int:
    """Start the workflow, or attach to it if it runs already, and follow it if asked to."""
    raw = {name: value for name, value in vars(options).items() if name in RULES}
    kind: Kind = ChargeWorkflow if options.command == "charge" else OrderWorkflow
    if kind is ChargeWorkflow:
        raw |= {"order_id": charge_id(raw), "max_attempts": 0}
    raw.setdefault("order_id", made_up_id())
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
        if options.wait_result:
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
REVIEWED: dict[str, Any] = {"review": "person", "review_seconds": 600}
# A workflow task that fails is tried again when its time is over: 10 s, if nothing else is said.
BRIEF = {"task_timeout": timedelta(seconds=1)}
# Edits, in the words of README.md: a file, a line in it, and what shall stand there instead.
REVIEW = "            await self._review()\n"
CHECK = '            await self._do(step.validate_order, "VALIDATING")\n'
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
        charging, waiting = plain_job("charging", 0), plain_job("waiting", 3)
        await t.until("the provider has charged; its answer is on the way", charged, "charging")
        charging.kill()
        waiting.kill()
        t.tell(f"jobs {charging.pid}, charging, and {waiting.pid}, waiting, die")
        again = plain_job("charging", 0)
        t.tell(f"the queue delivers the job again that nobody noted as done, to {again.pid}")
        await t.until("that job is done", lambda: again.poll() is not None)
        t.check("charged twice", len(store.effects_of("charging")) == 2)
        t.check("the waiting order is lost", not store.effects_of("waiting"))


async def timer(t: "Player") -> None:
    """A durable wait keeps its deadline while no worker lives."""
    order = await t.charge(**await t.asked(wait_seconds=5))
    await t.until("the wait has begun", t.timer_began, order)
    await t.kill()
    killed = time.time()
    if others := await t.pollers():
        t.show(f"no worker lives; {others[0]} serves {ORDERS_QUEUE} too, stop it first", False)
    await t.start()
    started = time.time()
    await t.ends(order, "charged", charge="charged")
    begin, end = await t.timer_of(order)
    t.show("the worker died before the wait was over", killed < end)
    t.show("another one was there before the wait was over", started < end)
    should = t.orders[order]["wait_seconds"]
    t.check(
        f"the wait should take {should:g} s, took {end - begin:.1f} s", end - begin < should + 1.5
    )


async def charge(t: "Player") -> None:
    """A worker ends in the middle of a charge, by Ctrl+C and by kill -9: charged once."""
    for hard in (False, True):
        order = await t.charge(simulate=SLOW)
        await t.until("the provider has charged; its answer, 5 s, is on the way", charged, order)
        await t.kill(hard)
        await t.start()
        await t.until("attempt 2; the provider knows the key", begun, order, "charge_payment", 2)
        await t.ends(order, "charged", within=6.5, charge="charged 2")


async def approve(t: "Player") -> None:
    """An order waits for a person, and goes on at the approval."""
    order = await t.place(**REVIEWED)
    await t.until("the order waits for you", t.is_in, order, "AWAITING_REVIEW")
    await t.shell(f"signals.py approve {order} --note 'looks good'", begun, order, "approve")
    await t.ends(order, "COMPLETED", within=2, **ONCE)


async def outage(t: "Player") -> None:
    """An outage that ends costs tenths of a second; one that does not undoes the order."""
    order = await t.place(simulate={"charge_payment": "flaky"})
    await t.ends(order, "COMPLETED", within=1.5, **ONCE)
    t.check("attempts 3", store.count(order, "charge_payment") >= 3)
    order = await t.place(simulate={"charge_payment": "down"}, max_attempts=3)
    await t.ends(order, "OrderGivenUp", within=1.5, reservation="released", charge="voided")
    t.check("attempts 3", store.count(order, "charge_payment") == 3)


async def card(t: "Player") -> None:
    """A refusal is an answer: the charge is tried once, and what was begun is undone."""
    order = await t.place(card_expiry="12/23")
    await t.ends(order, "PaymentDeclined", within=1, reservation="released", charge="voided")
    t.check("attempts 1", store.count(order, "charge_payment") == 1)


async def nobody(t: "Player") -> None:
    """Nobody approves: the review's window closes, and the goods are released."""
    seconds = t.time_for(machine=1, person=10)
    order = await t.place(review="person", review_seconds=seconds)
    await t.ends(order, "EXPIRED", within=seconds + 1, reservation="released")


async def address(t: "Player") -> None:
    """A change of address or a cancel comes in time or too late; the order says which."""
    order = await t.place(**REVIEWED, simulate={"prepare_package": "slow"})
    await t.until("the order waits for you", t.is_in, order, "AWAITING_REVIEW")
    change = f"signals.py update-address {order}"
    await t.shell(f"{change} '2 Side Street'", begun, order, "update_address")
    await t.shell(f"signals.py approve {order}", begun, order, "approve")
    await t.until("it is packed, which takes 5 s", begun, order, "prepare_package")
    said = await t.shell(f"{change} '3 Late Street'")
    t.show("the second change came too late", "too late, the order is SHIPPING" in said)
    await t.ends(order, "COMPLETED", within=6, **ONCE)
    t.check("sent to 2 Side Street", payloads(order, "dispatch_carrier")[0]["address"][0] == "2")
    order = await t.place(**REVIEWED)
    await t.until("a second order waits for you", t.is_in, order, "AWAITING_REVIEW")
    await t.shell(f"signals.py cancel {order} --reason 'changed my mind'", begun, order, "cancel")
    await t.ends(order, "CANCELLED", within=1, reservation="released")


async def shipping(t: "Player") -> None:
    """Without a shipping worker paid orders wait; a carrier that is down undoes its order."""
    await t.restart("orders")
    order = await t.place()
    await t.until("the order is paid; its package waits", t.is_in, order, "SHIPPING")
    shippers = {event["worker"] for event in payloads(order, "prepare_package")}
    t.show(f"nobody ships, but worker {shippers} does", not shippers)
    await t.start("shipping")
    await t.ends(order, "COMPLETED", within=1.5, **ONCE)
    order = await t.place(simulate={"dispatch_carrier": "down"}, max_attempts=3)
    undone = dict.fromkeys(ONCE, "") | {"charge": "refunded", "reservation": "released"}
    await t.ends(order, "OrderGivenUp", within=6, **undone | {"dispatch": "voided"})
    t.check("attempts 9, in three tries", store.count(order, "dispatch_carrier") == 9)


async def bug(t: "Player") -> None:
    """A workflow meets a bug: the order waits, and goes on when the bug is mended."""
    await t.edit(BUG)
    await t.restart()
    order = await t.place(options=BRIEF)
    await t.until("the workflow task fails and is tried again", t.code_fails, order, "a bug")
    await t.edit(None)
    await t.restart()
    await t.ends(order, "COMPLETED", within=4, **ONCE)


async def server(t: "Player") -> None:
    """The Temporal server dies in the middle of a wait and a charge, and forgets nothing."""
    waiting = await t.place(wait_seconds=t.time_for(machine=3, person=15))
    charging = await t.place(simulate=SLOW)
    await t.until("one order waits, one is being charged", charged, charging)
    await t.kill_server()
    await t.until("no server answers", t.server_is_dead)
    await t.start_server()
    for order in (charging, waiting):  # an answer that met no server is asked for again
        await t.ends(order, "COMPLETED", within=t.time_for(machine=10, person=22), **ONCE)


async def deploy(t: "Player") -> None:
    """Changed code must fit the histories of running orders; `patched` makes it fit."""
    order = await t.place(**REVIEWED, options=BRIEF)
    await t.until("the order waits for you", t.is_in, order, "AWAITING_REVIEW")
    await t.edit(CHECKED)
    await t.restart()
    await t.shell(f"signals.py approve {order}", begun, order, "receive_order")
    await t.until("the new code does not fit the history", t.code_fails, order, "Nondeterminism")
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
    await t.shell(f"{back} {order}", begun, order, "receive_order", 2)
    await t.ends(order, "COMPLETED", within=2, **{kind: f"{end} 2" for kind, end in ONCE.items()})
    order = await t.place(**REVIEWED)
    await t.until("a second order waits for you", t.is_in, order, "AWAITING_REVIEW")
    await t.shell(f"signals.py approve {order}", begun, order, "approve")
    await t.ends(order, "COMPLETED", **ONCE)
    again = f"{back} {order} --reapply-exclude Signal"
    await t.shell(again, begun, order, "receive_order", 2)
    await t.until("it waits for you once more", t.is_in, order, "AWAITING_REVIEW")
    await t.shell(f"signals.py cancel {order}", begun, order, "cancel")
    await t.ends(order, "COMPLETED", within=2, **ONCE)


async def late(t: "Player") -> None:
    """A charge or a dispatch that arrives after its order was given up is refused."""
    charging = await t.place(simulate={"charge_payment": "late"})
    shipping = await t.place(simulate={"dispatch_carrier": "late"})
    for order, step in ((charging, "charge_payment"), (shipping, "dispatch_carrier")):
        await t.until(f"{step}, 5 s late, is on its way", begun, order, step)
        await t.shell(f"signals.py cancel {order}", begun, order, "cancel")
        t.show("the cancel came before it arrived", "ended" not in payloads(order, step)[0])
    await t.ends(charging, "CANCELLED", charge="voided 1", reservation="released")
    refunded: dict[str, Any] = {"charge": "refunded", "reservation": "released"}
    await t.ends(shipping, "CANCELLED", within=6, dispatch="voided 1", **refunded)


async def points(t: "Player") -> None:
    """A worker dies before the charge, after it, after the dispatch: it does not matter where."""
    for step, fault, asked in (
        ("charge_payment", "crash-before", {}),
        ("charge_payment", "crash-after", {"charge": "charged 2"}),
        ("dispatch_carrier", "crash-after", {"dispatch": "dispatched 2"}),
    ):
        order = await t.place(simulate={step: fault})
        await t.until(f"the worker has died: {fault} of {step}", t.died, order, step)
        await t.start()
        await t.ends(order, "COMPLETED", within=2, **ONCE | asked)
        t.show("a second attempt", store.count(order, step) >= 2)


async def no_key(t: "Player") -> None:
    """The contrast, exercise 2 with a key that changes on each attempt: charged twice."""
    async with t.contrast():
        await t.edit(NO_KEY)
        await t.start()
        order = await t.place(simulate=SLOW)
        await t.until("the provider has charged; its answer, 5 s, is on the way", charged, order)
        await t.kill()
        await t.start()
        await t.until("the order has ended", t.ended, order)
        t.show("a second attempt", store.count(order, "charge_payment") >= 2)
        t.check(
            "charged twice", [row["kind"] for row in store.effects_of(order)].count("charge") == 2
        )


Exercise = Callable[["Player"], Awaitable[None]]
EXERCISES: list[Exercise] = [
    *(no_temporal, timer, charge, approve, outage, card, nobody, address),
    *(shipping, bug, server, deploy, reset, late, points, no_key),
]
NAMES = [exercise.__name__.replace("_", "-") for exercise in EXERCISES]

JOB = """
import sys, time, uuid, charge_store
time.sleep({wait})
key = uuid.uuid4().hex  # made up at each delivery: there is nowhere to remember it
charge_store.perform("charge", key, "{order_id}", "customer-123", 9999)
time.sleep({slow})  # the provider's answer is on the way
"""


def plain_job(order_id: str, wait: float) -> subprocess.Popen[bytes]:
    """Do an order as a background job without Temporal: all it knows is in its memory."""
    code = JOB.format(order_id=order_id, wait=wait, slow=SLOW_SECONDS)
    apart: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, **apart)


# What can be seen in the ledger.


def charged(order_id: str) -> bool:
    """Tell whether the provider has charged."""
    return any(row["kind"] == "charge" for row in store.effects_of(order_id))


def begun(order_id: str, type_: str, times: int = 1) -> bool:
    """Tell whether so many attempts at a step have begun, or so many messages have come."""
    return store.count(order_id, type_) >= times


def payloads(order_id: str, type_: str) -> list[dict[str, Any]]:
    """Read the payloads of an order's events of one type."""
    query = "SELECT payload_json FROM events WHERE order_id = ? AND type = ? ORDER BY id"
    return [json.loads(row["payload_json"]) for row in store.select(query, order_id, type_)]


def enough(row: dict[str, Any] | None, effect: str) -> bool:
    """Tell whether an effect is there, as `status` or `status least_requests`."""
    status, _, least = effect.partition(" ")
    return row is not None and row["status"] == status and row["requests"] >= int(least or 0)


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
Sight = Callable[..., Any]  # tells, perhaps only when awaited, whether something is to be seen
Deed = Callable[[], Awaitable[Any]]


async def sees(sight: Sight, *given: Any) -> bool:
    """Look, which may take awaiting."""
    seen = sight(*given)
    return bool(await seen if inspect.isawaitable(seen) else seen)


class Player:
    """Plays exercises unattended, on a stage of its own, and tells what happens."""

    def __init__(self, client: Client, stage: Stage | None) -> None:
        """Play on a stage of ours, or on a server and workers that others run."""
        self._client, self.stage, self.code = client, stage, HERE
        self.orders: dict[str, dict[str, Any]] = {}  # what was placed, by order id
        self.began = self.since = time.time()
        self.apart = True  # the stage is for exercises alone, with workers of a changed copy too

    @property
    def client(self) -> Client:
        """Return the client of the stage's newest server."""
        return self.stage.client if self.stage else self._client

    @property
    def address(self) -> str:
        """Tell where the server is."""
        return str(self.client.service_client.config.target_host)

    async def play(self, exercise: Exercise) -> str:
        """Play an exercise; return `held`, `not shown: ...` or `NOT HELD: ...`."""
        self.orders, self.code, verdict = {}, HERE, "held"
        self.began = self.since = time.time()
        try:
            limit = self.time_for(machine=90, person=86_400)
            await asyncio.wait_for(self.prepare(), limit)
            await asyncio.wait_for(exercise(self), limit)
            ours = tuple(f"{order_id} (" for order_id in self.orders)
            wrong = [line for line in store.audit()[1] if line.startswith(ours or "-")]
            self.check("audit clean", not wrong, "; ".join(wrong))
        except NotShown as error:
            verdict = f"not shown: {error}"
        except (NotHeld, TimeoutError) as error:
            verdict = f"NOT HELD: {error or 'not done in time'}"
        except RPCError as error:
            verdict = f"not shown: {error}"
        with suppress(TimeoutError):
            await asyncio.wait_for(self.draw(), 20)
        say(verdict)
        return verdict

    async def prepare(self) -> None:
        """Have exactly one worker, of our own scripts."""
        assert self.stage
        for worker in list(self.stage.workers):
            self.stage.kill_worker(worker)
        if not self.stage.server:
            await self.stage.start_server()
        worker = self.stage.start_worker()
        # One that was killed a moment ago could be given the next task; it would take 10 s to see.
        while worker.pid not in await self.pollers():
            await asyncio.sleep(0.05)
        self.tell(f"worker {worker.pid} is there")

    async def draw(self) -> None:
        """Draw the lives of the orders, and print their effects."""
        for order_id in self.orders:
            print()
            say(order_id)
            await persist(partial(signals.show_lanes, self.handle(order_id)))

    def tell(self, words: str) -> None:
        """Print what happens, with the seconds since the exercise began."""
        if words:
            say(f"{time.time() - self.began:6.1f} s  {words}", indent=10)

    # What an exercise places.

    async def place(
        self, kind: Kind = OrderWorkflow, options: dict[str, Any] | None = None, **fields: Any
    ) -> str:
        """Place an order and return its id."""
        raw = PATIENT | fields | {"order_id": made_up_id()}
        if kind is ChargeWorkflow:
            first = raw["order_id"] = charge_id(raw)
            while store.effects_of(raw["order_id"]):
                raw["amount_cents"] += 1
                raw["order_id"] = charge_id(raw)
            if raw["order_id"] != first:
                self.tell(f"{first} was made before; to ask again is the same charge: a cent more")
        try:
            await start(self.client, kind, raw, once=True, **options or {})
        except WorkflowAlreadyStartedError:  # by another starter, in this moment
            return await self.place(
                kind, options, **fields | {"amount_cents": raw["amount_cents"] + 1}
            )
        self.orders[raw["order_id"]] = raw
        self.since = time.time()
        self.tell(f"{raw['order_id']} is placed")
        return str(raw["order_id"])

    async def charge(self, **fields: Any) -> str:
        """Place a charge alone: lesson one."""
        return await self.place(ChargeWorkflow, **{"amount_cents": 9999} | fields)

    async def asked(self, **defaults: Any) -> dict[str, Any]:
        """Let a person choose the customer, the amount and the wait."""
        return defaults

    def time_for(self, machine: float, person: float) -> float:
        """Choose how long something takes: a person needs longer than a machine."""
        return machine

    @asynccontextmanager
    async def contrast(self) -> AsyncIterator[None]:
        """Have a server and a ledger apart, as what is played here charges twice."""
        stage, apart = self.stage, self.apart
        async with private_stage() as self.stage:
            self.apart = True
            try:
                yield
                await self.draw()
            finally:
                self.stage, self.apart, self.orders = stage, apart, {}

    # What is seen.

    async def until(self, words: str, sight: Sight, *given: Any) -> None:
        """Wait until something is seen, and tell it."""
        while not await persist(partial(sees, sight, *given)):
            await asyncio.sleep(0.05)
        self.tell(words)

    def handle(self, order_id: str) -> signals.Handle:
        """Get at an order's newest run."""
        return self.client.get_workflow_handle(order_id)

    async def ended(self, order_id: str) -> bool:
        """Tell whether an order has ended."""
        return (await self.handle(order_id).describe()).status != signals.RUNNING

    async def is_in(self, order_id: str, state: str) -> bool:
        """Tell whether an order says that it is in a state."""
        return (await signals.ask(self.handle(order_id)))[1] == state

    async def code_fails(self, order_id: str, why: str) -> bool:
        """Tell whether the workflow task fails in our code, for this reason."""
        return why in (await signals.code_failure(self.handle(order_id)) or "")

    def died(self, order_id: str, step: str) -> bool:
        """Tell whether the process of the newest attempt at a step is dead."""
        attempts = payloads(order_id, step)
        return bool(attempts) and self.is_dead(attempts[-1]["worker"])

    def is_dead(self, pid: int) -> bool:
        """Tell whether a process on this machine has ended."""
        for worker in self.stage.workers if self.stage else ():
            worker.poll()  # else a dead child of ours would still be there, as a zombie
        return not is_process(pid)

    async def server_is_dead(self, dead: bool = True) -> bool:
        """Tell whether nothing listens where the server was, or, dead=False, something does."""
        return await is_listening(self.address) != dead

    async def timer_of(self, order_id: str) -> tuple[float, float]:
        """Read when an order's first timer began and when it fired, as Unix times; 0: not yet."""
        times = [0.0, 0.0]
        async for event in self.handle(order_id).fetch_history_events():
            for n, kind in enumerate(("timer_started", "timer_fired")):
                if event.WhichOneof("attributes") == f"{kind}_event_attributes":
                    times[n] = times[n] or event.event_time.ToNanoseconds() / 1e9
        return times[0], times[1]

    async def timer_began(self, order_id: str) -> bool:
        """Tell whether an order's timer has begun."""
        return (await self.timer_of(order_id))[0] > 0

    async def pollers(self) -> list[int]:
        """List the living processes on this machine that ask for work; empty without a server.

        The server lists dead ones too, for over a minute: its list alone is no proof of life.
        """
        found = set()
        for queue in (ORDERS_QUEUE, SHIPPING_QUEUE):
            with suppress(RPCError):
                found |= {pid for pid in await signals.pollers(self.client, queue)}
        return sorted(pid for pid in found if not self.is_dead(pid))

    async def worker(self) -> int:
        """Find the process that has the newest order, by its last attempt or by the history.

        0: it is dead, or not on this machine, where its number may be another program's.
        """
        order_id = list(self.orders)[-1]
        query = "SELECT payload_json FROM events WHERE order_id = ? AND attempt > 0 ORDER BY id"
        here = await self.pollers()
        while not (attempts := store.select(query, order_id)):
            async for event in self.handle(order_id).fetch_history_events():
                if event.HasField("workflow_task_completed_event_attributes"):
                    identity = event.workflow_task_completed_event_attributes.identity
                    pid = identity.partition("@")[0]
                    return int(pid) if pid in map(str, here) else 0
            await asyncio.sleep(0.1)
        pid = json.loads(attempts[-1]["payload_json"])["worker"]
        return int(pid) if pid in here else 0

    # What is done. Each of these is one **Do.** of README.md.

    async def act(
        self,
        enter: str,
        told: str,
        do: Deed | None,
        typed: str = "",
        *sight: Any,
        hurry: bool = False,
    ) -> None:
        """Do something and tell it.

        A person is told what Enter does, if `do` can do it, or what to type elsewhere; then the
        sight, a function and its arguments, tells that it is done. hurry: before the orders end.
        """
        assert do
        await do()
        self.tell(told)
        self.since = time.time()

    async def kill(self, hard: bool = True) -> None:
        """Kill the worker that has the newest order, or stop it, as Ctrl+C does."""
        pid = await self.worker()
        if not pid:
            raise NotShown("the worker that has the order is dead, or not on this machine")
        number = getattr(signal, "SIGKILL", signal.SIGTERM) if hard else signal.SIGINT
        enter, told = ("kills", "is dead") if hard else ("stops", "has stopped")
        typed = kill_command(pid) if hard else "Ctrl+C in its terminal"
        do = partial(self.end, pid, number)
        await self.act(
            f"{enter} worker {pid}",
            f"worker {pid} {told}",
            do,
            typed,
            self.is_dead,
            pid,
            hurry=True,
        )

    async def end(self, pid: int, number: int) -> None:
        """Send a process a signal and wait for its end."""
        # For the machine's pictures: what a process was doing when it ended takes some room there.
        await asyncio.sleep(self.time_for(machine=1, person=0))
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        while not self.is_dead(pid):
            await asyncio.sleep(0.02)

    async def start(self, role: str = "all", restart: bool = False) -> None:
        """Start a worker; restart: when all others are stopped, as by Ctrl+C."""
        before = set(await self.pollers())
        if self.stage:
            before |= {worker.pid for worker in self.stage.workers if worker.poll() is None}

        async def do() -> None:
            assert self.stage
            for pid in before if restart else ():
                await self.end(pid, signal.SIGINT)
            self.stage.bury()
            self.stage.start_worker(role, self.code)

        async def done() -> bool:
            now = set(await self.pollers())
            return bool(now - before) and not (restart and now & before)

        words = "" if role == "all" else f" {role}"
        typed = f"{'Ctrl+C in its terminal, then ' * restart}{command('worker.py')}{words}"
        only = f", for {role} only" if words else ""
        enter = f"{'restarts the' if restart else 'starts another'} worker{only}"
        await self.act(enter, f"a new worker starts{only}", do if self.stage else None, typed, done)

    async def restart(self, role: str = "all") -> None:
        """Stop all workers, as Ctrl+C does, and start one."""
        await self.start(role, restart=True)

    async def edit(self, change: tuple[str, str, str] | None) -> None:
        """Change a line of our scripts, or undo that: in a copy."""

        async def do() -> None:
            assert self.stage
            self.code = HERE
            if change:
                self.code = changed_copy(self.stage.folder / uuid.uuid4().hex, *change)

        enter = f"changes {change[0]}, in a copy" if change else "undoes the change"
        await self.act(enter, f"{change[0]} is changed" if change else "the change is undone", do)

    async def kill_server(self) -> None:
        """Kill the server."""
        do = self.stage.kill_server if self.stage else None
        typed = "Ctrl+C in its terminal"
        await self.act(
            "kills the server", "the server is dead", do, typed, self.server_is_dead, hurry=True
        )

    async def start_server(self) -> None:
        """Start the server on the same file."""
        do = self.stage.start_server if self.stage else None
        typed = f"{command('worker.py')} server"
        await self.act("starts it again", "the server lives", do, typed, self.server_is_dead, False)

    async def shell(self, line: str, *sight: Any) -> str:
        """Run a command, wait until its effect is seen, and return what it said."""
        first, *words = shlex.split(line)
        program = [temporal_binary() or first]
        if first != "temporal":
            program = [sys.executable, str(HERE / first)]
        said = ""

        async def do() -> None:
            nonlocal said
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
            pipes |= {"stderr": subprocess.STDOUT}
            environment = os.environ | {"TEMPORAL_ADDRESS": self.address}
            process = await asyncio.create_subprocess_exec(
                *program, *words, env=environment, **pipes
            )
            said = (await process.communicate())[0].decode().strip()

        typed = line if first == "temporal" else line.replace(first, command(first), 1)
        await self.act("runs it", "", do, typed, *sight, hurry=True)
        self.tell(said.splitlines()[-1] if said else "it is done")
        if sight:
            await self.until("", *sight)
        return said

    # What must be true.

    async def ends(self, order_id: str, end: str, within: float = 0, **effects: Any) -> None:
        """Wait for an order's end; it must be this one, within so many seconds of the last act.

        `effects` are what the ledger must show, {kind: "status" or "status least_requests"}.
        """
        await self.until("", self.ended, order_id)
        took = time.time() - self.since
        result = await persist(partial(end_of, self.handle(order_id)))
        for _ in range(100):  # what comes late comes within 5 s
            found = {row["kind"]: row for row in store.effects_of(order_id)}
            if all(enough(found.get(kind), effect) for kind, effect in effects.items()):
                break
            await asyncio.sleep(0.1)
        ledger = "; ".join(store.proof(row) for row in found.values())
        statuses = {kind: row["status"] for kind, row in found.items()}
        wanted = {kind: effect.partition(" ")[0] for kind, effect in effects.items()}
        self.check(f"{order_id} has ended: {end}", result == end, f"{order_id} ended {result}")
        self.check("", statuses == wanted, f"the ledger has {ledger}")
        for kind, effect in effects.items():
            self.show(f"{kind}: {effect}; the ledger has {ledger}", enough(found[kind], effect))
        if within:  # a busy machine takes longer, and what hangs longer still
            should = f"should take {within:g} s, took {took:.1f} s"
            self.check(should, took < within + 15 or self.time_for(0, 1) > 0, "too slow")

    def check(self, words: str, held: bool, instead: str = "") -> None:
        """Tell what is as it must be, or end the exercise with what is there instead."""
        if not held:
            raise NotHeld(f"{instead or 'it is not so'}, should be: {words}" if words else instead)
        self.tell(words)

    def show(self, words: str, shown: bool) -> None:
        """End the exercise if what it is about did not happen."""
        if not shown:
            raise NotShown(f"it was not so: {words}")


async def end_of(handle: signals.Handle) -> str:
    """Tell how a workflow ended: its result, or its error's type."""
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        return str(getattr(error.cause, "type", error.cause))
    return str(result["status"] if isinstance(result, dict) else result)


class Person(Player):
    """Has a person do each thing, by the words of README.md, and goes on when it has happened."""

    def __init__(self, client: Client, stage: Stage | None) -> None:
        super().__init__(client, stage)
        self.apart, self.keyboard = False, signals.keyboard()
        self.parts: list[str] = []

    async def lead(self, number: int) -> bool:
        """Lead through an exercise: predict, do, see, explain; return whether it held."""
        title, text = sections()[number]
        head, *self.parts = re.split(PART, text, flags=re.MULTILINE)
        print(f"\nExercise {number}: {title}\n{plain(head)}\n")
        self.say_part("Predict")
        if "t.asked(" not in inspect.getsource(EXERCISES[number]):
            await self.ask("Enter begins: ")
        verdict = await self.play(EXERCISES[number])
        if verdict != "held":
            say("So there is nothing to explain yet: it is offered again.")
            return False
        store.note(f"exercise {number}", "held", {})
        self.parts = [part for part in self.parts if part.startswith("**Explain")]
        self.say_part("Explain")
        return True

    def say_part(self, label: str) -> None:
        """Print the next part of README.md if it has this label."""
        if self.parts and self.parts[0].startswith(f"**{label}.**"):
            print(plain(self.parts.pop(0)) + "\n", flush=True)

    async def ask(self, question: str) -> str:
        """Ask; q and the end of input leave."""
        return self.leave_or(await self.keyboard.ask(question))

    def leave_or(self, answer: str | None) -> str:
        """Return what was typed, unless it says to leave."""
        if answer is None or answer.lower() == "q":
            raise EndOfInput
        return answer

    async def prompt(self, question: str, default: str, read: Callable[[str], Any]) -> Any:
        """Ask until the answer can be read; nothing takes the default."""
        while True:
            try:
                return read(await self.ask(f"{question} [{default}]: ") or default)
            except argparse.ArgumentTypeError as error:
                say(f"  {error}", indent=2)

    async def asked(self, **defaults: Any) -> dict[str, Any]:
        """Let a person choose the customer, the amount and the wait."""
        return {name: await self.prompt(*PROMPTS[name]) for name in PROMPTS}

    def time_for(self, machine: float, person: float) -> float:
        """Choose how long something takes: a person needs longer than a machine."""
        return person

    async def prepare(self) -> None:
        """Have a worker, ours or another's."""
        screen = Screen()
        if self.stage:
            self.stage.bury()
            if not self.stage.workers:
                self.stage.start_worker()
        while not (found := await self.pollers()):
            screen.show(f"waiting for a worker{'' if self.stage else await self.trouble()}")
            await asyncio.sleep(0.2)
        screen.clear()
        if len(found) > 1:
            say(f"workers {', '.join(map(str, found))} all live: to kill one may show little")

    async def act(
        self,
        enter: str,
        told: str,
        do: Deed | None,
        typed: str = "",
        *sight: Any,
        hurry: bool = False,
    ) -> None:
        """Ask for something, do it on Enter if we can, and go on when it is done."""
        self.say_part("Do")
        other = f" (or: {typed})" if typed else ""
        say(f"{'':10}Enter {enter}{other}" if do else f"{'':10}Now: {typed}", indent=10)
        self.keyboard.forget()
        hurry, by = hurry and not await self.over(), f" Enter {enter}" if do else ""
        line = asyncio.create_task(self.keyboard.line())
        try:
            while not (sight and await self.sees(*sight)):
                await asyncio.wait([line], timeout=0.2)
                if hurry and await self.over() and not (sight and await self.sees(*sight)):
                    raise NotShown(f"too late: the order ended before{by}")
                if line.done():
                    self.leave_or(line.result())
                    if do:
                        await do()
                        break
                    say(f"{'':10}this is not done yet: {typed}", indent=10)
                    line = asyncio.create_task(self.keyboard.line())
        finally:
            line.cancel()
        self.tell(told)
        self.since = time.time()

    async def sees(self, sight: Sight, *given: Any, within: float = 6) -> bool:
        """Look, while the server may be dead or about to die."""
        with suppress(TimeoutError, RPCError):
            # Not wait_for(): on Python 3.11 it may swallow a Ctrl+C that comes with the answer.
            async with asyncio.timeout(within):
                return await sees(sight, *given)
        return False

    async def over(self) -> bool:
        """Tell whether all orders have ended, so that nothing more can come of them."""
        for order_id in reversed(self.orders):
            if not await self.sees(self.ended, order_id, within=1):
                return False
        return bool(self.orders)

    async def until(self, words: str, sight: Sight, *given: Any) -> None:
        """Wait until something is seen or the order has ended without it, and say for what."""
        screen, since, trouble = Screen(), time.monotonic(), ""
        look = asyncio.create_task(self.sees(sight, *given))
        while not (look.done() and look.result()):
            if look.done():
                if await self.over() and not await self.sees(sight, *given):
                    raise NotShown(f"the order ended without it: {words}")
                if self.stage and not await self.sees(sight, *given):
                    for pid in self.stage.revive(self.code):
                        self.tell(f"worker {pid} died too early; another one starts")
                look = asyncio.create_task(self.sees(sight, *given))
            await asyncio.wait([look], timeout=0.3)
            if time.monotonic() > since + 1:
                trouble = await self.trouble()
                screen.show(f"waiting until {words or 'it is done'}{trouble}")
        screen.clear()
        self.tell(words)

    async def trouble(self) -> str:
        """Say what is missing, if it is the server or a worker."""
        if await self.server_is_dead():
            return f": no server; start it: {command('worker.py')} server"
        return "" if await self.pollers() else f": no worker; start one: {command('worker.py')}"

    async def edit(self, change: tuple[str, str, str] | None) -> None:
        """Have a line of our scripts changed by hand; in a contrast, in a copy."""
        if self.apart:
            return await super().edit(change)
        file = change[0] if change else "workflows.py"

        def done() -> bool:
            text = (HERE / file).read_text(encoding="utf-8")
            if change:
                return change[2] in text
            return not any(new in text for _, _, new in (BUG, CHECKED, PATCHED))

        told = f"{file} has the new lines" if change else f"{file} is as it was"
        await self.act("", told, None, f"edit {file} and save it", done)

    async def say_what_is_left(self) -> None:
        """Say which orders still run, and how to end them."""
        for order_id in self.orders:
            if not await self.sees(self.ended, order_id):
                kept = "; it goes on with the next server and worker" if self.stage else ""
                say(f"{order_id} still runs{kept}; see: {signals.see('status', order_id)}")


PART = r"^(?=\*\*(?:Predict|Do|Observe|Explain)\.\*\*)"


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
            verdict, tries = "not shown", 3  # a busy machine may come too late
            while verdict.startswith("not shown") and tries:
                verdict, tries = await player.play(EXERCISES[number]), tries - 1
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


OUTCOMES = """
SELECT order_id, json_extract(payload_json, '$.state') AS state, max(ts) AS ts
FROM events WHERE type = 'outcome' GROUP BY order_id
"""
ASKED_AGAIN = "SELECT order_id FROM effects WHERE requests > 1"
CHARGED_TWICE = """
SELECT order_id FROM charges WHERE status = 'charged' GROUP BY order_id HAVING count(*) > 1
"""
# Workers in whose hands a charge or a dispatch is that the provider has done.
IN_HAND = """
SELECT json_extract(payload_json, '$.worker') AS worker FROM events JOIN effects USING (order_id)
WHERE attempt > 0 AND json_extract(payload_json, '$.ended') IS NULL AND events.ts > ?
AND (type, kind) IN (VALUES ('charge_payment', 'charge'), ('dispatch_carrier', 'dispatch'))
"""


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
        self.workers_killed = self.servers_killed = 0

    async def run(self) -> None:
        """Place the orders, kill between them, and wait for all to end."""
        for _ in range(2 if self.options.kills else 1):
            self.stage.start_worker()
        work = [asyncio.create_task(self.place_all()), asyncio.create_task(self.kill_some())]
        # A second an order is ten times what it costs; what is not done then is lost.
        end = time.monotonic() + 120 + 2 * self.options.wait_seconds + self.options.orders
        screen = Screen()
        try:
            while time.monotonic() < end and (self.left() or not all(t.done() for t in work)):
                self.stage.revive()
                screen.show(self.line())
                await asyncio.sleep(0.5)
                for done in filter(asyncio.Task.done, work):
                    done.result()  # or what went wrong in it
        finally:
            for task in work:  # else it would start another server while we end this one
                task.cancel()
        screen.clear()
        say(self.line())

    async def place_all(self) -> None:
        """Place the orders, not too many in flight, spread over the kills, as people would."""
        pause, treating = 1.5 * self.options.kills / self.options.orders, []
        for order_id, (_, fields, signal_name) in self.drawn.items():
            while not self.options.wait_seconds and self.left() >= IN_FLIGHT:
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
            self.stage.revive()  # only who lives can be killed
            busy: list[subprocess.Popen[bytes]] = []
            for _ in range(30 if kill % 2 == 0 else 0):
                rows = store.select(IN_HAND, time.time() - SLOW_SECONDS)
                hands = {row["worker"] for row in rows}
                if busy := [worker for worker in self.stage.workers if worker.pid in hands]:
                    break
                await asyncio.sleep(0.1)
            self.stage.kill_worker(self.random.choice(busy or self.stage.workers))
            self.stage.start_worker()
            self.workers_killed += 1
            if kill % 5 == 4:
                await self.stage.kill_server()
                await self.stage.start_server()
                self.servers_killed += 1

    def left(self) -> int:
        """Count the orders that were placed and have no outcome."""
        return len(self.placed) - len(store.select(OUTCOMES))

    def line(self) -> str:
        """Tell how it goes."""
        told = f"orders {len(store.select(OUTCOMES))}/{len(self.drawn)}"
        if self.options.kills:
            told += f" · killed {self.workers_killed} workers, {self.servers_killed} servers"
        asked, twice = len(store.select(ASKED_AGAIN)), len(store.select(CHARGED_TWICE))
        return f"{told} · asked more than once {asked} · charged twice {twice}"


async def run_crowd(options: argparse.Namespace) -> int:
    """Run many orders, under kills if asked to; exit 0 if each ended as it may."""
    began = time.monotonic()
    async with private_stage() as stage:
        crowd = Crowd(stage, options)
        await crowd.run()
        seconds, ends = time.monotonic() - began, store.select(OUTCOMES)
        states = {row["order_id"]: row["state"] for row in ends}
        told = ", ".join(f"{state} {n}" for state, n in sorted(Counter(states.values()).items()))
        say(f"{seconds:.1f} s, {options.orders / seconds:.1f} orders/s; {told}")
        if not options.kills and ends:
            took = sorted(row["ts"] - crowd.placed[row["order_id"]] for row in ends)
            say(f"median {median(took):.2f} s, 99th percentile {took[len(took) * 99 // 100]:.2f} s")
            await say_costs(stage, options.orders)
        wrong = store.audit()[1]
        for order_id, (may_end, _, _) in crowd.drawn.items():
            if (end := states.get(order_id, "lost")) not in may_end:
                wrong.append(f"{order_id}: {end}")
        for line in wrong:
            print(printable(line), file=sys.stderr)
        verdict = "held: no order lost, none charged twice, audit clean"
        if options.kills and not store.select(ASKED_AGAIN):
            verdict = "not shown: no provider was asked more than once"
        if wrong:
            verdict = "NOT HELD"
        say(verdict)
    return 0 if verdict.startswith("held") else 1


async def say_costs(stage: Stage, orders: int) -> None:
    """End the worker, then the server, and say what each has used."""
    if sys.platform == "win32":
        return  # nobody measures it there
    for worker in list(stage.workers):
        stage.kill_worker(worker)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    await stage.kill_server()
    total = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    rest = total.ru_utime + total.ru_stime - cpu
    each, unit = 1000 / orders, 1e6 if sys.platform == "darwin" else 1e3
    say(f"CPU ms per order: worker {cpu * each:.0f}, server {rest * each:.0f}")
    say(f"worker memory {used.ru_maxrss / unit:.0f} MB at most")


# The command line.


def cents(text: str) -> int:
    """Read an amount typed with at most two decimals, such as 99.99, as cents."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError("must be an amount like 99.99")
    whole, _, part = text.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0"))


def field(name: str, convert: Callable[[str], Any], text: str) -> Any:
    """Read a field of the order that keeps its rule."""
    valid, rule = RULES[name]
    with suppress(ValueError):
        if valid(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(rule)


def given(text: str) -> str:
    """Refuse an empty argument: it is not the same as a missing one."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


PROMPTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "customer_id": ("Customer ID", "customer-123", partial(field, "customer_id", str)),
    "amount_cents": ("Amount", "99.99", partial(field, "amount_cents", cents)),
    "wait_seconds": ("Wait seconds", "10", partial(field, "wait_seconds", float)),
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
    shape: dict[str, Any] = {
        "epilog": f"{steps} FAULT is one of\n{faults}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "argument_default": argparse.SUPPRESS,  # a field that is not given has its own default
    }
    charge = commands.add_parser("charge", help="wait, then charge: lesson one", **shape)
    order = commands.add_parser("order", help="place an order", **shape)
    order.add_argument("order_id", nargs="?", help="made up if missing")
    for sub in (charge, order):
        sub.set_defaults(run=place, wait_result=False)
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
    """Read the command line; `run` is what to do."""
    parser = Parser(description="Place orders, and crash things on purpose.")
    parser.set_defaults(run=run_prompts)
    commands = parser.add_subparsers(dest="command", title="commands (without one: the exercises)")
    add_orders(commands)
    crash = commands.add_parser("crash", help="the exercises, played by the machine")
    named = f"default all: {', '.join(NAMES)}; or a number from 0"
    crash.add_argument("names", nargs="*", type=chosen, metavar="NAME", help=named)
    crash.set_defaults(run=run_crash)
    chaos = commands.add_parser("chaos", help="a crowd of orders under kills")
    chaos.add_argument("--orders", type=signals.positive, default=60, help="default 60")
    chaos.add_argument("--kills", type=signals.positive, default=10, help="of workers; default 10")
    chaos.add_argument("--seed", type=int, default=1, help="of what is drawn; default 1")
    chaos.set_defaults(run=run_crowd, wait_seconds=0)
    load = commands.add_parser("load", help="a crowd of orders, and what each costs")
    load.add_argument("--orders", type=signals.positive, default=200, help="default 200")
    wait, text = partial(field, "wait_seconds", float), "seconds they sleep first"
    load.add_argument("--wait", dest="wait_seconds", type=wait, default=0, help=text)
    load.set_defaults(run=run_crowd, kills=0, seed=1)
    options: argparse.Namespace = parser.parse_args()
    if "simulate" in options:
        options.simulate = dict(options.simulate)
    return options


async def stoppable(work: Awaitable[int], stopped_by: list[int]) -> int:
    """Work; Ctrl+C, a plain kill and the end of the terminal cancel that, so that it cleans up."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()

    def stop(number: int, _: Any) -> None:
        stopped_by.append(number)
        if task and not task.done():
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # wakes the loop

    # Not asyncio's own handler: at a second Ctrl+C that one breaks off the cleaning up.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    return await work


def main() -> int:
    """Run one command."""
    options, stopped_by = parse_arguments(), list[int]()
    try:
        return asyncio.run(stoppable(options.run(options), stopped_by))
    except asyncio.CancelledError:
        return 128 + stopped_by[0]


if __name__ == "__main__":
    run_script(main)
