# The whole stack, frozen: Debian's Python 3.11 and every package by hash from requirements.lock (CUDA 12.8 comes with torch's
# wheels; the driver comes from the host through the NVIDIA container toolkit).
#
#   make docker                                   build with docker, podman or buildah
#   docker run imagenet-sd                        the list of commands
#   mkdir -p data cache; docker run --gpus all --user $(id -u):$(id -g) -v $PWD/data:/app/data -v $PWD/cache:/cache \
#       imagenet-sd make generate CLASSES=100
#
# docs/cluster.md has Apptainer, docs/reproducibility.md how the image's digest gets into datasets and checkpoints.

# For a build that repeats to the byte give a digest: --build-arg BASE_IMAGE=debian@sha256:...
ARG BASE_IMAGE=debian:bookworm-20250520-slim
FROM ${BASE_IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcc and Python's headers serve torch.compile; tini passes signals on (docker stop, a preempted job) and reaps children.
# The base's date pins Debian's release; versions of single packages are left to its security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ gcc libc6-dev make python3.11 python3.11-dev python3.11-venv tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# An ordinary user; folders that hold results and caches can be written by any user id (docker run --user, Apptainer).
RUN useradd --uid 1000 --create-home --shell /bin/bash app \
    && install -d -m 1777 /app/data /app/runs /cache \
    && chmod 1777 /home/app

# 8 GB of wheels: a layer of their own, built again only when the lock changes. The stamp is the Makefile's: inside the
# image `make` finds its environment ready and installs nothing.
ENV VENV=/opt/venv
COPY requirements.lock /app/requirements.lock
RUN python3.11 -m venv "$VENV" \
    && "$VENV/bin/pip" install --no-cache-dir --no-compile --disable-pip-version-check --no-deps --require-hashes \
        -r /app/requirements.lock \
    && touch "$VENV/.installed-$(cksum < /app/requirements.lock | cut -d' ' -f1)"

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/app \
    USER=app \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The source last: it changes most often. It belongs to root: a run cannot alter the code it is recorded with.
WORKDIR /app
COPY . /app

ARG VERSION=dev
ARG GIT_COMMIT=unknown
ENV GIT_COMMIT=${GIT_COMMIT}
LABEL org.opencontainers.image.title="imagenet-sd" \
      org.opencontainers.image.description="Train ImageNet classifiers on Stable Diffusion images, judge them on real ones" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${GIT_COMMIT}" \
      org.opencontainers.image.licenses="MIT"

VOLUME ["/app/data", "/app/runs", "/cache"]
# By number: a cluster that refuses root can tell without looking names up.
USER 1000
ENTRYPOINT ["tini", "--"]
CMD ["make", "help"]
