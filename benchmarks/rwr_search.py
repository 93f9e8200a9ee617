"""The search for RWR's and RWR-sparse's settings on Emoji SD, by the rule of notebook 10: the largest sum of
the gains on both JPEG rewards, among settings that keep more than half of the base model's alignment. Seven
trials each, as many as DDPO-IS had.

    # all trials, one after the other; again: what is missing
    python benchmarks/rwr_search.py --output ~/out/rwr-search
    # some of them; several processes may share the folder
    python benchmarks/rwr_search.py --output ~/out/rwr-search --trials rwr-1
    # what there is, as a Markdown table
    python benchmarks/rwr_search.py --output ~/out/rwr-search --table
"""
import argparse
import json
from pathlib import Path

REWARDS = ("jpeg_compressibility", "jpeg_incompressibility")
SEED, QUERIES = 100, 1024   # a seed that no table reports
COMMON = dict(
    sample_batch_size=64, sample_num_batches_per_epoch=2, train_batch_size=64, train_num_inner_epochs=2,
    lora_rank=4
)
WHOLE = COMMON | dict(
    rwr_rewards="normalized", rwr_normalizer="batch", train_cfg=False, train_fresh_optimizer=False
)
OWN = COMMON | dict(
    rwr_rewards="raw", rwr_normalizer="prompt", samples_per_prompt=8, train_cfg=False,
    train_fresh_optimizer=False, per_prompt_stat_tracking=False
)
PUBLISHED = OWN | dict(train_cfg=True, train_fresh_optimizer=True)   # as far as 1,024 pictures allow
SPARSE = dict(train_learning_rate=1e-3, rwr_draws=8)

TRIALS = {
    "rwr-1": (
        "β 5, normalised, over the batch, 2 draws, lr 3e-3, no guidance in the loss",
        WHOLE | dict(rwr_beta=5.0, rwr_draws=2, train_learning_rate=3e-3),
    ),
    "rwr-2": ("… β 2", WHOLE | dict(rwr_beta=2.0, rwr_draws=2, train_learning_rate=3e-3)),
    "rwr-3": (
        (
            "as published: β 0.2 per kB, raw, per prompt (8 of each), guidance in the loss, fresh optimizer,"
            " lr 3e-4"
        ),
        PUBLISHED | dict(rwr_beta=0.2, rwr_draws=2, train_learning_rate=3e-4),
    ),
    "rwr-4": (
        "β 10 per kB, raw, per prompt (8 of each), 2 draws, lr 3e-3, no guidance in the loss",
        OWN | dict(rwr_beta=10.0, rwr_draws=2, train_learning_rate=3e-3),
    ),
    "rwr-5": ("… lr 1e-3", OWN | dict(rwr_beta=10.0, rwr_draws=2, train_learning_rate=1e-3)),
    "rwr-6": (
        "the first, with a fresh optimizer",
        WHOLE | dict(rwr_beta=5.0, rwr_draws=2, train_learning_rate=3e-3, train_fresh_optimizer=True),
    ),
    "rwr-7": (
        "the first, with guidance in the loss, lr 1e-3",
        WHOLE | dict(rwr_beta=5.0, rwr_draws=2, train_learning_rate=1e-3, train_cfg=True),
    ),
    "rwr-sparse-1": (
        "top tenth of the batch, normalised, 8 draws, lr 1e-3, no guidance in the loss",
        WHOLE | SPARSE,
    ),
    "rwr-sparse-2": (
        "top tenth of each prompt (1 of 8), 8 draws, lr 1e-3, no guidance in the loss",
        OWN | SPARSE,
    ),
    "rwr-sparse-3": (
        "as published: the same, with guidance in the loss and a fresh optimizer, lr 3e-4",
        PUBLISHED | SPARSE | dict(train_learning_rate=3e-4),
    ),
    "rwr-sparse-4": ("the second, lr 2e-3", OWN | SPARSE | dict(train_learning_rate=2e-3)),
    "rwr-sparse-5": ("the first, lr 2e-3", WHOLE | SPARSE | dict(train_learning_rate=2e-3)),
    "rwr-sparse-6": ("the first, lr 3e-3", WHOLE | SPARSE | dict(train_learning_rate=3e-3)),
    "rwr-sparse-7": ("the first, with guidance in the loss", WHOLE | SPARSE | dict(train_cfg=True)),
}

def algorithm_of(trial): return trial.rsplit("-", 1)[0]

