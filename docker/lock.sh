#!/usr/bin/env bash
# Renew docker/requirements.lock and docker/build.lock from pyproject.toml. Usage: pip install uv && bash docker/lock.sh
# Only what has been out for a week is taken: most malicious releases are found within days.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # lock INPUT OUTPUT: every dependency of INPUT with the sha256 of its wheels
  uv pip compile --quiet --upgrade --generate-hashes --only-binary :all: --exclude-newer "7 days" \
    --python-version 3.12 --python-platform x86_64-manylinux_2_36 \
    --no-emit-index-url --no-annotate --custom-compile-command "bash docker/lock.sh" --output-file "$2" "$1"
}

builder=$(mktemp --suffix .in)
trap 'rm -f "$builder"' EXIT
python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" >"$builder"
lock "$builder" docker/build.lock
lock pyproject.toml docker/requirements.lock
