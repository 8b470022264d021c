"""What a run records about the decoder that is trained against its clients (`config.resist`)."""

from collections.abc import Callable

import jax
import numpy as np

from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.models.decoders import make_decoder
from mocosfl_jax.privacy.inversion import Training, Weights
from mocosfl_jax.privacy.judge import Verdict, judge
from mocosfl_jax.training.build import online_models, smashed_shape
from mocosfl_jax.training.experiment import Run

VICTIMS = 128  # the first test images, as in `python -m mocosfl_jax.attack`


def metrics(run: Run, state: TrainState, epoch: int, say: Callable[[str], None]) -> dict[str, float]:
    """Return what metrics.jsonl records about the decoder after an epoch; nothing if there is none.

    Args:
      run: the run.
      state: after the epoch.
      epoch: number of epochs done.
      say: prints a warning of one line, if a fresh decoder sees more or less than that of the run.
    """
    settings = run.config.resist
    adversary = getattr(state.server, "adversary", None)
    if adversary is None:
        return {}
    of_decoder, of_regulariser = jax.device_get(adversary.similarity).tolist()
    found = {"ssim_decoder": of_decoder, "ssim_regulariser": of_regulariser}
    due = settings.judge_every and epoch % settings.judge_every == 0
    if due or epoch == run.config.total_epochs:
        verdict = _judge(run, state, epoch)
        found |= {"ssim_in_loop": verdict.in_loop, "ssim_fresh": verdict.fresh}
        if abs(verdict.fresh - verdict.in_loop) > settings.judge_margin:
            say(_warning(verdict, settings.judge_margin, settings.judge_images))
    return found


def _judge(run: Run, state: TrainState, epoch: int) -> Verdict:
    settings, dataset = run.config.resist, run.dataset
    shape, size = smashed_shape(run.model, dataset.x_train.shape[1]), dataset.x_train.shape[1]
    count = min(settings.judge_images, len(dataset.x_train))
    rows = np.random.default_rng(run.config.seed).permutation(len(dataset.x_train))[:count]
    params = jax.device_get(online_models(run.algorithm, state)[0])
    adversary = jax.device_get(state.server.adversary)
    return judge(
        lambda images: run.model.client(params, images),
        make_decoder(settings.decoder, shape, size, run.forms, stacked=False),
        Weights(adversary.params, adversary.statistics),
        images=dataset.x_train[np.sort(rows)],
        victims=dataset.x_test[:VICTIMS],
        mean=dataset.mean,
        std=dataset.std,
        fresh=make_decoder(settings.decoder, shape, size, run.forms, stacked=run.forms.scan_rounds),
        training=Training(epochs=settings.judge_epochs),
        rng=jax.random.fold_in(jax.random.key(run.config.seed), epoch),
        batch_statistics=settings.preset != "faithful",
        forms=run.forms,
    )


def _warning(verdict: Verdict, margin: float, images: int) -> str:
    """Say what the difference means."""
    numbers = (
        f"a fresh decoder reaches an SSIM of {verdict.fresh:.3f}, the one in the loop {verdict.in_loop:.3f}"
    )
    if verdict.fresh > verdict.in_loop:
        return f"warning: {numbers}; they differ by more than {margin:g}: the loop's says too little"
    return (
        f"warning: {numbers}; they differ by more than {margin:g}: {images:,} images are too few for a judge "
        "(config.resist.judge_images)"
    )
