"""Shared by all commands: parsing a configuration, and reporting errors in one line.

--config=FILE[:PARAMETER]    a Python file with get_config(), or get_config(parameter)
--config.FIELD=VALUE         one field of the configuration
"""

import contextlib
import dataclasses
import difflib
import functools
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from mocosfl_jax.config import Config, Own, quickstart
from mocosfl_jax.errors import UserError, one_line
from mocosfl_jax.paths import user_path

HELP = {"--help", "-h", "-help", "--helpfull"}


class Arguments(NamedTuple):
    """A parsed command line."""

    config: Config  # not resolved
    name: str  # the name of the configuration's file, with its parameter
    flags: flags.FlagValues  # the command's own flags


def parse(
    argv: Sequence[str], usage: str, define: Callable[[flags.FlagValues], None] = lambda values: None
) -> Arguments:
    """Parse a command line that sets a configuration. The default is the quickstart's.

    Args:
      argv: the command and its arguments.
      usage: the allowed arguments, for the error message.
      define: adds the command's own flags.

    Returns:
      The configuration, its name and the command's flags.

    Raises:
      UserError: names the first invalid argument.

    Example:
      >>> arguments = parse(["train", "--config.clients.num=50"], usage="--config.FIELD=VALUE")
      >>> arguments.name, arguments.config.clients.num
      ('quickstart', 50)
    """
    unset, argv = split_unset(argv)
    for argument in argv[1:]:
        check_field(argument)
    values = flags.FlagValues()
    names = ["quickstart"]

    def load(path: str) -> Config:
        file, parameter = split_parameter(str(user_path("--config", path)))
        names.append("_".join([Path(file).stem, *parameter]))
        return load_config(file, parameter)

    try:
        config_flags.DEFINE_config_dataclass(
            "config", quickstart(), "A file with get_config().", values, sys_argv=list(argv), parse_fn=load
        )
        define(values)
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(explain(error)) from error
    if rest:
        raise UserError(f"found {rest[0]!r}, allowed: {usage}")
    for path in unset:
        *parents, field = path.split(".")
        setattr(functools.reduce(getattr, parents, values.config), field, None)
    return Arguments(values.config, names[-1], values)


def parse_flags(
    argv: Sequence[str], usage: str, define: Callable[[flags.FlagValues], None], required: Sequence[str] = ()
) -> Any:
    """Parse a command line without a configuration, with only the flags that `define` adds.

    Args:
      argv: the command and its arguments.
      usage: the allowed arguments, for the error message.
      define: adds the flags.
      required: flags that must have a value.

    Returns:
      The flags, each an attribute.

    Raises:
      UserError: names the first invalid argument, or a required flag without a value.
    """
    values = flags.FlagValues()
    define(values)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(f"{explain(error).rstrip(' .?')}; allowed: {usage}") from error
    if rest:
        raise UserError(f"found {rest[0]!r}, allowed: {usage}")
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name} is missing; allowed: {usage}")
    return values


def output_file(text: str) -> Path:
    """Return the path given by --out.

    Raises:
      UserError: if the path is a URL or a folder, or its parent folder does not exist.
    """
    path = user_path("--out", text)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out: found {path}, allowed: a file in an existing folder")
    return path


def split_parameter(path: str) -> tuple[str, list[str]]:
    """Split FILE:PARAMETER into the file and a list with the parameter; the list is empty without one.

    Example:
      >>> split_parameter("configs/cifar10_cross_silo.py:20")
      ('configs/cifar10_cross_silo.py', ['20'])
    """
    file, colon, parameter = path.rpartition(":")
    return (file, [parameter]) if colon and file.endswith(".py") else (path, [])


