"""The starter: places orders, and plays the exercises, in which things are crashed on purpose.

Each exercise is a function that reads as a script. The machine plays it (`crash`), or a person
does, by the words of README.md (without arguments). `chaos` and `load` place a crowd of orders.
"""

import argparse
import asyncio
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from secrets import token_hex
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":  # Ctrl+C in the second of imports that follows: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

import charge_store as store
import signals
import worker
from activities import FAULTS, RULES, SLOW_SECONDS, STEPS, number, parse_order
from charge_store import say
from signals import Keyboard, Screen, end_of, positive, take
from worker import HERE, Stage, command, is_process
from workflows import ORDERS_QUEUE

# One order or charge.


def charge_id(raw: dict[str, Any]) -> str:
    """Name a charge by what is asked for, so that the same request is the same workflow."""
    return f"charge-{raw.get('customer_id', 'customer-123')}-{raw.get('amount_cents', 9999)}"


async def place(options: argparse.Namespace) -> None:
    """Start the workflow, or attach to it if it runs already, and follow it if asked to."""
    raw = {name: value for name, value in vars(options).items() if name in RULES}
    if "simulate" in raw:
        pairs = [pair.partition("=") for pair in raw["simulate"]]
        raw["simulate"] = {step: fault for step, _, fault in pairs}
    alone = options.command == "charge"
    if alone:
        raw |= {"order_id": charge_id(raw), "max_attempts": 0}
    raw.setdefault("order_id", f"order-{token_hex(4)}")
    try:
        order = parse_order(raw, raw["order_id"], charge=alone)
    except ApplicationError as error:
        print(f"starter.py: {error.message}", file=sys.stderr)
        sys.exit(2)
    async with temporal(quiet=False) as stage:
        client = stage.client
        handle = client.get_workflow_handle(order.order_id)
        try:
            await start(client, raw)
            say(f"{order.order_id} started: {order.customer_id}, {order.amount_cents / 100:.2f}")
        except WorkflowAlreadyStartedError:
            if (await handle.describe()).status != signals.RUNNING:
                see = signals.see("events", order.order_id)
                sys.exit(f"{order.order_id} has finished already: nothing was started; see: {see}")
            say(f"{order.order_id} is running already: attached to it, nothing was started")
        page = f"namespaces/{client.namespace}/workflows/{order.order_id}"
        say(f"see it: {worker.web_ui(stage.address)}/{page}")
        if stage.server or options.wait_result:
            await signals.follow(client, order.order_id, stage.revive if stage.server else None)
        else:
            say((await signals.picture(handle))[0])


async def start(client: Client, raw: dict[str, Any], **options: Any) -> None:
    """Start a workflow on an order. An order id is used once; a charge may be asked for again."""
    kind, policy = "OrderWorkflow", WorkflowIDReusePolicy.REJECT_DUPLICATE
    if raw["order_id"].startswith("charge-"):  # which no order's does
        kind, policy = "ChargeWorkflow", WorkflowIDReusePolicy.ALLOW_DUPLICATE
    options |= {"id": raw["order_id"], "task_queue": ORDERS_QUEUE, "id_reuse_policy": policy}
    await client.start_workflow(kind, raw, **options)


@asynccontextmanager
async def temporal(quiet: bool) -> AsyncIterator[Stage]:
    """Use the server that is there; if none was configured and none is there, bring up our own.

    quiet: our worker's lines go to a file and not to the screen.
    """
    address = worker.DEFAULT_ADDRESS
    if worker.client_config() or await worker.is_listening(address):
        client = await worker.connect()
        stage = Stage(HERE, client.service_client.config.target_host)
        stage.client = client
        yield stage
        return
    with TemporaryDirectory(prefix="orders-", ignore_cleanup_errors=True) as folder:
        logs = Path(folder) / "workers.log" if quiet else None
        with closing(Stage(HERE, address, logs)) as stage:
            say(f"no server at {address}: starting one, and a worker, while this runs")
            await stage.start_server()
            say(f"unfinished orders stay in {worker.nearby(HERE / 'temporal.db')}")
            stage.start_worker()
            yield stage


# The exercises. `t` is the player, the machine or a person; README.md has the words for a person,
# a **Do.** for each act: kill, start, edit, shell, send, kill_server, start_server.

SLOW = {"charge_payment": "slow"}
# What the ledger must have at an order's end.
CHARGED, RELEASED = ["charge charged"], ["reservation released", "dispatch voided"]
ONCE = ["charge charged", "reservation reserved", "dispatch dispatched"]
VOIDED, REFUNDED = [*RELEASED, "charge voided"], [*RELEASED, "charge refunded"]
PATIENT: dict[str, Any] = {"deadline_seconds": 600, "max_attempts": 0}
PATIENT |= {"review": "timer", "review_seconds": 0.1}
# A workflow task that fails is tried again when its time is over: 10 s, if nothing else is said.
BRIEF = {"task_timeout": timedelta(seconds=1)}
# Edits, in the words of README.md: a file, a line in it, and what shall stand there instead.
Edit = tuple[str, str, str]
REVIEW = "            state = await self._review()\n"
CHECK = '            await self._do(step.validate_order, "VALIDATING")\n'
ENTER = '        self._enter("AWAITING_REVIEW")\n'
BUG = ("workflows.py", ENTER, '        raise RuntimeError("a bug")\n' + ENTER)
CHECKED = ("workflows.py", REVIEW, CHECK + REVIEW)
PATCH = '            if workflow.patched("check again"):\n'
PATCHED = ("workflows.py", REVIEW, f"{PATCH}    {CHECK}{REVIEW}")
AS_IT_WAS = ("workflows.py", "", "")
KEY = 'perform(order, "charge", order.payment_id)'
NO_KEY = ("activities.py", KEY, KEY[:-1] + ' + f"-{activity.info().attempt}")')


