"""Facts about ncdpo.py, one a test: python -m pytest -q test_ncdpo.py -m "not notebooks" (two minutes).

What is compared with is a closed form or another computation, never a recorded output. The parts, in this order:

    equations       schedule, networks, policies, PPO's loss and update: sections 1 to 4 and 8 of ncdpo.py
    loop            rollout, batch and update; the chain's columns; nobody waits for the device
    environments    Gymnasium's tasks, and MuJoCo in batches
    run folders     what is written, resumed and evaluated
    command line    flags and mistakes
    the file        how it may be copied, imported and pasted; what it declares
    scripts         what stands in notebooks/
    texts           README, the notebooks, links

Which tests check which equation of README.md (python -m pytest -k E5_ runs those of E5):

    E2              test_E2_cloning_recovers_two_modes_where_a_gaussian_finds_their_mean
    E1, E2, E18     test_E1_E2_E18_behaviour_cloning_loss_is_the_squared_error_against_a_perfect_network
    E3, E4, E18     test_E3_E4_E18_reverse_step_is_ddpms_posterior_at_eta_1_and_ddims_step_at_eta_0
    E3              test_E3_gradient_is_zero_where_the_clean_estimate_is_clipped
    E5, E6, E18     test_E5_E6_E18_ncdpo_mean_is_the_sampler_run_on_given_noise
    E7, E8          test_E7_E8_likelihood_is_torchs_gaussian_and_softmax_around_the_mean
    E7, E8          test_E7_E8_actions_are_drawn_as_their_likelihood_says
    E9              test_E9_all_noise_is_drawn_afresh_at_each_step
    E10, E13        test_E10_E13_policy_gradient_is_unbiased_if_it_flows_through_the_whole_chain
    E10, E12        test_E10_E12_update_learns_from_the_decisions_played
    E10             test_E10_a_baseline_that_sees_the_chain_knows_nothing_of_the_final_gaussian
    E10, E15        test_E10_E15_ncdpo_and_dppo_have_the_same_gradient_where_no_floor_binds
    E11             test_E11_first_minibatch_after_a_rollout_has_ratio_one
    E11, E12, E15   test_E11_E12_E15_ppo_loss_is_the_clipped_objective
    E13             test_E13_bpdt_gradient_equals_finite_differences
    E14             test_E14_kl_given_the_noise_bounds_the_kl_of_the_actions
    E15             test_E15_dppo_draws_and_scores_its_steps_as_a_plain_loop_does
    E15, E16        test_E15_E16_scored_steps_are_those_of_a_plain_loop
    E16             test_E16_one_scored_step_is_ncdpo_with_or_without_its_gradient_through_the_chain
    E13, E16        test_E13_E16_gradient_of_scored_steps_equals_finite_differences
    E13, E16        test_E13_E16_a_cut_chain_is_ncdpo_whose_gradient_is_that_of_the_last_step
    E17             test_E17_chain_std_is_the_deviation_of_the_action_over_the_chains_noise
"""

import ast
import csv
import dataclasses
import errno
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ncdpo
from ncdpo import UserError, VectorEnv, main, make_env
from notebooks import cloning, deploy, modes

HERE = Path(ncdpo.__file__).resolve().parent
CPU = torch.device("cpu")
PREDICT = ["sample", "epsilon", "v"]
ALGORITHMS = ["ncdpo", "ppo", "dppo"]
WIDE = 1e6  # a clip of the clean estimate that never bites
torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a marker that no configuration file registers
    notebooks = pytest.mark.notebooks
warp = pytest.mark.skipif(not importlib.util.find_spec("mujoco_warp"), reason="mujoco-warp is not installed")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def config(**given):
    """A run of four small updates."""
    small = dict(env="CartPole-v1", hidden=16, num_envs=2, num_steps=32, minibatch_size=32, update_epochs=2,
                 total_timesteps=256, episodes=2, device="cpu")
    return ncdpo.Config(**{**small, **given})


