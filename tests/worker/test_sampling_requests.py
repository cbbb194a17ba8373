"""Sampling options through the scheduler: shared prompts, scores, penalties, grammars."""

import math

import numpy as np
import pytest

from tilefleet_worker.block_pool import BlockPool
from tilefleet_worker.fake_runner import FakeRunner
from tilefleet_worker.request import Delta, Request, SamplingParams, TokenLogprob
from tilefleet_worker.scheduler import MAX_SCORED_TOKENS, Scheduler

VOCAB = 97
PROMPT = [(7 * n) % VOCAB for n in range(42)]


def make(blocks: int = 64, budget: int = 512, concurrent: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks, 4), budget, concurrent, 1024, vocab_size=VOCAB)


def ask(name: str, prompt: list[int], max_tokens: int = 8, **params: object) -> Request:
    made = SamplingParams(max_tokens=max_tokens, **{"temperature": 0.0, **params})  # type: ignore[arg-type]
    return Request(name, prompt, made, 0.0)


class Run:
    """What came out for each request."""

    def __init__(self, scheduler: Scheduler, *requests: Request) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        self.scores: dict[str, tuple[TokenLogprob, ...]] = {}
        self.ends: dict[str, Delta] = {}
        self.longest_scored = 0
        for request in requests:
            assert scheduler.add(request) is None
        runner = FakeRunner(VOCAB)
        for _ in range(3000):
            if not scheduler.has_work:
                return
            plan = scheduler.schedule()
            scored = sum(len(row.targets) for row in plan.rows)
            self.longest_scored = max(self.longest_scored, scored)
            for delta in scheduler.commit(plan, runner.run(plan)):
                self.take(delta)
            scheduler.check_integrity()
        raise AssertionError("not drained")

    def take(self, delta: Delta) -> None:
        name = delta.request_id
        self.tokens.setdefault(name, []).extend(delta.token_ids)
        self.logprobs.setdefault(name, []).extend(delta.logprobs)
        if delta.prompt_logprobs:
            assert name not in self.scores
            self.scores[name] = delta.prompt_logprobs
        if delta.finish_reason:
            self.ends[name] = delta


def test_answers_to_one_prompt_that_arrive_together_share_its_blocks() -> None:
    scheduler = make()
    run = Run(scheduler, *(ask(f"r{n}", PROMPT) for n in range(6)))
    counts = scheduler.gauges().counts
    # 40 of 42 tokens are in full blocks: five of the six requests find them
    assert counts["prompt_tokens_cached"] == 5 * 40
    assert counts["prompt_tokens_computed"] == 42 + 5 * 2
    assert len({tuple(tokens) for tokens in run.tokens.values()}) == 1


def test_waiting_for_a_prefix_never_stops_a_request_whose_leader_is_gone() -> None:
    scheduler = make(budget=8)
    for name in ("leader", "follower"):
        assert scheduler.add(ask(name, PROMPT)) is None
    plan = scheduler.schedule()
    assert [row.request_id for row in plan.rows] == ["leader"]
    scheduler.abort("leader")
    assert scheduler.commit(plan, FakeRunner(VOCAB).run(plan)) == []
    assert Run(scheduler).ends["follower"].finish_reason == "length"


@pytest.mark.parametrize(
    ("blocks", "budget"), [(64, 512), (64, 5), (16, 64)], ids=["whole", "chunks", "preempted"]
)
def test_a_prompt_is_scored_once_and_alike_however_it_is_computed(blocks: int, budget: int) -> None:
    scheduler = make(blocks, budget)
    old = [ask(f"old{n}", PROMPT[n:10], 24) for n in range(3)]
    scored = ask("scored", PROMPT, 3, prompt_logprobs=2, logprobs=1)
    run = Run(scheduler, *old, scored)
    alone = Run(make(), ask("warm", PROMPT), scored)
    assert run.scores["scored"] == alone.scores["scored"]
    assert [s.token_id for s in run.scores["scored"]] == PROMPT[1:]
    assert run.logprobs["scored"] == alone.logprobs["scored"]
    assert [s.token_id for s in run.logprobs["scored"]] == run.tokens["scored"]
    assert set(run.scores) == {"scored"}