async def no_temporal(t: "Player") -> None:
    """The contrast, a plain background job: charged twice, and a waiting order lost."""
    order, other = f"job-{token_hex(4)}", f"job-{token_hex(4)}"
    charging, waiting = plain_job(t.stage, order, 0), plain_job(t.stage, other, 3)
    await t.until("the provider has charged; its answer is on the way", charged, order)
    charging.kill()
    waiting.kill()
    t.tell(f"jobs {charging.pid}, charging, and {waiting.pid}, waiting, die")
    again = plain_job(t.stage, order, 0)
    t.tell(f"the queue delivers the job again that nobody noted as done, to {again.pid}")
    await t.until("that job is done", lambda: again.poll() is not None)
    t.check(len(store.effects_of(order)), 2, "charged twice")
    t.check(len(store.effects_of(other)), 0, "the waiting order is lost")


async def timer(t: "Player") -> None:
    """A durable wait keeps its deadline while no worker lives."""
    asked = {name: await t.keyboard.ask(*PROMPTS[name]) for name in PROMPTS if t.keyboard}
    asked = {"wait_seconds": 5} | asked
    order = await t.charge(**asked)
    await t.until("the wait has begun", t.in_history, order, "Wait before the charge")
    await t.kill()
    await t.start()
    started = t.since
    await t.ends(order, "charged", CHARGED)
    begin, end = await t.in_history(order, "Wait before the charge")
    t.show(started < end, "the wait was over before another worker was started")
    should, took = asked["wait_seconds"], end - begin
    if took > should + 1.5:
        raise Verdict(f"NOT HELD: the wait took {took:.1f} s, should be {should:g} s")
    t.tell(f"the wait should take {should:g} s, took {took:.1f} s")


async def charge(t: "Player") -> None:
    """A worker ends in the middle of a charge, by Ctrl+C and by kill -9: charged once."""
    for hard in (False, True):
        if hard and t.keyboard:
            await t.keyboard.ask("Enter places a second charge")
        order = await t.charge(simulate=SLOW)
        await t.until("the provider has charged; its answer, 5 s, is on the way", charged, order)
        await t.kill(hard)
        await t.start()
        await t.until("attempt 2; the provider knows the key", begun, order, "charge_payment", 2)
        # Only an attempt that is told to stop can note its end.
        told = "ended" in store.events_of(order, "charge_payment")[0]
        way = "kill -9" if hard else "Ctrl+C"
        t.show(told is not hard or os.name == "nt", f"the worker did not end by {way}")
        await t.ends(order, "charged", CHARGED, within=6.5, charge=2)


async def approve(t: "Player") -> None:
    """An order waits for a person, and goes on at the approval."""
    order = await t.place_for_review()
    await t.send("approve", order, "--note 'looks good'")
    await t.ends(order, "COMPLETED", ONCE, within=2)


async def outage(t: "Player") -> None:
    """An outage that ends costs tenths of a second; one that does not undoes the order."""
    order = await t.place(simulate={"charge_payment": "flaky"})
    await t.ends(order, "COMPLETED", ONCE, within=1.5)
    # A busy machine may miss a heartbeat and take one more.
    t.check(min(3, store.count(order, "charge_payment")), 3, "attempts 3")
    order = await t.place(simulate={"charge_payment": "down"}, max_attempts=3)
    await t.ends(order, "OrderGivenUp", VOIDED, within=1.5)
    t.check(store.count(order, "charge_payment"), 3, "attempts 3")


async def card(t: "Player") -> None:
    """A refusal is an answer: the charge is tried once, and what was begun is undone."""
    order = await t.place(card_expiry="12/23")
    await t.ends(order, "PaymentDeclined", VOIDED, within=1)
    t.check(store.count(order, "charge_payment"), 1, "attempts 1")


async def nobody(t: "Player") -> None:
    """Nobody approves: the review's window closes, and the goods are released."""
    seconds = 10 if t.keyboard else 1  # a person needs longer than a machine
    order = await t.place(review="person", review_seconds=seconds)
    await t.ends(order, "EXPIRED", RELEASED, within=seconds + 1)


async def address(t: "Player") -> None:
    """A change of address or a cancel comes in time or too late; the order says which."""
    order = await t.place_for_review(simulate={"prepare_package": "slow"})
    change = f"signals.py update-address {order}"
    await t.shell(f"{change} '2 Side Street'", begun, order, "update_address")
    await t.send("approve", order)
    await t.until("it is packed, which takes 5 s", begun, order, "prepare_package")
    said = await t.shell(f"{change} '3 Late Street'")
    t.show("too late, the order is SHIPPING" in said, f"the second change: {said}")
    await t.ends(order, "COMPLETED", ONCE, within=6)
    changes = [event["address"] for event in store.events_of(order, "update_address")]
    t.show(changes == ["2 Side Street"], f"it was changed to {changes}")
    sent = store.events_of(order, "dispatch_carrier")[0]
    t.check(sent["address"], changes[0], "sent to 2 Side Street")
    order = await t.place_for_review()
    await t.send("cancel", order, "--reason 'changed my mind'")
    await t.ends(order, "CANCELLED", RELEASED, within=1)


async def shipping(t: "Player") -> None:
    """Without a shipping worker paid orders wait; a carrier that is down undoes its order."""
    await t.kill(hard=False)
    await t.start("orders")
    order = await t.place()
    await t.until("the order is paid; its package waits", t.in_history, order, "ship-")
    await t.start("shipping")
    await t.ends(order, "COMPLETED", ONCE, within=2)
    order = await t.place(simulate={"dispatch_carrier": "down"}, max_attempts=3)
    await t.ends(order, "OrderGivenUp", REFUNDED, within=6)
    t.check(store.count(order, "dispatch_carrier"), 9, "attempts 9, in three tries")


async def bug(t: "Player") -> None:
    """A workflow meets a bug: the order waits, and goes on when the bug is mended."""
    await t.edit(BUG)
    order = await t.place(options=BRIEF)
    await t.until("the workflow task fails and is tried again", t.in_history, order, "a bug")
    await t.edit(AS_IT_WAS)
    await t.ends(order, "COMPLETED", ONCE, within=2)


