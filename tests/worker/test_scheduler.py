"""The scheduler with the fake runner: budgets hold, nothing is lost, everybody ends."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.worker.memory_runner import MemoryRunner
from tests.worker.pool_oracle import check_accounting, check_sums
from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.deadlines import Deadlines
from tilefleet_worker.errors import ConfigError
from tilefleet_worker.fake_runner import FakeRunner
from tilefleet_worker.layer_kinds import FULL, LayerKind
from tilefleet_worker.request import Delta, Request, SamplingParams
from tilefleet_worker.scheduler import MAX_OVERTAKEN, PROMPT_TOKENS_PER_DECODE, Scheduler
from tilefleet_worker.step import StepPlan, StepResult, StepRow

VOCAB = 97


def make(
    blocks: int = 32, budget: int = 16, concurrent: int = 4, length: int = 512, **kwargs: object
) -> Scheduler:
    eos, drafts = kwargs.pop("eos", ()), kwargs.pop("drafts", 0)
    pool = BlockPool(blocks, 4, **kwargs)  # type: ignore[arg-type]
    return Scheduler(
        pool, budget, concurrent, length, vocab_size=VOCAB, eos_token_ids=eos, max_drafts=drafts
    )  # type: ignore[arg-type]


def ask(name: str, prompt: list[int], max_tokens: int = 4, **kwargs: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, **kwargs)  # type: ignore[arg-type]
    return Request(name, prompt, params, arrival_seconds=0.0)


def step(scheduler: Scheduler, runner: FakeRunner | None = None) -> tuple[StepPlan, list[Delta]]:
    plan, runner = scheduler.schedule(), runner or FakeRunner(VOCAB)
    runner.transfer(scheduler.take_transfers())
    assert len(plan.rows) == len(plan)  # spelled out now: blocks may move at the commit
    deltas = scheduler.commit(plan, runner.run(plan))
    scheduler.check_integrity()
    check_sums(scheduler)
    return plan, deltas


def finish(scheduler: Scheduler, limit: int = 3000) -> dict[str, list[int]]:
    """Run to the end. Returns the tokens of each request."""
    tokens: dict[str, list[int]] = {}
    for _ in range(limit):
        if not scheduler.has_work:
            return tokens
        _, deltas = step(scheduler)
        for delta in deltas:
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    raise AssertionError(f"not drained after {limit} steps")


def usual(last: int, end: int) -> int:
    """The fake runner's formula."""
    return (last * 31 + end * 7 + 3) % VOCAB


def repeating(last: int, end: int) -> int:
    """Tokens that come again after every five, but not always."""
    return 50 + last % 7 if end % 9 == 0 else end % 5


