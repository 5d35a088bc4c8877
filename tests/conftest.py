"""How many examples the property tests draw, and which.

Everywhere but in a long run they are the same each time: a check that fails by chance is worth as little as one that
cannot fail. ``scripts/test --long`` draws new ones, many more; what it finds becomes an ``@example``. No example has
a deadline: on a busy machine that, too, fails by chance.
"""

from hypothesis import Phase, settings

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
settings.register_profile(  # the first example that fails is enough: nobody reads it
    "mutants", derandomize=True, database=None, deadline=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("same")
