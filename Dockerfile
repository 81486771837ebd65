# Debian, its Python 3.11 and one of the locks: the environment alone. The checkout is mounted at /workspace, so a change
# in it rebuilds nothing. docs/container.md tells how to use it.
ARG BASE=debian:bookworm-20250721-slim

FROM ${BASE}

# safe.directory: the checkout belongs to another user than root. It is in the system's file because libgit2, which DVC
# uses, reads no settings from environment variables. DVC's own system file puts its cache on a volume.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates dumb-init git python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && git config --system --add safe.directory '*' \
    && mkdir --mode=1777 /cache /cache/dvc /cache/flatmin \
    && mkdir -p /etc/xdg/dvc \
    && printf '[cache]\n    dir = /cache/dvc\n' > /etc/xdg/dvc/config

# In one layer, which pip has left again (a stage of its own would save nothing and copy gigabytes). Headers and libclang,
# 490 MB, are of use to compilers alone. Bytecode is never checked against its source: nobody can write it. The loader is
# told where NVIDIA's wheels have their libraries: TensorFlow alone does not find all.
ARG LOCK=gpu
COPY requirements/${LOCK}.txt /opt/requirements.txt
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip \
    && python3 -m venv --without-pip /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check --no-compile \
        --no-deps --require-hashes -r /opt/requirements.txt \
    && rm -rf /opt/venv/lib/python3*/site-packages/tensorflow/include /opt/venv/lib/python3*/site-packages/clang \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/venv/lib \
    && find /opt/venv/lib -type d -path '*/nvidia/*/lib' > /etc/ld.so.conf.d/wheels.conf \
    && ldconfig \
    && apt-get purge --yes --auto-remove python3-pip \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

# Any --user can run it: HOME is writable for all, USER stands in for an entry in passwd. $FLATMIN_CACHE keeps what makes
# a rerun quick: resume state, Keras' ImageNet weights, TFDS data sets. The NVIDIA container toolkit reads NVIDIA_*.
ENV PATH=/opt/venv/bin:${PATH} \
    LANG=C.UTF-8 \
    HOME=/tmp \
    USER=flatmin \
    FLATMIN_CACHE=/cache/flatmin \
    KERAS_HOME=/cache/flatmin/keras \
    TFDS_DATA_DIR=/cache/flatmin/tfds \
    MPLCONFIGDIR=/tmp/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/dvc \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache/dvc /cache/flatmin
WORKDIR /workspace
USER 1000:1000
# PID 1 hands every signal to all processes, SIGTERM as SIGINT: on that alone DVC releases its locks. The exit code is the
# command's.
ENTRYPOINT ["dumb-init", "--rewrite", "15:2", "--"]
CMD ["dvc", "repro"]

# Last, so that another commit of the Dockerfile or the locks changes no layer but this.
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="flatmin" \
    org.opencontainers.image.description="Environment of the Flatmin pipeline: Python, TensorFlow, DVC (${LOCK} lock)" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.base.name="${BASE}" \
    org.opencontainers.image.revision="${REVISION}"
