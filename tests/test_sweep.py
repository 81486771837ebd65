"""Grids of experiments: what a file may say, names, the table and the picture, and grids that really run."""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from flatmin.reporting import InputError
from PIL import Image
from repository import ROOT, TINY, Repository

from flatmin import reporting

sys.path.insert(0, str(ROOT / "scripts"))
import grids
import runs_table
import sweep

GRID: dict[str, Any] = {
    "targets": ["sam-finetune"],
    "runs": [{"seed": [7, 8], "sam.rho": [0.02, 0.1]}],
    "picture": {"x": "sam.rho", "y": "sam/val.accuracy"},
}
COMMAND = ("python", "scripts/sweep.py", "grid.yaml")
EPOCHS = 40  # of fine-tuning where a signal must come before the last


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A checkout for tests that write nothing but grid.yaml."""
    return Repository(tmp_path_factory.mktemp("untouched"), TINY)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A checkout that is the current folder; nothing has run in it."""
    made = Repository(tmp_path, TINY)
    monkeypatch.chdir(made.folder)
    return made


def grid(**changes: Any) -> Path:
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def runs(**changes: Any) -> list[grids.Run]:
    return grids.read_grid(grid(**changes))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 3}, "jobs: expected targets, runs or picture, received this key"),
        ({"runs": []}, "runs: expected a list of grids, received []"),
        ({"runs": [{"seed": []}]}, "runs.0.seed: expected a list of at least one value, received []"),
        ({"runs": [{"seed": 3}]}, "runs.0.seed: expected a list of at least one value, received 3"),
        ({"runs": [{"seed": [1]}, {}]}, "runs.1: expected a mapping from keys of params.yaml to lists, received {}"),
        ({"runs": [{"a b": [1]}]}, "runs.0: expected a key of params.yaml such as sam.rho, received 'a b'"),
        (
            {"runs": [{"data.name": ["${HOME}"]}]},
            "runs.0: data.name: expected no ${, which DVC takes for another key's value, received '${HOME}'",
        ),
        ({"runs": [{"sam.roh": [1]}]}, "runs.0: sam.roh: expected no such key, received 1"),
        ({"runs": [{"sam.rho": [0.1, -1]}]}, "runs.0: sam.rho: expected greater than or equal to 0, received -1"),
        ({"runs": [{"seed.x": [1]}]}, "runs.0: seed.x: expected a key within mappings, received one within 7"),
        ({"runs": [{"sam.rho.x": [1]}]}, "runs.0: sam.rho.x: expected a key within mappings, received one within 0.05"),
        ({"runs": [{"backbones.0": ["A"]}]}, "runs.0: backbones.0: expected a key within ... ['EfficientNetLite0']"),
        ({"runs": [{"seed": [datetime.date(2026, 1, 2)]}]}, "runs.0: seed: expected ... datetime.date(2026, 1, 2)"),
        ({"targets": ["train"]}, "targets: expected a list of prepare, ... evaluate, each once, received 'train'"),
        ({"targets": "finetune"}, "targets: expected a list of prepare, ... evaluate, each once, received 'finetune'"),
        (
            {"targets": ["finetune", "finetune"]},
            "targets: expected a list of prepare, ... each once, received 'finetune'",
        ),
        ({"picture": None}, "picture: expected x and y, received None"),
        ({"picture": {"x": "seed", "y": "sam/"}}, "picture.y: expected select or sam, ... received 'sam/'"),
        ({"picture": {"x": "seeds", "y": "sam/epochs"}}, "picture.x: expected one of seed, sam.rho, received 'seeds'"),
        ({"picture": {"x": ["seed"], "y": "sam/epochs"}}, "picture.x: expected one of ... received ['seed']"),
        (
            {"picture": {"x": "seed", "y": "evaluate/sam.test.accuracy"}},
            "picture.y: expected select or sam, a slash and a metric such as val.accuracy, "
            "received 'evaluate/sam.test.accuracy'",
        ),
    ],
)
def test_wrong_grids_are_refused(
    changes: dict[str, Any], message: str, untouched: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untouched.folder)
    with pytest.raises(InputError) as caught:
        runs(**changes)
    beginning, _, end = message.partition("...")
    assert str(caught.value).startswith(f"grid.yaml: {beginning}")
    assert str(caught.value).endswith(end)


