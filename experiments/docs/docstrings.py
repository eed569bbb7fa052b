"""Docstrings as they are in the source -> Markdown: doctests become code, `<` is not HTML, references a paragraph.

An extension of griffe, which reads the sources for mkdocstrings. Sections (Args, Returns, Raises, Attributes) are left
to griffe.
"""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")
# These begin with a sentence, where griffe expects the title of a box.
INLINE = re.compile(r"(References?|Letters): ")
# "Raises: as another function" names no exception.
AS_ELSEWHERE = re.compile(r"^Raises:\n  As (.*)$", flags=re.MULTILINE)
SEVERAL = re.compile(r"  (\w+(?:, \w+)+): ")


def to_markdown(text: str) -> str:
    """A whole docstring."""
    text = AS_ELSEWHERE.sub(r"**Raises:** as \1", text)
    lines, inside = [], None  # None, 'section', 'inline', 'code', 'doctest'
    base, before = 0, ""
    for line in text.split("\n"):
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if inside == "doctest":
            if stripped:
                lines.append(line)
                before = line
                continue
            lines.append(" " * base + "```")
            inside = None
        if stripped.startswith(">>> "):
            if before.strip():
                lines.append("")
            base, inside = indent, "doctest"
            lines += [" " * indent + "```pycon", line]
        elif SECTION.match(line):
            inside = "section"
            lines.append(line)
        elif INLINE.match(line):
            inside = "inline"
            lines.append(escape(INLINE.sub(lambda m: f"**{m[1]}:** ", line)))
        elif stripped and inside == "inline" and indent:
            lines.append(escape(stripped))
        else:
            if stripped and not indent:
                inside = None
            margin = 2 if inside == "section" else 0
            code = indent >= margin + 4 and (not before.strip() or is_code(before, margin))
            lines.append(line if code else escape(line))
        before = line
    if inside == "doctest":
        lines.append(" " * base + "```")
    return "\n".join(lines)


def is_code(line: str, margin: int) -> bool:
    return line.startswith(" " * (margin + 4))


def escape(line: str) -> str:
    """`<` outside of code spans."""
    parts = line.split("`")
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def one_by_one(text: str) -> str:
    """'b1, b2: rates' of a section as an entry for each name."""
    lines = []
    for line in text.split("\n"):
        match = SEVERAL.match(line)
        if not match:
            lines.append(line)
            continue
        *first, last = match[1].split(", ")
        lines += [f"  {name}: see `{last}`." for name in first]
        lines.append(f"  {last}: {line[match.end() :]}")
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_by_one(to_markdown(obj.docstring.value))
