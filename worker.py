"""The worker: the process people kill. It runs workflows and activities, and it keeps nothing.

What an order has been through is in Temporal's history, and what it did is in the ledger, so this
process may die at any moment and another one goes on. Orders and shipping have a task queue each:
one process serves both, or one serves `orders` and another `shipping`.
"""

import argparse
import asyncio
import atexit
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.converter import DataConverter, DefaultPayloadConverter
from temporalio.envconfig import ClientConfig
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.worker import PollerBehaviorSimpleMaximum, Worker

import charge_store as store
from activities import ORDER_STEPS, SHIPPING_STEPS
from workflows import (
    ORDERS_QUEUE,
    SHIPPING_QUEUE,
    ChargeWorkflow,
    OrderWorkflow,
    ShippingWorkflow,
)

DEFAULT_ADDRESS = "localhost:7233"
# A workflow task first goes to the worker that has the workflow in memory. If that one was killed,
# this long passes before any other gets it; the default, 10 s, looks like a hang.
STICKY = timedelta(seconds=0.3)
# A task that a busy worker fetches later than that costs a replay of its workflow. With the default
# of 5 polls, an order among 200 in flight had 1.2 of those; with 40 it has 0.1, for 8 % less CPU.
POLLS = 40
# How often a worker passes on that an activity lives, which is taken for dead after 1 s of silence.
# The default, 0.8 s, leaves a busy machine 0.2 s to be late.
BEAT = timedelta(seconds=0.4)
# Orders kept in memory, and as many of their children: 0.15 MB for such a pair. Those that sleep
# longer are replayed when they wake. It is more than the 200 that `load` has in flight. With 10,000
# asleep the worker took 161 MB, and 191 MB when all woke at once; with 400 kept, 226 MB.
CACHED = 230
THREADS = 32  # activities at once; most of them wait, for the ledger


class TolerantConverter(DefaultPayloadConverter):
    """Hands over an input that does not decode as the error that it gave, for the order to refuse.

    Raised here it would fail not the order but its workflow task, which is retried for ever.
    """

    def from_payloads(
        self, payloads: Sequence[Payload], type_hints: list[type] | None = None
    ) -> list[Any]:
        """Decode payloads as usual."""
        try:
            return super().from_payloads(payloads, type_hints)
        except Exception as error:
            return [error]


DATA_CONVERTER = DataConverter(payload_converter_class=TolerantConverter)


def client_config() -> dict[str, Any]:
    """Read from the environment or a profile where Temporal is; empty if neither says."""
    try:
        return dict(ClientConfig.load_client_connect_config())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"cannot read the Temporal configuration: {store.printable(error)}")


async def connect() -> Client:
    """Connect within 4 s, or exit with a line that says what to do."""
    # Without this pause the SDK can crash while Python exits (sdk-python issue 300).
    atexit.register(time.sleep, 0.1)
    config: dict[str, Any] = {"target_host": DEFAULT_ADDRESS, "data_converter": DATA_CONVERTER}
    config |= client_config()
    warnings.filterwarnings("ignore", module="temporalio")  # about addresses; we say it ourselves
    try:
        return await asyncio.wait_for(Client.connect(**config), 4)
    except (RuntimeError, ValueError, TimeoutError):
        address = store.printable(config["target_host"])
        start = "temporal server start-dev --db-filename temporal.db"
        sys.exit(f"no Temporal server answers at {address}; start one: {start}")


def nearby(path: Path) -> str:
    """Shorten a path below the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def web_ui(address: str) -> str:
    """Guess the Web UI's URL: the development server has it 1000 ports higher."""
    host, _, port = address.rpartition(":")
    return f"http://{host}:{int(port) + 1000}" if port.isdigit() else "unknown"


def make_workers(client: Client, role: str = "all", **options: Any) -> list[Worker]:
    """Make the worker of each task queue that the role serves."""
    served: dict[str, tuple[list[Any], list[Any]]] = {
        ORDERS_QUEUE: ([ChargeWorkflow, OrderWorkflow], ORDER_STEPS),
        SHIPPING_QUEUE: ([ShippingWorkflow], SHIPPING_STEPS),
    }
    return [
        Worker(
            client,
            task_queue=queue,
            workflows=workflows,
            activities=activities,
            activity_executor=ThreadPoolExecutor(THREADS),
            # More than there are threads would wait in line with their timeouts running.
            max_concurrent_activities=THREADS,
            max_heartbeat_throttle_interval=BEAT,
            workflow_task_poller_behavior=PollerBehaviorSimpleMaximum(POLLS),
            sticky_queue_schedule_to_start_timeout=STICKY,
            **{"max_cached_workflows": CACHED} | options,
        )
        for queue, (workflows, activities) in served.items()
        if role in ("all", queue.removesuffix("-tq"))
    ]


async def serve(role: str) -> None:
    """Serve the role's task queues until stopped."""
    client = await connect()
    workers = make_workers(client, role)
    address, pid = client.service_client.config.target_host, os.getpid()
    kill = f"taskkill /F /PID {pid}" if sys.platform == "win32" else f"kill -9 {pid}"
    print(f"worker {pid} serves {' and '.join(w.task_queue for w in workers)} at {address}")
    print(f"Web UI: {web_ui(address)}  ledger: {nearby(store.store_path())}")
    print(f"kill it: {kill}  stop it: Ctrl+C")
    await asyncio.gather(*(worker.run() for worker in workers))


def parse_arguments() -> argparse.Namespace:
    """Read the command line, and LOG_LEVEL into `level`."""
    parser = store.Parser(description="Run a worker until Ctrl+C. LOG_LEVEL sets how much it says.")
    roles = ["all", "orders", "shipping"]
    parser.add_argument("role", nargs="?", choices=roles, default="all", help="which task queues")
    options: argparse.Namespace = parser.parse_args()
    options.level = os.environ.get("LOG_LEVEL", "INFO").upper()
    if options.level not in logging.getLevelNamesMapping():
        parser.error(f"LOG_LEVEL {options.level}: must be DEBUG, INFO, WARNING or ERROR")
    return options


def main() -> int:
    """Run a worker."""
    options = parse_arguments()
    logging.basicConfig(
        stream=sys.stdout,
        level=options.level,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # Failed attempts have a line of ours, to which the SDK would add a traceback each; what it
    # says about the workflow's code is kept, but once, and not by its core as well.
    logging.getLogger("temporalio").setLevel(logging.WARNING)
    logging.getLogger("temporalio.activity").setLevel(logging.ERROR)
    core = LoggingConfig(filter=TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    Runtime.set_default(Runtime(telemetry=TelemetryConfig(logging=core)))
    with store.connect():
        pass  # a ledger that cannot be written ends the worker here, and not each attempt later
    try:
        asyncio.run(serve(options.role))
    except KeyboardInterrupt:
        print(f"worker {os.getpid()} stopped")
    except RuntimeError as error:
        sys.exit(f"worker {os.getpid()} failed: {store.printable(error)}")
    return 0


if __name__ == "__main__":
    store.run_script(main)
