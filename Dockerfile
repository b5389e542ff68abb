# The command nidl-dcl as a BIDS App; docs/docker.md says how to build and run it.

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY nidl_dcl ./nidl_dcl
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="nidl_dcl" \
      org.opencontainers.image.description="From a BIDS dataset of 3D brain MRI to embeddings and phenotype predictions" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="BSD-3-Clause AND CC-BY-SA-3.0"

# Where pip looks, too. The index of PyTorch's CPU builds makes an image without CUDA libraries.
ARG PIP_EXTRA_INDEX_URL

# The largest part has a layer of its own, which a change of nidl_dcl leaves as it is.
COPY constraints.txt /
RUN pip install --no-cache-dir --constraint /constraints.txt torch

COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /constraints.txt "$(echo /wheels/*.whl)[harmonize,parquet,preprocess]" \
    && useradd --create-home --uid 1000 nidl \
    && chmod 1777 /home/nidl

# For whoever the container is run as (docker run --user): a home to write to, and a name, which MONAI
# asks for and which a user number alone has not.
ENV HOME=/home/nidl USER=nidl
WORKDIR /home/nidl
USER 1000
ENTRYPOINT ["nidl-dcl"]
