"""Talk to a running order, and look at it: approve it, cancel it, watch it, draw its life.

A signal needs no worker: the server keeps it until one comes. An update and a query are answered
by a worker, so without one these commands say how to start it.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

if __name__ == "__main__":  # Ctrl+C in the second of imports that follows: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from temporalio.api.enums.v1 import EventType, TimeoutType, WorkflowTaskFailedCause
from temporalio.client import (
    Client,
    WorkflowExecutionDescription,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowQueryFailedError,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.service import RPCError, RPCStatusCode

import charge_store as store
from activities import number
from charge_store import fit, printable, say
from worker import Parser, command, connect, run_script
from workflows import HEARTBEAT, NOTE_LENGTH, START_TO_CLOSE

Handle = WorkflowHandle[Any, Any]
RUNNING = WorkflowExecutionStatus.RUNNING
# What calls end with while the server is down, dies or starts.
SERVER_DOWN = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.UNKNOWN)
RPC_TIMEOUT = timedelta(seconds=1.5)  # a worker that lives answers within milliseconds
TRACKER = {  # what is done once an order has left a state
    "RECEIVING": "received",
    "VALIDATING": "validated",
    "RESERVING": "goods reserved",
    "WAITING": "waited as asked",
    "AWAITING_REVIEW": "reviewed",
    "CHARGING": "charged",
    "SHIPPING": "shipped",
}


def see(verb: str, order_id: str = "") -> str:
    """Spell one of our commands."""
    return f"{command('signals.py')} {verb} {order_id}".strip()


# The terminal. Where a message names a command to type, the command ends it, after a colon.


class Keyboard:
    """What a person types, read beside the event loop: a wait may end by Enter or otherwise."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        # Not by input(), which cannot be interrupted, nor by add_reader(), which Windows has not.
        threading.Thread(target=self._read, args=[asyncio.get_running_loop()], daemon=True).start()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hand lines over to the event loop until the end of input, which is as good as a q."""
        hand_over, put = loop.call_soon_threadsafe, self._lines.put_nowait
        with suppress(RuntimeError):  # the loop has ended
            # Unbuffered: Python cannot exit while a thread waits in a buffered read.
            with suppress(OSError), open(0, "rb", buffering=0, closefd=False) as typed:
                for line in typed:
                    hand_over(put, line.decode(errors="replace").strip())
            hand_over(put, "q")

    async def line(self, seconds: float | None = None) -> str | None:
        """Return a line, or None if none comes in time; q and the end of input raise EOFError."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                line = await self._lines.get()
                if line.lower() == "q":
                    raise EOFError
                return line
        return None

    async def overhear(self) -> None:
        """Let go what a person at a terminal types unasked; who leaves has left."""
        while sys.stdin.isatty() and await self.line(0) is not None:
            pass

    async def ask(self, question: str, default: str = "", read: Callable[[str], Any] = str) -> Any:
        """Ask until the answer can be read; nothing takes the default, if there is one."""
        question += f" [{default}]: " if default else ": "
        while True:
            await self.overhear()  # an Enter too many
            print(question, end="", flush=True)
            answer = await self.line()
            if not sys.stdin.isatty():
                print()
            try:
                return read(answer or default)
            except argparse.ArgumentTypeError as error:
                say(f"  {error}", indent=2)


class Screen:
    """What is drawn: on a terminal again and again in place, elsewhere a line when it changes."""

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain or not sys.stdout.isatty()
        self.started, self.shown, self.height = time.monotonic(), "", 0

    def show(self, headline: str, lines: Iterable[str] = ()) -> None:
        """Show a headline with the seconds so far, and lines that only a terminal gets."""
        told = f"{time.monotonic() - self.started:6.1f} s  {headline}"
        if self.plain and headline != self.shown:
            say(told)
        elif not self.plain:
            size = shutil.get_terminal_size()
            self.clear()
            for line in [*fit(told, sys.stdout).splitlines(), *map(printable, lines)]:
                rows = 1 + (len(line) - 1) // size.columns  # a long one wraps
                if self.height + rows < size.lines:
                    print(line)
                    self.height += rows
        self.shown = headline

    def clear(self) -> None:
        """Take away what is drawn."""
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="", flush=True)
        self.height = 0


