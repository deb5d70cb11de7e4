"""What forecasts and rehearsals were worth in our own validation, for readers of a forecast.

Numbers are from examples/validation/RESULTS.md and examples/validation/second/RESULTS.md.
"""

WHAT_HOLDS = (
    "How far to trust this: in our validation (24 LoRA runs on 8 data sets, 20 domains, one small model) transfer ordered "
    "domains by how far they then moved (Spearman 0.64, 95% interval 0.37 to 0.91, on four data sets that no choice was made "
    "on; raw, without an SAE, did as well), and harm by how they then fared (0.43, 0.02 to 0.84). No forecast can tell whether "
    "a domain will be harmed: of those with a go, training harmed 28% at a gentle rate and 85% at a harsh one. A check after 5 "
    "of 40 steps gave the right direction for 86% of clear changes; always guessing worse gives 75%. On five other data sets a "
    "rehearsal of five steps found 36 of 54 domains that harsh runs harmed, and 1 of 36 that long, gentle ones did. So "
    "rehearse, and let the checks watch."
)
