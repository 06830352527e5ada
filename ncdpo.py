# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<2.14", "gymnasium[mujoco]>=1.1,<2", "mujoco>=3.2,<5", "numpy>=1.26", "tyro>=0.9,<2",
#     "tqdm>=4.66", "matplotlib>=3.8"]
# ///
"""NCDPO: reinforcement learning of diffusion policies by backpropagation through the denoising steps, in one file.

A diffusion policy turns Gaussian noise into an action in K denoising steps, so the likelihood of an action, which PPO
needs, is an intractable integral over that noise. NCDPO (arXiv 2505.10482) draws all the noise first and calls it part
of the state. Given the noise, the chain is a deterministic, differentiable function; a small Gaussian (or a softmax) on
its end makes the likelihood exact; and plain PPO then sends its gradient back through all K steps. Beside it stand the
two methods that it must be compared with: PPO with an MLP, and DPPO, which calls every denoising step a decision.

    python ncdpo.py --env HalfCheetah-v4                  # train; the run is a folder, runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --env HalfCheetah-v4 --algo ppo       # the same lines with an MLP policy (or --algo dppo)
    python ncdpo.py --evaluate runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --resume runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --env Hopper-v4 --demos demos.npz     # clone demonstrations, then improve the clone

Sections: 1 configuration, 2 noise schedule, 3 networks, 4 policies, 5 environments, 6 rollout and advantages, 7 PPO
update, 8 demonstrations, 9 checkpoints, evaluation and curves, 10 training, 11 command line. NCDPO itself is sections
2, 3, 4 and 7.
Labels such as E5 name the equations of README.md. Letters: B batch, S observation, A action (or logits; in `ppo_loss`
the advantage), K denoising steps, M scored decisions per action, T steps of a rollout, N environments.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import importlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import timeit
import typing
import warnings
import zipfile
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ===== 1  Configuration ===============================================================================================

class UserError(Exception):
    """A mistake of the user's or of their machine, told in one sentence that names the remedy."""


def first_line(error: BaseException) -> str:
    """The gist of somebody else's exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def optional(module: str, user: str):
    """Import a module of an optional package; raises UserError that says what wants it and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0]
        raise UserError(f"{user} needs the package {package}: pip install {package}.") from None


@dataclasses.dataclass
class Config:
    """Everything that decides a run. Algorithms differ by `algo` alone; see `Config.for_task` for the presets."""

    # --- what to run
    env: str = "HalfCheetah-v4"  # Gymnasium id of the task (Box observations; Box or Discrete actions)
    algo: Literal["ncdpo", "ppo", "dppo"] = "ncdpo"  # what the policy is; nothing else differs
    seed: int = 1  # seed of the weights, the noise and the environments
    total_timesteps: int = 1_000_000  # environment steps, summed over the environments

    # --- the diffusion policy
    denoising_steps: int = 5  # K, from 1 to 100
    predict: Literal["sample", "epsilon", "v"] = "sample"  # what the network predicts (E2, E3)
    eta: float = 1.0  # noise of the reverse chain (E4): 1 is DDPM, 0 is DDIM
    noise_scale: float = 1.0  # factor of all the chain's noise, x_K and sigma_k: below 1 actions are less diverse
    clip_denoised: float = 1.0  # the clean estimate is clipped to [-c, c] at each denoising step (E3)
    temperature: float = 0.1  # tau of the softmax over denoised logits (E8), for Discrete actions
    action_chunk: int = 1  # actions H that are denoised together and played in a row: one decision of PPO
    finetune_steps: int | None = None  # only the last so many denoising steps learn; a frozen copy does the others
    min_std: float = 0.1  # DPPO only: floor of each scored step's standard deviation (E15)
    gamma_denoising: float = 0.99  # DPPO only: discount of the advantage per denoising step still to go (E15)
    scored_steps: int | None = None  # DPPO only: score the last m steps (E16), condition on the noise of the others
    chain_gradient: bool = True  # DPPO only: gradient through the steps not scored (E16); --no-chain-gradient cuts it
    clip_coef_first: float | None = None  # DPPO only: clip_coef of the first scored step, rising to clip_coef's

    # --- demonstrations
    demos: str | None = None  # clone these first: an .npz file of --collect, a D4RL .hdf5 file, or minari:DATASET
    init_from: str | None = None  # start from this run's policy; its config.json gives the defaults of other flags
    bc_steps: int = 20_000  # gradient steps of behaviour cloning (E2)
    bc_batch_size: int = 256  # chunks in a minibatch of behaviour cloning
    bc_learning_rate: float = 1e-3  # of behaviour cloning, falling to zero along a cosine
    bc_coef: float = 0.0  # weight of the cloning loss while PPO runs (it needs --demos too)
    critic_warmup: int = 0  # first updates in which only the critic learns
    stop_at_return: float | None = None  # stop training once the mean return is this high

    # --- networks
    hidden: int = 128  # width of the two hidden layers of actor and critic
    activation: Literal["silu", "tanh", "relu"] = "silu"  # nonlinearity of actor and critic
    init_std: float = 0.22  # initial sigma of the final Gaussian (E7), for Box actions of ncdpo and ppo

    # --- PPO
    num_envs: int = 16  # parallel environments N
    num_steps: int = 128  # steps T of each environment in a rollout; N * T transitions make an update
    learning_rate: float = 5e-4  # of Adam
    critic_learning_rate: float | None = None  # if given, the critic's own, and its gradient is clipped by itself
    anneal_lr: bool = True  # let the learning rate fall linearly to zero
    gamma: float = 0.98  # discount of rewards
    gae_lambda: float = 0.92  # lambda of generalised advantage estimation
    minibatch_size: int = 512  # transitions in a minibatch; a remainder smaller than that is left out of the epoch
    update_epochs: int = 5  # passes over each rollout
    clip_coef: float = 0.2  # clip of the likelihood ratio (E12)
    mean_log_prob: bool = False  # average log-likelihoods over a Box action's coordinates instead of summing them
    clip_vloss: bool = False  # clip the value's change by clip_coef as well
    norm_adv: bool = True  # normalise the advantages of each minibatch
    ent_coef: float = 0.0  # weight of the entropy bonus (no effect on DPPO's Box actions, whose sigma is fixed)
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    target_kl: float | None = None  # stop the epochs of an update once the approximate KL exceeds this
    norm_obs: bool = True  # normalise observations by running statistics
    norm_reward: bool = True  # scale rewards by the running standard deviation of the discounted return

    # --- machine and output
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    vector: Literal["sync", "async", "envpool"] = "sync"  # Gymnasium's, or the package envpool
    compile: bool = True  # torch.compile of acting and of the loss (up to half a minute at the start)
    compile_chain: int = 10  # a longer chain is not compiled: for K = 20 that takes 3 minutes, once, and gains a third
    checkpoint_chain: bool = False  # recompute the chain in the backward pass: less memory, slower
    runs: str = "runs"  # folder of the run folders
    checkpoint_every: int = 50  # updates between two checkpoints
    episodes: int = 10  # episodes of an evaluation
    tensorboard: bool = False  # also write TensorBoard logs (optional package)

    @classmethod
    def for_task(cls, env: str, **given) -> "Config":
        """The defaults of a task: those of this class, then PRESETS of its family or of cloning, then what is given."""
        family = "demonstrations" if given.get("demos") else env.split("/")[-1].rsplit("-v", 1)[0]
        return cls(**{"env": env, **PRESETS.get(family, {}), **given})

    def check(self) -> None:
        """Raises UserError for the first field out of its range."""
        for name, kind in typing.get_type_hints(Config).items():
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
                raise UserError(f"{flag} must be one of {', '.join(typing.get_args(kind))}, not {value!r}.")
            low, high = LIMITS.get(name, (1e-12, math.inf))  # a number without LIMITS must be above 0
            if kind is not bool and isinstance(value, (int, float)) and not (low <= value <= high and value < math.inf):
                limits = ("above 0" if name not in LIMITS else
                          f"between {low} and {high}" if high < math.inf else f"of {low} or more")
                raise UserError(f"{flag} must be a finite number {limits}, not {value}.")
        if not (self.scored_steps or 1) <= (self.finetune_steps or self.denoising_steps) <= self.denoising_steps:
            raise UserError("--scored-steps may not exceed --finetune-steps, nor that --denoising-steps.")
        if self.scored_steps and self.algo != "dppo":
            raise UserError("--scored-steps is for --algo dppo; ncdpo scores the last step only, ppo has no steps.")
        if bool(self.bc_coef) != bool(self.demos) and (self.init_from or not self.demos):
            raise UserError("--bc-coef needs --demos, and --demos beside --init-from needs --bc-coef.")
        batch = self.num_envs * self.num_steps
        rollout = f"the {batch} transitions of a rollout (--num-envs {self.num_envs} x --num-steps {self.num_steps})"
        if self.minibatch_size > batch:
            raise UserError(f"--minibatch-size {self.minibatch_size} exceeds {rollout}; make it at most {batch}.")
        batch *= self.action_chunk
        if self.total_timesteps < batch and (self.total_timesteps or not self.demos):  # 0 is cloning alone
            raise UserError(f"--total-timesteps {self.total_timesteps} is below {rollout}, {self.action_chunk} steps "
                            f"each; make it at least {batch}.")


