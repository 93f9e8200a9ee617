"""What an epoch costs: TRL 0.23.1, ours, and the floor, which is the network's own passes and nothing else;
in turn, on one machine.

`python benchmarks/speed.py [--setting NAME] [--rounds N]` makes an environment for TRL once, starts both
sides, has each of them do one epoch to warm up, then takes turns. It prints medians and ratios, and writes
every figure to a JSON file if asked to. README.md beside it has the numbers.
"""
import argparse, json, os, platform, shutil, statistics, subprocess, sys, tempfile
from datetime import date
from importlib import resources
from importlib.metadata import version
from pathlib import Path
import torch
from trl_env import CACHE, add_env_option, trl_python

HERE = Path(__file__).parent
_trl = dict(sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3)
_gpu = dict(model="sd15", cuda=True, floor_sizes=[2, 4, 8, 16, 32, 48])
SETTINGS = {
    "emoji": dict(
        model="emoji-sd", cuda=False, settings=_trl | dict(mixed_precision="no"),
        floor_sizes=[12, 24, 48, 64, 96, 128, 192, 288]
    ),
    # a flow, by the algorithm's own settings, which TRL's trainer does not know
    "emoji-sd3": dict(
        model="emoji-sd3", cuda=False, algorithm="flow-grpo", settings={},
        floor_sizes=[16, 32, 48, 64, 96, 128]
    ),
    "sd15": _gpu | dict(settings=_trl | dict(mixed_precision="bf16")),
    "sd15-paper": (
        _gpu
        | dict(
            settings=dict(
                sample_batch_size=8, sample_num_batches_per_epoch=32, train_batch_size=8,
                train_gradient_accumulation_steps=8, mixed_precision="bf16"
            )
        )
    ),
}

# ---- the model ----

def random_sd15(folder):
    """A pipeline of Stable Diffusion 1.5's size with random weights, in fp16, and Emoji SD's tokenizer,
    on the disk."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    from ddpo_nb.policy import load_pipeline
    from ddpo_nb.recipes import model_numbers
    configs, tokenizer = (
        model_numbers("stable-diffusion-v1-5/stable-diffusion-v1-5").configs, load_pipeline().tokenizer
    )
    torch.manual_seed(0)
    text = CLIPTextConfig(**configs["text_encoder"] | dict(eos_token_id=tokenizer.eos_token_id))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # a billion random numbers
        networks = dict(
            unet=UNet2DConditionModel.from_config(configs["unet"]),
            vae=AutoencoderKL.from_config(configs["vae"]), text_encoder=CLIPTextModel(text)
        )
    parts = dict(scheduler=DDIMScheduler.from_config(configs["scheduler"], clip_sample=False)) | {
        k: o.half().cpu() for k, o in networks.items()
    }
    tmp = Path(tempfile.mkdtemp(dir=folder.parent))
    StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False
    ).save_pretrained(tmp)
    shutil.rmtree(tmp / "tokenizer")
    shutil.copytree(emoji_sd() / "tokenizer", tmp / "tokenizer")
    tmp.rename(folder)

def emoji_sd(): return Path(str(resources.files("ddpo_nb"))) / "weights/emoji-sd"

def model_folder(name):
    if name == "emoji-sd": return emoji_sd()
    if name == "emoji-sd3": return name
    folder = CACHE.parent / "random-sd15"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        random_sd15(folder)
    return folder

# ---- both sides ----

class Side:
    """A process that waits to be told what to do, so that its start and its imports are paid once and its
    rival never runs beside it."""
    def __init__(self, command, env=None):
        env = os.environ | dict(HF_HUB_OFFLINE="1") | (env or {})
        self.process = subprocess.Popen(
            [str(o) for o in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self.idle_memory = None

    def answer(self):
        line = self.process.stdout.readline()
        if not line: raise SystemExit(f"{self.process.args[-2]} ended with {self.process.wait()}")
        return json.loads(line)

    def ready(self):
        "Wait until it has loaded the model."
        self.idle_memory = self.answer()["idle_memory"]

    def do(self, command):
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self):
        self.process.stdin.close()
        self.process.wait()

def measure(plans, python, rounds, log, env=None, on_round=None):
    """Figures of each round, after one to warm up. plans: a name, and what it is to do: TRL's is for TRL, the
    floor's for the bare passes, others for us. env: what TRL's side finds in its environment, if its
    interpreter is not one of TRL's own; on_round sees what is found so far."""
    with tempfile.TemporaryDirectory() as folder:
        turns, found = [], []
        for name, plan in plans.items():
            file = Path(folder) / f"{name}.json"
            file.write_text(json.dumps(plan | dict(folder=folder)))
            theirs = [python, *([] if env else ["-I"]), HERE / "speed_trl.py", file]
            side = (
                Side(theirs, env) if name == "TRL" else Side([sys.executable, HERE / "speed_ours.py", file])
            )
            turns.append((name, side, "floor" if name == "floor" else "epoch"))
        for _, side, _ in turns: side.ready()  # they load side by side, and work in turn
        for i in range(rounds + 1):
            row = {}
            for name, side, command in turns[::1 if i % 2 else -1]:
                row[name] = side.do(command) | dict(idle_memory=side.idle_memory)
                log(f"{'warming up' if not i else f'round {i}'}: {name} {row[name]['seconds']:.2f} s")
            if i: found.append(row)
            if i and on_round: on_round(found)
        for _, side, _ in turns: side.end()
    return found

