#!/usr/bin/env bash
# The whole pipeline on what this folder ships, offline, on a laptop CPU.
#   bash sample_data/demo.sh [FOLDER]     results go to FOLDER (default: a temporary one)
set -euo pipefail
data=$(cd "$(dirname "$0")" && pwd)
out=${1:-$(mktemp -d)}
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

say "1. extract: drawings and captions through a tiny CLIP, embeddings and tokens to Parquet"
csalign extract "$data/drawings" --out "$out/drawings" --overwrite --tokens both \
    --encoder "open_clip:$data/tiny-clip/tiny-clip.json+$data/tiny-clip/tiny-clip.safetensors"
csalign inspect "$out/drawings"

say "2. train: on 1,000 drawings as an image encoder and a sentence encoder saw them"
# Two encoders that never met: before alignment their spaces have nothing in common.
csalign train "$data/features" --out "$out/before" --overwrite --init random --steps 0
csalign train "$data/features" --out "$out/infonce" --overwrite --init random --steps 100 --cs-weight 0 \
    --logit-scale 14.3 --learn-scale --noise 0 --captions sample --other-captions 0
csalign train "$data/features" --out "$out/csalign" --overwrite --steps 100

say "3. eval: 300 held-out drawings and their titles"
for run in before infonce csalign; do
    csalign eval "$data/features" --adapter "$out/$run" --split test --json > "$out/$run.json"
done
csalign eval "$data/features" --adapter "$out/csalign" --split test

say "4. apply: the aligned embeddings as a feature set again"
csalign apply "$data/features" --adapter "$out/csalign" --out "$out/aligned" --overwrite

say "Before alignment, InfoNCE alone, and csalign (chance: mean recall $(
    python3 -c 'print(f"{100 * (1 + 5 + 10) / 3 / 300:.2f}")') %)"
csalign compare "$out/before.json" "$out/infonce.json" "$out/csalign.json"
echo "Everything is in $out"
