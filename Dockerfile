# mokd_det on an NVIDIA GPU, with Detectron2 and its operators built from source.
#
#   docker build -t mokd_det .
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/datasets:/workspace/datasets" -v "$PWD/output:/workspace/output" mokd_det
#
# NOT BUILT by the project so far: its machines have no Docker and no network but package registries.
# The base image must have the CUDA version that its PyTorch was built with, and a compiler (devel).
ARG BASE=pytorch/pytorch:2.7.1-cuda12.6-cudnn9-devel
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends git g++ ninja-build libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

# Compute capabilities to build the operators for: Volta to Hopper. Fewer build faster.
ENV TORCH_CUDA_ARCH_LIST="7.0;7.5;8.0;8.6;8.9;9.0" FORCE_CUDA=1
ARG DETECTRON2=git+https://github.com/facebookresearch/detectron2.git
RUN pip install --no-cache-dir setuptools wheel \
    && pip install --no-cache-dir --no-build-isolation "${DETECTRON2}"

COPY . /opt/mokd_det
RUN pip install --no-cache-dir "/opt/mokd_det[timm,onnx]" && python -c "import mokd_det.compat, detectron2._C"

WORKDIR /workspace
CMD ["bash"]
