#!/usr/bin/env bash
# Downloads the laion pictures of stage 1 as shards:
#   bash dataset/download_laion.sh FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]
# The folder holds laion_synthetic_filtered_large.json, or the .tsv made from it. A second call goes on where the
# first one stopped.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: bash $0 FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]" >&2
    exit 2
fi
annotations="$1/laion_synthetic_filtered_large"
output="$2"
shift 2

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
