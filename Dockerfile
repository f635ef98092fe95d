# A student in a container:
#   docker build -t latentforge .
#   docker run -p 7860:7860 -e LATENTFORGE_API_KEY=... -v $PWD/checkpoints/student:/model latentforge
# Another torch, for a GPU: --build-arg TORCH="torch==2.13.0"
FROM python:3.12-slim

ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
WORKDIR /app
RUN useradd --create-home --uid 1000 user
# first what changes rarely
RUN pip install --no-cache-dir ${TORCH}
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY modeling_latentforge modeling_latentforge
COPY trainers trainers
COPY model_cards model_cards
COPY scripts scripts
RUN pip install --no-cache-dir '.[serve]'

USER user
EXPOSE 7860
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
# SIGTERM ends it with 0 when what has begun is finished
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "scripts/serve.py", "--host", "0.0.0.0"]
CMD ["--model", "/model"]
