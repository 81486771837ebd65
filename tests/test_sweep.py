"""Sweeps: what a grid's file may contain, names of runs, the table and the picture, and grids that really run."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quick
import yaml
from PIL import Image
from repository import ROOT, TINY, Repository

from flatmin.common import files
from flatmin.common.errors import InputError

sys.path.insert(0, str(ROOT / "scripts"))
import grids
import runs_table
import sweep

GRID: dict[str, Any] = {
    "targets": ["sam-finetune"],
    "runs": [{"seeds": [[7], [8]], "sam.rho": [0.02, 0.1]}],
    "picture": {"x": "sam.rho", "y": "sam/val.accuracy"},
}
COMMAND = ("python", "scripts/sweep.py", "grid.yaml")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    """A git repository with what names runs, in the current folder; the code is not there."""
    made = Repository.existing(tmp_path)
    made.folder.mkdir()
    monkeypatch.chdir(made.folder)
    shutil.copy(ROOT / "dvc.yaml", made.folder)
    made.write_params(TINY)
    made.run("git", "init", "--quiet")
    made.commit("start")
    return made


def grid(**changes: Any) -> Path:
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return path


def runs(**changes: Any) -> list[grids.Run]:
    return grids.read_grid(grid(**changes))[0]


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 3}, "jobs: expected no such key, received 3"),
        ({"runs": []}, "runs: expected a list of at least 1, received []"),
        ({"runs": [{"seeds": []}]}, "runs.0.seeds: expected a list of at least 1, received []"),
        ({"runs": [{"seeds": 3}]}, "runs.0.seeds: expected a list, such as [3], received 3"),
        ({"runs": [{"seed": [3]}]}, "runs.0: seed: expected seeds, a list, for ... in its place, received 3"),
        ({"runs": [3]}, "runs.0: expected a mapping, received 3"),
        ({"runs": [{"sam.roh": [1]}]}, "runs.0: sam.roh: expected no such key, received 1"),
        ({"runs": [{"sam.rho": [0.1, -1]}]}, "runs.0: sam.rho: expected greater than or equal to 0, received -1"),
        ({"runs": [{"sam.rho.x": [1]}]}, "runs.0: sam.rho.x: expected a key within mappings, received one within 0.05"),
        ({"targets": ["train"]}, "targets: expected some of prepare, ... report, each once, received ['train']"),
        ({"targets": "finetune"}, "targets: expected a list, such as ['finetune'], received 'finetune'"),
        ({"targets": ["audit", "audit"]}, "targets: expected some of ... each once, received ['audit', 'audit']"),
        ({"picture": {"x": "seeds"}}, "picture.y: expected a value, found none"),
    ],
)
def test_read_grid_wrong_file_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        runs(**changes)
    beginning, _, end = message.partition("...")
    assert str(caught.value).startswith(f"grid.yaml: {beginning}")
    assert str(caught.value).endswith(end)


@pytest.mark.usefixtures("repository")
def test_read_grid_of_each_study_fits_the_schema() -> None:
    for study in (ROOT / "studies/cifar100", ROOT / "studies/digits"):
        shutil.copy(study / "params.yaml", "params.yaml")
        found = [path for path in study.rglob("*.yaml") if path.name != "params.yaml"]
        assert all(grids.read_grid(path)[0] for path in found)
        assert "sweep" in {path.stem for path in found}


@pytest.mark.usefixtures("repository")
def test_read_grid_run_in_two_lists_is_listed_once() -> None:
    listed = runs(runs=[{"sam.rho": [0.1, 0.2]}, {"sam.rho": [0.2, 0.3]}, {"sam.rho": [0.2], "targets": ["evaluate"]}])
    assert [(run.values["sam.rho"], run.targets) for run in listed] == [
        *((rho, ("sam-finetune",)) for rho in (0.1, 0.2, 0.3)),
        (0.2, ("evaluate",)),
    ]


def test_run_name_has_the_values_that_vary_and_depends_on_params_alone(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = runs()
    assert first.name.startswith("seeds-7-rho-0.02-sam-finetune-")
    assert len({first.name, *(run.name for run in others)}) == 4
    repository.write_params(dict(reversed(TINY.items())))
    assert runs()[0].name == first.name
    sections = {"sam": TINY["sam"] | {"accumulate": 1}, "finetune": TINY["finetune"] | {"learning_rate": "1e-2"}}
    repository.write_params(TINY | sections)
    assert runs()[0].name == first.name, "a default and a number in other digits"
    assert len({runs(targets=targets)[0].name for targets in (["sam-finetune"], ["finetune", "sam-finetune"], [])}) == 3
    monkeypatch.setattr(grids, "RESULTS_VERSION", grids.RESULTS_VERSION + 1)
    assert runs()[0].name != first.name


@pytest.mark.parametrize(
    ("targets", "section", "changed"),
    [
        (["sam-finetune"], {"evaluate": {"ece_bins": 3}}, False),
        (["sam-finetune"], {"select": {"metric": "accuracy", "tolerance": 0.5}}, True),
        (["sam-finetune"], {"backbones": ["EfficientNetLite0", "MobileNet025"]}, True),
        (["finetune"], {"sam": {"rho": 0.3, "method": "gsam"}}, False),
        (["finetune"], {"data": TINY["data"] | {"train_per_class": 5}}, True),
        (["extract-train"], {"select": {"metric": "accuracy", "tolerance": 0.5}}, False),
        (["select-best"], {"seeds": [8]}, False),
        (["finetune"], {"seeds": [8]}, True),
        (["prepare"], {"augment": {"engine": "none"}}, False),
        (["prepare"], {"finetune": TINY["finetune"] | {"image_size": 64}}, True),
        ([], {"evaluate": {"ece_bins": 3}}, True),
    ],
)
def test_run_name_changed_section_matters_where_a_stage_uses_it(
    targets: list[str], section: dict[str, Any], changed: bool, repository: Repository
) -> None:
    (before,) = runs(targets=targets, runs=[{"sam.adaptive": [False]}])
    repository.write_params(TINY | section)
    (after,) = runs(targets=targets, runs=[{"sam.adaptive": [False]}])
    assert (after.name != before.name) == changed


@pytest.mark.usefixtures("repository")
def test_run_name_odd_values_is_a_valid_git_ref() -> None:
    odd = {"finetune.schedule": [{"name": "cosine", "warmup_epochs": 1}], "data.name": ["../a..b~^:?*[ c", "é" * 200]}
    for run in runs(runs=[odd]):
        subprocess.run(["git", "check-ref-format", f"refs/exps/{run.name}"], check=True)


@pytest.mark.usefixtures("repository")
def test_run_shared_names_stages_before_the_first_difference() -> None:
    first, other_rho, other_rate, other_seed = runs(
        targets=["finetune", "sam-finetune"],
        runs=[
            {"seeds": [[1]], "sam.rho": [0.1, 0.2]},
            {"seeds": [[1]], "finetune.learning_rate": [0.1]},
            {"seeds": [[2]]},
        ],
    )
    assert {shared.split()[0] for shared in first.shared & other_rho.shared} == {"select-best", "finetune"}
    assert {shared.split()[0] for shared in first.shared & other_rate.shared} == {"select-best"}
    assert {shared.split()[0] for shared in first.shared & other_seed.shared} == {"select-best"}


def test_write_params_sets_params_as_listed_and_keeps_comments(repository: Repository) -> None:
    values = {
        "sam.rho": 1e-5,
        "sam.method": "gsam",
        "finetune.early_stopping.patience": 3,
        "finetune.schedule": {"name": "cosine", "warmup_epochs": 1},
        "backbones": ["EfficientNetLite0", "MobileNet025"],
        "data.splits": {"train": "train[:10%]", "test": "train[90%:]"},
        "data.val_fraction": 0.1,
        "augment.flip": True,
        "data.class_names": ["é", "a\\b", 'a"b', "true", "${HOME}", "x" * 200],
    }
    path = repository.folder / "params.yaml"
    repository.write_params(TINY | {"finetune": TINY["finetune"] | {"schedule": {"name": "plateau", "patience": 2}}})
    path.write_text(f"# The study.\n{path.read_text()}")
    (run,) = runs(runs=[{key: [value] for key, value in values.items()}])
    sweep.write_params(path, run.values)
    written = yaml.safe_load(path.read_text())
    written["sam"]["rho"] = float(written["sam"]["rho"])  # written as 1e-05, which is text to PyYAML
    assert written == run.settings
    assert written["finetune"]["schedule"] == {"name": "cosine", "warmup_epochs": 1}
    assert path.read_text().startswith("# The study.\n")


def test_divide_cores_gives_equal_sets() -> None:
    assert sweep.divide_cores([0, 1, 2, 3, 4], 0, 9) == [[0, 1], [2, 3]]
    assert sweep.divide_cores([0, 1], 0, 9) == [[0, 1]]
    assert sweep.divide_cores([3, 5, 7], 9, 9) == [[3], [5], [7]]
    assert sweep.divide_cores([0, 1, 2, 3], 4, 2) == [[0, 1], [2, 3]]
    assert sweep.divide_cores([0], 0, 1) == [[0]]


ORIGIN = {"dirty": False, "results_version": grids.RESULTS_VERSION, "lock": "cpu-1", "machine": "M", "cores": 2}
RECORDS = "0123456789abcdef"


def make_experiment(repository: Repository, run: grids.Run, metrics: dict[str, Any], **origin: Any) -> None:
    """Make the experiment that a run would have left, with these metrics; no origin: made in another checkout."""
    for file, values in ({"prepare": {"digest": RECORDS}} | metrics).items():
        files.write_json(f"metrics/{file}.json", values)
    repository.commit(run.name)
    repository.run("git", "update-ref", f"refs/exps/ab/cdef/{run.name}", "HEAD")
    if origin:
        files.write_json(run.file("json"), origin)


def test_table_has_a_row_per_run_with_metrics_of_its_stages_only(repository: Repository) -> None:
    trial, control, failed, pending = runs()
    metrics = {"select": {"backbone": "A"}, "sam/7": {"val": {"accuracy": 0.5}}, "evaluate": {"sam": {"accuracy": 0.4}}}
    make_experiment(repository, trial, metrics, **ORIGIN, seconds=12.5)
    make_experiment(repository, control, {"sam/7": {"val": {"accuracy": 0.25}, "epochs": 3}})
    columns, rows = runs_table.table([trial, control, failed, pending], {}, [failed])
    data = (7, "digits", 6, "", "")
    assert columns == [
        *("name", "status", "targets", *runs_table.SHOWN, "sam.rho"),
        *("select/backbone", "sam/val.accuracy", "sam/epochs", *runs_table.ORIGIN, "seconds"),
    ]
    first, second = (repository.run("git", "rev-parse", f"HEAD~{back}")[:7] for back in (2, 1))
    origin = (first, "false", grids.RESULTS_VERSION, "cpu-1", "M", 2, RECORDS[:12])
    assert [[row.get(column) for column in columns[1:]] for row in rows] == [
        ["succeeded", "sam-finetune", "[7]", *data, 0.02, "A", 0.5, None, *origin, 12.5],
        ["succeeded", "sam-finetune", "[7]", *data, 0.1, "A", 0.25, 3, second, *["unknown"] * 5, RECORDS[:12], None],
        ["failed", "sam-finetune", "[8]", *data, 0.02, *[None] * 11],
        ["not run", "sam-finetune", "[8]", *data, 0.1, *[None] * 11],
    ]


def test_table_run_of_several_seeds_has_their_means(repository: Repository) -> None:
    (run,) = runs(targets=[], runs=[{"seeds": [[7, 8]]}])
    means = {"test": {"accuracy": 0.4}, "seeds": {"7": {"test": {"accuracy": 0.3}}, "8": {"test": {"accuracy": 0.5}}}}
    metrics: dict[str, Any] = {"select": {"backbone": "A"}, "final": {"sam": means}, "evaluate": {"sam": means}}
    for seed, accuracy in ((7, 0.5), (8, 1)):
        of_seed = {"backbone": "A", "epochs": 3, "early": seed == 7, "val": {"accuracy": accuracy}}
        metrics |= {f"{method}/{seed}": of_seed for method in ("finetune", "control", "sam")}
    make_experiment(repository, run, metrics)
    _, (row,) = runs_table.table([run], {}, [])
    of_method = {"backbone": "A", "epochs": 3, "val.accuracy": 0.75}
    expected = {f"{method}/{key}": each for method in ("finetune", "control", "sam") for key, each in of_method.items()}
    expected |= {"select/backbone": "A", "final/sam.test.accuracy": 0.4, "evaluate/sam.test.accuracy": 0.4}
    assert {key: each for key, each in row.items() if "/" in key} == expected


def test_table_keeps_rows_of_another_clone(repository: Repository) -> None:
    one, two, *_ = runs()
    make_experiment(repository, one, {"select": {"backbone": "A"}, "sam/7": {"epochs": 3}})
    cells = {"select/backbone": "A", "sam/epochs": "5", "commit": "abc", "cores": "3", "seconds": "7.5"}
    columns = ["name", "status", "seeds", *cells, "evaluate/none"]
    lines = [[two.name, "succeeded", "0", *cells.values(), ""], ["other", "failed", "0", *[""] * 6]]
    files.write_csv("grid.csv", columns, lines)
    previous = runs_table.read_table(Path("grid.csv"))
    assert list(previous) == [two.name]
    _, rows = runs_table.table([one, two], previous, [])
    assert rows[0]["sam/epochs"] == 3
    assert (rows[1]["status"], rows[1]["seeds"]) == ("succeeded", str(two.values["seeds"]))
    assert cells.items() <= rows[1].items()
    assert "evaluate/none" not in rows[1]
    assert runs_table.read_table(Path("other.csv")) == {}
    files.write_csv("grid.csv", columns, [lines[0], lines[0]])
    with pytest.raises(InputError, match=rf"^grid.csv: {two.name}: expected one row, received two$"):
        runs_table.read_table(Path("grid.csv"))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ("select/backbone", "picture.y: expected a metric that is a number, received select/backbone: 'A'"),
        ("sam/epochs", "picture.y: expected a column of the table, received 'sam/epochs'"),
    ],
)
def test_draw_wrong_picture_is_refused(y: str, message: str, tmp_path: Path) -> None:
    row = {"name": "a", "status": "succeeded", "seeds": "[7]", "select/backbone": "A"}
    with pytest.raises(InputError) as caught:
        runs_table.draw([*row], [row], grids.Picture(x="seeds", y=y), tmp_path / "picture.png")
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


PICTURE = grids.Picture(x="sam.rho", y="sam/y")
ROWS = [
    {"name": "", "status": "succeeded", "seeds": seed, "sam.rho": rho, "sam.method": method, "sam/y": seed, "cores": 1}
    for seed in (1, 2)
    for rho in (0.2, "auto", 0.1)
    for method in ("sam", "gsam")
]


def test_spread_gives_a_line_per_other_param_and_seeds_per_x() -> None:
    lines = runs_table.spread(ROWS, PICTURE)
    assert lines == {f"sam.method {name}": {x: [1, 2] for x in ("0.2", "auto", "0.1")} for name in ("sam", "gsam")}
    assert list(runs_table.spread(ROWS[::2], PICTURE)) == ["mean of seeds"]


def test_draw_same_values_give_same_picture(tmp_path: Path) -> None:
    pixels = []
    for rows in (ROWS, ROWS, ROWS[:-1]):
        runs_table.draw([*ROWS[0]], rows, PICTURE, tmp_path / "picture.png")
        with Image.open(tmp_path / "picture.png") as image:
            assert image.width >= 400
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[1] != pixels[2]


def test_make_base_has_uncommitted_changes_and_settings_and_commits_none(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", repository.environment["PATH"])
    repository.run("dvc", "init", "--quiet")
    Path("removed.txt").write_text("committed")
    repository.commit("dvc")
    repository.run("git", "config", "user.name", "Somebody")
    Path("params.yaml").write_text("seeds: [8]")
    Path("removed.txt").unlink()
    Path("new.txt").write_text("added")
    repository.run("git", "add", "new.txt")
    before = repository.run("git", "status", "--porcelain")
    base = sweep.make_base()
    assert (base / "params.yaml").read_text() == "seeds: [8]"
    assert (base / "new.txt").read_text() == "added"
    assert not (base / "removed.txt").exists()
    for command in ("rev-parse HEAD", "config user.name"):
        assert repository.run("git", "-C", str(base), *command.split()) == repository.run("git", *command.split())
    assert repository.run("git", "status", "--porcelain") == before


def started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*sweep.TIED, *command], stdin=subprocess.PIPE, start_new_session=True)


def test_tied_processes_end_when_the_sweep_does(tmp_path: Path) -> None:
    """Also what a run's first process started, after that has ended."""
    child = tmp_path / "child"
    process = started(["sh", "-c", f"sleep 60 & echo $! > {child}"])
    assert process.wait(10) == 0
    left = Path(f"/proc/{child.read_text().strip()}/status")
    time.sleep(0.1)
    assert "State:\tS" in left.read_text()
    assert process.stdin
    process.stdin.close()  # as the kernel does when the sweep is killed
    until = time.monotonic() + 10
    while left.exists() and "State:\tZ" not in left.read_text():
        assert time.monotonic() < until


