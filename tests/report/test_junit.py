"""JUnit XML: what CI systems are told of each protected domain, and that they can read it."""

from __future__ import annotations

from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from samples import domain_forecast, estimate, forecast
from sts_callback.config import PolicyConfig
from sts_callback.policy import Judgement, judge_domains, judge_forecast
from sts_callback.report.junit import junit_xml

NAN = float("nan")
HARMED = {"sts_net": 0.75, "nll_change": estimate(0.5, 0.25, 0.75)}
UNSURE = {"sts_net": 0.75, "nll_change": estimate(0.5, -0.25, 0.75)}
JUDGED: dict[str, Judgement] = {
    "law": Judgement("no-go", "expected to move."),
    "code": Judgement("go", "expected to stay."),
    "health": Judgement("cannot tell", "no weight at or below ..."),
    "math": Judgement("cannot tell", "direction unsure."),
}


class Element(NamedTuple):
    required: set[str]
    optional: set[str]
    children: tuple[str, ...]  # in this order


# What Jenkins' and the Ant schema have in common; the parsers of GitLab and the GitHub actions take less or anything.
RESULT = Element(set(), {"message", "type"}, ())
LAYOUT = {
    "testsuites": Element(set(), {"name", "tests", "failures", "errors", "time"}, ("testsuite",)),
    "testsuite": Element(
        {"name", "tests", "failures", "errors"}, {"skipped", "time"}, ("properties", "testcase", "system-out", "system-err")
    ),
    "properties": Element(set(), set(), ("property",)),
    "property": Element({"name", "value"}, set(), ()),
    "testcase": Element({"classname", "name"}, {"time"}, ("skipped", "error", "failure", "system-out", "system-err")),
    "failure": RESULT,
    "error": RESULT,
    "system-out": Element(set(), set(), ()),
}


def misplaced(element: ElementTree.Element) -> list[str]:
    """What in an element is not in the usual layout."""
    known = LAYOUT[element.tag]
    found = [f"{element.tag} lacks {name}" for name in known.required - set(element.attrib)]
    found += [f"{element.tag} has {name}" for name in set(element.attrib) - known.required - known.optional]
    tags = [child.tag for child in element]
    found += [f"{tag} in {element.tag}" for tag in tags if tag not in known.children]
    if not found and tags != sorted(tags, key=known.children.index):
        found.append(f"order in {element.tag}")
    return found + [what for child in element if child.tag in known.children for what in misplaced(child)]


def read(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text.encode())
    assert misplaced(root) == []
    return root


def judged_by(*domains: str) -> dict[str, Judgement]:
    return {name: JUDGED[name] for name in domains}


def made(judged: dict[str, Judgement], **changes: object) -> ElementTree.Element:
    return read(junit_xml(judged, forecast(*(domain_forecast(name, **changes) for name in judged))))


def test_every_protected_domain_is_a_test_case_with_its_reason() -> None:
    root = made(JUDGED)
    cases = {case.attrib["name"]: case for case in root.iter("testcase")}
    assert list(cases) == list(JUDGED)
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        "law": ["failure"],
        "code": ["system-out"],
        "health": ["error"],
        "math": ["error"],
    }
    for name in ("law", "health", "math"):
        (result,), (decision, reason, _) = cases[name], JUDGED[name]
        assert result.attrib == {"message": f"{decision}: {reason}", "type": decision}
        assert result.text == result.attrib["message"]  # which GitLab shows; Jenkins shows the attribute


@pytest.mark.parametrize(
    ("domains", "counts"),
    [(("code",), "100"), (("law",), "110"), (("math", "health"), "202"), (("law", "code", "math"), "311"), ((), "000")],
)
def test_the_counts_are_those_of_the_cases(domains: tuple[str, ...], counts: str) -> None:
    root = made(judged_by(*domains))
    for element in (root, root[0]):
        assert "".join(element.attrib[name] for name in ("tests", "failures", "errors")) == counts


def test_scores_are_properties_of_the_suite() -> None:
    root = made(judged_by("law", "code"), sts_net=0.25, nll_change=estimate(0.125, -0.5, 0.75), sae_error_share=NAN)
    found = {one.attrib["name"]: one.attrib["value"] for one in root.iter("property")}
    assert found.items() >= {"model": "tiny-llama", "sae": "tiny-sae", "hook_name": "blocks.2.hook_resid_post"}.items()
    for name in ("law", "code"):
        assert (found[f"{name}.transfer"], found[f"{name}.nll_change"], found[f"{name}.nll_change_low"]) == (
            "0.25",
            "0.125",
            "-0.5",
        )
        assert found[f"{name}.unseen"] == "unknown"


def test_without_a_forecast_all_domains_are_errors_and_there_are_no_scores() -> None:
    root = read(junit_xml({name: Judgement("cannot tell", "explained variance: none.") for name in ("law", "code")}, None))
    assert [child.tag for case in root.iter("testcase") for child in case] == ["error", "error"]
    assert not list(root.iter("property"))


@pytest.mark.parametrize("name", ["a<b>&\"'", "\x1b[31mred\x00", "\ud800", "法律", "two\nlines", "]]>"])
def test_any_name_and_reason_make_valid_xml(name: str) -> None:
    root = read(junit_xml({name: Judgement("no-go", f"because of {name}.")}, forecast(domain_forecast(name))))
    (case,) = root.iter("testcase")
    assert len(case.attrib["name"]) == len(name)
    if name.isprintable():
        assert case.attrib["name"] == name and f"because of {name}." in case[0].attrib["message"]


def test_domains_are_decided_as_the_verdict_decides_them() -> None:
    domains = [domain_forecast("law", **HARMED), domain_forecast("code"), domain_forecast("math", **UNSURE)]
    made, policy = forecast(*domains), PolicyConfig(dict.fromkeys(("law", "code", "math"), 0.1))
    judged = judge_domains(made, policy)
    assert {name: found.decision for name, found in judged.items()} == {"law": "no-go", "code": "go", "math": "cannot tell"}
    verdict = judge_forecast(made, policy)
    assert (verdict.decision, verdict.threatened) == ("no-go", ("law",))
    assert verdict.reasons == {name: reason for name, (_, reason, _) in judged.items()}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (("<testcase ", '<testcase status="run" '), "testcase has status"),
        (('classname="sts-callback.forecast" ', ""), "testcase lacks classname"),
        (("system-out", "note"), "note in testcase"),
    ],
)
def test_the_layout_check_can_fail(change: tuple[str, str], what: str) -> None:
    text = junit_xml(judged_by("code"), None).replace(*change)
    assert misplaced(ElementTree.fromstring(text.encode())) == [what]