def test_a_preempted_request_is_scored_on() -> None:
    scheduler = make(blocks=14, budget=8)
    for request in (ask("old", PROMPT[:4], 40), ask("scored", PROMPT[:20], 3, prompt_logprobs=0)):
        assert scheduler.add(request) is None
    runner = FakeRunner(VOCAB)
    for _ in range(2):
        plan = scheduler.schedule()
        scheduler.commit(plan, runner.run(plan))
    scheduler._roster.preempt(scheduler._roster.running[-1])
    run = Run(scheduler)
    assert [s.token_id for s in run.scores["scored"]] == PROMPT[1:20]


def test_one_step_keeps_the_logits_of_a_bounded_number_of_positions() -> None:
    long = [n % VOCAB for n in range(700)]
    requests = [ask(f"r{n}", long[n:], 2, prompt_logprobs=0) for n in range(3)]
    run = Run(make(blocks=600, budget=2048), *requests)
    assert run.longest_scored == MAX_SCORED_TOKENS
    assert [len(run.scores[f"r{n}"]) for n in range(3)] == [699, 698, 697]


def test_penalties_survive_a_preemption() -> None:
    fields = {"temperature": 0.8, "seed": 3, "repetition_penalty": 1.2, "frequency_penalty": 0.3}

    def requests() -> list[Request]:
        return [ask(f"r{n}", PROMPT[n : n + 9], 30, **fields) for n in range(4)]

    scheduler = make(blocks=20)
    together = Run(scheduler, *requests())
    assert scheduler.gauges().counts["preemptions"] > 0
    for request in requests():
        name = request.request_id
        assert Run(make(), request).tokens[name] == together.tokens[name]


def test_a_request_that_bans_a_repeat_never_repeats() -> None:
    first = Run(make(), ask("a", PROMPT, 8)).tokens["a"]
    again = Run(make(), ask("a", PROMPT, 8, bad_words=((first[0], first[1]), (first[3],))))
    assert again.tokens["a"][0] == first[0]
    pairs = list(zip(again.tokens["a"], again.tokens["a"][1:], strict=False))
    assert (first[0], first[1]) not in pairs
    assert first[3] not in again.tokens["a"]


@pytest.mark.parametrize(
    "params",
    [
        {"logit_bias": ((VOCAB, 1.0),)},
        {"bad_words": ((1, 2), (5, -3))},
        {"allowed_token_ids": (0, 10_000)},
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params: dict[str, object]) -> None:
    refusal = make().add(ask("a", [1], **params))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (400, "invalid_token_id")


class Counting:
    """A grammar: the numbers 1, 2, 3, … in order; cannot go on after `end`."""

    def __init__(self, end: int) -> None:
        self.next = 1
        self.end = end

    def allowed(self) -> np.ndarray:
        if self.next > self.end:
            raise ValueError("nothing may follow")
        return np.arange(VOCAB) == self.next

    def accept(self, token_id: int) -> None:
        if token_id != self.next:
            raise ValueError(f"{token_id} is not {self.next}")
        self.next += 1


def test_a_grammar_that_cannot_go_on_ends_its_request_alone() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.0)
    grammars = [
        Request(f"g{end}", PROMPT, params, 0.0, constraint=Counting(end)) for end in (3, 20)
    ]
    run = Run(make(), *grammars, ask("mate", PROMPT, 9))
    assert run.tokens["g3"] == [1, 2, 3]
    assert run.ends["g3"].finish_reason == "error"
    assert "nothing may follow" in (run.ends["g3"].error or "")
    assert run.tokens["g20"] == list(range(1, 10))
    assert run.tokens["mate"] == Run(make(), ask("mate", PROMPT, 9)).tokens["mate"]


def test_scores_are_logarithms_of_probabilities() -> None:
    run = Run(make(), ask("a", PROMPT, 4, logprobs=20, prompt_logprobs=20))
    for found in (*run.logprobs["a"], *run.scores["a"]):
        assert found.logprob <= 0
        assert sum(math.exp(p) for _, p in found.top) < 1
        assert [p for _, p in found.top] == sorted((p for _, p in found.top), reverse=True)
