"""The results of attacks as a table, as JSON and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.paths import replacing
from mocosfl_jax.privacy.attacks import SHOWN, Result

_COLUMNS = ("MSE", "SSIM", "PSNR", "MSE/const", "MSE p5")


def table(results: Sequence[Result]) -> str:
    """Return one line for each attacker, under a line of titles.

    MSE/const is the error in terms of the constant predictor's: 1 means that nothing was learned. MSE p5 is
    the 5th percentile over victims: one in twenty is reconstructed better than that.
    """
    most = max(result.mse.shape[1] for result in results)
    names = []
    for result in results:
        victims = result.mse.shape[1]
        names.append(f"{result.attacker} ({victims} victims)" if victims < most else result.attacker)
    width = max(len(name) for name in names)
    titles = "".join(f"{title:>11}" for title in _COLUMNS)
    lines = [f"{'attacker':<{width}}  {'smashed':<7} {'images':>7}{titles}"]
    for name, result in zip(names, results, strict=True):
        row = result.summary()
        images = "-" if result.images is None else f"{result.images:,}"
        numbers = f"{row['mse']:11.4f}{row['ssim']:11.3f}{row['psnr']:11.1f}"
        numbers += f"{row['relative_mse']:11.2f}{row['mse_5th_percentile']:11.4f}"
        lines.append(f"{name:<{width}}  {result.smashed or '-':<7} {images:>7}{numbers}")
    return "\n".join(lines)


def record(results: Mapping[str, Sequence[Result]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what privacy.json holds: the settings, and a row for each client and attacker."""
    rows = [{"client": client, **row.summary()} for client, rows in results.items() for row in rows]
    return {**settings, "rows": rows}


def draw_reconstructions(path: Path, victims: np.ndarray, results: Mapping[str, Sequence[Result]]) -> None:
    """Draw victims in the first row, and what each attacker made of them below.

    Args:
      path: the PNG file.
      victims: [m, H, W, 3] uint8.
      results: by client; each client has a column of the picture.
    """
    # Imported lazily, since it takes a second. Figure needs no display and no global state.
    from matplotlib.figure import Figure

    size = victims.shape[1]
    top = np.concatenate(list(victims[:SHOWN] / np.float32(255)), axis=1)
    most = 1 + max(len(rows) for rows in results.values())
    figure = Figure(figsize=(8.5 * len(results), 0.62 * most + 0.4), layout="constrained")
    columns = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (client, rows) in zip(columns, results.items(), strict=True):
        strips = [top]
        for row in rows:
            strip = np.ones_like(top)
            found = np.concatenate(list(row.shown), axis=1)
            strip[:, : found.shape[1]] = found
            strips.append(strip)
        axes.imshow(np.concatenate(strips), interpolation="nearest")
        axes.set_xticks([])
        labels = ["victims", *(_label(row) for row in rows)]
        axes.set_yticks([size * (i + 0.5) for i in range(len(labels))], labels, parse_math=False)
        axes.set_title(client, parse_math=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")


def _label(row: Result) -> str:
    images = "" if row.images is None else f", {row.images:,} images"
    return f"{row.attacker}{images}" + (f", {row.smashed}" if row.smashed else "")
