#!/usr/bin/env bash
# One machine with several GPUs, and one run for each seed, on a GPU of its own: a step of 100 images does not fill
# several. Each GPU takes the next seed when it is free. At the end there is a table with means over the seeds.
#
#     launch/seeds.sh GPUS FOLDER SEED... -- [arguments of mocosfl_jax.train]
#     launch/seeds.sh 8 runs/noniid 1 2 3 4 5 6 7 8 -- --config=configs/cifar10_noniid.py:100
#
# The run of seed S is in FOLDER/seed_S, and what it prints in FOLDER/seed_S.log. GPUs are those that
# CUDA_VISIBLE_DEVICES names, or 0 to GPUS - 1. Without GPUs, as many processes share the CPU. The same command
# resumes runs that were stopped. The status is 0 only if every run is finished. Needs GNU xargs.
set -uo pipefail

usage() {
  echo "error: $1; usage: launch/seeds.sh GPUS FOLDER SEED... -- [arguments of mocosfl_jax.train]" >&2
  exit 2
}

[ $# -ge 2 ] || usage "found $# arguments"
gpus=$1 folder=$2
shift 2
[[ $gpus =~ ^[1-9][0-9]*$ ]] || usage "GPUS: found '$gpus', allowed: a number, 1 or more"
seeds=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  [[ $1 =~ ^[0-9]+$ ]] || usage "SEED: found '$1', allowed: numbers, and -- before other arguments"
  seeds+=("$1")
  shift
done
[ ${#seeds[@]} -gt 0 ] || usage "SEED is missing"
[ $# -eq 0 ] || shift
export DEVICES=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}
IFS=, read -ra devices <<<"$DEVICES"
[ "$gpus" -le ${#devices[@]} ] || usage "GPUS: found $gpus, allowed: at most ${#devices[@]} (CUDA_VISIBLE_DEVICES)"
mkdir -p "$folder" || exit 2

# xargs keeps GPUS processes at work, appends a seed to the arguments of each, and says in which of its places it is.
train='
IFS=, read -ra devices <<<"$DEVICES"
export CUDA_VISIBLE_DEVICES=${devices[$SLOT]}
folder=$1 seed=${!#}
run=$folder/seed_$seed
echo "GPU $CUDA_VISIBLE_DEVICES: seed $seed, $run.log"
python -m mocosfl_jax.train "${@:2:$#-2}" --config.seed="$seed" --workdir="$run" >>"$run.log" 2>&1 && exit
echo "seed $seed: status $?: $(tail -n 1 "$run.log")" >&2
exit 1
'
printf '%s\n' "${seeds[@]}" |
  xargs -n 1 -P "$gpus" --process-slot-var=SLOT bash -c "$train" seeds.sh "$folder" "$@"
status=$?
python -m mocosfl_jax.table "$folder" --out="$folder/table.md" || status=$?
exit $status
