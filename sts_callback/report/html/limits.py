"""Sections on the basis of the numbers: features and their examples, blind spots, and what was left out."""

from __future__ import annotations

import math

from sts_callback.errors import NEEDS_SAE
from sts_callback.records import Check, Snippet
from sts_callback.records.remedies import DomainAttribution
from sts_callback.report import formatting
from sts_callback.report.data import FeatureRow, ReportData
from sts_callback.report.html.components import beyond, command, domain, meanings, more, name_row, say, section, table
from sts_callback.report.html.markup import Html, join, tag

_MOST_FEATURES = 6  # unfolded
_N_QUOTED = 2  # examples from the training data that are shown before unfolding
_NAN = math.nan
_UNEXPLAINED = "The SAE leaves {} of the variance of the texts' activations unexplained. "


def examples_section(story: ReportData) -> Html:
    """Examples of the features that carry forecast and drift."""
    title = "Top activating examples"
    if not story.has_sae:
        return section("features", title, say(NEEDS_SAE))
    if not story.features:
        return section("features", title, say("No feature was looked up in the texts of this run."))
    told = [_feature(feature) for feature in story.features]
    shown, folded = told[:_MOST_FEATURES], told[_MOST_FEATURES:]
    untold = f" features.jsonl has {story.n_features_untold} more." if story.n_features_untold else ""
    return section(
        "features",
        title,
        say(
            "Each feature with the places in your own texts where it is most active before training; the active token is "
            "highlighted. What the places have in common is what the feature stands for, as far as one can tell. This section "
            "quotes your texts: mind to whom you show it." + untold
        ),
        *shown,
        more(formatting.counted(len(folded), "more feature"), *folded) if folded else join(),
    )


def attribution_section(story: ReportData) -> Html:
    """Training rows that activate protected domains' features."""
    title, found = "Rows to blame", story.blame
    if not story.has_sae:
        return section("blame", title, say(NEEDS_SAE))
    if found is None:
        told = [say(one.what, *([" ", command(one)] if one.command else [])) for one in story.to_rank_rows]
        return section("blame", title, say("No training rows were ranked."), *told)
    return section(
        "blame",
        title,
        say(
            f"{found.meaning} Score: 0 is an average row, 1 as the domain; \u25b2 stands out. Of {found.n_read} rows read "
            f"{len(found.left_out)} would be left out, a tenth at most. Rows are counted from 0."
        ),
        *(_blamed(one) for one in found.domains.values()),
    )


def _blamed(found: DomainAttribution) -> Html:
    rows = [
        [
            str(row.row),
            beyond(row.score, math.nextafter(found.threshold, math.inf), f"{row.score:.2f}"),
            str(row.feature),
            _quoted(row.snippet),
        ]
        for row in found.rows
    ]
    stand_out = (
        f"Standing out, above {found.threshold:.2f}: {formatting.counted(found.n_standing_out, 'row')}. The median is "
        f"{found.median:.2f}, the domain's own texts score {found.own_score:.2f}."
    )
    return join(
        tag("h3", "For ", domain(found.name)),
        table(["row", "score", "feature", "where it is active"], rows, cls="words"),
        say(stand_out),
        *_by_source(found),
    )


def _by_source(found: DomainAttribution) -> list[Html]:
    rows = [
        [
            one.name,
            str(one.n_read),
            f"{one.score.value:+.2f}",
            f"{one.score.low:+.2f} to {one.score.high:+.2f}",
            str(one.n_standing_out),
        ]
        for one in found.sources
        if not one.has_few_rows
    ]
    parts = [table(["source", "rows read", "mean score", "95 %", "stand out"], rows)] if rows else []
    few = formatting.too_few_rows(found.sources)
    return parts + ([say(few)] if few else [])


