"""Reward per query and per second: how soon each way of training reaches what TRL's defaults reach after their 4,800 queries.

    python benchmarks/efficiency.py run SETTING SEED [--output DIR]     train, with an examination now and then; goes on where it was stopped
    python benchmarks/efficiency.py table [--output DIR]                queries and seconds to the common reward, from all runs in DIR

Everybody is examined in the same way, whatever they trained with: 50 steps, guidance 5, the same 90 pictures of two for each of 45 animals.
Examinations are not counted, neither as queries nor as seconds. README.md beside this file has the numbers.
"""
import argparse, json, statistics
from pathlib import Path
import torch
from ddpo_nb.checkpoints import checkpoints, write_atomic
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PROMPT_SETS, PromptSource
from ddpo_nb.rewards import get_reward
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.trainer import DDPOConfig, make_config, make_trainer

REWARD, QUERIES = "jpeg_compressibility", 4800
EXAM = dict(num_steps=50, guidance_scale=5.0)
_blog = dict(mixed_precision="no", sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3, per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32)
EVERY = dict(trl=480, recommended=128)  # queries between examinations
SETTINGS = {  # TRL's: the gradient is TRL's own to 1e-5 (trl_agreement.py), the seconds of TRL's loop are in speed.py
    "trl": lambda **kw: DDPOConfig(**_blog, **kw),
    "recommended": lambda **kw: make_config("ddpo-is", **kw),
}

def examine(policy, reward, animals):
    "Reward of every picture of the examination (90,)."
    before = dict(num_steps=len(policy.timesteps), eta=policy.eta, guidance_scale=policy.guidance_scale, negative_prompt=policy.negative_prompt, reduction=policy.reduction)
    policy.configure(**before | EXAM)
    prompts = animals * 2
    t = rollout(policy, prompts, [sample_generator(2**20, 0, i) for i in range(len(prompts))], batch_size=45)
    policy.configure(**before)
    return reward(t.images, t.prompts, t.metadata)[0].tolist()

def run(setting, seed, folder):
    "Train up to 4,800 queries; `exams.jsonl` gets a line an examination."
    place, animals = folder / f"{setting}-{seed}", PROMPT_SETS["simple_animals"]()
    c = SETTINGS[setting](seed=seed, logdir=str(place), save_freq=2, num_checkpoint_limit=2, resume_from=str(place) if checkpoints(place / "checkpoints") else "")
    torch.manual_seed(seed)
    t = make_trainer(c, get_reward(REWARD), PromptSource(animals, seed), StableDiffusionPolicy(load_pipeline(), lora_rank=c.lora_rank))
    lines = [json.loads(o) for o in (place / "exams.jsonl").read_text().splitlines()] if (place / "exams.jsonl").exists() else []
    while True:
        if t.queries // EVERY[setting] >= len(lines):
            rewards = examine(t.policy, t.reward_function, animals)
            lines.append(dict(queries=t.queries, seconds=sum(r["seconds"] for r in t.rows), reward=statistics.mean(rewards), rewards=rewards))
            place.mkdir(parents=True, exist_ok=True)
            write_atomic(place / "exams.jsonl", "".join(json.dumps(o) + "\n" for o in lines))
            print(f"{setting}, seed {seed}: {t.queries:,} queries, {lines[-1]['seconds']:.0f} s, {lines[-1]['reward']:.4f} kB", flush=True)
        if t.queries >= QUERIES: break
        t.train(t.epochs_done + 1, progress=False)

def first_at(lines, goal):
    "Queries and seconds at which the reward, between examinations taken to be a straight line, first reaches the goal; None if never."
    for a, b in zip(lines, lines[1:]):
        if b["reward"] >= goal:
            share = (goal - a["reward"]) / (b["reward"] - a["reward"]) if a["reward"] < goal else 0
            return {k: a[k] + share * (b[k] - a[k]) for k in ("queries", "seconds")}

def table(folder):
    found = {}
    for o in sorted(folder.glob("*-*/exams.jsonl")):
        setting, _, seed = o.parent.name.rpartition("-")
        found.setdefault(setting, {})[int(seed)] = [json.loads(line) for line in o.read_text().splitlines()]
    whole = {seed: lines for seed, lines in found.get("trl", {}).items() if lines[-1]["queries"] >= QUERIES}
    if not whole: raise SystemExit(f"no run of TRL's settings in {folder} has come to {QUERIES:,} queries yet")
    goal = statistics.mean(lines[-1]["reward"] for lines in whole.values())
    print(f"Goal: {goal:.4f} kB, TRL's settings after {QUERIES:,} queries (mean of seeds {sorted(whole)})\n\n| setting | seed | start | reward after {QUERIES:,} queries | queries to the goal | seconds to the goal |\n|---|---|---|---|---|---|")
    for setting, seeds in found.items():
        for seed, lines in sorted(seeds.items()):
            hit, last = first_at(lines, goal), lines[-1]
            print(f"| {setting} | {seed} | {lines[0]['reward']:.4f} | " + (f"{last['reward']:.4f}" if last["queries"] >= QUERIES else f"{last['reward']:.4f} so far ({last['queries']:,})") +
                  " | " + (f"{hit['queries']:,.0f} | {hit['seconds']:.0f} |" if hit else "not reached | |"))

def main():
    parser = argparse.ArgumentParser(description="Queries and seconds to the reward that TRL's defaults reach.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs, tables = commands.add_parser("run", help="train one setting with one seed"), commands.add_parser("table", help="what all runs say")
    runs.add_argument("setting", choices=SETTINGS)
    runs.add_argument("seed", type=int)
    for o in (runs, tables): o.add_argument("--output", type=Path, default=Path("runs/efficiency"), help="folder of the runs (default: runs/efficiency)")
    args = parser.parse_args()
    run(args.setting, args.seed, args.output) if args.command == "run" else table(args.output)

if __name__ == "__main__": main()
