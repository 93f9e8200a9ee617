"""A folder of wheels for a GPU machine that has PyTorch and no network: `python benchmarks/gpu.py
--collect-wheels DIR` fills it.

Two lists: what ddpo_nb needs beside PyTorch, transformers, peft and accelerate, and TRL 0.23.1 with the older
versions that it needs. Neither brings PyTorch or one of NVIDIA's packages: the machine's own are used.
`unpack` lays a list out in a folder that goes before all others on Python's path.
"""
import os, subprocess, sys, zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

OURS = [
    "diffusers==0.42.1", "importlib_metadata==10.2.0", "zipp==4.1.2", "fastcore==2.2.39", "httpx2==2.16.2",
    "httpcore2==2.16.2", "truststore==0.10.5", "bitsandbytes"
]
TRL = [
    "trl==0.23.1", "transformers==4.56.2", "tokenizers==0.22.2", "diffusers==0.35.2",
    "huggingface_hub==0.36.2", "datasets==5.0.1", "dill", "multiprocess", "importlib_metadata==10.2.0",
    "zipp==4.1.2"
]
PLATFORMS = [
    "manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"
]

def collect(
    folder: Path,
    python: str,  # the GPU machine's, such as 3.12
    cuda: str,    # its CUDA, such as 130: of bitsandbytes' dozen libraries only that one is kept
):
    "Download both lists' wheels; says what each takes."
    for name, packages in dict(ours=OURS, trl=TRL).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        where = [o for p in PLATFORMS for o in ("--platform", p)]
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                "--implementation", "cp", "--python-version", python, *where, "-d", str(folder / name),
                *packages
            ],
            check=True,
        )
    for wheel in folder.rglob("bitsandbytes-*.whl"): slim(wheel, cuda)
    sizes = {o.relative_to(folder).as_posix(): o.stat().st_size / 1e6 for o in sorted(folder.rglob("*.whl"))}
    for name, size in sizes.items(): print(f"{size:6.1f} MB  {name}")
    print(f"{sum(sizes.values()):6.1f} MB in all")

def slim(wheel: Path, cuda: str):
    "Leave out bitsandbytes' libraries for other versions of CUDA."
    keep = f"libbitsandbytes_cuda{cuda}"
    with zipfile.ZipFile(wheel) as old:
        libraries = [o for o in old.namelist() if "libbitsandbytes_" in o]
        if not any(keep in o for o in libraries):
            raise SystemExit(f"--cuda {cuda}: bitsandbytes has {', '.join(map(os.path.basename, libraries))}")
        with zipfile.ZipFile(small := wheel.with_suffix(".part"), "w", zipfile.ZIP_DEFLATED) as new:
            for o in old.infolist():
                if o.filename not in libraries or keep in o.filename: new.writestr(o, old.read(o.filename))
    small.replace(wheel)

def unpack(folder: Path, target: Path) -> bool:
    "Lay out the wheels of `folder` in `target`; False if there are none."
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if not wheels: return False
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as f: f.extractall(target)
    return True

def versions(*packages) -> dict:
    "Of those that can be imported here."
    found = {}
    for p in packages:
        try: found[p] = version(p)
        except PackageNotFoundError: pass
    return found
