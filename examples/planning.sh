#!/usr/bin/env bash
# Checks whether a model fits devices that this machine does not have, and bounds the performance they could reach with
# it. TPU and GPU targets need the extra `plan`.
#
#   examples/planning.sh [MODEL] [TARGET]
set -euo pipefail
python -m jaxserve.plan --model-path "${1:-demo}" --target "${2:-cpu:2}" --context-length 256 \
    --max-running-requests 4 --chunked-prefill-size 32
