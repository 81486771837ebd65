#!/bin/sh
# One experiment of a sweep: line $JOB_COMPLETION_INDEX + 1 of $COMBINATIONS, a file with a combination of params a line
# as in `sam.rho=0.1 seed=1`. Its runs go to the DVC remote, where the same experiment finds them again; its metrics to
# the log; with PUSH_EXPERIMENTS=yes itself to the git repository.
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
dvc exp run --pull --name "${SWEEP:-sweep}-$index" "$@"
for stage in $(dvc stage list --name-only); do python "$scripts/push.py" "$stage"; done
for metrics in metrics/*.json; do
    printf '%s %s %s ' "$index" "$combination" "$metrics"
    tr -d '\n' < "$metrics"
    echo
done
if [ "${PUSH_EXPERIMENTS-}" = yes ]; then dvc exp push --no-cache "$REPOSITORY" "${SWEEP:-sweep}-$index"; fi
