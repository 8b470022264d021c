"""Write the encoder of a run to one safetensors file.

  python -m mocosfl_jax.export --workdir=FOLDER --out=FILE.safetensors [--checkpoint=STEP]

--workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not; its data set is not needed
--out=FILE           the output: the parameters of client 0 and of the server, with the network and the
                     preprocessing in the header; `mocosfl_jax.load_encoder` reads it
--checkpoint=STEP    a number in the run's checkpoints; default: the newest
"""

import sys
from collections.abc import Sequence

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.config import name_of
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

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
    config = workdir.read_config(folder, commandline.own_functions(values.config))
    if config.own.network is not None:
        raise UserError(
            f"config.own.network: found {name_of(config.own.network)}, allowed: None; an encoder file holds "
            "a network of split_model"
        )
    preprocessing = workdir.read_preprocessing(folder)

    compiler.set_up()
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint
    from mocosfl_jax.training.build import build, network_arguments
    from mocosfl_jax.weights import encoder_file

    device = jax.devices()[0]
    _, algorithm = build(
        config, one_device(device), forms(device.platform), image_size=preprocessing.image_size
    )
    state, progress = checkpoint.restore(folder / "checkpoints", values.checkpoint, algorithm, device)
    client, server = algorithm.models(state).online
    source = f"checkpoint {progress.step:,} of {folder}"
    network = network_arguments(config, preprocessing.image_size)
    metadata = encoder_file.Metadata(network, preprocessing.mean, preprocessing.std, source)
    encoder_file.export_encoder(out, client, server, metadata)
    say(f"{out}: {encoder_file.describe(client, server, metadata)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
