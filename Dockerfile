# CPU image: docker build -t moe_jax . && docker run -v "$PWD/runs:/moe_jax/runs" moe_jax
FROM python:3.11-slim
WORKDIR /moe_jax
# The dependencies first: they change less often than the code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY moe_jax/__init__.py moe_jax/__init__.py
RUN pip install --no-cache-dir -c constraints.txt -e .
COPY . .
CMD ["python", "-m", "experiments.evolve_topology"]
