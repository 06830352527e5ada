"""Multi-agent games of VMAS (pip install vmas) as an environment of ncdpo.py: every agent is a row of the batch.

    python ncdpo.py --env "notebooks.games:football?n_blue_agents=3&n_red_agents=1" --num-envs 64
    python ncdpo.py --env "notebooks.games:balance?n_agents=3&continuous=1&critic=own"

Scenarios whose agents share their spaces will do, but for road_traffic. Behind the question mark are their arguments,
and these:
    max_steps     steps after which an episode is truncated [200, football 500]
    continuous    1 for Box actions instead of Discrete ones [0]
    critic        joint (MAPPO) or own (IPPO): whose observations the critic sees [joint]
    nearest       football: an agent observes this many opponents, the nearest, so that a team may meet more [all]
W worlds of G agents are N = W * G rows, row = world * G + agent, all played by one policy. An observation is the
agent's own, which is what the policy sees (`policy_dim` columns), and then those of the others in cyclic order.
The red team of football is played by VMAS's heuristic unless ai_red_agents=0.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import io
import random
import re
import warnings
from pathlib import Path
from types import ModuleType
from urllib.parse import parse_qsl

import gymnasium as gym
import numpy as np
import torch

DEFAULTS = {"football": dict(max_steps=500, ai_red_agents=True)}  # from end to end of its pitch an agent needs 200
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Where an episode may end well: whether it did for an agent of a world that terminated, by the agent's `info`
WON = {"football": lambda info: info["sparse_reward"] > 0, "balance": lambda info: info["ground_rew"] == 0,
       **dict.fromkeys(("navigation", "transport", "reverse_transport", "passage", "joint_passage", "dispersion",
                         "discovery"), lambda info: True)}


def make_vec(name, num_envs, device):
    """The game of `scenario?argument=value&...` in num_envs worlds; raises ValueError, ImportError (no vmas)."""
    scenario, _, query = name.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    for key, value in given.items():
        with contextlib.suppress(ValueError, SyntaxError):  # words stay words
            given[key] = WORDS[value] if value in WORDS else ast.literal_eval(value)
    return Games(scenario, num_envs, device, **{**DEFAULTS.get(scenario, {}), **given})


def load(name):
    """A scenario of VMAS by its name."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the old gym, on which VMAS is built, says that it is old
            scenarios = importlib.import_module("vmas.scenarios")
    except ImportError as error:
        raise ImportError(f"games need the package {error.name}: pip install {error.name.split('.')[0]}") from None
    known = [path.stem for path in Path(scenarios.__file__).parent.rglob("*.py") if path.stem != "__init__"]
    if name not in known:
        near = " or ".join(difflib.get_close_matches(name, known)) or ", ".join(sorted(known))
        raise ValueError(f"VMAS has no scenario {name!r} (did you mean {near}?)")
    return scenarios.load(name + ".py").Scenario()


def check_arguments(scenario, names):
    """Raises ValueError for a name that the scenario's source never asks for: some scenarios would ignore it."""
    source = Path(inspect.getsourcefile(type(scenario).make_world)).read_text()
    known = re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', source) + ["max_steps", "continuous", "critic", "nearest"]
    for name in names:
        if name == "multidiscrete_actions":
            raise ValueError("MultiDiscrete actions cannot be played: leave out multidiscrete_actions")
        if name not in known:
            near = " or ".join(difflib.get_close_matches(name, known)) or ", ".join(known)
            raise ValueError(f"the scenario has no argument {name!r} (did you mean {near}?)")


def modern(space):
    """A space of the old gym as one of Gymnasium's; raises ValueError for other than Box and Discrete."""
    if type(space).__name__ == "Discrete":
        return gym.spaces.Discrete(int(space.n))
    if type(space).__name__ == "Box":
        return gym.spaces.Box(space.low, space.high, dtype=space.dtype.type)
    raise ValueError(f"{type(space).__name__} spaces cannot be played")


