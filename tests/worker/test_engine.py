"""The engine's thread: nobody waits for ever, and one bad request ends alone."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.engine import Engine
from tilefleet_worker.engine_config import EngineConfig
from tilefleet_worker.errors import EngineError
from tilefleet_worker.fake_runner import FakeRunner
from tilefleet_worker.request import Delta, Request, SamplingParams
from tilefleet_worker.scheduler import Scheduler
from tilefleet_worker.step import StepPlan, StepResult

VOCAB = 97
POISON = 66


class Outbox:
    """Collects deltas and lets a test wait for the end of a request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.changed = threading.Condition()

    def __call__(self, deltas: list[Delta]) -> None:
        with self.changed:
            self.deltas += deltas
            self.changed.notify_all()

    def ended(self) -> dict[str, Delta]:
        return {delta.request_id: delta for delta in self.deltas if delta.finish_reason}

    def wait(self, *names: str) -> dict[str, Delta]:
        with self.changed:
            assert self.changed.wait_for(lambda: set(names) <= set(self.ended()), 20), self.ended()
            return self.ended()

    def tokens(self, name: str) -> list[int]:
        return [t for delta in self.deltas if delta.request_id == name for t in delta.token_ids]


class Gate(FakeRunner):
    """A fake runner whose steps wait until the test lets them go."""

    def __init__(self) -> None:
        super().__init__(VOCAB)
        self.entered = threading.Event()
        self.open = threading.Event()

    def run(self, plan: StepPlan) -> StepResult:
        self.entered.set()
        assert self.open.wait(20)
        return super().run(plan)


class BrokenDevice(FakeRunner):
    def run(self, plan: StepPlan) -> StepResult:
        raise RuntimeError("bus error")

    def check(self) -> None:
        raise RuntimeError("still a bus error")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Build = Callable[..., tuple[Engine, Outbox]]


@pytest.fixture
def build() -> Iterator[Build]:
    engines: list[Engine] = []

    def make(
        runner: FakeRunner | None = None,
        start: bool = True,
        clock: Clock | None = None,
        **options: int,
    ) -> tuple[Engine, Outbox]:
        config = EngineConfig(**{"max_concurrent": 4, **options})  # type: ignore[arg-type]
        scheduler = Scheduler(BlockPool(64, 4), 16, config.max_concurrent, 200, vocab_size=VOCAB)
        runner = runner or FakeRunner(VOCAB, fault_token_id=POISON)
        engine = Engine(config, runner, scheduler, clock or time.monotonic)
        outbox = Outbox()
        engine.set_sink(outbox)
        engines.append(engine)
        if start:
            engine.start()
        return engine, outbox

    yield make
    for engine in engines:
        engine.stop()


def ask(name: str, prompt: list[int] | None = None, max_tokens: int = 5) -> Request:
    # 1, then only tokens that lead the fake runner around its poison token
    return Request(name, prompt or [1], SamplingParams(max_tokens=max_tokens), time.monotonic())


def test_a_request_becomes_tokens(build: Build) -> None:
    engine, outbox = build()
    assert engine.submit(ask("a", max_tokens=3)) is None
    assert outbox.wait("a")["a"].finish_reason == "length"
    assert len(outbox.tokens("a")) == 3
    assert engine.num_inflight == 0


def test_the_first_delta_says_when_a_request_left_the_queue(build: Build) -> None:
    engine, outbox = build(max_concurrent=1)
    for name in "ab":
        engine.submit(ask(name, max_tokens=6))
    outbox.wait("a", "b")
    for name in "ab":
        first, *others = [d.started_seconds for d in outbox.deltas if d.request_id == name]
        assert first is not None
        assert others == [None] * 5
    started = [d.started_seconds for d in outbox.deltas if d.started_seconds is not None]
    assert started == sorted(started)
    steps = engine.stats().histograms
    assert sum(steps["step_tokens"].counts) == engine.stats().counters["steps"]
    assert steps["step_tokens"].sum == 12
    assert steps["step_seconds"].sum == pytest.approx(engine.stats().counters["busy_seconds"])


