#!/bin/sh
# Open reports in Debian's Chromium: see tests/browser_report.py. Left out, with the reason, where a tool is missing and
# cannot be had. Called by `make browser-test`, which makes .venv first.
set -eu
cd "$(dirname "$0")/.."

install_tools() {
    if type chromium && type chromedriver && type npm; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "chromium, chromedriver and npm: not all here, and only root can have them installed by apt-get"
        return 1
    fi
    apt-get update -qq || return
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends chromium chromium-driver npm
}

# The checker of accessibility, of the version and with the digest in the lock file.
install_axe() {
    mkdir -p .venv/axe && cp tests/axe/package.json tests/axe/package-lock.json tests/axe/.npmrc .venv/axe
    (cd .venv/axe && npm ci)
}

for step in install_tools install_axe; do
    if ! reason=$($step 2>&1); then
        echo "browser-test left out: $(echo "$reason" | tail -n 1)"
        exit 0
    fi
done
exec python -m pytest tests/browser_report.py
