"""Talk to a running order, and look at it: approve it, cancel it, watch it, draw its life.

A signal needs no worker: the server keeps it until one comes. An update and a query are answered
by a worker, so without one these commands say how to start it.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from math import ceil, floor
from typing import Any

from temporalio.api.enums.v1 import (
    EventType,
    PendingWorkflowTaskState,
    TaskQueueType,
    TimeoutType,
)
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
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
from charge_store import printable, say
from worker import SERVER_DOWN, Parser, command, connect, run_script, web_ui
from workflows import HEARTBEAT, NOTE_LENGTH

Handle = WorkflowHandle[Any, Any]
RUNNING = WorkflowExecutionStatus.RUNNING
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


# The terminal.


@cache
def keyboard() -> "Keyboard":
    """Return this process's one reader of what is typed."""
    return Keyboard()


class Keyboard:
    """What a person types, read beside the event loop: a wait may end by Enter or otherwise."""

    def __init__(self) -> None:
        self._lines: asyncio.Queue[str | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        # Not by input(), which cannot be interrupted, nor by add_reader(), which Windows has not.
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Read lines until the end of input, for which None stands."""
        rest = b""
        with suppress(OSError):
            while chunk := os.read(0, 4096):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._put(line.decode(errors="replace").strip())
        if rest:
            self._put(rest.decode(errors="replace").strip())
        self._put(None)

    def _put(self, line: str | None) -> None:
        """Hand a line over to the event loop, if that still runs."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._lines.put_nowait, line)

    async def line(self) -> str | None:
        """Return the next line, or None at the end of input."""
        line = await self._lines.get()
        if line is None:
            self._lines.put_nowait(None)
        return line

    def forget(self) -> None:
        """Drop what a person at a terminal typed before being asked; who leaves has left."""
        while sys.stdin.isatty() and not self._lines.empty():
            line = self._lines.get_nowait()
            if line is None or line.lower() == "q":
                self._lines.put_nowait(line)
                return

    async def ask(self, question: str) -> str | None:
        """Ask, and return the answer, or None at the end of input."""
        print(question, end="", flush=True)
        answer = await self.line()
        if answer is None or not sys.stdin.isatty():
            print()
        return answer


class Screen:
    """What is drawn: on a terminal again and again in place, elsewhere a line when it changes."""

    def __init__(self, plain: bool = False) -> None:
        self.plain = plain or not sys.stdout.isatty()
        self.started, self.shown, self.height = time.monotonic(), "", 0

    def show(self, headline: str, lines: Iterable[str] = ()) -> None:
        """Show a headline with the seconds so far, and lines that only a terminal gets."""
        seconds = f"{time.monotonic() - self.started:6.1f} s  "
        if self.plain and headline != self.shown:
            print(printable(seconds + headline), flush=True)
        elif not self.plain:
            size = shutil.get_terminal_size()
            drawn = [seconds + headline, *lines][: size.lines - 1]
            self.clear()
            for line in drawn:  # one that wraps would not be where the next drawing expects it
                print(printable(line)[: size.columns - 1])
            sys.stdout.flush()
            self.height = len(drawn)
        self.shown = headline

    def clear(self) -> None:
        """Take away what is drawn."""
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="", flush=True)
        self.height = 0


# Messages to an order.


async def decide(client: Client, options: argparse.Namespace) -> int:
    """Send approve or reject, and say whether that is the decision which stands."""
    handle = await addressee(client, options)
    await handle.signal(options.command, options.note)
    status, state = await ask(handle)
    if status and not str(status["decision"]).startswith(options.command):
        stands = status["decision"] or state
        sys.exit(f"{handle.id} is {stands} already: the {options.command} was only recorded")
    say(f"{handle.id}: {options.command} sent; {state}")
    return 0


