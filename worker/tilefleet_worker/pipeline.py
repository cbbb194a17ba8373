"""The pipeline: turns the scheduler's plans into its results, where the runner can one step ahead.

One step ahead: the next step is laid out and launched while the device computes the one before;
only then does the host wait for the tokens of that one. Every failure is dealt with here, so that
one bad request ends alone. Knows no thread, no inbox and no tensor.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tilefleet_worker.errors import EngineError
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.request import Delta
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepResult

LOGGER = logging.getLogger(__name__)

Steps = list[tuple[StepPlan, float]]
"""Steps that ended, and how many seconds each took."""


class StepRunner(Protocol):
    """What the engine needs of a device: the real runners and the fake one all have it."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute a plan. Running the same rows twice must be harmless."""
        ...

    def check(self) -> None:
        """Raise when the device cannot run even a step that is known to be good."""
        ...

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Copy blocks between device and host: behind the steps launched, before the next one."""
        ...


class Launched(Protocol):
    """A step on its way through the device."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what went wrong on the device."""
        ...


@runtime_checkable
class LaunchingRunner(Protocol):
    """A runner that returns from a launch at once and computes launches in their order.

    It keeps the newest token of every slot, so that a row whose last token is pending can follow.
    """

    def launch(self, plan: StepPlan) -> Launched:
        """Begin a step. Reads the plan now, not later. Raises what the host sees at once."""
        ...


@dataclass(frozen=True, slots=True)
class _UnderWay:
    plan: StepPlan
    launched: Launched
    began_seconds: float


class Pipeline:
    """At most one step under way while the next is laid out; none for a runner that only runs.

    When a step fails, no other step is under way any longer: what was launched after it builds on
    tokens that do not exist, so its end is awaited, its result is thrown away and its rows are
    scheduled again. The rows of the failed step run once more, one by one, to find those at fault.
    """

    def __init__(
        self, runner: StepRunner, scheduler: Scheduler, clock: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._clock = clock
        self._launching = runner if isinstance(runner, LaunchingRunner) else None
        self._under_way: _UnderWay | None = None
        self._last_end_seconds = clock()

    @property
    def busy(self) -> bool:
        """True while a step is under way, whose result nobody has seen."""
        return self._under_way is not None

    def turn(self, began_seconds: float) -> tuple[list[Delta], Steps]:
        """Schedule one step and take in one. Returns what came of the latter, and its seconds.

        began_seconds: when this turn began, on the engine's clock. Raises EngineError when the
        device is broken.
        """
        plan = self._scheduler.schedule()
        self._transfer()
        if self._launching is None:
            result = self._run(plan) if len(plan) else StepResult({})
            return self._commit(plan, result, began_seconds)
        before, self._under_way = self._under_way, None
        step, failure = self._launch(self._launching, plan, began_seconds)
        deltas: list[Delta] = []
        steps: Steps = []
        if before is not None:
            try:
                result = before.launched.result()
            except Exception as error:
                self._throw_away(plan, step)
                step = failure = None
                result = self._one_by_one(self._scheduler.settled(before.plan), error)
            deltas, steps = self._commit(before.plan, result, before.began_seconds)
        if failure is not None:
            result = self._one_by_one(self._scheduler.settled(plan), failure)
            more = self._commit(plan, result, began_seconds)
            deltas, steps = deltas + more[0], steps + more[1]
        self._under_way = step
        return deltas, steps

    def _transfer(self) -> None:
        """Make the copies that the newest plan relies on. They are of no request: one that fails
        is the end of the device.
        """
        transfers = self._scheduler.take_transfers()
        if not transfers:
            return
        try:
            self._runner.transfer(transfers)
        except Exception as error:
            raise EngineError(f"KV blocks could not be copied: {error}") from error

    def drain(self) -> None:
        """Wait for what is under way, whatever becomes of it."""
        if self._under_way is not None:
            _await(self._under_way.launched)
            self._under_way = None

    def _launch(
        self, runner: LaunchingRunner, plan: StepPlan, began_seconds: float
    ) -> tuple[_UnderWay | None, Exception | None]:
        """The step under way, or why it could not be launched; neither for an empty plan."""
        if not len(plan):
            return None, None
        try:
            return _UnderWay(plan, runner.launch(plan), began_seconds), None
        except Exception as error:
            return None, error

    def _throw_away(self, plan: StepPlan, step: _UnderWay | None) -> None:
        if step is not None:
            _await(step.launched)
        self._scheduler.discard(plan)

    def _commit(
        self, plan: StepPlan, result: StepResult, began_seconds: float
    ) -> tuple[list[Delta], Steps]:
        """Commit a step and measure it: from its launch, or from the end of the one before."""
        deltas = self._scheduler.commit(plan, result)
        if not len(plan):
            return deltas, []
        now = self._clock()
        seconds = now - max(began_seconds, self._last_end_seconds)
        self._last_end_seconds = now
        return deltas, [(plan, seconds)]

    def _run(self, plan: StepPlan) -> StepResult:
        """Run a plan; when it raises, find the rows at fault so that the others go on."""
        try:
            return self._runner.run(plan)
        except Exception as error:
            failure = error
        # Outside the handler, so that the traceback of a row shows its own error alone.
        return self._one_by_one(plan, failure)

    def _one_by_one(self, plan: StepPlan, error: Exception) -> StepResult:
        """Results of a plan that raised `error`: each row once more, alone."""
        LOGGER.warning("a step of %d rows failed (%s): running them one by one", len(plan), error)
        parts = [self._alone(plan.alone(index)) for index in range(len(plan))]
        return StepResult.joined(parts)

    def _alone(self, plan: StepPlan) -> StepResult:
        """Run one row. What it raises is its fault, unless the device is broken."""
        try:
            return self._runner.run(plan)
        except Exception as error:
            LOGGER.exception("request %s broke its step", plan.request_ids[0])
            self._check_device(error)
            return StepResult({}, {plan.request_ids[0]: f"{type(error).__name__}: {error}"})

    def _check_device(self, error: Exception) -> None:
        """Raise EngineError when not the request but the device is broken."""
        try:
            self._runner.check()
        except Exception as broken:
            raise EngineError(
                f"The device failed its self-check ({broken}) after: {error}"
            ) from error


def _await(launched: Launched) -> None:
    """Wait for a step whose result is of no use."""
    try:
        launched.result()
    except Exception as error:
        LOGGER.warning("a step that was thrown away failed too (%s)", error)
