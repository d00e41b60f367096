"""Strict settings for every test: four CPU devices, no silent broadcasting, compiled programs kept between runs."""

import importlib.util
import os
import pathlib
from collections.abc import Iterator

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moe_jax" / "tests"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers for every test that asks."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of a real model, downloaded once (93 MB); without a network, tests that need it are skipped.

    Under MOE_JAX_REQUIRE_PARITY=1, which CI sets, they fail instead.
    """
    from moe_jax.data.smollm2 import fetch_smollm2

    try:
        return fetch_smollm2()
    except RuntimeError as error:
        if os.environ.get("MOE_JAX_REQUIRE_PARITY") == "1":
            raise
        pytest.skip(f"the real model is not tested: {error}")


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Unloads a module's compiled programs when it is done: thousands of them take many gigabytes."""
    yield
    jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `parity` tests where torch or transformers is missing, which is most people's environment.

    They are an extra of gigabytes. CI installs it and sets MOE_JAX_REQUIRE_PARITY=1, under which they fail instead.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing and item.get_closest_marker("parity"):
        verdict = pytest.fail if os.environ.get("MOE_JAX_REQUIRE_PARITY") == "1" else pytest.skip
        verdict(f"parity is not tested: {' and '.join(missing)} not installed (pip install 'moe_jax[parity]')")


def pytest_terminal_summary(terminalreporter) -> None:
    """Says loudly that parity was not tested, since a letter `s` among hundreds of dots is easily missed."""
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if "parity is not tested" in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"PARITY NOT TESTED: {len(skipped)} tests, {skipped[0].longrepr[2]}", red=True)
