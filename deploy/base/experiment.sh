#!/bin/sh
# One experiment of a sweep: line $JOB_COMPLETION_INDEX + 1 of $COMBINATIONS, a file with a combination of params a line
# as in `sam.rho=0.1 seeds=[42]`. Its runs go to the DVC remote, where the same experiment finds them again; its metrics to
# the log. It runs $TARGETS and the stages that they need.
set -eu
scripts=$(cd "$(dirname "$0")" && pwd)
. "$scripts/checkout.sh"

index=${JOB_COMPLETION_INDEX:?expected the index of an Indexed Job}
combination=$(sed -n "$((index + 1))p" "${COMBINATIONS:?expected a file}")
[ -n "$combination" ] || fail "$COMBINATIONS: expected a combination in line $((index + 1)), found none"
set -f  # a list is no pattern of file names
set --
for setting in $combination; do set -- "$@" --set-param "$setting"; done
set +f

dvc fetch --quiet --run-cache --max-size 0  # the records of runs alone
targets=${TARGETS:-sam-finetune}
# shellcheck disable=SC2086  # several words
dvc exp run --pull "$@" $targets

# What the targets need and its metrics: those of other stages are still the revision's.
# shellcheck disable=SC2086
python - $targets > ../needed <<'END'
import sys

from dvc.repo import Repo

with Repo() as repo:
    needed = {stage for target in sys.argv[1:] for stage in repo.stage.collect(target, with_deps=True)}
    stages = [stage for stage in repo.stage.collect() if stage in needed]  # in the order of dvc.yaml
for stage in stages:
    print(stage.addressing, *(out.def_path for out in stage.outs if out.metric))
END
while read -r stage metrics; do
    python "$scripts/push.py" "$stage"
    for file in $metrics; do
        printf '%s %s %s ' "$index" "$combination" "$file"
        tr -d '\n' < "$file"
        echo
    done
done < ../needed
