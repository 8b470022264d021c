"""Parts of a page that a script writes: what stands between `<!-- NAME -->` and `<!-- end of NAME -->`."""

from collections.abc import Iterable
from pathlib import Path

from mocosfl_jax.errors import UserError


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a part."""
    return f"<!-- {name} -->\n", f"<!-- end of {name} -->"


def check(path: Path, names: Iterable[str]) -> None:
    """Raise UserError if there is no such page, or if it lacks marks."""
    if not path.is_file():
        raise UserError(f"--page: found no {path}, allowed: a page with marks")
    text = path.read_text()
    for first, last in map(marks, names):
        if last not in text.partition(first)[2]:
            raise UserError(f"{path}: found no {first.strip()} with its {last}, allowed: both")


def filled(text: str, name: str, part: str) -> str:
    """The text of a page with another part.

    Example:
      >>> filled("a\\n<!-- curve -->\\nold\\n<!-- end of curve -->\\nb", "curve", "new\\n")
      'a\\n<!-- curve -->\\nnew\\n<!-- end of curve -->\\nb'
    """
    first, last = marks(name)
    before, _, rest = text.partition(first)
    return f"{before}{first}{part}{last}{rest.partition(last)[2]}"
