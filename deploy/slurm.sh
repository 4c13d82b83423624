#!/bin/bash
# GPT-2 on N nodes under Slurm: one torchrun per node, one process per GPU. docs/clusters.md explains it.
#
#   RECIPE=gpt2_124m DATA=/shared/data/fineweb_edu RUN=/shared/runs/gpt2 sbatch --nodes=4 deploy/slurm.sh
#
# Arguments after the script's name go to `regpt2 train`: ... deploy/slurm.sh --optim.lr 1e-3
# Options of sbatch on the command line override the #SBATCH lines.
#SBATCH --job-name=regpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun, which starts the processes of its node
#SBATCH --gpus-per-node=8
#SBATCH --exclusive             # all cores of the node, because other jobs on it would slow down all ranks
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # 300 s before the end torchrun gets SIGTERM; every rank saves and exits
#SBATCH --requeue               # a dead node or a preemption requeues the job
#SBATCH --output=regpt2-%j.log
#SBATCH --open-mode=append      # one log for all attempts of the job
set -uo pipefail

: "${RECIPE:=gpt2_124m}"
: "${DATA:?the folder with the shards, on a disk that all nodes share}"
: "${RUN:?the run folder, on a disk that all nodes share}"
: "${PYTHON:=python}"           # the one that has regpt2, at the same path on all nodes
: "${RANKS_PER_NODE:=gpu}"      # gpu: as many as torch sees

# The agents' rendezvous. The port comes from the job's id, so two jobs can share a first node.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
mkdir -p "$RUN/logs"

# Threads per rank, the same in every attempt, because another number would change the bits of a resumed run.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# How long torchrun lets the ranks save before it kills them; default 30 s (torch/distributed/launcher/api.py).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
# Where NCCL's flight recorder writes the last collectives of each rank when one times out; default below /tmp or
# the home folder. It records by default, and by default a timeout ends the rank
# (torch/csrc/distributed/c10d/FlightRecorder.hpp, ProcessGroupNCCL.hpp), so neither needs a variable.
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$RUN/logs/nccl_rank_}"

newest_checkpoint() {
  local found=("$RUN"/checkpoints/step-*)
  echo "${found[-1]}"
}
before=$(newest_checkpoint)

# --wait, --kill-on-bad-exit=0: when the first torchrun has exited, the others have a minute to finish writing.
# --cpus-per-task: without it srun gives a step only one core.
srun --wait=60 --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
  "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:$port" \
  --log-dir "$RUN/logs" --tee 3 \
  -m regpt2 -- train "$RECIPE" --data "$DATA" --run "$RUN" "$@" && exit

# Interrupted or failed. Requeue only while each attempt makes progress, so that an error is not repeated for ever.
if [[ $(newest_checkpoint) == "$before" ]]; then
  echo "no new checkpoint in this attempt: the job is not requeued; the cause is above and in $RUN/logs" >&2
  exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
