"""The comments of fields, which say what they mean."""

import ast
import inspect
import textwrap
from collections.abc import Sequence


def comments(kind: type) -> dict[str, str]:
    """The comment of each field of a dataclass, from its source; nothing where the source is not installed.

    Example:
      >>> from mocosfl_jax.config import Clients
      >>> comments(Clients)["num"]
      'N, the number of clients in the pool.'
    """
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except OSError:
        return {}
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: comment_of(lines, field.lineno, field.end_lineno or field.lineno)
        for field in definition.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def comment_of(lines: Sequence[str], first: int, last: int) -> str:
    """The comment of the statement in lines `first` to `last`, counted from 1.

    It is on the last of these lines, or on the lines directly above.
    """
    _, mark, behind = lines[last - 1].partition("  # ")
    if mark:
        return behind.strip()
    above: list[str] = []
    for line in reversed(lines[: first - 1]):
        if not line.strip().startswith("# "):
            break
        above.insert(0, line.strip()[2:])
    return " ".join(above)
