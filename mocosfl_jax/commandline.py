"""Shared by all commands: parsing a configuration, and reporting errors in one line.

--config=FILE[:PARAMETER]    a Python file with get_config(), or get_config(parameter)
--config.FIELD=VALUE         one field of the configuration
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import runpy
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from mocosfl_jax import data
from mocosfl_jax.config import CHOICES, PRESET_FIELDS, Config, Data, Own, Resolved, comments, quickstart
from mocosfl_jax.errors import UserError, one_line, renamed
from mocosfl_jax.paths import user_path, why_not_writable

_FIELD = re.compile(r"--?(?:no)?config\.([^=]*)")  # an argument that sets a field
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
    values = flags.FlagValues()
    define(values)
    for argument in argv[1:]:
        check_field(argument, values)
    unset, argv = split_unset(argv)
    names = ["quickstart"]

    def load(path: str) -> Config:
        file, parameter = split_parameter(str(user_path("--config", path)))
        names.append("_".join([Path(file).stem, *parameter]))
        return load_config(file, parameter)

    try:
        config_flags.DEFINE_config_dataclass(
            "config", quickstart(), "A file with get_config().", values, sys_argv=list(argv), parse_fn=load
        )
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(explain(error, values, usage)) from error
    _refuse_nan(values)
    if rest:
        raise UserError(unexpected(repr(rest[0]), rest[0], _names(values), usage))
    given = {match[1] for argument in argv if (match := _FIELD.match(argument))}
    if "moco.preset" in given:  # it sets all of its fields, also those of the quickstart or the file
        unset += [path for field in PRESET_FIELDS if (path := f"moco.{field}") not in given]
    for path in unset:
        *parents, field = path.split(".")
        setattr(functools.reduce(getattr, parents, values.config), field, None)
    return Arguments(values.config, names[-1], values)


def parse_flags(
    argv: Sequence[str],
    usage: str,
    define: Callable[[flags.FlagValues], None],
    required: Sequence[str] = (),
    rest: list[str] | None = None,
) -> Any:
    """Parse a command line without a configuration, with only the flags that `define` adds.

    Args:
      argv: the command and its arguments.
      usage: the allowed arguments, for the error message.
      define: adds the flags.
      required: flags that must have a value.
      rest: receives the arguments that are no flags; None: there may be none.

    Returns:
      The flags, each an attribute.

    Raises:
      UserError: names the first invalid argument, or a required flag without a value.
    """
    values = flags.FlagValues()
    define(values)
    try:
        found = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(explain(error, values, usage)) from error
    _refuse_nan(values)
    if rest is not None:
        rest += found
    elif found:
        raise UserError(unexpected(repr(found[0]), found[0], _names(values), usage))
    for name in required:
        if not values[name].value:
            raise UserError(f"--{name} is missing; allowed: {usage}")
    return values


def _refuse_nan(values: flags.FlagValues) -> None:
    """Raise UserError for a flag that is not a number, which passes any bound."""
    for name in values:
        value = values[name].value
        # Fields of the configuration have checks of their own.
        if isinstance(value, float) and math.isnan(value) and not name.startswith("config."):
            raise UserError(f"--{name}: found nan, allowed: a number")


def define_data(values: flags.FlagValues) -> None:
    """Define the flags of a data set, which are named as the fields of `config.data`."""
    flags.DEFINE_string("data.name", None, "Name of the data set.", flag_values=values)
    flags.DEFINE_string("data.dir", None, "Where the data set is.", flag_values=values)
    flags.DEFINE_float(
        "data.max_broken", None, "Share of its images that may fail to decode.", 0.0, 1.0, flag_values=values
    )


def given_data(values: flags.FlagValues) -> dict[str, Any]:
    """Return the fields of `config.data` that are given by the flags of `define_data`."""
    names = ("name", "dir", "max_broken")
    return {name: values[f"data.{name}"].value for name in names if values[f"data.{name}"].value is not None}


def load_data(given: dict[str, Any], image_size: int) -> data.Dataset:
    """Load the data set that a user has named by flags. It is downloaded if training would do so.

    Args:
      given: from `given_data`, with a name. Other fields have the defaults of `Data`.
      image_size: in pixels.

    Raises:
      UserError: as for `data.load`.
    """
    wanted = Data(**given)
    with renamed({"name": "--data.name", "directory": "--data.dir", "max_broken": "--data.max_broken"}):
        return data.load(wanted.name, wanted.dir, image_size, max_broken=wanted.max_broken)


def output_file(text: str) -> Path:
    """Return the path given by --out.

    Raises:
      UserError: if the path is a URL, a folder or a device, or its parent folder does not exist or takes no
        files.
    """
    path = user_path("--out", text)
    if (path.exists() and not path.is_file()) or not path.parent.is_dir():  # a device would be replaced
        raise UserError(f"--out: found {path}, allowed: a file in an existing folder")
    if why := why_not_writable(path.parent):
        raise UserError(f"--out: found {path}, allowed: a writable file ({why})")
    return path


def make_folder(name: str, folder: Path) -> None:
    """Make the folder of a command's results, before the work of which they come.

    Args:
      name: the flag that names it, for messages.
      folder: it may be there already.

    Raises:
      UserError: if it cannot be made or takes no files.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name}: found {folder}, allowed: a folder that can be made ({error.strerror})"
        ) from error
    if why := why_not_writable(folder):
        raise UserError(f"{name}: found {folder}, allowed: a folder that can be written to ({why})")


