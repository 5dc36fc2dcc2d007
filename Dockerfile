# One rank, or all ranks of one machine:
#   docker build -t ddp .
#   docker run --rm --network host -v "$PWD/runs:/home/app/runs" ddp train --data shapes --nproc-per-node 2
#   docker run --rm --network host -e MASTER_ADDR=10.0.0.1 -e MASTER_PORT=29500 -e WORLD_SIZE=2 -e RANK=0 ddp
# Without a GPU, a smaller image from an index that holds CPU-only builds of torch and torchvision:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=URL -t ddp .
FROM python:3.11-slim-bookworm

# pip reads this from the environment of each RUN; empty means none.
ARG PIP_EXTRA_INDEX_URL=""

RUN groupadd --gid 1000 app && useradd --uid 1000 --gid app --create-home app
WORKDIR /home/app

# The dependencies have a layer of their own: a change of the code does not install them again.
# requirements.txt only constrains here, so that notebooks and developers' tools stay outside.
COPY pyproject.toml requirements.txt /src/
RUN python -c "import tomllib; print(*tomllib.load(open('/src/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /src/direct.txt \
    && pip install --no-cache-dir --requirement /src/direct.txt --constraint /src/requirements.txt

COPY LICENSE README.md /src/
COPY ddp_lib /src/ddp_lib
RUN pip install --no-cache-dir --no-deps /src \
    && install --directory --owner app --group app data runs

# By number, so that Kubernetes sees that it is not root.
USER 1000:1000
ENV PYTHONUNBUFFERED=1
# The master's port. Gloo and NCCL also listen on ports that the system chooses: use --network host.
EXPOSE 29500
ENTRYPOINT ["ddp-launch"]
CMD ["train"]
