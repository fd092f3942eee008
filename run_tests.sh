#!/usr/bin/env bash
# Install what the tests need and pass them:   bash run_tests.sh [pytest arguments]
#
# Needs Python 3.10+ with pip and the package index. VENV=... uses another environment than .venv.
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
bin="$VENV/bin"
"$bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
"$bin/python" -m pip install --quiet --disable-pip-version-check -e ".[dev]"
"$bin/ruff" check . && "$bin/ruff" format --check .
"$bin/mypy" -p megatron.core
"$bin/lint-imports"
# Two tests at a time, each of which computes on one thread.
export OMP_NUM_THREADS=1
exec "$bin/python" -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not te and not flash_attn and not network" "$@"