# Messages to an order.


async def send(client: Client, options: argparse.Namespace) -> None:
    """Send approve, reject or cancel; say of a decision whether it is the one that stands."""
    handle, verb = await addressee(client, options), options.command
    if verb == "cancel" and (await ask(handle))[1] == "COMPENSATING":
        sys.exit(f"too late: {handle.id} is being undone already; see: {see('watch', handle.id)}")
    await handle.signal(verb, options.note)
    status, state = await ask(handle)
    if status and verb != "cancel" and not str(status["decision"]).startswith(verb):
        stands = status["decision"] or state
        sys.exit(f"{handle.id} is {stands} already: the {verb} was only recorded")
    say(f"{handle.id}: {verb} sent; {state}")


async def update_address(client: Client, options: argparse.Namespace) -> None:
    """Change the address by an update, which, unlike a signal, has an answer."""
    handle = await addressee(client, options)
    try:
        await handle.execute_update("update_address", options.address, rpc_timeout=RPC_TIMEOUT)
    except WorkflowUpdateFailedError as error:
        sys.exit(f"{handle.id}: refused: {getattr(error.cause, 'message', error)}")
    except (WorkflowUpdateRPCTimeoutOrCancelledError, RPCError):
        sys.exit(f"{handle.id}: it may still be changed; {await silence(handle)}")
    say(f"{handle.id}: goes to {options.address}")


async def addressee(client: Client, options: argparse.Namespace) -> Handle:
    """Find the running order that a message is for, offering a choice if none was named."""
    order_id = options.order_id
    if order_id is None:
        order_id = await offer(client, options.command)
    handle, description = await find(client, order_id)
    if description.workflow_type != "OrderWorkflow":
        sys.exit(f"{order_id} is no order, it takes no messages; see: {see('watch', order_id)}")
    if description.status != RUNNING:
        sys.exit(f"too late: {order_id} has ended; see: {see('status', order_id)}")
    return handle


async def offer(client: Client, verb: str) -> str:
    """Let a person on a terminal pick one of the orders that a message could be for."""
    if not sys.stdin.isatty():
        sys.exit(f"name an order: {see(verb, 'ORDER_ID')}")
    orders = "WorkflowType = 'OrderWorkflow' AND ExecutionStatus = 'Running'"
    found = [order.id async for order in client.list_workflows(orders, limit=20)]
    answers = await asyncio.gather(*(ask(client.get_workflow_handle(id_)) for id_ in found))
    choices: dict[str, str] = {}
    cents = amounts()
    for order_id, (status, state) in zip(found, answers, strict=True):
        if verb == "cancel" or state == "AWAITING_REVIEW" or not status:
            choices[str(len(choices) + 1)] = order_id
            amount, state = cents.get(order_id, "-"), state.partition(";")[0]
            say(f"{len(choices):3}  {state:15} {amount:>10}  {order_id}", indent=5)
    if not choices:
        sys.exit(f"no order waits to {verb}; see: {see('list')}")
    only = "1" if len(choices) == 1 and verb != "cancel" else ""  # Enter alone undoes nothing
    rule = f"must be a number from 1 to {len(choices)} or one of these ids"
    known = list(choices.values()).__contains__
    pick = partial(take, lambda typed: choices.get(typed, typed), known, rule)
    with suppress(EOFError):
        return str(await Keyboard().ask("Which one, or q", only, pick))
    print()  # Ctrl+D ends no line
    sys.exit(f"no {verb} was sent")


# Looking at orders.


async def find(client: Client, order_id: str) -> tuple[Handle, WorkflowExecutionDescription]:
    """Get a workflow's handle and description, or exit if there is none."""
    handle = client.get_workflow_handle(order_id)
    try:
        return handle, await handle.describe()
    except RPCError as error:
        if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            raise
        sys.exit(f"unknown order '{order_id}'; see: {see('list')}")


