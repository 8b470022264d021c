"""Views against PIL and torchvision: each operation separately, then the statistics of 20,000 draws.

`golden/augmentations` holds the results of torchvision's transforms on six 32x32 PIL images. PIL rounds each
step to uint8, so an exact result differs by up to 1 / 255, and by 0.4 / 255 on average where PIL truncates.
"""

import colorsys
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.typing import ArrayLike
from PIL import Image

from mocosfl_jax.data import canvas
from mocosfl_jax.errors import UserError
from mocosfl_jax.feed import augment as aug

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DRAWS = 20_000
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    with np.load(GOLDEN / "augmentations.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def settings() -> Any:
    return json.loads((GOLDEN / "augmentations.json").read_text())


@pytest.fixture(scope="module")
def images(arrays: Arrays) -> np.ndarray:
    return arrays["images"].astype(np.float32) / 255


def error(image: ArrayLike, golden: np.ndarray) -> np.ndarray:
    """|image - golden| in units of 1 / 255."""
    return np.abs(np.asarray(image) * 255 - golden)


# --- single operations


def test_resized_crop_equals_pil(arrays: Arrays, settings: dict[str, Any], images: np.ndarray) -> None:
    for i, box in enumerate(settings["crop_boxes_top_left_height_width"]):
        cropped = aug.resized_crop(images[i], aug.Box(*box), 32)
        assert error(cropped, arrays[f"resized_crop.{i}"]).max() <= 1.01


def test_resized_crop_shrinks_with_antialiasing() -> None:
    # Stripes much narrower than an output pixel average to gray; without antialiasing only two pixels count.
    stripes = np.indices((32, 48)).sum(0) % 4 < 2
    board = jnp.asarray(np.broadcast_to(stripes[..., None], (32, 48, 3)), jnp.float32)
    small = np.asarray(aug.resized_crop(board, aug.Box(0, 0, 32, 48), 4))
    assert abs(small - 0.5).max() < 0.1
    whole = np.asarray(aug.resized_crop(board, aug.Box(0, 8, 32, 32), 32))
    np.testing.assert_allclose(whole, board[:, 8:40], atol=1e-6)


# Measured, in 1 / 255. Blends: at most 1.09. Hue: at most 9.8, 0.82 on average, because PIL keeps hue,
# saturation and value in one byte each, and one step of hue is up to 6 / 255 of a channel. The hue test
# against colorsys is exact. Blur: at most 11.9, 0.9 on average, because PIL uses three box filters, each of
# which extends the edge.
def blended(op: int) -> Callable[[Any, float], Any]:
    """The jitter with one of its blends alone: 0 brightness, 1 contrast, 2 saturation."""
    return lambda image, factor: aug.color_jitter(
        jnp.asarray(image), jnp.ones(3).at[op].set(factor), 0.0, jnp.arange(3), 3
    )


@pytest.mark.parametrize(
    ("name", "adjust", "largest", "average"),
    [
        ("brightness", blended(0), 1.2, 0.6),
        ("contrast", blended(1), 1.2, 0.6),
        ("saturation", blended(2), 1.2, 0.6),
        ("hue", aug.adjust_hue, 10, 0.9),
        ("gaussian_blur", aug.gaussian_blur, 12, 1.0),
    ],
)
def test_adjustments_equal_pil(
    arrays: Arrays,
    settings: dict[str, Any],
    images: np.ndarray,
    name: str,
    adjust: Callable[..., Array],
    largest: float,
    average: float,
) -> None:
    factors = [case for case in settings["factors"] if case["op"] == name]
    assert len(factors) == 6
    for case in factors:
        wrong = error(adjust(images[case["image"]], case["value"]), arrays[f"{name}.{case['image']}"])
        assert wrong.max() <= largest and wrong.mean() <= average, case


def test_grayscale_and_flip_equal_pil(arrays: Arrays, images: np.ndarray) -> None:
    for i, image in enumerate(images):
        assert error(aug.grayscale(image), arrays[f"grayscale.{i}"]).max() <= 0.51
        np.testing.assert_array_equal(error(aug.horizontal_flip(jnp.asarray(image)), arrays[f"hflip.{i}"]), 0)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.1])
