#!/usr/bin/env bash
# Regenerates the lock files: every version and hash pinned, no index address inside, so any index serves them.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--universal --generate-hashes --no-header --no-emit-index-url --python-version 3.11 --quiet)
uv pip compile pyproject.toml --extra operator "${common[@]}" -o locks/operator.txt
uv pip compile pyproject.toml --extra worker "${common[@]}" -o locks/worker.txt
uv pip compile pyproject.toml --extra operator --extra worker --group dev "${common[@]}" -o locks/dev.txt
uv pip compile --group clients "${common[@]}" -o locks/clients.txt
# torch has a file of its own: an image installs it in a layer below, and never where the base brings one
pin() { uv pip compile - "${common[@]}" --no-annotate "${@:3}" -o "locks/$2" <<<"$1"; }
pin "torch==2.15.0" torch.txt -c locks/dev.txt
pin "uv==0.13.9" uv.txt
pin "checkov==3.3.30" scan.txt