async def ask(handle: Handle) -> tuple[dict[str, Any], str]:
    """Ask an order for its status; return that, empty if there is none, and where it stands."""
    description = await handle.describe()
    if description.workflow_type != "OrderWorkflow" and description.status:
        return {}, description.status.name  # it has no such query; Temporal's word will do
    task = description.raw_description.pending_workflow_task
    since = task.original_scheduled_time.ToMilliseconds() / 1000
    untaken = task.attempt > 0 and not task.HasField("started_time")
    if untaken and time.time() - since > RPC_TIMEOUT.total_seconds():
        return {}, await silence(handle)  # a question would only wait behind that task
    # A worker that has not got the order in memory replays a thousand events in under a second.
    patience = RPC_TIMEOUT + timedelta(milliseconds=description.history_length)
    try:
        # Not rpc_timeout, which is for each try of the SDK's; this is for all of them.
        async with asyncio.timeout(patience.total_seconds()):
            status = dict(await handle.query("status"))
    except WorkflowQueryFailedError:
        return {}, f"the workflow's code fails; see: {see('history', handle.id)}"
    except (RPCError, TimeoutError) as error:
        if isinstance(error, RPCError) and error.status in SERVER_DOWN:
            raise
        return {}, await silence(handle)
    return status, str(status["state"])


async def silence(handle: Handle) -> str:
    """Say why a question has no answer, and what to do."""
    if await code_failure(handle) is not None:
        return f"the workflow's code fails; see: {see('history', handle.id)}"
    now = await handle.describe()
    if now.raw_description.pending_workflow_task.HasField("started_time"):
        return f"a worker replays {now.history_length} events; if it died, another will within 10 s"
    return f"no worker answers; start one in another terminal: {command('worker.py')}"


async def code_failure(handle: Handle) -> str | None:
    """Tell how a worker last failed in the workflow's code; None: it did not, or it was killed."""
    kinds = [f"WORKFLOW_TASK_{how}" for how in ("FAILED", "COMPLETED", "TIMED_OUT")]
    ends = [event for event in await read_history(handle) if event.kind in (*kinds, "RESET")]
    failed = ends and ends[-1].kind == "WORKFLOW_TASK_FAILED"
    return why(ends[-1].a.failure) if failed else None


async def status(client: Client, options: argparse.Namespace) -> None:
    """Print an order's status, or what Temporal knows of another workflow."""
    handle, description = await find(client, options.order_id)
    status, state = await ask(handle)
    if not status and description.workflow_type == "OrderWorkflow":
        sys.exit(f"{handle.id}: {state}")
    if not status:
        status = {"order_id": handle.id, "workflow": description.workflow_type, "state": state}
    elif description.status and description.status.name in ("TERMINATED", "TIMED_OUT"):
        status["state"] += f", then {description.status.name}: nothing was undone"
    for name, value in status.items():
        say(f"{name:18}{'-' if value in (None, '') else value}", indent=18)


def amounts() -> dict[str, str]:
    """Read from the ledger what each order costs."""
    rows = store.execute("SELECT order_id, amount_cents FROM effects")
    return {row["order_id"]: f"{row['amount_cents'] / 100:.2f}" for row in rows}


async def list_orders(client: Client, options: argparse.Namespace) -> None:
    """List the newest orders and charges."""
    kinds, cents = "WorkflowType IN ('OrderWorkflow', 'ChargeWorkflow')", amounts()
    found = [run async for run in client.list_workflows(kinds)]
    runs = sorted(found, key=lambda run: run.start_time, reverse=True)
    for n, run in enumerate(runs[: options.limit]):
        state = run.status.name if run.status else ""
        if state == "COMPLETED":  # to Temporal a rejected order is too: what it returned says more
            state = await end_of(client.get_workflow_handle(run.id, run_id=run.run_id))
        started = f"{run.start_time.astimezone():%m-%d %H:%M:%S}"
        again = "  (another run of it)" if run.id in [older.id for older in runs[n + 1 :]] else ""
        say(f"{started}  {state:10} {cents.get(run.id, '-'):>10}  {run.id}{again}", indent=16)
    if len(runs) > options.limit:
        say(f"{len(runs) - options.limit} older ones are not shown; --limit {len(runs)} shows all")
    if not runs:
        say(f"no orders yet; place one: {command('starter.py')} order")


