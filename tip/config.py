"""The optional `tip` section of a pair file. `python -m tip.config` prints the JSON schema of pair files."""

import json
from typing import Annotated, Literal

from opd.config import doc, schema, strict

RuleName = Literal["all", "random", "entropy_sampling", "entropy_topk", "soft_or"]
Quantile = Annotated[float, doc("", gt=0, le=1)]


@strict
class TipConfig:
    """Token selection; every key has a default, so a pair file needs no such section."""

    rule: Annotated[
        RuleName,
        doc(
            "Which tokens are kept. all; random (control); entropy_sampling: probability proportional to student entropy; "
            "entropy_topk; soft_or: top of h + d - h d. TIP, arXiv 2604.14084."
        ),
    ] = "soft_or"
    retention: Annotated[float, doc("Share of the response tokens kept. Paper: 0.5, 0.2, 0.1.", gt=0, le=1)] = 0.5
    budget: Annotated[
        Literal["per_rollout", "per_update"],
        doc("Where the share is counted: floor(retention * m) tokens of each rollout (paper), or of the whole update."),
    ] = "per_rollout"
    entropy_clip_quantile: Annotated[
        Quantile | None,
        doc("Entropy is capped at this quantile of the update before normalising. null: no cap. Paper: 0.98."),
    ] = 0.98
    divergence_clip_quantile: Annotated[
        Quantile | None, doc("The same for divergence. Paper: null; one outlier then squeezes the axis.")
    ] = None
    aggregation: Annotated[
        Literal["token_mean", "rollout_mean"],
        doc(
            "token_mean: mean over all kept tokens of the update; rollout_mean: mean of per-rollout means. "
            "Not stated in the paper."
        ),
    ] = "token_mean"


SECTIONS = {"tip": TipConfig}

if __name__ == "__main__":
    print(json.dumps(schema(SECTIONS), indent=1))