def test_a_wrong_grid_is_one_line_of_the_command(repository: Repository) -> None:
    grid(targets=["train"])
    output = repository.run(*COMMAND, expect=1)
    assert output.startswith("error: grid.yaml: targets: expected a list of prepare, ")
    assert len(output.splitlines()) == 1
    repository.variables["PYTHONPATH"] = ""
    assert "found no file" in repository.run("python", "scripts/sweep.py", "nothing.yaml", expect=1)
    Path("grid.yaml").write_text("runs: [{seed: [2026-02-30]}]")
    assert repository.run(*COMMAND, expect=1).startswith("error: grid.yaml: expected YAML, received ")


def test_a_picture_of_text_is_refused_in_one_line(repository: Repository) -> None:
    cells = [[run.name, "succeeded", "A"] for run in runs(picture={"x": "seed", "y": "select/backbone"})]
    reporting.write_csv("grid.csv", ["name", "status", "select/backbone"], cells)
    output = repository.run(*COMMAND, expect=1).splitlines()
    assert output[-1] == "error: picture.y: expected a metric that is a number, received select/backbone: 'A'"
    assert not [line for line in output if "Traceback" in line]


def test_changes_reach_the_clones_whatever_git_shows_its_user(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", repository.environment["PATH"])
    settings = {
        "color.ui": "always",
        "diff.noprefix": "true",
        "diff.external": "echo",
        "diff.context": "0",
        "diff.yaml.textconv": "wc",
    }
    for key, value in settings.items():
        repository.run("git", "config", key, value)
    Path(".git/info/attributes").write_text("*.yaml diff=yaml\n")
    text = Path("params.yaml").read_text().replace("seed: 7", "seed: 8")
    Path("params.yaml").write_text(text)
    sweep.make_base()
    assert (sweep.FOLDER / "base/params.yaml").read_text() == text


@pytest.mark.usefixtures("repository")
def test_a_name_tells_the_values_and_changes_with_what_the_run_depends_on() -> None:
    first, *others = runs()
    assert first.name.startswith("seed-7-rho-0.02-sam-finetune-")
    assert len({first.name, *(run.name for run in others)}) == 4
    assert [run.name for run in runs()] == [first.name, *(run.name for run in others)]
    Path("src/flatmin/evaluation.py").write_text("# sam-finetune does not import this")
    assert runs()[0].name == first.name
    assert runs(targets=["finetune", "sam-finetune"])[0].name != first.name
    Path("params.yaml").write_text(yaml.safe_dump({**TINY, "select": {"tolerance": 0.5}}))
    assert runs()[0].name != first.name
    Path("params.yaml").write_text(yaml.safe_dump(TINY))
    assert runs()[0].name == first.name
    Path("src/flatmin/sam.py").write_text("# sam-finetune imports this")
    assert runs()[0].name != first.name


def test_grids_that_the_page_names_are_ones_of_this_code(repository: Repository) -> None:
    named = re.findall(r"^make study-sweep NAME=(\w+)(?:.* GRID=(\w+))?", (ROOT / "docs/sweeps.md").read_text(), re.M)
    assert ("cifar100", "extract") in named
    for study, name in named:
        shutil.copy(ROOT / f"studies/{study}/params.yaml", repository.folder / "params.yaml")
        assert grids.read_grid(ROOT / f"studies/{study}/{name or 'sweep'}.yaml")[0]


@pytest.mark.usefixtures("repository")
def test_names_are_ones_that_git_takes() -> None:
    odd = {"finetune.schedule": [{"name": "cosine", "warmup_epochs": 1}], "data.name": ["../a..b~^:?*[ c", "é" * 200]}
    for run in runs(runs=[odd], picture={"x": "data.name", "y": "sam/epochs"}):
        subprocess.run(["git", "check-ref-format", f"refs/exps/{run.name}"], check=True)


@pytest.mark.usefixtures("repository")
def test_a_run_of_two_grids_is_run_once_and_a_grid_has_its_own_targets() -> None:
    listed = runs(runs=[{"sam.rho": [0.1, 0.2]}, {"sam.rho": [0.2, 0.3]}, {"sam.rho": [0.2], "targets": ["evaluate"]}])
    assert [(run.values["sam.rho"], run.targets) for run in listed] == [
        *((rho, ("sam-finetune",)) for rho in (0.1, 0.2, 0.3)),
        (0.2, ("evaluate",)),
    ]


@pytest.mark.usefixtures("repository")
def test_dvc_sets_what_the_grid_says() -> None:
    values = {
        "sam.rho": 1e-5,
        "sam.alpha": 0.3,
        "sam.method": "gsam",
        "finetune.early_stopping.patience": 3,
        "finetune.schedule": {"name": "cosine", "warmup_epochs": 1},
        "finetune.fine_tune_at": 3,
        "backbones": ["EfficientNetLite0", "MobileNet025"],
        "data.splits": {"train": "train[:10%]", "test": "train[90%:]"},
        "data.val_fraction": 0.1,
        "augment.flip": True,
        "data.class_names": ["é", "a\\b", 'a"b', 'a\\"b', "a\\", "a'b, c: [d]", "true"],
    }
    (run,) = runs(runs=[{key: [value] for key, value in values.items()}])
    overrides = [word for flag, word in zip(run.command, run.command[1:], strict=False) if flag == "-S"]
    apply_overrides("params.yaml", overrides)
    written = yaml.safe_load(Path("params.yaml").read_text())
    written["sam"]["rho"] = float(written["sam"]["rho"])  # written as 1e-05, which is text to PyYAML
    assert written == run.settings
    assert written["finetune"]["early_stopping"] == {"patience": 3}


@pytest.mark.usefixtures("repository")
def test_runs_share_what_comes_before_the_sections_in_which_they_differ() -> None:
    first, other_rho, other_rate, other_seed = runs(
        targets=["finetune", "sam-finetune"],
        runs=[{"seed": [1], "sam.rho": [0.1, 0.2]}, {"finetune.learning_rate": [0.1], "seed": [1]}, {"seed": [2]}],
    )
    assert {stage for stage, _ in first.shared() & other_rho.shared()} == {"select-best", "finetune"}
    assert {stage for stage, _ in first.shared() & other_rate.shared()} == {"select-best"}
    assert not first.shared() & other_seed.shared()


def test_jobs_part_the_cores() -> None:
    assert sweep.share([0, 1, 2, 3, 4], 0, 9) == [[0, 1], [2, 3]]
    assert sweep.share([0, 1], 0, 9) == [[0, 1]]
    assert sweep.share([3, 5, 7], 9, 9) == [[3], [5], [7]]
    assert sweep.share([0, 1, 2, 3], 4, 2) == [[0, 1], [2, 3]]
    assert sweep.share([0], 0, 1) == [[0]]


def keep(repository: Repository, run: grids.Run, metrics: dict[str, Any]) -> None:
    """Make the experiment that a run would have left, with these metrics."""
    for file, values in metrics.items():
        Path("metrics").mkdir(exist_ok=True)
        Path(f"metrics/{file}.json").write_text(json.dumps(values))
    repository.commit(run.name)
    repository.run("git", "update-ref", f"refs/exps/ab/cdef/{run.name}", "HEAD")


def test_the_table_has_a_row_for_each_run_and_no_figure_that_the_run_did_not_make(repository: Repository) -> None:
    trial, control, failed, pending = runs(runs=[*GRID["runs"]])
    metrics = {"select": {"backbone": "A"}, "sam": {"val": {"accuracy": 0.5}}, "evaluate": {"sam": {"accuracy": 0.4}}}
    keep(repository, trial, metrics)
    keep(repository, control, {"sam": {"val": {"accuracy": 0.25}, "epochs": 3}})
    sweep.FOLDER.mkdir(parents=True)
    trial.clock.write_text("12.5")
    columns, rows = runs_table.table([trial, control, failed, pending], {}, [failed])
    data = ("digits", 6, "", "")
    assert columns == [
        *("name", "status", "targets", "seed", *runs_table.DATA, "sam.rho"),
        *("select/backbone", "sam/val.accuracy", "sam/epochs", "commit", "seconds"),
    ]
    first, second = (repository.run("git", "rev-parse", f"HEAD~{back}")[:7] for back in (2, 1))
    assert [[row.get(column) for column in columns[1:]] for row in rows] == [
        ["succeeded", "sam-finetune", 7, *data, 0.02, "A", 0.5, None, first, "12.5"],
        ["succeeded", "sam-finetune", 7, *data, 0.1, "A", 0.25, 3, second, ""],
        ["failed", "sam-finetune", 8, *data, 0.02, None, None, None, "", ""],
        ["not run", "sam-finetune", 8, *data, 0.1, None, None, None, "", ""],
    ]
    (evaluated,) = runs(targets=[], runs=[{"sam.rho": [0.02]}])
    keep(repository, evaluated, {"finetune": {"epochs": 1}})
    columns, rows = runs_table.table([evaluated], {}, [])
    assert rows[0]["evaluate/sam.accuracy"] == 0.4
    assert (rows[0]["seed"], rows[0]["data.name"]) == (7, "digits"), "of params.yaml, since the grid does not set them"


def test_the_table_keeps_what_it_had_of_another_clone(repository: Repository) -> None:
    one, two, *_ = runs(runs=[*GRID["runs"]])
    keep(repository, one, {"select": {"backbone": "A"}, "sam": {"epochs": 3}})
    figures = {"select/backbone": "A", "sam/epochs": "5", "evaluate/none": "", "commit": "abc", "seconds": "7.5"}
    columns = ["name", "status", "seed", *figures]
    cells = [[two.name, "succeeded", "0", *figures.values()], ["other", "failed", "0", "", "", "", "", "7.5"]]
    reporting.write_csv("grid.csv", columns, cells)
    kept = runs_table.read_kept(Path("grid.csv"))
    assert list(kept) == [two.name]
    _, rows = runs_table.table([one, two], kept, [])
    assert rows[0]["sam/epochs"] == 3
    assert (rows[1]["status"], rows[1]["seed"]) == ("succeeded", two.values["seed"])
    assert {key: rows[1].get(key, "") for key in figures} == figures
    assert runs_table.read_kept(Path("other.csv")) == {}


ROWS = [
    {"targets": "sam-finetune", "seed": seed, "sam.rho": rho, "sam.method": method, "y": rho + seed}
    for seed in (1, 2)
    for rho in (0.2, 0.1)
    for method in ("sam", "gsam")
]
KEYS = ("targets", "seed", "sam.rho", "sam.method")


def test_the_picture_has_a_line_for_each_other_param_and_the_seeds_at_each_x() -> None:
    lines = runs_table.spread(ROWS, "sam.rho", "y", KEYS)
    assert lines == {f"sam.method {method}": {0.1: [1.1, 2.1], 0.2: [1.2, 2.2]} for method in ("sam", "gsam")}
    assert list(lines["sam.method sam"]) == [0.1, 0.2]
    assert list(runs_table.spread(ROWS[::2], "sam.rho", "y", KEYS)) == ["mean of seeds"]


def test_the_picture_is_one_and_shows_the_values(tmp_path: Path) -> None:
    pixels = []
    for name, top in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        runs_table.draw(
            {"mean of seeds": {0.1: [0.5, top], "auto": [0.2]}}, "rho", "accuracy", tmp_path / f"{name}.png"
        )
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width >= 400
            pixels.append(picture.tobytes())
    assert pixels[0] == pixels[1] != pixels[2]


def marked(repository: Repository) -> list[int]:
    """Processes that a sweep of this checkout started, directly or not."""
    mark = f"FLATMIN_SWEEP={(repository.folder / sweep.FOLDER).resolve()}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def logs(repository: Repository) -> str:
    return "\n".join(path.read_text() for path in sorted((repository.folder / sweep.FOLDER).glob("*.log")))


def stop_in_training(repository: Repository, number: int, jobs: int) -> tuple[int, str]:
    """Start a sweep, send it a signal after some epochs with SAM that no earlier sweep saw; exit code and output."""
    told = f"sam 2/{EPOCHS}: loss"
    seen = logs(repository).count(told)
    process = repository.start(*COMMAND, "--jobs", str(jobs))
    until = time.monotonic() + 500
    while logs(repository).count(told) <= seen and process.poll() is None:
        assert time.monotonic() < until, logs(repository)
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate()
    return process.returncode, output


def rows_of(repository: Repository) -> list[dict[str, str]]:
    with (repository.folder / "grid.csv").open() as file:
        return [
            {key: value for key, value in row.items() if key not in ("commit", "seconds")}
            for row in csv.DictReader(file)
        ]


def curves(repository: Repository) -> dict[str, str]:
    """What each epoch of SAM gave in each experiment, by name."""
    refs = repository.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {ref.rpartition("/")[2]: repository.run("git", "show", f"{ref}:plots/sam.csv") for ref in refs}


@pytest.mark.slow
def test_a_grid_that_is_stopped_and_killed_gives_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    params = TINY | {
        "backbones": ["MobileNet025"],
        "extract": TINY["extract"] | {"levels": "all"},  # the last has next to nothing to learn from random weights
        "finetune": TINY["finetune"] | {"epochs": EPOCHS, "views": 2, "fine_tune_at": "conv_pw_12"},
    }
    three = GRID | {"runs": [{"seed": [7], "sam.rho": [0.02, 0.1]}, {"seed": [8], "sam.rho": [0.02]}]}
    whole, killed = (Repository(tmp_path / name, params) for name in ("whole", "killed"))
    for repository in (whole, killed):
        (repository.folder / "grid.yaml").write_text(yaml.safe_dump(three, sort_keys=False))
    jobs = len(os.sched_getaffinity(0))
    output = whole.run(*COMMAND, "--jobs", str(jobs))
    assert "3 experiments: 0 have succeeded, 3 to run" in output
    with Image.open(whole.folder / "grid.png") as picture:
        assert picture.width >= 400

    code, output = stop_in_training(killed, signal.SIGINT, jobs)
    assert (code, output.splitlines()[-1]) == (130, "interrupted: run it again to resume after the last complete epoch")
    assert marked(killed) == []
    assert {row["status"] for row in rows_of(killed)} >= {"not run"}

    code, output = stop_in_training(killed, signal.SIGKILL, jobs)
    assert code == -signal.SIGKILL
    orphans = marked(killed)
    assert orphans, "the runs of a killed sweep go on"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(orphans[0]), signal.SIGKILL)  # one worker dies with it

    output = killed.run(*COMMAND, "--jobs", str(jobs))
    assert "3 experiments: grid.csv and grid.png" in output
    assert "sam: going on after epoch" in logs(killed)
    assert logs(killed).count("view 1/2: ") == logs(whole).count("view 1/2: ") > 0, "the views are found again"
    assert marked(killed) == []
    assert not list((killed.folder / sweep.FOLDER).glob("clone-*"))
    assert rows_of(killed) == rows_of(whole)
    assert curves(killed) == curves(whole)
    assert len(rows_of(killed)) == 3
    assert {row["status"] for row in rows_of(killed)} == {"succeeded"}

    refs, table = killed.run("git", "for-each-ref", "refs/exps"), (killed.folder / "grid.csv").read_bytes()
    assert "3 experiments: 3 have succeeded, 0 to run" in killed.run(*COMMAND)
    assert killed.run("git", "for-each-ref", "refs/exps") == refs
    assert (killed.folder / "grid.csv").read_bytes() == table
    assert rows_of(killed)[0]["name"] in killed.run("dvc", "exp", "show", "--csv")
    for ref in refs.split()[2::3]:
        killed.run("git", "update-ref", "-d", ref)
    assert "3 experiments: 3 have succeeded, 0 to run" in killed.run(*COMMAND), "the table has them"
    assert (killed.folder / "grid.csv").read_bytes() == table


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_succeed(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    changed = {
        "targets": ["finetune"],
        "runs": [{"finetune.fine_tune_at": ["nowhere", "block7a_expand_conv"]}],
        "picture": {"x": "finetune.fine_tune_at", "y": "finetune/val.accuracy"},
    }
    (repository.folder / "grid.yaml").write_text(yaml.safe_dump(changed))
    last = repository.run(*COMMAND, expect=1).splitlines()[-1]
    assert last.startswith("error: 1 of 2 experiments: expected success, failed: .dvc/tmp/sweep/fine-tune-at-nowhere-")
    assert "nowhere" in (repository.folder / last.split(": ")[-1]).read_text()
    assert [row["status"] for row in rows_of(repository)] == ["failed", "succeeded"]
    assert not (repository.folder / "grid.png").exists()


@pytest.mark.usefixtures("repository")
def test_what_another_machine_made_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the first run, DVC's cache lacks its start: of the two others one makes it, the other waits."""
    first, *others = runs(runs=[{"seed": [7], "sam.rho": [0.02, 0.05, 0.1]}])
    started: list[sweep.Worker] = []

    def start(run: grids.Run, slot: int, _: Any) -> sweep.Worker:
        assert all(worker.process.poll() is not None for worker in started), "the one before makes the start"
        run.log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(["sleep", "2"], start_new_session=True)
        started.append(sweep.Worker(run, slot, Path(), process, time.monotonic()))
        return started[-1]

    monkeypatch.setattr(sweep, "start", start)
    failed: list[grids.Run] = []
    sweep.run_all([first, *others], 2, {first.name: {}}, failed)
    assert [worker.run for worker in started] == failed == others, "these left no experiment"


def test_a_sweep_of_other_code_leaves_the_table_until_a_run_has_succeeded(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_all", interrupted)
    path, table = grid(), Path("grid.csv")
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, 1)
    assert table.read_text().count("not run") == 4, "there was no table"
    assert "note" not in capsys.readouterr().out
    earlier = "name,status,commit\nearlier,succeeded,abc1234\n"
    table.write_text(earlier)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, 1)
    assert table.read_text() == earlier
    told = "note: grid.csv: the 1 runs there are of other code or params (commit abc1234)\n"
    assert capsys.readouterr().out == told
    keep(repository, runs()[0], {"select": {"backbone": "A"}, "sam": {"epochs": 3}})
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, 1)
    assert table.read_text().count("succeeded") == 1
    assert "earlier" not in table.read_text()


