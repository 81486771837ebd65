"""Sweeps: what a grid's file may contain, names of runs, the table and the picture, and grids that really run."""

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
EPOCHS = 20  # of fine-tuning, where a signal must arrive before the last one


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


def file_of(values: dict[str, Any]) -> Path:
    path = Path("grid.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def grid(**changes: Any) -> Path:
    return file_of({**GRID, **changes})


def runs(**changes: Any) -> list[grids.Run]:
    listed: list[grids.Run] = grids.read_grid(grid(**changes))[0]
    return listed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jobs": 3}, "jobs: expected no such key, received 3"),
        ({"runs": []}, "runs: expected a list of at least 1, received []"),
        ({"runs": [{"seeds": []}]}, "runs.0.seeds: expected a list of at least 1, received []"),
        ({"runs": [{"seeds": 3}]}, "runs.0.seeds: expected a list, such as [3], received 3"),
        ({"runs": [{"seeds": [3]}]}, "runs.0: seeds: expected ... received 3"),
        ({"runs": [{"seed": [3]}]}, "runs.0: seed: expected seeds, a list, for ... in its place, received 3"),
        ({"runs": [3]}, "runs.0: expected a mapping, received 3"),
        ({"runs": [{"a b": [1]}]}, "runs.0: a b: expected no such key, received 1"),
        ({"runs": [{"sam.roh": [1]}]}, "runs.0: sam.roh: expected no such key, received 1"),
        ({"runs": [{"sam.rho": [0.1, -1]}]}, "runs.0: sam.rho: expected greater than or equal to 0, received -1"),
        ({"runs": [{"seeds.x": [1]}]}, "runs.0: seeds.x: expected a key within mappings, received one within [7]"),
        ({"runs": [{"sam.rho.x": [1]}]}, "runs.0: sam.rho.x: expected a key within mappings, received one within 0.05"),
        ({"runs": [{"seeds": [datetime.date(2026, 1, 2)]}]}, "runs.0: seeds: expected ... datetime.date(2026, 1, 2)"),
        ({"targets": ["train"]}, "targets: expected some of prepare, ... report, each once, received ['train']"),
        ({"targets": "finetune"}, "targets: expected a list, such as ['finetune'], received 'finetune'"),
        (
            {"targets": ["finetune", "finetune"]},
            "targets: expected some of prepare, ... each once, received ['finetune', 'finetune']",
        ),
        ({"picture": {"x": "seeds"}}, "picture.y: expected a value, found none"),
    ],
)
def test_read_grid_wrong_file_is_refused(
    changes: dict[str, Any], message: str, untouched: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untouched.folder)
    with pytest.raises(InputError) as caught:
        runs(**changes)
    beginning, _, end = message.partition("...")
    assert str(caught.value).startswith(f"grid.yaml: {beginning}")
    assert str(caught.value).endswith(end)


@pytest.mark.slow
def test_sweep_wrong_grid_prints_one_line(repository: Repository) -> None:
    grid(targets=["train"])
    output = repository.run(*COMMAND, expect=1)
    assert output.startswith("error: grid.yaml: targets: expected some of prepare, ")
    assert len(output.splitlines()) == 1
    repository.variables["PYTHONPATH"] = ""
    assert "expected a file, found none" in repository.run("python", "scripts/sweep.py", "nothing.yaml", expect=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("y", "message"),
    [
        ("select/backbone", "picture.y: expected a metric that is a number, received select/backbone: 'A'"),
        ("sam/epochs", "picture.y: expected a column of the table, received 'sam/epochs'"),
    ],
)
def test_sweep_wrong_picture_prints_one_line(repository: Repository, y: str, message: str) -> None:
    cells = [[run.name, "succeeded", "A"] for run in runs(picture={"x": "seeds", "y": y})]
    files.write_csv("grid.csv", ["name", "status", "select/backbone"], cells)
    output = repository.run(*COMMAND, expect=1).splitlines()
    assert output[-1] == f"error: {message}"
    assert not [line for line in output if "Traceback" in line]


