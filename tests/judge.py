"""An independent judge of Emoji SD: a small classifier trained on fresh renders, never on the model's
pictures.

`python tests/judge.py [MODEL]` trains it, prints its accuracy on unseen renders, then asks the model for
every noun on every colour and prints how often the judge sees the right object and the right colour, at T =
50 and T = 20 (η = 1, guidance 5).
"""
import sys, time
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from ddpo_nb.emoji_sd import COLOUR_NAMES, NOUNS, captions, random_scenes

class Judge(nn.Module):
    "Four strided convolutions, one head for the noun, one for the background's colour."
    def __init__(self, width=32):
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 4 * width]
        layers = [
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip(sizes, sizes[1:])
        ]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        self.noun, self.colour = nn.Linear(64 * width, len(NOUNS)), nn.Linear(64 * width, len(COLOUR_NAMES))
    def forward(self, x):
        h = self.body(x)
        return self.noun(h), self.colour(h)

def soften(x, rng):
    """Blur and noise of random strength: the judge should look at the object, not at the sharpness of its
    edges."""
    blurred = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, 1)
    return torch.lerp(x, blurred, float(rng.random())) + 0.05 * float(rng.random()) * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))
    )

def train_judge(steps=1000, batch=128):
    torch.manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rng = np.random.default_rng((77, step))
        x, nouns, colours = random_scenes(batch, rng)
        n, c = judge(soften(x, rng))
        loss = F.cross_entropy(n, torch.tensor(nouns), label_smoothing=0.05) + F.cross_entropy(
            c, torch.tensor(colours)
        )
        optimizer.zero_grad(); loss.backward(); optimizer.step(); schedule.step()
    return judge.eval()

@torch.no_grad()
def accuracy(judge, images, nouns, colours):
    "Shares of images (N, 3, 64, 64) in [-1, 1] whose noun and colour the judge sees as asked for."
    n, c = judge(images)
    return [(p.argmax(1).numpy() == np.asarray(want)).mean().item() for p, want in ((n, nouns), (c, colours))]

def unseen_renders(judge, n=2000):
    x, nouns, colours = random_scenes(n, np.random.default_rng(999))
    return accuracy(judge, x, nouns, colours)

@torch.no_grad()
def pictures(pipe, pairs, steps, guidance=5.0, batch=114):
    """One picture of each (noun, colour), (N, 3, 64, 64) in [-1, 1], from noise seeded by its place in
    the list."""
    prompts = [captions(NOUNS[n], COLOUR_NAMES[c])[2] for n, c in pairs]
    generators = [torch.Generator().manual_seed(i) for i in range(len(pairs))]
    out = [
        pipe(
            prompts[i : i + batch], num_inference_steps=steps, guidance_scale=guidance, eta=1.0,
            generator=generators[i : i + batch], output_type="pt"
        ).images
        for i in range(0, len(pairs), batch)
    ]
    return torch.cat(out) * 2 - 1

if __name__ == "__main__":
    from ddpo_nb.policy import load_pipeline
    pipe, start = load_pipeline(*sys.argv[1:2]), time.time()
    judge = train_judge()
    print(
        "judge on 2000 unseen renders: object %.3f, colour %.3f (trained in %.0f s)"
        % (*unseen_renders(judge), time.time() - start)
    )
    pairs = [(n, c) for n in range(len(NOUNS)) for c in range(len(COLOUR_NAMES))]
    for steps in (50, 20):
        start, images = time.time(), pictures(pipe, pairs, steps)
        nouns, colours = zip(*pairs)
        print(
            "T = %d: object %.3f, colour %.3f of %d pictures (%.0f s)"
            % (steps, *accuracy(judge, images, nouns, colours), len(pairs), time.time() - start),
            flush=True,
        )
        seen, _ = judge(images)
        wrong = [NOUNS[n] for (n, c), p in zip(pairs, seen.argmax(1).tolist()) if n != p]
        print(
            "  most often missed:",
            ", ".join(
                f"{w} {wrong.count(w)}/8" for w in sorted(set(wrong), key=wrong.count, reverse=True)[:8]
            ),
        )
