"""The paper's three claims at laptop scale: runs all points of configs/claims.py, and draws their curves.

    python -m scripts.claims --data_dir=data [--workdir=runs/claims] [--claims=sharing,sync-cut1-f5]
                             [--seeds=1,2,3] [--jobs=2] [--minutes=300] [--page=docs/claims.md]
                             [-- --config.FIELD=VALUE ...]

--data_dir has CIFAR-10. --claims are names of claims or of points; without it all of them are run. Each point
is one run of `python -m mocosfl_jax.train` in a process of its own, --jobs of them at a time, with one device
each if there are several. All points are run with the first seed, then with the next. After --minutes, or
when it is interrupted, the runs save and end. The same command goes on: finished runs are skipped,
interrupted ones resumed, failed ones tried again. What follows -- is added to every run of the workdir, and
cannot be published by --page.

In the workdir, runs.jsonl has a line for each run, with its command, date, commit, seconds and results.
NAME.png and NAME.md are the curves and tables of each claim, from the runs that are finished. With --page,
the tables go between the marks on that page, curves and runs.jsonl into the folder beside it that has its
name. What is finished there counts as finished, so seeds can come from several machines. A collapse, and a
run that ends because its loss is not finite, are results and are recorded as such.
"""

import argparse
import collections
import datetime
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import replacing
from mocosfl_jax.pictures import figure
from mocosfl_jax.training import workdir
from scripts import page, subset

CONFIGS = Path(__file__).parents[1] / "configs" / "claims.py"
PER_CLASS = 1000  # training images of each class
NOT_FINITE = re.compile(r"the loss of step .* is (nan|-?inf)|a parameter is not finite after step")
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)  # the last: before it could save

# What is drawn and tabulated.
MEASURES = {
    "concatenation": ("knn_backbone", "knn_projection"),
    "sharing": ("knn_backbone", "knn_projection"),
    "synchronization": ("knn_backbone", "knn_projection", "divergence"),
    "deep": ("knn_backbone", "knn_projection", "divergence"),
}
# The curves whose difference a claim is about.
PAIRS = {
    "concatenation": (
        ("concatenated", "each client a step"),
        ("concatenated", "each client a step, rates / N"),
        ("concatenated", "FL-MoCo"),
    ),
    "sharing": (
        ("IID, one queue", "IID, a queue for each"),
        ("two classes, one queue", "two classes, a queue for each"),
    ),
    "synchronization": (
        ("4 of 8 convolutions, MonAcoSFL", "4 of 8 convolutions"),
        ("6 of 8 convolutions, MonAcoSFL", "6 of 8 convolutions"),
    ),
    "deep": (
        ("one class, rates 0.03, MonAcoSFL", "one class, rates 0.03"),
        ("two classes, rates 0.1, MonAcoSFL", "two classes, rates 0.1"),
        ("one class, rates 0.1, MonAcoSFL", "one class, rates 0.1"),
    ),
}
NAMES = {
    "knn_backbone": "kNN accuracy, backbone features",
    "knn_projection": "kNN accuracy, projection features",
    "divergence": "divergence of the clients, mean over epochs",
}
XS = {
    "concatenation": "clients N, with batches of 100 / N",
    "sharing": "keys K of all queues together",
    "synchronization": "synchronizations in an epoch of 100 steps",
    "deep": "synchronizations in an epoch of 100 steps",
}


class Run(NamedTuple):
    """A run that is to be done."""

    claim: str
    point: str
    curve: str
    x: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.point}-seed{self.seed}"


class Started(NamedTuple):
    """A run whose process is at work."""

    run: Run
    process: subprocess.Popen
    since: float  # seconds, monotonic


Line = dict[str, Any]  # of runs.jsonl


