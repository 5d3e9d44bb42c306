# A virtual environment with the pinned requirements, made once, then reused.
#   bash launch/environment.sh [requirements-dev.txt ...]      make it
#   source launch/environment.sh; use_environment [...]        make it, and put its programs first on PATH
# Sourcing sets $root (the checkout) and $venv.
# MEGAREC_VENV names another directory than .venv; PYTHON another interpreter than python3.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${MEGAREC_VENV:-$root/.venv}

ensure_environment() {
  local python=${PYTHON:-python3} requirements=requirements.txt file files stamp
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then requirements=requirements-gpu.txt; fi
  files=("$root/$requirements")
  for file in "$@"; do files+=("$root/$file"); done
  # One stamp a list of files: a wish for fewer packages than there are installs nothing.
  stamp=$venv/.installed-$(cat "${files[@]}" | sha256sum | cut -c1-16)
  if [ -f "$stamp" ]; then
    echo "environment: $venv (ready)"
    return
  fi
  "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    { echo "error: $("$python" --version): megarec needs Python 3.11, 3.12 or 3.13 (set PYTHON=...)" >&2; exit 2; }
  if [ ! -x "$venv/bin/python" ]; then
    echo "environment: creating $venv with $("$python" --version)"
    "$python" -P -m venv "$venv" ||
      { echo "error: '$python -m venv' failed: on Debian install python3-venv" >&2; exit 2; }
  fi
  echo "environment: installing ${files[*]##*/} (a few minutes the first time)"
  local arguments=()
  for file in "${files[@]}"; do arguments+=(-r "$file"); done
  "$venv/bin/python" -P -m pip install --quiet --disable-pip-version-check "${arguments[@]}"
  touch "$stamp"
}

# A function, as a script that is sourced without arguments sees those of its caller.
use_environment() {
  ensure_environment "$@"
  export PATH="$venv/bin:$PATH"
  # DeepSpeed warns at every start when it has to find out by itself that there is no accelerator.
  [ -e /dev/nvidiactl ] || [ -e /dev/kfd ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then use_environment "$@"; fi
