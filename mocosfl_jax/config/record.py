"""The configuration in config.json: reading it back, and comparing it with that of a run that resumes."""

import dataclasses
from typing import Any

from mocosfl_jax.config.fields import Config
from mocosfl_jax.config.resolution import Resolved, resolve
from mocosfl_jax.errors import UserError


def from_dict(values: Any) -> Resolved:
    """Rebuilds a resolved configuration from the values of `Resolved.as_dict`.

    Example:
      >>> values = resolve(Config(epochs=3)).as_dict()
      >>> from_dict(values).epochs
      3

    Args:
      values: Nested dictionaries, as read from config.json.

    Raises:
      UserError: If a field is missing, unknown or has an impossible value. The message names the first one.
    """
    return resolve(_from_dict(Config, upgraded(values), "config"))


# Fields that runs of earlier versions lack, with what those runs did.
_ADDED = {("model", "init"): "xavier"}


def upgraded(values: Any) -> Any:
    """The values of a config.json, with the fields that were added after it was written.

    Example:
      >>> upgraded({"model": {"name": "resnet18"}})
      {'model': {'name': 'resnet18', 'init': 'xavier'}}
    """
    for (section, field), before in _ADDED.items():
        if isinstance(values, dict) and isinstance(values.get(section), dict):
            values = values | {section: values[section] | {field: values[section].get(field, before)}}
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
    {"config.data.resident", "config.data.max_broken", "config.checkpoint", "config.mesh"}
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
