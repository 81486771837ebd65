# Sourced by study.sh and experiment.sh: a fresh checkout of $REVISION in ./checkout, with $REMOTE as its DVC remote.
# The secrets come from the environment and are written nowhere.
set -eu

fail() { echo "error: $*" >&2; exit 1; }
[ -n "${REPOSITORY-}" ] || fail "REPOSITORY: expected the URL of a git repository, found none"
[ -n "${REVISION-}" ] || fail "REVISION: expected a commit, tag or branch, found none"
[ -n "${REMOTE-}" ] || fail "REMOTE: expected the URL of a DVC remote, found none"

# A file names the variable that holds the token: libraries that push do not read git's settings in the environment.
if [ -n "${GIT_TOKEN-}" ]; then
    # shellcheck disable=SC2016  # git's shell expands them
    git config --global credential.helper \
        '!printf "username=%s\npassword=%s\n" "${GIT_USERNAME:-git}" "$GIT_TOKEN"; :'
fi
rm -rf checkout
git clone --quiet "$REPOSITORY" checkout
cd checkout
commit=$(git rev-parse --quiet --verify "$REVISION^{commit}" ||
    git rev-parse --quiet --verify "origin/$REVISION^{commit}") ||
    fail "REVISION: expected a commit, tag or branch of the repository, received $REVISION"
git checkout --quiet --detach "$commit"
git config user.name "${GIT_NAME:-flatmin}"
git config user.email "${GIT_EMAIL:-flatmin@localhost}"
dvc remote add --quiet --local --force --default cluster "$REMOTE"
