#!/usr/bin/env bash
# Everything that needs a GPU, in one go: install, matrix, sanitizers, benchmark. Results go to the folder OUT.
#
#   OUT=/tmp/out benchmarks/gpu.sh [PATH_OF_VLLM_OPS_LIBRARY]
#
# Needs torch >= 2.10 with CUDA, nvcc, cmake >= 3.26, ninja, scikit-build-core and the test dependencies; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?names the folder for the results}"
vllm=${1:-}

start=$(date +%s)
python3 -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$OUT/../latentkv-site" --upgrade .
export PYTHONPATH="$OUT/../latentkv-site" PATH="$OUT/../latentkv-site/bin:$PATH"
echo "install: $(($(date +%s) - start)) s"

cd "$OUT"  # away from the sources: what was installed is what runs
repo=$OLDPWD
latentkv info
latentkv verify 2>&1 | tee "$OUT/verify.txt" | tail -n 25
python3 -m pytest -q -n 12 -p no:cacheprovider -m "not slow" -c "$repo/pyproject.toml" --rootdir "$repo" \
  "$repo/tests" 2>&1 | tee "$OUT/pytest.txt" | tail -n 12
for tool in memcheck initcheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 --print-limit 5 \
    python3 "$repo/benchmarks/sanitize.py" 2>&1 | tee "$OUT/$tool.txt" | tail -n 8
done
latentkv bench --csv "$OUT/bench.csv" ${vllm:+--peer vllm --vllm-library "$vllm"} 2>&1 | tee "$OUT/bench.txt"
