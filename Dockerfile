# syntax: any builder of OCI images (docker, buildah, podman). README.md, "By container", says how to
# run it. For a machine without a GPU, much smaller, from an index that holds CPU-only builds:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=URL -t ddp-training .
FROM python:3.11-slim-bookworm

# pip reads this from the environment of each RUN; empty means none.
ARG PIP_EXTRA_INDEX_URL=""

WORKDIR /home/app

# The dependencies have a layer of their own: a change of the code does not install them again.
# requirements.txt only constrains here, so that developers' tools stay outside.
COPY pyproject.toml requirements.txt /src/
RUN python -c "import tomllib; p = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
      print(*p['dependencies'], *p['optional-dependencies']['notebooks'], sep='\n')" > /src/direct.txt \
    && pip install --no-cache-dir --root-user-action=ignore \
      --requirement /src/direct.txt --constraint /src/requirements.txt

COPY LICENSE README.md /src/
COPY ddp_lib /src/ddp_lib
COPY deploy/container/entrypoint.sh /usr/local/bin/ddp-training
COPY notebooks notebooks
COPY examples examples
# World-writable, as /tmp is: `docker run --user` may name any number.
RUN pip install --no-cache-dir --root-user-action=ignore --no-deps /src \
    && groupadd --gid 1000 app \
    && useradd --uid 1000 --gid app --home-dir /home/app --no-create-home app \
    && mkdir --parents data runs \
    && chown --recursive app:app . \
    && chmod --recursive a+rwX .

# By number, so that Kubernetes sees that it is not root.
USER 1000:1000
# USER: a number that no line of /etc/passwd knows has no name of its own.
ENV HOME=/home/app USER=app PYTHONUNBUFFERED=1 DDP_LIB_CONTAINER=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8888 29500
ENTRYPOINT ["ddp-training"]
CMD ["train"]
