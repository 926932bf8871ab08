"""Mistakes that a user can mend: one line that says what and where, instead of a traceback."""

import sys

from engine import distributed


class UserError(ValueError):
    """A wrong key, file or number; the message names it and what to do."""


def run(main, usage):
    """Run a script's main(arguments); a UserError ends it with its message and exit code 1."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(usage)
    try:
        main(sys.argv[1:])
    except UserError as error:
        process = f" (process {distributed.rank()})" if distributed.world_size() > 1 else ""
        sys.exit(f"error{process}: {error}")
    finally:
        distributed.close()
