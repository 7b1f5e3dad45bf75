#!/usr/bin/env bash
# Builds the wheel, installs it with what the notebooks need in a new environment, and runs every notebook there with
# fast settings. Run by `make test-notebooks`.
set -euo pipefail
python=${1:-python3} constraints=$(realpath "${2:-constraints.txt}")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip wheel --no-deps --wheel-dir "$work/dist" "$root"
wheel=$(echo "$work"/dist/*.whl)
pip install -c "$constraints" "$wheel[notebooks]" ipykernel nbclient

cd "$work" # not the checkout, whose files would be imported instead
export PATH="$work/venv/bin:$PATH" PYTHONPATH="$root/tests/support"
python "$root/tests/notebooks/run.py" "$root"/notebooks/*.ipynb
