#!/usr/bin/env bash
# Train and sample in an image as its documentation says: an unknown user id, a read-only root, no network.
# Usage: bash docker/smoke.sh IMAGE
set -euo pipefail
image=$1
runs=$(docker volume create)
trap 'docker volume rm "$runs" >/dev/null' EXIT

run() {
  docker run --rm --init --read-only --tmpfs /tmp --network none --shm-size 1g --user 12345:12345 \
    -v "$runs:/project/runs" "$image" "$@"
}

run fit --config experiments/ncsn.yaml --trainer.accelerator cpu --trainer.max_images 640 --run_dir runs/smoke \
  --model.init_args.sampler.init_args.steps_per_level 1
run sample --ckpt_path runs/smoke/checkpoints/last.ckpt --num_samples 4 --out runs/smoke/samples.npz
run evaluate --samples runs/smoke/samples.npz --reference Digits --out runs/smoke/samples.json
