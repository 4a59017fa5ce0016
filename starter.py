"""The starter: places orders, and crashes things on purpose.

Without arguments it goes through an exercise of README.md with a person. `charge` and `order` start
one workflow. `crash`, `chaos` and `load` bring a server and workers of their own.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
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
from temporalio.testing import WorkflowEnvironment

if sys.platform != "win32":
    import resource

import charge_store as store
import signals
from activities import FAULTS, RULES, SLOW_SECONDS, STEPS, parse_order
from signals import command, say
from worker import DEFAULT_ADDRESS, client_config, connect, nearby, web_ui
from workflows import ORDERS_QUEUE, SHIPPING_QUEUE, ChargeWorkflow, OrderWorkflow

HERE = Path(__file__).parent
# How we start every server; docker-compose.yml has the same. WAL makes a server that keeps its data
# in a file as fast as one that keeps it in memory, and it survives kill -9 as well.
SERVER_FLAGS = ["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"]
# Timers and retries under 1 s take 1 s without the first; the second makes a workflow that has had
# its bug mended go on within a second instead of up to half a minute.
SERVER_FLAGS += ["--dynamic-config-value", 'history.timerProcessorMaxTimeShift="10ms"']
SERVER_FLAGS += ["--dynamic-config-value", 'history.workflowTaskRetryMaxInterval="1s"']
# A worker that dies in the middle of a workflow task holds it up this long, by default 10 s; and a
# failed task shows within this time that its bug is mended (see SERVER_FLAGS).
TASK_TIMEOUT = timedelta(seconds=1)


class Stage:
    """A Temporal server and workers of our own: start, kill and revive them."""

    def __init__(self, folder: Path, port: int, quiet: bool = True) -> None:
        """Keep the server's data, and with quiet=True the ledger and the logs, in the folder."""
        self.folder, self.port, self.quiet = folder, port, quiet
        self.address = f"127.0.0.1:{port}"
        self.server: WorkflowEnvironment | None = None
        self.client: Client
        self.workers: list[subprocess.Popen[bytes]] = []
        self.failed = 0

    async def start_server(self) -> Client:
        """Start the server, or start it again on the same file, and return a client."""
        self.server = await WorkflowEnvironment.start_local(
            port=self.port,
            ui=True,
            ui_port=self.port + 1000,
            # Without a binary, as on Windows, the SDK downloads one.
            dev_server_existing_path=temporal_binary(),
            dev_server_database_filename=str(self.folder / "temporal.db"),
            dev_server_log_level="never",
            # The HTTP API stands 10 ports higher, as 7243 does; no banner among our own lines.
            dev_server_extra_args=[
                *("--http-port", str(self.port + 10), "--output", "none"),
                *SERVER_FLAGS,
            ],
        )
        self.client = self.server.client
        return self.client

    async def kill_server(self) -> None:
        """Kill the server at once: the SDK shuts its servers down with SIGKILL."""
        if self.server:
            await self.server.shutdown()
            self.server = None

    def start_worker(self, role: str = "all", code: Path = HERE) -> subprocess.Popen[bytes]:
        """Start a worker process, from our scripts or from a changed copy of them."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith("TEMPORAL_")}
        with open(self.folder / "workers.log" if self.quiet else os.devnull, "ab") as log:
            worker = subprocess.Popen(
                [sys.executable, str(code / "worker.py"), role],
                env=kept | {"TEMPORAL_ADDRESS": self.address},
                stdin=subprocess.DEVNULL,
                stdout=log if self.quiet else None,
                stderr=log if self.quiet else None,
            )
        self.workers.append(worker)
        return worker

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill a worker at once, as kill -9 does."""
        worker.kill()
        worker.wait()
        self.workers.remove(worker)

    def revive(self) -> None:
        """Start another worker for each that has died."""
        for worker in [w for w in self.workers if w.poll() is not None]:
            self.workers.remove(worker)
            # One that met no server, as it was just being restarted, ended with 1; so does one that
            # can never start, which we do not repeat for ever.
            self.failed += worker.returncode == 1
            if self.failed > 20:
                sys.exit(f"workers end with exit code {worker.returncode}: {self.folder}")
            if not self.quiet:
                say(f"worker {worker.pid} died; starting another")
            self.start_worker()

    async def close(self) -> None:
        """Kill all that still runs."""
        for worker in list(self.workers):
            self.kill_worker(worker)
        await self.kill_server()


def temporal_binary() -> str | None:
    """Find the `temporal` command that pip put beside Python, or one on the path."""
    beside = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    return shutil.which("temporal", path=beside)


def free_port() -> int:
    """Find a port that is free for a server, and those of its HTTP API and Web UI too."""
    while True:
        # Below the ports that systems give to clients: a client that keeps calling a killed server
        # could otherwise be given that very port, and the server could not come back on it.
        port = random.randrange(20_000, 30_000)
        with ExitStack() as probes, suppress(OSError):
            for offset in (0, 10, 1000):  # server, HTTP API, Web UI
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", port + offset))
            return port


@asynccontextmanager
async def private_stage() -> AsyncIterator[Stage]:
    """Set a stage in a temporary folder, with a ledger of its own; leave nothing behind."""
    with TemporaryDirectory(prefix="orders-", ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder), free_port())
        with ledger(stage.folder / "charge_store.db"):
            try:
                await stage.start_server()
                yield stage
            finally:
                await stage.close()


@contextmanager
def ledger(path: Path) -> Iterator[None]:
    """Use another ledger for a while, in this process and in the workers it starts."""
    before = os.environ.get("CHARGE_STORE", "")
    os.environ["CHARGE_STORE"] = str(path)
    try:
        yield
    finally:
        store.close()
        os.environ["CHARGE_STORE"] = before


