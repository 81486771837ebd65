#!/bin/sh
# Podman where no container registry can be reached: from Debian's packages, and so is the base image. For root on Debian.
#   podman.sh ready        install podman, make the base image, start a container from it
#   podman.sh ARGUMENT...  podman with settings that work there; `build` gets BASE, apt's and pip's settings, certificates
set -eu
base=localhost/flatmin-base:bookworm
state=${XDG_CACHE_HOME:-$HOME/.cache}/flatmin-podman
mkdir -p "$state"

# runc, since Debian's crun refuses some machines' cgroups. The limits, since podman's own are higher than what some
# machines allow even to root.
cat >"$state/containers.conf" <<CONF
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
runtime = "runc"
CONF
export CONTAINERS_CONF="$state/containers.conf"

# What `FROM debian` would give: the smallest system from the archive that this machine uses itself, with its sources.
# `set -e` is off in what `if` asks.
make_base() {
    rm -rf "$state/tree" "$state/tree.tar"
    debootstrap --variant=minbase bookworm "$state/tree" || return
    # shellcheck disable=SC2016  # apt-get expands these
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        grep ' bookworm' | sort -u >"$state/tree/etc/apt/sources.list"
    if [ ! -s "$state/tree/etc/apt/sources.list" ]; then
        echo "apt's sources: expected Debian bookworm's, found none"
        return 1
    fi
    rm -rf "$state"/tree/var/cache/apt/* "$state"/tree/var/lib/apt/lists/* "$state"/tree/var/log/*
    tar -C "$state/tree" -cf "$state/tree.tar" . || return
    podman import "$state/tree.tar" "$base" || return
    rm -rf "$state/tree" "$state/tree.tar"
}

# Whether the base image starts; one that does not is made again the next time.
try_base() {
    podman run --rm --network none "$base" true || {
        podman image rm --force "$base" >/dev/null 2>&1
        return 1
    }
}

# This machine's settings on how to reach Debian's archive.
apt_settings() { apt-config dump | grep -E '^Acquire::(https?::|Check-|Retries)' || true; }

# Those of this machine's pip settings that hold in a container too; of two the environment's, which are listed first.
pip_settings() {
    echo "[global]"
    echo "cert = /run/certificates.pem"
    settings=$(python3 -m pip config list || true)
    for key in index-url proxy trusted-host timeout default-timeout; do
        printf "%s\n" "$settings" | sed -nE "s/^(:env:|global)\.$key='(.*)'$/$key = \2/p" | head -n 1
    done
}

case "${1:?ready, or a command of podman}" in
    ready)
        if ! { "${0%/*}/tools.sh" podman runc debootstrap -- podman runc debootstrap && { podman image exists "$base" || make_base; } && try_base; } >"$state/log" 2>&1; then
            echo "no container engine here: $(tail -n 1 "$state/log")" >&2
            exit 1
        fi
        ;;
    build)
        shift
        pip_settings >"$state/pip.conf"
        apt_settings >"$state/apt.conf"
        certificates=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
        # The mounts last while RUN does: a proxy's password stays out of the image, which keeps an empty file for each.
        exec podman build --format docker --network host --pull-never --build-arg "BASE=$base" \
            --volume "$state/apt.conf:/etc/apt/apt.conf.d/90machine:ro" \
            --volume "$state/pip.conf:/etc/pip.conf:ro" --volume "$certificates:/run/certificates.pem:ro" "$@"
        ;;
    *)
        exec podman "$@"
        ;;
esac
