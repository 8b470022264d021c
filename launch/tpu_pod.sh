#!/usr/bin/env bash
# A TPU pod: the same command on all of its hosts. JAX finds the others by what the TPU's machines know.
#
#     TPU=NAME ZONE=ZONE launch/tpu_pod.sh --config=configs/FILE.py --workdir=FOLDER_THAT_ALL_HOSTS_SHARE
#
# On each host before: pip install 'mocosfl-jax[tpu]', and the shared folder mounted (Filestore, or a bucket by
# Cloud Storage FUSE). PROJECT: the folder on the hosts from which the command runs.
set -euo pipefail
command="cd ${PROJECT:-.} && python -m mocosfl_jax.train ${1+$(printf '%q ' "$@")}"
exec gcloud compute tpus tpu-vm ssh "${TPU:?the name of the TPU}" --zone="${ZONE:?its zone}" --worker=all \
  --command="$command"
