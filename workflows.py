"""The order as a story: pure orchestration, which may be stopped anywhere and goes on from there.

After a crash another worker runs the same code from the top, and Temporal answers every `await`
that had an answer before from the recorded history. So this code must decide the same each time:
no clock, no random numbers, no files, no ledger. All of that is in activities.py.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from math import inf
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    ChildWorkflowError,
    FailureError,
    is_cancelled_exception,
)

with workflow.unsafe.imports_passed_through():
    import activities as step
    from activities import RULES, Note, Order, parse_order

ORDERS_QUEUE, SHIPPING_QUEUE = "orders-tq", "shipping-tq"
SHIPPING_TRIES = 3
NOTE_LENGTH = 500
# Answers that asking again will not change.
REFUSALS = ["InvalidOrder", "PaymentDeclined", "PaymentConflict", "OrderGivenUp"]
# The slowest honest answer takes 5 s; after twice that we stop waiting for it.
START_TO_CLOSE = timedelta(seconds=10)
# A killed worker says nothing: a second of silence is how the server learns of its death. A step
# that may take longer has to beat meanwhile, as _wait() in activities.py does. With 0.6 s, 300
# orders at full load had 53 attempts taken for dead that were not; with 1 s, 2.
HEARTBEAT = timedelta(seconds=1)
# Outages and crashes end soon here, so ask again soon: after 0.1, 0.2, 0.4, 0.8 s, then every 1 s.
FIRST_RETRY, SLOWEST_RETRY = timedelta(seconds=0.1), timedelta(seconds=1)


async def run_activity(activity: Callable[..., Any], argument: Any, max_attempts: int) -> Any:
    """Run an activity until it has an answer or its attempts (0: no limit) are used up."""
    return await workflow.execute_activity(
        activity,
        argument,
        start_to_close_timeout=START_TO_CLOSE,
        heartbeat_timeout=HEARTBEAT,
        retry_policy=RetryPolicy(
            initial_interval=FIRST_RETRY,
            maximum_interval=SLOWEST_RETRY,
            maximum_attempts=max_attempts,
            non_retryable_error_types=REFUSALS,
        ),
        summary=activity.__doc__,
    )


def clip(text: Any) -> str:
    """Make whatever a signal brought a short text that every screen and file can take."""
    return str(text)[:NOTE_LENGTH].encode("utf-8", "backslashreplace").decode()


# Workflows and handlers take any inputs of any type and check them in code: an input that did not
# fit a signature would fail not the order but its workflow task, which Temporal retries for ever.
def only(inputs: tuple[Any, ...]) -> Any:
    """Take the one input; anything else is passed on whole, for parse_order to refuse."""
    return inputs[0] if len(inputs) == 1 else list(inputs)


@workflow.defn
class ChargeWorkflow:
    """Lesson one: a durable wait, then a charge."""

    @workflow.run
    async def run(self, *inputs: Any) -> dict[str, Any]:
        """Wait, charge once, and return the provider's receipt."""
        order = parse_order(only(inputs), workflow.info().workflow_id, charge=True)
        if order.wait_seconds:
            await workflow.sleep(order.wait_seconds, summary="Wait before the charge")
        receipt: dict[str, Any] = await run_activity(step.charge_payment, order, order.max_attempts)
        return receipt


class Ended(Exception):
    """The story is over early, but nothing is wrong: REJECTED or EXPIRED."""


