"""Which requests' time is over. Knows no clock: the time is told."""

from heapq import heappop, heappush

from tilefleet_worker.request import Request

Entry = tuple[float, int, str]


class Deadlines:
    """The deadlines of requests in progress, the next one first.

    A request that ends before its deadline leaves an entry behind; when these are most of all
    entries they are dropped together, so the memory is that of the requests in progress.
    """

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._entries: dict[str, Entry] = {}
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """Note the deadline of a request, if it has one."""
        if request.deadline_seconds is not None:
            self._arrivals += 1
            entry = (request.deadline_seconds, self._arrivals, request.request_id)
            self._entries[request.request_id] = entry
            heappush(self._heap, entry)

    def forget(self, request: Request) -> None:
        """A request ended."""
        self._entries.pop(request.request_id, None)
        if len(self._heap) > max(64, 2 * len(self._entries)):
            self._heap = sorted(self._entries.values())

    def passed(self, now_seconds: float) -> list[str]:
        """Ids of the requests whose deadline is not after now, in the order of deadlines."""
        found = []
        while self._heap and self._heap[0][0] <= now_seconds:
            entry = heappop(self._heap)
            if self._entries.get(entry[2]) == entry:
                found.append(entry[2])
        return found

    def __len__(self) -> int:
        return len(self._heap)
