"""An extension of Griffe: a field's comment in a NamedTuple or dataclass is its description in the reference.

    name: str = "resnet18"  # on the same line,

or on the lines directly above. mkdocs.yml names this file.
"""

import ast
from typing import Any

import griffe


class Comments(griffe.Extension):
    """Gives attributes that have no docstring their comment."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        if not isinstance(node, ast.AnnAssign) or attr.docstring is not None or attr.parent is None:
            return
        if not attr.parent.is_class or attr.lineno is None or attr.endlineno is None:
            return
        lines = attr.lines_collection[attr.filepath]
        comment = field_comment(lines, attr.lineno, attr.endlineno)
        if comment:
            attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)


def field_comment(lines: list[str], first: int, last: int) -> str:
    """The comment of the statement in lines `first` to `last`, counted from 1."""
    _, mark, behind = lines[last - 1].partition("  # ")
    if mark:
        return behind.strip()
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)
