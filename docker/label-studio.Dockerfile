# Label Studio as published, with the folders and the user id of its official image, so that either can use the volume.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG PIP_INDEX_URL=""
ARG LABEL_STUDIO_VERSION=1.23.2
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN pip install --no-cache-dir "label-studio==${LABEL_STUDIO_VERSION}"
RUN useradd --uid 1001 --gid 0 --home-dir /label-studio --shell /usr/sbin/nologin label-studio \
 && install -d -o 1001 -g 0 -m 0770 /label-studio /label-studio/data
ENV HOME=/label-studio \
    LABEL_STUDIO_BASE_DATA_DIR=/label-studio/data
WORKDIR /label-studio
VOLUME /label-studio/data
USER 1001
EXPOSE 8080
CMD ["label-studio", "start", "--no-browser"]
