import doctest

import pytest

from jaxopt_lab.data import archives, batches, corpora, decoding, labelled, tokenizer


@pytest.mark.parametrize(
    "module",
    [archives, batches, corpora, decoding, labelled, tokenizer],
    ids=lambda m: m.__name__,
)
def test_examples_of_the_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