@asynccontextmanager
async def temporal() -> AsyncIterator[tuple[Client, Stage | None]]:
    """Use the server that is there; if none was configured and none is there, bring up our own."""
    if client_config() or await is_listening(DEFAULT_ADDRESS):
        yield await connect(), None
        return
    stage = Stage(HERE, int(DEFAULT_ADDRESS.rpartition(":")[2]), quiet=False)
    try:
        say(f"no server at {DEFAULT_ADDRESS}: starting one, and a worker, while this runs")
        client = await stage.start_server()
        kept = nearby(HERE / "temporal.db")
        say(f"Web UI: {web_ui(DEFAULT_ADDRESS)}  unfinished orders stay in {kept}")
        stage.start_worker()
        yield client, stage
    except RuntimeError as error:
        sys.exit(f"cannot start a Temporal server: {store.printable(error)}")
    finally:
        await stage.close()


async def is_listening(address: str) -> bool:
    """Tell whether anything accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 2)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


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


async def place(kind: type[ChargeWorkflow | OrderWorkflow], raw: dict[str, Any], wait: bool) -> int:
    """Start the workflow, or attach to it if it runs already, and follow it if asked to."""
    try:
        order = parse_order(raw, raw["order_id"], charge=kind is ChargeWorkflow)
    except ApplicationError as error:
        print(f"starter.py: {error.message}", file=sys.stderr)
        return 2
    async with temporal() as (client, stage):
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
            return await signals.follow(client, order.order_id, plain=True, each_time=stage.revive)
        if wait:
            return await signals.follow(client, order.order_id)
        say((await signals.picture(client, handle, await handle.describe()))[0])
        return 0


async def start(
    client: Client,
    kind: type[ChargeWorkflow | OrderWorkflow],
    raw: dict[str, Any],
    task_timeout: timedelta | None = TASK_TIMEOUT,
) -> WorkflowHandle[Any, Any]:
    """Start a workflow on an order. An order id is used once; a charge may be asked for again."""
    again = WorkflowIDReusePolicy.ALLOW_DUPLICATE
    return await client.start_workflow(
        kind.__name__,
        raw,
        id=raw["order_id"],
        task_queue=ORDERS_QUEUE,
        id_reuse_policy=again if kind is ChargeWorkflow else WorkflowIDReusePolicy.REJECT_DUPLICATE,
        task_timeout=task_timeout,
    )


# The crash tests: orders, what is done to whom and when, and what the ledger must show then.

PATIENT: dict[str, Any] = {
    "deadline_seconds": 600,
    "max_attempts": 0,
    "review": "timer",
    "review_seconds": 0.1,
}
SLOW_CHARGE = {"simulate": {"charge_payment": "slow"}}
ONCE = {"charge": ("charged", 1), "reservation": ("reserved", 1), "dispatch": ("dispatched", 1)}
TWICE_ASKED = ONCE | {"charge": ("charged", 2)}
BUG = ("workflows.py", 'step.charge_payment, "CHARGING"', 'step.charge_paymnet, "CHARGING"')
NO_KEY = (
    "activities.py",
    '_ask(order, "charge", order.payment_id',
    '_ask(order, "charge", f"{order.payment_id}-{activity.info().attempt}"',
)


@dataclass(frozen=True)
class CrashTest:
    """One crash. A beat is a cue, an action and what to say; {pid} is the newest worker's."""

    name: str
    claim: str
    orders: list[dict[str, Any]]
    beats: list[tuple[str, str, str]]
    proof: dict[str, tuple[str, int]]  # of each order {kind of effect: (status, requests; 0: any)}
    seconds: float  # that it should take, from the last start of a worker or a server
    slack: float = 15  # how much longer it may take on a busy machine
    ends: str = "COMPLETED"
    kind: type[ChargeWorkflow | OrderWorkflow] = OrderWorkflow
    since: str = "start"  # the action that starts the clock
    change: tuple[str, str, str] | None = None  # in a copy of our scripts: (file, text, instead)
    twice: bool = False  # a contrast, which charges twice


