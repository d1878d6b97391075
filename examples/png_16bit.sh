#!/usr/bin/env bash
# A 16-bit PNG stays 16-bit; --preview writes a picture of bicubic beside the result.
# Usage: png_16bit.sh IMAGE.png OUTPUT.png
set -euo pipefail
image=${1:-"$(dirname "$0")/png/brain_t2_slice_16bit.png"} output=${2:-"$(mktemp -d)/brain_x4.png"}
"${MEDSR:-medsr}" upscale "$image" -m rdst -s 4 --modality mr -o "$output" --preview "${output%.png}_preview.png"
