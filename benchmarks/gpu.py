"""All that has to be seen on a GPU, in one command and at most 8 minutes: `python benchmarks/gpu.py --wheels
DIR --output gpu.json`.

Four parts, each in processes of its own, with a time budget, and written to the JSON file as soon as it has
found something: the tests marked `cuda`; Stable Diffusion 1.5 at full size, TRL beside ours beside the UNet's
bare passes; its whole UNet with 8-bit AdamW; Emoji SD's `compare`. A Markdown table ends it. What could not
run stands there as such. Nothing is downloaded: `--collect-wheels DIR`, on a machine with a package index,
makes the folder that a GPU machine without one needs. `--device cpu --tiny` walks the same way in seconds,
and measures nothing worth reading.
"""
import argparse, json, os, platform, re, signal, subprocess, sys, tempfile, time
from datetime import date
from pathlib import Path
from gpu_wheels import collect, unpack, versions

HERE = Path(__file__).resolve().parent
BUDGETS = dict(tests=130, speed=210, whole=60, compare=60)  # seconds; 20 are left for the start and the table
SHOWN = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "trl")

def write(path: Path, value):
    "Write JSON so that no reader sees half of it."
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)

# ---- the parts: each gets its arguments and a function that keeps what is found so far ----

OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.M)

def tests(args, keep):
    "pytest's verdicts, read while it runs."
    chosen = (
        ["-k", "pictures_of_the_gpu_are_read or trap_6_trained_weights", "-m", "not cuda and not slow"]
        if args.tiny
        else ["-m", "cuda"]
    )
    files = ["tests/test_devices.py", "tests/test_precision.py"] if args.tiny else ["tests"]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *chosen, *files]
    with open(args.folder / "tests.txt", "w") as log:
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=log, stderr=log)
    while True:
        ended = process.poll() is not None
        text = (args.folder / "tests.txt").read_text(errors="replace")
        found = dict(OUTCOME.findall(text))
        count = {k: sum(v == k for v in found.values()) for k in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        bad = sorted(k for k, v in found.items() if v in ("FAILED", "ERROR"))
        keep(
            dict(
                **{k.lower(): n for k, n in count.items()}, names_failed=bad, exit=process.poll(),
                tail=text[-6000:] if bad or ended else ""
            )
        )
        if ended: return
        time.sleep(2)

def speed(args, keep):
    "Two settings of speed.py's three sides."
    import torch
    from speed import measure, medians, model_folder, ratios, log
    steps = 1 if args.tiny else 10
    few = dict(sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=1)
    one = dict(
        sample_batch_size=1, sample_num_batches_per_epoch=6, train_batch_size=1,
        train_gradient_accumulation_steps=3
    )
    trl = dict(sample_batch_size=6, sample_num_batches_per_epoch=4, train_batch_size=3)
    settings = (
        {"tiny": (few, {}, [2])}
        if args.tiny
        else {
            "TRL's setting": (trl, {}, [4, 8, 16, 32]),
            "micro-batches of 1": (one, dict(micro_batch_size=1), [2])
        }
    )
    model = str(model_folder("emoji-sd" if args.tiny else "sd15"))
    python, env, why = trl_side(args)
    sides, out = (["TRL"] if python else []) + ["ours", "floor"], dict(without_trl=why, steps=steps)
    for name, (setting, ours, sizes) in settings.items():
        precision = "no" if args.tiny else "bf16"
        plan = dict(
            model=model, ours=ours, threads=0, floor_sizes=sizes,
            settings=setting | dict(mixed_precision=precision, sample_num_steps=steps),
        )
        def on_round(found):
            out[name] = dict(
                settings=plan["settings"], ours=ours, medians=medians(found), found=found, rounds=len(found),
                ratios={f"{a} / {b}": r for (a, b), r in ratios(found).items()}
            )
            keep(out)
        measure(
            dict.fromkeys(sides, plan), python, 1 if args.tiny or name != "TRL's setting" else 2, log, env,
            on_round
        )
        out[name]["estimate"] = estimate(dict(plan["settings"], **ours), args.tiny)
        keep(out)

def trl_side(args):
    "TRL's interpreter, its environment, and if there is neither the reason."
    from trl_env import CACHE
    target = args.folder.parent / "trl"
    if args.wheels and unpack(args.wheels / "trl", target):
        return sys.executable, dict(PYTHONPATH=str(target)), None
    python = (args.env or CACHE) / "bin/python"
    return (
        (python, None, None)
        if python.exists()
        else (None, None, f"TRL is not here: --wheels names no wheels of it, and there is no {python}")
    )

def estimate(settings, tiny, lora=True):
    "GB that `ddpo-nb train --dry-run` expects."
    from ddpo_nb.recipes import model_numbers, plan
    from ddpo_nb.trainer import DDPOConfig
    name = "emoji-sd" if tiny else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return plan(DDPOConfig(**settings), model_numbers(name), lora).memory.peak / 1e9

def whole(args, keep):
    "An epoch of the whole UNet: with 8-bit AdamW, then with AdamW."
    import torch
    from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
    from ddpo_nb.prompts import InputError
    from ddpo_nb.trainer import DDPOConfig, make_trainer
    from speed import model_folder
    from speed_plan import Watch, memory, prompt_function, reward
    out, cuda, model = {}, torch.cuda.is_available(), str(model_folder("emoji-sd" if args.tiny else "sd15"))
    for name, eight_bit in {"8-bit AdamW": True, "AdamW": False}.items():
        settings = dict(
            mixed_precision="no" if args.tiny else "bf16", sample_num_steps=2 if args.tiny else 5,
            sample_batch_size=2, sample_num_batches_per_epoch=1, train_batch_size=2, train_learning_rate=1e-5,
            micro_batch_size=1, train_use_8bit_adam=eight_bit
        )
        if cuda: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
        try:
            trainer = make_trainer(
                DDPOConfig(**settings, logdir=""), reward, prompt_function(),
                StableDiffusionPolicy(load_pipeline(model), use_lora=False)
            )
        except InputError as e:
            out[name] = dict(problem=str(e))
        else:
            trainer.epoch()  # to warm up, and so that the optimizer has its state
            watch = Watch(cuda)
            row = trainer.epoch()
            out[name] = dict(
                seconds=watch.tick(), memory=memory(), estimate=estimate(settings, args.tiny, lora=False),
                grad_norm=row["grad_norm"], settings=settings
            )
            del trainer
        keep(out)

def compared(args, keep):
    "`ddpo-nb compare` from the command line to the report."
    folder = args.folder / "compare"
    size = (
        ["--queries", "4", "--sample-num-steps", "2", "--sample-batch-size", "2", "--train-batch-size", "2"]
        if args.tiny
        else ["--queries", "256"]
    )
    command = [
        "-m", "ddpo_nb", "compare", "--algorithms", "ddpo-is" if args.tiny else "ddpo-is,rwr", "--reward",
        "jpeg_compressibility", "--evaluation-samples", "2" if args.tiny else "16", *size, "--output",
        str(folder)
    ]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=args.folder)
    seconds = time.perf_counter() - start
    rows = (
        [json.loads(o) for o in (folder / "metrics.jsonl").read_text().splitlines()]
        if (folder / "metrics.jsonl").exists()
        else []
    )
    report = (folder / "report.html").stat().st_size if (folder / "report.html").exists() else 0
    found = dict(
        exit=done.returncode, seconds=seconds, in_epochs=sum(r["seconds"] for r in rows),
        queries=sum(r["queries"] for r in rows[-1:]), epochs=len(rows), report_kb=report / 1e3,
        memory=max((r["peak_memory_gb"] for r in rows), default=0), command=" ".join(command[1:])
    )
    keep(
        found
        if done.returncode == 0 and report
        else found
        | dict(problem=f"exit status {done.returncode}, {report} bytes of report", tail=done.stderr[-3000:])
    )

