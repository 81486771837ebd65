#!/bin/sh
# Run studies/NAME/params.yaml in a clone of this checkout's last commit and copy its results to studies/NAME. As
# `study.sh NAME sweep [--jobs N]` run the grid studies/NAME/sweep.yaml there instead, or the one that
# $GRID names: studies/NAME/$GRID.yaml or studies/NAME/grids/$GRID.yaml.
set -eu
fail() { echo "error: $*" >&2; exit 1; }
name=${1:-}
root=$(pwd -P)
export GIT_CEILING_DIRECTORIES="$root/.studies"  # a broken clone is an error: git must not take this checkout for it
clone=.studies/$name
params=studies/$name/params.yaml
if [ -n "$(printf %s "$root" | LC_ALL=C tr -d ' -~')" ]; then
    fail "$root: expected a path in ASCII, since DVC can't configure a clone elsewhere; move the checkout"
fi
case "$name" in
    "" | *[!A-Za-z0-9._-]* | .*) fail "NAME: expected a folder of studies/, received '$name'" ;;
esac
[ -f "$params" ] || fail "NAME: expected one of $(cd studies && printf '%s ' *)with a params.yaml, received '$name'"
[ "${2:-sweep}" = sweep ] || fail "expected NAME or NAME sweep, received '$*'"
grid=${GRID:-sweep}
case "$grid" in
    *[!A-Za-z0-9._-]* | .*) fail "GRID: expected the name of a grid in studies/$name, received '$grid'" ;;
esac
if [ -f "studies/$name/grids/$grid.yaml" ]; then grid=grids/$grid; fi
mkdir -p .studies
exec 9>".studies/$name.lock"
flock --nonblock 9 || fail "$clone: expected no other run of this study, found one"
if [ -n "$(git status --porcelain -- src stages dvc.yaml)" ]; then
    echo "note: the study runs the last commit; what is not committed in src, stages and dvc.yaml is left out"
fi
if [ -n "$(git status --porcelain -- "$params")" ]; then
    echo "note: the study runs $params as it is, which is not committed"
fi
if [ ! -d "$clone/.git" ]; then
    rm -rf "$clone" ".studies/.$name"
    git clone --quiet --no-checkout . ".studies/.$name"
    mv ".studies/.$name" "$clone"
fi
# Not from origin, which is the path that this checkout had then: in a container it has another.
git -C "$clone" fetch --quiet "$root" "$(git rev-parse HEAD)"
git -C "$clone" checkout --quiet --force --detach FETCH_HEAD
cp "$params" "$clone/params.yaml"
cache=$(dvc cache dir)
# What is relative is so to the checkout. TFDS takes ~ and addresses such as gs:// too.
case "${FLATMIN_CACHE:-/}" in /*) ;; *) export FLATMIN_CACHE="$root/$FLATMIN_CACHE" ;; esac
case "${FLATMIN_WEIGHTS:-/}" in /*) ;; *) export FLATMIN_WEIGHTS="$root/$FLATMIN_WEIGHTS" ;; esac
case "${TFDS_DATA_DIR:-/}" in /* | "~"* | *://*) ;; *) export TFDS_DATA_DIR="$root/$TFDS_DATA_DIR" ;; esac
cd "$clone"
rm -rf metrics plots dvc.lock
dvc config --local cache.dir "$cache"
export PYTHONPATH=src
python -m flatmin.check
python -m flatmin.prune
if [ -f "$root/studies/$name/dvc.lock" ]; then cp "$root/studies/$name/dvc.lock" dvc.lock; fi
if [ "${2:-}" = sweep ]; then
    shift 2
    exec python scripts/sweep.py "$root/studies/$name/$grid.yaml" "$@"
fi
dvc repro
rm -rf results  # complete here first: renamed, all of it appears at once
mkdir results
cp -R metrics plots dvc.lock results/
if [ -f predictions/predict.csv ]; then  # of images whose labels are not known here
    python - <<PYTHON
from flatmin.common import files
rows = ((row["name"], row["final"]) for row in files.read_csv("predictions/predict.csv"))
files.write_csv("results/test_predictions.csv", ("name", "final"), rows)
PYTHON
fi
cd results
for file in metrics plots dvc.lock test_predictions.csv; do
    rm -rf "$root/studies/$name/$file"
    if [ -e "$file" ]; then mv "$file" "$root/studies/$name/"; fi
done
echo "study $name: results in studies/$name"
