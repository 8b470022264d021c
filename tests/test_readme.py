"""What README says can be done."""

import pathlib
import re

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def test_the_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(program, names)
    assert names["features"].shape == (4, 128)
    assert int(names["state"].step) == 6


def test_every_file_it_names_is_there() -> None:
    root = pathlib.Path(__file__).parents[1]
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (root / name).exists(), name