@pytest.mark.usefixtures("repository")
def test_run_all_starts_what_is_shared_once_and_ends_all_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the first run, but DVC's cache lacks its start: one of the others computes it, the other waits."""
    grids.FOLDER.mkdir(parents=True)
    first, *others = runs(runs=[{"seeds": [[7]], "sam.rho": [0.02, 0.05, 0.1]}])
    workers: list[sweep.Worker] = []

    def start(run: grids.Run, slot: int, *_: Any) -> sweep.Worker:
        assert all(worker.process.poll() is not None for worker in workers), "the previous run computes the start"
        files.write_json(run.file("json"), {})
        seconds = "0.1" if len(workers) < len(others) else "60"
        workers.append(sweep.Worker(run, slot, Path(), started(["sleep", seconds]), time.monotonic()))
        return workers[-1]

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "make_base", lambda: Path())
    monkeypatch.setattr(sweep, "describe", lambda *_: {})
    failed: list[grids.Run] = []
    sweep.run_all([first, *others], 2, {first.name: {}}, failed)
    assert [worker.run for worker in workers] == failed == others, "these left no experiment"

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "time", SimpleNamespace(sleep=interrupt, monotonic=time.monotonic))
    with pytest.raises(KeyboardInterrupt):
        sweep.run_all([first], 2, {}, failed)
    assert workers[-1].process.returncode == -signal.SIGTERM


