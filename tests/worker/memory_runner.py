"""A fake runner with a memory: it notices when a block does not hold what a query must see."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from tilefleet_worker.fake_runner import FakeRunner
from tilefleet_worker.host_cache import Transfer
from tilefleet_worker.layer_kinds import LayerKind
from tilefleet_worker.step import StepPlan, StepResult, StepRow


class MemoryRunner(FakeRunner):
    """Stores for every token a hash of all tokens up to it, where the tables of its row say.

    tokens_of: the tokens that a request has or may get, from its first on. A step raises
    AssertionError when a place that its first query sees holds anything else.
    """

    def __init__(
        self,
        vocab_size: int,
        kinds: tuple[LayerKind, ...],
        block_size: int,
        tokens_of: Callable[[str], list[int]],
        formula: Callable[[int, int], int] | None = None,
    ) -> None:
        """formula: the next token from the last one and its position, instead of the usual."""
        super().__init__(vocab_size)
        self._formula = formula
        self._windows = [kind.window for kind in kinds for _ in range(kind.width)]
        self._block_size = block_size
        self._tokens_of = tokens_of
        self._memory: dict[tuple[int, int], tuple[int, int]] = {}
        self._host: dict[tuple[int, int], tuple[int, int]] = {}
        self.num_copied = {True: 0, False: 0}
        self.num_checked = 0

    def run(self, plan: StepPlan) -> StepResult:
        for row in plan.rows:
            assert len(row.tables) == len(self._windows)
            for group, (table, window) in enumerate(zip(row.tables, self._windows, strict=True)):
                self._check(row, group, table, window)
                self._write(row, group, table)
        return super().run(plan)

    def transfer(self, transfers: Sequence[Transfer]) -> None:
        for to_host, block, host_block in transfers:
            pair = ((self._memory, block), (self._host, host_block))
            (source, left), (target, right) = pair if to_host else pair[::-1]
            for place in range(self._block_size):
                target[right, place] = source[left, place]
            self.num_copied[to_host] += 1

    def _next(self, last: int, end: int) -> int:
        return super()._next(last, end) if self._formula is None else self._formula(last, end)

    def _check(self, row: StepRow, group: int, table: tuple[int, ...], window: int) -> None:
        expected = self._chain(self._tokens_of(row.request_id)[: row.start])
        for position in range(max(0, row.start - window + 1) if window else 0, row.start):
            found = self._memory[self._place(table, position)]
            assert found == (group, expected[position]), (row.request_id, group, position)
            self.num_checked += 1

    def _write(self, row: StepRow, group: int, table: tuple[int, ...]) -> None:
        before = self._tokens_of(row.request_id)[: row.start]
        values = self._chain([*before, *row.token_ids])
        for position in range(row.start, row.start + row.length):
            self._memory[self._place(table, position)] = (group, values[position])

    def _place(self, table: tuple[int, ...], position: int) -> tuple[int, int]:
        return table[position // self._block_size], position % self._block_size

    @staticmethod
    def _chain(tokens: list[int]) -> list[int]:
        hashes = accumulate(tokens, lambda value, token: hash((value, token)), initial=0)
        return list(hashes)[1:]