def shaken(module, scale=0.3):
    """The module with noise on all its weights: a fresh network's output is nearly zero, which hides mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)
    return module


def make_policy(algo="ncdpo", obs_dim=3, act_dim=2, discrete=False, **given):
    given = {"hidden": 8, "clip_denoised": WIDE, **given}
    return shaken(ncdpo.make_policy(config(algo=algo, **given), obs_dim, act_dim, discrete))


def test_each_equation_has_a_row_in_the_table_above_and_each_row_a_test():
    rows = re.findall(r"^    (E\d[E\d, ]*?) +(test_\w+)$", __doc__, re.MULTILINE)
    assert {label for labels, _ in rows for label in labels.split(", ")} == {f"E{n}" for n in range(1, 19)}
    assert not [name for _, name in rows if name not in globals()]


# --- environments of the tests ---------------------------------------------------------------------------------------

class Tiny(gym.Env):
    """Observation (2, 3): where the episode started (drawn by reset), the step, the last action, then zeros."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 125}
    made_to_fail = None  # (after so many steps of this object, what goes wrong)

    def __init__(self, action_space=gym.spaces.Discrete(3, start=5), observation_space=None, random_start=True,
                 terminates_after=math.inf, render_mode=None):
        self.action_space, self.random_start, self.terminates_after = action_space, random_start, terminates_after
        self.observation_space = observation_space or gym.spaces.Box(-np.inf, np.inf, (2, 3), np.float32)
        self.played, self.render_mode = 0, render_mode

    def observe(self, action):
        return np.array([[self.start, self.t, action], [0, 0, 0]], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.t = float(self.np_random.random()) if self.random_start else 0.0, 0
        return self.observe(0), {}

    def step(self, action):
        assert self.made_to_fail or self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t, self.played = self.t + 1, self.played + 1
        obs, reward = self.observe(np.sum(action)), float(np.sum(action)) + self.start
        after, wrong = self.made_to_fail or (math.inf, None)
        if self.played > after:
            if wrong == "exception":
                raise ZeroDivisionError("the physics\nexploded")
            worse = np.nan if wrong == "observation" else np.inf  # the normaliser clips what is infinite
            obs, reward = (obs, reward * np.nan) if wrong == "reward" else (obs + worse, reward)
        return obs, reward, self.t >= self.terminates_after, False, {}

    def render(self):
        assert self.render_mode == "rgb_array"
        return np.full((32, 48, 3), 7 * self.t, np.uint8)  # the step as a shade of grey


def register(name, steps=8, **arguments):
    gym.register(name, entry_point=Tiny, max_episode_steps=steps, kwargs=arguments)


BOX = gym.spaces.Box(np.array([-1, 2], np.float32), np.array([3, 10], np.float32))
register("Tiny-v0")
register("TinyBox-v0", action_space=BOX)
register("TinyWide-v0", action_space=gym.spaces.Box(-2.0, 6.0, (2,), np.float64), steps=21)
register("TinyFixed-v0", steps=32, action_space=BOX, random_start=False)
register("TinyEnds-v0", steps=32, action_space=BOX, terminates_after=7)
register("TinyEndless-v0", steps=None)
register("TinyDict-v0", observation_space=gym.spaces.Dict(a=BOX))
register("TinyMulti-v0", action_space=gym.spaces.MultiDiscrete([2, 3]))
register("TinyUnbounded-v0", action_space=gym.spaces.Box(-np.inf, np.inf, (2,)))


# ===== equations ======================================================================================================

# --- noise schedule ---------------------------------------------------------------------------------------------------

def cosine_tables(K):
    """abar_0 ... abar_K and beta_1 ... beta_K (beta_0 unused) of the cosine schedule, from its definition."""
    f = lambda k: math.cos((k / K + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = [0.0] + [min(1 - f(k) / f(k - 1), 0.999) for k in range(1, K + 1)]
    return [math.prod(1 - b for b in beta[:k + 1]) for k in range(K + 1)], beta


def perfect_output(predict, abar, x, x0):
    """What a network that knows x0 must say at x = sqrt(abar) x0 + sqrt(1 - abar) eps (E2)."""
    eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
    return {"sample": x0 + 0 * x, "epsilon": eps, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x0}[predict]


@pytest.mark.parametrize("K, S", [(1, None), (2, None), (5, None), (100, None), (20, 5), (20, 1), (7, 3)])
@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_E3_E4_E18_reverse_step_is_ddpms_posterior_at_eta_1_and_ddims_step_at_eta_0(float64, K, S, predict, eta):
    schedule, (abar, betas) = ncdpo.Schedule(K, predict, eta, WIDE, S), cosine_tables(K)
    tau = [round(K * k / (S or K)) for k in range((S or K) + 1)]
    x0, x = torch.randn(2, 7, 4)
    for k in range(1, len(tau)):
        now, before = abar[tau[k]], abar[tau[k - 1]]
        beta = 1 - math.prod(1 - b for b in betas[tau[k - 1] + 1:tau[k] + 1])  # of all the steps that are one now
        mu = schedule.mu(schedule.clean(perfect_output(predict, now, x, x0), x, k), x, k)
        assert schedule.tau(k) == schedule.tau(torch.tensor(k)) == tau[k]
        if eta == 1:
            expected = (before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - before) * x) / (1 - now)
            variance = (1 - before) / (1 - now) * beta
        else:
            expected = before**0.5 * x0 + (1 - before) ** 0.5 * (x - now**0.5 * x0) / (1 - now) ** 0.5
            variance = 0.0
        torch.testing.assert_close(mu, expected, rtol=1e-8, atol=1e-8)
        assert schedule.sigma[k] ** 2 == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_E4_more_noise_than_ddpms_is_refused(eta):
    with pytest.raises(ValueError, match="eta must be from 0 to 1"):
        ncdpo.Schedule(5, eta=eta)


@pytest.mark.parametrize("given, words", [(dict(predict="eps"), "sample, epsilon or v, and is eps"),
                                          (dict(sampling_steps=6), "from 1 to steps, not 5 and 6"),
                                          (dict(sampling_steps=0), "from 1 to steps, not 5 and 0"),
                                          (dict(steps=0), "at least 1, .+, not 0 and None")], ids=str)
def test_a_chain_that_cannot_be_run_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        ncdpo.NCDPO(3, 2, **{"steps": 5, **given})


def test_a_table_gives_an_int_and_a_tensor_of_them_the_same_numbers(float64):
    schedule, many = ncdpo.Schedule(20, eta=0.7, sampling_steps=5), torch.tensor([[0, 3], [5, 1]])
    for table in (schedule.signal, schedule.noise, schedule.sigma, schedule.to_clean, schedule.to_noisy):
        assert table[many].tolist() == [[[table[k].item()] for k in row] for row in many.tolist()]
    assert schedule.tau(many).tolist() == [[schedule.tau(k) for k in row] for row in many.tolist()]


class Perfect(torch.nn.Module):
    """A denoiser that knows the clean action, and says it with an error of `shift`."""

    def __init__(self, policy, x0, shift=0.0):
        super().__init__()
        self.abar = torch.tensor(cosine_tables(policy.schedule.steps)[0])[:, None]
        self.predict, self.x0, self.shift, self.seen = policy.schedule.predict, x0, shift, set()

    def forward(self, x, k, obs):
        self.seen |= set(torch.as_tensor(k).flatten().tolist())
        return perfect_output(self.predict, self.abar[k], x, self.x0) + self.shift


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_E1_E2_E18_behaviour_cloning_loss_is_the_squared_error_against_a_perfect_network(float64, predict, shift):
    policy, action = make_policy(denoising_steps=7, sampling_steps=2, predict=predict), torch.randn(500, 2)
    policy.denoiser = Perfect(policy, action, shift)
    assert policy.bc_loss(torch.randn(500, 3), action).item() == pytest.approx(shift**2, abs=1e-20)
    assert policy.denoiser.seen == set(range(1, 8))


# --- networks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("algo", ALGORITHMS)
def test_untrained_policy_proposes_nearly_the_zero_action(algo):
    policy = ncdpo.make_policy(config(algo=algo, hidden=128), 17, 6, False)
    action = policy.sample(torch.randn(500, 17), deterministic=True)[0]
    assert 0 < action.abs().max() < 0.05


def test_each_denoising_step_has_an_embedding_of_its_own_on_circles():
    table = ncdpo.Denoiser(3, 2, 100, 8, "silu").embedding
    torch.testing.assert_close(table[:, :8] ** 2 + table[:, 8:] ** 2, torch.ones(101, 8))
    assert torch.pdist(table).min() > 0.5


def test_hidden_layers_begin_orthogonal_with_a_gain_of_root_two(float64):
    net = ncdpo.mlp(8, 8, 3, "tanh", last_gain=0.5)
    gains = [layer.weight @ layer.weight.T for layer in net[::2]]
    for gain, expected in zip(gains, (2 * torch.eye(8), 2 * torch.eye(8), 0.25 * torch.eye(3)), strict=True):
        torch.testing.assert_close(gain, expected)
    assert not any(layer.bias.any() for layer in net[::2])
    assert [type(layer) for layer in net[1::2]] == [torch.nn.Tanh] * 2


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_width_nonlinearity_and_sigma_are_those_of_the_configuration(algo):
    agent = ncdpo.Agent(config(algo=algo, hidden=24, activation="tanh", init_std=0.7, min_std=0.7), 3, 2, False, 3)
    for net in (agent.policy.net if algo == "ppo" else agent.policy.denoiser.net, agent.critic):
        assert [type(layer) for layer in net[1::2]] == [torch.nn.Tanh] * 2 and net[0].out_features == 24
    assert agent.policy.head.log_std.exp().tolist() == pytest.approx([0.7] * 2)
    assert agent.critic[-1].weight.norm().item() == pytest.approx(1)
    for name, kind in dict(silu=torch.nn.SiLU, tanh=torch.nn.Tanh, relu=torch.nn.ReLU).items():
        assert type(ncdpo.mlp(1, 2, 1, name, 1.0)[1]) is kind


def test_cloning_draws_standard_normal_noise_and_every_level_equally_often(float64):
    policy, seen = make_policy(denoising_steps=4), []
    diffuse = policy.schedule.diffuse
    policy.schedule.diffuse = lambda *given: seen.append(given) or diffuse(*given)
    policy.bc_loss(torch.randn(40_000, 3), torch.randn(40_000, 2))
    (_, k, eps), = seen
    shares = torch.tensor([0, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(torch.bincount(k, minlength=5) / 40_000, shares, atol=0.011, rtol=0)
    assert abs(eps.mean()) < 0.02 and abs(eps.var() - 1) < 0.03 and abs((eps**4).mean() - 3) < 0.2


def test_defaults_that_no_preset_changes():
    """The settings of every reported run that does not name them."""
    c, default = ncdpo.Config(), lambda f, name: inspect.signature(f).parameters[name].default
    assert (c.clip_coef, c.ent_coef, c.eta, c.noise_scale, c.clip_denoised, c.temperature) == (0.2, 0, 1, 1, 1, 0.1)
    assert (c.gamma_denoising, c.mean_log_prob, c.episodes, c.total_timesteps) == (0.99, False, 10, 1_000_000)
    assert [default(ncdpo.ppo_update, name) for name in ("epochs", "minibatch_size")] == [5, 512]
    assert [default(ncdpo.DPPO, name) for name in ("min_std", "gamma_denoising")] == [0.1, 0.99]
    assert default(ncdpo.ppo_loss, "ent_coef") == 0


def test_the_optimizer_is_adam_but_for_its_epsilon():
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], eps=1e-5, fused=True)
    optimizer = ncdpo.Trainer(config()).optimizer
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults == adam.defaults


def test_a_row_has_the_means_over_the_episodes_that_ended(monkeypatch):
    trainer = ncdpo.Trainer(config())
    monkeypatch.setattr(trainer, "finished", lambda rollout: torch.tensor([[1.0, 3, 0], [2, 5, 1], [12, 40, 1]]))
    row = trainer.iterate()
    assert [row[name] for name in ("return", "length", "success", "episodes")] == pytest.approx([5, 16, 2 / 3, 3])


def test_ppo_has_the_usual_constants_where_nobody_gives_others():
    default = lambda function, name: inspect.signature(function).parameters[name].default
    assert (default(ncdpo.ppo_loss, "vf_coef"), default(ncdpo.ppo_update, "max_grad_norm")) == (0.5, 0.5)
    assert {group["eps"] for group in ncdpo.Trainer(config()).optimizer.param_groups} == {1e-5}


def test_normalizer_agrees_with_numpy_over_uneven_batches(float64):
    batches = [3 + 2 * torch.randn(n, 4) * torch.tensor([1, 10, 0.1, 1]) for n in (1, 7, 300, 2)]
    norm, everything = ncdpo.Normalizer(4), torch.cat(batches).numpy()
    for batch in batches:
        norm.update(batch)
    mean, var = everything.mean(0), everything.var(0)
    np.testing.assert_allclose(norm.mean, mean)
    np.testing.assert_allclose(norm.var, var)
    assert norm.count == 310
    np.testing.assert_allclose(norm(batches[1]), (batches[1].numpy() - mean) / np.sqrt(var), rtol=1e-5)
    assert norm(1e6 * torch.tensor([1.0, -1, 1, -1])).tolist() == [10.0, -10, 10, -10]


# --- policies ---------------------------------------------------------------------------------------------------------

def reference_step(policy, predict, eta, x, k, obs):
    """mu_k and sigma_k of E3, E4, E18 as the README writes them, without the tables of Schedule."""
    K, S = policy.schedule.steps, policy.K
    abar, tau = cosine_tables(K)[0], round(K * k / S)
    now, before = abar[tau], abar[round(K * (k - 1) / S)]
    output = policy.denoiser(x, tau, obs)
    x0 = {"sample": output, "epsilon": (x - (1 - now) ** 0.5 * output) / now**0.5,
          "v": now**0.5 * x - (1 - now) ** 0.5 * output}[predict].clamp(-policy.schedule.clip, policy.schedule.clip)
    variance = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
    eps = (x - now**0.5 * x0) / (1 - now) ** 0.5
    return before**0.5 * x0 + max(1 - before - variance, 0) ** 0.5 * eps, variance**0.5


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("K", [4, 8, 11])
def test_E5_E6_E18_ncdpo_mean_is_the_sampler_run_on_given_noise(float64, predict, eta, K):
    policy = make_policy(denoising_steps=K, sampling_steps=4, predict=predict, eta=eta, clip_denoised=0.8)
    obs, omega = torch.randn(9, 3), torch.randn(9, 4, 2)
    noise = {"x4": omega[:, 0], 4: omega[:, 1], 3: omega[:, 2], 2: omega[:, 3], 1: 0.0}
    x = noise["x4"]
    for k in (4, 3, 2, 1):
        mu, sigma = reference_step(policy, predict, eta, x, k, obs)
        x = mu + sigma * noise[k]
    torch.testing.assert_close(policy.act(obs, omega, torch.zeros(9, 2))[0], x)


@pytest.mark.parametrize("predict, noise_scale, discrete, K", [
    ("sample", 1.0, False, 5), ("epsilon", 0.6, True, 5), ("v", 0.6, False, 12)])
def test_E15_dppo_draws_and_scores_its_steps_as_a_plain_loop_does(float64, predict, noise_scale, discrete, K):
    """Five steps, of K."""
    given = dict(denoising_steps=K, sampling_steps=5, predict=predict, eta=0.7, min_std=0.3, temperature=0.5,
                 clip_denoised=0.8)
    policy = make_policy("dppo", discrete=discrete, noise_scale=noise_scale, **given)
    obs, (omega, noise) = torch.randn(11, 3), policy.draw_noise(11)
    action, _, latent = policy.act(obs, omega, noise)
    x, expected = omega[:, 0], []
    for k in range(5, 0, -1):
        mu, sigma = reference_step(policy, predict, 0.7, x, k, obs)
        std = max(noise_scale * sigma, 0.3)
        if k > 1:
            x = mu + std * omega[:, 6 - k] / noise_scale
        else:
            x = action if discrete else mu + std * noise
        end = Categorical(logits=mu / 0.5) if k == 1 and discrete else Normal(mu, std)
        expected.append(end.log_prob(x) if k == 1 and discrete else end.log_prob(x).sum(-1))
    torch.testing.assert_close(action, x)
    log_prob, entropy = policy.evaluate_actions(obs, action, latent)
    torch.testing.assert_close(log_prob, torch.stack(expected, 1))
    torch.testing.assert_close(entropy, end.entropy() if discrete else end.entropy().sum(-1))  # of the last step
    assert latent.shape == (11, 5, 2)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_action_is_drawn_with_the_likelihood_that_its_latent_scores_again(float64, algo, discrete):
    policy, obs = make_policy(algo, discrete=discrete, denoising_steps=7, sampling_steps=3), torch.randn(20, 3)
    action, log_prob, latent = policy.act(obs, *policy.draw_noise(20))
    torch.testing.assert_close(policy.log_prob(obs, action, latent), log_prob)
    assert log_prob.shape == ((20, 3) if algo == "dppo" else (20,))


def test_dppo_takes_any_network_whose_steps_have_the_leading_axes_of_x():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.of_step, self.out = torch.nn.Embedding(6, 4), torch.nn.Linear(2 + 4 + 3, 2)

        def forward(self, x, k, obs):
            if isinstance(k, int):
                k = torch.full(x.shape[:-1], k)
            return self.out(torch.cat([x, self.of_step(k), obs], -1))

    policy, obs = ncdpo.DPPO(3, 2, denoiser=Net()), torch.randn(9, 3)
    action, log_prob, latent = policy.sample(obs)
    torch.testing.assert_close(policy.log_prob(obs, action, latent), log_prob)
    assert policy.bc_loss(obs, action).isfinite()


def test_noise_scale_is_a_factor_of_the_chains_noise_alone():
    drawn = []
    for scale in (1.0, 0.3):
        policy = make_policy(noise_scale=scale)
        torch.manual_seed(1)
        drawn.append(policy.draw_noise(9))
    (omega, noise), (quiet, same_noise) = drawn
    torch.testing.assert_close(0.3 * omega, quiet)
    assert torch.equal(noise, same_noise)


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_E7_E8_likelihood_is_torchs_gaussian_and_softmax_around_the_mean(float64, algo):
    obs, tau = torch.randn(6, 3), 0.3 if algo == "ncdpo" else 1.0
    box, choice = (make_policy(algo, discrete=d, temperature=0.3, denoising_steps=3) for d in (False, True))
    for policy in (box, choice):
        action, log_prob, omega = policy.sample(obs)
        mean = policy.mean(obs, omega)
        end = Categorical(logits=mean / tau) if policy is choice else Normal(mean, policy.head.log_std.exp())
        expected = (end.log_prob(action), end.entropy())
        expected = expected if policy is choice else [term.sum(-1) for term in expected]
        torch.testing.assert_close(log_prob, expected[0])
        torch.testing.assert_close(policy.evaluate_actions(obs, action, omega)[1], expected[1])


@pytest.mark.parametrize("discrete", [False, True])
def test_E7_E8_gradient_of_the_entropy_is_torchs(float64, discrete):
    policy, obs = make_policy(discrete=discrete, temperature=0.7), torch.randn(9, 3)
    action, _, omega = policy.sample(obs)
    mean = policy.mean(obs, omega)
    end = Categorical(logits=mean / 0.7) if discrete else Normal(mean, policy.head.log_std.exp())
    theta, how = [p for p in policy.parameters() if p.requires_grad], dict(allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(policy.evaluate_actions(obs, action, omega)[1].sum(), theta, **how)
    torch.testing.assert_close(ours, torch.autograd.grad(end.entropy().sum(), theta, **how))
    assert any(g.any() for g in ours)


def test_E7_E8_actions_are_drawn_as_their_likelihood_says(float64):
    n, mean = 100_000, torch.tensor([0.4, -0.1, 0.2])
    choice, box = ncdpo.Categorical(0.5), ncdpo.Gaussian(3, 0.3)
    drawn = choice.sample(mean, choice.draw_noise(n, 3))
    probability = torch.softmax(mean / 0.5, -1)
    frequency = torch.bincount(drawn, minlength=3) / n
    assert ((frequency - probability).abs() < 5 * (probability / n).sqrt()).all()
    drawn = box.sample(mean, box.draw_noise(n, 3))
    assert ((drawn.mean(0) - mean).abs() < 5 * 0.3 / n**0.5).all()
    torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.3), rtol=5 / (2 * n) ** 0.5, atol=0)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("K", [1, 4, 10])
def test_E13_bpdt_gradient_equals_finite_differences(float64, predict, K):
    policy = make_policy(denoising_steps=K, predict=predict)
    (obs, action), omega, h = (torch.randn(5, n) for n in (3, 2)), torch.randn(5, K, 2), 1e-5
    parameters, loss = list(policy.denoiser.parameters()), lambda: policy.log_prob(obs, action, omega).sum()
    gradient = parameters_to_vector(torch.autograd.grad(loss(), parameters))
    theta = parameters_to_vector(parameters).detach()

    def at(vector):
        vector_to_parameters(vector, parameters)
        return loss().item()

    for direction in torch.randn(3, len(theta)):
        difference = (at(theta + h * direction) - at(theta - h * direction)) / (2 * h)
        assert difference == pytest.approx((gradient @ direction).item(), rel=1e-5)


def test_E3_gradient_is_zero_where_the_clean_estimate_is_clipped(float64):
    policy = make_policy(denoising_steps=3, clip_denoised=1.0)
    torch.nn.init.constant_(policy.denoiser.net[-1].bias, 100.0)
    mean = policy.mean(torch.randn(5, 3), torch.randn(5, 3, 2))
    assert (mean == 1).all()
    assert all((g == 0).all() for g in torch.autograd.grad(mean.sum(), list(policy.denoiser.parameters())))


def test_ncdpo_with_one_step_that_ignores_its_noise_is_ppo_with_an_mlp(float64):
    chain, plain = make_policy("ncdpo", denoising_steps=1), make_policy("ppo")
    first, net = chain.denoiser.net[0], plain.net
    with torch.no_grad():
        first.weight[:, :2] = 0
        net[0].weight.copy_(first.weight[:, 2:5])
        net[0].bias.copy_(first.bias + first.weight[:, 5:] @ chain.denoiser.embedding[1])
    net[1:].load_state_dict(chain.denoiser.net[1:].state_dict())
    obs, omega, noise = torch.randn(32, 3), torch.randn(32, 1, 2), torch.zeros(32, 2)
    torch.testing.assert_close(chain.act(obs, omega, noise)[0], plain.act(obs, omega[:, :0], noise)[0])


def gauss_hermite(n, dims):
    """Nodes (n^dims, dims) and weights (n^dims,) of the expectation over a standard normal of `dims` dimensions."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    w = w / w.sum()
    weights = [math.prod(ws) for ws in itertools.product(w, repeat=dims)]
    return torch.tensor(np.array(list(itertools.product(x, repeat=dims)))), torch.tensor(weights)


@pytest.mark.parametrize("through_the_chain", [True, False])
def test_E10_E13_policy_gradient_is_unbiased_if_it_flows_through_the_whole_chain(float64, through_the_chain):
    policy = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    reward = lambda a: torch.sin(2 * a) + 0.5 * a**2
    parameters = list(policy.parameters())
    flat = lambda gradients: torch.cat([g.flatten() for g in gradients])

    nodes, weights = gauss_hermite(24, 3)  # (x_2, z_2) and the final Gaussian's draw
    mean = policy.mean(torch.ones(len(nodes), 1), nodes[:, :2, None])[:, 0]
    J = (weights * reward(mean + policy.head.log_std.exp() * nodes[:, 2])).sum()
    truth = flat(torch.autograd.grad(J, parameters))

    mu = policy.mu
    if not through_the_chain:
        policy.mu = lambda x, *more: mu(x.detach(), *more)
    estimates, obs = [], torch.ones(4000, 1)
    for _ in range(200):
        action, _, omega = policy.sample(obs)
        score = policy.log_prob(obs, action, omega) * (reward(action[:, 0]) - J.item())
        estimates.append(flat(torch.autograd.grad(score.mean(), parameters)))
    estimates = torch.stack(estimates)
    standard_error = estimates.std(0) / len(estimates) ** 0.5 + 1e-12
    off = ((estimates.mean(0) - truth).abs() / standard_error).max()
    assert (off < 4) == through_the_chain


def test_E14_kl_given_the_noise_bounds_the_kl_of_the_actions(float64):
    old = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    new = make_policy(obs_dim=1, act_dim=1, denoising_steps=2, init_std=0.5)
    new.load_state_dict(old.state_dict())
    shaken(new, 0.05)
    nodes, weights = gauss_hermite(24, 2)
    a = torch.linspace(-15, 15, 3001)
    with torch.no_grad():  # log pi(a | omega): a row for each omega, a column for each a
        log_p, log_q = (Normal(policy.mean(torch.ones(len(nodes), 1), nodes[:, :, None]),
                               policy.head.log_std.exp()).log_prob(a) for policy in (old, new))
        row = old.log_prob(torch.ones(3001, 1), a[:, None], nodes[[5]][:, :, None].expand(3001, 2, 1))
    torch.testing.assert_close(log_p[5], row)
    integral = lambda density: torch.trapezoid(density, a)
    p, q = weights @ log_p.exp(), weights @ log_q.exp()
    conditional = (weights * integral(log_p.exp() * (log_p - log_q))).sum()
    marginal = integral(p * (p / q.clamp(min=1e-300)).clamp(min=1e-300).log())
    assert integral(p).item() == pytest.approx(1, abs=1e-9)
    assert 1e-4 < marginal < conditional


@pytest.fixture
def core():
    """Sections 1 to 4 of the file, pasted below nothing but torch and math."""
    source = (HERE / "ncdpo.py").read_text()
    sections = source[source.index("# ===== 1  Noise schedule"):source.index("# ===== 5")]
    assert not [word for word in ("Config", "gym", "DPPO", "np.") if word in sections]
    there = {"__name__": "elsewhere"}
    exec("import math, torch, torch.nn as nn, torch.nn.functional as F\n" + sections, there)
    return there


def test_the_core_learns_a_bandit_when_it_is_pasted_elsewhere(core):
    """Its best action is a function of the observation."""
    policy, critic = core["NCDPO"](2, 2, steps=3, hidden=32), core["mlp"](2, 32, 1, "silu", last_gain=1.0)
    adam = torch.optim.Adam([*policy.parameters(), *critic.parameters()], 3e-3)
    rewards = []
    for _ in range(60):
        obs = torch.rand(256, 2) * 2 - 1
        action, log_prob, latent = policy.sample(obs)
        reward = -(action - 0.8 * obs.flip(1)).square().sum(1)
        batch = dict(obs=obs, action=action, latent=latent, log_prob=log_prob, target=reward,
                     advantage=reward - critic(obs)[:, 0].detach())
        core["ppo_update"](partial(core["ppo_loss"], policy, critic), batch, adam, minibatch_size=128)
        rewards.append(reward.mean().item())
    untrained, perfect = -2 * (0.8**2 / 3 + 0.22**2), -2 * 0.22**2  # of the zero action and of the best one
    assert rewards[0] == pytest.approx(untrained, abs=0.1) and np.mean(rewards[-5:]) > 1.5 * perfect


def test_readmes_lines_run_below_the_core(core):
    core |= dict(obs_dim=3, act_dim=2, obs=torch.randn(64, 3), A=torch.randn(64))
    text = (HERE / "README.md").read_text()
    lines = re.search(r"```python\n(policy = .*?)```", text, re.DOTALL).group(1)
    assert "`import math, torch, torch.nn as nn, torch.nn.functional as F`" in text  # the fixture's own
    exec(lines, core)  # README; it ends with loss.backward(), through the chain
    assert core["policy"].denoiser.net[0].weight.grad.norm() > 1e-4
    assert torch.allclose(core["ratio"], torch.ones(64), atol=1e-5) and len(lines.splitlines()) == 6


class Transformer(torch.nn.Module):
    """net(x_k, k, s) over chunks of H actions of A numbers, each action a token."""

    def __init__(self, H, A, obs_dim, steps, width=16):
        super().__init__()
        self.action, self.obs = torch.nn.Linear(A, width), torch.nn.Linear(obs_dim, width)
        self.step, self.place = torch.nn.Embedding(steps + 1, width), torch.nn.Parameter(torch.randn(H, width))
        self.body = torch.nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.last = torch.nn.Linear(width, A)

    def forward(self, x, k, obs):
        about = self.obs(obs) + self.step(torch.as_tensor(k))
        tokens = self.action(x.unflatten(-1, (len(self.place), -1))) + about[..., None, :] + self.place
        return self.last(self.body(tokens.flatten(0, -3)).view_as(tokens)).flatten(-2)


@pytest.mark.parametrize("kind", [ncdpo.NCDPO, ncdpo.DPPO])
def test_any_network_may_denoise_and_is_trained_by_ppo_and_cloned(kind):
    net, obs = Transformer(H=3, A=2, obs_dim=4, steps=3), torch.randn(64, 4)
    policy, critic = kind(4, 6, steps=3, denoiser=net), ncdpo.mlp(4, 8, 1, "silu", last_gain=1.0)
    batch = dict(zip(("action", "log_prob", "latent"), policy.sample(obs)), obs=obs, target=torch.randn(64),
                 advantage=torch.randn(64))
    adam = torch.optim.Adam([*policy.parameters(), *critic.parameters()], 3e-3)
    ncdpo.ppo_update(partial(ncdpo.ppo_loss, policy, critic), batch, adam, epochs=1, minibatch_size=64)
    for weight in net.parameters():
        assert weight.grad.isfinite().all() and weight.grad.norm() > 1e-6
    expert = lambda obs: torch.tanh(obs[:, :1] * torch.linspace(-1, 1, 6))
    for _ in range(300):
        obs = torch.randn(128, 4)
        adam.zero_grad()
        policy.bc_loss(obs, expert(obs)).backward()
        adam.step()
    omega, noise = policy.draw_noise(64)
    shown, cloned = expert(batch["obs"]), policy.act(batch["obs"], 0 * omega, 0 * noise)[0]
    assert (cloned - shown).square().mean() < 0.03 * shown.square().mean()


def test_the_file_of_running_md_gives_training_and_loading_another_network(tmp_path, monkeypatch):
    running = (HERE / "notebooks" / "RUNNING.md").read_text()
    text, = re.findall(r"```python\n(import sys\nimport ncdpo\n.+?)```", running, re.DOTALL)
    monkeypatch.setattr(ncdpo, "Denoiser", ncdpo.Denoiser)  # to be put back
    exec(text, {"__name__": "mine"})
    run, trainer = a_clone(tmp_path / "run", env="TinyBox-v0", hidden=8)
    policy = ncdpo.load_agent(run)[1].policy
    assert type(policy.denoiser).__name__ == "Residual" and len(trainer.iterate())
    x, obs = torch.randn(4, 2), torch.randn(4, 6)
    plain = super(type(policy.denoiser), policy.denoiser).forward(x, 2, obs)
    torch.testing.assert_close(policy.denoiser(x, 2, obs), x + plain)


def test_dropout_of_a_network_of_ones_own_is_for_cloning_alone(tmp_path, monkeypatch):
    class Dropped(ncdpo.Denoiser):
        masked = []  # of all copies: whether each call drops

        def forward(self, x, k, obs):
            self.masked.append(self.training)
            return torch.nn.functional.dropout(super().forward(x, k, obs), 0.5, self.training)

    monkeypatch.setattr(ncdpo, "Denoiser", Dropped)
    run, trainer = a_clone(tmp_path / "run", env="TinyBox-v0", hidden=8)
    policy, demos = trainer.agent.policy, (torch.randn(40, 6), torch.zeros(40, 2), np.arange(40) // 4)
    cloning.clone(trainer.agent, demos, seed=1, steps=3)
    assert Dropped.masked == 3 * [True, False]  # each step, and not where the loss held out is taken
    obs = torch.randn(50, 6)
    action, log_prob, omega = policy.sample(obs)
    assert torch.equal(policy.log_prob(obs, action, omega), log_prob)
    assert ncdpo.load_agent(run)[1].training is False and Dropped.masked.count(True) == 3


# --- PPO --------------------------------------------------------------------------------------------------------------

def random_rollout(T=40, N=3):
    reward, value, final_value = torch.randn(3, T, N)
    terminated = torch.rand(T, N) < 0.08
    truncated = (torch.rand(T, N) < 0.08) & ~terminated
    ended = terminated | truncated
    final_value[:-1] = torch.where(ended[:-1], final_value[:-1], value[1:])  # without a reset a step leads on
    assert terminated.sum() > 1 and truncated.sum() > 1
    return reward, value, final_value, terminated, ended


def test_advantages_are_the_discounted_sum_of_td_errors_within_an_episode(float64):
    reward, value, final_value, terminated, ended = arguments = random_rollout()
    A = ncdpo.advantages(*arguments, 0.9, 0.8)
    for t, n in np.ndindex(*A.shape):
        expected = 0.0
        for l in range(len(A) - t):
            bootstrap = 0.0 if terminated[t + l, n] else final_value[t + l, n]
            expected += 0.72**l * (reward[t + l, n] + 0.9 * bootstrap - value[t + l, n])
            if ended[t + l, n]:
                break
        assert A[t, n].item() == pytest.approx(float(expected))


def test_advantages_do_not_ask_what_follows_a_termination(float64):
    reward, value, final_value, terminated, ended = random_rollout()
    A = ncdpo.advantages(reward, value, final_value, terminated, ended, 0.9, 0.8)
    unknown = final_value.masked_fill(terminated, math.nan)  # of a simulator that diverged
    assert torch.equal(ncdpo.advantages(reward, value, unknown, terminated, ended, 0.9, 0.8), A)


def test_E12_ratios_beyond_what_a_float_holds_leave_the_gradient_finite():
    log_ratio = torch.tensor([100.0, 100.0, -200.0, -200.0], requires_grad=True)
    objective, clipped = ncdpo.clipped_objective(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    gradient, = torch.autograd.grad(objective, log_ratio)
    assert objective.isfinite() and clipped == 1 and (gradient == 0).all()


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_E11_E12_E15_ppo_loss_is_the_clipped_objective(float64, algo):
    c = config(algo=algo, denoising_steps=3, gamma_denoising=0.5)
    agent, obs = shaken(ncdpo.Agent(c, 3, 2, False, 3)), torch.randn(40, 3)
    action, log_prob, latent = agent.policy.sample(obs)
    log_prob = log_prob.detach()
    old, advantage, target = log_prob + 0.3 * torch.randn_like(log_prob), 5 + torch.randn(40), torch.randn(40)
    loss, diagnostics = ncdpo.ppo_loss(agent.policy, agent.critic, obs, action, latent, old, advantage, target,
                                       vf_coef=0.7, ent_coef=0.03)
    M, policy = log_prob[0].numel(), agent.policy
    r = (policy.log_prob(obs, action, latent) - old).view(40, M).exp()
    A = ((advantage - advantage.mean()) / advantage.std())[:, None] * 0.5 ** torch.arange(M - 1, -1, -1)
    gain = (torch.where(A > 0, r.clamp(max=1.2), r.clamp(min=0.8)) * A).mean()
    value_loss = (agent.critic(obs)[:, 0] - target).square().mean() / 2
    entropy, clipped = Normal(torch.zeros(2), policy.head.log_std.exp()).entropy().sum(), (r < 0.8) | (r > 1.2)
    expected = dict(policy_loss=-gain, value_loss=value_loss, entropy=entropy, clip_fraction=clipped.double().mean(),
                    approx_kl=(r - 1 - r.log()).sum() / 40)
    assert {k: v.item() for k, v in diagnostics.items()} == pytest.approx({k: v.item() for k, v in expected.items()})
    learnt = [p for p in agent.parameters() if p.requires_grad]
    both = [[x, *torch.autograd.grad(x, learnt)] for x in (loss, -gain + 0.7 * value_loss - 0.03 * entropy)]
    torch.testing.assert_close(*both)


def descend(size, **given):
    """`ppo_update` on the loss 100 v + 10 w by plain gradient descent, each a group of its own: the minibatches
    taken, where v and w went, the diagnostics.
    """
    v, w, picks = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.zeros(())), []

    def loss(obs, target):
        assert torch.equal(obs, target)  # each row stays together
        picks.append(obs.tolist())
        return 100 * v + 10 * w, {"taken": obs.min() * 1.0}

    sgd = torch.optim.SGD([{"params": [v]}, {"params": [w]}], lr=1.0)
    row = ncdpo.ppo_update(loss, dict.fromkeys(("obs", "target"), torch.arange(size)), sgd, **given)
    return picks, v.item(), w.item(), row


def test_update_takes_whole_minibatches_in_a_new_order_each_epoch_and_clips_each_groups_gradient():
    picks, v, w, row = descend(110, epochs=3, minibatch_size=50, max_grad_norm=0.5)
    assert [len(pick) for pick in picks] == [50] * 6  # 10 are left out of each epoch
    epochs = [picks[i] + picks[i + 1] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 100 and epoch != sorted(epoch) for epoch in epochs) and epochs[0] != epochs[1]
    assert (v, w) == pytest.approx((-0.5 * 6, -0.5 * 6)) and row["grad_norm"] == pytest.approx(100)
    assert row["taken"] == pytest.approx(np.mean([min(pick) for pick in picks]))  # the mean over all minibatches
    assert [len(pick) for pick in descend(100, epochs=2, minibatch_size=300)[0]] == [100] * 2  # all there is


# ===== loop ===========================================================================================================

# --- rollout and update -----------------------------------------------------------------------------------------------

@pytest.fixture
def batches(monkeypatch):
    """What ppo_update would have learnt from: batch, loss function, optimizer and settings of each update."""
    taken = []
    monkeypatch.setattr(ncdpo, "ppo_update", lambda loss, batch, *more: taken.append((batch, loss, *more)) or {})
    return taken


def test_E9_all_noise_is_drawn_afresh_at_each_step():
    trainer = ncdpo.Trainer(config(env="Pendulum-v1", num_steps=400, total_timesteps=800))
    agent, rollout = trainer.agent, trainer.play()
    omega = rollout["latent"]
    mean = agent.policy.mean(agent.obs_norm(rollout["obs"]).flatten(0, 1), omega.flatten(0, 1))
    final = (rollout["action"] - mean.view(400, 2, 1)).detach() / 0.22
    for noise in (omega, final):
        n = noise.numel()
        assert len(noise.unique()) > 0.99 * n and abs((noise[1:] * noise[:-1]).mean()) < 5 / n**0.5
        assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert omega.shape == (400, 2, 5, 1)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_E11_first_minibatch_after_a_rollout_has_ratio_one(algo, env):
    trainer = ncdpo.Trainer(config(algo=algo, env=env, update_epochs=1, minibatch_size=64))
    for _ in range(2):  # in the second, weights and normalisers have moved on from their first values
        row = trainer.iterate()
        assert abs(row["approx_kl"]) < 1e-6 and row["clip_fraction"] == 0 and row["grad_norm"] > 0


def test_episodes_are_counted_across_rollouts():
    """Return, length and success, the last told where an episode ends."""
    trainer, cut = ncdpo.Trainer(config()), torch.tensor([math.nan, 0.5]).expand(3, 2)  # one plays half of each chunk
    reward = torch.stack([torch.tensor([[1.0, 10], [2, 20], [3, 30]]), cut], -1)

    def finished(ended, success):
        rollout = dict(reward=reward, ended=torch.tensor(ended) > 0, success=torch.tensor(success))
        return trainer.finished(rollout).tolist()

    assert finished([[0, 0], [1, 0], [0, 0]], [[0.0, 0], [1, 0], [0, 0]]) == [[3, 2, 1]]
    episodes = finished([[0, 1], [1, 1], [1, 0]], [[0.0, 1], [0, 0], [1, 0]])
    assert episodes == [[72, 8, 1], [6, 3, 0], [20.5, 2, 0], [3, 1, 1]]
    finished([[0, 0], [0, 0], [1, 1]], [[0.0, 0], [0, 0], [math.nan, 0]])  # a task may tell it now and then
    assert finished([[0, 0], [0, 0], [1, 1]], [[0.0, 0], [0, 0], [1, 1]])[0][2] == 1


class Elsewhere(torch.Tensor):
    """A tensor as on another device: no operation takes it together with plain ones, and cpu() makes it plain."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
            assert len({type(x) for x in tensors}) <= 1, "tensors of two devices"
            kind = torch.Tensor if func is torch.Tensor.cpu else cls
            return tree_map(lambda x: x.as_subclass(kind) if isinstance(x, torch.Tensor) else x,
                            func(*args, **kwargs or {}))


def test_episodes_are_counted_where_the_simulator_is_on_another_device():
    with pytest.raises(AssertionError, match="two devices"):
        torch.stack([torch.ones(2).as_subclass(Elsewhere), torch.ones(2)])
    trainer = ncdpo.Trainer(config(env="CartPole-v1", num_steps=64))
    rollout = trainer.play()
    moved = {name: x if name == "success" else x.as_subclass(Elsewhere) for name, x in rollout.items()}
    assert torch.equal(trainer.finished(moved)[:, :2], ncdpo.Trainer.finished(ncdpo.Trainer(config()), rollout)[:, :2])


@pytest.mark.parametrize("algo, env, H, g", [
    ("ncdpo", "CartPole-v1", 1, 0.9), ("dppo", "TinyBox-v0", 1, 0.9),  # the first terminates, the second truncates
    ("ncdpo", "TinyBox-v0", 3, 0.9), ("ncdpo", "TinyEnds-v0", 3, 0.9),  # the latter within a chunk
    ("ncdpo", "TinyEnds-v0", 3, 1e-20), ("ncdpo", "TinyBox-v0", 3, 0.0)])
def test_E10_E12_update_learns_from_the_decisions_played(monkeypatch, batches, algo, env, H, g):
    """The second update against loops over its steps: discount g a step, so g^H a decision."""
    lam, coefficients, measured = 0.8, dict(clip_coef=0.1, ent_coef=0.03), []
    trainer = ncdpo.Trainer(config(algo=algo, env=env, action_chunk=H, gamma=g, gae_lambda=lam,
                                   total_timesteps=256 * H, **coefficients))
    step, starts, steps, agent = trainer.env.step, trainer.obs, [], trainer.agent
    shaken(agent)
    trainer.env.step = lambda action: steps.append(step(action)) or steps[-1]
    act, noises = agent.act, []
    agent.act = lambda obs, *noise: noises.append(noise) or act(obs, *noise)
    monkeypatch.setattr(ncdpo, "chain_std", lambda policy, obs: measured.append(obs) or 0.25)
    trainer.iterate()
    row = trainer.iterate()
    obs, rewards, terminated, truncated, led = (torch.stack(x) for x in zip(*steps))
    obs, ended = torch.cat([starts[None], obs[:-1]]), terminated | truncated
    seen = obs[:32].flatten(0, 1)  # a rollout's own observations count only from the next one on
    obs, led = (((x - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()).clamp(-10, 10).float()
                for x in (obs, led))
    with torch.no_grad():
        value, there = (agent.critic(x)[..., 0] for x in (obs, led))
    reward, sums, A = (g ** torch.arange(H) * rewards).nansum(-1), torch.zeros(65, 2), torch.zeros(65, 2)
    for t in range(64):
        sums[t + 1] = g**H * sums[t] * (~ended[t - 1] if t else 1) + reward[t]
    scale = sums[1:].std(correction=0)
    for t in reversed(range(32, 64)):
        ahead = reward[t] / scale + g ** rewards[t].isfinite().sum(-1) * ~terminated[t] * there[t]
        A[t] = ahead - value[t] + g**H * lam * ~ended[t] * A[t + 1]
    batch, loss, optimizer, *more = batches[1]
    names = ("action", "log_prob", "latent")
    expected = dict(obs=obs[32:], advantage=A[32:64], target=A[32:64] + value[32:])
    played = agent.policy.act(obs[32:].flatten(0, 1), *(torch.cat(x) for x in zip(*noises[32:])))  # as it was seen
    expected |= {name: x.detach().view(32, 2, *x.shape[1:]) for name, x in zip(names, played)}
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor.flatten(0, 1), rtol=1e-3, atol=1e-3)
    assert optimizer is trainer.optimizer and more == [2, 32] and ended[32:].any()
    batch["log_prob"] += 0.3 * torch.randn_like(batch["log_prob"])  # at a ratio of one no clip shows
    assert loss(**batch)[0] == ncdpo.ppo_loss(agent.policy, agent.critic, **batch, **coefficients)[0]
    explained = 1 - float(expected["advantage"].var() / expected["target"].var())
    assert row["explained_variance"] == pytest.approx(explained, abs=1e-3) and row["step"] == 2 * 2 * 32 * H
    if isinstance(agent.policy.head, ncdpo.Gaussian):
        assert torch.equal(measured[1], batch["obs"][:128]) and row["chain_std"] == 0.25
        assert row["sigma"] == pytest.approx(agent.policy.head.log_std.exp().mean().item())
    else:
        assert not measured and "sigma" not in row


def test_a_reward_that_is_not_a_number_ends_the_run_whatever_simulator_gave_it():
    trainer = ncdpo.Trainer(config())
    step = trainer.env.step
    trainer.env.step = lambda action: [x * math.nan if i == 1 else x for i, x in enumerate(step(action))]
    with pytest.raises(UserError, match="not finite in update 1"):
        trainer.iterate()


def test_scaled_rewards_are_clipped_to_ten(batches):
    trainer = ncdpo.Trainer(config(gamma=0.0))  # without a future, the target is the scaled reward
    trainer.agent.reward_norm.var.fill_(1e-6)
    trainer.agent.reward_norm.count.fill_(1e9)
    step, signs = trainer.env.step, torch.tensor([[1.0], [-1]])
    trainer.env.step = lambda action: [x * signs if i == 1 else x for i, x in enumerate(step(action))]
    trainer.iterate()
    torch.testing.assert_close(batches[0][0]["target"].view(32, 2), (10 * signs.T).expand(32, 2))


@pytest.mark.parametrize("critics_own", [None, 2e-3])
def test_adam_takes_the_learning_rates_of_the_update(critics_own):
    trainer, taken = ncdpo.Trainer(config(critic_learning_rate=critics_own, update_epochs=1, minibatch_size=64)), []
    trainer.optimizer.register_step_post_hook(lambda adam, *_: taken.append([g["lr"] for g in adam.param_groups]))
    for _ in range(4):
        trainer.iterate()
    rates = [5e-4, 2e-3] if critics_own else [5e-4]
    np.testing.assert_allclose(taken, np.array([[1], [0.75], [0.5], [0.25]]) * rates)
    sizes = [sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups]
    parts = [sum(p.numel() for p in part.parameters()) for part in (trainer.agent.policy, trainer.agent.critic)]
    assert sizes == (parts if critics_own else [sum(parts)])


@pytest.mark.parametrize("algo, discrete", [("ncdpo", False), ("dppo", False), ("ncdpo", True)])
def test_mean_log_prob_divides_a_box_actions_log_ratio_by_its_coordinates(algo, discrete):
    """So a log-ratio of d has the loss that one of d / 6 has without the flag: chunks of 3 actions of 2 coordinates."""
    losses, chunk, d = [], 1 if discrete else 3, 0.3
    for mean, shift in ((True, d), (False, d if discrete else d / 6)):
        torch.manual_seed(1)
        trainer = ncdpo.Trainer(config(env="Tiny-v0" if discrete else "TinyBox-v0", algo=algo, action_chunk=chunk,
                                       mean_log_prob=mean))
        obs = torch.randn(64, 6)
        action, log_prob, latent = trainer.agent.policy.sample(obs)
        old = log_prob.detach() - shift * torch.linspace(-1, 1, 64).view(-1, *[1] * (log_prob.dim() - 1))
        losses.append(trainer.loss(obs=obs, action=action, latent=latent, log_prob=old, advantage=torch.randn(64),
                                   target=torch.zeros(64))[1])
    kl, less = (diagnostics.pop("approx_kl") for diagnostics in losses)  # which is of the whole action
    assert kl.item() == pytest.approx(less.item() * (1 if discrete else 36), rel=0.1) and less > 1e-5
    one, other = ([x.item() for x in diagnostics.values()] for diagnostics in losses)
    assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


def test_a_constant_observation_is_0_to_the_network_and_a_large_one_that_hardly_varies_keeps_its_digits(monkeypatch):
    observe = lambda self, action: np.array([293.15, 12345.678, 12345.678 + 1e-6 * self.t, 0, 0, 0])
    monkeypatch.setattr(Tiny, "observe", observe)
    trainer, seen = ncdpo.Trainer(config(env="Tiny-v0")), []
    trainer.iterate()  # four episodes of steps 0 to 7
    trainer.agent.policy.denoiser.register_forward_pre_hook(lambda net, given: seen.append(given[2]))
    trainer.play()
    constant, varying = torch.stack(seen[::5]).split([2, 4], -1)
    assert constant.dtype == torch.float32 and constant.abs().max() < 1e-6
    steps = 1e-6 * (torch.arange(32) % 8 - 3.5) / (1e-12 * 63 / 12 + 1e-8) ** 0.5  # the variance of 0 to 7 is 63 / 12
    torch.testing.assert_close(varying[..., 0], steps[:, None].expand(32, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_E17_chain_std_is_the_deviation_of_the_action_over_the_chains_noise(algo):
    policy = ncdpo.make_policy(config(algo=algo, predict="epsilon"), 3, 2, False)
    obs = torch.randn(1, 3).expand(20_000, 3)
    actions = policy.sample(obs, deterministic=True)[0]
    expected = actions.var(0).mean().sqrt().item()
    assert expected > 0.05
    assert ncdpo.chain_std(policy, obs) == pytest.approx(expected, rel=0.03)
    assert ncdpo.chain_std(make_policy("ppo"), obs) == 0  # an MLP has no such noise


def test_chain_std_is_measured_over_the_whole_rollout(batches, monkeypatch):
    measured = []
    monkeypatch.setattr(ncdpo, "chain_std", lambda policy, obs: measured.append(obs) or 0.25)
    ncdpo.Trainer(config(env="Pendulum-v1", num_steps=192, total_timesteps=384)).iterate()
    steps, copies = np.divmod((measured[0][:, None] == batches[0][0]["obs"]).all(2).float().argmax(1).numpy(), 2)
    assert len(measured[0]) == 128 and (np.diff(steps) >= 0).all() and steps[0] == 0 and steps[-1] == 191
    assert 0.3 < copies.mean() < 0.7  # of both environments


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_training_in_double_precision(algo, float64):
    trainer = ncdpo.Trainer(config(env="Pendulum-v1", algo=algo, action_chunk=2))
    assert math.isfinite(trainer.iterate()["value_loss"]) and trainer.agent.critic[0].weight.dtype == torch.float64


# --- nobody waits for the device -------------------------------------------------------------------------------------

class NoCopies(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU; counts the operations that launch a kernel."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal.default")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function).removeprefix("aten."), kwargs or {}
        assert not name.startswith(self.REFUSED), f"{name} waits for the device"
        assert not name.startswith("index") or not any(
            x is not None and x.dtype == torch.bool for x in args[1]), f"{name} by a mask waits for the device"
        self.count += not function.is_view and not name.startswith("empty")
        return function(*args, **kwargs)


class NoReads(TorchFunctionMode):
    """Refuses the methods that read a tensor on the host: on a CPU they never reach the dispatcher."""

    REFUSED = {getattr(torch.Tensor, name) for name in
               "cpu numpy item tolist nonzero __bool__ __float__ __int__ __index__ __array__".split()}

    def __init__(self, but=()):
        super().__init__()
        self.but, self.allowed = {getattr(torch.Tensor, name) for name in but}, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.allowed += function in self.but
        assert function not in self.REFUSED - self.but, f"{function.__name__} reads a tensor"
        return function(*args, **(kwargs or {}))


def resident(env="Hopper-v4", **given):
    """A trainer whose simulator lives where its tensors do, after its first update."""
    small = dict(env=env, vector="warp", num_envs=8, num_steps=16, total_timesteps=4096)
    trainer = ncdpo.Trainer(config(**small | given))
    trainer.iterate()
    return trainer


def rollout_and_update(trainer):
    """A rollout; then one update, its batch made outside of what is looked at."""
    yield (rollout := trainer.play())
    yield (batch := trainer.make_batch(rollout)[0])
    yield ncdpo.ppo_update(trainer.loss, batch, trainer.optimizer, epochs=2, minibatch_size=32)


def test_the_modes_refuse_what_they_should():
    x, mask = torch.arange(3.0), torch.tensor([True, False, True])
    for wrong in (lambda: x[mask], lambda: x.cpu(), lambda: x.sum().item(), lambda: mask.nonzero(), lambda: x.tolist(),
                  lambda: x.new_tensor([1.0]), lambda: float(x[0]), lambda: x.__setitem__(mask, torch.ones(2)),
                  lambda: not mask.all()):
        with pytest.raises(AssertionError, match="waits|reads"), NoCopies(), NoReads():
            wrong()


@warp
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("env, chunk", [("Hopper-v4", 1), ("Hopper-v4", 3), ("HalfCheetah-v4", 1)])
def test_a_rollout_and_the_epochs_of_an_update_never_read_the_device(algo, env, chunk):
    trainer = resident(env, algo=algo, action_chunk=chunk)
    trainer.env.envs.limit = 10
    moves = rollout_and_update(trainer)
    with NoCopies() as rollout, NoReads():
        played = next(moves)
    assert played["ended"].any()  # also where episodes end
    next(moves)
    with NoCopies(), NoReads(but=["tolist"]) as reads:
        next(moves)
    assert reads.allowed == 1  # of all the diagnostics, once, when the update is over
    print(f"{algo}, {env}, chunks of {chunk}: {rollout.count / trainer.config.num_steps:.0f} torch kernels a decision")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_nothing_waits_for_the_gpu_in_a_rollout_and_the_epochs_of_an_update(algo):
    trainer = resident(algo=algo, device="cuda", num_envs=64, minibatch_size=256)
    assert (trainer.env.envs.kind, trainer.env.envs.device.type) == ("warp", "cuda")
    moves = rollout_and_update(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(moves)
        torch.cuda.set_sync_debug_mode("default")
        next(moves)
        torch.cuda.set_sync_debug_mode("warn")  # one wait, of the diagnostics when the update is over
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            next(moves)
        assert len(waits) == 1
    finally:
        torch.cuda.set_sync_debug_mode("default")


@warp
def test_training_with_warp_learns_and_writes_what_any_run_does(tmp_path):
    history = ncdpo.train(config(env="Hopper-v4", vector="warp", num_envs=8, num_steps=16, runs=str(tmp_path),
                                 total_timesteps=8 * 16 * 50, learning_rate=3e-3, update_epochs=6,
                                 minibatch_size=64))
    assert np.nanmean(history["return"][-5:]) > 1.5 * np.nanmean(history["return"][:5])
    assert list(history) == ncdpo.COLUMNS and (np.diff(history["seconds"]) > 0).all()


# ===== environments ===================================================================================================

# --- Gymnasium's tasks -----------------------------------------------------------------------------------------------

def play(env_id, vector, seed=3, num_envs=3, steps=210, chunk=1):
    """Random actions, many of them out of bounds: a dictionary of arrays for each step, and the seeds used."""
    env, seeds = VectorEnv(env_id, num_envs, CPU, vector, chunk), []
    reset, rng = env.envs.reset, torch.Generator().manual_seed(seed)
    env.envs.reset = lambda new: seeds.extend(new) or reset(new)
    obs, rows = env.reset(seed), []
    for _ in range(steps):
        if env.discrete:
            action = torch.randint(env.act_dim, (num_envs,), generator=rng)
        else:
            action = 1.5 * torch.randn(num_envs, env.act_dim, generator=rng)
        next_obs, reward, terminated, truncated, final_obs = env.step(action)
        row = dict(obs=obs, action=action, reward=reward, terminated=terminated, truncated=truncated,
                   final_obs=final_obs, next_obs=next_obs)
        rows.append({name: tensor.numpy() for name, tensor in row.items()})
        obs = next_obs
    env.close()
    return rows, seeds


@pytest.mark.parametrize("env_id, vector, chunk", [
    ("CartPole-v1", "auto", 1), ("Pendulum-v1", "auto", 1), ("Tiny-v0", "sync", 1), ("TinyBox-v0", "sync", 1),
    ("TinyBox-v0", "sync", 3), ("TinyEnds-v0", "sync", 3), ("Hopper-v4", "sync", 3)])
def test_every_environment_plays_as_it_would_alone(env_id, vector, chunk):
    """Also where the actions of a chunk are played one after another, until its episode ends."""
    rows, seeds = play(env_id, vector, chunk=chunk, steps=210 if chunk == 1 else 80)
    ends, cut_short = 0, False
    for i, seed in enumerate(seeds):
        alone = make_env(env_id)
        obs, space = alone.reset(seed=seed)[0], alone.action_space
        for row in rows:
            np.testing.assert_allclose(row["obs"][i], obs.ravel(), rtol=1e-5, atol=1e-5)
            rewards = []
            for part in np.split(np.atleast_1d(row["action"][i]), chunk):
                if isinstance(space, gym.spaces.Discrete):
                    action = part[0] + space.start
                else:
                    low, high = space.low.astype(float), space.high.astype(float)
                    action = (low + high) / 2 + part.astype(float).clip(-1, 1) * (high - low) / 2
                    action = action.astype(np.float32)
                obs, reward, *ended, _ = alone.step(action)
                rewards.append(reward)
                if any(ended):
                    break
            cut_short |= len(rewards) < chunk
            np.testing.assert_allclose(row["final_obs"][i], obs.ravel(), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(row["reward"][i], rewards + [np.nan] * (chunk - len(rewards)),
                                       rtol=1e-5, atol=1e-5)
            assert [row["terminated"][i], row["truncated"][i]] == ended
            assert np.array_equal(row["final_obs"][i], row["next_obs"][i]) != any(ended)
            if any(ended):
                ends += 1
                obs = alone.reset()[0]
    assert ends >= len(seeds) and len(set(seeds)) == len(seeds) and cut_short == (chunk > 1)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_seed_decides_where_episodes_start(env_id):
    one, again, other = (play(env_id, "auto", seed, steps=1)[0][0]["obs"] for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.isin(one, other).any()


def test_with_repeat_each_part_of_the_environments_starts_as_the_first_does():
    obs = VectorEnv("Tiny-v0", 6, CPU).reset(1, repeat=3).view(3, 2, 6)
    assert torch.equal(obs[0], obs[1]) and torch.equal(obs[0], obs[2]) and obs[0, 0, 0] != obs[0, 1, 0]


@pytest.fixture
def own():
    """Registers a task for one test, and gives its name."""
    names = []

    def register(entry_point, steps=8, wrappers=(), **arguments):
        names.append(f"Own{len(names)}-v0")
        gym.register(names[-1], entry_point, max_episode_steps=steps, additional_wrappers=wrappers, kwargs=arguments)
        return names[-1]

    yield register
    for name in names:
        gym.registry.pop(name)


@pytest.fixture
def arrived(own):
    """What a task with this action space is given for the actions (T, H * A) that VectorEnv is given."""
    def play(space, actions, chunk=1):
        seen = []

        class Notes(Tiny):
            def step(self, action):
                seen.append(action)
                return super().step(action)  # asserts that the space contains the action

        env = VectorEnv(own(Notes, action_space=space), 1, CPU, chunk=chunk)
        env.reset(1)
        for action in actions:
            env.step(torch.as_tensor(action, dtype=torch.float32)[None])
        assert all(action.dtype == space.dtype and space.contains(action) for action in seen)
        return np.array(seen)

    return play


@pytest.mark.parametrize("low, high, dtype", [(-100, 100, np.int8), (10, 255, np.uint8), (-3e38, 3e38, np.float32)])
def test_lowest_middle_and_highest_action_of_wide_boxes_arrive(arrived, low, high, dtype):
    actions = arrived(gym.spaces.Box(low, high, (1,), dtype), [[-1], [0], [1]]).ravel()
    assert actions[0] == dtype(low) and actions[2] == dtype(high)
    assert abs(float(actions[1]) - (low + high) / 2) <= 0.5


def test_a_box_of_integers_gets_the_nearest_one(arrived):
    given = np.linspace(-1, 1, 41)[:, None]
    actions = arrived(gym.spaces.Box(-3, 5, (1,), np.int16), given)
    assert len(np.unique(actions)) == 9 and np.abs(actions - (1 + 4 * given)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_rounding_leads_out_of_a_box(arrived, dtype):
    rng = np.random.default_rng(0)
    low = np.round([-2.3, *rng.uniform(-5, 5, 300)], 2)
    high = np.round([-0.13, *low[1:] + rng.uniform(0.01, 5, 300)], 2)
    given = np.array([-1.5, -1, *rng.uniform(-1, 1, 30), 1, 1.5])[:, None] * np.ones(301)
    actions = arrived(gym.spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype), given)  # which checks it
    np.testing.assert_allclose(actions, low + (given.clip(-1, 1) + 1) / 2 * (high - low), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_coordinate_without_room_gets_its_only_value(arrived, chunk):
    space = gym.spaces.Box(np.array([0.1, -1, 2], np.float32), np.array([0.1, 3, 2], np.float32))
    actions = arrived(space, np.tile([[-1, 0.5, 0.3], [1, -2, 2]], chunk), chunk)
    assert np.array_equal(actions, np.repeat(np.array([[0.1, 2, 2], [0.1, -1, 2]], np.float32), chunk, 0))


@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("rows", [2, 4])
def test_a_task_that_writes_its_observation_in_place_is_seen_as_it_was(own, rows, chunk):
    class InPlace(Tiny):
        def observe(self, action):
            if self.played == 0:
                self.memory = np.zeros((rows, 3))[-2:]  # all of an array, or a part
            self.memory[:] = super().observe(action)
            return self.memory

    env = VectorEnv(own(InPlace, steps=4, action_space=BOX), 2, CPU, chunk=chunk)
    first, actions = env.reset(1), torch.linspace(-1, 1, 8 // chunk)
    seen, start = [env.step(torch.full((2, 2 * chunk), a)) for a in actions], first[:, 0]
    for t, (a, (obs, _, _, truncated, final_obs)) in enumerate(zip(actions, seen)):  # only now: nothing is overwritten
        age = (t * chunk) % 4 + chunk
        expected = torch.stack([start, torch.full((2,), age), (7 + 6 * a).expand(2)], 1)  # of BOX the middle is (1, 6)
        torch.testing.assert_close(final_obs[:, :3], expected.double(), rtol=1e-6, atol=1e-6)
        assert (truncated == (age == 4)).all() and ((obs != final_obs).any(1) == truncated).all()
        assert (obs[:, 1] == age % 4).all()
        start = obs[:, 0]


INFOS = {"a key final_obs": lambda env: {"final_obs": env.t, "final_info": None, "_x": 3},
         "lengths": lambda env: {"x": np.zeros(1 + int(10 * env.start))},
         "types": lambda env: {"x": "text" if env.start < 0.5 else 3.0, str(env.start): None}}


@pytest.mark.parametrize("info", INFOS)
def test_infos_may_hold_anything(own, info):
    class Told(Tiny):
        def reset(self, **given):
            return super().reset(**given)[0], INFOS[info](self)

        def step(self, action):
            return *super().step(action)[:4], INFOS[info](self)

    told, plain = (play(name, "auto", steps=20)[0] for name in (own(Told), "Tiny-v0"))
    for one, other in zip(told, plain):
        assert all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("as_task_gives", [list, np.float64], ids=["list", "float64"])
def test_observations_may_be_lists_and_keep_the_digits_of_float64(own, as_task_gives):
    class Precise(Tiny):
        def observe(self, action):
            return as_task_gives([12345.678901234, self.t + 1e-9])

    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    env = VectorEnv(own(Precise, steps=2, observation_space=space), 3, CPU)
    exact = lambda t: torch.tensor([[12345.678901234, t + 1e-9]] * 3, dtype=torch.float64)
    assert torch.equal(env.reset(1), exact(0))
    for now, then in ((1, 1), (0, 2)):
        obs, *_, final_obs = env.step(torch.zeros(3, dtype=torch.long))
        assert torch.equal(obs, exact(now)) and torch.equal(final_obs, exact(then))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk, when", [(1, 1), (3, 1), (3, 3)])
def test_a_reward_that_is_not_finite_is_told_with_the_name_of_the_task(own, chunk, when, value):
    class Odd(Tiny):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, value if self.t == when else reward, *rest

    name = own(Odd, action_space=BOX)
    env = VectorEnv(name, 2, CPU, chunk=chunk)
    env.reset(1)
    with pytest.raises(UserError, match=f"{name} gave the reward {value}"):
        env.step(torch.zeros(2, 2 * chunk))


@pytest.mark.parametrize("reward, success, words", [
    (np.arange(2), True, r"the reward \[0 1\], which is not finite or not one number"),
    (1.0, "yes", "the success yes, which is not one number"), (1.0, np.ones(2), r"the success \[1. 1.\], which")])
def test_a_reward_or_success_that_is_not_one_number_is_told(own, reward, success, words):
    class Odd(Tiny):
        def step(self, action):
            obs, _, *ends, _ = super().step(action)
            return obs, reward, *ends, {"success": success}

    env = VectorEnv(name := own(Odd), 1, CPU)
    env.reset(1)
    with pytest.raises(UserError, match=f"{name} gave {words}"):
        for _ in range(9):
            env.step(torch.tensor([0]))


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_reward_may_be_an_array_of_one_number(own, chunk):
    class Odd(Tiny):
        def step(self, action):
            obs, reward, *rest = super().step(action)
            return obs, np.array([reward]), *rest

    odd, plain = (play(name, "auto", steps=9, chunk=chunk)[0] for name in (own(Odd, action_space=BOX), "TinyBox-v0"))
    for one, other in zip(odd, plain):
        np.testing.assert_array_equal(one["reward"], other["reward"])


def test_box_actions_of_two_dimensions_are_refused(own):
    with pytest.raises(UserError, match="flat Box"):
        VectorEnv(own(Tiny, action_space=gym.spaces.Box(-1, 1, (2, 2))), 1, CPU)


def test_the_seed_decides_where_training_starts():
    assert not torch.isin(*(ncdpo.Trainer(config(seed=seed)).obs for seed in (1, 2))).any()


@pytest.mark.parametrize("error", [IndexError, ValueError, AssertionError])
@pytest.mark.parametrize("method", ["__init__", "reset", "step"])
def test_an_error_in_ones_own_task_stays_what_it_is(own, method, error):
    def broken(*given, **more):
        raise error("mine")

    with pytest.raises(error, match="^mine$"):
        env = VectorEnv(own(type("Broken", (Tiny,), {method: broken})), 1, CPU)
        env.reset(1)
        env.step(torch.tensor([0]))


def test_an_error_in_ones_own_module_stays_what_it_is_but_a_missing_module_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mistaken.py").write_text("int('three')")
    with pytest.raises(ValueError, match="'three'"):
        VectorEnv("mistaken:MyTask-v0", 1, CPU)
    for name, words in {"forgotten:MyTask-v0": "on PYTHONPATH.*No module named 'forgotten'",
                        ":MyTask-v0": "is module:name"}.items():
        with pytest.raises(UserError, match=f"cannot make {name}.*{words}"):
            VectorEnv(name, 1, CPU)


@pytest.mark.parametrize("size", [1, 7])
def test_observations_of_another_size_than_the_tasks_space_are_refused(own, size):
    """Those of one number would be broadcast without a word."""
    env = VectorEnv(own(Tiny, observation_space=gym.spaces.Box(-1, 1, (size,))), 2, CPU)
    with pytest.raises(UserError, match=rf"of shape \(6,\), but its observation_space has {size} numbers"):
        env.reset(1)


def test_observations_of_another_size_in_a_step_alone_are_refused(own):
    class Odd(Tiny):
        def step(self, action):
            obs, *rest = super().step(action)
            return np.ravel(obs)[:1], *rest

    env = VectorEnv(own(Odd), 2, CPU)
    env.reset(1)
    with pytest.raises(UserError, match=r"gave obs, reward.* of shapes \[\(2, 1\), .* must be \[\(2, 6\)"):
        env.step(torch.tensor([0, 0]))


class Worlds:
    """Worlds of three agents, each of which ends every fourth step, well for the first agent alone."""

    kind, device, policy_dim = "worlds", CPU, 2
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Discrete(2)

    def __init__(self, name, num_envs, device):
        if name == "unknown":
            raise ValueError("no such game")
        if name == "uninstalled":
            raise ImportError("pip install it")
        self.success, self.t = torch.zeros(3 * num_envs), 0

    def reset(self, seeds):
        assert len(seeds) == len(self.success)
        return torch.randn(len(self.success), 4)

    def step(self, action):
        self.t += 1
        ended = torch.full_like(action, self.t % 4 == 0, dtype=torch.bool)
        self.success = ended * torch.tensor([1.0, 0, 0]).repeat(len(action) // 3)
        obs = torch.randn(len(action), 4)
        return obs, torch.ones(len(action), 1), ended, torch.zeros_like(ended), obs

    def close(self):
        pass


def test_a_simulator_may_write_each_step_into_the_same_memory(monkeypatch):
    class InPlace(Worlds):
        """The step is observed and paid, and the agent that succeeds has its number."""

        def __init__(self, *given):
            super().__init__(*given)
            self.obs, self.reward, self.t = torch.zeros(3, 4), torch.zeros(3, 1), -1

        def reset(self, seeds):
            return self.step(torch.zeros(3, dtype=torch.long))[0]

        def step(self, action):
            self.t += 1
            self.success[:] = self.t % 2
            ended = torch.zeros(3, dtype=torch.bool)
            return self.obs.fill_(self.t), self.reward.fill_(self.t), ended, ended, self.obs

    monkeypatch.setitem(sys.modules, "worlds", types.SimpleNamespace(make_vec=InPlace))
    trainer = ncdpo.Trainer(config(env="worlds:x", num_envs=1, num_steps=4, total_timesteps=24))
    for first in (0, 4):
        rollout = trainer.play()
        for name, values in {"obs": range(4), "reward": range(1, 5), "final_obs": range(1, 5)}.items():
            assert rollout[name][:, 0, 0].tolist() == [first + x for x in values], name
        assert rollout["success"][:, 0].tolist() == [1, 0, 1, 0]


@pytest.fixture
def worlds(monkeypatch):
    monkeypatch.setitem(sys.modules, "worlds", types.SimpleNamespace(make_vec=Worlds))


@pytest.mark.parametrize("key", ["success", "is_success", None])
def test_success_of_a_gymnasium_task_is_what_the_last_info_of_an_episode_tells(monkeypatch, key):
    """Episodes of three steps, every other one good; what infos say before the end does not count."""

    class Told(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,))
        t, episode = 0, 0

        def reset(self, seed=None, options=None):
            self.t, self.episode = 0, self.episode + 1
            return np.zeros(1), {}

        def step(self, action):
            self.t += 1
            told = self.episode % 2 == 0 if self.t == 3 else True
            return np.zeros(1), 0.0, False, self.t == 3, {key: told} if key else {}

    monkeypatch.setitem(gym.registry, "Told-v0", gym.envs.registration.EnvSpec("Told-v0", Told))
    env = VectorEnv("Told-v0", 2, CPU)
    env.reset(1)
    told = []
    for _ in range(6):
        env.step(torch.zeros(2, 1))
        told.append(env.envs.success.tolist())
    expected = [[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [1, 1]]
    np.testing.assert_array_equal(told, expected if key else [*expected[:2], [np.nan] * 2] * 2)
    row = ncdpo.Trainer(config(env="Told-v0")).iterate()
    np.testing.assert_allclose(row["success"], 0.5 if key else np.nan, atol=0.1)


def test_success_may_be_an_array_of_one_number(own):
    class Told(Tiny):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {"success": np.array([True])}

    row = ncdpo.Trainer(config(env=own(Told), total_timesteps=256)).iterate()
    assert row["success"] == 1


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_simulator_of_ones_own_tells_success_and_what_the_policy_sees(worlds, algo):
    trainer = ncdpo.Trainer(config(env="worlds:some?agents=3", algo=algo, total_timesteps=4 * 6 * 32))
    assert trainer.env.spaces == [4, 2, True, 2] and trainer.env.num_envs == 6 and trainer.env.envs.kind == "worlds"
    row = trainer.iterate()
    assert (row["episodes"], row["length"], row["return"]) == (6 * 32 / 4, 4, 4)
    assert row["success"] == pytest.approx(1 / 3)
    obs, (omega, noise) = torch.randn(5, 4), trainer.agent.policy.draw_noise(5)
    other = torch.cat([obs[:, :2], torch.randn(5, 2)], 1)
    log_probs = [trainer.agent.act(o, omega, noise)[1] for o in (obs, other)]
    assert torch.equal(*log_probs)  # the policy sees two numbers, the critic all
    assert not torch.isclose(*(trainer.agent.critic(trainer.agent.obs_norm(o)) for o in (obs, other))).any()


@pytest.mark.parametrize("env_id, words", [
    ("worlds:unknown", "cannot make worlds:unknown: no such game"), ("worlds:uninstalled", "pip install it"),
    ("nowhere:Thing-v0", "nowhere"), ("worlds:some", "--action-chunk 1")])
def test_what_ones_own_module_cannot_make_is_told(worlds, env_id, words):
    with pytest.raises(UserError, match=words):
        VectorEnv(env_id, 2, CPU, chunk=2)


def test_a_task_of_ones_own_module_is_made_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("import gymnasium as gym\n"
                                           "gym.register('MyTask-v0', 'gymnasium.envs.classic_control:CartPoleEnv')")
    monkeypatch.syspath_prepend(tmp_path)
    assert make_env("my_module:MyTask-v0").reset()[0].shape == (4,)  # as film.py makes it, before any import of it
    env = VectorEnv("my_module:MyTask-v0", 2, CPU)
    assert env.reset(1).shape == (2, 4)
    gym.registry.pop("MyTask-v0")


@pytest.mark.parametrize("error", [AssertionError, ValueError, IndexError])
@pytest.mark.parametrize("suite", ["gymnasium_robotics.envs.fetch", "metaworld.env"])
def test_a_suite_that_fails_under_a_new_mujoco_is_told_to_want_an_old_one(own, monkeypatch, suite, error):
    def broken():
        raise error("no mj_full_m")

    monkeypatch.setitem(sys.modules, suite, types.SimpleNamespace(Env=broken))
    monkeypatch.setattr(ncdpo, "version", lambda package: "4.0.0")
    told = IndexError if error is IndexError else UserError
    with pytest.raises(told, match="no mj_full_m" if error is IndexError else r"mujoco<4.*no mj_full_m"):
        VectorEnv(own(f"{suite}:Env"), 1, CPU)
    with pytest.raises(told, match="no mj_full_m" if error is IndexError else r"mujoco<4.*no mj_full_m"):
        VectorEnv("math:" + own(f"{suite}:Env"), 1, CPU)  # as any module that registers it
    monkeypatch.setattr(ncdpo, "version", lambda package: "3.3.0")  # which cannot be blamed
    with pytest.raises(error, match="no mj_full_m"):
        VectorEnv(own(f"{suite}:Env"), 1, CPU)


def test_every_copy_of_a_task_that_is_made_is_closed(monkeypatch):
    made, closed = [], []
    monkeypatch.setattr(Tiny, "close", lambda self: closed.append(self))
    monkeypatch.setattr(ncdpo, "make_env", lambda *given, make=make_env: made.append(make(*given)) or made[-1])
    VectorEnv("Tiny-v0", 3, CPU).close()
    assert closed == [task.unwrapped for task in made] and len(made) == 3


# --- MuJoCo in batches, against Gymnasium -- --------------------------------------------------------------------------

batched = pytest.mark.skipif(not importlib.util.find_spec("mujoco.batch"), reason="a MuJoCo before 3.17 has no batches")
MUJOCO = [f"{family}-{version}" for family in ("HalfCheetah", "Hopper", "Walker2d") for version in ("v4", "v5")]
MODELS = ["HalfCheetah-v5", "Hopper-v5", "Walker2d-v4", "Walker2d-v5"]  # the others have the same ones
SHOWN = dict(exclude_current_positions_from_observation=False)
CHANGED = [
    ("HalfCheetah-v4", dict(ctrl_cost_weight=0.3, forward_reward_weight=0.7, reset_noise_scale=0.2, **SHOWN)),
    ("Hopper-v4", dict(terminate_when_unhealthy=False, healthy_reward=0.3, **SHOWN)),
    ("Hopper-v5", dict(terminate_when_unhealthy=False, healthy_reward=0.3, frame_skip=2, healthy_state_range=(-3, 3))),
    ("Hopper-v5", dict(healthy_state_range=(-2, 2))), ("Hopper-v4", dict(healthy_angle_range=(-9, 9))),
    ("Walker2d-v5", dict(healthy_z_range=(1.1, 1.3), healthy_angle_range=(-9, 9), xml_file="walker2d.xml")),
    ("Walker2d-v4", dict(healthy_angle_range=(-0.1, 0.1), healthy_z_range=(-9, 9))),
]


def follow(env, batch, i):
    """Put a single environment at its start into the state of the batch's i-th; returns its observation."""
    env.reset()
    env.unwrapped.set_state(batch.qpos[i].numpy(), batch.qvel[i].numpy())
    return env.unwrapped._get_obs()


def both(env_id, num_envs=3, chunk=1, **changed):
    """The batch and as many single environments, in the same start states; and a source of actions."""
    batch = ncdpo.batched_envs(make_env(env_id, **changed), num_envs, chunk, CPU, "auto")
    singles = [make_env(env_id, **changed) for _ in range(num_envs)]
    batch.reset([1])
    for i, env in enumerate(singles):
        follow(env, batch, i)
    space, rng = singles[0].action_space, np.random.default_rng(1)
    return batch, singles, lambda: rng.uniform(space.low, space.high, (num_envs, chunk, len(space.low)))


@batched
@pytest.mark.parametrize("ages", [[0, 0, 0], [0, 1, 2], [0, 0, 1]])
def test_each_batched_episode_starts_elsewhere(ages):
    env = VectorEnv("Hopper-v5", 3, CPU)
    starts, env.envs.limit = [env.reset(1)], 3
    env.envs.age += torch.tensor(ages)
    for _ in range(9):
        obs, *_, truncated, _ = env.step(torch.zeros(3, 3))
        starts.append(obs[truncated])
    assert len(torch.cat(starts)[:, 0].unique()) == 3 + 9


@batched
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v5", "Walker2d-v4"])
def test_coordinates_of_a_batched_start_are_independent(env_id):
    batch = ncdpo.batched_envs(make_env(env_id), 4000, 1, CPU, "auto")
    batch.reset([1])
    z = torch.cat([batch.qpos - batch.first[0], batch.qvel - batch.first[1]], 1) / batch.env._reset_noise_scale
    normal = torch.zeros(z.shape[1], dtype=torch.bool)
    normal[batch.qpos.shape[1]:] = "Cheetah" in env_id
    torch.testing.assert_close(z.T.cov(), torch.diag(torch.where(normal, 1.0, 1 / 3)).double(), atol=0.1, rtol=0)
    assert (z.abs().amax(0)[~normal] <= 1).all() and (z.abs().amax(0)[normal] > 2.5).all()


@batched
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v5", "Walker2d-v4"])
def test_batched_episodes_start_as_gymnasiums_do(env_id):
    env, batch = make_env(env_id), VectorEnv(env_id, 2000, CPU).reset(1).numpy()
    single = np.array([env.reset(seed=seed)[0] for seed in range(2000)])
    spread = single.std(0)
    assert np.abs(batch.mean(0) - single.mean(0)).max() < 5 * (2 / 2000) ** 0.5 * spread.max()
    assert np.abs(batch.std(0) - spread).max() < 5 * (2 / 2000) ** 0.5 * spread.max()
    assert len(np.unique(batch[:, 0])) > 1900
    uniform = (single.max(0) - single.min(0)) < 4 * spread  # its range is 3.5 deviations; a normal one's is about 7
    assert np.abs(batch.max(0) - single.max(0))[uniform].max() < 0.05 * spread.max()


@batched
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v5"])
def test_each_step_of_a_batched_chunk_is_paid_as_in_gymnasium(env_id):
    batch, singles, draw = both(env_id, chunk=3)
    for _ in range(3):
        action = draw()
        reward = batch.step(torch.from_numpy(action.reshape(3, -1)))[1]
        for i, env in enumerate(singles):
            assert reward[i].tolist() == pytest.approx([env.step(one)[1] for one in action[i]], abs=1e-12)


@batched
@pytest.mark.parametrize("env_id, changed", [(env_id, {}) for env_id in MUJOCO] + CHANGED, ids=str)
def test_every_batched_step_is_the_one_of_gymnasium(env_id, changed):
    batch, singles, draw = both(env_id, max_episode_steps=70, **changed)
    ended = False
    for _ in range(150):  # free-running: no error may add up, not even through ends and restarts
        for i, data in enumerate(env.unwrapped.data for env in singles):
            assert np.array_equal(batch.qpos[i], data.qpos) and np.array_equal(batch.qvel[i], data.qvel)
        action = draw()
        obs, reward, terminated, truncated, final_obs = batch.step(torch.from_numpy(action[:, 0]))
        for i, env in enumerate(singles):
            now, r, *ends, _ = env.step(action[i, 0])
            assert ends == [terminated[i], truncated[i]]
            assert float(reward[i, 0]) == pytest.approx(r, rel=1e-12, abs=1e-12)
            assert np.array_equal(final_obs[i], now)
            ended |= any(ends)
            now = follow(env, batch, i) if any(ends) else now
            assert np.array_equal(obs[i], now)
    assert ended  # the comparison has gone through restarts


@batched
def test_time_limit_and_fall_in_one_step_set_both_flags():
    _, (env,), draw = both("Hopper-v5", 1)
    actions = [draw()[:, 0] for _ in range(200)]
    fall = 1 + next(i for i, action in enumerate(actions) if env.step(action[0])[2])
    chunk = torch.from_numpy(np.concatenate(actions[:fall], 1))
    for limit in (fall, fall - 1):  # and a fall that the episode did not live to see sets none
        batch, (env,), _ = both("Hopper-v5", 1, chunk=fall, max_episode_steps=limit)
        _, reward, terminated, truncated, final_obs = batch.step(chunk)
        for action in actions[:limit]:
            obs, _, *ends, _ = env.step(action[0])
        assert ends == [terminated[0], truncated[0]] == [limit == fall, True]
        assert np.array_equal(final_obs[0], obs) and reward.isfinite().sum() == limit


@batched
def test_a_state_that_mujoco_itself_resets_goes_on_as_in_gymnasium_and_does_not_poison_the_others():
    batch, singles, draw = both("HalfCheetah-v5", chunk=2)
    batch.qvel[1] = singles[1].unwrapped.data.qvel[:] = 1e11
    for _ in range(3):
        action = draw()
        obs, reward, terminated, truncated, _ = batch.step(torch.from_numpy(action.reshape(3, -1)))
        assert not (terminated | truncated).any() and reward.isfinite().all()
        for i, env in enumerate(singles):
            assert np.array_equal(obs[i], [env.step(a)[0] for a in action[i]][-1])


@batched
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 2e10])
@pytest.mark.parametrize("what", ["qpos", "qvel"])
def test_a_bad_state_at_the_end_of_a_step_terminates_the_episode(what, value):
    batch, _, draw = both("Hopper-v5")
    advance = batch.advance
    batch.advance = lambda: (advance(), getattr(batch, what)[1].fill_(value))
    obs, reward, terminated, _, final_obs = batch.step(torch.from_numpy(draw()[:, 0]))
    assert terminated.tolist() == [False, True, False] and reward[1] == 0 and not final_obs[1].any()
    assert obs.abs().max() < 10 and reward.isfinite().all()


@batched
def test_only_tasks_whose_formulas_are_known_are_batched(own):
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

    class Mine(HopperEnv):
        __module__ = "mine.gymnasium.envs.mujoco.hopper_v5"

    kind = lambda name, vector="auto": VectorEnv(name, 1, CPU, vector).envs.kind
    assert {kind(name) for name in [*MUJOCO, own(HopperEnv)]} == {"batched"} and kind("Hopper-v5", "sync") == "sync"
    clipped = lambda **given: gym.wrappers.ClipReward(HopperEnv(**given), -1, 1)
    wrappers = (gym.wrappers.ClipReward.wrapper_spec(min_reward=-1, max_reward=1),)
    others = [own(Mine), own(clipped), own(HopperEnv, wrappers=wrappers)]
    others += ["Ant-v4", "Ant-v5", "Swimmer-v4", "Humanoid-v5", "Reacher-v4", "CartPole-v1"]
    assert {kind(name) for name in others} == {"sync"}
    for name in others:
        with pytest.raises(UserError, match="^--vector warp has HalfCheetah, Hopper and Walker2d"):
            kind(name, "warp")


@batched
def test_a_batched_episode_lasts_as_long_as_it_was_registered_to(own):
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
    within = lambda **given: gym.wrappers.TimeLimit(HopperEnv(**given), 50)
    for name, limit in (("Hopper-v5", 1000), (own(HopperEnv, 30), 30), (own(HopperEnv, None), math.inf),
                        (own(within, None), 50), (own(within, 100), 50), (own(within, 30), 30)):
        assert VectorEnv(name, 1, CPU).envs.limit == limit


@batched
def test_a_gpu_without_warp_and_a_mujoco_without_batches_serve_the_same_tasks(monkeypatch):
    served = lambda device: ncdpo.batched_envs(make_env("Hopper-v5"), 2, 1, torch.device(device), "auto")
    missing, find_spec, chosen = {"mujoco_warp"}, importlib.util.find_spec, []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in missing else find_spec(name))
    assert served("cuda").kind == "batched"
    missing.add("mujoco.batch")
    assert served("cuda") is served("cpu") is None and VectorEnv("Hopper-v5", 1, CPU).envs.kind == "sync"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "mujoco_warp")
    monkeypatch.setattr(ncdpo, "WarpEnvs", lambda *rest: chosen.append(rest[-1].type) or ncdpo.MujocoEnvs(*rest[:-1]))
    assert served("cuda") and served("cpu") is None and chosen == ["cuda"]


# --- MuJoCo Warp, against MuJoCo -- ----------------------------------------------------------------------------------

def restart(envs, where, qpos, qvel):
    """Begin anew in given states where `where` is true."""
    envs.draw_states = lambda: (qpos, qvel)
    envs.restart(where)


def advance(envs, ctrl):
    envs.ctrl.copy_(ctrl)
    envs.advance()


def simulators(env_id, num_envs=16):
    """The task's object, both simulators in the same states near a start, and a source of actions."""
    env = make_env(env_id).unwrapped
    given = env, math.inf, num_envs, 1
    slow, fast, rng = ncdpo.MujocoEnvs(*given), ncdpo.WarpEnvs(*given), np.random.default_rng(3)
    qpos = torch.from_numpy(env.init_qpos + rng.uniform(-0.1, 0.1, slow.qpos.shape)).float()
    qvel = torch.from_numpy(rng.uniform(-0.5, 0.5, slow.qvel.shape)).float()
    everywhere = torch.ones(num_envs, dtype=torch.bool)
    restart(slow, everywhere, qpos.double(), qvel.double())
    restart(fast, everywhere, qpos, qvel)
    space = env.action_space
    return env, slow, fast, lambda: torch.from_numpy(rng.uniform(space.low, space.high, slow.ctrl.shape)).float()


def distance(slow, fast, *names):
    """Largest difference in each environment."""
    difference = [(getattr(slow, name) - getattr(fast, name)).abs().amax(1) for name in names]
    return torch.stack(difference).amax(0)


@warp
@batched
@pytest.mark.parametrize("env_id", MODELS)
def test_warp_moves_as_mujoco_does(env_id):
    _, slow, fast, draw = simulators(env_id)
    for step in range(50):
        action = draw()
        advance(slow, action.double())
        advance(fast, action)
        qpos, qvel = (distance(slow, fast, name) for name in ("qpos", "qvel"))
        if step == 0:
            assert qpos.max() < 1e-6 and qvel.max() < 1e-4
        if step == 19:
            assert qpos.median() < 1e-4 and qvel.median() < 2e-3
    if "HalfCheetah" not in env_id:  # which is chaotic
        assert qpos.median() < 3e-4 and qvel.median() < 3e-3
    assert not fast.arrays[1].overflow.numpy().any() and slow.qvel.abs().max() > 0.1


@warp
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v5"])
def test_rewards_and_ends_on_warps_states_are_those_of_the_formulas(env_id):
    envs = VectorEnv(env_id, 32, CPU, "warp").envs
    envs.reset([5])
    outcome, seen, ends = envs.outcome, [], 0

    def noted(x_before, action):
        exact = ncdpo.MujocoEnvs(envs.env, math.inf, 32, 1)
        exact.qpos.copy_(envs.qpos), exact.qvel.copy_(envs.qvel)
        seen.append((*exact.outcome(x_before.double(), action.double()), exact.observe(), exact.qpos[:, 0].clone()))
        return outcome(x_before, action)

    envs.outcome = noted
    for step in range(60):
        action = torch.from_numpy(envs.action_space.high * np.random.default_rng(step).uniform(-1, 1, (32, 1)))
        age = envs.age.clone()
        obs, reward, terminated, truncated, final_obs = envs.step(action.float().expand_as(envs.ctrl))
        expected, fell, expected_obs, x = seen[-1]
        assert torch.equal(terminated, fell) and not truncated.any()
        scale = max(1, x.abs().max().item() / 1e-2)  # float32 positions, divided by dt
        torch.testing.assert_close(reward[:, 0].double(), expected, rtol=1e-5, atol=3e-6 * scale)
        torch.testing.assert_close(final_obs, expected_obs.float(), rtol=1e-5, atol=1e-6)
        assert torch.equal(envs.age, torch.where(terminated, 0, age + 1))
        assert torch.equal((obs != final_obs).any(1), terminated)
        ends += terminated.sum()
    assert ends or "HalfCheetah" in env_id


@warp
@batched
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Walker2d-v5"])
def test_a_masked_restart_leaves_the_other_environments_alone(env_id):
    env, slow, fast, draw = simulators(env_id, 6)
    names = ["qpos", "qvel", "warmstart"]
    for _ in range(8):  # into contact
        advance(fast, action := draw())
    ended = torch.tensor([True, False, False, True, False, True])
    before = [getattr(fast, name).clone() for name in names]
    qpos, qvel = 0.01 + fast.qpos.new_tensor(env.init_qpos).expand(6, -1), torch.zeros(6, fast.qvel.shape[1])
    restart(fast, ended, qpos, qvel)
    assert torch.equal(fast.qpos[ended], qpos[ended]) and torch.equal(fast.qvel[ended], qvel[ended])
    assert not fast.warmstart[ended].any()
    for name, old in zip(names, before):
        assert torch.equal(getattr(fast, name)[~ended], old[~ended])
    restart(slow, torch.ones(6, dtype=torch.bool), qpos.double(), qvel.double())
    advance(slow, action.double())
    advance(fast, action)
    assert distance(slow, fast, "qpos", "qvel")[ended].max() < 1e-4


@warp
@pytest.mark.parametrize("chunk", [1, 3])
def test_warps_environments_end_and_begin_again(chunk):
    env = VectorEnv("Hopper-v4", 8, CPU, "warp", chunk)
    env.envs.limit = 12
    obs, ends = env.reset(1), torch.zeros(2)
    for step in range(40):
        age = env.envs.age.clone()
        obs, reward, terminated, truncated, final_obs = env.step(1.5 * torch.randn(8, 3 * chunk))
        played = reward.isfinite().sum(1)
        assert torch.equal(truncated, age + played == 12) and (played[~(terminated | truncated)] == chunk).all()
        fresh = terminated | truncated
        assert (env.envs.age[fresh] == 0).all() and (obs[fresh, 0] - 1.25).abs().max() <= 0.005 if fresh.any() else True
        assert torch.equal(obs[~fresh], final_obs[~fresh])
        ends += torch.tensor([terminated.sum(), truncated.sum()])
    assert ends.min() > 0


@warp
def test_a_diverged_world_terminates_and_does_not_poison_the_others():
    env = VectorEnv("HalfCheetah-v5", 3, CPU, "warp")
    env.reset(1)
    env.envs.qpos[1] = torch.nan
    obs, reward, terminated, _, final_obs = env.step(torch.zeros(3, 6))
    assert terminated.tolist() == [False, True, False] and reward[1] == 0 and not final_obs[1].any()
    for _ in range(3):
        assert obs.isfinite().all() and reward.isfinite().all()
        obs, reward, terminated, *_ = env.step(torch.zeros(3, 6))
        assert not terminated.any()


def may_touch(model, a, b):
    """MuJoCo's rule for two geoms: one's type meets the other's affinity, and no limb touches the one it hangs on."""
    one, other = model.geom_bodyid[[a, b]]
    neighbours = model.body_parentid[one] == other > 0 or model.body_parentid[other] == one > 0  # 0 is the world
    meet = model.geom_contype[[a, b]] & model.geom_conaffinity[[b, a]]
    return meet.any() and one != other and not neighbours


@warp
@pytest.mark.parametrize("env_id", MODELS)
def test_no_pose_has_more_contacts_than_warp_has_room_for(env_id):
    """Counted, for nothing looks for lost contacts while a run plays; and seen with all limbs in the floor."""
    env = make_env(env_id).unwrapped
    env.frame_skip = 1  # in more, a limb is thrown out of the floor again
    model, fast = env.model, ncdpo.WarpEnvs(env, math.inf, 64, 1)
    data, floor = fast.arrays[1], 2 * (model.ngeom - 1)
    most = 2 * sum(may_touch(model, *pair) for pair in itertools.combinations(range(model.ngeom), 2))
    assert sorted(model.geom_type) == [0] + [3] * (model.ngeom - 1)  # a plane and capsules: two points a pair,
    assert set(model.geom_condim) <= {1, 3} and not model.neq and not model.dof_frictionloss.any()  # of 4 rows at most
    assert floor <= most <= data.naconmax / 64 and 4 * most + model.njnt <= data.njmax  # and each joint has one limit
    for depth in (0, 1, 100):
        start = torch.empty_like(fast.qpos).uniform_(-1.5, 1.5), torch.zeros_like(fast.qvel)
        start[0][:, 1] -= depth
        restart(fast, torch.ones(64, dtype=torch.bool), *start)
        advance(fast, torch.zeros_like(fast.ctrl))
        assert not (data.overflow.numpy() & 31).any()  # the bits above are of solvers
    assert data.nacon.numpy() >= 64 * floor and data.nefc.numpy().min() >= 4 * floor


def test_warp_tells_that_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(UserError, match="pip install mujoco-warp"):
        VectorEnv("Hopper-v4", 1, CPU, "warp")


# ===== run folders ====================================================================================================

def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{key: cell for key, cell in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Whether two nested states are equal to the last bit, but for the time they took, which rows tell as well."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one.keys() - {"seconds", "rows"})
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of CartPole, and what its training printed."""
    runs = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(ncdpo, "print", lambda *words, **_: printed.append(" ".join(map(str, words))), raising=False)
        ncdpo.train(config(runs=str(runs)))
    return runs / "CartPole-v1__ncdpo__1", "\n".join(printed)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def each_update(monkeypatch):
    """A checkpoint after each update."""
    monkeypatch.setattr(ncdpo, "CHECKPOINT_SECONDS", -1)


def untrained(runs, **given):
    """A run folder whose policy has only seen one update."""
    ncdpo.train(config(runs=str(runs), num_steps=16, total_timesteps=32 * given.get("action_chunk", 1), **given))
    return next(runs.glob("*__1"))


def a_clone(folder, **given):
    """A run folder that was never trained, and its trainer, whose policy does not stand still."""
    trainer = ncdpo.Trainer(config(**given))
    shaken(trainer.agent)
    trainer.agent.obs_norm.update(torch.randn(9, trainer.env.obs_dim) * 3 + 1)
    folder.mkdir()
    ncdpo.save_config(trainer.config, folder)
    ncdpo.save_checkpoint(trainer, folder)
    return folder, trainer


def test_progress_tells_the_last_twenty_episodes_and_the_pace_since_it_was_started(tmp_path, monkeypatch, capsys):
    now = [0.0]

    def iterate(self):
        now[0] += 2
        self.done += 1
        return {"episodes": 10, "return": float(self.done), "step": 64 * self.done, "learning_rate": 1234567.25}

    monkeypatch.setattr(ncdpo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ncdpo.Trainer, "iterate", iterate)
    trainer = ncdpo.Trainer(config())
    trainer.done = 1  # as if resumed
    ncdpo.run_updates(trainer, tmp_path)
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    expected = ("128 steps (50%), return 2.0, 4", "192 steps (75%), return 2.5, 2", "256 steps (100%), return 3.5, 0")
    assert told == [", 32 steps/s, ".join(line.rsplit(", ", 1)) + " s left" for line in expected]
    assert [row["learning_rate"] for row in rows_of(tmp_path)] == ["1234567.25"] * 3
    ncdpo.run_updates(ncdpo.Trainer(config(total_timesteps=64 * 100)), tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 20  # each twentieth


def test_training_closes_all_environments_that_it_made(tmp_path, monkeypatch):
    made, closed = [], []
    reset = Tiny.reset
    monkeypatch.setattr(Tiny, "reset", lambda self, **given: made.append(self) or reset(self, **given))
    monkeypatch.setattr(Tiny, "close", lambda self: closed.append(self), raising=False)
    ncdpo.train(config(env="Tiny-v0", runs=tmp_path))
    assert {id(task) for task in made} == {id(task) for task in closed} and len(closed) == 2 + 3 * 2


def test_an_episode_that_was_cut_off_tells_no_success(own, tmp_path):
    run, _ = a_clone(tmp_path / "run", env=own(Tiny, steps=10**6))
    assert np.isnan(ncdpo.evaluate(run, episodes=2, max_steps=20)["mean action"]["success"]).all()


def test_an_evaluation_is_described_by_mean_spread_and_range():
    values = {"return": np.array([1.0, 3]), "length": np.array([5.0, 7]), "success": np.array([1.0, 0])}
    returns, lengths = "return 2.00 +- 1.00 (min 1.00, max 3.00)", "length 6.00 +- 1.00 (min 5.00, max 7.00)"
    assert ncdpo.describe({"exploring": values}) == f"    exploring: {returns}, {lengths}, success 50.0%"
    values["success"] = np.array([1.0, np.nan])  # one was cut off
    assert ncdpo.describe({"exploring": values}) == f"    exploring: {returns}, {lengths}"
    values["return"] = np.array([1234.56, 1234.56, 0.123456])  # small returns keep three digits
    assert "length 100.0 " in ncdpo.describe({"exploring": values | {"length": np.full(2, 99.96)}})
    assert "return 823.1 +- 581.9 (min 0.123, max 1234.6)" in ncdpo.describe({"exploring": values})


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_that_began_with_a_clone_is_resumed_without_it(tmp_path, monkeypatch, stopped):
    """Also one that was stopped in its first update, which looks like the clone."""
    def interrupted(self):
        raise KeyboardInterrupt

    clone, _ = a_clone(tmp_path / "clone", env="TinyBox-v0")
    if stopped:
        monkeypatch.setattr(ncdpo.Trainer, "iterate", interrupted)
    flags = ["--init-from", str(clone), "--total-timesteps", "128", "--runs", str(tmp_path / "runs")]
    assert main(flags) == (130 if stopped else 0)
    monkeypatch.undo()
    shutil.rmtree(clone)
    run, = (tmp_path / "runs").iterdir()
    assert main(["--resume", str(run), "--total-timesteps", "192"]) == 0 and len(rows_of(run)) == 3


def test_resuming_seeds_every_device_anew(tmp_path, monkeypatch):
    run, _ = a_clone(tmp_path / "run")
    torch.save(checkpoint_of(run) | {"update": 3}, run / "checkpoint.pt")
    trainer, seeds, seed = ncdpo.Trainer(config()), [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    ncdpo.resume_from(trainer, run)
    assert 1_003 in seeds


def test_a_checkpoint_of_a_gpu_is_loaded_without_one(run, monkeypatch):
    load, places = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *path, **how: places.append(how["map_location"]) or load(*path, **how))
    ncdpo.load_agent(run)
    assert places == ["cpu"]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_tensor_is_made_on_the_device_of_the_others(algo):
    trainer = ncdpo.Trainer(config(env="TinyBox-v0", algo=algo, action_chunk=2, total_timesteps=512))
    rollout, policy, obs = trainer.play(), trainer.agent.policy, torch.randn(9, 6)
    with torch.device("meta"):  # where a tensor lands that names no device
        batch, _ = trainer.make_batch(rollout)
        ncdpo.ppo_update(trainer.loss, batch, trainer.optimizer)
        sample = policy.sample(obs)
        if algo != "ppo":
            policy.bc_loss(obs, sample[0])
    assert {x.device.type for x in sample} == {"cpu"}


@pytest.mark.parametrize("algo, env", [("ncdpo", "CartPole-v1"), ("dppo", "Pendulum-v1"), ("ppo", "Hopper-v4")])
def test_same_seed_gives_the_same_metrics_and_another_seed_gives_others(tmp_path, algo, env):
    def metrics(seed, name):
        ncdpo.train(config(algo=algo, env=env, seed=seed, runs=tmp_path / name, total_timesteps=128, episodes=1))
        return rows_of(next((tmp_path / name).iterdir()))

    one, again, other = metrics(1, "one"), metrics(1, "again"), metrics(2, "other")
    assert len(one) == 2 and one == again
    assert all(a["value_loss"] != b["value_loss"] for a, b in zip(one, other))


def test_a_run_is_never_overwritten_and_its_name_is_that_of_a_folder(tmp_path, run):
    before = contents(run)
    c = config(runs=tmp_path, seed=9)
    names = []
    for _ in range(3):
        names.append(ncdpo.new_run_folder(c).name)
        (tmp_path / names[-1] / "mine").write_text(names[-1])
    assert names == ["CartPole-v1__ncdpo__9", "CartPole-v1__ncdpo__9-2", "CartPole-v1__ncdpo__9-3"]
    assert all((tmp_path / name / "mine").read_text() == name for name in names) and contents(run) == before
    game = config(env="notebooks.games:football?n_blue_agents=3", runs=tmp_path, algo="ppo")
    assert ncdpo.new_run_folder(game).name == "notebooks.games_football__ppo__1"


def test_config_json_has_the_fields_and_the_versions(run):
    saved = json.loads((run / "config.json").read_text())
    versions = saved.pop("versions")
    assert ncdpo.Config(**saved) == ncdpo.load_config(run) == config(runs=saved["runs"])
    assert versions.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert versions.pop("mujoco") == importlib.metadata.version("mujoco")
    # a package may tell its build (+cpu) in one place and not in the other
    found = {module.__name__: module.__version__.split("+")[0] for module in (torch, gym, np)}
    assert {name: version.split("+")[0] for name, version in versions.items()} == found


def test_checkpoint_restores_everything(run, tmp_path):
    trainer, saved = ncdpo.Trainer(config(total_timesteps=512)), checkpoint_of(run)
    ncdpo.save_checkpoint(trainer, tmp_path)
    fresh = checkpoint_of(tmp_path)
    assert not any(same(fresh[name], saved[name]) for name in ("agent", "optimizer", "random", "update"))
    ncdpo.resume_from(trainer, run)
    ncdpo.save_checkpoint(trainer, tmp_path)
    assert same(checkpoint_of(tmp_path), saved) and torch.equal(torch.get_rng_state(), saved["random"])
    assert trainer.seconds == saved["seconds"] > 0
    assert saved["agent"]["obs_norm.count"] == saved["agent"]["reward_norm.count"] == 256
    row = trainer.iterate()
    assert (row["update"], row["step"]) == (5, 320) and row["learning_rate"] == pytest.approx(5e-4 * (1 - 4 / 8))


def test_checkpoints_are_written_at_the_start_every_ten_seconds_and_at_the_end(tmp_path, monkeypatch):
    iterate, save, saved, now = ncdpo.Trainer.iterate, ncdpo.save_checkpoint, [], [0.0]

    def four_seconds(self):
        now[0] += 4
        return iterate(self)

    monkeypatch.setattr(ncdpo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(ncdpo.Trainer, "iterate", four_seconds)
    monkeypatch.setattr(ncdpo, "save_checkpoint", lambda trainer, run: saved.append(trainer.done) or save(trainer, run))
    ncdpo.train(config(runs=tmp_path, num_steps=16, total_timesteps=32 * 8))
    assert saved == [0, 3, 6, 8]


def test_resumed_run_equals_one_that_was_never_interrupted(tmp_path, monkeypatch):
    """In an environment whose episodes end with each rollout and start alike, nothing may differ by a bit."""
    c = config(env="TinyFixed-v0", total_timesteps=320, runs=tmp_path / "whole")
    ncdpo.train(c)
    iterate = ncdpo.Trainer.iterate

    def power_cut(self):
        if self.done == 3:
            raise MemoryError
        monkeypatch.setattr(ncdpo, "CHECKPOINT_SECONDS", -1 if self.done == 1 else math.inf)
        return iterate(self)

    monkeypatch.setattr(ncdpo.Trainer, "iterate", power_cut)
    c.runs = str(tmp_path / "cut")
    with pytest.raises(MemoryError):
        ncdpo.train(c)
    monkeypatch.undo()
    whole, cut = (tmp_path / name / "TinyFixed-v0__ncdpo__1" for name in ("whole", "cut"))
    assert checkpoint_of(cut)["update"] == 2 and len(rows_of(cut)) == 3  # a row that no checkpoint has
    history = ncdpo.train(c, resume=cut)
    assert history["update"].tolist() == [1, 2, 3, 4, 5] and (np.diff(history["seconds"]) > 0).all()
    assert rows_of(cut) == rows_of(whole) and same(checkpoint_of(cut), checkpoint_of(whole))


def test_resumed_run_plays_new_episodes(run):
    starts, state = [], checkpoint_of(run)
    for update in (4, 2):  # nor does it play the same ones wherever it goes on from
        torch.save({**state, "update": update}, run / "checkpoint.pt")
        trainer = ncdpo.Trainer(config(total_timesteps=512))
        starts += [trainer.obs] * (not starts)
        ncdpo.resume_from(trainer, run)
        starts.append(trainer.obs)
    assert len(torch.cat(starts).unique()) == 3 * starts[0].numel()


def test_runs_of_two_seeds_go_on_with_episodes_of_their_own(tmp_path):
    starts = []
    for seed in (1, 2):
        run, trainer = a_clone(tmp_path / str(seed), env="Tiny-v0", seed=seed)
        trainer.done = 1
        ncdpo.save_checkpoint(trainer, run)
        ncdpo.resume_from(trainer, run)
        starts.append(trainer.obs[:, 0])
    assert not torch.isin(*starts).any()


def test_metrics_have_a_column_for_each_thing_measured_and_an_empty_cell_is_not_a_number(run, tmp_path):
    history = ncdpo.read_metrics(run)
    assert list(history) == ncdpo.COLUMNS and all(len(column) == 4 for column in history.values())
    unknown = [name for name, column in history.items() if np.isnan(column).all()]
    assert unknown == ["success", "sigma", "chain_std"]  # CartPole knows no success, and a softmax has no sigma
    assert history["step"].tolist() == [64, 128, 192, 256] and (np.diff(history["seconds"], prepend=0) > 0).all()
    (tmp_path / "metrics.csv").write_text(",".join(ncdpo.COLUMNS) + "\n1,64" + "," * (len(ncdpo.COLUMNS) - 2) + "\n")
    history = ncdpo.read_metrics(tmp_path)
    assert history["step"] == 64 and all(np.isnan(history[name]).all() for name in ncdpo.COLUMNS[2:])


WAYS = ["exploring", "mean action", "zero noise"]


def test_printed_evaluation_is_that_of_a_later_one_in_python_and_on_the_command_line(finished, capsys):
    run, printed = finished
    later = ncdpo.describe(ncdpo.evaluate(run, episodes=2)).splitlines()
    assert [line.split(":")[0].strip() for line in later] == WAYS
    assert all("return" in line and line in printed.splitlines() for line in later)
    assert main(["--evaluate", str(run)]) == 0 and capsys.readouterr().out.splitlines() == later


def test_evaluation_leaves_random_state_and_run_alone(run):
    before, files = torch.get_rng_state(), contents(run)
    np.random.seed(0)
    numbers = np.random.get_state()[1].copy()
    one, two = ncdpo.evaluate(run, episodes=3), ncdpo.evaluate(run, episodes=3)
    assert all(np.array_equal(one[way]["return"], two[way]["return"]) for way in WAYS) and contents(run) == files
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_evaluation_plays_one_whole_episode_in_each_environment(tmp_path, algo):
    history = ncdpo.train(config(env="Tiny-v0", algo=algo, runs=tmp_path, total_timesteps=64, episodes=1))
    assert history["length"] == 8 and history["return"] >= 8 * 5
    result = ncdpo.evaluate(tmp_path / f"Tiny-v0__{algo}__1", episodes=5)
    assert list(result) == WAYS
    for way in WAYS:
        assert result[way]["length"].tolist() == [8] * 5
        assert len(set(result[way]["return"])) == 5  # each has a start of its own, which is in its rewards
        assert (8 * 5 <= result[way]["return"]).all() and (result[way]["return"] <= 8 * 8).all()


def test_evaluation_counts_first_episodes_and_leaves_the_heads_noise_out_where_it_says_so(run, monkeypatch):
    step, sample, played = VectorEnv.step, ncdpo.Categorical.sample, []
    monkeypatch.setattr(VectorEnv, "step", lambda *given: played.append(step(*given)) or played[-1])
    monkeypatch.setattr(ncdpo.Categorical, "sample", lambda *given: sample(*given) * given[-1].any(-1))
    result = ncdpo.evaluate(run, episodes=8)
    ended = torch.stack([terminated | truncated for _, _, terminated, truncated, _ in played]).int()
    for way, part in zip(WAYS, ended.split(8, 1), strict=True):
        assert result[way]["length"].tolist() == result[way]["return"].tolist() == (part.argmax(0) + 1).tolist()
        # a cart that is always pushed to the left falls within 11 steps
        assert (result[way]["length"].max() <= 11) == (way != "exploring")
    assert len(played) == max(result[way]["length"].max() for way in WAYS)


def test_evaluation_plays_with_standard_noise_that_is_drawn_anew_each_step(tmp_path, monkeypatch):
    run, _ = a_clone(tmp_path / "run", env="TinyWide-v0")
    given, act = [], ncdpo.Agent.act
    monkeypatch.setattr(ncdpo.Agent, "act", lambda agent, obs, *noise: (
        given.append([x.clone() for x in noise]), act(agent, obs, *noise))[1])
    ncdpo.evaluate(run, episodes=50)
    omega, noise = (torch.stack(x) for x in zip(*given))  # (steps, 3 x 50, ...)
    for drawn in (omega[:, :100], noise[:, :50]):
        assert len(drawn.unique()) > 0.99 * drawn.numel() and abs(drawn.mean()) < 0.1 and abs(drawn.var() - 1) < 0.1
    assert not noise[:, 50:].any() and not omega[:, 100:].any()


def test_evaluation_tells_the_success_of_each_episode(own, tmp_path, monkeypatch):
    class Told(Tiny):
        def step(self, action):
            return *super().step(action)[:4], {"success": self.start < 0.5}

    run, _ = a_clone(tmp_path / "run", env=own(Told))
    starts, reset = [], VectorEnv.reset
    monkeypatch.setattr(VectorEnv, "reset", lambda *g, **more: starts.append(reset(*g, **more)) or starts[-1])
    result = ncdpo.evaluate(run, episodes=8)
    expected = (starts[0][:8, 0] < 0.5).float().tolist()
    assert 0 < sum(expected) < 8 and all(result[way]["success"].tolist() == expected for way in WAYS)


def test_evaluation_of_a_task_without_an_end_stops_at_max_steps(tmp_path):
    run = untrained(tmp_path, env="Tiny-v0")
    result = ncdpo.evaluate(run, episodes=2, max_steps=9, env="TinyEndless-v0")
    assert [values["length"].tolist() for values in result.values()] == 3 * [[9, 9]]


def test_max_steps_holds_also_where_some_episodes_end(own, tmp_path):
    class Some(Tiny):
        def step(self, action):
            assert self.t < 100
            obs, reward, _, *rest = super().step(action)
            return obs, reward, self.t == 3 and self.start < 0.5, *rest

    run, _ = a_clone(tmp_path / "run", env=own(Some, steps=None))
    assert set(ncdpo.evaluate(run, episodes=8, max_steps=20)["mean action"]["length"]) == {3, 20}


def test_the_ways_of_an_evaluation_of_a_game_are_thirds_of_its_rows(worlds, tmp_path, monkeypatch):
    run, _ = a_clone(tmp_path / "run", env="worlds:some")
    given, act = [], ncdpo.Agent.act
    monkeypatch.setattr(ncdpo.Agent, "act", lambda self, obs, *noise: given.append(noise) or act(self, obs, *noise))
    ncdpo.evaluate(run, episodes=2)  # of three agents each
    omega, noise = (x.flatten(1).any(1).tolist() for x in given[0])
    assert omega == [True] * 12 + [False] * 6 and noise == [True] * 6 + [False] * 12


def test_a_run_of_warp_is_evaluated_where_there_is_none(tmp_path, monkeypatch):
    run, _ = a_clone(tmp_path / "run", env="Hopper-v4")
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    assert list(ncdpo.evaluate(run, vector="warp")) == WAYS


def test_evaluation_normalises_as_training_did_and_starts_elsewhere_in_each_way_alike(run, monkeypatch):
    reset, step, mean, norm = VectorEnv.reset, VectorEnv.step, ncdpo.NCDPO.mean, checkpoint_of(run)["agent"]
    starts, shown, seen = [], [], []
    monkeypatch.setattr(VectorEnv, "reset", lambda *given, **more: starts.append(reset(*given, **more)) or starts[-1])
    monkeypatch.setattr(VectorEnv, "step", lambda *given: (result := step(*given), shown.append(result[0]))[0])
    monkeypatch.setattr(ncdpo.NCDPO, "mean", lambda self, obs, omega: seen.append(obs) or mean(self, obs, omega))
    ncdpo.Trainer(config())
    monkeypatch.delattr(ncdpo.Normalizer, "update")
    ncdpo.evaluate(run, episodes=2)
    training, start = starts
    ways = start.split(2)
    assert len(ways) == 3 and all(torch.equal(way, ways[0]) for way in ways) and len(start.unique()) == 2 * 4
    assert not torch.isin(training, start).any()
    shown = ((torch.cat([start, *shown]) - norm["obs_norm.mean"]) / norm["obs_norm.var"].sqrt()).clamp(-10, 10)
    assert torch.cdist(torch.cat(seen).double(), shown.double()).min(1).values.max() < 1e-4


@pytest.mark.parametrize("algo, fields", [("ncdpo", {}), ("ncdpo", dict(sampling_steps=1)), ("dppo", {})], ids=str)
def test_zero_noise_is_the_chain_run_on_no_noise_in_a_loop_over_the_task(tmp_path, monkeypatch, algo, fields):
    """Also with a chain of fewer steps than the run's, from the same start as the other ways."""
    run, _ = a_clone(tmp_path / "run", env="TinyBox-v0", algo=algo, action_chunk=2, denoising_steps=3)
    reset, starts = VectorEnv.reset, []
    monkeypatch.setattr(VectorEnv, "reset", lambda *given, **more: starts.append(reset(*given, **more)) or starts[-1])
    result = ncdpo.evaluate(run, episodes=3, **fields)
    _, agent, _ = ncdpo.load_agent(run, **fields)
    low, high, expected = np.tile(BOX.low, 2), np.tile(BOX.high, 2), []
    assert agent.policy.K == fields.get("sampling_steps", 3)
    for obs in starts[0][-3:]:
        task, rewards = gym.make("TinyBox-v0"), []
        task.reset()
        task.unwrapped.start = obs[0].item()
        while len(rewards) < 8:
            with torch.no_grad():
                mean = agent.policy.chain(agent.obs_norm(obs[None]), torch.zeros(1, agent.policy.K, 4))[-1][0]
            chunk = low + (mean.clamp(-1, 1).numpy() + 1) / 2 * (high - low)
            for action in chunk.reshape(2, 2):
                obs, reward, *_ = task.step(action.astype(np.float32))
                rewards.append(reward)
            obs = torch.as_tensor(obs).flatten()
        expected.append(sum(rewards))
    np.testing.assert_allclose(result["zero noise"]["return"], expected, rtol=1e-5)
    assert not np.isclose(result["zero noise"]["return"], result["mean action"]["return"], rtol=1e-3).any()
    faint = ncdpo.evaluate(run, episodes=3, noise_scale=1e-9, **fields)["mean action"]["return"]
    assert algo == "dppo" or np.allclose(faint, expected, rtol=1e-5)  # DPPO's steps have a floor of min_std


def test_a_run_is_evaluated_with_other_fields(tmp_path, capsys):
    """On the command line: in another task of the same spaces, with fewer steps, with less noise."""
    run, _ = a_clone(tmp_path / "run", env="TinyBox-v0")
    result = ncdpo.describe(ncdpo.evaluate(run, episodes=3, env="TinyEnds-v0", sampling_steps=2, noise_scale=0.5))
    flags = "--env TinyEnds-v0 --sampling-steps 2 --noise-scale 0.5 --episodes 3".split()
    assert main(["--evaluate", str(run), *flags]) == 0 and capsys.readouterr().out == result + "\n"
    assert result.count("length 7.00") == 3  # where it was trained an episode has 8 steps
    fields = [{}, dict(sampling_steps=2), dict(noise_scale=0.5)]
    exploring = [ncdpo.evaluate(run, episodes=3, **given)["exploring"]["return"].tolist() for given in fields]
    assert all(one != other for one, other in itertools.combinations(exploring, 2))
    assert "other observations or actions" in complaint(capsys, "--evaluate", run, "--env", "Tiny-v0")


@pytest.mark.parametrize("after", [0, 5])
def test_ctrl_c_says_how_to_go_on_and_loses_only_the_updates_since_the_checkpoint(tmp_path, monkeypatch, capsys, after):
    """There is a checkpoint of the start, and one of update 3."""
    iterate = ncdpo.Trainer.iterate

    def interrupted(self):
        if self.done == after:
            signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(ncdpo, "CHECKPOINT_SECONDS", -1 if self.done == 2 else math.inf)
        return iterate(self)

    monkeypatch.setattr(ncdpo.Trainer, "iterate", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's background ignores it
    code = main(arguments("CartPole-v1", tmp_path, "--total-timesteps", "192"))
    signal.signal(signal.SIGINT, handler)
    run, error, kept = tmp_path / "CartPole-v1__ncdpo__1", capsys.readouterr().err, 3 if after else 0
    assert error.startswith("ncdpo: stopped") and f"update {kept}" in error and f"--resume {run}" in error
    assert code == 130 and error.count("\n") == 1
    assert checkpoint_of(run)["update"] == kept and len(rows_of(run)) == after
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    assert [row["update"] for row in rows_of(run)] == ["1", "2", "3", "4", "5", "6"]


def test_one_process_at_a_time_writes_into_a_folder_but_many_may_evaluate_it(run, capsys, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def unlocked(*given):
        raise OSError(errno.ENOSYS, "no locks")

    with ncdpo.locked(run):
        before = contents(run)
        assert "another process" in complaint(capsys, "--resume", run, "--total-timesteps", "512")
        assert main(["--evaluate", str(run)]) == 0 and contents(run) == before
    assert main(["--resume", str(run), "--total-timesteps", "320"]) == 0 and len(rows_of(run)) == 5
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", unlocked)
        assert main(["--resume", str(run), "--total-timesteps", "384"]) == 0  # a network disk that has no locks
    (run / "lock").unlink()
    (run / "lock").mkdir()  # cannot be opened, as in a folder of somebody else, but for root, too
    assert "cannot write into" in complaint(capsys, "--resume", run, "--total-timesteps", "640")


# ===== command line ===================================================================================================

def arguments(env, runs, *more):
    return ["--env", env, "--runs", str(runs), "--device", "cpu", "--num-envs", "2", "--hidden", "8",
            "--num-steps", "16", "--minibatch-size", "16", "--total-timesteps", "128", "--episodes", "1", *more]


def complaint(capsys, *flags):
    """What the program says when it refuses: one line, behind the usage or how a run that was stopped goes on."""
    capsys.readouterr()
    try:
        code = main([str(flag) for flag in flags])
    except SystemExit as error:  # argparse's own
        code = error.code
    error = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"(ncdpo: stopped.+\n)?ncdpo: .+\.\n|usage: .+\n.+: error: .+\n", error), error
    return error


SOURCE = ncdpo.inspect.getsource(ncdpo.Config)  # parse reads it each time, which would be half the time of these tests
ncdpo.inspect = types.SimpleNamespace(getsource=lambda what: SOURCE)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA")


@pytest.mark.parametrize("flags, words", [
    (["--env", "HalfCheeta-v4"], "Did you mean: `HalfCheetah`?"),
    (["--env", "HalfCheetah-v9"], "`v5`"),
    (["--env", "Nothing-like-it"], "cannot make Nothing-like-it"),
    (["--env", "nowhere:Thing-v0"], "nowhere"),
    (["--env", "Hopper-v3"], "Hopper-v3"),  # its simulator is gone
    (["--env", "TinyDict-v0"], "only Box"),
    (["--env", "TinyMulti-v0"], "Discrete or"),
    (["--env", "TinyUnbounded-v0"], "bounded flat Box"),
    (["--denoising-steps", "0"], "--denoising-steps"),
    (["--denoising-steps", "101"], "100"),
    (["--sampling-steps", "6"], "--denoising-steps"),
    (["--total-timesteps", "100"], "--total-timesteps"),
    (["--num-envs", "many"], "--num-envs"),
    (["--episodes", "0"], "--episodes"),
    (["--action-chunk", "2"], "--action-chunk 1"),  # of Discrete actions
    (["--env", "TinyBox-v0", "--action-chunk", "2", "--total-timesteps", "2048"], "a rollout of 4096 steps"),
    (["--num-envs", "2", "--minibatch-size", "1", "--total-timesteps", "64"], "--minibatch-size"),
    (["--num-envs", "1", "--num-steps", "1", "--total-timesteps", "64"], "--num-steps"),  # nothing to normalise by
    (["--critic-warmup", "9"], "--critic-learning-rate"),
    (["--critic-warmup", "9", "--critic-learning-rate", "1e-3", "--total-timesteps", "8192"], "9 of --critic-warmup: give 20480"),
    (["--algo", "sac"], "--algo"),
    (["--momentum", "0.9"], "--momentum"),
    (["--total", "5000"], "--total"),  # an abbreviation would be guessed
    (["--vector", "envpool"], "--vector"),
    (["--device", "nonsense"], "--device"),
    pytest.param(["--device", "cuda"], "--device", marks=no_cuda),
    (["--resume", "nowhere"], "nowhere"),
    (["--evaluate", "nowhere"], "nowhere"),
    (["--init-from", "nowhere"], "nowhere"),
    # a variable of the shell that is not set
    (["--resume", "", "--total-timesteps", "2048"], "'' is damaged, or no run folder"),
    (["--evaluate", "", "--total-timesteps", "2048"], "'' is damaged, or no run folder"),
    (["--init-from", "", "--total-timesteps", "2048"], "'' is damaged, or no run folder"),
    (["--resume", "one", "--evaluate", "other"], "not allowed with"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(tmp_path, capsys, flags, words):
    if not {"--env", "--resume", "--evaluate"} & set(flags):
        flags = ["--env", "CartPole-v1", *flags]
    assert words in complaint(capsys, "--runs", tmp_path / "runs", *flags)
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_an_exit_code_of_the_program(tmp_path):
    refused = run_python(tmp_path, HERE / "ncdpo.py", "--resume", "nowhere")
    assert refused.returncode == 2 and refused.stderr.startswith("ncdpo: ")


@no_cuda
def test_auto_is_the_gpu_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # it lies, so using one fails
    with pytest.raises(UserError, match="--device auto is not to be had"):
        ncdpo.Trainer(config(device="auto"))


def test_a_long_complaint_of_a_simulator_of_ones_own_is_told_to_its_end(monkeypatch, tmp_path, capsys):
    def make_vec(name, num_envs, device):
        raise ValueError(f"no {name}, but {', '.join(map(str, range(300)))}: give one of these")

    monkeypatch.setitem(sys.modules, "toys", types.SimpleNamespace(make_vec=make_vec))
    assert "give one of these" in complaint(capsys, *arguments("toys:Cube", tmp_path))


@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_runs_that_cannot_be_a_folder_is_told_before_anything_is_written(tmp_path, capsys, kind):
    runs = tmp_path / "runs"
    runs.write_text("mine") if kind == "a file" else runs.symlink_to(tmp_path / "nowhere" / "else")
    assert main(arguments("CartPole-v1", runs)) == 2
    assert "check --runs" in capsys.readouterr().err
    assert contents(tmp_path) == ({Path("runs"): b"mine"} if kind == "a file" else {})


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "foreign", "list", "harmful"])
def test_a_damaged_checkpoint_is_told_in_one_line(run, tmp_path, capsys, damage):
    class Harmful:
        def __reduce__(self):  # what its file does to whoever reads it
            return Path.touch, (run / "harm",)

    path = run / "checkpoint.pt"
    if damage == "missing":
        path.unlink()
    elif damage in ("foreign", "list", "harmful"):
        torch.save({"foreign": {"model": torch.ones(2)}, "list": [1, 2], "harmful": Harmful()}[damage], path)
    else:
        path.write_bytes({"empty": b"", "text": b"hello\n", "truncated": path.read_bytes()[:5000]}[damage])
    before = contents(tmp_path)
    for flag, *more in (["--evaluate"], ["--resume", "--total-timesteps", 512],
                        ["--init-from", "--total-timesteps", 256, "--runs", tmp_path / "runs"]):
        error = complaint(capsys, flag, run, *more)
        assert str(run) in error and len(error) < 500 + len(str(run)) and contents(tmp_path) == before


@pytest.mark.parametrize("name, value", [*((name, None) for name in ("update", "seconds", "optimizer", "random")),
                                         ("update", "x"), ("optimizer", {}), ("random", 1)])
def test_a_checkpoint_that_can_be_played_but_not_gone_on_from_is_told_in_one_line(run, capsys, name, value):
    torch.save(checkpoint_of(run) | {name: value}, run / "checkpoint.pt")
    before = contents(run)
    assert main(["--evaluate", str(run)]) == 0
    assert str(run) in complaint(capsys, "--resume", run, "--total-timesteps", "512") and contents(run) == before


@pytest.mark.parametrize("edit", [
    lambda saved: saved.update(algo="sac"), lambda saved: saved.update(gamma="0.9"),
    lambda saved: saved.update(seed=None), lambda saved: saved.pop("eta"), lambda saved: saved.update(target_kl=0.1),
    lambda saved: saved.pop("versions"), lambda saved: saved.update(versions=None), lambda saved: saved.clear(),
    list, "{", "[1]"])
def test_a_config_json_that_was_edited_or_is_older_is_told_in_one_line(run, tmp_path, capsys, edit):
    path = run / "config.json"
    text = edit
    if callable(edit):
        saved = json.loads(path.read_text())
        text = json.dumps(edit(saved) if edit is list else (edit(saved), saved)[1])
    path.write_text(text)
    before = contents(tmp_path)
    for flag, *more in (["--evaluate"], ["--resume", "--total-timesteps", 512],
                        ["--init-from", "--total-timesteps", 256, "--runs", tmp_path / "runs"]):
        assert str(run) in complaint(capsys, flag, run, *more) and contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["torn", "older", "newer", "rows reordered", "columns reordered", "headerless",
                                    "empty", "missing"])
def test_resume_writes_the_rows_of_its_checkpoint_whatever_became_of_metrics(run, damage):
    path = run / "metrics.csv"
    whole = path.read_text()
    header, *rows = whole.splitlines()
    lines = {"torn": [header, *rows[:3], rows[3][:20]], "older": [header, *rows[:3]], "headerless": rows,
             "rows reordered": [header, rows[1], rows[0], *rows[2:]], "empty": [], "missing": [],
             "newer": [header, *rows, rows[3].replace("4", "5", 1)],
             "columns reordered": [",".join(line.split(",")[::-1]) for line in (header, *rows)]}[damage]
    path.write_text("\n".join(lines))
    if damage == "missing":
        path.unlink()
    assert main(["--resume", str(run), "--total-timesteps", "512", "--episodes", "1"]) == 0
    assert path.read_text().startswith(whole) and [row["update"] for row in rows_of(run)] == list("12345678")
    assert path.read_text().splitlines()[1:] == checkpoint_of(run)["rows"]


def test_another_mujoco_is_told_and_the_run_goes_on(run, capsys):
    path = run / "config.json"
    edited = path.read_text().replace(f'"mujoco": "{importlib.metadata.version("mujoco")}"', '"mujoco": "3.0"')
    for line in (["--evaluate", str(run)], ["--resume", str(run), "--total-timesteps", "320"]):
        path.write_text(edited)
        assert main(line) == 0
        told = set(capsys.readouterr().err.splitlines())
        assert len(told) == 1 and f"{run} is of MuJoCo 3.0" in told.pop()
    assert main(["--evaluate", str(run)]) == 0 and not capsys.readouterr().err  # now it is of this one


def test_resume_refuses_another_task_or_policy_or_chain(run, capsys, monkeypatch):
    """Also where the weights would fit: a run must not silently become another one."""
    before, kept = contents(run), ncdpo.load_config(run)
    assert ncdpo.MAY_CHANGE == {"total_timesteps", "episodes", "device", "vector"}
    for name in vars(kept).keys() - ncdpo.MAY_CHANGE:
        other = dataclasses.replace(kept, total_timesteps=4096)
        setattr(other, name, "another")
        with pytest.raises(UserError, match=f"leave out --{name.replace('_', '-')}$"):
            ncdpo.train(other, resume=run)
    for flag, value in (("--env", "Tiny-v0"), ("--algo", "dppo"), ("--temperature", "0.5")):
        assert f"leave out {flag}." in complaint(capsys, "--resume", run, "--total-timesteps", "4096", flag, value)
    monkeypatch.setitem(gym.registry, "CartPole-v1", gym.registry["Tiny-v0"])  # the task itself has changed
    assert "other observations or actions" in complaint(capsys, "--resume", run, "--total-timesteps", "4096")
    assert contents(run) == before


def test_resume_refuses_a_finished_run_and_goes_on_with_more_steps_and_another_simulator(run, capsys):
    before = contents(run)
    assert "--total-timesteps" in complaint(capsys, "--resume", run) and contents(run) == before
    assert main(["--resume", str(run), "--total-timesteps", "320", "--vector", "sync", "--device", "cpu",
                 "--episodes", "1"]) == 0
    assert len(rows_of(run)) == 5 and ncdpo.load_config(run).vector == "sync"


@pytest.mark.parametrize("flags", [["--episodes", "0"], ["--episodes", "-3"], ["--eta", "2"],
                                   ["--env", "Pendulum-v1"]], ids=" ".join)
def test_evaluation_refuses_what_cannot_be(run, capsys, flags):
    assert flags[1] in complaint(capsys, "--evaluate", run, *flags)


def test_an_episode_that_does_not_end_is_told_while_an_evaluation_waits_for_it(tmp_path, own, capsys):
    endless = own(Tiny, steps=None, action_space=BOX)
    run, _ = a_clone(tmp_path / "run", env=endless, action_chunk=100, num_steps=2, total_timesteps=400, episodes=1)
    ncdpo.evaluate(run, max_steps=9_900)
    assert not capsys.readouterr().err
    result = ncdpo.evaluate(run, max_steps=10_100)
    assert capsys.readouterr().err.count("10,000 steps and no end, cut off after 10,100; give the task a limit") == 1
    assert result["exploring"]["length"].tolist() == [10_100]


@pytest.mark.parametrize("flags", [["--algo", "ppo"], ["--min-std", "0.7"], ["--hidden", "64"],
                                   ["--predict", "epsilon"], ["--denoising-steps", "9"],
                                   ["--activation", "tanh"], ["--action-chunk", "2"]], ids=" ".join)
def test_evaluation_refuses_another_network(run, capsys, flags):
    """Also where the weights would fit: they would play another policy."""
    assert f"leave out {flags[0]}." in complaint(capsys, "--evaluate", run, *flags)


def test_evaluation_takes_a_device_and_stays_on_the_cpu(run, capsys):
    assert main(["--evaluate", str(run), "--device", "cuda"]) == 0 and capsys.readouterr().out.count("return") == 3


@pytest.mark.parametrize("given", [
    dict(algo="sac"), dict(predict="x0"), dict(gamma=1.5), dict(eta=-0.5), dict(gae_lambda=1.1),
    dict(gamma_denoising=-0.1), dict(ent_coef=-1), dict(num_envs=0), dict(num_steps=-1), dict(update_epochs=0),
    dict(seed=-1), dict(learning_rate=math.nan), dict(clip_coef=math.inf), dict(clip_coef=1e308),
    dict(minibatch_size=64.5), dict(learning_rate="3e-4"), dict(mean_log_prob="no"), dict(hidden=10**6),
    dict(num_steps=2 * 10**9), dict(env=""), dict(env=None), dict(runs=3), dict(critic_learning_rate=0)], ids=str)
def test_configurations_made_in_python_are_checked_too(given):
    with pytest.raises(UserError, match="--" + next(iter(given)).replace("_", "-")):
        config(**given)


def test_configurations_take_numbers_of_other_kinds_and_keep_plain_ones():
    c = ncdpo.Config(learning_rate=np.float64(3e-4), gamma=1, seed=np.int64(3), runs=Path("x"), minibatch_size=64.0,
                     critic_learning_rate=np.float32(0.5), sampling_steps=np.int32(2), init_from=Path("y"))
    wanted = dict(learning_rate=3e-4, gamma=1.0, seed=3, runs="x", minibatch_size=64, critic_learning_rate=0.5,
                  sampling_steps=2, init_from="y")
    for name, value in wanted.items():
        assert getattr(c, name) == value and type(getattr(c, name)) is type(value), name
    assert json.loads(json.dumps(vars(c))) == vars(c) and c == ncdpo.Config(**vars(c))
    assert ncdpo.Config(seed=2**31 - 1).seed == 2**31 - 1  # what torch and NumPy take


def test_settings_from_python_are_those_of_the_run_to_start_from_as_on_the_command_line(run):
    before = ncdpo.load_config(run)
    made = ncdpo.Config.for_task(init_from=run, gamma=0.5)
    assert made == ncdpo.parse(["--init-from", str(run), "--gamma", "0.5"])[0] == dataclasses.replace(
        before, init_from=str(run), gamma=0.5, runs="runs", total_timesteps=ncdpo.Config.total_timesteps)
    assert before.hidden == made.hidden != ncdpo.Config.hidden and before.runs != "runs"
    assert ncdpo.Config.for_task("Tiny-v0", init_from=run, runs="x").env == "Tiny-v0"  # another task of its spaces


def test_defaults_are_the_presets_of_the_task_but_for_what_is_given():
    hopper = ncdpo.PRESETS["Hopper"]
    parsed = ncdpo.parse(["--env", "Hopper-v4", "--gamma", "0.5"])[0]
    made = ncdpo.Config.for_task("x/Hopper-v5", gamma=0.5)
    for c in (parsed, made):
        assert (c.gamma, c.init_std, c.min_std) == (0.5, hopper["init_std"], hopper["min_std"])
        assert c.learning_rate == ncdpo.Config.learning_rate and hopper["init_std"] != ncdpo.Config.init_std
    c = ncdpo.parse(["--env", "Hopper-v4", "--gamma", "0.5"], preset=dict(gamma=0.7, action_chunk=4))[0]
    assert c == ncdpo.Config("Hopper-v4", gamma=0.5, action_chunk=4)  # a script's own defaults
    assert ncdpo.parse([])[0] == ncdpo.Config.for_task() == ncdpo.Config(**ncdpo.PRESETS["HalfCheetah"])


def test_the_presets_are_of_the_tasks_that_are_batched_and_those_that_notebook_4_shows():
    assert set(ncdpo.PRESETS) == {name.rsplit("-v", 1)[0] for name in MUJOCO}
    cells = json.loads((HERE / "notebooks" / "04_ppo_from_scratch.ipynb").read_text())["cells"]
    shown = "\n".join("".join(out["data"].get("text/markdown", "")) for cell in cells for out in cell.get("outputs", [])
                      if "data" in out)
    head, *rows = re.findall(r"^\| (setting|[a-z_]+) \| (.+) \|$", shown[shown.index("| setting |"):], re.MULTILINE)
    rows = rows[:len({name for preset in ncdpo.PRESETS.values() for name in preset})]
    for i, env in enumerate(head[1].split(" | ")):
        assert {name: row.split(" | ")[i] for name, row in rows} == {
            name: str(getattr(ncdpo.Config.for_task(env), name)) for name, _ in rows}


@pytest.mark.parametrize("kept, flag", [(True, "--no-mean-log-prob"), (False, "--mean-log-prob")])
def test_a_bool_of_a_run_is_changed_either_way(tmp_path, kept, flag):
    ncdpo.save_config(config(mean_log_prob=kept), tmp_path)
    assert ncdpo.parse(["--init-from", str(tmp_path), flag])[0].mean_log_prob is not kept


def test_a_run_that_starts_from_another_takes_over_its_settings_but_not_its_end(tmp_path):
    kept = config(env="Pendulum-v1", eta=0.5, seed=7, action_chunk=3, runs="elsewhere", total_timesteps=77)
    ncdpo.save_config(kept, tmp_path)
    c, *others = ncdpo.parse(["--init-from", str(tmp_path), "--seed", "8"])
    new = dict(seed=8, init_from=str(tmp_path), total_timesteps=ncdpo.Config.total_timesteps, runs=ncdpo.Config.runs)
    assert c == dataclasses.replace(kept, **new) and others[:2] == [None, None]
    for flag in ("--resume", "--evaluate"):
        c, *others = ncdpo.parse([flag, str(tmp_path), "--total-timesteps=78"])
        assert c == dataclasses.replace(kept, total_timesteps=78) and others[2] == dict(total_timesteps=78)
        assert others[:2] == ([None, str(tmp_path)] if flag == "--resume" else [str(tmp_path), None])


def test_init_from_writes_a_run_of_its_own_and_leaves_the_clone_alone(tmp_path, monkeypatch):
    clone, trainer = a_clone(tmp_path / "clone", env="TinyBox-v0", gamma=0.9)
    before, update, started = contents(clone), ncdpo.run_updates, []

    def watched(new, run):
        started.append(same(new.agent.state_dict(), trainer.agent.state_dict()))
        return update(new, run)

    monkeypatch.setattr(ncdpo, "run_updates", watched)
    line = ["--init-from", str(clone), "--total-timesteps", "128", "--runs", str(tmp_path / "runs")]
    assert main(line) == 0 and contents(clone) == before and started == [True]
    run = tmp_path / "runs" / "TinyBox-v0__ncdpo__1"
    assert [row["update"] for row in rows_of(run)] == ["1", "2"] and ncdpo.load_config(run).gamma == 0.9


def test_help_says_what_each_field_is_and_its_default(capsys):
    source = (HERE / "ncdpo.py").read_text()
    node, = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    documented = {field.target.id: source.splitlines()[field.end_lineno - 1].split("  # ")[1]
                  for field in node.body if isinstance(field, ast.AnnAssign)}
    assert list(documented) == [field.name for field in dataclasses.fields(ncdpo.Config)] and len(documented) <= 36
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name, text in documented.items():
        assert f"--{name.replace('_', '-')}" in printed
        assert re.sub(r"\s", "", f"{text} [{getattr(ncdpo.Config, name)}]") in re.sub(r"\s", "", printed)


def test_writing_a_file_leaves_its_neighbours_alone(tmp_path):
    (tmp_path / "cheetah.tmp").write_text("of the user")
    ncdpo.write(tmp_path / "cheetah.gif", b"film")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "cheetah.tmp": "of the user", "cheetah.gif": "film"}


@pytest.mark.parametrize("file, nth", [("config", 1), ("metrics", 1), ("checkpoint", 1), ("checkpoint", 3)])
def test_a_full_disk_keeps_the_previous_file(run, capsys, monkeypatch, each_update, file, nth):
    before, write, calls = contents(run), Path.write_bytes, []

    def full(path, content):
        calls.append(path.name.split(".")[0])
        if calls.count(file) < nth or calls[-1] != file:
            return write(path, content)
        write(path, content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    error = complaint(capsys, "--resume", run, "--total-timesteps", "512")
    assert f"cannot write {run / file}." in error and "No space left" in error and not list(run.glob("*.tmp"))
    assert ("stopped" in error) == (nth > 1) and checkpoint_of(run)["update"] == (5 if nth > 1 else 4)
    name = Path({"config": "config.json", "metrics": "metrics.csv", "checkpoint": "checkpoint.pt"}[file])
    assert nth > 1 or (run / name).read_bytes() == before[name]
    monkeypatch.undo()
    assert main(["--resume", str(run), "--total-timesteps", "512"]) == 0
    assert [row["update"] for row in rows_of(run)] == [str(i) for i in range(1, 9)]


def test_a_full_disk_shows_as_such_where_metrics_grow_and_keeps_the_checkpoint(run, capsys, monkeypatch):
    def full(path, mode="r", **more):
        if mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, **more)

    monkeypatch.setattr(ncdpo, "open", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        main(["--resume", str(run), "--total-timesteps", "512"])
    assert f"--resume {run}" in capsys.readouterr().err and checkpoint_of(run)["update"] == 4


@pytest.mark.parametrize("wrong", ["observation", "infinity", "reward"])
def test_an_environment_that_breaks_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, each_update, wrong):
    monkeypatch.setattr(Tiny, "made_to_fail", (40, wrong))  # in the third rollout of 16 steps
    error = complaint(capsys, *arguments("TinyBox-v0", tmp_path))
    run = tmp_path / "TinyBox-v0__ncdpo__1"
    assert f"--resume {run}" in error and "update 2" in error and "not finite" in error
    # Tiny pays for the action, which is no number either after such an observation
    assert ("update 3" if wrong == "infinity" else "TinyBox-v0 gave the reward nan") in error
    state = checkpoint_of(run)
    assert state["update"] == len(rows_of(run)) == 2
    assert all(torch.isfinite(tensor).all() for tensor in state["agent"].values())


def test_a_loss_that_is_not_a_number_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch, each_update):
    loss, calls = ncdpo.ppo_loss, []

    def poisoned(*args, **batch):
        calls.append(1)
        value, diagnostics = loss(*args, **batch)
        return (value, diagnostics) if len(calls) <= 2 * 2 * 5 else (value * math.nan, diagnostics)

    monkeypatch.setattr(ncdpo, "ppo_loss", poisoned)
    assert "not finite in update 3" in complaint(capsys, *arguments("TinyBox-v0", tmp_path))
    state = checkpoint_of(tmp_path / "TinyBox-v0__ncdpo__1")
    assert state["update"] == 2 and all(torch.isfinite(tensor).all() for tensor in state["agent"].values())


def test_ncdpo_learns_cartpole(tmp_path):
    flags = dict(num_envs=16, num_steps=64, minibatch_size=256, update_epochs=10, learning_rate=3e-3, hidden=64,
                 denoising_steps=2, gamma=0.98, gae_lambda=0.95, total_timesteps=20_480, episodes=1)
    line = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    assert main(["--env", "CartPole-v1", "--algo", "ncdpo", "--device", "cpu", "--runs", str(tmp_path), *line]) == 0
    returns = [float(row["return"]) for row in rows_of(tmp_path / "CartPole-v1__ncdpo__1") if row["return"]]
    assert returns[0] < 50 and np.convolve(returns, np.ones(4) / 4, "valid").max() > 200  # four updates in a row


# ===== the file =======================================================================================================

def run_python(folder, *command, **environment):
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_import_prints_and_writes_nothing_and_needs_neither_mujoco_nor_matplotlib(tmp_path):
    code = """import ncdpo, sys, torch
ncdpo.VectorEnv("CartPole-v1", 1, torch.device("cpu"))
assert not {"mujoco", "matplotlib"} & set(sys.modules)"""
    result = run_python(tmp_path, "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not list(tmp_path.iterdir())


IMPORTS = """
import contextlib, importlib.util, io, runpy, sys
from pathlib import Path
path, here = Path(sys.argv[1]), Path.cwd()

def works(ncdpo):
    import torch
    assert ncdpo["Config"](seed=2).seed == 2
    env = ncdpo["VectorEnv"]("CartPole-v1", 2, torch.device("cpu"))
    assert env.reset(1).shape == (2, 4)

def imported(folder, name):
    (here / folder / "notebooks").mkdir(parents=True)  # the user's own, which is nobody's business
    (here / folder / "notebooks" / "__init__.py").write_text("raise ImportError('this is mine')")
    return (here / folder / name)

sys.path.insert(0, str(here / "linked"))
imported("linked", "ncdpo.py").symlink_to(path)
import ncdpo
works(vars(ncdpo))
assert Path(ncdpo.__file__).parent == here / "linked"

sys.path.insert(0, str(here / "vendored"))
(imported("vendored", "lib")).mkdir()
(here / "vendored" / "lib" / "__init__.py").touch()
(here / "vendored" / "lib" / "ncdpo.py").write_text(path.read_text())
from lib import ncdpo as another
assert another is not ncdpo
works(vars(another))

spec = importlib.util.spec_from_file_location("reference", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "reference" not in sys.modules
works(vars(module))

cell = {"__name__": "__main__"}  # of a notebook, where it is pasted
with contextlib.redirect_stdout(io.StringIO()) as out:
    exec(path.read_text(), cell)
assert not out.getvalue() and "__file__" not in cell
works(cell)

sys.argv = ["ncdpo.py", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as out:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        assert end.code == 0 and "--sampling-steps" in out.getvalue()
print("all")
"""


def test_the_file_can_be_linked_vendored_loaded_by_path_and_pasted(tmp_path):
    """Also beside a package `notebooks` of the user's, in an isolated Python (-I implies -P) without docstrings."""
    (tmp_path / "imports.py").write_text(IMPORTS)
    result = run_python(tmp_path, "-I", "-OO", "imports.py", HERE / "ncdpo.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, "all\n", "")


KILLED = """
import os, signal, sys, ncdpo
replace, calls = os.replace, []

def cut(temporary, path):
    calls.append(str(path)[-13:])
    if calls.count("checkpoint.pt") == 4:  # the first is of the start
        os.kill(os.getpid(), signal.SIGKILL)
    replace(temporary, path)

ncdpo.CHECKPOINT_SECONDS, os.replace = -1, cut
ncdpo.main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows")
def test_the_file_alone_in_a_folder_trains_and_resumes_in_another_process_after_a_kill_and_evaluates(tmp_path):
    """It is killed where the checkpoint of its third update is written, but has not yet replaced the second."""
    shutil.copy(HERE / "ncdpo.py", tmp_path)
    small = "--env HalfCheetah-v4 --num-envs 4 --num-steps 32 --minibatch-size 64 --episodes 1 --device cpu".split()
    kind = "(batched)" if importlib.util.find_spec("mujoco.batch") else "(sync)"
    killed = run_python(tmp_path, "-c", KILLED, *small, PYTHONPATH="")
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "") and kind in killed.stdout, killed
    run = tmp_path / "runs" / "HalfCheetah-v4__ncdpo__1"
    assert checkpoint_of(run)["update"] == 2 and len(rows_of(run)) == 3 and (run / "checkpoint.pt.tmp").exists()
    again = run_python(tmp_path, "ncdpo.py", "--resume", run, "--total-timesteps", 128 * 4, PYTHONPATH="")
    assert (again.returncode, again.stderr) == (0, "") and again.stdout.count("length 1000.0") == 3, again
    assert [row["update"] for row in rows_of(run)] == ["1", "2", "3", "4"]
    assert {path.name for path in run.iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt", "lock"}


def test_a_task_of_ones_own_module_is_made_by_its_name_and_its_mistake_shows_in_its_own_line(tmp_path):
    (tmp_path / "my_module.py").write_text("""
import sys
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

sys.modules["__main__"].CHECKPOINT_SECONDS = -1

class Task(CartPoleEnv):
    played = 0

    def step(self, action):
        self.played += 1
        range(40)[self.played]  # the mistake
        return super().step(action)

gym.register("Task-v0", Task)
""")
    line = arguments("my_module:Task-v0", tmp_path)
    result = run_python(tmp_path, HERE / "ncdpo.py", *line, PYTHONPATH=str(tmp_path))
    run = tmp_path / "my_module_Task-v0__ncdpo__1"
    assert result.returncode == 1 and "range(40)[self.played]  # the mistake" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("IndexError: ")
    said, = re.findall("^ncdpo: .+$", result.stderr, re.MULTILINE)
    assert "update 2" in said and f"--resume {run}" in said and checkpoint_of(run)["update"] == 2


def imports_of(*nodes):
    """Top-level packages that are imported anywhere in the nodes of a syntax tree, relative ones as the empty name."""
    return {name.split(".")[0] for tree in nodes for node in ast.walk(tree) for name in
            ([alias.name for alias in node.names] if isinstance(node, ast.Import) else
             [node.module if not node.level else ""] if isinstance(node, ast.ImportFrom) else [])}


def test_the_file_imports_three_packages_and_has_ten_sections_in_the_order_of_reading():
    source = (HERE / "ncdpo.py").read_text()
    tree = ast.parse(source)
    statements = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert imports_of(*statements) - set(sys.stdlib_module_names) == {"torch", "gymnasium", "numpy"}
    where_used = {"mujoco", "mujoco_warp", "warp"}
    assert imports_of(tree) - set(sys.stdlib_module_names) == {"torch", "gymnasium", "numpy"} | where_used
    assert re.findall(r"^# =====  ?(\d+  .+?) =+$", source, re.MULTILINE) == [
        "1  Noise schedule", "2  Networks", "3  The noise-conditioned policy", "4  PPO", "5  Training loop",
        "6  Environments", "7  MuJoCo in batches", "8  The two baselines", "9  Run folder",
        "10  Configuration and command line"]


def test_dependencies_of_the_script_are_declared_in_both_places():
    tomllib = pytest.importorskip("tomllib")
    source = (HERE / "ncdpo.py").read_text()
    header = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", source, re.MULTILINE).group(1)
    meta = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    name_of = lambda line: re.match(r"[\w.-]+", line).group().lower().replace("_", "-")
    declared = {name_of(line) for line in meta["dependencies"]}
    imported = imports_of(ast.parse(source)) - set(sys.stdlib_module_names) - {"mujoco_warp", "warp"}  # an option
    assert imported == declared and "requires-python" in meta
    lines = (HERE / "requirements.txt").read_text().splitlines()
    assert declared <= {name_of(line) for line in lines if re.match(r"\w", line)}


# ===== scripts ========================================================================================================

def script(name):
    """A fixture: the module notebooks/<name>.py, imported as its own program would be."""
    @pytest.fixture(name=name)
    def module(monkeypatch):
        monkeypatch.syspath_prepend(str(HERE / "notebooks"))
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            ours = {"ncdpo", "notebooks", name, *(path.stem for path in HERE.glob("notebooks/*.py"))}
            if error.name.partition(".")[0] in ours:
                raise
            pytest.skip(str(error))
    return module


SCRIPTS = "demos", "film", "curves", "health", "e16", "moving", "unclipped", "speed", "plots", "toy", "verdicts"
demos, film, curves, health, e16, moving, unclipped, speed, plots, toy, verdicts = map(script, SCRIPTS)


def scripts_complaint(capsys, script, *line):
    """The one line with which a script refuses; asserts that it is one."""
    capsys.readouterr()
    code = script.main([str(word) for word in line])
    said, name = capsys.readouterr(), script.__name__.split(".")[-1]
    assert code == 2 and re.fullmatch(rf"{name}: .+[^.]\.\n", said.err) and said.out == "", said
    return said.err


# --- notebooks/cloning.py --------------------------------------------------------------------------------------------

def tiny_demos(lengths=(9, 2, 12, 7), seed=0):
    """Episodes of TinyBox-v0, numbered by their first observation; every action names its episode and its step."""
    rows, rng = [], np.random.default_rng(seed)
    for episode, length in enumerate(lengths):
        for t in range(length):
            action = np.array([episode / 10, 3 + t / 10], np.float32)
            rows.append((np.array([episode, t, 0, 0, 0, 0], np.float32), action, rng.normal(),
                         t == length - 1 and episode % 2 == 0, t == length - 1 and episode % 2 == 1))
    return dict(zip(cloning.DEMO_KEYS, (np.array(column) for column in zip(*rows))))


def saved(path, demos):
    np.savez(path, **demos)
    return str(path)


@pytest.mark.parametrize("H", [1, 3, 8])
def test_chunks_of_demonstrations_never_cross_an_episodes_end(tmp_path, capsys, H):
    demos, lengths = tiny_demos(), (9, 2, 12, 7)
    env = VectorEnv("TinyBox-v0", 2, CPU, chunk=H)
    obs, action, episode = cloning.load(saved(tmp_path / "d.npz", demos), env)
    expected = [(e, t) for e, length in enumerate(lengths) for t in range(length - H + 1)]
    assert [tuple(map(int, row)) for row in obs[:, :2].tolist()] == expected
    assert episode.tolist() == [e for e, _ in expected]
    low, high = torch.as_tensor(BOX.low), torch.as_tensor(BOX.high)
    real = low + (action.view(-1, H, 2) + 1) / 2 * (high - low)
    for chunk, (e, t) in zip(real, expected):
        shown = torch.tensor([[e / 10, 3 + (t + i) / 10] for i in range(H)])
        torch.testing.assert_close(chunk, shown, rtol=0, atol=1e-5)
    returns = [demos["rewards"][demos["observations"][:, 0] == e].sum() for e in range(4)]
    printed = capsys.readouterr().out
    assert "4 episodes, 30 steps" in printed and f"mean return {np.mean(returns):.1f}" in printed


ROWS = np.arange(30)
DAMAGES = [
    (dict(observations=np.zeros((30, 5))), "observations of"),
    (dict(actions=np.zeros((30, 3))), "actions of"),
    (dict(observations=np.zeros((6, 30))), "observations of"), (dict(actions=np.zeros((2, 30))), "actions of"),
    (dict(terminations=np.zeros(29)), "terminations of"),
    (dict(observations=np.where(ROWS[:, None] == 11, np.nan, np.zeros((30, 6)))), "row 11"),
    (dict(rewards=np.where(ROWS == 4, np.inf, 0.0)), "row 4"),
    (dict(actions=np.where(ROWS[:, None] == 17, 11.0, np.full((30, 2), 2.5))), "row 17"),
    (dict(truncations=np.zeros(30), terminations=np.zeros(30)), "fewer than two episodes.*mark each one's last row"),
    (dict(truncations=np.ones(30)), "--action-chunk 2"),
    ({key: np.zeros(0) for key in cloning.DEMO_KEYS}, "need"),
    (dict(rewards=np.zeros(30, object)), "cannot read"),  # a pickle, which may run anything
    (dict(rewards=np.full(30, "one")), "cannot read"), (dict(rewards=np.float64(1)), "need"),
]


def test_damaged_demonstrations_are_told_in_one_line(tmp_path, capsys):
    env, demos, path = VectorEnv("TinyBox-v0", 2, CPU, chunk=2), tiny_demos(), tmp_path / "d.npz"
    for damage, words in DAMAGES:
        with pytest.raises(UserError, match=words):
            cloning.load(saved(path, demos | damage), env)
    without_a_key = saved(tmp_path / "key.npz", {key: demos[key] for key in cloning.DEMO_KEYS[:4]})
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:300])
    (tmp_path / "empty.npz").touch()
    flags = arguments("TinyBox-v0", tmp_path / "runs", "--action-chunk", "2", "--critic-warmup", "0")
    for source in (without_a_key, *(tmp_path / f"{name}.npz" for name in ("text", "cut", "empty", "missing"))):
        error = scripts_complaint(capsys, cloning, source, *flags)
        assert f"cannot read demonstrations from {source}" in error
        assert ("it lacks truncations, see --help" in error) == (source == without_a_key)
    assert not (tmp_path / "runs").exists()


gym.register("TinyOdd-v0", entry_point=Tiny, max_episode_steps=8, kwargs=dict(  # its second number is no choice
    action_space=gym.spaces.Box(np.float32([-0.1, 0.7, 1e4]), np.float32([0.3, 0.7, 1e4 + 1]))))
gym.register("TinyWhole-v0", entry_point=Tiny, max_episode_steps=8, kwargs=dict(
    action_space=gym.spaces.Box(-3, 9, (2,), np.int32)))


@pytest.mark.parametrize("env_id, wrong", [("TinyOdd-v0", [0, 0.7001, 1e4]), ("TinyWhole-v0", [0, 2.5])])
def test_actions_are_loaded_as_to_task_makes_them_also_where_a_bound_is_narrow_or_they_are_whole_numbers(
        tmp_path, env_id, wrong):
    env = VectorEnv(env_id, 40, CPU, chunk=2)
    dtype, drawn = env.envs.action_space.dtype, torch.rand(40, env.act_dim, dtype=torch.float64) * 2.4 - 1.2
    drawn[:2] = torch.tensor([[-1.0], [1.0]])
    played = ncdpo.to_task(drawn, **env.bounds).numpy().astype(dtype).reshape(80, -1)
    zeros, end = np.zeros(80), np.arange(80) % 2 == 1
    given = dict(zip(cloning.DEMO_KEYS, (np.full((80, 6), 12345.678), played, zeros, end, zeros)))
    obs, action, _ = cloning.load(saved(tmp_path / "d.npz", given), env)
    again = ncdpo.to_task(action, **env.bounds).numpy().astype(dtype).reshape(80, -1)
    np.testing.assert_allclose(again, played, rtol=1e-6, atol=1e-7)
    assert again.dtype == dtype and (action.abs() <= 1).all() and (obs == 12345.678).all()
    given["actions"] = np.where(np.arange(80)[:, None] == 33, wrong, played)
    with pytest.raises(UserError, match="row 33"):
        cloning.load(saved(tmp_path / "d.npz", given), env)


@pytest.mark.parametrize("algo, predict", [("ppo", "sample"), *(("ncdpo", predict) for predict in PREDICT)])
def test_E2_cloning_recovers_two_modes_where_a_gaussian_finds_their_mean(capsys, algo, predict):
    """Demonstrated: -0.3 or 0.9 with equal probability, whatever the state; an untrained MLP proposes 0."""
    action = torch.where(torch.rand(4000, 1) < 0.5, 0.9, -0.3) + 0.02 * torch.randn(4000, 1)
    c = config(algo=algo, predict=predict, hidden=64, denoising_steps=20)
    agent = ncdpo.Agent(c, 2, 1, False, 2)
    cloning.clone(agent, (torch.randn(4000, 2), action, np.arange(4000) // 10), c.seed, 1000, 1e-2)
    drawn = agent.policy.sample(torch.randn(1000, 2), deterministic=True)[0]
    if algo == "ppo":
        assert (drawn - 0.3).abs().mean() < 0.15
    else:
        near = ((drawn - 0.3).abs() - 0.6).abs() < 0.15
        assert near.float().mean() > 0.75 and 0.4 < (drawn > 0.3).float().mean() < 0.6
        losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
        assert len(losses) == 20 and losses[-1] < losses[0]


@pytest.mark.parametrize("predict", ["epsilon", "v"])
def test_cloned_one_hot_actions_are_drawn_as_often_as_they_were_shown(predict):  # E2, E8
    """Two states; with 20 steps (5, or predicting the sample, sharpen the frequencies) the chain's end is a choice."""
    p, state = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]]), torch.randint(2, (8000,))
    action = 2 * torch.nn.functional.one_hot(torch.multinomial(p[state], 1).squeeze(1), 3) - 1.0
    c = config(predict=predict, hidden=64, denoising_steps=20)
    agent = ncdpo.Agent(c, 1, 3, True, 1)
    cloning.clone(agent, (2.0 * state[:, None] - 1, action, np.arange(8000) // 10), c.seed, 1500, 1e-2)
    for s in (0, 1):
        drawn = agent.policy.sample(agent.obs_norm(torch.full((4000, 1), 2.0 * s - 1)))[0]
        error = (torch.bincount(drawn, minlength=3) / 4000 - p[s]) / (p[s] * (1 - p[s]) * 2 / 4000).sqrt()
        assert (error.abs() < 3).all()


def test_E8_likelihood_steps_leave_the_choice_to_the_softmax(capsys):
    """A clone is nearly certain of its action given omega; then its softmax has the frequencies, whatever omega is."""
    p, state = torch.tensor([[0.2, 0.3, 0.5], [0.7, 0.1, 0.2]]), torch.randint(2, (8000,))
    action = 2 * torch.nn.functional.one_hot(torch.multinomial(p[state], 1).squeeze(1), 3) - 1.0
    c = config(hidden=64, denoising_steps=20, sampling_steps=5)
    agents = [ncdpo.Agent(c, 1, 3, True, 1) for _ in range(2)]
    for agent, steps in zip(agents, (0, 500)):
        cloning.clone(agent, (2.0 * state[:, None] - 1, action, np.arange(8000) // 10), c.seed, 1000, 3e-3, steps)
    assert capsys.readouterr().out.count("likelihood steps") == 20
    assert agents[0].policy.head.temperature == 0.1
    for s in (0, 1):
        cold, warm = (agent.policy.mean(agent.obs_norm(torch.full((2000, 1), 2.0 * s - 1)),
                                        agent.policy.draw_noise(2000)[0]) for agent in agents)
        head, entropy = agents[0].policy.head, -(p[s] * p[s].log()).sum()
        assert head.entropy(cold).mean() < 0.5 * entropy
        torch.testing.assert_close(torch.softmax(warm / head.temperature, -1).mean(0), p[s], atol=0.05, rtol=0)
        assert head.entropy(warm).mean().item() == pytest.approx(entropy.item(), abs=0.1)


@pytest.mark.parametrize("algo", ["ncdpo", "ppo"])
def test_a_cloned_expert_with_discrete_actions_reaches_its_return(tmp_path, capsys, algo):
    env, rows = VectorEnv("CartPole-v1", 8, CPU), []
    obs = env.reset(1)
    for _ in range(500):  # a rule that balances for the whole episode
        action = (obs.float() @ torch.tensor([0.1, 0.3, 2.0, 1.0]) > 0).long()
        after, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward[:, 0], terminated, truncated))
        obs = after
    path = saved(tmp_path / "d.npz", {key: torch.stack(x, 1).flatten(0, 1).numpy()
                                      for key, x in zip(cloning.DEMO_KEYS, zip(*rows))})
    run = cloning.make(path, config(algo=algo, denoising_steps=10, hidden=64, runs=tmp_path), 1000, 3e-3,
                       {"ncdpo": 300, "ppo": None}[algo])
    assert "8 episodes, 4,000 steps, mean return 500.0 (what was cut off included)\n" in capsys.readouterr().out
    assert ncdpo.evaluate(run, episodes=8)["mean action"]["return"].mean() > 450
    with np.load(path) as file:
        demos = dict(file)
    for wrong in (2, -1, 0.5, np.nan):
        action = np.where(np.arange(4000) == 17, wrong, demos["actions"])
        with pytest.raises(UserError, match="row 17"):
            cloning.load(saved(tmp_path / "wrong.npz", demos | {"actions": action}), env)


def test_cloning_never_trains_on_the_episodes_held_out_and_judges_them_on_the_same_noise(monkeypatch, capsys):
    """A twentieth of them, rounded up; each observation is the number of its episode."""
    agent, trained, held_out = shaken(ncdpo.Agent(config(), 1, 1, False, 1)), set(), set()
    agent.obs_norm.update = lambda obs: None  # stay at mean 0 and variance 1
    agent.obs_norm.forward = lambda obs: obs
    bc_loss, episode = cloning.bc_loss, np.arange(30).repeat(7)
    monkeypatch.setattr(cloning, "bc_loss", lambda policy, obs, action: (
        (trained if torch.is_grad_enabled() else held_out).update(obs[:, 0].tolist()) or bc_loss(policy, obs, action)))
    shown = torch.tensor(episode)[:, None].float(), torch.zeros(210, 1), episode
    cloning.clone(agent, shown, 1, 40, 1e-12)  # without learning, nothing else moves their loss
    assert len(held_out) == 2 and trained == set(range(30)) - held_out
    losses = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 20 and len(set(losses)) == 1 and float(losses[0]) > 0.01


def test_what_stands_still_in_the_demonstrations_has_a_hundredth_of_the_median_spread():
    """Else a grain of movement later would be 1e4 standard deviations; statistics of a clone do not move."""
    obs = torch.randn(1000, 5) * torch.tensor([1.0, 2.0, 4.0, 1e-5, 0.0]) + 3
    agent = ncdpo.Agent(config(), 5, 1, False, 5)
    cloning.clone(agent, (obs, torch.randn(1000, 1), np.arange(1000) // 5), 1, 2)
    var = obs.double().var(0, unbiased=False)
    median = var[:4].sort().values[1]  # of those that move, the lower of the two in the middle
    torch.testing.assert_close(agent.obs_norm.var, torch.cat([var[:3], 1e-4 * median.expand(2)]))
    still = ncdpo.Agent(config(), 1, 1, False, 1)
    cloning.clone(still, (torch.full((50, 1), 7.0), torch.randn(50, 1), np.arange(50) // 5), 1, 2)
    assert still.obs_norm.var.item() == 1 and still.obs_norm(torch.tensor([[7.5]])).item() == pytest.approx(0.5)


def test_cloning_keeps_the_moving_average_of_its_weights():
    """Adam's weights w_1 ... w_n, averaged as m_1 = w_1, m_i = d m_(i-1) + (1 - d) w_i with d = 1 - 10 / n."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    n, weights, rates = 40, [], []
    hook = register_optimizer_step_post_hook(lambda adam, *_: (
        weights.append([p.clone() for p in adam.param_groups[0]["params"]]), rates.append(adam.param_groups[0]["lr"])))
    agent = ncdpo.Agent(config(), 2, 1, False, 2)
    cloning.clone(agent, (torch.randn(100, 2), torch.randn(100, 1), np.arange(100) // 5), 1, n, 1e-2)
    hook.remove()
    shares = [(0.25 if i else 1) * 0.75 ** (n - 1 - i) for i in range(n)]
    assert sum(shares) == pytest.approx(1)
    for i, p in enumerate(agent.policy.parameters()):
        torch.testing.assert_close(p, sum(share * w[i] for share, w in zip(shares, weights)))
    np.testing.assert_allclose(rates, [1e-2 * (1 + math.cos(math.pi * i / n)) / 2 for i in range(n)])  # along a cosine


def test_an_mlp_is_cloned_by_its_mean_or_by_cross_entropy(float64):
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    box, choice = make_policy("ppo"), make_policy("ppo", discrete=True)
    assert cloning.bc_loss(box, obs, action).item() == pytest.approx(((box.net(obs) - action) ** 2).mean().item())
    chosen = torch.randint(2, (9,))
    one_hot = 2.0 * torch.nn.functional.one_hot(chosen, 2) - 1
    expected = -Categorical(logits=choice.net(obs)).log_prob(chosen).mean()
    assert cloning.bc_loss(choice, obs, one_hot).item() == pytest.approx(expected.item())


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A cloned run of TinyBox-v0 with chunks of 2, and the demonstrations."""
    folder = tmp_path_factory.mktemp("clone")
    path = saved(folder / "d.npz", tiny_demos())
    given = dict(env="TinyBox-v0", action_chunk=2, denoising_steps=3)
    return cloning.make(path, config(runs=folder, **given), steps=60), path, given


def test_a_clone_is_a_run_folder_without_updates_whose_preset_travels_on(tmp_path, capsys):
    path = saved(tmp_path / "d.npz", tiny_demos())
    flags = ["--env", "TinyBox-v0", "--runs", tmp_path, "--action-chunk", 2, "--num-envs", 2, "--hidden", 16,
             "--bc-steps", 20, "--bc-learning-rate", 0.01, "--device", "cpu", "--episodes", 3]
    assert cloning.main([str(word) for word in (path, *flags)]) == 0
    run = tmp_path / "TinyBox-v0__ncdpo__1"
    printed = capsys.readouterr().out
    assert printed.count("cloning steps") == 20 and ncdpo.describe(ncdpo.evaluate(run, episodes=3)) in printed
    assert set(path.name for path in run.iterdir()) == {"config.json", "checkpoint.pt", "metrics.csv", "lock"}
    assert rows_of(run) == [] and checkpoint_of(run)["update"] == 0
    changed = dict(runs=tmp_path, action_chunk=2, num_envs=2, hidden=16, device="cpu", episodes=3)
    assert ncdpo.load_config(run) == ncdpo.Config("TinyBox-v0", **cloning.PRESET | changed)
    before = contents(run)
    error = complaint(capsys, "--resume", run, "--total-timesteps", 1536)
    assert f"is a clone: improve it by --init-from {run}" in error
    assert contents(run) == before
    c = ncdpo.parse(["--init-from", str(run), "--env", "TinyBox-v0"])[0]
    assert c.total_timesteps == ncdpo.Config.total_timesteps and c.init_std == cloning.PRESET["init_std"]
    for line, words in ((["--bc-steps", 0], "--bc-steps"), (["--bc-learning-rate", "nan"], "--bc-learning-rate"),
                        (["--evaluate", run], "leave out --evaluate"), (["--init-from", run], "--init-from"),
                        (["--likelihood-steps", -1], "0 or more"), ([*flags, "--likelihood-steps", 5], "a Gaussian"),
                        (["--env", "CartPole-v1"], "give --action-chunk 1")):  # the preset's 4 are for Box actions
        assert words in scripts_complaint(capsys, cloning, path, *line)


def test_clone_starts_from_the_demonstrations_statistics_and_dppo_starts_from_ncdpos_clone(clone):
    run, path, given = clone
    obs = cloning.load(path, VectorEnv("TinyBox-v0", 2, CPU, chunk=2))[0]
    trainer = ncdpo.Trainer(config(algo="dppo", min_std=0.3, **given))
    ncdpo.start_from(trainer, run)
    torch.testing.assert_close(trainer.agent.obs_norm.mean, obs.mean(0))
    var = obs.var(0, correction=0)
    torch.testing.assert_close(trainer.agent.obs_norm.var, var.clamp(min=1e-4 * var[var > 0].median()))
    cloned, policy = checkpoint_of(run)["agent"], trainer.agent.policy
    for name, tensor in policy.denoiser.state_dict().items():
        assert torch.equal(tensor, cloned["policy.denoiser." + name])
    assert policy.head.log_std.exp().tolist() == pytest.approx([0.3] * 4)


def test_statistics_of_observations_move_from_scratch_and_stay_a_clones_when_it_is_improved(clone):
    run, _, given = clone
    for init_from, moves in ((None, True), (str(run), False)):
        trainer = ncdpo.Trainer(config(init_from=init_from, **given))
        if init_from:
            ncdpo.start_from(trainer, run)
        before = [x.clone() for x in trainer.agent.obs_norm.buffers()]
        trainer.iterate()
        assert same(before, list(trainer.agent.obs_norm.buffers())) is not moves
        assert trainer.agent.reward_norm.count > 0  # these are training's own


def test_moving_statistics_are_those_of_the_demonstrations_and_the_rollouts(clone, moving):
    run, _, given = clone
    trainer = moving.Moving(config(init_from=str(run), **given))
    ncdpo.start_from(trainer, run)
    norm = ncdpo.Normalizer(trainer.env.obs_dim)
    norm.load_state_dict(trainer.agent.obs_norm.state_dict())
    rollout = trainer.play()
    trainer.make_batch(rollout)
    norm.update(rollout["obs"].flatten(0, 1))
    assert same(norm.state_dict(), trainer.agent.obs_norm.state_dict())


@pytest.mark.parametrize("predict", ["sample", "epsilon", "v"])
def test_a_chain_whose_last_step_is_not_clipped_is_the_usual_one_before(unclipped, predict):
    usual, free = (kind(6, predict, clip=0.5, sampling_steps=4) for kind in (ncdpo.Schedule, unclipped.Unclipped))
    output, x = torch.randn(5, 4, 2).requires_grad_(), torch.randn(5, 4, 2)
    unbounded = ncdpo.Schedule(6, predict, clip=1e6, sampling_steps=4)
    for k in range(4, 1, -1):
        assert torch.equal(free.clean(output, x, k), usual.clean(output, x, k)) and free.clip == 0.5
    last = free.clean(output, x, 1)
    assert torch.equal(last, unbounded.clean(output, x, 1)) and last.abs().max() > 0.5
    assert torch.autograd.grad(last.sum(), output)[0].all()
    each = free.clean(output, x, torch.arange(4, 0, -1).expand(5, -1))  # as DPPO's
    for i in range(4):
        torch.testing.assert_close(each[:, i], free.clean(output[:, i], x[:, i], 4 - i))


def test_init_from_goes_on_in_another_task_of_the_same_spaces_and_refuses_one_of_others(clone):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(**given | dict(env="TinyEnds-v0")))
    ncdpo.start_from(trainer, run)
    for name, tensor in trainer.agent.state_dict().items():
        assert torch.equal(tensor, checkpoint_of(run)["agent"][name])
    with pytest.raises(UserError, match="Hopper-v4 has other observations or actions than"):
        ncdpo.start_from(ncdpo.Trainer(config(**given | dict(env="Hopper-v4"))), run)


@pytest.mark.parametrize("before, now", [("ncdpo", "ncdpo"), ("dppo", "dppo"), ("dppo", "ncdpo"), ("ncdpo", "dppo")])
def test_sigma_is_the_one_learnt_or_else_the_one_asked_for(tmp_path, before, now):
    run, old = a_clone(tmp_path / "run", env="TinyBox-v0", algo=before, min_std=0.1)
    learnt = old.agent.policy.head.log_std.exp().tolist()
    assert learnt != pytest.approx([0.22] * 2)
    for init_std in (0.22, 0.4):
        trainer = ncdpo.Trainer(config(env="TinyBox-v0", algo=now, min_std=0.3, init_std=init_std))
        ncdpo.start_from(trainer, run)
        expected = [0.3 if now == "dppo" else init_std] * 2
        if before == now == "ncdpo" and init_std == 0.22:  # that of the run
            expected = learnt
        assert trainer.agent.policy.head.log_std.exp().tolist() == pytest.approx(expected)


def test_critic_warmup_leaves_the_actor_where_it_was(clone):
    run, _, given = clone
    trainer = ncdpo.Trainer(config(critic_warmup=1, critic_learning_rate=1e-3, **given))
    ncdpo.start_from(trainer, run)
    parts = trainer.agent.policy, trainer.agent.critic
    actor, critic = ([p.clone() for p in part.parameters()] for part in parts)
    trainer.iterate()
    assert all(torch.equal(a, b) for a, b in zip(actor, parts[0].parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(critic, parts[1].parameters()))
    trainer.iterate()
    assert not any(torch.equal(a, b) for a, b in zip(actor, parts[0].parameters()))


@pytest.mark.parametrize("flags, words", [
    (["--action-chunk", "4"], "--action-chunk"), (["--predict", "v"], "--predict"), (["--hidden", "9"], "--hidden"),
    (["--denoising-steps", "4"], "--denoising-steps"), (["--activation", "tanh"], "--activation"),
    (["--env", "Hopper-v4"], "other observations or actions"), (["--algo", "ppo"], "not that of ppo")])
def test_a_run_that_cannot_start_from_the_clone_says_so(clone, tmp_path, capsys, flags, words):
    flags = ["--init-from", clone[0], "--runs", tmp_path, "--total-timesteps", "512", *flags]
    assert words in complaint(capsys, *flags) and not list(tmp_path.iterdir())


def test_a_run_of_an_mlp_cannot_become_a_chain(tmp_path, capsys):
    run, _ = a_clone(tmp_path / "run", env="TinyBox-v0", algo="ppo")
    flags = ["--init-from", run, "--runs", tmp_path, "--total-timesteps", "512", "--algo", "ncdpo"]
    assert "not that of ncdpo" in complaint(capsys, *flags)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_clone_that_is_stopped_leaves_no_folder(tmp_path, monkeypatch, error):
    np.savez(tmp_path / "d.npz", **tiny_demos())
    monkeypatch.setattr(cloning, "clone", lambda *given: (_ for _ in ()).throw(error("stop")))
    with pytest.raises(error):
        cloning.make(str(tmp_path / "d.npz"), config(env="TinyBox-v0", action_chunk=2, runs=tmp_path / "runs"))
    assert not list((tmp_path / "runs").iterdir())


# --- notebooks/demos.py ----------------------------------------------------------------------------------------------

def saved_hdf5(path, arrays):
    names = dict(terminations="terminals", truncations="timeouts")
    with pytest.importorskip("h5py").File(path, "w") as file:
        for key, array in arrays.items():
            file[names.get(key, key)] = array
    return path


def loaded(path):
    with np.load(path, allow_pickle=False) as file:
        assert set(file) - {"env"} == set(cloning.DEMO_KEYS)
        return {key: file[key] for key in cloning.DEMO_KEYS}


def test_training_stops_once_twenty_episodes_have_the_mean_return_asked_for(demos, tmp_path, monkeypatch, capsys):
    # episodes and their mean return in each update; (19 * 9.9 + 12) / 20 is the first mean above 10
    reports = iter([(1, 100.0), (30, 0.0), (1, 100.0), (0, math.nan), (5, 15.0), (20, 9.9), (1, 12.0)])

    def iterate(trainer):
        trainer.done += 1
        return dict(zip(("episodes", "return"), next(reports)), update=trainer.done, step=64 * trainer.done)

    monkeypatch.setattr(ncdpo.Trainer, "iterate", iterate)
    monkeypatch.setattr(ncdpo, "Trainer", ncdpo.Trainer)  # put back after the test
    assert demos.main(["train", "10", *arguments("CartPole-v1", tmp_path), "--total-timesteps", "4096"]) == 0
    run = tmp_path / "CartPole-v1__ncdpo__1"
    assert ncdpo.read_metrics(run)["update"].tolist() == [1, 2, 3, 4, 5, 6, 7] and checkpoint_of(run)["update"] == 7
    assert ncdpo.describe(ncdpo.evaluate(run, episodes=1)) in capsys.readouterr().out


def test_recorded_demonstrations_are_what_the_run_plays(demos, clone, tmp_path, capsys):
    """Recorded step by step although the policy decides chunks; read again, they are whole episodes of the task."""
    path = tmp_path / "own.npz"
    assert demos.main(["record", str(clone[0]), str(path), "--steps", "4004", "--deterministic"]) == 0
    own = loaded(path)
    ends = own["terminations"] | own["truncations"]
    obs, played = own["observations"], own["actions"].sum(1)
    assert len(ends) == 4004 and ends.sum() == 2 * math.ceil(2002 / 8)  # two environments, episodes of eight steps
    follows = ~ends[:-1]
    np.testing.assert_allclose(obs[1:, 2][follows], played[:-1][follows], rtol=1e-5)  # obs[2] is the last action's sum
    np.testing.assert_allclose(own["rewards"], played + obs[:, 0], rtol=1e-5)
    whole = own["rewards"].reshape(2, 2002)[:, :2000].sum() / 500  # the last two steps of each environment are cut off
    assert f"500 whole episodes of mean return {whole:.1f}, 2 cut off" in capsys.readouterr().out
    cloning.load(str(path), VectorEnv("TinyBox-v0", 2, CPU, chunk=2))


@pytest.mark.parametrize("env, least", [
    ("Tiny-v0", 5), ("TinyBox-v0", -1), ("TinyWide-v0", -2), ("TinyOdd-v0", -1), ("TinyWhole-v0", -3)])
def test_recorded_actions_are_those_of_the_task_in_its_dtype(demos, tmp_path, env, least):
    run, played, step = untrained(tmp_path, env=env, init_std=2.0), [], Tiny.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tiny, "step", lambda self, action: played.append(action) or step(self, action))
        assert demos.main(["record", str(run), str(tmp_path / "own.npz"), "--steps", "50"]) == 0
    own = loaded(tmp_path / "own.npz")  # at a bound where the Gaussian asked for more
    np.testing.assert_array_equal(own["actions"], np.array(played))
    assert own["actions"].dtype == gym.make(env).action_space.dtype and least <= own["actions"].min()
    assert own["observations"].dtype == np.float32


def test_a_new_episode_asks_for_a_new_chunk(demos, tmp_path, monkeypatch):
    """Chunks of four in episodes of twenty-one steps; every decision names the steps of its chunk."""
    run, asked = untrained(tmp_path, env="TinyWide-v0", action_chunk=4), []
    monkeypatch.setattr(ncdpo.Normalizer, "forward", lambda self, x: x)

    def sample(self, obs, deterministic=False):
        asked.append(round(obs[0, 1].item()))
        return torch.linspace(-0.3, 0.3, 4).repeat_interleave(2)[None], None, None

    monkeypatch.setattr(ncdpo.NCDPO, "sample", sample)
    own = demos.record(run, 63, False)
    assert asked == [0, 4, 8, 12, 16, 20] * 3
    whole = np.linspace(-0.3, 0.3, 4).tolist() * 5 + [-0.3]
    np.testing.assert_allclose(own["actions"][0, :, 0], 2 + 4 * np.tile(whole, 3), rtol=1e-6)


def test_recorded_episodes_start_elsewhere_than_those_of_training_and_evaluation(demos, clone, monkeypatch):
    reset, starts = VectorEnv.reset, []

    def watched(*given, **more):
        starts.append(reset(*given, **more)[:, 0])
        return reset(*given, **more)

    monkeypatch.setattr(VectorEnv, "reset", watched)
    ncdpo.Trainer(config(env="TinyBox-v0"))
    ncdpo.evaluate(clone[0], episodes=2)
    demos.record(clone[0], 30, False)
    assert len(starts[-1]) == 1 and not torch.isin(starts[-1], torch.cat(starts[:-1])).any()


def test_d4rl_files_become_the_same_numbers(demos, tmp_path, capsys):
    tiny, out = tiny_demos(), tmp_path / "d.npz"
    source = saved_hdf5(tmp_path / "d.hdf5", tiny | {"terminations": tiny["terminations"].astype(np.uint8)})
    assert demos.main(["convert", str(source), str(out)]) == 0
    for key, array in loaded(out).items():
        np.testing.assert_array_equal(array, tiny[key])
    mean = np.mean([tiny["rewards"][tiny["observations"][:, 0] == e].sum() for e in range(4)])
    assert f"30 steps, 4 whole episodes of mean return {mean:.1f}, 0 cut off" in capsys.readouterr().out
    cloning.load(str(out), VectorEnv("TinyBox-v0", 2, CPU))


def test_two_runs_of_one_seed_are_recorded_with_starts_and_noise_of_their_own(demos, tmp_path):
    for name in ("one", "other"):
        a_clone(tmp_path / name, env="TinyBox-v0")
    assert demos.main(["record", *(str(tmp_path / name) for name in ("one", "other")), str(tmp_path / "d.npz"),
                       "--steps", "60"]) == 0
    with np.load(tmp_path / "d.npz") as file:
        assert str(file["env"]) == "TinyBox-v0"
        first, second = np.split(file["observations"][:, 0], 2)
        assert not np.isin(first, second).any()
    alone = demos.record(tmp_path / "one", 30, False)["observations"][..., 0].ravel()
    np.testing.assert_array_equal(alone, first)  # of a single source nothing changes


def test_runs_of_different_tasks_are_not_recorded_into_one_file(demos, tmp_path, capsys):
    for name, env in (("one", "TinyBox-v0"), ("other", "TinyEnds-v0")):
        a_clone(tmp_path / name, env=env)
    assert demos.main(["record", *(str(tmp_path / name) for name in ("one", "other")), str(tmp_path / "d.npz"),
                       "--steps", "60"]) == 2
    assert "of different tasks: TinyBox-v0 and TinyEnds-v0" in capsys.readouterr().err
    assert not (tmp_path / "d.npz").exists()


def test_a_demonstrator_that_does_not_get_there_is_told(demos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demos.UntilReturn, "goal", math.inf)
    monkeypatch.setattr(ncdpo, "Trainer", ncdpo.Trainer)  # put back
    line = ["train", "1e9", *map(str, arguments("TinyBox-v0", tmp_path))]
    assert demos.main(line) == 0 and "mean return 1e+09 was not reached" in capsys.readouterr().err


@pytest.mark.parametrize("task, good", [("Tiny-v0", True), ("Tiny-v7", True), ("mine:Tiny-v0", True),
                                        ("TinyEnds-v0", False)])
def test_demonstrations_of_another_version_of_the_task_will_do(task, good, tmp_path):
    np.savez(tmp_path / "d.npz", **tiny_demos(), env=task.replace("Tiny-", "TinyBox-"))
    env = VectorEnv("TinyBox-v0", 2, CPU)
    if good:
        cloning.load(str(tmp_path / "d.npz"), env)
    else:
        with pytest.raises(UserError, match="give --env TinyEnds-v0"):
            cloning.load(str(tmp_path / "d.npz"), env)


def test_several_sources_become_one_file(demos, tmp_path, capsys):
    """Each keeps its episodes: the first one's last, cut off without an end, does not run on into the second."""
    parts = [{key: array[:-1] for key, array in tiny_demos(seed=seed).items()} for seed in (0, 1)]
    sources = [saved_hdf5(tmp_path / f"{i}.hdf5", part) for i, part in enumerate(parts)]
    assert demos.main(["convert", *map(str, sources), str(tmp_path / "d.npz")]) == 0
    both = loaded(tmp_path / "d.npz")
    for key in ("observations", "actions", "rewards", "terminations"):
        np.testing.assert_array_equal(both[key], np.concatenate([part[key] for part in parts]))
    cut = sum(part["truncations"].sum() for part in parts)
    assert both["truncations"][[28, 57]].all() and both["truncations"].sum() == cut + 2
    other = saved_hdf5(tmp_path / "other.hdf5", parts[0] | {"observations": parts[0]["observations"][:, :2]})
    flags = ["convert", str(sources[0]), str(other), str(tmp_path / "e.npz")]
    assert demos.main(flags) == 2 and "of different tasks" in capsys.readouterr().err
    assert not (tmp_path / "e.npz").exists()


@pytest.fixture
def tiny_minari(tmp_path, monkeypatch):
    """Minari, and a function that keeps demonstrations of TinyBox-v0 there, each episode with a last observation."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def create(name, tiny):
        buffers = []
        for e in range(4):
            one = {key: array[tiny["observations"][:, 0] == e] for key, array in tiny.items()}
            one["observations"] = np.concatenate([one["observations"], np.full((1, 6), 99, np.float32)])
            one = {key: list(array) if array.ndim == 1 else array for key, array in one.items()}
            buffers.append(minari.data_collector.EpisodeBuffer(**one))
        minari.create_dataset_from_buffers(name, buffers, action_space=BOX, algorithm_name="-", author="-",
                                           observation_space=gym.spaces.Box(-np.inf, np.inf, (6,), np.float32),
                                           author_email="-", code_permalink="-", description="-")

    return minari, create


def test_minari_datasets_become_the_same_numbers(demos, tiny_minari, tmp_path, monkeypatch, capsys):
    minari, create = tiny_minari
    tiny = tiny_demos()
    create("tiny/box-v0", tiny)
    assert demos.main(["convert", "minari:tiny/box-v0", str(tmp_path / "d.npz")]) == 0
    for key, array in loaded(tmp_path / "d.npz").items():
        np.testing.assert_allclose(array, tiny[key], rtol=1e-6)
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: 1 / 0)
    monkeypatch.setattr(minari, "list_remote_datasets", lambda: 1 / 0)  # no network
    flags = "convert", "minari:tiny/boxx-v0", tmp_path / "e.npz"
    assert "did you mean tiny/box-v0" in scripts_complaint(capsys, demos, *flags)


def test_minaris_episodes_end_also_where_no_flag_says_so(demos, tiny_minari, tmp_path, monkeypatch, capsys):
    minari, create = tiny_minari
    tiny = tiny_demos()
    last = np.flatnonzero(tiny["terminations"] | tiny["truncations"])
    create("tiny/flagless-v0", tiny | {"truncations": np.zeros(30, bool)})
    assert demos.main(["convert", "minari:tiny/flagless-v0", str(tmp_path / "d.npz")]) == 0
    assert "4 whole episodes" in capsys.readouterr().out
    made = loaded(tmp_path / "d.npz")
    assert np.flatnonzero(made["terminations"]).tolist() == last[::2].tolist()  # as they were
    assert np.flatnonzero(made["truncations"]).tolist() == last[1::2].tolist()
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: [])
    assert "has no step" in scripts_complaint(capsys, demos, "convert", "minari:a/b-v0", tmp_path / "e.npz")


@pytest.mark.parametrize("package, source", [("h5py", "d.hdf5"), ("minari", "minari:a/b-v0")])
def test_a_missing_package_of_a_source_is_named(demos, tmp_path, monkeypatch, capsys, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    error = scripts_complaint(capsys, demos, "convert", source, tmp_path / "d.npz")
    install = "'minari[all]'" if package == "minari" else package
    assert f"needs the package {package}: pip install {install}." in error


def test_parts_of_dict_observations_are_flattened_or_refused(demos):
    space = gym.spaces.Dict({"a": gym.spaces.Discrete(3, start=2), "b": gym.spaces.Box(-1, 1, (2,))})
    space.seed(0)
    seen = [space.sample() for _ in range(5)]
    columns = {key: np.stack([one[key] for one in seen]) for key in space}
    expected = [gym.spaces.flatten(space, one) for one in seen]
    np.testing.assert_allclose(demos.flat_columns(space, columns), expected)
    space["c"] = gym.spaces.Text(9)
    assert demos.flat_columns(space, columns | {"c": ["go", "on"]}) is None  # which read_minari refuses


@pytest.mark.parametrize("damage, words", [
    (None, "cannot read"), (b"no archive", "cannot read"), (dict(truncations=None), "timeouts"),
    (dict(rewards=ROWS[1:]), "differ in length"), (dict(rewards=1.0), "cannot read"),
    (dict.fromkeys(cloning.DEMO_KEYS, ROWS[:0]), "empty")], ids=str)
def test_damaged_d4rl_files_are_told_in_one_line(demos, tmp_path, capsys, damage, words):
    pytest.importorskip("h5py")
    path = tmp_path / "d.hdf5"
    if isinstance(damage, dict):
        saved_hdf5(path, {key: array for key, array in (tiny_demos() | damage).items() if array is not None})
    elif damage:
        path.write_bytes(damage)
    error = scripts_complaint(capsys, demos, "convert", path, tmp_path / "d.npz")
    assert words in error and not (tmp_path / "d.npz").exists()


def test_demos_refuses_what_it_cannot_do(demos, clone, tmp_path, capsys):
    (tmp_path / "mine.npz").write_bytes(b"mine")
    for line, words in (("mine.npz --steps 9", "exists"), ("none/own.npz --steps 9", "folder"),
                        ("x --steps 0", "--steps")):
        out, *flags = line.split()
        assert words in scripts_complaint(capsys, demos, "record", clone[0], tmp_path / out, *flags)
    assert "no run folder" in scripts_complaint(capsys, demos, "record", tmp_path, tmp_path / "x")
    with pytest.raises(SystemExit):
        demos.main(["record", str(clone[0]), str(tmp_path / "x"), "--stepz", "9"])
    assert (tmp_path / "mine.npz").read_bytes() == b"mine" and len(list(tmp_path.iterdir())) == 1


# --- notebooks/deploy.py ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [dict(env="TinyBox-v0", action_chunk=3), dict(env="CartPole-v1", algo="ppo"),
                                   dict(env="TinyOdd-v0", algo="dppo")], ids=lambda given: given["env"])
def test_deploy_a_loaded_policy_acts_on_raw_observations_as_an_evaluation_does(tmp_path, given):
    """Played in a task of Gymnasium's, without a VectorEnv; and exported, for any batch."""
    run = untrained(tmp_path, **given)
    policy, task = deploy.load_policy(run), make_env(given["env"])
    seed = np.random.SeedSequence(1_000_003 + config().seed).generate_state(1)[0] // 2
    obs, total, ended = task.reset(seed=int(seed))[0], 0.0, False
    while not ended:
        for action in policy(np.ravel(obs)) if "action_chunk" in given else [policy(np.ravel(obs))]:
            assert isinstance(action, (np.ndarray, np.generic))
            action = action.astype(task.action_space.dtype)
            assert task.action_space.contains(action)
            obs, reward, terminated, truncated, _ = task.step(action)
            total, ended = total + float(np.squeeze(reward)), terminated or truncated
            if ended:
                break
    assert total == pytest.approx(ncdpo.evaluate(run, episodes=1)["zero noise"]["return"].item(), rel=1e-5)
    obs = torch.randn(5, len(np.ravel(obs)))
    for way in WAYS:
        policy = deploy.load_policy(run, way)
        exported = torch.export.export(policy, (obs[:4],), dynamic_shapes={"obs": {0: torch.export.Dim("B", min=2)}})
        played = []
        for act in (policy, exported.module(), lambda obs: torch.stack([policy(row) for row in obs])):
            torch.manual_seed(0)
            played.append(act(obs))
        assert torch.equal(*played[:2]) and played[0].shape == played[2].shape and len(played[0]) == 5
        if way == "zero noise":
            torch.testing.assert_close(played[0], played[2])
    one = policy(obs[0])  # an observation of any shape and dtype, as the file trains with
    torch.testing.assert_close(policy(obs[0].view(-1, 1)), one)
    torch.testing.assert_close(policy(obs[0].view(2, -1)), one)
    zero = deploy.load_policy(run)
    torch.testing.assert_close(zero(obs.view(5, 2, -1)), zero(obs))
    torch.testing.assert_close(policy(obs[0] > 0), policy((obs[0] > 0).float()))
    with pytest.raises(UserError, match="way must be one of exploring, mean action, zero noise"):
        deploy.load_policy(run, "zero_noise")


# --- notebooks/film.py -----------------------------------------------------------------------------------------------

class Odd(Tiny):
    """Tiny as others write their tasks: observations are lists, rewards arrays, and frames of many kinds."""

    metadata, shade = {"render_modes": ["rgb_array"], "render_fps": None}, None

    def observe(self, action):
        return super().observe(action).tolist()

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest

    def render(self):
        return self.shade(7 * self.t)


gym.register("Odd-v0", entry_point=Odd, max_episode_steps=9)


def film_of(film, capsys, run, out):
    """Number of frames, shade of each, milliseconds in all, steps and return of a film of Tiny."""
    image = pytest.importorskip("PIL.Image")
    capsys.readouterr()
    assert film.main([str(run), str(out)]) == 0
    printed = re.search(r"of (\d+) steps with the return (\S+), (\d+) frames", capsys.readouterr().out)
    steps, score, count = printed.groups()
    shades, time = [], 0
    with image.open(out) as picture:
        for i in range(picture.n_frames):
            picture.seek(i)
            assert picture.size == (48, 32) and picture.info["duration"] >= 20  # browsers slow faster ones down
            shades.append(picture.convert("L").getpixel((0, 0)))
            time += picture.info["duration"]
    assert int(count) == len(shades)
    return shades, time, int(steps), float(score)


@pytest.mark.parametrize("algo, env, fps", [
    ("ncdpo", "Tiny-v0", 20), ("dppo", "TinyBox-v0", 50), ("ppo", "TinyBox-v0", 50), ("ncdpo", "TinyWide-v0", 125)])
def test_film_shows_an_evaluations_episode_at_its_true_speed(film, tmp_path, capsys, monkeypatch, algo, env, fps):
    """Every other step, or as many as make fifty frames a second; chunks are played action by action."""
    every = 3 if fps == 125 else 2
    monkeypatch.setitem(Tiny.metadata, "render_fps", fps)
    run = untrained(tmp_path, env=env, algo=algo, action_chunk=1 if env == "Tiny-v0" else 4, init_std=2.0)
    shades, time, steps, score = film_of(film, capsys, run, tmp_path / "film.gif")
    expected = ncdpo.evaluate(run, episodes=1)["mean action"]
    assert score == pytest.approx(expected["return"][0], abs=0.06) and steps == expected["length"][0]
    assert shades == [7 * t for t in range(0, steps + 1, every)]
    assert time == pytest.approx(1000 * every * len(shades) / fps, abs=10)


@pytest.mark.parametrize("fps", [0, None])
@pytest.mark.parametrize("shade", [
    lambda x: np.full((32, 48, 3), x / 255, np.float32), lambda x: np.full((32, 48, 3), float(x)),
    lambda x: np.full((32, 48), x, np.uint8), lambda x: np.full((32, 48, 1), x / 255),
    lambda x: np.full((32, 48, 4), x, np.uint8), lambda x: [[[x] * 3] * 48] * 32],
    ids=["up to 1", "up to 255", "grey", "grey up to 1", "alpha", "list"])
def test_film_takes_frames_observations_and_rewards_of_many_kinds(film, tmp_path, capsys, monkeypatch, shade, fps):
    monkeypatch.setattr(Odd, "shade", staticmethod(shade))
    monkeypatch.setitem(Odd.metadata, "render_fps", fps)
    run = untrained(tmp_path, env="Odd-v0")
    shades, time, steps, score = film_of(film, capsys, run, tmp_path / "film.gif")
    assert shades == [0, 14, 28, 42, 56] and steps == 9  # at 30 a second
    assert time == pytest.approx(1000 * 2 * 5 / 30, abs=10)
    assert score == pytest.approx(ncdpo.evaluate(run, episodes=1)["mean action"]["return"][0], abs=0.06)


@pytest.mark.parametrize("env, chunk, algo", [("Hopper-v4", 1, "ncdpo"), ("Walker2d-v5", 1, "ppo"),
                                              ("Hopper-v4", 4, "ncdpo")])
def test_film_of_a_batched_task_draws_the_states_that_are_played(film, tmp_path, monkeypatch, env, chunk, algo):
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
    run = untrained(tmp_path, env=env, action_chunk=chunk, algo=algo)
    drawn, seen, act = [], [], ncdpo.Agent.act

    def render(renderer, mode):
        drawn.append(np.concatenate([renderer.data.qpos[1:], renderer.data.qvel]))
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(MujocoRenderer, "render", render)
    monkeypatch.setattr(ncdpo.Agent, "act", lambda self, obs, *noise: seen.append(obs[1]) or act(self, obs, *noise))
    frames, fps, rewards = film.play(run)
    steps, every = len(rewards), 3  # of 125 a second
    assert fps == pytest.approx(125 / 3) and len(frames) == steps // 3 + 1 and len(seen) == math.ceil(steps / chunk)
    for t in range(0, steps, math.lcm(every, chunk)):  # velocities are cut off at 10
        np.testing.assert_allclose(drawn[t // every].clip(-10, 10), seen[t // chunk].clip(-10, 10), atol=1e-12)
    monkeypatch.undo()
    expected = ncdpo.evaluate(run, episodes=1)["mean action"]
    assert steps == expected["length"][0] and sum(rewards) == pytest.approx(expected["return"][0], rel=1e-5)


@pytest.mark.parametrize("env", ["CartPole-v1", "Hopper-v4"])
def test_film_of_a_real_task(film, tmp_path, env):
    run = untrained(tmp_path, env=env)
    try:
        frames, _, rewards = film.play(run)
    except UserError as error:  # no pygame, no screen
        pytest.skip(str(error))
    assert len(rewards) == ncdpo.evaluate(run, episodes=1)["mean action"]["length"][0]
    assert frames[0].dtype == np.uint8 and frames[0].ndim == 3 and (frames[0] != frames[-1]).any()


def test_film_of_a_task_without_an_end_stops_at_max_steps(film, tmp_path):
    run = untrained(tmp_path, env="Tiny-v0")
    saved_as = run / "config.json"
    saved_as.write_text(saved_as.read_text().replace("Tiny-v0", "TinyEndless-v0"))
    assert len(film.play(run, max_steps=11)[2]) == 11


def test_strip_shows_evenly_spaced_moments_and_is_white_where_an_episode_has_ended(film):
    shade = lambda value: np.full((20, 30, 3), value, np.uint8)
    picture = np.asarray(film.strip([[shade(10 * i) for i in range(15)], [shade(200)] * 5], frames=8, size=4))
    assert picture.shape == (8, 32, 3)
    assert picture[2, 1::4, 0].tolist() == list(range(0, 160, 20)) and (picture[4:, :12] == 200).all()
    assert (picture[4:, 12:] == 255).all()


def raised(error):
    raise error


def test_film_refuses_what_it_cannot_do(film, clone, tmp_path, capsys, monkeypatch):
    assert "folder" in scripts_complaint(capsys, film, clone[0], tmp_path / "none" / "film.gif")
    assert ".gif, .mp4 or .png" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.avi")
    assert "one run" in scripts_complaint(capsys, film, clone[0], clone[0], tmp_path / "film.gif")
    assert "no run folder" in scripts_complaint(capsys, film, tmp_path, tmp_path / "film.gif")
    with monkeypatch.context() as patch:
        patch.setattr(film.importlib.util, "find_spec", lambda name: None)
        assert "pip install imageio-ffmpeg" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "render", lambda self: None)
        assert "rgb_array" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.gif")
        patch.setattr(Tiny, "render", gym.Env.render)
        assert "rgb_array" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.gif")
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "__init__", lambda self, action_space, plain=Tiny.__init__: plain(self, action_space))
        assert "takes no render_mode" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.gif")
    with monkeypatch.context() as patch:
        patch.setattr(Tiny, "render", lambda self: raised(gym.error.DependencyNotInstalled("pip install pygame")))
        assert "pip install pygame" in scripts_complaint(capsys, film, clone[0], tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["render", "step"])
def test_an_error_of_ones_own_task_shows_its_traceback_in_a_film(film, clone, tmp_path, monkeypatch, method):
    monkeypatch.setattr(Tiny, method, lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        film.main([str(clone[0]), str(tmp_path / "film.gif")])


def test_a_game_with_a_simulator_of_its_own_cannot_be_filmed(film, tmp_path, monkeypatch, capsys):
    class Own:
        def __init__(self, name, num_envs):
            self.envs = ncdpo.GymnasiumEnvs([make_env(name) for _ in range(num_envs)], 1)

        def __getattr__(self, name):
            return getattr(self.envs, name)

    module = type(sys)("toys")
    module.make_vec = lambda name, num_envs, device: Own(name, num_envs)
    monkeypatch.setitem(sys.modules, "toys", module)
    run = untrained(tmp_path, env="toys:Tiny-v0")
    assert "only Gymnasium's tasks can be filmed" in scripts_complaint(capsys, film, run, tmp_path / "film.gif")


def test_a_film_without_opengl_names_the_packages_that_bring_it(film, tmp_path, monkeypatch, capsys):
    from ctypes.util import find_library
    run = untrained(tmp_path, env="Hopper-v4")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back after the test
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    if find_library("OSMesa") is None:
        result = run_python(tmp_path, HERE / "notebooks" / "film.py", run, "film.gif", MUJOCO_GL="osmesa")
        assert result.returncode == 2 and re.fullmatch(r"film: .* osmesa .*libosmesa6.*\.\n", result.stderr)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    error = scripts_complaint(capsys, film, run, tmp_path / "film.gif")
    assert "MUJOCO_GL nonsense" in error and "libegl1" in error and "libosmesa6" in error


# --- notebooks/e16.py ------------------------------------------------------------------------------------------------

def scoring(e16, M, flows=True, **given):
    """A policy of K steps that scores the last M of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ncdpo, "DPPO", partial(e16.ScoredSteps, scored_steps=M, chain_gradient=flows))
        return make_policy("dppo", **given)


@pytest.mark.parametrize("M", [1, 2, 4, 5])
@pytest.mark.parametrize("predict, noise_scale, discrete, K", [
    ("sample", 1.0, False, 5), ("epsilon", 0.6, True, 5), ("v", 0.6, False, 12)])
def test_E15_E16_scored_steps_are_those_of_a_plain_loop(float64, e16, M, predict, noise_scale, discrete, K):
    """E15, E16: five steps, of K; the last M are scored, those before follow E5 on the noise that is kept."""
    given = dict(denoising_steps=K, sampling_steps=5, predict=predict, eta=0.7, min_std=0.3, temperature=0.5,
                 clip_denoised=0.8, gamma_denoising=0.9)
    policy = scoring(e16, M, discrete=discrete, noise_scale=noise_scale, **given)
    obs, (omega, noise) = torch.randn(11, 3), policy.draw_noise(11)
    action, log_prob, latent = policy.act(obs, omega, noise)
    x, expected = omega[:, 0], []
    for k in range(5, 0, -1):
        mu, sigma = reference_step(policy, predict, 0.7, x, k, obs)
        std, z = noise_scale * sigma, omega[:, 6 - k] / noise_scale if k > 1 else noise
        if k <= M:
            std = max(std, 0.3)
            end = Categorical(logits=mu / 0.5) if k == 1 and discrete else Normal(mu, std)
            x = action if k == 1 and discrete else mu + std * z
            expected.append(end.log_prob(x) if k == 1 and discrete else end.log_prob(x).sum(-1))
        else:
            x = mu + std * z
    torch.testing.assert_close(action, x)
    torch.testing.assert_close(log_prob, torch.stack(expected, 1))
    torch.testing.assert_close(policy.log_prob(obs, action, latent), log_prob)
    log_ratio = torch.zeros(1, M, requires_grad=True)
    policy.objective(log_ratio, torch.ones(1), 0.2)[0].backward()  # the mean of advantages discounted by steps to go
    assert (M * log_ratio.grad[0]).tolist() == pytest.approx([0.9**k for k in range(M)][::-1])
    assert latent.shape == (11, 5, 2)
    if M == 5:
        plain = ncdpo.make_policy(config(algo="dppo", hidden=8, noise_scale=noise_scale, **given), 3, 2, discrete)
        plain.load_state_dict(policy.state_dict())
        for one, other in zip(plain.act(obs, omega, noise), (action, log_prob, latent)):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("flows", [True, False])
def test_E16_one_scored_step_is_ncdpo_with_or_without_its_gradient_through_the_chain(float64, e16, flows):
    shared = dict(denoising_steps=4, min_std=0.3, init_std=0.3)
    one = scoring(e16, 1, flows, **shared)
    ncdpo_ = make_policy("ncdpo", **shared)
    ncdpo_.load_state_dict(one.state_dict())
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    omega, _ = one.draw_noise(9)
    gradients = []
    for policy in (one, ncdpo_):
        log_prob = policy.log_prob(obs, action, omega)
        gradients.append(torch.autograd.grad(log_prob.sum(), list(policy.denoiser.parameters())))
    same = [torch.allclose(a, b) for a, b in zip(*gradients)]
    assert all(same) if flows else not any(same)
    torch.testing.assert_close(log_prob, one.log_prob(obs, action, omega)[:, 0])


@pytest.mark.parametrize("steps", [1, 4])
def test_E13_E16_a_cut_chain_is_ncdpo_whose_gradient_is_that_of_the_last_step(float64, e16, monkeypatch, steps):
    whole = make_policy("ncdpo", denoising_steps=steps)
    monkeypatch.setattr(ncdpo, "NCDPO", e16.CutChain)
    cut = make_policy("ncdpo", denoising_steps=steps)
    cut.load_state_dict(whole.state_dict())
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    omega, _ = whole.draw_noise(9)
    last = Normal(whole.mu(whole.chain(obs, omega)[-2].detach(), 1, obs), whole.head.log_std.exp())
    ends = cut.log_prob(obs, action, omega), last.log_prob(action).sum(-1), whole.log_prob(obs, action, omega)
    for end in ends[1:]:
        torch.testing.assert_close(ends[0], end)
    ours, theirs, through = (torch.cat([g.flatten() for g in torch.autograd.grad(
        end.sum(), list(policy.denoiser.parameters()))]) for end, policy in zip(ends, (cut, whole, whole)))
    torch.testing.assert_close(ours, theirs)
    assert torch.allclose(ours, through) == (steps == 1)


@pytest.mark.parametrize("predict", PREDICT)
@pytest.mark.parametrize("M", [1, 2, 4])
def test_E13_E16_gradient_of_scored_steps_equals_finite_differences(float64, e16, predict, M):
    policy = scoring(e16, M, denoising_steps=5, predict=predict)
    (obs, action), latent, h = (torch.randn(5, n) for n in (3, 2)), torch.randn(5, 5, 2), 1e-5
    parameters, loss = list(policy.denoiser.parameters()), lambda: policy.log_prob(obs, action, latent).sum()
    gradient = parameters_to_vector(torch.autograd.grad(loss(), parameters))
    theta = parameters_to_vector(parameters).detach()

    def at(vector):
        vector_to_parameters(vector, parameters)
        return loss().item()

    for direction in torch.randn(3, len(theta)):
        difference = (at(theta + h * direction) - at(theta - h * direction)) / (2 * h)
        assert difference == pytest.approx((gradient @ direction).item(), rel=1e-5)


def test_scored_steps_train_and_evaluates_with_the_steps_that_its_flags_name(e16, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ncdpo, "DPPO", ncdpo.DPPO)  # put back after the test
    scored, objective = [], ncdpo.DPPO.objective
    monkeypatch.setattr(ncdpo.DPPO, "objective", lambda self, log_ratio, *more: (
        scored.append((log_ratio.shape[1], self.chain_gradient)) or objective(self, log_ratio, *more)))
    flags = ["--scored-steps", "2", *arguments("TinyBox-v0", tmp_path)]
    assert e16.main([*flags, "--no-chain-gradient"]) == 0 and set(scored) == {(2, False)}
    run = tmp_path / "TinyBox-v0__dppo__1"
    printed = capsys.readouterr().out
    assert ncdpo.load_config(run).algo == "dppo" and len(rows_of(run)) == 4
    assert e16.main(["--scored-steps", "2", "--evaluate", str(run)]) == 0 and capsys.readouterr().out in printed
    assert e16.main([*flags, "--algo", "dppo"]) == 0 and scored[-1] == (2, True)
    for steps in ("0", "6"):
        assert e16.main([*flags, "--scored-steps", steps]) == 2
        error = "e16: --scored-steps must be from 1 to 5, the number of steps that are run.\n"
        assert capsys.readouterr().err == error
    for way in ("--evaluate", "--resume"):
        assert e16.main([way, str(run)]) == 2
        assert capsys.readouterr().err == f"e16: {run} is a run of dppo: give --scored-steps as it was trained.\n"
    ncdpo.save_config(dataclasses.replace(ncdpo.load_config(run), algo="ppo"), run)
    assert e16.main(["--evaluate", str(run)]) == 2
    assert capsys.readouterr().err == f"e16: {run} is a run of ppo: ncdpo.py goes on with it.\n"
    for wrong in ([*flags, "--algo", "ncdpo"], [*flags[2:], "--algo", "dppo"]):  # which would ignore it
        with pytest.raises(SystemExit):
            e16.main(wrong)


def test_without_scored_steps_ncdpo_itself_trains_with_or_without_its_chain_gradient(e16, tmp_path, monkeypatch):
    monkeypatch.setattr(ncdpo, "NCDPO", ncdpo.NCDPO)  # put back after the test
    make, made = ncdpo.make_policy, []
    monkeypatch.setattr(ncdpo, "make_policy", lambda *given: made.append(make(*given)) or made[-1])
    for way in ([], ["--no-chain-gradient", "--algo", "ncdpo"]):
        assert e16.main([*way, *arguments("TinyBox-v0", tmp_path)]) == 0
        assert (type(made[-1]) is e16.CutChain) == bool(way)
    assert len(rows_of(tmp_path / "TinyBox-v0__ncdpo__1-2")) == 4


# --- notebooks/health.py ---------------------------------------------------------------------------------------------

def test_chain_gradient_measures_the_gradient_at_each_denoising_step(float64, health):  # E13
    policy, B = make_policy(denoising_steps=4), 6
    obs, action, omega, advantage = torch.randn(B, 3), torch.randn(B, 2), torch.randn(B, 4, 2), torch.randn(B)
    norms, clipped = health.chain_gradient(policy, obs, action, omega, advantage)
    mean = policy.mean(obs, omega.requires_grad_())
    at_x0 = (-advantage[:, None] * (action - mean) / policy.head.log_std.exp() ** 2 / B).detach()
    at_omega, = torch.autograd.grad((mean * at_x0).sum(), omega)
    assert len(norms) == 5 and clipped == 0
    assert (norms[0], norms[-1]) == pytest.approx((at_omega[:, 0].norm().item(), at_x0.norm().item()))
    policy.schedule.clip = mean.abs().median().item()
    share = (policy.mean(obs, omega).abs() == policy.schedule.clip).double().mean().item()
    assert health.chain_gradient(policy, obs, action, omega, advantage)[1] == pytest.approx(share) and 0 < share < 1


@pytest.mark.parametrize("env, chunk", [("HalfCheetah-v4", 1), ("HalfCheetah-v5", 4)])
def test_a_cheetah_on_its_back_is_counted_as_tipped_over(health, tmp_path, monkeypatch, env, chunk):
    run = untrained(tmp_path, env=env, action_chunk=chunk)
    step, played, angles = VectorEnv.step, [], torch.tensor([0.0, 1.0, -1.1, math.pi, 2 * math.pi])

    def turned(self, action):
        obs, reward, terminated, truncated, final_obs = step(self, action)
        final_obs[:, 1] = angles if len(played) % 2 else 0  # every other step
        played.append(reward)
        return obs, reward, terminated, truncated | (len(played) == 10), final_obs

    monkeypatch.setattr(VectorEnv, "step", turned)
    total, over = health.tipped(run, episodes=5)
    np.testing.assert_allclose(total, sum(played).sum(1), rtol=1e-5)
    assert over.tolist() == [0, 0, 0.5, 0.5, 0] and len(played) == 10
    monkeypatch.undo()
    with pytest.raises(UserError, match="only HalfCheetah"):
        health.tipped(untrained(tmp_path / "tiny", env="TinyBox-v0"))


# --- notebooks/curves.py ---------------------------------------------------------------------------------------------

def test_picture_of_runs_shows_the_updates_with_episodes_and_few_of_them_as_points(tmp_path, curves):
    for name, n in (("short", 4), ("long", 300)):
        (tmp_path / name).mkdir()
        rows = [f"{i},{i},{2 * i},1,{'' if i == 1 else -i}" + 12 * "," for i in range(n)]
        (tmp_path / name / "metrics.csv").write_text("\n".join([",".join(ncdpo.COLUMNS), *rows]))
    picture = curves.picture([tmp_path / "short", tmp_path / "long"])
    for axes, factor in zip(picture.axes, (1, 2), strict=True):
        for line, n, name in zip(axes.lines, (4, 300), ("short", "long"), strict=True):
            name = str(tmp_path / name)
            steps = np.delete(np.arange(n), 1)
            assert line.get_xdata().tolist() == (factor * steps).tolist() and line.get_label() == name
            assert line.get_ydata().tolist() == (-steps).tolist() and (line.get_marker() == ".") == (n == 4)


PROGRAM = """
import sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if "--evaluate" in flags:
    pass
elif "--resume" in flags:
    assert flags["--rate"] == "run-2"
    sys.exit("ncdpo: it is finished after 400 steps; raise --total-timesteps.")
else:
    run = Path(flags["--runs"], f"a_b__dppo__{flags['--seed']}")
    run.mkdir()
    (run / "checkpoint.pt").touch()
    seed = int(flags["--seed"])
    rows = [f"{i},{i},{2 * i},1,{seed * i}" + 12 * "," for i in range(1, 201)]
    (run / "metrics.csv").write_text(HEADER + "\\n" + "\\n".join(rows))
    assert flags["--rate"] == f"run-{seed}" and flags["--env"] == "a:b?c=1" and flags["--algo"] == "dppo"
    if seed == 2 and not Path(flags["--runs"], "again").exists():
        sys.exit("interrupted")
print("  mean action: return 7.5 +- 0.1 (min 7, max 8)")
"""


def test_runs_of_another_program_are_resumed_but_not_repeated_and_become_files(tmp_path, monkeypatch, curves, capsys):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "other.py").write_text(PROGRAM.replace("HEADER", repr(",".join(ncdpo.COLUMNS))))
    monkeypatch.setattr(curves, "HERE", tmp_path / "notebooks")
    line = "curves.py train a:b?c=1 dppo --seeds 1 2 --program other.py --rate run-{seed} --jobs 1"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match="interrupted"):
        curves.main()
    runs, folder = tmp_path / "runs" / "a_b__dppo", tmp_path / "notebooks" / "curves"
    (folder / "evaluations.csv").write_text("task,line,seed,exploring,mean action\na_b,dppo,1,1,1\na_b,ppo,1,2,3\n")
    before = (runs / "a_b__dppo__1.log").stat().st_mtime_ns
    curves.main()
    assert (runs / "a_b__dppo__1.log").stat().st_mtime_ns == before
    assert "7.5" in (runs / "a_b__dppo__2.log").read_text()  # of a run whose evaluation alone was missing
    curve = curves.read(folder / "a_b__dppo.csv")
    assert list(curve) == curves.COLUMNS and curve["seed"][:, 0].tolist() == [1, 2]
    assert "chain_clipped" not in curves.COLUMNS
    expected = [(2 * t + 2 * t - 1) / 2 for t in range(1, 101)]  # two updates a row
    np.testing.assert_allclose(curve["return"], [expected, [2 * x for x in expected]])
    assert curves.rows_of(folder / "evaluations.csv") == [  # another line's row stays, the line's own are replaced
        {"task": "a_b", "line": "ppo", "seed": "1", "exploring": "2", "mean action": "3"},
        *({"task": "a_b", "line": "dppo", "seed": seed, "exploring": "", "mean action": "7.5"} for seed in "12")]
    assert curves.load(folder)["a_b"]["dppo"]["mean action"].tolist() == [7.5, 7.5]
    kept = contents(tmp_path)
    for changed, words in ((line.replace("--seeds 1 2", "--seeds 2 3"), r"would be lost \(1\)"),
                           (line.replace("run-{seed}", "x"), r"made with other.py a:b\?c=1 --rate run-{seed}, not"),
                           (line.replace("c=1", "c=2"), r"run-{seed}, not made with other.py a:b\?c=2 --rate"),
                           (line + " --name x/mine", "must end in TASK__LINE, as a_b__dppo"),
                           ("curves.py --foldr x", "2"), ("curves.py show nowhere", "nowhere is no run folder"),
                           ("curves.py --ratios ncdpo", "--ratios wants LINE/LINE"),
                           ("curves.py --pool --ratios a/b a/c", "--pool wants --ratios without a line in common")):
        monkeypatch.setattr(sys, "argv", changed.split())
        with pytest.raises(SystemExit, match=words):
            curves.main()
    assert contents(tmp_path) == kept
    # a run that went on by hand is evaluated again; one whose folder is gone is run again, whatever its log says
    os.utime(runs / "a_b__dppo__2" / "metrics.csv", (2e9, 2e9))
    shutil.rmtree(runs / "a_b__dppo__1")
    (runs / "a_b__dppo__1.log").write_text("made with other flags\n  mean action: return 3 +- 0 (min 3, max 3)\n")
    (runs / "a_b__dppo__2.log").write_text((runs / "a_b__dppo__2.log").read_text().replace("7.5", "2.5"))
    os.utime(runs / "a_b__dppo__2.log", (1e9, 1e9))
    monkeypatch.setattr(sys, "argv", line.split())
    curves.main()
    assert curves.load(folder)["a_b"]["dppo"]["mean action"].tolist() == [7.5, 7.5]


def test_what_a_run_prints_at_its_end_is_read_back(curves):
    numbers = {"return": np.array([1.0, 2.5]), "length": np.array([5.0, 7]), "success": np.array([1.0, 0])}
    ways = {"exploring": numbers, "mean action": {**numbers, "return": np.array([-3.0, -4])}}
    log = "    1,024 steps (50%), return 99.0, 7 steps/s\n" + ncdpo.describe(ways)
    assert curves.evaluation(log) == {"exploring": 1.75, "exploring success": 0.5,
                                      "mean action": -3.5, "mean action success": 0.5}
    numbers["success"] = np.full(2, np.nan)
    assert curves.evaluation(ncdpo.describe({"zero noise": numbers})) == {"zero noise": 1.75}
    assert curves.evaluation("    1,024 steps (50%), return 99.0, success 12%\n") == {}


def test_runs_of_folders_whose_seeds_have_starts_of_their_own_are_compared_in_pairs(
        curves, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    for folder in ("other", curves.OWN_STARTS[0]):
        (tmp_path / "curves" / folder).mkdir(parents=True)
        write_line(tmp_path / "curves" / folder, "Task-v0__ncdpo", [2, 20, 200])
        write_line(tmp_path / "curves" / folder, "Task-v0__ppo", [1, 10, 100])
    assert "2.00 [2.00, 2.00]" in printed(curves, monkeypatch, capsys, f"curves.py --folder {curves.OWN_STARTS[0]}")
    assert "2.00 [2.00, 2.00]" not in printed(curves, monkeypatch, capsys, "curves.py --folder other")
    # a line that shares no seed has no pairs, and is left out
    write_line(tmp_path / "curves" / curves.OWN_STARTS[0], "Task-v0__dppo", [1, 10, 100], seeds=(4, 5, 6))
    text = printed(curves, monkeypatch, capsys, f"curves.py --folder {curves.OWN_STARTS[0]}")
    assert "2.00 [2.00, 2.00]" in text and "/ DPPO" not in text
    # pairs are found by their seeds, in whatever order, and lines by their names, in the other folder too
    write_line(tmp_path / "curves" / curves.OWN_STARTS[0], "Task-v0__mine", [2, 20, 200])
    write_line(tmp_path / "curves" / "other", "Task-v0__mine", [100, 10, 1], seeds=(3, 2, 1))
    line = f"curves.py --folder {curves.OWN_STARTS[0]} --against other --ratios mine/mine"
    assert "2.00 [2.00, 2.00]" in printed(curves, monkeypatch, capsys, line)


def test_tables_tell_of_what_they_cannot_compare(curves, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    (tmp_path / "curves").mkdir()
    rows = [f"{seed},{step},60,{step < 8e5:d},{seed if step < 8e5 else ''},5"
            for seed in (1, 2, 3) for step in (4e5, 8e5)]
    (tmp_path / "curves" / "Task-v0__ncdpo.csv").write_text(
        "\n".join(["seed,step,seconds,episodes,return,length", *rows]))
    write_line(tmp_path / "curves", "Task-v0__ppo", [1, 2, 3])
    monkeypatch.setattr(curves, "figure", lambda *args, **kwargs: types.SimpleNamespace(savefig=lambda *a, **k: None))
    monkeypatch.setattr(sys, "argv", "curves.py --folder .".split())
    curves.main()
    error = capsys.readouterr().err
    assert "no episode ended in the last tenth of a seed of NCDPO, Task-v0" in error and "MLP" not in error
    assert "lines of Task-v0 end after different numbers of steps, [2, 800000]" in error
    nothing = {"step": np.ones((1, 2)), "return": np.full((1, 2), np.nan)}
    assert np.isnan(curves.returns(nothing)).all()


def write_line(folder, name, values, seeds=(1, 2, 3)):
    """A file of two rows a seed, of which the last tenth of training is the second."""
    rows = [f"{seed},{step},60,1,{value},5" for seed, value in zip(seeds, values) for step in (1, 2)]
    (folder / f"{name}.csv").write_text("\n".join(["seed,step,seconds,episodes,return,length", *rows]))


def test_lines_are_sorted_by_algorithm_and_steps_and_named_so_in_the_tables(curves, tmp_path):
    for i, line in enumerate(("ppo", "dppo-s20", "ncdpo-k10", "ncdpo-k2", "ncdpo-epsilon")):
        write_line(tmp_path, f"Task-v0__{line}", [i + 1, i + 2, i + 3])
    loaded = curves.load(tmp_path)
    assert list(loaded["Task-v0"]) == ["ncdpo-k2", "ncdpo-k10", "ppo", "dppo-s20"]  # "ncdpo-epsilon" is no line
    assert [row.split("|")[2].strip() for row in curves.table(loaded).splitlines()[2:]] == [
        "NCDPO, K = 2", "NCDPO, K = 10", "MLP+PPO", "DPPO, S = 20"]
    assert list(curves.load(tmp_path, only=["ncdpo-epsilon", "ppo"])["Task-v0"]) == ["ncdpo-epsilon", "ppo"]


def test_the_final_success_is_unknown_where_only_some_episodes_tell_it(curves):
    told = {"step": np.zeros((1, 30)), "episodes": np.array([[9] * 27 + [4, 0, 1]]),
            "success": np.array([[0.0] * 27 + [0.5, np.nan, 1.0]])}
    assert curves.final(told, "success").tolist() == [0.6]  # nothing ended in the row between
    told["episodes"][0, -2] = 1
    assert np.isnan(curves.final(told, "success")).all()


def test_seeds_of_two_folders_are_put_together_with_their_own_evaluations(curves, tmp_path):
    for name, seeds, extra in (("a", (1, 2, 3), ",zero noise"), ("b", (7, 8), "")):
        (tmp_path / name).mkdir()
        write_line(tmp_path / name, "Task-v0__ncdpo", [10 * seed for seed in seeds], seeds)
        rows = [f"Task-v0,ncdpo,{seed},{100 * seed}" + (",5" if extra else "") for seed in reversed(seeds)]
        rows.append("Task-v0,dppo,7,700")
        (tmp_path / name / "evaluations.csv").write_text("\n".join(["task,line,seed,mean action" + extra, *rows]))
    write_line(tmp_path / "b", "Task-v0__dppo", [1, 2], (7, 8))
    loaded = curves.load(tmp_path / "a", tmp_path / "b")["Task-v0"]
    assert curves.final(loaded["ncdpo"]).tolist() == [10, 20, 30, 70, 80]
    assert loaded["ncdpo"]["mean action"].tolist() == [100, 200, 300, 700, 800]
    assert "zero noise" not in loaded["ncdpo"] and "mean action" not in loaded["dppo"]  # not known of all seeds
    assert curves.load(tmp_path / "a")["Task-v0"]["ncdpo"]["zero noise"].tolist() == [5, 5, 5]
    with pytest.raises(SystemExit, match="a/Task-v0__ncdpo.csv has seeds that another of these folders has"):
        curves.load(tmp_path / "a", tmp_path / "a")  # which would count them twice


def printed(curves, monkeypatch, capsys, line):
    """What a command line of curves.py prints; figures are not drawn."""
    monkeypatch.setattr(curves, "figure", lambda *args, **kwargs: type("", (), {"savefig": lambda *a, **k: None})())
    monkeypatch.setattr(sys, "argv", line.split())
    capsys.readouterr()
    curves.main()
    return capsys.readouterr().out


def test_each_ncdpo_is_compared_with_the_line_of_its_ending_and_with_all_that_have_no_other(
        curves, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    for folder in ("one", "two"):
        (tmp_path / "curves" / folder).mkdir(parents=True)
    values = {"ncdpo": 12, "dppo": 6, "ppo": 4, "dppo-matched": 3, "ncdpo-sample": 20, "dppo-sample": 10}
    for line, value in values.items():
        write_line(tmp_path / "curves" / "one", f"Task-v0__{line}", [value] * 3)
    write_line(tmp_path / "curves" / "two", "Task-v0__ppo", [8] * 3)
    said = lambda line: re.findall(r"^\| ([^|]* / [^|]*) \| Task-v0 \| 3 \| (\S+)", printed(
        curves, monkeypatch, capsys, f"curves.py {line}"), re.MULTILINE)
    assert sorted(said("--folder one")) == sorted([
        ("NCDPO / MLP+PPO", "3.00"), ("NCDPO / DPPO", "2.00"), ("NCDPO / DPPO, matched noise", "4.00"),
        ('NCDPO, "sample" / DPPO, "sample"', "2.00")])
    assert said("--folder one --ratios ppo/dppo-matched dppo/ncdpo") == [
        ("MLP+PPO / DPPO, matched noise", "1.33"), ("DPPO / NCDPO", "0.50")]
    assert said("--folder one --against two") == [("MLP+PPO / two", "0.50")]
    assert said("--folder one --against two --ratios ncdpo/ppo") == [("NCDPO / MLP+PPO, two", "1.50")]
    assert "| pooled | all 2 | 3 | 3.65 [3.65, 3.65] **higher, provisional** |" in printed(
        curves, monkeypatch, capsys, "curves.py --folder one --pool --ratios ncdpo/dppo-matched ncdpo-sample/dppo")
    assert "| pooled | MLP+PPO / two, Task-v0 | 3 | 0.50" in printed(
        curves, monkeypatch, capsys, "curves.py --folder one --against two --pool --ratios ppo/ppo")
    with pytest.raises(SystemExit, match="no such lines"):
        said("--folder one --ratios ppo5/ppo6")


def test_where_success_is_all_that_is_paid_for_tables_say_it_once(curves, tmp_path):
    for line, share in (("ncdpo", 0.75), ("ppo", 0.5)):
        rows = [f"{seed},{step},60,4,{share},{share}" for seed in (1, 2) for step in (1, 2)]
        (tmp_path / f"Task-v0__{line}.csv").write_text("\n".join(["seed,step,seconds,episodes,return,success", *rows]))
    ways = "exploring,exploring success,mean action,mean action success"
    evaluated = [f"Task-v0,{line},{seed},0.4,0.44,0.9,0.8{seed}" for line in ("ncdpo", "ppo") for seed in (1, 2)]
    (tmp_path / "evaluations.csv").write_text("\n".join([f"task,line,seed,{ways}", *evaluated]))
    loaded = curves.load(tmp_path)
    heads, _, row, _ = ([cell.strip() for cell in line.split("|")][1:-1] for line in curves.table(loaded).splitlines())
    assert heads[3:6] == ["final success", "area of success", "exploring / mean action / zero noise"]
    assert row[3:6] == ["0.75 [0.75, 0.75]", "0.75 [0.75, 0.75]", "0.44 / 0.81"]
    told = curves.measures(loaded["Task-v0"]["ncdpo"])
    assert list(told) == ["seed", "final success", "area of success", "mean action success"]


def test_table_of_curves_that_are_straight_lines(curves, tmp_path):
    """Return slope * seed * t at row t of 100; no episode ends in each seventh row, ten in the last one, else one."""
    for algo, slope in (("ncdpo", 2), ("ppo", 1)):
        with open(tmp_path / f"Task-v1__{algo}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, curves.COLUMNS)
            writer.writeheader()
            for seed, t in itertools.product(range(1, 6), range(1, 101)):
                n = 0 if t % 7 == 0 else 10 if t == 100 else 1
                writer.writerow({"seed": seed, "step": t, "seconds": 60 * t * seed, "episodes": n,
                                 "return": slope * seed * t if n else "", "success": 0.25 if n else ""})
    heads, _, ours, theirs = ([cell.strip() for cell in line.split("|")][1:-1] for line in
                              curves.table(curves.load(tmp_path)).splitlines())
    assert heads == ["task", "algorithm", "seeds", "final success", "final return", "area", "minutes"]
    # seed 3 is their mean; of the last ten rows 91 and 98 are empty: (92 + ... + 99 - 98 + 10 * 100) / 17 = 98
    half = 2.776 * np.std([196, 392, 588, 784, 980], ddof=1) / 5**0.5  # t of four degrees of freedom
    assert ours == ["Task-v1", "NCDPO", "5", "0.25 [0.25, 0.25]", f"588 [{588 - half:.0f}, {588 + half:.0f}]",
                    ours[5], "300.0"]
    assert ours[5].startswith("303 [") and theirs[4].startswith("294 [")


# --- notebooks/verdicts.py -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dof, quantile", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (10, 2.228), (30, 2.042),
                                           (120, 1.980)])
def test_quantiles_are_those_of_the_printed_tables_of_students_t(verdicts, dof, quantile):
    assert verdicts.student(dof) == pytest.approx(quantile, abs=6e-4)


def test_quantile_between_whole_degrees_of_freedom_leaves_a_fortieth_above(verdicts):
    x = np.random.default_rng(0).standard_t(2.5, 400_000)
    assert np.mean(x > verdicts.student(2.5)) == pytest.approx(0.025, abs=1e-3)


def test_interval_of_a_mean_is_the_t_interval_along_seeds(verdicts):
    low, high = verdicts.interval(np.array([[1.0, 10], [2, 10], [3, 10]]))
    np.testing.assert_allclose([low, high], [[2 - 4.3027 / 3**0.5, 10], [2 + 4.3027 / 3**0.5, 10]], atol=1e-3)
    assert np.isnan(verdicts.interval(np.array([1.0]))).all()


def test_ratio_of_one_task_is_welchs_interval_of_relative_deviations(verdicts):
    x, y = np.array([3.0, 4, 8]), np.array([2.0, 3, 3, 0])  # a seed may be 0
    a, b = np.var([0.6, 0.8, 1.6], ddof=1) / 3, np.var([1, 1.5, 1.5, 0], ddof=1) / 4
    dof = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    half = verdicts.student(dof) * (a + b) ** 0.5
    np.testing.assert_allclose(verdicts.ratio(x, y), [2.5, 2.5 * np.exp(-half), 2.5 * np.exp(half)])
    assert verdicts.ratio([20.0] * 5, [10.0] * 5) == pytest.approx((2, 2, 2))


def test_a_ratio_without_a_positive_mean_or_of_a_single_seed_is_not_a_number(verdicts):
    for x, y in (([1.0, 2], [-5.0, 4]), ([-1.0, 1], [1.0, 2]), ([1.0], [1.0, 2])):
        assert np.isnan(verdicts.ratio(x, y)).all()
    assert np.isnan(verdicts.ratio([3.0, 0], [1.0, 2], paired=True)).all()  # a pair's ratio needs two positive numbers
    assert verdicts.ratio([3.0, 0], [1.0, 2])[0] == 1


def test_pooled_ratio_is_the_geometric_mean_whatever_a_tasks_unit(verdicts):
    rng = np.random.default_rng(3)
    ours, theirs = rng.uniform(1, 2, (3, 5)), rng.uniform(1, 2, (3, 5))
    point, low, high = verdicts.ratio(ours, theirs)
    singles = [verdicts.ratio(x, y) for x, y in zip(ours, theirs)]
    assert point == pytest.approx(np.prod([single[0] for single in singles]) ** (1 / 3))
    scale = np.array([[1], [1000], [0.01]])
    assert verdicts.ratio(ours * scale, theirs * scale) == pytest.approx((point, low, high))
    assert np.log(high / low) < max(np.log(single[2] / single[1]) for single in singles)


def test_pairs_take_out_what_the_seeds_of_a_pair_share(verdicts):
    start = np.array([1.0, 3, 10])
    assert verdicts.ratio(2 * start, start, paired=True) == pytest.approx((2, 2, 2))
    _, low, high = verdicts.ratio(2 * start, start)
    assert low < 1 < high
    x, y = np.array([1.0, 2, 3]), np.array([2.0, 2, 5])
    half = verdicts.student(2) * np.std(np.log([0.5, 1, 0.6]), ddof=1) / 3**0.5
    middle = 0.3 ** (1 / 3)
    assert verdicts.ratio(x, y, paired=True) == pytest.approx(
        (middle, middle * np.exp(-half), middle * np.exp(half)))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seeds, tasks", [(3, 1), (3, 3), (10, 3)])
def test_intervals_hold_the_true_ratio_as_often_as_they_say(verdicts, seeds, tasks, paired):
    rng = np.random.default_rng(1)
    pairs = [(spread * np.array([-1.0, 0, 1]) + mean, np.array([-0.1, 0, 0.1]) + 1)
             for spread, mean in ((0.2, 1.5), (1, 5), (0.05, 1))[:tasks]]
    assert 0.92 < verdicts.coverage(pairs, rng.normal(size=1000), seeds, paired, samples=1000) < 0.98


def test_improvement_is_the_share_of_pairs_in_which_ours_is_above(verdicts):
    assert verdicts.improvement([[1.0, 5]], [[2.0, 3, 4, 0]]) == 5 / 8
    assert verdicts.improvement([[1.0, 5], [1.0]], [[2.0, 3, 4, 0], [2.0]]) == 5 / 16
    assert verdicts.improvement([[1.0, 5]], [[0.0, 6]], paired=True) == 1 / 2


def test_words_follow_from_the_interval_and_few_seeds_make_them_provisional(verdicts):
    for low, high, word in ((1.01, 3, "higher"), (0.5, 0.99, "lower"), (0.91, 0.99, "lower"), (0.91, 1.2, "as high"),
                            (0.89, 1.2, ""), (1.0, 1.2, "as high"), (0.9, 1.2, "")):
        assert verdicts.word(low, high, 5) == word
        assert verdicts.word(low, high, 4) == (word and f"{word}, provisional")
    assert verdicts.cell(0.95, 0.8999, 1.004, 5) == "0.95 [0.8999, 1.004]"
    assert verdicts.cell(2, 1.5, 2.5, 3) == "2.00 [1.50, 2.50] **higher, provisional**"
    assert verdicts.cell(*[np.nan] * 3, 3) == ""


def test_ratio_table_pools_the_tasks_and_takes_only_seeds_of_both_in_pairs(verdicts):
    seeds = np.arange(6.0)
    ours = {"seed": seeds, "return": 2 * seeds + 2, "mean action": seeds + 1}
    theirs = {"seed": seeds[1:], "return": seeds[1:] + 1}
    table = lambda **how: [[cell.strip() for cell in row.split("|")[1:-1]] for row in verdicts.ratio_table(
        {"A / B": {"one": (ours, theirs), "two": (theirs, theirs)}}, **how).splitlines()]
    heads, _, one, two, both = table(paired=True)
    assert heads == ["ratio", "task", "seeds", "return", "chance above"] and one[:3] == ["A / B", "one", "5"]
    assert one[3] == "2.00 [2.00, 2.00] **higher**" and two[3] == "1.000 [1.000, 1.000] **as high**"
    assert both[1] == "all 2" and both[3] == "1.41 [1.41, 1.41] **higher**" and two[4] == "0%"
    assert table()[2][2] == "5 to 6"  # not in pairs all seeds count
    for values in (ours, theirs):
        values["success"] = values["return"] * 0  # no ratio: the chance is the next measure's
    ours, theirs = ({key: values[key] for key in ("seed", "success", "return")} for values in (ours, theirs))
    assert table(paired=True)[2][3:] == ["", "2.00 [2.00, 2.00] **higher**", "100%"]


# ===== texts: numbers of README.md and RESULTS.md come from CSV files ================================================

TABLES = "RESULTS.md", "TUNING.md"


@pytest.fixture
def said(curves, monkeypatch, capsys):
    """What all commands of RESULTS.md and TUNING.md that print tables print, in code blocks and as `--folder ...`."""
    text = "".join((HERE / "notebooks" / name).read_text() for name in TABLES).replace("\\\n", " ")
    found = re.findall(r"^python notebooks/(curves\.py(?: --.*)?)$", text, re.MULTILINE)
    found += [f"curves.py {line}" for line in re.findall(r"`(--folder\s[^`]*)`", text)]
    lines = dict.fromkeys(" ".join(re.sub(r" +#.*", "", line).split()) for line in found)
    assert len(lines) > 15
    return [row for line in lines for row in printed(curves, monkeypatch, capsys, line).splitlines()]


def test_every_row_of_a_table_of_results_is_what_its_commands_print(said):
    text = "".join((HERE / "notebooks" / name).read_text() for name in TABLES)
    tables = re.findall(r"^\| (?:ratio \| task|task \| algorithm \| seeds) .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) > 20
    for row in (row for table in tables for row in table.splitlines()):
        assert row in said or set(row) <= set("|-"), row


def intervals(text):
    """What a text says with an interval, "1.16 [1.07, 1.26]", whatever its line breaks."""
    number = r"-?[\d,]+(?:\.\d+)?"
    return [" ".join(found.split()) for found in re.findall(rf"{number}\s+\[{number},\s+{number}\]", text)]


def test_every_interval_of_results_is_printed_by_its_commands(said):
    text = (HERE / "notebooks" / "RESULTS.md").read_text()
    own_file = re.compile(r"\n## What noise-conditioning keeps.*?(?=\n## )", re.DOTALL)
    found = intervals(own_file.sub("", text))
    assert len(found) > 50 and set(found) - {KEPT} <= set(intervals("\n".join(said)))


@pytest.mark.parametrize("names", [("dense", "mechanism"), ("mechanism", "dense")])
def test_files_of_the_modes_that_have_no_table_in_common_are_told(names):
    with pytest.raises(UserError, match="no table in common"):
        modes.table(names)


def test_every_interval_of_the_modes_is_a_rounding_of_one_that_their_tables_print():
    modes = importlib.import_module("notebooks.modes")
    text = (HERE / "notebooks" / "RESULTS.md").read_text()
    section = re.search(r"\n## What noise-conditioning keeps.*?(?=\n## )", text, re.DOTALL)[0]
    number = r"([-+]?[\d,]+(?:\.\d+)?(?:e-\d+)?)"
    triples = lambda text: [[cell.replace(",", "") for cell in found] for found in re.findall(
        rf"{number}\s+\[{number},\s+{number}\]", text)]
    names = [path.stem for path in modes.CURVES.glob("*.csv")]
    names.sort(key=lambda name: name != "dense")  # from which differences are taken
    printed = [[float(cell) for cell in cells] for measured in ([n for n in names if n != "mechanism"], ["mechanism"])
               for cells in triples(modes.table(measured))]
    said = triples(section)
    said.remove(["-409", "-1266", "447"])  # of HalfCheetah, whose command stands beside it
    assert len(said) > 60
    for cells in said:
        digits = [len(cell.partition(".")[2]) for cell in cells]
        close = lambda found: all(abs(float(cell) - x) <= 0.5 * 10.0**-d + 0.005 * abs(x)  # x has three digits
                                  for cell, x, d in zip(cells, found, digits))
        assert any(map(close, printed)), cells


KEPT = "0.23 [0.12, 0.33]"


def test_the_difference_of_entropies_of_the_headline_is_that_of_the_file(verdicts):
    """Welch's interval of a difference of means, at the last evaluation."""
    with open(HERE / "notebooks" / "curves" / "modes" / "dense.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last = max(int(row["decisions"]) for row in rows)
    x, y = ([float(row["entropy"]) for row in rows if row["line"] == line and int(row["decisions"]) == last]
            for line in ("ncdpo", "dppo"))
    a, b = (np.var(z, ddof=1) / 20 for z in (x, y))
    difference, half = np.mean(x) - np.mean(y), verdicts.student((a + b) ** 2 / ((a**2 + b**2) / 19)) * np.sqrt(a + b)
    assert f"{difference:.2f} [{difference - half:.2f}, {difference + half:.2f}]" == KEPT and len(x) == len(y) == 20
    assert f"+{KEPT}" in (HERE / "notebooks" / "RESULTS.md").read_text()


def test_every_interval_of_the_readme_is_in_results():
    found = intervals(README.read_text())
    assert len(found) > 5 and set(found) <= set(intervals((HERE / "notebooks" / "RESULTS.md").read_text()))


def test_files_with_the_columns_of_older_runs_are_read(curves, tmp_path):
    names = ["seed", "step", "seconds", "episodes", "return", "length", "sigma", "chain_clipped"]
    rows = [f"{seed},{t},1,1,{seed * t},5,0.5,0.25" for seed in (1, 2) for t in (1, 2, 3)]
    (tmp_path / "old.csv").write_text("\n".join([",".join(names), *rows]))
    curve = curves.read(tmp_path / "old.csv")
    assert curve["return"].tolist() == [[1, 2, 3], [2, 4, 6]] and (curve["sigma"] == 0.5).all()
    assert np.isnan(curve["success"]).all() and np.isnan(curve["chain_std"]).all()


def test_steps_to_a_threshold_are_those_of_a_straight_line(curves):
    curve = {"step": np.arange(1, 101)[None] * 10_000.0, "return": np.arange(100)[None] * 1.0}
    curve = {name: x.repeat(2, 0) for name, x in curve.items()} | {"seconds": np.arange(200.0).reshape(2, 100)}
    steps = curves.reach(curve, 50)
    assert steps.shape == (2,) and abs(steps[0] - 530_000) < 11_000  # the mean of five rows lags by two
    assert curves.reach(curve, 50, "seconds").tolist() == [52, 152]  # each seed has its own clock
    assert np.isinf(curves.reach(curve, 1000)).all()


def test_thinned_curve_keeps_episodes_and_their_mean_return(curves):
    rng = np.random.default_rng(2)
    history = {"step": np.arange(1, 1001) * 64.0, "seconds": np.arange(1, 1001) * 0.5,
               "episodes": rng.integers(0, 3, 1000).astype(float), "return": rng.normal(size=1000),
               "length": rng.normal(size=1000), **{name: rng.normal(size=1000) for name in curves.DIAGNOSTICS}}
    history["chain_std"][:] = np.nan  # MLP+PPO has no chain
    history["return"][history["episodes"] == 0] = np.nan
    rows = curves.thin(history)
    episodes = np.array([row["episodes"] for row in rows])
    assert len(rows) == 100 and episodes.sum() == history["episodes"].sum()
    mean = np.average([float(row["return"]) for row in rows], weights=episodes)
    assert mean == pytest.approx(np.nansum(history["return"] * history["episodes"]) / episodes.sum(), abs=1e-4)
    assert float(rows[7]["sigma"]) == pytest.approx(history["sigma"][70:80].mean(), rel=1e-3)
    assert {row["chain_std"] for row in rows} == {""}


# --- notebooks/speed.py ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, compiled", [("", 0), ("--compile", 8)])
def test_speed_prints_a_row_for_each_number_of_environments_and_policy(speed, monkeypatch, capsys, flags, compiled):
    functions = []
    monkeypatch.setattr(torch, "compile", lambda function: functions.append(function) or function)
    speed.main(f"--env CartPole-v1 --device cpu --num-envs 4 8 --num-steps 8 {flags}".split())
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["4", "4", "8", "8"] and len(functions) == compiled
    assert all(float(row[i].replace(",", "")) > 0 for row in rows for i in (2, 3))



@pytest.fixture
def games(monkeypatch):
    """notebooks/games.py, with a scenario "coded" whose numbers tell of which world and agent they are."""
    pytest.importorskip("vmas", reason="games need vmas")
    games = pytest.importorskip("notebooks.games")
    games.load("football")  # imports VMAS without its noise
    import random

    from vmas.simulator.core import Agent, World
    from vmas.simulator.scenario import BaseScenario

    class Coded(BaseScenario):
        """World w ends after 3 + w steps. An agent observes w, itself, the step, a random start, its action, luck."""

        def make_world(self, batch_dim, device, **kwargs):
            world, self.w = World(batch_dim, device), torch.arange(batch_dim, device=device)
            for i in range(kwargs.pop("n_agents", 3)):
                world.add_agent(Agent(f"agent {i}"))
            self.hidden = [{"t": torch.zeros(batch_dim)}]
            return world

        def reset_world_at(self, env_index=None):
            assert env_index is None  # one at a time is slow
            self.hidden[0]["t"][:] = 0
            self.luck = torch.zeros(len(self.w))
            self.start = torch.rand(len(self.w)) + np.random.random() + random.random()
            for agent in self.world.agents:
                agent.last = torch.zeros(len(self.w))

        def process_action(self, agent):
            agent.last = agent.action.u[:, 0].clone()

        def post_step(self):
            self.hidden[0]["t"] += 1
            self.luck = torch.rand(len(self.w))

        def observation(self, agent):
            i = torch.full_like(self.start, self.world.agents.index(agent))
            return torch.stack([self.w, i, self.hidden[0]["t"], self.start, agent.last, self.luck], 1)

        def reward(self, agent):
            return 100 * self.w + 10 * self.world.agents.index(agent) + self.hidden[0]["t"]

        def done(self):
            return self.hidden[0]["t"] >= 3 + self.w

        def info(self, agent):
            return {"well": self.w != 1}  # world 1 never ends well

    real = games.load
    monkeypatch.setattr(games, "load", lambda name: Coded() if name == "coded" else real(name))
    monkeypatch.setitem(games.WON, Path(__file__).stem, lambda info: info["well"])
    return games


def test_actions_observations_and_rewards_of_agents_land_on_their_rows(games):
    game = games.make_vec("coded?continuous=1", 4, CPU)
    game.reset([0])
    obs, reward, *_ = game.step(torch.arange(24.0).view(12, 2) / 24)
    rows = [[w, i, 1, 2 * (3 * w + i) / 24] for w in range(4) for i in range(3)]
    torch.testing.assert_close(obs.view(12, 3, 6)[:, 0, [0, 1, 2, 4]], torch.tensor(rows))
    assert reward.tolist() == [[100 * w + 10 * i + 1] for w in range(4) for i in range(3)]
    assert obs.view(12, 3, 6)[:, :, 1].tolist() == 4 * [[0, 1, 2], [1, 2, 0], [2, 0, 1]]  # own first, then in turn
    for world in obs.view(4, 3, 3, 6):  # the same numbers for all its agents
        assert all(torch.equal(seen[seen[:, 1].argsort()], world[0]) for seen in world)
    assert isinstance(games.make_vec("coded?continuous=no", 4, CPU).action_space, gym.spaces.Discrete)
    own = games.make_vec("coded?continuous=yes&critic=own", 4, CPU)
    assert own.reset([0]).shape == (12, 6) and own.policy_dim == game.policy_dim == 6


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_permuting_agents_permutes_their_actions_and_only_the_critic_sees_the_others(games, algo):
    env = VectorEnv("notebooks.games:coded", 4, CPU)
    agent = shaken(ncdpo.Agent(config(algo=algo), *env.spaces))
    omega, noise = (x.view(4, 3, *x.shape[1:]) for x in agent.policy.draw_noise(12))
    obs, swap = list(torch.randn(3, 4, 6)), [1, 0, 2]
    normal = lambda obs: agent.obs_norm(env.envs.joint(obs))
    act = lambda obs, pick: agent.policy.act(normal(obs), omega[:, pick].flatten(0, 1), noise[:, pick].flatten(0, 1))
    action = act(obs, [0, 1, 2])[0].view(4, 3)
    assert torch.equal(act([obs[i] for i in swap], swap)[0].view(4, 3), action[:, swap])
    value = lambda obs: agent.critic(env.envs.joint(obs)).view(4, 3)
    moved = [obs[0], obs[1], obs[2] + 1]
    assert torch.equal(act(moved, [0, 1, 2])[0].view(4, 3)[:, :2], action[:, :2])
    assert (value(moved) != value(obs)).all()


def test_an_agent_of_football_may_observe_its_nearest_opponents_alone(games):
    see = lambda reds, more: games.make_vec(f"football?n_blue_agents=2&n_red_agents={reds}{more}", 5, CPU)
    game, one = see(3, "&nearest=2"), see(2, "")
    obs = game.reset([0])
    assert (game.policy_dim, obs.shape) == (one.policy_dim, one.reset([0]).shape)  # so that a team may go on
    scenario = game.game.scenario
    for i, agent in enumerate(scenario.blue_agents):
        seen = obs.view(5, 2, 2, -1)[:, i, 0, 16:32].view(5, 2, 8)[..., :2]  # of each of two: where it is from here
        away = agent.state.pos[:, None] - torch.stack([red.state.pos for red in scenario.red_agents], 1)
        order = away.norm(dim=-1).argsort(1)[:, :2, None].expand(-1, -1, 2)
        torch.testing.assert_close(seen, away.gather(1, order))
    for name in ("football?nearest=-1", "football?nearest=x", "balance?nearest=1"):
        with pytest.raises(ValueError, match="nearest must be a number of football's opponents"):
            games.make_vec(name, 2, CPU)


def test_speed_tells_what_the_adapter_of_a_game_costs(games, speed, capsys):
    speed.main("--env notebooks.games:coded --device cpu --num-envs 4 --num-steps 8".split())
    first = capsys.readouterr().out.splitlines()[0]
    assert float(re.fullmatch(r"4 worlds: a step through the adapter takes ([\d.]+) of VMAS's own", first)[1]) > 0


def test_a_world_ends_and_begins_again_without_the_others(games):
    """Worlds 0 to 3 terminate after 3 to 6 steps, those behind them are truncated after 7, world 4 is both."""
    env = VectorEnv("notebooks.games:coded?max_steps=7&critic=own", 6, CPU)
    before, w, starts = env.reset(3), torch.arange(6).repeat_interleave(3), set()
    age = torch.zeros(18)
    for _ in range(40):
        now, _, terminated, truncated, final = env.step(torch.randint(9, (18,)))
        age += 1
        assert torch.equal(terminated, age >= 3 + w) and torch.equal(truncated, age >= 7)
        assert torch.equal(final[:, 2], age) and torch.equal(final[:, 3], before[:, 3])
        assert torch.equal(env.envs.success, (terminated & (w != 1)).float())
        ended = terminated | truncated
        age[ended] = 0
        assert torch.equal(now[:, 2], age) and torch.equal(now[~ended], final[~ended])
        assert (now[ended, 3] != final[ended, 3]).all() and (now[ended, 4] == 0).all()
        starts |= {round(x, 6) for x in now[ended, 3].tolist()}
        before = now
    assert len(starts) == sum(40 // min(3 + i, 7) for i in range(6))  # no beginning is used twice
    assert torch.equal(env.reset(3), env.reset(3)) and not torch.equal(env.reset(3), env.reset(4))


@pytest.mark.parametrize("name", ["football?n_red_agents=1", "navigation?continuous=1", "balance", "transport",
                                  "sampling?grid_spacing=0.25"])  # whose resets rebuild objects
def test_worlds_of_vmas_begin_again_as_their_observations_say(games, name):
    env = VectorEnv(f"notebooks.games:{name}{'&' if '?' in name else '?'}max_steps=5", 4, CPU)
    env.reset(1)
    env.envs.game.steps += torch.arange(4)  # their episodes end one after the other
    for _ in range(12):
        action = torch.zeros(env.num_envs, dtype=torch.long) if env.discrete else torch.ones(env.num_envs, env.act_dim)
        obs, reward, *_ = env.step(action)
        scenario = env.envs.game.scenario
        torch.testing.assert_close(obs, env.envs.joint([scenario.observation(a) for a in env.envs.game.agents]))
        assert reward.shape == (env.num_envs, 1)


def test_a_run_of_a_game_does_not_change_with_what_else_is_played_in_its_process(games, tmp_path):
    ncdpo.train(config(env="notebooks.games:coded?n_agents=1", runs=str(tmp_path)))
    run, = tmp_path.iterdir()
    other = VectorEnv("notebooks.games:coded?max_steps=1", 3, CPU)  # begins anew at each step

    def metrics(between):
        trainer, rows = ncdpo.Trainer(config(env="notebooks.games:coded?n_agents=2", total_timesteps=384)), []
        for _ in range(3):
            rows.append({name: x for name, x in trainer.iterate().items() if name != "seconds"})
            between()
        return rows

    alone = metrics(lambda: None)
    assert metrics(lambda: ncdpo.evaluate(run, episodes=2)) == alone
    other.reset(1)
    assert metrics(lambda: other.step(torch.zeros(9, dtype=torch.long))) == alone


def test_success_in_football_is_a_goal_of_the_own_team(games):
    game = games.make_vec("football?n_blue_agents=2&n_red_agents=1", 3, CPU)
    game.reset([0])
    ball = game.game.scenario.ball
    ball.state.pos = torch.tensor([[1.55, 0.0], [-1.55, 0.0], [0.0, 0.0]])
    _, _, terminated, truncated, _ = game.step(torch.zeros(6, dtype=torch.long))
    assert terminated.tolist() == [True] * 4 + [False] * 2 and not truncated.any()
    assert game.success.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_team_is_trained_recorded_and_cloned(games, demos, tmp_path, capsys, algo):
    env, path = "notebooks.games:coded?max_steps=12", tmp_path / "d.npz"
    history = ncdpo.train(config(env=env, algo=algo, total_timesteps=4 * 192, runs=str(tmp_path)))
    run = tmp_path / f"notebooks.games_coded__{algo}__1"
    assert history["step"].tolist() == [192, 384, 576, 768]  # of two worlds of three agents
    with pytest.raises(UserError, match="191 has no room for a rollout of 192 steps after the 0 .*: give 192 or more"):
        ncdpo.Trainer(config(env=env, algo=algo, total_timesteps=191))
    ended = [3 * (32 // 3), 3 * (32 // 4)]  # in the first update, by world
    assert history["episodes"][0] == sum(ended) and history["success"][0] == pytest.approx(ended[0] / sum(ended))
    assert "success 50.0%" in capsys.readouterr().out  # of the worlds 0 and 1, after training
    for first, values in zip((0, 4, 8), ncdpo.evaluate(run, episodes=4).values()):  # the four worlds of each way
        assert values["length"].tolist() == np.repeat([min(3 + first + i, 12) for i in range(4)], 3).tolist()
        assert values["success"].tolist() == np.repeat([first + i not in (1, 10, 11) for i in range(4)], 3).tolist()
    assert demos.main(["record", str(run), str(path), "--steps", "600"]) == 0
    own = loaded(path)
    assert (own["observations"].reshape(3, 200, 18)[:, :, 1] == np.arange(3)[:, None]).all()  # one after the other
    flags = ["--env", env, "--algo", algo, "--runs", tmp_path, "--bc-steps", 20, "--action-chunk", 1, "--num-envs", 2]
    flags += ["--likelihood-steps", 5] if algo == "ncdpo" else []
    assert cloning.main([str(word) for word in [path, *flags, "--device", "cpu", "--episodes", 1]]) == 0
    assert "201 episodes, 600 steps" in capsys.readouterr().out  # three of them cut off


@pytest.mark.parametrize("name, words", [
    ("footbal", "did you mean football?"), ("football?n_blue=3", "did you mean n_blue_agents?"),
    ("football?multidiscrete_actions=1", "MultiDiscrete"), ("football?critic=both", "joint or own"),
    ("football?max_steps=0", "max_steps"), ("football?n_blue_agents", "n_blue_agents"),
    ("football?n_blue_agents=0", "change these"), ("football?ai_blue_agents=1", "no agent is left"),
    ("road_traffic", "share their past"), ("simple_tag", "differ in their spaces"),
    ("balance?continuous=1 --action-chunk 2", "--action-chunk 1"),
    ("missing", "pip install vmas")])
def test_games_refuses_what_it_cannot_play(games, tmp_path, capsys, monkeypatch, name, words):
    if name == "missing":
        monkeypatch.setitem(sys.modules, "vmas", None)
        monkeypatch.setitem(sys.modules, "vmas.scenarios", None)
    name, *flags = name.split()
    assert words in complaint(capsys, *arguments("notebooks.games:" + name, tmp_path / "runs", *flags))


# --- notebooks/parallel.py -------------------------------------------------------------------------------------------

SHARED = dict(env="Hopper-v4", num_envs=4, num_steps=64, minibatch_size=256, total_timesteps=512, update_epochs=3)
FEW = ["--env", "Hopper-v4", "--num-envs", 6, "--num-steps", 32, "--minibatch-size", 96, "--hidden", 16, "--device",
       "cpu", "--episodes", 1]
MISTAKES = [(["--num-envs", 5], "multiples of 2"), (["--resume", "nowhere"], "nowhere"),
            (["--total-timesteps", 191], "a rollout of 192 steps of all 2 processes"), (["--nonsense"], "--nonsense")]
EACH = """
import runpy, sys, torch
import ncdpo
from notebooks import parallel
folder, kept, plain = sys.argv[1], {"codes": []}, ncdpo.Trainer
parallel.distributed.init_process_group()
parallel.distributed.init_process_group = lambda: None  # that of main
runs, mistakes, flags = torch.load(folder + "/given.pt")
for algo, (settings, played) in runs.items():
    trainer = parallel.SharedTrainer(ncdpo.Config(**settings))
    mine = slice(2 * parallel.RANK, 2 * parallel.RANK + 2)
    trainer.join()
    kept[algo + " plays"] = trainer.play()
    trainer.play = lambda: {name: x[:, mine] for name, x in played.items()}
    kept[algo] = trainer.iterate(), trainer.agent.state_dict()
    trainer.play = lambda: torch.eye(2) @ torch.eye(3)
    try:
        trainer.iterate()
    except RuntimeError as error:
        kept["the task's error"] = str(error)
for mistake in mistakes:
    try:
        kept["codes"].append(parallel.main(mistake))
    except SystemExit as end:
        kept["codes"].append(end.code)
torch.save(kept, f"{folder}/{parallel.RANK}.pt")
ncdpo.Trainer, sys.argv[1:] = plain, flags
runpy.run_path("notebooks/parallel.py", run_name="__main__")
"""


def torchrun(processes, *line):
    """Start a script by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, *line]
    return subprocess.Popen([str(word) for word in command], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE)))


def ended(process):
    """Exit code, output and complaints of a process, once it has ended."""
    out, err = process.communicate(timeout=300)
    print(err)  # pytest shows it where a test fails
    return process.returncode, out, [line for line in err.splitlines() if re.match(r"ncdpo: |\S+: error: ", line)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes did, one after the other, as it takes long to start them; and an update of one alone.

    An update of NCDPO and of DPPO with the rollout of that one; an update whose task fails; MISTAKES; a whole run.
    """
    folder, runs, alone = tmp_path_factory.mktemp("pair"), {}, {}
    for algo in ("ncdpo", "dppo"):
        trainer = ncdpo.Trainer(config(**SHARED, algo=algo))
        before = {name: tensor.clone() for name, tensor in trainer.agent.state_dict().items()}
        played = trainer.play()
        trainer.play = lambda: played
        alone[algo] = before, trainer.iterate(), trainer.agent.state_dict()
        runs[algo] = vars(trainer.config), played
    lines = [[*FEW, "--runs", folder / "runs", *flags] for flags, _ in [*MISTAKES, (["--total-timesteps", 768], "")]]
    *mistakes, good = [[str(word) for word in line] for line in lines]
    torch.save((runs, mistakes, good), folder / "given.pt")
    (folder / "each.py").write_text(EACH)
    code, out, complaints = ended(torchrun(2, folder / "each.py", folder))
    assert code == 0
    run, = (folder / "runs").iterdir()
    return dict(alone=alone, both=[torch.load(folder / f"{rank}.pt") for rank in range(2)], complaints=complaints,
                out=out, run=run)


@pytest.mark.parametrize("algo", ["ncdpo", "dppo"])
def test_two_processes_with_half_of_the_environments_each_take_the_step_of_one_with_all(pair, algo):
    """Gradients, advantages' scale, clip, normalisers, metrics: the minibatch is all."""
    before, row, after = pair["alone"][algo]
    (row_0, state_0), (row_1, state_1) = (kept[algo] for kept in pair["both"])
    for name, tensor in after.items():
        assert torch.equal(state_0[name], state_1[name])  # bit by bit
        torch.testing.assert_close(state_0[name], tensor, rtol=2e-4, atol=2e-6)
        assert not torch.equal(before[name], tensor) or "log_std" in name
    for name in set(row) - {"seconds", "chain_std", "explained_variance"}:  # one's own
        assert row_0[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5, nan_ok=True), name
        assert row_1[name] == pytest.approx(row_0[name], rel=0, abs=0, nan_ok=True), name


def test_processes_play_different_episodes_with_different_noise(pair):
    one, two = (kept["ncdpo plays"] for kept in pair["both"])
    for name in ("obs", "action", "latent"):
        assert not torch.isin(one[name], two[name]).any()


def test_a_mistake_is_told_once_by_all_processes(pair):
    assert [kept["codes"] for kept in pair["both"]] == [4 * [2]] * 2
    for (_, words), line in zip(MISTAKES, pair["complaints"], strict=True):
        assert words in line


def test_an_error_of_the_task_is_not_mistaken_for_the_end_of_a_process(pair):
    assert all("cannot be multiplied" in kept["the task's error"] for kept in pair["both"])


def test_torchrun_writes_one_run(pair):
    assert pair["out"].count(str(pair["run"])) == pair["out"].count("mean action") == 1
    assert [int(row["step"]) for row in rows_of(pair["run"])] == [192, 384, 576, 768]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("victim, processes", [("the second", 3), ("all", 2)])
def test_a_dead_process_or_ctrl_c_ends_all_and_any_number_resumes_the_run(pair, tmp_path, victim, processes):
    run = shutil.copytree(pair["run"], tmp_path / "run")
    process = torchrun(processes, "notebooks/parallel.py", "--resume", run, "--total-timesteps", 10**8)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(rows_of(run)) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    if victim == "all":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    code, _, complaints = ended(process)
    done = checkpoint_of(run)["update"]
    assert code and len(complaints) <= 2  # torchrun may be faster
    assert not complaints or f"after update {done} by --resume {run}" in complaints[0]

    before = checkpoint_of(run)["agent"]["critic.0.weight"]
    assert main(["--resume", str(run), "--total-timesteps", str(192 * (done + 1))]) == 0
    assert [int(row["step"]) for row in rows_of(run)] == list(range(192, 192 * (done + 1) + 1, 192))
    assert not torch.equal(before, checkpoint_of(run)["agent"]["critic.0.weight"])

# --- notebooks/modes.py ----------------------------------------------------------------------------------------------

def walk(start, action, open_goals):
    """Plain loop over the steps of a decision: the way that was gone, and the goal that was reached, or -1."""
    path, goal = [np.array(start, float)], -1
    for x, y in np.clip(action, -1, 1).reshape(8, 2):
        path.append(path[-1] + 0.1 * np.array([x, y]))
        near = [g for g in open_goals if math.dist(path[-1], modes_goal(g)) < 0.1]
        if near:
            goal = near[0]
            break
    return path, goal


def modes_goal(g):
    return 0.8 * np.array([math.cos(g * math.pi / 2), math.sin(g * math.pi / 2)])


@pytest.mark.parametrize("reward", ["dense", "sparse"])
@pytest.mark.parametrize("closed", [None, 2])
@pytest.mark.parametrize("limit", ["end", "cut"])
def test_a_point_that_seeks_goals_is_paid_for_its_approach_its_arrival_and_its_steps(reward, closed, limit):
    """Three episodes and more of 64 points, some of which head for a goal: against a plain loop."""
    worth, open_goals = [1.0, 0.8, 0.6, 0.4], [g for g in range(4) if g != closed]
    query = f"reward={reward}&worth=1,0.8,0.6,0.4&limit={limit}" + (f"&closed={closed}" if closed else "")
    env = VectorEnv(f"notebooks.modes:goals?{query}", 64, CPU)
    position, age, seen = np.zeros((64, 2)), np.zeros(64, int), set()
    obs = env.reset(3)
    for _ in range(13):
        np.testing.assert_allclose(obs, np.column_stack([position, age / 4]), atol=1e-5)
        action = 0.4 * torch.randn(64, 16)
        action[:40] += 0.6 * torch.tensor(np.stack([modes_goal(i % 4) for i in range(40)])).float().repeat(1, 8)
        obs, pay, terminated, truncated, final_obs = env.step(action)
        for i in range(64):
            path, goal = walk(position[i], action[i].numpy(), open_goals)
            distance = lambda x: min(math.dist(x, modes_goal(g)) for g in open_goals)
            expected = worth[goal] if goal >= 0 else 0.0
            if reward == "dense":
                expected += sum(distance(a) - distance(b) - 0.01 for a, b in zip(path, path[1:]))
            late = goal < 0 and age[i] == 3
            assert pay[i].item() == pytest.approx(expected, abs=1e-5)
            np.testing.assert_allclose(final_obs[i], [*path[-1], (age[i] + 1) / 4], atol=1e-5)
            assert bool(terminated[i]) == (goal >= 0 or late and limit == "end")
            assert bool(truncated[i]) == (late and limit == "cut")
            assert env.envs.success[i] == (goal >= 0) and env.envs.goal[i] == goal
            ended = goal >= 0 or late
            position[i], age[i] = (np.zeros(2), 0) if ended else (path[-1], age[i] + 1)
            seen.add((goal, late))
    assert seen == {(-1, False), (-1, True), *((g, False) for g in open_goals)}


@pytest.mark.parametrize("name", ["goal", "goals?reward=much", "goals?closed=4", "goals?open=1", "goals?worth=a",
                                  "goals?limit=none", "goals?closed="])
def test_a_task_of_goals_that_is_not_known_is_one_sentence(name):
    with pytest.raises(UserError, match="cannot make notebooks.modes:"):
        VectorEnv(f"notebooks.modes:{name}", 2, CPU)


def test_entropy_over_goals_is_that_of_their_shares_over_that_of_equal_ones():
    assert modes.entropy([0.2, 0.2, 0.2, 0.2]) == pytest.approx(1) and modes.entropy([0, 0.3, 0, 0]) == 0
    assert modes.entropy([0.25, 0, 0.25, 0]) == pytest.approx(0.5) and math.isnan(modes.entropy([0, 0, 0, 0]))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert modes.entropy([0.3, 0.1, 0, 0]) == pytest.approx(expected)


def test_demonstrations_of_goals_fail_half_of_the_time_and_head_for_all_alike(tmp_path, capsys):
    success = modes.demonstrate(tmp_path / "d.npz", 1)
    assert 0.4 < success < 0.65
    env = VectorEnv("notebooks.modes:goals", 1, CPU)
    obs, action, episode = cloning.load(tmp_path / "d.npz", env)
    assert "400 episodes" in capsys.readouterr().out and len(np.unique(episode)) == 400
    first = (obs[:, 2] == 0).numpy()
    end = action[first].view(-1, 8, 2).sum(1)
    heading = torch.stack([end @ torch.tensor(modes_goal(g)).float() for g in range(4)]).argmax(0)
    assert first.sum() == 400 and (torch.bincount(heading, minlength=4) > 85).all()


def small_goals(**given):
    small = dict(env="notebooks.modes:goals", hidden=8, num_envs=32, num_steps=4, total_timesteps=1280,
                 minibatch_size=64)
    return ncdpo.Config(**{**modes.SETTINGS, **small, **given})


def test_E10_a_baseline_that_sees_the_chain_knows_nothing_of_the_final_gaussian():
    """The advantage of two actions of the same s and omega differs by their targets alone; the ratio stays at one."""
    trainer = modes.SeesChain(small_goals())
    trainer.iterate()
    rollout = trainer.play()
    judged = []
    hook = trainer.baseline.register_forward_hook(lambda module, given, out: judged.append((given[0], out)))
    batch, _ = trainer.make_batch(rollout)
    hook.remove()
    (seen, value), agent = judged[0], trainer.agent
    f = agent.policy.mean(batch["obs"], batch["latent"])  # without the final Gaussian's noise
    assert seen.shape == (128, 3 + 16) and torch.equal(seen, torch.cat([batch["obs"], f], 1))
    torch.testing.assert_close(batch["advantage"], batch["target"] - value.squeeze(1))
    torch.testing.assert_close(agent.policy.log_prob(batch["obs"], batch["action"], batch["latent"]), batch["log_prob"])
    for name in ("action", "log_prob", "latent"):
        assert torch.equal(batch[name], rollout[name].flatten(0, 1))
    assert not seen.requires_grad and not batch["advantage"].requires_grad


def test_a_baseline_that_sees_the_chain_judges_once_it_has_learnt_and_learns_nothing_in_the_mechanism():
    trainer = modes.SeesChain(small_goals())
    modes.starts(trainer, 40)
    assert not trainer.fitted
    trainer.done = 3  # as after --resume: the head is in no checkpoint
    batch, _ = trainer.make_batch(trainer.play())
    by_critic = batch["target"] - trainer.agent.critic(batch["obs"]).squeeze(1)  # V(s) alone
    torch.testing.assert_close(batch["advantage"], by_critic.detach())
    before = parameters_to_vector(trainer.baseline.parameters()).detach().clone()
    modes.starts(trainer, 40)
    assert torch.equal(parameters_to_vector(trainer.baseline.parameters()), before)
    trainer.make_batch(trainer.play())
    assert not torch.equal(parameters_to_vector(trainer.baseline.parameters()), before)


def test_inner_is_the_mean_over_pairs_of_different_rows(float64):
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    pairs = [x[i] @ y[j] for i in range(5) for j in range(5) if i != j]
    assert modes.inner(x, y) == pytest.approx(np.mean(pairs))


def test_E10_E15_ncdpo_and_dppo_have_the_same_gradient_where_no_floor_binds():
    """Both are unbiased for the same policy: the cosine of their expected gradients is one."""
    found, policy, obs = {}, None, torch.randn(3).expand(60_000, 3)
    for algo in ("ncdpo", "dppo"):
        given = dict(init_std=0.2, min_std=0.2, gamma_denoising=1, clip_denoised=9)
        one = ncdpo.make_policy(small_goals(algo=algo, **given), 3, 2, False)
        assert algo == "ncdpo" or (one.log_std[2:].exp() > 0.2).all()
        if policy is None:
            policy = one
            with torch.no_grad():
                for p in policy.denoiser.parameters():
                    p += 0.3 * torch.randn_like(p)
        one.denoiser = policy.denoiser
        action, log_prob, latent = one.sample(obs)
        advantage = torch.sin(3 * action[:, 0]) * action[:, 1]
        batch = {"obs": obs, "action": action, "latent": latent}
        found[algo] = modes.gradients(one, batch, advantage - advantage.mean(), 60)
    ours, theirs = found.values()
    size = math.sqrt(modes.inner(ours, ours) * modes.inner(theirs, theirs))
    assert (ours.mean(0) @ theirs.mean(0)).item() / size == pytest.approx(1, abs=0.1)


def test_runs_over_goals_become_a_table_and_a_figure(tmp_path, monkeypatch, capsys):
    quick = lambda source, config, steps, learning_rate: make(source, config, 30, learning_rate)
    make = cloning.make
    monkeypatch.setattr(modes.cloning, "make", quick)
    monkeypatch.setattr(modes, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(modes, "CURVES", tmp_path)
    flags = "--evaluations 2 --seeds 1 2 --jobs 1 -- --total-timesteps 6144".split()
    assert modes.main(["run", "dense", *flags]) == 0
    assert modes.main(["run", "dense-sees-chain", "--lines", "ncdpo", "--critic-sees-chain", *flags]) == 0
    with open(tmp_path / "dense.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == modes.COLUMNS and len(rows) == 2 * 4 * 3
    for row in rows:
        shares = [float(row[f"share{g}"]) for g in range(4)]
        assert sum(shares) == pytest.approx(float(row["success"]), abs=2e-3)
        assert (row["closed0"] == "") == (row["decisions"] == "3072")
    capsys.readouterr()
    modes.main(["table", "dense", "dense-sees-chain"])
    assert capsys.readouterr().out.count("first minus") == 4
    modes.main(["figure"])
    assert (tmp_path / "modes.png").stat().st_size > 10_000
    run = tmp_path / "runs" / "dense" / "ncdpo" / "notebooks.modes_goals__ncdpo__1"
    assert np.isfinite(ncdpo.evaluate(run, episodes=4)["exploring"]["success"]).all()
    for line, complaint in {
            "x --lines ncdpo --seeds 1 --jobs 1 -- --total-timesteps 9": "--total-timesteps 9 has no room",
            "dense --lines ncdpo --seeds 1": "there is ",  # the figure would show what was there before
            "y --critic-sees-chain --lines ncdpo dppo": "--critic-sees-chain is for",  # whose latent is no omega
            "y --critic-sees-chain --lines ncdpo --moving": "--critic-sees-chain is for",
            "y --sweep clip_coef": "--evaluations and --jobs are at least 1, and --sweep wants a field and its values",
            "y --evaluations 0": "--evaluations and --jobs", "y --jobs 0": "--evaluations and --jobs",
            "y -- --runs z": "runs: modes.py chooses these itself",
            "y --sweep seed 5 6": "seed: modes.py chooses these itself",
            "y -- --sampling-steps 30": "--sampling-steps must not be more"}.items():
        assert modes.main(["run", *line.split()]) == 2
        assert capsys.readouterr().err.startswith(f"modes: {complaint}")
    shutil.rmtree(tmp_path / "runs")  # as in a fresh clone
    kept, few = contents(tmp_path), "--evaluations 2 --jobs 1 -- --total-timesteps 6144"
    for line in ("--lines ncdpo --seeds 1 2", "--seeds 1", "--seeds 1 2 --sweep clip_coef 0.1"):
        assert modes.main(["run", "dense", *line.split(), *few.split()]) == 2
        assert "runs that would be lost" in capsys.readouterr().err and contents(tmp_path) == kept
    assert modes.main(["table", "typo"]) == 2 and "`modes.py run typo` makes it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        modes.main(["mechanism", "quiet", "--", "--noise-scale", "0.3"])


def test_a_sweep_over_goals_takes_fields_of_every_kind_and_flags_that_suit_the_settings(monkeypatch):
    taken = []
    monkeypatch.setattr(modes, "in_parallel", lambda options, rows_of, *columns: taken.append(rows_of.keywords))
    for sweep, expected in (("activation silu tanh", ["silu", "tanh"]), ("clip_coef 0.01 1000", [0.01, 1000.0]),
                            ("sampling_steps 2 10", [2, 10])):
        modes.main(f"run x --lines ncdpo --sweep {sweep} -- --sampling-steps 10 --critic-warmup 8".split())
        field = sweep.split()[0]
        assert [fields[field] for fields in taken[-1]["settings"].values()] == expected
        assert taken[-1]["changed"] == {"sampling_steps": 10, "critic_warmup": 8}


# --- notebooks/manipulation.py ----------------------------------------------------------------------------------------

ARMS = ["push-v3", "pick-place-v3", "drawer-open-v3", "peg-insert-side-v3"]


@pytest.fixture
def manipulation():
    """notebooks/manipulation.py, where Meta-World is installed."""
    pytest.importorskip("metaworld")
    return importlib.import_module("notebooks.manipulation")


@pytest.mark.parametrize("version, words", [("4.0.0", "this is MuJoCo 4.0.0"), ("3.3.0", "metaworld")])
def test_want_of_metaworld_or_of_its_mujoco_is_told_in_one_sentence(monkeypatch, capsys, tmp_path, version, words):
    monkeypatch.delitem(sys.modules, "notebooks.manipulation", raising=False)
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    error = complaint(capsys, "--env", "notebooks.manipulation:push-v3", "--runs", tmp_path)
    assert words in error and "pip install -r requirements.txt metaworld==" in error
    assert not list(tmp_path.iterdir())


def test_the_program_without_metaworld_says_so_without_a_traceback(tmp_path):
    """In a process where it cannot be imported, whatever is installed."""
    code = ("import runpy, sys; sys.modules['metaworld'] = None\n"
            "path = sys.argv[1]; sys.argv[1:] = ['demos', 'a', 'b']\n"
            "runpy.run_path(path, run_name='__main__')")
    result = run_python(tmp_path, "-c", code, HERE / "notebooks" / "manipulation.py")
    assert result.returncode == 1 and result.stderr.startswith("manipulation: Meta-World cannot be imported")
    assert "Traceback" not in result.stderr


def test_an_unknown_arm_is_answered_with_the_nearest(manipulation, capsys, tmp_path):
    assert "Did you mean: `pick-place`" in complaint(capsys, "--env", "notebooks.manipulation:pick-plase-v3")
    error = scripts_complaint(capsys, manipulation, "demos", "pick-plase-v3", tmp_path / "d.npz")
    assert "did you mean pick-place-v3" in error


@pytest.mark.parametrize("name", [*ARMS, "stick-push-v3"])  # whose success asks for forces
def test_an_arm_shows_and_pays_what_metaworlds_own_object_does(manipulation, name):
    """The same object and goal, the expert's actions: observations and rewards of each step, and when it succeeds."""
    metaworld = pytest.importorskip("metaworld")
    plain = metaworld.ALL_V3_ENVIRONMENTS[name]()
    plain._set_task_called, plain._freeze_rand_vec, plain._partially_observable = True, True, False
    plain.sawyer_observation_space = gym.spaces.Box(-np.inf, np.inf, (39,))
    for dense in (False, True):
        arm, expert = manipulation.Arm(name, dense), manipulation.EXPERTS[name]()
        obs, _ = arm.reset(seed=3)
        plain._last_rand_vec = arm.arm._last_rand_vec
        theirs, _ = plain.reset()
        np.testing.assert_allclose(obs, theirs, atol=2e-4)  # the arm may have settled to another digit
        np.testing.assert_allclose(obs[-3:], plain._target_pos, atol=2e-4)  # no zeros
        for _ in range(250):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action = np.clip(expert.get_action(obs.copy()), -1, 1).astype(np.float32)
            obs, reward, terminated, truncated, info = arm.step(action)
            theirs, their_reward, _, _, their_info = plain.step(action)
            np.testing.assert_allclose(obs, theirs, atol=0.02)  # contacts magnify that digit
            assert terminated == (their_info["success"] == 1) == (info["success"] == 1) and not truncated
            assert reward == pytest.approx(their_reward, abs=0.1) if dense else reward == terminated
            if terminated:
                break
        assert terminated


def test_quaternions_are_scipys_with_their_sign(manipulation):
    scipy = pytest.importorskip("scipy.spatial.transform").Rotation
    for matrix in scipy.random(300, random_state=0).as_matrix():
        ours, theirs = manipulation.Rotation.from_matrix(matrix).as_quat(), scipy.from_matrix(matrix).as_quat()
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_arms_repeat_with_the_seed_and_share_no_goal(manipulation):
    def goals(*seed, episodes=3):
        env = VectorEnv("notebooks.manipulation:push-v3", 3, CPU)
        seen = [env.reset(*seed)[:, -3:]]
        for _ in range(150 * (episodes - 1)):  # nothing succeeds by standing still
            obs, _, terminated, truncated, _ = env.step(torch.zeros(3, 4))
            assert not terminated.any()
            if truncated.all():
                seen.append(obs[:, -3:])
        return torch.stack(seen)

    once, again, other = goals(1), goals(1), goals(1_000_004, episodes=2)
    assert once.shape == (3, 3, 3) and torch.equal(once, again)
    assert len(torch.cat([once.flatten(0, 1), other.flatten(0, 1)]).unique(dim=0)) == 9 + 6


def test_arms_that_share_a_model_play_as_each_would_alone(manipulation):
    """Of drawer-open-v3 each episode has the drawer at another place of the model."""
    def played(seeds):
        arms = [manipulation.Arm("drawer-open-v3") for _ in seeds]
        assert len({id(arm.arm.model) for arm in arms}) == 1
        seen = [[arm.reset(seed=seed)[0] for arm, seed in zip(arms, seeds)]]
        for t in range(40):
            action = np.array([0, 0.8, -0.5, -1], np.float32)
            seen.append([arm.step(action)[0] for arm in arms])
        return np.array(seen).swapaxes(0, 1)

    together = played([1, 2])
    assert np.abs(together[0] - together[1]).max() > 0.05
    np.testing.assert_array_equal(together, np.concatenate([played([1]), played([2])]))


def test_half_of_the_demonstrations_succeed_and_their_clone_is_improved(manipulation, tmp_path, monkeypatch, capsys):
    path = tmp_path / "d.npz"
    assert manipulation.main(["demos", "push-v3", str(path), "--episodes", "40", "--seed", "2"]) == 0
    with np.load(path) as file:
        made = dict(file)
    assert made.pop("env") == "notebooks.manipulation:push-v3" and set(made) == set(cloning.DEMO_KEYS)
    won, ended = made["terminations"].sum(), (made["terminations"] | made["truncations"]).sum()
    assert ended == 40 and 0.3 <= won / ended <= 0.7 and made["rewards"].sum() == won
    assert made["observations"].shape == (len(made["rewards"]), 39) and np.abs(made["actions"]).max() <= 1
    env = "notebooks.manipulation:push-v3"
    small = ["--hidden", "16", "--num-envs", "2", "--num-steps", "8", "--episodes", "1", "--runs", str(tmp_path)]
    assert cloning.main([str(path), "--env", env, "--bc-steps", "20", *small]) == 0
    run = tmp_path / "notebooks.manipulation_push-v3__ncdpo__1"
    rows = manipulation.probe(run, starts=2, repeats=2)
    assert [row["noise"] for row in rows] == ["both", "chain", "final"]
    assert all(row["success"] + row["left"] + row["moved"] == pytest.approx(1) for row in rows)
    assert main(["--init-from", str(run), "--total-timesteps", "448", *small[2:], "--algo", "dppo"]) == 0
    assert capsys.readouterr().out.count("success 0.0%") == 6


def test_a_task_whose_demonstrator_never_succeeds_in_time_is_refused(manipulation, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gym.registry["push-v3"], "max_episode_steps", 5)
    error = scripts_complaint(capsys, manipulation, "demos", "push-v3", tmp_path / "d.npz", "--episodes", "4")
    assert "none of 4 demonstrations of push-v3 succeeds within its 5 steps" in error
    assert not (tmp_path / "d.npz").exists()


# --- Fetch and Kitchen ------------------------------------------------------------------------------------------------

ROBOTICS = """
import gymnasium as gym
import gymnasium_robotics
gym.register_envs(gymnasium_robotics)
for name, task in {"FlatFetchPush-v0": "FetchPush-v4", "FlatKitchen-v0": "FrankaKitchen-v1"}.items():
    gym.register(name, lambda task=task, **more: gym.wrappers.FlattenObservation(gym.make(task, **more)))
"""


@pytest.mark.skipif(importlib.metadata.version("mujoco") >= "4", reason="Gymnasium-Robotics cannot use MuJoCo 4")
@pytest.mark.parametrize("name", ["FlatFetchPush-v0", "FlatKitchen-v0"])
def test_a_flattened_task_of_gymnasium_robotics_trains(tmp_path, monkeypatch, name):
    pytest.importorskip("gymnasium_robotics")
    (tmp_path / "robotics.py").write_text(ROBOTICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = dict(env=f"robotics:{name}", num_steps=8, minibatch_size=8, total_timesteps=16, episodes=1, runs=tmp_path)
    history = ncdpo.train(config(**given))
    assert len(history["update"]) == 1 and np.isfinite(history["approx_kl"]).all()


# --- with the change of notebooks/demos.py ----------------------------------------------------------------------------

def test_minaris_dict_observations_are_flattened_as_gymnasium_does(demos, tmp_path, monkeypatch, capsys):
    """The layout of D4RL's Kitchen: Dict observations, of which a goal is a Dict of its own."""
    pytest.importorskip("h5py")
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    box = lambda *shape: gym.spaces.Box(-np.inf, np.inf, shape, np.float64)
    goals = gym.spaces.Dict({"microwave": box(1), "kettle": box(2)})
    space = gym.spaces.Dict({"observation": box(3), "achieved_goal": goals, "desired_goal": goals})
    space.seed(0)
    buffers, flat = [], []
    for steps in (3, 4):
        seen = [space.sample() for _ in range(steps + 1)]
        flat += [gym.spaces.flatten(space, one) for one in seen[:-1]]
        columns = {key: np.stack([one[key] for one in seen]) for key in ["observation"]}
        columns |= {key: {part: np.stack([one[key][part] for one in seen]) for part in goals.spaces}
                    for key in ("achieved_goal", "desired_goal")}
        buffers.append(minari.data_collector.EpisodeBuffer(
            observations=columns, actions=np.full((steps, 2), 0.5), rewards=[0.0] * steps,
            terminations=[False] * steps, truncations=[False] * (steps - 1) + [True]))
    actions = gym.spaces.Box(-1, 1, (2,), np.float64)
    minari.create_dataset_from_buffers("tiny/kitchen-v0", buffers, observation_space=space, action_space=actions,
                                       algorithm_name="-", author="-", author_email="-", code_permalink="-",
                                       description="-")
    assert demos.main(["convert", "minari:tiny/kitchen-v0", str(tmp_path / "d.npz")]) == 0
    np.testing.assert_array_equal(loaded(tmp_path / "d.npz")["observations"], flat)


# --- with the change of notebooks/cloning.py --------------------------------------------------------------------------

def test_demonstrations_of_another_task_with_the_same_spaces_are_refused(tmp_path, capsys):
    rows = dict(observations=np.zeros((40, 4)), actions=np.zeros(40), rewards=np.zeros(40),
                terminations=np.arange(40) % 10 == 9, truncations=np.zeros(40))
    np.savez(tmp_path / "d.npz", **rows, env="BalancedPole-v1")
    flags = ["--env", "CartPole-v1", "--bc-steps", "2", "--action-chunk", "1", "--episodes", "1"]
    flags += ["--runs", tmp_path / "r"]
    error = scripts_complaint(capsys, cloning, tmp_path / "d.npz", *flags)
    assert "BalancedPole-v1" in error and "CartPole-v1" in error and not (tmp_path / "r").exists()


# --- modules of the notebooks ----------------------------------------------------------------------------------------

def test_peak_memory_counts_the_bytes_that_were_alive_at_once(health):
    x = torch.zeros(1000)  # before the block: not counted
    with health.PeakMemory() as memory:
        y = x + 1
        z = y[:10] * 2  # a view costs nothing, its product 40 bytes
        del y
        w = x + 3
    assert memory.most == memory.now == 4000 + 40, (memory.most, memory.now)  # y died before w was born
    with health.PeakMemory() as memory:
        y, z = x + 1, x + 2
        x += 1  # in place
    assert memory.most == 8000


def test_the_toys_mixture_is_a_density_and_what_its_two_steps_sample(float64, toy):  # E7
    torch.manual_seed(0)
    policy = toy.clone(toy.small(2), steps=100)
    density = toy.marginal_density(policy)
    assert density.sum() * toy.WIDTH == pytest.approx(1, abs=1e-6)
    action, _, _ = policy.sample(torch.ones(20_000, 1))
    assert (density @ toy.ACTIONS) * toy.WIDTH == pytest.approx(action.mean().item(), abs=0.02)
    assert (density @ toy.ACTIONS**2) * toy.WIDTH == pytest.approx(action.square().mean().item(), abs=0.02)


def test_a_table_has_its_numbers_in_one_format_and_its_words_and_whole_numbers_as_they_are(plots):
    text = plots.table("name | a | b", [("x", 3, torch.tensor(0.12345)), ("y", None, "5%")], ".2f").data
    assert text.splitlines() == ["| name | a | b |", "| --- | --- | --- |", "| x | 3 | 0.12 |", "| y |  | 5% |"]


def test_panels_of_one_figure_share_one_legend(plots, monkeypatch):
    monkeypatch.setattr(plots.plt, "show", lambda: None)
    with plots.panels("title", ["left", "right"], x=["a", "b"], y="value", xlim=(0, 2)) as grid:
        for ax in grid.flat:
            plots.lines(ax, [0, 1], {"one": [1, 2], "two": [3, 4]})
    legend, = grid[0, 0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert [ax.get_xlabel() for ax in grid[0]] == ["a", "b"] and grid[0, 0].get_ylabel() == "value"
    plots.plt.close("all")


# ===== texts =========================================================================================================

NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))
README = HERE / "README.md"
TEXTS = [README, *(HERE / "notebooks" / f"{name}.md" for name in ("RESULTS", "TUNING", "RUNNING"))]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell leaves on the page: the kinds of its outputs, but for warnings."""
    data = [{"image/png", "text/markdown", "text/html"} & set(out.data) for out in cell.outputs if "data" in out]
    return data, any(out.output_type == "stream" and out.name == "stdout" for out in cell.outputs)


@notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_showed_when_it_was_committed(path):
    if path.stem == "06_games":
        pytest.importorskip("vmas")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    committed = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for was, now in zip(code_cells(committed), code_cells(fresh)):
        assert shown(was) == shown(now), was.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_five_lines_at_most_that_say_what_to_do_on_colab(path):
    first, *cells = json.loads(path.read_text())["cells"]
    assert first["cell_type"] == "markdown" and len(first["source"]) <= 5
    assert "On Colab, " in "".join(first["source"]) and "git clone" in "".join(first["source"])
    for cell in cells:
        assert cell["cell_type"] == "markdown" or max(map(len, "".join(cell["source"]).splitlines())) <= 120


def test_every_equation_of_the_readme_has_its_code_its_notebook_and_its_tests():
    rows = re.findall(r"^\| (E\d+) \|.*\| ([^|]*) \| ([\d, ]+) \|$", README.read_text(), re.MULTILINE)
    assert [label for label, _, _ in rows] == [f"E{i}" for i in range(1, 19)]
    for label, code, numbers in rows:
        for number in numbers.split(", "):
            path, = (path for path in NOTEBOOKS if path.name.startswith(f"0{number}_"))
            source = "".join(line for cell in json.loads(path.read_text())["cells"] for line in cell["source"])
            assert re.search(rf"\b{label}\b", source), (label, number)
        for name in re.findall(r"`([\w./]+)`", code):
            assert (HERE / name).exists() if "/" in name else operator.attrgetter(name)(ncdpo)
        assert [name for name in globals() if name.startswith("test_") and f"_{label}_" in name], label


def test_readme_names_only_flags_files_and_functions_that_exist_and_the_files_true_size():
    text = README.read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert f"The file is {len((HERE / 'ncdpo.py').read_text().splitlines()):,} lines" in text
    sources = [path.read_text() for path in (HERE / "ncdpo.py", *sorted((HERE / "notebooks").glob("*.py")))]
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(ncdpo.Config)} | {"--help"}
    flags |= set(re.findall(r'add_argument\("(--[\w-]+)"', "".join(sources)))
    flags |= {"--no-" + flag[2:] for flag in flags}
    flags |= {"--standalone", "--nproc-per-node", "--index"}  # of torchrun and uv
    for path in TEXTS:
        assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", path.read_text())) - flags, path.name
    named = re.findall(r"ncdpo\.([\w.]+)\(", text) + re.findall(r"`(Trainer\.\w+)`", text)
    assert len(named) >= 3 and all(operator.attrgetter(name)(ncdpo) for name in named)


def test_the_two_commands_of_the_readme_are_what_ci_pastes():
    commands = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv .venv && ")]
    train, test = (command.split(" && ")[-1].removeprefix(".venv/bin/python ") for command in commands)
    assert all(" && .venv/bin/pip install -r requirements.txt && " in command for command in commands)
    assert ncdpo.parse(train.removeprefix("ncdpo.py").split())[0].total_timesteps == 150_000
    assert test == '-m pytest -q -m "not notebooks"' and "150000" in train
    assert "grep '^python3 -m venv .venv' README.md" in (HERE / ".ci" / "run").read_text()


def anchors(path) -> list[str]:
    """GitHub's anchors of a Markdown file's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall("^#+ (.*)", text, re.MULTILINE)
    names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return [f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    for file, heading in re.findall(r"\]\((?!http|attachment)([^)#\s]*)#?([^)\s]*)\)", text):
        target = path.parent / file if file else path
        assert target.exists(), file
        assert not heading or heading in anchors(target), f"{file}#{heading}"