PARTS = dict(tests=tests, speed=speed, whole=whole, compare=compared)

# ---- one after the other ----

def run_part(name, args):
    "A part in a process group of its own, ended with its budget; what it kept, and how it ended."
    kept, budget = args.folder / f"{name}.json", args.budgets.get(name, BUDGETS[name])
    command = [
        sys.executable, str(HERE / "gpu.py"), "--part", name, "--folder", str(args.folder), *args.passed_on
    ]
    start = time.perf_counter()
    with open(args.folder / f"{name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try: how = f"ended with {code}" if (code := process.wait(budget)) else "finished"
    except subprocess.TimeoutExpired: how = f"cut off after {budget} s"
    try: os.killpg(process.pid, signal.SIGKILL)  # whatever it started
    except ProcessLookupError: pass
    process.wait()
    found = json.loads(kept.read_text()) if kept.exists() else {}
    tail = (
        (args.folder / f"{name}.log").read_text(errors="replace")[-3000:] if how.startswith("ended") else ""
    )
    return dict(how=how, seconds=time.perf_counter() - start, found=found) | (dict(log=tail) if tail else {})

def machine(device):
    "The card, its driver, and the versions that were used."
    import torch
    about = dict(date=str(date.today()), python=platform.python_version(), **versions(*SHOWN))
    if device == "cpu": return about | dict(card=f"no GPU: {os.cpu_count()} CPU cores", driver="", cuda="")
    ask = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True
        )
        if has("nvidia-smi")
        else None
    )
    p = torch.cuda.get_device_properties(0)
    return about | dict(
        card=f"{p.name}, {p.total_memory / 1e9:.0f} GB",
        driver=ask.stdout.split("\n")[0].strip() if ask else "", cuda=torch.version.cuda
    )

