"""Convert a checkpoint of the official PyTorch code into one safetensors file. PyTorch is not needed.

  python -m mocosfl_jax.import_official --client=checkpoint_c_best.tar --server=checkpoint_s_best.tar
      --config=FILE[:PARAMETER] [--config.FIELD=VALUE ...] --out=FILE.safetensors [--mean=R,G,B --std=R,G,B]

--client, --server   the two files saved by the official code
--config             the configuration of the checkpoint: its network (config.model, config.moco) and its data
                     (name, image_size)
--out=FILE           the output; `mocosfl_jax.load_encoder` reads it
--mean, --std        per channel, for pixels on [0, 1]; default: the official code's for config.data.name
"""

import re
import sys
from collections.abc import Sequence

from absl import flags

from mocosfl_jax import commandline, data
from mocosfl_jax.commandline import say
from mocosfl_jax.config import Resolved, resolve
from mocosfl_jax.errors import UserError, renamed
from mocosfl_jax.paths import user_path

USAGE = "--client=FILE, --server=FILE, --config=FILE, --config.FIELD=VALUE, --out=FILE, --mean, --std, --help"


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, commandline.help_text(__doc__), import_official)


def import_official(argv: Sequence[str]) -> None:
    """Import as requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the files hold a different network.
    """

    def define(values: flags.FlagValues) -> None:
        for name in ("client", "server", "out"):
            flags.DEFINE_string(name, None, "File.", flag_values=values)
        for name in ("mean", "std"):
            flags.DEFINE_list(name, None, "Per channel.", flag_values=values)

    arguments = commandline.parse(argv, USAGE, define)
    values = arguments.flags
    # --config has no default here: no official checkpoint has the quickstart's network.
    given = {"config"} if any(re.match(r"--?config(=|$)", argument) for argument in argv) else set()
    given |= {name for name in ("client", "server", "out") if values[name].value}
    for name in ("client", "server", "config", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; allowed: {USAGE}")
    out = commandline.output_file(values.out)
    files = [user_path("--client", values.client), user_path("--server", values.server)]
    config = resolve(arguments.config)
    mean, std = (_channels(name, values[name].value, config) for name in ("mean", "std"))
    image_size = config.data.image_size or data.SIZES.get(config.data.name, (None, None))[1]
    if image_size is None:
        raise UserError(
            f"config.data.image_size: found None, allowed: the image size of {config.data.name} in pixels"
        )

    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.training.build import FIELDS, network_arguments
    from mocosfl_jax.weights import encoder_file, official, torch_file

    network = network_arguments(config, image_size)
    states = [torch_file.read_state_dict(path) for path in files]
    with renamed(FIELDS):
        client, server = official.from_official(*states, **network)
    metadata = encoder_file.Metadata(network, mean, std, f"{values.client}, {values.server}")
    encoder_file.export_encoder(out, client, server, metadata)
    say(f"{out}: {encoder_file.describe(client, server, metadata)}")


def _channels(flag: str, given: list[str] | None, config: Resolved) -> tuple[float, ...]:
    """Return the values of --mean or --std, or the published ones of the data set."""
    if given is None:
        if config.data.name not in data.PUBLISHED:
            raise UserError(
                f"--{flag} is missing and has no default for {config.data.name}; allowed: --{flag}=R,G,B"
            )
        return data.PUBLISHED[config.data.name][("mean", "std").index(flag)]
    try:
        numbers = tuple(map(float, given))
    except ValueError:
        numbers = ()
    if (
        len(numbers) != 3
        or not all(0 <= number <= 1 for number in numbers)
        or (flag == "std" and 0 in numbers)
    ):
        raise UserError(
            f"--{flag}: found {','.join(given)}, allowed: R,G,B on [0, 1], such as 0.49,0.48,0.45"
        )
    return numbers


if __name__ == "__main__":
    sys.exit(main(sys.argv))