def test_what_cannot_be_served_is_refused_at_once(build: Build) -> None:
    engine, _ = build()
    refusal = engine.submit(ask("a", max_tokens=500))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert engine.stats().counters["arrivals"] == 0


def test_a_poisoned_request_ends_alone(build: Build) -> None:
    engine, outbox = build(start=False)
    names = [f"r{index}" for index in range(3)]
    for name in names:
        engine.submit(ask(name))
    engine.submit(ask("bad", [3, POISON]))
    engine.start()
    ended = outbox.wait(*names, "bad")
    assert ended["bad"].finish_reason == "error"
    assert f"token {POISON} is poison" in str(ended["bad"].error)
    assert [ended[name].finish_reason for name in names] == ["length"] * 3
    assert len(outbox.tokens("r0")) == 5
    assert engine.failure is None
    engine.submit(ask("later"))
    assert outbox.wait("later")["later"].finish_reason == "length"
    assert engine.stats().counters["errors"] == 1


def test_a_broken_device_ends_everybody_and_says_so(build: Build) -> None:
    engine, outbox = build(BrokenDevice(VOCAB), start=False)
    for name in "ab":
        engine.submit(ask(name))
    engine.start()
    ended = outbox.wait("a", "b")
    assert {delta.finish_reason for delta in ended.values()} == {"error"}
    deadline = time.monotonic() + 20
    while engine.stall() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "bus error" in str(engine.stall())
    refusal = engine.submit(ask("c"))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (503, "engine_failed")


def test_an_abort_during_a_step_gives_one_final_delta(build: Build) -> None:
    gate = Gate()
    engine, outbox = build(gate)
    engine.submit(ask("a", max_tokens=100))
    assert gate.entered.wait(20)
    engine.abort("a")
    engine.abort("a")
    engine.abort("unknown")
    gate.open.set()
    assert outbox.wait("a")["a"].finish_reason == "abort"
    engine.submit(ask("b"))
    outbox.wait("b")
    assert [d.finish_reason for d in outbox.deltas if d.request_id == "a"].count("abort") == 1
    assert engine.stats().gauges["kv_blocks_used"] == 0


def test_a_request_whose_time_is_over_ends_and_frees_its_blocks(build: Build) -> None:
    clock, gate = Clock(), Gate()
    engine, outbox = build(gate, clock=clock)
    params = SamplingParams(max_tokens=100)
    for name, deadline in (("late", 1005.0), ("patient", 2000.0)):
        request = Request(name, [1], params, clock.now, deadline_seconds=deadline)
        assert engine.submit(request) is None
    assert gate.entered.wait(20)
    clock.now += 6
    gate.open.set()
    ended = outbox.wait("late", "patient")
    assert ended["late"].finish_reason == "timeout"
    assert "time was over after" in str(ended["late"].error)
    assert ended["patient"].finish_reason == "length"
    assert engine.stats().counters["timeouts"] == 1


def test_a_full_queue_answers_429_with_a_time(build: Build) -> None:
    engine, _ = build(start=False, max_waiting=2)
    for index in range(6):
        assert engine.submit(ask(str(index))) is None
    refusal = engine.submit(ask("one more"))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "queue_full")
    assert refusal.retry_after_seconds == 1


def test_an_id_in_flight_cannot_be_used_again(build: Build) -> None:
    engine, outbox = build(start=False)
    engine.submit(ask("a"))
    refusal = engine.submit(ask("a"))
    assert refusal is not None
    assert refusal.code == "duplicate_request_id"
    engine.start()
    outbox.wait("a")
    assert engine.submit(ask("a")) is None


def test_draining_refuses_new_requests_and_ends_the_accepted(build: Build) -> None:
    gate = Gate()
    engine, outbox = build(gate)
    engine.submit(ask("a"))
    engine.drain()
    refusal = engine.submit(ask("b"))
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after_seconds) == (503, "draining", 1)
    gate.open.set()
    assert outbox.wait("a")["a"].finish_reason == "length"
    assert engine.draining


