"""Convolutions in several forms, each fast on some platform; all give the same numbers.

Images are NHWC, kernels HWIO, and padding is zero on every side. `forms.forms` chooses the form;
`direct_conv` is the plain one, against which the others are tested.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint


class Convolution(Protocol):
    """A form of the convolution. All forms compute the same function."""

    def __call__(self, x: Array, kernel: Array, *, stride: int, padding: int) -> Array: ...


class Lowering(NamedTuple):
    """The forms of the convolutions of a network."""

    single: Convolution  # for one model on a batch: the server
    stacked: Convolution  # for many models, each with its own kernel, in a loop or under `vmap`: the clients


def direct_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """Convolution of `x` [n, H, W, in] with `kernel` [kh, kw, in, out], zero padding on every side."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def patches_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`direct_conv` as one matmul over patches.

    Under `vmap` over kernels it becomes a batched matmul. A convolution would become a grouped convolution,
    which is about two hundred times slower on a CPU.
    """
    return _patches(x, kernel, stride, padding) @ kernel.reshape(-1, kernel.shape[-1])


_FEW_CHANNELS = 3  # of images: their patches are small


def grouped_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`direct_conv`, or `patches_conv` where patches are cheap. For GPUs and TPUs.

    Under `vmap` over kernels, the first becomes a grouped convolution. On an H100, a step of the headline
    (docs/speed.md) takes 5.4 ms in this form and 6.1 ms with patches, which are nine times as large as the
    images. By the estimate of the compiler for a TPU v5e, two 3x3 convolutions between 64 channels of 100
    clients with one image each, forward and backward in bfloat16, take 5.7 M cycles in this form, and 10.2 M
    with patches. A first layer, from 3 channels, takes 1.8 M as a grouped convolution and 0.2 M with patches.
    """
    if kernel.shape[:2] == (1, 1) or kernel.shape[2] <= _FEW_CHANNELS:
        return patches_conv(x, kernel, stride=stride, padding=padding)
    return direct_conv(x, kernel, stride=stride, padding=padding)


def _patches(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    """The patches of `x` that the kernel is applied to: [n, h, w, kh * kw * in]."""
    kh, kw = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return jnp.concatenate(windows(x, kh, kw, stride), axis=-1)


def windows(x: Array, kh: int, kw: int, stride: int) -> list[Array]:
    """The pixels that each of the kh * kw entries of a kernel multiplies, row by row: [n, h, w, C] each."""
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    return [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]


LANES = 128  # of a TPU's registers, which the innermost dimension of an array fills


def images_in_lanes(x: Array) -> Array:
    """`x` [n, H, W, C] with images innermost in memory, if they fill a TPU's lanes better than channels.

    XLA lays out a convolution in this way by itself. But it lays out norms and sums of blocks like their
    input, and then copies between the two. A constraint on the input of all blocks spares the copies. By the
    estimate of the compiler for a TPU v5e, a step of the headline (docs/preflight.md) takes 32.1 instead of
    41.7 M cycles.
    """

    def filled(size: int) -> float:
        return size / (LANES * math.ceil(size / LANES))

    # `jax.export` may leave the number of images open.
    if not isinstance(x.shape[0], int) or filled(x.shape[0]) <= filled(x.shape[-1]):
        return x
    # Without the first constraint, what comes before would be laid out in this way too.
    x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 2, 3)))
    return with_layout_constraint(x, Layout(major_to_minor=(1, 2, 3, 0)))


def depthwise_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """Convolution of each channel of `x` [n, H, W, C] with its own slice of `kernel` [kh, kw, 1, C].

    It is computed in the dtype of the kernel. The result and the gradient of `x` are rounded to the dtype of
    `x`, which may be bfloat16. Shifts, multiplications and additions are seventeen times as fast on a CPU as
    a grouped convolution (8 and 132 ms for [200, 16, 16, 96] on two cores), and still faster with gradients.
    """
    kh, kw, _, channels = kernel.shape
    dtype, x = x.dtype, x.astype(kernel.dtype)
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    weights = kernel.reshape(kh * kw, 1, 1, 1, channels)
    return sum(
        (window * weight for window, weight in zip(windows(x, kh, kw, stride), weights, strict=True)),
        start=jnp.zeros((), x.dtype),
    ).astype(dtype)


