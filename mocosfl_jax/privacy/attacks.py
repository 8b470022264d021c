"""The attacks of `python -m mocosfl_jax.attack` on one client, and how their results are summed up."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from mocosfl_jax.algorithm.noise import Noise, clipped, disturb
from mocosfl_jax.errors import UserError
from mocosfl_jax.models.decoders import make_decoder, read_family
from mocosfl_jax.models.forms import Forms
from mocosfl_jax.privacy import inversion, protocol, similarity, trivial
from mocosfl_jax.privacy.inversion import FEWEST_IMAGES, LOSSES, Training
from mocosfl_jax.privacy.optimisation import optimise_images
from mocosfl_jax.privacy.protocol import Client, Given
from mocosfl_jax.privacy.ridge import ridge

ATTACKERS = ("trivial", "ridge", "official", "strong", "optimisation")
PROTOCOLS = ("clean", "official")
VIEWS = ("query", "key")  # the smashed data of the online and of the momentum model
OFFICIAL_DECODER = "res_normN4C64"
OFFICIAL_IMAGES = 500  # of which 50 are held out
# Of the larger ridge attack. It takes seconds as long as images or numbers of smashed data are this few.
RIDGE_IMAGES, RIDGE_DIMENSIONS = 10_000, 2000
BLOCKS = (16, 8, 4)  # pixels, of the block means; those that divide the image size
SHOWN = 10  # victims whose reconstructions are kept for the picture
# Of the strong attackers' smashed data, all seeds and views together. They have fewer images if these take
# more.
SMASHED_BYTES = 4 * 2**30

Bar = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]


class Settings(NamedTuple):
    """What the attackers do."""

    attackers: Sequence[str] = ATTACKERS
    protocol: str = "clean"  # one of PROTOCOLS
    seed: int = 0  # of the first attacker
    # Attackers of each kind but the optimisation, with seeds `seed`, `seed` + 1, ...
    seeds: int = 1
    images: int | None = None  # of the strong attacker; None: all that there are
    epochs: int = 20  # of the strong attacker
    official_epochs: int = 50  # of the official attacker
    decoder: str = OFFICIAL_DECODER  # of the strong attacker
    loss: str = "mse"  # of the strong attacker, one of `inversion.LOSSES`
    optimised: int = 16  # victims of the optimisation
    steps: int = 1000  # of the optimisation


class Result(NamedTuple):
    """What one attacker reached. S is the number of seeds, m that of victims."""

    attacker: str
    smashed: str  # "query", "key", or "" for predictors that need no smashed data
    images: int | None  # of the attacker, with those held out; None: it needs none
    mse: np.ndarray  # [S, m]
    ssim: np.ndarray  # [S, m]
    psnr: np.ndarray  # [S, m], decibels
    constant_mse: float  # mean error on these victims of the mean colour of the attacker's images
    shown: np.ndarray  # [k, H, W, 3], the first victims' reconstructions, k <= SHOWN

    def summary(self) -> dict[str, Any]:
        """The row of the table: means over victims and seeds, and the deviation between seeds."""
        of_seeds = self.mse.mean(axis=1)
        numbers = {
            "mse": of_seeds.mean(),
            "ssim": self.ssim.mean(),
            "psnr": self.psnr.mean(),
            "relative_mse": of_seeds.mean() / self.constant_mse,
            "mse_5th_percentile": np.percentile(self.mse, 5, axis=1).mean(),
        }
        if len(of_seeds) > 1:
            numbers |= {"mse_std": of_seeds.std(ddof=1), "ssim_std": self.ssim.mean(axis=1).std(ddof=1)}
        names = {"attacker": self.attacker, "smashed": self.smashed, "images": self.images}
        sizes = {"victims": self.mse.shape[1], "seeds": len(of_seeds)}
        return names | sizes | {name: float(number) for name, number in numbers.items()}


@contextlib.contextmanager
def no_bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Show no progress."""
    yield lambda: None