def test_a_command_that_fails_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^git nonsense: expected it to succeed, received: git: 'nonsense' is not"):
        sweep.output("git", "nonsense")


def test_a_broken_clone_of_a_study_is_not_taken_for_the_checkout(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    (repository.folder / ".studies/digits/.git").mkdir(parents=True)
    readme = repository.folder / "README.md"
    readme.write_text("not committed")
    output = repository.run("sh", "scripts/study.sh", "digits", "sweep", "--jobs", "none", expect=128)
    assert "not a git repository" in output
    assert readme.read_text() == "not committed"
    assert repository.run("git", "branch", "--show-current") == "main\n"


def test_a_study_goes_on_in_a_checkout_that_has_moved(tmp_path: Path) -> None:
    """As it does in a container, where the checkout is mounted at another place."""
    repository = Repository(tmp_path, TINY)
    command = ("sh", "scripts/study.sh", "digits", "sweep", "--jobs", "none")
    assert "argument --jobs" in repository.run(*command, expect=2)
    (repository.folder / "README.md").write_text("later")
    repository.commit("later")
    repository.folder = repository.folder.rename(tmp_path / "elsewhere")
    assert "argument --jobs" in repository.run(*command, expect=2)
    assert (repository.folder / ".studies/digits/README.md").read_text() == "later"
    start = repository.run("git", "rev-parse", "--short", "HEAD~").strip()
    assert "argument --jobs" in repository.run("env", f"COMMIT={start}", *command, expect=2)
    assert (repository.folder / ".studies/digits/README.md").read_text() != "later"
    assert repository.run("env", "COMMIT=none", *command, expect=1) == (
        "error: COMMIT: expected one of this checkout, received 'none'\n"
    )
    later = repository.folder / "studies/later"
    later.mkdir()
    (later / "params.yaml").write_text("seed: 1\n")
    assert repository.run("env", f"COMMIT={start}", "sh", "scripts/study.sh", "later", expect=1) == (
        f"error: COMMIT: expected one with studies/later/params.yaml, received '{start}'\n"
    )
    assert repository.run("sh", "scripts/study.sh", "digits", "sweeps", expect=1) == (
        "error: expected NAME or NAME sweep, received 'digits sweeps'\n"
    )
    with (repository.folder / ".studies/digits.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert repository.run(*command, expect=1) == (
            "error: .studies/digits: expected no other run of this study, found one\n"
        )


@pytest.mark.slow
def test_the_grid_of_a_study_runs_in_its_clone(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    changed = {
        "targets": ["select-best"],
        "runs": [{"seed": [9]}],
        "picture": {"x": "seed", "y": "select/val.accuracy"},
    }
    study = repository.folder / "studies/other"
    study.mkdir()
    (study / "params.yaml").write_text(yaml.safe_dump({**TINY, "select": {"tolerance": 0.25}}))
    (study / "sweep.yaml").write_text(yaml.safe_dump(changed))
    repository.commit("another study")
    repository.run("dvc", "cache", "dir", "--local", str(tmp_path / "dvc"))
    repository.variables["FLATMIN_CACHE"] = "../kept"
    repository.run("sh", "scripts/study.sh", "other", "sweep", "--jobs", "1")
    assert (tmp_path / "kept/state").is_dir(), "a relative path is so to the checkout"
    assert (tmp_path / "dvc/files").is_dir()
    assert not (repository.folder / ".dvc/cache").exists()
    assert repository.run("git", "status", "--porcelain").split()[1::2] == [
        "studies/other/sweep.csv",
        "studies/other/sweep.png",
    ]
    with (study / "sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["seed"], row["select/backbone"], row["status"]) == ("9", "EfficientNetLite0", "succeeded")
    shown = repository.run("git", "-C", ".studies/other", "for-each-ref", "--format=%(refname)", "refs/exps").strip()
    params = repository.run("git", "-C", ".studies/other", "show", f"{shown}:params.yaml")
    assert yaml.safe_load(params) == {**TINY, "seed": 9, "select": {"tolerance": 0.25}}
    # A later commit is left out where COMMIT names an earlier one, its params too.
    start = repository.run("git", "rev-parse", "HEAD").strip()
    (study / "params.yaml").write_text(yaml.safe_dump({**TINY, "select": {"tolerance": 0.5}}))
    (repository.folder / "src/flatmin/selection.py").write_text("raise SystemExit('broken')\n")
    repository.commit("broken")
    output = repository.run("env", f"COMMIT={start}", "sh", "scripts/study.sh", "other", "sweep")
    assert "1 experiments: 1 have succeeded, 0 to run" in output
    # Another grid of the study.
    del changed["picture"]
    (study / "trials.yaml").write_text(yaml.safe_dump(changed))
    repository.run("env", f"COMMIT={start}", "GRID=trials", "sh", "scripts/study.sh", "other", "sweep")
    assert (study / "trials.csv").read_bytes() == (study / "sweep.csv").read_bytes()
    assert not (study / "trials.png").exists()
