"""The number of examples of a property test that needs more or fewer than usual, as the profile in force scales it."""

from hypothesis import settings

USUAL = 100


def examples(count: int) -> int:
    """Return how many examples to draw where ``count`` would be drawn by default."""
    return count * settings().max_examples // USUAL
