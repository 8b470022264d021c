"""Writes tests/official/decoders.npz, which the README beside it describes. This script needs torch.

python scripts/save_torch_decoders.py FOLDER
"""

import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROWS, SIZE = 3, 8
# Family, its blocks and channels, and side and channels of the smashed data of images of SIZE pixels.
CASES = (
    ("res_norm", 1, 4, 4, 2),
    ("res_norm", 0, 4, 8, 2),
    ("res_norm", 0, 4, 1, 2),
    ("conv_norm", 1, 4, 4, 2),
    ("conv_norm", 0, 4, 2, 2),
    ("custom", 0, 0, 8, 2),
    ("custom", 0, 0, 4, 2),
    ("custom", 0, 0, 1, 8),
)


def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Deterministic values, which the tests compute too."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(rng.standard_normal(shape))


def conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)


class ResBlock(nn.Module):
    """Pre-activation block of the official decoders. The names are those of our parameters."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm0, self.conv0 = nn.BatchNorm2d(inputs), conv(inputs, outputs)
        self.norm1, self.conv1 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        if inputs != outputs:
            self.shortcut_conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv0(torch.relu(self.norm0(x)))
        y = self.conv1(torch.relu(self.norm1(y)))
        return y + (self.shortcut_norm(self.shortcut_conv(x)) if hasattr(self, "shortcut_conv") else x)


def normed(layer: nn.Module, channels: int) -> nn.Module:
    module = nn.Sequential()
    module.add_module("conv", layer)
    module.add_module("norm", nn.BatchNorm2d(channels))
    return module


def decoder(
    family: str, blocks: int, channels: int, side: int, inputs: int, size: int = SIZE
) -> nn.Sequential:
    """The official decoder of a family, with its initial weights."""
    doublings = int(np.log2(size // side))
    net = nn.Sequential()
    if family == "custom":
        names = {"_Conv": 0, "_Upsampling": 0}

        def add(kind: str, layer: nn.Module, activation: nn.Module) -> None:
            net.add_module(f"{kind}_{names[kind]}", layer)
            net.add_module(f"activation{len(net)}", activation)
            names[kind] += 1

        for _ in range(doublings - 1):
            add("_Conv", conv(inputs, inputs // 2), nn.ReLU())
            inputs //= 2
            add("_Upsampling", up(inputs, inputs), nn.ReLU())
        add("_Conv", conv(inputs, inputs), nn.ReLU())
        if doublings:
            add("_Upsampling", up(inputs, 3), nn.Sigmoid())
        else:
            add("_Conv", conv(inputs, 3), nn.Sigmoid())
        return net

    def block(inputs: int, outputs: int) -> nn.Module:
        return ResBlock(inputs, outputs) if family == "res_norm" else normed(conv(inputs, outputs), outputs)

    layers = [block(inputs, channels), *(block(channels, channels) for _ in range(blocks))]
    for place in range(max(2, doublings)):
        upsamples = place < doublings
        layers.append(normed(up(channels, channels), channels) if upsamples else block(channels, channels))
    for number, layer in enumerate(layers):
        net.add_module(f"block{number}", layer)
        net.add_module(f"relu{number}", nn.ReLU())
    net.add_module("last", block(channels, 3))
    net.add_module("sigmoid", nn.Sigmoid())
    return net


def results(family: str, blocks: int, channels: int, side: int, inputs: int) -> dict[str, np.ndarray]:
    """A pass forward and back in training mode, and one in evaluation mode after it."""
    net = decoder(family, blocks, channels, side, inputs).double()
    for name, parameter in net.named_parameters():
        path = name.replace(".", "/")
        z = values(path, tuple(parameter.shape))
        if parameter.ndim == 1:
            parameter.data = 0.1 * z + path.endswith("weight")  # a scale, or a bias
        else:
            parameter.data = z / np.prod(z.shape[1:]) ** 0.5
    smashed = values("smashed", (ROWS, inputs, side, side)).abs()
    images = values("images", (ROWS, 3, SIZE, SIZE)).sigmoid()
    net.train()
    found = net(smashed)
    loss = nn.functional.mse_loss(found, images)
    loss.backward()
    kept = {"loss": loss, "found": found}
    kept |= {f"gradient/{name.replace('.', '/')}": p.grad for name, p in net.named_parameters()}
    kept |= {
        f"statistics/{name.replace('.', '/')}": value.clone()
        for name, value in net.named_buffers()
        if not name.endswith("num_batches_tracked")
    }
    kept["evaluated"] = net.eval()(smashed)
    return {name: value.detach().numpy() for name, value in kept.items()}


if __name__ == "__main__":
    arrays: dict[str, Any] = {}
    for case in CASES:
        name = "-".join(map(str, case))
        arrays |= {f"{name}/{key}": value for key, value in results(*case).items()}
    np.savez_compressed(Path(sys.argv[1]) / "decoders.npz", **arrays)
