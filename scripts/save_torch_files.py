"""Writes the PyTorch files in tests/official, which its README describes. This script needs torch.

python scripts/save_torch_files.py FOLDER
"""

import itertools
import sys
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

WIDTH, KEY_DIM = 4, 6


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Deterministic values, which the tests compute too."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))


def block(inputs: int, outputs: int) -> torch.nn.Module:
    """A module that has the parameters of the official BasicBlock_gn, with the same names."""
    module = torch.nn.Module()
    module.conv1 = torch.nn.Conv2d(inputs, outputs, 3, bias=False)
    module.bn1 = torch.nn.GroupNorm(1, outputs)
    module.conv2 = torch.nn.Conv2d(outputs, outputs, 3, bias=False)
    module.bn2 = torch.nn.GroupNorm(1, outputs)
    if inputs != outputs:
        shortcut = torch.nn.Conv2d(inputs, outputs, 1, bias=False)
        module.shortcut = torch.nn.Sequential(shortcut, torch.nn.GroupNorm(1, outputs))
    return module


def save_modules(folder: Path) -> None:
    """Saves state dicts of client and server, as the official code does."""
    stem = torch.nn.Module()
    stem.conv1 = torch.nn.Conv2d(3, WIDTH, 3, bias=False)
    stem.bn1 = torch.nn.GroupNorm(1, WIDTH)
    widths = [WIDTH * 2**stage for stage in (0, 0, 0, 1, 1, 2, 2, 3, 3)]
    blocks = [block(*pair) for pair in itertools.pairwise(widths)]
    last = widths[-1]
    head = torch.nn.Sequential(
        torch.nn.Linear(last, KEY_DIM), torch.nn.ReLU(), torch.nn.Linear(KEY_DIM, KEY_DIM)
    )
    sides = {"c": torch.nn.Sequential(stem), "s": torch.nn.Sequential(*blocks, torch.nn.Identity(), head)}
    for side, model in sides.items():
        for name, tensor in model.state_dict().items():
            tensor.copy_(values(f"{side}.{name}", tuple(tensor.shape)))
        torch.save(model.state_dict(), folder / f"checkpoint_{side}_best.tar")


def save_odd(folder: Path) -> None:
    """Saves tensors of other dtypes and shapes, and views that share a storage."""
    base = values("base", (6, 5))
    tensors = OrderedDict(
        half=values("half", (3, 2)).half(),
        double=values("double", (2,)).double(),
        long=torch.arange(-2, 3),
        scalar=torch.tensor(7),
        empty=torch.zeros(0, 3),
        base=base,
        transposed=base.T,
        sliced=base[1::2, 1:4],
    )
    torch.save(tensors, folder / "odd.pt")


if __name__ == "__main__":
    save_modules(Path(sys.argv[1]))
    save_odd(Path(sys.argv[1]))
    legacy = {"a": torch.arange(3.0)}
    torch.save(legacy, Path(sys.argv[1]) / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.arange(3.0).bfloat16()}, Path(sys.argv[1]) / "bfloat16.pt")
