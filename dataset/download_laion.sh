#!/usr/bin/env bash
# Downloads the laion images of stage 1 as shards:
#   bash dataset/download_laion.sh FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]
exec bash "$(dirname "$0")/download.sh" laion_synthetic_filtered_large "$@"