CRASH_TESTS = [
    CrashTest(
        "timer",
        "a durable wait keeps its deadline while no worker lives",
        [{"wait_seconds": 5}],
        [
            ("", "start all", "worker {pid} starts"),
            ("timer", "mark", "the order waits 5 s before its charge"),
            ("2", "kill", "worker {pid} dies"),
            ("1", "start all", "worker {pid} starts; the wait goes on where it was"),
            ("charge_payment 1", "", "the wait is over, the charge begins"),
            ("end", "", "the charge is done"),
        ],
        {"charge": ("charged", 1)},
        seconds=5,
        slack=1.5,
        kind=ChargeWorkflow,
        since="mark",
    ),
    CrashTest(
        "charge",
        "a worker dies after the provider charged and before Temporal heard of it",
        [SLOW_CHARGE],
        [
            ("", "start all", "worker {pid} starts"),
            ("charge", "", "the provider has charged; its answer, 5 s long, is on the way"),
            ("1", "kill", "worker {pid} dies"),
            ("", "start all", "worker {pid} starts"),
            ("charge_payment 2", "", "attempt 2 on worker {pid}; the provider knows the key"),
            ("end", "", "the order is complete"),
        ],
        TWICE_ASKED,
        seconds=6.5,
    ),
    CrashTest(
        "before-charge",
        "a worker dies before the provider heard of the charge",
        [{"simulate": {"charge_payment": "crash-before"}}],
        [
            ("", "start all", "worker {pid} starts"),
            ("dead", "", "worker {pid} has died, about to call the provider"),
            ("", "start all", "worker {pid} starts"),
            ("charge_payment 2", "", "attempt 2 on worker {pid}"),
            ("end", "", "the order is complete"),
        ],
        ONCE,
        seconds=2,
    ),
    CrashTest(
        "server",
        "the Temporal server dies in the middle of waits and charges",
        [{"wait_seconds": 3}, {"wait_seconds": 3}, {}, SLOW_CHARGE],
        [
            ("", "start all", "worker {pid} starts; two orders wait, one is being charged"),
            ("2", "kill server", "the Temporal server dies"),
            ("2", "start server", "the Temporal server starts on the same file"),
            ("end", "", "all orders are complete"),
        ],
        ONCE | {"charge": ("charged", 0)},  # an answer that met no server is asked for again
        seconds=10,
    ),
    CrashTest(
        "shipping",
        "orders are paid while no shipping worker lives, and ship when one comes back",
        [{}, {}, {}],
        [
            ("", "start orders", "worker {pid} starts, for orders only"),
            ("charge", "", "all orders are paid; their packages wait"),
            ("2", "start shipping", "worker {pid} starts, for shipping"),
            ("end", "", "all orders have shipped"),
        ],
        ONCE,
        seconds=1,
    ),
    CrashTest(
        "shipping",
        "a worker dies after the package left: it leaves once",
        [{"simulate": {"dispatch_carrier": "crash-after"}}],
        [
            ("", "start all", "worker {pid} starts"),
            ("dead", "", "worker {pid} has died; the carrier has the package"),
            ("", "start all", "worker {pid} starts"),
            ("end", "", "the order is complete"),
        ],
        ONCE | {"dispatch": ("dispatched", 2)},
        seconds=2,
    ),
    CrashTest(
        "shipping",
        "an order is cancelled while its dispatch is on the way: neither paid nor shipped",
        [{"simulate": {"dispatch_carrier": "late"}}],
        [
            ("", "start all", "worker {pid} starts"),
            (
                "dispatch_carrier 1",
                "cancel",
                "the dispatch, 5 s late, is on its way; a cancel comes",
            ),
            ("end", "", "the order is cancelled and its money back"),
            ("proof", "", "the late dispatch arrives at the carrier, and is refused"),
        ],
        {"charge": ("refunded", 1), "reservation": ("released", 1), "dispatch": ("voided", 1)},
        seconds=6,
        ends="CANCELLED",
    ),
    CrashTest(
        "late",
        "a charge that reaches the provider after the order was given up is refused",
        [{"simulate": {"charge_payment": "late"}}],
        [
            ("", "start all", "worker {pid} starts"),
            ("charge_payment 1", "cancel", "the charge, 5 s late, is on its way; a cancel comes"),
            ("end", "", "the order is cancelled"),
            ("proof", "", "the late charge arrives at the provider, and is refused"),
        ],
        {"charge": ("voided", 1), "reservation": ("released", 1)},
        seconds=6,
        ends="CANCELLED",
    ),
    CrashTest(
        "bug",
        "a workflow meets a bug: the order waits, and goes on when the bug is mended",
        [{}],
        [
            ("", "start changed", "worker {pid} starts, with a bug in its copy of workflows.py"),
            ("task fails", "", "the workflow task fails and is tried again; the order stays"),
            ("2", "kill", "worker {pid} is stopped"),
            ("", "start all", "worker {pid} starts, with the bug mended"),
            ("end", "", "the order is complete"),
        ],
        ONCE,
        seconds=4,
        change=BUG,
    ),
    CrashTest(
        "no-key",
        "the contrast: the crash of `charge`, with a key that changes on each attempt",
        [SLOW_CHARGE],
        [
            ("", "start changed", "worker {pid} starts, with a new key at each attempt"),
            ("charge", "", "the provider has charged; its answer, 5 s long, is on the way"),
            ("1", "kill", "worker {pid} dies"),
            ("", "start changed", "worker {pid} starts"),
            ("charge_payment 2", "", "attempt 2 on worker {pid}; the provider sees a new key"),
            ("end", "", "the order is complete, and the customer charged twice, as expected"),
        ],
        ONCE,
        seconds=6.5,
        change=NO_KEY,
        twice=True,
    ),
]


