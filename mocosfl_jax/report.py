"""Write a page about one run, or about several side by side, as a single HTML file.

    python -m mocosfl_jax.report --workdir=FOLDER [--workdir=FOLDER ...] --out=FILE.html

  --workdir=FOLDER  the folder of a run of mocosfl_jax.train, finished or not; once for each run
  --out=FILE.html   the page

The page has accuracies, curves, the configuration with the fields that differ between the runs and from the
paper's, the pictures of the workdir, the costs of a client, the command that repeats the run, and versions.
It opens without a network. Nothing is trained, and no data are read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.paths import replacing, user_path

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
    given: dict[Path, Path] = {}  # by real path, so that a folder counts once, however it is written
    for text in values.workdir:
        path = user_path("--workdir", text)
        given.setdefault(path.resolve(), path)
    folders = list(given.values())
    out = commandline.output_file(values.out)
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.page.contents import read_runs
    from mocosfl_jax.page.html import html

    with replacing(out) as temporary:
        temporary.write_text(html(read_runs(folders)), encoding="utf-8")
    say(f"{out}: {len(folders)} run{'' if len(folders) == 1 else 's'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
