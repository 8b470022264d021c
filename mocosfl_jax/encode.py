"""Encode a folder of images, or a data set, with the encoder of a run.

    python -m mocosfl_jax.encode --workdir=FOLDER --images=FOLDER --out=FILE.npz [--checkpoint=STEP]
                                 [--config=FILE] [-v]
    python -m mocosfl_jax.encode --workdir=FOLDER --data.name=NAME [--data.dir=FOLDER] --out=FILE.npz
                                 [--data.max_broken=SHARE] [--checkpoint=STEP] [--config=FILE] [-v]

  --workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not; its data set is not needed
  --images=FOLDER      a folder of pictures; folders below it and links are followed
  --data.name=NAME     a data set that training takes, such as cifar10 or image_folder; downloaded as there
  --data.dir=FOLDER    where it is; default: data
  --data.max_broken=SHARE  how large a share of a split's images may fail to decode; such images are black
  --out=FILE.npz       the output, see below
  --checkpoint=STEP    a number in the run's checkpoints; default: the newest
  --config=FILE        the config file of a run with functions of its own, which no workdir holds
  -v, --verbose        name the files that are not used, such as those that are not pictures

Of --images the output holds backbone [n, D] and projection [n, key_dim], both float32, and files [n], the
paths relative to --images, in sorted order. Of --data.name it holds train_backbone, train_projection and
train_labels [n] int32, the same of test, and class_names [C].

The shorter side of each image is resized to the run's image size and the centre is cropped. Pictures of
--images that cannot be read are reported and skipped.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.data import Dataset, decode, find
from mocosfl_jax.errors import UserError, printable, renamed
from mocosfl_jax.evaluation.features import encode_of, extract, extract_batches
from mocosfl_jax.paths import replacing, user_path, utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir
from mocosfl_jax.training.encoder import read_encoder
from mocosfl_jax.weights.encoder_file import Encoder

USAGE = (
    "--workdir=FOLDER, --config=FILE, --images=FOLDER, --data.name=NAME, --data.dir=FOLDER, "
    "--data.max_broken=SHARE, --out=FILE.npz, --checkpoint=STEP, -v, --help"
)
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
        commandline.define_data(values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir", "out"])
    given = commandline.given_data(values)
    if values.images and given:
        other = next(iter(given))
        raise UserError(f"found --images and --data.{other}, allowed: one of --images and --data.name")
    if not values.images and "name" not in given:
        raise UserError(f"--images is missing, or --data.name; allowed: {USAGE}")
    folder = utf8_path("--workdir", values.workdir)
    own = commandline.own_functions(values.config)
    workdir.read_config(folder, own)
    image_size = workdir.read_preprocessing(folder).image_size
    out = commandline.output_file(values.out)

    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.training.build import FIELDS

    if values.images:
        images = user_path("--images", values.images)
        files = pictures_below(images, verbose=values.verbose)
        compiler.set_up()
        encoder, step = read_encoder(folder, values.checkpoint, own=own)
        with renamed(FIELDS):
            arrays = encode_files(encoder, images, files, image_size)
        what = f"{len(arrays['files']):,} images"
    else:
        compiler.set_up()
        encoder, step = read_encoder(folder, values.checkpoint, own=own)  # before anything is downloaded
        dataset = commandline.load_data(given, image_size)
        report_unused(dataset.unused, verbose=values.verbose)
        with renamed(FIELDS):
            arrays = encode_dataset(encoder, dataset)
        counts = f"{len(dataset.x_train):,} training and {len(dataset.x_test):,} test images"
        what = f"{counts} of {len(dataset.class_names)} classes ({dataset.source})"
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    widths = [arrays[name].shape[1] for name in arrays if name.endswith(("backbone", "projection"))]
    say(f"{out}: {what}, backbone {widths[0]}, projection {widths[1]}, by checkpoint {step:,} of {folder}")


def pictures_below(images: Path, *, verbose: bool) -> list[Path]:
    """Find the pictures in a folder, and report what is not used.

    Raises:
      UserError: if there is no folder or no picture.
    """
    if not images.is_dir():
        raise UserError(f"--images: found no folder {images}, allowed: a folder of images")
    files, unused = find.below(images)
    if not files:
        others = f" (not used: {find.counted(unused)})" if unused else ""
        raise UserError(f"--images: {images} holds no picture{others}, allowed: {', '.join(find.SUFFIXES)}")
    report_unused(unused, verbose=verbose)
    return files


def report_unused(unused: Sequence[find.Unused], *, verbose: bool) -> None:
    """Name the files that are not used, or count them by reason."""
    for path, reason in unused if verbose else ():
        say(f"not used: {path} ({reason})")
    if unused:
        say(f"not used: {find.counted(unused)} (named with -v)")


def encode_files(encoder: Encoder, images: Path, files: Sequence[Path], image_size: int) -> dict[str, Any]:
    """Return the features of the files that can be read, and their paths below `images`.

    Raises:
      UserError: if none of them can be read.
    """
    read: list[Path] = []

    def pictures() -> Iterator[np.ndarray]:
        for paths, batch in batches(files, image_size):
            read.extend(paths)
            yield batch
        if not read:
            raise UserError(f"--images: none of the {len(files):,} files in {images} can be read")

    features = extract_batches(encode_of(encoder), encoder.params, pictures(), BATCH)
    # As UTF-8, in any locale.
    names = [os.fsencode(path.relative_to(images)).decode("utf-8", "surrogateescape") for path in read]
    return {**features._asdict(), "files": np.array(names)}


def encode_dataset(encoder: Encoder, dataset: Dataset) -> dict[str, Any]:
    """Return the features and labels of both splits, and the names of the classes."""
    encode = encode_of(encoder)
    arrays: dict[str, Any] = {}
    for split, images, labels in (
        ("train", dataset.x_train, dataset.y_train),
        ("test", dataset.x_test, dataset.y_test),
    ):
        features = extract(encode, encoder.params, images, BATCH)
        arrays |= {f"{split}_{name}": rows for name, rows in features._asdict().items()}
        arrays[f"{split}_labels"] = labels
    return arrays | {"class_names": np.array(dataset.class_names)}


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
