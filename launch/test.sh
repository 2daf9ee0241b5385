#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest arguments]. Installs missing packages first. Two test files run at a time,
# because tests that start processes wait as much as they compute; -n 0 runs one at a time, for example for --pdb.
# tests/conftest.py orders them, the longest first.
set -euo pipefail
extras=${extras:-test}
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
