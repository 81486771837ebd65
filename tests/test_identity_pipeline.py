"""Real trainings across edits of code and params: what is found in caches, what resumes, what is recorded."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import pytest
import toy
import yaml
from repository import TINY, Repository, stages_run

pytestmark = pytest.mark.slow

# Two augmented views of each image, and epochs enough to be killed among them.
STUDY = TINY | {"extract": TINY["extract"] | {"epochs": 1}, "finetune": TINY["finetune"] | {"epochs": 4, "views": 2}}
STAGES = ("prepare", "extract-train", "select-best", "finetune")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """The real pipeline up to finetune, run and committed."""
    checkout = Repository(tmp_path_factory.mktemp("study"), STUDY)
    dvc = yaml.safe_load((checkout.folder / "dvc.yaml").read_text())["stages"]
    (checkout.folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {name: dvc[name] for name in STAGES}}))
    # The golden numbers take half a minute and have tests of their own.
    (checkout.folder / "tests/golden.py").write_text("")
    checkout.run("python", "-c", "from flatmin.common import identity; identity.write_accepted()")
    assert views_computed(checkout.run("dvc", "repro")) == ["val activations", "view 1/2", "view 2/2"]
    checkout.commit("study")
    return checkout


def with_learning_rate(rate: float) -> dict[str, Any]:
    return STUDY | {"finetune": STUDY["finetune"] | {"learning_rate": rate}}


def views_computed(output: str) -> list[str]:
    return sorted(re.findall(r"^(val activations|view \d/\d): \d+ images", output, re.MULTILINE))


def kill_in_training(checkout: Repository, epochs: int) -> None:
    """Run finetune, and kill it with its workers once this number of epochs is saved."""
    process = checkout.start("python", "stages/finetune.py", "7", start_new_session=True)
    assert process.stdout
    finished = 0
    for line in process.stdout:
        finished += line.startswith("finetune@7 ")
        if finished > epochs:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert finished > epochs, "it ended before it could be killed"


def rename_in_augmentation_and_training(checkout: Repository) -> None:
    source = {path: path.read_text() for path in (checkout.folder / "src/flatmin").rglob("*.py")}
    for old, new in (("AUGMENT_CHUNK", "IMAGES_PER_DRAW"), ("Validator", "Validation")):
        renamed = {path: re.sub(rf"\b{old}\b", new, text) for path, text in source.items()}
        assert renamed != source, f"no {old}"
        source = renamed
    for path, text in source.items():
        path.write_text(text)


def test_training_across_a_kill_a_rename_and_an_edit_of_params_trains_no_epoch_twice(trained: Repository) -> None:
    checkout, before = trained, toy.lock(trained)
    checkout.write_params(with_learning_rate(0.02))
    model = checkout.folder / "models/finetune/7/classifier.weights.h5"
    old = model.read_bytes()
    plot = checkout.folder / "plots/finetune/7.csv"
    complete = plot.read_bytes()
    kill_in_training(checkout, epochs=1)
    assert plot.read_bytes() != complete, "it grows while a training runs"
    plot.write_bytes(complete)  # what `git checkout plots` does

    checkout.write_params(STUDY)
    rename_in_augmentation_and_training(checkout)
    assert set(json.loads(checkout.run("dvc", "status", "--json"))) >= {"extract-train@EfficientNetLite0", "finetune@7"}
    checkout.run("python", "scripts/accept.py")
    assert json.loads(checkout.run("dvc", "status", "--json")) == {}
    assert stages_run(checkout.run("dvc", "repro")) == []
    assert model.read_bytes() == old
    accepted = toy.lock(checkout)
    assert accepted != before

    checkout.write_params(with_learning_rate(0.02))
    process = checkout.start("dvc", "repro")
    assert process.stdout
    assert any(re.match(r"finetune@7: resuming after epoch [123]$", line) for line in process.stdout)
    checkout.write_params(with_learning_rate(0.03))  # for the next experiment
    output, _ = process.communicate()
    assert process.returncode != 0
    assert views_computed(output) == []
    assert "error: params.yaml: finetune.learning_rate: changed from 0.02 to 0.03 while finetune ran" in output
    assert toy.lock(checkout) == accepted, "nothing is recorded"

    checkout.write_params(with_learning_rate(0.02))
    output = checkout.run("dvc", "repro")
    assert stages_run(output) == ["finetune@7"]
    assert "finetune@7: resuming after epoch 4" in output
    assert not re.search(r"^finetune@7 \d/4", output, re.MULTILINE), "nothing is trained twice"
    recorded = yaml.safe_load(toy.lock(checkout))["stages"]["finetune@7"]["params"]["params.yaml"]
    assert recorded["finetune"]["learning_rate"] == 0.02
    assert model.read_bytes() != old
