#!/usr/bin/env bash
# Builds the wheel and the source distribution, installs the wheel without extras in a new environment, and tries it
# there; then tries it where torch and numpy are all there is. Run by `make test-wheel`.
set -euo pipefail
python=${1:-python3} constraints=$(realpath "${2:-constraints.txt}")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$1/bin/python" -m pip --quiet --disable-pip-version-check "${@:2}"; }

"$python" -m venv "$work/build"
pip "$work/build" install build
"$work/build/bin/python" -m build --outdir "$work/dist" "$root" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$python" "$root/tests/wheel/contents.py" "$work"/dist/*

cd "$work" # not the checkout, whose files would be imported instead
"$python" -m venv "$work/plain"
pip "$work/plain" install -c "$constraints" "$work"/dist/*.whl
"$work/plain/bin/python" "$root/tests/wheel/smoke.py" --lightning
"$work/plain/bin/selfcompress" --version

"$python" -m venv "$work/serving"
pip "$work/serving" install -c "$constraints" torch numpy
pip "$work/serving" install --no-deps "$work"/dist/*.whl
"$work/serving/bin/python" "$root/tests/wheel/smoke.py"
"$work/serving/bin/selfcompress" --help > /dev/null
echo "the wheel works, with its dependencies and with torch and numpy alone"