@pytest.mark.slow
def test_make_base_has_uncommitted_changes_and_commits_none(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", repository.environment["PATH"])
    text = Path("params.yaml").read_text().replace("  seed: 7", "  seed: 8")
    Path("params.yaml").write_text(text)
    Path("README.md").unlink()
    Path("new.txt").write_text("added")
    repository.run("git", "add", "new.txt")
    before = repository.run("git", "status", "--porcelain")
    sweep.make_base()
    base = grids.FOLDER / "base"
    assert (base / "params.yaml").read_text() == text
    assert (base / "new.txt").read_text() == "added"
    assert not (base / "README.md").exists()
    assert repository.run("git", "-C", str(base), "rev-parse", "HEAD") == repository.run("git", "rev-parse", "HEAD")
    assert repository.run("git", "status", "--porcelain") == before


def write_params(**changes: Any) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))


@pytest.mark.usefixtures("repository")
def test_run_name_begins_with_the_values_that_vary() -> None:
    first, *others = runs()
    assert first.name.startswith("seeds-7-rho-0.02-sam-finetune-")
    assert len({first.name, *(run.name for run in others)}) == 4


@pytest.mark.usefixtures("repository")
def test_run_name_same_params_otherwise_written_is_the_same() -> None:
    name = runs()[0].name
    reordered = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in TINY.items()
    }
    Path("params.yaml").write_text(yaml.safe_dump(dict(reversed(reordered.items())), sort_keys=False))
    assert runs()[0].name == name
    write_params(sam=TINY["sam"] | {"accumulate": 1}, finetune=TINY["finetune"] | {"learning_rate": "1e-2"})
    assert runs()[0].name == name, "a default and a number in other digits"


@pytest.mark.usefixtures("repository")
def test_run_name_other_code_is_the_same() -> None:
    name = runs()[0].name
    for source in ("src/flatmin/sam/step.py", "stages/sam_finetune.py"):
        Path(source).write_text(f"{Path(source).read_text()}# a comment\n")
    assert runs()[0].name == name


@pytest.mark.usefixtures("repository")
@pytest.mark.parametrize(
    ("targets", "section", "changed"),
    [
        (["sam-finetune"], {"evaluate": {"ece_bins": 3}}, False),
        (["sam-finetune"], {"select": {"metric": "accuracy", "tolerance": 0.5}}, True),
        (["sam-finetune"], {"backbones": ["EfficientNetLite0", "MobileNet025"]}, True),
        (["finetune"], {"sam": {"rho": 0.3, "method": "gsam"}}, False),
        (["finetune"], {"data": TINY["data"] | {"train_per_class": 5}}, True),
        (["extract-train"], {"select": {"metric": "accuracy", "tolerance": 0.5}}, False),
        (["extract-train"], {"backbones": ["MobileNet025"]}, True),
        (["select-best"], {"seeds": [8]}, False),
        (["finetune"], {"seeds": [8]}, True),
        (["prepare"], {"augment": {"engine": "none"}}, False),
        ([], {"evaluate": {"ece_bins": 3}}, True),
    ],
)
@pytest.mark.slow
def test_run_name_changed_section_matters_where_a_stage_uses_it(
    targets: list[str], section: dict[str, Any], changed: bool
) -> None:
    values = {"targets": targets, "runs": [{"sam.adaptive": [False]}]}
    (before,) = grids.read_grid(file_of(values))[0]
    write_params(**section)
    (after,) = grids.read_grid(file_of(values))[0]
    assert (after.name != before.name) == changed


@pytest.mark.usefixtures("repository")
def test_run_name_other_targets_is_another() -> None:
    assert len({runs(targets=targets)[0].name for targets in (["sam-finetune"], ["finetune", "sam-finetune"], [])}) == 3


@pytest.mark.slow
def test_read_grid_of_each_study_fits_the_schema(repository: Repository) -> None:
    for study in (ROOT / "studies/cifar100", ROOT / "studies/digits"):
        shutil.copy(study / "params.yaml", repository.folder / "params.yaml")
        found = [path for path in study.rglob("*.yaml") if path.name != "params.yaml"]
        assert all(grids.read_grid(path)[0] for path in found)
        assert "sweep" in {path.stem for path in found}


