"""The second round's tables: what was known before step 1 and in training, against what happened. No model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from validation.alarms import Table, auroc, share
from validation.scores import Scores, right_signs, spearman, student
from validation.second.outcomes import BUDGET, DOMAINS, Happened, Rehearsed


@dataclass(frozen=True)
class Told:
    """A run with all that was known before it."""

    run: Happened
    rehearsed: Rehearsed
    scores: Scores
    """Of the forecast, each with larger values for more change or for worse."""

    def orders(self) -> Scores:
        """Everything that orders domains from the worst to the best; unsigned ones from the most changed to the least."""
        at_five = {"*change at step 5 of the run itself*": self.run.looks[5].change}
        multiple = {"change at the multiple": self.rehearsed.at_multiple} if np.isfinite(self.rehearsed.at_multiple).all() else {}
        return {
            "expected change": self.rehearsed.expected,
            "change after five steps": self.rehearsed.own.change,
            **multiple,
            "drift after five steps": self.rehearsed.drift,
            **at_five,
            "*KL of the domain's answers after five steps*": self.rehearsed.divergence,
            **{f"*{name}*": values for name, values in self.scores.items()},
        }


Runs = Sequence[Told]


def pooled(runs: Runs, value: Callable[[Told], float]) -> str:
    """Mean over fine-tunes of a number of each run, runs of one fine-tune averaged first, with Student's interval."""
    means = by_fine_tune(runs, value)
    if len(means) == 0:
        return "-"
    found = student(means)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]".replace("nan", "-")


def by_fine_tune(runs: Runs, value: Callable[[Told], float]) -> np.ndarray:
    """Means over the runs of each; runs that have no such number are left out."""
    groups: dict[str, list[float]] = {}
    for told in runs:
        if not math.isnan(found := value(told)):
            groups.setdefault(told.run.fine_tune, []).append(found)
    return np.array([np.mean(group) for group in groups.values()])


def harm_orders(parts: Mapping[str, Runs]) -> Table:
    """Spearman of every order with the signed and with the absolute change at the end."""
    rows: Table = [["order (*rival*)", *(f"{what}, {part}" for what in ("signed", "absolute") for part in parts)]]
    for name in _names(parts):
        cells = []
        for unsigned in (False, True):
            for runs in parts.values():

                def correlation(told: Told, name: str = name, unsigned: bool = unsigned) -> float:
                    said, change = told.orders().get(name), told.run.change
                    if said is None:
                        return math.nan
                    return spearman(np.abs(said), np.abs(change)) if unsigned else spearman(said, change)

                cells.append(pooled(runs, correlation))
        rows.append([name, *cells])
    return rows


def movement_orders(parts: Mapping[str, Runs]) -> Table:
    """Spearman of orders with the drift at the end."""

    def both(told: Told) -> np.ndarray:
        found: np.ndarray = 2 * stats.rankdata(told.rehearsed.drift) + stats.rankdata(told.scores["STS_net"])
        return found

    orders: dict[str, Callable[[Told], np.ndarray]] = {
        "ranks of drift after five steps, twice, and STS_net": both,
        "drift after five steps": lambda told: told.rehearsed.drift,
        "*KL of the domain's answers after five steps*": lambda told: told.rehearsed.divergence,
        "*absolute change after five steps*": lambda told: np.abs(told.rehearsed.own.change),
        "*STS_net*": lambda told: told.scores["STS_net"],
        "*NLL at step 0*": lambda told: told.scores["NLL at step 0"],
    }
    rows: Table = [["order (*rival*)", *parts]]
    for name, order in orders.items():
        cells = (pooled(runs, lambda t, order=order: spearman(order(t), t.run.drift)) for runs in parts.values())  # type: ignore[misc]
        rows.append([name, *cells])
    return rows


