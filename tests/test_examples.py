"""Property tests draw the same examples whatever ran before them, and a search draws others."""

import subprocess
import sys
import textwrap

import hypothesis
import hypothesis.strategies as st

from tests.examples import PER_TEST, SEARCH_FACTOR, examples


def drawn(profile, *, after=""):
    """The examples of one test in a process of its own that first runs `after`."""
    program = f"""
        import hypothesis, hypothesis.strategies as st
        from tests.examples import examples, register_profiles
        register_profiles()
        hypothesis.settings.load_profile({profile!r})
        {after}
        found = []
        @examples(20)
        @hypothesis.given(st.floats(), st.integers())
        def test(x, n):
            found.append((x, n))
        test()
        print(found)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_examples_do_not_depend_on_the_modules_that_are_loaded():
    alone = drawn("ci")
    assert alone.count("(") == 20
    assert alone == drawn("ci", after="import jaxopt_lab.core.spectral, jaxopt_lab.optim")


def test_a_search_draws_new_and_more_examples():
    first, second = drawn("search"), drawn("search")
    assert first != second
    assert first.count("(") == 20 * SEARCH_FACTOR


def test_every_property_test_follows_the_profile(request):
    """Settings of its own would silently take a test out of the default or out of the search."""
    default = hypothesis.settings()
    assert default.derandomize != (default.max_examples == SEARCH_FACTOR * PER_TEST)
    for item in request.session.items:
        if item.get_closest_marker("hypothesis"):
            own = item.obj._hypothesis_internal_use_settings
            same = ("derandomize", "deadline", "database")
            assert all(getattr(own, k) == getattr(default, k) for k in same), item.nodeid


@examples(1)
@hypothesis.given(st.none())
def test_settings_of_examples_scale_with_the_profile(_):
    assert examples(PER_TEST).max_examples == hypothesis.settings().max_examples