def check_names(settings: Settings) -> None:
    """Raise UserError for unknown attackers, protocols, losses or decoders."""
    for name in settings.attackers:
        if name not in ATTACKERS:
            raise UserError(f"--attackers: found {name!r}, allowed: {', '.join(ATTACKERS)}")
    if settings.protocol not in PROTOCOLS:
        raise UserError(f"--protocol: found {settings.protocol!r}, allowed: {', '.join(PROTOCOLS)}")
    if settings.loss not in LOSSES:
        raise UserError(f"--loss: found {settings.loss!r}, allowed: {', '.join(LOSSES)}")
    read_family(settings.decoder)


def check(settings: Settings, images: int, client: Client, image_size: int) -> tuple[int, int, int]:
    """Check the settings against a client and the number of images, before any work.

    Args:
      settings: of the attackers.
      images: that there are for attackers.
      client: the client-side model.
      image_size: in pixels.

    Returns:
      The shape (h, w, c) of one image's smashed data.

    Raises:
      UserError: if a decoder does not fit, or there are too few images.
    """
    check_names(settings)
    shape = _smashed_shape(client, image_size)
    asked = set(settings.attackers)
    for kind, decoder in (("official", OFFICIAL_DECODER), ("strong", settings.decoder)):
        if kind in asked:
            make_decoder(decoder, shape, image_size)
    fewest = _official_images(settings, images)
    if settings.images is not None:
        fewest = min(fewest, settings.images)
    if asked & {"ridge", "official", "strong"} and fewest < FEWEST_IMAGES:
        raise UserError(
            f"attacker's images: found {fewest} of {images:,} training images, "
            f"allowed: {FEWEST_IMAGES} or more"
        )
    return shape


def _smashed_shape(client: Client, image_size: int) -> tuple[int, int, int]:
    one = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.float32)
    _, height, width, channels = jax.eval_shape(client, one).shape
    return height, width, channels