class CrashRun:
    """One crash test on a stage: its orders, its clock, its words."""

    def __init__(self, test: CrashTest, stage: Stage, number: int) -> None:
        self.test, self.stage = test, stage
        self.ids = [f"crash-{number}-{n}" for n in range(1, len(test.orders) + 1)]
        self.started = self.since = time.time()
        self.took = 0.0
        self.problem = ""
        self.code = HERE
        if test.change:
            self.code = changed_copy(stage.folder / f"changed-{number}", *test.change)

    async def run(self) -> bool:
        """Play the test and tell it; return whether all held."""
        print(f"\n{self.test.name}: {self.test.claim}")
        try:
            await asyncio.wait_for(self._play(), 60)
        except TimeoutError:
            self.problem = "not done within 60 s"
        for worker in list(self.stage.workers):
            self.stage.kill_worker(worker)
        start = {"mark": "the wait began"}.get(self.test.since, "the last start")
        should = f"{self.test.seconds:g} s after {start}"
        if not self.problem and self.took > self.test.seconds + self.test.slack:
            self.problem = "too slow"
        say(f"   should take {should}, took {self.took:.1f} s")
        say(f"   {self.evidence()}")
        say(f"   {'NOT HELD: ' + self.problem if self.problem else 'held'}")
        return not self.problem

    async def _play(self) -> None:
        """Place the orders, follow the beats, and wait until the ledger shows the proof."""
        for order_id, fields in zip(self.ids, self.test.orders, strict=True):
            raw = PATIENT | fields | {"order_id": order_id}
            await start(self.stage.client, self.test.kind, raw)
        for cue, action, words in self.test.beats:
            await until(partial(self._reached, cue))
            pid = self.stage.workers[-1].pid if self.stage.workers else 0
            await self._act(action)
            pid = self.stage.workers[-1].pid if self.stage.workers else pid
            say(f"   {time.time() - self.started:5.1f} s  {words.format(pid=pid)}")
            self.took = time.time() - self.since
        for order_id in self.ids:
            handle = self.stage.client.get_workflow_handle(order_id)
            result = await persist(handle.result)
            if self.test.kind is OrderWorkflow and result != self.test.ends:
                self.problem = f"{order_id} ended {result}, not {self.test.ends}"
        await until(self._proved)

    async def _reached(self, cue: str) -> bool:
        """Tell whether a cue has come: nothing, seconds, death, the end, an effect, an event."""
        if cue == "" or cue.isdigit():
            await asyncio.sleep(int(cue or 0))
            return True
        if cue == "dead":
            return self.stage.workers[-1].poll() is not None
        if cue == "proof":
            return await self._proved()
        return await come(self.stage.client, self.ids, cue)

    async def _act(self, action: str) -> None:
        """Do what a beat does to a worker, the server or the orders."""
        verb, _, what = action.partition(" ")
        if verb == self.test.since:
            self.since = time.time()
        if action == "start server":
            await self.stage.start_server()
        elif verb == "start":
            code = self.code if what == "changed" else HERE
            self.stage.start_worker("all" if what == "changed" else what, code)
        elif action == "kill server":
            await self.stage.kill_server()
        elif verb == "kill":
            self.stage.kill_worker(self.stage.workers[-1])
        elif verb == "cancel":
            for order_id in self.ids:
                await self.stage.client.get_workflow_handle(order_id).signal("cancel")

    async def _proved(self) -> bool:
        """Tell whether the ledger shows what it must."""
        proof = sorted([*self.test.proof.items()] + [("charge", ("charged", 1))] * self.test.twice)
        found = [
            sorted((row["kind"], (row["status"], row["requests"])) for row in effects_of(order_id))
            for order_id in self.ids
        ]
        # Requests that may be any number are taken out of the comparison.
        any_number = {kind for kind, (_, requests) in proof if requests == 0}
        known = [[(k, (s, 0 if k in any_number else n)) for k, (s, n) in rows] for rows in found]
        return all(rows == proof for rows in known)

    def evidence(self) -> str:
        """Sum up the ledger: charge requests, charges, audit."""
        rows = [row for order_id in self.ids for row in effects_of(order_id, "charge")]
        charges = sum(row["status"] == "charged" for row in rows)
        requests = sum(row["requests"] for row in rows)
        violations = [v for v in store.audit() if v.startswith(tuple(self.ids))]
        if bool(violations) != self.test.twice:
            self.problem = self.problem or "audit: " + "; ".join(violations)
        audit = f"audit: {violations[0]}" if violations else "audit clean"
        return f"orders {len(self.ids)}, requests {requests}, charged {charges}; {audit}"


async def come(client: Client, ids: list[str], cue: str, before: int = 0) -> bool:
    """Tell whether orders have come so far: to their end, an effect, or a number of events."""
    if cue in ("end", "task fails"):
        handles = [client.get_workflow_handle(order_id) for order_id in ids]
        if cue == "task fails":
            return all([await signals.code_fails(handle) for handle in handles])
        return all([(await handle.describe()).status != signals.RUNNING for handle in handles])
    if cue == "timer":
        history = await client.get_workflow_handle(ids[0]).fetch_history()
        return any(event.HasField("timer_started_event_attributes") for event in history.events)
    if cue in store.IN_FORCE:
        return all(effects_of(order_id, cue) for order_id in ids)
    name, _, times = cue.partition(" ")
    return all(store.count(order_id, name) - before >= int(times) for order_id in ids)


