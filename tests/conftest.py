"""What holds for every test process."""

import faulthandler
import logging
import threading
import time
from collections.abc import Iterator

import pytest
from tqdm import tqdm

# No watching thread: one that wakes while the interpreter ends can crash it (CPython 3.11).
tqdm.monitor_interval = 0
# pytest lets go of it at its end: a crash behind that names the threads too.
faulthandler.enable()
PATIENCE_SECONDS = 10.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """No test leaves a log handler behind: it would write to the file of that test's output."""
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        return (yield)
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nobody is left behind who runs on while the interpreter ends. Others are waited for there."""
    end = time.monotonic() + PATIENCE_SECONDS
    left = [thread for thread in threading.enumerate() if thread.daemon]
    for thread in left:
        thread.join(max(end - time.monotonic(), 0.0))
    left = [thread for thread in left if thread.is_alive()]
    if left and session.exitstatus == pytest.ExitCode.OK:
        said = f"tests left threads behind, which can crash the interpreter's end: {left}"
        session.config.get_terminal_writer().line(f"\nerror: {said}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
