# An image for training on NVIDIA GPUs:
#   docker build -t bagel_ds .
#   docker run --gpus all --shm-size=1g --ulimit memlock=-1 -v "$PWD:/work" bagel_ds bagel-ds doctor
# torch brings CUDA's libraries, so only the host's driver must suit it (`bagel-ds doctor` compares them). DeepSpeed's C++
# ops are compiled at the first run with offload; a volume at /opt/torch_extensions keeps them.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

# ssh and pdsh start ranks on other hosts.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ openssh-client pdsh python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv TORCH_EXTENSIONS_DIR=/opt/torch_extensions

WORKDIR /opt/bagel_ds
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"

COPY pyproject.toml README.md LICENSE NOTICE ./
COPY bagel_ds ./bagel_ds
COPY ds_configs ./ds_configs
COPY launch ./launch
RUN pip install --no-cache-dir -c constraints.txt ".[video,wandb,qlora]"
RUN mkdir -p /opt/torch_extensions && bagel-ds --version

WORKDIR /work
