"""TRL 0.23.1's own tests of its DDPO trainer, run on ours: nothing in them is changed but the lines that
import.

`python benchmarks/trl_tests.py` downloads TRL's source distribution from PyPI, takes
tests/test_ddpo_trainer.py out of it, runs its six tests, and prints how many passed; it exits with 1 unless
all did. They ask the hub for `hf-internal-testing/tiny-stable-diffusion-torch`. To need no hub, a pipeline of
the same shapes with random weights is put into a cache folder of its own under that name; `--hub` takes the
real one instead.
"""
import argparse, os, re, subprocess, sys, tarfile, tempfile
from pathlib import Path

VERSION, TEST = "0.23.1", "tests/test_ddpo_trainer.py"
MODEL = "hf-internal-testing/tiny-stable-diffusion-torch"
IMPORTS = {
    "from trl.import_utils import": "from testing_utils import",
    "from .testing_utils import": "from testing_utils import", "from trl import": "from ddpo_nb import"
}
UTILITIES = '''"What the test takes from TRL's own test helpers."
import shutil, tempfile, unittest

def is_diffusers_available(): return True
def require_diffusers(case): return case

class TrlTestCase(unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.tmp_dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.tmp_dir, ignore_errors=True)
'''

def fetch(folder: Path) -> str:
    "The test file's text, from TRL's source distribution on PyPI."
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--dest", folder,
        f"trl=={VERSION}"
    ]
    subprocess.run(command, check=True)
    with tarfile.open(folder / f"trl-{VERSION}.tar.gz") as f:
        return f.extractfile(f"trl-{VERSION}/{TEST}").read().decode()

def adapt(text: str) -> str:
    """The same tests with other import lines; SystemExit if a line that was to change is not there, or if
    one of TRL's is left."""
    for old, new in IMPORTS.items():
        if old not in text: raise SystemExit(f"{TEST} has no line with {old!r}")
        text = text.replace(old, new)
    if re.search(r"^\s*(from|import) (trl|\.)", text, re.M):
        raise SystemExit(f"{TEST} imports more of TRL than is known here")
    return text

def tiny_pipeline():
    """Stable Diffusion with random weights, in the shapes of the hub's model: latents (4, 64, 64), 77
    tokens of 32 dimensions."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from ddpo_nb.emoji_sd import build_tokenizer
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_attention_heads=4,
            num_hidden_layers=5, **ends
        )
    )
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=32, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False
    )

def fill_cache(hub: Path):
    "Put the stand-in where huggingface_hub keeps what it has downloaded."
    home, commit = hub / ("models--" + MODEL.replace("/", "--")), "0" * 40
    tiny_pipeline().save_pretrained(home / "snapshots" / commit)
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)

def main():
    parser = argparse.ArgumentParser(description=f"Run TRL {VERSION}'s tests of its DDPO trainer on ddpo_nb.")
    parser.add_argument(
        "--hub", action="store_true", help=f"download {MODEL} from the hub instead of making a stand-in"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "test_ddpo_trainer.py").write_text(adapt(fetch(folder)))
        (folder / "testing_utils.py").write_text(UTILITIES)
        env = dict(
            os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        )
        if not args.hub:
            fill_cache(folder / "hub")
            env |= dict(HF_HUB_CACHE=str(folder / "hub"), HF_HUB_OFFLINE="1")
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--rootdir", folder,
            "test_ddpo_trainer.py"
        ]
        out = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True).stdout
    passed = int((re.search(r"(\d+) passed", out) or [0, 0])[1])
    if passed < 6: print(out)
    print(f"{passed} of 6 of TRL {VERSION}'s tests pass")
    return int(passed < 6)

if __name__ == "__main__": sys.exit(main())
