#!/bin/sh
# One study on several workers: each runs this in a checkout of its own, and they train together.
#
# Every worker must start the same trainings in the same order. So all go by what the DVC remote holds when they start,
# and by nothing that one of them alone has: a stage whose run is recorded there is restored, any other is run by every
# worker, and the first records it. A worker that is started again starts like a new one; a training goes on from the
# last epoch that all have kept in $FLATMIN_CACHE.
set -eu
scripts=$(cd "$(dirname "$0")" && pwd)
. "$scripts/checkout.sh"

first=$(python - <<'END'
import json
import os

config = json.loads(os.environ.get("TF_CONFIG") or "{}")
task = config.get("task", {"type": "chief", "index": 0})
first = "chief" if "chief" in config.get("cluster", {"chief": []}) else "worker"
print("yes" if (task["type"], task["index"]) == (first, 0) else "no")
END
)
export FLATMIN_WRITERS=all  # DVC wants the outputs of a stage in each checkout
if [ -n "${TF_CONFIG-}" ]; then
    python - <<'END'
from dvc.utils.serialize import modify_yaml

with modify_yaml("params.yaml") as params:
    params.setdefault("runtime", {})["strategy"] = "multi_worker"
END
fi
PYTHONPATH=src python -m flatmin.check
PYTHONPATH=src python -m flatmin.prune

rm -rf "$(dvc cache dir)/runs"
dvc fetch --quiet --run-cache --max-size 0  # the records of runs alone
for stage in $(dvc stage list --name-only); do  # in the order of dvc.yaml, in which each comes after what it needs
    if [ "$first" = no ]; then
        case $stage in augment-preview | finalize | evaluate | report) continue ;; esac  # nothing that is trained needs them
    fi
    dvc repro --pull "$stage"
    if [ "$first" = yes ]; then python "$scripts/push.py" "$stage"; fi
done
