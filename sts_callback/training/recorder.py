"""What a run has measured, written into its folder, shown on the screen and kept in the ledger."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from sts_callback.measure.monitor import Monitor
from sts_callback.measure.scoring import rank_agreement
from sts_callback.policy import judge_forecast
from sts_callback.records import DriftSnapshot, Estimate, Forecast, Verdict
from sts_callback.records.rehearsal import Rehearsal
from sts_callback.records.run import Given, Looks, RunSettings, TimeSpent
from sts_callback.report.terminal.check import check_view
from sts_callback.report.terminal.forecast import forecast_view, layers_table
from sts_callback.report.terminal.rehearsal import not_rehearsed, rehearsal_view
from sts_callback.report.terminal.rows import rows_doubts
from sts_callback.runs import ledger, track_record
from sts_callback.runs.calibration import expected_changes
from sts_callback.runs.directory import RunDirectory
from sts_callback.training.arguments import Settings

logger = logging.getLogger(__name__)


class RunRecorder:
    """Knows the places. That one of them fails is for its caller to survive."""

    def __init__(self, settings: Settings, directory: RunDirectory) -> None:
        """Name the user's settings and the folder of the run; nothing is written yet."""
        self._settings, self._directory = settings, directory
        self._expected: Mapping[str, Estimate] = {}
        self._given = Given()

    def learn_given(self, given: Given) -> None:
        """Take what the run was given, as a command takes it, before anything is written or shown."""
        self._given = given

    def write_settings(self, looks: Looks) -> None:
        """Write what the run was asked to do, and when it is planned to be checked."""
        one = self._settings
        asked = {"check_on": one.check_on, "action": one.action}
        settings = RunSettings.of(one.policy, one.probes, **asked, max_overhead=one.max_overhead, looks=looks, given=self._given)
        self._directory.write_settings(settings)

    def write_step_zero(
        self, monitor: Monitor, forecasts: Sequence[Forecast], rollouts: Sequence[Mapping[str, Any]], looks: Looks
    ) -> None:
        """Write settings, forecasts and what drift is measured from.

        Args:
            monitor: that made them.
            forecasts: the one that decides first.
            rollouts: of step 0, where reward functions are tapped.
            looks: the planned checks.

        """
        self.write_settings(looks)
        self._directory.write_forecast(forecasts[0], judge_forecast(forecasts[0], self._settings.policy), forecasts[1:])
        self._directory.write_rollouts(rollouts)
        self._directory.append_top_examples(monitor.top_activating_examples())
        assert monitor.step_zero is not None
        monitor.step_zero.save(self._directory.baseline_file)

    def show_rehearsing(self, forecast: Forecast, n_steps: int) -> None:
        """Say that the forecast is made, which is shown when the rehearsal has ended, and how long that is."""
        tqdm.write(f"STS: forecast made in {forecast.seconds:.0f} s; rehearsing {n_steps} steps ...")

    def show_before(
        self, monitor: Monitor, forecasts: Sequence[Forecast], rehearsal: Rehearsal | None, verdict: Verdict | None
    ) -> None:
        """Print what is known before the first step: by the rehearsal if there was one, else by the forecast.

        Args:
            monitor: that made them.
            forecasts: the one that decides first.
            rehearsal: with doses or without; None if none was wanted.
            verdict: on the rehearsal; None without doses.

        """
        first, policy = forecasts[0], self._settings.policy
        in_context = judge_forecast(first, policy)
        if rehearsal is not None and verdict is not None:
            limit = self._settings.max_overhead
            tqdm.write(
                rehearsal_view(rehearsal, verdict, first, in_context, policy.budgets, max_overhead=limit, given=self._given)
            )
        else:
            tqdm.write(forecast_view(first, in_context, policy, expected=self._expected, given=self._given))
            if rehearsal is not None:
                tqdm.write(not_rehearsed(rehearsal))
        if doubts := rows_doubts(monitor.reads):
            tqdm.write(doubts)
        if len(forecasts) > 1:
            tqdm.write(layers_table(forecasts, [rank_agreement(first, f) for f in forecasts]))
        if (verdict or in_context).decision == "no-go" and self._settings.on_forecast == "warn":
            tqdm.write("Training begins all the same; STSCallback(on_forecast='refuse') would not let it.")

    def learn_expectations(self, forecast: Forecast) -> None:
        """Look up what past runs make of a forecast, if there are enough of them, before it is shown."""
        expected = track_record.expectations(ledger.read(self._settings.ledger).entries, forecast)
        self._expected = {} if expected is None else expected.nll_change

    def with_expected(self, rehearsal: Rehearsal) -> Rehearsal:
        """A rehearsal with what past runs make of it; with those that ship alone where the ledger cannot be read."""
        try:
            entries = ledger.read(self._settings.ledger).entries
        except OSError as error:
            logger.warning("STS: past runs are left out, the ledger cannot be read (%s).", error)
            entries = ()
        return dataclasses.replace(rehearsal, expected=expected_changes(rehearsal, entries))

    def write_check(self, monitor: Monitor, snapshot: DriftSnapshot, verdict: Verdict, time: TimeSpent) -> None:
        """Write a check. Its own line comes last: where that stands, all of the check has been written."""
        self._directory.append_top_examples(monitor.top_activating_examples(snapshot.train.top_features))
        self._directory.append_check(snapshot, verdict, time)

    def show_check(
        self,
        snapshot: DriftSnapshot,
        verdict: Verdict,
        rehearsal: Rehearsal | None,
        since: Mapping[str, int],
        next_step: int,
        *,
        is_first: bool,
    ) -> None:
        """Print a check.

        Args:
            snapshot: the check.
            verdict: on it.
            rehearsal: of the run, if any.
            since: of alarms that stand, the steps of the checks that began them.
            next_step: of the next planned check; 0 if none is left.
            is_first: whether no check was made before.

        """
        shown = check_view(
            snapshot,
            verdict,
            self._settings.policy.budgets,
            since=since,
            is_first=is_first,
            expected=rehearsal.expected if rehearsal else {},
            next_step=next_step,
            output_dir=self._directory.folder.parent,
            given=self._given,
        )
        tqdm.write(shown)

    def last_words(self, *, is_watched: bool, failed_checks: Sequence[int]) -> str:
        """What is said when training ends; if it was not wholly watched, the last line says so.

        Args:
            is_watched: whether there were checks at all.
            failed_checks: their steps.

        """
        folder = self._directory.folder
        if not is_watched:
            return f"STS: this run was NOT WATCHED; {folder / 'faults.jsonl'} has the reason."
        lines = [f"STS files of this run: {folder}; report.html is the one to read"]
        if failed_checks:
            steps = ", ".join(map(str, failed_checks))
            lines.append(
                f"STS: this run was NOT WHOLLY WATCHED, checks failed at step {steps}; faults.jsonl there has the reason."
            )
        return "\n".join(lines)

    def enter_outcome(self, forecast: Forecast, last: DriftSnapshot, rehearsal: Rehearsal | None) -> None:
        """Enter how the forecast came out into the ledger, if one is kept."""
        ledger.append(ledger.Entry.of(forecast, last, rehearsal), self._settings.ledger)
