#!/bin/sh
# Have Debian's packages install tools that are not all here:  tools.sh TOOL... -- PACKAGE...
set -eu
missing=
for tool in "$@"; do
    [ "$tool" != -- ] || break
    command -v "$tool" >/dev/null || missing="$missing $tool"
done
[ -n "$missing" ] || exit 0
while [ "$1" != -- ]; do shift; done
shift
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not here, and only root can have them installed by apt-get:$missing"
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$@"
