"""How much of a batch's gradient is signal? Batches of the untouched model's pictures, each with the gradient
that its epoch would begin with, and how far these agree.

    python benchmarks/gradient_noise.py [--algorithms flow-grpo,nft] [--model emoji-sd3] [--reward scenes] ...

Of K gradients g = signal + noise, the mean inner product of two different ones is the squared length of the
signal, without bias (it may come out negative), and what is left of the mean squared length is the noise's.
The share printed is signal / noise: its inverse is the number of batches after which both are of one size.
Its error is the jackknife's, over batches. Nothing is updated, so what is asked is how training begins.
"""
import argparse

import numpy as np
import torch

from ddpo_nb.cli import _option
from ddpo_nb.config import make_config
from ddpo_nb.policy import load_policy
from ddpo_nb.prompts import prompt_source
from ddpo_nb.rewards import get_reward
from ddpo_nb.rollout import sample_generator
from ddpo_nb.trainer import make_trainer
from speed import hardware

def shares(gram):
    "Squared signal and squared noise, from the inner products of K gradients, (K, K)."
    n, whole = len(gram), np.trace(gram) / len(gram)
    signal = (gram.sum() - np.trace(gram)) / (n * (n - 1))
    return signal, whole - signal

def signal_to_noise(gradients):
    "Squared signal over squared noise of K gradients, (K, D), and the jackknife's standard error."
    gram = (gradients.double() @ gradients.double().T).numpy()
    n, ratio = len(gram), lambda kept: np.divide(*shares(gram[np.ix_(kept, kept)]))
    without = np.array([ratio([j for j in range(n) if j != i]) for i in range(n)])
    return ratio([*range(n)]), np.sqrt((n - 1) / n * ((without - without.mean())**2).sum())

def gradients_of(algorithm, model, reward, prompts, batches, seed, changes, on_batch=print):
    "The gradient that each of so many epochs would begin with, (K, D), and the pictures' mean reward."
    config = make_config(algorithm, model, True, logdir="", seed=seed, **changes)
    torch.manual_seed(seed)
    policy = load_policy(model, lora_rank=config.lora_rank)
    trainer = make_trainer(config, get_reward(reward, model), prompt_source(prompts, seed), policy)
    found, rewards = [], []
    for b in range(batches):
        trainer.epochs_done = b  # other noise, other prompts; the weights stay
        work = trainer.collect()
        generator = sample_generator(seed, b, 2**31)
        examples = trainer.objective.examples(policy, work.trajectories, work.advantages, generator)
        trainer.gradient(work.trajectories, examples)
        flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable_parameters()]
        found.append(torch.cat([g.flatten() for g in flat]).clone())
        trainer.optimizer.zero_grad()
        rewards.append(work.row["reward_mean"])
        on_batch(f"{algorithm}: batch {b + 1} of {batches}, reward {rewards[-1]:.3f}")
    return torch.stack(found), float(np.mean(rewards))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--algorithms", default="flow-grpo,nft")
    parser.add_argument("--model", default="emoji-sd3")
    parser.add_argument("--reward", default="scenes")
    parser.add_argument("--prompts", default="scenes")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument(
        "--set", nargs="*", type=_option, default=[], metavar="NAME=VALUE", help="settings of the config")
    args = parser.parse_args()
    if args.batches < 3: parser.error("--batches: give 3 or more")
    print(hardware(), f"seed {args.seed}", sep=", ")
    for algorithm in args.algorithms.split(","):
        gradients, reward = gradients_of(
            algorithm, args.model, args.reward, args.prompts, args.batches, args.seed, dict(args.set),
            lambda line: print(line, flush=True)
        )
        share, error = signal_to_noise(gradients)
        print(f"{algorithm}: signal over noise, squared, {share:.4f} ± {error:.4f} (standard error),"
              f" mean reward {reward:.3f}", flush=True)

if __name__ == "__main__": main()
