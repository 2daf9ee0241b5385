#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]. Installs missing packages first. Three test files run at a
# time, also on two cores, because tests that start processes often wait; -n 0 runs one at a time, for example for --pdb.
# tests/conftest.py orders them: those with tests marked launch come first.
set -euo pipefail
extras=${extras:-test}
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
