# syntax=docker/dockerfile:1
#
# Two images:
#   docker build --target service -t curvature-service .    the API: no torch
#   docker build --target worker -t curvature-worker .      the worker: torch and the engine
#
# On Linux, the torch wheel that pip finds by default brings CUDA: several GB, and it computes on the CPU as well. For a
# small CPU-only image, name the index of CPU wheels that PyTorch's installation page gives:
#   docker build --target worker --build-arg TORCH_INDEX_URL=… -t curvature-worker .
#
# Dependencies are installed before the sources are copied: a change of code rebuilds, and uploads, a small layer only.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm


# What both images run on.
FROM ${PYTHON_IMAGE} AS base
# tini passes SIGTERM on and buries orphans. Versions are those of the Debian release that the tag pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# One user id in both images: they share the volume of objects. A new named volume takes over the owner of /data.
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin curvature \
    && install --directory --owner=curvature --group=curvature /data


# What builds wheels and environments. pip works on /opt/venv from outside, so that no image carries it twice.
FROM base AS build
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --root-user-action=ignore --constraint constraints.txt pip hatchling \
    && python -m venv --without-pip /opt/venv


# Our metadata without our code: what `curvature[service,s3]` and `curvature[worker,s3]` depend on.
FROM build AS metadata
COPY pyproject.toml LICENSE ./
RUN touch README.md \
    && pip wheel --no-build-isolation --no-deps --wheel-dir /wheels .


# Our code alone, in an environment of the same place.
FROM build AS code
COPY pyproject.toml LICENSE README.md ./
COPY client client
COPY protocol protocol
COPY service service
COPY state state
COPY worker worker
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels . \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-index --no-deps /wheels/*.whl


FROM build AS service-dependencies
COPY --from=metadata /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --constraint constraints.txt "$(echo /wheels/*.whl)[service,s3]" \
    && pip --python /opt/venv/bin/python uninstall --yes curvature


FROM build AS worker-dependencies
ARG TORCH_INDEX_URL
# torch's CUDA libraries are not in constraints.txt; torch itself names their exact versions.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${TORCH_INDEX_URL}" ]; then \
        pip --python /opt/venv/bin/python install --no-deps --index-url "${TORCH_INDEX_URL}" \
            "$(grep '^torch==' constraints.txt)"; \
    fi
COPY --from=metadata /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/venv/bin/python install --constraint constraints.txt "$(echo /wheels/*.whl)[worker,s3]" \
    && pip --python /opt/venv/bin/python uninstall --yes curvature


FROM base AS service
COPY --from=service-dependencies /opt/venv /opt/venv
COPY --from=code /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Whether the process answers. (/v1/ready also asks for all its parts, and a worker may come later.)
HEALTHCHECK --interval=5s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v1/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "python", "-m", "curvature_service", "--host", "0.0.0.0", "--port", "8000"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="curvature-service" \
      org.opencontainers.image.description="The API of the curvature service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM base AS worker
# The worker's child confines itself with Landlock (no library needed) and seccomp (libseccomp).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libseccomp2 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=worker-dependencies /opt/venv /opt/venv
COPY --from=code /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /data
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "python", "-m", "curvature_worker"]
CMD ["--device", "cpu"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="curvature-worker" \
      org.opencontainers.image.description="A worker of the curvature service: torch and the engine" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
