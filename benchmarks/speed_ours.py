"Our side of speed.py, and the floor: the UNet's bare passes. `python speed_ours.py PLAN`"
import json, sys, warnings
from pathlib import Path
import torch
from ddpo_nb.policy import StableDiffusionPolicy, load_pipeline
from ddpo_nb.trainer import DDPOConfig, make_trainer
from speed_plan import SETTINGS, Watch, memory, prompt_function, reward, serve

class Floor:
    """The UNet's own passes, forward for sampling, forward and backward for training: as many rows as an
    epoch, and nothing else."""
    def __init__(self, trainer, sizes):
        self.trainer, self.policy, self.config = trainer, trainer.policy, trainer.config
        self.unet, self.cuda = trainer.policy.pipeline.unet, torch.cuda.is_available()
        c, guided = self.config, 2 if self.config.sample_guidance_scale > 1 else 1
        self.rows = dict(
            forward=c.samples_per_epoch * c.sample_num_steps * guided,
            backward=c.samples_per_epoch
            * int(self.policy.stochastic.sum())
            * (guided if c.train_cfg else 1)
            * c.train_num_inner_epochs,
        )
        self.sizes = {kind: min(sizes, key=lambda n: self.a_row(kind, n)) for kind in self.rows}

    def inputs(self, n):
        text = self.policy.encode(["cat"])[0:1].prompt.expand(n, -1, -1)
        return (
            torch.randn(n, *self.policy.latent_shape, device=self.policy.device).to(self.unet.dtype),
            torch.full((n,), 500, device=self.policy.device), text.to(self.unet.dtype)
        )

    def passes(self, kind, n, rows):
        inputs, watch, parameters = self.inputs(n), Watch(self.cuda), self.policy.trainable_parameters()
        with self.trainer.accelerator.autocast(), torch.set_grad_enabled(kind == "backward"):
            while rows > 0:
                m, rows = min(n, rows), rows - n
                out = self.unet(*(o[:m] for o in inputs), return_dict=False)[0]
                if kind == "backward": out.float().square().mean().backward()
        seconds = watch.tick()
        for p in parameters: p.grad = None
        return seconds

    def a_row(self, kind, n):
        """Seconds a row, the best of five tries after one to warm up; none if the memory does not
        hold that many."""
        try: return min([self.passes(kind, n, n) for _ in range(6)][1:]) / n
        except torch.OutOfMemoryError: return float("inf")

    def __call__(self):
        sampling, training = (
            self.passes(kind, self.sizes[kind], self.rows[kind]) for kind in ("forward", "backward")
        )
        return dict(
            seconds=sampling + training, sampling=sampling, rest=training, memory=memory(), sizes=self.sizes,
            rows=self.rows
        )

def main(plan):
    warnings.filterwarnings("ignore")
    if plan["threads"]: torch.set_num_threads(plan["threads"])
    config = DDPOConfig(**SETTINGS | plan["settings"] | plan["ours"] | dict(logdir=""))
    trainer, floor = (
        make_trainer(
            config, reward, prompt_function(),
            StableDiffusionPolicy(load_pipeline(plan["model"]), lora_rank=config.lora_rank),
        ),
        [],
    )

    def epoch():
        watch = Watch(torch.cuda.is_available())
        row = trainer.epoch()
        seconds = watch.tick()
        return dict(
            seconds=seconds, sampling=row["seconds_sampling"], rest=seconds - row["seconds_sampling"],
            memory=memory()
        )
    def run_floor():
        if not floor: floor.append(Floor(trainer, plan["floor_sizes"]))
        return floor[0]()
    serve(dict(epoch=epoch, floor=run_floor))

if __name__ == "__main__": main(json.loads(Path(sys.argv[1]).read_text()))
