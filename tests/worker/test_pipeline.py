"""One step ahead, with failures, equals one step at a time.

The device here has memory: a row writes its tokens into its blocks, and its next token is a
formula over its whole context as it stands in memory when the step runs. A block that changes hands
too early, a token from the wrong place and a step that is forgotten all change the answer.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.errors import EngineError
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.pipeline import Pipeline, StepRunner
from tilefleet_worker.request import Delta, Request, SamplingParams
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepResult, StepRow

VOCAB, BLOCK, POISON = 89, 4, 88


class Device:
    """Runs steps at once. A row that contains POISON breaks every step that it is in."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], int] = {}
        self.num_copied = 0
        self.newest: dict[int, int] = {}
        self.healthy = True

    def run(self, plan: StepPlan) -> StepResult:
        assert not plan.pending.any()
        return self.compute(list(zip(plan.rows, plan.slots.tolist(), strict=True)))

    def check(self) -> None:
        if not self.healthy:
            raise RuntimeError("it is gone")

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        self.check()
        for to_host, block, host_block in transfers:
            for place in range(BLOCK):
                if to_host:
                    self.host[host_block, place] = self.memory[block, place]
                else:
                    self.memory[block, place] = self.host[host_block, place]
        self.num_copied += len(transfers)

    def compute(self, rows: list[tuple[StepRow, int]]) -> StepResult:
        if not self.healthy:
            raise RuntimeError("it is gone")
        tokens = {}
        for row, slot in rows:
            if POISON in row.token_ids:
                raise ValueError("poison")
            for place, token in enumerate(row.token_ids, row.start):
                self.memory[row.block_ids[place // BLOCK], place % BLOCK] = token
            if row.sample:
                token = self.next_token(row)
                tokens[row.request_id] = self.newest[slot] = token
        return StepResult(tokens)

    def next_token(self, row: StepRow) -> int:
        value = 7
        for place in range(row.end):
            value = (value * 31 + self.memory[row.block_ids[place // BLOCK], place % BLOCK]) % 8191
        token = value % POISON
        while token in row.banned_token_ids:
            token = (token + 1) % POISON
        return token


@dataclass
class Step:
    """A step that the device has not begun, with what it was told at the launch."""

    device: "AheadDevice"
    rows: list[tuple[StepRow, int, bool]]
    number: int
    outcome: StepResult | Exception | None = None

    def result(self) -> StepResult:
        """The device works in order: everything launched before comes first."""
        self.device.catch_up(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome


@dataclass
class Failures:
    """Numbers of launches that fail: at once, or later on the device after some of their rows."""

    launches: frozenset[int] = frozenset()
    steps: dict[int, int] = field(default_factory=dict)


class AheadDevice(Device):
    """Begins a step only when its result, or that of a later one, is wanted."""

    def __init__(self, failures: Failures) -> None:
        super().__init__()
        self.failures = failures
        self.queue: list[Step | Sequence[Transfer]] = []
        self.num_launched = self.num_pending = 0

    def launch(self, plan: StepPlan) -> Step:
        self.num_launched += 1
        if self.num_launched in self.failures.launches:
            raise MemoryError("no room for the inputs")
        steps = [one for one in self.queue if isinstance(one, Step)]
        assert len(steps) < 2, "more than one step ahead"
        self.num_pending += int(plan.pending.sum())
        rows = list(zip(plan.rows, plan.slots.tolist(), plan.pending.tolist(), strict=True))
        self.queue.append(Step(self, rows, self.num_launched))
        return self.queue[-1]

    def run(self, plan: StepPlan) -> StepResult:
        self.catch_up(None)
        return super().run(plan)

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        """Behind the steps launched so far, however late those are begun."""
        self.queue.append(transfers)

    def catch_up(self, last: Step | None) -> None:
        """Do what comes before this step's end; None: the copies that are left."""
        while self.queue if last is None else last.outcome is None:
            step = self.queue.pop(0)
            if not isinstance(step, Step):
                super().transfer(step)
                continue
            assert last is not None, "a row was run alone while a step was under way"
            rows = [(self.named(row, slot, pending), slot) for row, slot, pending in step.rows]
            try:
                if step.number in self.failures.steps:
                    self.compute(rows[: self.failures.steps[step.number]])
                    raise RuntimeError("a fault on the device")
                step.outcome = self.compute(rows)
            except Exception as error:
                step.outcome = error

    def named(self, row: StepRow, slot: int, pending: bool) -> StepRow:
        if not pending:
            return row
        return replace(row, token_ids=(*row.token_ids[:-1], self.newest.get(slot, 0)))


@dataclass(frozen=True)
class Asked:
    prefix: int
    tail: tuple[int, ...]
    answer: int
    min_tokens: int
    arrives: int
    poisoned: bool

    def request(self, name: str) -> Request:
        prompt = [*range(self.prefix), *self.tail, *([POISON] * self.poisoned)]
        minimum = min(self.min_tokens, self.answer)
        return Request(name, prompt, SamplingParams(self.answer, min_tokens=minimum), 0.0)


def play(
    asked: list[Asked], eos: int, aborts: dict[int, int], device: StepRunner
) -> tuple[dict[str, list[int]], dict[str, Delta], Scheduler]:
    """Serve all of it. Returns tokens, the last delta of each request, and the empty scheduler."""
    host_blocks = 10 if isinstance(device, AheadDevice) else 0
    pool = BlockPool(14, BLOCK, host_blocks=host_blocks)
    scheduler = Scheduler(pool, 9, 3, 48, vocab_size=VOCAB, eos_token_ids=(eos,))
    pipeline = Pipeline(device, scheduler, time.monotonic)
    tokens: dict[str, list[int]] = {f"r{index}": [] for index in range(len(asked))}
    ended: dict[str, Delta] = {}
    for turn in range(4000):
        for index, one in enumerate(asked):
            if one.arrives == turn:
                assert scheduler.add(one.request(f"r{index}")) is None
        deltas = scheduler.abort(f"r{aborts[turn]}") if turn in aborts else []
        deltas += pipeline.turn(time.monotonic())[0]
        scheduler.check_integrity()
        for delta in deltas:
            assert delta.request_id not in ended
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                ended[delta.request_id] = delta
        if len(ended) == len(asked) and not pipeline.busy:
            break
    assert scheduler.pool.num_referenced == scheduler.pool.num_deferred == 0
    assert scheduler.pool.num_steps_under_way == 0
    return tokens, ended, scheduler


REQUESTS = st.builds(
    Asked,
    prefix=st.integers(1, 18),
    tail=st.lists(st.integers(0, POISON - 1), max_size=6).map(tuple),
    answer=st.integers(1, 20),
    min_tokens=st.sampled_from([0, 0, 0, 5]),
    arrives=st.integers(0, 12),
    poisoned=st.sampled_from([False] * 7 + [True]),
)


@settings(max_examples=80, deadline=None)
@given(
    asked=st.lists(REQUESTS, min_size=1, max_size=7),
    eos=st.integers(0, POISON - 1),
    aborts=st.dictionaries(st.integers(0, 40), st.integers(0, 6), max_size=2),
    launches=st.frozensets(st.integers(1, 30), max_size=2),
    steps=st.dictionaries(st.integers(1, 30), st.integers(0, 3), max_size=3),
)
def test_one_step_ahead_equals_one_at_a_time_whatever_fails(
    asked: list[Asked],
    eos: int,
    aborts: dict[int, int],
    launches: frozenset[int],
    steps: dict[int, int],
) -> None:
    """Stops, aborts, preemption, shared prefixes, poisoned requests, failing launches and steps."""
    want, _, _ = play(asked, eos, {}, Device())
    got, ended, _ = play(asked, eos, aborts, AheadDevice(Failures(launches, steps)))
    for index, one in enumerate(asked):
        name = f"r{index}"
        delta = ended[name]
        if delta.finish_reason == "abort":
            assert got[name] == want[name][: len(got[name])]
        else:
            assert (delta.finish_reason == "error") == one.poisoned, delta
            assert got[name] == want[name]


def busy_load(**changes: int) -> list[Asked]:
    return [Asked(3 + i, (i,), changes.get("answer", 12), 0, 0, False) for i in range(3)]


def test_every_decode_runs_ahead_and_no_turn_is_idle() -> None:
    device = AheadDevice(Failures())
    want, _, _ = play(busy_load(), POISON, {}, Device())
    got, _, _ = play(busy_load(), POISON, {}, device)
    assert got == want
    # The first token of each answer needs none before it.
    assert device.num_pending == 3 * 11


def test_a_step_that_fails_with_another_in_flight_costs_nobody_a_token() -> None:
    device = AheadDevice(Failures(steps={4: 1, 5: 2}))
    got, ended, _ = play(busy_load(), POISON, {}, device)
    assert got == play(busy_load(), POISON, {}, Device())[0]
    assert {delta.finish_reason for delta in ended.values()} == {"length"}


def test_preemption_waits_for_the_step_that_uses_the_blocks() -> None:
    """Blocks of a preempted request go to others at once: no step may still be writing them."""
    load = [Asked(8 + 3 * i, (i,), 20, 0, 0, False) for i in range(3)]
    device = AheadDevice(Failures(steps={9: 2}))
    got, _, scheduler = play(load, POISON, {}, device)
    assert device.num_copied > 0
    assert scheduler.gauges().counts["preemptions"] > 0
    assert got == play(load, POISON, {}, Device())[0]


def test_blocks_of_an_aborted_request_wait_for_the_step_that_uses_them() -> None:
    scheduler = Scheduler(BlockPool(14, BLOCK), 9, 3, 48, vocab_size=VOCAB)
    pipeline = Pipeline(AheadDevice(Failures()), scheduler, time.monotonic)
    assert scheduler.add(Request("a", [1, 2, 3], SamplingParams(9), 0.0)) is None
    pipeline.turn(0.0)
    pool = scheduler.pool
    assert [delta.finish_reason for delta in scheduler.abort("a")] == ["abort"]
    assert (pool.num_deferred, pool.num_available) == (1, 13)
    scheduler.check_integrity()
    pipeline.turn(0.0)
    assert (pool.num_deferred, pool.num_available) == (0, 14)
    assert not pipeline.busy


def turns_of(pipeline: Pipeline) -> Iterator[list[Delta]]:
    while True:
        yield pipeline.turn(time.monotonic())[0]


def test_a_broken_device_is_an_error_of_the_engine() -> None:
    device = AheadDevice(Failures())
    scheduler = Scheduler(BlockPool(14, BLOCK), 9, 3, 48, vocab_size=VOCAB)
    pipeline = Pipeline(device, scheduler, time.monotonic)
    for name in "ab":
        assert scheduler.add(Request(name, [1, 2, 3], SamplingParams(9), 0.0)) is None
    turns = turns_of(pipeline)
    next(turns)
    device.healthy = False
    with pytest.raises(EngineError, match="self-check"):
        next(turns)
    pipeline.drain()
    assert not pipeline.busy


def test_a_copy_that_fails_is_an_error_of_the_engine() -> None:
    """Nobody's request asked for it, so nobody's request is run again."""
    device = Device()
    pool = BlockPool(14, BLOCK, host_blocks=4)
    scheduler = Scheduler(pool, 9, 3, 48, vocab_size=VOCAB)
    pipeline = Pipeline(device, scheduler, time.monotonic)
    for name in "ab":
        prompt = [ord(name) - 90] * 40
        assert scheduler.add(Request(name, prompt, SamplingParams(2), 0.0)) is None
    device.transfer = broken  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="could not be copied: no such memory"):
        deque(turns_of(pipeline), maxlen=0)


def broken(transfers: Sequence[Transfer]) -> None:
    raise RuntimeError("no such memory")


def test_steps_are_measured_from_the_end_of_the_one_before() -> None:
    """Two steps under way at once must not count the same seconds twice."""
    now = 0.0
    scheduler = Scheduler(BlockPool(14, BLOCK), 9, 3, 48, vocab_size=VOCAB)
    pipeline = Pipeline(AheadDevice(Failures()), scheduler, lambda: now)
    assert scheduler.add(Request("a", [1, 2, 3], SamplingParams(4), 0.0)) is None
    seconds = []
    while scheduler.has_work or pipeline.busy:
        began = now
        now += 1.0
        seconds += [took for _, took in pipeline.turn(began)[1]]
    assert seconds == [2.0, 1.0, 1.0, 1.0]