def split_parameter(path: str) -> tuple[str, list[str]]:
    """Split FILE:PARAMETER into the file and a list with the parameter; the list is empty without one.

    Example:
      >>> split_parameter("configs/cifar10_cross_silo.py:20")
      ('configs/cifar10_cross_silo.py', ['20'])
    """
    file, colon, parameter = path.rpartition(":")
    return (file, [parameter]) if colon and file.endswith(".py") else (path, [])


def split_unset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config.FIELD=None` and `--config.FIELD None` out of a command line: to absl, None is no number.

    Returns:
      The paths of these fields, without `config.`, and the other arguments. Whether a field exists and may be
      None is not checked here.

    Example:
      >>> split_unset(["train", "--config.clients.cohort=None", "--config.epochs", "2"])
      (['clients.cohort'], ['train', '--config.epochs', '2'])
    """
    unset: list[str] = []
    others: list[str] = []
    for argument in argv:
        before = re.fullmatch(r"--?config\.([^=]+)", others[-1]) if others else None
        if before and argument.lower() == "none":
            others.pop()
            unset.append(before[1])
        elif match := re.fullmatch(r"--?config\.(.+)=(?i:none)", argument):
            unset.append(match[1])
        else:
            others.append(argument)
    return unset, others


def check_field(argument: str, flag_names: Iterable[str] = ()) -> None:
    """Raise UserError if `argument` sets a field that does not exist in a configuration.

    The message says which field, or flag of `flag_names`, was probably meant.
    """
    match = _FIELD.match(argument)
    node: Any = quickstart()
    path = "config"
    if match and match[1].split(".")[0] == "own":
        raise UserError(
            f"config.{match[1]}: found a value, allowed: a function in a file given by --config=FILE"
        )
    for part in match[1].split(".") if match else []:
        names = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            allowed = ", ".join(names) if names else "no field below it"
            meant = did_you_mean(argument, ["config", *flag_names]) if names else ""
            hint = f" ({meant})" if meant else ""
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


MOST_GUESSES = 3
# What other programs call it, in the words that are used here.
OTHER_WORDS = {"learning_rate": "lr", "dataset": "data", "arch": "model", "output": "out"}


def did_you_mean(argument: str, flag_names: Sequence[str]) -> str:
    """Return what was probably meant by an argument that does not exist, or "" if nothing is like it.

    With `config` in `flag_names`, it may be a field of the configuration.

    Example:
      >>> did_you_mean("--seed=3", ["config", "workdir"])
      'did you mean --config.seed=3?'
      >>> did_you_mean("--config.width=8", ["config", "workdir"])
      'did you mean --config.model.width=8?'
    """
    name, equals, value = argument.lstrip("-").partition("=")
    names = [each for each in flag_names if not each.startswith("config")]
    if "config" in flag_names:
        names += [f"config.{path}" for path in field_paths()]
    found = [f"--{each}{equals}{value}" for each in guesses(name.removeprefix("config."), names)]
    return f"did you mean {one_of(found)}?" if found else ""


def guesses(wanted: str, names: Iterable[str]) -> list[str]:
    """Return up to three names of flags and fields that are most like the one that was wanted.

    The best kind of likeness counts: the same name or section; the same last part; nearly the same letters;
    the same words, such as `num_clients` and `clients.num`; one within the other; similar letters. Names in
    the section that was given come first.

    Example:
      >>> guesses("num_clients", ["config.clients.num", "config.clients.cohort", "workdir"])
      ['config.clients.num']
    """
    wanted = OTHER_WORDS.get(wanted.lower(), wanted.lower())
    section, _, last = wanted.rpartition(".")
    words = set(re.split(r"[._-]", wanted)) - {""}
    kinds: list[list[str]] = [[] for _ in range(6)]
    for name in sorted(names, key=lambda name: not name.startswith(f"config.{section}.")):
        path = name.removeprefix("config.")
        end = path.rpartition(".")[2]
        likenesses = (
            path == wanted or path.startswith(f"{wanted}."),
            end == last,
            difflib.SequenceMatcher(None, last, end).ratio() > 0.85,
            bool(words) and words <= set(re.split(r"[._]", path)),
            min(len(end), len(last)) >= 3 and (last in path or end in last),
            difflib.SequenceMatcher(None, last, end).ratio() > 0.7,
        )
        for kind, alike in zip(kinds, likenesses, strict=True):
            if alike:
                kind.append(name)
    return next((kind[:MOST_GUESSES] for kind in kinds if kind), [])


def one_of(words: Sequence[str]) -> str:
    """Return the words as `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def field_paths(node: Any = None, path: str = "") -> list[str]:
    """Return the paths of all fields of a configuration, such as `clients.num`."""
    node = quickstart() if node is None else node
    paths = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = f"{path}{field.name}"
        paths += field_paths(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return paths


def load_config(file: str, parameter: Sequence[str] = ()) -> Config:
    """Return the configuration from get_config(*parameter) of a Python file, which may import its neighbours.

    Raises:
      UserError: if the file does not exist, fails, or returns something else.
    """
    try:
        there = Path(file).is_file()
    except OSError as error:
        raise UserError(f"--config: {error}, allowed: a Python file with get_config()") from error
    if not there:
        raise UserError(f"--config: found no file {file}, allowed: a Python file with get_config()")
    try:
        with _importable(Path(file).resolve().parent):
            config = runpy.run_path(file)["get_config"](*parameter)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{file}: {one_line(error)}") from error
    if not isinstance(config, Config) or isinstance(config, Resolved):
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


def explain(error: BaseException, values: flags.FlagValues, usage: str) -> str:
    """Describe an absl parsing error in one line.

    Args:
      error: of the parser.
      values: the flags that were defined.
      usage: the allowed arguments.
    """
    cause = error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is not None:
        return str(cause)
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname in ("resume", "restore") and {"config", "workdir"} <= set(values):
            return f"found --{error.flagname}; the command that started a run resumes it, without a flag"
        return unexpected(f"--{error.flagname}", error.flagvalue, _names(values), usage)
    wrong_type = re.match(r"flag --(config\.[\w.]+)=(.*?): ", str(error), re.DOTALL)
    if wrong_type is None:
        return f"{' '.join(str(error).split()).rstrip(' .?')}; allowed: {usage}"
    *parents, name = wrong_type[1].split(".")[1:]
    node: Any = quickstart()
    for part in parents:
        node = getattr(node, part)
    (allowed,) = (field.type for field in dataclasses.fields(node) if field.name == name)
    return f"{wrong_type[1]}: found {wrong_type[2]!r}, allowed: {type_name(allowed)}"


def _names(values: flags.FlagValues) -> list[str]:
    """Return the names of the flags, without `config` where no field can be set, only a file given."""
    return [name for name in values if name != "config" or type(values[name]) is not flags.Flag]


def unexpected(shown: str, argument: str, flag_names: Sequence[str], usage: str) -> str:
    """Describe an argument that does not exist: what was probably meant, or else what is allowed."""
    return f"found {shown}, {did_you_mean(argument, flag_names) or f'allowed: {usage}'}"


def type_name(annotation: Any) -> str:
    """Return the name of a field's type, such as `int or None`."""
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return one_of(name.split(" | "))


def help_text(description: str | None) -> str:
    """Return a command's description, followed by every field: its default, type and meaning.

    The meanings are the comments of `config.fields`, wrapped to the width of the terminal.
    """
    width = max(40, shutil.get_terminal_size().columns)

    def wrapped(text: str, indent: str, further: str) -> str:
        return textwrap.fill(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=further,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def lines(node: Any, path: str) -> Iterator[str]:
        meanings = comments(type(node))
        for field in dataclasses.fields(node):
            value, name = getattr(node, field.name), f"{path}{field.name}"
            if dataclasses.is_dataclass(value):
                yield f"\n{wrapped(f'{name}: {value.__doc__}', '', '  ')}"
                yield from lines(value, f"{name}.")
            else:
                words = CHOICES.get(name, ())
                optional = ("None",) if words and type(None) in typing.get_args(field.type) else ()
                allowed = one_of([*words, *optional]) if words else type_name(field.type)
                yield wrapped(
                    f"--config.{name}={value}  ({allowed})  {meanings.get(field.name, '')}", "  ", "      "
                )

    title = (
        "Fields of the configuration, each with its value in the quickstart, what it may be, and its meaning:"
    )
    return "\n".join([(description or "").strip(), "", wrapped(title, "", ""), "", *lines(quickstart(), "")])


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
