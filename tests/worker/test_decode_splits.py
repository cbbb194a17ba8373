"""How a sequence is cut into splits: a function of what it sees, with few and bounded splits."""

from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.attention.triton.decode import MANY_SPLITS, most_splits, split_length

SPLITS = st.sampled_from([64, 128, 256, 512])


@given(visible=st.integers(1, 2**21), split=SPLITS)
def test_a_longer_context_never_has_shorter_splits(visible: int, split: int) -> None:
    length = split_length(visible, split)
    assert split <= length <= 32 * split
    assert length % split == 0
    assert length <= split_length(visible + 1, split)


@given(visible=st.integers(1, 2**21), split=SPLITS)
def test_the_number_of_splits_grows_as_the_root(visible: int, split: int) -> None:
    """At most MANY_SPLITS · 2^doublings, and at least half of what the step before had."""
    length = split_length(visible, split)
    count = -(-visible // length)
    if length < 32 * split:
        assert count <= MANY_SPLITS * length // split
    if length > split:
        assert count > MANY_SPLITS * length // split // 4


@given(context=st.integers(1, 2**21), more=st.integers(0, 2**20), split=SPLITS)
def test_the_workspace_holds_the_splits_of_every_context(
    context: int, more: int, split: int
) -> None:
    """One more than the context fills, as a window may begin and end within a split."""
    needed = -(-context // split_length(context, split)) + 1
    assert needed <= most_splits(context + more, split)
