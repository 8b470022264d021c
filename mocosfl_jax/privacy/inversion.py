"""Model inversion: an attacker trains a decoder from smashed data to images.

The attacker knows the client-side model, or can query it, and has images of its own. It computes their
smashed data, trains the decoder on these pairs, and applies it to the smashed data of its victims.

All attackers that are trained together are a leading axis A of every array, as clients are. Where the forms
scan rounds, an epoch of all of them is one program. Elsewhere, on a CPU, whose convolutions are slow inside a
loop of a program, each batch of each attacker is a call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.decoders import Decoder
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.privacy import similarity

FEWEST_IMAGES = 20  # of an attacker, of which it validates on 2

Rows = Array | np.ndarray  # [n, ...] of one attacker, or stacked [A, n, ...]
Loss = Callable[[Array, Array], Array]  # reconstructions in [0, 1] and uint8 images [n, H, W, 3] -> []


def _mse(found: Array, images: Array) -> Array:
    return jnp.mean(jnp.square(found - _unit(images)))


def _dissimilarity(found: Array, images: Array) -> Array:
    return 1 - jnp.mean(similarity.ssim(found, _unit(images)))


def _unit(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


LOSSES: dict[str, Loss] = {"mse": _mse, "ssim": _dissimilarity}


class Training(NamedTuple):
    """How a decoder is trained, by Adam. The defaults are the official attack's."""

    epochs: int = 50
    batch_size: int = 32
    learning_rate: float = 1e-3
    cosine: bool = False  # whether the learning rate falls to 0; otherwise it is constant
    # Share of the images that are held out. The weights of the epoch with the smallest loss on them stay.
    validation: float = 0.1
    # Validate as the official attack: batches are drawn anew each epoch, batch norms use and record each, one
    # batch alone decides, and the weights stay as they are right after it.
    validate_in_training_mode: bool = False
    loss: str = "mse"  # the mean squared error; or "ssim": 1 less the structural similarity


class Weights(NamedTuple):
    """A decoder's weights."""

    params: Any
    statistics: Any  # running, of batch norms


class Trained(NamedTuple):
    """The decoders of A attackers."""

    weights: Weights  # leaves [A, ...], of the best epoch
    validation_loss: np.ndarray  # [A, epochs], by which the best epoch was chosen


class _State(NamedTuple):
    """The state of one attacker."""

    weights: Weights
    opt_state: Any
    best: Weights
    least: Array  # [], the loss of `best` on the images that are held out


def train_decoder(
    rngs: Array,
    smashed: ArrayLike,
    images: ArrayLike,
    *,
    decoder: Decoder,
    training: Training = Training(),  # noqa: B008, an immutable tuple
    forms: Forms = ACCELERATOR,
    each_epoch: Callable[[np.ndarray], None] = lambda loss: None,
) -> Trained:
    """Train a decoder for each of A attackers.

    Args:
      rngs: [A] keys: for the initial weights, the held-out images and the order of the batches.
      smashed: [A, n, h, w, c] smashed data of the attackers' images.
      images: [A, n, H, W, 3] uint8, the attackers' images.
      decoder: from `make_decoder`, fastest with `stacked=forms.scan_rounds`.
      training: how to train. The last batch of an epoch may be smaller.
      forms: of the platform.
      each_epoch: called after each epoch with the validation losses [A].

    Returns:
      The decoders, each of the epoch with the smallest validation loss.

    Raises:
      UserError: if there are fewer than `FEWEST_IMAGES` images.
      ValueError: if the loss is unknown.

    Example:
      >>> from mocosfl_jax.models.decoders import make_decoder
      >>> images = np.random.default_rng(0).integers(0, 256, (1, 20, 8, 8, 3), np.uint8)
      >>> smashed = images[:, :, ::2, ::2] / np.float32(255)
      >>> trained = train_decoder(
      ...     jax.random.split(jax.random.key(0), 1),
      ...     smashed,
      ...     images,
      ...     decoder=make_decoder("custom", (4, 4, 3), image_size=8),
      ...     training=Training(epochs=2),
      ... )
      >>> trained.validation_loss.shape
      (1, 2)
    """
    if training.loss not in LOSSES:
        raise ValueError(f"loss: found {training.loss!r}, allowed: {', '.join(LOSSES)}")
    loss_of = LOSSES[training.loss]
    store: Callable[[ArrayLike], Rows] = jnp.asarray if forms.scan_rounds else np.asarray
    smashed, images = store(smashed), store(images)
    count = images.shape[1]
    if count < FEWEST_IMAGES:
        raise UserError(f"attacker's images: found {count}, allowed: {FEWEST_IMAGES} or more")
    held_out = max(2, round(training.validation * count))
    steps = -(-(count - held_out) // training.batch_size)
    rate: Any = training.learning_rate
    if training.cosine:
        rate = optax.cosine_decay_schedule(training.learning_rate, training.epochs * steps)
    optimizer = optax.adam(rate)
    rngs_init, rngs_split, rngs_order = jnp.moveaxis(jax.vmap(partial(jax.random.split, num=3))(rngs), 1, 0)
    order = jax.vmap(lambda rng: jax.random.permutation(rng, count))(rngs_split)

    @jax.jit
    @jax.vmap
    def init(rng: Array) -> _State:
        weights = Weights(*decoder.init(rng))
        # Copies, since the state is donated.
        best = jax.tree.map(jnp.copy, weights)
        return _State(weights, optimizer.init(weights.params), best, jnp.full((), jnp.inf, smashed.dtype))

    step = jax.jit(partial(_step, decoder, optimizer, loss_of), donate_argnums=0)
    validation_step = jax.jit(
        partial(_least_loss if training.validate_in_training_mode else _add_loss, decoder, loss_of)
    )

    def epoch(state: _State, rng: Array, order: Array, smashed: Rows, images: Rows) -> tuple[_State, Array]:
        """One attacker's epoch."""
        validation, rows = order[:held_out], order[held_out:]
        fold = partial(_over_batches, forms, training.batch_size, smashed, images)
        state = fold(step, state, jax.random.permutation(rng, rows))
        weights = state.weights
        if training.validate_in_training_mode:
            none = jnp.full((), jnp.inf, smashed.dtype)
            drawn = jax.random.permutation(jax.random.fold_in(rng, 1), validation)
            weights, candidate, loss = fold(validation_step, (weights, weights, none), drawn)
        else:
            _, total = fold(validation_step, (weights, jnp.zeros(())), validation)
            candidate, loss = weights, total / held_out
        best = _where(loss < state.least, candidate, state.best)
        return state._replace(weights=weights, best=best, least=jnp.minimum(loss, state.least)), loss

    run_epoch = _over_attackers(forms, epoch, donate=(0,))
    state, losses = init(rngs_init), []
    for number in range(training.epochs):
        rngs_epoch = jax.vmap(lambda rng, number=number: jax.random.fold_in(rng, number))(rngs_order)
        state, loss = run_epoch(state, rngs_epoch, order, smashed, images)
        losses.append(np.asarray(loss))
        each_epoch(losses[-1])
    return Trained(state.best, np.stack(losses, axis=1))


def reconstruct(
    decoder: Decoder,
    weights: Weights,
    smashed: ArrayLike,
    *,
    forms: Forms = ACCELERATOR,
    batch_size: int = 128,
) -> np.ndarray:
    """Apply each attacker's decoder, in evaluation mode, to smashed data.

    Args:
      decoder: from `make_decoder`.
      weights: leaves [A, ...].
      smashed: [A, m, h, w, c].
      forms: of the platform.
      batch_size: images at a time.

    Returns:
      [A, m, H, W, 3] float32 in [0, 1].
    """
    smashed = np.asarray(smashed)

    @jax.jit
    def one(weights: Weights, smashed: Array) -> Array:
        return decoder.apply(*weights, smashed, training=False)[0]

    run = _over_attackers(forms, one)
    starts = range(0, smashed.shape[1], batch_size)
    parts = [np.asarray(run(weights, smashed[:, start : start + batch_size])) for start in starts]
    return np.concatenate(parts, axis=1)


def _step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    loss_of: Loss,
    state: _State,
    smashed: Array,
    images: Array,
) -> _State:
    """One step of Adam on a batch."""

    def loss(params: Any) -> tuple[Array, Any]:
        found, statistics = decoder.apply(params, state.weights.statistics, smashed, training=True)
        return loss_of(found, images), statistics

    grads, statistics = jax.grad(loss, has_aux=True)(state.weights.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.weights.params)
    weights = Weights(optax.apply_updates(state.weights.params, updates), statistics)
    return state._replace(weights=weights, opt_state=opt_state)


