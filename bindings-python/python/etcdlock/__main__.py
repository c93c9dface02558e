"""python -m etcdlock run NAME -- COMMAND: the same program as the command etcdlock."""

import signal
import sys

from etcdlock._native import _command


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    # The program passes signals on to its command; Python must not raise KeyboardInterrupt afterwards.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
