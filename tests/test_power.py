"""How many queries an alarm takes."""

from __future__ import annotations

import pytest

from sts_callback.config import PolicyConfig, ProbeConfig
from sts_callback.errors import CannotTell
from sts_callback.power import ENOUGH_QUERIES, fewest_queries, little_power, require_power, short_of_queries

POLICY = PolicyConfig({"law": 0.25})


@pytest.mark.parametrize(
    ("n_domains", "alpha", "n_looks", "n_queries"),
    # Student's quantiles at 0.005 / twice the normal one, 5.15: 9.92, 5.84, 4.60 with 2, 3, 4 degrees of freedom.
    [(1, 0.05, 10, 5), (0, 0.05, 10, 5), (1, 0.5, 1, 2), (5, 0.05, 10, 6), (20, 0.05, 10, 7), (20, 0.05, 20, 8)],
)
def test_fewest_queries_by_the_table_of_student(n_domains: int, alpha: float, n_looks: int, n_queries: int) -> None:
    assert fewest_queries(PolicyConfig({str(i): 0.1 for i in range(n_domains)}, alpha=alpha), n_looks) == n_queries


def test_probes_without_power_are_refused_with_what_it_takes() -> None:
    require_power({"law": 5, "code": 2}, POLICY)
    needed = r"^n_queries: law has 4; an alarm for one of 1 protected domains at one of 10 checks at alpha 0\.05 takes 5\. Give "
    with pytest.raises(CannotTell, match=needed):
        require_power({"law": 4, "code": 2}, POLICY)
    with pytest.raises(CannotTell, match=r"law has 5; .* at one of 100 checks at alpha 0\.05 takes 7\."):
        require_power({"law": 5}, POLICY, 100)
    assert short_of_queries({"law": ENOUGH_QUERIES - 1, "code": 2}, POLICY, ENOUGH_QUERIES) == {"law": 27}
    assert short_of_queries({"law": ENOUGH_QUERIES}, POLICY, ENOUGH_QUERIES) == {}


def test_little_power_is_warned_of_with_the_rows_that_it_takes_where_these_are_too_few() -> None:
    probes = ProbeConfig(n_queries=32, n_domain_demonstrations=5)
    told, rows = little_power({"law": 20, "code": 2}, POLICY, probes)
    assert told == "n_queries: law has 20; with fewer than 28 an alarm comes late or never."
    assert rows == "Of a domain's rows 5 are kept as examples: give it 33 or more."
    assert little_power({"law": 20}, POLICY, ProbeConfig(n_queries=20)) == [told]  # as many as were asked for
    assert little_power({"law": 28}, POLICY, probes) == []
