"""Compile a run for accelerators that are not here: does it fit, and how long would a step take?

    python -m mocosfl_jax.preflight [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                    [--device=KIND] [--devices=NUMBER] [--images=NUMBER]
                                    [--image_size=PIXELS] [--programs=NAME,...] [--json]

KIND is v5e, v5p, v6e, h100, h200 or a100. Nothing is trained and no data is read. --images (the number of
training images) and --image_size are needed for data sets of unknown size. --programs compiles only some of
init, enter, round, sync, leave, encode, knn. --json prints one object per program.

The exit status is 0 if every program fits in the memory of the device, 1 if one does not, 2 for a mistake.
Times are estimates: for a TPU by its compiler, for a GPU a lower bound.
"""

import json
import sys
from collections.abc import Sequence

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.config import resolve
from mocosfl_jax.errors import UserError
from mocosfl_jax.preflight import devices as kinds
from mocosfl_jax.preflight import programs, report
from mocosfl_jax.preflight.figures import as_dict, measure
from mocosfl_jax.runtime.waiting import waiting

USAGE = (
    "--config=FILE, --config.FIELD=VALUE, --device=KIND, --devices=NUMBER, --images=NUMBER, "
    "--image_size=PIXELS, --programs=NAME,..., --json, --help"
)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    fits = True

    def command(argv: Sequence[str]) -> None:
        nonlocal fits
        fits = preflight(argv)

    return commandline.answer(argv, commandline.help_text(__doc__), command) or int(not fits)


def preflight(argv: Sequence[str]) -> bool:
    """Compile as requested on the command line, and print the figures of each program.

    Returns:
      Whether all programs fit.

    Raises:
      UserError: if an argument is wrong, or the compiler is not installed.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_enum("device", "v5e", list(kinds.KINDS), "Kind of accelerator.", flag_values=values)
        flags.DEFINE_integer("devices", 1, "Number of them.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("images", None, "Training images.", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("image_size", None, "Image size in pixels.", lower_bound=1, flag_values=values)
        flags.DEFINE_list("programs", list(programs.NAMES), "Programs to compile.", flag_values=values)
        flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)

    config, _, values = commandline.parse(argv, USAGE, define)
    for name in values.programs or [""]:
        if name not in programs.NAMES:
            raise UserError(f"--programs: found {name}, allowed: {', '.join(programs.NAMES)}")
    resolved = resolve(config)
    kind = kinds.KINDS[values.device]
    found = kinds.topology(kind, values.devices)

    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.parallel import mesh as meshes

    mesh = meshes.make_mesh(resolved.mesh, found)
    run = programs.describe(resolved, mesh, kind.memory, values.images, values.image_size)
    if not values.json:
        say(report.header(run, kind))
    fits = True
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for plan in programs.plans(run, tuple(values.programs)):
            with waiting(f"compiling {plan.name}"):
                figures = measure(plan, kind, mesh.size)
            fits &= figures.fits
            say(json.dumps(as_dict(figures, kind, mesh.size)) if values.json else report.table(figures, kind))
    if not values.json:
        say(report.footer(kind))
    return fits


if __name__ == "__main__":
    sys.exit(main(sys.argv))
