#!/usr/bin/env bash
# Regenerates the lock files: every version and hash pinned, no index address inside, so any index serves them.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --quiet)
uv pip compile pyproject.toml --extra operator "${common[@]}" -o locks/operator.txt
uv pip compile pyproject.toml --extra worker "${common[@]}" -o locks/worker.txt
uv pip compile pyproject.toml --extra operator --extra worker --group dev "${common[@]}" -o locks/dev.txt
