#!/bin/sh
# From the container's arguments to one process: `run` and its kin are the job's, anything else is a command of its own.
# On the way it picks folders that nobody named: results and downloads on a mounted volume, work on the local disk.
# Secrets from files (HF_TOKEN_FILE) and which of several machines this is are read in Python.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# Is a setting given? What is exported here would win over the env file, so the file is asked too.
given() {
    [ -n "$(printenv "$1")" ] || grep -Eqs "^[[:space:]]*(export[[:space:]]+)?$1[[:space:]]*=[[:space:]]*[^[:space:]]" "${JOB_ENV_FILE:-.env}"
}

# Does a folder lie on a disk of its own? An empty folder where a volume belongs goes with the container.
mounted() {
    [ -d "$1" ] && [ "$(df -P -- "$1" 2>/dev/null | sed -n '$s/.* //p')" != / ]
}

# Without a command this is the job; where RunPod's serverless queue started the container, its worker.
if [ $# = 0 ]; then
    set -- run
    [ -z "${RUNPOD_WEBHOOK_GET_JOB:-}" ] || set -- serve
fi

# RunPod: serverless workers, then pods and clusters. SageMaker. Everybody else. Any other place is VOLUME_ROOT's to name.
volume=${VOLUME_ROOT:-}
if [ -z "$volume" ]; then
    for folder in /runpod-volume /workspace /opt/ml/checkpoints /data /mnt; do
        if mounted "$folder"; then
            volume=$folder
            break
        fi
    done
elif [ "$1" = serve ] && ! mounted "$volume"; then
    volume=
fi
volume=${volume%/}

if ! { [ -d "${HOME:-}" ] && [ -w "$HOME" ]; }; then # `--user 1000` or `--read-only`, say
    local_disk=/tmp/qlora-job
    given WORK_DIR || export WORK_DIR="$local_disk"
    export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$local_disk/.cache}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local_disk/triton}"
    export LOGNAME="${LOGNAME:-job}" # torch names a cache after the user, who may have no line in /etc/passwd
fi

# Downloads outlive the container where they can. Not on SageMaker: what lies there is copied to S3, base models too.
if [ -n "$volume" ] && [ "$volume" != /opt/ml/checkpoints ] && ! given HF_HOME; then
    if [ -w "$volume/huggingface-cache/hub" ]; then # RunPod's cached models
        export HF_HOME="$volume/huggingface-cache"
    elif [ -w "$volume" ]; then
        export HF_HOME="$volume/.cache/huggingface"
    fi
fi

# A volume that cannot be written is named all the same: the job then says so, instead of losing a run on the container's disk.
if ! given OUTPUT_URI; then
    if [ -n "$volume" ]; then
        export OUTPUT_URI="$volume/runs"
    elif [ "$1" != serve ] && ! [ -w . ]; then # `serve` refuses to be without a store
        export OUTPUT_URI=/tmp/qlora-job/runs
        case "$1" in
            run | train | smoke | -*)
                echo "entrypoint: no volume is mounted and OUTPUT_URI is not set: $OUTPUT_URI goes when the container goes" >&2
                ;;
        esac
    fi
fi

case "$1" in
    -*) set -- python -m job run "$@" ;;
    smoke)
        shift
        export RECIPE=smoke
        set -- python -m job run "$@"
        ;;
    train) # SageMaker's word for it
        shift
        set -- python -m job run "$@"
        ;;
    serve)
        shift
        set -- python "$here/runpod/handler.py" "$@"
        ;;
    run | plan | check | prepare | evaluate | publish | history | recipes | settings | bench | submit)
        set -- python -m job "$@"
        ;;
    *) # a misspelt command is the job's to name, and its end is the job's: a pod restarts what dies
        command -v -- "$1" >/dev/null || set -- python -m job "$@"
        ;;
esac
exec "$@"
