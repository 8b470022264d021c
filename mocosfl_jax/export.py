"""Write the encoder of a run to one safetensors file.

  python -m mocosfl_jax.export --workdir=FOLDER --out=FILE.safetensors [--checkpoint=STEP] [--config=FILE]

--workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not; its data set is not needed
--out=FILE           the output: the parameters of client 0 and of the server, with the network and the
                     preprocessing in the header; `mocosfl_jax.load_encoder` reads it
--checkpoint=STEP    a number in the run's checkpoints; default: the newest
--config=FILE        the config file of a run with an algorithm of its own
"""

import sys
from collections.abc import Sequence

from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.config import name_of
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir
from mocosfl_jax.training.encoder import read_encoder
from mocosfl_jax.weights import encoder_file

USAGE = "--workdir=FOLDER, --config=FILE, --out=FILE.safetensors, --checkpoint=STEP, --help"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", export)


def export(argv: Sequence[str]) -> None:
    """Export as requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the folder does not hold a run.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_string("config", None, "File with the run's own functions.", flag_values=values)
        flags.DEFINE_string("out", None, "File of the encoder.", flag_values=values)
        flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir", "out"])
    folder, out = utf8_path("--workdir", values.workdir), commandline.output_file(values.out)
    own = commandline.own_functions(values.config)
    if (network := workdir.read_config(folder, own).own.network) is not None:
        raise UserError(
            f"config.own.network: found {name_of(network)}, allowed: None; an encoder file holds a network "
            "of split_model"
        )
    compiler.set_up()
    (_, (client, server), metadata), _ = read_encoder(folder, values.checkpoint, own=own)
    encoder_file.export_encoder(out, client, server, metadata)
    say(f"{out}: {encoder_file.describe(client, server, metadata)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
