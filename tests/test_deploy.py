"""The manifests of deploy/ against published schemas, and its scripts run for real on one machine.

docs/cluster.md says what needs a cluster.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import quick
import yaml
from fixtures import tiny_params
from loopback import free_ports
from repository import ROOT, Repository, stages_run

DEPLOY = ROOT / "deploy"
SCRIPTS = DEPLOY / "base"
CORE = "io.k8s.api.core.v1."
KINDS = {
    ("v1", "ConfigMap"): f"{CORE}ConfigMap",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("kubeflow.org/v1", "TFJob"): "KubeflowOrgV1TFJob",
}
JOBS = {"tfjob": "tfjob/tfjob.yaml", "sweep": "sweep/job.yaml"}


def check(manifest: dict[str, Any]) -> None:
    """Validate a manifest against the published schema of its kind. Raises jsonschema.ValidationError."""
    definitions: dict[str, Any] = {}
    for name in ("kubernetes", "tfjob"):
        definitions |= json.loads((ROOT / f"tests/schemas/{name}.json").read_text())["$defs"]
    kind = KINDS[manifest["apiVersion"], manifest["kind"]]
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions}).validate(manifest)


def job(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / JOBS[name]).read_text())


def template(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec["template"] if manifest["kind"] == "Job" else spec["tfReplicaSpecs"]["Worker"]["template"]


@pytest.mark.parametrize("name", JOBS)
def test_job_validates_against_its_published_schema_and_holds_no_secret(name: str) -> None:
    manifest = job(name)
    check(manifest)
    (container,) = template(manifest)["spec"]["containers"]
    secrets = [source["secretRef"] for source in container["envFrom"] if "secretRef" in source]
    assert secrets == [{"name": f"flatmin-{each}", "optional": True} for each in ("remote", "git")]
    container["resource"] = {}
    with pytest.raises(jsonschema.ValidationError):
        check(manifest)


def test_jobs_have_what_no_schema_asks_for() -> None:
    assert [each["name"] for each in template(job("tfjob"))["spec"]["containers"]] == ["tensorflow"]
    spec = job("sweep")["spec"]
    combinations = (DEPLOY / "sweep/combinations.txt").read_text().splitlines()
    assert spec["completions"] == len(combinations) == len(set(combinations))
    assert spec["completionMode"] == "Indexed"
    assert template(job("sweep"))["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("missing", ["REPOSITORY", "REVISION", "REMOTE"])
def test_missing_setting_is_one_line(missing: str, tmp_path: Path) -> None:
    settings = {key: "x" for key in ("REPOSITORY", "REVISION", "REMOTE") if key != missing}
    environment = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run(
        ["sh", SCRIPTS / "study.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(rf"error: {missing}: expected .*, found none\n", done.stderr)


def test_stages_stand_in_an_order_in_which_they_can_run() -> None:
    made: set[str] = set()
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        needed = {path for path in stage["deps"] if path.startswith(("data/", "models/"))}
        assert all(any(path.startswith(need) or f"{path}/" in need for path in made) for need in needed), name
        made |= {path for path in stage.get("outs", []) if isinstance(path, str)}


class Pod:
    """A folder that stands for a pod's volumes, in which a script runs as in the image."""

    def __init__(self, origin: Repository, folder: Path) -> None:
        self.folder = folder
        self.origin = origin
        for name in ("home", "work"):
            (folder / name).mkdir(parents=True)

    def start(self, script: str, **variables: str) -> subprocess.Popen[str]:
        settings = {
            "HOME": str(self.folder / "home"),
            "FLATMIN_CACHE": str(self.folder / "cache"),
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
            "REPOSITORY": str(self.origin.folder),
            "REVISION": "main",
            "REMOTE": str(self.origin.folder.parent / "remote"),
        }
        return subprocess.Popen(
            ["sh", SCRIPTS / script],
            cwd=self.folder / "work",
            env=self.origin.environment | settings | variables,
            stdout=(self.folder / "log").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def finished(tmp_path: Path) -> Repository:
    """A git repository with results at seed 7, of data and training; the DVC remote has nothing yet."""
    origin = quick.repository(tmp_path, tiny_params())
    origin.run("dvc", "repro")
    origin.commit("results")
    return origin


def run(origin: Repository, name: str, script: str, **variables: str) -> Pod:
    """Run a script in a pod of its own, which succeeds."""
    pod = Pod(origin, origin.folder.parent / name)
    assert pod.start(script, **variables).wait(200) == 0, pod.log
    return pod


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_revision_is_a_branch_a_tag_or_a_commit(finished: Repository) -> None:
    finished.run("git", "checkout", "--quiet", "-b", "topic/other")
    finished.run("git", "commit", "--quiet", "--allow-empty", "--message", "other")
    finished.run("git", "tag", "v1")
    commit = finished.run("git", "rev-parse", "HEAD").strip()
    finished.run("git", "checkout", "--quiet", "main")
    for index, revision in enumerate(("topic/other", "v1", commit, commit[:10])):
        pod = run(finished, f"pod_{index}", "checkout.sh", REVISION=revision)
        assert finished.run("git", "-C", str(pod.folder / "work/checkout"), "rev-parse", "HEAD").strip() == commit
    pod = Pod(finished, finished.folder.parent / "wrong")
    assert pod.start("checkout.sh", REVISION="topic/none").wait(60) == 1
    assert pod.log == "error: REVISION: expected a commit, tag or branch of the repository, received topic/none\n"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_experiment_runs_its_targets_once(finished: Repository) -> None:
    combinations = finished.folder.parent / "combinations"
    settings = {"JOB_COMPLETION_INDEX": "0", "COMBINATIONS": str(combinations)}
    combinations.write_text("data.seed=1 sam.rho=0.1 seeds=[1,2]\n")
    pod = run(finished, "first", "experiment.sh", **settings)
    assert stages_run(pod.log) == ["prepare", "sam-finetune@1", "sam-finetune@2"]
    assert [line for line in pod.log.splitlines() if " metrics/" in line and line.startswith("0 ")] == [
        '0 data.seed=1 sam.rho=0.1 seeds=[1,2] metrics/prepare.json {"digest":"0123456789abcdef","seed":1}',
        '0 data.seed=1 sam.rho=0.1 seeds=[1,2] metrics/sam/1.json {"rho":0.1}',
        '0 data.seed=1 sam.rho=0.1 seeds=[1,2] metrics/sam/2.json {"rho":0.1}',
    ]
    pod = run(finished, "again", "experiment.sh", **settings)
    assert stages_run(pod.log) == []

    combinations.write_text("sam.rho=0.2 seeds=[7]\n")  # prepare is the revision's: pulled, with no run recorded
    finished.run("dvc", "remote", "add", "--local", "--default", "cluster", str(finished.folder.parent / "remote"))
    finished.run("dvc", "push")
    pod = run(finished, "other", "experiment.sh", **settings)
    assert stages_run(pod.log) == ["sam-finetune@7"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed file")  # the log's, which the process has
def test_two_workers_train_together_and_another_machine_restores_their_runs(tmp_path: Path) -> None:
    """With the study's stages up to the first that trains: tests/test_training.py has the rest with several workers."""
    params = tiny_params(backbones=["MobileNet025"], extract={"epochs": 1})
    origin = Repository(tmp_path, params)
    pipeline = yaml.safe_load((origin.folder / "dvc.yaml").read_text())
    stages = {name: pipeline["stages"][name] for name in ("prepare", "augment-preview", "extract-train")}
    (origin.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    origin.commit("three stages")
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}) for index in range(2)]
    pods = [Pod(origin, tmp_path / f"pod_{index}") for index in range(3)]
    started = [pod.start("study.sh", TF_CONFIG=config) for pod, config in zip(pods, configs, strict=False)]
    codes = [process.wait(400) for process in started]
    assert codes == [0, 0], pods[0].log + pods[1].log
    first, second = (pod.folder / "work/checkout" for pod in pods[:2])
    weights = "models/extract/MobileNet025/classifier.weights.h5"
    assert filecmp.cmp(first / weights, second / weights, shallow=False)
    assert "augment-preview" in stages_run(pods[0].log)
    assert "augment-preview" not in stages_run(pods[1].log)

    # Elsewhere with the remote alone, as an experiment of the same params: nothing runs, and every file is there.
    (tmp_path / "combinations").write_text("data.seed=1\ndata.seed=7 +runtime.strategy=multi_worker\n")
    experiment = pods[2].start(
        "experiment.sh",
        TARGETS="augment-preview extract-train",
        JOB_COMPLETION_INDEX="1",
        COMBINATIONS=str(tmp_path / "combinations"),
    )
    assert experiment.wait(200) == 0, pods[2].log
    assert stages_run(pods[2].log) == []
    metrics = "metrics/extract/MobileNet025.json"
    assert (pods[2].folder / "work/checkout" / metrics).read_bytes() == (first / metrics).read_bytes()
