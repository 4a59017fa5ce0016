"""The order as a story: pure orchestration, which may be stopped anywhere and goes on from there.

A worker runs this code only until it must wait: such a short piece of work is a workflow task.
After a crash another worker runs the same code from the top, and Temporal answers every `await`
that had an answer before from the recorded history: replay. So this code must decide the same
each time: no clock, no random numbers, no files, no ledger. All of that is in activities.py.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    ChildWorkflowError,
    FailureError,
    is_cancelled_exception,
)

# Workflow code runs in a sandbox, which loads modules anew for each run; these need it not.
# `step.charge_payment`, say, is the activity of that name.
with workflow.unsafe.imports_passed_through():
    import activities as step
    from activities import RULES, Order, parse_order

Activity = Callable[..., Any]
ORDERS_QUEUE, SHIPPING_QUEUE = "orders-tq", "shipping-tq"
SHIPPING_TRIES = 3  # counted by the order, so that its history shows each
NOTE_LENGTH = 500
NOTES_KEPT = 300  # of an order; more are only counted: an activity's input is at most 2 MB
# Answers that asking again will not change.
REFUSALS = ["InvalidOrder", "OrderConflict", "PaymentDeclined", "PaymentConflict", "OrderGivenUp"]

# A worker killed between the charge and its answer is silent: after HEARTBEAT the server gives the
# attempt up, and 0.1 s later it hands the next one to any worker. (A step that takes longer beats
# every 0.1 s; worker.py passes that on every 0.4 s. 0.6 s here took the living for dead at load.)
HEARTBEAT = timedelta(seconds=1)
# The slowest honest answer takes 5 s; after twice that we stop waiting for it.
START_TO_CLOSE = timedelta(seconds=10)
# Outages and crashes end soon here, so ask again soon: after 0.1, 0.2, 0.4, 0.8 s, then every 1 s.
RETRY = RetryPolicy(
    initial_interval=timedelta(seconds=0.1),
    maximum_interval=timedelta(seconds=1),
    non_retryable_error_types=REFUSALS,
)


async def run_activity(activity: Activity, max_attempts: int, *arguments: Any) -> Any:
    """Run an activity until it has an answer or its attempts (0: no limit) are used up."""
    return await workflow.execute_activity(
        activity,
        args=arguments,
        start_to_close_timeout=START_TO_CLOSE,
        heartbeat_timeout=HEARTBEAT,
        retry_policy=replace(RETRY, maximum_attempts=max_attempts),
        summary=str(activity.__doc__).partition(".")[0],
    )


def clip(text: Any) -> str:
    """Make whatever a signal brought a short text that every screen and file can take."""
    return str(text)[:NOTE_LENGTH].encode("utf-8", "backslashreplace").decode()


# Workflows and handlers take inputs of any type and number and check them in code: what did not fit
# a signature would fail not the order but its workflow task, for ever, or, a signal's, be dropped.


@workflow.defn
class ChargeWorkflow:
    """Lesson one: a durable wait, then a charge. Cancelled in it, it undoes nothing."""

    @workflow.run
    async def run(self, raw: Any = None, *_: Any) -> dict[str, Any]:
        """Wait, charge once, and return the provider's receipt."""
        order = parse_order(raw, workflow.info().workflow_id, charge=True)
        if order.wait_seconds:
            await workflow.sleep(order.wait_seconds, summary="Wait before the charge")
        return dict(await run_activity(step.charge_payment, order.max_attempts, order))


