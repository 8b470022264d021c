"""The encoder of a run."""

import re
from pathlib import Path

import jax

from mocosfl_jax.config import Own
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.training import workdir as workdirs
from mocosfl_jax.weights.encoder_file import Encoder, Metadata


def encoder_of_run(
    workdir: Path | str,
    checkpoint: int | None = None,
    device: jax.Device | None = None,
    own: Own | None = None,
) -> Encoder:
    """Read the encoder from the workdir of a run, which may still be training. Its data set is not needed.

    Args:
      workdir: the folder of the run.
      checkpoint: training step of a checkpoint; None: the newest that can be read.
      device: where the parameters will be, and for which the network is written; None: JAX's first device.
      own: the functions that the run's configuration names; None: it names none.

    Returns:
      The network, the parameters of the client side and of the server side, and the metadata.

    Raises:
      UserError: if the folder holds no run or no such checkpoint, or a file cannot be used.

    Example, with the quickstart's run:

        encoder = encoder_of_run("runs/quickstart")
        features = encode_images(encoder, images).backbone  # [n, D], of images [n, 32, 32, 3] uint8
    """
    try:
        return read_encoder(utf8_path("workdir", str(workdir)), checkpoint, device, own)[0]
    except UserError as error:  # arguments of a function are no flags
        message = re.sub(r"^--(?=workdir:|checkpoint:)", "", str(error))
        message = message.replace("--config=FILE, the file of", "own=Own(...) with")
        raise UserError(message) from error


def read_encoder(
    folder: Path, checkpoint: int | None = None, device: jax.Device | None = None, own: Own | None = None
) -> tuple[Encoder, int]:
    """Like `encoder_of_run`, also with the training step of the checkpoint."""
    config = workdirs.read_config(folder, own)
    preprocessing = workdirs.read_preprocessing(folder)
    device = device or jax.devices()[0]

    # Imported lazily, since Orbax takes a second, also for those who only read an exported file.
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint as checkpoints
    from mocosfl_jax.training.build import build, network_record, online_models

    model, algorithm = build(
        config, one_device(device), forms(device.platform), image_size=preprocessing.image_size
    )
    state, progress = checkpoints.restore(folder / "checkpoints", checkpoint, algorithm, device)
    metadata = Metadata(
        network_record(config, preprocessing.image_size),
        preprocessing.mean,
        preprocessing.std,
        source=f"checkpoint {progress.step:,} of {folder}",
    )
    return Encoder(model, online_models(algorithm, state), metadata), progress.step
