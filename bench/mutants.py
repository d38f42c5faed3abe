"""Are the tests of the algorithms worth anything? Breaks the code in ways that train badly without crashing.

    python bench/mutants.py --out docs/benchmarks/2026-11-21-mutants.json

Each mutant is one change of one line, in a copy of the code: a sign, a normaliser, a mask that is off by one, a
baseline, a gradient that flows or does not, the wrong policy's log-probabilities. It is killed if a test of
tests/unit/rl/algorithms fails; exit code 1 if one survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from reports import ROOT, write_json

CODE = "stages/rl/algorithms"
TESTS = "tests/unit/rl/algorithms"


@dataclass(frozen=True)
class Mutant:
    """One line that says something else."""

    file: str
    kind: str
    old: str
    new: str


MUTANTS = (
    Mutant("policy_gradient.py", "sign", "-logprobs * weights", "logprobs * weights"),
    Mutant("policy_gradient.py", "sign", "-fixed * ratios, -fixed * clipped)\n", "fixed * ratios, fixed * clipped)\n"),
    Mutant("policy_gradient.py", "sign", "inputs.advantages - self.charge_kl", "inputs.advantages + self.charge_kl"),
    Mutant("policy_gradient.py", "pessimism", "torch.maximum(-fixed", "torch.minimum(-fixed"),
    Mutant("policy_gradient.py", "normaliser", "terms.sum() / totals.num_tokens", "terms.mean()"),
    Mutant("policy_gradient.py", "normaliser", ".sum() / totals.num_units\n", ".mean()\n"),
    Mutant("policy_gradient.py", "normaliser", "terms.sum() / (totals.num_units", "terms.sum() / (len(terms)"),
    Mutant("policy_gradient.py", "normaliser", "terms / mask.sum(dim=1, keepdim=True)", "terms / mask.shape[1]"),
    Mutant("policy_gradient.py", "gradient", "weights.detach() * advantages.detach()", "weights * advantages"),
    Mutant("policy_gradient.py", "gradient", "fixed = log_ratios.exp()", "fixed = log_ratios.exp().detach()"),
    Mutant("policy_gradient.py", "logprobs", "else inputs.sampling_logprobs\n", "else inputs.reference_logprobs\n"),
    Mutant(
        "policy_gradient.py", "logprobs", "older = inputs.proximal_logprobs if", "older = inputs.sampling_logprobs if"
    ),
    Mutant("policy_gradient.py", "clip", '1 + clip["high"]', '1 + clip["low"]'),
    Mutant("policy_gradient.py", "weight", "terms = terms * weights", "terms = terms"),
    Mutant(
        "policy_gradient.py",
        "mask",
        "inputs.sampling_logprobs, inputs.reference_logprobs, inputs.completion_mask, estimator",
        "inputs.sampling_logprobs, inputs.reference_logprobs, torch.ones_like(inputs.completion_mask), estimator",
    ),
    Mutant("policy_gradient.py", "sign", "terms + self.kl_loss_coef", "terms - self.kl_loss_coef"),
    Mutant("policy_gradient.py", "coefficient", "self.kl_loss_coef * self._kl_of_loss", "self._kl_of_loss"),
    Mutant(
        "policy_gradient.py",
        "logprobs",
        "predictions.logprobs, inputs.reference_logprobs, inputs.completion_mask",
        "predictions.logprobs, inputs.sampling_logprobs, inputs.completion_mask",
    ),
    Mutant(
        "policy_gradient.py",
        "gradient",
        "predictions.logprobs, inputs.reference_logprobs, inputs.completion_mask",
        "predictions.logprobs.detach(), inputs.reference_logprobs, inputs.completion_mask",
    ),
    Mutant("policy_gradient.py", "estimator", "completion_mask, self.kl_loss_estimator", 'completion_mask, "k2"'),
    Mutant("policy_gradient.py", "weight", 'else "sequence_tis"', 'else "token_tis"'),
    Mutant("policy_gradient.py", "bound", "log_ratios.clamp(max=LARGEST_LOG_RATIO)", "log_ratios"),
    Mutant("importance.py", "sign", "logprobs - sampling_logprobs", "sampling_logprobs - logprobs"),
    Mutant("importance.py", "gradient", "logprobs.detach(), sampling_logprobs.detach()", "logprobs, sampling_logprobs"),
    Mutant("importance.py", "bound", "ratios.clamp(max=max_weight)", "ratios"),
    Mutant(
        "importance.py",
        "mask",
        "torch.where(completion_mask, logprobs - sampling_logprobs, 0.0)",
        "logprobs - sampling_logprobs",
    ),
    Mutant("kl.py", "sign", "return logprobs - reference_logprobs", "return reference_logprobs - logprobs"),
    Mutant("kl.py", "gradient", "estimate_kl(logprobs.detach()", "estimate_kl(logprobs"),
    Mutant("kl.py", "sum", "per_token.flip(1).cumsum(1).flip(1)", "per_token.cumsum(1)"),
    Mutant(
        "kl.py", "sum", "per_token.flip(1).cumsum(1).flip(1)", "per_token.sum(1, keepdim=True).expand_as(per_token)"
    ),
    Mutant("advantages.py", "baseline", "(total[of_row] - values) / (count[of_row] - 1)", "(total / count)[of_row]"),
    Mutant(
        "advantages.py",
        "baseline",
        "(total[of_row] - values) / (count[of_row] - 1)",
        "(total[of_row] - values) / count[of_row]",
    ),
    Mutant("advantages.py", "baseline", "((values.sum() - total) / others)", "(values.sum() / others)"),
    Mutant("advantages.py", "scale", "(count - 1).clamp(min=1)", "count"),
    Mutant("advantages.py", "mask", "kept = per_token[completion_mask]", "kept = per_token.flatten()"),
    Mutant("advantages.py", "mask", ".long().sum(dim=1) - 1  # [B]", ".long().sum(dim=1)  # [B]"),
    Mutant("remax.py", "baseline", "return scores - greedy_scores", "return scores - greedy_scores.mean()"),
    Mutant("remax.py", "baseline", "return scores - greedy_scores", "return scores"),
    Mutant("remax.py", "coefficient", "return self.kl_coef * kl_cost", "return kl_cost"),
    Mutant(
        "remax.py",
        "logprobs",
        "kl_cost(logprobs, inputs.reference_logprobs",
        "kl_cost(inputs.sampling_logprobs, inputs.reference_logprobs",
    ),
    Mutant("reinforce.py", "baseline", "scores - mean_of_other_groups", "scores + mean_of_other_groups"),
    Mutant("rloo.py", "baseline", "advantages = scores - leave_one_out", "advantages = scores + leave_one_out"),
    Mutant("rloo.py", "sign", "inputs.advantages - charged", "inputs.advantages + charged"),
    Mutant("rloo.py", "baseline", "penalties - leave_one_out(penalties, inputs.groups)", "penalties"),
    Mutant("rloo.py", "estimator", "sequence_kl(inputs, self.kl_estimator)", 'sequence_kl(inputs, "k1")'),
    Mutant("grpo.py", "scale", "advantages / (spread + EPSILON)", "advantages * (spread + EPSILON)"),
    Mutant("grpo.py", "baseline", "scores - group_mean(scores, groups)", "scores - scores.mean()"),
    Mutant("reinforce_pp.py", "baseline", "scores - group_mean(scores, rollout.groups[rows])", "scores"),
    Mutant("reinforce_pp.py", "sign", "returns - self.kl_coef * cost", "returns + self.kl_coef * cost"),
    Mutant(
        "reinforce_pp.py",
        "scale",
        "whiten(returns, mask)",
        "returns",
    ),
    Mutant("ppo.py", "sign", "rewards - self.kl_coef * kl", "rewards + self.kl_coef * kl"),
    Mutant("ppo.py", "mask", "put_at_end(inputs.advantages[:, 0], mask)", "inputs.advantages"),
    Mutant("ppo.py", "shift", "torch.cat([values[:, 1:]", "torch.cat([values[:, :-1]"),
    Mutant("ppo.py", "sum", "delta + gamma * gae_lambda * running", "delta + gae_lambda * running"),
    Mutant("ppo.py", "pessimism", "torch.maximum((values", "torch.minimum((values"),
    Mutant("ppo.py", "normaliser", "errors, 0.0).sum() / totals.num_tokens", "errors, 0.0).mean()"),
    Mutant("ppo.py", "returns", "advantages + values, 0.0", "advantages, 0.0"),
    Mutant("copg.py", "sign", "scores - beta * log_ratios", "scores + beta * log_ratios"),
    Mutant("copg.py", "normaliser", "correction=1) / beta", "correction=0) / beta"),
    Mutant("copg.py", "normaliser", "loss.sum() / totals.num_units", "loss.mean()"),
    Mutant(
        "copg.py",
        "mask",
        "torch.where(mask, predictions.logprobs - inputs.reference_logprobs, 0.0)",
        "(predictions.logprobs - inputs.reference_logprobs)",
    ),
    Mutant("best_of_n.py", "choice", "Unit((best,)) for best, _ in pairs", "Unit((worst,)) for _, worst in pairs"),
    Mutant("best_of_n.py", "sign", "-predictions.logprobs, 0.0", "predictions.logprobs, 0.0"),
    Mutant("online_dpo.py", "choice", "best = max(rows", "best = min(rows"),
    Mutant("online_dpo.py", "sign", "ratios[0::2] - ratios[1::2]", "ratios[1::2] - ratios[0::2]"),
    Mutant("online_dpo.py", "logprobs", "logprobs - reference_logprobs.detach()", "logprobs"),
    Mutant("online_dpo.py", "normaliser", "per_pair.sum() / num_pairs", "per_pair.mean()"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = sorted({mutant.file for mutant in MUTANTS})
    parser.add_argument("--only", choices=files, help="file whose mutants are tried")
    parser.add_argument("--limit", type=int, help="mutants to try, from the first on")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in (None, mutant.file)][: arguments.limit]
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        directory = Path(name)
        for part in ("stages", "tests"):
            shutil.copytree(ROOT / part, directory / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", directory)
        if run_tests(directory) is not None:
            raise SystemExit("the tests fail without any mutant")
        rows = [{**asdict(mutant), "killed_by": try_mutant(mutant, directory)} for mutant in mutants]
    survivors = [row for row in rows if row["killed_by"] is None]
    print(f"{len(rows) - len(survivors)} of {len(rows)} killed")
    write_json(arguments.out, rows)
    return 1 if survivors else 0


def try_mutant(mutant: Mutant, directory: Path) -> str | None:
    """The first test that fails, or None."""
    path = directory / CODE / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file}: {mutant.old!r} is there {text.count(mutant.old)} times; update the mutant")
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        killer = run_tests(directory)
    finally:
        path.write_text(text)
    verdict = "killed" if killer else "SURVIVED"
    print(f"{verdict:9} {mutant.file:20} {mutant.kind:12} {mutant.new.strip()[:60]:62} {killer}", flush=True)
    return killer


def run_tests(directory: Path) -> str | None:
    """Name of the first failing test; None if all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", TESTS]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600, env=env)
    if done.returncode == 0:
        return None
    # Not ERROR: of a mutant that cannot be imported no test has said anything.
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if not failed:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return failed[0].split(" - ")[0].split("::", 1)[-1]


if __name__ == "__main__":
    sys.exit(main())
