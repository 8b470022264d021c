"""Every layout gives back the images that were written to it; every mistake gives one clear line."""

import functools
import gzip
import hashlib
import http.client
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import time
import tracemalloc
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mocosfl_jax.data import (
    NAMES,
    Unused,
    cifar_files,
    cifar_pickle,
    decode,
    download,
    images,
    in_memory,
    stl10,
    svhn,
    tiny_imagenet,
)
from mocosfl_jax.data import load as load_dataset
from mocosfl_jax.errors import UserError
from tests.support.data_files import (
    CLASSES,
    files,
    mat,
    pack,
    pictures,
    planes,
    shrink,
    small,
    tiny_files,
    unpack,
    write_folder,
    write_svhn,
    write_tree,
    written,
    zip_tree,
)


class Arrays(NamedTuple):
    """A data set whose images have all been read."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str
    unused: tuple[Unused, ...]
    whole: Any


def load(name: str, directory: str, image_size: Any, max_broken: float = 0.0) -> Arrays:
    """The data set, after a look at its images where they are: some of them, twice, in any order."""
    dataset = load_dataset(name, directory, image_size, max_broken)
    whole = in_memory(dataset)
    for split in ("x_train", "x_test"):
        lazy, read = getattr(dataset, split), getattr(whole, split)
        some = np.random.default_rng(0).integers(0, len(read), (2, 3))
        assert len(lazy) == len(read) and lazy.shape == read.shape and type(read) is np.ndarray
        np.testing.assert_array_equal(lazy[some], read[some])
        np.testing.assert_array_equal(lazy[1:4:2], read[1:4:2])
    return Arrays(**whole._asdict())


def refuses(match: str, name: str, directory: Path | str, image_size: Any = None) -> str:
    """The message of the UserError, which is one line and matches."""
    with pytest.raises(UserError, match=match) as caught:
        load(name, str(directory), image_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(dataset: Arrays, written: dict[str, np.ndarray]) -> None:
    for key, value in written.items():
        np.testing.assert_array_equal(getattr(dataset, key), value)
        assert getattr(dataset, key).dtype == (np.uint8 if key.startswith("x") else np.int32)
        assert getattr(dataset, key).flags.c_contiguous


# CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CIFAR set whose files are small, so that tests are quick."""
    shrink(str(request.param), monkeypatch)
    return str(request.param)


@pytest.fixture
def small10(monkeypatch: pytest.MonkeyPatch) -> str:
    shrink("cifar10", monkeypatch)
    return "cifar10"


@pytest.mark.parametrize("kind", ["binary", "2", "4", "5"])
def test_cifar_is_the_same_from_every_layout(name: str, kind: str, tmp_path: Path) -> None:
    layout = cifar_files.LAYOUTS[name][0 if kind == "binary" else 1]
    data = written(name)
    contents = files(name, kind, data)
    (tmp_path / "packed").mkdir()
    pack(tmp_path / "packed" / layout.archive, layout.folder, contents)
    folder = unpack(tmp_path / "unpacked" / layout.folder, contents)
    for directory in (tmp_path / "packed", tmp_path / "unpacked", folder):
        dataset = load(name, str(directory), None)
        same(dataset, data)
        assert dataset.class_names == tuple(f"class{label}" for label in range(CLASSES[name]))
        assert ("not the published file" in dataset.source) == (directory.name == "packed")
    assert dataset.mean == {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}[name]
    assert dataset.std == {"cifar10": (0.2023, 0.1994, 0.2010), "cifar100": (0.2673, 0.2564, 0.2762)}[name]


def test_cifar_reads_the_pickles_of_python_2(small10: str, tmp_path: Path) -> None:
    """The official files: byte strings for keys, names and pixels, and the old module of NumPy."""
    layout = cifar_files.LAYOUTS["cifar10"][1]
    data = written("cifar10")

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def python2(x: np.ndarray, y: np.ndarray) -> bytes:
        pixels = planes(x)
        rows, columns = (b"J" + struct.pack("<i", size) for size in pixels.shape)
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
        array += b"(K\x01(" + rows + columns + b"tcnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR"
        array += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        array += b"T" + struct.pack("<i", pixels.size) + pixels.tobytes() + b"tb"
        labels = b"](" + b"".join(b"K" + bytes([label]) for label in y) + b"e"
        return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."

    contents = files("cifar10", "2", data)
    del contents[layout.names]
    for n, file in enumerate(layout.train):
        rows = slice(n * layout.rows[0], (n + 1) * layout.rows[0])
        contents[file] = python2(data["x_train"][rows], data["y_train"][rows])
    contents[layout.test] = python2(data["x_test"], data["y_test"])
    unpack(tmp_path / layout.folder, contents)
    dataset = load("cifar10", str(tmp_path), None)
    same(dataset, data)
    assert dataset.class_names[0] == "airplane"


