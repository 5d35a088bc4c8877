"""``{...}`` in an engine's command and environment: which there are, and what braces mean themselves."""

import re
from collections.abc import Iterable

NAMES = (
    *("model", "name", "names", "host", "port", "tp", "pp", "ranks", "split", "gpus", "drain_s", "api_key", "cache"),
    "python",
)
"""What may stand there; engines/launch.py fills them in."""

PATTERN = re.compile(r"(?<!\{)\{([A-Za-z_][A-Za-z0-9_]*)\}(?!\})")
"""A name in single braces; ``{"mode": 2}`` and ``{{ messages }}`` are what they look like."""


def names_in(texts: Iterable[str]) -> list[str]:
    """Return the names of the placeholders in these texts, in order."""
    return [name for text in texts for name in PATTERN.findall(text)]