async def server(t: "Player") -> None:
    """The Temporal server dies in the middle of a wait and a charge, and forgets nothing."""
    seconds = 15 if t.keyboard else 3
    waiting = await t.place(wait_seconds=seconds)
    due = t.since + seconds
    charging = await t.place(simulate=SLOW)
    await t.until("one order waits, one is being charged", charged, charging)
    await t.kill_server()
    await t.start_server()
    # An answer that met no server is asked for again.
    await t.ends(charging, "COMPLETED", ONCE, within=15)
    await t.ends(waiting, "COMPLETED", ONCE, within=max(15, round(due - t.since + 1)))
    workers = {event["worker"] for event in store.events_of(charging, "charge_payment")}
    t.show(len(workers) == 1, f"it was not the same worker all along: {workers}")


async def deploy(t: "Player") -> None:
    """Changed code must fit the histories of running orders; `patched` makes it fit."""
    order = await t.place_for_review(options=BRIEF)
    await t.edit(CHECKED)
    await t.kill(hard=False)
    await t.start()
    await t.send("approve", order)
    await t.until("the new code does not fit the history", t.in_history, order, "Nondeterminism")
    await t.edit(PATCHED)
    await t.ends(order, "COMPLETED", ONCE, within=2)
    await t.edit(AS_IT_WAS)


async def reset(t: "Player") -> None:
    """A reset runs an order again from its beginning: nothing is charged or sent twice."""
    back = "temporal workflow reset --type FirstWorkflowTask --reason lesson --workflow-id"
    order = await t.place()
    await t.ends(order, "COMPLETED", ONCE)
    await t.shell(f"{back} {order}", begun, order, "receive_order", 2)
    await t.ends(order, "COMPLETED", ONCE, within=2, charge=2, reservation=2, dispatch=2)
    order = await t.place_for_review()
    await t.send("approve", order)
    await t.ends(order, "COMPLETED", ONCE)
    again = f"{back} {order} --reapply-exclude Signal"
    await t.shell(again, begun, order, "receive_order", 2)
    await t.until("it waits for you once more", t.in_history, order, "Review by person")
    await t.send("cancel", order)
    await t.ends(order, "COMPLETED", ONCE, within=2)


async def late(t: "Player") -> None:
    """A charge or a dispatch that arrives after its order was given up is refused."""
    orders = []
    for step in ("dispatch_carrier", "charge_payment"):  # the one that takes longer to come to it
        orders.append((await t.place(simulate={step: "late"}), step))
        await t.until(f"{step}, 5 s late, is on its way", begun, *orders[-1])
    for order, step in orders:
        await t.send("cancel", order)
        t.show("ended" not in store.events_of(order, step)[0], "it arrived before the cancel")
    (shipping, _), (charging, _) = orders
    await t.ends(shipping, "CANCELLED", REFUNDED, within=6, dispatch=1)
    await t.ends(charging, "CANCELLED", VOIDED, within=6, charge=1)


async def points(t: "Player") -> None:
    """A worker dies before the charge, after it, after the dispatch: it does not matter where."""
    for step, fault, asked in (
        ("charge_payment", "crash-before", {}),
        ("charge_payment", "crash-after", {"charge": 2}),
        ("dispatch_carrier", "crash-after", {"dispatch": 2}),
    ):
        order = await t.place(simulate={step: fault})
        await t.until(f"the worker has died: {fault} of {step}", died, order, step)
        await t.start()
        await t.ends(order, "COMPLETED", ONCE, within=4, **asked)
        t.show(store.count(order, step) >= 2, "there was no second attempt")


async def no_key(t: "Player") -> None:
    """The contrast, exercise 2 with a key that changes on each attempt: charged twice."""
    await t.edit(NO_KEY)
    await t.kill(hard=False)
    await t.start()
    order = await t.place(simulate=SLOW)
    await t.until("the provider has charged; its answer, 5 s, is on the way", charged, order)
    await t.kill()
    await t.start()
    await t.until("attempt 2, with another key", begun, order, "charge_payment", 2)
    await t.ends(order, "COMPLETED", ONCE + CHARGED, within=7.5)
    t.tell("charged twice")


Exercise = Callable[["Player"], Awaitable[None]]
EXERCISES: list[Exercise] = [
    *(no_temporal, timer, charge, approve, outage, card, nobody, address),
    *(shipping, bug, server, deploy, reset, late, points, no_key),
]
CONTRASTS = (no_temporal, no_key)  # never in a person's own ledger, as they charge twice
NAMES = [exercise.__name__.replace("_", "-") for exercise in EXERCISES]

JOB = """
import sys, time, uuid, charge_store
time.sleep({wait})
key = uuid.uuid4().hex  # made up at each delivery: there is nowhere to remember it
charge_store.perform("charge", key, "{order_id}", "customer-123", 9999)
time.sleep({slow})  # the provider's answer is on the way
"""


def plain_job(stage: Stage, order_id: str, wait: float) -> subprocess.Popen[bytes]:
    """Do an order as a background job without Temporal: all it knows is in its memory."""
    code = JOB.format(order_id=order_id, wait=wait, slow=SLOW_SECONDS)
    job = worker.start_apart([sys.executable, "-c", code], cwd=HERE)
    stage.workers.append(job)  # it does not outlive the stage
    return job


# What can be seen in the ledger and in the scripts.


def charged(order_id: str) -> bool:
    """Tell whether the provider has charged."""
    return any(row["kind"] == "charge" for row in store.effects_of(order_id))


def begun(order_id: str, type_: str, times: int = 1) -> bool:
    """Tell whether so many attempts at a step have begun, or so many messages have come."""
    return store.count(order_id, type_) >= times


def died(order_id: str, step: str) -> bool:
    """Tell whether the process of the newest attempt at a step is dead."""
    return any(not is_process(event["worker"]) for event in store.events_of(order_id, step)[-1:])


def edited(folder: Path, change: Edit) -> bool:
    """Tell whether the workflows.py there is as an edit makes it."""
    script = (folder / "workflows.py").read_text(encoding="utf-8")
    if change == AS_IT_WAS:
        left = any(text in script for text in (BUG[2], CHECKED[2], PATCH.strip()))
        return not left and ENTER in script and REVIEW in script
    return change[2] in script


# The player.


class Verdict(Exception):
    """Something is not as it must be, or what the exercise is about did not happen."""


Sight = Callable[..., Any]  # tells, perhaps only when awaited, whether something is to be seen


