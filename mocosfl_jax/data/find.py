"""Finds the pictures in a folder, and says why its other files are not used.

One rule for training and for `encode`: every file with a suffix in `SUFFIXES` is a picture, also in folders
below and behind links. Whatever else there is, is `Unused`.
"""

import heapq
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mocosfl_jax.errors import printable

# Suffixes of the formats that `decode` reads, in lower case. Upper case is the same.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib"),
    *(".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_HIDDEN = ("__MACOSX",)  # beside names that start with a dot
_REASONS = 8  # at most so many reasons are named in a line
_LONGEST_SUFFIX = 10


class Unused(NamedTuple):
    """A file or folder that is not used."""

    path: str  # without characters that cannot be printed
    reason: str  # reads well after a number: "hidden", "of type .txt"


class Listing(NamedTuple):
    """What a folder holds, each part sorted by name."""

    folders: list[Path]
    pictures: list[Path]
    unused: list[Unused]


class Found(NamedTuple):
    """What a folder and the folders below it hold, sorted by path."""

    pictures: list[Path]
    unused: list[Unused]


def listing(folder: Path) -> Listing:
    """Lists a folder, without the folders below it. Links count as what they point to.

    Raises:
      OSError: If the folder cannot be opened.
    """
    found = Listing([], [], [])
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            reason = _reason(entry)
            if reason:
                found.unused.append(unused(path, reason))
            else:
                (found.folders if entry.is_dir() else found.pictures).append(path)
    return found


def below(folder: Path) -> Found:
    """All pictures in a folder and in the folders below it, also behind links.

    A folder counts once, where it is itself or else at the first link to it. Further links to it are unused,
    and so is a folder that cannot be opened.
    """
    pictures: list[Path] = []
    left_out: list[Unused] = []
    walked: set[str] = set()  # real paths
    # Heaps of folders, each with the real folders that it is in. Links wait until all else is walked.
    folders: list[tuple[Path, frozenset[str]]] = [(folder, frozenset())]
    links: list[tuple[Path, frozenset[str]]] = []
    while folders or links:
        here, above = heapq.heappop(folders or links)
        real = os.path.realpath(here)
        if real in walked:
            reason = "linked to a folder above" if real in above else "linked a second time"
            left_out.append(unused(here, reason))
            continue
        walked.add(real)
        try:
            found = listing(here)
        except OSError as error:
            left_out.append(unused(here, f"that cannot be opened ({error.strerror})"))
            continue
        pictures += found.pictures
        left_out += found.unused
        for inner in found.folders:
            heapq.heappush(links if inner.is_symlink() else folders, (inner, above | {real}))
    return Found(sorted(pictures), sorted(left_out))


def unused(path: Path, reason: str) -> Unused:
    """A file or folder that is not used, for a reason that reads well after a number."""
    return Unused(printable(str(path)), reason)


def counted(left_out: Sequence[Unused]) -> str:
    """How many files and folders are not used, by reason, the most frequent first.

    Example:
      >>> counted([Unused("a/x.txt", "of type .txt"), Unused("a/.y", "hidden"), Unused("b/.z", "hidden")])
      '2 hidden, 1 of type .txt'
    """
    counts = Counter(each.reason for each in left_out).most_common()
    named, rest = counts[:_REASONS], counts[_REASONS:]
    words = [f"{count:,} {reason}" for reason, count in named]
    if rest:
        words.append(f"{sum(count for _, count in rest):,} for other reasons")
    return ", ".join(words)


def _reason(entry: os.DirEntry[str]) -> str:
    """Why an entry of a folder is not used, or "" for a picture and for a folder."""
    if entry.name.startswith(".") or entry.name in _HIDDEN:
        return "hidden"
    try:
        if entry.is_dir():
            return ""
        if not entry.is_file():
            return "neither file nor folder" if os.path.exists(entry.path) else "linked to nothing"
    except OSError as error:  # a link to itself, or to where nothing may be read
        return f"that cannot be opened ({error.strerror})"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in SUFFIXES:
        return ""
    if not suffix:
        return "without a suffix"
    return f"of type {printable(suffix)}" if len(suffix) <= _LONGEST_SUFFIX else "of another type"
