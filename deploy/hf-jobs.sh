#!/bin/sh
# Hugging Face Jobs, results in a bucket (hf buckets create you/qlora). `deploy/hf-jobs.sh --dry-run` only shows the job.
# The image's entrypoint is named in full: whether Jobs keep it is not documented. The home folder is the machine's own disk.
set -eu

exec hf jobs run "$@" \
    --name qlora \
    --flavor l40sx1 \
    --timeout 24h \
    --attempts 4 \
    --detach \
    --secrets HF_TOKEN \
    --volume hf://buckets/you/qlora:/data \
    --env MODEL_ID=Qwen/Qwen2.5-1.5B-Instruct \
    --env 'DATASETS=mlabonne/FineTome-100k?split=train[:20000]' \
    --env OUTPUT_URI=/data/runs \
    --env HF_HOME=/tmp/huggingface \
    --env GRACE_SECONDS=20 \
    --env MAX_HOURS=23 \
    -- ghcr.io/you/qlora-job:0.1.0 /usr/bin/tini -s -g -- /job/entrypoint.sh run