def has(program):
    from shutil import which
    return which(program) is not None

# ---- the table ----

def number(value, digits=2): return "" if value is None else f"{value:.{digits}f}"

def rows_of_tests(found, tiny):
    what = "the tests' twins on the CPU" if tiny else "tests marked cuda"
    if not found: return [(what, "nothing found", "", "")]
    failed = found["failed"] + found["error"]
    names = "; failed: " + ", ".join(found["names_failed"][:8]) if failed else ""
    return [(what, f"{found['passed']} passed, {failed} failed, {found['skipped']} skipped{names}", "", "")]

def rows_of_speed(found, tiny):
    rows = [("TRL", found["without_trl"], "", "")] if found.get("without_trl") else []
    for name, o in found.items():
        if not isinstance(o, dict): continue
        n = o["settings"]["sample_batch_size"] * o["settings"]["sample_num_batches_per_epoch"]
        where = (
            f"{'Emoji SD' if tiny else 'SD 1.5, LoRA, bf16'}, {name}: {n} pictures of"
            f" {o['settings']['sample_num_steps']} steps"
        )
        for side, m in o["medians"].items():
            expected = (
                f", {o['estimate']:.2f} expected" if side == "ours" and o.get("estimate") and not tiny else ""
            )
            memory = "" if side == "floor" else number(m["memory"]) + expected
            rows.append(
                (
                    f"{where}: {side}", f"{number(m['sampling'])} sampling, {number(m['rest'])} training",
                    number(m["seconds"]), memory
                )
            )
        rows += [
            (f"{where}: {pair}", "", f"**{number(r['seconds'])}**", "") for pair, r in o["ratios"].items()
        ]
    return rows or [("speed", "nothing found", "", "")]

def rows_of_whole(found, tiny):
    what = "Emoji SD" if tiny else "SD 1.5, bf16"
    one = lambda o: (
        (o["problem"], "", "")
        if "problem" in o
        else (
            "an epoch of 2 pictures", number(o["seconds"]),
            f"{number(o['memory'])}, {number(o['estimate'])} expected"
        )
    )
    return [(f"{what}, whole UNet, {name}", *one(o)) for name, o in found.items()] or [
        ("whole UNet", "nothing found", "", "")
    ]

def rows_of_compare(found, tiny):
    if not found: return [("compare", "nothing found", "", "")]
    said = (
        f"failed: {found['problem']}"
        if "problem" in found
        else f"{found['epochs']} epochs, report of {found['report_kb']:.0f} kB"
    )
    return [("Emoji SD, compare", said, number(found["seconds"], 1), number(found["memory"]))]

ROWS = dict(tests=rows_of_tests, speed=rows_of_speed, whole=rows_of_whole, compare=rows_of_compare)

