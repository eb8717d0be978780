"""Text for people: plain off a terminal or with NO_COLOR, otherwise the same characters with emphasis."""

from __future__ import annotations

import os
import sys

_STYLES = (
    (r"^(?:[A-Z][a-z]+(?=  |: )|Step \d+)", "bold"),
    (r"^ *step  .*|^ *start  .*|^ *rank  .*", "dim"),
    (r"^ok\b", "green"),
    (r"^warn\b", "yellow"),
    (r"^fail\b", "red"),
)


def say(text: str) -> None:
    """Prints to stdout."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        print(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for line in text.splitlines():
        styled = Text(line)
        for pattern, style in _STYLES:
            styled.highlight_regex(pattern, style)
        console.print(styled)