def transposed_conv(x: Array, kernel: Array) -> Array:
    """Transposed 3x3 convolution of stride 2: pixel (y, x) adds to the 3x3 pixels around (2y, 2x).

    PyTorch's ConvTranspose2d with padding 1 and output padding 1: `x` [n, H, W, in] and `kernel`
    [3, 3, in, out] give [n, 2H, 2W, out].

    Output pixels come in squares of four, and each square is one product of a matrix and the four input
    pixels at (y, x), to its right and below. On one CPU core, with gradients, it takes 11 ms for
    [100, 16, 16, 16]; a convolution of the image with zeros between its pixels takes 168 ms.
    """
    (n, height, width, channels), features = x.shape, kernel.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    pixels = jnp.concatenate([x[:, i : i + height, j : j + width] for i, j in _SQUARE], axis=-1)
    # Along one axis: by which entry of the kernel an input pixel reaches an output pixel of the square.
    entry = {(0, 0): 1, (0, 1): 2, (1, 1): 0}
    nothing = jnp.zeros((channels, features), kernel.dtype)

    def block(pixel: tuple[int, int], output: tuple[int, int]) -> Array:
        row, column = (entry.get(pair) for pair in zip(pixel, output, strict=True))
        return nothing if row is None or column is None else kernel[row, column]

    matrix = jnp.concatenate([jnp.concatenate([block(i, o) for o in _SQUARE], axis=1) for i in _SQUARE])
    out = matmul(pixels, matrix).reshape(n, height, width, 2, 2, features)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, features)


_SQUARE = ((0, 0), (0, 1), (1, 0), (1, 1))  # a pixel, and those to its right and below


# --- on a CPU

CACHE_ELEMENTS = 2**20  # of one intermediate result, so that it stays in the cache
LEAST_CHANNELS = 32  # for Winograd: the fewer, the more of its time goes into the transforms


def cpu_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`direct_conv` of one model, in the form that is fastest on a CPU."""
    kh = kernel.shape[0]
    # If the output is smaller than the kernel, XLA exchanges image and kernel, which takes ten times as long
    # as a matmul (2x2 images of 128 channels).
    small = (x.shape[1] + 2 * padding - kh) // stride + 1 < kh
    if kh == 1 or small or _suits_winograd(x, kernel, stride, padding):
        return matmul_conv(x, kernel, stride=stride, padding=padding)
    return direct_conv(x, kernel, stride=stride, padding=padding)


def matmul_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`direct_conv` by matmuls alone. In a loop of the program, XLA's convolution is twenty times slower."""
    if _suits_winograd(x, kernel, stride, padding):
        return winograd_conv(x, kernel)
    return matmul(_patches(x, kernel, stride, padding), kernel.reshape(-1, kernel.shape[-1]))


def _suits_winograd(x: Array, kernel: Array, stride: int, padding: int) -> bool:
    _, height, width, channels = x.shape
    even = height % 2 == width % 2 == 0
    many = min(channels, kernel.shape[-1]) >= LEAST_CHANNELS
    exact = x.dtype.itemsize >= 4  # in bfloat16 the sums of the transforms would be rounded
    return kernel.shape[:2] == (3, 3) and stride == padding == 1 and even and many and exact


@jax.custom_vjp
def matmul(x: Array, matrix: Array) -> Array:
    """`x` [..., in] times `matrix` [in, out]. The gradient of `matrix` does not transpose `x` in memory."""
    return x @ matrix


def _matmul_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, matrix = saved
    return grad @ matrix.T, _rows(x).T @ _rows(grad)


matmul.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _matmul_bwd)


def _rows(x: Array) -> Array:
    """`x` [..., C] as a matrix. The barrier keeps it in memory; a matmul would otherwise compute it again."""
    return jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]))


# Winograd's F(2x2, 3x3), output tiles of 2x2 from input tiles of 4x4 (Lavin and Gray, CVPR 2016).
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

Grid = Sequence[Sequence[Array]]  # a small matrix whose entries are arrays


@jax.custom_vjp
def winograd_conv(x: Array, kernel: Array) -> Array:
    """`direct_conv` with a 3x3 kernel, stride 1 and padding 1, by 2.25 times fewer multiplications.

    Tiles and kernel are transformed, each of the 16 entries of a tile is one matmul over channels, and the
    products are transformed back. It works on a few images at a time, so that the tiles stay in the cache.
    The rounding error is that of a direct convolution.

    Args:
      x: [n, H, W, in], H and W even.
      kernel: [3, 3, in, out].
    """
    return _winograd(x, _sandwich(_KERNEL, kernel))


