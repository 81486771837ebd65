"""DVC remotes: the commands of docs/remotes.md against a shared folder and a real S3 server on loopback."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import boto3
import pytest
import requests
from moto.server import ThreadedMotoServer
from repository import ROOT, Repository, stages_run

PAGE = (ROOT / "docs/remotes.md").read_text()
SECTIONS = ["A shared folder", "S3", "Credentials in a file", "Another checkout", "Experiments"]
FOLDER, S3, FILE, CLONE, EXPERIMENTS = SECTIONS
BUCKET = "bucket"


def scripts(heading: str) -> list[str]:
    """Return the commands below a heading of the page, block by block."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, heading
    return re.findall(r"```sh\n(.*?)```", found[1], re.DOTALL)


class Server(NamedTuple):
    """An S3 server that knows two access keys (id, secret) and checks every signature."""

    address: str
    keys: Sequence[tuple[str, str]]


def with_keys(address: str) -> Server:
    """Make a bucket and a user who may use S3, then have the server refuse everybody else."""
    anyone = {"endpoint_url": address, "region_name": "us-east-1"}
    anyone |= {"aws_access_key_id": "anyone", "aws_secret_access_key": "anyone"}
    boto3.client("s3", **anyone).create_bucket(Bucket=BUCKET)
    users = boto3.client("iam", **anyone)
    users.create_user(UserName="tester")
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    users.put_user_policy(UserName="tester", PolicyName="s3", PolicyDocument=json.dumps(policy))
    made = [users.create_access_key(UserName="tester")["AccessKey"] for _ in range(2)]
    plain = {"Content-Type": "text/plain"}
    requests.post(f"{address}/moto-api/reset-auth", "0", headers=plain, timeout=10).raise_for_status()
    return Server(address, [(key["AccessKeyId"], key["SecretAccessKey"]) for key in made])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = ThreadedMotoServer("127.0.0.1", port=0)
    running.start()
    yield with_keys("http://{}:{}".format(*running.get_host_and_port()))
    running.stop()


def credentials(key: tuple[str, str]) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key[0], "AWS_SECRET_ACCESS_KEY": key[1]}


class Machine:
    """A folder with a copy of the finished study, its git remote and its clone, and the places that the page names."""

    def __init__(self, finished_study: Repository, folder: Path, server: Server) -> None:
        self.folder = folder / "machine"
        shutil.copytree(finished_study.folder.parent, self.folder, symlinks=True)
        self.study = self.checkout("checkout")
        self.clone = self.checkout("flatmin")
        self.study.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", str(self.folder / "git"))
        self.study.run("git", "remote", "add", "origin", str(self.folder / "git"))
        self.places = {
            "/mnt/shared/flatmin": str(self.folder / "shared"),
            "s3://bucket/flatmin": f"s3://{BUCKET}/flatmin",
            "https://s3.example.org": server.address,
            "https://git.example.org/flatmin.git": str(self.folder / "git"),
        }

    def checkout(self, name: str) -> Repository:
        repository = Repository.existing(self.folder)
        repository.folder = self.folder / name
        repository.cache = self.folder / f"{name}-cache"
        repository.variables = {
            # Nothing of the machine's own: no settings, no service that gives credentials, no index of remotes.
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "DVC_SITE_CACHE_DIR": str(self.folder / "site"),
        }
        return repository

    def script(self, text: str, repository: Repository | None = None) -> str:
        """Run a block of the page, in the study's checkout or another, up to the first command that fails."""
        for example, place in self.places.items():
            text = text.replace(example, place)
        assert "example.org" not in text
        assert "/mnt" not in text
        return (repository or self.study).run("sh", "-euc", text)

    def cloned(self) -> str:
        """Follow the page to a second checkout and return what its commands print."""
        elsewhere = copy.copy(self.clone)
        elsewhere.folder = self.folder
        (block,) = scripts(CLONE)
        return self.script(block, elsewhere)


@pytest.fixture
def machine(finished_study: Repository, server: Server, tmp_path: Path) -> Machine:
    return Machine(finished_study, tmp_path, server)


def made(repository: Repository) -> dict[str, bytes]:
    """Return every file that stages made, with its bytes."""
    folders = ("data/records", "metrics", "models", "plots")
    paths = (path for name in folders for path in (repository.folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(repository.folder)): path.read_bytes() for path in paths}


def assert_nothing_runs(output: str, machine: Machine) -> None:
    """Assert that DVC says of every stage that the study ran that it didn't change."""
    ran = stages_run((machine.folder / "repro.log").read_text())
    assert {"prepare", "sam-finetune@7", "control@7"} <= set(ran)
    assert [line.split("'")[1] for line in output.splitlines() if "didn't change, skipping" in line] == ran
    assert stages_run(output) == []
    assert output.rstrip().endswith("Data and pipelines are up to date.")