@pytest.mark.usefixtures("repository")
def test_run_name_odd_values_is_a_valid_git_ref() -> None:
    odd = {"finetune.schedule": [{"name": "cosine", "warmup_epochs": 1}], "data.name": ["../a..b~^:?*[ c", "é" * 200]}
    for run in runs(runs=[odd], picture={"x": "data.name", "y": "sam/epochs"}):
        subprocess.run(["git", "check-ref-format", f"refs/exps/{run.name}"], check=True)


@pytest.mark.usefixtures("repository")
def test_read_grid_run_in_two_lists_is_listed_once() -> None:
    listed = runs(runs=[{"sam.rho": [0.1, 0.2]}, {"sam.rho": [0.2, 0.3]}, {"sam.rho": [0.2], "targets": ["evaluate"]}])
    assert [(run.values["sam.rho"], run.targets) for run in listed] == [
        *((rho, ("sam-finetune",)) for rho in (0.1, 0.2, 0.3)),
        (0.2, ("evaluate",)),
    ]


@pytest.mark.usefixtures("repository")
def test_write_params_sets_params_as_listed_and_keeps_comments() -> None:
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
        "data.class_names": ["é", "a\\b", 'a"b', "true", "${HOME}", "x" * 200],
    }
    write_params(finetune=TINY["finetune"] | {"schedule": {"name": "plateau", "factor": 0.5, "patience": 2}})
    path = Path("params.yaml")
    path.write_text(f"# The study.\n{path.read_text()}")
    (run,) = runs(runs=[{key: [value] for key, value in values.items()}])
    sweep.write_params(path, run.values)
    written = yaml.safe_load(path.read_text())
    written["sam"]["rho"] = float(written["sam"]["rho"])  # written as 1e-05, which is text to PyYAML
    assert written == run.settings
    assert written["finetune"]["schedule"] == {"name": "cosine", "warmup_epochs": 1}
    assert path.read_text().startswith("# The study.\n")


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


def test_divide_cores_gives_equal_sets() -> None:
    assert sweep.divide_cores([0, 1, 2, 3, 4], 0, 9) == [[0, 1], [2, 3]]
    assert sweep.divide_cores([0, 1], 0, 9) == [[0, 1]]
    assert sweep.divide_cores([3, 5, 7], 9, 9) == [[3], [5], [7]]
    assert sweep.divide_cores([0, 1, 2, 3], 4, 2) == [[0, 1], [2, 3]]
    assert sweep.divide_cores([0], 0, 1) == [[0]]


ORIGIN = {"dirty": False, "results_version": runs_table.RESULTS_VERSION, "lock": "cpu-1", "machine": "M", "cores": 2}
RECORDS = "0123456789abcdef"


def make_experiment(
    repository: Repository, run: grids.Run, metrics: dict[str, Any], origin: dict[str, Any] | None = ORIGIN
) -> None:
    """Make the experiment that a run would have left, with these metrics; origin None: made in another checkout."""
    for file, values in ({"prepare": {"digest": RECORDS}} | metrics).items():
        files.write_json(f"metrics/{file}.json", values)
    repository.commit(run.name)
    repository.run("git", "update-ref", f"refs/exps/ab/cdef/{run.name}", "HEAD")
    if origin:
        files.write_json(run.file("json"), origin)


def test_table_has_a_row_per_run_with_metrics_of_its_stages_only(repository: Repository) -> None:
    trial, control, failed, pending = runs(runs=[*GRID["runs"]])
    metrics = {"select": {"backbone": "A"}, "sam/7": {"val": {"accuracy": 0.5}}, "evaluate": {"sam": {"accuracy": 0.4}}}
    make_experiment(repository, trial, metrics)
    make_experiment(repository, control, {"sam/7": {"val": {"accuracy": 0.25}, "epochs": 3}}, origin=None)
    trial.file("seconds").write_text("12.5")
    columns, rows = runs_table.table([trial, control, failed, pending], {}, [failed])
    data = (7, "digits", 6, "", "")
    assert columns == [
        *("name", "status", "targets", *runs_table.SHOWN, "sam.rho"),
        *("select/backbone", "sam/val.accuracy", "sam/epochs", *runs_table.ORIGIN, "seconds"),
    ]
    origin = ("false", str(runs_table.RESULTS_VERSION), "cpu-1", "M", "2", RECORDS[:12])
    first, second = (repository.run("git", "rev-parse", f"HEAD~{back}")[:7] for back in (2, 1))
    assert [[row.get(column) for column in columns[1:]] for row in rows] == [
        ["succeeded", "sam-finetune", "[7]", *data, 0.02, "A", 0.5, None, first, *origin, "12.5"],
        ["succeeded", "sam-finetune", "[7]", *data, 0.1, "A", 0.25, 3, second, *["unknown"] * 5, RECORDS[:12], ""],
        ["failed", "sam-finetune", "[8]", *data, 0.02, *[None] * 10, ""],
        ["not run", "sam-finetune", "[8]", *data, 0.1, *[None] * 10, ""],
    ]


