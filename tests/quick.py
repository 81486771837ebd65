"""A checkout in which the stages of the study take a second: its params, scripts, DVC and git are the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from repository import TINY, Repository

PIPELINE = """
stages:
  prepare:
    cmd:
      - mkdir -p data metrics && echo ${data.seed} > data/records
      - echo '{"digest":"0123456789abcdef","seed":${data.seed}}' > metrics/prepare.json
    params: [data.seed]
    outs: [data/records]
    metrics: [metrics/prepare.json: {cache: false}]
  sam-finetune:
    matrix: {seed: "${seeds}"}
    cmd: sh stages/quick.sh ${item.seed} ${sam.rho}
    deps: [data/records]
    params: [sam]
    outs: ["models/sam/${item.seed}"]
    metrics: ["metrics/sam/${item.seed}.json": {cache: false}]
  evaluate:
    cmd: mkdir -p plots && touch plots/confusion.csv && cp data/records metrics/evaluate.json
    deps: [models/sam]
    metrics: [metrics/evaluate.json: {cache: false}]
"""
TRAIN = """
if [ "$2" = 0.9 ]; then echo "rho 0.9 diverges"; exit 1; fi
mkdir -p models/sam metrics/sam "$FLATMIN_CACHE"
touch "$FLATMIN_CACHE/trained"
echo "$1" > "models/sam/$1"
echo "{\\"rho\\":$2}" > "metrics/sam/$1.json"
"""


def repository(folder: Path, params: dict[str, Any] = TINY) -> Repository:
    """A checkout in which nothing has run; its code is the project's, but for dvc.yaml."""
    made = Repository(folder, params)
    (made.folder / "dvc.yaml").write_text(PIPELINE)
    (made.folder / "stages/quick.sh").write_text(TRAIN)
    made.commit("quick")
    return made
