"""The `anymamba` command, which is also `python -m anymamba`.

It imports nothing before it is ready for Ctrl-C, which may come while the rest is imported.
"""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from anymamba.cli.main import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
