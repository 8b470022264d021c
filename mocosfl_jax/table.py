"""Print and write a table of runs: one row for each experiment, with means over its seeds.

    python -m mocosfl_jax.table RUN [RUN ...] [--out=FILE.csv|FILE.md] [--unfinished]

  RUN               the folder of a run of mocosfl_jax.train, or a folder of such folders
  --out=FILE        also write the table, as CSV with all digits or as Markdown
  --unfinished      count unfinished runs too, with their newest numbers

Runs that differ only in their seeds (config.seed, config.clients.seed), and in fields that do not change the
numbers, are one row. Its columns are the fields in which rows differ, the number of seeds, and the mean and
standard error over the seeds of the final kNN accuracies, the linear probe and the loss. Unfinished runs are
named and left out.
"""

import sys
from collections.abc import Sequence

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import replacing, user_path
from mocosfl_jax.training import comparison

USAGE = "RUN, --out=FILE.csv, --out=FILE.md, --unfinished, --help"
FORMATS = {".csv": comparison.comma_separated, ".md": lambda table: comparison.markdown(table) + "\n"}


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", table)


def table(argv: Sequence[str]) -> None:
    """Print and write the table requested on the command line.

    Raises:
      UserError: if an argument is wrong, or there is no run to count.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("out", None, "File of the table.", flag_values=values)
        flags.DEFINE_bool("unfinished", False, "Count unfinished runs too.", flag_values=values)

    runs: list[str] = []
    values = commandline.parse_flags(argv, USAGE, define, rest=runs)
    if not runs:
        raise UserError(f"RUN is missing; allowed: {USAGE}")
    out = commandline.output_file(values.out) if values.out else None
    if out and out.suffix not in FORMATS:
        raise UserError(f"--out: found {out}, allowed: a file that ends in {' or '.join(FORMATS)}")
    folders = [folder for run in runs for folder in comparison.workdirs(user_path("RUN", run))]
    outcomes = [comparison.read_outcome(folder) for folder in dict.fromkeys(folders)]

    unfinished = [outcome for outcome in outcomes if not outcome.finished]
    counted = outcomes if values.unfinished else [outcome for outcome in outcomes if outcome.finished]
    if unfinished:
        done = [f"{each.folder} (epoch {each.epoch:,} of {each.epochs:,})" for each in unfinished]
        left_out = "counted with their newest numbers" if values.unfinished else "left out"
        say(f"unfinished, {left_out}: {len(unfinished):,} of {len(outcomes):,} runs: {', '.join(done)}")
    for first, twin in comparison.twins(counted):
        say(f"counted once: {twin.folder} has the configuration and the seed of {first.folder}")
        counted.remove(twin)
    if not counted:
        raise UserError("found no finished run; --unfinished counts the others too")
    compared = comparison.compare(counted)
    say(comparison.markdown(compared))
    if out:
        with replacing(out) as temporary:
            temporary.write_text(FORMATS[out.suffix](compared), encoding="utf-8")
        say(f"{out}: {len(compared.rows):,} rows")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
