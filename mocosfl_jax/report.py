"""Write a page about one run, or about several side by side, as a single HTML file.

    python -m mocosfl_jax.report --workdir=FOLDER [--workdir=FOLDER ...] --out=FILE.html

  --workdir=FOLDER  the folder of a run of mocosfl_jax.train, finished or not; once for each run
  --out=FILE.html   the page

The page has accuracies, curves, the configuration with the fields that differ between the runs and from the
paper's, the pictures of the workdir, the costs of a client, the command that repeats the run, and versions.
It opens without a network. Nothing is trained, and no data are read.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import user_path

USAGE = "--workdir=FOLDER, --out=FILE.html, --help"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", report)


def report(argv: Sequence[str]) -> None:
    """Write the page requested on the command line.

    Raises:
      UserError: if an argument is wrong, or a folder does not hold a run.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_multi_string("workdir", None, "Folder of a run.", flag_values=values)
        flags.DEFINE_string("out", None, "File of the page.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir", "out"])
    folders = [user_path("--workdir", text) for text in dict.fromkeys(values.workdir)]
    out = commandline.output_file(values.out)
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.page.contents import read_runs
    from mocosfl_jax.page.html import html

    with replacing(out) as file:
        file.write(html(read_runs(folders)))
    say(f"{out}: {len(folders)} run{'' if len(folders) == 1 else 's'}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a new file that takes the place of `path` at the end, unless something fails.

    Raises:
      UserError: if no file can be written there.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        file = temporary.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: found {path}, allowed: a writable file ({error.strerror})") from error
    try:
        with file:
            yield file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv))
