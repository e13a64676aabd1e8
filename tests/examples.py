"""How many examples property tests draw, and which: the same ones always, or new ones in a search.

`ci`, the default, draws the same examples on every day and in every order of the tests. `search`
draws new ones and many more of them; what it finds is kept in `.hypothesis` and tried first the
next time:

    pytest -m "hypothesis and not slow" --hypothesis-profile search
"""

import hypothesis
import hypothesis.database
from hypothesis.internal.conjecture import providers

PER_TEST = 25
SEARCH_FACTOR = 20


def register_profiles() -> None:
    """Register `ci` and `search` and load `ci`; `--hypothesis-profile` may replace it later."""
    # Whether a slow machine draws in time is not what the tests are about.
    calm = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile(
        "ci", derandomize=True, max_examples=PER_TEST, print_blob=True, **calm
    )
    # Hypothesis derandomizes by itself and keeps nothing where the environment says CI.
    hypothesis.settings.register_profile(
        "search",
        derandomize=False,
        database=hypothesis.database.DirectoryBasedExampleDatabase(".hypothesis/examples"),
        max_examples=SEARCH_FACTOR * PER_TEST,
        print_blob=True,
        **calm,
    )
    hypothesis.settings.load_profile("ci")
    # Hypothesis mixes numbers that it reads in the source of the modules imported so far into its
    # draws. Examples would then depend on which tests this worker happened to run before, and a
    # derandomized test could fail on one machine and pass on the next.
    providers._get_local_constants = lambda: providers.Constants()


def examples(count: int) -> hypothesis.settings:
    """Settings of a test that needs `count` examples where others need 25; more in a search."""
    return hypothesis.settings(max_examples=count * hypothesis.settings().max_examples // PER_TEST)
