# unmask in a container.
#
#   docker build -t unmask .                                    CPU
#   docker build -t unmask:cuda --build-arg TORCH=cu130 .       NVIDIA GPUs
#   docker run --rm -it --init --user "$(id -u):$(id -g)" -v "$PWD:/work" unmask demo
#   docker run --rm -it --init --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" unmask:cuda pretrain PHOTOS --out runs/a
#
# TORCH: which build of torch to install, a folder of https://download.pytorch.org/whl: cpu, cu126, cu130, ...
# The CUDA libraries are part of those wheels, so one base image serves all; the host provides only the driver and the
# NVIDIA container toolkit. `docker stop` sends SIGTERM: training writes a checkpoint, exits with 75, and `unmask resume`
# continues; allow it more than ten seconds (`docker stop -t 60`).

FROM python:3.11-slim

ARG TORCH=cpu
ARG EXTRAS=tiff,detect,onnx

# HOME and USER: so that any --user, also one without an entry in /etc/passwd, has a place for caches.
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=unmask

# train.compile=true needs a C++ compiler, on a GPU too.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/unmask
COPY pyproject.toml constraints.txt README.md LICENSE ./

# torch in a layer of its own: it is large and changes seldom. Of 2.13.0 and 2.13.0+cpu pip prefers the latter.
RUN python -m pip install --constraint constraints.txt \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch \
    && python -c "import torch; print(torch.__version__); assert torch.__version__.endswith('+${TORCH}')"

COPY src ./src
RUN python -m pip install --constraint constraints.txt ".[${EXTRAS}]" && unmask --version

WORKDIR /work
STOPSIGNAL SIGTERM
ENTRYPOINT ["unmask"]
CMD ["--help"]
