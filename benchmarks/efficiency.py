"""Reward per query and per second: how soon each way of training reaches what TRL's defaults reach after
their 4,800 queries.

    python benchmarks/efficiency.py run SETTING SEED [--set FIELD=VALUE] [--output DIR]
                                                                        train, with an examination now and
                                                                        then; goes on where it was stopped
    # what an epoch of each costs, TRL's own loop among them, in turn and alone on the machine
    python benchmarks/efficiency.py time [--rounds N] [--output DIR]
    # queries and seconds to the common reward, from all that is in DIR
    python benchmarks/efficiency.py table [--output DIR] [--json FILE]

Everybody is examined in the same way, whatever they trained with: 50 steps, guidance 5, the same 90 pictures
of two for each of 45 animals. Examinations are not counted, neither as queries nor as seconds. So several
runs may share a machine: their own clocks are not used. README.md beside this file has the numbers.
"""
import argparse, json, statistics
from dataclasses import asdict
from datetime import date
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from ddpo_nb.checkpoints import checkpoints, write_atomic
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.prompts import PROMPT_SETS, PromptSource
from ddpo_nb.recipes import get_recipe
from ddpo_nb.rewards import get_reward, to_uint8
from ddpo_nb.rollout import rollout, sample_generator
from ddpo_nb.trainer import DDPOConfig, make_trainer
from speed import emoji_sd, hardware, log, measure, pairs
from trl_env import add_env_option, trl_python