async def events(options: argparse.Namespace) -> None:
    """Print an order's audit trail and its effects, from the ledger."""
    if not store.say_order(options.order_id):
        sys.exit(f"no events of '{options.order_id}' in {store.store_path()}; see: {see('list')}")


# Watching an order.


async def follow(client: Client, order_id: str, tend: Callable[[], Any] | None = None) -> None:
    """Draw an order until it ends: in place on a terminal, else a line at each change.

    `tend` looks after workers of ours, whose lines stand between ours. Exits with 1 if it failed.
    """
    handle, description = await find(client, order_id)
    screen = Screen(plain=tend is not None)
    while description.status == RUNNING:
        try:
            async with asyncio.timeout(4):  # the SDK repeats a call for up to 10 s
                screen.show(*await picture(handle))
                await asyncio.sleep(0.2)
                description = await handle.describe()
        except (RPCError, TimeoutError) as error:
            if isinstance(error, RPCError) and error.status not in SERVER_DOWN:
                raise
            screen.show("no answer; the server keeps the order, so we wait for it")
        if tend:
            tend()
    screen.clear()  # it is not so any more
    if description.status != WorkflowExecutionStatus.COMPLETED:
        end = (await read_history(handle))[-1]
        sys.exit(f"{handle.id} FAILED: {SENTENCES[end.kind](end)}")
    say(f"{handle.id} {await end_of(handle)}")


async def end_of(handle: Handle) -> str:
    """Tell how a workflow ended: its result, or its error's type."""
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        return str(getattr(error.cause, "type", type(error.cause).__name__))
    return str(result["status"] if isinstance(result, dict) else result or "COMPLETED")


async def picture(handle: Handle) -> tuple[str, list[str]]:
    """Return an order's headline and its steps: done, now, still to come."""
    _, state = await ask(handle)
    activities = (await handle.describe()).raw_description.pending_activities
    attempts = [activity.attempt for activity in activities if activity.attempt > 1]
    headline = state + (f", attempt {attempts[0]}" if attempts else "")
    left, lines, box = "", [], "x"
    if state in ("WAITING", "AWAITING_REVIEW"):
        timers = [event for event in await read_history(handle) if event.kind == "TIMER_STARTED"]
        for timer in timers[-1:]:  # of a run that has just begun, after a reset, there is none
            left = f": {max(0, timer.at + timer_seconds(timer) - time.time()):.0f} s left"
            if timer.name == "Review by person":
                headline += f"; decide: {see('approve', handle.id)}"
    for step, done in TRACKER.items() if state in TRACKER else ():
        lines.append(f"    [>] {done}{left}" if step == state else f"    [{box}] {done}")
        box = " " if step == state else box
    return headline, lines


# The event history in plain sentences.


@dataclass
class Event:
    """An event of Temporal's history."""

    kind: str
    at: float  # as a Unix time
    a: Any  # its attributes
    begun: int  # the id of the event that began what this one is about
    name: str  # what that is called
    worker: str  # who had the task, if it is one that somebody had


