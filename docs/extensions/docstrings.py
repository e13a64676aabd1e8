"""Prepares docstrings for Markdown: doctests become code blocks, `.. math::` display math."""

import re
from typing import Any

import griffe

# From a prompt to the next blank line: input, continuation and output.
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n\1[^\n]*\S[^\n]*)*", re.MULTILINE)
_MATH = re.compile(r"^([ \t]*)\.\. math::[ \t]*\n\n?((?:\1[ \t]+\S[^\n]*(?:\n|\Z))+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = _DOCTEST.sub(_fence, obj.docstring.value)
            obj.docstring.value = _MATH.sub(_display, text)


def _fence(match: re.Match[str]) -> str:
    indent = match[1]
    return f"\n{indent}```pycon\n{match[0]}\n{indent}```"


def _display(match: re.Match[str]) -> str:
    indent = match[1]
    return f"{indent}$$\n{match[2].rstrip()}\n{indent}$$\n"