def test_hue_equals_colorsys(shift: float) -> None:
    grid = np.array(
        list(itertools.product((0.0, 0.2, 0.5, 0.9, 1.0), repeat=3)), np.float32
    )  # includes ties and grays
    expected = []
    for pixel in grid.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value))
    turned = aug.adjust_hue(jnp.asarray(grid)[None], shift)[0]
    np.testing.assert_allclose(turned, expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(32, 32), (5, 20)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_with_extended_edges(sigma: float, shape: tuple[int, int]) -> None:
    image = np.random.default_rng(0).uniform(size=(*shape, 3))
    taps = np.arange(-8, 9)
    weights = np.exp(-0.5 * (taps / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image, ((8, 8), (8, 8), (0, 0)), mode="edge")
    rows = sum(w * padded[8 + t : 8 + t + shape[0]] for w, t in zip(weights, taps, strict=True))
    expected = sum(w * rows[:, 8 + t : 8 + t + shape[1]] for w, t in zip(weights, taps, strict=True))
    np.testing.assert_allclose(aug.gaussian_blur(jnp.asarray(image, jnp.float32), sigma), expected, atol=1e-5)


def test_color_jitter_can_apply_its_four_adjustments_in_every_order(images: np.ndarray) -> None:
    # The values are stretched so that every adjustment clips; otherwise some would commute.
    image = jnp.clip(2 * images[0] - 0.5, 0, 1)
    factors, shift = (1.4, 1.3, 1.4), 0.1
    adjust = [blended(0), blended(1), blended(2), aug.adjust_hue]
    jitter = jax.jit(aug.color_jitter)
    orders, results = set(), []
    for order, slot in itertools.product(itertools.permutations(range(3)), range(4)):
        sequence = (*order[:slot], 3, *order[slot:])
        expected = image
        for op in sequence:
            expected = adjust[op](expected, (*factors, shift)[op])
        result = jitter(image, jnp.array(factors), shift, jnp.array(order), slot)
        np.testing.assert_allclose(result, expected, atol=1e-5)
        orders.add(sequence)
        results.append(np.asarray(result))
    assert orders == set(itertools.permutations(range(4)))
    assert all(abs(one - other).max() > 1e-3 for one, other in itertools.combinations(results, 2))


def test_flip_commutes_with_what_follows_it(images: np.ndarray) -> None:
    # One position of the flip therefore serves both versions, though torchvision's v2 has it last.
    image = jnp.asarray(images[3])
    jitter = partial(
        aug.color_jitter, factors=jnp.array([0.7, 1.4, 1.2]), hue_shift=0.1, order=jnp.arange(3), hue_slot=1
    )
    for then in (jitter, aug.grayscale, partial(aug.gaussian_blur, sigma=1.5)):
        flipped_last = aug.horizontal_flip(then(image))
        np.testing.assert_allclose(then(aug.horizontal_flip(image)), flipped_last, atol=1e-6)


# --- random draws


def sample_boxes(height: int, width: int, min_scale: float = 0.08) -> np.ndarray:
    draw = jax.jit(jax.vmap(partial(aug.sample_crop_box, height=height, width=width, min_scale=min_scale)))
    return np.stack(draw(jax.random.split(jax.random.key(3), DRAWS)), axis=1)


def test_crop_boxes_have_torchvisions_distribution(settings: dict[str, Any]) -> None:
    golden = settings["statistics"]
    boxes = sample_boxes(32, 32)
    assert boxes.dtype == np.int32
    top, left, height, width = boxes.T
    assert (boxes >= [0, 0, 1, 1]).all() and (top + height <= 32).all() and (left + width <= 32).all()
    std = np.array(golden["crop_top_left_height_width_std"])
    # Four standard errors of the difference between two samples; half a pixel on a side would be eight.
    error_mean = std * math.sqrt(2 / DRAWS)
    assert (abs(boxes.mean(0) - golden["crop_top_left_height_width_mean"]) < 4 * error_mean).all()
    assert (abs(boxes.std(0) - std) < 4 * error_mean).all()
    quantiles = (0.1, 0.5, 0.9)
    # Boxes have whole pixels, so quantiles move in steps.
    area = np.quantile(height * width / 32**2, quantiles)
    np.testing.assert_allclose(area, golden["crop_area_fraction_quantiles_10_50_90"], atol=0.015)
    aspect = np.quantile(width / height, quantiles)
    np.testing.assert_allclose(aspect, golden["crop_aspect_w_over_h_quantiles_10_50_90"], atol=0.01)


def torchvision_box(rng: np.random.Generator, height: int, width: int, min_scale: float) -> tuple[int, ...]:
    """Top, left, height and width as `torchvision.transforms.RandomResizedCrop.get_params` draws them."""
    for _ in range(10):
        target_area = height * width * rng.uniform(min_scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(target_area * ratio))
        h = round(math.sqrt(target_area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def largest_gap(one: np.ndarray, other: np.ndarray) -> float:
    """Between the cumulative distributions of two samples (Kolmogorov and Smirnov)."""
    values = np.union1d(one, other)
    shares = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (one, other)]
    return float(abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(
    ("height", "width", "min_scale"),
    [(375, 500, 0.08), (500, 375, 0.2), (448, 448, 0.08), (24, 24, 0.5), (40, 90, 0.08), (30, 10, 0.3)],
)
def test_crop_boxes_follow_torchvisions_definition(height: int, width: int, min_scale: float) -> None:
    """In images of any shape, also long ones, in which many tries do not fit."""
    boxes = sample_boxes(height, width, min_scale)
    rng = np.random.default_rng(0)
    expected = np.array([torchvision_box(rng, height, width, min_scale) for _ in range(DRAWS)])
    # Two samples of one distribution have a larger gap once in 10,000 times; there are 36 here.
    limit = math.sqrt(-math.log(1e-4 / 2) / DRAWS)
    for measure in (
        *(lambda x, side=side: x[:, side] for side in range(4)),
        lambda x: x[:, 2] * x[:, 3],
        lambda x: x[:, 3] / x[:, 2],
    ):
        assert largest_gap(measure(boxes), measure(expected)) < limit


@pytest.mark.parametrize(
    ("height", "width", "centred"),
    [
        (10, 40, (0, 13, 10, 13)),
        (40, 10, (13, 0, 13, 10)),
        (32, 32, (0, 0, 32, 32)),
        (30, 36, (0, 0, 30, 36)),
    ],
)
def test_boxes_that_cannot_fit_become_the_largest_centred_one(
    height: int, width: int, centred: tuple[int, int, int, int]
) -> None:
    # No box of an allowed ratio has the area of a long image. In the other cases only the whole image fits,
    # or a box whose side was rounded down by a pixel.
    boxes = sample_boxes(height, width, min_scale=1.0)
    np.testing.assert_allclose(boxes, np.broadcast_to(centred, boxes.shape), atol=1 if height == 30 else 0)


@cache  # compiles once
def view_sampler(size: int, version: str, min_crop_scale: float) -> Callable[..., Array]:
    view = partial(aug.augment, size=size, version=version, min_crop_scale=min_crop_scale)
    return jax.jit(jax.vmap(view, in_axes=(0, None)))


def draw_views(image: Array, version: str, min_crop_scale: float = 0.08) -> np.ndarray:
    """Draw views of one image, 1,000 at a time."""
    sampler = view_sampler(image.shape[0], version, min_crop_scale)
    rngs = jax.random.split(jax.random.key(5), (DRAWS // 1000, 1000))
    return np.concatenate([np.asarray(sampler(chunk, image)) for chunk in rngs])


def test_probability_and_strength_of_brightness() -> None:
    # On a plain gray image every operation but brightness is the identity.
    views = draw_views(jnp.full((16, 16, 3), 0.5), "v2", min_crop_scale=1.0)
    assert np.ptp(views, axis=(1, 2, 3)).max() < 1e-5
    assert_jitter_law(views[:, 0, 0, 0] / 0.5)


def assert_jitter_law(factors: np.ndarray) -> None:
    """Assert that factors are uniform in 0.6..1.4 with probability 0.8, else 1."""
    jittered = np.sort(factors[abs(factors - 1) > 1e-4])
    # Binomial: four standard deviations of 20,000 draws.
    assert abs(len(jittered) / DRAWS - 0.8) < 4 * math.sqrt(0.8 * 0.2 / DRAWS)
    # Kolmogorov-Smirnov; 1.95 / sqrt(n) is exceeded once in a thousand samples.
    law = (jittered - 0.6) / 0.8
    assert abs(law - (np.arange(len(law)) + 0.5) / len(law)).max() < 1.95 / math.sqrt(len(law))


def test_probability_and_strength_of_saturation_and_grayscale() -> None:
    # On a plain, nearly gray image contrast acts like saturation, and brightness does not alter the ratio of
    # chroma to luma; hue alters the luma by one percent.
    color = jnp.array([0.51, 0.49, 0.49])
    pixels = draw_views(jnp.broadcast_to(color, (16, 16, 3)), "v2", min_crop_scale=1.0)[:, 0, 0]
    saturations = (
        np.ptp(pixels, axis=1) / (pixels @ np.array(aug.LUMA)) / (0.02 / (0.49 + 0.02 * aug.LUMA[0]))
    )
    gray = saturations < 0.1
    assert abs(gray.mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / DRAWS)
    # Product of two factors uniform in 0.6..1.4, each of variance 0.64 / 12; no jitter with probability 0.2.
    moment = 1 + 0.64 / 12
    expected = math.sqrt(0.8 * (moment**2 - 1))
    assert saturations[~gray].mean() == pytest.approx(1, abs=0.015)
    assert saturations[~gray].std() == pytest.approx(expected, rel=0.03)


def test_probability_of_flip_contrast_and_blur() -> None:
    # A step between two grays, always inside the view: jitter moves the grays, the flip swaps them, and blur
    # smears them.
    step = jnp.broadcast_to(jnp.where(jnp.arange(16) < 8, 0.4, 0.6)[None, :, None], (16, 16, 3))
    views = draw_views(step, "v2", min_crop_scale=1.0)
    flipped = views[:, 0, 0, 0] > views[:, 0, -1, 0]
    assert abs(flipped.mean() - 0.5) < 4 * math.sqrt(0.25 / DRAWS)
    # Contrast keeps the mean gray, and brightness keeps ratios.
    dark, light = np.sort(views[:, 0, [0, -1], 0], axis=1).T
    assert_jitter_law((light - dark) / (light + dark) * (1.0 / 0.2))
    # A sigma of 0.3 smears a pixel by 0.4 %, so 0.1..0.3 is not detected: 1.7 / 1.9 of one half.
    sorted_views = np.sort(views[:, 0, :, 0], axis=1)
    smeared = (sorted_views[:, 7] - sorted_views[:, 0]) / (sorted_views[:, 15] - sorted_views[:, 0])
    threshold = math.exp(-0.5 / 0.3**2) / (1 + 2 * math.exp(-0.5 / 0.3**2))
    share = 0.5 * 1.7 / 1.9
    assert abs((smeared > threshold).mean() - share) < 4 * math.sqrt(share * (1 - share) / DRAWS)
    # The widest blur: a sigma close to 2 puts this share of the Gaussian beyond the step.
    taps = np.exp(-0.5 * (np.arange(-8, 9) / 2) ** 2)
    assert smeared.max() == pytest.approx(taps[9:].sum() / taps.sum(), abs=2e-3)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("image", [0, 3])
def test_statistics_of_the_pipeline_equal_torchvision(
    arrays: Arrays, settings: dict[str, Any], images: np.ndarray, version: str, image: int
) -> None:
    name = f"moco{version}.{image}"
    golden, mean, std = (
        settings["statistics"][name],
        arrays[f"{name}.mean_image"],
        arrays[f"{name}.std_image"],
    )
    views = draw_views(jnp.asarray(images[image]), version)
    assert views.dtype == np.float32 and views.min() >= 0 and views.max() <= 1 + 1e-6

    # PIL truncates after each of three blends, drawn with p 0.8, so it is darker by 0.8 * 3 * 0.4 = 1 / 255.
    # The brightness of a whole view varies most: the standard error of the difference is 0.2 / 255.
    brightness = views.mean((1, 2), dtype=np.float64)
    error_mean = brightness.std(0) * math.sqrt(2 / DRAWS)
    darker = brightness.mean(0) - golden["mean"]
    assert (abs(darker - 1 / 255) < 4 * error_mean).all()
    np.testing.assert_allclose(mean.mean((0, 1)), golden["mean"], atol=1e-5)

    # Pixels, without that common part. There are 3,072 pixels, hence five standard errors.
    # In chunks of 1,000: float32 sums of 20,000 would be too coarse, float64 copies too large.
    chunks = np.split(views, DRAWS // 1000)
    mean_views = np.mean([chunk.mean(0) for chunk in chunks], axis=0)
    std_views = np.sqrt(np.mean([np.square(chunk - mean_views).mean(0) for chunk in chunks], axis=0))
    pattern = (mean_views - mean) - darker[None, None, :]
    assert (abs(pattern) / (std * math.sqrt(2 / DRAWS))).max() < 5
    # A standard deviation has the relative error 1 / sqrt(2 n), a difference of two 0.7 %: four of these for
    # each pixel, three for the average, where little cancels because the pixels of a view vary together.
    assert abs(std_views / std - 1).max() < 0.03
    assert abs((std_views / std).mean() - 1) < 0.02

    gray = np.ptp(views[:, ::4, ::4], axis=-1).max((1, 2)) < 1e-3
    assert abs(gray.mean() - golden["gray_fraction"]) < 4 * math.sqrt(0.2 * 0.8 * 2 / DRAWS)

    # Sharpness of the views. PIL's rounding adds noise to smooth images: 1 % on top of four standard errors.
    steps = abs(np.diff(views, axis=2)).mean((1, 2, 3))
    expected = golden["mean_abs_horizontal_difference"]
    assert abs(steps.mean() - expected) < 4 * steps.std() * math.sqrt(2 / DRAWS) + 0.01 * expected


# --- contracts


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@partial(jax.jit, static_argnames="size")
def two_views(rng: Array, images: Array, size: int = 32) -> aug.Views:
    return aug.two_views(rng, images, size=size, version="v2", min_crop_scale=0.08, mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def client_images(arrays: Arrays) -> Array:
    return jnp.asarray(arrays["images"].reshape(3, 2, 32, 32, 3))


def test_views_are_independent_and_determined_by_the_rng(client_images: Array) -> None:
    views = two_views(jax.random.key(0), client_images)
    for view in views:
        assert view.shape == (3, 2, 32, 32, 3) and view.dtype == jnp.float32
        pixels = np.asarray(view) * np.array(STD, np.float32) + np.array(MEAN, np.float32)
        assert pixels.min() > -1e-5 and pixels.max() < 1 + 1e-5
    again = two_views(jax.random.key(0), client_images)
    other = two_views(jax.random.key(1), client_images)
    for name in ("query", "key"):
        np.testing.assert_array_equal(getattr(views, name), getattr(again, name))
        assert abs(getattr(views, name) - getattr(other, name)).max() > 0.1
    # The same image in all places: all twelve views still differ.
    same = two_views(jax.random.key(0), jnp.broadcast_to(client_images[:1, :1], client_images.shape))
    flat = np.concatenate(same).reshape(12, -1)
    assert all(abs(one - other).max() > 0.01 for one, other in itertools.combinations(flat, 2))


def test_a_view_depends_on_its_own_image_only(client_images: Array) -> None:
    views = two_views(jax.random.key(0), client_images)
    changed = two_views(jax.random.key(0), client_images.at[1, 0].set(7))
    same = np.ones((3, 2), bool)
    same[1, 0] = False
    for before, after in zip(views, changed, strict=True):
        np.testing.assert_array_equal((np.asarray(before) == np.asarray(after)).all((2, 3, 4)), same)


def test_vmapped_views_equal_a_loop(images: np.ndarray) -> None:
    image = jnp.asarray(images[3])
    one = jax.jit(partial(aug.augment, size=32, version="v2", min_crop_scale=0.08))
    rngs = jax.random.split(jax.random.key(2), 1000)
    batch = view_sampler(32, "v2", 0.08)(rngs, image)
    for rng, view in zip(rngs[:20], batch[:20], strict=True):
        np.testing.assert_allclose(one(rng, image), view, atol=1e-5)


def test_float32_in_x64_mode(client_images: Array) -> None:
    with jax.enable_x64(True):
        program = jax.make_jaxpr(two_views)(jax.random.key(0), client_images)
        assert aug.normalise(client_images, MEAN, STD).dtype == jnp.float32
    assert all(view.dtype == jnp.float32 for view in program.out_avals)
    assert not re.search(r"f64\[\d", str(program))  # matches arrays; "f64[]" are constants


def test_normalise(client_images: Array) -> None:
    expected = (np.asarray(client_images) / 255.0 - MEAN) / STD
    for images in (client_images, client_images.astype(jnp.float32) / 255):
        normalised = aug.normalise(images, MEAN, STD)
        assert normalised.dtype == jnp.float32
        np.testing.assert_allclose(normalised, expected, atol=1e-5)


def test_one_picture_in_any_type_is_the_same_or_refused(arrays: Arrays) -> None:
    """Integers that are not uint8, and floats in 0..255, would come out a thousand times too large."""
    picture = arrays["images"][:2].reshape(1, 2, 32, 32, 3)
    plain = partial(aug.normalise, mean=MEAN, std=STD)
    drawn = partial(two_views, jax.random.key(0))
    want, views = plain(picture), drawn(picture)
    assert abs(np.asarray(views.query)).max() < 3
    np.testing.assert_allclose(plain((picture / 255).tolist()), want, atol=1e-5)
    for floats in (np.float16, np.float32, np.float64):
        np.testing.assert_allclose(plain((picture / 255).astype(floats)), want, atol=2e-3)
        np.testing.assert_allclose(drawn((picture / 255).astype(floats)).query, views.query, atol=2e-2)
    np.testing.assert_allclose(
        plain(np.array([1.1, -0.1, 1.0])), np.array([3.01, -2.92, 2.76]), atol=0.01
    )  # resized
    for other in (np.int8, np.int16, np.uint16, np.int32, np.int64, np.uint32, bool):
        name = np.dtype(other).name
        with pytest.raises(UserError, match=f"images: found {name}, allowed: uint8 in 0..255, or floats"):
            plain(picture.astype(other))
    for found in (picture.tolist(), jnp.asarray(picture, jnp.int32)):
        with pytest.raises(UserError, match=r"images: found int\d\d, allowed: uint8"):
            plain(found)
    with pytest.raises(UserError, match="images: found int16"):
        drawn(picture.astype(np.int16))
    largest = picture.max()
    with pytest.raises(UserError, match=f"images: found float32 up to {largest}, allowed: uint8"):
        plain(picture.astype(np.float32))
    with pytest.raises(UserError, match=f"images: found float64 up to {largest}, allowed: uint8"):
        aug.two_views(jax.random.key(0), picture * 1.0, size=32, mean=MEAN, std=STD)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rng, shape, size, message",
    [
        (jax.random.key(0), (2, 8, 8, 3), 8, "images: found shape (2, 8, 8, 3), allowed: [M, B, H, W, 3]"),
        (jax.random.key(0), (1, 2, 3, 8, 8), 8, "images: found shape (1, 2, 3, 8, 8), allowed"),
        (jax.random.key(0), (1, 2, 8, 8, 1), 8, "images: found shape (1, 2, 8, 8, 1), allowed"),
        (jax.random.key(0), (1, 2, 8, 8, 3), 0, "size: found 0, allowed: 1 or more"),
        (jax.random.PRNGKey(0), (1, 2, 8, 8, 3), 8, "rng: found uint32, allowed: a typed key"),
        (0, (1, 2, 8, 8, 3), 8, "rng: found int32, allowed: a typed key"),  # the function is jitted
    ],
)
def test_what_is_no_batch_of_clients_or_no_key_is_refused(
    rng: Any, shape: tuple[int, ...], size: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        two_views(rng, jnp.zeros(shape, jnp.uint8), size=size)
    assert message in str(error.value)


def test_images_of_any_shape() -> None:
    images = jnp.zeros((2, 1, 40, 56, 3), jnp.uint8)
    views = jax.eval_shape(partial(two_views, size=24), jax.random.key(0), images)
    assert views.query.shape == views.key.shape == (2, 1, 24, 24, 3)


def views_of_canvas(picture: np.ndarray, size: int, min_crop_scale: float = 0.08) -> np.ndarray:
    """[2, 16, size, size, 3]: query and key views of 16 times the same picture, on canvases."""
    painted = canvas.paint(Image.fromarray(picture), size)
    draw = jax.jit(partial(aug.two_views_of_canvases, size=size, min_crop_scale=min_crop_scale, **PLAIN))
    return np.stack(draw(jax.random.key(7), jnp.asarray(np.tile(painted, (2, 8, 1, 1, 1))))).reshape(
        2, 16, size, size, 3
    )


def views_of_whole(picture: np.ndarray, size: int, min_crop_scale: float = 0.08) -> np.ndarray:
    """The same views, each cropped from all pixels of the picture."""
    draw = jax.jit(partial(aug.two_views, size=size, min_crop_scale=min_crop_scale, **PLAIN))
    return np.stack(draw(jax.random.key(7), jnp.asarray(np.tile(picture, (2, 8, 1, 1, 1))))).reshape(
        2, 16, size, size, 3
    )


PLAIN: Any = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "version": "v1"}


@pytest.mark.parametrize("shape", [(32, 32), (20, 31), (32, 7)])
def test_views_of_a_canvas_are_those_of_the_picture(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_allclose(views_of_canvas(picture, 16), views_of_whole(picture, 16), atol=1e-5)


@pytest.mark.parametrize("shape", [(150, 200), (33, 300)])
def test_a_squeezed_picture_gives_nearly_the_same_views(shape: tuple[int, int]) -> None:
    down, right = np.meshgrid(*(np.linspace(0, 1, side) for side in shape), indexing="ij")
    waves = np.stack([np.sin(9 * down), np.cos(7 * right), np.sin(6 * (down + right))], -1)
    picture = (127 + 100 * waves).astype(np.uint8)
    squeezed, whole = views_of_canvas(picture, 32), views_of_whole(picture, 32)
    wrong = np.abs(squeezed - whole)  # the shift of hue amplifies a few
    assert np.quantile(wrong, 0.99) < 0.03 and wrong.mean() < 0.005 and whole.std() > 0.1


def test_a_crop_of_an_odd_picture_has_its_colour() -> None:
    """Squeezed to 16 pixels, crops of these are parts of a pixel."""
    expected = views_of_whole(np.full((8, 8, 3), 200, np.uint8), 8, 1e-4)
    for shape in ((1, 5000), (3, 4000), (1, 1)):
        picture = np.full((*shape, 3), 200, np.uint8)
        views = views_of_canvas(picture, 8, min_crop_scale=1e-4)
        assert np.isfinite(views).all()
        np.testing.assert_allclose(views, expected, atol=1e-5)
    draw = jax.jit(partial(aug.two_views_of_canvases, size=8, **PLAIN))
    broken = np.stack(draw(jax.random.key(0), jnp.zeros((1, 2, *canvas.shape(8)), jnp.uint8)))
    assert (broken == 0).all()  # black
    with pytest.raises(ValueError, match=r"canvases .* of \(8, 8, 3\), \(17, 16, 3\) are needed"):
        draw(jax.random.key(0), jnp.zeros((1, 2, 8, 8, 3), jnp.uint8))


def test_unknown_version_and_scale_are_refused(images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"^version: found 'v3', allowed: v1, v2"):
        aug.augment(jax.random.key(0), images[0], size=32, version="v3", min_crop_scale=0.08)
    for scale in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"^min_crop_scale: found"):
            aug.augment(jax.random.key(0), images[0], size=32, version="v1", min_crop_scale=scale)