# ---- the table ----

def medians(found):
    samples = lambda name, key: [row[name][key] for row in found]
    return {
        name: {
            k: statistics.median(samples(name, k))
            for k in ("seconds", "sampling", "rest", "memory", "idle_memory")
        }
        for name in found[0]
    }

def ratios(found):
    "The median over rounds of each round's own ratio: what slows the machine for a while slows both."
    ratio = lambda a, b, key: statistics.median(row[a][key] / row[b][key] for row in found)
    return {
        (a, b): {k: ratio(a, b, k) for k in ("seconds", "sampling", "rest")}
        for a, b in (("TRL", "ours"), ("ours", "floor"))
        if a in found[0]
    }

def show(found, samples):
    "The medians and the ratios, as a Markdown table."
    print(
        "\n| | s an epoch | sampling | reward, training | images a second | peak memory, GB | of it before"
        " the first epoch |\n|---|---|---|---|---|---|---|"
    )
    for name, m in medians(found).items():
        print(
            f"| {name} | {m['seconds']:.2f} | {m['sampling']:.2f} | {m['rest']:.2f} |"
            f" {samples / m['seconds']:.2f} | "
            + (f"{m['memory']:.2f} | {m['idle_memory']:.2f} |" if name != "floor" else "| |")
        )
    for (a, b), r in ratios(found).items():
        print(f"| {a} / {b} | **{r['seconds']:.2f}** | {r['sampling']:.2f} | {r['rest']:.2f} | | | |")

def samples_of(plan):
    "Pictures of an epoch."
    if plan["algorithm"]:
        from ddpo_nb.trainer import make_config
        return make_config(plan["algorithm"], plan["model"], **plan["settings"]).samples_per_epoch
    return plan["settings"]["sample_batch_size"] * plan["settings"]["sample_num_batches_per_epoch"]

def hardware():
    if torch.cuda.is_available(): return torch.cuda.get_device_name()
    name = (
        next(
            (
                o.split(":")[1].strip()
                for o in Path("/proc/cpuinfo").read_text().splitlines()
                if o.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return f"{os.cpu_count()} CPU cores ({name}, {torch.backends.cpu.get_cpu_capability()})"

def log(text): print(text, file=sys.stderr, flush=True)

def pairs(text):
    key, _, value = text.partition("=")
    try: return key, json.loads(value)
    except json.JSONDecodeError: return key, value

def main():
    parser = argparse.ArgumentParser(
        description="Seconds and memory of an epoch: TRL 0.23.1, ours, and the UNet's bare passes."
    )
    parser.add_argument(
        "--setting", choices=SETTINGS, default="emoji",
        help="what to measure (default: emoji; the others want a CUDA GPU)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds after the first, which warms up (default: 5)"
    )
    parser.add_argument(
        "--set", type=pairs, action="append", default=[], metavar="FIELD=VALUE",
        help="a setting of both sides, such as sample_num_steps=10"
    )
    parser.add_argument(
        "--ours", type=pairs, action="append", default=[], metavar="FIELD=VALUE",
        help="a setting of our side only, such as compile=true"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of each side (default: PyTorch's own number)"
    )
    parser.add_argument("--json", type=Path, help="file for every figure of every round")
    add_env_option(parser)
    args = parser.parse_args()
    chosen = SETTINGS[args.setting]
    if args.rounds < 1: parser.error("--rounds: give 1 or more")
    if chosen["cuda"] and not torch.cuda.is_available():
        return print(f"{args.setting} wants a CUDA GPU, and there is none: nothing measured")
    plan = dict(
        model=str(model_folder(chosen["model"])), settings=chosen["settings"] | dict(args.set),
        ours=dict(args.ours), threads=args.threads, floor_sizes=chosen["floor_sizes"],
        algorithm=chosen.get("algorithm")
    )
    about = dict(
        date=str(date.today()), hardware=hardware(), torch=version("torch"), diffusers=version("diffusers"),
        setting=args.setting, **plan, rounds=args.rounds
    )
    sides = ("ours", "floor") if plan["algorithm"] else ("TRL", "ours", "floor")
    python = trl_python(args.env) if "TRL" in sides else None
    found = measure(dict.fromkeys(sides, plan), python, args.rounds, log)
    print(
        f"{about['date']}, {about['hardware']}, PyTorch {about['torch']}; {args.setting}, {plan['settings']}"
        + (f"; ours: {plan['ours']}" if args.ours else "")
        + f"; medians of {args.rounds} rounds; the floor's rows at a time: {found[-1]['floor']['sizes']}"
    )
    show(found, samples_of(plan))
    if args.json: args.json.write_text(json.dumps(about | dict(model=chosen["model"], found=found), indent=1))

if __name__ == "__main__": main()
