"""Drafts are what followed the last time."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilefleet_worker.prompt_lookup import LONGEST, SHORTEST, propose


@pytest.mark.parametrize(
    ("tokens", "count", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 4, 5, 1, 2], 9, [3, 4, 5, 1, 2]),
        ([1, 2, 8, 1, 2, 9, 7, 7, 1, 2], 2, [9, 7]),  # the newest place
        ([5, 1, 2, 8, 9, 1, 2, 9, 7, 5, 1, 2], 2, [8, 9]),  # but longer matches first
        ([7, 7, 7, 7, 7, 7], 2, [7, 7]),
        ([1, 2, 3, 4], 3, []),
        ([9, 2, 3, 1, 2], 3, []),  # one equal token is not enough
        ([1], 3, []),
        ([], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_drafts(tokens: list[int], count: int, expected: list[int]) -> None:
    assert propose(array("I", tokens), count) == expected


def slow(tokens: list[int], count: int) -> list[int]:
    """The same from its definition."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        places = [
            end
            for end in range(size, len(tokens))
            if size <= len(tokens) and tokens[end - size : end] == tokens[len(tokens) - size :]
        ]
        if places:
            whole = [end for end in places if end + count <= len(tokens)]
            end = whole[-1] if whole else places[0]
            return tokens[end : end + count]
    return []


@given(tokens=st.lists(st.integers(0, 2), max_size=40), count=st.integers(1, 6))
def test_drafts_are_those_of_the_definition(tokens: list[int], count: int) -> None:
    assert propose(array("I", tokens), count) == slow(tokens, count)
