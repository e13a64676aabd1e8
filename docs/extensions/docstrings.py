"""Prepares docstrings for Markdown: doctests become code blocks, comments on fields are shown."""

import itertools
import re
from typing import Any

import griffe

# From a prompt to the next blank line: input, continuation and output.
_DOCTEST = re.compile(r"^([ \t]*)>>> .*(?:\n\1[^\n]*\S[^\n]*)*", re.MULTILINE)
# The comment behind a field of a class: `mu: optax.Updates  # shapes of the parameters`.
_COMMENT = re.compile(r"""^(?:[^#"']|"[^"]*"|'[^']*')*#\s*(.*)$""")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is None and obj.is_attribute and obj.parent and obj.parent.is_class:
            comment = _comment(obj)
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        elif obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(_fence, obj.docstring.value)


def _comment(field: griffe.Object) -> str:
    """What is said behind a field or, in lines of its own, above it."""
    if field.lineno is None or not field.source:
        return ""
    behind = _COMMENT.match(field.lines[-1])
    if behind:
        return behind[1]
    before = list(field.lines_collection[field.filepath][: field.lineno - 1])
    above = [line.strip() for line in reversed(before)]
    block = itertools.takewhile(lambda line: line.startswith("#"), above)
    return " ".join(line.lstrip("# ") for line in reversed(list(block)))


def _fence(match: re.Match[str]) -> str:
    indent = match[1]
    return f"\n{indent}```pycon\n{match[0]}\n{indent}```"
