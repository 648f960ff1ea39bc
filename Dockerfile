# The same steps as `make setup`, in an image. Build: docker build -t onellm_dist .
# GPUs need only the host's driver: torch's wheels bring CUDA.
FROM debian:12-slim

RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/onellm_dist
COPY . .
ENV PIP_NO_CACHE_DIR=1
RUN make setup PYTHON=python3
ENV PATH=/opt/onellm_dist/.venv/bin:$PATH
ENTRYPOINT ["onellm"]
CMD ["--help"]
