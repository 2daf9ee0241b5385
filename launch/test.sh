#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest's arguments]. Installs first what is missing. Two files of tests are at
# work at a time, because those that start processes wait as much as they compute; -n 0 does without, for --pdb say.
# They keep the order that tests/conftest.py gives them: the longest first.
set -euo pipefail
extras=test
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