def test_sweep_interrupted_keeps_table_of_other_params_until_a_run_succeeds(
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
    assert capsys.readouterr().out == "note: grid.csv: 1 runs there are not in the grid with these params\n"
    make_experiment(repository, runs()[0], {"select": {"backbone": "A"}, "sam/7": {"epochs": 3}})
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(path, 1)
    assert table.read_text().count("succeeded") == 1
    assert "earlier" not in table.read_text()


def processes(repository: Repository) -> list[int]:
    """Processes that work in a clone of this checkout's sweep."""
    clones = str((repository.folder / grids.FOLDER).resolve() / "clone-")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "cwd").startswith(clones):
                found.append(int(folder.name))
    return found


def logs(repository: Repository) -> str:
    return "\n".join(path.read_text() for path in sorted((repository.folder / grids.FOLDER).glob("*.log")))


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_sweep_killed_and_given_again_resumes(tmp_path: Path) -> None:
    """That a training resumed equals one undisturbed is shown by tests/test_pipeline.py."""
    params = TINY | {
        "backbones": ["MobileNet025"],
        "finetune": TINY["finetune"] | {"epochs": 20, "views": 2, "fine_tune_at": "conv_pw_12"},
    }
    repository = Repository(tmp_path, params)
    two = GRID | {"runs": [{"seeds": [[7]], "sam.rho": [0.02, 0.1]}]}
    (repository.folder / "grid.yaml").write_text(yaml.safe_dump(two, sort_keys=False))
    command = (*COMMAND, "--jobs", str(len(os.sched_getaffinity(0))))
    process = repository.start(*command)
    until = time.monotonic() + 300
    while not re.search(r"^sam-finetune@7 2/\d+: loss", logs(repository), re.M) and process.poll() is None:
        assert time.monotonic() < until, logs(repository)
        time.sleep(0.1)
    assert processes(repository)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while processes(repository):
        assert time.monotonic() < until, "the runs of a killed sweep end with it"
        time.sleep(0.1)

    output = repository.run(*command)
    assert "2 experiments: 0 have succeeded, 2 to run" in output
    assert "2 experiments: grid.csv, grid.val.md, grid.png" in output
    assert re.search(r"^sam-finetune@7: \w.* after epoch \d+", logs(repository), re.M), "a training was resumed"
    assert logs(repository).count("Running stage 'select-best'") == 1, "both runs start from the same"
    assert processes(repository) == []
    assert not list((repository.folder / grids.FOLDER).glob("clone-*"))
    table = repository.folder / "grid.csv"
    before = table.read_bytes()
    assert [row["status"] for row in rows_of(table)] == ["succeeded"] * 2
    assert rows_of(table)[0]["name"] in repository.run("dvc", "exp", "show", "--csv")
    for ref in repository.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split():
        repository.run("git", "update-ref", "-d", ref)
    assert "2 experiments: 2 have succeeded, 0 to run" in repository.run(*COMMAND), "the table has them"
    assert table.read_bytes() == before


