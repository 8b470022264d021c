"""What attackers and victims are given, by both protocols."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.privacy import protocol

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def smooth(count: int) -> np.ndarray:
    """Images that JPEG keeps well."""
    colours = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((16, 16))) for c in colours])


def test_clean_images_are_themselves() -> None:
    images = smooth(3)
    given = protocol.clean(images, MEAN, STD)
    np.testing.assert_array_equal(given.truth, images)
    np.testing.assert_allclose(given.inputs, (images / 255 - MEAN) / STD, rtol=1e-5, atol=1e-6)


def test_the_official_attacker_has_right_inputs_and_compressed_targets() -> None:
    images = smooth(3)
    given = protocol.official_attacker(images, MEAN, STD)
    np.testing.assert_array_equal(given.inputs, protocol.clean(images, MEAN, STD).inputs)
    for image, found in zip(images, given.truth, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        np.testing.assert_array_equal(found, np.asarray(Image.open(file)))


def test_the_official_victims_lose_contrast() -> None:
    images = smooth(4)
    given = protocol.official_victims(images, MEAN, STD)
    shrunk = (images / 255 - MEAN) * np.array(STD) / (0.247, 0.243, 0.261) + MEAN
    np.testing.assert_allclose(given.inputs * np.array(STD) + MEAN, shrunk, atol=1e-6)
    assert 0 < np.abs(given.truth / 255 - shrunk).mean() < 0.02  # JPEG changes a little


def test_smashed_data_do_not_depend_on_the_batches() -> None:
    inputs = np.random.default_rng(0).normal(size=(protocol.BATCH + 3, 4, 4, 3)).astype(np.float32)
    found = protocol.smash(lambda x: jnp.cumsum(x, axis=1), inputs)
    np.testing.assert_allclose(found, np.cumsum(inputs, axis=1), rtol=1e-5)


@pytest.mark.parametrize("count", [16, 128, 600])
def test_the_victims_of_a_set_in_order_of_class_are_of_all_classes(count: int) -> None:
    in_order = np.arange(10).repeat(50)
    rows = protocol.victim_rows(in_order, count)
    assert len(set(rows.tolist())) == len(rows) == min(count, 500)
    assert len(set(in_order[rows[:16]].tolist())) >= 6
    shuffled = np.random.default_rng(1).permutation(in_order)
    np.testing.assert_array_equal(protocol.victim_rows(shuffled, count), np.arange(min(count, 500)))
    np.testing.assert_array_equal(protocol.victim_rows(np.zeros(3, int), count), np.arange(3))
