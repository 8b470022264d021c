"""Imports follow one order, and neither side of the cut imports the other."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mocosfl_jax"


def imported(file: pathlib.Path) -> set[str]:
    """Full names of all modules that the file imports, at any place in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(room: str) -> set[str]:
    """Rooms of the package that the room imports. A room is a folder, or a file beside the folders."""
    path = PACKAGE / f"{room}.py"
    files = [path] if path.exists() else sorted((PACKAGE / room).glob("*.py"))
    names = set().union(*map(imported, files))
    return {name.split(".")[1] for name in names if name.startswith("mocosfl_jax.")} - {room}


def modules(folder: str, name: str) -> set[str]:
    """Modules of the same folder that one of its modules imports."""
    prefix = f"mocosfl_jax.{folder}."
    names = imported(PACKAGE / folder / f"{name}.py")
    return {found.removeprefix(prefix).split(".")[0] for found in names if found.startswith(prefix)}


# Each room may import those in earlier lines; rooms in the same line do not import each other.
ROOMS = [
    {"errors"},
    {"paths"},
    {"config", "data", "models", "runtime"},
    {"algorithm", "commandline"},
    {"feed", "parallel", "weights"},
    {"evaluation", "privacy"},
    {"pictures"},
    {"training"},
    {"costs"},
    {"page", "preflight", "wire"},
    {"train", "evaluate", "attack", "encode", "export", "import_official", "report", "table"}
    | {"serve", "join", "certificates"},
]


def test_every_room_has_its_place() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set().union(*ROOMS)


def test_imports_follow_the_order() -> None:
    earlier: set[str] = set()
    for rooms in ROOMS:
        for room in rooms:
            assert imports(room) <= earlier, f"{room} imports {imports(room) - earlier}"
        earlier |= rooms


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_no_folder_has_an_import_cycle(folder: str) -> None:
    arrows = {p.stem: modules(folder, p.stem) for p in (PACKAGE / folder).glob("*.py")}
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError


def test_only_smashed_data_passes_between_clients_and_server() -> None:
    assert "server" not in modules("algorithm", "clients")
    assert "clients" not in modules("algorithm", "server")


def test_only_models_imports_flax() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "models" not in file.parts:
            assert not any(name.split(".")[0] == "flax" for name in imported(file)), file
    assert any(name.startswith("flax") for name in imported(PACKAGE / "models" / "layers.py"))


def test_no_test_imports_another() -> None:
    for file in PACKAGE.with_name("tests").rglob("test_*.py"):
        names = {name for name in imported(file) if name.startswith("tests.")}
        assert all(name.startswith("tests.support") for name in names), (file, names)
