#!/bin/sh
# Run studies/NAME/params.yaml in a clone of this checkout's last commit and copy its results to studies/NAME. As
# `study.sh NAME sweep [--jobs N] [--mix-versions]` run the grid studies/NAME/sweep.yaml, or $GRID.yaml, there instead.
# With $COMMIT the code, scripts and params.yaml are that commit's; the grid is always this checkout's.
set -eu
name=${1:-}
root=$(pwd -P)
export GIT_CEILING_DIRECTORIES="$root/.studies"  # a broken clone is an error: git must not take this checkout for it
clone=.studies/$name
case "$name" in
    "" | *[!A-Za-z0-9._-]* | .*) echo "error: NAME: expected a folder of studies/, received '$name'" >&2; exit 1 ;;
esac
if [ ! -f "studies/$name/params.yaml" ]; then
    echo "error: NAME: expected one of $(cd studies && printf '%s ' *)with a params.yaml, received '$name'" >&2
    exit 1
fi
if [ "${2:-sweep}" != sweep ]; then
    echo "error: expected NAME or NAME sweep, received '$*'" >&2
    exit 1
fi
mkdir -p .studies
exec 9>".studies/$name.lock"
if ! flock --nonblock 9; then
    echo "error: $clone: expected no other run of this study, found one" >&2
    exit 1
fi
if [ -z "${COMMIT:-}" ]; then
    if [ -n "$(git status --porcelain -- src stages dvc.yaml)" ]; then
        echo "note: the study runs the last commit; what is not committed in src, stages and dvc.yaml is left out"
    fi
    if [ -n "$(git status --porcelain -- "studies/$name/params.yaml")" ]; then
        echo "note: the study runs studies/$name/params.yaml as it is, which is not committed"
    fi
fi
grid=${GRID:-sweep}
case "$grid" in
    *[!A-Za-z0-9._-]* | .*) echo "error: GRID: expected the name of a grid in studies/$name, received '$grid'" >&2; exit 1 ;;
esac
commit=$(git rev-parse --verify --quiet "${COMMIT:-HEAD}^{commit}") || {
    echo "error: COMMIT: expected one of this checkout, received '${COMMIT:-HEAD}'" >&2
    exit 1
}
if [ ! -d "$clone/.git" ]; then
    rm -rf "$clone" ".studies/.$name"
    git clone --quiet --no-checkout . ".studies/.$name"
    mv ".studies/.$name" "$clone"
fi
# Not from origin, which is the path that this checkout had then: in a container it has another.
git -C "$clone" fetch --quiet "$root" "$commit"
git -C "$clone" checkout --quiet --force --detach FETCH_HEAD
params=studies/$name/params.yaml
if [ -n "${COMMIT:-}" ]; then params=$clone/$params; fi
if [ ! -f "$params" ]; then
    echo "error: COMMIT: expected one with studies/$name/params.yaml, received '$COMMIT'" >&2
    exit 1
fi
if [ "${2:-}" = sweep ] && [ ! -f "$clone/scripts/provenance.py" ]; then
    echo "error: COMMIT: expected one whose sweeps record where results come from, received '$COMMIT': its own scripts" \
        "in a clone of that commit still run its grids" >&2
    exit 1
fi
cp "$params" "$clone/params.yaml"
cache=$(dvc cache dir)
# What is relative is so to the checkout. TFDS takes ~ and addresses such as gs:// too.
case "${FLATMIN_CACHE:-/}" in /*) ;; *) export FLATMIN_CACHE="$root/$FLATMIN_CACHE" ;; esac
case "${FLATMIN_WEIGHTS:-/}" in /*) ;; *) export FLATMIN_WEIGHTS="$root/$FLATMIN_WEIGHTS" ;; esac
case "${TFDS_DATA_DIR:-/}" in /* | "~"* | *://*) ;; *) export TFDS_DATA_DIR="$root/$TFDS_DATA_DIR" ;; esac
cd "$clone"
rm -rf metrics plots
dvc config --local cache.dir "$cache"
if [ -f src/flatmin/prune.py ]; then  # a commit before it has other commands for this; its stages check params too
    PYTHONPATH=src python -m flatmin.check
    PYTHONPATH=src python -m flatmin.prune
fi
if [ -f "$root/studies/$name/dvc.lock" ]; then cp "$root/studies/$name/dvc.lock" dvc.lock; else rm -f dvc.lock; fi
if [ "${2:-}" = sweep ]; then
    shift 2
    exec python scripts/sweep.py "$root/studies/$name/$grid.yaml" "$@"
fi
dvc repro
rm -rf results  # complete here first: renamed, all of it appears at once
mkdir results
cp -R metrics plots dvc.lock results/
if [ -f predictions/predict.csv ]; then  # of images whose labels are not known here
    python "$root/scripts/columns.py" name final < predictions/predict.csv > results/test_predictions.csv
fi
cd results
for file in metrics plots dvc.lock test_predictions.csv; do
    rm -rf "$root/studies/$name/$file"
    if [ -e "$file" ]; then mv "$file" "$root/studies/$name/"; fi
done
echo "study $name: results in studies/$name"
