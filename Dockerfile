# The image of one stack: exactly the distributions uv.lock names for it, on Ubuntu 24.04's Python, for x86-64.
#
#   docker build --build-arg STACK=torch2.9-tf4.57 --tag wake2vec:torch2.9-tf4.57 --target final .
#
# os -> build (uv; thrown away) ; os -> stack-* (labels) -> final -> test. The big environment is installed in place,
# by a uv that is only mounted: copying it from another stage would double disk and time. Code comes last.
# BASE_IMAGE: the wheels carry CUDA, so any Debian-like base with Python 3.11 to 3.13 gives the same environment.
ARG BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04@sha256:133c78a0575303be34164d0b90137a042172bdf60696af01a3c424ab402d86e2
ARG STACK=torch2.9-tf4.57

FROM ${BASE_IMAGE} AS os
# gcc, libc6-dev and libpython3-dev: Triton compiles a launcher at its first use. tini: signals reach the whole group.
# No versions here: Ubuntu takes old ones away, so a pin would only break the build.
# hadolint ignore=DL3008
RUN [ "$(dpkg --print-architecture)" = amd64 ] || { echo "wake2vec: the lock holds x86-64 wheels only" >&2; exit 1; } \
 && apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev libpython3-dev python3 tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
 && python3 -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit(f"Python {v} is not 3.11..3.13")'

FROM os AS build
ARG UV_VERSION=0.13.9
ARG UV_SHA256=d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3-venv \
 && python3 -m venv /opt/uv \
 && echo "uv==${UV_VERSION} --hash=sha256:${UV_SHA256}" >/opt/uv/requirements.txt \
 && /opt/uv/bin/pip install --no-cache-dir --only-binary :all: --require-hashes -r /opt/uv/requirements.txt
# How the later stages run it. Unchecked-hash bytecode: the default carries the files' times, which differ from build
# to build; the hash seed fixes the order of constant sets in it.
RUN printf 'export %s\n' "PATH=\$PATH:/opt/uv/bin" \
    "UV_CACHE_DIR=/root/.cache/uv UV_PROJECT_ENVIRONMENT=/opt/wake2vec UV_PYTHON=/usr/bin/python3 UV_PYTHON_DOWNLOADS=never" \
    "UV_LINK_MODE=copy UV_LOCKED=1 UV_NO_DEFAULT_GROUPS=1 PYTHONHASHSEED=0 PYC_INVALIDATION_MODE=UNCHECKED_HASH" \
    >/opt/uv/settings

# Each stack's list, and what a registry shows of it. `.ci/lock` writes both, a test reads them.
FROM os AS stack-torch2.9-tf4.57
COPY wake2vec/locks/torch2.9-tf4.57.txt /opt/lock.txt
ENV WAKE2VEC_GROUP=tf4
LABEL wake2vec.torch="2.9.0" wake2vec.transformers="4.57.6" wake2vec.huggingface-hub="0.36.0" \
      wake2vec.lock-sha256="4b09a1846bd95bb6764a9ab057f7d99447a90c4fe408e3262e78dac6aee9f03f"

FROM os AS stack-torch2.10-tf5.0
COPY wake2vec/locks/torch2.10-tf5.0.txt /opt/lock.txt
ENV WAKE2VEC_GROUP=tf5
LABEL wake2vec.torch="2.10.0" wake2vec.transformers="5.0.0" wake2vec.huggingface-hub="1.4.1" \
      wake2vec.lock-sha256="2ab4d5a100a77ee8c98a4a4ba678f889acbb1d14301bb506fe594aedc25d569a"

# hadolint ignore=DL3006
FROM stack-${STACK} AS final
ARG STACK
# From the stack's list, which is all that uv.lock says of it: a bump of the other stack leaves this layer alone.
WORKDIR /tmp/src
RUN --mount=type=cache,target=/root/.cache/uv,sharing=locked \
    --mount=type=bind,from=build,source=/opt/uv,target=/opt/uv \
    . /opt/uv/settings \
 && uv venv /opt/wake2vec \
 && uv pip sync --python /opt/wake2vec --require-hashes --compile-bytecode /opt/lock.txt \
 && echo "$STACK" >/opt/wake2vec/wake2vec-stack
# The plain Ubuntu base has none of the NVIDIA variables. The user may be any uid, even one without an entry: hence
# HOME, USER, and the modes below, which a new volume takes over. OMP: threads that wait by spinning made the demo eight
# times slower on a busy machine.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/wake2vec/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=wake2vec \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRITON_CACHE_DIR=/cache/wake2vec/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/wake2vec/inductor \
    MPLCONFIGDIR=/tmp/matplotlib \
    OMP_WAIT_POLICY=PASSIVE \
    WAKE2VEC_CACHE=/cache/wake2vec \
    WAKE2VEC_RUNS=/runs
RUN groupadd --gid 10001 wake2vec \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /bin/bash wake2vec \
 && mkdir -p /runs /data /cache/huggingface /cache/wake2vec \
 && chown -R 10001:10001 /runs /cache \
 && chmod 1777 /runs /cache/huggingface /cache/wake2vec
COPY --chmod=755 entrypoint.sh deploy/healthcheck.py /usr/local/bin/
# Without uv's cache: it would take an older build of this package for the new one, as it looks at pyproject.toml alone.
# Offline, because this only checks the environment against uv.lock. uv_cache.json holds the time of the build.
RUN --mount=type=bind,from=build,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=pyproject.toml,target=/tmp/src/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/tmp/src/uv.lock \
    --mount=type=bind,source=README.md,target=/tmp/src/README.md \
    --mount=type=bind,source=LICENSE,target=/tmp/src/LICENSE \
    --mount=type=bind,source=wake2vec,target=/tmp/src/wake2vec \
    . /opt/uv/settings \
 && uv sync --no-cache --offline --group "$WAKE2VEC_GROUP" --no-editable \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/wake2vec/lib/python3*/site-packages/wake2vec \
 && sed -i '/uv_cache.json/d' /opt/wake2vec/lib/python3*/site-packages/wake2vec-*.dist-info/RECORD \
 && rm -f /opt/wake2vec/lib/python3*/site-packages/wake2vec-*.dist-info/uv_cache.json /opt/wake2vec/.lock /tmp/*.lock \
 && python -m wake2vec.environment
# `data/` and `runs/` of a recipe are the volumes.
WORKDIR /
USER 10001:10001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=20s --start-period=5m --retries=3 CMD ["healthcheck.py"]
ENTRYPOINT ["tini", "-g", "--", "entrypoint.sh"]
CMD ["wake2vec", "--help"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="wake2vec" \
      org.opencontainers.image.description="Teach a frozen causal language model new words, reproducibly." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}+${STACK}" \
      org.opencontainers.image.revision="${REVISION}"

FROM final AS test
USER 0:0
WORKDIR /tmp/src
# The tools come with a list of their own: the guard then holds this environment to the stack's list plus that.
RUN --mount=type=cache,target=/root/.cache/uv,sharing=locked \
    --mount=type=bind,from=build,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=pyproject.toml,target=/tmp/src/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/tmp/src/uv.lock \
    . /opt/uv/settings \
 && uv sync --group "$WAKE2VEC_GROUP" --group dev --no-install-project --inexact \
 && uv export --quiet --group "$WAKE2VEC_GROUP" --group dev --no-emit-project \
        --no-header --no-annotate --output-file /opt/wake2vec/wake2vec-lock.txt \
 && python -m wake2vec.environment
WORKDIR /opt/wake2vec-tests
COPY . .
USER 10001:10001
ENV PYTEST_ADDOPTS="-p no:cacheprovider"
CMD ["pytest"]
