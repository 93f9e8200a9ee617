"TRL's side of speed.py: `python -I speed_trl.py PLAN` in TRL's own environment. It only looks at the clock."
import json, sys, warnings
from pathlib import Path
import torch
from accelerate import PartialState

PartialState()  # TRL's imports log, and accelerate's logger wants a state
sys.path.insert(0, str(Path(__file__).parent))
from speed_plan import SETTINGS, Watch, memory, prompt_function, reward, serve
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

def main(plan):
    warnings.filterwarnings("ignore")
    if plan["threads"]: torch.set_num_threads(plan["threads"])
    pipeline = DefaultDDPOStableDiffusionPipeline(plan["model"], use_lora=True)
    config = DDPOConfig(
        **SETTINGS | plan["settings"], save_freq=10**9, num_epochs=1,
        project_kwargs=dict(project_dir=plan["folder"])
    )
    trainer = DDPOTrainer(config, reward, prompt_function(), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    watch, times, steps = Watch(torch.cuda.is_available()), {}, [0, 0]
    sample = trainer._generate_samples
    def timed_sample(*args, **kwargs):
        watch.tick()
        out = sample(*args, **kwargs)
        times["sampling"] = watch.tick()
        return out
    trainer._generate_samples = timed_sample

    def epoch():
        start = Watch(watch.cuda)
        steps[1] = trainer.step(*steps)
        steps[0] += 1
        seconds = start.tick()
        return dict(
            seconds=seconds, sampling=times["sampling"], rest=seconds - times["sampling"], memory=memory()
        )
    serve(dict(epoch=epoch))

if __name__ == "__main__": main(json.loads(Path(sys.argv[1]).read_text()))