def signs(parts: Mapping[str, Runs]) -> Table:
    """How often each has the sign of a clear change."""
    says: dict[str, Callable[[Told], np.ndarray | None]] = {
        "expected change": lambda told: told.rehearsed.expected,
        "change after five steps": lambda told: told.rehearsed.own.change,
        "change at the multiple": lambda told: told.orders().get("change at the multiple"),
        "*change at step 5 of the run itself*": lambda told: told.run.looks[5].change,
        "*NLL change in context*": lambda told: told.scores.get("NLL change in context"),
        "*gradient alignment*": lambda told: told.scores.get("gradient alignment"),
        "*always worse*": lambda told: np.ones(len(DOMAINS)),
    }
    rows: Table = [["says", *parts]]
    for name, said in says.items():
        rows.append([name, *(_rate(right_sign(runs, said)) for runs in parts.values())])
    return rows


def right_sign(runs: Runs, said: Callable[[Told], np.ndarray | None]) -> list[bool]:
    """For each clear change of the runs of which something was said, whether its sign was right."""
    found: list[bool] = []
    for told in runs:
        if (values := said(told)) is not None:
            found += right_signs(values, told.run.change, told.run.error)
    return found


def before_training(parts: Mapping[str, Runs], threshold: float) -> Table:
    """Which domains each rule names before step 1.

    Args:
        parts: runs by title.
        threshold: of the fitted rule.

    """
    rules: dict[str, Callable[[Told], np.ndarray]] = {
        "1: over": lambda told: told.rehearsed.own.over,
        "1: over or on course": lambda told: told.rehearsed.own.passed,
        "2: fitted": lambda told: told.rehearsed.expected >= threshold,
        "*value after five steps at least the budget*": lambda told: told.rehearsed.own.change >= BUDGET,
    }
    rows: Table = [["rule", *(f"{what}, {part}" for part in parts for what in ("harmed named", "others named"))]]
    for name, rule in rules.items():
        rows.append([name, *(cell for runs in parts.values() for cell in named(runs, rule))])
    return rows


def named(runs: Runs, rule: Callable[[Told], np.ndarray]) -> tuple[str, str]:
    """Of harmed domains and of the others, how many a rule names."""
    hits = np.concatenate([rule(told) for told in runs]) if runs else np.zeros(0, dtype=bool)
    harmed = np.concatenate([told.run.harmed for told in runs]) if runs else np.zeros(0, dtype=bool)
    return _rate(hits[harmed].tolist()), _rate(hits[~harmed].tolist())


def in_training(parts: Mapping[str, Runs]) -> Table:
    """The alarms of checks: how many, how false, how early."""
    head = [
        "runs",
        "harmed caught",
        "others alarmed",
        "of these under half the budget at the end",
        "lead in steps, median (range)",
    ]
    rows: Table = [head]
    for part, runs in parts.items():
        caught, others = named(runs, lambda told: np.isfinite(told.run.alarmed))
        n_false = sum(int((np.isfinite(t.run.alarmed) & ~t.run.harmed & (t.run.change < BUDGET / 2)).sum()) for t in runs)
        leads = np.concatenate([lead_in_training(told) for told in runs]) if runs else np.zeros(0)
        told_leads = f"{np.median(leads):.1f} ({leads.min():.1f} to {leads.max():.1f})" if len(leads) else "-"
        rows.append([part, caught, others, str(n_false), told_leads])
    return rows


def lead_in_training(told: Told) -> np.ndarray:
    """Steps from the first alarm of a check to the first crossing, of the harmed domains that alarmed, `(n,)`."""
    keep = told.run.harmed & np.isfinite(told.run.alarmed)
    lead: np.ndarray = (told.run.crossed - told.run.alarmed)[keep]
    return lead


def relative_lead(told: Told) -> np.ndarray:
    """Lead over first crossing, by the first alarm before step 1 or in training, of all harmed domains; 0 without one, `(n,)`."""
    first = np.where(told.rehearsed.own.over, 0.0, told.run.alarmed)
    lead: np.ndarray = np.nan_to_num((told.run.crossed - first) / told.run.crossed, nan=0.0)[told.run.harmed]
    return lead


