"""Imports run one way, and the two sides of the cut do not know each other."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "mocosfl_jax"


def imported(file: pathlib.Path) -> set[str]:
    """Full names of all modules that the file imports, wherever in it."""
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
    """Rooms of the package that the room imports."""
    path = PACKAGE / f"{room}.py"
    files = [path] if path.exists() else sorted((PACKAGE / room).glob("*.py"))
    names = set().union(*map(imported, files))
    return {name.split(".")[1] for name in names if name.startswith("mocosfl_jax.")} - {room}


# Each room may use those in earlier lines, and rooms in the same line do not know each other.
ORDER = [
    {"errors", "compiler", "concatenation", "environment"},
    {"config", "data", "partition", "augment", "models", "moco", "fedavg", "optim", "torch_file", "hosts"},
    {"clients", "server", "probes", "workdir", "plots", "commandline", "official", "encoder_file"},
    {"placement"},
    {"mocosfl", "saving"},
    {"flmoco", "rounds", "checkpoint", "batches", "sharding"},
    {"experiment"},
    {"report", "monitor", "costs"},
    {"loop"},
    {"train", "evaluate", "encode", "export", "import_official"},
]


def test_every_module_has_its_place() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set().union(*ORDER)


def test_imports_run_one_way() -> None:
    earlier: set[str] = set()
    for rooms in ORDER:
        for room in rooms:
            assert imports(room) <= earlier, f"{room} imports {imports(room) - earlier}"
        earlier |= rooms


def test_only_smashed_data_passes_between_clients_and_server() -> None:
    assert "server" not in imports("clients")
    assert "clients" not in imports("server")


def test_only_models_imports_flax() -> None:
    for file in PACKAGE.rglob("*.py"):
        if "models" not in file.parts:
            assert not any(name.split(".")[0] == "flax" for name in imported(file)), file
    assert any(name.startswith("flax") for name in imported(PACKAGE / "models" / "layers.py"))
