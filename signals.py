"""Talk to a running order: approve it, cancel it, change its address, watch it.

A signal needs no worker: the server keeps it until one comes. An update and a query are answered
by a worker, so without one these commands say how to start it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

from temporalio.api.enums.v1 import EventType
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
from worker import command, connect, web_ui
from workflows import NOTE_LENGTH

Handle = WorkflowHandle[Any, Any]
RUNNING = WorkflowExecutionStatus.RUNNING
RPC_TIMEOUT = timedelta(seconds=2)  # a worker that lives answers within milliseconds
TRACKER = {  # what is done once the order has left a state
    "RECEIVING": "received",
    "VALIDATING": "validated",
    "RESERVING": "goods reserved",
    "WAITING": "waited as asked",
    "AWAITING_REVIEW": "reviewed",
    "CHARGING": "charged",
    "SHIPPING": "shipped",
}


def say(line: str) -> None:
    """Print a line, with whatever came from outside escaped."""
    print(store.printable(line), flush=True)


# Signals and the update.


async def decide(client: Client, options: argparse.Namespace) -> int:
    """Send approve or reject, and say whether that is the decision which stands."""
    handle = await find(client, await named_or_picked(client, options), running=True)
    await handle.signal(options.command, options.note)
    status = await query(handle)
    if not str(status["decision"]).startswith(options.command) and not status["silent"]:
        stands = status["decision"] or status["state"]
        sys.exit(f"{handle.id} is {stands} already: the {options.command} was only recorded")
    say(f"{handle.id}: {options.command} sent; {status['state']}")
    return 0


async def cancel(client: Client, options: argparse.Namespace) -> int:
    """Send cancel; an order that was picked from a list is confirmed first."""
    handle = await find(client, await named_or_picked(client, options), running=True)
    if options.order_id is None and input(f"Cancel {handle.id}? [y/N]: ").strip().lower() != "y":
        sys.exit("nothing was cancelled")
    await handle.signal("cancel", options.reason)
    say(f"{handle.id}: cancel sent; see: {command('signals.py')} watch {handle.id}")
    return 0


async def update_address(client: Client, options: argparse.Namespace) -> int:
    """Change the address by an update, which, unlike a signal, has an answer."""
    handle = await find(client, options.order_id, running=True)
    try:
        await handle.execute_update("update_address", options.address, rpc_timeout=RPC_TIMEOUT)
    except WorkflowUpdateFailedError as error:
        sys.exit(f"{handle.id}: address refused: {store.printable(reason(error))}")
    except WorkflowUpdateRPCTimeoutOrCancelledError:
        sys.exit(f"{handle.id}: {silent()} (the change may still be made when one comes)")
    say(f"{handle.id}: goes to {options.address}")
    return 0


async def named_or_picked(client: Client, options: argparse.Namespace) -> str:
    """Return the order id that was given, or offer the orders that this could be for."""
    if options.order_id is not None:
        return str(options.order_id)
    if not sys.stdin.isatty():
        sys.exit(f"name an order: {command('signals.py')} {options.command} ORDER_ID")
    waiting = "WorkflowType = 'OrderWorkflow' AND ExecutionStatus = 'Running'"
    found = [w.id async for w in client.list_workflows(waiting, limit=20)]
    states = [await query(client.get_workflow_handle(order_id)) for order_id in found]
    offered = [
        order_id
        for order_id, status in zip(found, states, strict=True)
        if options.command == "cancel" or status["state"] == "AWAITING_REVIEW" or status["silent"]
    ]
    if not offered:
        sys.exit(f"no order waits to {options.command}; see: {command('signals.py')} list")
    for number, order_id in enumerate(offered, 1):
        say(f"{number:3} {order_id}")
    while not (answer := input("Which one [1]: ").strip() or "1").isdecimal() or not (
        1 <= int(answer) <= len(offered)
    ):
        say(f"a number from 1 to {len(offered)}, please")
    return offered[int(answer) - 1]


# Looking.


async def find(client: Client, order_id: str, running: bool = False) -> Handle:
    """Get a workflow's handle, or exit if there is none or, with running=True, it has ended."""
    handle = client.get_workflow_handle(order_id)
    try:
        status = (await handle.describe()).status
    except RPCError as error:
        if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            raise
        shown = store.printable(order_id)
        sys.exit(f"unknown order '{shown}'; see: {command('signals.py')} list")
    if running and status != RUNNING:
        sys.exit(f"too late: {order_id} has ended; see: {command('signals.py')} status {order_id}")
    return handle


