"""Which commit runs, according to git or pip, and what has changed in the environment."""

import importlib.metadata
import json
import pathlib
import subprocess

import pytest

from mocosfl_jax.runtime.environment import commit, differences

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


def test_differences_name_both_sides() -> None:
    there: dict[str, str | None] = {"jax": "1", "commit": None, "python": "3.11.7"}
    assert differences(there, there) == []
    assert differences(there, {"jax": "2", "commit": "abc", "python": "3.11.7"}) == [
        "jax 1 at the start, 2 now",
        "commit unknown at the start, abc now",
    ]
