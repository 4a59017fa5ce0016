"""The worker: the process people kill. It runs workflows and activities, and it keeps nothing.

What an order has been through is in Temporal's history, and what it did is in the ledger, so this
process may die at any moment and another one goes on. Orders and shipping have a task queue each:
one process serves both, or one serves `orders` and another `shipping`. Below it stands what the
other scripts need of processes: to connect to a server, and to start and kill servers and workers.
"""

import argparse
import asyncio
import atexit
import io
import logging
import os
import random
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, NoReturn

if __name__ == "__main__":  # Ctrl+C in the second of imports that follows: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from temporalio.client import Client
from temporalio.converter import DataConverter, DefaultPayloadConverter
from temporalio.envconfig import ClientConfig
from temporalio.runtime import Runtime, TelemetryConfig
from temporalio.service import RPCError
from temporalio.worker import PollerBehaviorSimpleMaximum, Worker

import charge_store as store
from activities import ORDER_STEPS, SHIPPING_STEPS
from charge_store import fit, printable, say
from workflows import ORDERS_QUEUE, SHIPPING_QUEUE, ChargeWorkflow, OrderWorkflow, ShippingWorkflow

# The numbers for the worker, each with what Temporal's default would do to a person who watches.
# STICKY: a killed worker's orders are kept for it so long; 10 s: a hang. With 0.3 s a busy machine
# ran into it without a death, and a query in between led the SDK astray: such an order's history no
# longer replayed (6 of 80 orders; with 1 s none of 160).
STICKY = timedelta(seconds=1)
BEAT = timedelta(seconds=0.4)  # a sign of life is passed on so often; 0.8 s: nearly taken for dead
POLLS = 40  # tasks fetched at once; 5: a busy worker fetches late and replays, 8 % more CPU
CACHED = 230  # orders in memory, and as many children, 0.15 MB a pair; 1000: more than 200 MB
THREADS = 32  # activities at once; most of them wait, for the ledger
QUEUES = [ORDERS_QUEUE, SHIPPING_QUEUE]
ROLES = {"all": QUEUES, "orders": QUEUES[:1], "shipping": QUEUES[1:]}  # what each serves


def make_worker(client: Client, queue: str) -> Worker:
    """Make the worker of one task queue."""
    orders = queue == ORDERS_QUEUE
    return Worker(
        client,
        task_queue=queue,
        workflows=[ChargeWorkflow, OrderWorkflow] if orders else [ShippingWorkflow],
        activities=ORDER_STEPS if orders else SHIPPING_STEPS,
        activity_executor=ThreadPoolExecutor(THREADS),
        # More than there are threads would wait in line with their timeouts running.
        max_concurrent_activities=THREADS,
        max_heartbeat_throttle_interval=BEAT,
        workflow_task_poller_behavior=PollerBehaviorSimpleMaximum(POLLS),
        max_cached_workflows=CACHED,
        sticky_queue_schedule_to_start_timeout=STICKY,
    )


async def serve(role: str) -> None:
    """Serve the role's task queues until stopped."""
    cancel_on("SIGINT")
    client = await connect()
    workers = [make_worker(client, queue) for queue in ROLES[role]]
    address = client.service_client.config.target_host
    say(f"worker {os.getpid()} serves {' and '.join(ROLES[role])} at {address}")
    say(f"Web UI: {web_ui(address)}  ledger: {nearby(store.store_path())}")
    say(f"kill it: {kill_command(os.getpid())}  stop it: Ctrl+C")
    # Ctrl+C, or one that fails, cancels all; each tells its activities to stop, and waits for them.
    async with asyncio.TaskGroup() as running:
        for worker in workers:
            running.create_task(worker.run())


# Connecting.

HERE = Path(__file__).parent
DEFAULT_ADDRESS = "localhost:7233"


class TolerantConverter(DefaultPayloadConverter):
    """Hands over an input that does not decode as the error that it gave: parse_order refuses it.

    Raised here it would fail not the order but its workflow task, which is retried for ever.
    """

    def from_payloads(self, payloads: Any, type_hints: Any = None) -> list[Any]:
        """Decode payloads as usual."""
        try:
            return super().from_payloads(payloads, type_hints)
        except Exception as error:
            if type_hints:  # an activity's input or answer: none may be taken for another
                raise
            return [error]


