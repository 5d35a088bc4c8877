"""The program ``l40sd``, and ``python -m l40sd``."""

import sys

# structlog imports rich where it is installed, for tracebacks on terminals; the daemon shows none there. 40 of the
# 190 ms in which nothing moves during an upgrade.
sys.modules["rich"] = None  # type: ignore[assignment]  # what makes an import fail (importlib's documentation)

EXIT_INTERRUPTED = 130  # as a shell reports Ctrl-C


def main() -> None:
    """Run l40sd and end with its exit status; a Ctrl-C before it can answer signals is no traceback."""
    try:
        from l40sd.daemon.main import main as run  # not before the line above

        run()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
