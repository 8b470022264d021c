"""Similarity of images, against scikit-image and loops over windows."""

import numpy as np
import pytest
from skimage import metrics

from mocosfl_jax.privacy.similarity import mse, psnr, ssim, ssim_map


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(3, 20, 16, 3))
    return images, np.clip(images + rng.normal(scale=0.2, size=images.shape), 0, 1)


def test_ssim_equals_scikit_image_inside(pair: tuple[np.ndarray, np.ndarray], x64: None) -> None:
    """Their borders differ: scikit-image mirrors the image there."""
    found = np.asarray(ssim_map(*pair))
    for index, (image, other) in enumerate(zip(*pair, strict=True)):
        _, expected = metrics.structural_similarity(
            image,
            other,
            data_range=1,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        np.testing.assert_allclose(found[index, 5:-5, 5:-5], expected[5:-5, 5:-5], rtol=1e-10)
    np.testing.assert_allclose(ssim(*pair), found.mean((1, 2, 3)), rtol=1e-12)


def test_beyond_the_border_lie_zeros(pair: tuple[np.ndarray, np.ndarray], x64: None) -> None:
    weights = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(weights, weights) / weights.sum() ** 2
    x, y = (np.pad(image[0, :, :, 1], 5)[:11, 3:14] for image in pair)  # around row 0, column 3

    def mean(values: np.ndarray) -> float:
        return float((window * values).sum())

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    np.testing.assert_allclose(ssim_map(*pair)[0, 0, 3, 1], expected, rtol=1e-10)


def test_float32_is_close(pair: tuple[np.ndarray, np.ndarray]) -> None:
    with np.errstate(all="raise"):
        expected = [
            metrics.structural_similarity(
                *images,
                data_range=1,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for images in zip(*pair, strict=True)
        ]
    found = np.asarray(ssim_map(*(images.astype(np.float32) for images in pair)))
    np.testing.assert_allclose(found[:, 5:-5, 5:-5].mean((1, 2, 3)), expected, atol=1e-4)


def test_mse_and_psnr_equal_scikit_image(pair: tuple[np.ndarray, np.ndarray], x64: None) -> None:
    errors, decibels = mse(*pair), psnr(*pair)
    for index, images in enumerate(zip(*pair, strict=True)):
        assert errors[index] == pytest.approx(metrics.mean_squared_error(*images), rel=1e-12)
        expected = metrics.peak_signal_noise_ratio(*images, data_range=1)
        assert decibels[index] == pytest.approx(expected, rel=1e-12)


def test_equal_images_have_100_decibels() -> None:
    """Not infinitely many, which a mean would keep and JSON does not have."""
    black = np.zeros((2, 4, 4, 3))
    others = np.stack([black[0], black[1] + 0.1])
    np.testing.assert_allclose(psnr(black, others), [100, 20], rtol=1e-6)