def test_cifar_official_files_have_ten_thousand_images(tmp_path: Path) -> None:
    layout = cifar_files.LAYOUTS["cifar10"][0]
    records = np.zeros((10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    records[:, 1:1025] = 200  # red
    contents = {file: records.tobytes() for file in (*layout.train, layout.test)}
    pack(tmp_path / layout.archive, layout.folder, contents)
    dataset = load("cifar10", str(tmp_path), None)
    assert dataset.x_train.shape == (50_000, 32, 32, 3) and dataset.x_test.shape == (10_000, 32, 32, 3)
    assert (dataset.x_train == [200, 0, 0]).all()
    contents["data_batch_3.bin"] = contents["data_batch_3.bin"][:-3073]
    unpack(tmp_path / layout.folder, contents)
    refuses(
        r"data_batch_3.bin: truncated .* 30,726,927 bytes, 30,730,000", "cifar10", tmp_path / layout.folder
    )


def test_cifar_with_the_published_checksum_is_not_warned_about(
    small10: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = cifar_files.LAYOUTS["cifar10"]
    layout = layouts[0]
    path = pack(tmp_path / layout.archive, layout.folder, files("cifar10", "binary", written("cifar10")))
    said: list[str] = []
    monkeypatch.setattr(
        "mocosfl_jax.data.download.logging.warning", lambda text, *args: said.append(text % args)
    )
    load("cifar10", str(tmp_path), None)
    assert len(said) == 1 and str(path) in said[0]
    published = layout._replace(
        size=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(cifar_files.LAYOUTS, "cifar10", (published, layouts[1]))
    assert load("cifar10", str(tmp_path), None).source == str(path)
    assert len(said) == 1


class Touch:
    """Unpickled by `pickle`, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_malicious_pickles_do_not_run(small10: str, tmp_path: Path, protocol: int) -> None:
    layout = cifar_files.LAYOUTS["cifar10"][1]
    contents = files("cifar10", "2", written("cifar10"))
    mark = tmp_path / "mark"
    contents["data_batch_2"] = pickle.dumps({"data": Touch(mark), "labels": []}, protocol=protocol)
    unpack(tmp_path / layout.folder, contents)
    assert "mkdir" in refuses("data_batch_2: not a readable pickle: .* not allowed", "cifar10", tmp_path)
    assert not mark.exists()
    pickle.loads(contents["data_batch_2"])
    assert mark.exists()  # it was a real one


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        b"\x80\x02]q\x00.",
        b"\x80\x02}K\x01K\x02s.",
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b"x.",
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        b"ccopyreg\n_reconstructor\n.",
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0bcore.system\x93.",
        b"\x80\x02cnumpy\ndtype\n}U\x04nameU\x04evilsb.",
        b"\x80\x02cnumpy\ndtype\nN}U\x04nameU\x04evils\x86b.",
        pickle.dumps({"data": np.array([None])}),
        pickle.dumps({"data": np.zeros(3, "datetime64[s]")}),
        pickle.dumps({"data": np.float64(1)}),
    ],
)
def test_other_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError) as caught:
        cifar_pickle.read(data)
    assert "\n" not in str(caught.value)


def test_pickles_cannot_grow() -> None:
    """A long string encoded again and again takes more memory than its file."""
    long = b"X" + struct.pack("<I", 1 << 16) + b"a" * (1 << 16) + b"q\x00U\x06latin1q\x01"
    encode = b"c_codecs\nencode\n(h\x00h\x01tR"
    with pytest.raises(ValueError, match="more encoded bytes"):
        cifar_pickle.read(b"\x80\x02" + long + b"](" + encode * 50 + b"e.")


def references(make: bytes, levels: int) -> bytes:
    """A program: `make` makes something of ten references to what it made before, and so on."""
    program = b"K\x01q\x00"
    for level in range(levels):
        program += b"(" + (b"h" + bytes([level])) * 10 + make + b"q" + bytes([level + 1])
    return program


def entry(program: bytes, key: bytes = b"labels") -> bytes:
    """A pickle of a dictionary whose only value is what a program made last."""
    return b"\x80\x02" + program + b"q\xff}U" + bytes([len(key)]) + key + b"h\xffs."


@pytest.mark.parametrize(
    "program",
    [
        entry(references(b"l", 7)),  # ten million numbers in 200 bytes
        entry(references(b"t", 7)),
        entry(references(b"t", 7) + b"cnumpy\ndtype\nh\x07R"),
        entry(
            references(b"t", 7) + b"cnumpy.core.numeric\n_frombuffer\n(U\x01acnumpy\ndtype\nU\x02u1\x85R"
            b"h\x07U\x01CtR"
        ),
        b"\x80\x02" + references(b"t", 60) + b"}h\x3cK\x01s.",  # a key whose hash would take forever
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.",  # a key whose hash would overflow the stack
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        entry(b"(lI" + b"1" * 5_000 + b"\na", b"label_names"),
        entry(
            b"\x8b" + struct.pack("<I", 200) + b"\x7f" * 200 + b"q\x00(" + b"h\x00" * 200_000 + b"tq\x01"
            b"cnumpy.core.numeric\n_frombuffer\n(U\x01acnumpy\ndtype\nU\x02u1\x85Rh\x01U\x01CtR"
        ),  # a product of 40 million bytes
    ],
    ids=["lists", "tuples", "argument", "shape", "key", "deep_key", "deep_list", "digits", "sizes"],
)
def test_references_do_not_multiply(program: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            cifar_pickle.read(program)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names, match",
    [
        ([1] * 9 + [10**4999], "class names are numbers, text is needed"),
        (["a", 1, *"cdefghij"], "class names are numbers, text is needed"),
        (["x" * 10_000] * 20_000, "20000 class names, 10 are needed"),
        ([b"\xff"] * 10, "class names are not text"),
        ("abcdefghij", "0 class names, 10 are needed"),
    ],
)
def test_class_names_in_pickles_are_text(small10: str, names: Any, match: str, tmp_path: Path) -> None:
    layout = cifar_files.LAYOUTS["cifar10"][1]
    contents = files("cifar10", "2", written("cifar10"))
    contents["batches.meta"] = pickle.dumps({"label_names": names}, protocol=2)
    unpack(tmp_path / layout.folder, contents)
    refuses(f"batches.meta: {match}", "cifar10", tmp_path)


def test_pickles_hold_orders_and_scalars() -> None:
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    content = {"c": array, "fortran": np.asfortranarray(array), "n": [np.int64(7)], "t": "text"}
    for protocol in (2, 4, 5):
        read = cifar_pickle.read(pickle.dumps(content, protocol=protocol))
        np.testing.assert_array_equal(read["c"], array)
        np.testing.assert_array_equal(read["fortran"], array)
        assert read["n"] == [7]


def test_broken_archives_are_refused(small10: str, tmp_path: Path) -> None:
    layout = cifar_files.LAYOUTS["cifar10"][0]
    contents = files("cifar10", "binary", written("cifar10"))
    path = pack(tmp_path / layout.archive, layout.folder, contents)
    good = path.read_bytes()
    for cut in (0, 5, len(good) // 2, len(good) - 9):
        path.write_bytes(good[:cut])
        refuses(f"{layout.archive}.*(truncated|missing)", "cifar10", tmp_path)
    rng = np.random.default_rng(0)
    for place in [*rng.integers(10, len(good) - 8, 20), len(good) - 6]:  # the last: the checksum
        path.write_bytes(good[:place] + bytes([good[place] ^ 64]) + good[place + 1 :])
        refuses(layout.archive, "cifar10", tmp_path)
    path.write_bytes(b"<html>not found</html>")
    refuses("malformed archive", "cifar10", tmp_path)
    path.write_bytes(gzip.compress(b"not a tar" * 1000))
    refuses("malformed archive", "cifar10", tmp_path)
    path.write_bytes(good)
    same(load("cifar10", str(tmp_path), None), written("cifar10"))


def test_archives_with_wrong_members_are_refused(
    small10: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = cifar_files.LAYOUTS["cifar10"][0]
    contents = files("cifar10", "binary", written("cifar10"))
    path = tmp_path / layout.archive

    lacking = {file: data for file, data in contents.items() if file != "data_batch_4.bin"}
    pack(path, layout.folder, lacking)
    refuses("data_batch_4.bin is missing", "cifar10", tmp_path)
    pack(path, "elsewhere", contents)
    refuses("data_batch_1.bin is missing", "cifar10", tmp_path)
    pack(path, layout.folder, contents | {"data_batch_1.bin": contents["data_batch_1.bin"] + b"x"})
    refuses("data_batch_1.bin: truncated or malformed, 61,461 bytes", "cifar10", tmp_path)
    pack(path, layout.folder, contents | {"batches.meta.txt": b"one\ntwo\n"})
    refuses("batches.meta.txt: 2 class names, 10 are needed", "cifar10", tmp_path)
    pack(path, layout.folder, contents | {"batches.meta.txt": b"\xff" * 20})
    refuses("class names are not text", "cifar10", tmp_path)

    outside = tmp_path / "outside"
    outside.write_bytes(contents["test_batch.bin"])
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{layout.folder}/test_batch.bin")
        info.type, info.linkname = tarfile.SYMTYPE, str(outside)
        tar.addfile(info)
    refuses("test_batch.bin: not a regular file", "cifar10", tmp_path)

    with tarfile.open(path, "w:gz") as tar:  # a header that claims a terabyte
        info = tarfile.TarInfo(f"{layout.folder}/test_batch.bin")
        info.size = 1 << 40
        tar.fileobj.write(info.tobuf())
    refuses("test_batch.bin: truncated or malformed, 1,099,511,627,776 bytes", "cifar10", tmp_path)

    monkeypatch.setattr(cifar_files, "_MAX_UNPACKED", 1 << 20)
    pack(path, layout.folder, {"zeros": bytes(1 << 21)} | contents)
    assert path.stat().st_size < 1 << 20
    refuses("unpacks to more than", "cifar10", tmp_path)


def test_cifar_labels_out_of_range_and_wrong_arrays(small10: str, tmp_path: Path) -> None:
    data = written("cifar10")
    layout, pickled = cifar_files.LAYOUTS["cifar10"]
    contents = files("cifar10", "binary", data)
    folder = unpack(tmp_path / "a" / layout.folder, contents)
    wrong = bytearray(contents["test_batch.bin"])
    wrong[3073] = 10
    (folder / "test_batch.bin").write_bytes(wrong)
    refuses("test_batch.bin: label 10, allowed: 0 to 9", "cifar10", tmp_path / "a")

    folder = unpack(tmp_path / "b" / pickled.folder, files("cifar10", "4", data))
    x, y = planes(data["x_test"]), data["y_test"].tolist()
    for content, match in (
        ({"data": x, "labels": [-1, *y[1:]]}, "label -1, allowed"),
        ({"data": x, "labels": y[1:]}, "labels must be 30 integers"),
        ({"data": x, "labels": [[1], *y[1:]]}, "a list with list, allowed: integers, text and bytes"),
        ({"data": x, "labels": [True, *y[1:]]}, "a list with bool"),
        ({"data": x, "labels": {1: 2}}, "a dictionary with keys that are not text"),
        ({"data": x, "labels": {"a": {}}}, "a dictionary with dict, allowed: integers"),
        ({"data": x, "labels": ["a", *y[1:]]}, "labels must be 30 integers"),
        ({"data": x, "labels": [1 << 80, *y[1:]]}, "labels must be 30 integers"),
        ({"data": x}, "labels must be 30 integers"),
        ({"data": x[1:], "labels": y[1:]}, r"data must be a uint8 array \[30, 3072\]"),
        ({"data": x.astype(np.int64), "labels": y}, "bytes, at most|data must be a uint8"),
        ({"labels": y}, "data must be a uint8 array"),
    ):
        (folder / "test_batch").write_bytes(pickle.dumps(content))
        refuses(f"test_batch: .*{match}|test_batch: {match}", "cifar10", tmp_path / "b")


def test_cifar_without_every_class_is_refused(small10: str, tmp_path: Path) -> None:
    data = written("cifar10")
    data["y_train"] = np.where(data["y_train"] == 7, 0, data["y_train"])
    layout = cifar_files.LAYOUTS["cifar10"][0]
    unpack(tmp_path / layout.folder, files("cifar10", "binary", data))
    refuses("no image has label 7", "cifar10", tmp_path)


def answer_with(monkeypatch: pytest.MonkeyPatch, respond: Callable[[], io.BytesIO]) -> list[str]:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return respond()

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_download_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> io.BytesIO:
        raise urllib.error.URLError("no route to host")

    answer_with(monkeypatch, fail)
    target = tmp_path / "new" / "cifar-100-binary.tar.gz"
    message = refuses("no route to host", "cifar100", target.parent)
    assert str(target) in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz" in message
    assert not list(target.parent.iterdir())

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise http.client.IncompleteRead(b"")

    answer_with(monkeypatch, Cut)
    refuses("IncompleteRead", "cifar100", target.parent)
    assert not list(target.parent.iterdir())


def test_download_is_kept_only_with_the_published_checksum(
    small10: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = cifar_files.LAYOUTS["cifar10"]
    layout = layouts[0]
    data = written("cifar10")
    good = pack(tmp_path / "good", layout.folder, files("cifar10", "binary", data)).read_bytes()
    published = layout._replace(size=len(good), sha256=hashlib.sha256(good).hexdigest())
    monkeypatch.setitem(cifar_files.LAYOUTS, "cifar10", (published, layouts[1]))
    target = tmp_path / "data"

    for bad in (good[:-1], good[:-1] + b"?", good + b"x" * (1 << 21), b""):
        answer_with(monkeypatch, functools.partial(io.BytesIO, bad))
        message = refuses("SHA-256", "cifar10", target)
        assert hashlib.sha256(good).hexdigest() in message
        assert not list(target.iterdir())

    asked = answer_with(monkeypatch, functools.partial(io.BytesIO, good))
    for _ in range(2):  # the second time it is there
        dataset = load("cifar10", str(target), None)
        same(dataset, data)
        assert dataset.source == str(target / layout.archive)
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert [path.name for path in target.iterdir()] == [layout.archive]


def test_of_several_processes_one_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes: each opens the lock anew, so they exclude each other as processes do."""
    content, target = b"contents", tmp_path / "data" / "archive"
    digest = hashlib.sha256(content).hexdigest()
    answers = [b"broken", content]  # the first one that asks fails, and the next one tries

    def respond() -> io.BytesIO:
        time.sleep(0.2)  # all others are there by then
        return io.BytesIO(answers.pop(0))

    asked = answer_with(monkeypatch, respond)

    def want(number: int) -> str:
        try:
            download.download("http://there", target, len(content), digest)
        except UserError as error:
            return str(error)
        return target.read_bytes().decode()

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(want, range(4)), key=len)[::-1]
    assert "instead of 8 bytes" in found[0] and found[1:] == ["contents"] * 3
    assert len(asked) == 2
    assert list(target.parent.iterdir()) == [target]


def test_cifar_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses("directory: .*file is a file", "cifar10", tmp_path / "file")
    refuses("directory", "cifar10", tmp_path / "file" / "below")
    refuses("directory", "cifar10", tmp_path / ("x" * 300))


# SVHN


def test_svhn_round_trip(tmp_path: Path) -> None:
    data = write_svhn(tmp_path)
    dataset = load("svhn", str(tmp_path), None)
    same(dataset, data)
    assert dataset.class_names == tuple("0123456789")
    assert (dataset.mean, dataset.std) == ((0.3522, 0.4004, 0.4463), (0.1189, 0.1377, 0.1784))
    assert dataset.source.count("not the published file") == 2
    mat(
        tmp_path / "test_32x32.mat",
        data["x_test"],
        data["y_test"],
        {"y": np.full((20, 1), 3.0), "other": np.ones(3)},
    )
    assert load("svhn", str(tmp_path), None).y_test.tolist() == [3] * 20


def test_svhn_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    refuses("file is a file", "svhn", tmp_path / "file")
    data = write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    x, y = data["x_train"], data["y_train"]
    good = path.read_bytes()
    for cut in (0, 100, len(good) // 2, len(good) - 9):
        path.write_bytes(good[:cut])
        refuses("train_32x32.mat: (truncated or malformed|X is missing|y is missing)", "svhn", tmp_path)
    path.write_bytes(b"<html>not found</html>" * 100)
    refuses("train_32x32.mat: truncated or malformed", "svhn", tmp_path)
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"X": x}, r"X is uint8 \[40, 32, 32, 3\], allowed: uint8 \[32, 32, 3, n\]"),
        ({"X": x.transpose(1, 2, 3, 0) / 255}, "X is double"),
        ({"X": {"a": 1}}, "X is struct"),
        ({"y": y}, r"y is int32 \[1, 40\], allowed: numbers \[n, 1\], n 40"),
        ({"y": np.full((40, 1), 11)}, "label 11, allowed: 1 to 10"),
        ({"y": np.full((40, 1), 0)}, "label 0, allowed: 1 to 10"),
        ({"y": np.full((40, 1), 1.5)}, "label 1.5, allowed: 1 to 10"),
        ({"y": np.full((40, 1), "a", object)}, "malformed"),
    )
    for change, match in changes:
        mat(path, x, y, change)
        refuses(f"train_32x32.mat: .*{match}", "svhn", tmp_path)
    scipy.io.savemat(path, {"X": x.transpose(1, 2, 3, 0)})
    refuses(r"y is missing \[\]", "svhn", tmp_path)

    # Zeros pack well: the claim is refused before it is unpacked.
    mat(path, np.zeros((1000, 32, 32, 3), np.uint8), np.ones(1000, int))
    assert path.stat().st_size < 10_000
    with monkeypatch.context() as patch:
        patch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}.__getitem__)
        patch.setattr(scipy.io, "loadmat", None)
        refuses("X: needs 3,072,000 bytes of memory, this machine has 1,000", "svhn", tmp_path)