@workflow.defn
class OrderWorkflow:
    """An order: received, validated, reserved, reviewed, charged, shipped; or undone."""

    @workflow.init
    def __init__(self, raw: Any = None, *_: Any) -> None:
        # A signal can run before run()'s first line, so all state is set here. What is wrong with
        # the input is for run() to raise: raised here it would fail the workflow task.
        self._order = Order(workflow.info().workflow_id)
        self._state, self._last_error = "RECEIVING", ""
        self._ending = self._closed = False  # closed: nothing more may be written down
        try:
            self._order = parse_order(raw, workflow.info().workflow_id)
        except ApplicationError as error:
            self._state, self._last_error, self._closed = "FAILED", error.message, True
        self._address = self._order.address
        self._decision: str | None = None
        self._decision_note = ""
        self._shipping_attempts = 0
        self._undos: list[Activity] = []
        self._first_run = workflow.info().first_execution_run_id  # also of a run after a reset
        self._seconds_left = self._order.deadline_seconds
        self._story: asyncio.Task[Any] | None = None
        self._halted: BaseException | None = None
        self._messages = 0
        self._notes: list[dict[str, Any]] = []  # that are still to be written down
        self._pen = asyncio.Lock()

    @workflow.run
    async def run(self, raw: Any = None, *_: Any) -> str:
        """Return how it ended: COMPLETED, REJECTED, EXPIRED or CANCELLED; raise if it FAILED."""
        parse_order(raw, workflow.info().workflow_id)  # raises what is wrong with it
        self._story, failure = asyncio.current_task(), None
        try:
            with self._deadline():
                await self._do(step.receive_order, "RECEIVING", self._first_run)
                await self._do(step.validate_order, "VALIDATING")
                await self._do(step.reserve_inventory, "RESERVING", undo=step.release_inventory)

            if self._order.wait_seconds:
                self._enter("WAITING")
                # The timer is the server's: it survives our death.
                await workflow.sleep(self._order.wait_seconds, summary="Requested wait")
            state = await self._review()

            if state == "APPROVED":
                with self._deadline():
                    await self._do(step.charge_payment, "CHARGING", undo=step.refund_payment)
                    await self._ship()
                state = "COMPLETED"
        except (FailureError, TimeoutError, asyncio.CancelledError) as error:  # what would fail it
            state, failure = self._why(self._halted or error)
        ending = asyncio.create_task(self._settle(state, failure))
        while not ending.done():
            with suppress(asyncio.CancelledError):  # a cancel that comes now must not tear it
                await asyncio.shield(ending)
        return ending.result()

    # What the story is made of.

    async def _do(self, activity: Activity, state: str, *more: Any, undo: Any = None) -> None:
        """Do a step."""
        self._enter(state)
        if undo:  # The saga pattern: registered first, as a step that "failed" may have happened.
            self._undos.append(undo)
        await run_activity(activity, self._order.max_attempts, self._order, *more)

    def _enter(self, state: str) -> None:
        """Go on to the next part of the story, or raise what shall end it."""
        if self._halted:  # an `await` that has its answer drops a cancel that came with it
            raise self._halted
        self._show(state)

    def _show(self, state: str) -> None:
        """Set the state and show it, in Temporal's Web UI too."""
        self._state = state
        workflow.set_current_details(f"**{state}** {self._last_error}")

    def _halt(self, reason: BaseException) -> None:
        """Cut the story short, wherever it stands; the first reason counts."""
        if not self._halted and not self._ending:
            self._halted = reason
            if self._story:
                self._story.cancel()

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        """Halt the story when its time is used up, to which reviews and waits do not count."""
        # Not this machine's clock, but the time in the history, which is the same in each replay.
        began, alarm = workflow.time(), asyncio.create_task(self._alarm())
        try:
            yield
        finally:
            alarm.cancel()
        self._seconds_left -= workflow.time() - began

    async def _alarm(self) -> None:
        """Halt the story when no time is left."""
        if self._seconds_left > 0:
            await workflow.sleep(self._seconds_left, summary="Deadline")
        problem = f"not done within {self._order.deadline_seconds:g} s, while {self._state}"
        self._halt(ApplicationError(problem, type="DeadlineExceeded"))

    async def _review(self) -> str:
        """Wait for a decision; when the window closes the timer approves, a person's is EXPIRED."""
        self._enter("AWAITING_REVIEW")
        if seconds := self._order.review_seconds:
            decided, window = lambda: self._decision is not None, f"Review by {self._order.review}"
            with suppress(TimeoutError):
                await workflow.wait_condition(decided, timeout=seconds, timeout_summary=window)
        if self._decision is None and self._order.review == "person":
            return "EXPIRED"
        self._decision = self._decision or "approved"
        return self._decision.upper()

    async def _ship(self) -> None:
        """Ship through a child workflow: another team's workers, who may be down, do that."""
        while True:
            self._enter("SHIPPING")
            self._shipping_attempts += 1
            child = asyncio.gather(
                workflow.execute_child_workflow(
                    ShippingWorkflow.run,
                    replace(self._order, address=self._address),
                    id=f"ship-{self._order.order_id}",
                    task_queue=SHIPPING_QUEUE,
                    # After a reset the old child may be there. (A child has no conflict policy.)
                    id_reuse_policy=WorkflowIDReusePolicy.TERMINATE_IF_RUNNING,
                    static_summary=f"Ship to {self._address}",
                ),
                return_exceptions=True,
            )
            # A stop ends this wait alone: SDK 1.35 cannot cancel a handle that was just terminated.
            [failure] = await asyncio.shield(child)
            if failure is None:
                return
            if not isinstance(failure, ChildWorkflowError) or is_cancelled_exception(failure):
                raise failure
            self._last_error = str(failure.cause)
            if self._shipping_attempts == SHIPPING_TRIES:
                problem = f"shipping failed {SHIPPING_TRIES} times: {self._last_error}"
                raise ApplicationError(problem, type="OrderGivenUp")
            await workflow.sleep(0.5 * 2**self._shipping_attempts, summary="Before shipping again")

    # How it ends.

    def _why(self, error: BaseException) -> tuple[str, ApplicationError | None]:
        """Name the state that an error ends the story in, and for FAILED the error to fail with."""
        if is_cancelled_exception(error):
            return "CANCELLED", None
        # An ActivityError says that an activity failed; what the activity raised is its cause.
        cause = error.cause if isinstance(error, ActivityError) else error
        if isinstance(cause, ApplicationError) and cause.type in (*REFUSALS, "DeadlineExceeded"):
            return "FAILED", ApplicationError(cause.message, type=cause.type)
        problem = f"given up while {self._state}: {cause}"
        return "FAILED", ApplicationError(problem, type="OrderGivenUp")

    async def _settle(self, state: str, failure: ApplicationError | None) -> str:
        """Undo what was begun, unless all is done, and write down how it ended, last of all."""
        self._ending = True
        if state != "COMPLETED":
            self._last_error = failure.message if failure else self._last_error
            self._show("COMPENSATING")
            try:
                if not await self._compensate():
                    state, failure, self._last_error = "COMPLETED", None, ""
            except ActivityError as error:  # OrderConflict: the effects are another order's
                self._show("FAILED")
                raise error.cause or error from None
        await self._write_notes()
        self._closed = True
        outcome: dict[str, Any] = {"state": state}
        if failure:
            outcome["reason"] = f"{failure.type}: {failure.message}"
        if self._messages > NOTES_KEPT:
            outcome["messages_not_kept"] = self._messages - NOTES_KEPT
        await run_activity(step.record_outcome, 0, self._order, outcome)
        self._show(state)
        if failure:
            raise failure
        return state

    async def _compensate(self) -> bool:
        """Undo, last first, each until done; return False if the package has left: then nothing."""
        if self._shipping_attempts:  # the child may still run
            child = workflow.get_external_workflow_handle(f"ship-{self._order.order_id}")
            with suppress(FailureError):  # it has ended
                await child.cancel()
        # Before a reset, or before the server forgot it, a run did what this one does not know of.
        was_before = await run_activity(step.look_back, 0, self._order, self._first_run)
        undos = step.UNDOS if was_before else self._undos
        # Forbidden first: else another run could, after a reset, ship what is undone here.
        if undos and await run_activity(step.void_dispatch, 0, self._order) == "dispatched":
            return False  # the point of no return
        for undo in reversed(undos):
            await run_activity(undo, 0, self._order)
        return True

    # Signals, an update and a query. No signal handler may raise: it would fail the order, or its
    # workflow task for ever. Messages may be thousands, so handlers only note what came.

    @workflow.signal
    def approve(self, note: Any = "", *_: Any) -> None:
        """Say yes."""
        self._decide("approve", "approved", note)

    @workflow.signal
    def reject(self, note: Any = "", *_: Any) -> None:
        """Say no."""
        self._decide("reject", "rejected", note)

    @workflow.signal
    def cancel(self, reason: Any = "", *_: Any) -> None:
        """Cancel the order: the same as cancelling the workflow, but it can say why."""
        if not self._ending:
            self._decision_note = clip(reason) or self._decision_note
        self._halt(asyncio.CancelledError())
        self._note("cancel", reason=clip(reason))

    @workflow.signal
    def dispatch_failed(self, reason: Any = "", *_: Any) -> None:
        """Hear from the child why it fails; that it failed, its end will tell."""
        self._note("dispatch_failed", reason=clip(reason))

    @workflow.signal(name="update_address")
    def signal_address(self, address: Any = "", *_: Any) -> None:
        """Change the address, or note why not: a signal has no answer."""
        if problem := self._address_problem(address):
            self._note("address_refused", address=clip(address), reason=problem)
        else:
            self.update_address(address)

    @workflow.update
    def update_address(self, address: Any = "", *_: Any) -> str:
        """Change the address and return it."""
        self._address = str(address)
        self._note("update_address", address=self._address)
        return self._address

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
            "note": self._decision_note,
            "shipping_attempts": self._shipping_attempts,
            "last_error": self._last_error,
        }

    def _decide(self, verb: str, decision: str, note: Any) -> None:
        """Take the first decision, early or not; later ones are only noted."""
        counts = self._decision is None and not self._ending
        if counts:
            self._decision, self._decision_note = decision, clip(note)
        self._note(verb, note=clip(note), counts=counts)

    def _address_problem(self, address: Any) -> str:
        """Say why the address cannot be changed to this one; empty if it can."""
        is_valid, rule = RULES["address"]
        if not is_valid(address):
            return f"address {rule}"
        if self._state == "SHIPPING" or self._ending or self._closed:
            return f"too late, the order is {self._state}"
        return ""

    def _note(self, type_: str, **payload: Any) -> None:
        """Have a message written down; its number tells it from another with the same words."""
        self._messages += 1
        if self._messages <= NOTES_KEPT and not self._closed:
            self._notes.append({"type": type_, **payload, "number": self._messages})
            asyncio.create_task(self._write_notes())  # noqa: RUF006 (Temporal's loop keeps it)

    async def _write_notes(self) -> None:
        """Have what came written down, one activity at a time, many notes in one."""
        async with self._pen:
            while self._notes:
                notes, self._notes = self._notes, []
                await run_activity(step.record_decision, 0, self._order, notes)


@workflow.defn
class ShippingWorkflow:
    """Pack and dispatch, on workers of its own."""

    @workflow.run
    async def run(self, raw: Any = None, *_: Any) -> None:
        """Ship one order; if that fails for good, tell the order why, and fail."""
        order = parse_order(raw, workflow.info().workflow_id.removeprefix("ship-"))
        try:
            await run_activity(step.prepare_package, order.max_attempts, order)
            await run_activity(step.dispatch_carrier, order.max_attempts, order)
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            # The failure is what the parent acts on; the signal is a note, for people who watch.
            reason = f"{error.activity_type} failed: {error.cause}"
            if parent := workflow.info().parent:
                the_order = workflow.get_external_workflow_handle(parent.workflow_id)
                await the_order.signal(OrderWorkflow.dispatch_failed, reason)
            raise ApplicationError(reason, type="DispatchFailed") from error
