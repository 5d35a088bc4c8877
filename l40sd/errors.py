"""Errors an operator can act on: what is wrong, where, and how to mend it."""

from collections.abc import Sequence


class L40sError(Exception):
    """Something the operator can mend. Shown without a traceback.

    Args:
        what: The problem in one sentence, with the values that matter.
        where: The file and key, worker, pattern or device it concerns; may be empty.
        hint: What to do about it; may be empty.
        code: A stable snake_case word for programs, e.g. ``"unknown_pattern"``.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "", code: str = "error") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  hint: {self.hint}" if self.hint else head


class ConfigError(L40sError):
    """Every problem of one configuration at once."""

    def __init__(self, problems: Sequence[L40sError]) -> None:
        assert problems, "a ConfigError names at least one problem"
        super().__init__(
            "\n".join(str(problem) for problem in problems),
            hint="",
            code="bad_config",
        )
        self.problems = tuple(problems)


class DoesNotFit(L40sError):  # noqa: N818  it reads as what it says: "raise DoesNotFit"
    """A pattern this host cannot hold; the hint says what would fit."""