class Player:
    """Plays exercises and tells what happens: unattended, or for a person at the keyboard."""

    def __init__(self, stage: Stage, keyboard: Keyboard | None = None) -> None:
        self.stage, self.keyboard = stage, keyboard
        self.parts: list[str] = []  # what README.md has a person do, act by act
        self.orders: list[str] = []  # what the exercise placed
        self.running: set[str] = set()  # of these, and of earlier ones, what has not ended
        self.since = time.time()  # the last act
        self.screen = Screen()  # which has the exercise's clock

    async def play(self, exercise: Exercise, seconds: float | None = None) -> str:
        """Play an exercise; return `held`, `not shown: ...` or `NOT HELD: ...`."""
        self.orders, self.screen, verdict = [], Screen(), "held"
        if exercise in CONTRASTS and self.stage.folder == HERE:
            async with worker.private_stage() as apart:
                player = Player(apart, self.keyboard)
                player.parts = self.parts
                return await player.play(exercise)
        try:
            async with asyncio.timeout(seconds):
                await self.prepare()
                await exercise(self)
        except Verdict as error:
            verdict = str(error)
        except TimeoutError:
            verdict = "NOT HELD: not done in time"
        except RPCError as error:
            verdict = f"not shown: {error}"
        self.screen.clear()
        if self.orders and exercise not in CONTRASTS:
            wrong = [line for line in store.audit()[1] if line.split()[0] in self.orders]
            if wrong:
                verdict = f"NOT HELD: {'; '.join([*wrong, verdict])}"
            elif verdict == "held":
                self.tell("audit clean")
        with suppress(TimeoutError, RPCError):
            async with asyncio.timeout(20):
                for order_id in () if await self.server_is_dead() else self.orders:
                    print()
                    say(order_id)
                    await signals.show_lanes(self.handle(order_id))
        say(verdict)
        return verdict

    async def prepare(self) -> None:
        """Have one worker; on a stage of ours a new one, of a copy of our scripts, to be edited."""
        if self.stage.server:
            for process in self.stage.workers:
                self.stage.kill_worker(process)
            if await self.server_is_dead():
                await self.stage.start_server()
            assert self.stage.logs
            self.stage.code = self.stage.logs.with_name("code")
            self.stage.code.mkdir(exist_ok=True)
            for script in HERE.glob("*.py"):
                shutil.copy2(script, self.stage.code)
            await self.expect_alone()
            self.stage.start_worker()
        # One that was killed a moment ago could be given the next task; it would take 10 s to see.
        await self.until("a worker is there", self.served)

    async def expect_alone(self, role: str = "all") -> None:
        """Look, before we start a worker, whether one serves; then no death would show anything."""
        queues = worker.ROLES[role]
        others = ", ".join(map(str, await self.pollers(*queues)))
        serves = f"serves {' and '.join(queues)} too: stop it"
        self.show(not others, f"worker {others}, which nobody thought of, {serves}")

    def tell(self, words: str) -> None:
        """Print what happens, with the seconds since the exercise began."""
        self.screen.clear()  # of what a person is told to wait for
        say(f"{time.monotonic() - self.screen.started:6.1f} s  {words}", indent=10)

    def note(self, type_: str, **payload: Any) -> None:
        """Note for the picture what befell the orders that have not ended."""
        for order_id in self.running:
            store.note(order_id, type_, payload)

    # What an exercise places.

    async def place(self, options: dict[str, Any] | None = None, **fields: Any) -> str:
        """Place an order and return its id."""
        raw = PATIENT | {"order_id": f"order-{token_hex(4)}"} | fields
        await start(self.stage.client, raw, **options or {})
        order_id = str(raw["order_id"])
        self.orders.append(order_id)
        self.running.add(order_id)
        self.did(f"{order_id} is placed")
        return order_id

    async def place_for_review(self, **fields: Any) -> str:
        """Place an order that waits for a person."""
        order = await self.place(review="person", review_seconds=600, **fields)
        await self.until("the order waits for you", self.in_history, order, "Review by person")
        return order

    async def charge(self, **fields: Any) -> str:
        """Place a charge alone, lesson one; to ask for the same again would be the same charge."""
        fields = {"amount_cents": 9999} | fields
        wanted = charge_id(fields)
        while True:
            order_id = charge_id(fields)
            if not store.effects_of(order_id):
                with suppress(WorkflowAlreadyStartedError):  # by another starter, or long ago
                    return await self.place(order_id=order_id, **fields)
            if order_id == wanted:
                self.tell(f"{wanted} exists, and would be no new charge: this one is a cent more")
            # After the most that a charge may be, the least.
            fields["amount_cents"] = fields["amount_cents"] % 100_000_000 + 1

    # What is seen.

    async def until(self, words: str, sight: Sight, *given: Any) -> Any:
        """Wait until something is seen, tell it and return it. Not after the orders' end."""
        patience = time.monotonic() + 1.5  # a server that has just started lists no workers yet
        while True:
            over = await self.over()  # asked first: a look after that sees all there will be
            if seen := await self.sees(sight, *given):
                self.tell(words)
                return seen
            self.show(not over, f"{over} without it: {words}")
            if any(process.poll() in (1, 2) for process in self.stage.workers):
                raise Verdict(f"not shown: no worker can start: {self.stage.last_words()}")
            if self.keyboard:
                await self.keyboard.overhear()
            if time.monotonic() > patience:
                self.screen.show(await self.trouble() or f"waiting until {words}")
            await asyncio.sleep(0.1)

    async def trouble(self) -> str:
        """Say what is missing: the server, a worker, or code that works."""
        hint = f"; start it: {command('worker.py')}"
        if self.stage.folder != HERE:  # there only we start anything
            return ""
        if await self.server_is_dead():
            return f"no server{hint} server"
        starting = any(process.poll() is None for process in self.stage.workers)
        if not starting and not await self.pollers(*worker.ROLES["all"]):
            return f"no worker{hint}"
        # In exercise 8 none ships, on purpose.
        for queue in () if starting else worker.ROLES["orders" if self.orders else "all"]:
            if not await self.pollers(queue):
                return f"no worker serves {queue}{hint} {queue.removesuffix('-tq')}"
        for order_id in self.orders:
            if why := await self.sees(signals.code_failure, self.handle(order_id)):
                return f"the workflow's code fails: {why}"
        return ""

    async def sees(self, sight: Sight, *given: Any) -> Any:
        """Look, while the server may be dead or about to die; return what there is to see."""
        with suppress(OSError, RPCError):  # it takes too long; a file is being saved
            # On Windows each worker that is listed takes a command to look at.
            async with asyncio.timeout(3 if os.name == "nt" else 1.5):
                seen = sight(*given)
                return await seen if asyncio.iscoroutine(seen) else seen
        return None

    async def over(self) -> str:
        """Tell how the newest order ended, if all have, so that nothing more can come of them."""
        if not self.orders or await self.server_is_dead():  # to see that would take 1.5 s
            return ""
        ends = [await self.sees(self.end_of, order_id) for order_id in self.orders]
        return f"{self.orders[-1]} ended {ends[-1]}" if all(ends) else ""

    def handle(self, order_id: str) -> signals.Handle:
        """Get at an order's newest run."""
        return self.stage.client.get_workflow_handle(order_id)

    async def end_of(self, order_id: str) -> str:
        """Tell how an order ended; nothing while it runs."""
        try:
            status = (await self.handle(order_id).describe()).status
        except RPCError as error:
            known = error.status != RPCStatusCode.NOT_FOUND
            self.show(known, f"the server does not know {order_id}: is it on another file?")
            raise
        if status == signals.RUNNING:
            self.running.add(order_id)  # once more, after a reset
            return ""
        self.running.discard(order_id)
        return await end_of(self.handle(order_id))

    async def in_history(self, order_id: str, words: str) -> list[float]:
        """Find when events came of which `signals.py history` tells these words, as Unix times."""
        events = await signals.read_history(self.handle(order_id))
        told = [(e.at, signals.SENTENCES[e.kind](e)) for e in events if e.kind in signals.SENTENCES]
        return [at for at, sentence in told if words in sentence]

    async def server_is_dead(self) -> bool:
        """Tell whether nothing listens where the server was."""
        return not await worker.is_listening(self.stage.address)

    async def pollers(self, *queues: str) -> list[int]:
        """List the living processes on this machine that ask for work; empty without a server.

        The server lists dead ones too, for over a minute: its list alone is no proof of life.
        """
        client, found = self.stage.client, set[int]()
        describe = client.workflow_service.describe_task_queue
        here = client.identity.partition("@")[2]  # who asks is called pid@machine, as we are
        for queue in queues:
            task_queue = TaskQueue(name=queue)
            request = DescribeTaskQueueRequest(namespace=client.namespace, task_queue=task_queue)
            with suppress(RPCError):
                answer = await describe(request, timeout=signals.RPC_TIMEOUT)
                names = [poller.identity.partition("@") for poller in answer.pollers]
                found |= {int(pid) for pid, _, host in names if host == here and pid.isdigit()}
        return sorted(pid for pid in found if is_process(pid))

    async def served(self, role: str = "all") -> bool:
        """Tell whether each task queue of a role has a worker."""
        return all([await self.pollers(queue) for queue in worker.ROLES[role]])

    # What is done. Each act asks for its turn, which is one **Do.** of README.md.

    async def turn(
        self, what: str, done: Sight, *given: Any, typed: str = "", hands: bool = False
    ) -> bool:
        """Tell whether an act is ours to do: it is the machine's always, for a person at Enter.

        False once it is seen done elsewhere, as by what may be typed there. `hands`: it must be
        done there, if the stage is not ours.
        """
        if not self.keyboard:
            return True
        if self.stage.server and hands:
            hands, typed = False, ""
        # This Do., without what it says of three terminals where one is enough.
        elsewhere = r"\s*With\s+three\s+terminals:.*" if self.stage.server else "$"
        print(re.sub(elsewhere, "", self.parts.pop(0), flags=re.DOTALL))
        told = f"{'':10}{'Now' if hands else 'Enter to'} {what}"
        await self.keyboard.overhear()
        say(f"{told}: {typed}" if typed else told)
        hurry = not await self.over()  # before the orders end
        while True:
            over = hurry and await self.over()
            if await self.sees(done, *given):
                return False
            self.show(not over, f"too late: {over} before that")
            if await self.keyboard.line(0.2) is not None:
                if not hands:
                    return True
                self.tell(f"not done yet: {what}")

    def did(self, words: str) -> None:
        """Tell what was done; what should follow is timed from here."""
        self.tell(words)
        self.since = time.time()

    async def kill(self, hard: bool = True) -> None:
        """Kill the worker that serves orders, or stop it, as Ctrl+C does."""
        pids = await self.pollers(ORDERS_QUEUE)
        self.show(bool(pids), "the worker is dead already, or not on this machine")
        pid = min(pids, default=0)
        does, is_now = ("kill", "is dead") if hard else ("stop", "has stopped")
        typed = worker.kill_command(pid) if hard else f"kill -INT {pid}"
        if await self.turn(f"{does} worker {pid}, or", lambda: not is_process(pid), typed=typed):
            if not self.keyboard:  # what it was doing takes some room in the picture
                await asyncio.sleep(1)
            with suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM) if hard else signal.SIGINT)
                if hasattr(signal, "SIGCONT"):  # Ctrl+Z has only halted it
                    os.kill(pid, signal.SIGCONT)
            while is_process(pid):
                await asyncio.sleep(0.02)
        self.did(f"worker {pid} {is_now}")
        self.note("killed" if hard else "stopped", worker=pid)

    async def start(self, role: str = "all") -> None:
        """Start a worker, of all task queues or one, which nobody serves yet."""
        # Before one for orders only as well: a stray shipper would show itself too late.
        await self.expect_alone("all" if role == "orders" else role)
        what = "start another worker" if role == "all" else f"start a worker for {role} only"
        typed = f"{command('worker.py')} {role}".removesuffix(" all")
        if await self.turn(what, self.served, role, typed=typed, hands=True):
            self.stage.start_worker(role)
        self.did("a new worker starts")

    async def edit(self, change: Edit) -> None:
        """Change a line of our scripts: in the copy that our worker runs, or by hand."""
        file, text, instead = change
        which = f"a copy of {file}" if self.stage.server else file
        what = f"change {which}" if instead else f"undo the change of {which}"
        if await self.turn(what, edited, self.stage.code, change, hands=True):
            source = (HERE / file).read_text(encoding="utf-8")
            (self.stage.code / file).write_text(source.replace(text, instead), encoding="utf-8")
        self.did(f"done: {what}")

    async def kill_server(self) -> None:
        """Kill the server."""
        if await self.turn("kill the server", self.server_is_dead, hands=True):
            self.stage.kill_server()
        self.did("the server is dead; the worker keeps asking")
        self.note("server", state="dead")
        if not self.keyboard:  # so that the outage takes some room in the picture
            await asyncio.sleep(1)

    async def start_server(self) -> None:
        """Start the server on the same file."""
        seen, typed = partial(worker.is_listening, self.stage.address), command("worker.py")
        if await self.turn("start it again", seen, typed=f"{typed} server", hands=True):
            await self.stage.start_server()
        self.did("the server lives")
        self.note("server", state="lives")

    async def send(self, verb: str, order_id: str, more: str = "") -> None:
        """Send an order a signal."""
        line = f"signals.py {verb} {order_id} {more}".strip()
        await self.shell(line, self.in_history, order_id, f"signal {verb} comes")

    async def shell(self, line: str, sight: Sight | None = None, *given: Any) -> str:
        """Run a command and return what it said; the sight tells if it was run elsewhere.

        A refusal has no sight: nobody sees it but who is refused.
        """
        first, *words = shlex.split(line)
        program, typed = [sys.executable, str(HERE / first)], line.replace(first, command(first), 1)
        if first == "temporal":
            program, typed = [worker.temporal_binary()], line
        said = "it is done"
        if await self.turn("run this", sight or (lambda: False), *given, typed=typed):
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            environment = self.stage.environment() if self.stage.server else None
            program += words
            process = await asyncio.create_subprocess_exec(*program, env=environment, **pipes)
            said = (await process.communicate())[0].decode().strip() or said
            self.show(not sight or process.returncode == 0, said)
        self.did(said.splitlines()[-1])
        return said

    # What must be true.

    async def ends(
        self, order_id: str, end: str, effects: list[str], within: float = 0, **asked: int
    ) -> None:
        """Wait for an order's end and its ledger; both must be so within seconds of the last act.

        `effects` are what the ledger must show, `asked` the least requests of a kind.
        """
        should = f", which should take {within:g} s" if within else ""
        result = await self.until(f"{order_id} has ended{should}", self.end_of, order_id)
        known = any(event["attempt"] for event in store.events_of(order_id))
        self.show(known, f"{store.store_path()} does not know {order_id}: which has the worker?")
        for _ in range(100):  # 10 s: what comes late comes within 5
            rows = store.effects_of(order_id)
            fit = sorted(f"{row['kind']} {row['status']}" for row in rows) == sorted(effects)
            rare = [row for row in rows if row["requests"] < asked.get(row["kind"], 0)]
            if fit and not rare:
                break
            await asyncio.sleep(0.1)
        ledger = "; ".join(store.proof(row) for row in rows) or "nothing"
        took = time.time() - self.since
        # A person may be away; a machine, even a busy one, is that slow only if something hangs.
        in_time = self.keyboard or not within or took < within + 15
        told = f"{order_id} ended {result}, after {took:.1f} s the ledger has {ledger}"
        must = f"{end} with {', '.join(effects)}" + (f" within {within:g} s" if within else "")
        if result != end or not fit or not in_time:
            raise Verdict(f"NOT HELD: {told}, should be: {must}")
        self.show(not rare, f"a provider was not asked again: {ledger}")
        self.tell(f"{end}, {took:.1f} s after the last act")

    def check(self, found: object, should: object, words: str) -> None:
        """Tell what is as it must be, or end the exercise with what is there instead."""
        if found != should:
            raise Verdict(f"NOT HELD: {found}, should be {should}: {words}")
        self.tell(words)

    def show(self, shown: bool, instead: str) -> None:
        """End the exercise if what it is about did not happen, with what did instead."""
        if not shown:
            raise Verdict(f"not shown: {instead}")