def effects_of(order_id: str, kind: str | None = None) -> list[dict[str, Any]]:
    """Read an order's effects, of one kind or of all."""
    query = "SELECT * FROM effects WHERE order_id = ?1 AND (?2 IS NULL OR kind = ?2)"
    return store.select(query, order_id, kind)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until the condition holds; the caller bounds the time."""
    while not await persist(condition):
        await asyncio.sleep(0.02)


def changed_copy(folder: Path, file: str, text: str, instead: str) -> Path:
    """Copy our scripts with one text in one file changed."""
    shutil.copytree(
        HERE, folder, ignore=lambda d, names: [n for n in names if not n.endswith(".py")]
    )
    source = (folder / file).read_text(encoding="utf-8")
    if text not in source:
        raise AssertionError(f"{file} has no {text!r} any more")
    (folder / file).write_text(source.replace(text, instead), encoding="utf-8")
    return folder


def plain_job(order_id: str, wait_seconds: float) -> None:
    """Do an order as a background job without Temporal: all it knows is in its memory."""
    time.sleep(wait_seconds)
    key = uuid.uuid4().hex  # made up at each delivery: there is nowhere to remember it
    store.perform("charge", key, order_id, "customer-123", 9999)
    time.sleep(SLOW_SECONDS)  # the provider's answer is on the way


async def run_without_temporal() -> bool:
    """Kill such jobs at the same instants: one is charged twice, one that waits is lost."""
    print("\nno-temporal: the contrast: the same order as a plain background job, redelivered")
    process, started = get_context("spawn").Process, time.time()

    def tell(words: str) -> None:
        say(f"   {time.time() - started:5.1f} s  {words}")

    charging = process(target=plain_job, args=("charging", 0))
    waiting = process(target=plain_job, args=("waiting", 3))
    charging.start()
    waiting.start()  # its queue has it acknowledged at once: no queue waits for days
    await asyncio.wait_for(until(lambda: reached_charge("charging")), 30)
    tell(f"the provider has charged; job {charging.pid} waits for its answer")
    charging.kill()
    waiting.kill()
    tell(f"jobs {charging.pid}, charging, and {waiting.pid}, waiting, die")
    again = process(target=plain_job, args=("charging", 0))
    again.start()
    tell(f"the queue delivers the unacknowledged job again, to {again.pid}; nobody has the other")
    await asyncio.to_thread(again.join, 60)
    charges, lost = len(effects_of("charging")), not effects_of("waiting")
    tell(f"charged {charges} times; the waiting order {'is lost' if lost else 'was charged'}")
    held = charges == 2 and lost
    say(f"   {'held, as expected of it' if held else 'NOT HELD'}")
    return held


async def reached_charge(order_id: str) -> bool:
    """Tell whether the order was charged."""
    return bool(effects_of(order_id, "charge"))


async def run_crash(options: argparse.Namespace) -> int:
    """Run the crash tests on a stage of our own; exit 0 if all held."""
    rows = []
    async with private_stage() as stage:
        say(f"a server of our own at {stage.address}, Web UI: {web_ui(stage.address)}")
        for number, test in enumerate(CRASH_TESTS, 1):
            if options.names and test.name not in options.names:
                continue
            with ledger(stage.folder / "contrast.db") if test.twice else nullcontext():
                run = CrashRun(test, stage, number)
                held = "yes" if await run.run() else "NO"
            should, took = f"{test.seconds:g} s", f"{run.took:.1f} s"
            rows.append({"test": test.name, "should": should, "took": took, "held": held})
            rows[-1]["claim"] = test.claim
        if not options.names or "no-temporal" in options.names:
            with ledger(stage.folder / "contrast.db"):
                held = "yes" if await run_without_temporal() else "NO"
            claim = "the contrast: charged twice, and a waiting order lost"
            rows.append({"test": "no-temporal", "should": "-", "took": "-", "held": held})
            rows[-1]["claim"] = claim
    print("\n" + store.table(rows))
    return 0 if all(row["held"] == "yes" for row in rows) else 1


# Chaos: many orders under many kills.


CHAOS: list[
    tuple[set[str], dict[str, Any], str]
] = [  # (how an order of this kind may end, its fields, how people treat it)
    ({"COMPLETED"}, {}, ""),
    ({"COMPLETED"}, {"wait_seconds": 3}, ""),
    ({"COMPLETED"}, {"simulate": {"charge_payment": "flaky", "dispatch_carrier": "flaky"}}, ""),
    ({"COMPLETED"}, {"simulate": {"reserve_inventory": "random"}}, ""),
    ({"REJECTED"}, {"review": "person", "review_seconds": 600}, "reject"),
    ({"CANCELLED"}, {"wait_seconds": 600}, "cancel"),
    ({"COMPLETED", "CANCELLED"}, {"simulate": {"charge_payment": "late"}}, "cancel"),
    ({"COMPLETED", "CANCELLED"}, {"simulate": {"dispatch_carrier": "slow"}}, "cancel"),
]


class Chaos:
    """Orders drawn from a seed, and the kills that they must survive."""

    def __init__(self, stage: Stage, options: argparse.Namespace) -> None:
        self.stage, self.options = stage, options
        self.random = random.Random(options.seed)
        # Drawn before anything runs: the same seed gives the same orders, whatever the kills do.
        self.drawn = {f"chaos-{n}": self.random.choice(CHAOS) for n in range(options.orders)}
        self.workers_killed = self.server_killed = 0
        self.line = Line()

    async def run(self) -> list[str]:
        """Place orders, kill between them, wait for all to end; return what went wrong."""
        for _ in range(2):
            self.stage.start_worker()
        placing = asyncio.create_task(self._place_all())
        for kill in range(self.options.kills):
            await self._show_for(self.random.uniform(0.5, 2.5))
            self.stage.kill_worker(self.random.choice(self.stage.workers))
            self.stage.start_worker()
            self.workers_killed += 1
            if kill % 5 == 4:
                await self.stage.kill_server()
                await self.stage.start_server()
                self.server_killed += 1
        await placing
        # A second an order is ten times what it costs; what is not done then is lost.
        end = time.monotonic() + 60 + self.options.orders
        while ended_orders() < self.options.orders and time.monotonic() < end:
            await self._show_for(0.2)
        self._show()
        self.line.end()
        return self._wrong()

    async def _place_all(self) -> None:
        """Place the orders, spread over the kills, and treat each as people would."""
        pause = 1.5 * self.options.kills / self.options.orders
        treating = []
        for order_id, (_, fields, signal_name) in self.drawn.items():
            raw = PATIENT | fields | {"order_id": order_id}
            treating.append(asyncio.create_task(self._treat(raw, signal_name)))
            await asyncio.sleep(pause)
        await asyncio.gather(*treating)

    async def _treat(self, raw: dict[str, Any], signal_name: str) -> None:
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

    async def _show_for(self, seconds: float) -> None:
        """Revive what died and show how it goes, for some seconds."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.stage.revive()
            self._show()
            await asyncio.sleep(min(0.5, left))

    def _show(self) -> None:
        """Show how it goes."""
        self.line.show(
            f"orders {ended_orders()}/{self.options.orders}"
            f" · workers killed {self.workers_killed} · server killed {self.server_killed}"
            f" · charged twice {len(charged_twice())}"
        )

    def _wrong(self) -> list[str]:
        """List the orders that were lost or ended as they must not, and what the audit finds."""
        ended = endings()
        lost = [f"{order_id}: lost" for order_id in self.drawn if order_id not in ended]
        odd = [f"{id_}: {end}" for id_, end in ended.items() if end not in self.drawn[id_][0]]
        return lost + odd + store.audit()


def ended_orders() -> int:
    """Count the orders that have an outcome."""
    return int(store.select("SELECT count(*) AS n FROM events WHERE type = 'outcome'")[0]["n"])


def endings() -> dict[str, str]:
    """Read how the orders ended: {order id: state}."""
    outcomes = store.select("SELECT order_id, payload_json FROM events WHERE type = 'outcome'")
    return {row["order_id"]: json.loads(row["payload_json"])["state"] for row in outcomes}


