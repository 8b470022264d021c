"""Figures as files. A picture that fails stops nothing: a warning of one line says why."""

import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from mocosfl_jax.errors import one_line, printable
from mocosfl_jax.paths import replacing

COLOURS = 20  # classes at most that have colours of their own
Draw = Callable[[Any], None]  # draws on the `matplotlib.figure.Figure` that it gets


class Rendered(NamedTuple):
    """A drawn figure."""

    file: bytes
    warning: str  # one line, such as that the font lacks a letter; "" without one


def render(size: tuple[float, float], draw: Draw, form: str = "png") -> Rendered:
    """Draw a figure.

    Args:
      size: width and height in inches.
      draw: draws on the figure.
      form: "png" or "svg".
    """
    # Imported lazily, since it takes a second. Figure needs no display and no global state.
    from matplotlib.figure import Figure

    file = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(file, format=form, dpi=120)
    return Rendered(file.getvalue(), " ".join(str(caught[0].message).split()) if caught else "")


def save(path: Path, size: tuple[float, float], draw: Draw) -> None:
    """Write a figure as a PNG file, or warn in one line and leave an earlier file as it is.

    Args:
      path: the file.
      size: width and height in inches.
      draw: draws on the figure.
    """
    try:
        file, warning = render(size, draw)
        with replacing(path) as temporary:
            temporary.write_bytes(file)
    except Exception as error:  # whatever it is, the run matters more
        logging.warning("%s is not drawn (%s)", path, one_line(error))
        return
    if warning:
        logging.warning("%s: %s", path, warning)


def class_colours(shown: Sequence[int], count: int) -> dict[int, Any]:
    """Return a colour for each class in a picture, by its number.

    Up to 20 colours differ well. A class of so small a set has the same colour in all pictures; if more than
    20 are shown, colours are alike.

    Args:
      shown: numbers of the classes in the picture, ascending.
      count: classes of the data set.
    """
    from matplotlib import colormaps

    if len(shown) > COLOURS:
        return {number: colormaps["hsv"](place / len(shown)) for place, number in enumerate(shown)}
    numbers = range(count) if count <= COLOURS else shown
    palette = colormaps["tab10" if len(numbers) <= 10 else "tab20"]
    colours = {number: palette(place) for place, number in enumerate(numbers)}
    return {number: colours[number] for number in shown}


def label(name: str, longest: int = 30) -> str:
    """Return a name in at most `longest` printable characters.

    Example:
      >>> label("a very long name", 7)
      'a very…'
    """
    name = printable(name)
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
