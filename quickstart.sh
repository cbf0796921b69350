#!/usr/bin/env bash
# Installs into .venv (or the active virtual environment) and runs both stages on small generated scenes.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || python3 -m venv .venv
  export PATH="$PWD/.venv/bin:$PATH"
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
python -m quickstart
