# The default run on the CPU, or a profile on a card: docs/container.md.
ARG IMAGE=ubuntu:24.04
FROM ${IMAGE}

# The card that the image is for, as nvidia-smi says it (name, compute capability, lowest driver): none is there while an
# image is built. Empty: the CPU.
ARG CARD=""
ARG PROFILE=tiny

# hadolint ignore=DL3008 # versions of Ubuntu's packages vanish from its archive
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /medical-reasoner
COPY . .
# DVC needs a git repository; a ZIP has none.
RUN { [ -d .git ] || git init --quiet; } \
    && cp "profiles/$PROFILE.yaml" params.yaml \
    && make setup GPU="${CARD:+1}" CARD="$CARD" \
    && rm -rf ~/.cache

CMD ["make", "repro"]
