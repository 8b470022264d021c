#!/usr/bin/env bash
# A toy federation on one machine: a server and some clients, each a process with certificates of its own. The clients
# share the images of one npz file (arrays x_train, y_train, x_test, y_test), which also evaluates.
#
#     launch/clients.sh CLIENTS FILE.npz FOLDER [arguments of mocosfl_jax.serve]
#     launch/clients.sh 5 images.npz runs/federation --config.epochs=3
#
# Client i gets every CLIENTS-th image. What each process prints is in FOLDER/serve.log and FOLDER/join_I.log. The same
# command resumes a run that was stopped.
set -euo pipefail

if [ $# -lt 3 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]] || ! [ -f "$2" ]; then
  echo "error: usage: launch/clients.sh CLIENTS FILE.npz FOLDER [arguments of mocosfl_jax.serve]" >&2
  exit 2
fi
count=$1 file=$2 folder=$3
shift 3
port=${PORT:-8765}
mkdir -p "$folder"
[ -e "$folder/tls" ] || python -m mocosfl_jax.certificates --tls="$folder/tls" --clients="$count"
if ! [ -d "$folder/tls/client-$((count - 1))" ]; then
  echo "error: $folder/tls: found certificates of fewer clients, allowed: $count; remove it, and it is made anew" >&2
  exit 2
fi
python - "$count" "$file" "$folder" <<'PYTHON'
import sys

import numpy as np

count, (file, folder) = int(sys.argv[1]), sys.argv[2:]
with np.load(file, allow_pickle=False) as arrays:
    images = arrays["x_train"]
for client in range(count):
    np.savez(f"{folder}/client_{client}.npz", images=images[client::count])
PYTHON

server=
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
# Ctrl-C reaches the server too, which ends its round and saves.
trap '[ -z "$server" ] || wait "$server" || true; exit 130' INT
python -m mocosfl_jax.serve --config.data.name=npz --config.data.dir="$file" --config.clients.num="$count" \
  --workdir="$folder/run" --listen="127.0.0.1:$port" --tls="$folder/tls" "$@" >>"$folder/serve.log" 2>&1 &
server=$!
for ((client = 0; client < count; client++)); do
  python -m mocosfl_jax.join --server="localhost:$port" --data="$folder/client_$client.npz" \
    --tls="$folder/tls/client-$client" >>"$folder/join_$client.log" 2>&1 &
done
status=0
wait "$server" || status=$?
[ "$status" -ne 0 ] || wait
tail -n 5 "$folder/serve.log"
exit "$status"