@pytest.mark.slow
@pytest.mark.parametrize("remote", [FOLDER, S3])
def test_second_checkout_pulls_and_runs_nothing(machine: Machine, server: Server, remote: str) -> None:
    if remote == S3:
        machine.study.variables |= credentials(server.keys[0])
        machine.clone.variables |= credentials(server.keys[0])
    (block,) = scripts(remote)
    assert re.search(r"^\d+ files pushed$", machine.script(block), re.MULTILINE)
    assert_nothing_runs(machine.cloned(), machine)
    assert made(machine.clone) == made(machine.study)
    expected = {"models/sam/7/classifier.weights.h5", "models/budget/7.json", "metrics/sam/7.json", "plots/sam/7.csv"}
    assert expected <= set(made(machine.clone))
    assert machine.clone.run("git", "status", "--porcelain") == ""
    # Metrics come with the commit and not from the remote.
    lost = machine.clone.folder / "metrics/sam/7.json"
    lost.unlink()
    machine.clone.run("dvc", "pull")
    assert not lost.exists()
    assert "metrics/sam/7.json" in machine.clone.run("dvc", "status")
    machine.clone.run("git", "checkout", "metrics/sam/7.json")
    assert "up to date" in machine.clone.run("dvc", "status")


@pytest.mark.slow
def test_pushed_experiment_is_pulled_in_another_checkout(machine: Machine, server: Server) -> None:
    for repository in (machine.study, machine.clone):
        repository.variables |= credentials(server.keys[0])
    machine.script(scripts(S3)[0])
    before = made(machine.study)
    run, pull = scripts(EXPERIMENTS)
    assert stages_run(machine.script(run)) == ["sam-finetune@7", "finalize", "evaluate", "report"]
    machine.cloned()
    assert made(machine.clone) == before
    machine.script(pull, machine.clone)
    assert made(machine.clone) == made(machine.study) != before
    assert_nothing_runs(machine.clone.run("dvc", "repro"), machine)


def files_with(text: str, folder: Path) -> set[str]:
    """Return the names of the files below a folder that hold a text."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)) for path in paths if text.encode() in path.read_bytes()}


def objects_with(text: str, repository: Path) -> int:
    """Count a text in git's objects, whether a commit reaches them or not."""
    command = ["git", "cat-file", "--batch-all-objects", "--batch"]
    done = subprocess.run(command, cwd=repository, capture_output=True, check=True)
    return done.stdout.count(text.encode())


@pytest.mark.slow
def test_credential_is_in_no_file_but_its_own(machine: Machine, server: Server) -> None:
    """A stage runs and pushes with one secret in its environment; another is put into the file."""
    in_environment, in_file = server.keys
    log = machine.folder / "commands.log"
    machine.study.variables |= credentials(in_environment)
    said = [machine.study.run("dvc", "repro", "-v", "--force", "--single-item", "select-best")]
    said += [machine.script(scripts(S3)[0]), machine.study.run("dvc", "push", "-v")]
    unset = dict(machine.study.variables)
    machine.study.variables |= credentials(in_file)
    said.append(machine.script(scripts(FILE)[0]))
    machine.study.variables = {name: value for name, value in unset.items() if name not in credentials(in_file)}
    shutil.rmtree(machine.study.folder / ".dvc/cache")
    said.append(machine.study.run("dvc", "pull", "-v"))
    # In a copy of the checkout, which has the file too for as long as it runs.
    said.append(machine.study.run("dvc", "exp", "run", "-v", "--temp", "-S", "augment.m=2", "augment-preview"))
    said.append(machine.study.run("dvc", "push", "-v"))
    said.append(machine.study.run("dvc", "doctor"))
    log.write_text("".join(said))
    machine.study.run("git", "add", "--all")
    assert machine.study.run("git", "status", "--porcelain") == ""

    assert "DEBUG" in log.read_text()
    settings = machine.study.folder / ".dvc/config.local"
    assert settings.stat().st_mode & 0o777 == 0o600
    assert files_with(in_file[1], machine.folder) == {"checkout/.dvc/config.local"}
    assert files_with(in_environment[1], machine.folder) == set()
    for repository in (machine.study.folder, machine.folder / "git"):
        assert objects_with("Keep data and models in S3", repository) > 0
        assert [objects_with(key[1], repository) for key in server.keys] == [0, 0]
    assert in_file[1] in machine.study.run("dvc", "config", "--list")

    bucket = boto3.client(
        "s3",
        endpoint_url=server.address,
        region_name="us-east-1",
        aws_access_key_id=in_file[0],
        aws_secret_access_key=in_file[1],
    )
    keys = [found["Key"] for found in bucket.list_objects_v2(Bucket=BUCKET)["Contents"]]
    bodies = [bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys]
    assert len(bodies) > 10
    assert not [body for body in bodies for key in server.keys if key[1].encode() in body]
