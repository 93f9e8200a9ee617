"""What both sides of speed.py share: the work, and the way they are told to do it. Needs nothing that only
one side has."""
import io, json, resource, sys, time
import torch
from PIL import Image

PROMPTS = ["cat", "dog", "bear", "lion", "fox", "frog", "pig", "ant"]
SETTINGS = dict(
    sample_num_steps=50, sample_eta=1.0, sample_guidance_scale=5.0, train_cfg=True, train_num_inner_epochs=1,
    train_gradient_accumulation_steps=1, train_learning_rate=3e-4, train_clip_range=1e-4,
    per_prompt_stat_tracking=True, per_prompt_stat_tracking_buffer_size=32, seed=0
)

def prompt_function():
    "Prompts in turn, the same on both sides."
    i = iter(range(10**9))
    return lambda: (PROMPTS[next(i) % len(PROMPTS)], {})

def reward(images, prompts, metadata):
    "Minus the size of a JPEG of quality 95, in kB."
    pictures = (images.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    def size(o):
        with io.BytesIO() as f:
            Image.fromarray(o).save(f, "JPEG", quality=95)
            return f.tell() / 1000
    return torch.tensor([-size(o) for o in pictures]), {}

class Watch:
    "Seconds between two `tick`s; on a GPU, of work that is done."
    def __init__(self, cuda): self.cuda, self.last = cuda, time.perf_counter()
    def tick(self):
        if self.cuda: torch.cuda.synchronize()
        last, self.last = self.last, time.perf_counter()
        return self.last - last

def memory():
    "Most memory so far in GB: the GPU's if there is one, else this process's."
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated() / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )

def serve(commands):
    "Read a command's name a line, and answer with what it returns, as JSON, on a line of its own."
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints must not come between
    print(json.dumps(dict(idle_memory=memory())), file=out, flush=True)
    for line in sys.stdin: print(json.dumps(commands[line.strip()]()), file=out, flush=True)