def silent() -> str:
    """Say that no worker answers and how to start one."""
    return f"no worker answers; start one in another terminal: {command('worker.py')}"


async def query(handle: Handle) -> dict[str, Any]:
    """Ask an order for its status; its `silent` tells that no worker answered."""
    try:
        return {**await handle.query("status", rpc_timeout=RPC_TIMEOUT), "silent": False}
    except WorkflowQueryFailedError:  # a ChargeWorkflow, which has no such query
        return {"state": "CHARGING", "decision": None, "silent": False}
    except RPCError as error:
        if error.status == RPCStatusCode.UNAVAILABLE:
            raise
        return {"state": silent(), "decision": None, "silent": True}


async def status(client: Client, options: argparse.Namespace) -> int:
    """Print an order's status."""
    answer = await query(await find(client, options.order_id))
    if answer.pop("silent"):
        sys.exit(answer["state"])
    for name, value in answer.items():
        say(f"{name:18}{'-' if value in (None, '') else value}")
    return 0


async def watch(client: Client, options: argparse.Namespace) -> int:
    """Follow an order to its end."""
    return await follow(client, options.order_id)


async def follow(
    client: Client,
    order_id: str,
    plain: bool = False,
    each_time: Callable[[], None] = lambda: None,
) -> int:
    """Draw the order until it ends, in place on a terminal, else a line at each change."""
    handle = await find(client, order_id)
    screen = Screen(plain or not sys.stdout.isatty())
    while True:
        try:
            description = await handle.describe()
            if description.status != RUNNING:
                return await tell_end(handle, description)
            screen.show(*await picture(client, handle, description))
        except RPCError as error:
            if error.status != RPCStatusCode.UNAVAILABLE:
                raise
            screen.show("the server does not answer; it keeps the order, so we wait for it", [])
        each_time()
        await asyncio.sleep(0.2)


class Screen:
    """What is drawn: on a terminal again and again in place, else only what changes."""

    def __init__(self, plain: bool) -> None:
        self.plain, self.started, self.shown, self.height = plain, time.monotonic(), "", 0

    def show(self, headline: str, lines: list[str]) -> None:
        """Show a headline with the seconds so far, and lines that only a terminal gets."""
        seconds = f"{time.monotonic() - self.started:6.1f} s  "
        if self.plain:
            if headline != self.shown:
                say(seconds + headline)
            self.shown = headline
            return
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="")
        for line in (drawn := [seconds + headline, *lines]):
            say(line[:79])
        self.height = len(drawn)


async def picture(
    client: Client, handle: Handle, description: WorkflowExecutionDescription
) -> tuple[str, list[str]]:
    """Return an order's headline and its steps: done, now, still to come."""
    answer = await query(handle)
    state, lines = answer["state"], []
    attempts = [f", attempt {a.attempt}" for a in description.raw_description.pending_activities]
    headline = state + (attempts[0] if attempts and not attempts[0].endswith(" 1") else "")
    if state == "AWAITING_REVIEW" and answer["decision"] is None:
        lines.append(f"    decide: {command('signals.py')} approve {handle.id}")
    if state in TRACKER:
        now = list(TRACKER).index(state)
        marks = ["x" if at < now else ">" if at == now else " " for at in range(len(TRACKER))]
        lines = [
            f"    [{m}] {done}" for m, done in zip(marks, TRACKER.values(), strict=True)
        ] + lines
    address = client.service_client.config.target_host
    lines.append(f"    {web_ui(address)}/namespaces/{client.namespace}/workflows/{handle.id}")
    return headline, lines


async def tell_end(handle: Handle, description: WorkflowExecutionDescription) -> int:
    """Say how a workflow ended; exit 1 if it failed."""
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        sys.exit(f"{handle.id} FAILED: {store.printable(reason(error))}")
    say(f"{handle.id} {result if isinstance(result, str) else result['status']}")
    say(f"what happened: {command('signals.py')} events {handle.id}")
    return 0


