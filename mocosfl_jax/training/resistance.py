"""What a run records about the decoder that is trained against its clients (`config.resist`)."""

from collections.abc import Callable

import jax
import numpy as np

from mocosfl_jax.algorithm.adversary import AdversaryState
from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.models.decoders import Decoder, make_decoder
from mocosfl_jax.privacy.inversion import Training, Weights
from mocosfl_jax.privacy.judge import Verdict, judge
from mocosfl_jax.privacy.protocol import victim_rows
from mocosfl_jax.training.build import online_models, smashed_shape
from mocosfl_jax.training.experiment import Run

_JUDGE_KEY = (1 << 30) + 1  # as `_NOISE_KEY` in training/build.py
VICTIMS = 128  # as in `python -m mocosfl_jax.attack`


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
    if not isinstance(adversary, AdversaryState):  # there is none, or one of your own, of whatever kind
        return {}
    of_decoder, of_regulariser = jax.device_get(adversary.similarity).tolist()
    found = {"ssim_decoder": of_decoder, "ssim_regulariser": of_regulariser}
    due = settings.judge_every and epoch % settings.judge_every == 0
    if (due or epoch == run.config.total_epochs) and _is_configured(run, adversary):
        verdict = _judge(run, state, epoch)
        found |= {"ssim_in_loop": verdict.in_loop, "ssim_fresh": verdict.fresh}
        if abs(verdict.fresh - verdict.in_loop) > settings.judge_margin:
            say(_warning(verdict, settings.judge_margin, settings.judge_images))
    return found


def _decoder(run: Run, *, stacked: bool) -> Decoder:
    """The decoder of the configuration."""
    size = run.dataset.x_train.shape[1]
    return make_decoder(
        run.config.resist.decoder, smashed_shape(run.model, size), size, run.forms, stacked=stacked
    )


def _is_configured(run: Run, adversary: AdversaryState) -> bool:
    """Whether an adversary is the configuration's decoder. An algorithm of your own may have another one."""
    like = jax.eval_shape(_decoder(run, stacked=False).init, jax.random.key(0))
    found = (adversary.params, adversary.statistics)
    return bool(jax.tree.map(np.shape, found) == jax.tree.map(np.shape, tuple(like)))


def _judge(run: Run, state: TrainState, epoch: int) -> Verdict:
    settings, dataset = run.config.resist, run.dataset
    count = min(settings.judge_images, len(dataset.x_train))
    rows = np.random.default_rng(run.config.seed).permutation(len(dataset.x_train))[:count]
    params = jax.device_get(online_models(run.algorithm, state)[0])
    adversary = jax.device_get(state.server.adversary)
    return judge(
        lambda images: run.model.client(params, images),
        _decoder(run, stacked=False),
        Weights(adversary.params, adversary.statistics),
        images=dataset.x_train[np.sort(rows)],
        victims=dataset.x_test[victim_rows(dataset.y_test, VICTIMS)],
        mean=dataset.mean,
        std=dataset.std,
        fresh=_decoder(run, stacked=run.forms.scan_rounds),
        training=Training(loss="ssim", epochs=settings.judge_epochs),  # as the decoder in the loop
        rng=jax.random.fold_in(jax.random.fold_in(jax.random.key(run.config.seed), _JUDGE_KEY), epoch),
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
