#!/bin/sh
# Run a command in the image on this checkout, as the user who calls:  scripts/container.sh dvc exp run -S sam.rho=0.1
# From the environment: ENGINE (docker), IMAGE (flatmin), VOLUMES (flatmin, what the two volumes' names start with),
# OPTIONS (more options for the engine's `run`, split at spaces).
set -eu
unset CDPATH
checkout=$(cd "$(dirname "$0")/.." && pwd)
engine=${ENGINE:-docker}
volumes=${VOLUMES:-flatmin}
case "$checkout" in
    *:*)
        echo "error: $checkout: expected a path without ':', at which the engine parts a volume's, received one" >&2
        exit 1
        ;;
esac
if [ -f "$checkout/.git" ]; then
    echo "error: $checkout/.git: expected a clone's folder, received a worktree's file: git would not work inside" >&2
    exit 1
fi

set -- "${IMAGE:-flatmin}" "$@"
# What is piped in is passed on; a terminal's keys only where it shows the output too.
if [ ! -t 0 ]; then set -- --interactive "$@"; elif [ -t 1 ]; then set -- --interactive --tty "$@"; fi
# Without root podman would take the caller's number for another user of the host.
case "${engine##*/}" in
    podman*) if [ "$(id -u)" != 0 ]; then set -- --userns=keep-id "$@"; fi ;;
esac
# The image without CUDA needs none, and docker fails at --gpus where NVIDIA's toolkit for containers is missing.
case "$engine ${IMAGE:-flatmin}" in
    *-cpu) ;;
    docker\ *) if [ -e /dev/nvidia0 ]; then set -- --gpus all "$@"; fi ;;
esac
# What is committed inside has the author that it would have outside.
if name=$(git -C "$checkout" config user.name) && email=$(git -C "$checkout" config user.email); then
    set -- --env "GIT_AUTHOR_NAME=$name" --env "GIT_AUTHOR_EMAIL=$email" \
        --env "GIT_COMMITTER_NAME=$name" --env "GIT_COMMITTER_EMAIL=$email" "$@"
fi
# By name, which passes those that are set, so that no command line has a value.
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION; do
    set -- --env "$name" "$@"
done
# shellcheck disable=SC2086  # OPTIONS are several words
exec "$engine" run --rm --user "$(id -u):$(id -g)" --stop-timeout 60 --volume "$checkout:/workspace" \
    --volume "$volumes-dvc:/cache/dvc" --volume "$volumes-cache:/cache/flatmin" ${OPTIONS-} "$@"