def charged_twice() -> list[dict[str, Any]]:
    """Find the orders with more than one charge in force."""
    charged = "SELECT order_id FROM charges WHERE status = 'charged'"
    return store.select(f"{charged} GROUP BY order_id HAVING count(*) > 1")


async def persist(call: Callable[[], Awaitable[Any]]) -> Any:
    """Call until the server answers; one that is being restarted does not, for a while."""
    while True:
        try:
            return await call()
        except RPCError as error:
            if error.status not in (*signals.SERVER_DOWN, RPCStatusCode.DEADLINE_EXCEEDED):
                raise
            await asyncio.sleep(0.2)


async def run_chaos(options: argparse.Namespace) -> int:
    """Run orders under kills; exit 0 if none was lost and none charged twice."""
    say(f"{options.orders} orders, {options.kills} kills, seed {options.seed}")
    started = time.monotonic()
    async with private_stage() as stage:
        chaos = Chaos(stage, options)
        wrong = await chaos.run()
        ends = Counter(endings().values())
        told = ", ".join(f"{end} {count}" for end, count in sorted(ends.items()))
        say(f"{time.monotonic() - started:.1f} s; {told}")
        for line in wrong:
            print(store.printable(line), file=sys.stderr)
        say("audit clean: no order lost, none charged twice" if not wrong else "NOT HELD")
    return 1 if wrong else 0


# The exercises: README.md has their words, this has the orders and what to look for.

REVIEWED = {"review": "person", "review_seconds": 600}
Beat = dict[str, Any] | str  # an order to place, or a cue; "do CUE" first shows the next **Do.**


@dataclass(frozen=True)
class Exercise:
    """What an exercise of README.md places and waits for, in order."""

    beats: list[Beat]
    kind: type[ChargeWorkflow | OrderWorkflow] = OrderWorkflow
    asks: tuple[str, ...] = ()


EXERCISES = {
    1: Exercise(
        [{"wait_seconds": 10}, "do silent", "do answers", "end"],
        ChargeWorkflow,
        ("customer_id", "amount_cents", "wait_seconds"),
    ),
    2: Exercise(
        [SLOW_CHARGE, "do charge_payment 2", "end", SLOW_CHARGE, "do charge_payment 2", "end"],
        ChargeWorkflow,
        ("customer_id", "amount_cents", "wait_seconds"),
    ),
    3: Exercise([REVIEWED, "do approve 1", "end"]),
    4: Exercise(
        [
            {"simulate": {"charge_payment": "flaky"}},
            "end",
            {"simulate": {"charge_payment": "down"}, "max_attempts": 3},
            "end",
        ]
    ),
    5: Exercise([{"card_expiry": "12/23"}, "end"]),
    6: Exercise([{"review": "person", "review_seconds": 10}, "end"]),
    7: Exercise(
        [
            REVIEWED | {"simulate": {"prepare_package": "slow"}},
            "do update_address 1",
            "do prepare_package 1",
            "end",
            REVIEWED,
            "do end",
        ]
    ),
    8: Exercise(
        [
            "do enter",
            {},
            "charge",
            "do end",
            {"simulate": {"dispatch_carrier": "down"}, "max_attempts": 3},
            "end",
        ]
    ),
    9: Exercise(["do enter", {}, "task fails", "do end"]),
    10: Exercise([{"wait_seconds": 15}, "do server silent", "do server answers", "end"]),
    11: Exercise([REVIEWED, "do task fails", "do end"]),
    12: Exercise([{}, "end", "do charge_payment 2", "end"]),
    0: Exercise([]),
}
SIGHTS = {  # what a person waits for, by cue
    "silent": "the worker to die",
    "answers": "a worker to answer",
    "server silent": "the server to die",
    "server answers": "the server to answer",
    "task fails": "the workflow task to fail",
    "end": "the order to end",
    "charge": "the charge",
    "approve 1": "your approval",
    "update_address 1": "the new address",
    "prepare_package 1": "shipping to begin",
    "charge_payment 2": "attempt 2 at the charge",
}


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


