# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<2.16", "gymnasium[mujoco]>=1.1,<2", "mujoco>=3.2,<5", "numpy>=1.26,<3"]
# ///
"""NCDPO, Noise-Conditioned Diffusion Policy Optimization: PPO for diffusion policies, in one file.

A diffusion policy turns Gaussian noise into an action in K denoising steps, so the likelihood of an action, which PPO
needs, is an intractable integral over that noise. NCDPO (arXiv 2505.10482) draws all the noise first and calls it part
of the state. Given the noise, the chain is a deterministic, differentiable function; a small Gaussian (or a softmax) on
its end makes the likelihood exact; and plain PPO sends its gradient back through all K steps:

    repeat
        for t = 1 ... T:                                             # play
            omega ~ N(0, I)                                          # all the noise of one chain (E9)
            action ~ N(f(s, omega), sigma^2)                         # the chain's end plus a small Gaussian (E6, E7)
        A = generalised advantages under the critic V(s)             # criticise
        for each minibatch of (s, omega, action, A), a few epochs:   # learn
            r = pi(action | s, omega) / pi_old(action | s, omega)    # one ratio a decision (E11)
            ascend min(r A, clip(r, 1 - e, 1 + e) A), and fit V      # the gradient passes all K steps (E12, E13)

    python ncdpo.py --env HalfCheetah-v4                  # train; the run is a folder, runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --env HalfCheetah-v4 --algo ppo       # the same lines with an MLP policy (or --algo dppo)
    python ncdpo.py --evaluate runs/HalfCheetah-v4__ncdpo__1
    python ncdpo.py --resume runs/HalfCheetah-v4__ncdpo__1 --total-timesteps 2000000
    python ncdpo.py --init-from CLONE                     # improve a cloned policy

Sections 1 to 4 (noise schedule, networks, policy, PPO) are NCDPO: they need torch and math only, and can be pasted
elsewhere. Labels such as E5 name the equations of README.md. Letters: B batch, S observation, A action (or logits; in
section 4 the advantage), K denoising steps, T decisions of a rollout, N environments, H actions of a chunk.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import math
import numbers
import os
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Literal, get_args

# Waiting threads of torch spin for so long that a busy machine crawls
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# ===== 1  Noise schedule ==============================================================================================

class Schedule(nn.Module):
    """The cosine schedule (Nichol and Dhariwal, 2021) and the steps that use it (E1, E3, E4, E18).

    A chain that was cloned on `steps` noise levels (E18's K) may run on fewer of them, `sampling_steps` (E18's S, here
    K): its k-th step is at level tau(k), about k steps / K. Of the tables `signal`, sqrt(abar), and `noise`, sqrt(1 -
    abar), are indexed by the level, the others by the chain's k; both are ints or LongTensors (...).
    x, eps and output are (..., A). Raises ValueError for steps, an eta or a `predict` that cannot be.
    """

    def __init__(self, steps, predict="sample", eta=1.0, clip=1.0, sampling_steps=None):
        super().__init__()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, and is {eta}")
        K = steps if sampling_steps is None else sampling_steps
        if not 1 <= K <= steps:
            raise ValueError(f"steps are at least 1, sampling_steps from 1 to steps, not {steps} and {sampling_steps}")
        if predict not in ("sample", "epsilon", "v"):
            raise ValueError(f"predict must be sample, epsilon or v, and is {predict}")
        self.steps, self.K, self.predict, self.clip = steps, K, predict, clip
        self.register_buffer("taus", torch.tensor([self.tau(k) for k in range(self.K + 1)]), persistent=False)
        f = torch.cos((torch.arange(steps + 1).double() / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        alpha = (f[1:] / f[:-1]).clamp(min=0.001)  # 1 - beta
        abar = F.pad(alpha.cumprod(0), (1, 0), value=1.0)

        before, now = abar[self.taus[:-1]], abar[self.taus[1:]]  # of the steps that are run
        sigma = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        # E4 with eps_tilde = (x_k - sqrt(abar_k) x0hat) / sqrt(1 - abar_k) written out: linear in (x0hat, x_k)
        to_noisy = ((1 - before - sigma**2) / (1 - now)).sqrt()
        to_clean = before.sqrt() - to_noisy * now.sqrt()
        of_run = F.pad(torch.stack([sigma, to_clean, to_noisy]), (1, 0))  # k = 0 is no step
        tables = [abar.sqrt(), (1 - abar).sqrt(), *of_run]
        for name, table in zip(("signal", "noise", "sigma", "to_clean", "to_noisy"), tables):
            self.register_buffer(name, table[:, None].to(torch.get_default_dtype()), persistent=False)

    def tau(self, k):
        """Noise level at which the k-th step of the chain is (E18)."""
        return round(k * self.steps / self.K) if isinstance(k, int) else self.taus[k]

    def diffuse(self, x0, k, eps):
        """Forward process (E1): x_k from clean x0 and standard normal eps, at noise level k."""
        return self.signal[k] * x0 + self.noise[k] * eps

    def clean(self, output, x, k):
        """Clean estimate x0hat (E3) from the network's output at x_k, clipped to [-clip, clip]."""
        if self.predict != "sample":
            signal, noise = self.signal[self.tau(k)], self.noise[self.tau(k)]
            output = (x - noise * output) / signal if self.predict == "epsilon" else signal * x - noise * output
        return output.clamp(-self.clip, self.clip)  # keeps "epsilon" / signal finite; at k = 1 it is the action's mean

    def mu(self, x0hat, x, k):
        """Mean of x_{k-1} given x_k (E4): DDPM's posterior mean at eta = 1, DDIM's step at eta = 0."""
        return self.to_clean[k] * x0hat + self.to_noisy[k] * x


# ===== 2  Networks ====================================================================================================

def layer(inputs, outputs, gain=math.sqrt(2)):
    """A linear layer with PPO's usual orthogonal weights."""
    linear = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


def mlp(inputs, hidden, outputs, activation, last_gain):
    """Two hidden layers."""
    act = {"silu": nn.SiLU, "tanh": nn.Tanh, "relu": nn.ReLU}[activation]
    return nn.Sequential(layer(inputs, hidden), act(), layer(hidden, hidden), act(), layer(hidden, outputs, last_gain))