def table(result):
    "Markdown."
    a, tiny = result["machine"], result["tiny"]
    about = [
        a["card"],
        *([f"driver {a['driver']}, CUDA {a['cuda']}"] if a["driver"] else []),
        f"Python {a['python']}", *(f"{k} {a[k]}" for k in SHOWN if k in a)
    ]
    lines = [
        f"{a['date']}: {', '.join(about)}",
        *(["", "A dry run on a CPU: the way is walked, and nothing is measured."] if tiny else []),
        "", "| what | | seconds | peak memory, GB |", "|---|---|---|---|"
    ]
    for name, o in result["parts"].items():
        rows = [(name, o["how"], "", "")] if o["how"].startswith("not run") else ROWS[name](o["found"], tiny)
        lines += ["| " + " | ".join(str(c).replace("|", "/") for c in row) + " |" for row in rows]
        if o["how"].startswith(("cut", "ended")):
            lines.append(f"| {name} | **{o['how']}** | {o['seconds']:.0f} | |")
    return "\n".join(lines)

def budget(text):
    name, _, seconds = text.partition("=")
    if name not in PARTS or not seconds.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r}: give PART=SECONDS, a part being one of {', '.join(PARTS)}"
        )
    return name, int(seconds)

def parse():
    path = lambda o: Path(o).expanduser().resolve()
    parser = argparse.ArgumentParser(description="Everything that has to be seen on a GPU, in one command.")
    parser.add_argument(
        "--output", type=path, default=Path("gpu.json"), help="JSON file for all figures (default: gpu.json)"
    )
    parser.add_argument(
        "--wheels", type=path,
        help="folder that --collect-wheels made: nothing is installed, it goes on Python's path",
    )
    parser.add_argument(
        "--env", type=path,
        help="TRL's environment, if there is one (default: where trl_agreement.py makes it)",
    )
    parser.add_argument(
        "--parts", type=lambda o: o.split(","), default=list(PARTS),
        help=f"which, of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--budget", type=budget, action="append", default=[], metavar="PART=SECONDS",
        help="another time limit for a part"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --tiny")
    parser.add_argument("--tiny", "--dry-run", action="store_true", help="the same way with next to no work")
    parser.add_argument(
        "--collect-wheels", type=path, metavar="DIR",
        help="download what a GPU machine without a package index needs, and end",
    )
    parser.add_argument(
        "--python", default="3.12", help="with --collect-wheels: the GPU machine's Python (default: 3.12)"
    )
    parser.add_argument(
        "--cuda", default="130", help="with --collect-wheels: its CUDA, 130 for 13.0 (default: 130)"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.parts:
        if name not in PARTS: parser.error(f"--parts: there is no {name!r}; choose from {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny: parser.error("--device cpu: a CPU would take days; add --tiny")
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels: there is no folder {str(args.wheels)!r}; --collect-wheels makes it")
    given = dict(wheels=args.wheels, env=args.env, device=args.device)
    args.budgets, args.passed_on = (
        dict(args.budget),
        [o for k, v in given.items() if v for o in (f"--{k}", str(v))] + ["--tiny"] * args.tiny,
    )
    return args

def prepare(args):
    """The environment of all that is started: the package, the wheels, no network, no other GPU, one way
    of adding up."""
    paths = [str(HERE.parent)]
    if args.wheels and unpack(args.wheels / "ours", args.folder / "ours"):
        paths.append(str(args.folder / "ours"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        paths + [o for o in os.environ.get("PYTHONPATH", "").split(os.pathsep) if o]
    )
    os.environ |= dict(
        HF_HUB_OFFLINE="1", MPLBACKEND="Agg", CUBLAS_WORKSPACE_CONFIG=":4096:8",
        TOKENIZERS_PARALLELISM="false"
    )
    if args.device == "cpu": os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path[:0] = paths  # for the versions that the table names

def main():
    args = parse()
    if args.collect_wheels: return collect(args.collect_wheels, args.python, args.cuda)
    if args.part: return PARTS[args.part](args, lambda found: write(args.folder / f"{args.part}.json", found))
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        prepare(args)
        import torch
        there = args.device == "cpu" or torch.cuda.is_available()
        result = dict(machine=machine(args.device if there else "cpu"), tiny=args.tiny, parts={})
        for name in args.parts:
            print(f"{name} …", file=sys.stderr, flush=True)
            result["parts"][name] = (
                run_part(name, args)
                if there
                else dict(how="not run: there is no CUDA GPU", seconds=0, found={})
            )
            write(args.output, result)
        print(table(result))
    return int(not there or any(o["how"] != "finished" for o in result["parts"].values()))

if __name__ == "__main__": sys.exit(main())
