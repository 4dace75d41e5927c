#!/usr/bin/env bash
# Format, lint, shell, types and the layer contract; needs pip install -e '.[dev]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

ruff format --check .
ruff check .
git ls-files -z '*.sh' | xargs -0 shellcheck --external-sources
mypy
lint-imports
