"""Accuracy against leak: trains and attacks the points of configs/leaks.py, and draws one against the other.

    python -m scripts.leaks --data_dir=data [--workdir=runs/leaks] [--points=open-1,noise-1.0] [--seeds=1,2,3]
                            [--jobs=2] [--minutes=300] [--page=docs/privacy.md] [--epochs=6]

--data_dir has CIFAR-10. A point is trained, after its expert if it has one, and attacked, with --epochs of
the strong attacker. Each of these is a process of its own, and --jobs points are at work at a time: all
points with the first seed, then with the next. After --minutes, or when it is interrupted, runs save and
end, and attacks end; the same command goes on.

In the workdir, POINT-seedN are the runs, with the results of the attack in attack/, leaks.jsonl has a line
for each, and leaks.png and leaks.md are the picture and the table of all that are done. With --page they go
between the marks `<!-- leaks -->` and `<!-- end of leaks -->` on that page, leaks.png and leaks.jsonl into
the folder beside it. Lines that are there already stay, for points and seeds that this workdir does not have.
So seeds can come from several machines.
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mocosfl_jax.config import Config
from mocosfl_jax.errors import UserError
from mocosfl_jax.pictures import figure
from mocosfl_jax.training import workdir
from scripts import page, subset
from scripts.claims import PER_CLASS, markdown, mean_and_error, one_or_more, origin, values

CONFIGS = Path(__file__).parents[1] / "configs" / "leaks.py"
SOURCE, TARGET = range(5), range(5, 10)  # classes
MARKERS = "osD^v<>ph*"  # of the points of one kind, in the picture
# Of the table, by the names in leaks.jsonl.
MEASURES = {
    "knn_backbone": "kNN backbone",
    "linear_probe": "linear probe",
    "relative_mse": "MSE/const",
    "ssim": "SSIM",
    "mse_5th_percentile": "MSE p5",
}
ATTACKED = "attack"  # folder of the results of an attack, apart from those that a user makes in the run's
ATTACK = ["--attackers=trivial,ridge,strong", "--decoder=res_normN1C16", "--smashed=query"]

Line = dict[str, Any]  # of leaks.jsonl


class Step(NamedTuple):
    """A process of a point."""

    command: list[str]
    marker: Path  # written when it has succeeded
    basis: str  # what its result follows from: it need not run again while this is in the marker
    log: Path

    @property
    def done(self) -> bool:
        return self.marker.exists() and self.marker.read_text() == self.basis


def main(argv: Sequence[str]) -> int:
    """Run what is missing, draw what there is, and return 0 if nothing failed."""
    options = parse(argv)
    configs = runpy.run_path(str(CONFIGS))
    points = configs["POINTS"]
    try:
        for name in options.points:
            if name not in points:
                raise UserError(f"--points: found {name}, allowed: {', '.join(points)}")
        if options.page:
            page.check(options.page, ["leaks"])
        with workdir.locked(options.workdir):
            return work(configs, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def work(configs: Mapping[str, Any], options: argparse.Namespace) -> int:
    """`main`, in a workdir that is locked.

    Raises:
      UserError: If there is no CIFAR-10.
    """
    points = configs["POINTS"]
    if not (options.workdir / "target.npz").exists():
        images = subset.cifar10(options.data_dir)
        for name, classes in (("source", SOURCE), ("target", TARGET)):
            subset.write(images, options.workdir / f"{name}.npz", classes=classes, train=PER_CLASS)
    chains = [
        steps(name, seed, configs, options) for seed in options.seeds for name in options.points or points
    ]
    stop = threading.Event()
    end = threading.Timer(60 * options.minutes, stop.set)
    end.start()
    try:
        failed = follow(chains, options.jobs, stop)
    finally:
        end.cancel()
    lines = read(points, options.workdir, options.page)
    report(options.workdir, lines)
    if options.page and lines:
        fill(options.page, options.workdir)
    done = sum(chain[-1].done for chain in chains)
    print(f"{done} of {len(chains)} points are done; {options.workdir / 'leaks.jsonl'}")
    for log in failed:
        print(f"failed: {log}: {log.read_text().splitlines()[-1]}")
    return int(bool(failed))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--workdir", type=Path, default=Path("runs/leaks"))
    parser.add_argument("--points", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--jobs", type=one_or_more, default=2)
    parser.add_argument("--minutes", type=float, default=300)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--page", type=Path)
    return parser.parse_args(argv)


# --- runs


def steps(name: str, seed: int, configs: Mapping[str, Any], options: argparse.Namespace) -> list[Step]:
    """The processes of a point, one after another. The result of each follows from those before it."""
    points: Mapping[str, Config] = configs["POINTS"]
    folder = options.workdir / f"{name}-seed{seed}"
    python = [sys.executable, "-m"]

    def train(config: str, into: Path, *more: str) -> Step:
        fields = [f"--config={os.path.relpath(CONFIGS)}:{config}", f"--config.seed={seed}"]
        fields += [f"--config.data.dir={options.workdir / 'target.npz'}", *more, f"--workdir={into}"]
        basis = "".join(step.basis for step in found[-1:]) + f"{configs['get_config'](config)} {fields}\n"
        command = [*python, "mocosfl_jax.train", *fields]
        return Step(command, into / "trained", basis, Path(f"{into}.log"))

    found: list[Step] = []
    more: list[str] = []
    if (init_from := points[name].init_from) is not None:
        expert = Path(init_from).name
        from_folder = options.workdir / f"{expert}-seed{seed}"
        source = f"--config.resist.source_dir={options.workdir / 'source.npz'}"
        found.append(train(expert, from_folder, source))
        more = [f"--init_from={from_folder}"]
    found.append(train(name, folder, *more))
    attack = ["mocosfl_jax.attack", f"--workdir={folder}", f"--out={folder / ATTACKED}"]
    attack += [f"--seed={seed}", f"--epochs={options.epochs}"]
    basis = f"{found[-1].basis}{attack} {ATTACK}\n"
    log = Path(f"{folder}.log")
    found.append(Step([*python, *attack, *ATTACK], folder / ATTACKED / "done", basis, log))
    return found


def follow(chains: Sequence[Sequence[Step]], jobs: int, stop: threading.Event) -> list[Path]:
    """Run the processes of each chain in order, some chains at a time, until `stop` is set.

    Returns:
      The logs of those that failed.
    """
    failed: list[Path] = []

    def one(chain: Sequence[Step]) -> None:
        for step in chain:
            if not step.done and not (succeeded := run(step, jobs, stop)):
                if succeeded is False:
                    failed.append(step.log)
                return

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(one, chain) for chain in chains]:
                future.result()
        finally:
            stop.set()
    return failed


def run(step: Step, jobs: int, stop: threading.Event) -> bool | None:
    """Whether a process succeeded; None if it was stopped, or not even started."""
    if stop.is_set():
        return None
    name = f"{step.log.stem}: {step.command[2].rpartition('.')[2]}"
    print(f"{datetime.datetime.now():%H:%M} {name}", flush=True)
    environment = {"JAX_NUM_CPU_DEVICES": "1"} if jobs > 1 else {}
    began = time.monotonic()
    with step.log.open("a") as log:
        log.write(f"$ {shlex.join(['python', *step.command[1:]])}\n")
        log.flush()
        process = subprocess.Popen(
            step.command, stdout=log, stderr=log, env=environment | os.environ, start_new_session=True
        )
        while process.poll() is None:
            if stop.wait(0.5):
                process.send_signal(signal.SIGTERM)  # it saves and ends
                process.wait()
                return None
    print(f"{datetime.datetime.now():%H:%M} {name}: {time.monotonic() - began:.0f} s", flush=True)
    if process.returncode == 0:
        step.marker.write_text(step.basis)
    return process.returncode == 0


def read(points: Sequence[str], runs: Path, published_on: Path | None) -> list[Line]:
    """What each attacked point has come to, with any seed: in the workdir, or else beside the page.

    The workdir's leaks.jsonl gets it too.
    """
    found: dict[tuple[str, int], Line] = {}
    if published_on and (published := published_on.with_suffix("") / "leaks.jsonl").exists():
        earlier = [json.loads(line) for line in published.read_text().splitlines()]
        found = {(line["point"], line["seed"]): line for line in earlier}
    for name in points:
        for marker in runs.glob(f"{name}-seed*/{ATTACKED}/done"):
            folder = marker.parents[1]
            seed = int(folder.name.rpartition("-seed")[2])
            date = datetime.date.fromtimestamp(marker.stat().st_mtime)
            about = {"point": name, "seed": seed, "date": f"{date}", **origin(folder)}
            found[name, seed] = about | results(folder)
    lines = [found[key] for name in points for key in sorted(found) if key[0] == name]
    with (runs / "leaks.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return lines


def results(folder: Path) -> Line:
    """Accuracies of a run, and what the strongest attacker sees, by whatever means."""
    found: Line = {}
    for line in workdir.read_metrics(folder):
        found |= {name: line[name] for name in ("knn_backbone", "linear_probe") if name in line}
        for ours, theirs in (
            ("knn_raw_pixels", "knn_raw_pixels"),
            ("probe_raw_pixels", "linear_probe_raw_pixels"),
        ):
            found |= {ours: line[theirs]} if theirs in line else {}
    record = json.loads((folder / ATTACKED / "privacy.json").read_text())
    rows = [row for row in record["rows"] if row["smashed"]]
    strongest = min(rows, key=lambda row: row["relative_mse"])
    names = ("attacker", "smashed", "relative_mse", "ssim", "mse_5th_percentile")
    return found | {name: strongest[name] for name in names} | {"attack_epochs": record["epochs"]}


# --- picture and table


def report(folder: Path, lines: Sequence[Line]) -> None:
    """Write leaks.png and leaks.md."""
    if not lines:
        return
    points: dict[str, list[Line]] = {}
    for line in lines:
        points.setdefault(line["point"], []).append(line)
    rows = [["defence", *MEASURES.values()]]
    rows += [
        [name, *(mean_and_error(values(of_point, measure)) for measure in MEASURES)]
        for name, of_point in points.items()
    ]
    levels = ", ".join(
        f"{what} {statistics.fmean(values(lines, name)):.3f}"
        for name, what in (("knn_raw_pixels", "kNN"), ("probe_raw_pixels", "linear probe"))
        if values(lines, name)
    )
    by_date = sorted(lines, key=lambda line: line["date"])
    dates, commits, devices, epochs = (
        ", ".join(dict.fromkeys(map(str, values(by_date, name))))
        for name in ("date", "commit", "device", "attack_epochs")
    )
    about = (
        f"On raw pixels: {levels}. {dates}; commits {commits}; devices {devices}; {epochs} epochs of attack."
    )
    text = f"{markdown(rows)}\n\n{about}\n"
    (folder / "leaks.md").write_text(text)
    plot(folder / "leaks.png", points)


def plot(path: Path, points: Mapping[str, Sequence[Line]]) -> None:
    """Draw the accuracy of each point against its leak: means, standard errors, small marks for runs."""
    kinds: dict[str, list[str]] = {}
    for name in points:
        kinds.setdefault(name.partition("-")[0], []).append(name)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots()
        for name, lines in points.items():
            kind = name.partition("-")[0]
            color, marker = f"C{list(kinds).index(kind)}", MARKERS[kinds[kind].index(name) % len(MARKERS)]
            both = [values(lines, measure) for measure in ("relative_mse", "linear_probe")]
            means = [statistics.fmean(numbers) for numbers in both]
            errors = [
                statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0 for numbers in both
            ]
            axes.errorbar(*means, *reversed(errors), color=color, fmt=marker, ms=7, lw=1, label=name)
            axes.scatter(*both, color=color, marker=marker, s=12, alpha=0.4)
        every = [line for lines in points.values() for line in lines]
        if levels := values(every, "probe_raw_pixels"):
            axes.axhline(statistics.fmean(levels), color="tab:gray", ls="--", label="raw pixels")
        canvas.legend(loc="outside right upper", fontsize=8)
        axes.set(
            xlabel="what the strongest attacker does not see: MSE / MSE of one constant colour",
            ylabel="accuracy of the linear probe",
            xlim=(0, 1.05 * max(values(every, "relative_mse"))),
        )

    figure.save(path, (8, 5.5), draw)


def fill(path: Path, folder: Path) -> None:
    """Put the picture and the table between the marks on the page, and the lines beside the picture."""
    pictures = path.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for name in ("leaks.png", "leaks.jsonl"):
        shutil.copy(folder / name, pictures / name)
    shown = f"![Accuracy against leak]({pictures.name}/leaks.png)\n\n{(folder / 'leaks.md').read_text()}"
    path.write_text(page.filled(path.read_text(), "leaks", shown))


def interrupt(*_: Any) -> None:
    """End like after Ctrl-C, so that runs are told to save."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