REWARD, QUERIES = "jpeg_compressibility", 4800
EXAM = dict(num_steps=50, guidance_scale=5.0)
_blog = dict(
    mixed_precision="no", sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3,
    per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32
)
# queries between examinations, and in all
EVERY, UNTIL = dict(trl=480, recommended=128), dict(trl=QUERIES, recommended=QUERIES // 4)
SETTINGS = {  # "trl": our loop; its gradient is TRL's own to 1e-5 (trl_agreement.py)
    "trl": lambda **kw: DDPOConfig(**_blog, **kw),
    "recommended": get_recipe("emoji-compressibility").config,
}

def examine(policy, reward, animals):
    "Every picture's reward (90,), and every fifth of the first 45 pictures side by side."
    before = dict(
        num_steps=len(policy.timesteps), eta=policy.eta, guidance_scale=policy.guidance_scale,
        negative_prompt=policy.negative_prompt, reduction=policy.reduction
    )
    policy.configure(**before | EXAM)
    prompts = animals * 2
    t = rollout(policy, prompts, [sample_generator(2**20, 0, i) for i in range(len(prompts))], batch_size=45)
    policy.configure(**before)
    return reward(t.images, t.prompts, t.metadata)[0].tolist(), Image.fromarray(
        np.concatenate(to_uint8(t.images[:45:5]), 1)
    )

def run(setting, seed, folder, changes, until):
    "Train; `exams.jsonl` gets a line an examination, and `pictures` a few of its pictures."
    name = ",".join([setting] + [f"{k}={v}" for k, v in changes.items()])
    place, animals = folder / f"{name}-{seed}", PROMPT_SETS["simple_animals"]()
    c = SETTINGS[setting](
        **changes, seed=seed, logdir=str(place), save_freq=2, num_checkpoint_limit=2,
        resume_from=str(place) if checkpoints(place / "checkpoints") else ""
    )
    torch.manual_seed(seed)
    t = make_trainer(
        c, get_reward(REWARD), PromptSource(animals, seed),
        StableDiffusionPolicy(load_pipeline(), lora_rank=c.lora_rank)
    )
    lines = (
        [json.loads(o) for o in (place / "exams.jsonl").read_text().splitlines()]
        if (place / "exams.jsonl").exists()
        else []
    )
    while True:
        if t.queries // EVERY[setting] >= len(lines):
            rewards, pictures = examine(t.policy, t.reward_function, animals)
            lines.append(dict(queries=t.queries, reward=statistics.mean(rewards), rewards=rewards))
            (place / "pictures").mkdir(parents=True, exist_ok=True)
            pictures.save(place / f"pictures/{t.queries:05}.png")
            write_atomic(place / "exams.jsonl", "".join(json.dumps(o) + "\n" for o in lines))
            print(f"{name}, seed {seed}: {t.queries:,} queries, {lines[-1]['reward']:.4f} kB", flush=True)
        if t.queries >= until: break
        t.train(t.epochs_done + 1, progress=False)

def time(folder, python, rounds):
    "`seconds.json`: a query's seconds in TRL's loop and in ours, every round's."
    trl = dict(model=str(emoji_sd()), settings=_blog, ours={}, threads=0)
    configs = {name: make() for name, make in SETTINGS.items()}
    found = measure(
        dict(TRL=trl) | {name: trl | dict(ours=asdict(c)) for name, c in configs.items()}, python, rounds, log
    )
    samples = {name: c.samples_per_epoch for name, c in configs.items()}
    samples["TRL"] = samples["trl"]
    about = dict(date=str(date.today()), hardware=hardware(), torch=torch.__version__, rounds=rounds)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(
        folder / "seconds.json",
        json.dumps(
            about
            | dict(query={name: [row[name]["seconds"] / n for row in found] for name, n in samples.items()})
        ),
    )

def first_at(lines, goal):
    """Queries at which the reward, between examinations taken to be a straight line, first reaches the
    goal; None if never."""
    for a, b in zip(lines, lines[1:]):
        if a["reward"] >= goal: return a["queries"]
        if b["reward"] >= goal:
            return a["queries"] + (goal - a["reward"]) / (b["reward"] - a["reward"]) * (
                b["queries"] - a["queries"]
            )

def collect(folder):
    """All that is in the folder: curves by setting and seed, the goal and the queries to it, the seconds
    of a query. SystemExit says what is missing."""
    curves = {}
    for o in sorted(folder.glob("*-*/exams.jsonl")):
        setting, _, seed = o.parent.name.rpartition("-")
        curves.setdefault(setting, {})[seed] = [
            {k: line[k] for k in ("queries", "reward")}
            for line in map(json.loads, o.read_text().splitlines())
        ]
    whole = [lines for lines in curves.get("trl", {}).values() if lines[-1]["queries"] >= QUERIES]
    if not whole:
        raise SystemExit(f"no run of TRL's settings in {folder} has come to {QUERIES:,} queries yet")
    if not (folder / "seconds.json").exists():
        raise SystemExit(f"{folder} has no seconds yet: efficiency.py time")
    goal = statistics.mean(lines[-1]["reward"] for lines in whole)
    reached = {
        setting: {seed: first_at(lines, goal) for seed, lines in seeds.items()}
        for setting, seeds in curves.items()
    }
    return dict(goal=goal, reached=reached, curves=curves) | json.loads((folder / "seconds.json").read_text())

def strips(folder, goal):
    """The same pictures at the start, by TRL's settings at the end, and by ours when they have come to
    the goal: one under the other. Of the first seed that has them."""
    def strip(setting, good):
        for o in sorted(folder.glob(f"{setting}-*/exams.jsonl")):
            at = next(
                (line["queries"] for line in map(json.loads, o.read_text().splitlines()) if good(line)), None
            )
            file = o.parent / f"pictures/{at or 0:05}.png"
            if at is not None and file.exists(): return Image.open(file)
    rows = [
        strip("recommended", lambda line: True), strip("trl", lambda line: line["queries"] >= QUERIES),
        strip("recommended", lambda line: line["reward"] >= goal)
    ]
    if None not in rows: return Image.fromarray(np.concatenate([np.asarray(o) for o in rows]))

def table(folder, file):
    o = collect(folder)
    second = {name: statistics.median(v) for name, v in o["query"].items()}
    print(
        f"{o['date']}, {o['hardware']}, PyTorch {o['torch']}; seconds a query, median of {o['rounds']}"
        " rounds: "
        + ", ".join(f"{k} {v:.3f}" for k, v in second.items())
    )
    print(
        f"Goal: {o['goal']:.4f} kB, TRL's settings after {QUERIES:,} queries; TRL's own loop takes"
        f" {QUERIES * second['TRL']:,.0f} s to it\n"
    )
    print(
        "| setting | seed | start | end | queries to the goal | share of TRL's | seconds to the goal | share"
        " of TRL's |\n|---|---|---|---|---|---|---|---|"
    )
    for setting, seeds in o["curves"].items():
        for seed, lines in seeds.items():
            hit, last = o["reached"][setting][seed], lines[-1]
            cells = [
                setting, seed, f"{lines[0]['reward']:.4f}", f"{last['reward']:.4f} ({last['queries']:,})"
            ]
            if hit is None:
                cells += ["not reached", "", "", ""]
            else:
                cells += [
                    f"{hit:,.0f}", f"{hit / QUERIES:.2f}",
                    *(
                        [
                            f"{hit * second[setting]:,.0f}",
                            f"{hit * second[setting] / QUERIES / second['TRL']:.3f}"
                        ]
                        if setting in second
                        else ["", ""]
                    ),
                ]
            print("| " + " | ".join(cells) + " |")
    if file:
        write_atomic(file, json.dumps(o, indent=1))
        if pictures := strips(folder, o["goal"]):
            pictures.quantize(128).save(file.with_suffix(".png"), optimize=True)

def main():
    parser = argparse.ArgumentParser(
        description="Queries and seconds to the reward that TRL's defaults reach."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs, times, tables = (
        commands.add_parser(name, help=text)
        for name, text in (
            ("run", "train one setting with one seed"), ("time", "what an epoch costs"),
            ("table", "what all runs say")
        )
    )
    runs.add_argument("setting", choices=SETTINGS)
    runs.add_argument("seed", type=int)
    runs.add_argument(
        "--set", type=pairs, action="append", default=[], metavar="FIELD=VALUE",
        help="a setting that is changed, such as train_clip_range=0.001"
    )
    runs.add_argument(
        "--until", type=int,
        help=f"queries in all (default: {', '.join(f'{v:,} for {k}' for k, v in UNTIL.items())})",
    )
    times.add_argument(
        "--rounds", type=int, default=3, help="rounds after the first, which warms up (default: 3)"
    )
    add_env_option(times)
    tables.add_argument("--json", type=Path, help="file for all of it; pictures go beside it, as PNG")
    for o in (runs, times, tables):
        o.add_argument(
            "--output", type=Path, default=Path("runs/efficiency"),
            help="folder of the runs (default: runs/efficiency)"
        )
    args = parser.parse_args()
    if args.command == "run":
        run(args.setting, args.seed, args.output, dict(args.set), args.until or UNTIL[args.setting])
    elif args.command == "time":
        time(args.output, trl_python(args.env), args.rounds)
    else:
        table(args.output, args.json)

if __name__ == "__main__": main()
