#!/usr/bin/env bash
# A TPU pod: runs the same command on all of its hosts. They find each other by the metadata of the TPU.
#
#     TPU=NAME ZONE=ZONE launch/tpu_pod.sh --config=configs/FILE.py --workdir=FOLDER_THAT_ALL_HOSTS_SHARE
#
# First, on each host: pip install 'mocosfl-jax[tpu]', and mount the shared folder (Filestore, or a bucket with
# Cloud Storage FUSE). PROJECT is the folder on the hosts in which the command runs.
set -euo pipefail
command="cd ${PROJECT:-.} && python -m mocosfl_jax.train ${1+$(printf '%q ' "$@")}"
exec gcloud compute tpus tpu-vm ssh "${TPU:?the name of the TPU}" --zone="${ZONE:?its zone}" --worker=all \
  --command="$command"
