"""The command `earlyfusion`, also as `python -m earlyfusion`."""

import signal
import sys


def main() -> int:
    """Run the command line."""
    if sys.argv[1:2] == ["serve"]:
        # A server that is asked to stop exits with 0, also amid the imports. As the first process
        # of a container it would not even notice without a handler.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from earlyfusion.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
