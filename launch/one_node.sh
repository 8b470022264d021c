#!/usr/bin/env bash
# One machine with several GPUs: one process uses them all, and nothing has to be said.
#
#     launch/one_node.sh --config=configs/FILE.py --workdir=FOLDER
set -euo pipefail
exec python -m mocosfl_jax.train "$@"
