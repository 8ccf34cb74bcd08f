# PascalVL with TensorRT 8.6.1 for Pascal cards: Python 3.11, CUDA 12, cuDNN 8.9, all from pip.
#
#   docker build -t pascalvl-tensorrt .
#   docker run --gpus all -v /path/to/models:/models pascalvl-tensorrt doctor
#
# Needs PyPI and NVIDIA's own index while it is built, and the host's driver (branch 525 to 580) with NVIDIA's container
# toolkit when it runs. Never built or run by the project: neither those libraries nor a Pascal card were at hand.
FROM python:3.11-slim-bookworm

# What TensorRT 8.6.1 was made for; its helpers still take np.bool for granted.
RUN pip install --no-cache-dir --extra-index-url https://pypi.nvidia.com \
    tensorrt==8.6.1.post1 tensorrt_bindings==8.6.1 tensorrt_libs==8.6.1 \
    nvidia-cudnn-cu12==8.9.7.29 nvidia-cublas-cu12==12.4.5.8 nvidia-cuda-runtime-cu12==12.4.127 \
    "numpy<2" "ml_dtypes<0.6"

COPY . /pascalvl
RUN pip install --no-cache-dir "/pascalvl[engines,video]"

ENTRYPOINT ["pascalvl"]
