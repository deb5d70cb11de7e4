# Sourced by the scripts beside it: an environment of its own in a temporary folder, and in it a tiny model to train.
# PYTHON chooses the Python. PLACE names a folder to keep; its environment is used again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
place=${PLACE:-$(mktemp -d)}
[ -n "${PLACE:-}" ] || trap 'rm -rf "$place"' EXIT
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" TOKENIZERS_PARALLELISM=false

environment() { # what to install beside this repository
    if [ ! -x "$place/venv/bin/sts-callback" ]; then
        "${PYTHON:-python3}" -m venv "$place/venv"
        "$place/venv/bin/pip" install -q uv # pip's own resolver did not come to an end over Axolotl and this package
        "$place/venv/bin/uv" pip install -q --python "$place/venv" "$@" "$here/../.."
    fi
    export PATH="$place/venv/bin:$PATH"
}
workplace() { # an empty folder with what tiny.py makes
    rm -rf "$place/run" && mkdir "$place/run" && cd "$place/run"
    python "$here/tiny.py" make
}
check() { # the output folders without and with the callback
    python "$here/tiny.py" check "$@"
}
