"""`make accept` records an edit of the code that moves no number, and refuses everything else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import toy
import yaml
from repository import Repository, stages_run

from flatmin.common import identity

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return toy.repository(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def checkout(study: Repository, tmp_path: Path) -> Repository:
    return toy.duplicate(study, tmp_path)


def accept(checkout: Repository, expect: int = 0) -> list[str]:
    return checkout.run("python", "scripts/accept.py", expect=expect).splitlines()


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def add_comment(path: Path) -> None:
    with path.open("a") as file:
        file.write("# A comment\n")


def test_accept_of_renamed_and_commented_code_leaves_nothing_to_run(checkout: Repository) -> None:
    model = checkout.folder / "models/train"
    before, output = toy.lock(checkout), model.read_bytes()
    replace(checkout.folder / "stages/train.py", "count * rho", "rho * count  # a comment")
    add_comment(checkout.folder / "src/flatmin/common/console.py")
    inputs = checkout.folder / "src/flatmin/inputs"
    (inputs / "preview.py").rename(inputs / "renamed.py")
    dvc = yaml.safe_load((checkout.folder / "dvc.yaml").read_text())
    dvc["stages"]["count"]["cmd"] = "env PYTHONPATH=src python stages/count.py"
    dvc["stages"]["train"]["deps"] += ["src/flatmin/models"]
    dvc["stages"]["count"]["deps"].remove("src/flatmin/common")
    (checkout.folder / "dvc.yaml").write_text(yaml.safe_dump(dvc))
    assert {"count", "train"} == set(json.loads(checkout.run("dvc", "status", "--json")))

    accept(checkout)
    assert json.loads(checkout.run("dvc", "status", "--json")) == {}
    assert stages_run(checkout.run("dvc", "repro")) == []
    assert model.read_bytes() == output
    assert toy.lock(checkout) != before
    accepted = json.loads((checkout.folder / "accepted.json").read_text())
    digests = (
        "import json; from flatmin.common.identity import *; print(json.dumps({r: source_digest(r) for r in rooms()}))"
    )
    assert accepted["source"] == json.loads(checkout.run("python", "-c", digests))


def edit_rho(checkout: Repository) -> None:
    toy.edit_params(checkout, rho=0.4)


def change_a_byte_of_the_model(checkout: Repository) -> None:
    model = checkout.folder / "models/train"
    content = model.read_bytes()
    model.unlink()  # a link into DVC's cache, perhaps
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def remove_outputs(checkout: Repository) -> None:
    (checkout.folder / "models/count").unlink()
    (checkout.folder / "models/train").unlink()


def change_a_metric(checkout: Repository) -> None:
    replace(checkout.folder / "metrics/count.json", "10", "11")


def change_the_data(checkout: Repository) -> None:
    (checkout.folder / "images.txt").write_text("a b")


def add_a_stage(checkout: Repository) -> None:
    stage = {"export": {"cmd": "cp models/train models/export", "outs": ["models/export"]}}
    dvc = {"stages": toy.DVC["stages"] | stage}
    (checkout.folder / "dvc.yaml").write_text(yaml.safe_dump(dvc))


def change_train(checkout: Repository, **changes: object) -> None:
    stages = toy.DVC["stages"] | {"train": toy.DVC["stages"]["train"] | changes}
    (checkout.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


def freeze_a_stage_and_edit_rho(checkout: Repository) -> None:
    change_train(checkout, frozen=True)
    edit_rho(checkout)


def drop_a_param_and_edit_it(checkout: Repository) -> None:
    change_train(checkout, params=["data", toy.VERSION])
    edit_rho(checkout)


def drop_a_data_dependency(checkout: Repository) -> None:
    deps = [dep for dep in toy.DVC["stages"]["train"]["deps"] if dep != "models/count"]
    change_train(checkout, deps=deps)


def empty_the_lock(checkout: Repository) -> None:
    (checkout.folder / "dvc.lock").write_text("{}\n")


def forget_all_runs(checkout: Repository) -> None:
    (checkout.folder / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")


def raise_the_version(checkout: Repository) -> None:
    line, version = "RESULTS_VERSION = {}\n", identity.RESULTS_VERSION
    replace(checkout.folder / "src/flatmin/common/identity.py", line.format(version), line.format(version + 1))


def raise_the_version_and_write_golden(checkout: Repository) -> None:
    raise_the_version(checkout)
    checkout.run("python", "-c", "from flatmin.common import identity; identity.write_accepted()")


def move_a_number(checkout: Repository) -> None:
    replace(checkout.folder / "stages/train.py", "count * rho", "count + rho")


def remove_the_golden_test(checkout: Repository) -> None:
    (checkout.folder / "tests/golden.py").unlink()


@pytest.mark.parametrize(
    ("change", "errors"),
    [
        (edit_rho, [r"train: params\.yaml: sam: modified since the stage ran: run `dvc repro` first"]),
        (
            change_a_byte_of_the_model,
            [r"train: models/train: modified since the stage wrote it: run `dvc repro` or `dvc checkout` first"],
        ),
        (
            remove_outputs,
            [
                r"count: models/count: missing: run `dvc repro` or `dvc pull` first",
                r"train: models/count: deleted since the stage ran: run `dvc repro` first",
                r"train: models/train: missing: run `dvc repro` or `dvc pull` first",
            ],
        ),
        (change_a_metric, [r"count: metrics/count\.json: modified since the stage wrote it: run .*"]),
        (change_the_data, [r"count: images\.txt: modified since the stage ran: run `dvc repro` first"]),
        (add_a_stage, [r"export: never ran: run `dvc repro` first"]),
        (freeze_a_stage_and_edit_rho, [r"train: expected a stage that is not frozen: `dvc status` says nothing of it"]),
        (drop_a_param_and_edit_it, [r"train: param sam: is in dvc\.lock alone: run `dvc repro` first"]),
        (drop_a_data_dependency, [r"train: dependency models/count: is in dvc\.lock alone: run `dvc repro` first"]),
        (empty_the_lock, [r"dvc\.lock: expected stages, as `dvc repro` writes them, found none"]),
        (forget_all_runs, [r"count: never ran: run .*", r"train: never ran: run .*"]),
        (raise_the_version, [r"RESULTS_VERSION: expected \d+, as accepted\.json has it, received \d+: .*"]),
        (
            raise_the_version_and_write_golden,
            [
                rf"{stage}: src/flatmin/common/identity\.py: RESULTS_VERSION: modified since the stage ran: run .*"
                for stage in ("count", "train")
            ],
        ),
        (move_a_number, ["loss: expected 5, received 10.5", r"tests/golden\.py: failed, so nothing is accepted"]),
        (remove_the_golden_test, [r"tests/golden\.py: expected the golden test, found none"]),
    ],
)
def test_accept_refuses_all_but_code_and_changes_nothing(
    checkout: Repository, change: Callable[[Repository], None], errors: list[str]
) -> None:
    # Alongside an edit that alone would be accepted.
    add_comment(checkout.folder / "src/flatmin/inputs/batches.py")
    change(checkout)
    files = [checkout.folder / "dvc.lock", checkout.folder / "accepted.json"]
    before = [path.read_bytes() for path in files]
    lines = [line.removeprefix("error: ") for line in accept(checkout, expect=1) if line.startswith("error: ")]
    assert len(lines) == len(errors), lines
    for line, error in zip(sorted(lines), errors, strict=True):
        assert re.fullmatch(error, line)
    assert [path.read_bytes() for path in files] == before


def test_accept_while_params_are_edited_changes_nothing(checkout: Repository) -> None:
    replace(checkout.folder / "stages/train.py", "count * rho", "rho * count")
    (checkout.folder / "tests/golden.py").write_text(
        toy.GOLDEN + 'from pathlib import Path\nparams = Path("params.yaml").read_text()\n'
        'Path("params.yaml").write_text(params.replace("rho: 0.05", "rho: 0.4"))\n'
    )
    before = toy.lock(checkout)
    assert "error: train: params.yaml: sam: modified since the stage ran: run `dvc repro` first" in accept(checkout, 1)
    assert toy.lock(checkout) == before


def test_accept_with_a_broken_dvc_yaml_is_one_line(checkout: Repository) -> None:
    (checkout.folder / "dvc.yaml").write_text("stages: {")
    (line,) = accept(checkout, expect=1)
    assert line.startswith("error: dvc stage: ")
