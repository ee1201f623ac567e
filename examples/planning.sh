#!/usr/bin/env bash
# Does a model fit devices that are not here, and what could they do with it at best? Needs the extra `plan` for TPU and
# GPU targets.
#
#   examples/planning.sh [MODEL] [TARGET]
set -euo pipefail
python -m jaxserve.plan --model-path "${1:-demo}" --target "${2:-cpu:2}" --context-length 256 \
    --max-running-requests 4 --chunked-prefill-size 32
