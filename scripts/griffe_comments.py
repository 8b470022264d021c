"""An extension of Griffe, which reads the docstrings of the package for the reference. mkdocs.yml names it.

- The comment of a field or a constant is its description: `name: str  # on the same line`, or on the lines
  directly above.
- `Example:` is a section of examples, as `Examples:` is.
"""

import re
import runpy
from pathlib import Path
from typing import Any

import griffe

# From the file, since the site is built without the packages that mocosfl_jax imports.
_COMMENTS = Path(__file__).parents[1] / "mocosfl_jax" / "config" / "comments.py"
comment_of = runpy.run_path(str(_COMMENTS))["comment_of"]


class Comments(griffe.Extension):
    """Gives attributes that have no docstring their comment, and examples their section."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        if attr.docstring is None and attr.lineno is not None and attr.endlineno is not None:
            comment = comment_of(attr.lines_collection[attr.filepath], attr.lineno, attr.endlineno)
            if comment:
                attr.docstring = griffe.Docstring(comment, lineno=attr.lineno, parent=attr)
