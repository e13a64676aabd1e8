"""The optimizer of the guide page on writing one, as its reader would type it."""

import doctest
import pathlib
import re

_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "guide" / "own-optimizer.md"


def _definitions() -> dict:
    text = re.sub(r"^ *```.*$", "", _PAGE.read_text(), flags=re.MULTILINE)
    examples = doctest.DocTestParser().get_examples(text)
    names: dict = {}
    for example in examples:
        if example.source.startswith(("import", "from", "def")):
            exec(example.source, names)
    return names


row_descent = _definitions()["row_descent"]
