"""The program ``l40sctl``: imports the command line where a Ctrl-C during the import is no traceback."""

import sys

EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C


def main() -> None:
    """Run l40sctl and end with its exit status."""
    try:
        from l40sd.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
