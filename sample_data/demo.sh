#!/usr/bin/env bash
# The pipeline on what this folder ships, offline, on a laptop CPU, in about two minutes.
#   bash sample_data/demo.sh [FOLDER]     results go to FOLDER (default: a temporary one)
set -euo pipefail
data=$(cd "$(dirname "$0")" && pwd)
out=${1:-$(mktemp -d)}
mkdir -p "$out"
cd "$out"
say() { printf '\n== %s\n' "$*"; }

say "1. extract: embed 1,420 drawings and their captions with a tiny CLIP model"
csalign extract "$data/drawings" --out drawings --overwrite \
    --encoder "open_clip:$data/tiny-clip/tiny-clip.json+$data/tiny-clip/tiny-clip.safetensors"

say "2. train: adapters for these embeddings, on the split train of captions.csv"
csalign train drawings --out run --overwrite

say "3. eval: 300 drawings and titles of the split test, unseen in training"
csalign eval run --report report.html

say "4. compare: before and after on the same drawings"
csalign compare drawings run

say "5. train: two encoders that never met, by InfoNCE alone and by csalign"
csalign train "$data/features" --out start --overwrite --init random --steps 0
csalign train "$data/features" --out infonce --overwrite --init random --steps 100 --cs-weight 0 \
    --logit-scale 14.3 --learn-scale --noise 0 --captions sample --other-captions 0
csalign train "$data/features" --out csalign --overwrite --steps 100

say "6. compare: untrained, InfoNCE alone and csalign, on 300 held-out drawings"
csalign compare start infonce csalign

say "7. apply: write the aligned embeddings as a feature set"
csalign apply "$data/features" --adapter csalign --out aligned --overwrite
printf '\nEverything is in %s; the page of step 3: %s\n' "$out" "$out/report.html"
