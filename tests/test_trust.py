"""Each sentence of "What may be trusted" in docs/reliability.md."""

import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax import commandline, encode, evaluate, load_encoder
from mocosfl_jax.data import download, load
from mocosfl_jax.errors import UserError
from mocosfl_jax.weights.torch_file import read_state_dict


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, ran: pathlib.Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[object, ...]:
        return pathlib.Path.touch, (self.ran,)


@pytest.fixture
def ran(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "ran"


@pytest.fixture
def evil(ran: pathlib.Path) -> bytes:
    """A pickle, which is first shown to run."""
    pickled = pickle.dumps(Evil(ran), protocol=2)
    pickle.loads(pickled)
    assert ran.exists()
    ran.unlink()
    return pickled


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_configuration_file_is_run(tmp_path: pathlib.Path, ran: pathlib.Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    with pytest.raises(UserError, match="get_config"):
        commandline.load_config(str(file))
    assert ran.exists()


@pytest.mark.parametrize("kind", ["npz", "npy", "cifar10"])
def test_data_are_not_run(kind: str, evil: bytes, tmp_path: pathlib.Path, ran: pathlib.Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    objects = np.array([Evil(ran)], dtype=object)
    if kind == "cifar10":
        with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as archive:
            member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
            member.size = len(evil)
            archive.addfile(member, io.BytesIO(evil))
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.save(folder / f"{name}.npy", objects, allow_pickle=True)
    np.savez(folder / "a.npz", x_train=objects, y_train=objects, x_test=objects, y_test=objects)
    with pytest.raises(UserError):
        load(kind, str(folder / "a.npz" if kind == "npz" else folder), None)
    assert not ran.exists()


def test_checkpoints_are_not_run(evil: bytes, run: pathlib.Path, ran: pathlib.Path) -> None:
    for file in (run / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(evil)
    assert evaluate.main(["evaluate", f"--workdir={run}", "--checkpoint=18"]) == 2
    assert not ran.exists()


def test_encoder_files_are_not_run(evil: bytes, tmp_path: pathlib.Path, ran: pathlib.Path) -> None:
    file = tmp_path / "encoder"
    file.write_bytes(evil)
    with pytest.raises(UserError):
        load_encoder(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", evil)
    with pytest.raises(UserError, match="not allowed"):
        read_state_dict(file)
    assert not ran.exists()


def test_a_workdir_is_not_run(run: pathlib.Path, tmp_path: pathlib.Path, ran: pathlib.Path) -> None:
    """Modules in a workdir that is also the current folder, as a command finds them by `python -m`."""
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nraise ImportError\n"
    for name in (
        "re",
        "jax",
        "numpy",
        "absl",
        "tensorflow",
        "tensorflow_datasets",
        "torch",
        "PIL",
        "colorama",
    ):
        (run / f"{name}.py").write_text(code)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "a.png")
    command = ["mocosfl_jax.encode", "--workdir=.", "--images=../pictures", "--out=../features.npz"]
    root = str(pathlib.Path(__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=run,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "features.npz").exists()
    assert not ran.exists()


def test_the_filter_of_a_run_of_several_processes_is_not_of_the_current_folder(
    tmp_path: pathlib.Path, ran: pathlib.Path
) -> None:
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nraise ImportError\n"
    for name in ("re", "signal", "enum"):
        (tmp_path / f"{name}.py").write_text(code)
    root = str(pathlib.Path(__file__).parents[1])
    program = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from mocosfl_jax.runtime.stderr_filter import filter_stderr\n"
        "import os\nfilter_stderr('lost', 'meeting')\nos.write(2, b'from C++\\n')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "from C++\n")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "stl10", "tiny_imagenet"])
def test_evaluate_downloads_nothing(
    name: str,
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: asked.append(args))
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["data"] |= {"name": name, "dir": str(tmp_path / "absent")}
    path.write_text(json.dumps(values))
    assert evaluate.main(["evaluate", f"--workdir={run}"]) == 2
    error = capsys.readouterr().err
    assert f"config.data.dir: {tmp_path / 'absent'}/" in error
    assert "is missing, and only training downloads; get http" in error and error.count("\n") == 1
    assert not asked and not (tmp_path / "absent").exists()
    with pytest.raises(UserError, match="sent 0 bytes"):  # training does
        monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: io.BytesIO(b""))
        download.download("http://localhost/a", tmp_path / "a", 3, "")


@pytest.mark.parametrize("command", ["evaluate", "encode"])
def test_a_data_set_that_the_user_names_is_downloaded_as_in_training(
    command: str,
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """To the user's folder, by default `data`, and not to one that the workdir names."""
    asked: list[object] = []

    def urlopen(url: str, **kwargs: object) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(b"")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.chdir(tmp_path)
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["data"] |= {"name": "cifar10", "dir": str(tmp_path / "foreign")}
    path.write_text(json.dumps(values))
    argv = [f"--workdir={run}", "--data.name=cifar100", *(["--out=x.npz"] if command == "encode" else [])]
    assert {"evaluate": evaluate, "encode": encode}[command].main([command, *argv]) == 2
    error = capsys.readouterr().err
    assert "--data.dir: data/cifar-100" in error and "sent 0 bytes" in error and error.count("\n") == 1
    assert len(asked) == 1 and "cifar-100" in str(asked[0])
    assert not (tmp_path / "foreign").exists()


@pytest.mark.parametrize("name", ["beans", "huggingface:mnist", "kaggle:mnist", "foreign"])
def test_evaluate_prepares_nothing(
    name: str, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    path = run / "config.json"
    values = json.loads(path.read_text())
    values["data"] |= {"name": name, "dir": str(tmp_path / "absent")}
    path.write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.socket.connect", lambda *args: pytest.fail("asked a server"))
        assert evaluate.main(["evaluate", f"--workdir={run}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "absent").exists()