def by_check(runs: Runs) -> Table:
    """What had been caught after each check, and how the change so far orders the domains."""
    rows: Table = [
        ["after step", "harmed caught so far", "others alarmed so far", "change so far, Spearman with the change at the end"]
    ]
    for step in runs[0].run.looks if runs else ():
        caught = named(runs, lambda told, step=step: told.run.alarmed <= step)  # type: ignore[misc]
        order = pooled(runs, lambda told, step=step: spearman(told.run.looks[step].change, told.run.change))  # type: ignore[misc]
        rows.append([str(step), *caught, order])
    return rows


def calibrated(parts: Mapping[str, Runs]) -> Table:
    """How far the expected changes missed, and how often their intervals held."""
    rows: Table = [["runs", "root mean square error", "of the change as it is", "mean error", "interval held", "width, median"]]
    for part, runs in parts.items():
        if not runs:
            continue
        change, expected, own, low, high = (
            np.concatenate([value(told) for told in runs])
            for value in (
                lambda t: t.run.change,
                lambda t: t.rehearsed.expected,
                lambda t: t.rehearsed.own.change,
                lambda t: t.rehearsed.low,
                lambda t: t.rehearsed.high,
            )
        )
        errors = (f"{math.sqrt(np.mean((change - said) ** 2)):.3f}" for said in (expected, own))
        held = _rate(((low <= change) & (change <= high)).tolist())
        rows.append([part, *errors, f"{np.mean(change - expected):+.3f}", held, f"{np.median(high - low):.2f}"])
    return rows


def areas(parts: Mapping[str, Runs]) -> Table:
    """AUROC of harm, over all domains of all runs and within runs."""
    rows: Table = [["evidence", *(f"{what}, {part}" for part in parts for what in ("over all", "within runs"))]]
    for name in _names(parts):
        cells: list[str] = []
        for runs in parts.values():
            known = [(values, told) for told in runs if (values := told.orders().get(name)) is not None]
            pairs = [(values, told.run.harmed) for values, told in known]
            together = [np.concatenate(some) for some in zip(*pairs, strict=True)] if pairs else [np.zeros(0)] * 2
            within = pooled([told for _, told in known], lambda told, name=name: _area(told.orders()[name], told.run.harmed))  # type: ignore[misc]
            cells += [f"{_area(*together):.3f}".replace("nan", "-"), within]
        rows.append([name, *cells])
    return rows


def run_by_run(runs: Runs) -> Table:
    """Each run in one line."""
    head = [
        "run",
        "change, median (worst)",
        "error",
        "harmed",
        "over, on course before",
        "alarmed",
        "expected, Spearman",
        "features",
    ]
    rows: Table = [head]
    for told in runs:
        run, said = told.run, told.rehearsed
        worst = int(np.argmax(run.change))
        rows.append(
            [
                run.key,
                f"{np.median(run.change):+.2f} ({DOMAINS[worst]} {run.change[worst]:+.2f})",
                f"{run.error.mean():.2f}",
                f"{run.harmed.sum()} of {len(DOMAINS)}",
                f"{said.own.over.sum()}, {(said.own.passed & ~said.own.over).sum()}",
                f"{np.isfinite(run.alarmed).sum()}",
                f"{spearman(said.expected, run.change):.2f}",
                f"{len(said.features & run.features)} of {len(run.features)}",
            ]
        )
    return rows


def by_loss_alone(runs: Runs) -> str:
    """How many harmed domains have as many right tokens as before, or more."""
    kept = [gained >= 0 for told in runs for gained in told.run.gained[told.run.harmed].tolist()]
    return _rate(kept)


def divergences(runs: Runs) -> str:
    """Spearman over runs of KL on the training rows after five steps with the runs' mean change."""
    kl, mean = (
        np.array(values) for values in zip(*((t.rehearsed.divergence_taught, t.run.change.mean()) for t in runs), strict=True)
    )
    return f"{spearman(kl, mean):.2f}".replace("nan", "-")


def _names(parts: Mapping[str, Runs]) -> list[str]:
    return list(dict.fromkeys(name for runs in parts.values() for told in runs for name in told.orders()))


def _area(evidence: np.ndarray, harmed: np.ndarray) -> float:
    return auroc(evidence, harmed) if 0 < harmed.sum() < len(harmed) else math.nan


def _rate(hits: Sequence[bool]) -> str:
    return share(sum(hits), len(hits))
