"""``scripts/soak``: the long runs."""

import argparse
import secrets
import sys

from l40sd.errors import L40sError
from soak import connections, kills, operations
from soak.ground import Broken


def main(argv: list[str] | None = None) -> int:
    """Return 0 when every claim held."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("what", choices=("operations", "kills", "connections"))
    parser.add_argument("--count", type=int, help="operations (default: 2000) or kills (300)")
    parser.add_argument("--seed", type=int, help="draw the same again; what meets what is up to the kernel")
    given = parser.parse_args(argv)
    number = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    say(f"{given.what}: seed {number}" if given.what != "connections" else given.what)
    try:
        match given.what:
            case "operations":
                operations.soak(given.count or 2000, number, say)
            case "kills":
                kills.soak(given.count or 300, number, say)
            case _:
                connections.soak(say)
    except (Broken, L40sError) as error:
        say(f"NOT KEPT: {error}")
        return 1
    say("every claim held")
    return 0


def say(text: str) -> None:
    """Print at once: a run takes long, and its reader waits."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
