#!/usr/bin/env bash
# The pipeline on what this folder ships, offline, on a laptop CPU, in about two minutes.
#   bash sample_data/demo.sh [FOLDER]     results go to FOLDER (default: a temporary one)
set -euo pipefail
data=$(cd "$(dirname "$0")" && pwd)
out=${1:-$(mktemp -d)}
mkdir -p "$out"
cd "$out"
say() { printf '\n== %s\n' "$*"; }

say "1. extract: drawings and their captions through a tiny CLIP model, embeddings to Parquet"
csalign extract "$data/drawings" --out drawings --overwrite \
    --encoder "open_clip:$data/tiny-clip/tiny-clip.json+$data/tiny-clip/tiny-clip.safetensors"

say "2. train: adapters for these embeddings, on the split that captions.csv calls train"
csalign train drawings --out run --overwrite

say "3. eval: drawings and titles of the split test, which training did not see"
csalign eval drawings --split test --json > before.json
csalign eval drawings --adapter run --split test --json --report report.html > after.json
csalign eval drawings --adapter run --split test

say "4. compare: before and after on the same drawings"
csalign compare before.json after.json

# As an image encoder and a sentence encoder see 1,500 drawings, no space is shared before training.
say "5. train: two encoders that never met, by InfoNCE alone and by csalign"
csalign train "$data/features" --out start --overwrite --init random --steps 0
csalign train "$data/features" --out infonce --overwrite --init random --steps 100 --cs-weight 0 \
    --logit-scale 14.3 --learn-scale --noise 0 --captions sample --other-captions 0
csalign train "$data/features" --out csalign --overwrite --steps 100

say "6. compare: an untrained adapter, InfoNCE alone and csalign on 300 held-out drawings"
csalign compare start infonce csalign --split test

say "7. apply: the aligned embeddings as a feature set again"
csalign apply "$data/features" --adapter csalign --out aligned --overwrite
echo "Everything is in $out; before and after as a page: $out/report.html"