def client_config() -> dict[str, Any]:
    """Read from the environment or a profile where Temporal is; empty if neither says."""
    try:
        return dict(ClientConfig.load_client_connect_config())
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"cannot read the Temporal configuration: {error}")


async def connect() -> Client:
    """Connect within 4 s, or exit with a line that says what to do."""
    converter = DataConverter(payload_converter_class=TolerantConverter)
    config: dict[str, Any] = {"target_host": DEFAULT_ADDRESS, "data_converter": converter}
    config |= client_config()
    try:
        # Not wait_for(): on Python 3.11 it may swallow a Ctrl+C that comes with the answer.
        async with asyncio.timeout(4):
            return await Client.connect(**config)
    except (RuntimeError, ValueError, TimeoutError) as error:
        address = config["target_host"]
        plain = "tcp connect error" in str(error)  # that nobody listens we say ourselves
        why = "" if plain else f" ({str(error) or 'no answer'})"
        where = f"to start one at {DEFAULT_ADDRESS}, in another terminal"
        told = f"no Temporal server answers at {address}{why}; {where}"
        sys.exit(f"{told}: {command('worker.py')} server")


async def is_listening(address: str) -> bool:
    """Tell whether anything accepts connections there."""
    host, _, port = address.replace("[", "").replace("]", "").rpartition(":")  # [::1]:7233
    with suppress(OSError):  # a timeout is one too
        async with asyncio.timeout(2):
            # Of the two addresses that localhost has, one may be silent, on Windows for 2 s.
            _, writer = await asyncio.open_connection(host, int(port), happy_eyeballs_delay=0.1)
        writer.close()
        return True
    return False


def web_ui(address: str) -> str:
    """Guess the Web UI's URL: the development server has it 1000 ports higher."""
    host, _, port = address.rpartition(":")
    return f"http://{host}:{int(port) + 1000}" if port.isdigit() else "unknown"


# Servers and workers of our own.

# A server's: WAL makes one that keeps its data in a file as fast as one in memory, and it survives
# kill -9 as well. Then: timers and retries under 1 s take no longer than they say, and a workflow
# that has had its bug mended goes on within a second instead of up to half a minute.
SERVER_FLAGS = [
    *("--sqlite-pragma", "journal_mode=wal", "--sqlite-pragma", "synchronous=normal"),
    *("--dynamic-config-value", 'history.timerProcessorMaxTimeShift="10ms"'),
    *("--dynamic-config-value", 'history.workflowTaskRetryMaxInterval="1s"'),
]


