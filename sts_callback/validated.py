"""What forecasts were worth in our own validation, told to those who read one; numbers of examples/validation/RESULTS.md."""

WHAT_HOLDS = (
    "In our validation (8 LoRA runs on 4 data sets, 20 domains, one small model) transfer ordered domains by how far they then "
    "moved (Spearman 0.57), but nothing told harm: of domains with a go, training harmed 15% at a gentle rate and 79% at a harsh "
    "one. Make a pilot run, and let the checks watch."
)
