#!/usr/bin/env bash
# What download_laion.sh and download_cc_sbu.sh share:
#   bash dataset/download.sh NAME FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]
# The folder holds NAME.json, or the NAME.tsv made from it. Run again, it skips what is finished.
set -euo pipefail

if [ "$#" -lt 3 ]; then
    echo "usage: FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]" >&2
    exit 2
fi
annotations="$2/$1"
output="$3"
shift 3

if [ ! -f "$annotations.tsv" ]; then
    python "$(dirname "$0")/convert_to_tsv.py" "$annotations.json" "$annotations.tsv"
fi
if ! command -v img2dataset > /dev/null; then
    echo "error: img2dataset is not installed; run: pip install img2dataset" >&2
    exit 1
fi
img2dataset --url_list "$annotations.tsv" --input_format tsv --url_col url --caption_col caption \
    --output_format webdataset --output_folder "$output" --image_size 256 \
    --processes_count 16 --thread_count 128 "$@"