async def cancel(client: Client, options: argparse.Namespace) -> int:
    """Send cancel; an order that was picked from a list is confirmed first."""
    handle = await addressee(client, options)
    if options.order_id is None:
        answer = await keyboard().ask(f"Cancel {printable(handle.id)}? [y/N]: ")
        if (answer or "").lower() != "y":
            sys.exit("nothing was cancelled")
    if (await ask(handle))[1] == "COMPENSATING":
        sys.exit(f"too late: {handle.id} is being undone already; see: {see('watch', handle.id)}")
    await handle.signal("cancel", options.reason)
    say(f"{handle.id}: cancel sent; see: {see('watch', handle.id)}")
    return 0


async def update_address(client: Client, options: argparse.Namespace) -> int:
    """Change the address by an update, which, unlike a signal, has an answer."""
    handle = await addressee(client, options)
    try:
        await handle.execute_update("update_address", options.address, rpc_timeout=RPC_TIMEOUT)
    except WorkflowUpdateFailedError as error:
        sys.exit(f"{handle.id}: refused: {getattr(error.cause, 'message', error)}")
    except WorkflowUpdateRPCTimeoutOrCancelledError:
        sys.exit(f"{handle.id}: {await silence(handle)} (then look: it may still be changed)")
    say(f"{handle.id}: goes to {options.address}")
    return 0


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
    states = await asyncio.gather(*(ask(client.get_workflow_handle(id_)) for id_ in found))
    waiting = [
        order_id
        for order_id, (status, state) in zip(found, states, strict=True)
        if verb == "cancel" or state == "AWAITING_REVIEW" or not status
    ]
    if not waiting:
        sys.exit(f"no order waits to {verb}; see: {see('list')}")
    for number, order_id in enumerate(waiting, 1):
        say(f"{number:3} {order_id}")
    while (answer := await keyboard().ask("Which one [1]: ")) is not None:
        if (answer or "1") in map(str, range(1, len(waiting) + 1)):
            return waiting[int(answer or "1") - 1]
        say(f"a number from 1 to {len(waiting)}, please")
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
    # A worker that has not got the order in memory replays a thousand events in under a second.
    patience = RPC_TIMEOUT + timedelta(milliseconds=description.history_length)
    try:
        query = handle.query("status", rpc_timeout=patience)
        # The RPC's limit is for each try of the SDK's; this one is for all of them.
        status = dict(await asyncio.wait_for(query, patience.total_seconds() + 1))
    except WorkflowQueryFailedError:
        return {}, f"the workflow's code fails; see: {see('history', handle.id)}"
    except (RPCError, TimeoutError) as error:
        if isinstance(error, RPCError) and error.status in SERVER_DOWN:
            raise
        return {}, await silence(handle)
    return status, str(status["state"])


async def silence(handle: Handle) -> str:
    """Say why a question had no answer, and what to do."""
    if await code_failure(handle) is not None:
        return f"the workflow's code fails; see: {see('history', handle.id)}"
    description = await handle.describe()
    task = description.raw_description.pending_workflow_task
    if task.state == PendingWorkflowTaskState.PENDING_WORKFLOW_TASK_STATE_STARTED:
        return (
            f"a worker has taken it up and replays {description.history_length} events;"
            " if it died meanwhile, another one gets it within 10 s"
        )
    return f"no worker answers; start one in another terminal: {command('worker.py')}"


