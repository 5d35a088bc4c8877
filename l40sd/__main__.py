"""The program ``l40sd``, and ``python -m l40sd``."""

import sys

# structlog imports rich where it is installed, for tracebacks on terminals; the daemon shows none there. 40 of the
# 190 ms in which nothing moves during an upgrade.
sys.modules["rich"] = None  # type: ignore[assignment]  # what makes an import fail (importlib's documentation)

from l40sd.daemon import main  # noqa: E402 - not before the line above

if __name__ == "__main__":
    main()
