"""The slow metrics of latents, one file each; `run.run_suite` measures them."""

METRICS = (
    "latent_quality",
    "shrinkage",
    "progressive_code",
    "ablation_sparsity",
    "probe_loss",
    "absorption",
    "explanations",
    "steering",
    "attribution",
    "stability",
    "compute_equivalent",
)
"""`stability` is of several SAEs of one site, `compute_equivalent` needs checkpoints of the language model."""