def test_table_run_of_several_seeds_has_their_means(repository: Repository) -> None:
    (run,) = runs(targets=[], runs=[{"seeds": [[7, 8]]}], picture={"x": "seeds", "y": "sam/epochs"})
    means = {"test": {"accuracy": 0.4}, "seeds": {"7": {"test": {"accuracy": 0.3}}, "8": {"test": {"accuracy": 0.5}}}}
    metrics: dict[str, Any] = {"select": {"backbone": "A"}, "final": {"sam": means}, "evaluate": {"sam": means}}
    for seed, accuracy in ((7, 0.5), (8, 1)):
        of_seed = {"backbone": "A", "epochs": 3, "early": seed == 7, "val": {"accuracy": accuracy}}
        metrics |= {f"{method}/{seed}": of_seed for method in ("finetune", "control", "sam")}
    make_experiment(repository, run, metrics)
    _, (row,) = runs_table.table([run], {}, [])
    assert (row["seeds"], row["data.name"]) == ("[7, 8]", "digits"), "the latter of params.yaml, not set by the grid"
    of_method = {"backbone": "A", "epochs": 3, "val.accuracy": 0.75}
    expected = {f"{method}/{key}": each for method in ("finetune", "control", "sam") for key, each in of_method.items()}
    expected |= {"select/backbone": "A", "final/sam.test.accuracy": 0.4, "evaluate/sam.test.accuracy": 0.4}
    assert {key: each for key, each in row.items() if "/" in key} == expected


def test_table_takes_rows_of_another_clone(repository: Repository) -> None:
    one, two, *_ = runs(runs=[*GRID["runs"]])
    make_experiment(repository, one, {"select": {"backbone": "A"}, "sam/7": {"epochs": 3}})
    cells = {"select/backbone": "A", "sam/epochs": "5", "evaluate/none": "", "commit": "abc", "cores": "3"}
    cells |= {"results_version": "1", "seconds": "7.5"}
    columns = ["name", "status", "seeds", *cells]
    lines = [[two.name, "succeeded", "0", *cells.values()], ["other", "failed", "0", *[""] * len(cells)]]
    files.write_csv("grid.csv", columns, lines)
    previous = runs_table.read_table(Path("grid.csv"))
    assert list(previous) == [two.name]
    _, rows = runs_table.table([one, two], previous, [])
    assert rows[0]["sam/epochs"] == 3
    assert (rows[1]["status"], rows[1]["seeds"]) == ("succeeded", str(two.values["seeds"]))
    assert {key: rows[1].get(key, "") for key in cells} == cells
    assert rows[1]["machine"] == "unknown"
    assert runs_table.read_table(Path("other.csv")) == {}
    files.write_csv("grid.csv", columns, [lines[0], lines[0]])
    with pytest.raises(InputError, match=rf"^grid.csv: {two.name}: expected one row, received two$"):
        runs_table.read_table(Path("grid.csv"))


def write_row(run: grids.Run, version: str, records: str = "unknown") -> None:
    """A table that has this run alone."""
    columns = ["name", "status", "sam/val.accuracy", "results_version", "records"]
    files.write_csv("grid.csv", columns, [[run.name, "succeeded", "0.5", version, records]])


