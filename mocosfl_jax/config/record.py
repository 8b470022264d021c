"""A configuration in config.json: read back, and compared with the one of a run that goes on."""

import dataclasses
from typing import Any

from mocosfl_jax.config.fields import Config
from mocosfl_jax.config.resolution import Resolved, resolve
from mocosfl_jax.errors import UserError


def from_dict(values: Any) -> Resolved:
    """The resolved configuration of which `Resolved.as_dict` made these values.

    Raises:
      UserError: naming the first field that is missing, unknown or impossible.
    """
    return resolve(_from_dict(Config, values, "config"))


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


# Fields that say how a run is done and not what comes out: a run may go on with other values.
INDIFFERENT = frozenset(
    {"config.data.resident", "config.data.max_broken", "config.checkpoint", "config.mesh"}
)


def differences(found: dict[str, Any], wanted: dict[str, Any], path: str = "config") -> list[str]:
    """The fields in which two configurations differ, as `path: found, now wanted`, but for `INDIFFERENT`."""
    lines = []
    for name in dict.fromkeys([*wanted, *found]):
        if f"{path}.{name}" in INDIFFERENT:
            continue
        there, now = found.get(name), wanted.get(name)
        if isinstance(there, dict) and isinstance(now, dict):
            lines += differences(there, now, f"{path}.{name}")
        elif there != now:
            lines.append(f"{path}.{name}: {there!r} there, {now!r} now")
    return lines