LIMITS = {"minibatch_size": (2, math.inf), "denoising_steps": (1, 100), "stop_at_return": (-math.inf, math.inf),
          **dict.fromkeys("seed total_timesteps critic_warmup ent_coef vf_coef bc_coef".split(), (0, math.inf)),
          **dict.fromkeys("eta gamma gae_lambda gamma_denoising".split(), (0, 1))}
# What a run must share with the one that --init-from names, and with the one that --resume names
SAME_POLICY = ("env", "denoising_steps", "predict", "hidden", "activation", "action_chunk", "norm_obs")
SAME_RUN = SAME_POLICY + ("algo", "eta", "noise_scale", "clip_denoised", "temperature", "min_std", "num_envs",
                          "num_steps", "finetune_steps", "scored_steps", "critic_learning_rate")
PRESETS: dict[str, dict] = {  # by the name of the task without its version; the same for all algorithms
    "demonstrations": dict(denoising_steps=20, predict="epsilon", action_chunk=4, init_std=0.2, gamma=0.99,
                           gae_lambda=0.95, num_steps=64, minibatch_size=256, learning_rate=3e-4,
                           critic_learning_rate=1e-3, critic_warmup=4),  # whatever the task
    "Hopper": dict(init_std=1.0, min_std=0.2, gamma=0.99, gae_lambda=0.95, minibatch_size=256, update_epochs=10),
    "Walker2d": dict(init_std=0.5, min_std=0.2, gamma=0.99, gae_lambda=0.95, minibatch_size=128, update_epochs=10,
                     learning_rate=3e-4, hidden=64, activation="tanh")}

# ===== 2  Noise schedule ==============================================================================================

class Schedule(nn.Module):
    """Tables of the cosine schedule (Nichol and Dhariwal, 2021) and the steps that use them (E1, E3, E4).

    Each table has shape (K + 1, 1) and is indexed by k, an int or a LongTensor (k = 0 stands for clean data), so that
    `table[k]` broadcasts against (..., A). Float64 inside, stored in torch's default dtype.
    """

    def __init__(self, steps: int, predict: str, eta: float, clip: float, noise_scale: float = 1.0):
        super().__init__()
        self.clip, self.noise_scale = clip, noise_scale
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
        now, before = abar[1:], abar[:-1]
        sigma = eta * torch.sqrt((1 - before) / (1 - now) * beta)
        # E4 is linear in (x0hat, x_k): write eps_tilde out once and for all
        on_eps = torch.sqrt((1 - before - sigma**2).clamp(min=0)) / torch.sqrt(1 - now)
        # E3 is linear in (network output, x_k), whatever the network predicts
        out, skip = {"sample": (torch.ones_like(now), torch.zeros_like(now)),
                     "epsilon": (-torch.sqrt((1 - now) / now), 1 / torch.sqrt(now)),
                     "v": (-torch.sqrt(1 - now), torch.sqrt(now))}[predict]
        tables = dict(abar=abar, sigma=noise_scale * sigma, from_output=out, from_noisy=skip,
                      to_clean=torch.sqrt(before) - on_eps * torch.sqrt(now), to_noisy=on_eps)
        for name, table in tables.items():
            table = table if name == "abar" else torch.cat([torch.zeros(1, dtype=torch.float64), table])
            self.register_buffer(name, table.to(torch.get_default_dtype())[:, None], persistent=False)

    def diffuse(self, x0, k, eps):
        """Forward process (E1): x_k from clean x0 and standard normal eps, both (..., A)."""
        return torch.sqrt(self.abar[k]) * x0 + torch.sqrt(1 - self.abar[k]) * eps

    def clean(self, output, x, k):
        """Clean estimate x0hat (E3) from the network's output at x_k, both (..., A), clipped to [-clip, clip]."""
        return (self.from_output[k] * output + self.from_noisy[k] * x).clamp(-self.clip, self.clip)

    def mu(self, x0hat, x, k):
        """Mean of x_{k-1} given x_k (E4): DDPM's posterior mean at eta = 1, DDIM's step at eta = 0."""
        return self.to_clean[k] * x0hat + self.to_noisy[k] * x


# ===== 3  Networks ====================================================================================================

ACTIVATIONS = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}


def linear(inputs: int, outputs: int, gain: float = math.sqrt(2)) -> nn.Linear:
    """Linear layer with orthogonal weights and zero bias, as PPO's implementations have it."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, hidden: int, outputs: int, activation: str, gain: float) -> nn.Sequential:
    """Two hidden layers; `gain` scales the last layer's initial weights."""
    act = ACTIVATIONS[activation]
    return nn.Sequential(linear(inputs, hidden), act(), linear(hidden, hidden), act(), linear(hidden, outputs, gain))


