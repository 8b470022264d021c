"""Bottleneck layers at the cut: the client sends fewer channels and pixels, and the server restores them."""

import re
from typing import NamedTuple

import flax.linen as nn
from jax import Array

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.layers import Conv, Options, TransposedConv


class Bottleneck(NamedTuple):
    """The meaning of a string such as "C4S2"."""

    channels: int  # of the smashed data
    halvings: int  # of height and width
    kernel_size: int
    relu: bool  # after every convolution


def read_bottleneck(bottleneck: str) -> Bottleneck:
    """Parse "CxSy" or "KkCxS1", optionally with noReLU: x channels, 1/y of the pixels a side, k x k kernels.

    Example:
      >>> read_bottleneck("C4S2")
      Bottleneck(channels=4, halvings=1, kernel_size=3, relu=True)

    Raises:
      UserError: If the text has another form.
    """
    found = re.fullmatch(r"(noReLU)?(?:K(\d*[13579]))?C([1-9]\d*)S([124])(noReLU)?", bottleneck)
    if found is None or (found[2] is not None and found[4] != "1"):
        raise UserError(
            f"bottleneck: found {bottleneck!r}, allowed: CxS1, CxS2 or CxS4 with x channels (C4S2), "
            "KkCxS1 with an odd kernel size k (K1C8S1), and noReLU at the end of any (C4S2noReLU)"
        )
    halvings = {"1": 0, "2": 1, "4": 2}[found[4]]
    return Bottleneck(int(found[3]), halvings, int(found[2] or 3), relu=not (found[1] or found[5]))


class ClientBottleneck(nn.Module):
    """[n, H, W, C] -> [n, H / y, W / y, x]: one convolution, or one of stride 2 for each halving."""

    bottleneck: Bottleneck
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, plain = self.bottleneck, self.options.standardised(False)
        stride = 2 if b.halvings else 1
        for i in range(max(1, b.halvings)):
            x = Conv(b.channels, b.kernel_size, stride, plain, bias=True, name=f"conv{i}")(x)
            x = nn.relu(x) if b.relu else x
        return x


class ServerBottleneck(nn.Module):
    """[n, H / y, W / y, x] -> [n, H, W, features]: one convolution, or a transposed one for each halving."""

    bottleneck: Bottleneck
    features: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, plain = self.bottleneck, self.options.standardised(False)
        if not b.halvings:
            x = Conv(self.features, b.kernel_size, 1, plain, bias=True, name="conv0")(x)
            return nn.relu(x) if b.relu else x
        for i in range(b.halvings):
            features = self.features if i == b.halvings - 1 else b.channels
            x = TransposedConv(features, plain, name=f"conv{i}")(x)
            x = nn.relu(x) if b.relu else x
        return x