# A person's lesson.


async def run_prompts(_: argparse.Namespace) -> None:
    """Lead through the exercises until the person leaves; exit 1 if one did not hold."""
    unheld = set[int]()
    async with temporal(quiet=True) as stage:
        where = f"server: {stage.address}, namespace {stage.client.namespace}"
        say(f"{where}, Web UI: {worker.web_ui(stage.address)}")
        keyboard, number = Keyboard(), 1
        player = Player(stage, keyboard)
        try:
            with suppress(EOFError):
                while True:
                    default = str(say_menu(number))
                    number = await keyboard.ask("Number, name, or q", default, chosen)
                    await lead(player, keyboard, number, unheld)
        finally:
            await goodbye(player)
    if unheld:
        sys.exit(f"not held, or left before: {', '.join(NAMES[n] for n in sorted(unheld))}")


def say_menu(number: int) -> int:
    """List the exercises, with an x at those that held in this ledger; return the one to offer.

    From this number on it is the first that has not held yet, or 1.
    """
    held = {note["number"] for note in store.events_of("the exercises", "held")}
    for n, (title, _) in sections().items():
        say(f"{'x' if n in held else ' '} {n:2}  {title}")
    around = [(number + n) % len(EXERCISES) for n in range(len(EXERCISES))]
    return next((n for n in around if n not in held), 1)