def reason(error: BaseException) -> str:
    """Find what is at the bottom of a failure."""
    while (cause := getattr(error, "cause", None)) is not None:
        error = cause
    return str(error)


async def list_orders(client: Client, options: argparse.Namespace) -> int:
    """List the newest orders and charges."""
    kinds = "WorkflowType IN ('OrderWorkflow', 'ChargeWorkflow')"
    rows = [
        {
            "order_id": found.id,
            "workflow": found.workflow_type,
            "status": found.status.name if found.status else "",
            "started": f"{found.start_time.astimezone():%Y-%m-%d %H:%M:%S}",
        }
        async for found in client.list_workflows(kinds, limit=options.limit)
    ]
    print(store.table(rows) if rows else f"no orders yet; place one: {command('starter.py')} order")
    return 0


async def events(options: argparse.Namespace) -> int:
    """Print an order's audit trail from the ledger."""
    rows = store.events(options.order_id)
    if not rows:
        shown = store.printable(options.order_id)
        sys.exit(
            f"no events of '{shown}' in {store.store_path()}; see: {command('signals.py')} list"
        )
    print(store.table(rows))
    ledger = store.effects(options.order_id)
    print("\n" + store.table(ledger) if ledger else "\nnothing charged, reserved or sent")
    return 0


# The event history in plain sentences. A step's end names the step by the id of its beginning.


def pid(a: Any) -> str:
    """Name the worker process, which is the first part of its identity."""
    return f"worker {a.identity.partition('@')[0]}"


def why(a: Any) -> str:
    """Say why something failed."""
    failure = a.failure
    while failure.HasField("cause"):
        failure = failure.cause
    timeout = failure.timeout_failure_info
    return str(failure.message) + (" (the worker fell silent)" if timeout.timeout_type == 4 else "")


def started(a: Any, names: dict[int, str]) -> str:
    """Tell which attempt at an activity a worker began, and what became of the one before."""
    before = a.last_failure
    again = f", attempt {a.attempt}; before it: {before.message}" if a.attempt > 1 else ""
    return f"{names[a.scheduled_event_id]} runs on {pid(a)}{again}"


def ended(what: str) -> Callable[[Any, dict[int, str]], str]:
    """Make a sentence about the end of an activity."""
    return lambda a, names: f"{names[a.scheduled_event_id]} {what}"


SENTENCES: dict[str, Callable[[Any, dict[int, str]], str]] = {
    "WORKFLOW_EXECUTION_STARTED": lambda a, _: f"Temporal has it, as {a.workflow_type.name}",
    "WORKFLOW_EXECUTION_COMPLETED": lambda a, _: "the workflow is complete",
    "WORKFLOW_EXECUTION_FAILED": lambda a, _: f"the workflow failed: {why(a)}",
    "WORKFLOW_EXECUTION_TERMINATED": lambda a, _: "terminated: no code ran, nothing was undone",
    "WORKFLOW_EXECUTION_CANCEL_REQUESTED": lambda a, _: "somebody cancelled the workflow",
    "WORKFLOW_EXECUTION_SIGNALED": lambda a, _: f"signal {a.signal_name} came",
    "WORKFLOW_EXECUTION_UPDATE_ACCEPTED": lambda a, _: (
        f"update {a.accepted_request.input.name} accepted"
    ),
    "WORKFLOW_TASK_STARTED": lambda a, _: f"{pid(a)} takes the workflow up",
    "WORKFLOW_TASK_TIMED_OUT": lambda a, _: "that worker does not answer; any other may take it",
    "WORKFLOW_TASK_FAILED": lambda a, _: f"{pid(a)} fails in the workflow's code: {why(a)}",
    "ACTIVITY_TASK_STARTED": started,
    "ACTIVITY_TASK_COMPLETED": ended("is done"),
    "ACTIVITY_TASK_FAILED": lambda a, names: f"{names[a.scheduled_event_id]} failed: {why(a)}",
    "ACTIVITY_TASK_TIMED_OUT": lambda a, names: f"{names[a.scheduled_event_id]} failed: {why(a)}",
    "ACTIVITY_TASK_CANCEL_REQUESTED": ended("is asked to stop"),
    "ACTIVITY_TASK_CANCELED": ended("has stopped"),
    "TIMER_STARTED": lambda a, _: (
        f"a timer of {a.start_to_fire_timeout.ToMilliseconds() / 1000:g} s starts"
    ),
    "TIMER_FIRED": lambda a, _: "the timer fires",
    "TIMER_CANCELED": lambda a, _: "the timer is not needed any more",
    "CHILD_WORKFLOW_EXECUTION_STARTED": lambda a, _: f"{a.workflow_execution.workflow_id} starts",
    "CHILD_WORKFLOW_EXECUTION_COMPLETED": lambda a, _: (
        f"{a.workflow_execution.workflow_id} is done"
    ),
    "CHILD_WORKFLOW_EXECUTION_FAILED": lambda a, _: (
        f"{a.workflow_execution.workflow_id} failed: {why(a)}"
    ),
    "CHILD_WORKFLOW_EXECUTION_CANCELED": lambda a, _: (
        f"{a.workflow_execution.workflow_id} was cancelled"
    ),
}


