"""Any configuration or file is used, or refused in one line, with bounded memory.

A few inputs of each kind by default, the same in every run; with -m soak, many that differ between runs.
"""

import dataclasses
import json
import mmap
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mocosfl_jax import commandline, data, load_encoder
from mocosfl_jax.config import Config, from_dict, quickstart, resolve
from mocosfl_jax.data import cifar_files, stl10
from mocosfl_jax.errors import UserError
from mocosfl_jax.training import workdir
from mocosfl_jax.weights.encoder_file import export_encoder
from mocosfl_jax.weights.torch_file import read_state_dict
from tests.support import data_files
from tests.support.encoders import METADATA, random_params

# Bytes besides the file itself: a few images of the largest size that is decoded, and libraries' own memory.
MEMORY = 1 << 29
OFFICIAL = Path(__file__).parent / "official"


def trials(few: int, many: int) -> Any:
    """Run a test with few inputs by default and with many under -m soak."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.soak)])


def try_out(count: int, strategy: st.SearchStrategy, body: Callable[[Any], None]) -> None:
    """Run `body` on `count` inputs; they are the same in every run unless there are many."""
    profile = settings(
        max_examples=count,
        derandomize=count < 100,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    given(strategy)(profile(body))()


def growth(use: Callable[[], object]) -> int:
    """The most bytes of memory that `use()` holds beyond what the process held before.

    Memory that is reserved but never touched does not count. Only Linux can reset an earlier peak; elsewhere
    this is the growth of the peak of the whole process, so it is zero below an earlier peak.
    """
    before = peak(forget=True)
    use()
    return peak() - before


def peak(forget: bool = False) -> int:
    """The most memory in bytes that this process has held; `forget` resets it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = re.findall(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(line)


class Outcomes:
    """Counts, for docs/reliability.md."""

    def __init__(self) -> None:
        self.used, self.refused, self.most = 0, 0, 0

    def of(self, use: Callable[[], object]) -> None:
        """Use something: it works or raises a UserError of one line, with bounded memory in both cases."""
        grown = growth(lambda: self.count(use))
        assert grown < MEMORY
        self.most = max(self.most, grown)

    def count(self, use: Callable[[], object]) -> None:
        try:
            use()
            self.used += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            self.refused += 1

    def __str__(self) -> str:
        used, refused = f"{self.used:,} used", f"{self.refused:,} refused"
        most = f"at most {self.most / 2**20:.0f} MiB more memory for one"
        return f"{self.used + self.refused:,} inputs: {used}, {refused}, {most}"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget an earlier peak")
def test_memory_is_measured_below_an_earlier_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    def hold(size: int) -> None:
        """Not by malloc, which keeps freed memory where a command has set it to do so in this process."""
        with mmap.mmap(-1, size) as pages:
            for start in range(0, size, mmap.PAGESIZE):
                pages[start] = 1

    monkeypatch.setattr(sys.modules[__name__], "MEMORY", 1 << 26)
    outcomes = Outcomes()
    assert growth(lambda: hold(1 << 28)) > 250 << 20
    outcomes.of(lambda: hold(1 << 24))
    assert 15 << 20 < outcomes.most < 20 << 20
    with pytest.raises(AssertionError):
        outcomes.of(lambda: hold(1 << 27))


# --- the configuration


def fields(node: Any, path: str = "") -> list[str]:
    """The paths of all fields."""
    found = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        name = f"{path}{field.name}"
        found += fields(value, f"{name}.") if dataclasses.is_dataclass(value) else [name]
    return found


FIELDS = fields(Config())
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.integers(-3, 300), st.sampled_from([0, 2**31, 2**63, 2**64, 10**400])
)
WORDS = st.sampled_from(
    [
        *(
            "none",
            "None",
            "true",
            "nan",
            "-inf",
            "1e999",
            "[]",
            "{}",
            "'",
            '"',
            "\0",
            "\n",
            "1_000",
            "٣",
            " ",
        ),
        *(
            "v1",
            "v2",
            "large_v2",
            "cosine",
            "mlp_bn",
            "reset",
            "vgg13",
            "mobilenetv2",
            "C4S2",
            "K1C8S1noReLU",
        ),
        *("flmoco", "continue", "instance", "official_per_step", "resnet50", "C0S1", "C9" * 99),
    ]
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20))
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@trials(100, 20_000)
def test_any_value_from_the_command_line(count: int) -> None:
    outcomes = Outcomes()

    def parse(values: list[tuple[str, Any]]) -> None:
        argv = ["train", *(f"--config.{field}={value}" for field, value in values)]
        outcomes.of(lambda: resolve(commandline.parse(argv, "").config))

    try_out(count, st.lists(st.tuples(st.sampled_from(FIELDS), PLAIN), min_size=1, max_size=3), parse)
    print(f"command line: {outcomes}")
    assert outcomes.used and outcomes.refused


