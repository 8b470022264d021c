"""Take part in a training with real clients: a client's side.

    python -m mocosfl_jax.join --server=HOST:PORT --data=FOLDER_OR_NPZ --tls=FOLDER
                               [--client_id=NUMBER] [--patience=SECONDS] [--insecure]

  --server=HOST:PORT    the address of mocosfl_jax.serve
  --data=FOLDER_OR_NPZ  this client's pictures: a folder, read with the folders in it, or an npz file with an
                        array `images` or `x_train`, uint8 [n, H, W, 3] or gray [n, H, W]. They stay here.
  --tls=FOLDER          this client's certificate, from `python -m mocosfl_jax.certificates`
  --client_id=NUMBER    which client this is, where the folder has the certificates of several; with
                        --insecure, the wanted number
  --patience=SECONDS    for which the server may be away (default: 3600)
  --insecure            instead of --tls: no encryption and no certificates, on this machine only

What leaves this machine is listed in docs/clients.md. The program that this client runs comes from the
server.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import user_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.wire.endpoint import checked_address, checked_tls, require_wire

USAGE = (
    "--server=HOST:PORT, --data=FOLDER_OR_NPZ, --tls=FOLDER, --client_id=NUMBER, --patience=SECONDS, "
    "--insecure, --help"
)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", join)


def join(argv: Sequence[str]) -> None:
    """Take part as requested on the command line.

    Raises:
      UserError: if an argument is wrong, there are no pictures, or the server refuses this client.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("server", None, "Address of the server.", flag_values=values)
        flags.DEFINE_string("data", None, "This client's pictures.", flag_values=values)
        flags.DEFINE_string("tls", None, "Folder of the certificate.", flag_values=values)
        flags.DEFINE_integer("client_id", None, "Number of this client.", 0, 2**32 - 1, flag_values=values)
        flags.DEFINE_float("patience", 3600.0, "Seconds.", 0.0, flag_values=values)
        flags.DEFINE_bool("insecure", False, "No encryption.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["server", "data"])
    address = checked_address("--server", values.server)
    tls = checked_tls(values.tls, values.insecure, address)
    data = user_path("--data", values.data)
    if not data.exists():
        raise UserError(f"--data: found no {data}, allowed: a folder of pictures or an npz file")
    require_wire()
    compiler.set_up()
    from mocosfl_jax.wire.certificates import client_credentials
    from mocosfl_jax.wire.member import Access, take_part

    credentials = None if tls is None else client_credentials(tls, values.client_id)
    access = Access(address, credentials, jax.devices()[0].platform, values.patience)
    take_part(access, lambda size: read_pictures(data, size), values.client_id, say)


def read_pictures(data: Path, size: int) -> np.ndarray:
    """Read a client's pictures.

    Args:
      data: a folder or an npz file.
      size: in pixels. Pictures in files are resized to it; those of an npz file must have it.

    Returns:
      [n, size, size, 3] uint8.

    Raises:
      UserError: if there are none, or they cannot be used.
    """
    from mocosfl_jax.data import decode, find
    from mocosfl_jax.data.images import rgb

    if not data.is_dir():
        return rgb(of_npz(data, size))
    files, unused = find.below(data)
    left_out = [*unused]
    pictures = []
    for path in files:
        picture = decode.read(path, size)
        if isinstance(picture, str):
            left_out.append(find.unused(path, f"that cannot be read ({picture})"))
        else:
            pictures.append(picture)
    if left_out:
        say(f"not used: {find.counted(left_out)}")
    if not pictures:
        raise UserError(
            f"--data: {data} holds no picture that can be read, allowed: {', '.join(find.SUFFIXES)}"
        )
    return np.stack(pictures)


def of_npz(path: Path, size: int) -> np.ndarray:
    """Return the images of an npz file, [n, size, size, 3], [n, size, size, 1] or [n, size, size] uint8."""
    allowed = f"images [n, {size}, {size}, 3] or [n, {size}, {size}] of uint8"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = next((name for name in ("images", "x_train") if name in arrays), None)
            if name is None:
                raise UserError(f"--data: {path} has no array images or x_train, allowed: {allowed}")
            images: np.ndarray = arrays[name]
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise UserError(f"--data: {path} is no npz file that can be read, allowed: {allowed}") from error
    fits = images.shape[1:] in ((size, size), (size, size, 1), (size, size, 3))
    if images.dtype != np.uint8 or not fits:
        raise UserError(f"--data: {path} has {name} {images.shape} of {images.dtype}, allowed: {allowed}")
    return images


if __name__ == "__main__":
    sys.exit(main(sys.argv))
