"""Entry point of `python3 hack/cluster`."""

import sys

if __name__ == "__main__":
    try:
        from kit.cli import main

        status = main()
    except KeyboardInterrupt:  # before the command line was even read
        status = 130
    sys.exit(status)