@trials(100, 20_000)
def test_any_argument(count: int) -> None:
    outcomes = Outcomes()
    words = st.one_of(st.text(max_size=20), st.text(max_size=9).map(lambda text: f"--config.{text}"))
    words |= st.sampled_from(["--config", "--config=", "--workdir", "--noconfig.data", "--config.data", "--"])

    def parse(argv: list[str]) -> None:
        outcomes.of(lambda: resolve(commandline.parse(["train", *argv], "").config))

    try_out(count, st.lists(words, max_size=3), parse)
    print(f"arguments: {outcomes}")


@trials(100, 20_000)
def test_any_value_in_a_configuration_file(count: int) -> None:
    """config.json, and the values that a Python file may set."""
    outcomes = Outcomes()

    def read(values: list[tuple[str, Any]]) -> None:
        config = resolve(quickstart()).as_dict()
        changed = quickstart()
        for path, value in values:
            *parents, name = path.split(".")
            node, set_in = config, changed
            for parent in parents:
                node, set_in = node[parent], getattr(set_in, parent)
            node[name] = value
            setattr(set_in, name, value)
        outcomes.of(lambda: from_dict(json.loads(json.dumps(config))))
        outcomes.of(lambda: resolve(changed))

    try_out(count, st.lists(st.tuples(st.sampled_from(FIELDS), JSON), min_size=1, max_size=3), read)
    print(f"configurations: {outcomes}")
    assert outcomes.used and outcomes.refused


@trials(100, 20_000)
def test_any_configuration_file(count: int, tmp_path: Path) -> None:
    outcomes = Outcomes()
    whole = json.dumps(resolve(quickstart()).as_dict()).encode()

    def read(content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        outcomes.of(lambda: workdir.read_config(tmp_path))
        outcomes.of(lambda: workdir.claim(tmp_path, resolve(quickstart()), {}))

    anything = st.one_of(st.binary(max_size=50), JSON.map(lambda value: json.dumps(value).encode()))
    try_out(count, anything | DAMAGES.map(lambda changes: damaged(whole, changes)), read)
    print(f"config.json: {outcomes}")


# --- files


class Change(NamedTuple):
    """A position in a file, counted from its start or its end, and the change made there."""

    kind: str
    place: int
    content: bytes


# Headers and directories are at the ends of files, so most of the changes are made there.
CHANGES = st.builds(
    Change,
    st.sampled_from(["flip", "flip", "cut", "overwrite", "remove", "double"]),
    st.integers(0, 2**20) | st.integers(0, 200) | st.integers(-200, -1),
    st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 4]),
)
DAMAGES = st.lists(CHANGES, min_size=1, max_size=4)


def damaged(whole: bytes, changes: list[Change]) -> bytes:
    """The file with these changes."""
    file = bytearray(whole)
    for kind, anywhere, content in changes:
        place = anywhere % (len(file) + 1)
        length = sum(content) % 100
        match kind:
            case "flip":
                file[place : place + 1] = bytes(
                    byte ^ 1 << content[0] % 8 for byte in file[place : place + 1]
                )
            case "cut":
                del file[place:]
            case "overwrite":
                file[place : place + len(content)] = content
            case "remove":
                del file[place : place + length]
            case "double":
                file[place:place] = file[place : place + length]
    return bytes(file)


@dataclasses.dataclass
class Case:
    """A data set with one damaged file."""

    name: str
    directory: Path
    file: Path


def arrays() -> dict[str, Any]:
    return data_files.small()


def make_npz(folder: Path) -> Case:
    np.savez(folder / "a.npz", **arrays())
    return Case("npz", folder, folder / "a.npz")


def make_compressed_npz(folder: Path) -> Case:
    np.savez_compressed(folder / "a.npz", **arrays(), class_names=np.array(list("wxyz")))
    return Case("npz", folder, folder / "a.npz")


def make_npy(folder: Path) -> Case:
    for name, array in arrays().items():
        np.save(folder / f"{name}.npy", array)
    return Case("npy", folder, folder / "x_train.npy")


def make_cifar(folder: Path, layout: cifar_files.Layout, kind: str) -> Path:
    contents = data_files.files("cifar10", kind, data_files.written("cifar10"))
    return data_files.pack(folder / layout.archive, layout.folder, contents)


def make_cifar_binary(folder: Path) -> Case:
    return Case("cifar10", folder, make_cifar(folder, cifar_files.LAYOUTS["cifar10"][0], "binary"))


def make_cifar_pickles(folder: Path) -> Case:
    return Case("cifar10", folder, make_cifar(folder, cifar_files.LAYOUTS["cifar10"][1], "2"))


def make_cifar_pickle(folder: Path) -> Case:
    """Without the archive, whose checksum detects nearly all damage."""
    layout = cifar_files.LAYOUTS["cifar10"][1]
    data_files.unpack(folder / layout.folder, data_files.files("cifar10", "4", data_files.written("cifar10")))
    return Case("cifar10", folder, folder / layout.folder / layout.train[0])