SENTENCES: dict[str, Callable[[Event], str]] = {
    "STARTED": lambda e: f"Temporal has it, as {e.a.workflow_type.name}",
    "TERMINATED": lambda _: "terminated: no code ran, nothing was undone",
    "TIMED_OUT": lambda _: "timed out: no code ran, nothing was undone",
    "CANCEL_REQUESTED": lambda _: "somebody cancels the workflow",
    "SIGNALED": lambda e: f"signal {e.a.signal_name} comes",
    "UPDATE_ACCEPTED": lambda e: f"update {e.a.accepted_request.input.name} is accepted",
    "WORKFLOW_TASK_STARTED": lambda e: f"{e.worker} takes the workflow up",
    "WORKFLOW_TASK_TIMED_OUT": lambda _: "that worker does not answer; any other may take it",
    "WORKFLOW_TASK_FAILED": lambda e: f"the code fails on {e.worker}: {why(e.a.failure)}",
    "RESET": lambda _: "reset to here: from now on this is another run",
    "ACTIVITY_TASK_STARTED": lambda e: f"{e.name} runs on {e.worker}{again(e.a)}",
    "ACTIVITY_TASK_TIMED_OUT": lambda e: f"{e.name} failed: {why(e.a.failure)}",
    "ACTIVITY_TASK_CANCEL_REQUESTED": lambda e: f"{e.name} is asked to stop",
    "TIMER_STARTED": lambda e: f"the timer of {timer_seconds(e):g} s starts: {e.name}",
    "TIMER_FIRED": lambda e: f"the timer fires: {e.name}",
    "TIMER_CANCELED": lambda e: f"the timer is not needed any more: {e.name}",
    "CHILD_WORKFLOW_EXECUTION_STARTED": lambda e: f"{e.name} starts",
    "CHILD_WORKFLOW_EXECUTION_TERMINATED": lambda e: f"{e.name} was terminated",
}
for _what in ("", "ACTIVITY_TASK_", "CHILD_WORKFLOW_EXECUTION_"):  # these end in the same ways
    SENTENCES[f"{_what}COMPLETED"] = lambda e: f"{e.name} is complete"
    SENTENCES[f"{_what}FAILED"] = lambda e: f"{e.name} failed: {why(e.a.failure)}"
    SENTENCES[f"{_what}CANCELED"] = lambda e: f"{e.name} was cancelled"
# A message came while the workflow's last task was done: that is done again, the code is all right.
OVERTAKEN = WorkflowTaskFailedCause.WORKFLOW_TASK_FAILED_CAUSE_UNHANDLED_COMMAND


def why(failure: Any) -> str:
    """Say what is at the bottom of a failure, and explain a missed heartbeat."""
    while failure.HasField("cause"):
        failure = failure.cause
    missed = failure.timeout_failure_info.timeout_type == TimeoutType.TIMEOUT_TYPE_HEARTBEAT
    told = failure.message or failure.application_failure_info.type  # an `assert` says nothing
    return str(told) + (" (its worker fell silent)" if missed else "")


def timer_seconds(event: Event) -> float:
    """Tell how long a timer is."""
    return float(event.a.start_to_fire_timeout.ToMilliseconds() / 1000)


def again(attempt: Any) -> str:
    """Say of an attempt that is not the first what became of the one before."""
    before = f"before it: {why(attempt.last_failure)}"
    return f", attempt {attempt.attempt}; {before}" if attempt.attempt > 1 else ""


async def read_history(handle: Handle) -> list[Event]:
    """Read a workflow's history from the server."""
    return read_events([event async for event in handle.fetch_history_events()])


def read_events(history: Iterable[Any]) -> list[Event]:
    """Make the server's events plain."""
    events, names = [], dict[int, str]()
    for event in history:
        kind = EventType.Name(event.event_type).removeprefix("EVENT_TYPE_")
        kind = kind.removeprefix("WORKFLOW_EXECUTION_")
        a = getattr(event, str(event.WhichOneof("attributes")))
        ids = [getattr(a, f"{how}_event_id", 0) for how in ("scheduled", "initiated", "started")]
        begun = next(filter(None, ids), event.event_id)
        if kind == "ACTIVITY_TASK_SCHEDULED":
            names[begun] = a.activity_type.name
        elif kind == "TIMER_STARTED":
            names[begun] = str(json.loads(event.user_metadata.summary.data or '"timer"'))
        elif kind == "START_CHILD_WORKFLOW_EXECUTION_INITIATED":
            names[begun] = a.workflow_id
        elif kind == "WORKFLOW_TASK_FAILED" and a.new_run_id:
            kind = "RESET"
        elif kind == "WORKFLOW_TASK_FAILED" and a.cause == OVERTAKEN:
            kind = "WORKFLOW_TASK_OVERTAKEN"
        at, name = event.event_time.ToNanoseconds() / 1e9, names.get(begun, "the workflow")
        pid = getattr(a, "identity", "").partition("@")[0] if "_TASK_" in kind else ""
        events.append(Event(kind, at, a, begun, name, f"worker {pid}" if pid else ""))
    return events