@pytest.mark.slow
def test_sweep_failing_run_is_named_and_others_succeed(tmp_path: Path) -> None:
    repository = quick.repository(tmp_path)
    (repository.folder / "stages/finetune.py").write_text("# edited and not committed")
    changed = {"targets": ["sam-finetune"], "runs": [{"sam.rho": [0.9, 0.1]}]}
    (repository.folder / "grid.yaml").write_text(yaml.safe_dump(changed))
    repository.variables["PYTHONPATH"] = ""
    last = repository.run(*COMMAND, "--jobs", "2", expect=1).splitlines()[-1]
    start = "error: 1 of 2 experiments: expected success, failed: .dvc/tmp/sweep/rho-0.9-sam-finetune-"
    assert last.startswith(start)
    assert "rho 0.9 diverges" in (repository.folder / last.split(": ")[-1]).read_text()
    failed, succeeded = rows_of(repository.folder / "grid.csv")
    assert (failed["status"], failed["records"], failed["cores"]) == ("failed", "", "")
    assert (succeeded["status"], succeeded["sam/rho"], succeeded["dirty"]) == ("succeeded", "0.1", "true")
    assert (succeeded["records"], succeeded["results_version"]) == (RECORDS[:12], str(grids.RESULTS_VERSION))


@pytest.mark.slow
def test_study_checkout_moved_continues_and_broken_clone_leaves_it_alone(tmp_path: Path) -> None:
    """In a container the checkout is mounted at another path."""
    repository = Repository(tmp_path, TINY)
    command = ("sh", "scripts/study.sh", "digits", "sweep", "--jobs", "none")
    assert "argument --jobs" in repository.run(*command, expect=2)
    (repository.folder / "README.md").write_text("later")
    repository.commit("later")
    repository.folder = repository.folder.rename(tmp_path / "elsewhere")
    assert "argument --jobs" in repository.run(*command, expect=2)
    clone = repository.folder / ".studies/digits"
    assert (clone / "README.md").read_text() == "later"
    message = "error: expected NAME or NAME sweep, received 'digits sweeps'\n"
    assert repository.run(*command[:3], "sweeps", expect=1) == message
    with (repository.folder / ".studies/digits.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = "error: .studies/digits: expected no other run of this study, found one\n"
        assert repository.run(*command, expect=1) == message
    shutil.rmtree(clone / ".git")
    (clone / ".git").mkdir()
    (repository.folder / "README.md").write_text("not committed")
    assert "not a git repository" in repository.run(*command, expect=128)
    assert (repository.folder / "README.md").read_text() == "not committed"


@pytest.mark.slow
def test_study_grid_runs_in_its_clone(tmp_path: Path) -> None:
    repository = quick.repository(tmp_path)
    changed = {
        "targets": ["sam-finetune"],
        "runs": [{"data.seed": [9]}],
        "picture": {"x": "data.seed", "y": "sam/rho"},
    }
    study = repository.folder / "studies/other"
    (study / "grids").mkdir(parents=True)
    settings = TINY | {"sam": TINY["sam"] | {"rho": 0.2}}
    (study / "params.yaml").write_text(yaml.safe_dump(settings))
    (study / "sweep.yaml").write_text(yaml.safe_dump(changed))
    repository.commit("another study")
    repository.run("dvc", "cache", "dir", "--local", str(tmp_path / "dvc"))
    repository.variables["FLATMIN_CACHE"] = "../kept"
    repository.run("sh", "scripts/study.sh", "other", "sweep", "--jobs", "1")
    assert (tmp_path / "kept/trained").is_file(), "a relative path is relative to the checkout"
    assert (tmp_path / "dvc/files").is_dir()
    assert not (repository.folder / ".dvc/cache").exists()
    assert repository.run("git", "status", "--porcelain").split()[1::2] == [
        "studies/other/sweep.csv",
        "studies/other/sweep.png",
    ]
    (row,) = rows_of(study / "sweep.csv")
    assert (row["data.seed"], row["sam/rho"], row["status"]) == ("9", "0.2", "succeeded")
    assert (row["dirty"], row["cores"]) == ("false", str(len(os.sched_getaffinity(0)))), "params.yaml is no code"
    assert f"{row['cores']} cores" in row["machine"]
    assert re.fullmatch(r"[cg]pu-[0-9a-f]{8}", row["lock"])
    assert float(row["seconds"]) > 0
    ref = repository.run("git", "-C", ".studies/other", "for-each-ref", "--format=%(refname)", "refs/exps").strip()
    params = repository.run("git", "-C", ".studies/other", "show", f"{ref}:params.yaml")
    assert yaml.safe_load(params) == settings | {"data": TINY["data"] | {"seed": 9}}
    # Another grid of the study, in its folder of grids: the experiment is there.
    del changed["picture"]
    (study / "grids/trials.yaml").write_text(yaml.safe_dump(changed))
    output = repository.run("env", "GRID=trials", "sh", "scripts/study.sh", "other", "sweep")
    assert "1 experiments: 1 have succeeded, 0 to run" in output
    assert (study / "grids/trials.csv").read_bytes() == (study / "sweep.csv").read_bytes()
    assert not (study / "grids/trials.png").exists()