def make_svhn(folder: Path) -> Case:
    data_files.write_svhn(folder)
    return Case("svhn", folder, folder / "train_32x32.mat")


def make_stl10(folder: Path) -> Case:
    rng = np.random.default_rng(0)
    contents = {}
    for split, rows in (("train", 20), ("test", 10)):
        contents[f"{split}_X.bin"] = rng.integers(0, 256, rows * 3 * 96 * 96, np.uint8).tobytes()
        contents[f"{split}_y.bin"] = (np.arange(rows) % 10 + 1).astype(np.uint8).tobytes()
    return Case("stl10", folder, data_files.pack(folder / "stl10_binary.tar.gz", "stl10_binary", contents))


def make_tiny_imagenet(folder: Path) -> Case:
    _, contents = data_files.tiny_files()
    return Case("tiny_imagenet", folder, data_files.zip_tree(folder / "tiny-imagenet-200.zip", contents))


def make_folder(folder: Path, suffix: str) -> Case:
    data_files.write_folder(folder, data_files.small(), suffix)
    return Case("image_folder", folder, sorted((folder / "train" / "class0").iterdir())[0])


def make_png(folder: Path) -> Case:
    return make_folder(folder, ".png")


def make_jpeg(folder: Path) -> Case:
    return make_folder(folder, ".jpg")


def make_webp(folder: Path) -> Case:
    return make_folder(folder, ".webp")


def make_bmp(folder: Path) -> Case:
    return make_folder(folder, ".bmp")


def make_gif(folder: Path) -> Case:
    return make_folder(folder, ".gif")


def make_ppm(folder: Path) -> Case:
    return make_folder(folder, ".ppm")


def make_tiff(folder: Path) -> Case:
    """Compressed, so that libtiff reads it."""
    case = make_folder(folder, ".tif")
    Image.open(case.file).save(case.file, compression="tiff_lzw")
    return case


MAKERS = [
    *(make_npz, make_compressed_npz, make_npy, make_cifar_binary, make_cifar_pickles, make_cifar_pickle),
    *(make_svhn, make_stl10, make_tiny_imagenet, make_png, make_jpeg),
    *(make_webp, make_bmp, make_gif, make_ppm, make_tiff),
]


@pytest.fixture
def small_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Official archives with a few images; downloads are disabled."""
    data_files.shrink("cifar10", monkeypatch)
    monkeypatch.setattr(stl10, "_ROWS", {"train": 20, "test": 10})

    def refuse(*args: object) -> None:
        raise UserError("config.data.dir: not there")

    for module in ("cifar", "stl10", "svhn", "tiny_imagenet"):
        monkeypatch.setattr(f"mocosfl_jax.data.{module}.download", refuse)
    monkeypatch.setattr("absl.logging.warning", lambda *args: None)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::DeprecationWarning:PIL")
@pytest.mark.usefixtures("small_sets")
@trials(10, 2_000)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.removeprefix("make_"))
def test_damaged_data(make: Callable[[Path], Case], count: int, tmp_path: Path) -> None:
    case = make(tmp_path)
    whole = case.file.read_bytes()
    outcomes = Outcomes()

    def use() -> None:
        dataset = data.load(case.name, str(case.directory), None)
        some = dataset.x_train[np.array([1, 0, 1])]
        assert some.shape == (3, *dataset.x_train.shape[1:]) and some.dtype == np.uint8
        images = data.in_memory(dataset).x_train
        assert isinstance(images, np.ndarray)
        assert images.shape == dataset.x_train.shape and images.dtype == np.uint8

    def read(changes: list[Change]) -> None:
        case.file.write_bytes(damaged(whole, changes))
        outcomes.of(use)

    use()
    try_out(count, DAMAGES, read)
    print(f"{make.__name__.removeprefix('make_')}: {outcomes}")
    assert outcomes.refused


@trials(10, 500)
def test_damaged_encoders(count: int, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    client, server = random_params()
    export_encoder(path, client, server, METADATA)
    whole = path.read_bytes()
    outcomes = Outcomes()

    def read(changes: list[Change]) -> None:
        path.write_bytes(damaged(whole, changes))
        outcomes.of(lambda: load_encoder(path))

    try_out(count, DAMAGES, read)
    print(f"safetensors: {outcomes}")
    assert outcomes.refused


@trials(10, 2_000)
def test_damaged_state_dicts(count: int, tmp_path: Path) -> None:
    whole = (OFFICIAL / "odd.pt").read_bytes()
    outcomes = Outcomes()

    def read(changes: list[Change]) -> None:
        (tmp_path / "a.pt").write_bytes(damaged(whole, changes))
        outcomes.of(lambda: read_state_dict(tmp_path / "a.pt"))

    try_out(count, DAMAGES, read)
    print(f"state dicts: {outcomes}")
    assert outcomes.refused
