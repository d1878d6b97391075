#!/usr/bin/env bash
# Every DICOM series of a PACS export, one after the other: each becomes a new series beside the export.
# Usage: pacs_export.sh EXPORT OUTPUT        (EXPORT holds one folder for each series)
set -u
export_folder=${1:-"$(dirname "$0")"} output=${2:-"$(mktemp -d)/upscaled"}
medsr=${MEDSR:-medsr}
mkdir -p "$output"
failed=0
for series in "$export_folder"/*/; do
  # Folders that hold no DICOM file are not series.
  find "$series" -maxdepth 1 -name '*.dcm' | grep -q . || continue
  name=$(basename "$series")
  "$medsr" upscale "$series" -m rdst -s 4 --modality mr --skip-existing -o "$output/${name}_x4-rdst" \
    --report "$output/${name}.json" || { echo "failed with $?: $name" >&2; failed=1; }
done
exit $failed