class Denoiser(nn.Module):
    """net(x_k, k, s): an MLP of [x_k, s, embedding of k], whose output is nearly zero at first.

    An untrained "sample" chain then proposes nearly the zero action, like an untrained MLP.
    """

    def __init__(self, obs_dim, act_dim, steps, hidden, activation, embedding=16):
        super().__init__()
        self.obs_dim = obs_dim
        self.net = mlp(act_dim + obs_dim + embedding, hidden, act_dim, activation, last_gain=0.01)
        freq = torch.exp(-math.log(1000) * torch.arange(embedding // 2) / (embedding // 2))
        angle = torch.arange(steps + 1)[:, None] * freq
        self.register_buffer("embedding", torch.cat([angle.sin(), angle.cos()], -1), persistent=False)

    def forward(self, x, k, obs):
        """Network output (..., A) at x_k (..., A) and s (..., S); k an int, or a LongTensor like x's leading axes."""
        seen = obs[..., :self.obs_dim]  # the critic may see more (make_envs)
        return self.net(torch.cat([x, seen, self.embedding[k].expand(*x.shape[:-1], -1)], -1))


class Normalizer(nn.Module):
    """Running mean and variance over a batch axis (Chan et al., parallel form), saved with the weights."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim).double())  # in float32 a constant 12345.678 would not be 0
        self.register_buffer("var", torch.ones(dim).double())
        self.register_buffer("count", torch.zeros(()).double())

    def update(self, x):
        """Take in a batch x of shape (B, dim)."""
        x, n = x.double(), len(x)
        delta, share = x.mean(0) - self.mean, n / (self.count + n)
        self.var += share * (x.var(0, unbiased=False) - self.var + (1 - share) * delta**2)
        self.mean += share * delta
        self.count += n

    def forward(self, x):
        """x in standard deviations from the mean, clipped to [-10, 10], in torch's default dtype."""
        return ((x - self.mean) * torch.rsqrt(self.var + 1e-8)).clamp(-10, 10).to(torch.get_default_dtype())


# ===== 3  The noise-conditioned policy ================================================================================

def gaussian_log_prob(x, mean, log_std):
    """log N(x; mean, exp(log_std)^2), summed over the last axis."""
    z = (x - mean) * torch.exp(-log_std)
    return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Gaussian(nn.Module):
    """Final Gaussian N(action; mean, diag(sigma^2)) of Box actions (..., A) (E7); log sigma is learnt."""

    def __init__(self, dim, std):
        super().__init__()
        self.log_std = nn.Parameter(torch.full((dim,), math.log(std)))

    def draw_noise(self, *shape, device=None):
        return torch.randn(shape, device=device)

    def sample(self, mean, noise):
        return mean + self.log_std.exp() * noise

    def log_prob(self, mean, action):
        return gaussian_log_prob(action, mean, self.log_std)

    def entropy(self, mean):
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(mean.shape[:-1])


class Categorical(nn.Module):
    """Final softmax(logits / temperature), Discrete actions (E8); a chain's logits (..., A) end in [-clip, clip]."""

    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def draw_noise(self, *shape, device=None):
        # Gumbel's distribution: with this noise the argmax draws from the softmax
        return -torch.log(torch.empty(shape, device=device).exponential_())

    def sample(self, logits, noise):
        return (logits / self.temperature + noise).argmax(-1)

    def log_prob(self, logits, action):
        return F.log_softmax(logits / self.temperature, -1).gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, logits):
        log_p = F.log_softmax(logits / self.temperature, -1)
        return -(log_p.exp() * log_p).sum(-1)


class NCDPO(nn.Module):
    """Noise-conditioned diffusion policy: the denoising chain is the mean, its noise part of the state (E6-E9).

    Observations are normalised, (B, S); actions (B, A), cut to [-1, 1] by the task, or indices (B,) of a Categorical;
    omega is (B, K, A). `denoiser` is any module net(x_k, k, s) with the shapes of Denoiser.forward, and must give the
    same twice: call eval() where it has dropout. `schedule` are more arguments of Schedule. What must be kept with an
    action to score it again is its `latent`, which is omega here.
    """

    def __init__(self, obs_dim, act_dim, steps=5, hidden=128, activation="silu", noise_scale=1.0, head=None,
                 denoiser=None, **schedule):
        super().__init__()
        self.schedule = Schedule(steps, **schedule)
        self.act_dim, self.K, self.noise_scale = act_dim, self.schedule.K, noise_scale
        self.head = head or Gaussian(act_dim, std=0.22)
        self.denoiser = denoiser or Denoiser(obs_dim, act_dim, steps, hidden, activation)

    def draw_noise(self, *shape, device=None):
        """Noise of actions of a leading shape: omega (*shape, K, A) (E9), times noise_scale; the head's (*shape, A)."""
        omega = self.noise_scale * torch.randn(*shape, self.K, self.act_dim, device=device)
        return omega, self.head.draw_noise(*shape, self.act_dim, device=device)

    def mu(self, x, k, obs):
        """Mean of x_{k-1} given x_k and s (E3, E4); shapes as in Denoiser.forward."""
        x0hat = self.schedule.clean(self.denoiser(x, self.schedule.tau(k), obs), x, k)
        return self.schedule.mu(x0hat, x, k)

    def chain(self, obs, omega):
        """Reverse chain x_K, ..., x_0, each (B, A) (E5), on given noise omega = (x_K, z_K, ..., z_2).

        omega and the scored action are data, no x_k is detached: autograd gives d x_0 / d theta over all steps (E13).
        """
        xs = [omega[:, 0]]
        for k in range(self.K, 0, -1):
            x = self.mu(xs[-1], k, obs)
            if k > 1:  # sigma_1 = 0: the last step has no noise
                x = x + self.schedule.sigma[k] * omega[:, self.K + 1 - k]
            xs.append(x)
        return xs

    def mean(self, obs, omega):
        """f_theta(s, omega) (E6), the chain's end: the mean action (B, A), or logits."""
        return self.chain(obs, omega)[-1]

    def act(self, obs, omega, noise):
        """Action (B, A) or (B,) for given noise of chain and head; log pi(action | s, omega), (B,); and omega."""
        mean = self.mean(obs, omega)
        action = self.head.sample(mean, noise)
        return action, self.head.log_prob(mean, action), omega

    def evaluate_actions(self, obs, action, latent):
        """log pi(action | s, omega) (E7, E8) and the head's entropy, both (B,), with gradients."""
        mean = self.mean(obs, latent)
        return self.head.log_prob(mean, action), self.head.entropy(mean)

    def log_prob(self, obs, action, latent):
        """log pi(action | s, omega), (B,)."""
        return self.evaluate_actions(obs, action, latent)[0]

    @torch.no_grad()
    def sample(self, obs, deterministic=False):
        """Draw actions: action, log-likelihood, latent; `deterministic` leaves out the head's noise, not omega."""
        omega, noise = self.draw_noise(len(obs), device=obs.device)
        return self.act(obs, omega, torch.zeros_like(noise) if deterministic else noise)

    def bc_loss(self, obs, action):
        """Behaviour cloning (E2): mean squared error of the network's prediction, each at a random noise level."""
        k = torch.randint(1, self.schedule.steps + 1, (len(obs),), device=obs.device)
        eps = torch.randn_like(action)
        target = {"sample": action, "epsilon": eps,
                  "v": self.schedule.signal[k] * eps - self.schedule.noise[k] * action}[self.schedule.predict]
        return F.mse_loss(self.denoiser(self.schedule.diffuse(action, k, eps), k, obs), target)


# ===== 4  PPO =========================================================================================================

def advantages(reward, value, final_value, terminated, ended, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al., 2016), the A of E10 and E12; tensors are (T, N).

    final_value is the value of where a step led, before any reset: a termination has no future, a truncation has one,
    and the trace is cut at both (ended = terminated or truncated; both are bools). gamma and gae_lambda are factors per
    decision; gamma may be a tensor. V(s) will do without omega: given omega the score's mean is 0, and V cancels.
    """
    A = reward + gamma * final_value.masked_fill(terminated, 0) - value  # delta; the loop adds what follows
    keep = gamma * gae_lambda * ~ended
    for t in range(len(A) - 2, -1, -1):
        A[t] += keep[t] * A[t + 1]
    return A


def clipped_objective(log_ratio, A, clip):
    """PPO's clipped objective (E12) of log ratios and advantages of one shape; and the fraction of clipped ratios."""
    ratio = log_ratio.clamp(max=20).exp()  # exp(89) is infinite, and the gradient would not be a number
    objective = torch.min(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A).mean()
    return objective, ((ratio - 1).abs() > clip).float().mean()


def ppo_loss(policy, critic, obs, action, latent, log_prob, advantage, target, clip_coef=0.2, vf_coef=0.5,
             ent_coef=0.0, coordinates=1, norm_adv=True):
    """PPO's loss on a minibatch and a dictionary of diagnostics.

    obs (B, S) normalised; action, log_prob (B,) and latent (NCDPO's omega) as policy.act gave them; advantage, which is
    made standard within the minibatch (of two or more) if norm_adv, and target for the critic, (B,). With `coordinates`
    d the clip is of r^(1/d). A policy may bring an `objective` of its own for M ratios a decision, log_prob (B, M).
    """
    new_log_prob, entropy = policy.evaluate_actions(obs, action, latent)
    log_ratio = new_log_prob - log_prob  # one for each decision; omega's density has no theta and cancels (E11)
    A = (advantage - advantage.mean()) / (advantage.std() + 1e-8) if norm_adv else advantage

    objective, clipped = getattr(policy, "objective", clipped_objective)(log_ratio / coordinates, A, clip_coef)
    kl = (log_ratio.clamp(max=20).exp() - 1 - log_ratio).sum() / len(obs)  # Schulman's k3, over all of an action
    value_loss = 0.5 * F.mse_loss(critic(obs).squeeze(-1), target)
    entropy = entropy.mean()
    loss = -objective + vf_coef * value_loss - ent_coef * entropy
    diagnostics = {"policy_loss": -objective, "value_loss": value_loss, "entropy": entropy, "approx_kl": kl,
                   "clip_fraction": clipped}
    return loss, {name: value.detach() for name, value in diagnostics.items()}


def ppo_update(loss_function, batch, optimizer, epochs=5, minibatch_size=512, max_grad_norm=0.5):
    """Epochs of minibatches over `batch`, a dictionary of tensors; the diagnostics, averaged over the minibatches.

    loss_function(**minibatch) is ppo_loss with all but its tensors filled in. An epoch leaves out a remainder. The
    gradient of each of the optimizer's groups is scaled down to max_grad_norm.
    """
    size, taken = len(batch["obs"]), []
    minibatch_size = min(minibatch_size, size)
    for _ in range(epochs):
        order = torch.randperm(size, device=batch["obs"].device)
        for pick in order[:size - size % minibatch_size].split(minibatch_size):
            loss, diagnostics = loss_function(**{name: tensor[pick] for name, tensor in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            norms = [nn.utils.clip_grad_norm_(group["params"], max_grad_norm) for group in optimizer.param_groups]
            optimizer.step()
            taken.append(torch.stack([*diagnostics.values(), norms[0]]))
    means = torch.stack(taken).mean(0).tolist()  # the only wait for an accelerator
    return dict(zip([*diagnostics, "grad_norm"], means))


# ===== 5  Training loop ===============================================================================================

class UserError(Exception):
    """A mistake of the user's or of their machine, told in one sentence that names the remedy."""


@contextlib.contextmanager
def told(words, *kinds, most=None):
    """Errors of these kinds become a UserError: these words, and the first `most` characters of the error's own."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{words}: {str(error)[:most]}") from error


class Agent(nn.Module):
    """Policy, critic and the normalisers of observations and rewards: all that learns or counts."""

    def __init__(self, config, obs_dim, act_dim, discrete, policy_dim):
        super().__init__()
        self.policy = make_policy(config, policy_dim, act_dim, discrete)
        self.critic = mlp(obs_dim, config.hidden, 1, config.activation, last_gain=1.0)
        self.obs_norm, self.reward_norm = Normalizer(obs_dim), Normalizer(1)
        self.eval()  # of networks of your own: with dropout the ratio would not be one where nothing has changed

    def act(self, obs, omega, noise):
        """policy.act on raw observations (N, S)."""
        return self.policy.act(self.obs_norm(obs), omega, noise)


class Trainer:
    """The state of a training run; `iterate` plays a rollout, learns from it and reports."""

    def __init__(self, config):
        self.config, self.done, self.seconds = config, 0, 0.0
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        with told(f"--device {config.device} is not to be had", RuntimeError, AssertionError, TypeError):
            # MPS knows no float64
            self.device = torch.zeros(1, dtype=torch.double, device=config.device.replace("auto", auto)).device
        torch.manual_seed(config.seed)
        self.env = VectorEnv(config.env, config.num_envs, self.device, config.vector, config.action_chunk)
        self.agent = Agent(config, *self.env.spaces).to(self.device)
        parts = [self.agent.policy, self.agent.critic] if config.critic_learning_rate else [self.agent]
        self.optimizer = torch.optim.Adam([{"params": part.parameters()} for part in parts], eps=1e-5, fused=True)
        self.batch_size = self.env.num_envs * config.num_steps * config.action_chunk  # environment steps
        self.updates = config.total_timesteps // self.batch_size
        if self.updates <= config.critic_warmup:
            raise UserError(f"--total-timesteps {config.total_timesteps} has no room for a rollout of "
                            f"{self.batch_size} steps after the {config.critic_warmup} of --critic-warmup: give "
                            f"{self.batch_size * (config.critic_warmup + 1)} or more")
        self.obs = self.env.reset(config.seed)
        self.carry = self.so_far = 0.0  # of the episodes that go on: discounted return; return, length and success
        self.rows = []  # of metrics.csv, one for each update
        coordinates = self.env.act_dim if config.mean_log_prob and not self.env.discrete else 1
        self.loss = partial(ppo_loss, self.agent.policy, self.agent.critic, clip_coef=config.clip_coef,
                            ent_coef=config.ent_coef, coordinates=coordinates)

    def iterate(self):
        """One rollout and one update; returns the row of metrics.csv."""
        start, config, groups = time.perf_counter(), self.config, self.optimizer.param_groups
        for group, rate in zip(groups, (config.learning_rate, config.critic_learning_rate)):
            group["lr"] = rate * (1 - self.done / self.updates)
        if self.done < config.critic_warmup:
            groups[0]["lr"] = 0.0  # the policy's Adam collects its moments

        rollout = self.play()
        batch, explained_variance = self.make_batch(rollout)
        row = ppo_update(self.loss, batch, self.optimizer, config.update_epochs, config.minibatch_size)
        if isinstance(self.agent.policy.head, Gaussian):
            row["sigma"] = self.agent.policy.head.log_std.exp().mean().item()
            seen = batch["obs"]
            some = torch.linspace(0, len(seen) - 1, min(128, len(seen)), device=self.device).long()
            row["chain_std"] = chain_std(self.agent.policy, seen[some])
        if not all(map(math.isfinite, [*row.values(), rollout["obs"].sum(), rollout["reward"][..., 0].sum()])):
            raise UserError(f"an observation, a reward or the loss is not finite in update {self.done + 1}; if it is "
                            "the loss, start anew with a lower --learning-rate")
        episodes = self.finished(rollout)
        if len(episodes):
            row |= zip(("return", "length", "success"), episodes.mean(0).tolist())
        self.done += 1
        self.seconds += time.perf_counter() - start
        return row | {"update": self.done, "step": self.done * self.batch_size, "seconds": self.seconds,
                      "episodes": len(episodes), "explained_variance": explained_variance,
                      "learning_rate": groups[0]["lr"]}

    @torch.no_grad()
    def play(self):
        """A rollout of T decisions of N environments: a dictionary of tensors (T, N, ...), with raw observations."""
        T, N, rows = self.config.num_steps, self.env.num_envs, []
        omega, noise = self.agent.policy.draw_noise(T, N, device=self.device)  # afresh each step (E9)
        for t in range(T):
            decision = self.agent.act(self.obs, omega[t], noise[t])
            obs, reward, terminated, truncated, final_obs = self.env.step(decision[0])
            rows.append((self.obs, *decision, reward, terminated, terminated | truncated, final_obs,
                         self.env.envs.success.clone()))
            self.obs = obs
        names = "obs action log_prob latent reward terminated ended final_obs success".split()
        return dict(zip(names, map(torch.stack, zip(*rows))))

    def finished(self, rollout):
        """Return, length and success of the episodes that ended, (episodes, 3); call once a rollout."""
        # success is where the simulator is, which may be another device
        ended, reward, success = (rollout[name].cpu() for name in ("ended", "reward", "success"))
        parts = torch.stack([reward.double().nansum(-1), reward.isfinite().sum(-1), success], -1)
        sums, self.so_far = discounted_sums(parts, ended[..., None], self.so_far, gamma=1.0)
        return sums[ended]

    @torch.no_grad()
    def make_batch(self, rollout):
        """The rollout as a batch of decisions for ppo_loss, (T * N, ...), and the critic's explained variance."""
        config, agent, H = self.config, self.agent, self.config.action_chunk
        # rewards are (T, N, H), NaN behind an episode's end, which may cut a chunk short
        reward = (rollout["reward"] * config.gamma ** torch.arange(H, device=self.device)).nansum(-1)
        discount = config.gamma ** rollout["reward"].isfinite().sum(-1)
        sums, self.carry = discounted_sums(reward, rollout["ended"], self.carry, config.gamma ** H)
        agent.reward_norm.update(sums.reshape(-1, 1))
        # in standard deviations of that sum over the past
        reward = (reward * torch.rsqrt(agent.reward_norm.var + 1e-8)).clamp(-10, 10).to(reward)

        obs, final_obs = agent.obs_norm(rollout["obs"]), agent.obs_norm(rollout["final_obs"])
        if not config.init_from:  # a given policy keeps the inputs that it knows
            agent.obs_norm.update(rollout["obs"].flatten(0, 1))  # only now: the old statistics acted
        value, final_value = agent.critic(obs).squeeze(-1), agent.critic(final_obs).squeeze(-1)
        advantage = advantages(reward, value, final_value, rollout["terminated"], rollout["ended"],
                               discount, config.gae_lambda)
        rollout = rollout | {"obs": obs, "advantage": advantage, "target": advantage + value}
        names = "obs action latent log_prob advantage target".split()
        batch = {name: rollout[name].flatten(0, 1) for name in names}
        return batch, 1 - (advantage.var() / batch["target"].var().clamp(min=1e-8)).item()


def discounted_sums(reward, ended, carry, gamma):
    """Discounted sums of past rewards (T, N, ...) within each episode, from `carry` (N, ...) on; the carry after."""
    sums = torch.empty_like(reward)
    for t in range(len(reward)):
        sums[t] = carry * gamma + reward[t]
        carry = sums[t].masked_fill(ended[t], 0)  # also where it is NaN
    return sums, carry


@torch.no_grad()
def chain_std(policy, obs):
    """Standard deviation of the action over the chain's noise (std_chain of E17), from two draws at each obs (B, S)."""
    one, other = (policy.sample(obs, deterministic=True)[0] for _ in range(2))
    return ((one - other).square().mean() / 2).sqrt().item()


# ===== 6  Environments ================================================================================================

class VectorEnv:
    """N copies of a task (of a game the agents of all worlds) that take and give tensors on `device`.

    A decision is a chunk of H actions: an action is (N, H * A), a reward (N, H), NaN for steps after an episode's end.
    Box actions live in [-1, 1] here. final_obs (N, S) is where a step really led: it differs from obs, where the next
    step starts, in those environments that ended and were reset in the same step. `vector` is auto (MuJoCo in batches
    where section 7 has the task, else sync), warp or sync; `bounds` are those of to_task.
    """

    def __init__(self, env_id, num_envs, device, vector="auto", chunk=1):
        self.env_id, self.device, self.chunk = env_id, device, chunk
        self.envs = make_envs(env_id, num_envs, chunk, device, vector)
        self.num_envs = len(self.envs.success)  # rows, which may be several agents of a world
        self.close, space = self.envs.close, self.envs.action_space
        self.discrete = isinstance(space, gym.spaces.Discrete)
        if self.discrete:
            self.act_dim, self.bounds = int(space.n), {"low": int(space.start)}
        else:
            low, high = torch.as_tensor(np.tile([space.low, space.high], chunk).astype(float), device=self.envs.device)
            self.act_dim, self.bounds = len(low), {"low": low, "high": high, "whole": space.dtype.kind in "iu"}
        self.obs_dim = math.prod(self.envs.observation_space.shape)
        self.spaces = [self.obs_dim, self.act_dim, self.discrete, getattr(self.envs, "policy_dim", self.obs_dim)]

    def reset(self, *seed, repeat=1):
        """First observations (N, S), drawn by `seed`; `repeat` groups of Gymnasium's copies start alike."""
        seeds = np.random.SeedSequence(seed).generate_state(self.num_envs // repeat) // 2
        obs = self.envs.reset(seeds.tolist() * repeat).to(self.device, copy=True)
        if obs.shape[1:] != (self.obs_dim,):
            raise UserError(f"{self.env_id} gave observations of shape {tuple(obs.shape[1:])}, but its "
                            f"observation_space has {self.obs_dim} numbers: correct one (make_vec gives them flat)")
        return obs

    def step(self, action):
        """Action (N, H * A) in [-1, 1], or indices (N,); gives obs (N, S), reward (N, H), the bools terminated and
        truncated (N,), and final_obs (N, S).
        """
        action = to_task(action.to(self.envs.device), **self.bounds)
        # copies, as a simulator may write the next step into the same memory
        obs, reward, *rest = parts = [x.to(self.device, copy=True) for x in self.envs.step(action)]
        N, S, shapes = self.num_envs, self.obs_dim, [tuple(x.shape) for x in parts]
        if shapes != (wanted := [(N, S), (N, self.chunk), (N,), (N,), (N, S)]):
            raise UserError(f"{self.env_id} gave obs, reward, terminated, truncated and final_obs of shapes {shapes}, "
                            f"but they must be {wanted}")
        return obs, reward.to(torch.get_default_dtype()), *rest


def to_task(action, low, high=None, whole=False):
    """Actions (..., H * A) in [-1, 1] as a task with these bounds takes them, float64; or indices (...) from low on."""
    if high is None:
        return action + low
    action = (high + low) / 2 + (high - low) / 2 * action
    return (action.round() if whole else action).clamp(low, high)  # in the task: PPO scores the action before it


def make_envs(env_id, num_envs, chunk, device, vector):
    """The simulator behind a VectorEnv, with the methods and attributes of GymnasiumEnvs below. Raises UserError.

    The module of `module:name` may bring one of its own: make_vec(name, num_envs, device) makes it, or raises
    ValueError or ImportError. It may have more rows than num_envs (a game's agents), and `policy_dim`: how many of the
    first numbers of an observation the policy sees (the critic sees all).
    """
    module, _, name = env_id.partition(":")
    if name and not module:
        raise UserError(f"cannot make {env_id}: a task of your own is module:name")
    with told(f"cannot make {env_id} (a module stands beside ncdpo.py or on PYTHONPATH)", ImportError):
        make_vec = name and getattr(importlib.import_module(module), "make_vec", None)
    with told(f"cannot make {env_id}", ValueError, ImportError):
        own = make_vec(name, num_envs, device) if make_vec else None
    one = own or make_env(env_id)
    obs, act = one.observation_space, one.action_space
    discrete = isinstance(act, gym.spaces.Discrete)
    box = isinstance(act, gym.spaces.Box) and len(act.shape) == 1 and act.is_bounded()
    if not isinstance(obs, gym.spaces.Box) or not (box or discrete):
        raise UserError(f"{env_id} has observations {obs} and actions {act}, but only Box observations and "
                        "Discrete or bounded flat Box actions will do: wrap it (gymnasium.wrappers)")
    if chunk > 1 and (own or discrete):
        raise UserError(f"{env_id} takes one action at a time: give --action-chunk 1")
    batched = None if own or vector == "sync" else batched_envs(one, num_envs, chunk, device, vector)
    return own or batched or GymnasiumEnvs([one, *(make_env(env_id) for _ in range(num_envs - 1))], chunk)


def make_env(env_id, **more):
    """gym.make without warnings of age; raises UserError for an unknown name or a missing package."""
    entry = str(getattr(gym.registry.get(env_id.rpartition(":")[2]), "entry_point", ""))
    words, kinds = f"cannot make {env_id}", [gym.error.Error, ImportError]
    if re.match("gymnasium_robotics|metaworld", entry) and not version("mujoco").startswith("3."):
        words += (f" with MuJoCo {version('mujoco')}; its suite wants MuJoCo 3 (pip install 'mujoco<4', in an "
                  "environment of its own)")
        kinds += [AssertionError, ValueError]
    with told(words, *kinds), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gymnasium on the age of -v4
        if "mujoco" in entry:
            import mujoco
            mujoco.set_mju_user_warning(lambda message: None)  # most are on the age of Gymnasium's models
        return gym.make(env_id, disable_env_checker=True, **more)


def version(package):
    """Of the package that is installed."""
    return next((found.version for found in importlib.metadata.distributions(name=package)), "none")


class GymnasiumEnvs:
    """Gymnasium's tasks, a Python object for each copy, one after another; what it takes and gives is on a CPU.

    `success` (N,) is 1 where the last step ended an episode well, else 0. It is NaN of a task that does not tell: here,
    if the info of an episode's last step has neither "is_success" nor "success".
    """

    kind, device = "sync", torch.device("cpu")

    def __init__(self, tasks, chunk):
        self.tasks, self.chunk = tasks, chunk
        self.observation_space, self.action_space = tasks[0].observation_space, tasks[0].action_space
        self.success = torch.full((len(tasks),), torch.nan)

    def reset(self, seeds):
        first = [flat(task.reset(seed=seed)[0]) for task, seed in zip(self.tasks, seeds)]
        return torch.as_tensor(np.stack(first))

    def step(self, action):
        """Actions in the tasks' units, (N, H * A) or (N,); what VectorEnv.step returns."""
        action = action.numpy().astype(self.action_space.dtype)
        rows = [self.play(task, one) for task, one in zip(self.tasks, action)]
        *result, self.success = [torch.as_tensor(np.stack(column)) for column in zip(*rows)]
        return result

    def play(self, task, action):
        """Play a chunk in one copy, and begin a new episode if it ends the old one."""
        rewards = np.full(self.chunk, np.nan)
        for i, part in enumerate(action.reshape(self.chunk, *self.action_space.shape)):
            obs, reward, terminated, truncated, info = task.step(part)
            number = np.asarray(reward, float)  # a task may give an array of one number
            if number.size != 1 or not np.isfinite(number).all():
                raise UserError(f"{task.spec.id} gave the reward {reward}, which is not finite or not one number")
            rewards[i] = number.item()
            if terminated or truncated:
                break
        final_obs = flat(obs)
        if not (terminated or truncated):
            return final_obs, rewards, False, False, final_obs, np.float32(0)
        success = info.get("is_success", info.get("success", np.nan))
        with told(f"{task.spec.id} gave the success {success}, which is not one number", ValueError, TypeError):
            success = np.float32(np.asarray(success).item())
        return flat(task.reset()[0]), rewards, bool(terminated), bool(truncated), final_obs, success

    def close(self):
        for task in self.tasks:
            task.close()


def flat(obs):
    """A copy of a task's observation, (S,): some tasks write the next one into the same array."""
    return np.array(obs, float).ravel()


# ===== 7  MuJoCo in batches ===========================================================================================

def batched_envs(env, num_envs, chunk, device, vector):
    """N copies of HalfCheetah, Hopper or Walker2d, as gym.make makes them, that step in one call, or None.

    They step on a GPU by MuJoCo Warp if that is installed (or `vector` is "warp"), else on the CPU's threads.
    """
    limit = math.inf
    while type(env).__module__ == "gymnasium.wrappers.common":  # the wrappers of gym.make itself
        limit, env = min(limit, getattr(env, "_max_episode_steps", limit)), env.env
    known = re.fullmatch(r"gymnasium\.envs\.mujoco\.(half_cheetah|hopper|walker2d)_v[45]", type(env).__module__)
    warp = known and importlib.util.find_spec("mujoco_warp")
    if vector == "warp" and not warp:
        raise UserError("--vector warp " + ("needs MuJoCo Warp: pip install mujoco-warp (Python 3.11 or newer)" if known
                                            else "has HalfCheetah, Hopper and Walker2d alone: give --vector auto"))
    if vector == "warp" or device.type == "cuda" and warp:
        return WarpEnvs(env, limit, num_envs, chunk, device)
    if known and importlib.util.find_spec("mujoco.batch"):  # it came with MuJoCo 3.17
        return MujocoEnvs(env, limit, num_envs, chunk)


class MujocoEnvs:
    """N copies of a MuJoCo task: Gymnasium's formulas over tensors (N, ...), with the constants of its object `env`.

    C++ threads step them in one call: the same bits as N simulations one by one. qpos (N, nq), qvel (N, nv) and ctrl
    (N, nu) are float64 views of MuJoCo's memory. The reward is forward velocity plus health minus control cost; `limit`
    is the number of steps of an episode.
    """

    kind = "batched"

    def __init__(self, env, limit, num_envs, chunk, device=torch.device("cpu")):
        self.env, self.limit, self.chunk, self.device = env, limit, chunk, device
        self.observation_space, self.action_space, self.close = env.observation_space, env.action_space, env.close
        self.build(env.model, num_envs)
        self.random = torch.Generator(device)
        self.age = torch.zeros(num_envs, device=device)
        self.success = torch.full_like(self.age, torch.nan)
        self.first = [torch.from_numpy(x).to(self.qpos) for x in (env.init_qpos, env.init_qvel)]
        self.can_fall = hasattr(env, "_healthy_z_range")  # Hopper and Walker2d

    def build(self, model, num_envs):
        """Make the simulator, and bind qpos, qvel and ctrl to it."""
        from mujoco import batch
        self.batch = batch.Batch(model, num_envs, torch.get_num_threads())
        for name in ("qpos", "qvel", "ctrl"):
            memory = self.batch.bind(name)
            memory.flags.writeable = True  # nobody writes, but torch warns of memory that is not
            setattr(self, name, torch.from_numpy(memory))

    def advance(self):
        """Hold ctrl for frame_skip substeps."""
        self.batch.step(nstep=self.env.frame_skip)

    def restart(self, where):
        """Begin anew in the environments `where` (N,) is true."""
        rows = np.flatnonzero(where)
        if len(rows):
            self.batch.reset(rows, stage=0)
            for now, first in zip((self.qpos, self.qvel), self.draw_states()):
                now[rows] = first[rows]

    def reset(self, seeds):
        self.random.manual_seed(seeds[0])
        return self.start(torch.ones_like(self.age, dtype=torch.bool))

    def start(self, where):
        """Observations (N, S) after new episodes have begun where `where` (N,) is true."""
        self.restart(where)
        self.age.masked_fill_(where, 0)
        return self.observe()

    def draw_states(self):
        """Start states for all environments, qpos (N, nq) and qvel (N, nv)."""
        u, v = torch.empty_like(self.qpos), torch.empty_like(self.qvel)
        u.uniform_(-1, 1, generator=self.random)
        v.uniform_(-1, 1, generator=self.random) if self.can_fall else v.normal_(generator=self.random)
        return [x + self.env._reset_noise_scale * noise for x, noise in zip(self.first, (u, v))]

    def observe(self):
        """Observations (N, S): positions, perhaps without x, and velocities."""
        hidden = int(self.env._exclude_current_positions_from_observation)
        qvel = self.qvel.clamp(-10, 10) if self.can_fall else self.qvel
        return torch.cat([self.qpos[:, hidden:], qvel], 1)

    def healthy(self):
        """Whether each environment may go on (N,)."""
        env, qpos = self.env, self.qpos
        inside = lambda x, ends: (ends[0] < x) & (x < ends[1])
        healthy = inside(qpos[:, 1], env._healthy_z_range) & inside(qpos[:, 2], env._healthy_angle_range)
        if hasattr(env, "_healthy_state_range"):  # Hopper
            healthy &= inside(torch.cat([qpos[:, 2:], self.qvel], 1), env._healthy_state_range).all(1)
        return healthy

    def outcome(self, x_before, action):
        """Reward (N,) and termination (N,) of the step that led here from x_before (N,)."""
        env, speed = self.env, (self.qpos[:, 0] - x_before) / self.env.dt
        reward = env._forward_reward_weight * speed - env._ctrl_cost_weight * action.square().sum(1)
        if not self.can_fall:
            return reward, torch.zeros_like(reward, dtype=torch.bool)
        healthy, ends = self.healthy(), env._terminate_when_unhealthy
        paid = healthy | (ends and type(env).__module__.endswith("v4"))  # which pays the last step
        return reward + env._healthy_reward * paid.to(reward), ~healthy & ends

    def step(self, action):
        terminated, truncated = torch.zeros(2, len(action), dtype=torch.bool, device=self.device)
        alive, final_obs, rewards = ~terminated, 0, []
        for part in action.chunk(self.chunk, 1):
            x_before = self.qpos[:, 0].clone()
            self.ctrl.copy_(part)  # also where the episode has ended: what happens there is not looked at
            self.advance()
            reward, fell = self.outcome(x_before, part)
            # a state that diverged terminates, with zeros for what is not known; on a CPU MuJoCo has mostly put it to
            # rest before one sees it, as in Gymnasium
            diverged = ~(torch.cat([self.qpos, self.qvel], 1).abs() < 1e10).all(1)  # MuJoCo's own limit
            obs = self.observe().masked_fill(diverged[:, None], 0)
            final_obs = obs.where(alive[:, None], final_obs)
            rewards.append(reward.masked_fill(diverged, 0).masked_fill(~alive, torch.nan))
            self.age += 1
            terminated |= alive & (diverged | fell)
            truncated |= alive & (self.age >= self.limit)
            alive = ~(terminated | truncated)
        return self.start(~alive), torch.stack(rewards, 1), terminated, truncated, final_obs


class WarpEnvs(MujocoEnvs):
    """The same on `device` by MuJoCo Warp: float32 views of its arrays, and nothing ever waits for the device."""

    kind = "warp"

    def build(self, model, num_envs):
        import mujoco_warp
        import warp
        warp.config.log_level = warp.LOG_WARNING
        contacts = 3 * model.ngeom  # a capsule lies on the floor at two points
        with warp.ScopedDevice(str(self.device)):
            m = mujoco_warp.put_model(model)
            d = mujoco_warp.make_data(model, num_envs, nconmax=contacts, njmax=4 * contacts + model.njnt)
            mujoco_warp.step(m, d)  # compiles
            with warp.ScopedCapture() as capture:  # one launch a step: a CUDA graph, on a CPU one of Warp's own
                for _ in range(self.env.frame_skip):
                    mujoco_warp.step(m, d)
        stream = warp.stream_from_torch(self.device) if self.device.type == "cuda" else None
        self.advance = partial(warp.capture_launch, capture.graph, stream)
        self.arrays = m, d  # kept alive: these are views of their memory
        self.qpos, self.qvel = warp.to_torch(d.qpos), warp.to_torch(d.qvel)
        self.ctrl, self.warmstart = warp.to_torch(d.ctrl), warp.to_torch(d.qacc_warmstart)

    def restart(self, where):
        for now, first in zip((self.qpos, self.qvel), self.draw_states()):
            now.copy_(first.where(where[:, None], now))
        self.warmstart.masked_fill_(where[:, None], 0)


# ===== 8  The two baselines ===========================================================================================

class MLPPolicy(NCDPO):
    """PPO's usual policy: pi(a | s) = N(a; mlp(s), sigma^2), or a softmax. NCDPO without a chain and its noise."""

    def __init__(self, obs_dim, act_dim, hidden, activation, head):
        nn.Module.__init__(self)  # what NCDPO's methods read, with a chain of no steps
        self.obs_dim, self.act_dim, self.head = obs_dim, act_dim, head
        self.K, self.noise_scale = 0, 1.0
        self.net = mlp(obs_dim, hidden, act_dim, activation, last_gain=0.01)

    def mean(self, obs, omega):
        return self.net(obs[..., :self.obs_dim])


class DPPO(NCDPO):
    """Diffusion Policy Policy Optimization (arXiv 2409.00588): every denoising step is a decision (E15).

    Log-likelihoods are (B, K), the latent is (x_K, ..., x_1), (B, K, A). The last step (k = 1) is the head's: N(mu_1,
    min_std^2), or the softmax of E8.
    """

    def __init__(self, obs_dim, act_dim, min_std=0.1, gamma_denoising=0.99, head=None, **chain):
        super().__init__(obs_dim, act_dim, head=head or Gaussian(act_dim, min_std).requires_grad_(False), **chain)
        std = (self.noise_scale * self.schedule.sigma).clamp(min=min_std)
        self.register_buffer("log_std", torch.log(std), persistent=False)  # of step k, noise_scale in it, (K + 1, 1)
        self.register_buffer("ks", torch.arange(self.K, 0, -1), persistent=False)  # K, ..., 1
        self.gamma_denoising = gamma_denoising

    def act(self, obs, omega, noise):
        xs, log_probs = [omega[:, 0]], []
        for k in range(self.K, 1, -1):
            mu = self.mu(xs[-1], k, obs)
            xs.append(mu + torch.exp(self.log_std[k]) * omega[:, self.K + 1 - k] / self.noise_scale)
            log_probs.append(gaussian_log_prob(xs[-1], mu, self.log_std[k]))
        mu = self.mu(xs[-1], 1, obs)
        action = self.head.sample(mu, noise)
        return action, torch.stack([*log_probs, self.head.log_prob(mu, action)], 1), torch.stack(xs, 1)

    def evaluate_actions(self, obs, action, latent):
        # (B, K, A): all steps at once, as no gradient flows from one to the other
        mu = self.mu(latent, self.ks.expand(len(obs), -1), obs[:, None].expand(-1, self.K, -1))
        steps = gaussian_log_prob(latent[:, 1:], mu[:, :-1], self.log_std[self.ks[:-1]])
        last = self.head.log_prob(mu[:, -1], action)
        return torch.cat([steps, last[:, None]], 1), self.head.entropy(mu[:, -1])

    def objective(self, log_ratio, A, clip):
        """E12 for each step: log_ratio (B, K), A (B,) discounted, as reward comes k - 1 steps after step k (E15)."""
        return clipped_objective(log_ratio, A[:, None] * self.gamma_denoising ** (self.ks - 1), clip)


def make_policy(c, obs_dim, act_dim, discrete):
    """The policy that a Config asks for."""
    if discrete:
        head = Categorical(1.0 if c.algo == "ppo" else c.temperature)  # an MLP's logits have no bounds
    else:
        head = None if c.algo == "dppo" else Gaussian(act_dim, c.init_std)  # DPPO makes its own
    if c.algo == "ppo":
        return MLPPolicy(obs_dim, act_dim, c.hidden, c.activation, head)
    chain = dict(steps=c.denoising_steps, hidden=c.hidden, activation=c.activation, head=head,
                 noise_scale=c.noise_scale, predict=c.predict, eta=c.eta, clip=c.clip_denoised,
                 sampling_steps=c.sampling_steps)
    if c.algo == "dppo":
        return DPPO(obs_dim, act_dim, c.min_std, c.gamma_denoising, **chain)
    return NCDPO(obs_dim, act_dim, **chain)


# ===== 9  Run folder ==================================================================================================

COLUMNS = """update step seconds episodes return length success approx_kl clip_fraction explained_variance
    policy_loss value_loss entropy grad_norm sigma chain_std learning_rate""".split()
CHECKPOINT_SECONDS = 10  # between two checkpoints
MAY_CHANGE = {"total_timesteps", "episodes", "device", "vector"}  # by --resume
OF_NETWORK = {"denoising_steps", "predict", "hidden", "activation", "action_chunk"}  # weights fit these values alone


def train(config, resume=None):
    """Train by a Config into a new run folder, and return the history, as read_metrics does. Raises UserError.

    Or go on in the folder `resume`: only the episodes start anew, and `config` is that folder's but for MAY_CHANGE.
    """
    if resume:
        require_same(load_config(resume), config, vars(config).keys() - MAY_CHANGE)
    trainer = Trainer(config)
    with contextlib.closing(trainer.env):
        if config.init_from and not resume:
            start_from(trainer, config.init_from)
        run = Path(resume or new_run_folder(config))
        with locked(run):
            if resume:
                resume_from(trainer, run)
            save_config(config, run)
            kind = f"{config.num_envs} environments ({trainer.env.envs.kind}) on {trainer.device}"
            print(f"{config.algo} on {config.env}, seed {config.seed}: {kind}; writing {run}", flush=True)
            run_updates(trainer, run)
    print(describe(evaluate(run)), flush=True)
    return read_metrics(run)


def run_updates(trainer, run):
    """Iterate to the end: metrics.csv, checkpoints, progress. What stops it early leaves the last checkpoint."""
    first, saved, recent = trainer.done, trainer.done, []
    started = checkpoint_at = time.perf_counter()
    write(run / "metrics.csv", "\n".join([",".join(COLUMNS), *trainer.rows, ""]).encode())  # later ones come anew
    save_checkpoint(trainer, run)
    try:
        while trainer.done < trainer.updates:
            row = trainer.iterate()
            trainer.rows.append(",".join(f"{row[name]:.10g}" if name in row else "" for name in COLUMNS))
            with open(run / "metrics.csv", "a") as file:
                file.write(trainer.rows[-1] + "\n")
            recent = (recent + [row.get("return")] * row["episodes"])[-20:]
            now, done, total = time.perf_counter(), trainer.done, trainer.updates
            if 20 * done // total > 20 * (done - 1) // total:  # each twentieth
                pace = (now - started) / (done - first)  # seconds an update
                score = f"return {np.mean(recent):.1f}" if recent else "no episode yet"
                print(f"{row['step']:>13,} steps ({done / total:.0%}), {score}, "
                      f"{trainer.batch_size / pace:,.0f} steps/s, {pace * (total - done):.0f} s left", flush=True)
            if now - checkpoint_at > CHECKPOINT_SECONDS or done == total:
                save_checkpoint(trainer, run)
                saved, checkpoint_at = done, now
    except BaseException:
        print(f"ncdpo: stopped; go on after update {saved} by --resume {run}", file=sys.stderr)
        raise


def new_run_folder(config):
    """runs/<env up to ?>__<algo>__<seed>, with -2, -3, ... behind it where that exists: no run is ever overwritten."""
    name = re.sub("[/:]", "_", config.env.split("?")[0]) + f"__{config.algo}__{config.seed}"
    run = Path(config.runs, name)
    with told("cannot make a folder for the run (check --runs)", OSError):
        run.parent.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                run.mkdir()
                return run
            run = Path(config.runs, f"{name}-{n}")


@contextlib.contextmanager
def locked(run):
    """Only one process at a time may write into a run folder; the lock goes with the process."""
    with told(f"cannot write into {run} (check folder and rights)", OSError):
        lock = open(run / "lock", "w")
    with lock:
        words = f"another process writes {run}, wait for it or stop it"
        with contextlib.suppress(ImportError, OSError), told(words, BlockingIOError):
            import fcntl  # Windows has another way, some network disks have none
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def write(path, content):
    """Write bytes atomically: a full disk or a kill in the middle leaves the old file as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with told(f"cannot write {path} (check folder and free space)", OSError):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_config(config, run):
    """config.json: the fields of a Config, and the versions with which the run is made."""
    versions = {name: version(name) for name in ("torch", "gymnasium", "mujoco", "numpy")}
    versions["python"] = sys.version.split()[0]
    write(run / "config.json", json.dumps(vars(config) | {"versions": versions}, indent=2).encode())


def reading(run):
    """Whatever a damaged file raises becomes a UserError."""
    return told(f"'{run}' is damaged, or no run folder of this ncdpo.py and its network", Exception, most=300)


def load_config(run):
    """Config of a run folder; raises UserError where there is none."""
    with reading(run):
        fields = json.loads(Path(run, "config.json").read_text())
        del fields["versions"]
        if fields.keys() != vars(Config()).keys():
            raise ValueError(f"other fields, such as {min(fields.keys() ^ vars(Config()).keys())}")
        return Config(**fields)


def save_checkpoint(trainer, run):
    """checkpoint.pt: tensors, numbers and strings only, which torch loads with weights_only=True."""
    state = {"spaces": trainer.env.spaces, "bounds": trainer.env.bounds, "update": trainer.done,
             "seconds": trainer.seconds, "rows": trainer.rows, "agent": trainer.agent.state_dict(),
             "optimizer": trainer.optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(state, buffer := io.BytesIO())
    write(run / "checkpoint.pt", buffer.getvalue())


def load_agent(run, **changed):
    """Config (but for what is `changed`), Agent and whole checkpoint of a run folder, on the CPU.

    Raises UserError; warns if MuJoCo was another then.
    """
    config = dataclasses.replace(before := load_config(run), **changed)
    require_same(before, config, OF_NETWORK | {"algo", "min_std"})
    with reading(run):
        state = torch.load(Path(run, "checkpoint.pt"), map_location="cpu", weights_only=True)
        agent = Agent(config, *state["spaces"])
        agent.load_state_dict(state["agent"])
        then, now = json.loads(Path(run, "config.json").read_text())["versions"]["mujoco"], version("mujoco")
    if then != now:
        print(f"ncdpo: {run} is of MuJoCo {then}, this is {now}, whose physics differs", file=sys.stderr)
    return config, agent, state


def require_same(before, config, names):
    """Raises UserError for the first of the fields `names` in which a configuration differs from that of its run."""
    for name in sorted(names):
        if getattr(before, name) != getattr(config, name):
            raise UserError(f"the run has {name} = {getattr(before, name)}: leave out --{name.replace('_', '-')}")


def require_spaces(env, state):
    """Raises UserError if the agent whose checkpoint is `state` cannot play in `env`."""
    if state["spaces"] != env.spaces:
        raise UserError(f"{env.env_id} has other observations or actions than the run's task")


def resume_from(trainer, run):
    """Go on from a run's own checkpoint, with new episodes (seeded by how far it had come)."""
    state = start_from(trainer, run)
    if not (state["update"] or trainer.config.init_from or trainer.agent.obs_norm.count == 0):
        raise UserError(f"{run} is a clone: improve it by --init-from {run}")
    with reading(run):
        # an accelerator must not repeat its first noise
        torch.manual_seed(1_000 * trainer.config.seed + state["update"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        trainer.done, trainer.seconds, trainer.rows = state["update"], float(state["seconds"]), list(state["rows"])
    trainer.obs = trainer.env.reset(trainer.config.seed, trainer.done)
    if trainer.done >= trainer.updates:
        steps = trainer.done * trainer.batch_size
        raise UserError(f"{run} is finished after {steps:,} steps; raise --total-timesteps")


def start_from(trainer, run):
    """Start from a run's policy, critic and normalisers (NCDPO and DPPO from one another's); gives its checkpoint."""
    config, (before, agent, state) = trainer.config, load_agent(run)
    require_same(before, config, OF_NETWORK)
    require_spaces(trainer.env, state)
    if before.algo != config.algo and "ppo" in (before.algo, config.algo):
        raise UserError(f"{run} is of {before.algo}, whose network is not that of {config.algo}")
    if config.algo == "dppo" or (before.algo, before.init_std) != (config.algo, config.init_std):
        agent.policy.head = trainer.agent.policy.head  # keep our sigma
    trainer.agent.load_state_dict(agent.state_dict())
    return state


@torch.no_grad()
@torch.random.fork_rng([])
def evaluate(run, *, max_steps=100_000, **changed):
    """Play a saved run in three ways, `episodes` each, to max_steps at most: {way: {"return": array, ...}}.

    "exploring" is the policy as it was trained; "mean action" leaves out the final Gaussian (or takes the likeliest
    choice); "zero noise" sets all noise of the chain to 0 as well, as policies are often deployed. Each environment
    plays one episode, so that short ones are not over-represented; of a game, `episodes` worlds, each agent has an
    entry. Also "length" and "success". `changed` are fields of Config, as `episodes` is. It runs on the CPU, all ways
    at once.
    """
    config, agent, state = load_agent(run, **changed)
    env = VectorEnv(config.env, 3 * config.episodes, torch.device("cpu"), chunk=config.action_chunk)
    require_spaces(env, state)
    N, seed = env.num_envs, 1_000_003 + config.seed  # apart from training's
    alive, sums = torch.ones(N, 1, dtype=torch.bool), torch.zeros(N, 3)
    with contextlib.closing(env):
        torch.default_generator.manual_seed(seed)
        obs = env.reset(seed, repeat=3)
        while alive.any() and (steps := int(sums[:, 1].max())) < max_steps:
            if steps and steps % 10_000 < config.action_chunk:
                print(f"ncdpo: {steps:,} steps and no end, cut off after {max_steps:,}; give the task a limit "
                      "(max_episode_steps of gymnasium.register)", file=sys.stderr)
            omega, noise = agent.policy.draw_noise(N)
            noise[N // 3:] = 0
            omega[2 * N // 3:] = 0
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs, omega, noise)[0])
            parts = reward.nansum(1), reward.isfinite().sum(1), env.envs.success
            sums += torch.stack(parts, 1).where(alive, 0)
            alive[terminated | truncated] = False
    sums[alive[:, 0], 2] = torch.nan  # nobody knows how these would have ended
    columns = [dict(zip(("return", "length", "success"), part.T.numpy())) for part in sums.chunk(3)]
    return dict(zip(("exploring", "mean action", "zero noise"), columns))


def describe(result):
    """An evaluation as text."""
    lines = []
    number = lambda x: f"{x:.1f}" if abs(x) >= 99.95 else f"{x:#.3g}"  # returns may be small: three digits
    for way, values in result.items():
        cells = [f"{what} {number(x.mean())} +- {number(x.std())} (min {number(x.min())}, max {number(x.max())})"
                 for what, x in values.items() if what != "success"]
        if np.isfinite(values["success"]).all():  # NaN: the task tells none
            cells.append(f"success {values['success'].mean():.1%}")
        lines.append(f"{way:>13}: {', '.join(cells)}")
    return "\n".join(lines)


def read_metrics(run):
    """metrics.csv of a run folder, one float array per column; NaN where no episode ended or a task tells nothing."""
    path = Path(run, "metrics.csv")
    names = path.read_text().split("\n", 1)[0].split(",")
    return dict(zip(names, np.genfromtxt(path, delimiter=",", ndmin=2)[1:].T))


# ===== 10  Configuration and command line =============================================================================

@dataclasses.dataclass
class Config:
    """Everything that decides a run; --help prints these lines. PRESETS has the tasks' own values.

    Values are converted to the types of their fields; UserError for one that is of another kind, or out of range.
    """

    # the run
    env: str = "HalfCheetah-v4"  # Gymnasium id, or module:name of a task of your own
    algo: Literal["ncdpo", "ppo", "dppo"] = "ncdpo"  # the policy; dppo fixes sigma, ppo the temperature at 1
    seed: int = 1  # seed of the weights, the noise and the environments
    total_timesteps: int = 1_000_000  # environment steps of all environments (or agents of a game)
    episodes: int = 10  # episodes of an evaluation
    runs: str = "runs"  # folder of the run folders
    init_from: str | None = None  # start from this run, with its flags but for its end
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    vector: Literal["auto", "warp", "sync"] = "auto"  # auto: MuJoCo in batches where it can

    # PPO
    num_envs: int = 32  # parallel environments (of a game: worlds)
    num_steps: int = 64  # decisions T of each environment in a rollout
    learning_rate: float = 5e-4  # of Adam, falling linearly to zero
    gamma: float = 0.98  # discount of rewards, per environment step
    gae_lambda: float = 0.92  # lambda of generalised advantage estimation, per decision
    minibatch_size: int = 512  # decisions in a minibatch, at most a rollout
    update_epochs: int = 5  # passes over each rollout
    clip_coef: float = 0.2  # clip of the likelihood ratio (E12)
    ent_coef: float = 0.0  # weight of the entropy bonus (dppo's sigma is fixed)
    critic_learning_rate: float | None = None  # if given, the critic's own
    critic_warmup: int = 0  # first updates, in which only the critic learns
    hidden: int = 128  # width of the two hidden layers of actor and critic
    activation: Literal["silu", "tanh", "relu"] = "silu"  # nonlinearity of actor and critic
    init_std: float = 0.22  # initial sigma (E7) of ncdpo and ppo; --init-from keeps its learnt one if this is the same
    action_chunk: int = 1  # actions H that are played in a row: one decision of PPO
    mean_log_prob: bool = False  # clip r^(1/d), d coordinates of a Box action, instead of r

    # the denoising chain of ncdpo and dppo
    denoising_steps: int = 5  # K, from 1 to 100
    sampling_steps: int | None = None  # run the chain on so many of its K steps (E18)
    predict: Literal["sample", "epsilon", "v"] = "sample"  # what the network predicts (E2, E3)
    eta: float = 1.0  # noise of the reverse chain (E4): 1 is DDPM, 0 is DDIM
    noise_scale: float = 1.0  # factor of all the chain's noise, x_K and sigma_k
    clip_denoised: float = 1.0  # x_max: clip of the clean estimate at each step (E3), no gradient passes
    temperature: float = 0.1  # of the softmax over denoised logits (E8), for Discrete actions
    min_std: float = 0.1  # dppo: floor of each step's standard deviation (E15)
    gamma_denoising: float = 0.99  # dppo: discount per denoising step still to go (E15)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), get_args(field.type) or [field.type]
            if value is None and type(None) in kinds:
                continue
            kind = kinds[0]
            low, high = LIMITS.get(field.name, (1, 1e12) if kind is int else (1e-12, 1e6))
            if isinstance(kind, str):
                good, kind, wanted = value in kinds, str, f"one of {', '.join(kinds)}"
            elif kind in (int, float):
                good = isinstance(value, numbers.Real) and low <= value <= high and kind(value) == value
                wanted = f"a{' whole' if kind is int else ''} number from {low:g} to {high:g}"
            else:
                good, wanted = isinstance(value, (kind, os.PathLike)) and value != "", f"a {kind.__name__}"
            if not good:
                raise UserError(f"--{field.name.replace('_', '-')} must be {wanted}, and is {value!r}")
            setattr(self, field.name, kind(value))
        if (self.sampling_steps or 1) > self.denoising_steps:
            raise UserError("--sampling-steps must not be more than --denoising-steps")
        if self.critic_warmup and not self.critic_learning_rate:
            raise UserError("--critic-warmup needs --critic-learning-rate")

    @classmethod
    def for_task(cls, env=None, **given):
        """What is given; else what the run `init_from` has, but for length and folder, or else the task's PRESETS."""
        if env is not None:
            given["env"] = env
        if given.get("init_from") is not None:
            given = {"total_timesteps": cls.total_timesteps, "runs": cls.runs} | given
            return dataclasses.replace(load_config(given["init_from"]), **given)
        task = given.get("env", cls.env).split("/")[-1].rsplit("-v", 1)[0]
        return cls(**PRESETS.get(task, {}) | given)


LIMITS = {"denoising_steps": (1, 100), "minibatch_size": (2, 1e9), "num_steps": (2, 1e6), "hidden": (1, 4096),
          "seed": (0, 2**31 - 1), "critic_warmup": (0, 1e9), "ent_coef": (0, 1e6),
          **dict.fromkeys(("eta", "gamma", "gae_lambda", "gamma_denoising"), (0, 1))}
PRESETS = {  # by the name of the task without its version; the same for all algorithms
    "HalfCheetah": dict(minibatch_size=1024, learning_rate=1e-3),
    "Hopper": dict(num_envs=16, num_steps=128, init_std=1.0, min_std=0.2, gamma=0.99, gae_lambda=0.95,
                   minibatch_size=256, update_epochs=10),
    "Walker2d": dict(num_envs=16, num_steps=128, init_std=0.5, min_std=0.2, gamma=0.99, gae_lambda=0.95,
                     minibatch_size=128, update_epochs=10, learning_rate=3e-4, hidden=64, activation="tanh")}


def parse(arguments, preset=None):
    """Config, the run folders of --evaluate and --resume, and the fields given on the command line; the others are
    those of such a folder, or else of `preset`, or else Config.for_task's.
    """
    parser = argparse.ArgumentParser(
        description="NCDPO in one file. Defaults in brackets; some tasks have their own (PRESETS).",
        usage="python ncdpo.py [--flag value ...]", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    verbs = parser.add_mutually_exclusive_group()
    verbs.add_argument("--resume", help="go on with this run folder; these flags may change: "
                       + ", ".join(sorted(MAY_CHANGE)).replace("_", "-"))
    verbs.add_argument("--evaluate", help="play this run folder as it was trained, but for the flags that are given")
    comments = dict(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        kinds = get_args(field.type) or [field.type]
        if isinstance(kinds[0], str):
            how = {"choices": kinds}
        elif kinds[0] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": kinds[0], "metavar": kinds[0].__name__}
        text = f"{comments[field.name]} [{field.default}]".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args(arguments))
    evaluated, resumed = given.pop("evaluate", None), given.pop("resume", None)
    for run in (evaluated, resumed):
        if run is not None:
            return dataclasses.replace(load_config(run), **given), evaluated, resumed, given
    return Config(**preset | given) if preset else Config.for_task(**given), None, None, given


def main(arguments=None):
    """Entry point; returns the exit code: 0, 2 for a mistake told in one sentence, 130 for an interruption."""
    try:
        config, evaluated, resumed, given = parse(arguments)
        if evaluated is not None:
            print(describe(evaluate(evaluated, **given)))
        else:
            train(config, resumed)
    except UserError as error:
        print(f"ncdpo: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__" and "__file__" in globals():  # a cell of a notebook has no file
    sys.exit(main())
