# syntax=docker/dockerfile:1

# torch's wheels carry CUDA 13 themselves. The base adds only the compatibility libraries for older drivers.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04
FROM ${BASE}

# gcc, libc6-dev and python3-dev: triton compiles small C launchers while a job runs. tini: signals reach every process, no zombies stay.
# Unpinned (DL3008): the base's release fixes the versions, and exact pins vanish from the archive with each security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# DL3064 takes TOKENIZERS_PARALLELISM for a token.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONPATH=/job \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_XET_HIGH_PERFORMANCE=1 \
    TOKENIZERS_PARALLELISM=false \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /job

# For REPORT_TO; requirements-trackers.txt pins the others too: trackio, mlflow-skinny.
ARG TRACKERS="tensorboard wandb"
COPY requirements.txt requirements-smoke.txt requirements-trackers.txt ./
# SC2086: several names in one argument.
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && pip install --upgrade pip==26.3 \
    && pip install -r requirements.txt -c requirements-trackers.txt ${TRACKERS} \
    && pip install --no-deps -r requirements-smoke.txt

COPY entrypoint.sh LICENSE ./
COPY job/ job/
# Compiled here, because the user who runs it may not write here (`--user 1000`).
RUN python -m compileall -q --invalidation-mode unchecked-hash job
ENV PYTHONDONTWRITEBYTECODE=1

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="qlora-job" \
      org.opencontainers.image.description="A batch job that fine-tunes language models: environment variables in, a LoRA adapter out." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/bin/tini", "-s", "-g", "--", "/job/entrypoint.sh"]
CMD ["run"]