def attack(
    views: Mapping[str, Client],
    images: np.ndarray,
    victims: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    settings: Settings,
    forms: Forms,
    victims_std: Sequence[float] | None = None,
    noise: Noise | None = None,
    bar: Bar = no_bar,
) -> list[Result]:
    """Attack the smashed data of one client.

    Args:
      views: the client-side models by name, one or both: the online model as "query", the momentum model as
        "key".
      images: [n, H, W, 3] uint8 that attackers may have. The clean protocol leaves out those of the victims.
      victims: [m, H, W, 3] uint8.
      mean: of each channel, with which the models' images are normalised.
      std: of each channel.
      settings: what the attackers do.
      forms: of the platform.
      victims_std: the official protocol's wrong standard deviation of the victims' images; None: `std`.
      noise: what clients add to smashed data. The attackers' own smashed data have it too; each image's is
        drawn once.
      bar: shows progress; `bar(name, total)` is entered, and what it gives is called `total` times.

    Returns:
      The results, trivial predictors first.

    Raises:
      UserError: if there are too few images, or a setting is wrong.
    """
    official = settings.protocol == "official"
    if official:
        given = protocol.official_victims(victims, mean, std, std if victims_std is None else victims_std)
    else:
        given = protocol.clean(victims, mean, std)
        images = without(images, victims)
    size = victims.shape[1]
    shape = check(settings, len(images), next(iter(views.values())), size)
    truth = given.truth / np.float32(255)
    colour = mean_colour(images)
    constant = float(np.mean(similarity.mse(trivial.constant_colour(truth, colour), truth)))

    def result(name: str, smashed: str, count: int | None, found: np.ndarray) -> Result:
        """`found` is [S, m', H, W, 3], of the first m' victims."""
        of_these = truth[: found.shape[1]]
        level = constant
        if len(of_these) < len(truth):
            level = float(np.mean(similarity.mse(trivial.constant_colour(of_these, colour), of_these)))
        mse, ssim, psnr = (
            np.stack([np.asarray(measure(one, of_these)) for one in found])
            for measure in (similarity.mse, similarity.ssim, similarity.psnr)
        )
        return Result(name, smashed, count, mse, ssim, psnr, level, found[0, :SHOWN])

    results = []
    if "trivial" in settings.attackers:
        predictors = {"constant colour": trivial.constant_colour(truth, colour)}
        predictors["own mean colour"] = trivial.block_means(truth, size)
        blocks = [block for block in BLOCKS if size % block == 0 and block < size]
        predictors |= {f"means of {b}x{b} blocks": trivial.block_means(truth, b) for b in blocks}
        results = [result(name, "", None, np.asarray(found)[None]) for name, found in predictors.items()]

    smashed_victims = {
        name: _disturbed(protocol.smash(client, given.inputs), noise, 0, VIEWS.index(name))
        for name, client in views.items()
    }
    stacked = Stacked(views, images, smashed_victims, mean, std, settings, forms, noise)
    few = _official_images(settings, len(images))
    runs: list[tuple[str, str, int, Callable[..., np.ndarray]]] = [
        ("ridge", "ridge", few, _ridge),
        ("ridge", "ridge", _ridge_images(settings, len(images), shape, len(views)), _ridge),
        ("official", "official decoder", few, _official),
        ("strong", "strong decoder", _strong_images(settings, len(images), shape, len(views)), _strong),
    ]
    for kind, name, count, run in dict.fromkeys(runs):
        if kind in settings.attackers:
            found = run(stacked, count, name, bar)
            for index, view in enumerate(views):
                results.append(result(name, view, count, found[:, index]))
    if "optimisation" in settings.attackers:
        with bar("optimisation", len(views)) as advance:
            for view, client in views.items():
                targets = smashed_victims[view][: settings.optimised]
                sent = client if noise is None else partial(_bounded, client, noise)
                rng = jax.random.key(settings.seed)
                images_found = optimise_images(rng, sent, targets, size, mean, std, steps=settings.steps)
                results.append(result("optimisation", view, None, np.asarray(images_found)[None]))
                advance()
    return results


def mean_colour(images: np.ndarray) -> tuple[float, ...]:
    """The mean of each channel, in [0, 1], of uint8 images: the constant predictor's colour.

    A client may have been trained on other images, so what it normalises by need not be their mean.

    Example:
      >>> mean_colour(np.array([[[[0, 51, 255]]], [[[255, 51, 255]]]], np.uint8))
      (0.5, 0.2, 1.0)
    """
    return tuple(float(mean) / 255 for mean in images.mean((0, 1, 2)))


def without(images: np.ndarray, victims: np.ndarray) -> np.ndarray:
    """The images that are none of the victims.

    Example:
      >>> images = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(3, axis=-1)
      >>> without(images, images[1:2])[:, 0, 0, 0].tolist()
      [0, 2]
    """
    known = {victim.tobytes() for victim in victims}
    keep = [image.tobytes() not in known for image in images]
    return images if all(keep) else images[np.array(keep)]


def _disturbed(smashed: np.ndarray, noise: Noise | None, *numbers: int) -> np.ndarray:
    """Smashed data [n, h, w, c] as clients send them. The numbers tell draws apart."""
    return smashed if noise is None else np.asarray(disturb(jax.numpy.asarray(smashed), noise, *numbers))


def _bounded(client: Client, noise: Noise, images: jax.Array) -> jax.Array:
    """The client's model with the bound of its smashed data, which attackers know, and without noise."""
    return clipped(client(images), noise.clip)


