"""Do we compute what TRL computes? One epoch of Emoji SD, its loss and its gradients, by TRL 0.23.1's own
trainer and by ours.

`python benchmarks/trl_agreement.py [--env DIR]` makes an environment for TRL once, samples trajectories, has
both sides work out the same epoch, and prints what differs and by how much. It exits with 1 if they differ by
more than 1e-5, relatively. README.md beside it has the numbers.
"""
import argparse, json, math, os, subprocess, sys, tempfile
from dataclasses import replace
from importlib import resources
from importlib.metadata import version
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from ddpo_nb.ddpo import DDPO
from ddpo_nb.emoji_sd import WEIGHTS
from ddpo_nb.mdp import Trajectories
from ddpo_nb.policy import Conditioning, StableDiffusionPolicy, load_pipeline
from ddpo_nb.speed import SmallLora
from ddpo_nb.rollout import rollout, sample_generator
from trl_env import add_env_option, trl_python

BOUND, GUIDANCE, MICRO_BATCH = 1e-5, 5.0, 32
PROMPTS = [
    "a cat", "a dog on a red background", "a lion", "a bear on a blue background", "a fox", "an ant",
    "a picture of a frog", "a pig on pink"
]
ADVANTAGES = [-7.0, 6.5, -1.3, 0.4, 1.1, -0.2, 2.0, -5.5]  # three lie beyond the cut at 5
# of the old log-probabilities: some within, some beyond each clip range
NUDGES = [5e-5, 2e-4, 5e-3, 4e-2]

# ---- TRL's side ----

def run_trl(python, folder):
    "Have TRL work on the cases in `folder`; its output matters only if it fails."
    res = subprocess.run(
        [python, "-I", Path(__file__).with_name("trl_side.py"), folder], capture_output=True, text=True,
        env=os.environ | dict(HF_HUB_OFFLINE="1")
    )
    if res.returncode: raise SystemExit(f"TRL's side failed:\n{res.stdout}{res.stderr}")

# ---- our side ----

class DoublePolicy(StableDiffusionPolicy):
    "The policy in double precision: its own `network` would round the UNet's output to single."
    def network(self, latents, t, text, kept=None):
        return self.wrapped(latents.double(), t, text.double(), return_dict=False)[0]

def make_policy(folder, dtype, steps):
    """Ours, with peft's layers and TRL's order in memory: single precision can then be compared to the
    last digits, since both round alike."""
    SmallLora.most, pipeline = 0, load_pipeline(lora=folder)
    policy = (DoublePolicy if dtype == torch.float64 else StableDiffusionPolicy)(
        pipeline, num_steps=steps, guidance_scale=GUIDANCE
    )
    # diffusers' own `to` warns
    torch.nn.Module.to(pipeline.unet, dtype, memory_format=torch.contiguous_format)
    policy.scheduler.alphas_cumprod = policy.scheduler.alphas_cumprod.to(dtype)
    policy.scheduler.final_alpha_cumprod = policy.scheduler.final_alpha_cumprod.to(dtype)
    return policy

def write_lora(folder):
    "A fresh LoRA whose B is not zero, so that every weight has a gradient."
    torch.manual_seed(0)
    policy = StableDiffusionPolicy(load_pipeline(), lora_rank=4)
    for name, p in policy.pipeline.unet.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.02)
    policy.save_pretrained(folder)

@torch.no_grad()
def score(policy, batch, guidance):
    "Log-probabilities (N, T) of the transitions in `batch`."
    samples, columns = torch.arange(len(batch)), []
    for j, t in enumerate(batch.timesteps):
        x, _, prev, _ = batch.transitions(samples, torch.full_like(samples, j))
        columns.append(
            policy.step(x, t.expand(len(x)), batch.conditioning, prev_sample=prev, guidance=guidance).log_prob
        )
    return torch.stack(columns, 1)

def nudge(log_probs, generator):
    """Old log-probabilities, a little off: ratios on both sides of 1, within and beyond each clip range,
    never on its edge."""
    size = torch.tensor(NUDGES)[torch.randint(len(NUDGES), log_probs.shape, generator=generator)]
    return log_probs + size * (1 - 2 * torch.randint(2, log_probs.shape, generator=generator))

def write_epoch(folder, steps):
    "Sample an epoch and write its transitions, advantages and old log-probabilities."
    policy = make_policy(folder, torch.float32, steps)
    batch = rollout(policy, PROMPTS, [sample_generator(0, steps, i) for i in range(len(PROMPTS))])
    generator = torch.Generator().manual_seed(steps)
    old = {
        name: nudge(score(policy, batch, guidance), generator)
        for name, guidance in (("old_cfg", True), ("old_plain", False))
    }
    save_file(
        dict(
            latents=batch.latents, timesteps=batch.timesteps.clone(), advantages=torch.tensor(ADVANTAGES),
            prompt_embeds=batch.conditioning.prompt,
            negative_prompt_embeds=batch.conditioning.negative.contiguous(), **old
        ),
        folder / f"epoch_{steps}.safetensors",
    )

