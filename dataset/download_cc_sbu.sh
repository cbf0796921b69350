#!/usr/bin/env bash
# Downloads the cc_sbu images of stage 1 as shards:
#   bash dataset/download_cc_sbu.sh FOLDER_WITH_ANNOTATIONS OUTPUT_FOLDER [more options of img2dataset]
exec bash "$(dirname "$0")/download.sh" ccs_synthetic_filtered_large "$@"