async def history(client: Client, options: argparse.Namespace) -> None:
    """Draw an order's life, then tell its history; a worker is named when it takes over."""
    handle, description = await find(client, options.order_id)
    events = await read_history(handle)
    await show_lanes(handle)
    taken_up_by = ""
    for event in sorted(events, key=lambda event: event.at):
        takes_up = event.kind == "WORKFLOW_TASK_STARTED"
        if event.kind in SENTENCES and not (takes_up and event.worker == taken_up_by):
            sentence = SENTENCES[event.kind](event)
            say(f"{event.at - events[0].at:7.2f} s  {sentence}", indent=11)
        taken_up_by = event.worker if takes_up else taken_up_by
    if description.status == RUNNING:  # what one that has ended left behind, nobody waits for
        for activity in description.raw_description.pending_activities:
            say(f"      now  {activity.activity_type.name}{again(activity)}", indent=11)


async def show_lanes(handle: Handle) -> None:
    """Draw an order's life, and print its effects."""
    bars = find_bars(await read_history(handle), store.events_of(handle.id), time.time())
    columns = min(79, shutil.get_terminal_size().columns - 1)
    for line in (*lanes(bars, columns), *map(store.proof, store.effects_of(handle.id))):
        say(line)
    print()


# An order's life as lanes: Temporal's, and one for each worker, over time.

LABEL = 15  # columns for a lane's name
TICKS = [n * unit for unit in (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600) for n in (1, 2, 5)]
LEGEND = "X its worker died, x failed, ? the code failed, / stopped, ! message, > goes on, | end"
LEGEND += ", . no server, ~ time shortened, - ran the code"
RANK = " -=~.|>!/?xX"  # where two marks meet, the latter is drawn
WAITS = ("TIMER_STARTED", "CHILD_WORKFLOW_EXECUTION_STARTED")
MOMENTS = {"STARTED": " ", "WORKFLOW_TASK_COMPLETED": "-", "WORKFLOW_TASK_FAILED": "?"}
MOMENTS |= {"SIGNALED": "!", "UPDATE_ACCEPTED": "!", "CANCEL_REQUESTED": "!"}
DEATHS = {"killed": "X", "stopped": "/"}  # events of who ends workers, with the worker's pid


@dataclass
class Bar:
    """Something on a lane from one moment to another, with a mark at its end."""

    lane: str
    begin: float
    end: float
    mark: str
    name: str = ""


def find_bars(events: list[Event], rows: list[dict[str, Any]], now: float) -> list[Bar]:
    """Find what is to be drawn in an order's history and in its events in the ledger."""
    ended = events[-1].kind in WorkflowExecutionStatus.__members__
    until, mark = (events[-1].at, "|") if ended else (now, ">")
    bars: list[Bar] = []
    waits: dict[int, Bar] = {}  # by the id of the event that began them
    for event in events:
        if event.kind in WAITS and event.name != "Deadline":
            # A child is called by the first word of its id, ship-<order id>.
            name = event.name.partition("-")[0]
            waits[event.begun] = Bar("Temporal", event.at, until, mark, name)
        elif event.begun in waits:
            waits[event.begun].end, waits[event.begun].mark = event.at, "|"
        elif event.kind in MOMENTS:
            lane = event.worker or "Temporal"
            bars.append(Bar(lane, event.at, event.at, MOMENTS[event.kind]))
    return [*bars, *waits.values(), *ledger_bars(rows, bars, until, now)]


