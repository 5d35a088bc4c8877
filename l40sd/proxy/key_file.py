"""The text of a file of API keys -> the keys, with the line of everything that cannot be one."""

import re
from collections.abc import Collection, Iterator

from l40sd.errors import ConfigError, L40sError

_KEY = re.compile(r"[!-~]{1,4096}")
_COMMENT = re.compile(r"(^|[ \t])#.*")


def parse_keys(text: str, *, path: str) -> frozenset[str]:
    """Return the keys, one a line; blanks around them, empty lines and comments are left out.

    A comment begins with a ``#`` at the start of the line or behind a blank: within a key ``#`` is a part of it.

    Args:
        text: As the file has it, perhaps with a byte order mark and with the line ends of another system.
        path: For the errors.

    Raises:
        ConfigError: Lines that cannot be a key, by their numbers and not by their content; or no key at all: nobody
            could ask anything.
    """
    lines = [_COMMENT.sub("", line).strip(" \t\r") for line in text.removeprefix("\ufeff").split("\n")]
    if problems := list(_problems(lines, path)):
        raise ConfigError(problems)
    if not (keys := frozenset(filter(None, lines))):
        hint = 'one key a line; api_keys_file = "" lets everybody ask'
        raise ConfigError([L40sError("has no key in it", where=path, hint=hint, code="bad_config")])
    return keys


def key_changes(before: Collection[str], after: Collection[str]) -> tuple[str, ...]:
    """Return how the keys in force differ from others, in one sentence; empty for not at all."""
    added, removed = len(set(after) - set(before)), len(set(before) - set(after))
    words = [
        f"{count} key{'s' * (count > 1)} {what}" for count, what in ((added, "added"), (removed, "removed")) if count
    ]
    return (f"proxy.api_keys_file: {', '.join(words)}",) if words else ()


def _problems(lines: list[str], path: str) -> Iterator[L40sError]:
    for number, line in enumerate(lines, start=1):
        if line and not _KEY.fullmatch(line):
            hint = "printable ASCII without blanks, at most 4096; a comment begins with # behind a blank"
            yield L40sError("cannot be a key", where=f"{path}:{number}", hint=hint, code="bad_config")
