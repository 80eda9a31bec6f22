#!/bin/sh
# From the container's arguments to one process: `run` and its kin are the job's, anything else is a command of its own.
# On the way it picks folders that nobody named: results and downloads on a mounted volume, work on the local disk.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

# Is a setting given? What is exported here would win over the env file, so the file is asked too.
given() {
    [ -n "$(printenv "$1")" ] || grep -Eqs "^[[:space:]]*(export[[:space:]]+)?$1[[:space:]]*=" "${JOB_ENV_FILE:-.env}"
}

volume=
for folder in "${VOLUME_ROOT:-}" /runpod-volume /workspace /data; do
    if [ -n "$folder" ] && [ -d "$folder" ] && [ -w "$folder" ]; then
        volume=${folder%/}
        break
    fi
done

if ! { [ -d "${HOME:-}" ] && [ -w "$HOME" ]; }; then # `--user 1000`, say
    local_disk=/tmp/qlora-job
    given WORK_DIR || export WORK_DIR="$local_disk"
    export XDG_CACHE_HOME="${XDG_CACHE_HOME:-$local_disk/.cache}" TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$local_disk/triton}"
    export LOGNAME="${LOGNAME:-job}" # torch names a cache after the user, who may have no line in /etc/passwd
fi

if [ -n "$volume" ]; then
    given OUTPUT_URI || export OUTPUT_URI="$volume/runs"
    given HF_HOME || export HF_HOME="$volume/.cache/huggingface"
elif ! [ -w . ] && ! given OUTPUT_URI; then
    export OUTPUT_URI=/tmp/qlora-job/runs
    echo "entrypoint: no volume is mounted and OUTPUT_URI is not set: $OUTPUT_URI goes when the container goes" >&2
fi

case "${1:-}" in
    "") set -- python -m job run ;;
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
    run | plan | check | prepare | evaluate | publish | history | recipes | settings)
        set -- python -m job "$@"
        ;;
esac
exec "$@"
