#!/bin/bash
# What only a GPU can show, in two commands of less than ten minutes each on one H100:
#
#   MODEL=SmolLM2-135M-Instruct PAIRS=pairs.parquet OUTPUT=gpu bash recipes/benchmark/gpu.sh 1
#   MODEL=SmolLM2-135M-Instruct PAIRS=pairs.parquet OUTPUT=gpu bash recipes/benchmark/gpu.sh 2
#
# MODEL is the directory of a decoder, PAIRS a Parquet file with `prompt`, `chosen` and `rejected` as messages, OUTPUT the
# folder for gpu.json, gpu.md and the logs, SECONDS_AT_MOST when a part is stopped (570). SMALL=1 does each step with a few
# pairs, also on a CPU, so that no GPU is spent on finding mistakes in typing. A part that is called again goes on.
#
# To install before, since nothing is downloaded here: trl-ssrm[plots], which brings torch, transformers, trl and datasets.
# Optional: flash-attn, or kernels with its flash-attn2 in the cache of the hub (flash attention), deepspeed (ZeRO).
#
# How long it takes with 135 million weights on an H100 is worked out from the number of steps, at 40 to 70 ms each, and not
# measured:
#
#   1  rewards                    1 min   1,200 sequences of 300 pairs, one at a time
#      rewards, flash attention   1 min
#      throughput                 1 min
#      speed                      3 to 5 min   most of it one sequence at a time
#   2  quality, each of 3 tasks   5 to 9 min   side by side: about 5,500 steps each
#      rounds, in 2 precisions    1 to 2 min   beside these: four runs of ssrm.py each, also side by side
set -euo pipefail

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python "$(dirname "$0")/gpu.py" --part "${1:?which part, 1 or 2?}" \
    --model_name_or_path "${MODEL:?the directory of a model}" --dataset_path "${PAIRS:?a Parquet file of pairs}" \
    --output_dir "${OUTPUT:-gpu}" --time_limit "${SECONDS_AT_MOST:-570}" --small "${SMALL:-0}"
