# The command with the CUDA extension, on a GPU or without one:
#   docker build -t ccl-fast .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" ccl-fast train --data photos --output runs/photos
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04

# Triton compiles its launchers with the C compiler when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/ccl-fast
ENV PATH=/opt/ccl-fast/bin:$PATH CCL_FAST_CUDA=on

COPY . /tmp/ccl-fast
RUN pip install --no-cache-dir "/tmp/ccl-fast[train]" && rm -rf /tmp/ccl-fast

WORKDIR /work
ENTRYPOINT ["ccl-fast"]
CMD ["--help"]
