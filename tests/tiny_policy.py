"Untrained policies of the tiny pipelines, and what training changes in them."
import torch
from ddpo_nb.loading import family_of
from ddpo_nb.tiny import tiny_pipeline

def tiny_policy(kind, lora=True, /, **settings):
    "The same weights at each call."
    torch.manual_seed(0)
    pipe = tiny_pipeline(kind)
    policy = family_of(pipe)(pipe, use_lora=lora, **settings)
    policy.text_window = 16  # of the flows' alone
    return policy

def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.policy.trainable_parameters()])
