#!/usr/bin/env bash
# A folder of NIfTI volumes: the model is loaded once, one bad file does not stop the rest, and a second run does
# only what is missing. Results are printed, one path a line.
# Usage: nifti_folder.sh FOLDER OUTPUT
set -euo pipefail
folder=${1:-"$(dirname "$0")/nifti"} output=${2:-"$(mktemp -d)"}
"${MEDSR:-medsr}" upscale "$folder" -m rdst -s 4 --skip-existing -o "$output" | while read -r result; do
  echo "done: $result"
done
