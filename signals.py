"""Talk to a running order: approve it, cancel it, change its address, watch it.

A signal needs no worker: the server keeps it until one comes. An update and a query are answered
by a worker, so without one these commands say how to start it.
"""

import argparse
import asyncio
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.api.enums.v1 import EventType, TimeoutType
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
from worker import connect, nearby, web_ui
from workflows import NOTE_LENGTH

Handle = WorkflowHandle[Any, Any]
RUNNING = WorkflowExecutionStatus.RUNNING
RPC_TIMEOUT = timedelta(seconds=1.5)  # a worker that lives answers within milliseconds
# What calls end with while the server is down, dies or starts.
SERVER_DOWN = (RPCStatusCode.UNAVAILABLE, RPCStatusCode.UNKNOWN)
TRACKER = {  # what is done once an order has left a state
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


def read_line(question: str) -> str:
    """Read a line from a person; the end of input is an empty line."""
    # While asyncio runs, Ctrl+C would only be noted; at a question it leaves at once.
    noted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(question).strip()
    except EOFError:
        print()
        return ""
    finally:
        signal.signal(signal.SIGINT, noted)


def command(script: str) -> str:
    """Spell the command that runs one of our scripts from the current directory."""
    python = Path(sys.executable)
    on_path = shutil.which("python")
    if on_path and Path(on_path).parent == python.parent:
        return f"python {nearby(Path(__file__).with_name(script))}"
    return f"{nearby(python)} {nearby(Path(__file__).with_name(script))}"


def see(verb: str, order_id: str = "") -> str:
    """Spell one of our commands."""
    return f"{command('signals.py')} {verb} {order_id}".strip()


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
    if options.order_id is None and read_line(f"Cancel {handle.id}? [y/N]: ").lower() != "y":
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
        sys.exit(f"{handle.id}: refused: {store.printable(getattr(error.cause, 'message', error))}")
    except WorkflowUpdateRPCTimeoutOrCancelledError:
        sys.exit(f"{handle.id}: {silent()} (then look: the change may still be made)")
    say(f"{handle.id}: goes to {options.address}")
    return 0


async def addressee(client: Client, options: argparse.Namespace) -> Handle:
    """Find the running order that a message is for, offering a choice if none was named."""
    order_id = (
        await offer(client, options.command) if options.order_id is None else options.order_id
    )
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
    while True:
        answer = read_line("Which one [1]: ") or "1"
        if answer.isdecimal() and 1 <= int(answer) <= len(waiting):
            return waiting[int(answer) - 1]
        say(f"a number from 1 to {len(waiting)}, please")


# Looking at orders.


async def find(client: Client, order_id: str) -> tuple[Handle, WorkflowExecutionDescription]:
    """Get a workflow's handle and description, or exit if there is none."""
    handle = client.get_workflow_handle(order_id)
    try:
        return handle, await handle.describe()
    except RPCError as error:
        if error.status not in (RPCStatusCode.NOT_FOUND, RPCStatusCode.INVALID_ARGUMENT):
            raise
        sys.exit(f"unknown order '{store.printable(order_id)}'; see: {see('list')}")


def silent() -> str:
    """Say that no worker answers and how to start one."""
    return f"no worker answers; start one in another terminal: {command('worker.py')}"


async def ask(handle: Handle) -> tuple[dict[str, Any], str]:
    """Ask a workflow for its status; return that, empty if there is none, and where it stands."""
    try:
        query = handle.query("status", rpc_timeout=RPC_TIMEOUT)
        # The RPC's limit is for each try of the SDK's; this one is for all of them.
        status = dict(await asyncio.wait_for(query, 2 * RPC_TIMEOUT.total_seconds()))
    except WorkflowQueryFailedError:
        if (await handle.describe()).workflow_type == "ChargeWorkflow":
            return {}, "RUNNING"  # it has no such query
        return {}, f"the workflow's code fails; see: {see('history', handle.id)}"
    except (RPCError, TimeoutError) as error:
        if isinstance(error, RPCError) and error.status in SERVER_DOWN:
            raise
        if await code_fails(handle):
            return {}, f"the workflow's code fails; see: {see('history', handle.id)}"
        return {}, silent()
    return status, str(status["state"])


async def code_fails(handle: Handle) -> bool:
    """Tell whether a worker last failed in the workflow's code; one that was killed did not."""
    ends = ("workflow_task_completed", "workflow_task_failed", "workflow_task_timed_out")
    last = ""
    async for event in handle.fetch_history_events():
        last = next((end for end in ends if event.HasField(f"{end}_event_attributes")), last)  # type: ignore[arg-type]
    return last == "workflow_task_failed"


async def status(client: Client, options: argparse.Namespace) -> int:
    """Print an order's status."""
    handle, description = await find(client, options.order_id)
    status, state = await ask(handle)
    if not status:
        sys.exit(f"{handle.id}: {state}")
    if description.status in (
        WorkflowExecutionStatus.TERMINATED,
        WorkflowExecutionStatus.TIMED_OUT,
    ):
        status["state"] += f", then {description.status.name}: nothing was undone"
    for name, value in status.items():
        say(f"{name:18}{'-' if value in (None, '') else value}")
    return 0


async def list_orders(client: Client, options: argparse.Namespace) -> int:
    """List the newest orders and charges."""
    kinds = "WorkflowType IN ('OrderWorkflow', 'ChargeWorkflow')"
    rows = []
    async for found in client.list_workflows(kinds, limit=options.limit):
        state = found.status.name if found.status else ""
        if state == "COMPLETED" and found.workflow_type == "OrderWorkflow":
            # To Temporal a rejected order is complete as well: what it returned says more.
            state = await client.get_workflow_handle(found.id, run_id=found.run_id).result()
        started = f"{found.start_time.astimezone():%Y-%m-%d %H:%M:%S}"
        rows.append({"started": started, "state": state, "order_id": found.id})
    print(store.table(rows) if rows else f"no orders yet; place one: {command('starter.py')} order")
    return 0


async def events(options: argparse.Namespace) -> int:
    """Print an order's audit trail and its effects, from the ledger."""
    rows = store.events(options.order_id)
    if not rows:
        shown = store.printable(options.order_id)
        sys.exit(f"no events of '{shown}' in {store.store_path()}; see: {see('list')}")
    print(store.table(rows))
    ledger = store.effects(options.order_id)
    print("\n" + store.table(ledger) if ledger else "\nnothing charged, reserved or sent")
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
    screen = Screen(plain or not sys.stdout.isatty())
    while description.status == RUNNING:
        try:
            screen.show(*await picture(client, handle, description))
            await asyncio.sleep(0.2)
            description = await handle.describe()
        except RPCError as error:
            if error.status not in SERVER_DOWN:
                raise
            screen.show("the server does not answer; it keeps the order, so we wait for it", [])
        if each_time:
            each_time()
    try:
        result = await handle.result()
    except WorkflowFailureError as error:
        cause: Any = error
        while getattr(cause, "cause", None):
            cause = cause.cause
        sys.exit(f"{handle.id} FAILED: {store.printable(cause)}")
    end = result["status"] if isinstance(result, dict) else result or "COMPLETED"
    if end == "COMPLETED" and not screen.plain:
        screen.show(end, [f"    [x] {done}" for done in TRACKER.values()])
    say(f"{handle.id} {end}")
    return 0


class Screen:
    """What is drawn: on a terminal again and again in place, else only what changes."""

    def __init__(self, plain: bool) -> None:
        self.plain, self.started, self.shown, self.height = plain, time.monotonic(), "", 0

    def show(self, headline: str, lines: list[str]) -> None:
        """Show a headline with the seconds so far, and lines that only a terminal gets."""
        seconds = f"{time.monotonic() - self.started:6.1f} s  "
        if self.plain and headline != self.shown:
            say(seconds + headline)
        elif not self.plain:
            drawn = [line[:79] for line in (seconds + headline, *lines)]  # no line may wrap
            print(f"\x1b[{self.height}A\x1b[J" if self.height else "", end="")
            print("\n".join(map(store.printable, drawn)), flush=True)
            self.height = len(drawn)
        self.shown = headline


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
    """Read from the history when the newest timer, the review's, will fire."""
    ends = datetime.now(UTC)
    async for event in handle.fetch_history_events():
        if event.HasField("timer_started_event_attributes"):
            timer = event.timer_started_event_attributes.start_to_fire_timeout
            ends = event.event_time.ToDatetime(UTC) + timer.ToTimedelta()
    return max(0.0, (ends - datetime.now(UTC)).total_seconds())


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
    "TIMER_STARTED": "a timer of {seconds:g} s starts",
    "TIMER_FIRED": "the timer fires",
    "TIMER_CANCELED": "the timer is not needed any more",
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
    kind = EventType.Name(event.event_type).removeprefix("EVENT_TYPE_")
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
    """Tell the event history; a worker is named again only when another takes over."""
    handle, description = await find(client, options.order_id)
    steps: dict[int, str] = {}
    told = [
        (event.event_time.ToDatetime(), tell(event, steps))
        async for event in handle.fetch_history_events()
    ]
    shown = ""
    for moment, sentence in sorted(told, key=lambda item: item[0]):
        takes_up = sentence.endswith("takes the workflow up")
        if sentence and sentence != shown:
            say(f"{(moment - told[0][0]).total_seconds():7.2f} s  {sentence}")
        shown = sentence if takes_up else shown
    for activity in description.raw_description.pending_activities:
        before = f"; before it: {why(activity.last_failure)}" if activity.attempt > 1 else ""
        say(f"      now  {activity.activity_type.name}, attempt {activity.attempt}{before}")
    return 0


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
    "history": (history, "what happened, from Temporal's event history"),
    "list": (list_orders, "the newest orders and charges"),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = store.Parser(description="Talk to a running order, or look at it.")
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
    if action is events:
        return await events(options)
    try:
        return await action(await connect(), options)
    except RPCError as error:
        sys.exit(f"the Temporal server refuses: {store.printable(error)}")


if __name__ == "__main__":
    store.run_script(lambda: asyncio.run(run(parse_arguments())))
