"""`make test-looks` counts the sets of models scored on test, in commits, experiments and the working tree."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT, Repository

sys.path.insert(0, str(ROOT / "scripts"))
import test_looks


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    made = Repository.existing(tmp_path)
    made.folder.mkdir()
    monkeypatch.chdir(made.folder)
    made.run("git", "init", "--quiet", "--initial-branch", "main")
    return made


def lock(rho: float, evaluate: bool = True, code: str = "c", **models: str) -> str:
    """A dvc.lock of a sam-finetune with this rho. models: folder of models/ -> digest."""
    deps = [{"path": f"models/{name}", "md5": digest} for name, digest in models.items()]
    deps.append({"path": "src/flatmin/evaluation", "md5": code})
    stages: dict[str, Any] = {"sam-finetune": {"params": {"params.yaml": {"sam": {"rho": rho}, "seed": 7}}}}
    return yaml.safe_dump({"schema": "2.0", "stages": stages | ({"evaluate": {"deps": deps}} if evaluate else {})})


def commit(repository: Repository, text: str, message: str = "a run") -> str:
    (repository.folder / "dvc.lock").write_text(text)
    repository.commit(message)
    return repository.run("git", "rev-parse", "--short", "HEAD").strip()


def test_looks_are_the_distinct_sets_of_models_of_all_refs(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(repository, lock(0.1, evaluate=False))
    first = commit(repository, lock(0.1, selected="a", finetune="b", sam="c"))
    commit(repository, lock(0.1, code="edited", select="a", finetune="b", sam="c"), "other code and another folder")
    commit(repository, "<<<<<<< HEAD\nstages: {\n=======\n", "a conflict")
    second = commit(repository, lock(0.2, selected="a", finetune="b", sam="d"))
    commit(repository, lock(0.1, selected="a", finetune="b", sam="c"), "back")
    repository.run("git", "checkout", "--quiet", "-b", "other", "HEAD~")
    experiment = commit(repository, lock(0.3, selected="a", finetune="b", sam="e"))
    repository.run("git", "update-ref", "refs/exps/ab/cdef/mine", "HEAD")
    repository.run("git", "checkout", "--quiet", "main")
    repository.run("git", "branch", "-D", "other")
    (repository.folder / "dvc.lock").write_text(lock(0.4, selected="a", finetune="b", sam="f"))
    test_looks.main()
    lines = capsys.readouterr().out.splitlines()
    date = repository.run("git", "log", "-1", "--format=%cs").strip()
    assert sorted(line.partition(". ")[2] for line in lines[:4]) == sorted(
        [
            *(f"{name} {date}: sam.rho {rho}" for name, rho in ((first, 0.1), (second, 0.2), (experiment, 0.3))),
            "dvc.lock not committed: sam.rho 0.4",
        ]
    )
    assert lines[4] == "4 sets of models were scored on test."
    assert lines[5].endswith("after a merge perhaps: versions of dvc.lock, 1.")
    assert lines[6].startswith("It cannot see looks of deleted experiments")


def test_looks_of_a_merge_alone_are_seen(repository: Repository) -> None:
    commit(repository, lock(0.1, sam="a"))
    repository.run("git", "checkout", "--quiet", "-b", "other")
    commit(repository, lock(0.2, sam="b"))
    repository.run("git", "checkout", "--quiet", "main")
    commit(repository, lock(0.3, sam="c"))
    repository.run("git", "merge", "--quiet", "--strategy", "ours", "--no-commit", "other")
    merge = commit(repository, lock(0.4, sam="d"), "merge")
    found, broken = test_looks.looks()
    assert (len(found), broken) == (4, 0)
    assert found[-1].commit == merge


def test_looks_without_any_lock_are_none(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    (repository.folder / "README.md").write_text("nothing")
    repository.commit("start")
    test_looks.main()
    assert capsys.readouterr().out.startswith("0 sets of models were scored on test.\nIt cannot see")