def examiner():
    """Puts the 45 prompts to a policy, each with a noise of its own: the kilobytes and the base model's
    judgement of alignment, means."""
    import numpy as np
    from ddpo_nb.compare import Examiner, exam_generators
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.prompts import prompt_source
    from ddpo_nb.rewards import get_reward
    from ddpo_nb.trainer import make_config
    c, source, size = (
        make_config("rwr"), prompt_source("simple_animals"), get_reward("jpeg_incompressibility")
    )
    base = StableDiffusionPolicy(
        load_pipeline(), use_lora=False, num_steps=c.sample_num_steps, guidance_scale=c.sample_guidance_scale
    )
    e = Examiner(base, size, "kB", source.items)
    items = e.sets["seen"]
    def examine(policy=base):
        images = e.draw(policy, items, exam_generators(SEED, len(items))).images
        prompts, empty = [p for p, _ in items], [{} for _ in items]
        return dict(
            kb=float(np.mean(e.score(images, items))),
            alignment=float(np.mean(e.second(images, prompts, empty)[0]))
        )
    return examine

def run(trial, reward, output, examine):
    "Train and examine, unless that was done before."
    from ddpo_nb.checkpoints import write_atomic
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.prompts import prompt_source
    from ddpo_nb.rewards import get_reward
    from ddpo_nb.trainer import make_config, make_trainer
    from accelerate.utils import set_seed
    file = output/f"{trial}-{reward}.json"
    if file.exists(): return
    c = make_config(algorithm_of(trial), seed=SEED, logdir="", **TRIALS[trial][1])
    c.num_epochs = QUERIES // c.samples_per_epoch
    set_seed(SEED)
    t = make_trainer(
        c, get_reward(reward), prompt_source("simple_animals", SEED),
        StableDiffusionPolicy(load_pipeline(), lora_rank=c.lora_rank)
    )
    rows = t.train(progress=False)
    assert t.queries == QUERIES
    write_atomic(file, json.dumps(examine(t.policy) | dict(curve=[round(r["reward_mean"], 4) for r in rows])))

def gains(trial, reward, output):
    """Gain on the training prompts, change of the alignment, and the alignment of the base model; None if
    it was not run."""
    file = output/f"{trial}-{reward}.json"
    if not file.is_file(): return None
    base, it = (json.loads(f.read_text()) for f in (output/"base.json", file))
    return (
        (it["kb"] - base["kb"]) * (1 if reward == REWARDS[1] else -1), it["alignment"] - base["alignment"],
        base["alignment"]
    )

def failed(trial, output):
    """Whether the first reward alone says enough: it fell, or half of the alignment was lost. The second
    is not run then."""
    g = gains(trial, REWARDS[0], output)
    return g is not None and (g[0] < -0.05 or -g[1] >= g[2] / 2)

def table(output):
    "All trials as Markdown, and what the rule takes."
    lines, sums = [
        "| | compressibility | incompressibility | alignment, the worse change | sum |",
        "|---|---|---|---|---|",
    ], {}
    for trial, (about, _) in TRIALS.items():
        found = [gains(trial, r, output) for r in REWARDS]
        cells = ["" if g is None else f"{g[0]:+.3f}" for g in found]
        known = [g for g in found if g]
        worst = min((g[1] for g in known), default=None)
        total = sum(g[0] for g in found) if all(found) else None
        if total is not None and -worst < known[0][2] / 2: sums[trial] = total
        lines.append(
            f"| {trial}: {about} | {' | '.join(cells)} | {'' if worst is None else f'{worst:+.3f}'} |"
            f" {'' if total is None else f'{total:+.3f}'} |"
        )
    for name in ("rwr", "rwr-sparse"):
        own = {t: v for t, v in sums.items() if algorithm_of(t) == name}
        if own:
            lines.append(
                f"\n{name}: the rule takes {max(own, key=own.get)}, of {len(own)} trials that may be taken"
            )
    return "\n".join(lines).replace("-0.", "−0.")

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--trials", default=",".join(TRIALS), help="some of them, separated by commas")
    p.add_argument("--table", action="store_true", help="only print what there is")
    args = p.parse_args()
    output = args.output.expanduser()
    if not args.table:
        from ddpo_nb.checkpoints import write_atomic
        output.mkdir(parents=True, exist_ok=True)
        examine = examiner()
        if not (output/"base.json").exists(): write_atomic(output/"base.json", json.dumps(examine()))
        for trial in args.trials.split(","):
            for reward in REWARDS:
                if reward == REWARDS[0] or not failed(trial, output): run(trial, reward, output, examine)
    print(table(output))

if __name__ == "__main__": main()