def blind_section(story: ReportData) -> Html:
    """What the SAE, if there is one, cannot see, and the warnings of the checks before the forecast."""
    forecast, drift, policy = story.forecast, story.drift, story.settings.policy if story.settings else None
    limit = policy.max_unseen if policy else math.inf
    then = {d.name: d.sae_error_share for d in (forecast.train, *forecast.domains.values())} if forecast else {}
    now = {d.name: d.sae_error_share for d in (drift.latest.train, *drift.latest.domains.values())} if drift else {}
    order = [name for name in dict.fromkeys([*then, *now]) if name not in story.domains]
    rows = [
        [
            name_row(name, story.budgets),
            *(beyond(some.get(name, _NAN), limit, formatting.percent(some.get(name, _NAN))) for some in (then, now)),
        ]
        for name in [*order, *story.domains]
    ]
    parts = []
    if forecast:
        parts.append(
            say(
                (_UNEXPLAINED.format(formatting.percent(forecast.fvu)) if story.has_sae else "")
                + f"Unchanged weights, read in other batches, drift by {formatting.tiny(forecast.noise_floor)}, the noise floor: "
                "what is near that is no drift at all."
            )
        )
    if rows and story.has_sae:
        rule = (
            f" \u25b2: more than {formatting.percent(limit)}. Harm is judged by answers, of which all is seen." if policy else ""
        )
        parts += [
            say("Share of the change of activations that the SAE cannot express, so that no score above sees it." + rule),
            table(["domain", "by examples, before training", "by training, at the last check"], rows),
        ]
    if forecast and forecast.checks:
        warned = [check for check in forecast.checks if check.status != "pass"]
        passed = [check for check in forecast.checks if check.status == "pass"]
        parts.append(tag("h3", "Checks before the forecast"))
        parts.append(_checks(warned) if warned else say("All passed."))
        parts.append(more(f"{formatting.counted(len(passed), 'check')} passed", _checks(passed)) if passed else join())
    return section("blind-spots", "Blind spots", *(parts or [say("Nothing about this can be read in this run's folder.")]))


def left_out_section(story: ReportData) -> Html:
    """How much text the numbers are based on, and what was left out."""
    forecast, drift = story.forecast, story.drift
    title = "What was measured, masked and cut"
    if forecast is None:
        return section("left-out", title, say("That stands in the forecast, which cannot be read."))
    later = {d.name: d.n_masked for d in (drift.latest.train, *drift.latest.domains.values())} if drift else {}
    limit = story.settings.policy.max_masked_share if story.settings else math.inf
    rows = []
    for d in (forecast.train, *(forecast.domains[name] for name in story.domains if name in forecast.domains)):
        share = d.n_masked / max(1, d.n_masked + d.n_tokens)
        masked = beyond(share, math.nextafter(limit, math.inf), f"{d.n_masked} ({formatting.percent_1(share)})")
        rows.append(
            [
                name_row(d.name, story.budgets),
                str(d.n_queries),
                str(d.n_tokens),
                str(d.n_answer_tokens),
                masked,
                str(d.n_cut),
                str(later.get(d.name, formatting.UNKNOWN)),
            ]
        )
    return section(
        "left-out",
        title,
        say(
            "Intervals are over queries: the fewer, the wider. Attention sinks, tokens with a norm of many times the median, "
            "would drown everything else and are masked."
        ),
        table(["domain", "queries", "tokens", "answer tokens", "masked", "cut", "masked since"], rows),
        meanings(
            ("masked", "query tokens left out as attention sinks, and their share"),
            ("cut", "queries or answers longer than max_tokens, which were cut"),
            ("masked since", "tokens that have become attention sinks by the last check"),
        ),
    )


def _feature(feature: FeatureRow) -> Html:
    words = feature.words
    roles = []
    if feature.forecast_rank:
        roles.append(f"number {feature.forecast_rank} of the forecast's")
    if feature.moved_rank:
        roles.append(f"number {feature.moved_rank} of those that moved most")
    head = tag(
        "h3",
        f"Feature {words.feature}",
        tag("small", f" {', '.join([*roles, formatting.percent_1(words.share) + ' of the whole'])}"),
    )
    first, *others = words.snippets.items() or [("", ())]
    quoted = [tag("li", _quoted(snippet)) for snippet in first[1][:_N_QUOTED]]
    rows = [[domain(name), join(*(_quoted(snippet) for snippet in some[:1]))] for name, some in others if some]
    silent = [name for name, some in words.snippets.items() if not some]
    return tag(
        "article",
        head,
        *([tag("p", words.link, class_="address")] if words.link else []),
        tag("ul", *quoted, class_="quotes") if quoted else join(),
        more(f"In {formatting.counted(len(rows), 'domain')}", table(["domain", "where it is most active"], rows, cls="words"))
        if rows
        else join(),
        say(f"It is active nowhere in {formatting.listing(silent)}.") if silent else join(),
        class_="feature",
    )


def _quoted(snippet: Snippet) -> Html:
    before, token, after = (part.replace("\n", "\u21b5") for part in (snippet.before, snippet.token, snippet.after))
    seen = token if token.strip() else "\u2423"  # a visible space
    return tag("span", f"\u2026{before}", tag("mark", seen), f"{after}\u2026", class_="quote", dir="auto")


def _checks(checks: list[Check]) -> Html:
    rows = [[c.name, c.status, c.found, c.remedy] for c in checks]
    return table(["check", "status", "found", "what to do"], rows, cls="words")
