"""Turns: a tenant's own requests never overtake each other, whatever ends early."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tilefleet_worker.fair_order import FairOrder, Turn
from tilefleet_worker.request import Request, SamplingParams

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("come"), st.sampled_from("ab"), st.integers(1, 40)),
        st.tuples(st.just("admit"), st.just(""), st.just(0)),
        st.tuples(st.just("end"), st.just(""), st.integers(0, 1000)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS)
def test_requests_of_a_tenant_keep_their_order(events: list[tuple[str, str, int]]) -> None:
    order = FairOrder()
    waiting: dict[str, tuple[Turn, Request]] = {}
    running: dict[str, tuple[Turn, Request]] = {}
    for number, (event, tenant, value) in enumerate(events):
        if event == "come":
            params = SamplingParams(max_tokens=value)
            request = Request(f"{number:03}", [1], params, 0.0, tenant=tenant)
            waiting[request.request_id] = (order.turn(request), request)
        elif event == "admit" and waiting:
            first = min(waiting, key=lambda name: waiting[name][0])
            running[first] = waiting.pop(first)
            order.admitted(running[first][1], running[first][0])
        elif event == "end" and (ending := sorted(running | waiting)):
            name = ending[value % len(ending)]
            turn, request = (running if name in running else waiting).pop(name)
            order.settle(request, turn, 1)
        for tenant_name in "ab":
            turns = [t for _, (t, r) in sorted(waiting.items()) if r.tenant == tenant_name]
            assert turns == sorted(turns)


def test_what_ended_early_serves_those_who_come_later() -> None:
    """The refund is not lost on the request that has to stay behind an older one."""
    order = FairOrder()
    asked = [Request(str(i), [1], SamplingParams(max_tokens=99), 0.0) for i in range(5)]
    turns = [order.turn(request) for request in asked[:3]]
    for request, turn in list(zip(asked, turns, strict=False))[:2]:
        order.admitted(request, turn)
        order.settle(request, turn, 1)
    assert order.turn(asked[3]).start == turns[2].start
    assert order.turn(asked[4]).start == 202.0


def test_who_gave_up_waiting_holds_nobody_back() -> None:
    order = FairOrder()
    request = Request("a", [1], SamplingParams(max_tokens=99), 0.0)
    turns = [order.turn(request) for _ in range(3)]
    for turn in turns[1:]:
        order.settle(request, turn, 0)
    assert order.turn(request).start == 100.0
