#!/bin/sh
# Build the Dockerfile with the cpu lock where no registry can be reached, and show that what docs/container.md promises
# holds in the image: see the steps below. Runs the last commit's default study with one seed outside the image and
# inside.
# Called by `make image-test`, which makes .venv first. Needs root on Debian.
set -eu
unset CDPATH
cd "$(dirname "$0")/.."
root=$(pwd)
work=$(mktemp -d)
chmod 755 "$work"
started=$(date +%s)
children=
export ENGINE="$root/scripts/podman.sh" IMAGE=localhost/flatmin-image-test VOLUMES="flatmin-image-test-$$"
# Not the checkout's owner, not in passwd, no network, nothing but the checkout, the volumes and /tmp to write to.
export OPTIONS="--user 12345:12345 --network none --read-only --tmpfs /tmp:exec"

say() { echo "image-test: $(($(date +%s) - started)) s: $*"; }
fail() {
    say "FAILED: $*"
    if [ -f "$work/log" ]; then tail -n 25 "$work/log"; fi
    exit 1
}
# shellcheck disable=SC2317  # called by the trap
clean() {
    trap - EXIT INT TERM
    if [ -n "$children" ]; then kill -- "$children" 2>/dev/null || true; fi
    wait
    "$ENGINE" volume rm --force "$VOLUMES-dvc" "$VOLUMES-cache" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT
trap 'exit 130' INT TERM

# A command in the container; its output goes to $work/log.
inside() { "$work/inside/scripts/container.sh" "$@" >"$work/log" 2>&1; }
stages() { sed -n "s/^Running stage '\(.*\)':$/\1/p" "$work/log" | tr '\n' ' '; }

"$ENGINE" ready
for place in outside inside tested; do git clone --quiet . "$work/$place"; done
for place in outside inside; do
    rm -r "$work/$place/metrics" "$work/$place/plots" "$work/$place/dvc.lock"
    sed -i 's/^seeds: .*/seeds: [42]/' "$work/$place/params.yaml"
done
chmod -R a+rwX "$work/inside" "$work/tested"
# The steps run the last commit, which may surprise.
if [ -n "$(git status --porcelain)" ]; then say "what is not committed is left out"; fi

say "outside: dvc repro, in the background; building the image"
# In a process group of its own, all of which is ended with it: DVC leaves its stage running.
(
    cd "$work/outside"
    PATH="$root/.venv/bin:$PATH" FLATMIN_CACHE="$work/outside-cache" exec setsid dvc repro
) >"$work/outside.log" 2>&1 &
outside=$!
children=-$outside
"$ENGINE" build --build-arg LOCK=cpu --tag "$IMAGE" "$work/outside" >"$work/log" 2>&1 || fail "the build"
say "built, $("$ENGINE" image inspect --format '{{.Size}}' "$IMAGE" | awk '{printf "%.2f GB", $1 / 1e9}')"

# The image itself.
code=0
inside sh -c 'exit 7' || code=$?
[ "$code" = 7 ] || fail "exit code: expected 7, received $code"
# shellcheck disable=SC2016  # for the container's shell
inside sh -c 'test "$(id -u)" = 12345 && ! touch /a 2>/dev/null && touch /tmp/a && git status --short >/dev/null' ||
    fail "user, read-only root or git"
say "exit codes, user, read-only root, git: good"

# pytest and what comes with it are not in the image: they are installed in a folder that the container mounts. CI:
# hypothesis sets no deadlines then.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
    --target "$work/dev" -r requirements/dev.txt >"$work/log" 2>&1 || fail "the tests' requirements"
OPTIONS="$OPTIONS --volume $work/dev:/dev-packages:ro --env PYTHONPATH=/workspace/src:/dev-packages --env CI=true" \
    "$work/tested/scripts/container.sh" python -m pytest -q -p no:cacheprovider -m 'not slow' >"$work/log" 2>&1 ||
    fail "the unit tests"
say "inside: the unit tests: $(tail -n 1 "$work/log")"

if ! wait "$outside"; then cp "$work/outside.log" "$work/log" && fail "dvc repro outside"; fi
children=
say "outside: done"

# A study that is stopped in the middle of finetune and resumed.
"$work/inside/scripts/container.sh" dvc repro >"$work/log" 2>&1 &
running=$!
children=$running
until grep -q '^finetune@42 3/.*val accuracy' "$work/log"; do
    kill -0 "$running" 2>/dev/null || fail "dvc repro ended before finetune's third epoch"
    sleep 1
done
kill -TERM "$running"
before=$(date +%s)
code=0
wait "$running" || code=$?
children=
if [ "$code" = 0 ] || [ "$code" = 137 ]; then fail "stopped: expected an exit code of its own, received $code"; fi
grep -q 'interrupted: run it again' "$work/log" || fail "stopped: expected the stage to say so"
say "inside: SIGTERM in finetune's fourth epoch: exit code $code after $(($(date +%s) - before)) s"

inside dvc repro || fail "dvc repro after SIGTERM"
grep -q '^finetune@42: resuming after epoch' "$work/log" || fail "expected finetune to resume after its last whole epoch"
say "inside: $(grep '^finetune@42: resuming' "$work/log"); ran $(stages)"
for folder in metrics plots predictions evaluation models; do
    diff -r "$work/outside/$folder" "$work/inside/$folder" >"$work/log" 2>&1 || fail "$folder differ from those outside"
done
say "metrics, plots, predictions, evaluation and models are byte for byte those made outside"

inside dvc repro || fail "the second dvc repro"
grep -q 'up to date' "$work/log" || fail "the second dvc repro: expected nothing to run, received $(stages)"
say "inside: dvc repro again ran nothing"

inside dvc exp run -S sam.rho=0.1 || fail "dvc exp run"
[ "$(stages)" = "sam-finetune@42 finalize evaluate report " ] || fail "dvc exp run: expected four stages, received $(stages)"
say "inside: dvc exp run -S sam.rho=0.1 ran $(stages)"

# The queue, with an experiment that reruns evaluate alone.
inside dvc exp run --queue -S evaluate.ece_bins=10 || fail "dvc exp run --queue"
inside dvc exp run --run-all || fail "dvc exp run --run-all"
inside dvc exp show --csv || fail "dvc exp show"
grep -q ',Success,.*,10\(,\|$\)' "$work/log" || fail "expected dvc exp show to list the queued experiment"
say "inside: dvc exp run --queue and --run-all: good"

say "done"
