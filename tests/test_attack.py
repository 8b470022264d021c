"""The command that attacks smashed data."""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax import attack, export, split_model, train
from mocosfl_jax.privacy import attacks
from mocosfl_jax.privacy.protocol import victim_rows
from mocosfl_jax.training import workdir
from tests.support.small_run import write_images

QUICK = ["--attackers=trivial,ridge,strong", "--decoder=custom", "--epochs=2", "--victims=6"]
TRIVIAL = ["constant colour", "own mean colour", "means of 8x8 blocks", "means of 4x4 blocks"]


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run's workdir."""
    return shutil.copytree(finished, tmp_path / "run")


def rows(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / "privacy.json").read_text())["rows"]


def test_a_run_is_attacked_at_queries_and_keys(run: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert attack.main(["attack", f"--workdir={run}", *QUICK]) == 0
    found = [(row["attacker"], row["smashed"], row["victims"]) for row in rows(run)]
    assert found == [
        *((name, "", 6) for name in TRIVIAL),
        *(("ridge", view, 6) for view in ("query", "key")),
        *(("strong decoder", view, 6) for view in ("query", "key")),
    ]
    by_view = {row["smashed"]: row["mse"] for row in rows(run) if row["attacker"] == "ridge"}
    assert by_view["query"] != by_view["key"]  # the momentum model is another one
    assert all(row["client"] == "client 0" for row in rows(run))
    assert json.loads((run / "privacy.json").read_text())["data"] == "npz"
    with Image.open(run / "reconstructions.png") as picture:
        picture.verify()
    captured = capsys.readouterr()
    assert "checkpoint 18" in captured.out and "MSE/const" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_one_kind_of_smashed_data_is_attacked_as_beside_the_other(run: pathlib.Path, noise: float) -> None:
    config = json.loads((run / "config.json").read_text())
    config["privacy"]["noise"] = noise
    (run / "config.json").write_text(json.dumps(config))
    quick = ["--attackers=ridge", "--victims=6"]
    assert attack.main(["attack", f"--workdir={run}", *quick]) == 0
    both = {row["smashed"]: row["mse"] for row in rows(run)}
    for view in ("query", "key"):
        assert attack.main(["attack", f"--workdir={run}", *quick, f"--smashed={view}"]) == 0
        found = {row["smashed"]: row["mse"] for row in rows(run)}
        assert found == {view: pytest.approx(both[view], rel=1e-4)}


def test_the_noise_of_a_run_is_in_what_is_attacked(run: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    def error_of_ridge(**privacy: float) -> float:
        config = json.loads((run / "config.json").read_text())
        config["privacy"] |= privacy
        (run / "config.json").write_text(json.dumps(config))
        assert attack.main(["attack", f"--workdir={run}", "--attackers=ridge", "--victims=20"]) == 0
        record = json.loads((run / "privacy.json").read_text())
        shown = capsys.readouterr().out
        if privacy:
            assert (record["noise"], record["clip"]) == (privacy["noise"], 1.0)
            assert f"client 0, noise {privacy['noise']:g}, clip 1\n" in shown
        else:
            assert (record["noise"], record["clip"]) == (0.0, None)
            assert "client 0, no noise\n" in shown
        return next(row["relative_mse"] for row in rows(run) if row["smashed"] == "query")

    without = error_of_ridge()
    assert without < error_of_ridge(noise=0.3) < error_of_ridge(noise=30.0) < 1.2


def test_the_client_of_an_export_is_that_of_the_run(
    run: pathlib.Path, images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    encoder, out = tmp_path / "encoder.safetensors", tmp_path / "new" / "out"
    assert export.main(["export", f"--workdir={run}", f"--out={encoder}"]) == 0
    assert attack.main(["attack", f"--workdir={run}", *QUICK]) == 0
    data = ["--data.name=npz", f"--data.dir={images}"]
    out.parent.mkdir()
    assert attack.main(["attack", f"--encoder={encoder}", f"--out={out}", *data, *QUICK]) == 0
    assert "normalises by" not in capsys.readouterr().out
    of_run = [row for row in rows(run) if row["smashed"] == "query"]
    of_encoder = [row for row in rows(out) if row["smashed"]]
    assert [row["attacker"] for row in of_encoder] == ["ridge", "strong decoder"]
    for one, other in zip(of_run, of_encoder, strict=True):
        assert one["mse"] == pytest.approx(other["mse"], rel=1e-3)

    # Other images: the constant predictor has their colour, not that of the run's images.
    dark = {name: array // (4 if array.ndim == 4 else 1) for name, array in np.load(images).items()}
    np.savez(tmp_path / "dark.npz", **dark)
    data[1] = f"--data.dir={tmp_path / 'dark.npz'}"
    trivial = ["--attackers=trivial", "--victims=6"]
    assert attack.main(["attack", f"--encoder={encoder}", f"--out={out}", *data, *trivial]) == 0
    assert "normalises by mean 0." in capsys.readouterr().out
    colour = np.mean(dark["x_train"] / 255, axis=(0, 1, 2))
    victims = dark["x_test"][victim_rows(dark["y_test"], 6)]
    assert set(dark["y_test"][:6]) != set(dark["y_test"])  # the set is in order of class
    assert rows(out)[0]["mse"] == pytest.approx(np.mean((victims / 255 - colour) ** 2), rel=1e-3)


def write_clients(file: pathlib.Path, **more: np.ndarray) -> None:
    """A client cut after the stem, one cut after two blocks, both C4S2 and of width 8."""
    arrays: dict[str, Any] = {}
    for name, cut_layer in (("one", 1), ("three", 3)):
        model = split_model("resnet18", cut_layer=cut_layer, width=8, bottleneck="C4S2", image_size=16)
        params, _ = model.init(jax.random.key(cut_layer))
        for path_in_tree, leaf in jax.tree.leaves_with_path(params):
            key = ".".join(entry.key for entry in path_in_tree).replace("bottleneck.conv0", str(cut_layer))
            for ours, theirs in (("layer", ""), ("norm", "bn"), ("kernel", "weight"), ("scale", "weight")):
                key = key.replace(ours, theirs)
            arrays[f"{name}/{key}"] = np.asarray(leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf)
    np.savez(file, **arrays | more)


def test_official_clients_of_several_cuts(tmp_path: pathlib.Path, images: str) -> None:
    victims = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    write_clients(tmp_path / "clients.npz", attack_test_images_uint8_nhwc=victims)
    argv = [f"--official_clients={tmp_path / 'clients.npz'}", "--data.name=npz", f"--data.dir={images}"]
    quick = ["--attackers=trivial,ridge", f"--out={tmp_path / 'out'}"]
    assert attack.main(["attack", *argv, *quick]) == 0
    found = [(row["client"], row["attacker"]) for row in rows(tmp_path / "out")]
    assert found == [(client, name) for client in ("one", "three") for name in [*TRIVIAL, "ridge"]]
    assert {row["victims"] for row in rows(tmp_path / "out")} == {7}
    own = next(row for row in rows(tmp_path / "out") if row["attacker"] == "own mean colour")
    pixels = victims / 255
    assert own["mse"] == pytest.approx(np.mean((pixels - pixels.mean((1, 2), keepdims=True)) ** 2), rel=1e-5)
    assert attack.main(["attack", *argv, *quick, "--clients=three"]) == 0
    assert {row["client"] for row in rows(tmp_path / "out")} == {"three"}


def test_privacy_json_is_json_where_images_are_reconstructed_perfectly(
    run: pathlib.Path, images: str, tmp_path: pathlib.Path
) -> None:
    """Black victims have their mean colour."""
    encoder = tmp_path / "encoder.safetensors"
    assert export.main(["export", f"--workdir={run}", f"--out={encoder}"]) == 0
    black = {name: array * (0 if name == "x_test" else 1) for name, array in np.load(images).items()}
    np.savez(tmp_path / "black.npz", **black)
    argv = [f"--encoder={encoder}", f"--out={tmp_path}", "--attackers=trivial"]
    data = ["--data.name=npz", f"--data.dir={tmp_path / 'black.npz'}"]
    assert attack.main(["attack", *argv, *data]) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    record = json.loads((tmp_path / "privacy.json").read_text(), parse_constant=refuse)
    assert record["rows"][1]["psnr"] == pytest.approx(100)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "found none, allowed: one of --workdir, --encoder and --official_clients"),
        (["--workdir={run}", "--encoder=x"], "found --workdir and --encoder, allowed: one of"),
        (["--encoder=x"], "--out is missing"),
        (["--workdir={run}", "--smashed=value"], "--smashed: found value, allowed: query, key or both"),
        (
            ["--encoder=x", "--out=y", "--smashed=key"],
            "--smashed: found with --encoder, allowed",
        ),
        (["--workdir={run}", "--attackers=magic"], "--attackers: found 'magic', allowed: trivial"),
        (["--workdir={run}", "--checkpoint=7", "--data.dir=/nowhere"], "--checkpoint: found 7, allowed: 18"),
        (["--workdir={run}", "--protocol=x"], "--protocol: found 'x', allowed: clean, official"),
        (["--workdir={run}", "--decoder=x"], "error: --decoder: found 'x', allowed: res_normNxCy"),
        (["--workdir={run}", "--loss=mae"], "error: --loss: found 'mae', allowed: mse, ssim"),
        (["--workdir={run}", "--epochs=0"], "epochs"),
        (["--workdir={run}", "--images=5"], "attacker's images: found 5 of 48 training images"),
        (["--workdir={run}", "--protocol=official"], "attacker's images: found 0 of 48 training images"),
        (["--workdir={run}", "--data.name=npz"], "--data.name: found npz with --workdir, allowed: with"),
        (["--workdir={run}", "--clients=a"], "--clients: found with --workdir, allowed: with --official_"),
        (["--workdir={run}", "--bottleneck=C4S2"], "--bottleneck: found with --workdir, allowed: with --off"),
        (["--encoder=x", "--clients=a"], "--clients: found with --encoder, allowed: with --official_clients"),
        (["--encoder=x", "--checkpoint=1"], "--checkpoint: found with --encoder, allowed: with --workdir"),
        (
            ["--official_clients=x", "--config=x"],
            "--config: found with --official_clients, allowed: with",
        ),
        (["--encoder=x", "--accept_other_data"], "--accept_other_data: found with --encoder, allowed: with"),
        (["--workdir={run}", "--data_dir=x"], "found --data_dir, did you mean --data.dir=x?"),
        (
            ["--official_clients={tmp}/c.npz", "--out={tmp}", "--data.name=npz", "--data.dir={tmp}/none"],
            "error: --data.dir: ",
        ),
        (["--workdir={tmp}"], "holds no config.json"),
        (["--encoder={tmp}/none", "--out={tmp}"], "none: no such file"),
        (["--official_clients={tmp}/none", "--out={tmp}"], "none: no such file"),
        (["--official_clients={tmp}/text", "--out={tmp}"], "text: not an npz file"),
        (["--official_clients={tmp}/c.npz", "--out={tmp}", "--clients=two"], "found ['two'], allowed"),
        (["--official_clients={tmp}/c.npz", "--out={tmp}", "--bottleneck=C8S2"], "one: client side: 1."),
        (
            ["--workdir={run}", "--attackers=trivial", "--out={tmp}/text/below"],
            "text/below, allowed: a folder that can be made (Not a directory)",
        ),
        (["--workdir={run}", "--seed=4294967296"], "--seed=4294967296"),
        (
            ["--workdir={run}", "--attackers=trivial", "--out=/proc/x"],
            "--out: found /proc/x, allowed: ",
        ),
    ],
)
def test_a_mistake_is_one_line(
    run: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "text").write_text("text")
    if any("c.npz" in argument for argument in arguments):
        write_clients(tmp_path / "c.npz")
    argv = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    assert attack.main(["attack", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not (run / "privacy.json").exists() and not (tmp_path / "privacy.json").exists()


def test_a_number_in_place_of_a_kernel_is_refused(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    write_clients(tmp_path / "clients.npz", **{"one/0.conv1.weight": np.zeros((), np.float32)})
    assert attack.main(["attack", f"--official_clients={tmp_path / 'clients.npz'}", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "clients.npz: one: client side: " in error and error.count("\n") == 1


@pytest.mark.parametrize("shape", [(0, 16, 16, 3), (2, 16, 24, 3), (2, 16, 16, 1)])
def test_victims_of_an_odd_shape_are_refused(
    shape: tuple[int, ...], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    write_clients(tmp_path / "clients.npz", attack_test_images_uint8_nhwc=np.zeros(shape, np.uint8))
    assert attack.main(["attack", f"--official_clients={tmp_path / 'clients.npz'}", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert f"clients.npz: attack_test_images_uint8_nhwc: found uint8 of shape {shape}, allowed: " in error


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.cut_layer", 0, "config.model.cut_layer: found 0, allowed: 1 or more"),
        ("algorithm", "flmoco", "config.algorithm: found flmoco, allowed: mocosfl"),
    ],
)
def test_clients_that_send_no_smashed_data_are_refused(
    run: pathlib.Path, capsys: pytest.CaptureFixture, field: str, value: object, message: str
) -> None:
    path = run / "config.json"
    record = json.loads(path.read_text())
    *parents, name = field.split(".")
    node = record
    for parent in parents:
        node = node[parent]
    node[name] = value
    path.write_text(json.dumps(record))
    assert workdir.read_config(run)
    assert attack.main(["attack", f"--workdir={run}"]) == 2
    assert message in capsys.readouterr().err


# MSE and SSIM on record of the official attack on clients that the authors released. The SSIM of the first is
# not reached, except with as many epochs as the record kept (docs/privacy.md).
RECORDED = {
    "cut2_ssim0.6_target0.01_cifar100": (0.0386, 0.454),
    "cut2_ssim0.5_target0.01_cifar100": (0.0080, 0.847),
}


@pytest.mark.privacy
@pytest.mark.parametrize("client", RECORDED)
def test_the_official_protocol_lands_at_the_record(
    client: str, pytestconfig: pytest.Config, released: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    """Minutes. CIFAR-10 has to be in the folder too, as for config.data.dir."""
    lands_at_the_record(client, pytestconfig, released, tmp_path)


@pytest.mark.privacy
def test_so_many_epochs_as_the_record_kept_land_at_it(
    pytestconfig: pytest.Config, released: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
    """Minutes, with the original CIFAR-10. In the log, one batch chose the decoder of epoch 16 of 50."""
    more = ["--official_epochs=16", "--seeds=5"]
    lands_at_the_record("cut2_ssim0.6_target0.01_cifar100", pytestconfig, released, tmp_path, *more)


def lands_at_the_record(
    client: str, pytestconfig: pytest.Config, released: dict[str, np.ndarray], out: pathlib.Path, *more: str
) -> None:
    assert f"{client}/0.conv1.weight" in released
    folder = pathlib.Path(pytestconfig.getoption("--privacy-dir"))
    argv = [f"--official_clients={folder / 'official_defended_clients.npz'}", f"--clients={client}"]
    argv += [f"--data.dir={folder}", f"--out={out}", "--protocol=official", "--attackers=official"]
    assert attack.main(["attack", *argv, *more]) == 0
    (row,) = rows(out)
    mse, ssim = RECORDED[client]
    assert row["images"] == 500
    assert row["mse"] == pytest.approx(mse, abs=0.005)
    assert row["ssim"] == pytest.approx(ssim, abs=0.04)


def test_help(capsys: pytest.CaptureFixture) -> None:
    assert attack.main(["attack", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ("--workdir", "--encoder", "--official_clients", *attacks.ATTACKERS, *attacks.PROTOCOLS):
        assert name in text


def test_an_algorithm_from_scratch_is_attacked_by_its_queries(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """Its pool is none of ours, so where its momentum models are is not known."""
    images = write_images(tmp_path / "images.npz", (8, 8, 3))
    config = f"--config=tests/support/own_config.py:{images}"
    assert train.main(["train", config, f"--workdir={tmp_path / 'run'}", "--config.epochs=1"]) == 0
    argv = ["attack", f"--workdir={tmp_path / 'run'}", config, "--attackers=trivial", "--victims=2"]
    assert attack.main([*argv, "--smashed=query"]) == 0
    capsys.readouterr()
    assert attack.main(argv) == 2
    assert "--smashed: found key, allowed: query for an algorithm that keeps" in capsys.readouterr().err