class Stacked(NamedTuple):
    """What the trained attackers of one client share. They are stacked: seeds, and the views of each."""

    views: Mapping[str, Client]
    images: np.ndarray
    victims: Mapping[str, np.ndarray]  # [m, h, w, c] smashed data by view
    mean: Sequence[float]
    std: Sequence[float]
    settings: Settings
    forms: Forms
    noise: Noise | None

    def draw(self, count: int) -> tuple[jax.Array, np.ndarray, np.ndarray, np.ndarray]:
        """Keys [A], smashed data [A, n, ...], targets [A, n, H, W, 3] and victims [A, m, ...].

        A counts the views of each seed.
        """
        settings = self.settings
        rngs, smashed, targets, victims = [], [], [], []
        give: Callable[..., Given] = protocol.clean
        if settings.protocol == "official":
            give = protocol.official_attacker
        for seed in range(settings.seed, settings.seed + settings.seeds):
            rows = np.random.default_rng(seed).permutation(len(self.images))[:count]
            given = give(self.images[rows], self.mean, self.std)
            for view, client in self.views.items():
                rngs.append(jax.random.key(seed))
                found = protocol.smash(client, given.inputs)
                smashed.append(_disturbed(found, self.noise, 1, seed, VIEWS.index(view)))
                targets.append(given.truth)
                victims.append(self.victims[view])
        return jax.numpy.stack(rngs), np.stack(smashed), np.stack(targets), np.stack(victims)

    def by_seed(self, found: np.ndarray) -> np.ndarray:
        """[A, ...] -> [S, views, ...]."""
        return found.reshape(self.settings.seeds, len(self.views), *found.shape[1:])


def _ridge(stacked: Stacked, count: int, name: str, bar: Bar) -> np.ndarray:
    with bar(f"{name}, {count:,} images", 1) as advance:
        found = np.asarray(ridge(*stacked.draw(count)))
        advance()
    return stacked.by_seed(found)


def _official(stacked: Stacked, count: int, name: str, bar: Bar) -> np.ndarray:
    slips = stacked.settings.protocol == "official"
    training = Training(epochs=stacked.settings.official_epochs, validate_in_training_mode=slips)
    return _decode(stacked, count, name, bar, OFFICIAL_DECODER, training)


def _strong(stacked: Stacked, count: int, name: str, bar: Bar) -> np.ndarray:
    training = Training(
        loss=stacked.settings.loss,
        epochs=stacked.settings.epochs,
        cosine=True,
        validation=min(0.1, 1000 / count),
    )
    return _decode(stacked, count, name, bar, stacked.settings.decoder, training)


def _decode(stacked: Stacked, count: int, name: str, bar: Bar, family: str, training: Training) -> np.ndarray:
    """Train decoders of one family, and apply them to the victims."""
    rngs, smashed, targets, victims = stacked.draw(count)
    forms = stacked.forms
    shape, size = smashed.shape[2:], targets.shape[2]
    decoder = make_decoder(family, shape, size, forms, stacked=forms.scan_rounds)
    with bar(f"{name}, {count:,} images", training.epochs) as advance:
        trained = inversion.train_decoder(
            rngs,
            smashed,
            targets,
            decoder=decoder,
            training=training,
            forms=forms,
            each_epoch=lambda mse: advance(),
        )
    return stacked.by_seed(inversion.reconstruct(decoder, trained.weights, victims, forms=forms))


def _official_images(settings: Settings, images: int) -> int:
    if settings.protocol == "official":
        return round(protocol.OFFICIAL_SHARE * images)
    return min(OFFICIAL_IMAGES, images)


def _ridge_images(settings: Settings, images: int, shape: tuple[int, ...], views: int) -> int:
    most = RIDGE_IMAGES if np.prod(shape) <= RIDGE_DIMENSIONS else RIDGE_DIMENSIONS
    return min(_strong_images(settings, images, shape, views), most)


def _strong_images(settings: Settings, images: int, shape: tuple[int, ...], views: int) -> int:
    most = SMASHED_BYTES // (4 * int(np.prod(shape)) * views * settings.seeds)
    return min(images, settings.images or images, most)