async def pollers(client: Client, queue: str) -> set[int]:
    """Find the processes on this machine that asked a task queue for work of late."""
    request = DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=TaskQueue(name=queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    answer = await client.workflow_service.describe_task_queue(request, timeout=RPC_TIMEOUT)
    found = [poller.identity.partition("@") for poller in answer.pollers]
    here = socket.gethostname()
    return {int(pid) for pid, _, host in found if host == here and pid.isdigit()}


async def code_failure(handle: Handle) -> str | None:
    """Tell how a worker last failed in the workflow's code; None: it did not, or it was killed."""
    failure = None
    async for event in handle.fetch_history_events():
        if event.HasField("workflow_task_failed_event_attributes"):
            failed = event.workflow_task_failed_event_attributes
            failure = None if failed.new_run_id else why(failed.failure)
        elif kind_of(event) in ("WORKFLOW_TASK_COMPLETED", "WORKFLOW_TASK_TIMED_OUT"):
            failure = None
    return failure


async def status(client: Client, options: argparse.Namespace) -> int:
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
    return 0


async def list_orders(client: Client, options: argparse.Namespace) -> int:
    """List the newest orders and charges."""
    amounts = {
        row["order_id"]: f"{row['amount_cents'] / 100:.2f}"
        for row in store.select("SELECT order_id, amount_cents FROM effects")
    }
    kinds = "WorkflowType IN ('OrderWorkflow', 'ChargeWorkflow')"
    runs = [run async for run in client.list_workflows(kinds, limit=options.limit)]
    for n, run in enumerate(runs):
        state = run.status.name if run.status else ""
        if state == "COMPLETED" and run.workflow_type == "OrderWorkflow":
            # To Temporal a rejected order is complete as well: what it returned says more.
            state = await client.get_workflow_handle(run.id, run_id=run.run_id).result()
        started = f"{run.start_time.astimezone():%m-%d %H:%M:%S}"
        again = "  (another run of it)" if run.id in [older.id for older in runs[n + 1 :]] else ""
        say(f"{started}  {state:10} {amounts.get(run.id, '-'):>10}  {run.id}{again}", indent=16)
    if not runs:
        say(f"no orders yet; place one: {command('starter.py')} order")
    return 0


async def events(options: argparse.Namespace) -> int:
    """Print an order's audit trail and its effects, from the ledger."""
    if not store.say_order(options.order_id):
        path = store.store_path()
        sys.exit(f"no events of '{options.order_id}' in {path}; see: {see('list')}")
    return 0


# Watching an order.


async def watch(client: Client, options: argparse.Namespace) -> int:
    """Follow an order to its end."""
    return await follow(client, options.order_id)


async def follow(
    client: Client, order_id: str, plain: bool = False, each_time: Callable[[], None] | None = None
) -> int:
    """Draw an order until it ends, in place on a terminal, else a line at each change.

    Returns 0; exits with 1 and a line if it failed.
    """
    handle, description = await find(client, order_id)
    screen = Screen(plain)
    while description.status == RUNNING:
        try:
            screen.show(*await picture(client, handle, description))
            await asyncio.sleep(0.2)
            description = await handle.describe()
        except RPCError as error:
            if error.status not in SERVER_DOWN:
                raise
            screen.show("the server does not answer; it keeps the order, so we wait for it")
        if each_time:
            each_time()
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        cause: Any = error
        while getattr(cause, "cause", None):
            cause = cause.cause
        sys.exit(f"{handle.id} FAILED: {cause}")
    end = result["status"] if isinstance(result, dict) else result or "COMPLETED"
    if end == "COMPLETED":
        screen.show(end, [f"    [x] {done}" for done in TRACKER.values()])
    say(f"{handle.id} {end}")
    return 0


async def picture(
    client: Client, handle: Handle, description: WorkflowExecutionDescription
) -> tuple[str, list[str]]:
    """Return an order's headline and its steps: done, now, still to come."""
    _, state = await ask(handle)
    activities = description.raw_description.pending_activities
    attempts = [activity.attempt for activity in activities if activity.attempt > 1]
    headline = state + (f", attempt {attempts[0]}" if attempts else "")
    if state == "AWAITING_REVIEW":
        headline += f"; decide: {see('approve', handle.id)}"
    address = client.service_client.config.target_host
    lines = [f"    {web_ui(address)}/namespaces/{client.namespace}/workflows/{handle.id}"]
    if state in TRACKER:
        now = list(TRACKER).index(state)
        steps = [
            f"    [{'x' if at < now else ' '}] {done}" for at, done in enumerate(TRACKER.values())
        ]
        steps[now] = steps[now].replace("[ ]", "[>]")
        if state in ("WAITING", "AWAITING_REVIEW"):
            steps[now] += f": {await seconds_left(handle):.0f} s left"
        lines = steps + lines
    return headline, lines


async def seconds_left(handle: Handle) -> float:
    """Read from the history when the newest timer, the wait's or the review's, will fire."""
    ends = datetime.now(UTC)
    async for event in handle.fetch_history_events():
        if event.HasField("timer_started_event_attributes"):
            timer = event.timer_started_event_attributes.start_to_fire_timeout
            ends = event.event_time.ToDatetime(UTC) + timer.ToTimedelta()
    return max(0.0, (ends - datetime.now(UTC)).total_seconds())


# An order's life as lanes: Temporal's, and one for each worker, over time.

LABEL, WIDTH = 15, 64  # columns: a lane's name, and its drawing
MESSAGES = ("WORKFLOW_EXECUTION_SIGNALED", "WORKFLOW_EXECUTION_UPDATE_ACCEPTED")
ENDS = [
    f"WORKFLOW_EXECUTION_{end}"
    for end in ("COMPLETED", "FAILED", "CANCELED", "TERMINATED", "TIMED_OUT")
]
STEPS = [n * unit for unit in (0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000) for n in (1, 2, 5)]
MARKS = {  # at the end of a bar; - alone: the worker ran the workflow's code
    "X": "its worker died",
    "x": "failed",
    "/": "stopped",
    "!": "message",
    ">": "goes on",
    "~": "time shortened",
}


@dataclass
class Bar:
    """Something on a lane from one moment to another, with a name and a mark at its end."""

    lane: str
    begin: float
    end: float
    name: str = ""
    mark: str = "|"
    waiting: bool = False


def lanes(events: list[Any], attempts: list[dict[str, Any]], now: float) -> list[str]:
    """Draw an order's life in 79 columns: a bar for each attempt, a cross where its worker died.

    `events` is its history, `attempts` its attempts' events in the ledger, `now` a Unix time.
    """
    bars = temporal_bars(events, now)
    bars += attempt_bars(attempts, bars, kind_of(events[-1]) in ENDS, now)
    if not bars:
        return ["no worker has taken it up yet"]
    column, shortened, clock = time_scale(bars)
    drawn = {"Temporal": [" "] * WIDTH}
    for bar in sorted(bars, key=lambda bar: bar.begin):
        lane = drawn.setdefault(bar.lane, [" "] * WIDTH)
        begin, end = column(bar.begin), column(bar.end)
        fill = "~" if bar.waiting and any(bar.begin <= at < bar.end for at in shortened) else "="
        body = (f"{bar.name} " if end - begin > len(bar.name) else "").ljust(end - begin, fill)
        for at, character in enumerate(body + bar.mark, begin):
            if lane[at] in " -=~|" and (character != "-" or lane[at] == " "):
                lane[at] = character
    lines = [f"{lane[: LABEL - 1]:{LABEL}}{''.join(drawn[lane])}".rstrip() for lane in drawn]
    legend = [f"{mark} {words}" for mark, words in MARKS.items() if mark in "".join(lines)]
    return [" " * LABEL + clock, *lines] + ([" " * LABEL + "  ".join(legend)] if legend else [])


def kind_of(event: Any) -> str:
    """Name an event of the history."""
    return EventType.Name(event.event_type).removeprefix("EVENT_TYPE_")


def temporal_bars(events: list[Any], now: float) -> list[Bar]:
    """Find what Temporal's lane shows, timers, the child, messages, and who ran the code when."""
    moments: list[Bar] = []
    waits: dict[int, Bar] = {}  # by the id of the event that began them
    for event in events:
        at, kind = event.event_time.ToDatetime(UTC).timestamp(), kind_of(event)
        a = getattr(event, str(event.WhichOneof("attributes")))
        begun = getattr(a, "initiated_event_id", 0) or getattr(a, "started_event_id", 0)
        if kind == "TIMER_STARTED":
            waits[event.event_id] = Bar("Temporal", at, now, summary(event) or "timer", ">", True)
        elif kind == "START_CHILD_WORKFLOW_EXECUTION_INITIATED":
            waits[event.event_id] = Bar("Temporal", at, now, "shipping", ">", True)
        elif kind in (*MESSAGES, "WORKFLOW_EXECUTION_CANCEL_REQUESTED"):
            moments.append(Bar("Temporal", at, at, mark="!"))
        elif kind == "WORKFLOW_TASK_COMPLETED" and "@" in a.identity:
            moments.append(Bar(f"worker {a.identity.partition('@')[0]}", at, at, mark="-"))
        elif begun in waits and not kind.endswith("STARTED"):
            waits[begun].end, waits[begun].mark = at, "|"
        elif kind in ENDS:
            for wait in waits.values():
                wait.end, wait.mark = min(wait.end, at), "|"
    return moments + [wait for wait in waits.values() if wait.name != "Deadline"]


def summary(event: Any) -> str:
    """Read what a timer is called."""
    data = event.user_metadata.summary.data
    return str(json.loads(data)) if data else ""


def attempt_bars(
    attempts: list[dict[str, Any]], marks: list[Bar], closed: bool, now: float
) -> list[Bar]:
    """Make a bar of each attempt and tell how it ended; `marks` are when workers were seen too."""
    told = [json.loads(attempt["payload_json"]) for attempt in attempts]
    last_seen = {bar.lane: bar.begin for bar in sorted(marks, key=lambda bar: bar.begin)}
    for attempt, payload in zip(attempts, told, strict=True):
        lane = f"worker {payload.get('worker', '?')}"
        last_seen[lane] = max(attempt["ts"], last_seen.get(lane, 0))
    bars = []
    for n, (attempt, payload) in enumerate(zip(attempts, told, strict=True)):
        later = (a for a in attempts[n + 1 :] if a["type"] == attempt["type"])
        again = next((a for a in later if a["attempt"] > attempt["attempt"]), None)
        bar = Bar(f"worker {payload.get('worker', '?')}", attempt["ts"], attempt["ts"])
        bar.name = attempt["type"].partition("_")[0]
        bar.end += payload.get("seconds", 0)
        ended = str(payload.get("ended", ""))
        # Nothing was seen of its worker since, or since another attempt took over.
        gone = last_seen[bar.lane] <= (again or attempt)["ts"]
        if not ended and not again and not closed:
            bar.end, bar.mark = now, ">"
        elif gone and (not ended or (ended == "ok" and again)):
            bar.mark = "X"
        elif ended.startswith("CancelledError"):
            bar.mark = "/"
        elif ended != "ok":
            bar.mark = "x"
        if not ended and again:  # when it died nobody saw; another came after a heartbeat's silence
            bar.end = max(bar.begin, again["ts"] - HEARTBEAT.total_seconds())
        bars.append(bar)
    return bars


def time_scale(bars: list[Bar]) -> tuple[Callable[[float], int], list[float], str]:
    """Lay time out over the columns, idle time shortened where it leaves no room for the rest.

    Returns the column of a moment, the moments at which shortened time begins, and the clock.
    """
    moments = sorted({moment for bar in bars for moment in (bar.begin, bar.end)})
    gaps = list(itertools.pairwise(moments))
    work = [(bar.begin, bar.end) for bar in bars if not bar.waiting]
    idle = {b for b, e in gaps if not any(begin <= b and e <= end for begin, end in work)}
    busy = sum(e - b for b, e in gaps if b not in idle)
    # More than 12 s in which nothing is done take no more room than three times what is done.
    longest = max(3 * busy, 1)
    length = {b: min(e - b, longest) if b in idle and e - b > 12 else e - b for b, e in gaps}
    shortened = [b for b, e in gaps if length[b] < e - b]
    columns_a_second = (WIDTH - 1) / max(0.001, sum(length.values()))
    place = dict(zip(moments, itertools.accumulate([0.0, *length.values()]), strict=True))
    labels = {place[e]: e - moments[0] for b, e in gaps if b in shortened} | {0.0: 0.0}
    step = next((s for s in STEPS if s * columns_a_second >= 9), STEPS[-1])
    for b, e in gaps:
        if b not in shortened:
            for n in range(ceil((b - moments[0]) / step), floor((e - moments[0]) / step) + 1):
                labels.setdefault(place[b] + n * step - (b - moments[0]), n * step)
    clock = ""
    for at, seconds in sorted(labels.items()):
        text = f"{round(seconds, 2):g} s" if seconds < 120 else f"{round(seconds / 60, 1):g} min"
        if not clock or len(clock) + 2 <= round(at * columns_a_second) <= WIDTH - len(text):
            clock = clock.ljust(round(at * columns_a_second)) + text
    return lambda moment: round(place[moment] * columns_a_second), shortened, clock


# The event history in plain sentences.

SENTENCES = {  # {event type: sentence}; the words in braces are found by tell()
    "WORKFLOW_EXECUTION_STARTED": "Temporal has it, as {type}",
    "WORKFLOW_EXECUTION_COMPLETED": "the workflow is complete",
    "WORKFLOW_EXECUTION_FAILED": "the workflow failed: {why}",
    "WORKFLOW_EXECUTION_CANCELED": "the workflow was cancelled",
    "WORKFLOW_EXECUTION_TERMINATED": "terminated: no code ran, nothing was undone",
    "WORKFLOW_EXECUTION_TIMED_OUT": "timed out: no code ran, nothing was undone",
    "WORKFLOW_EXECUTION_CANCEL_REQUESTED": "somebody cancels the workflow",
    "WORKFLOW_EXECUTION_SIGNALED": "signal {signal} comes",
    "WORKFLOW_EXECUTION_UPDATE_ACCEPTED": "update {update} is accepted",
    "WORKFLOW_TASK_STARTED": "{worker} takes the workflow up",
    "WORKFLOW_TASK_TIMED_OUT": "that worker does not answer; any other may take it",
    "WORKFLOW_TASK_FAILED": "{worker} fails in the workflow's code: {why}",
    "ACTIVITY_TASK_STARTED": "{step} runs on {worker}{again}",
    "ACTIVITY_TASK_COMPLETED": "{step} is done",
    "ACTIVITY_TASK_FAILED": "{step} failed: {why}",
    "ACTIVITY_TASK_TIMED_OUT": "{step} failed: {why}",
    "ACTIVITY_TASK_CANCEL_REQUESTED": "{step} is asked to stop",
    "ACTIVITY_TASK_CANCELED": "{step} has stopped",
    "TIMER_STARTED": "the timer of {seconds:g} s starts: {timer}",
    "TIMER_FIRED": "the timer fires: {timer}",
    "TIMER_CANCELED": "the timer is not needed any more: {timer}",
    "CHILD_WORKFLOW_EXECUTION_STARTED": "{child} starts",
    "CHILD_WORKFLOW_EXECUTION_COMPLETED": "{child} is done",
    "CHILD_WORKFLOW_EXECUTION_FAILED": "{child} failed: {why}",
    "CHILD_WORKFLOW_EXECUTION_CANCELED": "{child} was cancelled",
}


def why(failure: Any) -> str:
    """Say what is at the bottom of a failure, and explain a missed heartbeat."""
    while failure.HasField("cause"):
        failure = failure.cause
    missed = failure.timeout_failure_info.timeout_type == TimeoutType.TIMEOUT_TYPE_HEARTBEAT
    return str(failure.message) + (" (its worker fell silent)" if missed else "")


def tell(event: Any, steps: dict[int, str]) -> str:
    """Put one event into words; an activity's later events name it by its first one's id."""
    kind = kind_of(event)
    a = getattr(event, str(event.WhichOneof("attributes")))
    if kind == "ACTIVITY_TASK_SCHEDULED":
        steps[event.event_id] = a.activity_type.name
    found: dict[str, Any] = {"step": steps.get(getattr(a, "scheduled_event_id", 0))}
    if hasattr(a, "identity"):
        found["worker"] = f"worker {a.identity.partition('@')[0]}"
    if hasattr(a, "failure"):
        found["why"] = why(a.failure)
    if kind == "ACTIVITY_TASK_STARTED":
        again = f", attempt {a.attempt}; before it: {why(a.last_failure)}"
        found["again"] = again if a.attempt > 1 else ""
    if kind == "TIMER_STARTED":
        found["seconds"] = a.start_to_fire_timeout.ToMilliseconds() / 1000
        steps[event.event_id] = summary(event)
        found["timer"] = summary(event)
    if kind in ("TIMER_FIRED", "TIMER_CANCELED"):
        found["timer"] = steps.get(a.started_event_id)
    if kind == "WORKFLOW_EXECUTION_UPDATE_ACCEPTED":
        found["update"] = a.accepted_request.input.name
    found["type"] = a.workflow_type.name if hasattr(a, "workflow_type") else ""
    found["signal"] = getattr(a, "signal_name", "")
    found["child"] = getattr(getattr(a, "workflow_execution", None), "workflow_id", "")
    if kind == "WORKFLOW_TASK_STARTED" and not a.identity:
        return ""  # a repeated attempt, which the server does not keep
    if kind == "WORKFLOW_TASK_FAILED" and a.new_run_id:
        return "reset to here: from now on this is another run"
    return SENTENCES.get(kind, "").format(**found)


async def history(client: Client, options: argparse.Namespace) -> int:
    """Draw an order's life, then tell its history; a worker is named when it takes over."""
    handle, description = await find(client, options.order_id)
    events = [event async for event in handle.fetch_history_events()]
    say_lanes(events, handle.id)
    steps: dict[int, str] = {}
    told = [(event.event_time.ToDatetime(), tell(event, steps)) for event in events]
    shown = ""
    for moment, sentence in sorted(told, key=lambda item: item[0]):
        takes_up = sentence.endswith("takes the workflow up")
        if sentence and sentence != shown:
            say(f"{(moment - told[0][0]).total_seconds():7.2f} s  {sentence}", indent=11)
        shown = sentence if takes_up else shown
    for activity in description.raw_description.pending_activities:
        before = f"; before it: {why(activity.last_failure)}" if activity.attempt > 1 else ""
        say(f"      now  {activity.activity_type.name}, attempt {activity.attempt}{before}", 11)
    return 0


async def show_lanes(handle: Handle) -> None:
    """Draw an order's life and its line in the ledger."""
    say_lanes([event async for event in handle.fetch_history_events()], handle.id)


def say_lanes(events: list[Any], order_id: str) -> None:
    """Print an order's lanes and its effects."""
    attempts = store.select(
        "SELECT * FROM events WHERE order_id = ? AND attempt > 0 ORDER BY id", order_id
    )
    for line in lanes(events, attempts, time.time()):
        print(printable(line))
    for effect in store.effects_of(order_id):
        say(store.proof(effect))
    print()


# The command line.


def positive(text: str) -> int:
    """Read a whole number from 1 to 100000."""
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:7]) <= 100_000):
        raise argparse.ArgumentTypeError("must be a whole number from 1 to 100000")
    return int(text)


