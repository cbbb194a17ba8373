"""From a parser to an exit status, the same for both command lines."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tilefleet_operator.errors import ApiError, OperatorError


def execute(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run ``command``, and say an error of ours in one line on standard error.

    Returns its status; 1 for a refusal of the API server, 2 for bad input, 130 when interrupted.
    """
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except OperatorError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1 if isinstance(error, ApiError) else 2
    except BrokenPipeError:
        # The reader, such as head, has seen enough. Nothing more may be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