def _add_loss(
    decoder: Decoder, loss_of: Loss, carry: tuple[Weights, Array], smashed: Array, images: Array
) -> tuple[Weights, Array]:
    """Add a batch to the sum of losses, in evaluation mode."""
    weights, total = carry
    found, _ = decoder.apply(*weights, smashed, training=False)
    return weights, total + loss_of(found, images) * len(images)


def _least_loss(
    decoder: Decoder, loss_of: Loss, carry: tuple[Weights, Weights, Array], smashed: Array, images: Array
) -> tuple[Weights, Weights, Array]:
    """A batch of the official attack's validation, in training mode, which changes the running statistics.

    Args:
      decoder: The decoder.
      loss_of: What it is trained on.
      carry: Its weights, those right after the batch with the smallest loss so far, and that loss.
      smashed: [n, h, w, c].
      images: [n, H, W, 3].
    """
    weights, best, least = carry
    found, statistics = decoder.apply(*weights, smashed, training=True)
    weights, loss = weights._replace(statistics=statistics), loss_of(found, images)
    return weights, _where(loss < least, weights, best), jnp.minimum(loss, least)


def _where(condition: Array, new: Any, old: Any) -> Any:
    """The leaves of one tree or of the other."""
    return jax.tree.map(lambda *leaves: jnp.where(condition, *leaves), new, old)


def _over_batches(
    forms: Forms,
    batch_size: int,
    smashed: Rows,
    images: Rows,
    function: Callable[[Any, Array, Array], Any],
    carry: Any,
    rows: Array,
) -> Any:
    """Fold `function` over the batches of `rows` of one attacker; the last batch may be smaller."""
    if not forms.scan_rounds:
        for start in range(0, len(rows), batch_size):
            batch = np.asarray(rows[start : start + batch_size])
            carry = function(carry, smashed[batch], images[batch])
        return carry

    def step(carry: Any, batch: Array) -> tuple[Any, None]:
        return function(carry, smashed[batch], images[batch]), None

    whole = len(rows) // batch_size * batch_size
    carry, _ = jax.lax.scan(step, carry, rows[:whole].reshape(-1, batch_size))
    return step(carry, rows[whole:])[0] if whole < len(rows) else carry


def _over_attackers(
    forms: Forms, function: Callable[..., Any], donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """A function of one attacker -> that of stacked attackers [A, ...]."""
    if forms.scan_rounds:
        return jax.jit(forms.over_clients(function), donate_argnums=donate)

    def one_after_another(*stacked: Any) -> Any:
        count = len(jax.tree.leaves(stacked)[0])
        each = [function(*jax.tree.map(lambda leaf, a=a: leaf[a], stacked)) for a in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    return one_after_another
