# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<2.14", "gymnasium[mujoco]>=1.1,<2", "mujoco>=3.2,<5", "numpy>=1.26"]
# ///
"""NCDPO: reinforcement learning of diffusion policies by backpropagation through the denoising steps, in one file.

A diffusion policy turns Gaussian noise into an action in K denoising steps, so the likelihood of an action, which PPO
needs, is an intractable integral over that noise. NCDPO (arXiv 2505.10482) draws all the noise first and calls it part
of the state. Given the noise, the chain is a deterministic, differentiable function; a small Gaussian (or a softmax) on
its end makes the likelihood exact; and plain PPO then sends its gradient back through all K steps:

    repeat
        for t = 1 ... T:                                             # play
            omega ~ N(0, I)                                          # all the noise of one chain (E9)
            action ~ N(f(s, omega), sigma^2)                         # the chain's end plus a small Gaussian (E6, E7)
        A = generalised advantages under the critic V(s)             # judge
        for each minibatch of (s, omega, action, A), a few epochs:   # learn
            r = pi(action | s, omega) / pi_old(action | s, omega)    # one ratio a decision (E11)
            ascend min(r A, clip(r, 1 - e, 1 + e) A), and fit V      # the gradient passes all K steps (E12, E13)

    python ncdpo.py --env HalfCheetah-v4                  # train; the run is a folder, runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --env HalfCheetah-v4 --algo ppo       # the same lines with an MLP policy (or --algo dppo)
    python ncdpo.py --evaluate runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --resume runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --env Hopper-v4 --demos demos.npz     # clone demonstrations, then improve the clone

Sections: 1 noise schedule, 2 networks, 3 the noise-conditioned policy, 4 PPO (these four are NCDPO; they need torch and
math only, and can be pasted elsewhere), 5 the two baselines, 6 environments, 7 rollout, 8 run folder, 9 configuration
and training, 10 command line.
Labels such as E5 name the equations of README.md. Letters: B batch, S observation, A action (or logits; in section 4
the advantage), K denoising steps (of Schedule and Config: those that were cloned, of a policy: those that are run), M
scored decisions per action, T decisions of a rollout, N environments.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import inspect
import json
import math
import os
import re
import sys
import textwrap
import time
import warnings
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or torch's waiting threads spin so long that a busy machine crawls
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # torch.compile trusts the CPU's flags: its tests take seconds

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F


def beside(name: str):
    """The module notebooks/<name>.py; None where it is not there, for alone in a folder this file works too."""
    path = Path(__file__).resolve().parent / "notebooks" / f"{name}.py"
    return importlib.import_module(f"notebooks.{name}") if path.exists() else None


cloning, health, physics = map(beside, ("cloning", "health", "physics"))  # --demos; a run's log; MuJoCo in batches, GPU

# ===== 1  Noise schedule ==============================================================================================

class Schedule(nn.Module):
    """Tables of the cosine schedule (Nichol and Dhariwal, 2021) and the steps that use them (E1, E3, E4, E18).

    A chain that was cloned with `steps` may be run on fewer, evenly spaced `sampling_steps`: its k-th step is then step
    tau(k) of the K, and from E3 on k counts the steps that are run (E18). `abar` has K + 1 rows, the other tables one
    for each step that is run, and one for k = 0, clean data. All have one column and are indexed by k, an int or a
    LongTensor, so that `table[k]` broadcasts against (..., A). Float64 inside, stored in torch's default dtype.
    """

    def __init__(self, steps: int, predict: str = "sample", eta: float = 1.0, clip: float = 1.0,
                 sampling_steps: int | None = None):
        super().__init__()
        self.clip = clip
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        abar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, 0)])
        tau = torch.linspace(0, steps, (sampling_steps or steps) + 1).round().long()
        now, before = abar[tau[1:]], abar[tau[:-1]]
        sigma = eta * torch.sqrt((1 - before) / (1 - now) * (1 - now / before))  # the last factor is beta_k if all run
        # E4 is linear in (x0hat, x_k): write eps_tilde out once and for all
        on_eps = torch.sqrt(1 - before - sigma**2) / torch.sqrt(1 - now)
        # E3 is linear in (network output, x_k), whatever the network predicts
        out, skip = {"sample": (torch.ones_like(now), torch.zeros_like(now)),
                     "epsilon": (-torch.sqrt((1 - now) / now), 1 / torch.sqrt(now)),
                     "v": (-torch.sqrt(1 - now), torch.sqrt(now))}[predict]
        tables = dict(abar=abar, sigma=sigma, from_output=out, from_noisy=skip,
                      to_clean=torch.sqrt(before) - on_eps * torch.sqrt(now), to_noisy=on_eps)
        for name, table in tables.items():
            table = table if name == "abar" else torch.cat([torch.zeros(1, dtype=torch.float64), table])
            self.register_buffer(name, table.to(torch.get_default_dtype())[:, None], persistent=False)
        self.register_buffer("taus", tau, persistent=False)
        self.tau_list = tau.tolist()

    def tau(self, k):
        """Which of the K steps that were cloned the k-th sampling step is (E18); the network is told this one."""
        return self.tau_list[k] if isinstance(k, int) else self.taus[k]  # no transfer from an accelerator

    def diffuse(self, x0, k, eps):
        """Forward process (E1): x_k from clean x0 and standard normal eps, both (..., A)."""
        return torch.sqrt(self.abar[k]) * x0 + torch.sqrt(1 - self.abar[k]) * eps

    def clean(self, output, x, k):
        """Clean estimate x0hat (E3) from the network's output at x_k, both (..., A), clipped to [-clip, clip]."""
        return (self.from_output[k] * output + self.from_noisy[k] * x).clamp(-self.clip, self.clip)

    def mu(self, x0hat, x, k):
        """Mean of x_{k-1} given x_k (E4): DDPM's posterior mean at eta = 1, DDIM's step at eta = 0."""
        return self.to_clean[k] * x0hat + self.to_noisy[k] * x


# ===== 2  Networks ====================================================================================================