def read_epoch(data, old, policy, dtype):
    "Trajectories from a file's tensors, in the precision asked for."
    cond = Conditioning(data["prompt_embeds"], data["negative_prompt_embeds"])
    return Trajectories(
        data["latents"].to(dtype), data["timesteps"], old.to(dtype), policy.stochastic, cond, PROMPTS,
        [{} for _ in PROMPTS]
    )

def our_epoch(case, data, policy):
    "Loss, figures, log-probabilities and gradients of one epoch, as `trl_side.run_loss`."
    batch = read_epoch(
        data, data["old_cfg" if case["cfg"] else "old_plain"], policy, getattr(torch, case["dtype"])
    )
    objective = DDPO(clip_range=case["clip"], adv_clip_max=case["adv_clip_max"], guidance=case["cfg"])
    examples = objective.examples(
        policy, batch, data["advantages"].to(batch.latents.dtype), torch.Generator().manual_seed(0)
    )
    m, losses, figures = len(examples["sample"]), [], []
    for i in range(0, m, MICRO_BATCH):
        loss, figure = objective.loss(policy, batch, {k: v[i:i + MICRO_BATCH] for k, v in examples.items()})
        (loss.sum() / m).backward()
        losses.append(loss.detach()); figures.append(figure)
    mean = lambda name: torch.cat([f[name] for f in figures]).mean()
    grads = {"grad." + k: p.grad for k, p in policy.pipeline.unet.named_parameters() if p.requires_grad}
    return dict(
        loss=torch.cat(losses).mean(), approx_kl=mean("approx_kl"), clipfrac=mean("clip_fraction"),
        log_probs=score(policy, batch, case["cfg"]), **grads
    )

# ---- the comparison ----

def relative(ours, theirs):
    "Norm of the difference over the norm."
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()

def worst(ours, theirs):
    "Largest relative difference of single values."
    return ((ours.double() - theirs.double()).abs() / theirs.double().abs()).max().item()

def compare(ours, theirs):
    "Relative differences of everything that both sides have; a comparison that could not fail is refused."
    names = sorted(k for k in theirs if k.startswith("grad."))
    if names != sorted(k for k in ours if k.startswith("grad.")):
        raise SystemExit("the two sides do not train the same weights")
    if not all(theirs[k].abs().max() > 0 for k in names):
        raise SystemExit("some weight has no gradient: nothing to compare")
    if not 0 < theirs["clipfrac"] < 1: raise SystemExit("all ratios are clipped, or none: nothing to compare")
    flat = lambda d: torch.cat([d[k].double().flatten() for k in names])
    figures = {k: relative(ours[k], theirs[k]) for k in ("loss", "approx_kl", "clipfrac")}
    return figures | dict(
        log_prob=worst(ours["log_probs"], theirs["log_probs"]), gradient=relative(flat(ours), flat(theirs)),
        worst_weight=max(relative(ours[k], theirs[k]) for k in names)
    )

def verdict(case, difference):
    """The differences that must stay within the bound: in double precision all, in single those of the
    loss, the clipped share and the gradients."""
    judged = (
        difference
        if case["dtype"] == "float64"
        else {k: v for k, v in difference.items() if k not in ("approx_kl", "log_prob")}
    )
    return max(judged.values())

def make_cases():
    """What to compare: losses at a T that divides 1000 and one that does not, ddpo-pytorch's defaults,
    and TRL's own sampler."""
    shared, cases = (
        dict(
            model=str(resources.files("ddpo_nb") / WEIGHTS), guidance=GUIDANCE, adv_clip_max=5.0,
            batch=len(PROMPTS), note=""
        ),
        [],
    )
    for dtype in ("float64", "float32"):
        loss = shared | dict(kind="loss", dtype=dtype)
        cases += [
            loss | dict(steps=steps, cfg=cfg, clip=clip)
            for steps in (10, 7)
            for cfg in (True, False)
            for clip in (1e-4, 0.02)
        ]
        cases += [loss | dict(steps=50, cfg=True, clip=1e-4, note="ddpo-pytorch's defaults")]
        cases += [
            shared | dict(kind="sampler", dtype=dtype, steps=steps, cfg=True, clip=1e-4)
            for steps in (10, 7, 50)
        ]
    return cases + [
        loss | dict(kind="small", steps=steps, cfg=True, clip=1e-4, batch=2) for steps in (10, 7, 50)
    ]

