"""Set before anything heavy is imported: tests draw to files, never ask the network for a model, and side by
side (pytest-xdist) take a core each."""
import importlib.util
import os
import shutil

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to compute the same bits twice
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

@pytest.fixture(scope="session")
def browser():
    "A headless Chromium driven by playwright: the system's, or else playwright's own"
    from playwright.sync_api import sync_playwright
    exe = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=["--no-sandbox"])
        yield b
        b.close()

def on_device(kind):
    "Let accelerate hand out this kind of device from now on, and let a GPU round as a CPU does."
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    if kind == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    return PartialState(cpu=kind == "cpu").device

@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    "The device that everything in a test runs on: the CPU, and with `-m cuda` the GPU"
    from accelerate.state import AcceleratorState
    yield on_device(request.param)
    AcceleratorState._reset_state(reset_partial_state=True)

@pytest.fixture
def exact():
    "On a GPU: kernels that add in one order, so that the same work ends in the same bits"
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH): yield
    torch.use_deterministic_algorithms(False)

@pytest.fixture(scope="module")
def small_unet():
    """Emoji SD with a UNet of a ninth of the weights, which are random: for tests of what happens around
    the network"""
    import torch
    from diffusers import UNet2DConditionModel
    from ddpo_nb import emoji_sd
    whole = emoji_sd.load

    def load(*args, **kwargs):
        pipe = whole(*args, **kwargs)
        smaller = dict(pipe.unet.config) | dict(block_out_channels=[32, 32], norm_num_groups=8)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel.from_config(smaller).to(pipe.unet.dtype).eval()
        torch.set_rng_state(state)
        return pipe

    with pytest.MonkeyPatch.context() as m:
        m.setattr(emoji_sd, "load", load)
        yield

@pytest.fixture(scope="session")
def module_at():
    "A script that is in no package, as a module: path -> module"
    def load(path):
        spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
        mod = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mod)
        return mod
    return load
