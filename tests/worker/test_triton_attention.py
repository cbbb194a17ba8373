"""The Triton kernels against an fp64 oracle, in Triton's interpreter: no GPU."""

import pytest

from tests.worker.interpreter import check_in_interpreter


@pytest.mark.parametrize("kind", ["decode", "prefill", "invariance"])
def test_kernels_match_the_oracle_in_the_interpreter(kind: str) -> None:
    check_in_interpreter("triton_attention_cases.py", kind)