def ledger_bars(rows: list[dict[str, Any]], seen: list[Bar], until: float, now: float) -> list[Bar]:
    """Make a bar of each attempt, death and outage; `seen` tells when workers lived too."""
    rows = [row | {"lane": f"worker {row.get('worker')}"} for row in rows]
    attempts = [row for row in rows if row["attempt"]]
    notes = [row for row in rows if not row["attempt"] and row["ts"] <= until]
    alive = [(bar.lane, bar.begin) for bar in seen] + [(row["lane"], row["ts"]) for row in attempts]
    last_seen = dict(sorted(alive))
    died: dict[str, Bar] = {}  # by their lane
    bars: list[Bar] = []
    for row in notes:
        if row["type"] in DEATHS:
            died[row["lane"]] = Bar(row["lane"], row["ts"], row["ts"], DEATHS[row["type"]])
        elif row["type"] == "server" and row["state"] == "dead":
            bars.append(Bar("Temporal", row["ts"], until, "."))
        elif row["type"] == "server" and bars:
            bars[-1].end = row["ts"]
    longest = START_TO_CLOSE.total_seconds()
    for n, row in enumerate(attempts):
        lane, end, ended = row["lane"], row["ts"] + row.get("seconds", 0), row.get("ended")
        # The step's next attempt, unless that is its first anew: after a reset, say.
        later = next((a for a in attempts[n + 1 :] if a["type"] == row["type"]), row)
        again = later["ts"] if later["attempt"] > row["attempt"] else 0
        gone = last_seen[lane] <= (again or row["ts"])  # nothing was seen of its worker after that
        if ended == "ok":  # and yet tried again, if the answer was lost with its worker
            mark = "X" if again and gone and lane not in died else "|"
        elif ended:
            mark = "/" if ended.startswith("CancelledError") else "x"
        elif lane in died:
            end, mark = died[lane].end, died[lane].mark
        elif not again and (until == now or now - row["ts"] < longest):
            end, mark = now, ">"
        else:  # nobody saw the end, but another attempt comes after a heartbeat's silence
            end, mark = min(again - HEARTBEAT.total_seconds(), end + longest), "X" if gone else "x"
        name = row["type"].partition("_")[0]
        bars.append(Bar(lane, row["ts"], max(row["ts"], end), mark, name))
    return [*bars, *died.values()]


def lanes(bars: list[Bar], columns: int = 79) -> list[str]:
    """Draw an order's life: the time, the lanes with their bars, and what the marks mean."""
    if not any(bar.mark.strip() for bar in bars):
        return ["no worker has taken it up yet"]
    width = max(20, columns - LABEL)
    shortened, column, clock = time_scale(bars, width)
    drawn = {"Temporal": [" "] * width}
    for bar in sorted(bars + shortened, key=lambda bar: bar.begin):
        lane = drawn.setdefault(bar.lane, [" "] * width)
        fill = bar.mark if bar.mark in ".~" else "="
        begin, end = column[bar.begin], column[bar.end]
        for at, character in enumerate(fill * (end - begin) + bar.mark, begin):
            lane[at] = max(lane[at], character, key=RANK.index)
    seen = set(itertools.chain(*drawn.values()))
    legend = "   ".join(told for told in LEGEND.split(", ") if told[0] in seen)
    # Names where there is room, first of what went wrong, then of what took long.
    for bar in sorted(bars, key=lambda bar: (bar.mark in "|>", bar.begin - bar.end)):
        if bar.name:
            write_name(drawn[bar.lane], bar.name, column[bar.begin], column[bar.end])
    lines = [("", clock), *((name, "".join(drawn[name])) for name in drawn)]
    lines += [("", line) for line in textwrap.wrap(legend, width)]
    return [f"{name[: LABEL - 1]:{LABEL}}{line}".rstrip() for name, line in lines]


def write_name(lane: list[str], name: str, begin: int, end: int) -> None:
    """Write a bar's name into it, else behind it, else before it, if there is room."""
    drawn, length = "".join(lane), len(name) + 1
    inside = max(drawn.find(fill * length, begin, end) for fill in "=~")
    if inside >= 0:
        lane[inside : inside + length] = f"{name} "
    elif end + length < len(lane) and not drawn[end + 1 : end + length + 3].strip(" -"):
        lane[end + 1 : end + 1 + length] = f" {name}"
    elif begin >= length and not drawn[max(0, begin - length - 2) : begin].strip(" -"):
        lane[begin - length : begin] = f"{name} "


