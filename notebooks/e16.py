"""Between NCDPO and DPPO (E16): score the last m denoising steps, and condition on the noise of those before.

    python notebooks/e16.py --scored-steps 2 --env HalfCheetah-v4                     # and other flags of ncdpo.py
    python notebooks/e16.py --scored-steps 2 --no-chain-gradient --env HalfCheetah-v4
    python notebooks/e16.py --scored-steps 2 --evaluate RUN                           # or --resume RUN
    python notebooks/e16.py --no-chain-gradient --env HalfCheetah-v4                  # NCDPO itself, cut

m = 1 is NCDPO with a sigma that stays at --min-std, all steps are DPPO. The run is one of --algo dppo, and knows
neither its m nor --no-chain-gradient: give both again where it is evaluated or resumed. Without m it is NCDPO itself,
and sigma is learnt.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


class ScoredSteps(ncdpo.DPPO):
    """DPPO whose decisions are the last M = scored_steps of the K steps; the noise of the others is part of the state.

    The latent is (x_K, z_K, ..., z_{M+1}; x_{M-1}, ..., x_1), (B, K, A); log-likelihoods are (B, M). Without
    `chain_gradient` none flows through the steps that are conditioned on.
    """

    def __init__(self, *dims, scored_steps, chain_gradient=True, **chain):
        super().__init__(*dims, **chain)
        self.M, self.chain_gradient = min(scored_steps, self.K), chain_gradient  # --init-from may name a shorter chain
        self.ks = self.ks[-self.M:]

    def begin(self, obs, omega):
        """x_M (B, A) by the chain of E5 on its noise (x_K, z_K, ..., z_{M+1}), the first entries of omega."""
        x = omega[:, 0]
        for k in range(self.K, self.M, -1):
            x = self.mu(x, k, obs) + self.schedule.sigma[k] * omega[:, self.K + 1 - k]
        return x

    def act(self, obs, omega, noise):
        x, log_probs = self.begin(obs, omega), []
        latent = list(omega[:, :self.K + 1 - self.M].unbind(1))
        for k in range(self.M, 1, -1):
            mu = self.mu(x, k, obs)
            x = mu + torch.exp(self.log_std[k]) * omega[:, self.K + 1 - k] / self.noise_scale
            log_probs.append(ncdpo.gaussian_log_prob(x, mu, self.log_std[k]))
            latent.append(x)
        mu = self.mu(x, 1, obs)
        action = self.head.sample(mu, noise)
        return action, torch.stack([*log_probs, self.head.log_prob(mu, action)], 1), torch.stack(latent, 1)

    def evaluate_actions(self, obs, action, latent):
        omega, scored = latent.split([self.K + 1 - self.M, self.M - 1], 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.chain_gradient):
            x = self.begin(obs, omega)
        xs = torch.cat([x[:, None], scored], 1)  # x_M, ..., x_1
        mu = self.mu(xs, self.ks, obs[:, None].expand(-1, self.M, -1))  # (B, M, A), all steps at once
        steps = ncdpo.gaussian_log_prob(scored, mu[:, :-1], self.log_std[self.ks[:-1]])
        last = self.head.log_prob(mu[:, -1], action)
        return torch.cat([steps, last[:, None]], 1), self.head.entropy(mu[:, -1])


class CutChain(ncdpo.NCDPO):
    """NCDPO whose gradient ends in the last step of the chain; E13 sends it through all of them."""

    def mean(self, obs, omega):
        x = omega[:, 0]
        with torch.no_grad():
            for k in range(self.K, 1, -1):
                x = self.mu(x, k, obs) + self.schedule.sigma[k] * omega[:, self.K + 1 - k]
        return self.mu(x, 1, obs)


def check(algo, m, flags):
    """Raises UserError for more than all steps, or a run to go on with that was trained by the other algorithm."""
    config, evaluated, resumed, _ = ncdpo.parse(flags)
    steps = config.sampling_steps or config.denoising_steps
    if m is not None and not 1 <= m <= steps:
        raise ncdpo.UserError(f"--scored-steps must be from 1 to {steps}, the number of steps that are run")
    run = resumed if evaluated is None else evaluated
    if run is not None and (found := ncdpo.load_config(run).algo) != algo:
        way = {"dppo": "give --scored-steps as it was trained", "ncdpo": "leave out --scored-steps"}
        raise ncdpo.UserError(f"{run} is a run of {found}: {way.get(found, 'ncdpo.py goes on with it')}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--scored-steps", type=int, help="m, from 1 to the number of steps that are run")
    parser.add_argument("--chain-gradient", action=argparse.BooleanOptionalAction, default=True,
                        help="let the gradient flow through the steps that are conditioned on")
    parser.add_argument("--algo", help="may be given: dppo with m, ncdpo without")
    line, flags = parser.parse_known_args(arguments)
    algo = "ncdpo" if line.scored_steps is None else "dppo"
    if line.algo not in (None, algo):
        parser.error(f"this is a run of --algo {algo}: leave out --algo")
    try:
        check(algo, line.scored_steps, flags)
    except ncdpo.UserError as error:
        print(f"e16: {str(error).rstrip('.')}.", file=sys.stderr)
        return 2

    class Chosen(ScoredSteps):
        def __init__(self, *dims, **chain):
            super().__init__(*dims, scored_steps=line.scored_steps, chain_gradient=line.chain_gradient, **chain)

    if algo == "dppo":
        ncdpo.DPPO = Chosen
    elif not line.chain_gradient:
        ncdpo.NCDPO = CutChain
    return ncdpo.main(["--algo", algo, *flags])


if __name__ == "__main__":
    sys.exit(main())
