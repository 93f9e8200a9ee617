"""An environment for TRL 0.23.1, the last release with DDPO: it needs older versions of transformers and
diffusers than we do."""
import os, subprocess, sys
from pathlib import Path

PACKAGES = ["trl==0.23.1", "transformers<4.57", "diffusers<0.36", "torch==2.13.0", "peft", "accelerate"]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpo_nb/trl-0.23.1"

def trl_python(folder: Path) -> Path:
    "The interpreter of TRL's environment, which is made if it is not there."
    python, made = (
        folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), folder / "packages.txt"
    )
    if python.exists() and made.exists() and made.read_text().split("\n") == PACKAGES: return python
    print(f"Making an environment for TRL in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    made.write_text("\n".join(PACKAGES))
    return python

def add_env_option(parser):
    parser.add_argument(
        "--env", type=lambda o: Path(o).expanduser(), default=CACHE,
        help=f"folder of TRL's virtual environment, made if missing (default: {CACHE})",
    )
