"""The order in which people expect names."""

import re

_PARTS = re.compile(r"(\d+)")


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return the key that sorts ``m-ext2`` before ``m-ext10``: digits count as the numbers that they are.

    Names that differ in leading zeros only are told apart by their text.
    """
    parts = _PARTS.split(name)
    return (*((part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts), (False, 0, name))
