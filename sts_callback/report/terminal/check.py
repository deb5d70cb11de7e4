"""Checks of a run, as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich.text import Text

from sts_callback.config import Budget, PlainBudget
from sts_callback.policy import beside_loss
from sts_callback.records import DriftSnapshot, Estimate, Verdict
from sts_callback.records.run import Given
from sts_callback.report.summary import of_check
from sts_callback.report.terminal.text import rendered, wrapped
from sts_callback.report.terminal.verdict import advice_lines, open_reasons, summary_parts, verdict_line


def check_view(
    snapshot: DriftSnapshot,
    verdict: Verdict,
    budgets: Mapping[str, PlainBudget],
    *,
    since: Mapping[str, int] | None = None,
    is_first: bool = False,
    expected: Mapping[str, Estimate] | None = None,
    next_step: int = 0,
    output_dir: Path = Path("OUTPUT_DIR"),
    given: Given | None = None,
    colour: bool | None = None,
) -> str:
    """A check: the verdict, a row a domain, what it rests on; at an alarm what has happened and, once, what to do.

    Args:
        snapshot: the check.
        verdict: on it.
        budgets: of the protected domains.
        since: of alarms that stand, the steps of the checks that began them.
        is_first: whether no check was made before.
        expected: change of each domain's NLL at the end of the run, as the rehearsal had it.
        next_step: of the next planned check; 0 if none is known.
        output_dir: of the run.
        given: what the run was given, for the commands that are advised.
        colour: whether to use colours; by default where a terminal shows them.

    """
    since = since or {}
    is_new = not all(since.get(name, snapshot.step) < snapshot.step for name in verdict.alarmed)
    return rendered(
        [
            verdict_line(f"STS step {snapshot.step}", verdict, "check", since, is_first=is_first),
            *summary_parts(of_check(snapshot, verdict, budgets, expected, next_step)),
            *beside_lines(snapshot, verdict, budgets),
            *open_reasons(verdict),
            *(advice_lines(verdict, output_dir, given, budgets, has_sae=snapshot.has_sae) if is_new else []),
        ],
        colour,
    )


def beside_lines(snapshot: DriftSnapshot, verdict: Verdict, budgets: Mapping[str, PlainBudget]) -> list[Text]:
    """What the table does not have: the tokens of alarmed domains, a model that has diverged, what the policy writes."""
    told = []
    for name in verdict.alarmed:
        if name in budgets and (found := beside_loss(snapshot.domains[name], Budget.of(budgets[name]))):
            told.append(f"{name}: {found}.")
    if snapshot.diverged:
        told.append(f"Training has diverged: the model gives NaN or infinite numbers on {', '.join(snapshot.diverged)}.")
    told += worse_on_its_own_data(snapshot)
    text = snapshot.output_drift
    if not math.isnan(text.value):
        told.append(f"What the policy writes has moved by {text.value:.1%} [{text.low:.1%}, {text.high:.1%}].")
    return wrapped(told)


def worse_on_its_own_data(snapshot: DriftSnapshot) -> list[str]:
    """That training harms what it trains on; of a policy's own rollouts, which are no aim of training, nothing is said."""
    is_policy = not math.isnan(snapshot.output_drift.value)
    is_worse = snapshot.train.nll_change.low > 0 and not is_policy
    return ["The training data itself has got worse: the learning rate is too high to learn."] if is_worse else []