class Denoiser(nn.Module):
    """net(x_k, k, s): an MLP of [x_k, s, embedding of k].

    At initialisation its output is nearly zero: an untrained "sample" chain then proposes nearly the zero action, like
    an untrained MLP.
    """

    def __init__(self, obs_dim: int, act_dim: int, steps: int, hidden: int, activation: str, embedding: int = 16):
        super().__init__()
        self.net = mlp(act_dim + obs_dim + embedding, hidden, act_dim, activation, gain=0.01)
        freq = torch.exp(-math.log(1000) * torch.arange(embedding // 2) / (embedding // 2))
        angle = torch.arange(steps + 1)[:, None] * freq
        self.register_buffer("embedding", torch.cat([angle.sin(), angle.cos()], -1), persistent=False)

    def forward(self, x, k, obs):
        """Network output (..., A) at x_k (..., A) and s (..., S); k an int, or a LongTensor of x's leading axes."""
        return self.net(torch.cat([x, obs, self.embedding[k].expand(*x.shape[:-1], -1)], -1))


class Normalizer(nn.Module):
    """Running mean and variance over a batch axis (Chan et al., parallel form), saved with the weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("count", torch.zeros(()))

    def update(self, x):
        """Take in a batch x of shape (B, dim)."""
        n, mean, var = len(x), x.mean(0), x.var(0, unbiased=False)
        total = self.count + n
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * n + delta**2 * self.count * n / total) / total)
        self.mean += delta * n / total
        self.count.copy_(total)

    def forward(self, x):
        """x in standard deviations from the mean, clipped to [-10, 10]."""
        return ((x - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10)


# ===== 4  Policies ====================================================================================================

class Gaussian(nn.Module):
    """Final Gaussian N(action; mean, diag(sigma^2)) for Box actions (E7); log sigma is learnt unless `fixed`."""

    def __init__(self, dim: int, std: float, fixed: bool = False):
        super().__init__()
        self.log_std = nn.Parameter(torch.full((dim,), math.log(std)), requires_grad=not fixed)

    def noise(self, mean_shape, device):
        return torch.randn(mean_shape, device=device)

    def sample(self, mean, noise):
        return mean + self.log_std.exp() * noise

    def log_prob(self, mean, action):
        z = (action - mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, mean):
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(mean))


class Categorical(nn.Module):
    """Final softmax(logits / tau) for Discrete actions (E8)."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def noise(self, logits_shape, device):
        return -torch.log(torch.empty(logits_shape, device=device).exponential_())  # Gumbel

    def sample(self, logits, noise):
        return (logits / self.temperature + noise).argmax(-1)

    def log_prob(self, logits, action):
        return F.log_softmax(logits / self.temperature, -1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, logits):
        log_p = F.log_softmax(logits / self.temperature, -1)
        return -(log_p.exp() * log_p).sum(-1)


class Policy(nn.Module):
    """A deterministic mean with one distribution, the head, on its end.

    noise(n, device) -> chain's noise, head's noise                      all randomness, before anything is computed
    act(obs, noise, noise) -> action (B, A) or (B,), log_prob (B, M), latent            what the rollout calls
    evaluate(obs, action, latent) -> log_prob (B, M), entropy (B,)       what the update calls, with gradients
    sample(obs) and log_prob(obs, action, latent) are the two in short. Observations are normalised (B, S); `latent` is
    what must be remembered to score an action again; `weight` and `clip_scale` (M,) scale the advantage and the clip of
    each decision. A subclass defines mean(obs, latent) -> (B, A), or, as DPPO does, act and evaluate.
    """

    latent_steps = 0  # latent has shape (B, latent_steps, A)

    def __init__(self, act_dim: int, head: nn.Module):
        super().__init__()
        self.act_dim, self.head = act_dim, head
        self.register_buffer("weight", torch.ones(1), persistent=False)
        self.register_buffer("clip_scale", torch.ones(1), persistent=False)

    def noise(self, n: int, device):
        """All randomness of n actions: that of the chain (n, latent_steps, A), and the head's (n, A)."""
        return (torch.randn(n, self.latent_steps, self.act_dim, device=device),
                self.head.noise((n, self.act_dim), device))

    def sample(self, obs, deterministic: bool = False):
        """Draw actions; `deterministic` leaves out the head's noise but not that of the chain."""
        latent, noise = self.noise(len(obs), obs.device)
        return self.act(obs, latent, torch.zeros_like(noise) if deterministic else noise)

    def act(self, obs, latent, noise):
        """The action as a deterministic function of observation and noise."""
        mean = self.mean(obs, latent)
        action = self.head.sample(mean, noise)
        return action, self.head.log_prob(mean, action)[:, None], latent

    def evaluate(self, obs, action, latent):
        """Log-likelihood of each decision (B, M) and entropy of the head (B,), with gradients."""
        mean = self.mean(obs, latent)
        return self.head.log_prob(mean, action)[:, None], self.head.entropy(mean)

    def log_prob(self, obs, action, latent):
        """Log-likelihood of each decision, (B, M)."""
        return self.evaluate(obs, action, latent)[0]


class MLPPolicy(Policy):
    """The baseline of the field: pi(a | s) = N(a; mlp(s), sigma^2), or a softmax."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, discrete: bool):
        super().__init__(act_dim, Categorical(1.0) if discrete else Gaussian(act_dim, config.init_std))
        self.net = mlp(obs_dim, config.hidden, act_dim, config.activation, gain=0.01)

    def mean(self, obs, latent):
        return self.net(obs)

    def bc_loss(self, obs, action):
        """Behaviour cloning: mean squared error of the mean action; obs (B, S), action (B, A)."""
        return F.mse_loss(self.net(obs), action)


class DiffusionPolicy(Policy):
    """What NCDPO and DPPO share: a denoiser, a schedule, and behaviour cloning."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, discrete: bool, gaussian: Gaussian | None = None):
        gaussian = gaussian or Gaussian(act_dim, config.init_std)
        super().__init__(act_dim, Categorical(config.temperature) if discrete else gaussian)
        self.K = self.latent_steps = config.denoising_steps
        self.predict, self.checkpoint_chain = config.predict, config.checkpoint_chain
        self.schedule = Schedule(self.K, config.predict, config.eta, config.clip_denoised, config.noise_scale)
        self.denoiser = Denoiser(obs_dim, act_dim, self.K, config.hidden, config.activation)
        self.tuned, self.frozen = config.finetune_steps or self.K, None
        if self.tuned < self.K:
            self.frozen = copy.deepcopy(self.denoiser).requires_grad_(False)  # for the steps k > tuned

    def mu(self, x, k, obs, denoiser=None):
        """Mean of x_{k-1} given x_k and s (E3, E4); shapes as in Denoiser.forward."""
        return self.schedule.mu(self.schedule.clean((denoiser or self.denoiser)(x, k, obs), x, k), x, k)

    def bc_loss(self, obs, action):
        """Behaviour cloning (E2): mean squared error of the network's prediction, each sample at a random k."""
        k = torch.randint(1, self.K + 1, (len(obs),), device=obs.device)
        eps = torch.randn_like(action)
        abar = self.schedule.abar[k]
        target = {"epsilon": eps, "sample": action,
                  "v": torch.sqrt(abar) * eps - torch.sqrt(1 - abar) * action}[self.predict]
        return F.mse_loss(self.denoiser(self.schedule.diffuse(action, k, eps), k, obs), target)


class NCDPO(DiffusionPolicy):
    """Noise-conditioned policy (E6-E8): the denoising chain is the mean, its noise omega is part of the state (E9)."""

    def mean(self, obs, omega):
        """f_theta(s, omega) (E6), the mean action (B, A) of given noise omega = (x_K, z_K, ..., z_2), (B, K, A)."""
        return self.chain(obs, omega)[-1]

    def chain(self, obs, omega, last: int = 0) -> list[torch.Tensor]:
        """Reverse chain x_K, ..., x_last, each (B, A) (E5). Nothing is detached: autograd through it is BPDT (E13)."""
        xs = [self.schedule.noise_scale * omega[:, 0]]
        for k in range(self.K, last, -1):
            denoiser = self.denoiser if k <= self.tuned else self.frozen
            arguments = xs[-1], k, omega[:, self.K + 1 - k] if k > 1 else None, obs, denoiser
            if self.checkpoint_chain and torch.is_grad_enabled():
                xs.append(checkpoint(self.step, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                xs.append(self.step(*arguments))
        return xs

    def step(self, x, k, z, obs, denoiser=None):
        """Reverse step (E5): x_{k-1} = mu_k(x_k, s) + sigma_k z_k, (B, A); sigma_1 = 0, so the last step has no z."""
        mu = self.mu(x, k, obs, denoiser)
        return mu if z is None else mu + self.schedule.sigma[k] * z


class DPPO(NCDPO):
    """Diffusion Policy Policy Optimization (arXiv 2409.00588): every denoising step is a decision, M = K (E15).

    Its likelihoods need no gradient through the chain: log_prob scores all stored transitions in one parallel pass. The
    last step (k = 1) is the head's: a Gaussian of standard deviation min_std, or the softmax of E8. With M < K scored
    steps (E16) the noise of the others is part of the state, as in NCDPO: latent is (x_K, z_K, ..., z_{M+1}; x_{M-1},
    ..., x_1).
    """

    def __init__(self, config: Config, obs_dim: int, act_dim: int, discrete: bool):
        super().__init__(config, obs_dim, act_dim, discrete, Gaussian(act_dim, config.min_std, fixed=True))
        self.M, self.chain_gradient = config.scored_steps or self.tuned, config.chain_gradient
        std = self.schedule.sigma.clamp(min=config.min_std)
        steps_to_go = torch.arange(self.M - 1, -1, -1)
        first, rise = (config.clip_coef_first or config.clip_coef) / config.clip_coef, torch.linspace(0, 3, self.M)
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("ks", steps_to_go + 1, persistent=False)
        self.register_buffer("weight", config.gamma_denoising ** steps_to_go.float(), persistent=False)
        self.register_buffer("clip_scale", first + (1 - first) * rise.expm1() / math.expm1(3), persistent=False)

    def step_log_prob(self, x_before, mu, k):
        """log N(x_{k-1}; mu_k, max(sigma_k, sigma_min)^2) of E15, summed over the action's coordinates."""
        z = (x_before - mu) / self.std[k]
        return (-0.5 * z**2 - torch.log(self.std[k]) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def act(self, obs, latent, noise):  # latent in: the chain's noise; latent out: the scored steps as they came out
        x = self.chain(obs, latent, last=self.M)[-1]
        scored, log_prob = [], []
        for k in range(self.M, 1, -1):
            mu = self.mu(x, k, obs)
            x = mu + self.std[k] * latent[:, self.K + 1 - k]
            log_prob.append(self.step_log_prob(x, mu, k))
            scored.append(x)
        mean = self.mu(x, 1, obs)
        action = self.head.sample(mean, noise)
        log_prob.append(self.head.log_prob(mean, action))
        latent = torch.cat([latent[:, :self.K + 1 - self.M], *(x[:, None] for x in scored)], 1)
        return action, torch.stack(log_prob, 1), latent

    def evaluate(self, obs, action, latent):
        omega, scored = latent.split([self.K + 1 - self.M, self.M - 1], 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.chain_gradient):
            x = self.chain(obs, omega, last=self.M)[-1]
        xs = torch.cat([x[:, None], scored], 1)  # x_M, ..., x_1
        mu = self.mu(xs, self.ks, obs[:, None].expand(-1, self.M, -1))  # (B, M, A), all steps at once
        last = self.head.log_prob(mu[:, -1], action)[:, None]
        return torch.cat([self.step_log_prob(scored, mu[:, :-1], self.ks[:-1]), last], 1), self.head.entropy(mu[:, -1])


class Agent(nn.Module):
    """Policy, critic and the normalisers of observations and rewards: all that a checkpoint must hold."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, discrete: bool):
        super().__init__()
        self.policy = {"ncdpo": NCDPO, "ppo": MLPPolicy, "dppo": DPPO}[config.algo](config, obs_dim, act_dim, discrete)
        self.critic = mlp(obs_dim, config.hidden, 1, config.activation, gain=1.0)
        self.obs_norm, self.reward_norm = Normalizer(obs_dim), Normalizer(1)
        self.norm_obs = config.norm_obs

    def normalize(self, obs):
        return self.obs_norm(obs) if self.norm_obs else obs

    def value(self, obs):
        """V of normalised observations (..., S) -> (...)."""
        return self.critic(obs).squeeze(-1)

    def act(self, obs, latent, noise):
        """Policy.act on raw observations."""
        return self.policy.act(self.normalize(obs), latent, noise)


# ===== 5  Environments ================================================================================================

class ActionChunk(gym.Wrapper):
    """One decision is H actions played in a row: a Box of A becomes a Box of H * A, and a reward an array (H,).

    An episode may end inside a chunk; the rewards of the steps that were not played are NaN.
    """

    def __init__(self, env: gym.Env, length: int):
        super().__init__(env)
        self.length, self.action_space = length, repeat(env.action_space, length)

    def step(self, action):
        rewards, ended = np.full(self.length, np.nan), False
        for i, one in enumerate(np.split(action, self.length)):
            if not ended:
                obs, rewards[i], terminated, truncated, info = self.env.step(one)
                ended = terminated or truncated
        return obs, rewards, terminated, truncated, info


def repeat(space: gym.Space, times: int) -> gym.Space:
    """Action space of a chunk; raises UserError for actions that cannot be chunked."""
    if times == 1:
        return space
    if not isinstance(space, gym.spaces.Box):
        raise UserError(f"--action-chunk needs Box actions, not {space}.")
    return gym.spaces.Box(np.tile(space.low, times), np.tile(space.high, times), dtype=space.dtype)


class LeanSyncVectorEnv(gym.vector.SyncVectorEnv):
    """Gymnasium's SyncVectorEnv without merging the infos that nobody reads (a tenth of HalfCheetah's time)."""

    def __init__(self, *given, chunk: int, **more):
        super().__init__(*given, **more)
        self._rewards = np.zeros((self.num_envs, chunk))  # of every step in a chunk

    def _add_info(self, vector_infos, env_info, env_num):
        return super()._add_info(vector_infos, {k: v for k, v in env_info.items() if k == "final_obs"}, env_num)


class EnvPoolVectorEnv:
    """EnvPool (C++ environments in threads) behind the part of SyncVectorEnv's interface that VectorEnv uses.

    EnvPool resets an ended environment in the NEXT step; here it is reset at once, as in AutoresetMode.SAME_STEP.
    """

    def __init__(self, env_id: str, num_envs: int, chunk: int):
        envpool = optional("envpool", "--vector envpool")
        if env_id not in envpool.list_all_envs():
            raise UserError(f"EnvPool has no task {env_id!r}; use --vector sync.")
        self.make = partial(envpool.make, env_id, env_type="gymnasium", num_envs=num_envs,
                            num_threads=min(num_envs, torch.get_num_threads()))
        self.reset(0)
        self.single_observation_space = self.pool.observation_space
        self.single_action_space = repeat(self.pool.action_space, chunk)
        self.num_envs, self.chunk = num_envs, chunk

    def reset(self, seed):
        self.pool = self.make(seed=seed)  # EnvPool takes seeds only here
        return self.pool.reset()

    def step(self, action):
        action = action if self.chunk == 1 else action.reshape(self.num_envs, self.chunk, -1)
        obs, reward, terminated, truncated, _ = self.pool.step(action if self.chunk == 1 else action[:, 0])
        reward = np.pad(reward[:, None], [(0, 0), (0, self.chunk - 1)], constant_values=np.nan)
        for i in range(1, self.chunk):
            if len(go := np.flatnonzero(~(terminated | truncated)).astype(np.int32)):
                obs[go], reward[go, i], terminated[go], truncated[go], _ = self.pool.step(action[go, i], go)
        ended, more = np.flatnonzero(terminated | truncated).astype(np.int32), {}
        if len(ended):
            obs, more = obs.copy(), {"final_obs": obs}
            first_obs, info = self.pool.reset(ended)
            obs[info["env_id"]] = first_obs
        return obs, reward, terminated, truncated, more

    def close(self):
        self.pool.close()


class VectorEnv:
    """N copies of a task that take and give tensors on `device`.

    reset(seed) -> obs (N, S);  step(action) -> obs, reward, terminated, truncated, final_obs
    A decision is a chunk of H actions (H = 1 unless asked for): an action is (N, H * A), a reward (N, H), NaN for steps
    after an episode's end. Box actions live in [-1, 1] here and are clipped and rescaled; final_obs (N, S) is where a
    step really led: it differs from obs (where the next step starts) in those environments that ended and were reset in
    the same step.
    """

    def __init__(self, env_id: str, num_envs: int, device: torch.device, vector: str = "sync", chunk: int = 1,
                 render: bool = False):
        self.env_id, self.num_envs, self.device, self.chunk = env_id, num_envs, device, chunk
        self.envs = make_envs(env_id, num_envs, vector, chunk, render)
        obs_space, act_space = self.envs.single_observation_space, self.envs.single_action_space
        self.discrete = isinstance(act_space, gym.spaces.Discrete)
        box = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1 and act_space.is_bounded()
        if not isinstance(obs_space, gym.spaces.Box) or not (self.discrete or box):
            raise UserError(f"{env_id} has observations {obs_space} and actions {act_space}; only Box observations and "
                            "only Discrete and bounded one-dimensional Box actions are supported, so wrap the "
                            "environment (gymnasium.wrappers.FlattenObservation, gymnasium.wrappers.TransformAction).")
        if self.discrete:
            self.act_dim, self.start = int(act_space.n), int(act_space.start)
        else:
            self.act_dim, high, low = len(act_space.high), act_space.high, act_space.low
            self.center, self.scale = (high + low) / 2, (high - low) / 2
        self.obs_dim, self.act_space = int(np.prod(obs_space.shape)), act_space
        self.spaces = [self.obs_dim, self.act_dim, self.discrete]  # what an Agent is built for

    def reset(self, *seed: int):
        """First observations (N, S) of new episodes; every environment gets its own seed, derived from `seed`."""
        seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(self.num_envs) // 2]
        return self._tensor(self.envs.reset(seed=seeds)[0])

    def step(self, action):
        """Action (N, H * A) in [-1, 1], or (N,) indices; obs and final_obs (N, S), reward (N, H), two bools (N,)."""
        action = action.cpu().numpy()
        action = action + self.start if self.discrete else self.center + self.scale * action.clip(-1, 1)
        try:
            obs, reward, terminated, truncated, info = self.envs.step(action.astype(self.act_space.dtype, copy=False))
        except Exception as error:
            raise UserError(f"{self.env_id} raised {type(error).__name__} in step: {first_line(error)}") from error
        final_obs = obs
        if "final_obs" in info:
            final_obs, ended = obs.copy(), terminated | truncated
            final_obs[ended] = np.stack(info["final_obs"][ended])
        now = self._tensor(obs)
        return (now, torch.as_tensor(reward.reshape(-1, self.chunk), dtype=torch.float32).to(self.device),
                torch.as_tensor(terminated).to(self.device), torch.as_tensor(truncated).to(self.device),
                now if final_obs is obs else self._tensor(final_obs))

    def _tensor(self, obs):
        return torch.as_tensor(obs.reshape(self.num_envs, -1), dtype=torch.float32).to(self.device)

    def frame(self):
        """Picture of the first environment, (height, width, 3) uint8."""
        try:
            return self.envs.envs[0].render()
        except Exception as error:
            raise UserError(f"cannot draw {self.env_id} ({first_line(error)}); without a screen, MuJoCo tasks need the "
                            "environment variable MUJOCO_GL=egl or MUJOCO_GL=osmesa.") from error

    def close(self):
        self.envs.close()


@contextmanager
def signals(handler, *numbers):
    """Handle these signals by `handler` inside the block (only the main thread may, and needs to)."""
    before = {n: signal.signal(n, handler) for n in numbers if threading.current_thread() is threading.main_thread()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_envs(env_id: str, num_envs: int, vector: str, chunk: int, render: bool):
    """Gymnasium's or EnvPool's vector environment; raises UserError, for an unknown name with the nearest ones."""
    try:
        gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(env_id, gym.registry, n=3)
        raise UserError(f"unknown environment {env_id!r}" + (f"; did you mean {' or '.join(near)}?" if near else
                        f" ({error}); gymnasium.pprint_registry() lists the known ones.")) from None
    if vector == "envpool":
        return EnvPoolVectorEnv(env_id, num_envs, chunk)

    def make():
        env = gym.make(env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if render else {}))
        return ActionChunk(env, chunk) if chunk > 1 else env

    kind = partial(LeanSyncVectorEnv, chunk=chunk) if vector == "sync" else gym.vector.AsyncVectorEnv
    mujoco.set_mju_user_warning(lambda message: None)  # MuJoCo 4 on the age of HalfCheetah's XML, N times
    try:
        with warnings.catch_warnings(), signals(signal.SIG_IGN, signal.SIGINT):  # Ctrl-C is not for the workers
            warnings.simplefilter("ignore")  # Gymnasium on the age of -v4
            return kind([make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    except UserError:
        raise
    except Exception as error:  # a missing package, a missing display, or a mistake in the environment's own code
        raise UserError(f"cannot make {env_id}: {first_line(error)}") from error
    finally:
        mujoco.set_mju_user_warning(None)


# ===== 6  Rollout and advantages ======================================================================================

class Rollout:
    """Buffers of one rollout, allocated once on the device; every tensor is (T, N, ...), observations are raw."""

    def __init__(self, config: Config, env: VectorEnv, agent: Agent):
        policy, shape = agent.policy, (config.num_steps, env.num_envs)
        new = lambda *more, dtype=torch.float32: torch.zeros(*shape, *more, dtype=dtype, device=env.device)
        self.obs, self.final_obs = new(env.obs_dim), new(env.obs_dim)
        self.action = new(dtype=torch.int64) if env.discrete else new(env.act_dim)
        self.latent, self.log_prob = new(policy.latent_steps, env.act_dim), new(len(policy.weight))
        self.reward, self.terminated, self.ended = new(env.chunk), new(), new()  # ended = terminated or truncated
        self.so_far = torch.zeros(env.num_envs, 2, dtype=torch.float64)  # return and length of the running episodes

    @torch.no_grad()
    def collect(self, env: VectorEnv, agent: Agent, act, obs):
        """Fill the buffers from `obs` on; `act` is agent.act, perhaps compiled. Returns the next observation (N, S)."""
        self.seconds_simulation, shape = 0.0, self.obs.shape[:2]
        noise = [x.unflatten(0, shape) for x in agent.policy.noise(shape.numel(), env.device)]  # of the whole rollout
        for t in range(len(self.obs)):
            action, _, latent = act(obs, *(x[t] for x in noise))
            self.obs[t], self.action[t], self.latent[t] = obs, action, latent
            action, start = self.action[t].cpu(), time.perf_counter()  # an accelerator finishes `act` first
            obs, self.reward[t], terminated, truncated, self.final_obs[t] = env.step(action)
            self.terminated[t], self.ended[t] = terminated, terminated | truncated
            self.seconds_simulation += time.perf_counter() - start
        flat = (agent.normalize(self.obs).flatten(0, 1), self.action.flatten(0, 1), self.latent.flatten(0, 1))
        self.log_prob = agent.policy.log_prob(*flat).unflatten(0, shape)
        return obs

    def finished(self):
        """Return and length of each episode that ended in this rollout, (episodes, 2); to be called once a rollout."""
        ended, reward = self.ended.cpu(), self.reward.cpu().double()
        both = torch.stack([reward.nansum(-1), reward.isfinite().sum(-1)], -1)
        sums, self.so_far = discounted_sums(both, ended[..., None], self.so_far, gamma=1.0)
        return sums[ended == 1]


def discounted_sums(reward, ended, carry, gamma: float):
    """Running discounted sum within each episode of rewards (T, N), from `carry` (N,) on; and the carry after it."""
    sums = torch.empty_like(reward)
    for t in range(len(reward)):
        sums[t] = carry = carry * gamma + reward[t]
        carry = carry * (1 - ended[t])
    return sums, carry


def advantages(reward, value, final_value, terminated, ended, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (Schulman et al., 2016), the A of E10 and E12; every argument is (T, N).

    final_value is the value of where a step led, before any reset: a termination has no future, a truncation has one,
    and the trace is cut at both.
    """
    delta = reward + gamma * (1 - terminated) * final_value - value
    keep = gamma * gae_lambda * (1 - ended)
    result, trace = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        result[t] = trace = delta[t] + keep[t] * trace
    return result


# ===== 7  PPO update ==================================================================================================

def ppo_loss(agent: Agent, config: Config, obs, action, latent, old_log_prob, old_value, advantage, target):
    """PPO's loss on a minibatch (E11, E12), the same lines for all algorithms: one ratio for each of M decisions.

    obs (B, S) normalised, old_log_prob (B, M), the last three (B,). Returns the loss and a tensor of diagnostics:
    policy loss, value loss, entropy, approximate KL (Schulman's k3 estimator, summed over M; with mean_log_prob that of
    the averaged log-likelihoods, which is far smaller), clip fraction.
    """
    log_prob, entropy = agent.policy.evaluate(obs, action, latent)
    log_ratio = (log_prob - old_log_prob) / (action[0].numel() if config.mean_log_prob else 1)
    ratio, clip = log_ratio.exp(), config.clip_coef * agent.policy.clip_scale
    if config.norm_adv:
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    A = advantage[:, None] * agent.policy.weight
    policy_loss = -torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
    value = agent.value(obs)
    value_loss = 0.5 * (value - target) ** 2
    if config.clip_vloss:
        clipped = old_value + (value - old_value).clamp(-config.clip_coef, config.clip_coef)
        value_loss = torch.max(value_loss, 0.5 * (clipped - target) ** 2)
    value_loss, entropy = value_loss.mean(), entropy.mean()
    with torch.no_grad():
        kl = (ratio - 1 - log_ratio).sum(-1).mean()
        clip_fraction = ((ratio - 1).abs() > clip).float().mean()
    loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy
    return loss, torch.stack([policy_loss.detach(), value_loss.detach(), entropy.detach(), kl, clip_fraction])


def update(agent: Agent, config: Config, optimizer, loss_function, batch: dict, demos=None, warmup=False) -> dict:
    """All epochs of PPO on a batch of flat tensors; returns diagnostics, averaged over the minibatches taken.

    With `demos`, raw obs (n, S) and actions (n, A), the cloning loss is added; with `warmup` the critic alone learns.
    """
    size, total, taken = len(batch["obs"]), 0.0, 0
    for _ in range(config.update_epochs):
        order = torch.randperm(size, device=batch["obs"].device)
        kl = 0.0
        for start in range(0, size - config.minibatch_size + 1, config.minibatch_size):
            optimizer.zero_grad()  # before the forward pass: a CUDA graph reuses the memory of old gradients
            pick = order[start:start + config.minibatch_size]
            loss, diagnostics = loss_function(**{name: tensor[pick] for name, tensor in batch.items()})
            if demos:
                some = torch.randint(len(demos[0]), (config.minibatch_size,), device=demos[0].device)
                loss = loss + config.bc_coef * agent.policy.bc_loss(agent.normalize(demos[0][some]), demos[1][some])
            loss.backward()
            for p in agent.policy.parameters() if warmup else ():
                p.grad = None
            norm, *_ = [nn.utils.clip_grad_norm_(g["params"], config.max_grad_norm) for g in optimizer.param_groups]
            optimizer.step()
            diagnostics = torch.cat([diagnostics, norm.to(diagnostics)[None]])  # on the CPU if no gradients
            total, taken, kl = total + diagnostics, taken + 1, kl + diagnostics[3]
        if config.target_kl is not None and kl / (size // config.minibatch_size) > config.target_kl:
            break
    names = ["policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "grad_norm"]
    return dict(zip(names, (total / taken).tolist()))


def chain_gradient(agent: Agent, obs, action, omega, advantage) -> tuple[np.ndarray, float]:
    """BPDT measured (E13): norms of dL/dx_k for k = K ... 0, L = -mean(log pi A), and the clipped fraction of x_0.

    Arguments as in ppo_loss. Rising from left to right the gradient vanishes on its way to the first denoising steps,
    falling it explodes.
    """
    xs = agent.policy.chain(obs, omega.clone().requires_grad_())
    loss = -(agent.policy.head.log_prob(xs[-1], action) * advantage).mean()
    norms = [g.norm().item() for g in torch.autograd.grad(loss, xs)]
    return np.array(norms), (xs[-1].abs() >= agent.policy.schedule.clip).float().mean().item()


def keep_random_state(device: torch.device):
    """Context manager after which the random states of CPU and `device` are what they were before."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


@torch.no_grad()
def chain_std(agent: Agent, obs) -> float:
    """Standard deviation of the action over the chain's noise (NCDPO's c of E17), from two draws at each obs (B, S)."""
    with keep_random_state(obs.device):  # to measure must not change the run
        one, other = (agent.policy.sample(obs, deterministic=True)[0] for _ in range(2))
    return ((one - other).square().mean() / 2).sqrt().item()


# ===== 8  Demonstrations ==============================================================================================

D4RL_NAMES = dict(observations="observations", actions="actions", rewards="rewards", terminations="terminals",
                  truncations="timeouts")  # ours and Minari's -> those of D4RL's HDF5 files


def read_demos(source: str) -> dict[str, np.ndarray]:
    """observations (n, S), actions (n, A), rewards, terminations, truncations (n,): a row per step, episode by episode.

    `source` is an .npz file of `collect`, a D4RL-style .hdf5 file, or minari:DATASET. Raises UserError.
    """
    if source.startswith("minari:"):
        minari, name = optional("minari", "--demos minari:..."), source.removeprefix("minari:")
        known = minari.list_local_datasets()
        try:
            episodes = list(minari.load_dataset(name, download=name not in known))
        except Exception as error:  # no such name, no network, a damaged download
            with suppress(Exception):
                known |= minari.list_remote_datasets()
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`minari list remote` names them."
            raise UserError(f"Minari has no dataset {name!r} ({first_line(error)}); {hint}") from None
        return {key: np.concatenate([getattr(e, key)[:len(e.rewards)] for e in episodes]) for key in D4RL_NAMES}
    try:
        if source.endswith((".hdf5", ".h5")):
            with optional("h5py", "--demos with an HDF5 file").File(source) as file:
                return {key: file[name][()] for key, name in D4RL_NAMES.items()}
        with np.load(source, allow_pickle=False) as file:
            return {key: file[key] for key in D4RL_NAMES}
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read demonstrations from {source} ({first_line(error)}); give an .npz file of "
                        "--collect, a D4RL .hdf5 file, or minari:DATASET.") from None


def load_demos(source: str, env: VectorEnv) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Chunks that stay inside an episode: observations (n, S), actions (n, H * A) in [-1, 1], episode numbers (n,).

    Raises UserError for demonstrations of another task, or the first row that cannot be right. Prints a summary.
    """
    if env.discrete:
        raise UserError(f"{env.env_id} has Discrete actions; demonstrations of Box actions only can be cloned.")
    demos, act_dim = read_demos(source), env.act_dim // env.chunk
    n = len(demos["rewards"])
    for key, size in dict(observations=env.obs_dim, actions=act_dim, rewards=1, terminations=1, truncations=1).items():
        if demos[key].size != n * size or not n:
            raise UserError(f"{key} of {source} have the shape {demos[key].shape}, but {n} steps of {env.env_id} need "
                            f"({n}, {size}): these are not demonstrations of this task.")
        demos[key] = demos[key].reshape(n, size)
        if not (good := np.isfinite(demos[key]).all(1)).all():
            raise UserError(f"{key} of {source} are not finite in row {good.argmin()}; remove that episode.")
    action = (demos["actions"] - env.center[:act_dim]) / env.scale[:act_dim]
    if not (good := (np.abs(action) <= 1.001).all(1)).all():
        raise UserError(f"actions of {source} leave the task's action space in row {good.argmin()}: "
                        f"{demos['actions'][good.argmin()]}; scale or clip them.")
    end = (demos["terminations"] + demos["truncations"] > 0).squeeze(1)
    end[-1] = True
    episode = np.cumsum(end) - end  # the number of each row's episode
    start = np.flatnonzero(episode[env.chunk - 1:] == episode[:max(0, n + 1 - env.chunk)])
    if not len(start) or not episode[start[0]] < episode[start[-1]]:
        raise UserError(f"{source} has fewer than two episodes of at least --action-chunk {env.chunk} steps; "
                        "record more.")
    returns = np.bincount(episode, demos["rewards"][:, 0])
    print(f"{source}: {len(returns)} episodes, {n:,} steps, mean return {returns.mean():.1f}, "
          f"{(np.abs(action) > 0.999).mean():.0%} of the actions at a bound", flush=True)
    chunks = np.lib.stride_tricks.sliding_window_view(action.clip(-1, 1), env.chunk, 0)[start].swapaxes(1, 2)
    tensor = lambda x: torch.as_tensor(x.reshape(len(start), -1), dtype=torch.float32).to(env.device)
    return tensor(demos["observations"][start]), tensor(chunks), episode[start]


def clone(agent: Agent, config: Config, demos, run: Path) -> None:
    """Behaviour cloning (E2): Adam, a cosine schedule, and at the end a moving average of the weights.

    `demos` as load_demos returns them. A twentieth of the episodes is held out; its loss and the loss of training are
    the columns of cloning.csv in the run folder.
    """
    obs, action, episode = demos
    agent.obs_norm.update(obs)
    obs, episodes = agent.normalize(obs), np.unique(episode)
    held_out = np.random.default_rng(config.seed).permutation(episodes)[:math.ceil(len(episodes) / 20)]
    held_out = torch.as_tensor(np.isin(episode, held_out), device=obs.device)
    seen, unseen = torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]
    optimizer = torch.optim.Adam(agent.policy.parameters(), config.bc_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.bc_steps)
    decay = max(0.0, 1 - 10 / config.bc_steps)  # the last tenth of the steps
    average = swa_utils.AveragedModel(agent.policy, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    rows, total, every = ["step,loss,held_out_loss"], 0.0, max(1, config.bc_steps // 20)
    for step in range(1, config.bc_steps + 1):
        pick = seen[torch.randint(len(seen), (config.bc_batch_size,), device=obs.device)]
        loss = agent.policy.bc_loss(obs[pick], action[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(agent.policy)
        total += loss.detach()
        if step % every == 0:
            with torch.no_grad(), keep_random_state(obs.device):
                torch.manual_seed(0)  # the same noise each time, so that only learning moves the loss
                unseen_loss = average.module.bc_loss(obs[unseen], action[unseen])
            print(f"{step:>13,} cloning steps, loss {total / every:.4f}, held out {unseen_loss:.4f}", flush=True)
            rows.append(f"{step},{total / every:.6g},{unseen_loss:.6g}")
            total = 0.0
    agent.policy.load_state_dict(average.module.state_dict())
    if getattr(agent.policy, "frozen", None):
        agent.policy.frozen.load_state_dict(agent.policy.denoiser.state_dict())
    write(run / "cloning.csv", lambda file: file.write("\n".join([*rows, ""]).encode()))


@torch.no_grad()
def collect(run: str | Path, steps: int, path: str, deterministic: bool = False, device: str = "auto") -> None:
    """Play a saved run for about `steps` environment steps and write them as demonstrations, an .npz file.

    `deterministic` leaves out the final Gaussian's noise. Episodes cut off at the end count as truncated.
    """
    config = load_config(Path(run))
    if steps < 1:
        raise UserError(f"--demo-steps must be 1 or more, not {steps}.")
    if Path(path).exists() or not Path(path).parent.is_dir():
        raise UserError(f"{path} exists, or its folder does not; choose another name with --demos-out.")
    env = VectorEnv(config.env, config.num_envs, pick_device(device))  # single steps, also of a policy with chunks
    N, H = env.num_envs, config.action_chunk
    torch.manual_seed(seed := 2_000_003 + config.seed)  # apart from the seeds of training and evaluation
    agent = Agent(config, env.obs_dim, env.act_dim * H, env.discrete).to(env.device)
    load_checkpoint(Path(run), agent, env)
    obs, rows, used = env.reset(seed), [], torch.full((N,), H)
    plan = torch.zeros(N, H, dtype=torch.int64) if env.discrete else torch.zeros(N, H, env.act_dim)
    for _ in range(math.ceil(steps / N)):
        if (due := used == H).any():
            new = agent.policy.sample(agent.normalize(obs), deterministic)[0].cpu().view(plan.shape)
            plan[due], used[due] = new[due], 0
        action, used = plan[range(N), used], used + 1
        after, reward, terminated, truncated, _ = env.step(action)
        used[(terminated | truncated).cpu()] = H  # a new episode asks for a new chunk
        played = action.numpy() + env.start if env.discrete else env.center + env.scale * action.numpy().clip(-1, 1)
        outcome = (x.cpu().numpy() for x in (reward[:, 0], terminated, truncated))
        rows.append([obs.cpu().numpy(), played.astype(env.act_space.dtype), *outcome])
        obs = after
    env.close()
    observations, actions, rewards, terminations, truncations = (np.stack(column, 1) for column in zip(*rows))
    ended = torch.as_tensor(terminations | truncations).T
    returns = discounted_sums(torch.as_tensor(rewards).T, ended.float(), torch.zeros(N), gamma=1.0)[0][ended]
    truncations[:, -1] |= ~terminations[:, -1]
    arrays = dict(zip(D4RL_NAMES, (observations, actions, rewards, terminations, truncations)))
    arrays = {key: array.reshape(-1, *array.shape[2:]) for key, array in arrays.items()}
    write(Path(path), lambda file: np.savez_compressed(file, **arrays))
    whole = f"{len(returns)} whole episodes" + (f" of mean return {returns.mean():.1f}" if len(returns) else "")
    print(f"{path}: {len(arrays['rewards']):,} steps, {whole}, the others cut off at the end", flush=True)


# ===== 9  Checkpoints, evaluation and curves ==========================================================================

COLUMNS = ["update", "step", "seconds", "episodes", "return", "length", "approx_kl", "clip_fraction",
           "explained_variance", "policy_loss", "value_loss", "entropy", "grad_norm", "sigma", "chain_std",
           "chain_gradient_ratio", "chain_clipped", "learning_rate",
           "seconds_simulation", "seconds_policy", "seconds_update"]


def write(path: Path, to) -> None:
    """Let to(file) write `path` atomically: a full disk or a kill in the middle leaves the old file as it was."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({first_line(error)}); check its folder and the free space") from error


def load_config(run: Path) -> Config:
    """Configuration of a run folder; raises UserError where there is none."""
    try:
        return Config(**json.loads((run / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run} is no run folder of this program, by its config.json: {first_line(error)}.") from None


def load_checkpoint(run: Path, agent: Agent, env: VectorEnv) -> dict:
    """Put a run folder's weights and normalisers into `agent`; returns the whole Trainer.state_dict it was saved as."""
    path = run / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{run} has no checkpoint.pt: give a run folder whose training came to its first checkpoint.")
    try:
        state = torch.load(path, map_location=env.device, weights_only=True)
        if state["env"] != env.env_id:
            raise ValueError(f"it is of {state['env']}")
        agent.load_state_dict(state["agent"])
    except Exception as error:  # a damaged or foreign file can raise nearly anything
        raise UserError(f"{path} is damaged, or of another program, task or architecture than config.json beside it "
                        f"({first_line(error)}).") from None
    return state


@torch.no_grad()
def evaluate(run: str | Path, episodes: int = 10, video: str | None = None, device: str = "auto") -> dict:
    """Play whole episodes of a saved run: `episodes` with the final Gaussian (or softmax), as many without it.

    The normaliser is frozen, the chain keeps its noise, and each environment plays exactly one episode, so that short
    ones are not over-represented. `video` names a .gif or .mp4 of the first episode without noise.
    Returns {"with noise": {"return", "length": arrays}, "without noise": same, "ms per action": float}.
    """
    config, frames, result = load_config(Path(run)), [], {}
    seed, H = 1_000_003 + config.seed, config.action_chunk  # apart from the seeds of training
    env = VectorEnv(config.env, episodes, pick_device(device), chunk=H, render=video is not None)
    with keep_random_state(env.device):
        agent = Agent(config, *env.spaces).to(env.device)
        load_checkpoint(Path(run), agent, env)
        for name in ("with noise", "without noise"):
            torch.manual_seed(seed)
            obs, alive = env.reset(seed), np.ones(episodes, bool)
            returns, lengths = np.zeros(episodes), np.zeros(episodes)
            while alive.any():
                if video and name == "without noise" and alive[0] and (H > 1 or lengths[0] % 2 == 0):
                    frames.append(env.frame())
                action = agent.policy.sample(agent.normalize(obs), deterministic=name == "without noise")[0]
                obs, reward, terminated, truncated, _ = env.step(action)
                returns += alive * reward.nansum(1).cpu().numpy()
                lengths += alive * reward.isfinite().sum(1).cpu().numpy()
                alive &= ~(terminated | truncated).cpu().numpy()
            result[name] = {"return": returns, "length": lengths}
        one = lambda: agent.policy.sample(agent.normalize(obs[:1]))[0].cpu()
        result["ms per action"] = 1000 * float(np.median(timeit.repeat(one, number=1, repeat=200)))
    env.close()
    if video:
        imageio = optional("imageio", "--video")  # comes with gymnasium[mujoco]
        try:
            fps = env.envs.metadata.get("render_fps", 30) / max(2, H)
            imageio.mimsave(video, frames, **({"duration": 1000 / fps} if video.endswith(".gif") else {"fps": fps}))
        except (ValueError, ImportError, OSError) as error:
            raise UserError(f"cannot write {video} ({first_line(error)}); a name that ends in .gif always works, .mp4 "
                            "needs pip install imageio-ffmpeg.") from None
    return result


def describe(result: dict) -> str:
    """An evaluation as text."""
    spread = lambda x: f"{x.mean():.1f} +- {x.std():.1f} (min {x.min():.1f}, max {x.max():.1f})"
    lines = [f"{way:>13}: " + ", ".join(f"{what} {spread(x)}" for what, x in result[way].items())
             for way in ("with noise", "without noise")]
    return "\n".join([*lines, f"   one action: {result['ms per action']:.2f} ms (batch 1)"])


def open_metrics(run: Path, keep: int):
    """metrics.csv as a file to append to; rows after update `keep`, which no checkpoint has, are dropped."""
    path = run / "metrics.csv"
    lines = path.read_text().splitlines()[1:keep + 1] if path.is_file() else []
    write(path, lambda file: file.write("\n".join([",".join(COLUMNS), *lines, ""]).encode()))
    return open(path, "a", buffering=1)  # one line at a time


def read_metrics(run: str | Path) -> dict[str, np.ndarray]:
    """metrics.csv of a run folder, one float array per column; an empty cell (no episode ended, no chain) is NaN."""
    names, *rows = (line.split(",") for line in (Path(run) / "metrics.csv").read_text().splitlines())
    table = np.array([[float(cell or "nan") for cell in row] for row in rows]).reshape(len(rows), len(names))
    return dict(zip(names, table.T))


def plot_curve(history: dict[str, np.ndarray], path: Path, title: str) -> None:
    """Return of the training episodes against environment steps and against seconds, as a picture."""
    from matplotlib.figure import Figure

    figure, there = Figure(figsize=(9, 3.2), layout="constrained"), ~np.isnan(history["return"])
    for axes, x in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds")):
        axes.plot(history[x][there], history["return"][there], color="black", linewidth=1)
        axes.set_xlabel({"step": "environment steps", "seconds": "seconds of wall clock"}[x])
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("return of training episodes")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


# ===== 10  Training ===================================================================================================

def pick_device(name: str) -> torch.device:
    """torch.device of auto, cpu, cuda, cuda:N or mps; raises UserError where it is not there."""
    if name == "auto":  # not mps: slower than the CPU for networks this small
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({first_line(error)}); try --device auto.") from None


def compiler(config: Config, device: torch.device):
    """torch.compile as a function of one function; where it cannot work, the identity, after one warning."""
    torch.compiler.reset()  # or the runs of one process, say a notebook's, share one small cache
    options = dict(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")  # CUDA graphs
    try:
        if config.compile and device.type != "mps":  # where it is a prototype
            torch.compile(lambda x: x + 1, **options)(torch.zeros(1, device=device))
            return partial(torch.compile, **options)
    except Exception as error:  # no C++ compiler, say
        warnings.warn(f"going on more slowly, without torch.compile, which failed: {first_line(error)}")
    return lambda function: function


def new_run_folder(config: Config) -> Path:
    """runs/<env>__<algo>__<seed>, with -2, -3, ... behind it where that exists: no run is ever overwritten."""
    name = "__".join([config.env.replace("/", "_").replace(":", "_"), config.algo, str(config.seed)])
    for attempt in itertools.count(1):
        run = Path(config.runs) / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            run.mkdir(parents=True)
            return run
        except OSError as error:
            if not run.exists():  # else the name is merely taken
                raise UserError(f"cannot make {run} ({error.strerror}); choose another folder with --runs.") from None


class Trainer:
    """The state of a training run and its one verb: `iterate` plays a rollout and learns from it."""

    def __init__(self, config: Config):
        config.check()
        self.config, self.device = config, pick_device(config.device)
        torch.manual_seed(config.seed)
        self.env = VectorEnv(config.env, config.num_envs, self.device, config.vector, config.action_chunk)
        self.demos = None  # of behaviour cloning
        self.agent = Agent(config, *self.env.spaces).to(self.device)
        parts = [self.agent.policy, self.agent.critic] if config.critic_learning_rate else [self.agent]
        groups = [[p for p in part.parameters() if p.requires_grad] for part in parts]  # `update` clips each by itself
        self.parameters, self.rates = sum(groups, []), [config.learning_rate, config.critic_learning_rate]
        self.optimizer = torch.optim.Adam([{"params": group} for group in groups], eps=1e-5,
                                          fused=self.device.type != "mps")
        compiled = compiler(config, self.device)
        short = config.algo == "ppo" or config.denoising_steps <= config.compile_chain
        self.act = compiled(self.agent.act) if short else self.agent.act
        self.loss = lambda **batch: ppo_loss(self.agent, config, **batch)
        if short or config.algo == "dppo" and config.denoising_steps - self.agent.policy.M <= config.compile_chain:
            # DPPO's loss takes its M scored steps at once: only the others are a chain
            self.loss = compiled(self.loss)
        self.rollout = Rollout(config, self.env, self.agent)
        self.carry = torch.zeros(config.num_envs, device=self.device)  # discounted return so far, to scale rewards
        self.batch_size = config.num_envs * config.num_steps * config.action_chunk  # in environment steps
        self.updates, self.done, self.seconds = config.total_timesteps // self.batch_size, 0, 0.0
        self.obs = self.env.reset(config.seed)

    def state_dict(self) -> dict:
        """What a checkpoint holds: tensors, numbers and strings only."""
        return {"env": self.env.env_id, "update": self.done, "seconds": self.seconds,
                "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(), **({} if self.device.type == "cpu" else {
                    "random_" + self.device.type: getattr(torch, self.device.type).get_rng_state(self.device)})}

    def save(self, run: Path) -> None:
        write(run / "checkpoint.pt", lambda file: torch.save(self.state_dict(), file))

    def resume(self, run: Path) -> None:
        """Go on from a run's checkpoint, with new episodes (seeded by how far it had come)."""
        self.require_same(run, SAME_RUN)
        state = load_checkpoint(run, self.agent, self.env)
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["fused"] = self.device.type != "mps"  # the checkpoint may be another device's
        torch.set_rng_state(state["random"].cpu())
        if (there := state.get("random_" + self.device.type)) is not None:
            getattr(torch, self.device.type).set_rng_state(there.cpu(), self.device)
        self.done, self.seconds = state["update"], state["seconds"]
        if self.done >= self.updates:
            raise UserError(f"{run} is finished after {self.done * self.batch_size:,} steps; raise --total-timesteps "
                            "to go on.")
        self.obs = self.env.reset(self.config.seed, self.done)

    def init_from(self, run: Path) -> None:
        """Start from another run's policy, critic and normalisers; NCDPO and DPPO can start from one another's."""
        before = self.require_same(run, SAME_POLICY)
        if before.algo != self.config.algo and "ppo" in (before.algo, self.config.algo):
            raise UserError(f"{run} was trained by {before.algo}, whose network is not that of {self.config.algo}.")
        if before.finetune_steps not in (None, self.config.finetune_steps):
            raise UserError(f"{run} froze a part of its steps: repeat --finetune-steps {before.finetune_steps}.")
        source = Agent(before, *self.env.spaces).to(self.device)
        load_checkpoint(run, source, self.env)
        ours, theirs = self.agent.state_dict(), source.state_dict()
        if self.config.algo == "dppo" or (before.algo, before.init_std) != (self.config.algo, self.config.init_std):
            theirs = {name: tensor for name, tensor in theirs.items() if ".head." not in name}  # keep our sigma
        frozen = {name.replace(".denoiser.", ".frozen."): tensor for name, tensor in theirs.items()}
        self.agent.load_state_dict({name: (frozen | theirs).get(name, tensor) for name, tensor in ours.items()})

    def require_same(self, run: Path, names) -> Config:
        """The configuration of a run; raises UserError where it differs from ours in one of `names`."""
        before = load_config(run)
        for name in names:
            if (was := getattr(before, name)) != (now := getattr(self.config, name)):
                raise UserError(f"{run} was trained with {name} = {was}, so it cannot go on with {now}: leave "
                                f"out --{name.replace('_', '-')}, or start a new run.")
        return before

    def iterate(self) -> dict:
        """One rollout and one update; returns the row of metrics.csv."""
        config, agent, rollout, start = self.config, self.agent, self.rollout, time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * (1 - self.done / self.updates if config.anneal_lr else 1)
        self.obs = rollout.collect(self.env, agent, self.act, self.obs)
        finished, collected = rollout.finished(), time.perf_counter()
        with torch.no_grad():
            H, played = config.action_chunk, rollout.reward.isfinite().sum(-1)  # steps of each chunk
            obs, gamma = agent.normalize(rollout.obs), config.gamma ** H  # of a decision
            reward = rollout.reward.nan_to_num() @ (config.gamma ** torch.arange(H, device=self.device))
            if config.norm_reward:
                sums, self.carry = discounted_sums(reward, rollout.ended, self.carry, gamma)
                agent.reward_norm.update(sums.reshape(-1, 1))
                reward = (reward * torch.rsqrt(agent.reward_norm.var + 1e-8)).clamp(-10, 10)
            value, final_value = agent.value(obs), agent.value(agent.normalize(rollout.final_obs))
            final_value = final_value * config.gamma ** (played - H)  # a truncated chunk led there sooner
            advantage = advantages(reward, value, final_value, rollout.terminated, rollout.ended, gamma,
                                   config.gae_lambda)
            target = advantage + value
            agent.obs_norm.update(rollout.obs.flatten(0, 1))  # only now: the rollout was played with the old statistics
        batch = dict(obs=obs, action=rollout.action, latent=rollout.latent, old_log_prob=rollout.log_prob,
                     old_value=value, advantage=advantage, target=target)
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        row = update(agent, config, self.optimizer, self.loss, batch, demos=self.demos if config.bc_coef else None,
                     warmup=self.done < config.critic_warmup)
        whole = rollout.reward[rollout.ended == 0].sum() + rollout.reward[..., 0].sum()  # no NaN has a place in these
        for what, numbers in {"an observation, action, reward or value": (whole, *(t.sum() for t in batch.values())),
                              "the loss or its gradient": row.values()}.items():
            if not all(math.isfinite(number) for number in numbers):
                raise UserError(f"{what} became infinite or not a number in update {self.done + 1} (a lower "
                                "--learning-rate may help)")

        few = {name: tensor[:128] for name, tensor in batch.items()}
        if config.algo == "ncdpo":
            norms, clipped = chain_gradient(agent, few["obs"], few["action"], few["latent"], few["advantage"])
            row |= {"chain_gradient_ratio": norms[1] / max(norms[-1], 1e-30), "chain_clipped": clipped}
        if not self.env.discrete:
            row["sigma"] = agent.policy.head.log_std.exp().mean().item()
            if config.algo != "ppo":
                row["chain_std"] = chain_std(agent, few["obs"])
        if len(finished):
            row["return"], row["length"] = finished.mean(0).tolist()
        self.done += 1
        end = time.perf_counter()
        self.seconds += end - start
        return row | {
            "update": self.done, "step": self.done * self.batch_size, "seconds": self.seconds,
            "episodes": len(finished), "learning_rate": self.optimizer.param_groups[0]["lr"],
            "explained_variance": (1 - (target - value).var() / target.var().clamp(min=1e-8)).item(),
            "seconds_simulation": rollout.seconds_simulation, "seconds_update": end - collected,
            "seconds_policy": collected - start - rollout.seconds_simulation}


def train(config: Config, resume: str | Path | None = None) -> dict[str, np.ndarray]:
    """Train, and return the history: one array per column of metrics.csv, one entry per update.

    Writes a new run folder, or goes on in the folder `resume`, where only the episodes start anew. Raises UserError.
    """
    trainer = Trainer(config)
    if config.demos and (config.bc_coef or not resume):
        trainer.demos = load_demos(config.demos, trainer.env)
    if resume is not None:
        trainer.resume(Path(resume))
    elif config.init_from:
        trainer.init_from(Path(config.init_from))
    tensorboard = optional("torch.utils.tensorboard", "--tensorboard") if config.tensorboard else None
    run = new_run_folder(config) if resume is None else Path(resume)
    write(run / "config.json", lambda file: file.write(json.dumps(dataclasses.asdict(config), indent=2).encode()))
    chain = f" (K = {config.denoising_steps}, predict {config.predict})" if config.algo != "ppo" else ""
    weights = f"{sum(map(torch.numel, trainer.parameters)):,} parameters on {trainer.device}"
    print(f"{config.algo}{chain} on {config.env}, seed {config.seed}: {weights}, {config.num_envs} environments "
          f"({config.vector}); writing {run}", flush=True)
    if config.demos and not config.init_from and resume is None:
        clone(trainer.agent, config, trainer.demos, run)
        trainer.save(run)
    size, first, saved, recent = trainer.batch_size, trainer.done, trainer.done, []
    started, stop, reached, go_on = time.perf_counter(), [], False, f"python ncdpo.py --resume {run}"
    goal = math.inf if config.stop_at_return is None else config.stop_at_return
    board = tensorboard.SummaryWriter(str(run), purge_step=first * size) if tensorboard else nullcontext()

    def handle(number, frame):  # finish the update, then save; a second signal interrupts at once
        if stop:
            raise KeyboardInterrupt
        stop.append(signal.Signals(number).name)

    with (signals(handle, signal.SIGINT, signal.SIGTERM), closing(trainer.env), board, open_metrics(run, first) as file,
          tqdm(total=trainer.updates * size, initial=first * size, unit=" steps", unit_scale=True, smoothing=0.05,
               disable=not sys.stderr.isatty()) as bar):
        try:
            while trainer.done < trainer.updates and not stop and not reached:
                row = trainer.iterate()
                cells = [row.get(name, "") for name in COLUMNS]
                file.write(",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in cells) + "\n")
                for name, x in row.items() if tensorboard else ():
                    board.add_scalar(name, x, row["step"])
                recent += [row["return"]] * row["episodes"] if row["episodes"] else []
                shown = f"return {np.mean(recent[-20:]):.1f}" if recent else "no episode has ended"
                reached = bool(recent) and np.mean(recent[-20:]) >= goal
                bar.set_postfix_str(shown, refresh=False)
                bar.update(size)
                twentieth = 20 * trainer.done // trainer.updates
                if bar.disable and twentieth > 20 * (trainer.done - 1) // trainer.updates:  # no terminal: plain lines
                    pace = (time.perf_counter() - started) / (trainer.done - first)  # seconds an update
                    print(f"{row['step']:>13,} steps ({5 * twentieth}%), {shown}, {size / pace:,.0f} steps/s, "
                          f"{pace * (trainer.updates - trainer.done):.0f} s left", flush=True)
                if trainer.done % config.checkpoint_every == 0:
                    trainer.save(run)
                    saved = trainer.done
            trainer.save(run)
        except (UserError, OSError) as error:
            there = (run / "checkpoint.pt").is_file()
            kept = f"the checkpoint of update {saved} is kept: {go_on}" if there else "there is no checkpoint"
            raise UserError(f"{error}; {kept}.") from error
    history, elapsed, steps = read_metrics(run), time.perf_counter() - started, (trainer.done - first) * size
    plot_curve(history, run / "curve.png", f"{config.algo} on {config.env}, seed {config.seed}")
    shares = {name: history["seconds_" + name][first:].sum() / elapsed for name in ("simulation", "policy", "update")}
    if reached:
        print(f"reached the mean return of --stop-at-return {goal:g}", flush=True)
    print(f"{steps:,} steps in {elapsed:.1f} s, {steps / elapsed:,.0f} steps/s ("
          + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + ")", flush=True)
    if stop:
        print(f"stopped by {stop[0]} after update {trainer.done}; to go on: {go_on}", flush=True)
    else:
        print(describe(evaluate(run, config.episodes, device=str(trainer.device))))
        print(f"curve: {run / 'curve.png'}", flush=True)
    return history


# ===== 11  Command line ===============================================================================================

@dataclasses.dataclass
class CommandLine(Config):
    """NCDPO, PPO and DPPO in one file: trains a policy unless --evaluate or --collect is given."""

    resume: str | None = None  # go on with this run folder; its config.json gives the defaults of all other flags
    evaluate: str | None = None  # evaluate this run folder instead of training
    video: str | None = None  # with --evaluate: film the first episode into this .gif or .mp4 file
    collect: str | None = None  # play this run folder and record demonstrations
    demo_steps: int = 100_000  # with --collect: environment steps to record
    demos_out: str = "demos.npz"  # with --collect: the file to write
    deterministic: bool = False  # with --collect: without the final Gaussian's noise


def parse(arguments: list[str]) -> tuple[Config, CommandLine]:
    """Command line -> configuration; the defaults are those of the task (PRESETS) or of the run folder named."""
    import tyro

    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--env", "--resume", "--evaluate", "--collect", "--init-from", "--demos"):
        peek.add_argument(flag, "--" + flag[2:].replace("-", "_"))  # tyro takes both
    early, _ = peek.parse_known_args(arguments)
    run = early.resume or early.evaluate or early.collect or early.init_from
    defaults = load_config(Path(run)) if run else Config.for_task(early.env or Config.env, demos=early.demos)
    if early.init_from:
        fresh = ("total_timesteps", "demos", "bc_coef", "stop_at_return", "runs")
        defaults = dataclasses.replace(defaults, **{name: getattr(Config, name) for name in fresh})
    line = tyro.cli(CommandLine, args=arguments, default=CommandLine(**dataclasses.asdict(defaults)))
    return Config(**{name: getattr(line, name) for name in Config.__dataclass_fields__}), line


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake told in one sentence, 130 for an interruption."""
    try:
        config, line = parse(sys.argv[1:] if arguments is None else arguments)
        config.check()
        run = line.collect or line.evaluate
        for name, value in vars(load_config(Path(run))).items() if run else ():
            if name not in ("episodes", "device") and value != getattr(config, name):
                raise UserError(f"a saved run is played as it was trained: leave out --{name.replace('_', '-')}.")
        if line.collect:
            collect(line.collect, line.demo_steps, line.demos_out, line.deterministic, config.device)
        elif line.evaluate:
            print(describe(evaluate(line.evaluate, config.episodes, line.video, config.device)))
        else:
            train(config, line.resume)
    except UserError as error:
        print(f"ncdpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ncdpo: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
