"""Every test runs on 8 fake CPU devices, with strict shapes and a compile cache for the whole session."""

import os
import pathlib

import jax
import jaxlib
import numpy as np
import pytest
from hypothesis import settings

# The same examples in every run, so that a red run says something about the change; `explore` draws new ones.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Also where there is an accelerator: tests count devices, bytes and operations. JAX_PLATFORMS=cuda runs them there.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# A test compiles many programs and runs each for microseconds: without LLVM's optimisation, without the newer emitters
# of loops (of jaxlib 0.10, whose flags these are) and in one piece they compile in a third of the time. What the
# compiler does to memory and collectives, which tests look at, comes before that.
FLAGS = "--xla_backend_optimization_level=0"
if jaxlib.__version__.startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
jax.config.update("jax_numpy_rank_promotion", "raise")
# A cache beside the tests: a second run, and the processes that tests start, compile nothing twice.
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every compiled program holds memory maps, of which a process may have 65,530; a file's are dropped at its end."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
