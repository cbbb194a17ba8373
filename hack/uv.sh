#!/usr/bin/env bash
# Puts uv on PATH (from PyPI, in an environment of its own if need be) and runs: sync | clients | lock.
# sync makes .venv exactly what locks/dev.txt pins, and the project editable on top; clients makes .venv-clients
# what locks/clients.txt pins; lock writes locks/ anew.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v uv >/dev/null; then
  home="${XDG_CACHE_HOME:-$HOME/.cache}/tilefleet/uv"
  if [ ! -x "$home/bin/uv" ]; then
    echo "installing uv into its own environment under the user's cache" >&2
    python3 -m venv "$home" && "$home/bin/pip" install --quiet --disable-pip-version-check uv
  fi
  export PATH="$home/bin:$PATH"
fi
case "${1:-sync}" in
  lock) exec locks/compile.sh ;;
  sync | clients) ;;
  *) echo "usage: hack/uv.sh sync|clients|lock" >&2; exit 2 ;;
esac
python=$(command -v python3)
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "python3 is $("$python" --version), tilefleet needs 3.11 or newer: install one, or run 'uv python install 3.12'" >&2
  exit 1
}
if [ "${1:-sync}" = clients ]; then
  [ -x .venv-clients/bin/python ] || uv venv --quiet --python "$python" .venv-clients
  exec uv pip sync --quiet --python .venv-clients/bin/python --require-hashes locks/clients.txt
fi
[ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
echo "installing the pinned dependencies (torch among them: about 5 GB the first time)" >&2
uv pip sync --python .venv/bin/python --require-hashes locks/dev.txt
uv pip install --quiet --python .venv/bin/python --no-deps -e .