def show(*cells):
    print("| " + " | ".join(f"{o:.1e}" if isinstance(o, float) else str(o) for o in cells) + " |", flush=True)

def heading(title, *columns):
    print(f"\n{title}\n")
    show(*columns); show(*("---" for _ in columns))

def settings(case):
    return (
        "double" if case["dtype"] == "float64" else "single", case["steps"], "on" if case["cfg"] else "off",
        f"{case['clip']:g}"
    )

COLUMNS = (
    "precision", "T", "guidance", "clip range", "loss", "approx. KL", "clipped", "log-prob.", "gradient",
    "worst weight", ""
)

def compare_losses(cases, folder):
    "A row for each loss; returns what is judged, one number a row."
    heading("Loss and gradients, ours against TRL's", *COLUMNS)
    found = []
    for i, case in cases:
        data, policy = load_file(folder / f"epoch_{case['steps']}.safetensors"), make_policy(
            folder, getattr(torch, case["dtype"]), case["steps"]
        )
        difference = compare(our_epoch(case, data, policy), load_file(folder / f"trl_{i}.safetensors"))
        show(*settings(case), *difference.values(), case["note"])
        found.append(verdict(case, difference))
    return found

def compare_samplers(cases, folder):
    """A row for each epoch that TRL sampled and our policy scores, from the prompts on; returns what is
    judged."""
    heading("TRL samples, we score its actions", "precision", "T", "embeddings", "log-prob.")
    found = []
    for i, case in cases:
        dtype, data = getattr(torch, case["dtype"]), load_file(folder / f"trl_{i}.safetensors")
        policy = make_policy(folder, dtype, case["steps"])
        if not torch.equal(data["timesteps"], policy.timesteps):
            raise SystemExit("TRL samples at other timesteps")
        cond = policy.encode(PROMPTS)
        batch = replace(read_epoch(data, data["log_probs"], policy, dtype), conditioning=cond)
        embeddings = max(
            relative(cond.prompt, data["prompt_embeds"]),
            relative(cond.negative, data["negative_prompt_embeds"])
        )
        difference = dict(embeddings=embeddings, log_prob=worst(score(policy, batch, True), batch.log_probs))
        show(*settings(case)[:2], *difference.values())
        found.append(verdict(case, difference))
    return found

def show_rounding(cases, folder):
    "How far rounding alone takes TRL from itself, in single precision. Not judged."
    heading("What single precision leaves open: TRL against itself", *COLUMNS)
    read = lambda **wanted: next(
        load_file(folder / f"trl_{i}.safetensors") for i, o in enumerate(cases) if wanted.items() <= o.items()
    )
    for case in cases:
        same = {k: case[k] for k in ("steps", "cfg", "clip")}
        if case["kind"] == "loss" and case["dtype"] == "float32" and case["clip"] == 1e-4:
            show(
                *settings(case),
                *compare(
                    read(kind="loss", dtype="float32", **same), read(kind="loss", dtype="float64", **same)
                ).values(),
                "single against double",
            )
        if case["kind"] == "small":
            show(
                *settings(case),
                *compare(read(kind="small", **same), read(kind="loss", dtype="float32", **same)).values(),
                f"batches of 2 against {len(PROMPTS)}",
            )

def show_versions(folder):
    theirs = json.loads((folder / "versions.json").read_text())
    for who, versions in (("TRL", theirs), ("ours", {k: version(k) for k in theirs if k != "trl"})):
        print(f"{who}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))

def main():
    parser = argparse.ArgumentParser(
        description="Compare one epoch's loss and gradients with those of TRL 0.23.1."
    )
    add_env_option(parser)
    python, cases = trl_python(parser.parse_args().env), make_cases()
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_lora(folder)
        for steps in sorted({o["steps"] for o in cases}): write_epoch(folder, steps)
        (folder / "cases.json").write_text(json.dumps(dict(prompts=PROMPTS, cases=cases)))
        run_trl(python, folder)
        show_versions(folder)
        losses, samplers = (
            [(i, o) for i, o in enumerate(cases) if o["kind"] == kind] for kind in ("loss", "sampler")
        )
        found = compare_losses(losses, folder) + compare_samplers(samplers, folder)
        show_rounding(cases, folder)
    agrees = max(found) <= BOUND and not any(map(math.isnan, found))
    print(
        f"\nLargest judged difference: {max(found):.1e}; bound: {BOUND:g}."
        f" {'They agree.' if agrees else 'They DIFFER.'}"
    )
    return int(not agrees)

if __name__ == "__main__": sys.exit(main())
