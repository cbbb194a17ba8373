"""What holds for every test process."""

from tqdm import tqdm

# No watching thread: one that wakes while the interpreter ends can crash it (CPython 3.11).
tqdm.monitor_interval = 0
