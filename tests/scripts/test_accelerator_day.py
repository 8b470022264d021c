"""The hour on an accelerator: what succeeded is kept, what failed or is missing is done by the next call."""

import json
import pathlib
import sys

import pytest

from scripts import accelerator_day


def test_the_next_call_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    counts = f"open({str(mark)!r}, 'a').write('x'); print('{{\"value\": 1}}')"
    fails = f"import pathlib; assert pathlib.Path({str(tmp_path / 'there')!r}).exists(), 'not there'"
    commands = [("good", [sys.executable, "-c", counts]), ("bad", [sys.executable, "-c", fails])]
    monkeypatch.setattr(accelerator_day, "measurements", lambda toy: commands)
    monkeypatch.setattr(accelerator_day, "DEVICE", 'print(\'{"device": "toy"}\')')
    trained: list[list[str]] = []

    def train(command: list[str], seconds: float) -> int:
        trained.append(command)
        return 0

    monkeypatch.setattr(accelerator_day, "train", train)

    argv = [f"--out={tmp_path / 'day'}", "--toy"]
    assert accelerator_day.main(argv) == 1
    results = json.loads((tmp_path / "day" / "results.json").read_text())
    assert results["good"]["results"] == [{"value": 1}] and results["good"]["on"] == [{"device": "toy"}]
    assert results["bad"]["status"] == 1 and "not there" in results["bad"]["error"]

    results["training"] = {"images_per_s": 5.0}
    (tmp_path / "day" / "results.json").write_text(json.dumps(results))
    (tmp_path / "there").touch()
    assert accelerator_day.main(argv) == 0
    kept = json.loads((tmp_path / "day" / "results.json").read_text())["training"]
    assert kept == {"images_per_s": 5.0}  # nothing was trained since
    assert mark.read_text() == "x"  # not measured again
    assert json.loads((tmp_path / "day" / "results.json").read_text())["bad"]["status"] == 0
    assert len(trained) == 2 and "--workdir" in " ".join(trained[0])

    monkeypatch.setattr(accelerator_day, "DEVICE", 'print(\'{"device": "another"}\')')
    assert accelerator_day.main(argv) == 0
    assert mark.read_text() == "xx"  # measured again on another device
    monkeypatch.setattr(accelerator_day, "measurements", lambda toy: [("good", [*commands[0][1], "more"])])
    assert accelerator_day.main(argv) == 0
    assert mark.read_text() == "xxx"  # and if the command is another


def test_what_was_measured_before_the_time_was_over_is_kept() -> None:
    prints = "import time; print('{\"value\": 1}'); print('{\"val', end='', flush=True); time.sleep(60)"
    found = accelerator_day.run([sys.executable, "-c", prints], 3.0)
    assert (found["status"], found["results"]) == (124, [{"value": 1}])


def test_a_measured_step_stands_beside_its_estimate(tmp_path: pathlib.Path) -> None:
    speeds = (10.0, 500.0, 400.0)
    lines = [{"step": 0}, *({"step": n, "images_per_s": speed} for n, speed in enumerate(speeds))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"environment": {}, "clients": {"cohort": 100, "batch_size": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    estimates = tmp_path / "estimates.jsonl"
    estimates.write_text('{"program": "init", "estimated_ms": 3}\n{"program": "round", "estimated_ms": 28}\n')
    found = accelerator_day.progress(tmp_path, estimates)
    assert (found["step_ms"], found["estimated_step_ms"], found["images_per_s"]) == (250.0, 28, 400.0)
    # Those of an earlier call may be of another device.
    assert accelerator_day.progress(tmp_path, estimates, already=3)["images_per_s"] == 400.0
    assert "images_per_s" not in accelerator_day.progress(tmp_path, estimates, already=4)


def test_training_is_asked_to_save_when_the_time_is_over() -> None:
    waits = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    assert accelerator_day.train([sys.executable, "-c", waits], 1.0) == 143