def test_svhn_downloads_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_svhn(tmp_path)
    contents = {file: (tmp_path / file).read_bytes() for file in svhn._FILES}
    published = {file: (len(c), hashlib.sha256(c).hexdigest()) for file, c in contents.items()}
    monkeypatch.setattr(svhn, "_FILES", published)
    (tmp_path / "test_32x32.mat").unlink()
    asked = answer_with(monkeypatch, lambda: io.BytesIO(contents["test_32x32.mat"]))
    dataset = load("svhn", str(tmp_path), None)
    same(dataset, data)
    assert asked == ["http://ufldl.stanford.edu/housenumbers/test_32x32.mat"]
    assert dataset.source == f"{tmp_path / 'train_32x32.mat'} and {tmp_path / 'test_32x32.mat'}"


# STL-10


@pytest.fixture
def stl10_files(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """Images and the files of an official folder with few of them."""
    monkeypatch.setattr(stl10, "_ROWS", {"train": 20, "test": 10})
    data: dict[str, np.ndarray] = {}
    contents = {"class_names.txt": b"airplane\nbird\n", "unlabeled_X.bin": bytes(96 * 96 * 3)}
    for split, count, seed in (("train", 20, 0), ("test", 10, 1)):
        x, y = pictures(count, 10, seed, 96)
        data |= {f"x_{split}": x, f"y_{split}": y}
        column_major = b"".join(image[:, :, channel].tobytes("F") for image in x for channel in range(3))
        contents |= {f"{split}_X.bin": column_major, f"{split}_y.bin": (y + 1).astype(np.uint8).tobytes()}
    return data, contents


StlFiles = tuple[dict[str, np.ndarray], dict[str, bytes]]


def test_stl10_is_the_same_packed_and_unpacked(
    stl10_files: StlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, contents = stl10_files
    (tmp_path / "packed").mkdir()
    archive = pack(tmp_path / "packed" / "stl10_binary.tar.gz", "stl10_binary", contents)
    folder = unpack(tmp_path / "unpacked" / "stl10_binary", contents)
    for directory in (archive.parent, folder.parent, folder):
        dataset = load("stl10", str(directory), None)
        same(dataset, data)
        assert dataset.class_names[7] == "monkey" and dataset.mean == (0.4914, 0.4822, 0.4465)
        assert ("not the published file" in dataset.source) == (directory == archive.parent)
    assert load("stl10", str(folder), 32).x_test.shape == (10, 32, 32, 3)

    good = archive.read_bytes()
    monkeypatch.setattr(stl10, "_SIZE", len(good))
    monkeypatch.setattr(stl10, "_SHA256", hashlib.sha256(good).hexdigest())
    asked = answer_with(monkeypatch, functools.partial(io.BytesIO, good))
    dataset = load("stl10", str(tmp_path / "new"), None)
    same(dataset, data)
    assert dataset.source == str(tmp_path / "new" / "stl10_binary.tar.gz")
    assert asked == ["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"]


def test_stl10_mistakes(stl10_files: StlFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, contents = stl10_files
    (tmp_path / "file").write_text("")
    refuses("file is a file", "stl10", tmp_path / "file")
    folder = unpack(tmp_path / "stl10_binary", contents)
    for label in (0, 11):
        (folder / "test_y.bin").write_bytes(bytes([label]) + contents["test_y.bin"][1:])
        refuses(f"test_y.bin: label {label}, allowed: 1 to 10", "stl10", tmp_path)
    (folder / "test_y.bin").unlink()
    refuses("test_y.bin is missing", "stl10", tmp_path)
    (folder / "train_X.bin").write_bytes(contents["train_X.bin"][1:])
    refuses("train_X.bin: truncated or malformed, 552,959 bytes, 552,960 are needed", "stl10", tmp_path)

    archive = pack(tmp_path / "stl10_binary.tar.gz", "stl10_binary", contents | {"test_y.bin": b"1"})
    refuses("test_y.bin: truncated or malformed, 1 bytes, 10 are needed", "stl10", tmp_path)
    pack(archive, "stl10_binary", {"train_y.bin": contents["train_y.bin"]})
    refuses("train_X.bin is missing", "stl10", tmp_path)
    archive.write_bytes(archive.read_bytes()[:-9])
    refuses("malformed archive", "stl10", tmp_path)
    monkeypatch.setattr(stl10, "_MAX_UNPACKED", 1 << 19)
    pack(archive, "stl10_binary", contents)
    refuses("unpacks to more than 524,288 bytes", "stl10", tmp_path)


# Tiny ImageNet


def test_tiny_imagenet_is_the_same_packed_and_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, contents = tiny_files()
    (tmp_path / "packed").mkdir()
    archive = zip_tree(tmp_path / "packed" / "tiny-imagenet-200.zip", contents)
    folder = write_tree(tmp_path / "unpacked" / "tiny-imagenet-200", contents)
    for directory in (archive.parent, folder.parent, folder):
        dataset = load("tiny_imagenet", str(directory), None)
        same(dataset, data)
        assert dataset.class_names == ("goldfish", "n01629819", "n01641577", "coral reef")
        assert dataset.mean == (0.5141, 0.5775, 0.3985)
        assert ("not the published file" in dataset.source) == (directory == archive.parent)
    (folder / "words.txt").unlink()
    assert load("tiny_imagenet", str(folder), 4).class_names[0] == "n01443537"
    assert list(archive.parent.iterdir()) == [archive]  # not unpacked

    good = archive.read_bytes()
    monkeypatch.setattr(tiny_imagenet, "_SIZE", len(good))
    monkeypatch.setattr(tiny_imagenet, "_SHA256", hashlib.sha256(good).hexdigest())
    asked = answer_with(monkeypatch, functools.partial(io.BytesIO, good))
    dataset = load("tiny_imagenet", str(tmp_path / "new"), None)
    same(dataset, data)
    assert dataset.source == str(tmp_path / "new" / "tiny-imagenet-200.zip")
    assert asked == ["http://cs231n.stanford.edu/tiny-imagenet-200.zip"]


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_imagenet_mistakes(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, contents = tiny_files()
    image = min(file for file in contents if file.startswith("train/n01443537/images/"))
    nothing = {file: None for file in contents if file.startswith("train/")}
    annotations = "val/val_annotations.txt"
    cases: list[tuple[str, dict[str, bytes | None]]] = [
        ("val_annotations.txt is missing", {annotations: None}),
        ("val_annotations.txt names no images", {annotations: b""}),
        ("val_annotations.txt: not readable, columns of text", {annotations: b"a\n"}),
        ("val_annotations.txt: not readable, columns of text", {annotations: b"\xff\tn01443537\n"}),
        ("val/images/a.JPEG is missing", {annotations: b"a.JPEG\tn01443537\n"}),
        ("n1 is a class that train lacks", {annotations: b"val_0.JPEG\tn1\n"}),
        ("val/images/val_0.JPEG is missing", {"val/images/val_0.JPEG": None}),
        (f"train: 1 of 12 images are not readable, .*{image} .not an image", {image: b"garbage"}),
        ("words.txt: not readable, .* 1,000 ", {"words.txt": b"a\tb\n" * 300}),
        ("no images train/CLASS/images", nothing | {"train/a": b""}),
    ]
    monkeypatch.setattr(tiny_imagenet, "_MAX_FILE_BYTES", 1000)
    for number, (match, changes) in enumerate(cases):
        changed = {file: data for file, data in (contents | changes).items() if data is not None}
        folder = tmp_path / str(number)
        folder.mkdir()
        if packed:
            zip_tree(folder / "tiny-imagenet-200.zip", changed)
        else:
            write_tree(folder / "tiny-imagenet-200", changed)
        refuses(match, "tiny_imagenet", folder)


def test_tiny_imagenet_zip_files_that_are_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses("file is a file", "tiny_imagenet", tmp_path / "file")
    _, contents = tiny_files()
    path = zip_tree(tmp_path / "tiny-imagenet-200.zip", contents)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    refuses("truncated or malformed zip file", "tiny_imagenet", tmp_path)
    path.write_bytes(b"<html>not found</html>")
    refuses("truncated or malformed zip file", "tiny_imagenet", tmp_path)

    # One image is damaged, and one entry of the directory claims 4 GB.
    place = good.index(b"tiny-imagenet-200/val/images/val_3.JPEG") + 100
    path.write_bytes(good[:place] + b"?" + good[place + 1 :])
    refuses("val: 1 of 8 images .*val_3.JPEG .(BadZipFile|error)", "tiny_imagenet", tmp_path)
    lying = bytearray(good)
    entry = lying.rindex(b"tiny-imagenet-200/val/images/val_5.JPEG") - 46
    struct.pack_into("<I", lying, entry + 24, 4_000_000_000)
    path.write_bytes(lying)
    refuses("val_5.JPEG .ValueError: 4,000,000,000 bytes, at most 16,777,216", "tiny_imagenet", tmp_path)


# npz


def save(path: Path, data: dict[str, Any]) -> None:
    np.savez(path, **data)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_round_trip(write: Callable[..., None], tmp_path: Path) -> None:
    data = small()
    write(tmp_path / "a.npz", **data | {"y_train": data["y_train"].astype(">u8")})
    for directory in (tmp_path, tmp_path / "a.npz"):
        dataset = load("npz", str(directory), None)
        same(dataset, data)
        assert dataset.class_names == ("0", "1", "2", "3")
        assert str(tmp_path / "a.npz") in dataset.source
    np.testing.assert_allclose(dataset.mean, (data["x_train"] / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, (data["x_train"] / 255).std((0, 1, 2)), rtol=1e-12)

    write(tmp_path / "a.npz", **data, class_names=np.array(list("wxyz")), other=np.ones(3))
    assert load("npz", str(tmp_path), None).class_names == ("w", "x", "y", "z")
    fortran = {key: np.asfortranarray(value) for key, value in data.items()}
    write(tmp_path / "a.npz", **fortran)
    same(load("npz", str(tmp_path), None), data)


@pytest.mark.parametrize("channel", [False, True])
def test_npz_gray_is_repeated(channel: bool, tmp_path: Path) -> None:
    data = small()
    gray = {key: value[..., :1] if value.ndim == 4 else value for key, value in data.items()}
    stored = {key: value[..., 0] if value.ndim == 4 and not channel else value for key, value in gray.items()}
    save(tmp_path / "a.npz", stored)
    dataset = load("npz", str(tmp_path), None)
    assert dataset.x_train.shape == (12, 8, 8, 3)
    for c in range(3):
        np.testing.assert_array_equal(dataset.x_train[..., c], gray["x_train"][..., 0])


def test_npz_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    data = small()

    def wrong(match: str, **changes: np.ndarray | None) -> None:
        save(path, {k: v for k, v in (data | changes).items() if v is not None})
        assert str(path) in refuses(match, "npz", path)

    x = data["x_train"]
    wrong(
        "x_train is float32, .*uint8.* from 0.* to 1: multiply by 255 and round$", x_train=x / np.float32(255)
    )
    wrong("x_train is float64, .* from 0 to 255: round, and convert to uint8$", x_train=x * 1.0)
    wrong("x_train is float16, .* from -2 to 2$", x_train=(x / 63.75 - 2).astype(np.float16))
    wrong("x_train is int32, .* from 0 to 255: convert to uint8$", x_train=x.astype(np.int32))
    wrong("x_train is uint16, .* from 0 to 65535$", x_train=x.astype(np.uint16) * 257)
    wrong("x_train is bool, allowed: [^;]*$", x_train=x > 9)
    wrong(r"x_train is float32, allowed: [^;]*$", x_train=x[:0].astype(np.float32))
    broken = data["x_train"].astype(np.float64)
    broken[3, 2, 1], broken[7, 0, 0, 2] = np.nan, -np.inf
    wrong("x_train is float64, .* 4 values are not finite, the first is nan at .3, 2, 1, 0.$", x_train=broken)
    wrong("x_test is int64, .*uint8", x_test=data["x_test"].astype(np.int64))
    wrong("y_test is missing", y_test=None)
    wrong(r"x_train has the shape \[12, 8, 8, 2\]", x_train=data["x_train"][..., :2])
    wrong(r"x_train has the shape \[12, 192\]", x_train=data["x_train"].reshape(12, -1))
    wrong(r"x_train has the shape \[0, 8, 8, 3\]", x_train=data["x_train"][:0])
    wrong("sizes must agree", x_test=data["x_test"][:, :4])
    wrong("train: 12 images and 11 labels", y_train=data["y_train"][:11])
    wrong("test: 8 images and 0 labels", y_test=data["y_test"][:0])
    wrong("test: label 4, allowed: 0 to 3", y_test=data["y_test"] + 1)
    wrong("test: label -1, allowed: 0 to 3", y_test=data["y_test"] - 1)
    wrong("4 different labels from 1 to 4, allowed: 0 to 3", y_train=data["y_train"] + 1)
    wrong("different labels from -1 to 2", y_train=data["y_train"] - 1)
    wrong("different labels", y_train=data["y_train"].astype(np.uint64) * (1 << 60))
    wrong("y_train is float64", y_train=data["y_train"] * 1.0)
    wrong(r"y_train is int32 \[12, 1\]", y_train=data["y_train"][:, None])
    wrong("train: label 3, allowed: 0 to 2", class_names=np.array(list("abc")))
    wrong("no image has label 4", class_names=np.array(list("abcde")))
    wrong("class_names is int64", class_names=np.arange(4))
    wrong("Python objects", y_train=data["y_train"].astype(object))
    wrong("Python objects", class_names=np.array(["a", None, 1, 2], dtype=object))


@pytest.mark.parametrize("name", ["npz", "npy"])
def test_class_names_beyond_unicode_are_refused(name: str, tmp_path: Path) -> None:
    arrays = small() | {"class_names": np.frombuffer(b"\xff" * 16, "<U1")}
    save(tmp_path / "a.npz", arrays)
    for key, value in arrays.items():
        np.save(tmp_path / f"{key}.npy", value)
    refuses("class_names.*: holds characters beyond Unicode, allowed: text", name, tmp_path)


def test_npz_files_that_are_not(tmp_path: Path) -> None:
    refuses("holds 0 npz files", "npz", tmp_path)
    refuses("does not exist", "npz", tmp_path / "a.npz")
    save(tmp_path / "a.npz", small())
    save(tmp_path / "b.npz", small())
    refuses("holds 2 npz files", "npz", tmp_path)
    path = tmp_path / "b.npz"
    good = path.read_bytes()
    for bad in (b"", b"PK", good[: len(good) // 2], b"\x93NUMPY\x01\x00"):
        path.write_bytes(bad)
        refuses("b.npz: not a readable npz", "npz", path)
    place = good.index(small()["x_train"].tobytes()) + 5
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    refuses("not a readable npz file .*CRC", "npz", path)


def header(shape: str, descr: str = "'|u1'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize(
    ("contents", "match"),
    [
        (header("(1000000, 1000, 1000, 3)") + b"abc", "truncated or malformed, 3 bytes for uint8"),
        (header("(-1, -3)") + b"abc", "truncated or malformed"),
        (header("(1, 1, 1, 3)") + b"ab", "truncated or malformed, 2 bytes"),
        (header("(1, 1, 1, 3)") + b"abcd", "truncated or malformed, 4 bytes"),
        (header("(1, 1, 1, __import__('os').mkdir('mark'))"), "malformed header"),
        (header("(" * 300 + ")" * 300), "malformed header"),
        (header("(3,)", "'|O'"), "holds Python objects"),
        (b"\x93NUMPY\x03\x00" + header("(3,)")[8:], "malformed header"),
        (b"not an array", "malformed header"),
        (b"", "malformed header"),
    ],
)
def test_npz_headers_that_lie(contents: bytes, match: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x_train.npy", contents)
    refuses(f"x_train: {match}", "npz", tmp_path)


def test_npz_sizes_beyond_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    data: dict[str, Any] = small()
    np.savez_compressed(path, **data)
    lying = bytearray(path.read_bytes())
    entry = lying.index(b"PK\x01\x02")  # the directory's first: x_train
    struct.pack_into("<I", lying, entry + 24, 4_000_000_000)
    path.write_bytes(lying)
    refuses("x_train: malformed, 4,000,000,000 bytes claimed", "npz", path)

    np.savez_compressed(path, **data)
    values = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(os, "sysconf", values.__getitem__)
    refuses("x_train: needs .* bytes of memory, this machine has 1,000", "npz", path)


def test_bombs_are_refused_without_being_unpacked(tmp_path: Path) -> None:
    """Small files that claim, or unpack to, more than there is memory: told in one line, at once."""
    for name in ("npz", "tiny_imagenet", "cifar10", "image_folder"):
        (tmp_path / name).mkdir()
    text = header("(1000000, 1000, 1000, 3)")
    with zipfile.ZipFile(tmp_path / "npz" / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", text + bytes(10**7))
    refuses("x_train: truncated or malformed, 10,000,000 bytes for uint8", "npz", tmp_path / "npz")

    _, contents = tiny_files()
    contents["words.txt"] = bytes(10**8)
    zip_tree(tmp_path / "tiny_imagenet" / "tiny-imagenet-200.zip", contents)
    refuses("words.txt: not readable.* 100,000,000 bytes", "tiny_imagenet", tmp_path / "tiny_imagenet")

    with gzip.open(tmp_path / "cifar10" / "cifar-10-binary.tar.gz", "wb", compresslevel=1) as packed:
        info = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
        info.size = 1 << 30
        packed.write(info.tobuf())
        for _ in range(33):
            packed.write(bytes(1 << 24))
    tracemalloc.start()
    try:
        refuses("it unpacks to more than 536,870,912 bytes", "cifar10", tmp_path / "cifar10")
        assert tracemalloc.get_traced_memory()[1] < 2**28  # the arrays for 60,000 images are there
    finally:
        tracemalloc.stop()

    write_folder(tmp_path / "image_folder", small())
    (file, *_) = (tmp_path / "image_folder" / "train").glob("*/*.png")
    bomb = bytearray(file.read_bytes())
    struct.pack_into(">II", bomb, 16, 60_000, 60_000)
    struct.pack_into(">I", bomb, 29, zlib.crc32(bytes(bomb[12:29])))
    file.write_bytes(bomb)
    refuses(r"1 of 12 images are not readable, .*\(", "image_folder", tmp_path / "image_folder", 8)


# Image folders


def by_class(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The order in which a folder is read: by class, then by name."""
    ordered = {}
    for split in ("train", "test"):
        order = np.argsort(data[f"y_{split}"], kind="stable")
        for key in ("x", "y"):
            ordered[f"{key}_{split}"] = data[f"{key}_{split}"][order]
    return ordered


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_round_trip(test: str, tmp_path: Path) -> None:
    write_folder(tmp_path, small(), ".PNG", test)
    (tmp_path / "train" / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "class0" / "._0.png").write_text("not an image")
    (tmp_path / "train" / ".hidden").mkdir()
    dataset = load("image_folder", str(tmp_path), None)
    same(dataset, by_class(small()))
    assert dataset.class_names == ("class0", "class1", "class2", "class3")
    assert sorted(each.reason for each in dataset.unused) == ["hidden", "hidden", "of type .txt"]


def test_folder_jpeg_and_sizes(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None] * 5, (40, 60, 3))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
    Image.fromarray(ramp).save(tmp_path / "train" / "a" / "0.jpg", quality=95)
    Image.fromarray(ramp.transpose(1, 0, 2)).save(tmp_path / "train" / "b" / "0.png")
    Image.fromarray(ramp[:, :, 0]).save(tmp_path / "test" / "a" / "gray.jpeg", quality=95)
    Image.fromarray(ramp[:20, :20]).save(tmp_path / "test" / "b" / "0.png")
    refuses("pixels, but others have 60x40: set image_size", "image_folder", tmp_path)
    dataset = load("image_folder", str(tmp_path), 20)
    assert dataset.x_train.shape == (2, 20, 20, 3) and dataset.x_test.shape == (2, 20, 20, 3)
    expected = np.asarray(Image.fromarray(ramp).resize((30, 20), Image.Resampling.BILINEAR))[:, 5:25]
    np.testing.assert_array_equal(dataset.x_train[1], expected.transpose(1, 0, 2))
    np.testing.assert_allclose(dataset.x_train[0], expected, atol=4)
    np.testing.assert_allclose(dataset.x_test[0], expected, atol=4)
    np.testing.assert_array_equal(dataset.x_test[1], ramp[:20, :20])


def test_folder_modes(tmp_path: Path) -> None:
    """Palettes, transparency and one bit come out as RGB; 16 bits are refused instead of clipped."""
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    write_folder(tmp_path, small(4))
    place = tmp_path / "train" / "class0"
    for file in place.iterdir():
        file.unlink()
    palette = red.convert("P")
    palette.save(place / "a.png", transparency=bytes([255] * 256))
    red.convert("RGBA").save(place / "b.png")
    Image.new("1", (4, 4), 1).save(place / "c.png")
    red.convert("CMYK").save(place / "d.jpg", quality=95)
    x = load("image_folder", str(tmp_path), None).x_train
    assert (
        (x[:2] == [255, 0, 0]).all() and (x[2] == 255).all() and abs(x[3] - np.array([255.0, 0, 0])).max() < 5
    )
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(place / "e.png")
    refuses(r"e.png \(.*8 bits per channel", "image_folder", tmp_path)


def test_folder_mistakes(tmp_path: Path) -> None:
    refuses("needs a folder train and a folder test", "image_folder", tmp_path)
    refuses("needs a folder train and a folder test", "image_folder", tmp_path / "none")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    refuses("train holds no folders", "image_folder", tmp_path)
    write_folder(tmp_path, small())
    (tmp_path / "train" / "empty").mkdir()
    refuses(r"empty holds no picture, allowed: \.png, ", "image_folder", tmp_path)
    (tmp_path / "train" / "empty").rmdir()
    (tmp_path / "test" / "other").mkdir()
    refuses("other is a class that .*train lacks", "image_folder", tmp_path)
    (tmp_path / "test" / "other").rmdir()

    place = tmp_path / "train" / "class1"
    good = next(place.iterdir()).read_bytes()
    (place / "y.png").write_bytes(good[: len(good) // 2])
    (place / "z.jpg").write_text("text")
    message = refuses(
        r"y.png \(\w+: .*\), .*z.jpg \(not an image of a known format\)", "image_folder", tmp_path
    )
    found = f"{tmp_path / 'train'}: 2 of 14 images are not readable"
    assert message.startswith(f"{found}, more than max_broken 0 allows: ")
    (place / "z.jpg").unlink()
    Image.new("RGB", (8, 8)).save(place / "y.png", "ICO")
    refuses(r"1 of 13 images .*y.png \(not an image", "image_folder", tmp_path)
    Image.new("RGB", (1, 3000)).save(place / "y.png")
    refuses(r"y.png \(.*too long and thin", "image_folder", tmp_path, 4096)

    # A header of 20,000 x 20,000 pixels: within what Pillow only warns about or beyond, it is refused.
    for side in (9_000, 12_000, 20_000):
        bomb = bytearray(good)
        struct.pack_into(">II", bomb, 16, side, side)
        struct.pack_into(">I", bomb, 29, zlib.crc32(bytes(bomb[12:29])))
        (place / "y.png").write_bytes(bomb)
        refuses(r"1 of 13 images .*y.png \(", "image_folder", tmp_path, 8)


def test_a_few_broken_images_are_black(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = pictures(400, 4, 0, 4)
    data = {"x_train": x, "y_train": y, "x_test": x[:8], "y_test": y[:8]}
    write_folder(tmp_path, data)
    expected = by_class(data)
    files = sorted((tmp_path / "train").glob("*/*.png"))
    said: list[str] = []
    monkeypatch.setattr(decode.logging, "warning", lambda text, *args: said.append(text % args))
    broken = [0, 5, 201, 399]  # 1 %; the first one does not tell the shape
    for index in broken:
        files[index].write_bytes(b"")
    dataset = load("image_folder", str(tmp_path), None, 0.01)
    expected["x_train"][broken] = 0
    same(dataset, expected)
    readable = np.delete(expected["x_train"], broken, axis=0) / 255
    np.testing.assert_allclose(dataset.mean, readable.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, readable.std((0, 1, 2)), rtol=1e-12)
    (line,) = said  # however often they are read
    assert line.startswith(f"{tmp_path / 'train'}: 4 of 400 images are not readable and become black: ")
    assert (
        all(f"{files[index]} (not an image of a known format)" in line for index in broken)
        and "\n" not in line
    )

    # They are counted over all that is read, one by one.
    lazy = load_dataset("image_folder", str(tmp_path), None, 0.01).x_train
    files[300].write_bytes(b"")
    for _ in range(2):  # and not forgotten, if somebody tries again
        with pytest.raises(UserError, match=r"5 of 400 .*max_broken 0\.01 allows: .*class3"):
            lazy[299:301]

    for file in files[10:30]:
        file.write_bytes(b"")
    message = refuses("25 of 400 images are not readable, more than", "image_folder", tmp_path)
    assert str(files[0]) in message and str(files[30]) not in message
    assert message.count(".png") == 10 and message.endswith(", ...")
    for file in files:
        file.write_bytes(b"")
    refuses(f"{files[0]}: not a readable image .*, nor is any other", "image_folder", tmp_path)
    with pytest.raises(UserError, match="none of the training images can be read"):
        load_dataset("image_folder", str(tmp_path), 4, 1.0)


def test_decoding_holds_one_copy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 1)):
        (tmp_path / split / "a").mkdir(parents=True)
        for n in range(count):
            image = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(32, 0).repeat(32, 1)
            Image.fromarray(image).save(tmp_path / split / "a" / f"{n:03}.jpg")
    (tmp_path / "train" / "a" / "007.jpg").write_bytes(b"")
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 2)  # each thread holds an image
            dataset = in_memory(load_dataset("imagenet12", str(tmp_path), None, 0.02))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(dataset.x_train, np.ndarray) and dataset.x_train.shape == (60, 224, 224, 3)
    assert peak < 1.5 * dataset.x_train.nbytes


def test_images_are_not_decoded_before_they_are_wanted(tmp_path: Path) -> None:
    """Labels and sizes take no pixels: memory stays at those of one batch, however many there are."""
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "test" / "a").mkdir(parents=True)
    Image.new("RGB", (256, 256), (10, 20, 30)).save(tmp_path / "train" / "a" / "first.jpg")
    for n in range(2000):
        (tmp_path / "train" / "a" / f"{n:04}.jpg").hardlink_to(tmp_path / "train" / "a" / "first.jpg")
    (tmp_path / "test" / "a" / "0.jpg").hardlink_to(tmp_path / "train" / "a" / "first.jpg")
    tracemalloc.start()
    try:
        dataset = load_dataset("imagenet12", str(tmp_path), None)
        batch = dataset.x_train[np.arange(0, 2000, 100)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.x_train.shape == (2001, 224, 224, 3) and batch.shape == (20, 224, 224, 3)
    assert peak < 2 * batch.nbytes + 2**22  # all of them take 300 MB


def test_imagenet12_is_a_folder_of_224_pixels(tmp_path: Path) -> None:
    write_folder(tmp_path, small(), ".png", "val")
    dataset = load("imagenet12", str(tmp_path), None)
    assert dataset.x_train.shape == (12, 224, 224, 3) and dataset.x_test.shape == (8, 224, 224, 3)
    assert dataset.mean == (0.485, 0.456, 0.406) and dataset.std == (0.229, 0.224, 0.225)
    assert load("imagenet12", str(tmp_path), 16).x_train.shape == (12, 16, 16, 3)
    refuses("needs a folder train and a folder test", "imagenet12", tmp_path / "none")


# The bundled sample, names, sizes


def test_sample_is_balanced_and_stable() -> None:
    dataset = load("fashion_mnist_sample", "not read", None)
    assert dataset.x_train.shape == (6000, 32, 32, 3) and dataset.x_test.shape == (1000, 32, 32, 3)
    assert np.bincount(dataset.y_train).tolist() == [600] * 10
    assert np.bincount(dataset.y_test).tolist() == [100] * 10
    assert dataset.class_names[9] == "Ankle boot"
    assert (np.diff(dataset.y_train) != 0).mean() > 0.8  # not sorted
    assert (dataset.x_train[..., 0] == dataset.x_train[..., 2]).all()
    assert not dataset.x_train[:, :2].any() and not dataset.x_train[:, :, -2:].any()
    digest = hashlib.sha256()
    for array in dataset[:4]:
        digest.update(np.ascontiguousarray(array).astype("<i4" if array.ndim == 1 else "u1").tobytes())
    assert digest.hexdigest() == "9d247b5c66d9f2a55c52f004291a9e4ea4dc4f4e975cc4a09e3c9bdf1a02110d"


def test_image_size(tmp_path: Path) -> None:
    data = small()
    save(tmp_path / "a.npz", data)
    dataset = load("npz", str(tmp_path), 5)
    for image, resized in zip(data["x_train"], dataset.x_train, strict=True):
        expected = Image.fromarray(image).resize((5, 5), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(resized, np.asarray(expected))
    same(load("npz", str(tmp_path), 8), data)
    for wrong in (0, -4, 2.0, True, "32", 1 << 20):
        refuses("image_size", "npz", tmp_path, wrong)


def test_statistics_need_no_float_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_CHUNK_BYTES", 1000)  # many chunks
    x = pictures(50, 5, 3, 16)[0]
    x[..., 1] = 7
    mean, std = images.channel_stats(x)
    np.testing.assert_allclose(mean, (x / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std[::2], (x / 255).std((0, 1, 2))[::2], rtol=1e-12)
    assert std[1] == 1.0  # constant: images are divided by it


@pytest.mark.parametrize("name", ["cifar10", "svhn", "tiny-imagenet-200"])
def test_the_name_of_a_folder_says_nothing_about_its_statistics(name: str, tmp_path: Path) -> None:
    write_folder(tmp_path / name, small())
    expected = (small()["x_train"] / 255).mean((0, 1, 2))
    np.testing.assert_allclose(load("image_folder", str(tmp_path / name), None).mean, expected, rtol=1e-12)


def test_bad_names_and_directories(tmp_path: Path) -> None:
    wrong: tuple[Any, ...] = ("", None, 3)
    for bad in wrong:
        refuses("name", bad, tmp_path)
    with pytest.raises(UserError, match=r"directory"):
        load("npz", "", None)
    with pytest.raises(UserError, match=r"directory"):
        load("npz", "a\0b", None)


# tensorflow-datasets


def tfds_module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, at import
        import tensorflow_datasets
    return tensorflow_datasets


def prepare(directory: Path, file_format: str, **changes: Any) -> dict[str, np.ndarray]:
    """Prepares a small set without TensorFlow: images are given as PNG files, so none is encoded.

    They are upside down, and EXIF says so.
    """
    tfds = tfds_module()
    data = small()
    side = changes.get("side", 8)

    def png(image: np.ndarray) -> io.BytesIO:
        file = io.BytesIO()
        Image.fromarray(image[::-1, ::-1].copy()).save(file, "PNG", exif=upside_down)
        file.seek(0)
        return file

    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    builder_class: Any = tfds.core.GeneratorBasedBuilder
    with tfds.core.registered.skip_registration():

        class TinyPictures(builder_class):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=(side, side, 3)),
                    "label": tfds.features.ClassLabel(names=list("wxyz")),
                }
                if "drop" in changes:
                    del features[changes["drop"]]
                    features["other"] = tfds.features.Scalar(np.int64)
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager: Any) -> Any:
                return {split: self._generate_examples(key) for split, key in splits.items()}

            def _generate_examples(self, split: str) -> Any:
                for n, (x, y) in enumerate(zip(data[f"x_{split}"], data[f"y_{split}"], strict=True)):
                    example = {"image": png(x), "label": int(y)}
                    if "drop" in changes:
                        del example[changes["drop"]]
                        example["other"] = 0
                    yield n, example

    splits = changes.get("splits", {"train": "train", "test": "test"})
    TinyPictures(data_dir=str(directory), file_format=file_format).download_and_prepare()
    return data


def sorted_rows(x: np.ndarray, y: np.ndarray) -> list[tuple[bytes, int]]:
    return sorted((image.tobytes(), int(label)) for image, label in zip(x, y, strict=True))


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_tfds_round_trip(file_format: str, test: str, tmp_path: Path) -> None:
    data = prepare(tmp_path, file_format, splits={"train": "train", test: "test"})
    dataset = load("tiny_pictures", str(tmp_path), None)
    for split in ("train", "test"):  # TFDS shuffles when it prepares
        got = getattr(dataset, f"x_{split}"), getattr(dataset, f"y_{split}")
        assert sorted_rows(*got) == sorted_rows(data[f"x_{split}"], data[f"y_{split}"])
    assert dataset.class_names == ("w", "x", "y", "z")
    assert f"tiny_pictures/1.0.0, train and {test}" in dataset.source
    assert dataset.y_train.dtype == np.int32
    assert load("tiny_pictures:1.0.0", str(tmp_path), 6).x_test.shape == (8, 6, 6, 3)


def test_tfds_mistakes(tmp_path: Path) -> None:
    prepare(tmp_path / "image", "parquet", drop="image")
    refuses("tiny_pictures has no features image and label", "tiny_pictures", tmp_path / "image")
    prepare(tmp_path / "label", "parquet", drop="label")
    refuses("tiny_pictures has no features image and label", "tiny_pictures", tmp_path / "label")
    prepare(tmp_path / "split", "parquet", splits={"train": "train"})
    refuses("has the splits train, needed: train, and test", "tiny_pictures", tmp_path / "split")
    prepare(tmp_path / "size", "parquet", side=None)
    refuses("image_size: found None, but", "tiny_pictures", tmp_path / "size")
    assert load("tiny_pictures", str(tmp_path / "size"), 8).x_train.shape == (12, 8, 8, 3)

    for file_format in ("parquet", "array_record"):
        prepare(tmp_path / file_format, file_format)
        (file,) = (tmp_path / file_format).glob(f"tiny_pictures/*/*train.{file_format}*")
        file.write_bytes(file.read_bytes()[:-20])
        refuses("tiny_pictures, split train: not readable", "tiny_pictures", tmp_path / file_format)
        file.unlink()
        refuses("tiny_pictures, split train: not readable", "tiny_pictures", tmp_path / file_format)


def test_tfds_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tfds_module()
    message = refuses("tensorflow-datasets has no such set", "cifar11", tmp_path)
    assert all(own in message for own in NAMES) and "cifar10" in message.split("did you mean")[1]
    assert "did you mean svhn_cropped" in refuses("no such set", "svhn_croped", tmp_path)
    for odd in ("no such name!", "a:b:c", "huggingface:mnist", "mnist/data_dir=x", "mnist/..", "../mnist"):
        refuses("name: .*NAME.*of tensorflow-datasets", odd, tmp_path)
    for absent in ("mnist:9.9.9", "mnist/config"):
        refuses(f"directory: {tmp_path} does not hold {absent} prepared", absent, tmp_path)
    message = refuses(f"{tmp_path} does not hold beans prepared", "beans", tmp_path)
    assert f"tfds build beans --data_dir={tmp_path} --file_format=array_record" in message
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "pip install tensorflow-datasets" in refuses("name: 'beans'", "beans", tmp_path)


def test_tfds_picks_the_newest_version_and_a_named_configuration(tmp_path: Path) -> None:
    prepare(tmp_path, "array_record")
    one = tmp_path / "tiny_pictures" / "1.0.0"
    for other in ("1.10.0", "1.9.0"):
        shutil.copytree(one, tmp_path / "tiny_pictures" / other)
        info = tmp_path / "tiny_pictures" / other / "dataset_info.json"
        info.write_text(info.read_text().replace("1.0.0", other))
    assert "tiny_pictures/1.10.0" in load("tiny_pictures", str(tmp_path), None).source
    assert "tiny_pictures/1.9.0" in load("tiny_pictures:1.9.0", str(tmp_path), None).source
    message = refuses("does not hold tiny_pictures:2.0.0 prepared", "tiny_pictures:2.0.0", tmp_path)
    assert "tiny_pictures/1.9.0" in message
    shutil.move(one, tmp_path / "tiny_pictures" / "large" / "1.0.0")
    refuses(
        "found tiny_pictures, allowed: one configuration .*: tiny_pictures, tiny_pictures/large",
        "tiny_pictures",
        tmp_path,
    )
    assert len(load("tiny_pictures/large", str(tmp_path), None).x_train) == 12


@pytest.mark.parametrize("form", ["proto", "snake_case", "legacy", "in_a_string"])
def test_tfds_features_of_other_modules_are_not_imported(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each form is first shown to run code when tensorflow-datasets reads it."""
    tfds = tfds_module()
    prepare(tmp_path, "array_record")
    (path,) = tmp_path.glob("tiny_pictures/*/features.json")
    ran = tmp_path / "ran"
    monkeypatch.syspath_prepend(tmp_path)
    module = f"foreign_{form}"  # imported once
    (tmp_path / module).mkdir()  # without __init__.py: a namespace package
    foreign = {"type": f"{module}.code.Feature", "content": {}}
    features = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    written = {
        "proto": {"pythonClassName": f"{module}.code.Feature", "jsonFeature": {"json": "{}"}},
        "snake_case": {"python_class_name": f"{module}.code.Feature", "json_feature": {"json": "{}"}},
        "legacy": {"type": features, "content": {"image": foreign}},
        "in_a_string": {
            "pythonClassName": features,
            "jsonFeature": {"json": json.dumps({"image": foreign})},
        },
    }
    path.write_text(json.dumps(written[form]))
    (tmp_path / module / "code.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    message = refuses(f"has the feature '{module}.code.Feature'", "tiny_pictures", tmp_path)
    assert "allowed: features of tensorflow_datasets itself" in message
    assert not ran.exists()
    with pytest.raises(Exception, match=module):
        tfds.builder_from_directory(str(path.parent))
    assert ran.exists()


@pytest.mark.parametrize("type_", [["x"], {"a": "b"}, 5, None])
def test_tfds_features_with_an_odd_type_are_refused(type_: object, tmp_path: Path) -> None:
    prepare(tmp_path, "array_record")
    (path,) = tmp_path.glob("tiny_pictures/*/features.json")
    path.write_text(json.dumps({"type": type_, "content": {}}))
    with pytest.raises(UserError):
        load("tiny_pictures", str(tmp_path), None)


def test_the_code_of_a_tfds_set_is_not_imported(tmp_path: Path) -> None:
    prepare(tmp_path, "array_record")
    shutil.move(tmp_path / "tiny_pictures", tmp_path / "beans")
    for file in list((tmp_path / "beans").rglob("*")):
        if file.suffix == ".json":
            file.write_text(file.read_text().replace("tiny_pictures", "beans"))
        elif file.is_file():
            file.rename(file.with_name(file.name.replace("tiny_pictures", "beans")))
    before = set(sys.modules)
    assert len(load("beans", str(tmp_path), None).x_train) == 12
    assert not [name for name in set(sys.modules) - before if "beans" in name]


def test_tfds_in_a_format_that_needs_tensorflow(tmp_path: Path) -> None:
    prepare(tmp_path, "parquet")
    (info,) = tmp_path.glob("tiny_pictures/*/dataset_info.json")
    info.write_text(info.read_text().replace("parquet", "tfrecord"))
    message = refuses(
        "holds tiny_pictures as tfrecord, allowed: array_record, parquet", "tiny_pictures", tmp_path
    )
    assert message.endswith("--file_format=array_record --overwrite")
