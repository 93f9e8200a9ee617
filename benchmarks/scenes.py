"""What a model of scenes gets right, by kind of prompt and by what is kept aside, in the eyes of two readers.

`python benchmarks/scenes.py --model DIR --reader DIR --examiner DIR` paints prompts of every kind, at the
settings given, and prints the share that is right, with 95 % intervals, as a table.
"""
import argparse, json, sys, time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from scene_examiner import load_examiner, shares_right
from ddpo_nb.scenes import KINDS, SHOWN, draw_scene, facts, read, reader_from, wordings

def prompts_of(n, seed):
    "n scenes of each kind, of those shown to everybody and of those kept aside: (kind, shown to) -> scenes."
    rng = np.random.default_rng(seed)
    asked = [(kind, to) for kind in KINDS for to in SHOWN if to == "both" or kind not in ("single", "colour")]
    return {key: [draw_scene(rng, *key) for _ in range(n)] for key in asked}

def paint(pipe, scenes, steps, guidance, seed, tokens):
    "Pictures (N, 3, 64, 64) in [0, 1], one of each scene."
    out = []
    for start in range(0, len(scenes), 32):
        part = scenes[start:start + 32]
        noise = [torch.Generator().manual_seed(seed * 100_000 + start + i) for i in range(len(part))]
        out.append(pipe([wordings(o)[0] for o in part], num_inference_steps=steps, guidance_scale=guidance,
                        generator=noise, max_sequence_length=tokens, output_type="pt").images)
    return torch.cat(out).float()

def interval(right):
    "Share and half the width of its 95 % interval (Wilson's would differ at the ends alone)."
    return f"{np.mean(right):6.1%} ± {1.96 * np.std(right) / np.sqrt(len(right)):5.1%}"

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--reader", type=Path, required=True)
    parser.add_argument("--examiner", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--each", type=int, default=40, help="pictures of each kind")
    parser.add_argument("--tokens", type=int, default=1, help="of the silent T5 (pipeline's default: 256)")
    parser.add_argument("--shift", type=float, help="of the scheduler (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gallery", type=Path, help="file for the first pictures of each kind")
    args = parser.parse_args()
    pipe = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if args.shift: pipe.scheduler = type(pipe.scheduler)(shift=args.shift)
    reader, threshold = reader_from(args.reader)
    examiner = load_examiner(args.examiner) if args.examiner else None
    began, rows, found = time.time(), [], {}
    for key, scenes in prompts_of(args.each, args.seed).items():
        images = paint(pipe, scenes, args.steps, args.guidance, args.seed, args.tokens)
        readings = read(reader, images, threshold)
        right = {"reader": [all(facts(o, r).values()) for o, r in zip(scenes, readings)]}
        if examiner: right["examiner"] = shares_right(examiner, images, scenes)
        found[key] = right
        shares = "  ".join(f"{who} {interval(o)}" for who, o in right.items())
        print(f"{key[0]:10}{key[1]:8}  {shares}", flush=True)
        rows.append(np.hstack(list((images[:16].permute(0, 2, 3, 1) * 255).byte().numpy())))
    for who in ("reader", "examiner") if examiner else ("reader",):
        both = np.concatenate([o[who] for (_, to), o in found.items() if to == "both"])
        print(f"{'all kinds, shown to both':28}{who} {interval(both)}")
    if args.gallery: Image.fromarray(np.vstack(rows)).save(args.gallery)
    print(json.dumps(dict(seconds=round(time.time() - began), pictures=args.each * len(found))))

if __name__ == "__main__": main()
