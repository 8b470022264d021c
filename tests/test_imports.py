"""Imports run one way, and the two sides of the cut do not know each other."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "mocosfl_jax"


def imports(module: str) -> set[str]:
    """Modules of the package that the module imports, wherever in the file."""
    path = PACKAGE / f"{module}.py"
    files = [path] if path.exists() else sorted((PACKAGE / module).glob("*.py"))
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "mocosfl_jax":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mocosfl_jax."):
                found.add((node.module or "").split(".")[1])
    return found - {module}


# Each room may use those in earlier lines, and rooms in the same line do not know each other.
ORDER = [
    {"errors", "compiler"},
    {"config", "data", "partition", "augment", "models", "moco", "fedavg", "optim"},
    {"clients", "server", "evaluate", "workdir", "plots"},
    {"mocosfl"},
    {"rounds", "checkpoint"},
    {"experiment"},
    {"report", "monitor"},
    {"loop"},
    {"train"},
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
            assert "flax" not in file.read_text().split(), file
