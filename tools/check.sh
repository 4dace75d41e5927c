#!/usr/bin/env bash
# Format, lint, types and the layer contract; needs pip install -e '.[dev]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ruff format --check .
ruff check .
mypy
lint-imports
