"""Draft tokens from the request's own text: what followed the last time that it said the same.

Prompt lookup decoding (Saxena, 2023; n-gram speculation in vLLM): answers that quote their prompt
or themselves, as edits of code, extracts and summaries do, are drafted for the cost of a search.
Knows no model.
"""

from collections.abc import Sequence

import numpy as np

# Tokens that must be equal before a draft; longer matches are preferred, up to LONGEST.
SHORTEST, LONGEST = 2, 4
# Newest tokens that are searched: bounds the cost of a long context.
SEARCHED = 16_384


def propose(token_ids: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that may follow; empty when the end of the text is new.

    They follow the newest place that ends with the same LONGEST tokens, or as many as there are
    down to SHORTEST, and that has `count` tokens behind it; else the place with the most.
    """
    # A copy: a view of the array would forbid it to grow.
    tokens = np.array(token_ids[-SEARCHED:], np.uint32)
    size = len(tokens)
    if count < 1 or size <= SHORTEST:
        return []
    ends = np.flatnonzero(tokens[SHORTEST - 1 : size - 1] == tokens[-1]) + SHORTEST - 1
    for back in range(1, LONGEST):
        same = ends[(ends >= back) & (tokens[ends - back] == tokens[size - 1 - back])]
        if not len(same):
            if back < SHORTEST:
                return []
            break
        ends = same
    whole = ends[ends + count < size]
    end = int(whole[-1] if len(whole) else ends[0])
    drafts: list[int] = tokens[end + 1 : end + 1 + count].tolist()
    return drafts