async def lead(player: Player, keyboard: Keyboard, number: int, unheld: set[int]) -> None:
    """Lead through an exercise: predict, do, see, explain."""
    unheld.add(number)
    title, text = sections()[number]
    about, predict, *player.parts, observe, explain = text.split("\n\n")
    print(f"\nExercise {number}: {title}\n{about}\n\n{predict}\n")
    await keyboard.ask("Enter begins")
    if await player.play(EXERCISES[number]) == "held":
        unheld.discard(number)
        store.note("the exercises", "held", {"number": number})  # which is no order's id
        print(f"{observe}\n")
        await keyboard.ask("Enter goes on")
        print(f"{explain}\n")
    else:
        say("So there is nothing to explain yet: try it again.")
    await keyboard.ask("Enter goes to the menu")


async def goodbye(player: Player) -> None:
    """Say which orders still run and what becomes of them."""
    print()  # Ctrl+C and Ctrl+D end no line
    with suppress(Verdict):
        await asyncio.gather(*(player.sees(player.end_of, id_) for id_ in player.running))
    kept = f"{', '.join(sorted(player.running))}: not done yet"
    if player.running and player.stage.server:
        say(f"{kept}, and kept in temporal.db; the next start goes on with it")
    elif player.running:
        say(f"{kept}; to end one: temporal workflow cancel -w ID")