async def history(client: Client, options: argparse.Namespace) -> int:
    """Tell the event history; a worker is named again only when another takes over."""
    handle = await find(client, options.order_id)
    names: dict[int, str] = {}
    start, last = None, ""
    async for event in handle.fetch_history_events():
        kind = EventType.Name(event.event_type).removeprefix("EVENT_TYPE_")
        attributes: Any = getattr(event, str(event.WhichOneof("attributes")))
        start = start or event.event_time.ToDatetime()
        if kind == "ACTIVITY_TASK_SCHEDULED":
            names[event.event_id] = attributes.activity_type.name
        if kind not in SENTENCES:
            continue
        sentence = SENTENCES[kind](attributes, names)
        if kind == "WORKFLOW_TASK_STARTED" and sentence == last:
            continue
        last = sentence if kind == "WORKFLOW_TASK_STARTED" else last
        say(f"{(event.event_time.ToDatetime() - start).total_seconds():7.2f} s  {sentence}")
    for activity in (await handle.describe()).raw_description.pending_activities:
        last_failure = activity.last_failure.message
        say(
            f"     now    {activity.activity_type.name}, attempt {activity.attempt}"
            + (f"; before it: {last_failure}" if last_failure else "")
        )
    return 0


def note(text: str) -> str:
    """Read a note or a reason."""
    if len(text) > NOTE_LENGTH:
        raise argparse.ArgumentTypeError(f"must be at most {NOTE_LENGTH} characters")
    return text


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = store.Parser(description="Talk to a running order, or look at it.")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    for name, run, text in (
        ("approve", decide, "say yes; without an id on a terminal: offers the waiting orders"),
        ("reject", decide, "say no; without an id on a terminal: offers the waiting orders"),
        ("cancel", cancel, "cancel; without an id on a terminal: offers the running orders"),
        ("update-address", update_address, "change the address, before shipping begins"),
        ("status", status, "ask the workflow where it stands"),
        ("watch", watch, "follow the order to its end; exit 1 if it failed"),
        ("events", events, "what happened, from the ledger"),
        ("history", history, "what happened, from Temporal's event history"),
        ("list", list_orders, "the newest orders"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        if name == "list":
            sub.add_argument("--limit", type=int, default=20, help="how many; default 20")
            continue
        sub.add_argument("order_id", nargs="?" if name in ("approve", "reject", "cancel") else None)
        if name == "update-address":
            sub.add_argument("address")
        if name in ("approve", "reject"):
            sub.add_argument("--note", type=note, default="")
        if name == "cancel":
            sub.add_argument("--reason", type=note, default="")
    return parser.parse_args()


async def run(options: argparse.Namespace) -> int:
    """Run one command."""
    action: Callable[..., Coroutine[Any, Any, int]] = options.run
    if action is events:
        return await events(options)
    return await action(await connect(), options)


def main() -> int:
    """Run one command, and turn the server's errors into a line."""
    options = parse_arguments()
    try:
        return asyncio.run(run(options))
    except RPCError as error:
        sys.exit(f"the Temporal server refuses: {store.printable(error)}")


if __name__ == "__main__":
    store.run_script(main)