def main(argv: Sequence[str]) -> int:
    """Run what is missing, draw what there is, and return 0 if no run failed."""
    options = parse(argv)
    try:
        wanted = runs(options.claims, options.seeds)
        if options.page:
            page.check(options.page, MEASURES)
            if options.more:
                raise UserError(
                    f"--: found {shlex.join(options.more)} with --page, allowed: nothing, since "
                    f"the page shows the points of {CONFIGS.name}"
                )
        with workdir.locked(options.workdir):  # another process would write runs.jsonl without these runs
            return work(wanted, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def work(wanted: Sequence[Run], options: argparse.Namespace) -> int:
    """`main`, in a workdir that is locked.

    Raises:
      UserError: If there is no CIFAR-10.
    """
    images = options.workdir / "cifar10.npz"
    table = options.workdir / "runs.jsonl"
    lines = read(table)
    check_settings(lines, options.more, table)
    if options.page:
        published = read(options.page.with_suffix("") / "runs.jsonl")
        lines |= {
            name: line for name, line in published.items() if is_done(line) and not is_done(lines.get(name))
        }
    if not images.exists():
        subset.write(subset.cifar10(options.data_dir), images, train=PER_CLASS)
    waiting = collections.deque(run for run in wanted if not is_done(lines.get(run.name)))
    print(f"{len(wanted) - len(waiting)} of {len(wanted)} runs are done", flush=True)
    train(waiting, lines, options, images)
    write(table, lines)
    report(options.workdir, lines)
    if options.page:
        fill(options.page, options.workdir)
    failed = [run.name for run in wanted if lines.get(run.name, {}).get("outcome") == "failed"]
    missing = sum(not is_done(lines.get(run.name)) for run in wanted)
    print(f"{len(wanted) - missing} of {len(wanted)} runs are done; {table}")
    for name in failed:
        print(f"failed: {name}: {lines[name]['error']} ({options.workdir / f'{name}.log'})")
    return int(bool(failed))


def check_settings(lines: Mapping[str, Line], more: Sequence[str], table: Path) -> None:
    """Raise UserError if there are runs with other arguments behind --, which would count as these."""
    now = shlex.join(more)
    for line in lines.values():
        if (before := line.get("more", "")) != now:
            raise UserError(
                f"--: found {now or 'nothing'}, allowed: {before or 'nothing'}, as in the runs of {table}; "
                "give another --workdir"
            )


def one_or_more(text: str) -> int:
    """Parse a number of jobs."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text}, allowed: 1 or more")
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `more` has the arguments behind --."""
    own, more = list(argv), []
    if "--" in own:
        place = own.index("--")
        own, more = own[:place], own[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--workdir", type=Path, default=Path("runs/claims"))
    parser.add_argument("--claims", type=lambda text: text.split(","), default=[])
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--jobs", type=one_or_more, default=2)
    parser.add_argument("--minutes", type=float, default=300)
    parser.add_argument("--page", type=Path)
    return parser.parse_args(own, argparse.Namespace(more=more))


# --- runs


def train(
    waiting: collections.deque[Run], lines: dict[str, Line], options: argparse.Namespace, images: Path
) -> None:
    """Run what is waiting, some at a time, until the time is over, and record each run in `lines`."""
    deadline = time.monotonic() + 60 * options.minutes
    started: list[Started] = []
    try:
        while (started or waiting) and time.monotonic() < deadline:
            while waiting and len(started) < options.jobs:
                started.append(start(waiting.popleft(), options, images))
            ended = [each for each in started if each.process.poll() is not None]
            for each in ended:
                started.remove(each)
                record(each, options, lines)
            time.sleep(0.2)
        if started or waiting:
            print(f"stopped after {options.minutes:g} minutes", flush=True)
    finally:  # the time is over, or this process is interrupted
        for each in started:
            each.process.send_signal(signal.SIGTERM)  # it saves and ends
        for each in started:
            each.process.wait()
            record(each, options, lines)


def runs(wanted: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """The runs of some claims or points, or of all: every point with the first seed, then with the next.

    Raises:
      UserError: If a name is that of no claim and no point.
    """
    claims = runpy.run_path(str(CONFIGS))["CLAIMS"]
    known = {*claims, *(name for points in claims.values() for name in points)}
    for name in wanted:
        if name not in known:
            raise UserError(f"--claims: found {name}, allowed: {', '.join(claims)}, or a point of {CONFIGS}")
    return [
        Run(claim, name, point.curve, point.x, seed)
        for seed in seeds
        for claim, points in claims.items()
        for name, point in points.items()
        if not wanted or claim in wanted or name in wanted
    ]


def command(run: Run, images: Path, folder: Path, more: Sequence[str]) -> list[str]:
    """The command of a run."""
    config = os.path.relpath(CONFIGS)
    fields = [f"--config={config}:{run.point}", f"--config.seed={run.seed}", f"--config.data.dir={images}"]
    return [sys.executable, "-m", "mocosfl_jax.train", *fields, *more, f"--workdir={folder}"]


def start(run: Run, options: argparse.Namespace, images: Path) -> Started:
    """Start the process of a run. What it prints goes to a log beside its workdir."""
    folder = options.workdir / run.name
    print(f"{datetime.datetime.now():%H:%M} {run.name}", flush=True)
    environment = {"JAX_NUM_CPU_DEVICES": "1"} if options.jobs > 1 else {}
    with Path(f"{folder}.log").open("a") as log:
        process = subprocess.Popen(
            command(run, images, folder, options.more),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | os.environ,
            start_new_session=True,  # a second signal, from the terminal, would end it without saving
        )
    return Started(run, process, time.monotonic())


def record(started: Started, options: argparse.Namespace, lines: dict[str, Line]) -> None:
    """Record a run whose process has ended, with the time of its earlier processes."""
    run, folder = started.run, options.workdir / started.run.name
    text = Path(f"{folder}.log").read_text(errors="replace").splitlines()
    error = text[-1] if text else "printed nothing"
    status = started.process.returncode
    if status == 0:
        outcome = "finished"
    elif status == 1 and NOT_FINITE.search(error):
        outcome = "not finite"
    else:
        outcome = "interrupted" if status in STOPPED else "failed"
    shown = command(run, options.workdir / "cifar10.npz", folder, options.more)
    line: Line = run._asdict() | {
        "command": shlex.join(["python", *shown[1:]]),
        "more": shlex.join(options.more),
        "date": f"{datetime.date.today()}",
        **origin(folder),
        "seconds": round(lines.get(run.name, {}).get("seconds", 0) + time.monotonic() - started.since, 1),
        "jobs": options.jobs,
        "outcome": outcome,
    }
    if outcome in ("failed", "not finite"):
        line["error"] = error
    if outcome in ("finished", "not finite"):
        line |= results(workdir.read_metrics(folder))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # those of FL-MoCo are large
    lines[run.name] = line
    write(options.workdir / "runs.jsonl", lines)
    print(f"{datetime.datetime.now():%H:%M} {run.name}: {outcome}, {line['seconds']:.0f} s", flush=True)


def origin(folder: Path) -> dict[str, str | None]:
    """The commit of the code that began the run, and the device that it began on."""
    file = folder / "config.json"
    environment = workdir.read_record(folder)["environment"] if file.exists() else {}
    commit = environment.get("commit")
    return {
        "commit": commit and re.sub(r"\b([0-9a-f]{7})[0-9a-f]+", r"\1", commit),
        "device": environment.get("device"),
    }


def results(metrics: Sequence[Mapping[str, float]]) -> Line:
    """What a run has come to, from the lines of its metrics.jsonl."""
    untrained = metrics[0]
    epochs = [line for line in metrics if "loss" in line]
    found: Line = {"knn_untrained": untrained["knn_backbone"], "knn_raw_pixels": untrained["knn_raw_pixels"]}
    if not epochs:
        return found
    divergences = [line["divergence"] for line in epochs if "divergence" in line]
    last = epochs[-1]
    found |= {name: last[name] for name in ("loss", "knn_backbone", "knn_projection") if name in last}
    if divergences:
        found["divergence"] = statistics.fmean(divergences)
    return found | {"collapsed": bool(last["collapsed"])}


def is_done(line: Line | None) -> bool:
    """Whether a run need not be started again."""
    return line is not None and line["outcome"] in ("finished", "not finite")


def read(path: Path) -> dict[str, Line]:
    """The lines of runs.jsonl, by the name of the run."""
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {f"{line['point']}-seed{line['seed']}": line for line in lines}


def write(path: Path, lines: Mapping[str, Line]) -> None:
    """Replace runs.jsonl, so that a kill leaves the old or the new one."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))


# --- curves and tables

Curves = dict[str, dict[int, list[Line]]]  # curve -> place on it -> runs, one for each seed


def report(folder: Path, lines: Mapping[str, Line]) -> None:
    """Write the picture and the tables of each claim of which there is a result."""
    done = sorted((line for line in lines.values() if is_done(line)), key=lambda line: line["seed"])
    for claim, measures in MEASURES.items():
        curves: Curves = {}
        for line in done:
            if line["claim"] == claim:
                curves.setdefault(line["curve"], {}).setdefault(line["x"], []).append(line)
        if curves:
            plot(folder / f"{claim}.png", claim, curves)
            tables = [table(NAMES[measure], curves, measure) for measure in measures]
            tables.append(differences(claim, curves, "knn_backbone"))
            text = "\n\n".join(filter(None, [*tables, baselines(curves), costs(curves)]))
            (folder / f"{claim}.md").write_text(f"{text}\n")


def plot(path: Path, claim: str, curves: Curves) -> None:
    """Draw a line through the means of each curve, and a dot for each run."""
    measures = [measure for measure in MEASURES[claim] if measure != "knn_projection"]

    def draw(canvas: Any) -> None:
        for axes, measure in zip(np.atleast_1d(canvas.subplots(1, len(measures))), measures, strict=True):
            for number, (curve, points) in enumerate(sorted(curves.items())):
                found = {x: values(points[x], measure) for x in sorted(points)}
                found = {x: numbers for x, numbers in found.items() if numbers}
                means = [statistics.fmean(numbers) for numbers in found.values()]
                color = f"C{number}"
                axes.plot(list(found), means, color=color, marker="_", ms=12, label=curve)
                dots = [(x, value) for x, numbers in found.items() for value in numbers]
                axes.scatter(*zip(*dots, strict=True), color=color, s=14, alpha=0.6) if dots else None
            if measure == "knn_backbone":
                for name, style in (("knn_untrained", ":"), ("knn_raw_pixels", "--")):
                    label = name.removeprefix("knn_").replace("_", " ")
                    if levels := values(every(curves), name):
                        axes.axhline(statistics.fmean(levels), color="tab:gray", ls=style, label=label)
            ticks = sorted({x for points in curves.values() for x in points})
            axes.set(xscale="log", xlabel=XS[claim], ylabel=NAMES[measure])
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        seeds = sorted({len(runs) for points in curves.values() for runs in points.values()})
        spread = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
        canvas.suptitle("One seed" if seeds == [1] else f"Means over {spread} seeds; each dot is a run")
        handles, names = canvas.axes[0].get_legend_handles_labels()
        canvas.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)

    figure.save(path, (6.5 * len(measures), 5.5), draw)


def table(title: str, curves: Curves, measure: str) -> str:
    """A row for each curve: mean ± standard error over the seeds at each of its places."""
    xs = sorted({x for points in curves.values() for x in points})
    rows = [[title, *(f"{x:,}" for x in xs)]]
    rows += [
        [curve, *(cell(points.get(x, []), measure) for x in xs)] for curve, points in sorted(curves.items())
    ]
    return markdown(rows)


def differences(claim: str, curves: Curves, measure: str) -> str:
    """A row for each pair of curves: their mean difference over runs with the same seed."""
    xs = sorted({x for points in curves.values() for x in points})
    rows = [[f"difference of {NAMES[measure]}", *(f"{x:,}" for x in xs)]]
    for pair in PAIRS[claim]:
        cells = []
        for x in xs:
            one, other = (
                {line["seed"]: line[measure] for line in curves.get(curve, {}).get(x, []) if measure in line}
                for curve in pair
            )
            cells.append(mean_and_error([one[seed] - other[seed] for seed in one if seed in other], "+.3f"))
        rows.append([" less ".join(pair), *cells])
    return markdown(rows)


def mean_and_error(numbers: Sequence[float], form: str = ".3f") -> str:
    """Mean ± standard error (how many there are); nothing if there are none."""
    if not numbers:
        return ""
    error = f" ± {statistics.stdev(numbers) / len(numbers) ** 0.5:.3f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):{form}}{error} ({len(numbers)})"


def cell(lines: Sequence[Line], measure: str) -> str:
    """The mean of a measure, and how many runs collapsed or were not finite."""
    parts = [mean_and_error(values(lines, measure))]
    for word, count in (
        ("collapsed", sum(line.get("collapsed", False) for line in lines)),
        ("not finite", sum(line["outcome"] == "not finite" for line in lines)),
    ):
        parts += [f"{count} {word}"] if count else []
    return ", ".join(filter(None, parts))


def baselines(curves: Curves) -> str:
    """What the accuracies are to be compared with, of the runs that have it."""
    untrained, pixels = (values(every(curves), name) for name in ("knn_untrained", "knn_raw_pixels"))
    known = []
    if untrained:
        known.append(f"of backbone features before training: {min(untrained):.3f} to {max(untrained):.3f}")
    if pixels:
        known.append(f"of raw pixels: {statistics.fmean(pixels):.3f}")
    return f"kNN {'; '.join(known)}." if known else ""


def costs(curves: Curves) -> str:
    """A row for each point: its command, dates, commits and devices of all its runs, seconds by seed."""
    rows = [["command, with `--config.seed` of each run", "seeds", "dates", "commits", "devices", "seconds"]]
    points: dict[str, list[Line]] = {}
    for line in every(curves):
        points.setdefault(line["point"], []).append(line)
    for lines in points.values():
        config = next(word for word in shlex.split(lines[0]["command"]) if word.startswith("--config="))
        each = [dict.fromkeys(values(lines, name)) for name in ("date", "commit", "device")]
        seconds = ", ".join(f"{line['seconds']:.0f}" for line in lines)
        seeds = ", ".join(str(line["seed"]) for line in lines)
        rows.append([f"`{config}`", seeds, *map(", ".join, each), seconds])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, whose first row is its head."""
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *others])


def every(curves: Curves) -> list[Line]:
    """All runs of the curves."""
    return [line for points in curves.values() for lines in points.values() for line in lines]


def values(lines: Sequence[Line], name: str) -> list[Any]:
    """The values of a measure, or of what else is recorded of a run, of the runs that have it."""
    return [line[name] for line in lines if line.get(name) is not None]


def fill(path: Path, folder: Path) -> None:
    """Put the tables of each claim between its marks on the page, curves and runs.jsonl into its folder."""
    text, pictures = path.read_text(), path.with_suffix("")
    pictures.mkdir(exist_ok=True)
    shutil.copy(folder / "runs.jsonl", pictures / "runs.jsonl")
    for claim in MEASURES:
        if (folder / f"{claim}.md").exists():
            shutil.copy(folder / f"{claim}.png", pictures / f"{claim}.png")
            tables = (folder / f"{claim}.md").read_text()
            alt = f"{NAMES['knn_backbone']}, over {XS[claim]}"
            text = page.filled(text, claim, f"![{alt}]({pictures.name}/{claim}.png)\n\n{tables}")
    path.write_text(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