def split_unset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the arguments `--config.FIELD=None` out of a command line: absl cannot parse None as a number.

    Returns:
      The paths of these fields, without `config.`, and the other arguments. Whether a field may be None is
      checked later, with the configuration.

    Raises:
      UserError: if there is no such field.

    Example:
      >>> split_unset(["train", "--config.clients.cohort=None"])
      (['clients.cohort'], ['train'])
    """
    unset, others = [], []
    for argument in argv:
        match = re.fullmatch(r"--?config\.(.+)=(?i:none)", argument)
        if match:
            check_field(argument)
            unset.append(match[1])
        else:
            others.append(argument)
    return unset, others


def check_field(argument: str) -> None:
    """Raise UserError if `argument` sets a field that does not exist in a configuration."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    node: Any = quickstart()
    path = "config"
    if match and match[1].split(".")[0] == "own":
        raise UserError(
            f"config.{match[1]}: found a value, allowed: a function in a file given by --config=FILE"
        )
    for part in match[1].split(".") if match else []:
        names = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            close = difflib.get_close_matches(part, names, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            allowed = ", ".join(names) if names else "no field below it"
            raise UserError(f"{path}: found field {part!r}{hint}, allowed: {allowed}")
        node, path = getattr(node, part), f"{path}.{part}"


def own_functions(path: str | None) -> Own:
    """Return the functions in the configuration that `--config=FILE[:PARAMETER]` names; None: there are none.

    Raises:
      UserError: as `load_config` does.
    """
    if path is None:
        return Own()
    file, parameter = split_parameter(str(user_path("--config", path)))
    return load_config(file, parameter).own


def load_config(file: str, parameter: Sequence[str] = ()) -> Config:
    """Return the configuration from get_config(*parameter) of a Python file, which may import its neighbours.

    Raises:
      UserError: if the file does not exist, fails, or returns something else.
    """
    if not Path(file).is_file():
        raise UserError(f"--config: found no file {file}, allowed: a Python file with get_config()")
    try:
        with _importable(Path(file).resolve().parent):
            config = runpy.run_path(file)["get_config"](*parameter)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{file}: {one_line(error)}") from error
    if not isinstance(config, Config):
        raise UserError(f"{file}: get_config() returned {type(config).__name__}, allowed: a Config")
    return config


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make the modules in `folder` importable.

    They are forgotten at the end, since another folder may have modules of the same names.
    """
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in sorted(set(sys.modules) - before):
            top = name.partition(".")[0]
            neighbour = (folder / f"{top}.py").exists() or (folder / top).is_dir()
            if neighbour and top not in before:
                del sys.modules[name]


def explain(error: BaseException) -> str:
    """Describe an absl parsing error in one line."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is not None:
        return str(cause)
    wrong_type = re.match(r"flag --(config\.[\w.]+)=(.*?): ", str(error), re.DOTALL)
    if wrong_type is None:
        return str(error).replace("\n", " ")
    *parents, name = wrong_type[1].split(".")[1:]
    node: Any = quickstart()
    for part in parents:
        node = getattr(node, part)
    (allowed,) = (field.type for field in dataclasses.fields(node) if field.name == name)
    return f"{wrong_type[1]}: found {wrong_type[2]!r}, allowed: {type_name(allowed)}"


def type_name(annotation: Any) -> str:
    """Return the name of a field's type, such as `int | None`."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def help_text(description: str | None) -> str:
    """Return a command's description, followed by every field of a configuration and its default."""

    def lines(node: Any, path: str) -> Iterator[str]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from lines(value, f"{path}.{field.name}")
            else:
                yield f"  --{path}.{field.name}={value}  ({type_name(field.type)})"

    fields = "\n".join(lines(quickstart(), "config"))
    title = "Fields and their values in the quickstart (see mocosfl_jax/config/fields.py):"
    return f"{description}\n{title}\n{fields}"


def answer(argv: Sequence[str], explanation: str, work: Callable[[Sequence[str]], None]) -> int:
    """Run a command that writes nothing before it is done, or print its description if --help is given.

    Args:
      argv: the command and its arguments.
      explanation: the text for --help.
      work: does the work of the command.

    Returns:
      The exit status: 0, 1 if the machine fails, 2 for a user error, 130 after SIGINT.
    """
    if HELP & set(argv):
        say(explanation)
        return 0
    try:
        work(argv)
    except UserError as error:
        return fail(2, error)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except (OSError, MemoryError) as error:
        return fail(1, str(error) or type(error).__name__)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(1, f"out of memory: {error}")
    return 0


def fail(status: int, error: object) -> int:
    """Print an error as one line on stderr and return `status`."""
    print("error:", " ".join(str(error).split())[:2000], file=sys.stderr)
    return status


def say(line: str) -> None:
    """Print a line on stdout, above the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
