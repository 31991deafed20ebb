#!/bin/bash
# From pictures to FID: train, draw 50,000 pictures, evaluate. Submit it, and submit it again whenever its time was up:
# each part goes on where it stopped, and a part that is done is passed over.
#
#     sbatch docs/imagenet.sh                              # with `--nodes 2`, on two machines
#     GPUS=4 bash docs/imagenet.sh                         # without SLURM: GPUs of this machine
#
# Start it in the repository's folder, with its environment activated. What can be set, as in `OUT=runs/try sbatch ...`:
#     IMAGENET   the training pictures: a folder of class folders, or a tar
#     TRAIN      flags of train.py but --out and --steps      OUT     folder of the run, seen by all machines
#     STEPS      of training                                  SAMPLE  flags of sample.py but --num and --npz
#     REFERENCE  of the FID, ADM's npz                        EVAL    flags of eval_fid.py
#     GPUS       processes on each machine                    NUM     pictures to draw
#SBATCH --job-name=pixnerd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Five minutes before the end all processes are told to save:
#SBATCH --signal=TERM@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
OUT=${OUT:-runs/XL} STEPS=${STEPS:-800000} GPUS=${GPUS:-8} NUM=${NUM:-50000}
TRAIN=${TRAIN:---size XL --repa 0.5} SAMPLE=${SAMPLE:-} EVAL=${EVAL:-}
REFERENCE=${REFERENCE:-VIRTUAL_imagenet256_labeled.npz}

if [[ $REFERENCE == *.npz && ! -e $REFERENCE ]]; then  # now, not after days of training
    echo "REFERENCE $REFERENCE is not here: see docs/gpus.md for its address" >&2
    exit 1
fi

# The "--" keeps torchrun, which completes shortened flags, from taking --num for its own --numa-binding.
launch() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$GPUS" --shutdown-timeout 240 --rdzv_backend c10d \
            --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$(scontrol show hostnames | head -n 1):29500" -- "$@"
    else
        torchrun --standalone --nproc_per_node "$GPUS" -- "$@"
    fi
}

# A run that is stopped saves and ends in good order: only its log tells whether it has come to its last step.
trained() { [[ -e $OUT/last.pt ]] && tail -n 1 "$OUT/metrics.jsonl" | grep -q "^{\"step\": $STEPS,"; }

# shellcheck disable=SC2086  # the flags are several words
trained || launch train.py $TRAIN --steps "$STEPS" --out "$OUT" || echo "training ended with status $?" >&2
trained || { echo "$OUT has not reached step $STEPS: submit this again" >&2; exit 1; }
SAMPLES=$OUT/samples-$STEPS.npz
# shellcheck disable=SC2086
[[ -e $SAMPLES ]] || launch sample.py --ckpt "$OUT/last.pt" --num "$NUM" --npz "$SAMPLES" $SAMPLE
# shellcheck disable=SC2086
launch eval_fid.py "$REFERENCE" "$SAMPLES" $EVAL
