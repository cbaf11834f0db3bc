#!/usr/bin/env bash
# Everything that needs a GPU, in one go: install, matrix, sanitizers, benchmarks. Results go to the folder OUT.
#
#   OUT=/tmp/out benchmarks/gpu.sh [PATH_OF_VLLM_OPS_LIBRARY [FOLDER_THAT_HOLDS_FLASHINFER [FOLDER_OF_READERS]]]
#
# The folder of readers holds _flashmla_C.abi3.so, _flashmla_extension_C.abi3.so and _vllm_fa3_C.abi3.so, out of
# vLLM's wheel like the first library.
#
# Needs torch >= 2.10 with CUDA, nvcc, cmake >= 3.26, ninja, scikit-build-core and the test dependencies; no network.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?names the folder for the results}"
peers=(${1:+--vllm-library "$1"} ${2:+--peer flashinfer})
flashinfer=${2:-}
readers=(${3:+--flashmla "$3" --flash-attention "$3/_vllm_fa3_C.abi3.so"})

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
export PYTHONPATH="$PYTHONPATH${flashinfer:+:$flashinfer}"
for op in rope_ write_cache_ rope_write_cache_ decode_prologue write_cache_grouped_ write_indexer_cache_ gather_cache \
  convert_cache_; do
  latentkv bench --op $op --csv "$OUT/$op.csv" "${peers[@]}"
done 2>&1 | tee "$OUT/bench.txt"
latentkv bench --op write_cache_ --model deepseek-v4 --formats fp8_model1 --csv "$OUT/write_cache_model1.csv" \
  "${peers[@]}" 2>&1 | tee -a "$OUT/bench.txt"
python3 "$repo/benchmarks/compiled_layer.py" --csv "$OUT/compiled_layer.csv" --styles "op,pytorch${1:+,vllm}" \
  ${1:+--vllm-library "$1"} 2>&1 | tee "$OUT/compiled_layer.txt"
python3 "$repo/benchmarks/readers.py" --csv "$OUT/readers.csv" --times "${readers[@]}" 2>&1 | tee "$OUT/readers.txt"
