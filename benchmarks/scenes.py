"""What a model of scenes gets right, by kind of prompt and by what is kept aside, in the eyes of two readers.

`python benchmarks/scenes.py` paints prompts of every kind with the bundled Emoji SD3; `--lora
DIR`, given once or several times, with weights that were trained on it. It prints the shares that are right,
with 95 % intervals over pictures, beside variety and sharpness; `--json` keeps every picture's verdict. The
second reader, the examiner, is no part of the package: see `tests/scene_examiner.py`.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from scene_examiner import WEIGHTS, load_examiner, shares_right
from ddpo_nb.compare import exam_generators, latent_spread
from ddpo_nb.emoji_sd import to_tensor
from ddpo_nb.emoji_sd3 import completed, draw
from ddpo_nb.policy import load_policy
from ddpo_nb.rollout import rollout
from ddpo_nb.scenes import KINDS, SHOWN, draw_scene, facts, load_reader, read, reader_from, wordings

COPIES = 6  # pictures of a prompt whose variety is asked for

def asked_scenes(n, seed):
    "n scenes of each kind, of those shown to everybody and of those kept aside: (kind, shown to) -> scenes."
    rng = np.random.default_rng([977, seed])
    asked = [(kind, to) for kind in KINDS for to in SHOWN if to == "both" or kind not in ("single", "colour")]
    return {key: [draw_scene(rng, *key) for _ in range(n)] for key in asked}

def paint(policy, prompts, seed):
    "Pictures (N, 3, 64, 64) in [0, 1], one of each prompt, from noise that training never sees."
    return rollout(policy, prompts, exam_generators(seed, len(prompts)), batch_size=64).images

def sharpness(images):
    "Mean absolute Laplacian of the grey values, (N,): 0 for a plain picture, less for a blurred one."
    kernel = torch.tensor([[0., 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(images.mean(1, keepdim=True), kernel).abs().mean((1, 2, 3))

def variety(policy, scenes, seed):
    "Mean distance of the pictures of one prompt in the autoencoder's latents, as `compare` measures it."
    prompts = [wordings(o)[0] for o in scenes for _ in range(COPIES)]
    return latent_spread(paint(policy, prompts, seed + 1000), COPIES, policy.latents_of)

def interval(right):
    "Share and half the width of its 95 % interval (Wilson's would differ at the ends alone)."
    return f"{np.mean(right):6.1%} ± {1.96 * np.std(right) / np.sqrt(len(right)):5.1%}"

def judges(reader=None, examiner=WEIGHTS):
    "Who judges: name -> (images, scenes) to whether all that was asked for is there, (N,) bool."
    (network, threshold), second = reader or load_reader(), load_examiner(examiner)
    def by_reader(images, scenes):
        readings = read(network, images, threshold)
        return np.array([all(facts(o, r).values()) for o, r in zip(scenes, readings)])
    return dict(reader=by_reader, examiner=lambda *o: shares_right(second, *o))

def listed(verdicts):
    "The same for JSON: kind/shown to -> who -> 0 or 1 for each picture."
    return {"/".join(k): {who: o.astype(int).tolist() for who, o in v.items()} for k, v in verdicts.items()}

def measure(policy, asked, readers, seed, gallery=None):
    "Verdicts of each reader on each kind's pictures, sharpness, variety."
    verdicts, sharp, rows = {}, [], []
    for key, scenes in asked.items():
        images = paint(policy, [wordings(o)[0] for o in scenes], seed)
        verdicts[key] = {who: judge(images, scenes) for who, judge in readers.items()}
        sharp += sharpness(images).tolist()
        rows.append(np.hstack(list((images[:16].permute(0, 2, 3, 1) * 255).round().byte().numpy())))
        print(
            f"  {key[0]:10}{key[1]:8}", "  ".join(f"{w} {interval(o)}" for w, o in verdicts[key].items()),
            flush=True
        )
    if gallery: Image.fromarray(np.vstack(rows)).save(gallery)
    spread = variety(policy, [o[i] for o in asked.values() for i in range(2)], seed)
    return verdicts, float(np.mean(sharp)), float(np.mean(spread))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sd3")
    parser.add_argument("--lora", action="append", default=[], help="trained weights; also: base")
    parser.add_argument("--reader", type=Path, help="default: the bundled one")
    parser.add_argument("--examiner", type=Path, help="weights of another examiner", default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--noise-level", type=float, default=0.0, help="of a stochastic step; 0: the ODE")
    parser.add_argument("--each", type=int, default=60, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gallery", type=Path,
                        help="file for each weights' first pictures of a kind; -0, -1, … are put to it")
    parser.add_argument("--json", type=Path, help="file for every verdict")
    args = parser.parse_args()
    readers = judges(reader_from(args.reader) if args.reader else None, args.examiner)
    how = dict(kind="flow-sde", noise_level=args.noise_level) if args.noise_level else dict(kind="ode")
    asked, found = asked_scenes(args.each, args.seed), []
    renders = to_tensor([draw(completed(o, rng := np.random.default_rng(i)), rng)[0]
                         for i, o in enumerate(asked["position", "both"])]) / 2 + 0.5
    print(
        f"T = {args.steps}, guidance {args.guidance}, {how}; sharpness of renders"
        f" {sharpness(renders).mean():.4f}"
    )
    for lora in args.lora or ["base"]:
        began = time.time()
        policy = load_policy(args.model, None if lora == "base" else lora, use_lora=lora != "base")
        policy.configure(args.steps, args.guidance, **how)
        print(lora)
        gallery = args.gallery and args.gallery.with_stem(f"{args.gallery.stem}-{len(found)}")
        verdicts, sharp, spread = measure(policy, asked, readers, args.seed, gallery)
        for to in SHOWN:
            both = lambda who: np.concatenate([o[who] for (_, t), o in verdicts.items() if t == to])
            print(f"  all kinds, {to:8}", "  ".join(f"{who} {interval(both(who))}" for who in readers))
        print(f"  sharpness {sharp:.4f}, variety {spread:.3f}; {time.time() - began:.0f} s")
        found.append(dict(weights=lora, sharpness=sharp, variety=spread, verdicts=listed(verdicts)))
        if args.json:
            about = {k: v for k, v in vars(args).items() if isinstance(v, (int, float))}
            args.json.write_text(json.dumps(about | dict(found=found)))

if __name__ == "__main__": main()
