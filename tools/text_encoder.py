"""Is it better to train Emoji SD's text encoder together with the UNet, or to take it ready-made from a CLIP
trained on the same pairs?

`python tools/text_encoder.py [STEPS]` trains a small CLIP on fresh scenes and their captions, then two UNets
on the same batches: one with a text encoder that learns along, one with the CLIP's, frozen. An independent
judge (tests/judge.py) looks at what they paint after STEPS steps (1,000 by default). Both use the bundled
autoencoder and tokenizer; nothing is kept.
"""
import sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig
from diffusers.optimization import get_cosine_schedule_with_warmup
from ddpo_nb import emoji_sd as e

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from judge import accuracy, pictures, train_judge, unseen_renders

def build_clip(tokenizer) -> CLIPModel:
    "A CLIP whose text half is Emoji SD's text encoder, and whose other half is a small vision transformer."
    vision = CLIPVisionConfig(
        image_size=64, patch_size=8, hidden_size=96, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, projection_dim=96
    )
    text = e.build_text_encoder(tokenizer).config
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=96)
    )

def train_clip(tokenizer, steps=800, batch=128):
    "Contrastive training on pairs of scene and caption; scenes with one caption count as one class."
    torch.manual_seed(0)
    clip, ids = build_clip(tokenizer), e.tokenize_captions(tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    for step in range(steps):
        rng = np.random.default_rng((5, step))
        x, nouns, colours = e.random_scenes(batch, rng)
        tokens = ids[
            torch.from_numpy(rng.integers(len(ids), size=batch)), torch.from_numpy(nouns),
            torch.from_numpy(colours)
        ]
        out = clip(input_ids=tokens, pixel_values=x)
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        same = same / same.sum(1, keepdim=True)
        loss = (
            F.cross_entropy(out.logits_per_text, same)
            + F.cross_entropy(out.logits_per_image, same.T / same.T.sum(1, keepdim=True))
        ) / 2
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return clip.eval()

@torch.no_grad()
def retrieval(clip, tokenizer):
    "Share of unseen scenes that find their own caption among all 912 of noun and colour."
    text = [e.captions(n, c)[2] for n in e.NOUNS for c in e.COLOUR_NAMES]
    tokens = tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    x, nouns, colours = e.random_scenes(500, np.random.default_rng(999))
    best = clip(input_ids=tokens, pixel_values=x).logits_per_image.argmax(1).numpy()
    return (best == nouns * len(e.COLOURS) + colours).mean()

def text_encoder_of(clip, tokenizer):
    "The text half of `clip`, frozen."
    encoder = e.build_text_encoder(tokenizer)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.requires_grad_(False)

def main(steps=1000):
    bundled, clock = e.load(), time.time
    start, judge = clock(), train_judge()
    print(
        "judge on 2000 unseen renders: object %.3f, colour %.3f (%.0f s)"
        % (*unseen_renders(judge), clock() - start),
        flush=True,
    )
    start, clip = clock(), train_clip(bundled.tokenizer)
    print(
        f"CLIP: {retrieval(clip, bundled.tokenizer):.3f} of 500 unseen scenes find their caption among 912"
        f" ({clock() - start:.0f} s)",
        flush=True,
    )
    pairs = [(n, (n + k) % len(e.COLOURS)) for n in range(len(e.NOUNS)) for k in (0, 3)]
    for name, encoder in {
        "trained together": None, "taken from CLIP": text_encoder_of(clip, bundled.tokenizer)
    }.items():
        with tempfile.TemporaryDirectory() as folder:
            bundled.tokenizer.save_pretrained(Path(folder) / "tokenizer")
            start, pipe = clock(), e.train_unet(
                Path(folder), bundled.vae, steps, save_every=steps, repeats=8, text_encoder=encoder
            )
        pipe.set_progress_bar_config(disable=True)
        spent, seen = clock() - start, accuracy(judge, pictures(pipe, pairs, 20), *zip(*pairs))
        print(
            "%s: object %.3f, colour %.3f of %d pictures at T = 20, guidance 5 (%.0f s for %d steps)"
            % (name, *seen, len(pairs), spent, steps),
            flush=True,
        )

if __name__ == "__main__": main(*map(int, sys.argv[1:2]))
