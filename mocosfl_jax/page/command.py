"""The command that repeats a run, and the paper's values of its fields, both from its configuration."""

import functools
import operator
import shlex
from collections.abc import Mapping
from typing import Any

from mocosfl_jax.config import PRESET_FIELDS, Clients, Config, Moco, Optim, Resolved, quickstart, resolve
from mocosfl_jax.errors import UserError
from mocosfl_jax.training.comparison import flat


def command(config: Resolved, own: Mapping[str, str | None], *, real: bool = False) -> str:
    """Return the command that trains a configuration again, in a new workdir.

    It sets the fields that are not the quickstart's, as far as they do not follow from others.

    Args:
      config: of the run. Of its own functions, only whether there are any matters.
      own: names of its own functions, which only their file can give.
      real: whether clients over a network hold the images.

    Example:
      >>> changed = quickstart()
      >>> changed.clients.num = 50
      >>> command(resolve(changed), {})
      'python -m mocosfl_jax.train --config.clients.num=50 --workdir=FOLDER'
    """
    wanted = config.as_dict()
    values = flat(wanted)
    made = quickstart()
    made.own = config.own
    fields = [name for name in values if not name.startswith("own.")]
    left = {name: operator.attrgetter(name)(made) for name in fields}
    preset = "moco.preset"
    by_preset = values[preset] != left[preset]
    if by_preset:  # on the command line, a preset replaces the quickstart's values of its fields too
        left |= {f"moco.{field}": None for field in PRESET_FIELDS}
    for name in fields:
        _set(made, name, values[name])
    given = []
    for name in reversed(fields):  # a preset comes before the fields that it fills in
        _set(made, name, left[name])
        if (name == preset and by_preset) or not _gives(made, wanted):
            _set(made, name, values[name])
            given.append(name)
    arguments = [f"--config.{name}={values[name]}" for name in reversed(given)]
    if any(own.values()):
        arguments.insert(0, "--config=FILE")
    module = "mocosfl_jax.serve" if real else "mocosfl_jax.train"
    where = ["--listen=HOST:PORT", "--tls=FOLDER"] if real else []
    words = ["python", "-m", module, *arguments, "--workdir=FOLDER", *where]
    return " ".join(map(shlex.quote, words))


def _gives(config: Config, wanted: Mapping[str, Any]) -> bool:
    try:
        return resolve(config).as_dict() == wanted
    except UserError:
        return False


def _set(config: Any, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    setattr(functools.reduce(getattr, parents, config), last, value)


# Fields on which the paper's values of others depend.
_LEADING = ("seed", "clients.num", "moco.preset", "optim.server_lr", "optim.schedule")


def paper_defaults(config: Resolved) -> dict[str, Any]:
    """Return the fields as the paper's experiments have them, for the run's number of clients and preset.

    Example:
      >>> changed = quickstart()  # 20 clients
      >>> paper = paper_defaults(resolve(changed))
      >>> paper["clients.num"], paper["clients.batch_size"], paper["optim.server_lr"]
      (100, 5, 0.06)
    """
    like_run = Config(
        seed=config.seed,
        clients=Clients(num=config.clients.num),
        moco=Moco(preset=config.moco.preset),
        optim=Optim(server_lr=config.optim.server_lr, schedule=config.optim.schedule),
    )
    alone = flat(resolve(Config(moco=Moco(preset=config.moco.preset))).as_dict())
    alone["moco.preset"] = Config().moco.preset
    return flat(resolve(like_run).as_dict()) | {name: alone[name] for name in _LEADING}
