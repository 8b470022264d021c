"""Which commit runs, according to git or pip, and what has changed in the environment."""

import importlib.metadata
import json
import pathlib
import subprocess

import jax
import pytest

from mocosfl_jax.runtime.environment import commit, differences, environment, processor

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git(folder: pathlib.Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def make_checkout(folder: pathlib.Path) -> pathlib.Path:
    """Make a repository with a package, which is returned, and a file beside it."""
    package = folder / "package"
    package.mkdir(parents=True)
    for file in (package / "code.py", folder / "README"):
        file.write_text("first\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return package


def test_a_checkout_reports_its_commit_and_changes(tmp_path: pathlib.Path) -> None:
    package = make_checkout(tmp_path)
    head = git(tmp_path, "rev-parse", "HEAD")
    assert len(head) == 40 and commit(package) == head
    (tmp_path / "notes").write_text("of nobody's concern")
    assert commit(package) == head
    for file in (package / "code.py", package / "new.py", tmp_path / "README"):
        before = file.read_text() if file.exists() else None
        file.write_text("second\n")
        assert commit(package) == f"{head}+changes"
        file.unlink() if before is None else file.write_text(before)
    assert commit(package) == head


def test_a_package_within_another_repository_does_not_take_its_commit(tmp_path: pathlib.Path) -> None:
    make_checkout(tmp_path)
    (tmp_path / "venv").mkdir()
    installed = tmp_path / "venv" / "package"
    installed.mkdir()
    assert commit(installed) is None
    unknown = tmp_path / "other"  # beside the package, but not in git
    unknown.mkdir()
    assert commit(unknown) is None


@pytest.mark.parametrize(
    "record, expected",
    [
        (json.dumps({"url": "https://example.org", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}), COMMIT),
        (json.dumps({"url": "file:///src", "dir_info": {"editable": True}}), None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_an_installation_from_git_has_the_commit_that_pip_recorded(
    record: str | None, expected: str | None, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "mocosfl_jax-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mocosfl-jax\nVersion: 0.1.0\n")
    if record is not None:
        (info / "direct_url.json").write_text(record)
    found = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    package = tmp_path / "site" / "mocosfl_jax"
    package.mkdir()
    assert commit(package) == expected
    copy = tmp_path / "copy" / "mocosfl_jax"  # runs, but is not the installed package
    copy.mkdir(parents=True)
    assert commit(copy) is None


def test_what_changes_sums_and_draws_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environment(jax.devices()[0], {"data": 2, "model": 1})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    with jax.enable_x64(True), jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
        now = environment(jax.devices()[0], {"data": 1, "model": 2})
    changed = {name for name in before if before[name] != now[name]}
    assert changed == {"devices", "xla_flags", "x64", "prng"}
    assert (now["devices"], now["x64"], now["prng"]) == ("data 1 x model 2", "True", "rbg")
    assert now["xla_flags"] == "--xla_cpu_enable_fast_math=true"
    assert before["cpu"] == now["cpu"] != ""


def test_a_processor_is_known_by_more_than_its_name(tmp_path: pathlib.Path) -> None:
    """That of a virtual machine has the name of its maker's whole series."""
    file = tmp_path / "cpuinfo"
    fields = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags : a b\n\n"
    file.write_text(fields.format(0) + fields.format(1))
    assert processor(file) == "AMD EPYC, family 25, model 17"
    file.write_text("processor\t: 0\nBogoMIPS\t: 243.75\n\n")  # ARM
    assert processor(file) == processor(tmp_path / "missing") != ""


def test_differences_name_both_sides() -> None:
    there: dict[str, str | None] = {"jax": "1", "commit": None, "python": "3.11.7"}
    assert differences(there, there) == []
    assert differences(there, {"jax": "2", "commit": "abc", "python": "3.11.7"}) == [
        "jax 1 at the start, 2 now",
        "commit unknown at the start, abc now",
    ]
