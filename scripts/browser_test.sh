#!/bin/sh
# Open reports in Debian's Chromium: see tests/browser_report.py. Left out, with the reason, where a tool is missing and
# cannot be had. Called by `make browser-test`, which makes .venv first.
set -eu
cd "$(dirname "$0")/.."

install_tools() { scripts/tools.sh chromium chromedriver npm -- chromium chromium-driver npm; }

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