def sections() -> dict[int, tuple[str, str]]:
    """Read the exercises from README.md, as plain text: {number: (title, text)}."""
    readme = (HERE / "README.md").read_text(encoding="utf-8").replace("**", "").replace("`", "")
    found = re.finditer(r"(?ms)^### Exercise (\d+): ([^\n]*)\n(.*?)(?=^##)", readme)
    return {int(m[1]): (m[2], m[3].strip()) for m in found}


async def run_crash(options: argparse.Namespace) -> int:
    """Play exercises on a stage of our own; exit 0 if all held."""
    rows = []
    async with worker.private_stage() as stage:
        say(f"a server of our own at {stage.address}, Web UI: {worker.web_ui(stage.address)}")
        player = Player(stage)
        for number in options.names or range(len(EXERCISES)):
            claim = f"{number} {NAMES[number]}: {EXERCISES[number].__doc__}"
            print()
            say(claim, indent=4)
            verdict, tries = "not shown", 3  # a busy machine may come too late
            while verdict.startswith("not shown") and tries:
                verdict, tries = await player.play(EXERCISES[number], seconds=120), tries - 1
            took = time.monotonic() - player.screen.started
            rows.append(f"{verdict.partition(':')[0]:9} {took:5.1f} s  {claim}")
    print()
    for row in rows:
        say(row, indent=20)
    return 0 if all(row.startswith("held ") for row in rows) else 1


# The crowd: many orders at once, with kills or without.

IN_FLIGHT = 200  # a worker keeps 230 in memory; 600 at once, replayed, took 1.4 times as long
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

OUTCOMES = "SELECT order_id, ts FROM events WHERE type = 'outcome'"
ASKED_AGAIN = "SELECT order_id FROM effects WHERE requests > 1"
CHARGED_TWICE = """
SELECT order_id FROM charges WHERE status = 'charged' GROUP BY order_id HAVING count(*) > 1
"""
# Workers in whose hands a charge or a dispatch is that the provider has done, asked once so far.
IN_HAND = """
SELECT json_extract(payload_json, '$.worker') AS worker FROM events JOIN effects USING (order_id)
WHERE json_extract(payload_json, '$.ended') IS NULL AND requests = 1
AND (type, kind) IN (VALUES ('charge_payment', 'charge'), ('dispatch_carrier', 'dispatch'))
"""


class Crowd:
    """An exercise with many orders, drawn from a seed, and the kills that they must survive."""

    def __init__(self, stage: Stage, options: argparse.Namespace) -> None:
        self.stage, self.options = stage, options
        self.random = random.Random(options.seed)
        fields = {"wait_seconds": options.wait_seconds, "review_seconds": 0}
        kinds = CROWD if options.kills else [({"COMPLETED"}, fields, "")]
        # Drawn before anything runs: the same seed gives the same orders, whatever the kills do.
        self.drawn = {f"crowd-{n}": self.random.choice(kinds) for n in range(options.orders)}
        self.placed: dict[str, float] = {}
        self.killed = 0  # workers; every fifth time the server too

    async def run(self, t: Player) -> None:
        """Place the orders, kill between them, wait for all to end, and look how they did."""
        if self.options.kills:
            self.stage.start_worker()  # a second one
        # A second an order is ten times what it costs; each kill waits up to 5.5 s for its moment.
        seconds = 120 + self.options.orders + 2 * self.options.wait_seconds + 8 * self.options.kills
        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as jobs:
                jobs.create_task(self.place_all(jobs))
                jobs.create_task(self.kill_some())
                await self.watch(t.screen)
        except TimeoutError:
            t.tell(f"not done within {seconds:g} s: what has not ended is lost")
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        t.tell(self.line())
        self.judge(t, store.execute(OUTCOMES))

    def judge(self, t: Player, ends: list[dict[str, Any]]) -> None:
        """Tell how the orders ended; each must have ended as it may."""
        rate = self.options.orders / (time.monotonic() - t.screen.started)
        states, wrong = store.audit()
        told = ", ".join(f"{state} {n}" for state, n in sorted(Counter(states.values()).items()))
        t.tell(f"{rate:.1f} orders/s; {told}")
        if not self.options.kills and ends:
            took = sorted(row["ts"] - self.placed[row["order_id"]] for row in ends)
            say(f"median {median(took):.2f} s, 99th percentile {took[len(took) * 99 // 100]:.2f} s")
            say_costs(self.stage, self.options.orders)
        found = {order_id: states.get(order_id, "lost") for order_id in self.drawn}
        wrong += [f"{id_}: {end}" for id_, end in found.items() if end not in self.drawn[id_][0]]
        for line in wrong[:10]:
            t.tell(line)
        t.check(len(wrong), 0, "no order lost, each ended as it may, audit clean")
        if self.options.kills:
            t.show(bool(store.execute(ASKED_AGAIN)), "no provider was asked more than once")

    async def watch(self, screen: Screen) -> None:
        """Tell how it goes until all is done, and replace a worker that has died.

        That may exit, which in a task of its own would end in a traceback.
        """
        while self.killed < self.options.kills or len(store.execute(OUTCOMES)) < len(self.drawn):
            self.stage.revive()
            screen.show(self.line())
            await asyncio.sleep(0.5)

    async def place_all(self, jobs: asyncio.TaskGroup) -> None:
        """Place the orders, not too many in flight, spread over the kills, as people would."""
        pause = 1.5 * self.options.kills / self.options.orders
        for order_id, (_, fields, signal_name) in self.drawn.items():
            waits = self.options.wait_seconds  # then all may be in flight
            while not waits and len(self.placed) - len(store.execute(OUTCOMES)) >= IN_FLIGHT:
                await asyncio.sleep(0.05)
            self.placed[order_id] = time.time()
            # When 10,000 wake, an order may have its next turn only minutes later: not its fault.
            raw = PATIENT | {"deadline_seconds": 86_400} | fields | {"order_id": order_id}
            jobs.create_task(self.treat(raw, signal_name))
            await asyncio.sleep(pause)

    async def treat(self, raw: dict[str, Any], signal_name: str) -> None:
        """Place an order and signal it; the SDK calls again while the server is down."""
        await start(self.stage.client, raw)
        if signal_name:
            await asyncio.sleep(1)
            handle = self.stage.client.get_workflow_handle(raw["order_id"])
            try:
                await handle.signal(signal_name)
            except RPCError as error:
                if error.status != RPCStatusCode.NOT_FOUND:  # too late: the order has ended
                    raise

    async def kill_some(self) -> None:
        """Kill a worker now and then, every other one in a charge or a dispatch; the server too."""
        while self.killed < self.options.kills:
            await asyncio.sleep(self.random.uniform(0.5, 2.5))
            for _ in range(30 if self.killed % 2 == 0 else 1):
                await asyncio.sleep(0.1)
                hands = {row["worker"] for row in store.execute(IN_HAND)}
                living = [process for process in self.stage.workers if process.poll() is None]
                if aimed := [process for process in living if process.pid in hands]:
                    break
            if not living:
                continue  # until watch() has replaced one
            self.stage.kill_worker(self.random.choice(aimed or living))
            self.killed += 1
            if self.killed % 5 == 0:
                self.stage.kill_server()
                await self.stage.start_server()

    def line(self) -> str:
        """Tell how it goes."""
        told = f"orders {len(store.execute(OUTCOMES))}/{len(self.drawn)}"
        if self.options.kills:
            told += f" · killed {self.killed} workers, {self.killed // 5} servers"
        asked, twice = len(store.execute(ASKED_AGAIN)), len(store.execute(CHARGED_TWICE))
        return f"{told} · asked more than once {asked} · charged twice {twice}"


