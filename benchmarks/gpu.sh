#!/usr/bin/env bash
# Measures everything that needs one GPU with 80 GB or more: benchmarks/gpu.sh [FOLDER [PRESET]]. Writes Markdown to
# FOLDER/rows.md and one line of JSON per row beside it. Failed rows are listed at the end; the others are kept. PRESET
# replaces all model sizes: "benchmarks/gpu.sh /tmp/rows tiny" checks the commands on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-output/gpu}
preset=${2:-}
mkdir -p "$out"
failed=()
row() { # NAME MODULE [ARGUMENT ...]
  name=$1
  shift
  arguments=("$@")
  for i in "${!arguments[@]}"; do
    if [ -n "$preset" ] && [ "${arguments[$i]}" = --preset ]; then arguments[i + 1]=$preset; fi
  done
  printf '\n## %s\n\n`python -m benchmarks.%s`\n\n' "$name" "${arguments[*]}" | tee -a "$out/rows.md"
  python -m "benchmarks.${arguments[0]}" "${arguments[@]:1}" --json "$out/$name.json" 2>&1 | tee -a "$out/rows.md" ||
    failed+=("$name")
}
: >"$out/rows.md"
row limits hardware
for model in 7b 13b; do
  row "$model-stage1" train_step --preset "$model" --stage 1 --batch 64
  row "$model-stage1-cached" train_step --preset "$model" --stage 1 --batch 64 --feature-cache
done
row 7b-stage1-compiled train_step --preset 7b --stage 1 --batch 64 --compile --compare uncompiled
row 7b-stage1-cached-compiled train_step --preset 7b --stage 1 --batch 64 --feature-cache --compile --compare uncompiled
row 13b-stage1-cached-compiled train_step --preset 13b --stage 1 --batch 64 --feature-cache --compile
row 7b-stage1-blip2 train_step --preset 7b --stage 1 --batch 16 --compare blip2
row 7b-stage1-plain train_step --preset 7b --stage 1 --batch 16 --compare plain
row 7b-stage2 train_step --preset 7b --stage 2 --batch 12
row 7b-stage2-cached train_step --preset 7b --stage 2 --batch 12 --feature-cache
row 13b-stage2-int8 train_step --preset 13b --stage 2 --batch 1 --llm-precision int8
row 7b-generate generate --preset 7b
row 7b-int8-decoding int8_decoding --preset 7b
row 7b-evaluate evaluate --preset 7b
row 7b-serve serve --preset 7b
row 7b-chat chat --preset 7b
row pipeline data_pipeline --compare plain
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}" | tee -a "$out/rows.md"
  exit 1
fi
