#!/bin/bash
# GPT-2 on N nodes under Slurm: one torchrun per node, one process per GPU. docs/clusters.md explains it.
#
#   RECIPE=gpt2_124m DATA=/shared/data/fineweb_edu RUN=/shared/runs/gpt2 sbatch --nodes=4 deploy/slurm.sh
#
# What stands behind the script's name goes to `regpt2 train`: ... deploy/slurm.sh --optim.lr 1e-3
# Every #SBATCH line can be overruled on the command line of sbatch.
#SBATCH --job-name=regpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one torchrun, which starts the processes of its node
#SBATCH --gpus-per-node=8
#SBATCH --exclusive             # all cores of the node: the GPUs' neighbors would only slow all ranks down
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # 300 s before the end torchrun gets SIGTERM: every rank saves and leaves
#SBATCH --requeue               # a dead node or a preemption puts the job back into the queue
#SBATCH --output=regpt2-%j.log
#SBATCH --open-mode=append      # one log for all stretches of the job
set -uo pipefail

: "${RECIPE:=gpt2_124m}"
: "${DATA:?the folder with the shards, on a disk that all nodes share}"
: "${RUN:?the run folder, on a disk that all nodes share}"
: "${PYTHON:=python}"           # the one that has regpt2, at the same path on all nodes
: "${RANKS_PER_NODE:=gpu}"      # gpu: as many as torch sees

# Where the agents meet. The port comes from the job, so that two jobs can share a first node.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
mkdir -p "$RUN/logs"

# Threads per rank, the same on every stretch: with another number the bits of a resumed run would differ.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# How long torchrun lets the ranks save before it kills them; by itself 30 s (torch/distributed/launcher/api.py).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
# Where NCCL's flight recorder leaves the last collectives of each rank when one times out, by itself below /tmp or
# the home folder. That it records, and that a timeout ends the rank, is the default
# (torch/csrc/distributed/c10d/FlightRecorder.hpp, ProcessGroupNCCL.hpp) and needs no variable.
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$RUN/logs/nccl_rank_}"

newest_checkpoint() {
  local found=("$RUN"/checkpoints/step-*)
  echo "${found[-1]}"
}
before=$(newest_checkpoint)

# --wait, --kill-on-bad-exit=0: the others have a minute after the first torchrun has left, to finish what they write.
# --cpus-per-task: srun would give a step one core only.
srun --wait=60 --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" \
  "$PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:$port" \
  --log-dir "$RUN/logs" --tee 3 \
  -m regpt2 -- train "$RECIPE" --data "$DATA" --run "$RUN" "$@" && exit

# Stopped or broken. Go on in the queue as long as each stretch gets further: a mistake is not repeated for ever.
if [[ $(newest_checkpoint) == "$before" ]]; then
  echo "no new checkpoint in this stretch: the job is not requeued; the cause is above and in $RUN/logs" >&2
  exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
