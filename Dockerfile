# The course with everything compiled: JupyterLab on port 8888.  See docs/anywhere.md.
#   docker build -t qtutor .                                                                              (CPU)
#   docker build -t qtutor --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg CUDA=ON .    (NVIDIA GPU)
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
ARG CUDA=OFF
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends build-essential cmake git python3 python3-venv python3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /course
COPY . .
RUN make install CUDA=${CUDA}
EXPOSE 8888
CMD ["make", "lab", "ARGS=--ip=0.0.0.0 --no-browser"]