async def run_crowd(options: argparse.Namespace) -> int:
    """Run many orders, under kills if asked to; exit 0 if each ended as it may."""
    async with worker.private_stage() as stage:
        return int(await Player(stage).play(Crowd(stage, options).run) != "held")


def say_costs(stage: Stage, orders: int) -> None:
    """End the worker, then the server, and say what each has used."""
    if sys.platform == "win32":
        return  # nobody measures it there
    import resource  # which Windows has not

    for process in stage.workers:
        stage.kill_worker(process)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    stage.kill_server()
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
    return round(float(text) * 100)  # exact: a float holds 15 digits


def number_of(text: str) -> int:
    """Read the number or the name of an exercise."""
    return int(text) if text.isdecimal() else NAMES.index(text)


ACT_IN = number(2, 60, float), "must be 2 to 60 seconds here, in which you have to act"
PROMPTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "customer_id": ("Customer ID", "customer-123", partial(take, str, *RULES["customer_id"])),
    "amount_cents": ("Amount", "99.99", partial(take, cents, *RULES["amount_cents"])),
    "wait_seconds": ("Wait seconds", "10", partial(take, float, *ACT_IN)),
}
NUMBERED = ", ".join(f"{n} {name}" for n, name in enumerate(NAMES))
chosen = partial(take, number_of, range(len(NAMES)).__contains__, f"must be one of {NUMBERED}")
given = partial(take, str, bool, "must not be empty")  # which is not the same as missing


def add_orders(commands: Any) -> None:
    """Add the commands that place one order; their options are its fields."""
    faults = "\n".join(f"  {name:13} {meaning}" for name, meaning in FAULTS.items())
    which = f"STEP is one of {', '.join(STEPS)}"
    shape: dict[str, Any] = {
        "epilog": f"FAULT is one of\n{faults}",
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
        sub.add_argument("--simulate", action="append", metavar="STEP=FAULT", help=which)
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
    parser = worker.Parser(description="Place orders, and crash things on purpose.")
    parser.set_defaults(run=run_prompts)
    commands = parser.add_subparsers(dest="command", title="commands (without one: the exercises)")
    add_orders(commands)
    crash = commands.add_parser("crash", help="the exercises, played by the machine")
    named = f"default all: {', '.join(NAMES)}; or a number from 0"
    crash.add_argument("names", nargs="*", type=chosen, metavar="NAME", help=named)
    crash.set_defaults(run=run_crash)
    chaos = commands.add_parser("chaos", help="a crowd of orders under kills")
    chaos.add_argument("--orders", type=positive, default=60, help="default 60")
    chaos.add_argument("--kills", type=positive, default=10, help="of workers; default 10")
    chaos.add_argument("--seed", type=int, default=1, help="of what is drawn; default 1")
    chaos.set_defaults(run=run_crowd, wait_seconds=0)
    load = commands.add_parser("load", help="a crowd of orders, and what each costs")
    load.add_argument("--orders", type=positive, default=200, help="default 200")
    wait, text = partial(take, float, *RULES["wait_seconds"]), "seconds they sleep first"
    load.add_argument("--wait", dest="wait_seconds", type=wait, default=0, help=text)
    load.set_defaults(run=run_crowd, kills=0, seed=1)
    return parser.parse_args()


async def run(options: argparse.Namespace) -> int:
    """Run one command; Ctrl+C, a plain kill and the end of the terminal cancel it, to clean up."""
    stopped_by = worker.cancel_on("SIGINT", "SIGTERM", "SIGHUP")
    try:
        return int(await options.run(options) or 0)
    except asyncio.CancelledError:
        return 128 + stopped_by[0]


if __name__ == "__main__":
    worker.run_script(lambda: asyncio.run(run(parse_arguments())))