def _winograd(x: Array, kernel: Grid) -> Array:
    """`winograd_conv` with a transformed kernel, 4 by 4 of [in, out]."""

    def conv(x: Array) -> Array:
        return _join(_sandwich(_OUTPUT, _pairwise(jnp.matmul, _tiles(x), kernel)))

    return _in_chunks(conv, x, images=_images_at_once(x, kernel[0][0].shape[1]))


def _winograd_bwd(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved

    def kernel_grad(x: Array, grad: Array) -> Grid:
        """The gradient of the transformed kernel: 4 by 4 of [in, out]."""
        return _pairwise(
            lambda tiles, of_product: _rows(tiles).T @ _rows(of_product),
            _tiles(x),
            _sandwich(_OUTPUT.T, _split(grad)),
        )

    of_kernel = _sandwich(
        _KERNEL.T, _sum_of_chunks(kernel_grad, (x, grad), _images_at_once(x, grad.shape[-1]))
    )
    # The gradient of x is a convolution with the rotated kernel. Rotation exchanges the first and the last
    # row of the transformed kernel, and the first and the last column.
    transformed = _sandwich(_KERNEL, kernel)
    turned = [[transformed[i][j].T for j in (3, 1, 2, 0)] for i in (3, 1, 2, 0)]
    return _winograd(grad, turned), jnp.stack([jnp.stack(row) for row in of_kernel])


winograd_conv.defvjp(lambda x, kernel: (winograd_conv(x, kernel), (x, kernel)), _winograd_bwd)


def _tiles(x: Array) -> Grid:
    """The transformed 4x4 tiles, two pixels apart, of `x` [n, H, W, C]: 4 by 4 of [n, H / 2, W / 2, C]."""
    pixels = windows(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), 4, 4, 2)
    return _sandwich(_INPUT, [pixels[i : i + 4] for i in range(0, 16, 4)])


def _split(x: Array) -> Grid:
    """`x` [n, H, W, C] as 2x2 tiles: 2 by 2 of [n, H / 2, W / 2, C]."""
    return [[x[:, i::2, j::2] for j in range(2)] for i in range(2)]


def _join(tiles: Grid) -> Array:
    """The inverse of `_split`."""
    n, height, width, channels = tiles[0][0].shape
    rows = [jnp.stack(row, axis=3) for row in tiles]
    return jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, channels)


def _sandwich(matrix: np.ndarray, grid: Grid | Array) -> Grid:
    """matrix @ grid @ matrix.T, written as sums, since most entries of `matrix` are 0, 1 or -1."""

    def combine(row: np.ndarray, arrays: Sequence[Array]) -> Array:
        terms = [a if c == 1 else -a if c == -1 else c * a for c, a in zip(row, arrays, strict=True) if c]
        return sum(terms[1:], start=terms[0])

    half = [[combine(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[combine(row, arrays) for row in matrix] for arrays in half]


def _pairwise(function: Callable[[Array, Array], Array], left: Grid, right: Grid) -> Grid:
    """function(a, b) of the entries at the same place of two grids."""
    return [[function(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def _images_at_once(x: Array, features: int) -> int:
    """Images that Winograd works on at a time: few enough for the cache, and enough for tall matmuls."""
    _, height, width, channels = x.shape
    most = max(channels, features)
    return max(CACHE_ELEMENTS // (4 * height * width * most), 2 * most // (height * width // 4))


def _chunk(n: int, wanted: int) -> int:
    """The divisor of n that is closest to `wanted`, by ratio. An n that is not known yet is not divided."""
    if not isinstance(n, int):  # a symbolic dimension of `jax.export`
        return n
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / max(1, wanted))))


def _chunks(x: Array, size: int) -> Array:
    return x.reshape(-1, size, *x.shape[1:])


def _in_chunks(function: Callable[[Array], Array], x: Array, images: int) -> Array:
    """function(x), a function of each image by itself, on about `images` of the n images at a time."""
    n = x.shape[0]
    size = _chunk(n, images)
    if size == n:
        return function(x)
    out = jax.lax.map(function, _chunks(x, size))
    return out.reshape(n, *out.shape[2:])


def _sum_of_chunks(function: Callable[..., Grid], xs: tuple[Array, ...], images: int) -> Grid:
    """function(*xs), a sum over images, on about `images` of them at a time."""
    size = _chunk(len(xs[0]), images)
    if size == len(xs[0]):
        return function(*xs)
    chunks = [_chunks(x, size) for x in xs]
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *(x[0] for x in chunks))
    )

    def add(totals: Grid, chunk: list[Array]) -> tuple[Grid, None]:
        return jax.tree.map(jnp.add, totals, function(*chunk)), None

    return jax.lax.scan(add, zeros, chunks)[0]