def observe_nearest(scenario, count):
    """Let agents of football observe but `count` of their opponents, from the nearest to the farthest."""
    everything = scenario.observation
    if "adversary_poses" not in inspect.signature(everything).parameters or not isinstance(count, int) or count < 0:
        raise ValueError(f"nearest must be a number of football's opponents, not {count!r}")

    def observation(agent):
        others = scenario.blue_agents if agent in scenario.red_agents else scenario.red_agents
        pos, vel, force = (torch.stack([getattr(other.state, name) for other in others], 1)  # (W, others, 2)
                           for name in ("pos", "vel", "force"))
        near = (pos - agent.state.pos[:, None]).norm(dim=-1, keepdim=True).argsort(1)[:, :count].expand(-1, -1, 2)
        pos, vel, force = (list(state.gather(1, near).unbind(1)) for state in (pos, vel, force))
        return everything(agent, adversary_poses=pos, adversary_vels=vel, adversary_forces=force)

    scenario.observation = observation


def tensors(scenario, worlds):
    """All tensors of a row for each world that a scenario and what hangs on it hold, as (container, key)."""
    boxes = [vars(scenario)]
    found = []
    seen = {id(boxes[0])}
    for box in boxes:  # grows as we go
        for key, value in list(box.items() if isinstance(box, dict) else enumerate(box)):
            if isinstance(value, torch.Tensor):
                if value.dim() and len(value) == worlds and not isinstance(box, tuple):
                    found.append((box, key))
            elif not isinstance(value, ModuleType):
                inner = value if isinstance(value, (dict, list, tuple)) else getattr(value, "__dict__", None)
                if isinstance(inner, (dict, list, tuple)) and id(inner) not in seen:
                    seen.add(id(inner))
                    boxes.append(inner)
    return found


def random_states(seed, device):
    """The states of all generators that a scenario may use: torch's, NumPy's and Python's; and that of `device`."""
    of_cpu = [torch.Generator().manual_seed(seed).get_state(), np.random.RandomState(seed).get_state(),
              random.Random(seed).getstate()]
    return of_cpu, torch.Generator(device).manual_seed(seed).get_state()