@pytest.mark.slow
def test_sweep_row_of_another_version_is_refused_unless_told(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, *_ = runs()
    write_row(one, "0")
    before = Path("grid.csv").read_bytes()
    expected = f"error: grid.csv: expected one results version, received 0 ({one.name}: grid.csv) and "
    expected += f"{runs_table.RESULTS_VERSION} (this code): to run those of another version again, delete their rows"
    output = repository.run(*COMMAND, expect=1)
    assert output.startswith(expected)
    assert len(output.splitlines()) == 1
    assert Path("grid.csv").read_bytes() == before
    monkeypatch.setattr(
        sweep, "run_all", lambda *_: make_experiment(repository, two, {"select": {}, "sam/7": {"a": 1}})
    )
    sweep.sweep(file_of({key: GRID[key] for key in ("targets", "runs")}), 1, mix_versions=True)
    with Path("grid.csv").open() as file:
        found = {row["name"]: row["results_version"] for row in csv.DictReader(file) if row["status"] == "succeeded"}
    assert found == {one.name: "0", two.name: str(runs_table.RESULTS_VERSION)}


@pytest.mark.usefixtures("repository")
def test_check_versions_complete_table_of_an_older_version_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    one, *_ = runs()
    write_row(one, "0")
    runs_table.check_versions(Path("grid.csv"), [one], runs_table.read_table(Path("grid.csv")), mix_versions=False)
    assert capsys.readouterr().out == (
        f"note: grid.csv: all runs are of results version 0, this code: {runs_table.RESULTS_VERSION}\n"
    )


def test_check_versions_row_and_experiment_that_disagree_are_refused(repository: Repository) -> None:
    one, *_ = runs()
    make_experiment(repository, one, {"sam/7": {}})
    current = str(runs_table.RESULTS_VERSION)
    for version, records, what in (
        ("0", RECORDS[:12], f"results_version: expected one, received 0 (grid.csv) and {current} (its experiment)"),
        (current, "f" * 12, f"records: expected one, received {'f' * 12} (grid.csv) and {RECORDS[:12]} (its"),
    ):
        write_row(one, version, records)
        with pytest.raises(InputError) as caught:
            runs_table.check_versions(Path("grid.csv"), [one], runs_table.read_table(Path("grid.csv")), True)
        assert str(caught.value).startswith(f"{one.name}: {what}")


def test_describe_edited_stage_is_dirty_and_edited_params_are_not(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_table, "MACHINE", "print('M')")  # test_study_grid has the real one
    write_params(seeds=[8])
    clean = runs_table.describe(repository.folder, [min(os.sched_getaffinity(0))])
    Path("stages/finetune.py").write_text("# edited\n")
    edited = runs_table.describe(repository.folder, [min(os.sched_getaffinity(0))])
    assert (clean["dirty"], edited["dirty"]) == (False, True)
    assert clean | {"dirty": True} == edited
    assert re.fullmatch(r"[cg]pu-[0-9a-f]{8}", clean["lock"])
    assert (clean["machine"], clean["cores"]) == ("M", 1)


ROWS = [
    {"targets": "sam-finetune", "seeds": seed, "sam.rho": rho, "sam.method": method, "y": rho + seed}
    for seed in (1, 2)
    for rho in (0.2, 0.1)
    for method in ("sam", "gsam")
]
KEYS = ("targets", "seeds", "sam.rho", "sam.method")


def test_spread_gives_a_line_per_other_param_and_seeds_per_x() -> None:
    lines = runs_table.spread(ROWS, "sam.rho", "y", KEYS)
    assert lines == {f"sam.method {method}": {0.1: [1.1, 2.1], 0.2: [1.2, 2.2]} for method in ("sam", "gsam")}
    assert list(lines["sam.method sam"]) == [0.1, 0.2]
    assert list(runs_table.spread(ROWS[::2], "sam.rho", "y", KEYS)) == ["mean of seeds"]


def test_draw_same_values_give_same_picture(tmp_path: Path) -> None:
    pixels = []
    for name, top in (("one", 1.0), ("same", 1.0), ("other", 2.0)):
        rows = [{"rho": rho, "y": y, "results_version": "3"} for rho, y in ((0.1, 0.5), (0.1, top), ("auto", 0.2))]
        columns, picture = ["name", "status", "rho", "y", "seconds"], grids.Picture(x="rho", y="y")
        runs_table.draw(columns, [{**row, "status": "succeeded"} for row in rows], picture, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width >= 400
            pixels.append(image.tobytes())
    assert pixels[0] == pixels[1] != pixels[2]


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


def stop_in_training(repository: Repository, number: int, jobs: int) -> tuple[int, str]:
    """Start a sweep and send it a signal once a run has ended its second epoch with SAM; exit code and output."""
    line = f"sam-finetune@7 2/{EPOCHS}: loss"
    seen = logs(repository).count(line)
    process = repository.start(*COMMAND, "--jobs", str(jobs))
    until = time.monotonic() + 500
    while logs(repository).count(line) <= seen and process.poll() is None:
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
    names = {ref: repository.run("git", "ls-tree", "--name-only", ref, "plots/sam/").split() for ref in refs}
    return {
        ref.rpartition("/")[2]: "".join(repository.run("git", "show", f"{ref}:{name}") for name in found)
        for ref, found in names.items()
    }


@pytest.mark.slow
def test_sweep_interrupted_and_killed_equals_undisturbed(tmp_path: Path) -> None:
    params = TINY | {
        "backbones": ["MobileNet025"],
        "extract": TINY["extract"] | {"levels": "all"},  # the last has next to nothing to learn from random weights
        "finetune": TINY["finetune"] | {"epochs": EPOCHS, "views": 2, "fine_tune_at": "conv_pw_12"},
    }
    two = GRID | {"runs": [{"seeds": [[7]], "sam.rho": [0.02, 0.1]}]}
    whole, killed = (Repository(tmp_path / name, params) for name in ("whole", "killed"))
    for repository in (whole, killed):
        (repository.folder / "grid.yaml").write_text(yaml.safe_dump(two, sort_keys=False))
    jobs = len(os.sched_getaffinity(0))
    output = whole.run(*COMMAND, "--jobs", str(jobs))
    assert "2 experiments: 0 have succeeded, 2 to run" in output
    with Image.open(whole.folder / "grid.png") as picture:
        assert picture.width >= 400

    code, output = stop_in_training(killed, signal.SIGINT, jobs)
    assert code == 130
    assert output.splitlines()[-1].startswith("interrupted: run it again")
    assert processes(killed) == []
    assert {row["status"] for row in rows_of(killed)} >= {"not run"}

    code, output = stop_in_training(killed, signal.SIGKILL, jobs)
    assert code == -signal.SIGKILL
    orphans = processes(killed)
    assert orphans, "the runs of a killed sweep continue"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(orphans[0]), signal.SIGKILL)  # one worker dies with it

    output = killed.run(*COMMAND, "--jobs", str(jobs))
    assert "2 experiments: grid.csv, grid.val.md, grid.png" in output
    assert re.search(r"^sam-finetune@7: \w.* after epoch \d+", logs(killed), re.M), "a training was resumed"
    assert logs(killed).count("view 1/2: ") == logs(whole).count("view 1/2: ") > 0, "cached activations are used again"
    assert processes(killed) == []
    assert not list((killed.folder / grids.FOLDER).glob("clone-*"))
    assert rows_of(killed) == rows_of(whole)
    assert curves(killed) == curves(whole)
    assert len(rows_of(killed)) == 2
    assert {row["status"] for row in rows_of(killed)} == {"succeeded"}

    refs, table = killed.run("git", "for-each-ref", "refs/exps"), (killed.folder / "grid.csv").read_bytes()
    assert "2 experiments: 2 have succeeded, 0 to run" in killed.run(*COMMAND)
    assert killed.run("git", "for-each-ref", "refs/exps") == refs
    assert (killed.folder / "grid.csv").read_bytes() == table
    assert rows_of(killed)[0]["name"] in killed.run("dvc", "exp", "show", "--csv")
    for ref in refs.split()[2::3]:
        killed.run("git", "update-ref", "-d", ref)
    assert "2 experiments: 2 have succeeded, 0 to run" in killed.run(*COMMAND), "the table has them"
    assert (killed.folder / "grid.csv").read_bytes() == table


@pytest.mark.slow
def test_sweep_failing_run_is_named_and_others_succeed(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    (repository.folder / "stages/finetune.py").write_text("# edited and not committed")
    changed = {"targets": ["prepare"], "runs": [{"data.train_per_class": [600, 6]}]}
    (repository.folder / "grid.yaml").write_text(yaml.safe_dump(changed))
    last = repository.run(*COMMAND, "--jobs", "2", expect=1).splitlines()[-1]
    start = "error: 1 of 2 experiments: expected success, failed: .dvc/tmp/sweep/train-per-class-600-prepare-"
    assert last.startswith(start)
    assert "train_per_class" in (repository.folder / last.split(": ")[-1]).read_text()
    failed, succeeded = rows_of(repository)
    assert (failed["status"], failed["records"], failed["cores"]) == ("failed", "", "")
    digest = json.loads(repository.run("git", "show", f"{experiment(repository)}:metrics/prepare.json"))["digest"]
    assert (succeeded["status"], succeeded["records"], succeeded["dirty"]) == ("succeeded", digest[:12], "true")
    assert succeeded["results_version"] == str(runs_table.RESULTS_VERSION)


def experiment(repository: Repository) -> str:
    """The git ref of the only experiment."""
    (ref,) = repository.run("git", "for-each-ref", "--format=%(refname)", "refs/exps/*/*/*").split()
    return ref


@pytest.mark.slow
@pytest.mark.usefixtures("repository")
def test_run_all_row_of_another_machine_provides_no_shared_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the first run, but DVC's cache lacks its start: one of the others computes it, the other waits."""
    first, *others = runs(runs=[{"seeds": [[7]], "sam.rho": [0.02, 0.05, 0.1]}])
    started: list[sweep.Worker] = []

    def start(run: grids.Run, slot: int, *_: Any) -> sweep.Worker:
        assert all(worker.process.poll() is not None for worker in started), "the previous run computes the start"
        grids.FOLDER.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(["sleep", "0.5"], start_new_session=True)
        started.append(sweep.Worker(run, slot, Path(), process, time.monotonic()))
        return started[-1]

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "describe", lambda *_: {})
    failed: list[grids.Run] = []
    sweep.run_all([first, *others], 2, {first.name: {}}, failed)
    assert [worker.run for worker in started] == failed == others, "these left no experiment"


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


def test_clear_ends_recorded_processes_only(repository: Repository, tmp_path: Path) -> None:
    """A sweep was killed, and so was one run's first process; another file's number belongs to somebody else now."""
    grids.FOLDER.mkdir(parents=True)
    orphaned, running, other = (grids.FOLDER / f"{name}.process" for name in ("orphaned", "running", "other"))
    child = tmp_path / "child"
    commands = {
        orphaned: ["sh", "-c", f"sleep 60 & echo $! > {child}"],
        running: ["sleep", "60"],
        other: ["sleep", "60"],
    }
    started = {
        path: subprocess.Popen([*sweep.RECORDED, str(path), *command], start_new_session=True)
        for path, command in commands.items()
    }
    started[orphaned].wait()
    orphan = Path(f"/proc/{child.read_text().strip()}")
    while not all(path.exists() and path.read_text().count("\n") == 2 for path in started):
        time.sleep(0.01)
    assert sweep.recorded_group(running) == started[running].pid
    group, began, boot = other.read_text().split()
    other.write_text(f"{group} 1\n{boot}\n")
    (grids.FOLDER / "cut-short.process").write_text("")
    (grids.FOLDER / "earlier-boot.process").write_text(f"{group} {began}\nanother-boot\n")
    sweep.clear()
    assert started[running].wait(10) == -signal.SIGKILL
    until = time.monotonic() + 10
    while orphan.exists() and "\nState:\tZ" not in (orphan / "status").read_text():
        assert time.monotonic() < until, "the first process had ended, but not what it had started"
    assert started[other].poll() is None
    started[other].kill()
    started[other].wait()
    assert not list(grids.FOLDER.glob("*.process"))


def test_output_failing_command_is_one_line() -> None:
    with pytest.raises(InputError, match=r"^git nonsense: expected it to succeed, received: git: 'nonsense' is not"):
        grids.output("git", "nonsense")


def test_study_broken_clone_leaves_checkout_alone(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    (repository.folder / ".studies/digits/.git").mkdir(parents=True)
    readme = repository.folder / "README.md"
    readme.write_text("not committed")
    output = repository.run("sh", "scripts/study.sh", "digits", "sweep", "--jobs", "none", expect=128)
    assert "not a git repository" in output
    assert readme.read_text() == "not committed"
    assert repository.run("git", "branch", "--show-current") == "main\n"


@pytest.mark.slow
def test_study_checkout_moved_continues(tmp_path: Path) -> None:
    """In a container the checkout is mounted at another path."""
    repository = Repository(tmp_path, TINY)
    command = ("sh", "scripts/study.sh", "digits", "sweep", "--jobs", "none")
    assert "argument --jobs" in repository.run(*command, expect=2)
    (repository.folder / "README.md").write_text("later")
    repository.commit("later")
    repository.folder = repository.folder.rename(tmp_path / "elsewhere")
    assert "argument --jobs" in repository.run(*command, expect=2)
    assert (repository.folder / ".studies/digits/README.md").read_text() == "later"
    assert repository.run("sh", "scripts/study.sh", "digits", "sweeps", expect=1) == (
        "error: expected NAME or NAME sweep, received 'digits sweeps'\n"
    )
    with (repository.folder / ".studies/digits.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert repository.run(*command, expect=1) == (
            "error: .studies/digits: expected no other run of this study, found one\n"
        )


@pytest.mark.slow
def test_study_grid_runs_in_its_clone(tmp_path: Path) -> None:
    repository = Repository(tmp_path, TINY)
    changed = {
        "targets": ["select-best"],
        "runs": [{"extract.seed": [9]}],
        "picture": {"x": "extract.seed", "y": "select/val.accuracy"},
    }
    study = repository.folder / "studies/other"
    study.mkdir()
    (study / "params.yaml").write_text(yaml.safe_dump({**TINY, "select": {"metric": "accuracy", "tolerance": 0.25}}))
    (study / "sweep.yaml").write_text(yaml.safe_dump(changed))
    repository.commit("another study")
    repository.run("dvc", "cache", "dir", "--local", str(tmp_path / "dvc"))
    repository.variables["FLATMIN_CACHE"] = "../kept"
    repository.run("sh", "scripts/study.sh", "other", "sweep", "--jobs", "1")
    assert (tmp_path / "kept/state").is_dir(), "a relative path is relative to the checkout"
    assert (tmp_path / "dvc/files").is_dir()
    assert not (repository.folder / ".dvc/cache").exists()
    assert repository.run("git", "status", "--porcelain").split()[1::2] == [
        "studies/other/sweep.csv",
        "studies/other/sweep.png",
    ]
    with (study / "sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["extract.seed"], row["select/backbone"], row["status"]) == ("9", "EfficientNetLite0", "succeeded")
    assert (row["dirty"], row["cores"]) == ("false", str(len(os.sched_getaffinity(0)))), "params.yaml is no code"
    assert row["machine"]
    assert "unknown" not in {row[column] for column in runs_table.ORIGIN}
    ref = repository.run("git", "-C", ".studies/other", "for-each-ref", "--format=%(refname)", "refs/exps").strip()
    params = repository.run("git", "-C", ".studies/other", "show", f"{ref}:params.yaml")
    assert yaml.safe_load(params) == {
        **TINY,
        "extract": TINY["extract"] | {"seed": 9},
        "select": {"metric": "accuracy", "tolerance": 0.25},
    }
    # Another grid of the study, in its folder of grids; DVC's cache has the run.
    del changed["picture"]
    (study / "grids").mkdir()
    (study / "grids/trials.yaml").write_text(yaml.safe_dump(changed))
    output = repository.run("env", "GRID=trials", "sh", "scripts/study.sh", "other", "sweep")
    assert "1 experiments: 1 have succeeded, 0 to run" in output
    assert (study / "grids/trials.csv").read_bytes() == (study / "sweep.csv").read_bytes()
    assert not (study / "grids/trials.png").exists()