def note(text: str) -> str:
    """Read a note or a reason."""
    if len(text) > NOTE_LENGTH:
        raise argparse.ArgumentTypeError(f"must be at most {NOTE_LENGTH} characters")
    return text


VERBS: dict[str, tuple[Callable[..., Coroutine[Any, Any, int]], str]] = {
    "approve": (decide, "say yes; without an id on a terminal: offers the waiting orders"),
    "reject": (decide, "say no; without an id on a terminal: offers the waiting orders"),
    "cancel": (cancel, "cancel; without an id on a terminal: offers the running orders"),
    "update-address": (update_address, "change the address, before shipping begins"),
    "status": (status, "ask the workflow where it stands"),
    "watch": (watch, "follow the order to its end; exit 1 if it failed"),
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
        sub.add_argument("order_id", nargs="?" if verb in ("approve", "reject", "cancel") else None)
        if verb == "update-address":
            sub.add_argument("address")
        if verb in ("approve", "reject"):
            sub.add_argument("--note", type=note, default="", help="why, up to 500 characters")
        if verb == "cancel":
            sub.add_argument("--reason", type=note, default="", help="why, up to 500 characters")
    options: argparse.Namespace = parser.parse_args()
    return options


async def run(options: argparse.Namespace) -> int:
    """Run one command; `events` asks the ledger alone."""
    action = VERBS[options.command][0]
    return await (events(options) if action is events else action(await connect(), options))


if __name__ == "__main__":
    run_script(lambda: asyncio.run(run(parse_arguments())))
