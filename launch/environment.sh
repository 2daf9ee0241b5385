# Sourced by the other scripts, after `extras=…`. Prepends a Python with the project and its dependencies to PATH: the
# active virtual environment, or else .venv in the project's root, which is created if missing. Installs missing
# packages, torch first, in the versions of constraints.txt; later calls find a record of this and skip it.
# `bash launch/environment.sh` only installs, for example before a job on nodes without access to a package index.

project=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

make_virtual_environment() {
    local python
    for python in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_recent "$python"; then
            printf 'creating .venv with %s\n' "$("$python" --version)"
            "$python" -m venv --clear "$project/.venv" >/dev/null ||
                fail "$python cannot create a virtual environment; install its venv module (python3-venv on Debian)"
            return
        fi
    done
    fail "Python 3.10 or newer is needed, but $(python3 --version 2>&1 || echo 'no python3') was found; install one"
}

install() {
    # PEP 517: the same isolated build with every version of pip.
    PIP_USE_PEP517=1 python -m pip install -qq --disable-pip-version-check --no-input \
        -c "$project/launch/constraints.txt" "$@" </dev/null ||
        fail "pip could not install $*; correct the error above and run the script again"
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    export VIRTUAL_ENV=$project/.venv
    # Incomplete or moved from another folder: created again.
    grep -qsF -- "$VIRTUAL_ENV" "$VIRTUAL_ENV/bin/activate" || make_virtual_environment
fi
export PATH=$VIRTUAL_ENV/bin:$PATH

# Record of installations: one line per checkout, dependencies and set of extras; no extras are a subset of any.
installed=$VIRTUAL_ENV/hpcm_scale.installed
state=$(printf '%s\n' "$project" | cat - "$project/pyproject.toml" "$project/launch/constraints.txt" | cksum)
if ! grep -qs -- "^$state ${extras:-}" "$installed"; then
    is_recent python || fail "Python 3.10 or newer is needed, but $VIRTUAL_ENV has $(python --version 2>&1)"
    command -v ${CXX:+"$CXX"} c++ g++ clang++ >/dev/null ||
        fail "a C++ compiler is needed, but none of c++, g++, clang++ was found; install one"
    printf 'installing torch (some minutes the first time) …\n'
    install torch
    printf 'installing hpcm_scale and its dependencies …\n'
    install -e "$project${extras:+[$extras]}"
    grep -qsF -- "$state " "$installed" || rm -f -- "$installed"
    printf '%s\n' "$state ${extras:-}" >>"$installed"
fi
