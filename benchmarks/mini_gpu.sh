#!/usr/bin/env bash
# Trains the larger mini on a machine with one GPU, then measures it; needs nothing but python3 with
# torch, tokenizers, safetensors, typer, rich, Pillow and numpy.
#
#     DATA=runs/emoji.tar.gz OUT=results bash benchmarks/mini_gpu.sh
#
# DATA    the emoji data: a folder, or a .tar.gz that holds its files (make one with
#         `tar -C DIR/emoji -czf runs/emoji.tar.gz .`)
# OUT     folder of the results, at most 8 files of at most 15 MB: model.tar.00 …, scores.json (those
#         that were measured in time), samples.png, results.tar.gz (metrics, reconstructions, notes),
#         log
# MINUTES of training (7); LIMIT images or questions a measure (40); SECONDS_LEFT for scores (100)
# FIELDS  more `field=value` for pretrain_mini
set -uo pipefail
cd "$(dirname "$0")/.."
: "${DATA:?give the emoji data}" "${OUT:?give a folder for the results}"
MINUTES=${MINUTES:-7} LIMIT=${LIMIT:-40} SECONDS_LEFT=${SECONDS_LEFT:-100} FIELDS=${FIELDS:-}
DEVICE=${DEVICE:-cuda} RUN=${RUN:-runs/mini_gpu}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
mkdir -p "$OUT" "$RUN"
OUT=$(cd "$OUT" && pwd)
exec > >(tee "$OUT/log") 2>&1
if [ -f "$DATA" ]; then
    # Beside the run's folder, which has to be empty.
    mkdir -p "$RUN.data" && tar -C "$RUN.data" -xzf "$DATA" && DATA=$RUN.data
fi
python3 - "$DEVICE" <<'PYTHON'
import sys

import torch

from earlyfusion.model.attention import varlen_kernel

print("torch", torch.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
print("packed attention:", "of torch" if varlen_kernel(sys.argv[1]) else "by mask")
PYTHON

# What there is comes back even where a stage fails: the newest model and all metrics.
# shellcheck disable=SC2086
python3 -m earlyfusion train pretrain_mini device="$DEVICE" minutes="$MINUTES" data="$DATA" out="$RUN" $FIELDS
status=$?
model=$RUN/chat/model
[ -d "$model" ] || model=$RUN/transformer/model
(cd "$RUN" && tar -czf "$OUT/results.tar.gz" --ignore-failed-read \
    $(ls -d ./*/metrics.jsonl ./*/notes.jsonl ./*/minutes.json ./*/curves.png ./*/samples 2>/dev/null))
for stage in "$RUN"/*/; do
    [ -f "$stage/metrics.jsonl" ] && echo "$(basename "$stage"): $(tail -n 1 "$stage/metrics.jsonl")"
done
if [ -d "$model" ]; then
    tar -C "$(dirname "$model")" -cf - model | split -b 15000000 -d - "$OUT/model.tar."
    # The first seeds, unselected; beside the scores, which do not wait for it.
    timeout 90 python3 -m earlyfusion gallery "Draw a cat." "Draw a house." \
        "Can you draw me an elephant?" "사과를 그려줘" --count 8 \
        --model "$model" --device "$DEVICE" --out "$OUT/samples.png" --overwrite &
    timeout "$SECONDS_LEFT" python3 -m earlyfusion.evals.emoji --model "$model" --data "$DATA" \
        --limit "$LIMIT" --device "$DEVICE" --out "$OUT/scores.json"
    wait %% || true
fi
ls -l "$OUT"
exit $status