class Lesson:
    """One exercise with a person: show its parts, see what is done, show the evidence."""

    def __init__(self, number: int, client: Client, stage: Stage | None) -> None:
        self.exercise, self.client, self.stage = EXERCISES[number], client, stage
        title, text = sections()[number]
        head, *parts = re.split(r"^(?=\*\*(?:Predict|Do|Observe|Explain)\.\*\*)", text, flags=re.M)
        self.title, self.head = f"Exercise {number}: {title}", head
        self.parts = parts
        self.ids: list[str] = []
        self.before: dict[str, int] = {}

    async def run(self, given: dict[str, Any]) -> int:
        """Go through the exercise with a person."""
        print(f"\n{self.title}")
        await self._show(self.head)
        if await self._show_next("Predict"):
            signals.read_line("\nPress Enter to go on: ")
        if not self.exercise.beats:
            with (
                TemporaryDirectory(ignore_cleanup_errors=True) as folder,
                ledger(Path(folder) / "x"),
            ):
                await run_without_temporal()
        for beat in self.exercise.beats:
            if isinstance(beat, dict):
                await self._place(beat | given)
                continue
            if beat.startswith("do "):
                await self._show_next("Do")
            await self._wait_for(beat.removeprefix("do "))
        await self._show_next("Observe")
        self._evidence()
        await self._show_next("Explain")
        return 0

    async def _place(self, fields: dict[str, Any]) -> None:
        """Place an order; a charge that was made before, some cents dearer, as a new request."""
        raw: dict[str, Any] = PATIENT | fields
        raw["order_id"] = made_up_id()
        if self.exercise.kind is ChargeWorkflow:
            raw["order_id"] = charge_id(raw)
            while effects_of(raw["order_id"], "charge"):
                raw["amount_cents"] += 1
                raw["order_id"] = charge_id(raw)
        self.ids.append(raw["order_id"])
        self.before[raw["order_id"]] = store.count(raw["order_id"], "charge_payment")
        await start(self.client, self.exercise.kind, raw)
        address = self.client.service_client.config.target_host
        ui = f"{web_ui(address)}/namespaces/{self.client.namespace}/workflows/{self.ids[-1]}"
        print(f"\n{self.ids[-1]} is placed; see it: {ui}")

    async def _show_next(self, label: str) -> bool:
        """Show the next part if it has this label."""
        if not self.parts or not self.parts[0].startswith(f"**{label}.**"):
            return False
        await self._show(self.parts.pop(0))
        return True

    async def _show(self, text: str) -> None:
        """Show a part with the real pid and order id in it."""
        if self.ids and "PID" in text:
            text = text.replace("PID", await self._worker())
        text = re.sub(r"\bORDER_ID\b", self.ids[-1] if self.ids else "ORDER_ID", text)
        print("\n" + plain(text), flush=True)

    async def _worker(self) -> str:
        """Find the process that has the newest order, once one has taken it up."""
        while True:
            handle, pid = self.client.get_workflow_handle(self.ids[-1]), ""
            async for event in handle.fetch_history_events():
                if event.HasField("workflow_task_completed_event_attributes"):
                    identity = event.workflow_task_completed_event_attributes.identity
                    pid = identity.partition("@")[0]
            if pid:
                return pid
            await asyncio.sleep(0.1)

    async def _wait_for(self, cue: str) -> None:
        """Wait until a person did something or the order came so far, and say what is awaited."""
        if cue == "enter":
            signals.read_line("\nPress Enter when that is done: ")
            return
        line, started, seen = Line(), time.monotonic(), False
        while not seen:
            line.show(f"waiting for {SIGHTS[cue]}", time.monotonic() - started)
            if self.stage:
                self.stage.revive()
            try:
                seen = await self._sees(cue)
            except RPCError as error:
                if error.status not in (*signals.SERVER_DOWN, RPCStatusCode.DEADLINE_EXCEEDED):
                    raise
                seen = cue == "server silent"
            await asyncio.sleep(0.2)
        line.end()

    async def _sees(self, cue: str) -> bool:
        """Tell whether a cue has come, or never will because the order has ended without it."""
        if cue.startswith("server"):
            await self.client.count_workflows("", rpc_timeout=signals.RPC_TIMEOUT)
            return cue == "server answers"
        handle = self.client.get_workflow_handle(self.ids[-1])
        if cue in ("silent", "answers"):
            silent = (await signals.ask(handle))[1] == signals.silent()
            if silent == (cue == "silent"):
                return True
        elif await come(self.client, self.ids[-1:], cue, self.before.get(self.ids[-1], 0)):
            return True
        # A reset makes another run of an order that has ended: then the cue may still come.
        ended = await come(self.client, self.ids[-1:], "end")
        return ended and self.exercise is not EXERCISES[12]

    def _evidence(self) -> None:
        """Show what the ledger and the history say, by the commands that show it at any time."""
        for order_id in self.ids:
            for script, *words in (("charge_store.py",), ("signals.py", "history")):
                print(f"\n$ {command(script)} {' '.join([*words, order_id])}", flush=True)
                subprocess.run([sys.executable, str(HERE / script), *words, order_id], check=False)


# Load: how many orders a machine does, and what one costs.


async def run_load(options: argparse.Namespace) -> int:
    """Run many orders on one worker; say how long each took and what it cost."""
    wait = options.wait_seconds or 0
    async with private_stage() as stage:
        worker = stage.start_worker()
        started, line = time.monotonic(), Line()
        loading = asyncio.create_task(load(stage.client, options.orders, wait))
        # Ten times what an order takes on two cores; who is not done then never will be.
        limit = started + 120 + 2 * wait + options.orders
        while not loading.done() and time.monotonic() < limit:
            line.show(f"orders {ended_orders()}/{options.orders}")
            await asyncio.wait([loading], timeout=1)
        line.show(f"orders {ended_orders()}/{options.orders}")
        line.end()
        if not loading.done():
            sys.exit(f"only {ended_orders()} of {options.orders} orders ended in time")
        seconds = time.monotonic() - started
        took = sorted(loading.result())
        stage.kill_worker(worker)
        worker_cpu, memory = children_used()
        await stage.kill_server()
        server_cpu = children_used()[0] - worker_cpu
        say(f"{options.orders / seconds:.1f} orders/s, {seconds:.1f} s in all")
        if not wait:
            say(f"median {median(took):.2f} s, 99th percentile {took[len(took) * 99 // 100]:.2f} s")
        each = 1000 / options.orders
        say(f"CPU ms per order: worker {worker_cpu * each:.0f}, server {server_cpu * each:.0f}")
        say(f"worker memory {memory:.0f} MB at most")
        ends = Counter(endings().values())
        wrong = [f"{ends[end]} orders {end}" for end in ends if end != "COMPLETED"] + store.audit()
        for problem in wrong:
            print(problem, file=sys.stderr)
        say("NOT HELD" if wrong else "audit clean")
    return 1 if wrong else 0


async def load(client: Client, orders: int, wait: float) -> list[float]:
    """Run orders, up to 200 in flight, or all at once if they wait; return the seconds of each."""
    # The server lets only some hundreds wait for results, so those that sleep are counted instead.
    places = asyncio.Semaphore(200)
    # When 10,000 wake at once, an order may have its next turn only minutes later: not its fault.
    fields = PATIENT | {"wait_seconds": wait, "review_seconds": 0, "deadline_seconds": 86_400}

    async def one(number: int) -> float:
        raw = fields | {"order_id": f"load-{number}"}
        async with places:
            started = time.monotonic()
            handle = await start(client, OrderWorkflow, raw, task_timeout=None)
            if not wait:
                with suppress(WorkflowFailureError):  # its outcome says so too
                    await handle.result()
            return time.monotonic() - started

    took = await asyncio.gather(*map(one, range(orders)))
    while ended_orders() < orders:
        await asyncio.sleep(0.5)
    return took


