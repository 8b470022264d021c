"""The configuration in config.json: reading it back, and comparing it with that of a run that resumes."""

import dataclasses
from typing import Any

from mocosfl_jax.config.fields import Config, Own, Privacy, Resist, Wire
from mocosfl_jax.config.resolution import Resolved, name_of, resolve
from mocosfl_jax.errors import UserError


def from_dict(values: Any, own: Own | None = None) -> Resolved:
    """Rebuilds a resolved configuration from the values of `Resolved.as_dict`.

    Example:
      >>> values = resolve(Config(epochs=3)).as_dict()
      >>> from_dict(values).epochs
      3

    Args:
      values: Nested dictionaries, as read from config.json.
      own: The functions that the values name.

    Raises:
      UserError: If a field is missing, unknown or has an impossible value, or a function is not in `own`. The
        message names the first one.
    """
    config = _from_dict(Config, upgraded(values), "config")
    for name, found in dataclasses.asdict(config.own).items():
        function = getattr(own, name, None)
        if found is None:
            continue
        if function is None or name_of(function) != found:
            has = f"but the config file has {name_of(function)!r}, " if function else ""
            raise UserError(
                f"config.own.{name}: found {found!r}, {has}allowed: --config=FILE, the file of that function"
            )
        setattr(config.own, name, function)
    return resolve(config)


# Fields that runs of earlier versions lack, with what those runs did.
_ADDED: dict[tuple[str, ...], Any] = {
    ("model", "init"): "xavier",
    ("init_from",): None,
    ("init_parts",): "both",
    ("resist",): dataclasses.asdict(Resist()),
    ("privacy",): dataclasses.asdict(Privacy()),
    ("wire",): dataclasses.asdict(Wire()),
    ("own",): {"network": None, "algorithm": None},
    ("clients", "seed"): None,  # the seed of the run
    ("eval", "stop_on_collapse"): False,
    ("moco", "concatenate"): True,
}


def upgraded(values: Any) -> Any:
    """The values of a config.json, with the fields that were added after it was written.

    Example:
      >>> upgraded({"model": {"name": "resnet18"}})["model"]
      {'init': 'xavier', 'name': 'resnet18'}
    """
    if not isinstance(values, dict):
        return values
    for (*sections, field), before in _ADDED.items():
        before = values.get("seed") if field == "seed" else before
        if not sections:
            values = {field: before} | values
        elif isinstance(values.get(sections[0]), dict):
            values = values | {sections[0]: {field: before} | values[sections[0]]}
    return values


def _from_dict(kind: Any, values: Any, path: str) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(values, dict):
        raise UserError(f"{path}: found {values!r}, allowed: fields {', '.join(fields)}")
    for name in [*values, *fields]:
        if name not in fields:
            raise UserError(f"{path}: found field {name!r}, allowed: {', '.join(fields)}")
        if name not in values:
            raise UserError(f"{path}.{name}: found no such field, as in a run of another version")
    return kind(
        **{
            name: _from_dict(type_, values[name], f"{path}.{name}")
            if dataclasses.is_dataclass(type_)
            else values[name]
            for name, type_ in fields.items()
        }
    )


# Fields that change how a run is carried out but not its results. A run may resume with other values.
INDIFFERENT = frozenset(
    {
        "config.data.resident",
        "config.data.max_broken",
        "config.saving.replay_gib",
        "config.eval",
        "config.checkpoint",
        "config.mesh",
        "config.wire.deadline_s",
        "config.wire.least",
    }
)


def differences(found: dict[str, Any], wanted: dict[str, Any], path: str = "config") -> list[str]:
    """Lists the fields in which two configurations differ, except those in `INDIFFERENT`.

    Example:
      >>> differences({"epochs": 200, "seed": 1}, {"epochs": 3, "seed": 1})
      ['config.epochs: 200 there, 3 now']

    Args:
      found: The configuration of the earlier run, as `Resolved.as_dict` gives it.
      wanted: The configuration of the present run.
      path: Prefix of the fields' names.
    """
    lines = []
    for name in dict.fromkeys([*wanted, *found]):
        if f"{path}.{name}" in INDIFFERENT:
            continue
        before, now = found.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            lines += differences(before, now, f"{path}.{name}")
        elif before != now:
            lines.append(f"{path}.{name}: {before!r} there, {now!r} now")
    return lines
