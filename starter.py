"""The starter: places orders, and crashes things on purpose.

`charge` and `order` start one workflow, on the server that is there or on one of our own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio.client import (
    Client,
    WorkflowExecutionStatus,
    WorkflowHandle,
)
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError
from temporalio.testing import WorkflowEnvironment

import charge_store as store
import signals
from activities import FAULTS, RULES, STEPS, parse_order
from signals import say
from worker import DEFAULT_ADDRESS, client_config, command, connect, nearby, web_ui
from workflows import ORDERS_QUEUE, ChargeWorkflow, OrderWorkflow

HERE = Path(__file__).parent
# How we start every server; docker-compose.yml has the same. WAL makes a server that keeps its data
# in a file as fast as one that keeps it in memory, and it survives kill -9 as well.
SERVER_FLAGS = ["--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"]
# Timers and retries under 1 s take 1 s without the first; the second makes a workflow that has had
# its bug mended go on within a second instead of up to half a minute.
SERVER_FLAGS += ["--dynamic-config-value", 'history.timerProcessorMaxTimeShift="10ms"']
SERVER_FLAGS += ["--dynamic-config-value", 'history.workflowTaskRetryMaxInterval="1s"']
# A failed workflow task shows within this time that its bug is mended (see SERVER_FLAGS).
TASK_TIMEOUT = timedelta(seconds=2)


class Stage:
    """A Temporal server and workers of our own: start, kill and revive them."""

    def __init__(self, folder: Path, port: int, quiet: bool = True) -> None:
        """Keep the server's data, and with quiet=True the ledger and the logs, in the folder."""
        self.folder, self.port, self.quiet = folder, port, quiet
        self.address = f"127.0.0.1:{port}"
        self.server: WorkflowEnvironment | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    async def start_server(self) -> Client:
        """Start the server, or start it again on the same file, and return a client."""
        beside = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
        self.server = await WorkflowEnvironment.start_local(
            port=self.port,
            ui=True,
            ui_port=self.port + 1000,
            # Without a binary on the path, as on Windows, the SDK downloads one.
            dev_server_existing_path=shutil.which("temporal", path=beside),
            dev_server_database_filename=str(self.folder / "temporal.db"),
            dev_server_log_level="never",
            dev_server_extra_args=SERVER_FLAGS,
        )
        return self.server.client

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
        """Start another worker for each that was killed."""
        for worker in [w for w in self.workers if w.poll() is not None]:
            self.workers.remove(worker)
            if worker.returncode not in (137, -9):
                sys.exit(f"worker {worker.pid} ended with exit code {worker.returncode}")
            say(f"worker {worker.pid} died; starting another")
            self.start_worker()

    async def close(self) -> None:
        """Kill all that still runs."""
        for worker in list(self.workers):
            self.kill_worker(worker)
        await self.kill_server()


def free_port() -> int:
    """Find a port that is free, and the Web UI's, 1000 higher, too."""
    while True:
        # Below the ports that systems give to clients: a client that keeps calling a killed server
        # could otherwise be given that very port, and the server could not come back on it.
        port = random.randrange(20_000, 30_000)
        with socket.socket() as server, socket.socket() as ui, suppress(OSError):
            server.bind(("127.0.0.1", port))
            ui.bind(("127.0.0.1", port + 1000))
            return port


@asynccontextmanager
async def private_stage() -> AsyncIterator[Stage]:
    """Set a stage in a temporary folder, with a ledger of its own; leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix="orders-", ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder), free_port())
        before = os.environ.get("CHARGE_STORE", "")
        os.environ["CHARGE_STORE"] = str(stage.folder / "charge_store.db")
        try:
            await stage.start_server()
            yield stage
        finally:
            await stage.close()
            os.environ["CHARGE_STORE"] = before


@asynccontextmanager
async def temporal() -> AsyncIterator[tuple[Client, Stage | None]]:
    """Use the server that is there; if none was configured and none is there, bring up our own."""
    if client_config() or await is_listening(DEFAULT_ADDRESS):
        yield await connect(), None
        return
    stage = Stage(HERE, int(DEFAULT_ADDRESS.rpartition(":")[2]), quiet=False)
    try:
        say(f"no server at {DEFAULT_ADDRESS}: starting one, and a worker, for as long as this runs")
        client = await stage.start_server()
        say(f"Web UI: {web_ui(DEFAULT_ADDRESS)}  server data: {nearby(HERE / 'temporal.db')}")
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
    customer, cents = raw.get("customer_id", "customer-123"), raw.get("amount_cents", 9999)
    raw["order_id"] = f"charge-{customer}-{cents}"
    return await place(ChargeWorkflow, raw | {"max_attempts": 0}, options.wait_result)


async def run_order(options: argparse.Namespace) -> int:
    """Start an OrderWorkflow."""
    made_up = f"order-{uuid.uuid4().hex[:8]}"
    raw = order_fields(options) | {
        "order_id": made_up if options.order_id is None else options.order_id
    }
    return await place(OrderWorkflow, raw, options.wait_result)


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
        say((await signals.query(handle))["state"])
        return 0


async def start(
    client: Client, kind: type[ChargeWorkflow | OrderWorkflow], raw: dict[str, Any]
) -> WorkflowHandle[Any, Any]:
    """Start a workflow on an order. An order id is used once; a charge may be asked for again."""
    again = WorkflowIDReusePolicy.ALLOW_DUPLICATE
    return await client.start_workflow(
        kind.__name__,
        raw,
        id=raw["order_id"],
        task_queue=ORDERS_QUEUE,
        id_reuse_policy=again if kind is ChargeWorkflow else WorkflowIDReusePolicy.REJECT_DUPLICATE,
        task_timeout=TASK_TIMEOUT,
    )


# The command line.


def cents(text: str) -> int:
    """Read an amount typed with at most two decimals, such as 99.99, as cents."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,2})?", text):
        raise argparse.ArgumentTypeError("must be an amount like 99.99")
    whole, _, part = text.partition(".")
    return int(whole) * 100 + int(part.ljust(2, "0"))


def given(text: str) -> str:
    """Refuse an empty argument: it is not the same as a missing one."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def fault(text: str) -> tuple[str, str]:
    """Read STEP=FAULT."""
    step, _, name = text.partition("=")
    if step not in STEPS or name not in FAULTS:
        raise argparse.ArgumentTypeError("must be STEP=FAULT with names from --help")
    return step, name


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = store.Parser(description="Place orders, and crash things on purpose.")
    commands = parser.add_subparsers(dest="command", title="commands", required=True)
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
    options = parser.parse_args()
    if options.simulate:
        options.simulate = dict(options.simulate)
    return options


def main() -> int:
    """Run one command."""
    options = parse_arguments()
    # A plain kill should clean up after us like Ctrl+C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commands = {"charge": run_charge, "order": run_order}
    try:
        return asyncio.run(commands[options.command](options))
    except RPCError as error:
        sys.exit(f"the Temporal server refuses: {store.printable(error)}")


if __name__ == "__main__":
    store.run_script(main)
