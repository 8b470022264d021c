"""The example of fine-tuning in examples/: all layers learn, from labels."""

import pathlib
import runpy
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import Encoder, encode_images, split_model
from mocosfl_jax.weights.encoder_file import Metadata, export_encoder
from tests.support.small_run import CLASSES

NETWORK: dict[str, Any] = {"name": "resnet18", "cut_layer": 1, "width": 4, "key_dim": 8, "image_size": 16}


@pytest.fixture
def example() -> dict[str, Any]:
    return runpy.run_path(str(pathlib.Path(__file__).parents[2] / "examples" / "finetune.py"))


@pytest.fixture
def encoder(short_resnet: None) -> Encoder:
    """A network of random parameters."""
    model = split_model(**NETWORK)
    metadata = Metadata(NETWORK, mean=(0.5,) * 3, std=(0.25,) * 3)
    return Encoder(model, jax.jit(model.init)(jax.random.key(0)), metadata)


def test_all_layers_of_the_backbone_learn(example: dict[str, Any], encoder: Encoder, images: str) -> None:
    with np.load(images) as arrays:
        x, y = arrays["x_train"], arrays["y_train"]
    before = jax.tree.map(np.array, encoder.params)
    params = example["finetune"](encoder, x, y, CLASSES, epochs=20, learning_rate=1e-2)
    assert example["accuracy"](encoder, params, x, y) > 0.9
    (client, server), classifier = params
    for side, old in ((client, before[0]), ({k: v for k, v in server.items() if k != "head"}, before[1])):
        leaves = jax.tree_util.tree_leaves_with_path(side)
        assert leaves
        for path, leaf in leaves:
            was = old
            for key in path:
                was = was[key.key]
            assert np.abs(np.asarray(leaf) - was).max() > 1e-4, path
    jax.tree.map(np.testing.assert_array_equal, server["head"], before[1]["head"])  # it has no part in this
    jax.tree.map(np.testing.assert_array_equal, encoder.params, before)  # the encoder is left as it was
    assert np.abs(classifier["kernel"]).max() > 0


def test_scores_are_a_linear_map_of_the_features(
    example: dict[str, Any], encoder: Encoder, images: str
) -> None:
    with np.load(images) as arrays:
        x = arrays["x_test"]
    kernel, bias = np.random.default_rng(0).normal(size=(8, 3)), np.arange(3.0)[None]
    features = encode_images(encoder, x).backbone
    kernel = np.resize(kernel, (features.shape[1], 3))
    scores = example["logits"](encoder, (encoder.params, {"kernel": kernel, "bias": bias}), x)
    np.testing.assert_allclose(scores, features.astype(float) @ kernel + bias, rtol=1e-3, atol=1e-4)


def test_batches_are_epochs_of_all_images(example: dict[str, Any]) -> None:
    rows = list(example["batches"](10, 5, 3, 0))
    assert [sorted(np.concatenate(rows[i : i + 2]).tolist()) for i in (0, 2, 4)] == 3 * [list(range(10))]
    assert [len(batch) for batch in example["batches"](7, 20, 2, 0)] == [7, 7]


def test_the_program_runs_on_an_exported_file(
    example: dict[str, Any], encoder: Encoder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "encoder.safetensors"
    client, server = encoder.params
    export_encoder(file, client, server, encoder.metadata)
    probe, tuned = example["main"](str(file), labels_per_class=5, epochs=20, max_test_images=100)
    assert 0 <= probe <= 1 and tuned > 0.25  # of ten classes
    assert capsys.readouterr().out.startswith("50 labels: linear probe 0.")