def mlp(inputs: int, hidden: int, outputs: int, activation: str, gain: float) -> nn.Sequential:
    """Two hidden layers with PPO's usual orthogonal weights; `gain` scales the last layer's."""
    act, layers = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}[activation], []
    for n, m, scale in ((inputs, hidden, math.sqrt(2)), (hidden, hidden, math.sqrt(2)), (hidden, outputs, gain)):
        layers += [nn.Linear(n, m), act()]
        nn.init.orthogonal_(layers[-2].weight, scale)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Denoiser(nn.Module):
    """net(x_k, k, s): an MLP of [x_k, s, embedding of k].

    At initialisation its output is nearly zero: an untrained "sample" chain then proposes nearly the zero action, like
    an untrained MLP.
    """

    def __init__(self, obs_dim: int, act_dim: int, steps: int, hidden: int, activation: str, embedding: int = 16):
        super().__init__()
        self.obs_dim, self.net = obs_dim, mlp(act_dim + obs_dim + embedding, hidden, act_dim, activation, gain=0.01)
        freq = torch.exp(-math.log(1000) * torch.arange(embedding // 2) / (embedding // 2))
        angle = torch.arange(steps + 1)[:, None] * freq
        self.register_buffer("embedding", torch.cat([angle.sin(), angle.cos()], -1), persistent=False)

    def forward(self, x, k, obs):
        """Network output (..., A) at x_k (..., A) and s (..., S); k an int, or a LongTensor of x's leading axes."""
        seen = obs[..., :self.obs_dim]  # the critic may see more than the policy (VectorEnv.policy_dim)
        return self.net(torch.cat([x, seen, self.embedding[k].expand(*x.shape[:-1], -1)], -1))


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


# ===== 3  The noise-conditioned policy ================================================================================

class Gaussian(nn.Module):
    """Final Gaussian N(action; mean, diag(sigma^2)) of Box actions (..., A) (E7); log sigma is learnt or `fixed`."""

    def __init__(self, dim: int, std: float, fixed: bool = False):
        super().__init__()
        self.log_std = nn.Parameter(torch.full((dim,), math.log(std)), requires_grad=not fixed)

    def noise(self, *shape, device=None):
        return torch.randn(shape, device=device)

    def sample(self, mean, noise):
        return mean + self.log_std.exp() * noise

    def log_prob(self, mean, action):
        z = (action - mean) * torch.exp(-self.log_std)
        return (-0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, mean):
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(mean.shape[:-1])


class Categorical(nn.Module):
    """Final softmax(logits / temperature) for Discrete actions (E8): logits (..., A), actions (...)."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def noise(self, *shape, device=None):
        return -torch.log(torch.empty(shape, device=device).exponential_())  # Gumbel: its argmax draws from the softmax

    def sample(self, logits, noise):
        return (logits / self.temperature + noise).argmax(-1)

    def log_prob(self, logits, action):
        return F.log_softmax(logits / self.temperature, -1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, logits):
        log_p = F.log_softmax(logits / self.temperature, -1)
        return -(log_p.exp() * log_p).sum(-1)


class NCDPO(nn.Module):
    """Noise-conditioned diffusion policy: the denoising chain is the mean, its noise part of the state (E6-E9).

    Observations are normalised, (B, S); actions (B, A) live in [-1, 1], or are indices (B,) with a Categorical head;
    omega is (B, K, A). Keep omega with the action: whoever scores the action again needs the same omega.
    """

    def __init__(self, obs_dim: int, act_dim: int, steps: int = 5, hidden: int = 128, activation: str = "silu",
                 predict: str = "sample", eta: float = 1.0, clip: float = 1.0, noise_scale: float = 1.0,
                 sampling_steps: int | None = None, head: nn.Module | None = None):
        super().__init__()
        self.act_dim, self.predict, self.noise_scale = act_dim, predict, noise_scale
        self.K = sampling_steps or steps
        self.head = head or Gaussian(act_dim, std=0.22)
        self.schedule = Schedule(steps, predict, eta, clip, sampling_steps)
        self.denoiser = Denoiser(obs_dim, act_dim, steps, hidden, activation)

    def noise(self, *shape, device=None):
        """Noise of actions of a leading shape: omega (*shape, K, A) (E9), times noise_scale; the head's (*shape, A)."""
        omega = self.noise_scale * torch.randn(*shape, self.K, self.act_dim, device=device)
        return omega, self.head.noise(*shape, self.act_dim, device=device)

    def mu(self, x, k, obs):
        """Mean of x_{k-1} given x_k and s (E3, E4); shapes as in Denoiser.forward."""
        x0hat = self.schedule.clean(self.denoiser(x, self.schedule.tau(k), obs), x, k)
        return self.schedule.mu(x0hat, x, k)

    def chain(self, obs, omega, last: int = 0) -> list[torch.Tensor]:
        """Reverse chain x_K, ..., x_last, each (B, A) (E5), on given noise omega = (x_K, z_K, ..., z_2).

        Nothing is detached: autograd through this loop is backpropagation through denoising (E13).
        """
        xs = [omega[:, 0]]
        for k in range(self.K, last, -1):
            x = self.mu(xs[-1], k, obs)
            if k > 1:  # sigma_1 = 0: the last step has no noise
                x = x + self.schedule.sigma[k] * omega[:, self.K + 1 - k]
            xs.append(x)
        return xs

    def mean(self, obs, omega):
        """f_theta(s, omega) (E6), the chain's end: the mean action (B, A), or logits."""
        return self.chain(obs, omega)[-1]

    def act(self, obs, omega, noise):
        """Action as a function of observation and noise; and what must be kept to score it again, here omega."""
        return self.head.sample(self.mean(obs, omega), noise), omega

    def evaluate(self, obs, action, omega):
        """log pi(action | s, omega) (E7, E8) and the head's entropy, both (B,), with gradients."""
        mean = self.mean(obs, omega)
        return self.head.log_prob(mean, action), self.head.entropy(mean)

    def log_prob(self, obs, action, omega):
        """log pi(action | s, omega) (E7, E8), (B,)."""
        return self.evaluate(obs, action, omega)[0]

    @torch.no_grad()
    def sample(self, obs, deterministic: bool = False):
        """Draw actions: action, log-likelihood, omega. `deterministic` leaves out the head's noise, not the chain's."""
        omega, noise = self.noise(len(obs), device=obs.device)
        action, omega = self.act(obs, omega, torch.zeros_like(noise) if deterministic else noise)
        return action, self.log_prob(obs, action, omega), omega

    def bc_loss(self, obs, action):
        """Behaviour cloning (E2): mean squared error of the network's prediction, each sample at a random k of K."""
        k = torch.randint(1, len(self.schedule.abar), (len(obs),), device=obs.device)
        eps = torch.randn_like(action)
        abar = self.schedule.abar[k]
        target = {"epsilon": eps, "sample": action,
                  "v": torch.sqrt(abar) * eps - torch.sqrt(1 - abar) * action}[self.predict]
        return F.mse_loss(self.denoiser(self.schedule.diffuse(action, k, eps), k, obs), target)


# ===== 4  PPO =========================================================================================================

def advantages(reward, value, final_value, terminated, ended, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (Schulman et al., 2016), the A of E10 and E12; every argument is (T, N).

    final_value is the value of where a step led, before any reset: a termination has no future, a truncation has one,
    and the trace is cut at both (ended = terminated or truncated).
    """
    delta = reward + gamma * (1 - terminated) * final_value - value
    keep = gamma * gae_lambda * (1 - ended)
    result, trace = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        result[t] = trace = delta[t] + keep[t] * trace
    return result


def clipped_objective(log_ratio, A, clip):
    """PPO's clipped objective (E12) of log ratios log r (E11); all of the same shape, clip a number or of that shape.

    Also returns the approximate KL (Schulman's k3 estimator) and the fraction of clipped ratios.
    """
    ratio = log_ratio.exp()
    objective = torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
    with torch.no_grad():
        return objective, (ratio - 1 - log_ratio).mean(), ((ratio - 1).abs() > clip).float().mean()


def ppo_loss(policy, critic, obs, action, latent, log_prob, advantage, target, clip_coef: float = 0.2,
             vf_coef: float = 0.5, ent_coef: float = 0.0, coordinates: int = 1, norm_adv: bool = True):
    """PPO's loss on a minibatch and a dictionary of diagnostics.

    obs (B, S) normalised; action and latent (NCDPO's omega) as policy.act gave them, log_prob their log-likelihood
    then, (B,), or (B, M) of a policy that brings an `objective` for it; advantage, and target for the critic, (B,). The
    log ratio may be averaged over an action's `coordinates`. Advantages are made standard within the minibatch unless
    that was done before (norm_adv=False).
    """
    new_log_prob, entropy = policy.evaluate(obs, action, latent)
    log_ratio = (new_log_prob - log_prob) / coordinates  # one for each decision (E11)
    A = (advantage - advantage.mean()) / (advantage.std() + 1e-8) if norm_adv else advantage
    gain, kl, clipped = getattr(policy, "objective", clipped_objective)(log_ratio, A, clip_coef)
    value_loss, entropy = 0.5 * F.mse_loss(critic(obs).squeeze(-1), target), entropy.mean()
    loss = -gain + vf_coef * value_loss - ent_coef * entropy
    return loss, {"policy_loss": -gain.detach(), "value_loss": value_loss.detach(), "entropy": entropy.detach(),
                  "approx_kl": kl, "clip_fraction": clipped}


def ppo_update(loss_function, batch: dict, optimizer, epochs: int = 5, minibatch_size: int = 512,
               max_grad_norm: float = 0.5, target_kl: float | None = None) -> dict:
    """Epochs of minibatches over `batch`, tensors of one length; the diagnostics, averaged over the minibatches taken.

    loss_function(**minibatch) is ppo_loss with all but its tensors filled in. The gradient of each of the optimizer's
    groups is scaled down to max_grad_norm. No epoch follows one whose approximate KL, "last_kl", exceeded target_kl.
    """
    size, taken = len(batch["obs"]), []
    minibatch_size = min(minibatch_size, size)
    per_epoch = size // minibatch_size  # a remainder smaller than a minibatch is left out
    for _ in range(epochs):
        order = torch.randperm(size, device=batch["obs"].device)
        for pick in order.split(minibatch_size)[:per_epoch]:
            optimizer.zero_grad()  # before the forward pass: a CUDA graph reuses the memory of old gradients
            loss, diagnostics = loss_function(**{name: tensor[pick] for name, tensor in batch.items()})
            loss.backward()
            norm, *_ = [nn.utils.clip_grad_norm_(g["params"], max_grad_norm) for g in optimizer.param_groups]
            optimizer.step()
            diagnostics["grad_norm"] = norm
            taken.append(torch.stack(list(diagnostics.values())))
        last_kl = (sum(taken[-per_epoch:]) / per_epoch)[list(diagnostics).index("approx_kl")]
        if target_kl is not None and last_kl > target_kl:
            break
    return dict(zip([*diagnostics, "last_kl"], torch.stack([*(sum(taken) / len(taken)), last_kl]).tolist()))


# ===== 5  The two baselines ===========================================================================================

class MLPPolicy(NCDPO):
    """PPO's usual policy: pi(a | s) = N(a; mlp(s), sigma^2), or a softmax. NCDPO without a chain and its noise."""

    def __init__(self, obs_dim: int, act_dim: int, hidden: int, activation: str, head: nn.Module):
        nn.Module.__init__(self)  # what NCDPO's methods read, with a chain of no steps
        self.obs_dim, self.act_dim, self.K, self.noise_scale, self.head = obs_dim, act_dim, 0, 1.0, head
        self.net = mlp(obs_dim, hidden, act_dim, activation, gain=0.01)

    def mean(self, obs, omega):
        return self.net(obs[..., :self.obs_dim])

    def bc_loss(self, obs, action):
        """Behaviour cloning, obs (B, S), action (B, A): squared error of the mean action, or cross entropy."""
        mean = self.mean(obs, None)
        if isinstance(self.head, Categorical):
            return -self.head.log_prob(mean, action.argmax(-1)).mean()
        return F.mse_loss(mean, action)


class DPPO(NCDPO):
    """Diffusion Policy Policy Optimization (arXiv 2409.00588): every denoising step is a decision, M = K (E15).

    Log-likelihoods are (B, M); no gradient need flow through the chain: `evaluate` scores all stored transitions in one
    parallel pass. The last step (k = 1) is the head's: a Gaussian of standard deviation min_std, or the softmax of E8.
    With M < K scored steps (E16) the noise of the others is part of the state, as in NCDPO; kept of an action is
    (x_K, z_K, ..., z_{M+1}; x_{M-1}, ..., x_1).
    """

    def __init__(self, *dims, scored_steps: int | None = None, chain_gradient: bool = True, min_std: float = 0.1,
                 gamma_denoising: float = 0.99, **more):
        super().__init__(*dims, **{"head": Gaussian(dims[1], min_std, fixed=True), **more})
        self.M, self.chain_gradient = scored_steps or self.K, chain_gradient
        steps_to_go = torch.arange(self.M - 1, -1, -1)
        self.register_buffer("ks", steps_to_go + 1, persistent=False)
        self.register_buffer("std", (self.noise_scale * self.schedule.sigma).clamp(min=min_std), persistent=False)
        self.register_buffer("weight", gamma_denoising ** steps_to_go.float(), persistent=False)  # of the advantage

    def step_log_prob(self, x_before, mu, k):
        """log N(x_{k-1}; mu_k, max(sigma_k, sigma_min)^2) of E15, summed over the action's coordinates."""
        z = (x_before - mu) / self.std[k]
        return (-0.5 * z**2 - torch.log(self.std[k]) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def act(self, obs, omega, noise):
        x, kept = self.chain(obs, omega, last=self.M)[-1], list(omega[:, :self.K + 1 - self.M].unbind(1))
        for k in range(self.M, 1, -1):
            x = self.mu(x, k, obs) + self.std[k] * omega[:, self.K + 1 - k] / self.noise_scale
            kept.append(x)
        return self.head.sample(self.mu(x, 1, obs), noise), torch.stack(kept, 1)

    def evaluate(self, obs, action, kept):
        omega, scored = kept.split([self.K + 1 - self.M, self.M - 1], 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.chain_gradient):
            x = self.chain(obs, omega, last=self.M)[-1]
        xs = torch.cat([x[:, None], scored], 1)  # x_M, ..., x_1
        mu = self.mu(xs, self.ks, obs[:, None].expand(-1, self.M, -1))  # (B, M, A), all steps at once
        last = self.head.log_prob(mu[:, -1], action)[:, None]
        return torch.cat([self.step_log_prob(scored, mu[:, :-1], self.ks[:-1]), last], 1), self.head.entropy(mu[:, -1])

    def objective(self, log_ratio, A, clip):
        """E12 for each of the M decisions: log_ratio (B, M), A (B,) discounted by the steps to go (E15)."""
        gain, kl, clipped = clipped_objective(log_ratio, A[:, None] * self.weight, clip)
        return gain, kl * self.M, clipped  # the KL of an action is that of all its decisions


class PartlyFrozen(nn.Module):
    """A denoiser whose last `tuned` steps learn; those before, k > tuned, are done by a frozen copy."""

    def __init__(self, denoiser: Denoiser, tuned: int):
        super().__init__()
        self.tuned, self.denoiser, self.frozen = tuned, denoiser, copy.deepcopy(denoiser).requires_grad_(False)

    def forward(self, x, k, obs):  # k is a tensor only where DPPO scores its steps, or where both are cloned
        return (self.frozen if isinstance(k, int) and k > self.tuned else self.denoiser)(x, k, obs)


# ===== 6  Environments ================================================================================================

class UserError(Exception):
    """A mistake of the user's or of their machine, told in one sentence that names the remedy."""


def gist(error: BaseException) -> str:
    """The gist of somebody else's exception; with its type where the text is but a word, a KeyError's key, say."""
    text = textwrap.shorten(str(error), 400, placeholder=" ...")
    return f"{type(error).__name__} {text}".strip() if isinstance(error, KeyError) or " " not in text else text


@contextmanager
def told(message: str):
    """Somebody else's exception in this block becomes a UserError: `message` with its gist for {} (f"...{{}}")."""
    try:
        yield
    except Exception as error:  # a damaged file, a missing display, a mistake in a task's code: it can be anything
        raise error if isinstance(error, UserError) else UserError(message.replace("{}", gist(error))) from error


class VectorEnv:
    """N copies of a task (of a game the agents of all worlds) that take and give tensors on `device`.

    reset(seed) -> obs (N, S);  step(action) -> obs, reward, terminated, truncated, final_obs
    A decision is a chunk of H actions (H = 1 unless asked for): an action is (N, H * A), a reward (N, H), NaN for steps
    after an episode's end. Box actions live in [-1, 1] here and are clipped and rescaled; final_obs (N, S) is where a
    step really led: it differs from obs (where the next step starts) in those environments that ended and were reset in
    the same step. `vector` is auto (MuJoCo in batches by notebooks/physics.py where that has the task, else sync), warp
    or sync; a `module:name` may bring a simulator of its own (make_vec).
    """

    def __init__(self, env_id: str, num_envs: int, device: torch.device, vector: str = "auto", chunk: int = 1):
        self.env_id, self.device, self.chunk = env_id, device, chunk
        own = make_vec(env_id, num_envs, device)
        one = own or make_env(env_id)
        obs_space, act_space = one.observation_space, one.action_space
        self.discrete = isinstance(act_space, gym.spaces.Discrete)
        box = isinstance(act_space, gym.spaces.Box) and len(act_space.shape) == 1 and act_space.is_bounded()
        if not isinstance(obs_space, gym.spaces.Box) or not (self.discrete or box):
            raise UserError(f"{env_id} has observations {obs_space} and actions {act_space}, but only Box observations "
                            "and Discrete or bounded flat Box actions will do: wrap it (gymnasium.wrappers).")
        if chunk > 1 and (own or self.discrete):
            raise UserError(f"{env_id} takes one action at a time, no chunk of them: give --action-chunk 1.")
        with told(f"cannot make {num_envs} x {env_id} (--vector {vector}): {{}}; "  # no mujoco-warp, little memory
                  "fewer --num-envs or --vector sync may help."):
            self.envs = own or (physics and vector != "sync" and physics.batched(one, num_envs, chunk, device, vector)
                                ) or GymnasiumEnvs(env_id, num_envs, chunk)
            if vector == "warp" and self.envs.kind != "warp":
                raise ValueError("that needs its formulas in notebooks/physics.py, beside this file")
        self.vector, self.home, self.close = self.envs.kind, self.envs.device, self.envs.close
        if self.discrete:
            self.act_dim, self.offset = int(act_space.n), int(act_space.start)
        else:
            low, high = (torch.as_tensor(b, device=self.home).repeat(chunk) for b in (act_space.low, act_space.high))
            self.act_dim, self.center, self.scale = len(low), (high + low) / 2, (high - low) / 2
        self.obs_dim = math.prod(obs_space.shape)
        self.num_envs = getattr(self.envs, "num_envs", num_envs)  # rows, which may be several agents of a world
        self.policy_dim = getattr(self.envs, "policy_dim", self.obs_dim)
        self.spaces = [self.obs_dim, self.act_dim, self.discrete, self.policy_dim]  # what an Agent is built for

    def check_spaces(self, spaces: list, run: Path) -> None:
        """Raises UserError if the agent of `run`, built for `spaces`, cannot play here."""
        if spaces != self.spaces:
            raise UserError(f"{self.env_id} has other observations or actions than the task of {run}: leave out --env.")

    def reset(self, *seed: int):
        """First observations (N, S) of new episodes, all of whose randomness comes from `seed`."""
        seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(self.num_envs) // 2]
        with told(f"{self.env_id} raised an error in reset: {{}}"):
            return self.envs.reset(seeds).to(self.device)

    def step(self, action):
        """Action (N, H * A) in [-1, 1], or (N,) indices; obs and final_obs (N, S), reward (N, H), two bools (N,)."""
        action = action.to(self.home)
        action = action + self.offset if self.discrete else self.center + self.scale * action.clamp(-1, 1)
        with told(f"{self.env_id} raised an error in step: {{}}"):
            return [x.to(self.device) for x in self.envs.step(action)]


def make_vec(env_id: str, num_envs: int, device: torch.device):
    """What make_vec(name, num_envs, device) of the module returns for `module:name`; None if it has no such function.

    It has the methods and attributes of GymnasiumEnvs below; the spaces of a row and the number of rows, `num_envs`;
    `policy_dim`, how many of the first numbers of an observation the policy sees (the critic sees all); `success`, None
    or (N,), 1 where the last step ended an episode well.
    """
    module, _, name = re.sub("^vmas:", "notebooks.games:", env_id).partition(":")
    with told(f"cannot make {env_id}: {{}}"):
        make = getattr(importlib.import_module(module), "make_vec", None) if name else None
        return make and make(name, num_envs, device)


def make_env(env_id: str, **more) -> gym.Env:
    """gym.make without warnings of age; raises UserError for an unknown name or a task that cannot be made."""
    opengl = " (if that is of OpenGL: unset MUJOCO_GL, or give egl or osmesa)" if "MUJOCO_GL" in os.environ else ""
    with told(f"cannot make {env_id}: {{}}{opengl}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium on the age of -v4
        if "mujoco" in str(gym.registry.get(env_id.split(":")[-1])):
            import mujoco
            mujoco.set_mju_user_warning(lambda message: None)  # MuJoCo 4 on the age of Gymnasium's models, N times
        try:
            return gym.make(env_id, disable_env_checker=True, **more)
        except gym.error.VersionNotFound as error:  # its list has MuJoCo's v2 and v3, which are gone
            raise ValueError(re.sub("`v[23]`, (?=.*`v[45]`)", "", str(error))) from None


class ActionChunk(gym.Wrapper):
    """One decision is H actions played in a row: a Box of A becomes a Box of H * A, and a reward an array (H,).

    An episode may end inside a chunk; the rewards of the steps that were not played are NaN.
    """

    def __init__(self, env: gym.Env, length: int):
        super().__init__(env)
        self.length, box = length, env.action_space
        self.action_space = gym.spaces.Box(np.tile(box.low, length), np.tile(box.high, length), dtype=box.dtype)

    def step(self, action):
        rewards, ended = np.full(self.length, np.nan), False
        for i, one in enumerate(np.split(action, self.length)):
            if not ended:
                obs, rewards[i], terminated, truncated, info = self.env.step(one)
                ended = terminated or truncated
        return obs, rewards, terminated, truncated, info


class GymnasiumEnvs:
    """Gymnasium's vector environments, a Python object for each copy, as VectorEnv wants them."""

    kind, device, success = "sync", torch.device("cpu"), None

    def __init__(self, env_id: str, num_envs: int, chunk: int):
        make = lambda: ActionChunk(make_env(env_id), chunk) if chunk > 1 else make_env(env_id)
        self.envs = gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        self.envs._rewards = np.zeros((num_envs, chunk))  # sync's buffer, with room for every step of a chunk
        self.dtype, self.close = self.envs.single_action_space.dtype, self.envs.close
        self.tensor = lambda array: torch.as_tensor(array.reshape(num_envs, -1), dtype=torch.float32)

    def reset(self, seeds: list[int]):
        return self.tensor(self.envs.reset(seed=seeds)[0])

    def step(self, action):
        obs, reward, terminated, truncated, info = self.envs.step(action.numpy().astype(self.dtype, copy=False))
        final_obs, ended = obs.copy(), terminated | truncated
        if ended.any():
            final_obs[ended] = np.stack(info["final_obs"][ended])
        obs, reward, final_obs = map(self.tensor, (obs, reward, final_obs))
        return obs, reward, torch.as_tensor(terminated), torch.as_tensor(truncated), final_obs


# ===== 7  Rollout =====================================================================================================

class Rollout:
    """Buffers of one rollout, allocated once on the device; every tensor is (T, N, ...), observations are raw."""

    def __init__(self, steps: int, env: VectorEnv):
        new = lambda *more: torch.zeros(steps, env.num_envs, *more, device=env.device)
        self.obs, self.final_obs, self.reward = new(env.obs_dim), new(env.obs_dim), new(env.chunk)
        self.terminated, self.ended = new(), new()  # ended = terminated or truncated
        self.success = None if env.envs.success is None else new()
        self.so_far = 0.0  # of the running episodes: return, length and success

    @torch.no_grad()
    def collect(self, env: VectorEnv, policy: NCDPO, act, obs):
        """Play from `obs` on by act(obs, omega, noise), the policy's on raw observations; returns the next `obs`."""
        omega, noise = policy.noise(*self.ended.shape, device=env.device)  # afresh for each step (E9)
        played = []  # actions, and what must be kept to score them again
        for t in range(len(self.obs)):
            self.obs[t] = obs
            played.append([x.clone() for x in act(obs, omega[t], noise[t])])  # a CUDA graph reuses its outputs' memory
            obs, self.reward[t], terminated, truncated, self.final_obs[t] = env.step(played[-1][0])
            self.terminated[t], self.ended[t] = terminated, terminated | truncated
            if self.success is not None:
                self.success[t] = env.envs.success
        self.action, self.latent = (torch.stack(column) for column in zip(*played))
        return obs

    def finished(self):
        """Return, length and perhaps success of the episodes that ended, (episodes, 2 or 3); call once a rollout."""
        ended, reward = self.ended.cpu(), self.reward.cpu().double()
        parts = [reward.nansum(-1), reward.isfinite().sum(-1)] + ([] if self.success is None else [self.success.cpu()])
        sums, self.so_far = discounted_sums(torch.stack(parts, -1), ended[..., None], self.so_far, gamma=1.0)
        return sums[ended == 1]


def discounted_sums(reward, ended, carry, gamma: float):
    """Running discounted sum within each episode of rewards (T, N), from `carry` (N,) on; and the carry after it."""
    sums = torch.empty_like(reward)
    for t in range(len(reward)):
        sums[t] = carry = carry * gamma + reward[t]
        carry = carry * (1 - ended[t])
    return sums, carry


# ===== 8  Run folder ==================================================================================================

COLUMNS = ("update step seconds episodes return length success approx_kl last_kl clip_fraction explained_variance "
           "policy_loss value_loss entropy grad_norm sigma chain_std chain_gradient_ratio chain_clipped learning_rate "
           "seconds_rollout seconds_update").split()


def new_run_folder(config: Config) -> Path:
    """runs/<env up to ?>__<algo>__<seed>, with -2, -3, ... behind it where that exists: no run is ever overwritten."""
    name = "__".join([re.sub("[/:]", "_", config.env.split("?")[0]), config.algo, str(config.seed)])
    paths = (Path(config.runs, f"{name}-{n}" if n > 1 else name) for n in range(1, 10**6))
    run = next(path for path in paths if not path.exists())
    with told(f"cannot make {run} ({{}}); choose another folder with --runs."):
        run.mkdir(parents=True)
    return run


def write(path: Path, to) -> None:
    """Let to(file) write `path` atomically: a full disk or a kill in the middle leaves the old file as it was."""
    temporary = path.with_suffix(".tmp")
    with told(f"cannot write {path} ({{}}); check its folder and the free space"):
        try:
            with open(temporary, "wb") as file:
                to(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_config(run: Path) -> Config:
    """Configuration of a run folder; raises UserError where there is none."""
    with told(f"{run} is no run folder of this version of the program, by its config.json: {{}}."):
        return Config(**json.loads((run / "config.json").read_text()))


def load_agent(run: Path, device: torch.device, **changed) -> tuple[Config, Agent, dict]:
    """Configuration (but for what is `changed`), agent and whole checkpoint of a run folder; raises UserError."""
    config, path = dataclasses.replace(before := load_config(run), **changed), run / "checkpoint.pt"
    config.check()
    if config.finetune_steps and config.sampling_steps != before.sampling_steps:
        raise UserError(f"{run} froze steps of a chain of its own: leave out --sampling-steps.")
    with told(f"{path} is missing (training did not come to its first checkpoint), damaged, or not of the config.json "
              "beside it ({})."):
        state = torch.load(path, map_location=device, weights_only=True)
        agent = Agent(config, *state["spaces"]).to(device)
        agent.load_state_dict(state["agent"])
    return config, agent, state


@torch.no_grad()
def evaluate(run: str | Path, episodes: int = 10, device: str = "auto", max_steps: int = 100_000, **changed) -> dict:
    """Play `episodes` episodes of a saved run, each to max_steps, in three ways: {way: {"return": array, ...}}.

    "exploring" is the policy as it was trained; "mean action", the one to report, leaves out the final Gaussian (or
    takes the likeliest choice; DPPO's other steps keep their floor); "eta 0" leaves out all noise of the chain but x_K
    as well (DDIM), as policies are often deployed. Each environment plays one episode, so that short ones are not
    over-represented; of a game, `episodes` worlds, each agent has an entry. Also "length", and of a game "success".
    `changed` are fields of Config.
    """
    device = pick_device(device)
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        config, agent, state = load_agent(Path(run), device, **changed)
        policy, result, act, seed = agent.policy, {}, agent.policy.act, 1_000_003 + config.seed  # apart from training's
        env = VectorEnv(config.env, episodes, device, "sync", config.action_chunk)
        env.check_spaces(state["spaces"], run)
        N, names = env.num_envs, ["return", "length"] + ["success"] * (env.envs.success is not None)
        for way in ["exploring", "mean action"] + ["eta 0"] * (config.algo != "ppo"):
            if way == "eta 0":  # NCDPO's chain for DPPO too, whose own steps are noisy whatever eta
                act = partial(NCDPO.act, load_agent(Path(run), device, **{**changed, "eta": 0.0})[1].policy)
            torch.manual_seed(seed)
            obs, alive, sums = env.reset(seed), np.ones(N, bool), np.zeros((len(names), N))
            while alive.any() and sums[1].max() < max_steps:  # a task without a time limit may never end
                omega, noise = policy.noise(N, device=device)
                noise = noise if way == "exploring" else torch.zeros_like(noise)
                obs, reward, terminated, truncated, _ = env.step(act(agent.obs_norm(obs), omega, noise)[0])
                for total, x in zip(sums, (reward.nansum(1), reward.isfinite().sum(1), env.envs.success)):
                    total += alive * x.cpu().numpy()
                alive &= ~(terminated | truncated).cpu().numpy()
            result[way] = dict(zip(names, sums))
        env.close()
    return result


def describe(result: dict) -> str:
    """An evaluation as text."""
    spread = lambda x: f"{x.mean():.1f} +- {x.std():.1f} (min {x.min():.1f}, max {x.max():.1f})"
    shown = lambda what, x: f"success {x.mean():.0%}" if what == "success" else f"{what} {spread(x)}"
    return "\n".join(f"{way:>13}: " + ", ".join(map(shown, values, values.values())) for way, values in result.items())


def read_metrics(run: str | Path) -> dict[str, np.ndarray]:
    """metrics.csv of a run folder, one float array per column; an empty cell (no episode ended, no chain) is NaN."""
    names, *rows = (line.split(",") for line in (Path(run) / "metrics.csv").read_text().splitlines())
    table = np.array([[float(cell or "nan") for cell in row] for row in rows]).reshape(len(rows), len(names))
    return dict(zip(names, table.T))


# ===== 9  Configuration and training ==================================================================================

@dataclasses.dataclass
class Config:
    """Everything that decides a run; the lines below are also what --help prints. PRESETS has the tasks' own values."""

    # --- run
    env: str = "HalfCheetah-v4"  # Gymnasium id, module:name of a task of your own, or vmas:scenario of a game
    algo: Literal["ncdpo", "ppo", "dppo"] = "ncdpo"  # what the policy is; nothing else differs
    seed: int = 1  # seed of the weights, the noise and the environments
    total_timesteps: int = 1_000_000  # environment steps, summed over the environments (or a game's agents)
    stop_at_return: float | None = None  # stop training once about the last 20 episodes have this mean return
    episodes: int = 10  # episodes of an evaluation
    runs: str = "runs"  # folder of the run folders
    checkpoint_every: int = 10  # updates between two checkpoints
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps (with --no-compile)
    vector: Literal["auto", "warp", "sync"] = "auto"  # auto: notebooks/physics.py (on a GPU Warp) where it can
    compile: bool = True  # torch.compile of the loss (not of chains of more than ten steps), and on a GPU of acting

    # --- PPO
    num_envs: int = 32  # parallel environments (of a game: worlds)
    num_steps: int = 64  # decisions T of each environment in a rollout; N * T decisions make an update
    learning_rate: float = 5e-4  # of Adam, falling linearly to zero
    adaptive_lr: bool = False  # move the rate so that the last epoch's KL stays between half of --target-kl and that
    gamma: float = 0.98  # discount of rewards, per environment step
    gae_lambda: float = 0.92  # lambda of generalised advantage estimation, per decision
    minibatch_size: int = 512  # decisions in a minibatch, at most a rollout; an epoch leaves out the remainder
    update_epochs: int = 5  # passes over each rollout
    clip_coef: float = 0.2  # clip of the likelihood ratio (E12)
    ent_coef: float = 0.0  # weight of the entropy bonus (no effect on DPPO's Box actions, whose sigma is fixed)
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # the gradient is scaled down to this norm
    target_kl: float | None = None  # stop an update's epochs above this KL (with --mean-log-prob: of the means)
    hidden: int = 128  # width of the two hidden layers of actor and critic
    activation: Literal["silu", "tanh", "relu"] = "silu"  # nonlinearity of actor and critic
    init_std: float = 0.22  # initial sigma (E7), Box actions of ncdpo and ppo; --init-from's stays unless this differs

    # --- denoising chain of ncdpo and dppo
    denoising_steps: int = 5  # K, from 1 to 100
    sampling_steps: int | None = None  # run the chain on so many of its K steps (E18); cloning learns all
    predict: Literal["sample", "epsilon", "v"] = "sample"  # what the network predicts (E2, E3)
    eta: float = 1.0  # noise of the reverse chain (E4): 1 is DDPM, 0 is DDIM
    noise_scale: float = 1.0  # factor of all the chain's noise, x_K and sigma_k: below 1 actions are less diverse
    clip_denoised: float = 1.0  # x_max: the clean estimate is clipped to [-x_max, x_max] at each step (E3)
    temperature: float = 0.1  # of the softmax over denoised logits (E8), for Discrete actions
    finetune_steps: int | None = None  # only the last so many denoising steps learn; a frozen copy does the others

    # --- dppo alone
    min_std: float = 0.1  # floor of each scored step's standard deviation (E15)
    gamma_denoising: float = 0.99  # discount of the advantage per denoising step still to go (E15)
    scored_steps: int | None = None  # score the last m steps (E16), condition on the noise of the others
    chain_gradient: bool = True  # gradient through the steps not scored (E16)

    # --- demonstrations and fine-tuning
    demos: str | None = None  # clone these first: an .npz file as notebooks/demos.py writes it
    init_from: str | None = None  # start from this run, with its flags but --total-timesteps, --stop-at-return, --runs
    action_chunk: int = 1  # actions H that are denoised together and played in a row: one decision of PPO
    bc_steps: int = 20_000  # gradient steps of behaviour cloning (E2), on minibatches of 256
    bc_learning_rate: float = 1e-3  # of behaviour cloning, falling to zero along a cosine
    critic_warmup: int = 0  # first updates in which only the critic learns (it needs --critic-learning-rate)
    critic_learning_rate: float | None = None  # if given, the critic's own, and its gradient is clipped by itself
    mean_log_prob: bool = False  # average log-likelihoods over a Box action's coordinates instead of summing them

    @classmethod
    def for_task(cls, env: str = "HalfCheetah-v4", **given) -> "Config":
        """The defaults of a task: those above, then PRESETS of its family, a GPU or cloning, then what is given."""
        family = "demonstrations" if given.get("demos") else env.split("/")[-1].rsplit("-v", 1)[0]
        gpu = f"{env.rsplit('-v', 1)[0]} on a GPU"  # for --device cuda: what a command does depends on itself alone
        if given.get("device", "").startswith("cuda") and not given.get("demos") and given.get("vector") != "sync":
            family = gpu if gpu in PRESETS and physics and importlib.util.find_spec("mujoco_warp") else family
        return cls(**{"env": env, **PRESETS.get(family, {}), **given})

    def check(self) -> None:
        """Raises UserError for the first field out of its range."""
        for name, kind in get_type_hints(Config).items():
            value, flag = getattr(self, name), "--" + name.replace("_", "-")
            low, high = LIMITS.get(name, (1e-12, math.inf))  # a number without LIMITS must be above 0
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise UserError(f"{flag} must be one of {', '.join(get_args(kind))}, not {value!r}.")
            if kind is not bool and isinstance(value, (int, float)) and not (low <= value <= high and value < math.inf):
                limits = "above 0" if low == 1e-12 else f"from {low} to {high}".replace("to inf", "on")
                raise UserError(f"{flag} must be a finite number {limits}, not {value}.")
        steps = {name: getattr(self, name) for name in ("scored_steps", "finetune_steps", "sampling_steps",
                                                        "denoising_steps") if getattr(self, name)}
        if list(steps.values()) != sorted(steps.values()):
            order = " <= ".join(f"--{name.replace('_', '-')} ({value})" for name, value in steps.items())
            raise UserError(f"this must hold, and does not: {order}.")
        if self.adaptive_lr and not self.target_kl or self.critic_warmup and not self.critic_learning_rate:
            raise UserError("--adaptive-lr needs --target-kl, and --critic-warmup needs --critic-learning-rate.")
        if self.demos and self.init_from:
            raise UserError("--demos clones a new policy, --init-from starts from an old one: leave out one of them.")
        if self.finetune_steps and not (self.demos or self.init_from):
            raise UserError("--finetune-steps would freeze a random network: give --demos or --init-from.")


LIMITS = {"denoising_steps": (1, 100), "seed": (0, 2**31 - 1), "stop_at_return": (-math.inf, math.inf),
          **dict.fromkeys(("minibatch_size", "num_steps"), (2, math.inf)),
          **dict.fromkeys("total_timesteps critic_warmup ent_coef vf_coef".split(), (0, math.inf)),
          **dict.fromkeys("eta gamma gae_lambda gamma_denoising".split(), (0, 1))}
# What --init-from shares with the run that it names, whose weights would mean something else; what the verbs may change
SAME_POLICY = "denoising_steps predict hidden activation action_chunk".split()
MAY_CHANGE = {"resume": "total_timesteps stop_at_return episodes checkpoint_every device vector compile".split(),
              "evaluate": "env episodes device sampling_steps".split()}
PRESETS: dict[str, dict] = {  # by the name of the task without its version; the same for all algorithms
    "HalfCheetah on a GPU": dict(num_envs=4096, num_steps=32, minibatch_size=16384, learning_rate=1e-3,
                                 total_timesteps=30_000_000),  # worlds step together: many of them, for a short while
    "demonstrations": dict(  # whatever the task; the last line is ours, as the target "sample" is: less chain noise
        denoising_steps=20, action_chunk=4, gamma=0.99, gae_lambda=0.95, num_envs=16, num_steps=64, minibatch_size=256,
        learning_rate=3e-4, critic_warmup=4, critic_learning_rate=1e-3,
        sampling_steps=5, noise_scale=0.3, init_std=0.1, min_std=0.05, mean_log_prob=True, clip_coef=0.05),
    "Hopper": dict(num_envs=16, num_steps=128, init_std=1.0, min_std=0.2, gamma=0.99, gae_lambda=0.95,
                   minibatch_size=256, update_epochs=10),
    "Walker2d": dict(num_envs=16, num_steps=128, init_std=0.5, min_std=0.2, gamma=0.99, gae_lambda=0.95,
                     minibatch_size=128, update_epochs=10, learning_rate=3e-4, hidden=64, activation="tanh")}


class Agent(nn.Module):
    """Policy, critic and the normalisers of observations and rewards: all that a checkpoint must hold."""

    def __init__(self, config: Config, obs_dim: int, act_dim: int, discrete: bool, policy_dim: int | None = None):
        super().__init__()
        self.policy = make_policy(config, policy_dim or obs_dim, act_dim, discrete)
        self.critic = mlp(obs_dim, config.hidden, 1, config.activation, gain=1.0)
        self.obs_norm, self.reward_norm = Normalizer(obs_dim), Normalizer(1)


def make_policy(c: Config, obs_dim: int, act_dim: int, discrete: bool) -> NCDPO:
    """The policy that a configuration asks for."""
    head = Categorical(1.0 if c.algo == "ppo" else c.temperature) if discrete else Gaussian(
        act_dim, c.min_std if c.algo == "dppo" else c.init_std, fixed=c.algo == "dppo")
    given = dict(hidden=c.hidden, activation=c.activation, head=head)
    if c.algo == "ppo":
        return MLPPolicy(obs_dim, act_dim, **given)
    given |= dict(steps=c.denoising_steps, predict=c.predict, eta=c.eta, clip=c.clip_denoised,
                  noise_scale=c.noise_scale, sampling_steps=c.sampling_steps)
    policy = NCDPO(obs_dim, act_dim, **given) if c.algo == "ncdpo" else DPPO(
        obs_dim, act_dim, scored_steps=c.scored_steps or c.finetune_steps, chain_gradient=c.chain_gradient,
        min_std=c.min_std, gamma_denoising=c.gamma_denoising, **given)
    if c.finetune_steps:
        policy.denoiser = PartlyFrozen(policy.denoiser, policy.schedule.tau(c.finetune_steps))
    return policy


def pick_device(name: str) -> torch.device:
    """torch.device of auto, cpu, cuda, cuda:N or mps; raises UserError where it is not there."""
    if name == "auto":  # not mps: slower than the CPU for networks this small
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with told(f"--device {name} cannot be used here ({{}}); try --device auto."):
        return torch.zeros(1, device=name).device


def compiled(function, device: torch.device):
    """torch.compile's function; where compiling fails (no C++ compiler, say), the plain one after one warning."""
    fast = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")

    def call(*given, **more):
        nonlocal fast
        try:
            return fast(*given, **more)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"going on more slowly, without torch.compile, which failed: {gist(error)}")
            fast = function
            return fast(*given, **more)
    return call


class Trainer:
    """The state of a training run and its verb: `iterate` plays a rollout, judges it, learns from it and reports."""

    processes = 1  # that share the run (notebooks/parallel.py)

    def __init__(self, config: Config):
        config.check()
        self.config, self.device = config, pick_device(config.device)
        torch.manual_seed(config.seed)
        self.env = VectorEnv(config.env, config.num_envs, self.device, config.vector, config.action_chunk)
        self.agent = Agent(config, *self.env.spaces).to(self.device)
        self.policy, self.critic = self.agent.policy, self.agent.critic
        parts = [self.policy, self.critic] if config.critic_learning_rate else [self.agent]  # each clipped by itself
        self.optimizer = torch.optim.Adam([{"params": part.parameters()} for part in parts], eps=1e-5, fused=True)
        self.carry = torch.zeros(self.env.num_envs, device=self.device)  # discounted return so far, to scale rewards
        self.batch_size = self.processes * self.env.num_envs * config.num_steps * config.action_chunk  # in env. steps
        self.updates, self.done, self.seconds = config.total_timesteps // self.batch_size, 0, 0.0
        if not self.updates and (config.total_timesteps or not config.demos):  # 0: cloning alone
            raise UserError(f"make --total-timesteps at least {self.batch_size}, the environment steps of a rollout.")
        if 0 < self.updates <= config.critic_warmup:
            raise UserError(f"--critic-warmup {config.critic_warmup} leaves the policy none of {self.updates} updates; "
                            "raise --total-timesteps.")
        self.rollout = Rollout(config.num_steps, self.env)
        self.rate, self.obs = config.learning_rate, self.env.reset(config.seed)  # the rate of --adaptive-lr

        coordinates = self.env.act_dim if config.mean_log_prob and not self.env.discrete else 1
        self.loss = partial(ppo_loss, self.policy, self.critic, clip_coef=config.clip_coef, vf_coef=config.vf_coef,
                            ent_coef=config.ent_coef, coordinates=coordinates)
        self.act = lambda obs, omega, noise: self.policy.act(self.agent.obs_norm(obs), omega, noise)
        # a loop over more than ten steps takes minutes to compile; DPPO's loss takes its M scored steps at once
        self.compiles = config.compile and self.policy.K - getattr(self.policy, "M", 0) <= 10
        if self.compiles:
            torch.compiler.reset()  # or the runs of one process, say a notebook's, share one small cache
            self.loss = compiled(self.loss, self.device)
            if self.device.type == "cuda" and self.policy.K <= 10:  # on a CPU that gains less than it costs
                self.act = compiled(self.act, self.device)

    def iterate(self) -> dict:
        """One rollout and one update; returns the row of metrics.csv."""
        start, config, left = time.perf_counter(), self.config, 1 - self.done / self.updates
        actor, *critic = self.optimizer.param_groups
        warm_up = self.done < config.critic_warmup  # the policy's Adam only collects its moments
        actor["lr"] = 0.0 if warm_up else self.rate if config.adaptive_lr else config.learning_rate * left
        for group in critic:
            group["lr"] = config.critic_learning_rate * left
        self.obs = self.rollout.collect(self.env, self.policy, self.act, self.obs)
        batch, explained = self.judge()
        judged = time.perf_counter()
        row = ppo_update(self.loss, batch, self.optimizer, config.update_epochs, config.minibatch_size,
                         config.max_grad_norm, config.target_kl)
        row |= health.measure(self.policy, batch) if health else {}
        reward = self.rollout.reward  # NaN has a place there only in chunks that were cut short
        rewards = reward[..., 0].sum() + reward.sum(-1)[self.rollout.ended == 0].sum()
        if not all(map(math.isfinite, [rewards, self.rollout.obs.sum(), *row.values()])):  # the loss sees it clipped
            raise UserError(f"a reward, an observation or the loss is not finite in update {self.done + 1} (if it is "
                            "the loss: lower --learning-rate)")
        if config.adaptive_lr and not warm_up:  # factor and bounds as usual for legged robots
            kl = row["last_kl"] / config.target_kl
            self.rate = min(max(self.rate * (1 / 1.5 if kl > 1 else 1.5 if kl < 0.5 else 1), 1e-5), 1e-2)
        if len(finished := self.rollout.finished()):
            row |= zip(("return", "length", "success"), finished.mean(0).tolist())  # success where the task has it
        self.done += 1
        end = time.perf_counter()
        self.seconds += end - start
        return row | {"update": self.done, "step": self.done * self.batch_size, "seconds": self.seconds,
                      "episodes": len(finished), "learning_rate": actor["lr"], "explained_variance": explained,
                      "seconds_rollout": judged - start, "seconds_update": end - judged}

    @torch.no_grad()
    def judge(self) -> tuple[dict, float]:
        """The rollout as a batch of decisions for ppo_loss, (T * N, ...), and the critic's explained variance."""
        config, agent, rollout = self.config, self.agent, self.rollout
        H, lengths = config.action_chunk, rollout.reward.isfinite().sum(-1)  # steps played of each chunk
        gamma = config.gamma ** H  # of a decision
        reward = rollout.reward.nan_to_num() @ (config.gamma ** torch.arange(H, device=self.device))
        sums, self.carry = discounted_sums(reward, rollout.ended, self.carry, gamma)
        agent.reward_norm.update(sums.reshape(-1, 1))
        reward = (reward * torch.rsqrt(agent.reward_norm.var + 1e-8)).clamp(-10, 10)  # in deviations of the return
        obs = agent.obs_norm(rollout.obs)
        value, final_value = (self.critic(x).squeeze(-1) for x in (obs, agent.obs_norm(rollout.final_obs)))
        final_value = final_value * (config.gamma or 1.0) ** (lengths - H)  # a chunk cut short led there sooner
        advantage = advantages(reward, value, final_value, rollout.terminated, rollout.ended, gamma, config.gae_lambda)
        target = advantage + value
        batch = dict(obs=obs, action=rollout.action, latent=rollout.latent, advantage=advantage, target=target)
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        batch["log_prob"] = self.policy.log_prob(batch["obs"], batch["action"], batch["latent"])
        if not config.finetune_steps:  # what frozen steps see must not move
            agent.obs_norm.update(rollout.obs.flatten(0, 1))  # only now: the rollout was played with the old statistics
        return batch, (1 - (target - value).var() / target.var().clamp(min=1e-8)).item()

    def save(self, run: Path) -> None:
        """The checkpoint: tensors, numbers and strings only."""
        state = {"spaces": self.env.spaces, "update": self.done, "seconds": self.seconds, "rate": self.rate,
                 "agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "random": torch.get_rng_state()}
        write(run / "checkpoint.pt", partial(torch.save, state))

    def resume(self, run: Path) -> None:
        """Go on from a run's checkpoint, with new episodes (seeded by how far it had come)."""
        state = load_agent(run, self.device)[2]
        self.agent.load_state_dict(state["agent"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.seconds, self.rate = (state[name] for name in ("update", "seconds", "rate"))
        torch.manual_seed(1_000 * self.config.seed + self.done)  # an accelerator must not repeat its first noise
        torch.set_rng_state(state["random"].cpu())
        self.obs = self.env.reset(self.config.seed, self.done)
        if self.done >= self.updates:
            raise UserError(f"{run} is finished after {self.done * self.batch_size:,} steps; raise --total-timesteps "
                            "to go on.")

    def init_from(self, run: Path) -> None:
        """Start from another run's policy, critic and normalisers; NCDPO and DPPO can start from one another's."""
        config, before = self.config, load_config(run)
        require_same(before, config, SAME_POLICY + ["finetune_steps", "sampling_steps"] * bool(before.finetune_steps))
        if before.algo != config.algo and "ppo" in (before.algo, config.algo):
            raise UserError(f"{run} was trained by {before.algo}, whose network is not that of {config.algo}.")
        _, source, state = load_agent(run, self.device)
        self.env.check_spaces(state["spaces"], run)
        if config.finetune_steps and not before.finetune_steps:
            source.policy.denoiser = PartlyFrozen(source.policy.denoiser, self.policy.denoiser.tuned)
        if config.algo == "dppo" or (before.algo, before.init_std) != (config.algo, config.init_std):
            source.policy.head = self.policy.head  # keep our sigma
        self.agent.load_state_dict(source.state_dict())


def require_same(before: Config, config: Config, names: list[str]) -> None:
    """Raises UserError for the first of the fields `names` in which a configuration differs from that of its run."""
    for name in names:
        if (was := getattr(before, name)) != getattr(config, name):
            raise UserError(f"the run was trained with {name} = {was}: leave out --{name.replace('_', '-')}.")


def train(config: Config, resume: str | Path | None = None) -> dict[str, np.ndarray]:
    """Train, and return the history: one array per column of metrics.csv, one entry per update.

    Writes a new run folder; or goes on in the folder `resume`, where only the episodes start anew and `config` is that
    folder's but for MAY_CHANGE. Raises UserError.
    """
    if resume:
        require_same(load_config(Path(resume)), config, [x for x in vars(config) if x not in MAY_CHANGE["resume"]])
    trainer, run = Trainer(config), Path(resume or "")
    with closing(trainer.env):
        demos = None
        if resume:
            trainer.resume(run)
        elif config.init_from:
            trainer.init_from(Path(config.init_from))
        elif config.demos:
            if not cloning:
                raise UserError("--demos needs this project's notebooks/cloning.py beside this file.")
            with told("{}"):  # what it says is the user's mistake
                demos = cloning.load(config.demos, trainer.env)
        run = run if resume else new_run_folder(config)
        write(run / "config.json", lambda file: file.write(json.dumps(dataclasses.asdict(config), indent=2).encode()))
        steps = f"{trainer.policy.K} of {config.denoising_steps}" if config.sampling_steps else config.denoising_steps
        chain = f" (K = {steps}, predict {config.predict})" if config.algo != "ppo" else ""
        print(f"{config.algo}{chain} on {config.env}, seed {config.seed}: {config.num_envs} environments "
              f"({trainer.env.vector}) on {trainer.device};",
              f"going on after update {trainer.done} in" if resume else "writing", run, flush=True)
        if demos:
            cloning.clone(trainer.agent, config, demos)
            trainer.save(run)
        run_updates(trainer, run)
    print(describe(evaluate(run, config.episodes, str(trainer.device))), flush=True)
    return read_metrics(run)


def run_updates(trainer: Trainer, run: Path) -> None:
    """Iterate to the end or to --stop-at-return; metrics.csv, checkpoints, progress."""
    config, size, first, recent, started = trainer.config, trainer.batch_size, trainer.done, [], time.perf_counter()
    saved, goal, path = first, config.stop_at_return, run / "metrics.csv"
    rows = path.read_text().splitlines()[1:first + 1] if path.is_file() else []  # those that the checkpoint has
    write(path, lambda file: file.write("\n".join([",".join(COLUMNS), *rows, ""]).encode()))
    if trainer.compiles and first < trainer.updates:
        print("compiling the loss, which takes some 15 s the first time (--no-compile skips it) ...", flush=True)
    try:
        while trainer.done < trainer.updates and (goal is None or len(recent) < 20 or np.mean(recent[-20:]) < goal):
            row = trainer.iterate()
            with open(path, "a") as file:
                cells = [row.get(name, "") for name in COLUMNS]
                file.write(",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in cells) + "\n")
            recent += [row.get("return")] * row["episodes"]
            if 20 * trainer.done // trainer.updates > 20 * (trainer.done - 1) // trainer.updates:  # each twentieth
                pace = (time.perf_counter() - started) / (trainer.done - first)  # seconds an update
                print(f"{row['step']:>13,} steps ({trainer.done / trainer.updates:.0%}),",
                      f"return {np.mean(recent[-20:]):.1f}, {len(recent)} episodes," if recent else "no episode yet,",
                      f"{size / pace:,.0f} steps/s, {pace * (trainer.updates - trainer.done):.0f} s left", flush=True)
            if trainer.done % config.checkpoint_every == 0:
                trainer.save(run)
                saved = trainer.done
        trainer.save(run)
    except (UserError, OSError, KeyboardInterrupt) as error:
        kept = f"update {saved} is saved: python ncdpo.py --resume {run}"
        kept = kept if (run / "checkpoint.pt").is_file() else "there is no checkpoint yet."
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
        raise kind(f"{str(error) or 'interrupted'}; {kept}") from error


# ===== 10  Command line ===============================================================================================

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags.")


def documented_fields() -> dict[str, dict[str, str]]:
    """The fields of Config and their comments, by the titles in its source."""
    _, *parts = re.split(r"    # --- (.+)\n", inspect.getsource(Config))  # title, lines, title, lines, ...
    fields = (dict(re.findall(r"^    (\w+): .+?  # (.+)$", lines, re.MULTILINE)) for lines in parts[1::2])
    return dict(zip(parts[::2], fields))


def parse(arguments: list[str]) -> tuple[Config, str | None, str | None]:
    """Configuration, --resume and --evaluate; the defaults are those of the task (PRESETS) or of the run folder named.

    Raises UserError for a flag that this --algo would ignore.
    """
    parser = Parser(usage="python ncdpo.py [--flag value ...]", allow_abbrev=False, description=__doc__.split("\n")[0]
                    + " Defaults in brackets; a task, --demos or --device cuda may have its own (PRESETS).")
    kinds = get_type_hints(Config)
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--resume", help="go on with this run folder; new may be " + ", ".join(MAY_CHANGE["resume"]))
    verbs.add_argument("--evaluate", help="play this run folder; new may be " + ", ".join(MAY_CHANGE["evaluate"]))
    for title, fields in (groups := documented_fields()).items():
        group = parser.add_argument_group(title)
        for name, text in fields.items():
            kind, shown = kinds[name], f"{text} [{getattr(Config, name)}]".replace("%", "%%")
            how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(
                choices=get_args(kind)) if get_origin(kind) is Literal else dict(
                type=(get_args(kind) or [kind])[0], metavar=name.split("_")[-1].upper())
            group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=shown, **how)
    given = vars(parser.parse_args([re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), a) for a in arguments]))
    resume, evaluate = given.pop("resume"), given.pop("evaluate")
    run = resume or evaluate or given.get("init_from")
    task = {name: given[name] for name in ("env", "demos", "device", "vector") if name in given}
    defaults = load_config(Path(run)) if run else Config.for_task(**task)
    if run and not (resume or evaluate):  # a new run, that starts where another one ended
        fresh = ("total_timesteps", "demos", "stop_at_return", "runs")
        defaults = dataclasses.replace(defaults, **{name: getattr(Config, name) for name in fresh})
    config = dataclasses.replace(defaults, **given)
    chain, dppo = groups["denoising chain of ncdpo and dppo"], groups["dppo alone"]
    ignored = {"ncdpo": {*dppo}, "ppo": {*chain, *dppo}, "dppo": {"init_std"}}[config.algo]
    ignored = ignored if config.demos else ignored | {"bc_steps", "bc_learning_rate"}
    learnt = config.finetune_steps or config.sampling_steps or config.denoising_steps
    scored = config.scored_steps or learnt
    ignored |= {"chain_gradient"} if scored == learnt else set()
    ignored |= {"gamma_denoising"} if scored == 1 else set()
    for name in [name for name in given if given[name] != getattr(defaults, name)]:
        flag = "--" + name.replace("_", "-")
        if evaluate and name not in MAY_CHANGE["evaluate"]:
            raise UserError(f"a saved run is played as it was trained: leave out {flag}.")
        if name in ignored:
            why = " without --demos" * name.startswith("bc_") + f" scoring {scored} of {learnt} steps" * (
                name in dppo and config.algo == "dppo")
            raise UserError(f"{flag} has no effect on --algo {config.algo}{why}: leave it out.")
    return config, resume, evaluate


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for a mistake told in one sentence, 130 for an interruption."""
    try:
        config, resume, played = parse(sys.argv[1:] if arguments is None else arguments)
        config.check()
        if played:
            changed = dict(env=config.env, sampling_steps=config.sampling_steps)
            print(describe(evaluate(played, config.episodes, config.device, **changed)))
        else:
            train(config, resume)
    except (UserError, KeyboardInterrupt) as error:
        print(f"ncdpo: {str(error) or 'interrupted.'}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