def test_stopping_answers_everybody(build: Build) -> None:
    gate = Gate()
    engine, outbox = build(gate)
    engine.submit(ask("running", max_tokens=100))
    assert gate.entered.wait(20)
    engine.submit(ask("in the inbox"))
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    time.sleep(0.05)
    gate.open.set()
    stopper.join(20)
    ended = outbox.wait("running", "in the inbox")
    assert {delta.finish_reason for delta in ended.values()} == {"abort"}
    assert engine.num_inflight == 0


def test_a_sink_that_raises_does_not_end_the_engine(build: Build) -> None:
    engine, outbox = build(start=False)

    def sink(deltas: list[Delta]) -> None:
        outbox(deltas)
        raise OSError("client gone")

    engine.set_sink(sink)
    engine.start()
    engine.submit(ask("a"))
    engine.submit(ask("b"))
    assert {d.finish_reason for d in outbox.wait("a", "b").values()} == {"length"}
    assert engine.failure is None


def test_load_is_no_stall_but_silence_is(build: Build) -> None:
    clock, gate = Clock(), Gate()
    engine, outbox = build(gate, clock=clock)
    clock.now += 1000
    assert engine.stall() is None
    engine.submit(ask("a"))
    assert gate.entered.wait(20)
    clock.now += 59
    assert engine.stall() is None
    clock.now += 2
    assert "no step finished for 61.0 s" in str(engine.stall())
    gate.open.set()
    outbox.wait("a")
    clock.now += 1000
    assert engine.stall() is None


def test_stats_count_what_happened(build: Build) -> None:
    engine, outbox = build()
    prompt = [index % 50 for index in range(20)]
    for name in ("a", "b"):
        engine.submit(ask(name, prompt, max_tokens=4))
        outbox.wait(name)
    stats = engine.stats().as_dict()
    counters, gauges = stats["counters"], stats["gauges"]
    assert counters["arrivals"] == counters["completions"] == 2
    assert counters["generated_tokens"] == 8
    assert counters["prompt_tokens_computed"] + counters["prompt_tokens_cached"] == 40
    assert counters["prompt_tokens_cached"] == 16
    assert counters["steps"] == len(stats["steps"]) == 9
    assert counters["busy_seconds"] > 0
    assert gauges["running"] == gauges["waiting"] == gauges["kv_blocks_used"] == 0
    assert gauges["kv_blocks_total"] == 64
    assert stats["steps"][0]["prefill_tokens"] == 16


def test_waiting_time_is_that_of_the_oldest(build: Build) -> None:
    clock = Clock()
    engine, _ = build(start=False, clock=clock)
    for name, arrival in (("a", 990.0), ("b", 995.0)):
        engine.submit(Request(name, [1, 2], SamplingParams(max_tokens=1), arrival))
    gauges = engine.stats().gauges
    assert gauges["oldest_wait_seconds"] == 10.0
    assert (gauges["waiting"], gauges["waiting_prompt_tokens"]) == (2, 4)


def test_an_engine_starts_once(build: Build) -> None:
    engine, _ = build()
    with pytest.raises(EngineError, match="started before"):
        engine.start()


def test_many_threads_may_submit_and_abort(build: Build) -> None:
    engine, outbox = build(FakeRunner(VOCAB), max_waiting=1000)
    names = [f"{thread}-{index}" for thread in range(4) for index in range(25)]

    def work(thread: int) -> None:
        for index in range(25):
            name = f"{thread}-{index}"
            assert engine.submit(ask(name, [thread + 1, index], max_tokens=6)) is None
            if index % 5 == 0:
                engine.abort(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ended = outbox.wait(*names)
    for thread in threads:
        thread.join()
    reasons = [d.finish_reason for d in outbox.deltas if d.finish_reason]
    assert len(reasons) == 100
    assert {ended[name].finish_reason for name in names if not name.endswith(("0", "5"))} == {
        "length"
    }
    assert engine.stats().gauges["kv_blocks_used"] == 0
