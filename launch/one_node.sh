#!/usr/bin/env bash
# One machine with several GPUs. One process uses all of them; no options are needed.
#
#     launch/one_node.sh --config=configs/FILE.py --workdir=FOLDER
set -euo pipefail
exec python -m mocosfl_jax.train "$@"
