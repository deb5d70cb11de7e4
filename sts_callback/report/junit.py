"""A forecast as JUnit XML, the format in which CI systems read test results. Each protected domain is a test case.

Only elements and attributes of all dialects are used. Strict readers refuse properties of a test case, so scores are properties
of the suite, named `DOMAIN.SCORE`. The reason is in a result's `message`, which Jenkins and the GitHub actions show, and in its
text, which GitLab shows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from xml.etree import ElementTree

from sts_callback.policy import Judgement
from sts_callback.records import Decision, DomainForecast, Forecast

_SUITE = "sts-callback.forecast"
_RESULTS: dict[Decision, str] = {
    "no-go": "failure",
    # No answer is an error and not a skipped test: CI systems count skipped tests as passed ones or leave them out, and what was
    # not answered must not look as if it were in order. In the words of JUnit, an error is a test that could not be carried out.
    "cannot tell": "error",
}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(judged: Mapping[str, Judgement], forecast: Forecast | None) -> str:
    """Convert decisions to test results.

    Args:
        judged: decision and reason for each protected domain.
        forecast: the forecast; None if there could be none.

    Returns:
        An XML document with its declaration. A `no-go` is a failure, `cannot tell` an error.

    """
    results = [_RESULTS.get(found.decision) for found in judged.values()]
    counts = {
        "tests": str(len(results)),
        "failures": str(results.count("failure")),
        "errors": str(results.count("error")),
        "time": f"{forecast.seconds if forecast else 0.0:.3f}",
    }
    root = ElementTree.Element("testsuites", {"name": _SUITE, **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _SUITE, **counts, "skipped": "0"})
    if forecast is not None:
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in _properties(forecast, judged):
            ElementTree.SubElement(properties, "property", {"name": _valid(name), "value": _valid(value)})
    for domain, (decision, reason, _) in judged.items():
        case = ElementTree.SubElement(suite, "testcase", {"classname": _SUITE, "name": _valid(domain), "time": "0.000"})
        if decision in _RESULTS:
            told = {"message": _valid(f"{decision}: {reason}"), "type": decision}
            ElementTree.SubElement(case, _RESULTS[decision], told).text = told["message"]
        else:
            ElementTree.SubElement(case, "system-out").text = _valid(f"{decision}: {reason}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _properties(forecast: Forecast, judged: Mapping[str, Judgement]) -> Iterator[tuple[str, str]]:
    identity = forecast.identity
    yield from {"model": identity.model_name, "sae": identity.sae_name, "hook_name": identity.hook_name}.items()
    for domain in judged:
        for name, score in _scores(forecast.domains[domain]).items():
            yield f"{domain}.{name}", f"{score:.6g}" if math.isfinite(score) else "unknown"


def _scores(domain: DomainForecast) -> dict[str, float]:
    transfer, change = domain.transfer, domain.nll_change
    return {
        "transfer": transfer.value,
        "transfer_low": transfer.low,
        "transfer_high": transfer.high,
        "nll_change": change.value,
        "nll_change_low": change.low,
        "nll_change_high": change.high,
        "bits_change": domain.bits_change.value,
        "accuracy_change": domain.accuracy_change.value,
        "gradient_change": domain.gradient_change.value,
        "unseen": domain.sae_error_share,
        "n_queries": domain.n_queries,
    }


def _valid(text: str) -> str:
    """Replace characters that XML does not allow, such as control characters."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