class Stage:
    """A Temporal server and workers of our own: start, kill and revive them."""

    def __init__(self, folder: Path, address: str, logs: Path | None = None) -> None:
        """Keep the server's data in the folder; the workers write to `logs`, or to the screen."""
        self.folder, self.address, self.logs, self.code = folder, address, logs, HERE
        self.server: subprocess.Popen[bytes] | None = None  # None: others run both
        self.client: Client
        self.workers: list[subprocess.Popen[bytes]] = []
        self.failed = 0  # workers that could not start, since the server did

    def server_command(self) -> list[str]:
        """Spell the server's command; the HTTP API stands 10 ports higher, as 7243 does."""
        port = int(self.address.rpartition(":")[2])
        ports = ["--port", str(port), "--http-port", str(port + 10)]
        data = ["--db-filename", str(self.folder / "temporal.db")]
        quiet = ["--log-level", "never", "--output", "none"]
        return [temporal_binary(), "server", "start-dev", *ports, *data, *quiet, *SERVER_FLAGS]

    async def start_server(self) -> None:
        """Start the server, or start it again on the same file, and connect to it."""
        with TemporaryFile() as errors:  # a pipe that nobody reads could fill up and hold it
            words = self.server_command()
            self.server = start_apart(words, stdout=subprocess.DEVNULL, stderr=errors)
            while self.server.poll() is None:
                with suppress(RuntimeError):
                    self.client = await Client.connect(self.address)
                    self.failed = 0
                    return
                await asyncio.sleep(0.02)
            errors.seek(0)
            why = errors.read().decode(errors="replace").partition("\n")[0]
        sys.exit(f"cannot start a Temporal server: {why}")

    def kill_server(self) -> None:
        """Kill the server at once, as kill -9 does."""
        if self.server:
            self.server.kill()
            self.server.wait()

    def environment(self) -> dict[str, str]:
        """Have a process use this server and our ledger, whatever environment or profile say."""
        kept = {name: v for name, v in os.environ.items() if not name.startswith("TEMPORAL_")}
        kept |= {"TEMPORAL_ADDRESS": self.address, "TEMPORAL_CONFIG_FILE": os.devnull}
        return kept | {"CHARGE_STORE": str(store.store_path())}  # not one beside a copy, in `code`

    def start_worker(self, role: str = "all") -> subprocess.Popen[bytes]:
        """Start a worker process, from our scripts or, in `code`, a copy of them."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        words = [sys.executable, str(self.code / "worker.py"), role]
        with open(self.logs, "ab") if self.logs else nullcontext() as log:
            worker = start_apart(words, env=self.environment(), stdout=log, stderr=log)
        self.workers.append(worker)
        return worker

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill a worker at once, as kill -9 does."""
        worker.kill()
        worker.wait()

    def revive(self) -> None:
        """Start another worker for each that has died."""
        for worker in [worker for worker in self.workers if worker.poll() is not None]:
            # One that met no server, as it was just being restarted, ended with 1; so does one that
            # can never start, which we say after some 5 s.
            self.failed += worker.returncode in (1, 2)
            if self.failed > 5:
                sys.exit(f"no worker can start: {self.last_words()}")
            self.start_worker()

    def last_words(self) -> str:
        """Read the last line that our workers wrote."""
        log = self.logs.read_text(encoding="utf-8", errors="replace") if self.logs else "see above"
        return log.strip().rpartition("\n")[2]

    def close(self) -> None:
        """Kill all that still runs."""
        for worker in self.workers:
            self.kill_worker(worker)
        self.kill_server()


def start_apart(words: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process that Ctrl+C in our terminal does not reach, but on Windows: we end it."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True, **options)
    # Buried when it dies: as a zombie it would look alive, to another starter too.
    threading.Thread(target=process.wait, daemon=True).start()
    return process


def temporal_binary() -> str:
    """Find the `temporal` command that pip put beside Python, or one on the path."""
    beside = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    return shutil.which("temporal", path=beside) or sys.exit("no command `temporal`: see README.md")


def free_port() -> int:
    """Find a port that is free for a server, and those of its HTTP API and Web UI too."""
    while True:
        # Below the ports that systems give to clients: a client that keeps calling a killed server
        # could otherwise be given that very port, and the server could not come back on it.
        port = random.randrange(20_000, 30_000)
        with suppress(OSError):
            for offset in (0, 10, 1000):  # server, HTTP API, Web UI
                socket.create_server(("127.0.0.1", port + offset)).close()
            return port


@asynccontextmanager
async def private_stage() -> AsyncIterator[Stage]:
    """Set a stage in a temporary folder, with a ledger of its own; leave nothing behind."""
    ledger = os.environ.get("CHARGE_STORE", "")
    with TemporaryDirectory(prefix="orders-", ignore_cleanup_errors=True) as folder:
        stage = Stage(Path(folder), f"127.0.0.1:{free_port()}", Path(folder) / "workers.log")
        os.environ["CHARGE_STORE"] = str(stage.folder / "charge_store.db")
        try:
            await stage.start_server()
            yield stage
        finally:
            stage.close()
            store.close()
            os.environ["CHARGE_STORE"] = ledger


def is_process(pid: int) -> bool:
    """Tell whether a process is there on this machine."""
    if sys.platform == "win32":
        query = ["tasklist", "/FI", f"PID eq {pid}"]
        return str(pid) in subprocess.run(query, capture_output=True, text=True).stdout
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError) as error:
        return isinstance(error, PermissionError)
    return True


async def run_server() -> int:
    """Be the Temporal server, on the default port, with its data in temporal.db."""
    if await is_listening(DEFAULT_ADDRESS):
        sys.exit(f"{DEFAULT_ADDRESS} is taken: a Temporal server or another program runs there")
    say(f"server {os.getpid()} at {DEFAULT_ADDRESS}, Web UI: {web_ui(DEFAULT_ADDRESS)}")
    say(f"data: {nearby(HERE / 'temporal.db')}  kill it: {kill_command(os.getpid())}")
    words = Stage(HERE, DEFAULT_ADDRESS).server_command()
    if sys.platform == "win32":
        return subprocess.call(words)
    os.execv(words[0], words)  # in our place: the pid above is the server's own


