"""Trivial predictors: by loops, and on the official attack's images."""

import numpy as np
import pytest

from mocosfl_jax.data import PUBLISHED
from mocosfl_jax.errors import UserError
from mocosfl_jax.privacy import protocol
from mocosfl_jax.privacy.similarity import mse, psnr, ssim
from mocosfl_jax.privacy.trivial import block_means, constant_colour


def test_blocks_have_their_mean() -> None:
    images = np.random.default_rng(0).uniform(size=(2, 8, 12, 3)).astype(np.float32)
    found = block_means(images, 4)
    for row in (0, 4):
        for column in (0, 4, 8):
            block = np.s_[:, row : row + 4, column : column + 4]
            expected = np.broadcast_to(images[block].mean((1, 2), keepdims=True), (2, 4, 4, 3))
            np.testing.assert_allclose(found[block], expected, rtol=1e-6)


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"block: found 3, allowed: a divisor of 8 and 8"):
        block_means(np.zeros((1, 8, 8, 3)), 3)


# MSE, SSIM, PSNR on the victims of the official code, on the same without JPEG, and on their true pixels.
TABLE = {
    "constant": ((0.0405, 0.415, 14.5), (0.0405, 0.419, 14.5), (0.0629, 0.349, 12.6)),
    32: ((0.0278, 0.440, 16.3), (0.0278, 0.446, 16.3), (0.0431, 0.379, 14.4)),
    16: ((0.0216, 0.456, 17.4), (0.0216, 0.461, 17.4), (0.0334, 0.401, 15.5)),
    8: ((0.0134, 0.528, 19.4), (0.0134, 0.532, 19.4), (0.0208, 0.484, 17.5)),
    4: ((0.0072, 0.697, 22.1), (0.0072, 0.700, 22.0), (0.0111, 0.670, 20.15)),
    2: ((0.0026, 0.8905, 26.5), (0.0026, 0.891, 26.5), (0.0040, 0.880, 24.6)),
}


@pytest.mark.privacy
@pytest.mark.parametrize("predictor", TABLE)
def test_trivial_predictors_on_the_128_official_images(
    predictor: str | int, released: dict[str, np.ndarray]
) -> None:
    images = released["attack_test_images_uint8_nhwc"]
    mean, std = PUBLISHED["cifar10"]
    given = protocol.official_victims(images, mean, std)
    truths = (
        given.truth / np.float32(255),
        np.clip(given.inputs * np.array(std, np.float32) + np.array(mean, np.float32), 0, 1),
        images / np.float32(255),
    )
    for truth, expected in zip(truths, TABLE[predictor], strict=True):
        found = constant_colour(truth, mean) if isinstance(predictor, str) else block_means(truth, predictor)
        numbers = [float(np.mean(measure(found, truth))) for measure in (mse, ssim, psnr)]
        for number, target, unit in zip(numbers, expected, (1e-4, 1e-3, 0.1), strict=True):
            assert number == pytest.approx(target, abs=0.51 * unit)
