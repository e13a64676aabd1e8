"""What stands in the pages of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def code_blocks(page, containing="", language=""):
    """The fenced blocks of a page that contain a text."""
    text = (DOCS / page).read_text()
    blocks = re.findall(rf"^```{language}[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if containing in block]