class Games:
    """A VMAS scenario (its name or an object) in W worlds of G agents, N = W * G rows, as ncdpo.VectorEnv wants it.

    reset(seeds) -> obs (N, S);  step(action) -> obs, reward (N, 1), terminated, truncated, final_obs;  all on `device`.
    `success` (N,) is 1 in the rows whose episode the last step ended well, else 0; NaN of a scenario that WON lacks.
    """

    kind = "vmas"

    def __init__(self, scenario, num_worlds, device, critic="joint", continuous=False, max_steps=200, nearest=None,
                 **arguments):
        if scenario == "road_traffic":
            raise ValueError("its worlds share their past: one that begins anew would change that of the others")
        scenario = load(scenario) if isinstance(scenario, str) else scenario
        check_arguments(scenario, arguments)
        if nearest is not None:
            observe_nearest(scenario, nearest)
        if critic not in ("joint", "own") or not isinstance(max_steps, int) or max_steps < 1:
            raise ValueError(f"critic must be joint or own, not {critic!r}, and max_steps 1 or more, not {max_steps!r}")
        from vmas.simulator.environment import Environment
        self.device = device
        self.shared = Environment.vmas_random_state
        self.random = random_states(0, device)
        try:
            with warnings.catch_warnings(), self.randomness():
                warnings.simplefilter("ignore")  # the old gym on the precision of its own boxes
                self.game = Environment(scenario, num_worlds, device, max_steps, bool(continuous),
                                        terminated_truncated=True, **arguments)
        except Exception as error:  # whatever a scenario does with no agents, or half a one
            raise ValueError(f"VMAS cannot make it with {arguments} ({type(error).__name__} {error}): change these, or "
                             "give fewer --num-envs") from error
        self.worlds, self.agents = num_worlds, self.game.n_agents
        self.num_envs = self.worlds * self.agents
        if not self.agents:
            raise ValueError("no agent is left to learn: leave one without a heuristic")
        (own, *other_obs), (action, *other_actions) = self.game.observation_space, self.game.action_space
        if any(space != own for space in other_obs) or any(space != action for space in other_actions):
            raise ValueError("its agents differ in their spaces; one policy needs agents that share them")
        self.action_space = modern(action)
        self.policy_dim = modern(own).shape[0]
        seen = self.agents if critic == "joint" else 1
        self.observation_space = gym.spaces.Box(-torch.inf, torch.inf, (seen * self.policy_dim,))
        turn = torch.arange(self.agents, device=device)
        self.order = (turn[:, None] + turn[:seen]) % self.agents  # whose observations an agent's row holds
        held = tensors(scenario, num_worlds)
        with self.randomness():
            self.game.reset()
        again = tensors(scenario, num_worlds)
        # Does a reset build new lists or objects (distributions, say)? Then what it did cannot be put back
        self.rebuilds = [(id(box), key) for box, key in held] != [(id(box), key) for box, key in again]
        self.won = WON.get(Path(inspect.getsourcefile(type(scenario).make_world)).stem)
        self.success = torch.full((self.num_envs,), 0.0 if self.won else torch.nan, device=device)

    @contextlib.contextmanager
    def randomness(self):
        """In it VMAS draws this game's own random numbers: it has one state of them for all games of a process."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            self.shared[:], of_device = self.random
            for gpu in gpus:
                torch.cuda.set_rng_state(of_device, gpu)
            yield
            self.random = list(self.shared), torch.cuda.get_rng_state(self.device) if gpus else of_device

    def joint(self, obs):
        """Rows (N, S) of the agents' observations (W, own)."""
        return torch.stack(obs, 1)[:, self.order].reshape(self.num_envs, -1)

    def rows(self, world):
        """What holds for a world (W,), for each of its agents (N,)."""
        return world.repeat_interleave(self.agents, output_size=self.num_envs)

    def reset(self, seeds):
        self.random = random_states(seeds[0], self.device)
        with self.randomness():
            obs = self.game.reset()
        self.used = torch.ones(self.worlds, dtype=torch.bool, device=self.game.device)  # no beginnings in reserve
        return self.joint(obs)

    def step(self, action):
        action = action.float() if self.game.continuous_actions else action
        parts = action.view(self.worlds, self.agents, -1).unbind(1)
        with self.randomness():
            obs, reward, terminated, truncated, info = self.game.step(list(parts))
        if self.won:
            wins = [torch.as_tensor(self.won(x), device=terminated.device) & terminated for x in info]
            self.success = torch.stack(wins, 1).flatten().float()
        final_obs = self.joint(obs)
        reward = torch.stack(reward, 1).view(-1, 1).float()
        obs = self.restart(terminated | truncated, final_obs)
        return obs, reward, self.rows(terminated), self.rows(truncated), final_obs

    def restart(self, ended, obs):
        """Observations (N, S) after new episodes have begun in the worlds where `ended` (W,) is true.

        VMAS begins anew either in one world, which is slow, or everywhere. Beginnings are drawn everywhere, and kept
        until a world has used its own.
        """
        if not ended.any():
            return obs
        if self.rebuilds:
            with self.randomness():
                for world in ended.nonzero().flatten().tolist():
                    first_obs = self.game.reset_at(world)
            self.first_obs = self.joint(first_obs)
        else:
            if (ended & self.used).any():
                self.draw_beginnings()
            for box, key, begin in self.reserve:
                box[key] = begin.where(ended.view(-1, *[1] * (begin.dim() - 1)), box[key])
            self.used |= ended
        self.game.steps.masked_fill_(ended, 0)
        return self.first_obs.where(self.rows(ended)[:, None], obs)

    def draw_beginnings(self):
        """Reset all worlds, keep what the reset touched as `reserve`, and put everything back."""
        before = [(box, key, box[key], box[key]._version, box[key].clone())
                  for box, key in tensors(self.game.scenario, self.worlds)]
        steps = self.game.steps
        with self.randomness():
            self.first_obs = self.joint(self.game.reset())
        self.game.steps = steps
        self.reserve = []
        for box, key, tensor, version, copy in before:
            if box[key] is not tensor or tensor._version != version:  # else it is no part of how an episode begins
                self.reserve.append((box, key, box[key].clone()))
                box[key] = copy
        self.used.fill_(False)

    def close(self):
        pass
