"""Cost as the work grows: seconds and memory of an epoch against samples, steps, image size and LoRA rank,
each point in a process of its own.

`python benchmarks/scaling.py [--json FILE]` prints a table; README.md beside it has the numbers, and the
performance notebook draws them.
"""
import argparse, json, resource, subprocess, sys, time
from datetime import date
from pathlib import Path
import torch
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.trainer import DDPOConfig, make_trainer
from speed import hardware
from speed_plan import prompt_function, reward

BASE = dict(samples=24, steps=5, pixels=64, rank=4)
AXES = dict(
    samples=[8, 16, 32, 64, 128, 256, 512], steps=[10, 20, 50, 100], pixels=[64, 96, 128], rank=[1, 4, 16, 64]
)

def gigabytes():
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )

def measure(samples, steps, pixels, rank):
    """One epoch to warm up, with few samples, then one to be measured; memory is the process's peak
    beyond what was there after warming up."""
    pipe = load_pipeline()
    pipe.unet.register_to_config(sample_size=pixels // 8)
    def trainer(n):
        c = DDPOConfig(
            logdir="", mixed_precision="no", sample_num_steps=steps, sample_batch_size=8,
            sample_num_batches_per_epoch=n // 8, train_batch_size=8, lora_rank=rank, train_learning_rate=1e-5
        )
        return make_trainer(c, reward, prompt_function(), StableDiffusionPolicy(pipe, lora_rank=rank))
    trainer(8).epoch()
    before, t = gigabytes(), trainer(samples)
    start = time.perf_counter()
    work = t.collect()
    sampled, trajectories = time.perf_counter(), work.trajectories.latents.numel() * 4 / 1e9
    t.update(work)
    return dict(
        seconds=time.perf_counter() - start, sampling=sampled - start, memory=gigabytes() - before,
        trajectories=trajectories, images=work.trajectories.images.numel() * 4 / 1e9, peak=gigabytes()
    )

def points():
    for axis, values in AXES.items():
        for v in values: yield axis, BASE | {axis: v}

def main():
    parser = argparse.ArgumentParser(
        description="Seconds and memory of an epoch of Emoji SD as the work grows."
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point: return print(json.dumps(measure(**json.loads(args.point))))
    found = []
    print(
        f"{date.today()}, {hardware()}, PyTorch {torch.__version__}\n\n| samples | steps | pixels | rank | s"
        " an epoch | of it sampling | ms a row | peak beyond the start, GB | trajectories, GB"
        " |\n|---|---|---|---|---|---|---|---|---|"
    )
    for axis, p in points():
        out = subprocess.run(
            [sys.executable, __file__, "--point", json.dumps(p)], capture_output=True, text=True
        )
        if out.returncode: raise SystemExit(out.stderr)
        found.append(dict(axis=axis, **p, **json.loads(out.stdout.splitlines()[-1])))
        o, rows = found[-1], 2 * p["samples"] * p["steps"]
        print(
            f"| {p['samples']} | {p['steps']} | {p['pixels']} | {p['rank']} | {o['seconds']:.2f} |"
            f" {o['sampling']:.2f} | {o['seconds'] / rows * 1000:.2f} | {o['memory']:.3f} |"
            f" {o['trajectories']:.3f} |",
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps(dict(date=str(date.today()), hardware=hardware(), found=found), indent=1)
        )

if __name__ == "__main__": main()
