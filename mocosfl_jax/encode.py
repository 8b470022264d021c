"""Encode a folder of images with the encoder of a run.

    python -m mocosfl_jax.encode --workdir=FOLDER --images=FOLDER --out=FILE.npz [--checkpoint=STEP] [-v]

  --workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not; its data set is not needed
  --images=FOLDER      a folder of pictures, also in folders below it and behind links
  --out=FILE.npz       the output: backbone [n, D] and projection [n, key_dim], both float32, and files [n],
                       the paths relative to --images, in sorted order
  --checkpoint=STEP    a number in the run's checkpoints; default: the newest
  -v, --verbose        name the files that are not used, such as those with a suffix of no picture

The shorter side of each image is resized to the run's image size and the centre is cropped. Pictures that
cannot be read are reported and skipped.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.data import decode, find
from mocosfl_jax.errors import UserError, printable
from mocosfl_jax.paths import user_path, utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

USAGE = "--workdir=FOLDER, --config=FILE, --images=FOLDER, --out=FILE.npz, --checkpoint=STEP, -v, --help"
BATCH = 250  # images in memory at a time


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", encode)


def encode(argv: Sequence[str]) -> None:
    """Encode as requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the folders do not hold a run or images.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_string("config", None, "File with the run's own functions.", flag_values=values)
        flags.DEFINE_string("images", None, "Folder of images.", flag_values=values)
        flags.DEFINE_string("out", None, "File of the features.", flag_values=values)
        flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint.", flag_values=values)
        flags.DEFINE_bool("verbose", False, "Name unused files.", short_name="v", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir", "images", "out"])
    folder = utf8_path("--workdir", values.workdir)
    images = user_path("--images", values.images)
    config = workdir.read_config(folder, commandline.own_functions(values.config))
    preprocessing = workdir.read_preprocessing(folder)
    if not images.is_dir():
        raise UserError(f"--images: found no folder {images}, allowed: a folder of images")
    out = commandline.output_file(values.out)
    files, unused = find.below(images)
    for path, reason in unused if values.verbose else ():
        say(f"not used: {path} ({reason})")
    left_out = find.counted(unused)
    if not files:
        others = f" (not used: {left_out})" if unused else ""
        raise UserError(f"--images: {images} holds no picture{others}, allowed: {', '.join(find.SUFFIXES)}")

    compiler.set_up()
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.evaluation.features import extract_batches, make_encode
    from mocosfl_jax.models.forms import forms
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint
    from mocosfl_jax.training.build import build, whole_head

    device = jax.devices()[0]
    mesh = one_device(device)
    model, algorithm = build(config, mesh, forms(device.platform), image_size=preprocessing.image_size)
    state, progress = checkpoint.restore(folder / "checkpoints", values.checkpoint, algorithm, device)
    encode_batch = make_encode(
        algorithm, preprocessing.mean, preprocessing.std, whole_head(config, model, algorithm, mesh)
    )
    read: list[Path] = []

    def pictures() -> Iterator[np.ndarray]:
        for paths, batch in batches(files, preprocessing.image_size):
            read.extend(paths)
            yield batch
        if not read:
            raise UserError(f"--images: none of the {len(files):,} files in {images} can be read")

    backbone, projection = extract_batches(encode_batch, state, pictures(), BATCH)
    # As UTF-8, in any locale.
    names = np.array(
        [os.fsencode(path.relative_to(images)).decode("utf-8", "surrogateescape") for path in read]
    )
    temporary = out.with_name(f"{out.name}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, backbone=backbone, projection=projection, files=names)
    temporary.replace(out)
    if unused:
        say(f"not used: {left_out} (named with -v)")
    say(
        f"{out}: {len(read):,} images, backbone {backbone.shape[1]}, projection {projection.shape[1]}, "
        f"by checkpoint {progress.step:,} of {folder}"
    )


def batches(files: Sequence[Path], image_size: int) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Read `BATCH` files at a time. Files that cannot be read are reported and skipped.

    Yields:
      Paths, and their images [n, image_size, image_size, 3] uint8, 1 <= n <= BATCH.
    """
    broken = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in tqdm(range(0, len(files), BATCH), unit="batch", disable=None, dynamic_ncols=True):
            paths, pictures = [], []
            batch = files[start : start + BATCH]
            found = pool.map(lambda path: decode.read(path, image_size), batch)
            for path, picture in zip(batch, found, strict=True):
                if isinstance(picture, str):
                    broken += 1
                    say(f"skipped: {printable(str(path))} ({picture})")
                else:
                    paths.append(path)
                    pictures.append(picture)
            if paths:
                yield paths, np.stack(pictures)
    if broken:
        say(f"skipped: {broken:,} of {len(files):,} files")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