def time_scale(bars: list[Bar], width: int) -> tuple[list[Bar], dict[float, int], str]:
    """Lay time out over the columns, idle time shortened where it leaves no room for the rest.

    Returns a bar for each time that is shortened, the column of each moment, and the clock.
    """
    moments = sorted({moment for bar in bars for moment in (bar.begin, bar.end)})
    gaps = [Bar("Temporal", begin, end, "~") for begin, end in itertools.pairwise(moments)]
    # A step takes 10 s at most, START_TO_CLOSE: where nothing happens for more than 12 s, something
    # is waited for. If that is more than twice all the rest, it takes no more room than the rest.
    rest = sum(gap.end - gap.begin for gap in gaps if gap.end - gap.begin <= 12)
    shortened = [gap for gap in gaps if gap.end - gap.begin > max(12, 2 * rest)]
    lengths = [max(1, rest) if gap in shortened else gap.end - gap.begin for gap in gaps]
    scale = (width - 1) / max(0.001, sum(lengths))
    step = next((tick for tick in TICKS if tick * scale >= 9), TICKS[-1])
    clock, tick, place, column = "0 s", step, 0.0, {moments[0]: 0}
    for gap, length in zip(gaps, lengths, strict=True):
        begin, end = gap.begin - moments[0], gap.end - moments[0]
        if gap in shortened:
            tick = end  # which must be told
        while tick <= end:
            text = f"{tick:.3g} s" if tick < 120 else f"{round(tick / 60, 1):g} min"
            # Where there is room; at the right edge a little to the left.
            column_of_tick = round((place + min(tick - begin, length)) * scale)
            at = min(column_of_tick, width - len(text))
            if f" {text}" not in clock and at > len(clock) + 1:
                clock = clock.ljust(at) + text
            tick = (round(tick / step) + 1) * step
        place += length
        column[gap.end] = round(place * scale)
    return shortened, column, clock


# The command line.


def take(convert: Callable[[str], Any], valid: Callable[[Any], bool], rule: str, text: str) -> Any:
    """Take an argument that keeps a rule; of one that does not the rule is told."""
    with suppress(ValueError):
        if valid(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(rule)


positive = partial(take, int, number(1, 100_000, int), "must be a whole number from 1 to 100000")
NOTE_RULE = f"must be at most {NOTE_LENGTH} characters"
note = partial(take, str, lambda text: len(text) <= NOTE_LENGTH, NOTE_RULE)

VERBS: dict[str, tuple[Callable[..., Coroutine[Any, Any, Any]], str]] = {
    "approve": (send, "say yes; without an id on a terminal: offers the waiting orders"),
    "reject": (send, "say no; without an id on a terminal: offers the waiting orders"),
    "cancel": (send, "cancel; without an id on a terminal: offers the running orders"),
    "update-address": (update_address, "change the address, before shipping begins"),
    "status": (status, "ask the workflow where it stands"),
    "watch": (lambda c, o: follow(c, o.order_id), "follow an order to its end; exit 1 if FAILED"),
    "events": (events, "what happened, from the ledger"),
    "history": (history, "what happened, as lanes and from Temporal's history"),
    "list": (list_orders, "the newest orders and charges"),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description="Talk to a running order, or look at it.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for verb, (_, text) in VERBS.items():
        sub = commands.add_parser(verb, help=text, description=text)
        if verb == "list":
            sub.add_argument("--limit", type=positive, default=20, help="default 20")
            continue
        offered = verb in ("approve", "reject", "cancel")
        sub.add_argument("order_id", nargs="?" if offered else None)
        if verb == "update-address":
            sub.add_argument("address")
        if offered:
            word, text = "--reason" if verb == "cancel" else "--note", "why, up to 500 characters"
            sub.add_argument(word, dest="note", metavar="TEXT", type=note, default="", help=text)
    return parser.parse_args()


async def run(options: argparse.Namespace) -> None:
    """Run one command; `events` asks the ledger alone."""
    action = VERBS[options.command][0]
    await (events(options) if action is events else action(await connect(), options))


if __name__ == "__main__":
    run_script(lambda: asyncio.run(run(parse_arguments())))
