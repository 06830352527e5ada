"""Train in several processes of torchrun: on all GPUs of a machine, or of several that share the folders of runs and
clones; or on the cores of a CPU.

    torchrun --standalone --nproc-per-node 2 notebooks/parallel.py --env HalfCheetah-v4     # flags as of ncdpo.py

Each process plays its share of --num-envs and learns from its share of each minibatch. Gradients are averaged, as are
the advantages' scale, the statistics of the normalisers and what is logged of loss and episodes: a run differs from one
of a single process by its random numbers alone, and may be resumed with another number of processes. The first process
writes; `explained_variance` and the columns of the chain are its own.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def gather(x):
    """The tensors x of all processes, of one shape, one after another along their first axis."""
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class SharedLoss(nn.Module):
    """The loss of a trainer on its part of a minibatch, as a module: DistributedDataParallel averages its gradients."""

    def __init__(self, trainer):
        super().__init__()
        self.learnt = nn.ParameterList(trainer.agent.parameters())
        self.loss = trainer.loss

    def forward(self, **part):
        A = part["advantage"]
        everyones = gather(A)
        part["advantage"] = (A - everyones.mean()) / (everyones.std() + 1e-8)
        loss, diagnostics = self.loss(**part, norm_adv=False)
        distributed.all_reduce(values := torch.stack(list(diagnostics.values())) / WORLD)
        return loss, dict(zip(diagnostics, values))


class SharedTrainer(ncdpo.Trainer):
    """A Trainer that plays and learns its share, in step with those of the other processes."""

    def __init__(self, config):
        if config.num_envs % WORLD or config.minibatch_size % WORLD or config.minibatch_size < 2 * WORLD:
            raise ncdpo.UserError(f"--num-envs and --minibatch-size must be multiples of {WORLD}, the processes, and "
                                  f"the second {2 * WORLD} at least: change those flags or that number")
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count() * (config.device != "cpu")
        if gpus and (here > gpus or ":" in config.device):
            raise ncdpo.UserError(f"each of the {here} processes takes one of {gpus} GPUs: --nproc-per-node {gpus} or "
                                  "fewer, and no number in --device; or give --device cpu")
        super().__init__(dataclasses.replace(config, num_envs=config.num_envs // WORLD, total_timesteps=10**12,
                                             minibatch_size=config.minibatch_size // WORLD))
        self.batch_size *= WORLD  # of all of them
        self.updates = config.total_timesteps // self.batch_size
        if self.updates <= config.critic_warmup:
            raise ncdpo.UserError(f"--total-timesteps {config.total_timesteps} has no room for a rollout of "
                                  f"{self.batch_size} steps of all {WORLD} processes after a --critic-warmup of "
                                  f"{config.critic_warmup}")
        self.joined = False

    def join(self):
        """Go on with the weights and statistics of the first process, but with noise and episodes of our own."""
        self.joined = True
        for tensor in self.agent.state_dict().values():
            distributed.broadcast(tensor, 0)
        for norm in (self.agent.obs_norm, self.agent.reward_norm):
            norm.update = lambda x, norm=norm: ncdpo.Normalizer.update(norm, gather(x))
        self.loss = nn.parallel.DistributedDataParallel(SharedLoss(self))
        if RANK:
            torch.manual_seed(1_000 * self.config.seed + self.done + 1_000_003 * RANK)
            self.obs = self.env.reset(self.config.seed, self.done, RANK)

    def iterate(self):
        try:
            if not self.joined:
                self.join()
            rows = [super().iterate()] * WORLD
            distributed.all_gather_object(rows, rows[RANK])
        except ncdpo.UserError as error:
            if RANK:  # a mistake of this process alone, whose streams nobody sees
                print(f"ncdpo: {' '.join(str(error).split())}.", file=sys.__stderr__)
            raise
        except RuntimeError as error:
            if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
                raise  # not from between the processes: the task's own, say
            reason = str(error).partition("\n")[0]
            raise ncdpo.UserError(f"a process of torchrun has ended ({reason})") from error
        row = dict(rows[RANK])
        finished = [other for other in rows if other["episodes"]]
        row["episodes"] = sum(other["episodes"] for other in finished)
        for name in ("return", "length", "success") if finished else ():
            row[name] = sum(other[name] * other["episodes"] for other in finished) / row["episodes"]
        return row


def main(arguments):
    """Entry point of each process; returns the exit code of ncdpo.main."""
    if WORLD < 2:
        return ncdpo.main(arguments)
    if LOCAL_RANK < torch.cuda.device_count():
        torch.cuda.set_device(LOCAL_RANK)
    distributed.init_process_group()
    ncdpo.Trainer = SharedTrainer
    with contextlib.ExitStack() as stack:
        if RANK:  # does as the first process does, but nobody sees it
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(stream(stack.enter_context(open(os.devnull, "w"))))
            try:
                _, evaluated, resumed, _ = ncdpo.parse(arguments)
            except ncdpo.UserError as error:  # the first process says it, but of its own machine
                if not LOCAL_RANK:
                    print(f"ncdpo: {' '.join(str(error).split()).rstrip('.')}.", file=sys.__stderr__)
                return 2
            if evaluated:
                return 0
            copy = shutil.copytree(resumed, Path(folder, "run")) if resumed else folder
            arguments = arguments + ["--resume" if resumed else "--runs", copy]
        return ncdpo.main([str(argument) for argument in arguments])


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:  # argparse's
        code = end.code
    sys.stdout.flush()
    if RANK and code == 2:
        time.sleep(5)  # so that the first process may speak: torchrun ends all of them with the first that fails
    os._exit(code)  # gloo's threads may abort a Python that takes its leave (github.com/pytorch/pytorch/issues/190489)