@workflow.defn
class OrderWorkflow:
    """An order: received, validated, reserved, reviewed, charged, shipped; or undone."""

    @workflow.init
    def __init__(self, *inputs: Any) -> None:
        # A signal can run before run()'s first line, so all state is set here; what is wrong with
        # the input is kept for run() to raise, because raising here would fail the workflow task.
        self._order, self._invalid = Order(workflow.info().workflow_id), None
        try:
            self._order = parse_order(only(inputs), workflow.info().workflow_id)
        except ApplicationError as error:
            self._invalid = error
        self._last_error = self._invalid.message if self._invalid else ""
        self._state = "RECEIVING"
        self._address = self._order.address
        self._decision: str | None = None
        self._note = ""
        self._shipping_attempts = 0
        self._undos: list[Callable[..., Any]] = []
        self._seconds_left = self._order.deadline_seconds
        self._due = inf  # when the machine time runs out; never, while it does not count
        self._story: asyncio.Task[Any] | None = None
        self._cancelled = False
        self._ending = False
        self._recorded = 0

    @workflow.run
    async def run(self, *inputs: Any) -> str:
        """Take the order to its end and return that: COMPLETED, REJECTED, EXPIRED or CANCELLED.

        Raises ApplicationError if it FAILED; its type says why.
        """
        if self._invalid:
            self._show("FAILED")
            raise self._invalid
        self._story = asyncio.current_task()
        try:
            async with self._machine_time():
                await self._do(step.receive_order, "RECEIVING")
                await self._do(step.validate_order, "VALIDATING")
                await self._do(step.reserve_inventory, "RESERVING", undo=step.release_inventory)

            await self._wait()
            await self._review()

            async with self._machine_time():
                await self._do(step.charge_payment, "CHARGING", undo=step.refund_payment)
                await self._ship(undo=step.void_dispatch)
            state, failure = "COMPLETED", None
        except (Ended, FailureError, asyncio.CancelledError) as error:
            state, failure = self._why(error)
        return await self._shielded(self._settle(state, failure))

    # What the story is made of.

    def _enter(self, state: str) -> None:
        """Go on to the next part of the story, unless a cancel or the deadline has come.

        Looked at here as well, because one that comes in the same moment as a step's answer may
        be swallowed by the `await`, which returns the answer; and a busy server fires timers late.
        """
        if self._seconds_left <= 0 or workflow.time() >= self._due:
            raise self._too_late()
        if self._cancelled or workflow.cancellation_reason() is not None:
            raise asyncio.CancelledError
        self._show(state)

    def _too_late(self) -> ApplicationError:
        """Build the error of an order that has used up its machine time."""
        problem = f"not done within {self._order.deadline_seconds:g} s, while {self._state}"
        return ApplicationError(problem, type="DeadlineExceeded")

    def _show(self, state: str) -> None:
        """Set the state and show it, in Temporal's Web UI too."""
        self._state = state
        workflow.set_current_details(f"**{state}** {self._last_error}")

    async def _do(
        self, activity: Callable[..., Any], state: str, undo: Callable[..., Any] | None = None
    ) -> None:
        """Do a step. Its undo is registered first: a step that "failed" may have happened."""
        self._enter(state)
        if undo:
            self._undos.append(undo)
        await run_activity(activity, self._order, self._order.max_attempts)

    @asynccontextmanager
    async def _machine_time(self) -> AsyncIterator[None]:
        """Count these steps against the deadline, which reviews and requested waits do not."""
        # Not this machine's clock, but the time in the history, which is the same in each replay.
        self._due = workflow.time() + self._seconds_left
        try:
            async with asyncio.timeout_at(self._due) as deadline:
                yield
        except (FailureError, TimeoutError, asyncio.CancelledError) as error:
            # A step cut off by the deadline raises its own cancellation, not TimeoutError.
            if not deadline.expired():
                raise
            raise self._too_late() from error
        self._seconds_left = self._due - workflow.time()
        self._due = inf

    async def _wait(self) -> None:
        """Wait as long as the order asks to. The timer is the server's: it survives our death."""
        if self._order.wait_seconds:
            self._enter("WAITING")
            await workflow.sleep(self._order.wait_seconds, summary="Requested wait")

    async def _review(self) -> None:
        """Wait for a person's decision, or for the timer, which approves."""
        self._enter("AWAITING_REVIEW")
        with suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: self._decision is not None,
                timeout=self._order.review_seconds,
                timeout_summary=f"Review by {self._order.review}",
            )
        # Looked at once more: a decision may have come in the instant in which the window closed.
        if self._decision is None and self._order.review == "person":
            raise Ended("EXPIRED")
        self._decision = self._decision or "approved"
        if self._decision == "rejected":
            raise Ended("REJECTED")

    async def _ship(self, undo: Callable[..., Any]) -> None:
        """Ship through a child workflow on its own task queue; three tries in all."""
        self._enter("SHIPPING")
        self._undos.append(undo)
        order = replace(self._order, address=self._address)
        while True:
            self._shipping_attempts += 1
            try:
                # TRY_CANCEL: a shipping worker that is down holds up no cancel and no deadline.
                await workflow.execute_child_workflow(
                    ShippingWorkflow.run,
                    order,
                    id=f"ship-{order.order_id}",
                    task_queue=SHIPPING_QUEUE,
                    cancellation_type=workflow.ChildWorkflowCancellationType.TRY_CANCEL,
                    static_summary=f"Ship to {self._address}",
                )
                return
            except ChildWorkflowError as error:
                if is_cancelled_exception(error):
                    raise
                self._last_error = str(error.cause)
            self._enter("SHIPPING")
            if self._shipping_attempts == SHIPPING_TRIES:
                problem = f"shipping failed {SHIPPING_TRIES} times: {self._last_error}"
                raise ApplicationError(problem, type="OrderGivenUp")
            await workflow.sleep(0.5 * 2**self._shipping_attempts, summary="Before shipping again")
            self._enter("SHIPPING")

    def _why(self, error: BaseException) -> tuple[str, ApplicationError | None]:
        """Name the state that an error ends the story in, and for FAILED the error to fail with."""
        if isinstance(error, Ended):
            return str(error), None
        if is_cancelled_exception(error):
            return "CANCELLED", None
        cause = error.cause if isinstance(error, ActivityError) else error
        if isinstance(cause, ApplicationError) and cause.type in (*REFUSALS, "DeadlineExceeded"):
            return "FAILED", ApplicationError(cause.message, type=cause.type)
        problem = f"given up while {self._state}: {cause}"
        return "FAILED", ApplicationError(problem, type="OrderGivenUp")

    async def _settle(self, state: str, failure: ApplicationError | None) -> str:
        """Undo what was begun, last first, until done, whatever the limits; write the outcome."""
        self._ending = True
        if state != "COMPLETED":
            self._last_error = failure.message if failure else self._last_error
            self._show("COMPENSATING")
            for undo in reversed(self._undos):
                if await run_activity(undo, self._order, max_attempts=0) == "dispatched":
                    # The package has left: there is nothing to undo, the order is complete.
                    state, failure, self._last_error = "COMPLETED", None, ""
                    break
        # What people asked for is written down first, so that the outcome comes last ...
        await workflow.wait_condition(workflow.all_handlers_finished)
        outcome = {"state": state}
        if failure:
            outcome["reason"] = f"{failure.type}: {failure.message}"
        note = Note(self._order, "outcome", outcome)
        await run_activity(step.record_outcome, note, max_attempts=0)
        self._show(state)
        # ... and whoever came meanwhile still gets an answer.
        await workflow.wait_condition(workflow.all_handlers_finished)
        if failure:
            raise failure
        return state

    async def _shielded(self, ending: Coroutine[Any, Any, str]) -> str:
        """Let the ending finish: further cancellations, from the UI say, must not tear it."""
        task = asyncio.create_task(ending)
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(task)
        return task.result()

    # Signals, an update and a query. No signal handler may raise: it would fail the order, or its
    # workflow task for ever. Each defaults its parameters and swallows surplus ones.

    @workflow.signal
    async def approve(self, note: Any = "", *_: Any) -> None:
        """Say yes."""
        await self._decide("approve", "approved", note)

    @workflow.signal
    async def reject(self, note: Any = "", *_: Any) -> None:
        """Say no."""
        await self._decide("reject", "rejected", note)

    @workflow.signal
    async def cancel(self, reason: Any = "", *_: Any) -> None:
        """Cancel the order, which is the same as cancelling the workflow, with a reason."""
        if not self._ending:
            self._cancelled, self._note = True, clip(reason) or self._note
            if self._story:
                self._story.cancel()
        await self._record("cancel", reason=clip(reason))

    @workflow.signal
    async def dispatch_failed(self, reason: Any = "", *_: Any) -> None:
        """Hear from the child why it fails; that it failed, its end will tell."""
        self._last_error = clip(reason)
        await self._record("dispatch_failed", reason=clip(reason))

    @workflow.signal(name="update_address")
    async def signal_address(self, address: Any = "", *_: Any) -> None:
        """Change the address, or note why not: a signal has no answer."""
        if problem := self._address_problem(address):
            await self._record("address_refused", address=clip(address), reason=problem)
        else:
            await self.update_address(address)

    @workflow.update
    async def update_address(self, address: Any = "", *_: Any) -> str:
        """Change the address and return it."""
        self._address = address
        await self._record("update_address", address=address)
        return str(address)

    @update_address.validator
    def check_address(self, address: Any = "", *_: Any) -> None:
        """Refuse an update before it enters the history."""
        if problem := self._address_problem(address):
            raise ApplicationError(problem, type="AddressRefused")

    @workflow.query
    def status(self) -> dict[str, Any]:
        """Tell where the order stands."""
        return {
            "order_id": self._order.order_id,
            "state": self._state,
            "address": self._address,
            "decision": self._decision,
            "note": self._note,
            "shipping_attempts": self._shipping_attempts,
            "last_error": self._last_error,
        }

    async def _decide(self, verb: str, decision: str, note: Any) -> None:
        """Take the first decision, early or not; later ones are only recorded."""
        counts = self._decision is None and not self._ending
        if counts:
            self._decision, self._note = decision, clip(note)
        await self._record(verb, note=clip(note), counts=counts)

    def _address_problem(self, address: Any) -> str:
        """Say why the address cannot be changed to this one; empty if it can."""
        valid, rule = RULES["address"]
        if not valid(address):
            return f"address {rule}"
        if self._state == "SHIPPING" or self._ending:
            return f"too late, the order is {self._state}"
        return ""

    async def _record(self, type_: str, **payload: Any) -> None:
        """Have an activity write a decision down; the number tells two alike apart."""
        self._recorded += 1
        note = Note(self._order, type_, {**payload, "number": self._recorded})
        if not self._invalid:
            await run_activity(step.record_decision, note, max_attempts=0)


@workflow.defn
class ShippingWorkflow:
    """Pack and dispatch, on workers of its own; tell the order why if that fails for good."""

    @workflow.run
    async def run(self, *inputs: Any) -> None:
        """Ship one order."""
        info = workflow.info()
        order = parse_order(only(inputs), info.workflow_id.partition("ship-")[2])
        try:
            await run_activity(step.prepare_package, order, order.max_attempts)
            await run_activity(step.dispatch_carrier, order, order.max_attempts)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            reason = f"{error.activity_type} failed: {error.cause}"
            if info.parent:
                parent = workflow.get_external_workflow_handle(info.parent.workflow_id)
                await parent.signal(OrderWorkflow.dispatch_failed, reason)
            raise ApplicationError(reason, type="DispatchFailed") from error
