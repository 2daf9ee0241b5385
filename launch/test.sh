#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [pytest's arguments]. Installs first what is missing.
set -euo pipefail
extras=test
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$project"
exec python -m pytest "$@"