# What all our scripts begin and end with.


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, escaped, and exits 2."""

    def error(self, message: str) -> NoReturn:
        """Say it and exit."""
        self.exit(2, f"{self.prog}: {printable(message)} (see: {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, but not what a terminal sent that is no text in its encoding."""
        if any("\ud800" <= character <= "\udfff" for character in " ".join(sys.argv[1:])):
            self.error("an argument is not valid text")
        return super().parse_known_args(args, namespace)


def nearby(path: Path) -> str:
    """Shorten a path below the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def command(script: str) -> str:
    """Spell the command that runs one of our scripts from the current directory."""
    python, on_path = Path(sys.executable), shutil.which("python")
    active = on_path and Path(on_path).parent == python.parent
    return f"{'python' if active else shlex.quote(nearby(python))} {nearby(HERE / script)}"


def kill_command(pid: int) -> str:
    """Spell the command that kills a process at once."""
    return f"taskkill /F /T /PID {pid}" if sys.platform == "win32" else f"kill -9 {pid}"


def cancel_on(*names: str) -> list[int]:
    """Have each of these signals cancel the current task, once; return a list of what has come."""
    task, loop, came = asyncio.current_task(), asyncio.get_running_loop(), list[int]()

    def stop(number: int, _: Any) -> None:
        # Not asyncio's own handler: at a second Ctrl+C that one breaks off the cleaning up.
        signal.signal(number, signal.SIG_IGN)
        came.append(number)
        if task and not task.done():
            loop.call_soon_threadsafe(task.cancel)

    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    return came


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script; whatever stops it leaves an exit code and no traceback. None: it worked."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr does both by itself
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    # Without this pause the SDK can crash while Python exits (sdk-python issue 300).
    atexit.register(time.sleep, 0.1)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # a second Ctrl+C in that
    try:
        # What is wrong we say ourselves, not the SDK in log lines.
        warnings.filterwarnings("ignore", module="temporalio")
        Runtime.set_default(Runtime(telemetry=TelemetryConfig(logging=None)))
        code: Any = main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 130  # what a shell reports after Ctrl+C
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os._exit(0)
    except sqlite3.Error as error:
        code = f"{store.store_path()}: {error}; name a writable file in CHARGE_STORE"
    except RPCError as error:
        code = f"the Temporal server refuses: {error}"
    except OSError as error:  # a full disk behind the output, say
        code = f"cannot go on: {error}"
    if isinstance(code, str):
        print(fit(code, sys.stderr), file=sys.stderr)
        code = 1
    sys.exit(code)


def main() -> None:
    """Run a worker, or a server."""
    parser = Parser(description="Run a worker until Ctrl+C. LOG_LEVEL sets how much it says.")
    text = "which task queues to serve; or server: be the Temporal server"
    parser.add_argument("role", nargs="?", choices=[*ROLES, "server"], default="all", help=text)
    role = parser.parse_args().role
    if role == "server":
        sys.exit(asyncio.run(run_server()))
    level, form = os.environ.get("LOG_LEVEL", "INFO").upper(), "%(asctime)s %(message)s"
    if level not in logging.getLevelNamesMapping():
        parser.error(f"LOG_LEVEL {level}: must be DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(stream=sys.stdout, level=level, format=form, datefmt="%H:%M:%S")
    # Failed attempts have a line of ours, to which the SDK would add a traceback each; what it
    # says about the workflow's code is kept.
    logging.getLogger("temporalio").setLevel(logging.WARNING)
    logging.getLogger("temporalio.activity").setLevel(logging.ERROR)
    logging.raiseExceptions = False  # whoever reads our lines, `head` say, may have seen enough
    # A ledger that cannot be written ends the worker, not each attempt.
    store.execute("UPDATE events SET id = id WHERE FALSE")
    try:
        asyncio.run(serve(role))
    except asyncio.CancelledError:
        say(f"worker {os.getpid()} stopped")
    except ExceptionGroup as failed:
        sys.exit(f"worker {os.getpid()} failed: {failed.exceptions[0]}")


if __name__ == "__main__":
    run_script(main)