def expected(
    prompt: list[int], count: int, formula: Callable[[int, int], int] = usual
) -> list[int]:
    """What the fake runner says for a prompt, computed without scheduler."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(formula(tokens[-1], len(tokens)))
    return tokens[len(prompt) :]


class SchedulerMachine(RuleBasedStateMachine):
    """A small pool, small budget, shared prefixes, aborts and faults at any time."""

    kinds = (FULL,)
    blocks = 12  # just enough for the longest request
    host_blocks = 0
    drafts = 0
    formula = staticmethod(usual)

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(
            blocks=self.blocks,
            budget=7,
            concurrent=3,
            length=48,
            kinds=self.kinds,
            drafts=self.drafts,
            host_blocks=self.host_blocks,
        )
        self.runner = MemoryRunner(VOCAB, self.kinds, 4, self.tokens_of, self.formula)
        self.now = 0.0
        self.asked: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}

    @rule(
        prefix=st.integers(0, 20),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=12),
        max_tokens=st.integers(1, 30),
        tenant=st.sampled_from(["", "a", "b"]),
        priority=st.sampled_from([0, 0, -1, 5]),
        patience=st.sampled_from([None, None, 3, 9]),
    )
    def add(
        self,
        prefix: int,
        tail: list[int],
        max_tokens: int,
        tenant: str,
        priority: int,
        patience: int | None,
    ) -> None:
        prompt = [*range(prefix), *tail]
        request = ask(f"r{len(self.asked)}", prompt, max_tokens)
        deadline = None if patience is None else self.now + patience
        request = replace(request, tenant=tenant, priority=priority, deadline_seconds=deadline)
        refusal = self.scheduler.add(request)
        fits = len(prompt) > 0 and len(prompt) + max_tokens <= 48
        assert (refusal is None) == fits
        if refusal is None:
            self.asked[request.request_id] = request

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.one_step()

    def one_step(self) -> None:
        plan = self.schedule()
        assert plan.num_tokens <= 7
        ids = [row.request_id for row in plan.rows]
        assert len(ids) == len(set(ids)) <= 3
        assert not set(ids) & set(self.ended)
        for row in plan.rows:
            assert row.length >= 1
            assert row.start + row.length <= len(row.block_ids) * 4
        self.take(self.scheduler.commit(plan, self.runner.run(plan)))
        self.scheduler.check_integrity()

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.runner.transfer(self.scheduler.take_transfers())
        return plan

    def take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ended
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.ended[delta.request_id] = delta.finish_reason

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.take(self.scheduler.abort(data.draw(st.sampled_from(sorted(self.asked)))))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        plan = self.schedule()
        if not plan.rows:
            return
        victim = data.draw(st.sampled_from([row.request_id for row in plan.rows]))
        result = self.runner.run(plan)
        tokens = {key: value for key, value in result.tokens.items() if key != victim}
        self.take(self.scheduler.commit(plan, StepResult(tokens, {victim: "poisoned"})))
        assert self.ended[victim] == "error"

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def abort_within_a_step(self, data: st.DataObject) -> None:
        plan = self.schedule()
        assert len(plan.rows) == len(plan)  # spelled out, as they are when a step is under way
        self.take(self.scheduler.abort(data.draw(st.sampled_from(sorted(self.asked)))))
        self.take(self.scheduler.commit(plan, self.runner.run(plan)))

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        """Exactly those end whose time is over, and their blocks are free at once."""
        self.now += seconds
        late = {
            name
            for name, request in self.asked.items()
            if name not in self.ended and (request.deadline_seconds or 1e9) <= self.now
        }
        deltas = self.scheduler.expire(self.now)
        assert {delta.request_id for delta in deltas} == late
        assert {delta.finish_reason for delta in deltas} <= {"timeout"}
        self.take(deltas)
        assert not late & set(self.scheduler._roster.by_id)

    def tokens_of(self, name: str) -> list[int]:
        prompt = list(self.asked[name].prompt_token_ids)
        return prompt + expected(prompt, self.asked[name].params.max_tokens, self.formula)

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        check_accounting(self.scheduler)

    def teardown(self) -> None:
        for _ in range(4000):
            if not self.scheduler.has_work:
                break
            self.one_step()
        assert set(self.ended) == set(self.asked)
        assert self.scheduler.pool.num_referenced == 0
        for name, reason in self.ended.items():
            request = self.asked[name]
            full = self.tokens_of(name)[len(request.prompt_token_ids) :]
            got = self.tokens[name]
            assert got == full[: len(got)]
            assert reason != "length" or got == full


class WindowMachine(SchedulerMachine):
    """Full attention beside a wider group of sliding windows, in a pool of both."""

    kinds = (FULL, LayerKind("window-9", 9, 2))
    blocks = 12 + 2 * 7
    host_blocks = 9


class OnlyWindowsMachine(SchedulerMachine):
    """All layers have windows, as in Mistral v0.1: a pool smaller than the longest request. The
    host has room for everything.
    """

    kinds = (LayerKind("window-8", 8),)
    blocks = 9
    host_blocks = 60


class SpeculatingMachine(WindowMachine):
    """Guesses that often come true, next to all else that may happen."""

    drafts = 3
    formula = staticmethod(repeating)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSpeculatingMachine = SpeculatingMachine.TestCase
TestWindowMachine = WindowMachine.TestCase
TestOnlyWindowsMachine = OnlyWindowsMachine.TestCase
for case in (
    TestSchedulerMachine,
    TestWindowMachine,
    TestOnlyWindowsMachine,
    TestSpeculatingMachine,
):
    case.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_running_requests_keep_their_token_while_a_long_prompt_comes_in() -> None:
    scheduler = make(blocks=64, budget=8)
    scheduler.add(ask("short", [1, 2, 3], max_tokens=40))
    step(scheduler)
    scheduler.add(ask("long", list(range(80)), max_tokens=2))
    for _ in range(10):
        plan, deltas = step(scheduler)
        assert plan.rows[0].request_id == "short"
        assert [d.request_id for d in deltas][:1] == ["short"]
        assert plan.rows[1].length == 7


def test_two_long_prompts_share_the_budget() -> None:
    scheduler = make(blocks=64, budget=8)
    scheduler.add(ask("a", list(range(50))))
    scheduler.add(ask("b", list(range(50, 90))))
    plan, _ = step(scheduler)
    assert [(row.request_id, row.length) for row in plan.rows] == [("a", 4), ("b", 4)]


def test_one_long_prompt_alone_takes_the_whole_budget() -> None:
    scheduler = make(blocks=64, budget=8)
    scheduler.add(ask("a", list(range(50))))
    plan, _ = step(scheduler)
    assert [row.length for row in plan.rows] == [8]


def test_a_step_takes_as_many_prompt_tokens_as_fill_the_device_and_more_beside_decodes() -> None:
    scheduler = Scheduler(BlockPool(64, 4), 100, 8, 256, vocab_size=VOCAB, prompt_tokens=8)
    for index in range(6):
        scheduler.add(ask(f"r{index}", list(range(index, index + 30)), max_tokens=9))
    taken = []
    while scheduler.has_work:
        plan, _ = step(scheduler)
        lengths = [row.length for row in plan.rows]
        taken.append((lengths.count(1), sum(length for length in lengths if length > 1)))
    assert taken[0] == (0, 8)  # two of them, four tokens each
    assert max(prompts for decodes, prompts in taken if decodes == 0) == 8
    decodes, beside = next(pair for pair in taken if pair[0] and pair[1] > 8)
    assert beside <= min(8 + PROMPT_TOKENS_PER_DECODE * decodes, 100 - decodes)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code", "limit"),
    [
        ([], 4, "empty_prompt", "at least one"),
        ([VOCAB], 4, "invalid_token_id", "97"),
        ([-1], 4, "invalid_token_id", "-1"),
        (list(range(60)), 5, "context_length_exceeded", "KV cache of 64"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    prompt: list[int], max_tokens: int, code: str, limit: str
) -> None:
    refusal = make(blocks=16).add(ask("a", prompt, max_tokens))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (400, code)
    assert limit in refusal.message


def test_the_model_length_is_named_when_it_is_the_limit() -> None:
    refusal = make(blocks=16, length=20).add(ask("a", [1] * 18, 3))
    assert refusal is not None
    assert "model length of 20" in refusal.message
    assert make(blocks=16, length=20).add(ask("a", [1] * 17, 3)) is None


def test_the_same_id_twice_is_refused() -> None:
    scheduler = make()
    scheduler.add(ask("a", [1]))
    refusal = scheduler.add(ask("a", [1]))
    assert refusal is not None
    assert refusal.code == "duplicate_request_id"


def test_a_request_as_large_as_the_pool_runs_to_its_end() -> None:
    scheduler = make(blocks=8, budget=5)
    scheduler.add(ask("a", list(range(20)), max_tokens=12))
    assert finish(scheduler)["a"] == expected(list(range(20)), 12)


def test_preemption_takes_the_youngest_and_changes_no_token() -> None:
    scheduler = make(blocks=12, budget=64, concurrent=3)
    prompts = {name: [index * 7 + 1] * 4 for index, name in enumerate("abc")}
    for name, prompt in prompts.items():
        scheduler.add(ask(name, prompt, max_tokens=28))
    tokens = finish(scheduler)
    assert scheduler.gauges().counts["preemptions"] > 0
    assert tokens == {name: expected(prompt, 28) for name, prompt in prompts.items()}


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = make(blocks=12, budget=64, concurrent=4)
    for name in "abc":
        assert scheduler.add(ask(name, [ord(name) % 7] * 4, max_tokens=28)) is None
    seen = 0
    for index in range(60):
        before = scheduler.gauges().counts["preemptions"]
        running = {s.request_id for s in scheduler._roster.running}
        scheduler.add(ask(f"small{index}", [1], max_tokens=1))
        plan, _ = step(scheduler)
        if scheduler.gauges().counts["preemptions"] > before:
            seen += 1
            assert {row.request_id for row in plan.rows} < running
    assert seen > 0


def test_a_prefix_is_hit_and_the_last_block_is_computed_again() -> None:
    scheduler = make(budget=64)
    prompt = list(range(16))
    scheduler.add(ask("first", prompt, max_tokens=1))
    finish(scheduler)
    scheduler.add(ask("second", prompt, max_tokens=1))
    plan, deltas = step(scheduler)
    assert (plan.rows[0].start, plan.rows[0].length) == (12, 4)
    assert deltas[0].num_cached_tokens == 12
    assert scheduler.gauges().counts["prompt_tokens_cached"] == 12
    assert scheduler.gauges().counts["prompt_tokens_computed"] == 20


def test_another_salt_hits_nothing() -> None:
    scheduler = make(budget=64)
    prompt, params = list(range(16)), SamplingParams(max_tokens=1)
    for salt in ("a", "b"):
        scheduler.add(Request(salt, prompt, params, 0.0, cache_salt=salt))
        finish(scheduler)
    assert scheduler.gauges().counts["prompt_tokens_cached"] == 0


def test_a_large_request_lets_small_ones_pass_but_not_for_ever() -> None:
    scheduler = make(blocks=16, budget=64, concurrent=4)
    scheduler.add(ask("holder", list(range(20)), max_tokens=12))
    step(scheduler)
    scheduler.add(ask("large", list(range(40, 90)), max_tokens=4))
    scheduler.add(ask("small", [1, 2], max_tokens=1))
    _, deltas = step(scheduler)
    assert "small" in [delta.request_id for delta in deltas]
    large = scheduler._roster.by_id["large"]
    assert large.num_overtaken == 1
    large.num_overtaken = MAX_OVERTAKEN
    scheduler.add(ask("late", [1, 2], max_tokens=1))
    _, deltas = step(scheduler)
    assert "late" not in [delta.request_id for delta in deltas]
    assert set(finish(scheduler)) >= {"large", "late"}


def blocks(scheduler: Scheduler, request_id: str) -> tuple[int, ...]:
    sequence = scheduler._roster.by_id[request_id]
    return scheduler._roster.table.tables_of(sequence.slot)[0] if sequence.is_running else ()


def test_the_oldest_request_is_never_preempted() -> None:
    generator = random.Random(5)
    scheduler = make(blocks=20, budget=16, concurrent=6)
    for index in range(40):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randrange(1, 30))]
        scheduler.add(ask(f"{index:02}", prompt, max_tokens=generator.randrange(1, 40)))
    while scheduler.has_work:
        oldest = min(scheduler._roster.by_id)
        held = blocks(scheduler, oldest)
        step(scheduler)
        if held and oldest in scheduler._roster.by_id:
            assert blocks(scheduler, oldest)[: len(held)] == held
    assert scheduler.gauges().counts["completions"] == 40


def test_end_tokens_stop_and_min_tokens_bans_them() -> None:
    first, second, third = expected([5], 3)
    assert finish_with(eos=(second,))["a"] == [first, second]
    assert finish_with(eos=(second,), ignore_eos=True)["a"] == [first, second, third]
    assert finish_with(stop_token_ids=(second,), ignore_eos=True)["a"] == [first, second]
    banned = finish_with(eos=(first,), min_tokens=2, max_tokens=2)["a"]
    assert len(banned) == 2
    assert first not in banned


def test_the_same_end_token_ends_each_request_that_names_it() -> None:
    """Also after one of them has left the table, and none that does not name it."""
    stop = expected([5], 4)[1]
    scheduler = make()
    for name, own in (("a", (stop,)), ("b", (stop, stop)), ("free", ())):
        scheduler.add(ask(name, [5], max_tokens=4, stop_token_ids=own))
    tokens = finish(scheduler)
    assert [len(tokens[name]) for name in ("a", "b", "free")] == [2, 2, 4]
    scheduler.add(ask("c", [5], max_tokens=4, stop_token_ids=(stop,)))
    assert len(finish(scheduler)["c"]) == 2
    assert not scheduler._table._num_ending


def finish_with(
    eos: tuple[int, ...] = (), max_tokens: int = 3, **kwargs: object
) -> dict[str, list[int]]:
    scheduler = make(eos=eos)
    scheduler.add(ask("a", [5], max_tokens=max_tokens, **kwargs))
    return finish(scheduler)


def test_a_missing_or_impossible_token_ends_only_its_request() -> None:
    scheduler = make()
    for name in "abc":
        scheduler.add(ask(name, [1, 2]))
    plan = scheduler.schedule()
    deltas = scheduler.commit(plan, StepResult({"a": 5, "b": VOCAB}))
    assert [(d.request_id, d.finish_reason) for d in deltas] == [
        ("a", None),
        ("b", "error"),
        ("c", "error"),
    ]
    scheduler.check_integrity()


def test_the_same_work_gives_the_same_plans() -> None:
    def plans() -> list[tuple[StepRow, ...]]:
        scheduler = make(blocks=20, budget=9, concurrent=3)
        for index in range(9):
            scheduler.add(ask(str(index), list(range(index, index * 4 + 1)), max_tokens=20))
        seen = []
        while scheduler.has_work:
            seen.append(step(scheduler)[0].rows)
        return seen

    assert plans() == plans()


def order_of_answers(scheduler: Scheduler) -> list[str]:
    """Ids in the order in which requests got their first token."""
    return list(finish(scheduler))


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    scheduler = make(concurrent=1)
    for index in range(20):
        scheduler.add(replace(ask(f"flood{index:02}", [1, 2]), tenant="loud"))
    step(scheduler)
    for index in range(2):
        scheduler.add(replace(ask(f"rare{index}", [1, 2]), tenant="quiet"))
    order = ["flood00", *order_of_answers(scheduler)]
    assert order.index("rare0") <= 3
    assert order.index("rare1") <= 5


def test_shares_are_of_tokens_not_of_requests() -> None:
    """Long answers and short ones: both tenants get about the same tokens."""
    scheduler = make(blocks=64, concurrent=1)
    for index in range(12):
        scheduler.add(replace(ask(f"long{index:02}", [1, 2], max_tokens=38), tenant="long"))
        scheduler.add(replace(ask(f"short{index:02}", [1, 2], max_tokens=8), tenant="short"))
    first = order_of_answers(scheduler)[:10]
    assert sum(name.startswith("short") for name in first) == 8


def test_an_idle_tenant_saves_nothing_up() -> None:
    scheduler = make(concurrent=1)
    scheduler.add(replace(ask("early", [1, 2]), tenant="a"))
    for index in range(9):
        scheduler.add(replace(ask(f"b{index}", [1, 2]), tenant="b"))
    for _ in range(20):
        step(scheduler)
    for index in range(4):
        scheduler.add(replace(ask(f"a{index}", [1, 2]), tenant="a"))
    order = order_of_answers(scheduler)
    assert [name[0] for name in order if name in ("a0", "a1") or name[0] == "b"].count("b") >= 4
    assert order.index("a1") > order.index("a0") + 1


def test_priority_goes_first_and_is_preempted_last() -> None:
    scheduler = make(blocks=12, budget=64, concurrent=3)
    for name, priority in (("late", 9), ("usual", 0), ("urgent", -5)):
        scheduler.add(replace(ask(name, [len(name)] * 4, max_tokens=28), priority=priority))
    plan, _ = step(scheduler)
    assert [row.request_id for row in plan.rows] == ["urgent", "usual", "late"]
    while scheduler.has_work:
        before = scheduler._roster.by_id.get("urgent")
        step(scheduler)
        assert before is None or before.num_preemptions == 0
    assert scheduler.gauges().counts["preemptions"] > 0


TWO_KINDS = (FULL, LayerKind("window-6", 6, 2))


class Ahead:
    """Runs a scheduler one step ahead: the next step is scheduled before the last is committed.

    The fake device below remembers the newest token of each slot, as the real one does.
    """

    def __init__(self, scheduler: Scheduler, runner: FakeRunner | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner or FakeRunner(VOCAB)
        self.in_flight: tuple[StepPlan, StepResult] | None = None
        self.newest: dict[int, int] = {}
        self.num_pending = 0

    def launch(self) -> tuple[StepPlan, StepResult] | None:
        plan = self.scheduler.schedule()
        self.runner.transfer(self.scheduler.take_transfers())
        if not len(plan):
            return None
        rows = [
            replace(row, token_ids=(*row.token_ids[:-1], self.newest[slot])) if pending else row
            for row, slot, pending in zip(
                plan.rows, plan.slots.tolist(), plan.pending.tolist(), strict=True
            )
        ]
        self.num_pending += int(plan.pending.sum())
        result = self.runner.run(StepPlan.of(rows))
        for row, slot in zip(plan.rows, plan.slots.tolist(), strict=True):
            if row.sample:
                self.newest[slot] = result.tokens[row.request_id]
        return plan, result

    def turn(self) -> list[Delta]:
        launched = self.launch()
        deltas = self.scheduler.commit(*self.in_flight) if self.in_flight else []
        self.in_flight = launched
        self.scheduler.check_integrity()
        check_sums(self.scheduler)
        return deltas


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.integers(1, 20), st.integers(1, 25), st.booleans()), min_size=1, max_size=8
    ),
    eos=st.integers(0, VOCAB - 1),
    aborts=st.dictionaries(st.integers(0, 40), st.integers(0, 7), max_size=2),
    kinds=st.sampled_from([(FULL,), TWO_KINDS]),
)
def test_one_step_ahead_gives_the_same_tokens(
    asked: list[tuple[int, int, bool]],
    eos: int,
    aborts: dict[int, int],
    kinds: tuple[LayerKind, ...],
) -> None:
    """With end tokens, min_tokens, preemption and aborts in between, also of what is in flight."""

    def fill() -> Scheduler:
        scheduler = make(
            blocks=12 * len(kinds) ** 2, budget=9, concurrent=3, length=48, eos=(eos,),
            kinds=kinds, host_blocks=8,
        )  # fmt: skip
        for index, (length, answer, banned) in enumerate(asked):
            minimum = answer // 2 if banned else 0
            prompt = list(range(index, index + length))
            assert scheduler.add(ask(f"r{index}", prompt, answer, min_tokens=minimum)) is None
        return scheduler

    def tokens_of(name: str) -> list[int]:
        return list(range(int(name[1:]), int(name[1:]) + asked[int(name[1:])][0])) + plain[name]

    plain = finish(fill())
    ahead = Ahead(fill(), MemoryRunner(VOCAB, kinds, 4, tokens_of))
    tokens: dict[str, list[int]] = {f"r{index}": [] for index in range(len(asked))}
    aborted: set[str] = set()
    for turn in range(2000):
        if not ahead.scheduler.has_work:
            break
        if turn in aborts:
            aborted.update(d.request_id for d in ahead.scheduler.abort(f"r{aborts[turn]}"))
        for delta in ahead.turn():
            assert delta.request_id not in aborted
            tokens[delta.request_id].extend(delta.token_ids)
    assert not ahead.scheduler.has_work
    for name, made in tokens.items():
        assert made == plain[name][: len(made)]
        assert name in aborted or made == plain[name]


def test_one_step_ahead_keeps_every_decode_busy() -> None:
    scheduler = make(budget=64)
    for name in "ab":
        assert scheduler.add(ask(name, [ord(name) - 90] * 3, max_tokens=20)) is None
    ahead = Ahead(scheduler)
    turns = 0
    while scheduler.has_work:
        ahead.turn()
        turns += 1
    assert ahead.num_pending == 2 * 19
    assert turns == 21


def test_deadlines_of_requests_that_ended_in_time_take_no_memory() -> None:
    deadlines = Deadlines()
    requests = [
        replace(ask(f"r{index}", [1]), deadline_seconds=1e6 - index) for index in range(5000)
    ]
    for first, request in enumerate(requests):
        deadlines.add(request)
        if first >= 10:
            deadlines.forget(requests[first - 10])
        assert len(deadlines) <= 64 + 1
    assert deadlines.passed(1e5) == []
    assert deadlines.passed(2e6) == [f"r{index}" for index in range(4999, 4989, -1)]


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=5),
    eos=st.sampled_from([(), (3,), (52,)]),
    drafts=st.integers(1, 6),
)
def test_speculation_changes_no_token_and_saves_steps(
    asked: list[tuple[int, int]], eos: tuple[int, ...], drafts: int
) -> None:
    """Also where an end token or the limit comes among accepted drafts."""

    def run(drafts: int) -> tuple[dict[str, list[int]], int, dict[str, int]]:
        scheduler = make(blocks=80, budget=40, concurrent=5, eos=eos, drafts=drafts)
        tokens: dict[str, list[int]] = {}
        whole: dict[str, list[int]] = {}
        for index, (length, answer) in enumerate(asked):
            prompt = [place % 5 for place in range(length)]
            scheduler.add(ask(f"r{index}", prompt, answer))
            whole[f"r{index}"] = prompt + expected(prompt, answer, repeating)
        runner = MemoryRunner(VOCAB, (FULL,), 4, whole.__getitem__, repeating)
        steps = 0
        while scheduler.has_work:
            steps += 1
            for delta in step(scheduler, runner)[1]:
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            check_accounting(scheduler)
        counts = dict(scheduler.gauges().counts)
        assert scheduler.pool.num_referenced == 0
        return tokens, steps, counts

    plain, plain_steps, _ = run(0)
    guessed, steps, counts = run(drafts)
    assert guessed == plain
    assert steps <= plain_steps
    assert counts["accepted_tokens"] <= counts["draft_tokens"] <= drafts * counts["drafts"]
    if max(answer for _, answer in asked) == 30 and not eos:
        assert counts["accepted_tokens"] > 0


def test_drafts_take_no_budget_from_prompts() -> None:
    scheduler = make(blocks=64, budget=8, drafts=4)
    runner = FakeRunner(VOCAB)
    runner._next = repeating  # type: ignore[method-assign]
    scheduler.add(ask("chat", [1, 2, 3, 4, 0, 1, 2, 3], max_tokens=40))
    step(scheduler, runner)
    scheduler.add(ask("long", list(range(60)), max_tokens=2))
    lengths = [[row.length for row in step(scheduler, runner)[0].rows] for _ in range(8)]
    assert lengths == [[1, 7]] * 8


def test_ending_all_tells_everybody_and_frees_everything() -> None:
    scheduler = make(concurrent=1)
    for name in "ab":
        scheduler.add(ask(name, [1, 2]))
    step(scheduler)
    deltas = scheduler.end_all("error", "the device is gone")
    assert [(d.request_id, d.finish_reason, d.error) for d in deltas] == [
        ("a", "error", "the device is gone"),
        ("b", "error", "the device is gone"),
    ]
    assert scheduler.pool.num_referenced == 0


@pytest.mark.parametrize("position", range(3))
def test_a_limit_below_one_is_refused(position: int) -> None:
    limits: list[int] = [1, 1, 1]
    limits[position] = 0
    build: Callable[[], Scheduler] = lambda: Scheduler(BlockPool(1, 1), *limits, vocab_size=9)  # noqa: E731
    with pytest.raises(ConfigError, match="at least 1"):
        build()
