# One Dockerfile for all images; `python3 hack/image build` fills in the arguments (docs/images.md).
#   operator    no torch
#   worker-cpu  torch without an accelerator, the tiny model in /models/tiny
#   worker      ROCm: torch and Triton are the base image's own
# Layers from the slowest-changing up: base, torch, dependencies, model, our code.
ARG BASE=python:3.12-slim
ARG ROCM_BASE=rocm/pytorch:latest

# The user has a name because getpass.getuser(), which torch calls, raises without one.
FROM ${BASE} AS base
RUN python3 -m venv --without-pip /opt/tilefleet \
 && echo 'tilefleet:x:65532:65532:tilefleet:/tmp:/usr/sbin/nologin' >>/etc/passwd \
 && echo 'tilefleet:x:65532:' >>/etc/group \
 && mkdir -p /app /var/lib/tilefleet && chown 65532:65532 /var/lib/tilefleet
ENV PATH=/opt/tilefleet/bin:$PATH PYTHONPATH=/app HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /tmp
COPY --chmod=0644 hack/image/bytecode.py hack/image/dependencies.py locks/uv.txt /opt/tilefleet/build/

# Byte code is compiled here and never checked against the sources again: the root file system is
# read-only, and an image's time stamps say nothing.
FROM base AS operator
ARG UV_CACHE_DIR=/root/.cache/uv
COPY --chmod=0644 locks/operator.txt /opt/tilefleet/build/operator.txt
RUN --mount=type=cache,target=/opt/uv --mount=type=cache,target=/root/.cache/uv \
    python /opt/tilefleet/build/dependencies.py /opt/tilefleet/build/operator.txt
LABEL org.opencontainers.image.title="tilefleet operator" \
      org.opencontainers.image.description="Kubernetes operator for LLM inference fleets" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 8080 8081
ENTRYPOINT ["python", "-m", "tilefleet_operator"]
COPY --chmod=0755 operator/tilefleet_operator /app/tilefleet_operator
RUN python /opt/tilefleet/build/bytecode.py /app
USER 65532:65532

FROM base AS torch-cpu
ARG UV_CACHE_DIR=/root/.cache/uv
ARG TORCH_SOURCE=auto
COPY --chmod=0644 locks/torch.txt hack/image/elf_slim.py hack/image/elf_stub.py \
     hack/image/torch_layer.py /opt/tilefleet/build/
RUN --mount=type=cache,target=/opt/uv --mount=type=cache,target=/root/.cache/uv \
    python /opt/tilefleet/build/torch_layer.py ${TORCH_SOURCE}

FROM torch-cpu AS worker-cpu
ARG UV_CACHE_DIR=/root/.cache/uv
COPY --chmod=0644 locks/worker.txt /opt/tilefleet/build/worker.txt
RUN --mount=type=cache,target=/opt/uv --mount=type=cache,target=/root/.cache/uv \
    python /opt/tilefleet/build/dependencies.py /opt/tilefleet/build/worker.txt
ENV HF_HOME=/var/lib/tilefleet/huggingface
LABEL org.opencontainers.image.title="tilefleet worker, CPU" \
      org.opencontainers.image.description="LLM engine of tilefleet with torch for the CPU" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 8000 8001
ENTRYPOINT ["python", "-m", "tilefleet_worker"]
COPY --chmod=0755 examples/tiny-model/model /models/tiny
COPY --chmod=0755 worker/tilefleet_worker /app/tilefleet_worker
RUN python /opt/tilefleet/build/bytecode.py /app
USER 65532:65532

# The vendor's site-packages are named in a .pth file, not inherited: ROCm images keep torch in a
# virtual environment of their own, which --system-site-packages of a second one would not see.
FROM ${ROCM_BASE} AS worker
USER 0
ARG UV_CACHE_DIR=/root/.cache/uv
RUN vendor=$(python3 -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))') \
 && python3 -m venv --without-pip /opt/tilefleet \
 && echo "$vendor" >"$(/opt/tilefleet/bin/python -c 'import site; print(site.getsitepackages()[0])')/vendor.pth" \
 && { grep -q :65532: /etc/passwd || echo 'tilefleet:x:65532:65532:tilefleet:/tmp:/usr/sbin/nologin' >>/etc/passwd; } \
 && mkdir -p /app /var/lib/tilefleet && chown 65532:65532 /var/lib/tilefleet
ENV PATH=/opt/tilefleet/bin:$PATH PYTHONPATH=/app HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    TRITON_CACHE_DIR=/var/lib/tilefleet/triton TILEFLEET_KERNELS=/opt/tilefleet/kernels \
    HF_HOME=/var/lib/tilefleet/huggingface
WORKDIR /tmp
COPY --chmod=0644 hack/image/bytecode.py hack/image/dependencies.py locks/uv.txt locks/worker.txt \
     /opt/tilefleet/build/
RUN --mount=type=cache,target=/opt/uv --mount=type=cache,target=/root/.cache/uv \
    python /opt/tilefleet/build/dependencies.py /opt/tilefleet/build/worker.txt
LABEL org.opencontainers.image.title="tilefleet worker" \
      org.opencontainers.image.description="LLM engine of tilefleet on the ROCm build of torch" \
      org.opencontainers.image.licenses="Apache-2.0"
EXPOSE 8000 8001
ENTRYPOINT ["python", "-m", "tilefleet_worker"]
COPY --chmod=0755 worker/tilefleet_worker /app/tilefleet_worker
RUN python /opt/tilefleet/build/bytecode.py /app
# For the named shapes; other models compile theirs at their first start. No GPU is needed.
RUN python -m tilefleet_worker kernels build --arch gfx942 --arch gfx950 --cache /opt/tilefleet/kernels \
 && chmod -R a+rX /opt/tilefleet/kernels
USER 65532:65532
