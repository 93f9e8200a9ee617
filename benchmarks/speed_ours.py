"Our side of speed.py, and the floor: the network's bare passes. `python speed_ours.py PLAN`"
import json, sys, warnings
from pathlib import Path
import torch
from ddpo_nb.policy import by_tensor, load_policy
from ddpo_nb.prompts import prompt_source
from ddpo_nb.rewards import get_reward
from ddpo_nb.trainer import DDPOConfig, make_config, make_trainer
from speed_plan import SETTINGS, Watch, memory, prompt_function, reward, serve

class Floor:
    """The network's own passes, forward for sampling, forward and backward for training: as many rows as an
    epoch, and nothing else."""
    def __init__(self, trainer, sizes):
        self.trainer, self.policy, self.config = trainer, trainer.policy, trainer.config
        self.network, self.cuda = trainer.policy.trained, torch.cuda.is_available()
        c, guided = self.config, self.policy.passes()
        steps = max(1, int(int(self.policy.stochastic.sum()) * c.train_timestep_fraction))
        trained = c.samples_per_epoch * steps * self.policy.passes(c.train_cfg) * c.train_num_inner_epochs
        drawn = c.samples_per_epoch * c.sample_num_steps * guided
        # the pretrained model is asked about every step that has a price
        self.rows = dict(forward=drawn + (trained if c.kl_coef else 0), backward=trained)
        self.sizes = {kind: min(sizes, key=lambda n: self.a_row(kind, n)) for kind in self.rows}

    def inputs(self, n):
        policy, dtype = self.policy, self.network.dtype
        text = by_tensor(lambda v: v.expand(n, *v.shape[1:]).to(dtype), policy.encode(["cat"])[0:1].prompt)
        noise = torch.randn(n, *policy.latent_shape, device=policy.device).to(dtype)
        return noise, torch.full((n,), 500, device=policy.device), text

    def passes(self, kind, n, rows):
        inputs, watch, parameters = self.inputs(n), Watch(self.cuda), self.policy.trainable_parameters()
        with self.trainer.accelerator.autocast(), torch.set_grad_enabled(kind == "backward"):
            while rows > 0:
                m, rows = min(n, rows), rows - n
                x, t, text = (by_tensor(lambda v: v[:m], o) for o in inputs)
                out = self.policy.forward(self.network, x, t, text)
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
    given, floor = plan["settings"] | plan["ours"] | dict(logdir=""), []
    if plan.get("algorithm"):
        config = make_config(plan["algorithm"], plan["model"], **given)
        judged = get_reward("scenes", plan["model"]), prompt_source("scenes")
    else:
        config = DDPOConfig(**SETTINGS | given)
        judged = reward, prompt_function()
    trainer = make_trainer(config, *judged, load_policy(plan["model"], lora_rank=config.lora_rank))

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
