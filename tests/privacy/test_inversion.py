"""Training of decoders: against a loop written by hand, and on clients that hide nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.decoders import make_decoder
from mocosfl_jax.models.forms import ACCELERATOR, CPU, Forms
from mocosfl_jax.privacy.inversion import Training, Weights, reconstruct, train_decoder
from mocosfl_jax.privacy.similarity import ssim_map

COUNT, SIZE = 23, 4


def pairs(attackers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (attackers, COUNT, SIZE, SIZE, 3), np.uint8)
    smashed = images[:, :, ::2, ::2] / np.float32(255) + rng.normal(
        scale=0.1, size=(attackers, COUNT, 2, 2, 3)
    )
    return smashed.astype(np.float32), images


@pytest.fixture
def rngs() -> jax.Array:
    return jax.random.split(jax.random.key(3), 2)


@pytest.mark.parametrize("loss, slips", [("mse", False), ("mse", True), ("ssim", False)])
def test_training_equals_a_loop(rngs: jax.Array, forms: Forms, loss: str, slips: bool, x64: None) -> None:
    """Adam on the loss, the last batch smaller, and the best epoch by the validation loss."""
    smashed, images = pairs()
    smashed = smashed.astype(np.float64)
    decoder = make_decoder("conv_normN0C4", (2, 2, 3), SIZE, forms)
    training = Training(epochs=3, batch_size=8, validation=0.4, validate_in_training_mode=slips, loss=loss)
    trained = train_decoder(rngs, smashed, images, decoder=decoder, training=training, forms=forms)

    @functools.partial(jax.jit, static_argnames="training")
    def error(params, statistics, x, y, training):  # type: ignore[no-untyped-def]
        found, statistics = decoder.apply(params, statistics, x, training=training)
        if loss == "ssim":
            return 1 - jnp.mean(ssim_map(found, y)), statistics
        return jnp.mean((found - y) ** 2), statistics

    gradient = jax.jit(jax.grad(error, has_aux=True), static_argnames="training")
    optimizer = optax.adam(1e-3)
    held_out = 9
    positions: set[int] = set()
    for attacker, rng in enumerate(rngs):
        rng_init, rng_split, rng_order = jax.random.split(rng, 3)
        order = jax.random.permutation(rng_split, COUNT)
        validation, rest = order[:held_out], order[held_out:]
        x, y = jnp.asarray(smashed[attacker]), jnp.asarray(images[attacker]) / 255
        params, statistics = decoder.init(rng_init)
        opt_state = optimizer.init(params)
        errors, kept = [], []

        for epoch in range(3):
            rng_epoch = jax.random.fold_in(rng_order, epoch)
            rows = jax.random.permutation(rng_epoch, rest)
            for batch in (rows[:8], rows[8:]):
                grads, statistics = gradient(params, statistics, x[batch], y[batch], training=True)
                updates, opt_state = optimizer.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            if slips:
                of_batches, after = [], []
                drawn = jax.random.permutation(jax.random.fold_in(rng_epoch, 1), validation)
                for batch in (drawn[:8], drawn[8:]):
                    mse, statistics = error(params, statistics, x[batch], y[batch], training=True)
                    of_batches.append(float(mse))
                    after.append(statistics)
                least = int(np.argmin(of_batches))
                positions.add(least)
                errors.append(of_batches[least])
                kept.append(Weights(params, after[least]))
            else:
                mse, _ = error(params, statistics, x[validation], y[validation], training=False)
                errors.append(float(mse))
                kept.append(Weights(params, statistics))
        np.testing.assert_allclose(trained.validation_loss[attacker], errors, rtol=1e-5)
        best = kept[int(np.argmin(errors))]
        for found, expected in zip(jax.tree.leaves(trained.weights), jax.tree.leaves(best), strict=True):
            np.testing.assert_allclose(found[attacker], expected, rtol=1e-4, atol=1e-7)
    assert not slips or 0 in positions  # otherwise all batches were seen before the weights were kept


def test_an_attacker_does_not_depend_on_the_others(rngs: jax.Array, x64: None) -> None:
    smashed, images = pairs()
    decoder = make_decoder("conv_normN0C4", (2, 2, 3), SIZE)
    training = Training(epochs=2, batch_size=8)
    both = train_decoder(rngs, smashed, images, decoder=decoder, training=training)
    alone = train_decoder(rngs[1:], smashed[1:], images[1:], decoder=decoder, training=training)
    np.testing.assert_allclose(both.validation_loss[1:], alone.validation_loss, rtol=1e-4)
    np.testing.assert_allclose(
        reconstruct(decoder, both.weights, smashed)[1:],
        reconstruct(decoder, alone.weights, smashed[1:], batch_size=10),
        atol=1e-4,
    )


def test_a_client_that_hides_nothing_is_inverted() -> None:
    """Flat images: their colour is the smashed data."""
    colours = np.random.default_rng(0).integers(0, 256, (1, 200, 1, 1, 3), np.uint8)
    images = np.broadcast_to(colours, (1, 200, SIZE, SIZE, 3))
    smashed = np.broadcast_to(colours, (1, 200, 2, 2, 3)) / np.float32(255)
    decoder = make_decoder("conv_normN0C16", (2, 2, 3), SIZE, CPU)
    training = Training(epochs=40, learning_rate=1e-2, cosine=True)
    trained = train_decoder(
        jax.random.split(jax.random.key(0), 1),
        smashed[:, :160],
        images[:, :160],
        decoder=decoder,
        training=training,
        forms=CPU,
    )
    found = reconstruct(decoder, trained.weights, smashed[:, 160:], forms=CPU)
    truth = images[:, 160:] / 255
    assert np.mean((found - truth) ** 2) < 0.05 * np.var(truth)


def test_an_unknown_loss_is_refused(rngs: jax.Array) -> None:
    smashed, images = pairs()
    decoder = make_decoder("custom", (2, 2, 3), SIZE, ACCELERATOR)
    with pytest.raises(ValueError, match="loss: found 'mae', allowed: mse, ssim"):
        train_decoder(rngs, smashed, images, decoder=decoder, training=Training(loss="mae"))


def test_too_few_images_are_refused(rngs: jax.Array) -> None:
    smashed, images = pairs()
    decoder = make_decoder("custom", (2, 2, 3), SIZE, ACCELERATOR)
    with pytest.raises(UserError, match=r"attacker's images: found 19, allowed: 20 or more"):
        train_decoder(rngs, smashed[:, :19], images[:, :19], decoder=decoder)