def children_used() -> tuple[float, float]:
    """Return what our ended processes used: CPU seconds, and the memory of the largest in MB."""
    if sys.platform == "win32":
        return float("nan"), float("nan")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return used.ru_utime + used.ru_stime, used.ru_maxrss / unit


class Line:
    """A line of progress: redrawn in place on a terminal, printed when it changes on a pipe."""

    def __init__(self) -> None:
        self.in_place, self.text = sys.stdout.isatty(), ""

    def show(self, text: str, seconds: float | None = None) -> None:
        """Show the text, on a terminal with the seconds so far."""
        if self.in_place:
            clock = "" if seconds is None else f"{seconds:4.0f} s  "
            print(f"\r\x1b[K{clock}{text}"[:85], end="", flush=True)
        elif text != self.text:
            say(text)
        self.text = text

    def end(self) -> None:
        """Leave the line as it is."""
        if self.in_place and self.text:
            print()


async def pollers(client: Client, queue: str) -> list[str]:
    """List the processes of the workers that poll a task queue, the most recent first."""
    request = DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=TaskQueue(name=queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    answer = await client.workflow_service.describe_task_queue(request)
    recent = sorted(answer.pollers, key=lambda poller: -poller.last_access_time.ToNanoseconds())
    return [poller.identity.partition("@")[0] for poller in recent]


async def preflight(client: Client, stage: Stage | None) -> None:
    """Say which server and which workers are there; wait for a worker if there is none."""
    address = client.service_client.config.target_host
    say(f"server: {address}, namespace {client.namespace}, Web UI: {web_ui(address)}")
    line, started = Line(), time.monotonic()
    while not (found := await pollers(client, ORDERS_QUEUE)):
        advice = f"no worker; start one in another terminal: {command('worker.py')}"
        if not stage and not sys.stdin.isatty():
            sys.exit(advice)
        line.show("waiting for our worker" if stage else advice, time.monotonic() - started)
        await asyncio.sleep(0.5)
    line.end()
    shipping = await pollers(client, SHIPPING_QUEUE) or ["none"]
    say(f"worker: {found[0]} serves {ORDERS_QUEUE}, {shipping[0]} serves {SHIPPING_QUEUE}")


async def run_prompts(_: argparse.Namespace) -> int:
    """Offer the exercises, ask what they need, and go through one."""
    async with temporal() as (client, stage):
        await preflight(client, stage)
        titles = {number: title for number, (title, _) in sections().items()}
        for number, title in titles.items():
            say(f"{number:3}  {title}")
        number = prompt("Exercise", "1", partial(chosen, titles))
        given = {name: prompt(*PROMPTS[name]) for name in EXERCISES[number].asks}
        return await Lesson(number, client, stage).run(given)


def chosen(titles: dict[int, str], text: str) -> int:
    """Read the number of an exercise."""
    if not text.isdecimal() or int(text) not in titles:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(map(str, titles))}")
    return int(text)


def prompt(question: str, default: str, read: Callable[[str], Any]) -> Any:
    """Ask until the answer can be read; nothing, or the end of input, takes the default."""
    while True:
        try:
            return read(signals.read_line(f"{question} [{default}]: ") or default)
        except argparse.ArgumentTypeError as error:
            say(f"  {error}")


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
    names = f"STEP is one of {', '.join(STEPS)}. FAULT is one of {', '.join(FAULTS)}."
    charge = commands.add_parser("charge", help="wait, then charge: lesson one", epilog=names)
    order = commands.add_parser("order", help="place an order", epilog=names)
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
    parser = store.Parser(description="Place orders, and crash things on purpose.")
    commands = parser.add_subparsers(dest="command", title="commands (without one: the exercises)")
    add_orders(commands)
    crash = commands.add_parser("crash", help="the crash tests, on a server of their own")
    tests = list(dict.fromkeys([test.name for test in CRASH_TESTS] + ["no-temporal"]))
    crash.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(tests)}")
    chaos = commands.add_parser("chaos", help="many orders under many kills")
    chaos.add_argument("--orders", type=signals.positive, default=60, help="default 60")
    chaos.add_argument("--kills", type=signals.positive, default=10, help="of workers; default 10")
    chaos.add_argument("--seed", type=int, default=1, help="of what is drawn; default 1")
    load = commands.add_parser("load", help="many orders, and what each costs")
    load.add_argument("--orders", type=signals.positive, default=200, help="default 200")
    seconds = ruled("wait_seconds", float)
    load.add_argument("--wait", dest="wait_seconds", type=seconds, help="seconds they sleep first")
    options: argparse.Namespace = parser.parse_args()
    if unknown := set(getattr(options, "names", [])) - set(tests):
        crash.error(f"no crash test {min(unknown)}; there are {', '.join(tests)}")
    if getattr(options, "simulate", None):
        options.simulate = dict(options.simulate)
    return options


def main() -> int:
    """Run one command."""
    options = parse_arguments()
    # A plain kill should clean up after us like Ctrl+C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commands = {
        "charge": run_charge,
        "order": run_order,
        "crash": run_crash,
        "chaos": run_chaos,
        "load": run_load,
        None: run_prompts,
    }
    try:
        return asyncio.run(commands[options.command](options))
    except RPCError as error:
        sys.exit(f"the Temporal server refuses: {store.printable(error)}")


if __name__ == "__main__":
    store.run_script(main)
